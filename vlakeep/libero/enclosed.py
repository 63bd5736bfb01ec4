"""Skills of the scripted expert for what is open to one side, such as a microwave: put a mug in by its handle, shut the door.

Every skill is a generator of actions, as in libero_expert.py; `expert` is the Expert whose hand it moves.
"""

from typing import Optional, Tuple

import numpy as np

from vlakeep.libero.scene import Boxes, hand_boxes, rotation_about, separation, turn

OPEN, CLOSED = -1.0, 1.0
HINGE = 3  # mujoco's number of this joint type
LEANING = 0.9  # rad by which a hand that reaches into something leans over
SIDES = ((1.0, 0.0), (-1.0, 0.0), (0.0, 1.0), (0.0, -1.0))
SHOVE = 0.75  # where a door is pushed, in parts of its width from the hinge
AMPLE = 0.010  # more room than this is no better
WIDE = 0.15  # rad from its end at which a door is open enough
TALL = 0.4  # a thing that comes from above must find this height free


def _gap(half_3: np.ndarray, middle_3, way_3, boxes: Boxes) -> float:
    """Room of a thing of this half size with its middle at a place and on a straight way from there."""
    middle, half = middle_3 + np.array(way_3) / 2, half_3 - 0.004 + np.abs(way_3) / 2
    return separation(Boxes(middle[None], np.eye(3)[None], half[None]), boxes)


def _half_size(scene, name: str) -> np.ndarray:
    """[3] of a thing without its handle."""
    span = np.ptp(scene.corners(name), axis=0) / 2
    return np.r_[span[:2].min(), span[:2].min(), span[2]]


def open_side(scene, name: str, region: str) -> Optional[np.ndarray]:
    """Unit vector [3] to the side from which a thing comes into a region; None where it comes from above."""
    if scene.owner(region) not in scene.env.fixtures_dict or not scene.is_site(region):
        return None
    middle, half, boxes = scene.position(region), _half_size(scene, name), scene.obstacles(name)
    if _gap(half, middle, [0, 0, TALL], boxes) > 0:
        return None
    gap, side = max((_gap(half, middle, [0.25 * x, 0.25 * y, 0], boxes), (x, y)) for x, y in SIDES)
    return np.array([*side, 0.0]) if gap > 0 else None


def _leaning(scene, forward_3: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Rotation of a hand that points down and forward, its fingers on a level line across."""
    across_3 = np.cross(forward_3, [0, 0, 1.0])
    yaw = scene.wrist_turn(np.arctan2(across_3[1], across_3[0]) - scene.finger_angle(), at)
    return rotation_about(across_3, LEANING) @ turn(yaw) @ scene.upright()


def _hand_gap(at_3: np.ndarray, forward_3: np.ndarray, obstacles: Boxes) -> float:
    """Room of such a hand, open."""
    across_3 = np.cross(forward_3, [0, 0, 1.0])
    tilt = rotation_about(across_3, LEANING)
    boxes = hand_boxes(np.zeros(3), float(np.arctan2(across_3[1], across_3[0])))
    tilted = Boxes(at_3 + boxes.centre @ tilt.T, tilt @ boxes.rotation, boxes.half)
    return separation(tilted, obstacles)


def put_inside(expert, goal, out_3: np.ndarray):
    """Take a thing by its handle, if that is on the side that the opening faces, and bring it in level, just past the opening."""
    scene, (_, name, region) = expert.scene, goal
    forward_3 = -out_3
    grip = _handle(scene, name, out_3)
    if _inner_place(scene, name, region, out_3, _middle(scene, name) - grip)[0] < AMPLE:
        yield from _swing(expert, scene.owner(region), opening=True)
    pointing = np.cos(LEANING) * np.array([0, 0, -1.0]) + np.sin(LEANING) * forward_3
    expert.rotation = _leaning(scene, forward_3, grip)
    yield from expert.go(grip - 0.12 * pointing + [0, 0, 0.08], OPEN, within=0.02, steps=80)
    yield from expert.go(grip - 0.07 * pointing, OPEN, within=0.008, steps=50)
    yield from expert.go(grip, OPEN, within=0.005, steps=40, slow=0.5)
    yield from expert.hold(grip, CLOSED, 10)
    from_hand = _middle(scene, name) - scene.hand()
    _, goal_3 = _inner_place(scene, name, region, out_3, from_hand)
    yield from expert.go(scene.hand() + [0, 0, 0.06], CLOSED, within=0.02, steps=20)

    def shifted(back: float):
        return lambda: goal_3 + back * out_3 + scene.hand() - _middle(scene, name)

    yield from expert.go(shifted(0.16), CLOSED, within=0.012, steps=80)
    yield from expert.go(shifted(0.0), CLOSED, within=0.008, steps=60, slow=0.5)
    place = scene.hand()
    yield from expert.hold(place, OPEN, 6)
    yield from expert.go(place - 0.10 * pointing, OPEN, within=0.02, steps=30)
    yield from expert.go(scene.hand() + 0.08 * out_3 + [0, 0, 0.12], OPEN, within=0.03, steps=30)


def _middle(scene, name: str) -> np.ndarray:
    """[3] of a thing without its handle: its own origin, at half its height."""
    corners = scene.corners(name)
    return np.r_[scene.position(name)[:2], (corners[:, 2].min() + corners[:, 2].max()) / 2]


def _handle(scene, name: str, out_3: np.ndarray) -> np.ndarray:
    """Middle [3] of the part of a thing that lies furthest on one side."""
    boxes_N83 = scene.corners(name).reshape(-1, 8, 3)
    return max(boxes_N83.mean(1), key=lambda middle: middle @ out_3)


def _inner_place(scene, name: str, region: str, out_3: np.ndarray, from_hand: np.ndarray) -> Tuple[float, np.ndarray]:
    """(gap, middle [3] of the thing) where it is inside, low, not further in than needed, and the hand has room on its way."""
    site = scene.position(region)
    reach = np.abs(scene.data.site(region).xmat.reshape(3, 3) @ np.array(scene.env.object_sites_dict[region].size))
    across_3 = np.array([-out_3[1], out_3[0], 0.0])
    half, mouth, boxes = _half_size(scene, name), reach @ np.abs(out_3), scene.obstacles(name)
    options = []
    for offset in np.linspace(-0.1, 0.1, 11):
        for depth in np.linspace(0, mouth, 6):
            for height in np.linspace(half[2], 2 * reach[2] - half[2], 8) - reach[2]:
                middle = site + offset * across_3 + depth * out_3 + [0, 0, height]
                hand = min(_hand_gap(middle - from_hand + back * out_3, -out_3, boxes) for back in (0.0, 0.08, 0.16))
                free = min(_gap(half, middle, 0.2 * out_3, boxes), hand)
                inside = mouth - half[0] - depth
                options.append((min(free, AMPLE) + 3 * min(inside, 0.0) - 0.02 * abs(offset) - 0.05 * height, free, tuple(middle)))
    _, free, middle = max(options)
    return free, np.array(middle)


def shut_door(expert, fixture: str):
    """Until the simulator says that it is shut."""
    yield from _swing(expert, fixture, opening=False)


def _swing(expert, fixture: str, opening: bool):
    """Push a hinged door, from outside until it is shut or from inside until it is wide open, with the closed finger tips, the palm
    above its upper edge."""
    scene = expert.scene
    joint = next((j for j in range(scene.model.njnt)
                  if scene.model.jnt_type[j] == HINGE and scene.model.joint(j).name.startswith(fixture)), None)
    if joint is None:
        return
    body, axis_3 = int(scene.model.jnt_bodyid[joint]), scene.data.xaxis[joint].copy()
    widest = max(scene.model.jnt_range[joint], key=abs)
    panel = max((g for g in range(scene.model.ngeom) if scene.model.geom_bodyid[g] == body and scene.model.geom_group[g] == 0),
                key=lambda g: np.prod(scene.model.geom_size[g]))
    width, thick = 2 * scene.model.geom_size[panel].max(), scene.model.geom_size[panel].min()
    hinge = scene.data.xanchor[joint].copy()

    def beside(gap: float):
        """Where the hand is when its fingers are `gap` from the door's face that it pushes."""
        along = (scene.data.geom_xpos[panel] - hinge) * [1, 1, 0]
        along /= np.linalg.norm(along)
        ahead = np.cross(axis_3, along) * np.sign(widest) * (1 if opening else -1)
        place = hinge + SHOVE * width * along - (thick + 0.012 + gap) * ahead
        return np.r_[place[:2], scene.data.geom_xpos[panel][2] + scene.model.geom_size[panel][2] - 0.018]

    def done():
        angle = scene.data.qpos[scene.model.jnt_qposadr[joint]]
        return abs(widest - angle) < WIDE if opening else scene.holds(("close", fixture))

    expert.rotation = scene.upright()
    yield from expert.go(np.r_[scene.hand()[:2], beside(0)[2] + 0.12], CLOSED, within=0.03, steps=40)
    yield from expert.go(beside(0.05) + [0, 0, 0.12], CLOSED, within=0.02, steps=80)
    yield from expert.go(beside(0.05), CLOSED, within=0.012, steps=40)
    for _ in range(150):
        if done():
            break
        yield expert.towards(beside(-0.05), CLOSED, slow=0.7)
    yield from expert.rise(0.10, CLOSED, within=0.02, steps=15)
