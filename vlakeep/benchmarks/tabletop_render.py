"""What the camera above the table sees: [N, 64, 64, 3] uint8, anti-aliased flat shapes, vectorised over tables.

The gripper is two fingers: their gap says open or closed, their length and brightness say how high it hangs. A held object grows
with its height.

Axes: N tables, H W pixels.
"""

import numpy as np

from vlakeep.benchmarks.tabletop_world import COLORS, RADIUS, SLOTS, TRAY, TRAY_RADIUS, TabletopWorld

SIZE = 64
TABLE = np.array([198, 186, 166], dtype=np.float32)
TRAY_FILL, TRAY_EDGE = np.array([150, 140, 128], dtype=np.float32), np.array([96, 88, 80], dtype=np.float32)
_PALETTE = np.array(list(COLORS.values()), dtype=np.float32)
_CENTRES = ((np.arange(SIZE) + 0.5) / SIZE).astype(np.float32)
WINDOW = 18  # pixels around an object that it can touch


def _coverage(distance: np.ndarray) -> np.ndarray:
    """Signed distance (in table units, negative inside) to pixel coverage in [0, 1]."""
    return np.clip(0.5 - distance * SIZE, 0, 1)


def _distance(dx, dy, radius, shape):
    """Signed distances of the four shapes, chosen per table."""
    ax, ay = np.abs(dx), np.abs(dy)
    circle = np.hypot(dx, dy) - radius
    square = np.maximum(ax, ay) - 0.88 * radius
    triangle = np.maximum(dy - 0.75 * radius, 0.89 * ax - 0.45 * dy - 0.62 * radius)
    arm = 0.38 * radius
    cross = np.minimum(np.maximum(ax - radius, ay - arm), np.maximum(ax - arm, ay - radius))
    return np.choose(shape[:, None, None], [circle, square, triangle, cross])


def _background() -> np.ndarray:
    image = np.tile(TABLE, (SIZE, SIZE, 1))
    grain = 4.0 * np.sin(np.arange(SIZE) * 0.9)[:, None, None]
    image = image + grain
    distance = np.maximum(np.abs(_CENTRES[None, :] - TRAY[0]), np.abs(_CENTRES[:, None] - TRAY[1])) - 0.9 * TRAY_RADIUS
    edge, fill = _coverage(distance)[..., None], _coverage(distance + 0.025)[..., None]
    image = image * (1 - edge) + TRAY_EDGE * edge
    return (image * (1 - fill) + TRAY_FILL * fill).astype(np.float32)


_BACKGROUND = _background()


def _paint(images, rows, x, y, half, coverage_of, color):
    """Blend a colour over a window around (x, y) in the chosen images; the window may hang over the edge."""
    if not len(rows):
        return
    side = 2 * half
    left = np.floor(x * SIZE).astype(int) - half
    top = np.floor(y * SIZE).astype(int) - half
    columns, lines = left[:, None] + np.arange(side), top[:, None] + np.arange(side)
    dx = ((columns + 0.5) / SIZE - x[:, None])[:, None, :].astype(np.float32)
    dy = ((lines + 0.5) / SIZE - y[:, None])[:, :, None].astype(np.float32)
    alpha = coverage_of(dx, dy)
    inside = ((columns >= 0) & (columns < SIZE))[:, None, :] & ((lines >= 0) & (lines < SIZE))[:, :, None]
    alpha = (alpha * inside)[..., None]
    i, c, r = rows[:, None, None], np.clip(columns, 0, SIZE - 1)[:, None, :], np.clip(lines, 0, SIZE - 1)[:, :, None]
    # Clipped indices repeat at the border with alpha 0; writing through the unclipped mask keeps them from overwriting each other.
    patch = images[i, r, c]
    blended = patch * (1 - alpha) + color[:, None, None, :] * alpha
    where = np.broadcast_to(inside, blended.shape[:3])
    full_i, full_r, full_c = (np.broadcast_to(v, where.shape)[where] for v in (i, r, c))
    images[full_i, full_r, full_c] = blended[where]


def render(world: TabletopWorld) -> np.ndarray:
    """uint8 [N, 64, 64, 3]."""
    images = np.tile(_BACKGROUND, (world.n, 1, 1, 1))
    rows = np.arange(world.n)
    held_NK = world.held_N[:, None] == np.arange(SLOTS)
    for lifted in (False, True):  # what hangs in the gripper covers what lies on the table
        for slot in range(SLOTS):
            pick = rows[world.present_NK[:, slot] & (held_NK[:, slot] == lifted)]
            radius = (RADIUS * (1 + 0.25 * world.z_N[pick] * lifted)).astype(np.float32)[:, None, None]
            shape = world.shape_NK[pick, slot]
            color = _PALETTE[world.color_NK[pick, slot]]
            x, y = world.xy_NK2[pick, slot].T
            _paint(images, pick, x, y, WINDOW // 2, lambda dx, dy: _coverage(_distance(dx, dy, radius, shape)), color)
    gap = np.where(world.closed_N, 0.028, 0.075).astype(np.float32)[:, None, None]
    length = (0.05 + 0.06 * world.z_N).astype(np.float32)[:, None, None]
    shade = np.float32([25, 25, 30]) + np.float32([215, 220, 225]) * world.z_N[:, None].astype(np.float32)

    def fingers(widen):
        return lambda dx, dy: _coverage(np.maximum(np.abs(np.abs(dx) - gap) - 0.016 - widen, np.abs(dy) - length - widen))

    x, y = world.grip_N2.T
    _paint(images, rows, x, y, 10, fingers(0.014), np.tile(np.float32([15, 15, 20]), (world.n, 1)))
    _paint(images, rows, x, y, 10, fingers(0.0), shade.astype(np.float32))
    return np.clip(np.rint(images), 0, 255).astype(np.uint8)
