"""What the camera above the table sees: anti-aliased 64x64 frames, composed from cached sprites. Pure NumPy, no loop over tables.

Every shape is rasterised once for 4x4 positions within a pixel; a frame is a handful of small blends. The gripper is two fingers under a
bar. Their gap tells whether it is open, closed or closed around something; brightness, size and the distance of the shadow tell how
high it is.

Axes: N tables, H W pixels of the padded canvas, S sprite side, C = 3 S (colours interleaved with columns).
"""

import functools

import numpy as np
from numpy.lib.stride_tricks import as_strided

from vlakeep.tabletop.world import COLORS, SHAPES, SLOTS, STILL, TRAY, TabletopWorld

SIZE = 64  # pixels along a side of the frame
_PAD = 18  # room for sprites that overlap the border
_CANVAS = SIZE + 2 * _PAD
_SUB = 4  # sprite positions within a pixel, each way
_BLOCK = 256  # frames composed together: their canvases stay in the cache
_OBJECT, _GRIPPER, _SHADOW = 16, 32, 16  # sprite sides
_LEVELS = 9  # heights that the gripper is drawn at

_TABLE = np.array([176, 160, 138])
_TRAY_FLOOR, _TRAY_RIM = np.array([128, 112, 98]), np.array([84, 70, 60])
_FINGER_LOW, _FINGER_HIGH = np.array([22, 22, 30]), np.array([110, 236, 240])
_SHADOW_STRENGTH, _SHADOW_SHIFT = 0.25, 7.0  # opacity; pixels down and right of a gripper at height 1


def _coverage(inside, side: int) -> np.ndarray:
    """Share [SUB, SUB, side, side] of every pixel for which `inside(x, y)` holds, x y in pixels from the sprite's centre, 4x4 samples.

    The first two axes are the position of the centre within its pixel, y before x.
    """
    samples = (np.arange(4) + 0.5) / 4
    shift = (np.arange(_SUB) + 0.5) / _SUB
    line = (np.arange(side)[None, :, None] + samples - side / 2 - shift[:, None, None])  # [SUB, side, 4]
    y, x = line[:, None, :, None, :, None], line[None, :, None, :, None, :]
    return np.broadcast_to(inside(x, y), (_SUB, _SUB, side, side, 4, 4)).mean((-1, -2))


def _shape(name: str, shrink: float = 0.0):
    def inside(x, y):
        if name == "circle":
            return x * x + y * y <= (5.6 - shrink) ** 2
        if name == "square":
            return (np.abs(x) <= 5.0 - shrink) & (np.abs(y) <= 5.0 - shrink)
        if name == "triangle":  # apex up
            return (y <= 4.6 - shrink) & (np.abs(x) * 1.75 - y <= 6.2 - 2.0 * shrink)
        arm, half = 5.8 - shrink, 2.0 - shrink * 0.5
        return ((np.abs(x) <= half) & (np.abs(y) <= arm)) | ((np.abs(x) <= arm) & (np.abs(y) <= half))
    return inside


def _blend_tables(alpha: np.ndarray, rgb: np.ndarray):
    """(256 - alpha, alpha * colour), uint16, colours interleaved, so that a blend is (under * first + second) >> 8."""
    alpha256 = np.rint(alpha * 256)
    keep = np.repeat((256 - alpha256)[..., None], 3, axis=-1)
    paint = np.rint(alpha256[..., None] * rgb)
    return tuple(np.ascontiguousarray(t.reshape(*t.shape[:-2], -1).astype(np.uint16)) for t in (keep, paint))


@functools.lru_cache(maxsize=None)
def _object_tables():
    """keep [shapes, SUB, SUB, S, C] and paint [colours, shapes, SUB, SUB, S, C] of objects, each with a darker rim."""
    keeps, paints = [], []
    for name in SHAPES:
        alpha, core = _coverage(_shape(name), _OBJECT), _coverage(_shape(name, 1.0), _OBJECT)
        rim_share = 1 - core / np.maximum(alpha, 1e-9)
        per_colour = []
        for rgb in COLORS.values():
            keep, paint = _blend_tables(alpha, np.array(rgb) * (1 - 0.35 * rim_share[..., None]))
            per_colour.append(paint)
        keeps.append(keep)
        paints.append(per_colour)
    return np.stack(keeps), np.stack([np.stack(p) for p in zip(*paints)])


@functools.lru_cache(maxsize=None)
def _gripper_tables():
    """keep and paint [3 states (open, closed, holding), LEVELS, SUB, SUB, S, C] of the gripper."""
    keeps, paints = [], []
    for gap in (7.6, 1.6, 4.8):  # half distance of the fingers in pixels, at height 0
        for level in range(_LEVELS):
            height = level / (_LEVELS - 1)
            scale = 1.0 + 0.3 * height

            def inside(x, y, grow=0.0, gap=gap, scale=scale):
                x, y = np.abs(x) / scale, y / scale
                finger = (np.abs(x - gap) <= 1.5 + grow) & (y >= -6.6 - grow) & (y <= 4.4 + grow)
                bar = (x <= gap + 1.5 + grow) & (y >= -8.2 - grow) & (y <= -5.6 + grow)
                return finger | bar

            alpha, core = _coverage(lambda x, y: inside(x, y, 0.7), _GRIPPER), _coverage(inside, _GRIPPER)
            core_share = (core / np.maximum(alpha, 1e-9))[..., None]
            fill = _FINGER_LOW + (_FINGER_HIGH - _FINGER_LOW) * height
            keep, paint = _blend_tables(alpha, fill * core_share + 10.0 * (1 - core_share))
            keeps.append(keep)
            paints.append(paint)
    shape = (3, _LEVELS) + keeps[0].shape
    return np.stack(keeps).reshape(shape), np.stack(paints).reshape(shape)


@functools.lru_cache(maxsize=None)
def _shadow_tables():
    return _blend_tables(_SHADOW_STRENGTH * _coverage(lambda x, y: x * x + y * y <= 5.0**2, _SHADOW), np.zeros(3))


@functools.lru_cache(maxsize=None)
def _background() -> np.ndarray:
    """The empty table with its tray [CANVAS, CANVAS, 3] uint8."""
    lines = np.arange(_CANVAS)
    grain = ((lines * 7919) % 13 - 6)[:, None] * 0.7 + ((lines * 104729) % 7 - 3)[None, :] * 0.3  # boards, a fixed pattern
    image = _TABLE + grain[..., None]
    edge = _PAD + np.round((np.array(TRAY) - 0.125) * SIZE).astype(int)
    image[edge[1]:edge[1] + 16, edge[0]:edge[0] + 16] = _TRAY_RIM
    image[edge[1] + 1:edge[1] + 15, edge[0] + 1:edge[0] + 15] = _TRAY_FLOOR
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def _paste(canvas_NHW3: np.ndarray, centre_N2: np.ndarray, rows: np.ndarray, side: int, tables) -> None:
    """Blend one sprite of `side` pixels into each of the given rows, its centre at canvas pixels centre[rows] (x, y).

    tables: function (sub_y, sub_x) -> (keep, paint), each [rows, S, C].
    """
    centre = centre_N2[rows]
    cell = np.floor(centre).astype(np.int64)
    sub = np.minimum((centre - cell) * _SUB, _SUB - 1).astype(np.int64)
    corner = np.clip(cell - side // 2, 0, _CANVAS - side)
    n, s = canvas_NHW3.shape[0], canvas_NHW3.strides
    # Every window of the canvas as a view: indexing it gathers the pixels under the sprites, assigning scatters them.
    windows = as_strided(canvas_NHW3, (n, _CANVAS - side + 1, _CANVAS - side + 1, side, side * 3), (s[0], s[1], s[2], s[1], s[3]))
    keep, paint = tables(sub[:, 1], sub[:, 0])
    keep *= windows[rows, corner[:, 1], corner[:, 0]]
    keep += paint
    keep >>= np.uint16(8)
    windows[rows, corner[:, 1], corner[:, 0]] = keep.astype(np.uint8)


def render(world: TabletopWorld) -> np.ndarray:
    """Frames [N, 64, 64, 3] uint8 of the tables."""
    frames = np.empty((world.n, SIZE, SIZE, 3), np.uint8)
    for start in range(0, world.n, _BLOCK):
        block = np.arange(start, min(world.n, start + _BLOCK))
        frames[start:start + _BLOCK] = _render_block(world, block)
    return frames


def _render_block(world: TabletopWorld, block: np.ndarray) -> np.ndarray:
    n = len(block)
    everyone, held_N, height_N = np.arange(n), world.held_N[block], world.z_N[block]
    canvas = np.broadcast_to(_background(), (n, _CANVAS, _CANVAS, 3)).copy()
    object_keep, object_paint = _object_tables()
    # What was put down on something lies on top of it.
    moved_NK = np.abs(world.xy_NK2[block] - world.start_NK2[block]).max(-1) > STILL
    order_NK = np.argsort(moved_NK, axis=1, kind="stable")
    gripper_px = world.grip_N2[block] * SIZE + _PAD

    def paste_objects(rows, slots):
        colour, shape = world.color_NK[block[rows], slots], world.shape_NK[block[rows], slots]
        centres = np.zeros((n, 2))
        centres[rows] = world.xy_NK2[block[rows], slots] * SIZE + _PAD
        _paste(canvas, centres, rows, _OBJECT, lambda y, x: (object_keep[shape, y, x], object_paint[colour, shape, y, x]))

    for k in range(SLOTS):
        rows = np.flatnonzero(world.present_NK[block, order_NK[:, k]] & (order_NK[:, k] != held_N))
        paste_objects(rows, order_NK[rows, k])
    shadow_keep, shadow_paint = _shadow_tables()
    shadow_px = gripper_px + (_SHADOW_SHIFT * height_N)[:, None]
    _paste(canvas, shadow_px, everyone, _SHADOW, lambda y, x: (shadow_keep[y, x], shadow_paint[y, x]))
    holding = np.flatnonzero(held_N >= 0)
    paste_objects(holding, held_N[holding])
    keep, paint = _gripper_tables()
    state = np.where(held_N >= 0, 2, np.where(world.closed_N[block], 1, 0))
    level = np.rint(height_N * (_LEVELS - 1)).astype(np.int64)
    _paste(canvas, gripper_px, everyone, _GRIPPER, lambda y, x: (keep[state, level, y, x], paint[state, level, y, x]))
    return canvas[:, _PAD:-_PAD, _PAD:-_PAD]
