"""Where to take hold of a thing: bowls and mugs at the rim, boxes and cans across their narrow side.

Candidates are weighed by the room that the hand has, at the grasp and where it will let go, by the reach of the arm and by
how far the hand must turn.
"""

from typing import NamedTuple, Optional, Tuple

import numpy as np

from vlakeep.libero.scene import Boxes, Scene, direction, hand_boxes, narrow_side, same_line, separation, turn

RIMMED = ("bowl", "ramekin", "mug")
ENOUGH = 0.012  # more room than this is no better
TIGHT = 0.003
WIDEST = 0.072  # what fits between the fingers
PALM = 0.029  # from the finger tips' middle to the palm, which must not stand on the thing
BITS_83 = np.array([[i, j, k] for i in (0, 1) for j in (0, 1) for k in (0, 1)], dtype=bool)  # corners of a box, as Scene gives them
BARELY = 0.077  # what still does if the hand comes down exactly
ANGLES = 24  # rim positions that are looked at


class Release(NamedTuple):
    """Where the thing will be put down: its centre [2], the height of the surface, and what that belongs to."""

    xy: np.ndarray
    height: float
    owner: Optional[str]


class Grasp(NamedTuple):
    """Grip site at (xy, z) with this rotation of the hand; `top` of the thing, `above` its lower end by z; how exactly to aim."""

    xy: np.ndarray
    z: float
    rotation: np.ndarray
    top: float
    above: float
    within: float = 0.010


def plan_grasp(scene: Scene, name: str, attempt: int = 0, release: Optional[Release] = None) -> Grasp:
    """The best grasp of a thing as it lies now; attempt 1, 2, ... give other ones. ValueError when it has no collision boxes."""
    rimmed = any(word in name for word in RIMMED)
    angle, xy, z, low, top, *within = (_at_the_rim if rimmed else _across)(scene, name, attempt, release)
    return Grasp(xy, z, turn(scene.wrist_turn(angle - scene.finger_angle(), xy)) @ scene.upright(), top, z - low, *within)


def _room(points: float) -> float:
    """Cost of a clearance: little is bad, nearly none much worse."""
    return -100 * min(points, ENOUGH)


def _rim(scene: Scene, name: str) -> Tuple:
    """(centre [2], low, top, [(angle, xy [2], z, height of the rim there)]) of a bowl or mug: where fingers may go over its rim."""
    corners = scene.corners(name)
    low, top = corners[:, 2].min(), corners[:, 2].max()
    centre = (corners[:, :2].max(0) + corners[:, :2].min(0)) / 2
    upper = corners[corners[:, 2] > top - 0.012]
    radius = np.median(np.linalg.norm(upper[:, :2] - centre, axis=1))
    if top - low > 0.06:  # tilted: the highest corners are one side of the rim only
        radius = np.ptp(corners[:, :2], axis=0).mean() / 2
    places = []
    for angle in scene.finger_angle() + np.arange(ANGLES) * 2 * np.pi / ANGLES:
        xy = centre + (radius - 0.004) * direction(angle)
        near = corners[np.linalg.norm(corners[:, :2] - xy, axis=1) < 0.02]
        rim = near[:, 2].max() if len(near) else top
        places.append((angle, xy, max(rim - 0.022, low + 0.018), rim))
    return centre, low, top, places


def _at_the_rim(scene: Scene, name: str, attempt: int, release: Optional[Release]) -> Tuple:
    centre, low, top, places = _rim(scene, name)
    now, hand = scene.finger_angle(), scene.hand()[:2]
    here, there = scene.obstacles(name), scene.obstacles(name, release.owner if release else None)
    options = []
    for angle, xy, z, rim in places:
        free, far = separation(hand_boxes(np.r_[xy, z], angle), here), scene.overreach(xy)
        if release is not None:
            target = release.xy + xy - centre
            free = min(free, separation(hand_boxes(np.r_[target, release.height + z - low + 0.01], angle), there))
            far = max(far, scene.overreach(target))
        cost = (_room(free) + (6 if free < TIGHT else 0) + 8 * max(0, top - rim) + 0.25 * abs(scene.wrist_turn(angle - now, xy))
                + 0.5 * np.linalg.norm(xy - hand) + 12 * far)
        options.append((cost, angle, xy, z))
    options.sort(key=lambda option: option[0])
    if attempt:  # another one means another side, not the neighbouring angle
        options = _apart(options, 0.7)
    _, angle, xy, z = options[attempt % len(options)]
    return angle, xy, z, low, top


def room_to_lift(scene: Scene, name: str, shift_2: np.ndarray, boxes: Boxes) -> float:
    """Clearance of a bowl or mug that is moved by `shift_2`, of its way up, and of the best grasp there; at most ENOUGH."""
    corners = scene.corners(name) + np.r_[shift_2, 0]
    low, high = corners.min(0), corners.max(0) + [0, 0, 0.3]
    lifted = Boxes((low + high)[None] / 2, np.eye(3)[None], (high - low)[None] / 2)
    hands = [separation(hand_boxes(np.r_[xy + shift_2, z], angle), boxes) for angle, xy, z, _ in _rim(scene, name)[3]]
    return min(ENOUGH, separation(lifted, boxes), max(hands))


def _apart(options, least: float):
    """Options whose angles are at least `least` from those of all better ones."""
    kept = []
    for option in options:
        if all(abs((option[1] - other[1] + np.pi) % (2 * np.pi) - np.pi) > least for other in kept):
            kept.append(option)
    return kept


def _across(scene: Scene, name: str, attempt: int, release: Optional[Release]) -> Tuple:
    corners = scene.corners(name)
    low, top = corners[:, 2].min(), corners[:, 2].max()
    z = max(min(top - 0.026, (low + top) / 2 + 0.02), low + 0.012, top - PALM)
    if top - low < 0.05:
        z = max(low + 0.010, (low + top) / 2 - 0.004)
    elif top - low > 0.08:
        z -= 0.02 * (attempt % 3)
    slice_N2 = scene.corners(name, (z - 0.012, z + 0.012))[:, :2]
    narrow, width, centre = narrow_side(slice_N2)
    now, obstacles, options = scene.finger_angle(), scene.obstacles(name), []
    for angle in [now, narrow, narrow + np.pi / 2, *(now + k * np.pi / 8 for k in range(1, 8))]:
        opening = np.ptp(slice_N2 @ direction(angle))
        if opening <= WIDEST:
            oblique = 60 * max(0, opening - 1.05 * width)  # faces parallel to the pads hold better
            free = separation(hand_boxes(np.r_[centre, z], angle), obstacles)
            options.append((_room(free) + oblique + 0.25 * abs(same_line(angle - now)), angle))
    if options:
        flat = top - low < 0.05  # tall things are taken lower at the next attempt, flat ones at another angle
        return sorted(options)[attempt % len(options) if flat else 0][1], centre, z, low, top
    angle, centre = _between_handle_and_spout(scene, name, z) or (narrow, centre)
    return angle, centre, z, low, top, 0.003


def _between_handle_and_spout(scene: Scene, name: str, z: float) -> Optional[Tuple[float, np.ndarray]]:
    """(angle, centre [2]) of the easiest grasp of what is too wide as a whole: only what is between the fingers counts."""
    share = np.stack(np.meshgrid(*[np.linspace(0, 1, 7)] * 3, indexing="ij"), axis=-1).reshape(-1, 1, 3)
    weights_M8 = np.where(BITS_83, share, 1 - share).prod(2)
    points = np.einsum("mk,nki->nmi", weights_M8, scene.corners(name).reshape(-1, 8, 3)).reshape(-1, 3)
    points = points[np.abs(points[:, 2] - z) < 0.012, :2] - scene.position(name)[:2]
    now, obstacles, options = scene.finger_angle(), scene.obstacles(name), []
    for angle in now + np.arange(ANGLES) * np.pi / ANGLES:
        along = points[np.abs(points @ direction(angle + np.pi / 2)) < 0.012] @ direction(angle)
        if len(along) and np.ptp(along) <= BARELY:
            centre = scene.position(name)[:2] + direction(angle) * (along.max() + along.min()) / 2
            free = separation(hand_boxes(np.r_[centre, z], angle), obstacles)
            cost = _room(free) + 60 * np.ptp(along) + 0.25 * abs(scene.wrist_turn(angle - now, centre))
            options.append((cost, float(angle), centre))
    return min(options, key=lambda option: option[0])[1:] if options else None
