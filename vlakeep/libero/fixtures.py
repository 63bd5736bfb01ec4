"""Skills of the scripted expert for things that are not carried: drawers, the stove's knob, a plate that is pushed, a bowl that is in
the way.

Every skill is a generator of actions, as in libero_expert.py; `expert` is the Expert whose hand it moves.
"""

import numpy as np

from vlakeep.libero.grasp import RIMMED, TIGHT, room_to_lift
from vlakeep.libero.scene import Boxes, clearance, direction, rotation_about, same_line, separation, turn

OPEN, CLOSED = -1.0, 1.0
SLIDE, HINGE = 2, 3  # mujoco's numbers of joint types
LEANING = 0.9  # rad by which the hand that closes a drawer ends oblique
PULLED = 0.155  # a drawer counts as open from 0.14 on; its end is at 0.16


def _joint_of(scene, region: str) -> int:
    """Number of the joint that moves a region (a drawer's inside)."""
    joint, = scene.env.object_sites_dict[region].joints
    return scene.model.joint(joint).id


def drawer_opening(scene, region: str) -> float:
    """How far the drawer is pulled out."""
    return float(abs(scene.data.qpos[scene.model.jnt_qposadr[_joint_of(scene, region)]]))


def _opens_towards(scene, joint: int) -> np.ndarray:
    """Unit vector [3]."""
    return scene.data.xaxis[joint] * np.sign(scene.model.jnt_range[joint].sum())


def is_drawer(scene, region: str) -> bool:
    """Whether a region slides."""
    site = scene.env.object_sites_dict.get(region)
    return bool(site is not None and site.joints) and scene.model.jnt_type[_joint_of(scene, region)] == SLIDE


def open_drawer(expert, region: str):
    """Take the handle with a level hand, fingers above and below it, and pull along the joint."""
    scene, home = expert.scene, (expert.scene.hand(), expert.scene.upright())
    handle, out_3 = _handle(scene, region)
    expert.rotation = _level_hand(scene, -out_3)
    yield from expert.go(handle() + 0.16 * out_3 + [0, 0, 0.10], OPEN, within=0.02, steps=70)
    yield from expert.go(handle() + 0.10 * out_3, OPEN, within=0.012, steps=40)
    yield from expert.go(handle, OPEN, within=0.006, steps=40, slow=0.6)
    yield from expert.hold(scene.hand(), CLOSED, 8)
    for _ in range(60):
        if drawer_opening(scene, region) > PULLED:
            break
        yield expert.towards(scene.hand() + 0.05 * out_3, CLOSED, slow=0.8)
    place = scene.hand()
    yield from expert.hold(place, OPEN, 5)
    yield from expert.go(place + 0.08 * out_3, OPEN, within=0.02, steps=20)
    # Back the way it came: from other places the arm returns to a vertical hand with a joint at its limit.
    yield from expert.go(scene.hand() + [0, 0, 0.10], OPEN, within=0.03, steps=20)
    expert.rotation = home[1]
    yield from expert.go(home[0], OPEN, within=0.03, steps=60)


def close_drawer(expert, region: str):
    """Push the handle in, a bit further than where the drawer looks closed. The hand comes down vertically, away from what stands
    in front, and leans over as it pushes, away from the handles above."""
    scene = expert.scene
    handle, out_3 = _handle(scene, region)
    across_3 = np.cross([0, 0, 1.0], out_3)
    vertical = turn(scene.wrist_turn(np.arctan2(across_3[1], across_3[0]) - scene.finger_angle(), handle())) @ scene.upright()
    expert.rotation = vertical
    yield from expert.go(handle() + 0.05 * out_3 + [0, 0, 0.13], CLOSED, within=0.02, steps=80)
    yield from expert.go(handle() + 0.05 * out_3, CLOSED, within=0.012, steps=50)
    for _ in range(140):
        if scene.holds(("close", region)):
            break
        inwards = 1 - drawer_opening(scene, region) / PULLED
        expert.rotation = rotation_about(across_3, LEANING * max(0.0, min(1.0, 1.3 * inwards))) @ vertical
        yield expert.towards(handle() - 0.05 * out_3, CLOSED, slow=0.6)
    yield from expert.go(scene.hand() + 0.05 * out_3 + [0, 0, 0.05], CLOSED, within=0.02, steps=20)


def free_spot(scene, name: str, region: str) -> np.ndarray:
    """Offset [2] from the middle of a drawer at which a thing comes past what is above the drawer; what is open may be half
    covered."""
    site, corners = scene.position(region), scene.corners(name)
    span, boxes = np.ptp(corners, axis=0), scene.obstacles(name)
    half = np.r_[0.45 * span[:2], 0.15]  # a round thing does not fill the corners of its box
    reach = np.abs(scene.data.site(region).xmat.reshape(3, 3) @ np.array(scene.env.object_sites_dict[region].size))[:2] - 0.01
    options = []
    for offset in (reach * [u, v] for u in np.linspace(-1, 1, 13) for v in np.linspace(-1, 1, 13)):
        middle = np.r_[site[:2] + offset, site[2] + half[2] - 0.01]
        free = separation(Boxes(middle[None], np.eye(3)[None], half[None]), boxes)
        options.append((min(free, 0.01) - 0.02 * np.linalg.norm(offset), tuple(offset)))
    return np.array(max(options)[1])


def _handle(scene, region: str):
    """(function that gives the middle of the handle, the direction [3] in which the drawer opens): the handle is the collision
    box of the drawer that lies furthest out."""
    joint = _joint_of(scene, region)
    out_3 = _opens_towards(scene, joint)
    body = int(scene.model.jnt_bodyid[joint])
    geoms = [g for g in range(scene.model.ngeom) if scene.model.geom_bodyid[g] == body and scene.model.geom_group[g] == 0]
    bar = max(geoms, key=lambda g: scene.data.geom_xpos[g] @ out_3)
    return lambda: scene.data.geom_xpos[bar].copy(), out_3


def _level_hand(scene, forward_3: np.ndarray) -> np.ndarray:
    """Rotation of a hand that points along a horizontal direction, fingers above each other; the nearer one of the two."""
    local_fingers = scene.hand_rotation().T @ np.r_[direction(scene.finger_angle()), 0]
    options = []
    for sign in (-1, 1):
        up_3 = np.array([0, 0, float(sign)])
        world = np.stack([up_3, np.cross(forward_3, up_3), forward_3], axis=1)  # finger line, third, pointing direction
        local = np.stack([local_fingers, np.cross([0, 0, 1.0], local_fingers), [0, 0, 1.0]], axis=1)
        options.append(world @ local.T)
    return max(options, key=lambda rotation: np.trace(rotation.T @ scene.hand_rotation()))


def turn_knob(expert, name: str):
    """Take the stove's knob across its ridge and turn it on."""
    scene = expert.scene
    hinges = [j for j in range(scene.model.njnt) if scene.model.jnt_type[j] == HINGE]
    joint = next(j for j in hinges if scene.model.joint(j).name.startswith(name))
    at = scene.data.xanchor[joint].copy()
    ridge = at + [0, 0, 0.030]
    expert.rotation = turn(same_line(np.pi / 2 - scene.finger_angle())) @ scene.upright()
    yield from expert.go(ridge + [0, 0, 0.10], OPEN, within=0.02, steps=70)
    yield from expert.go(ridge, OPEN, within=0.006, steps=40, slow=0.6)
    yield from expert.hold(ridge, CLOSED, 8)
    expert.rotation = turn(1.2) @ expert.rotation
    yield from expert.hold(ridge, CLOSED, 40)
    yield from expert.hold(ridge, OPEN, 6)
    yield from expert.rise(0.12, OPEN, within=0.02, steps=20)


def make_room(expert, name: str, region: str):
    """Drag a bowl or mug out of the way if, beside the drawer as it will be when open, no hand could get at it."""
    scene = expert.scene
    if not any(word in name for word in RIMMED):
        return
    boxes, corners = _when_open(scene, name, region), scene.corners(name)
    if room_to_lift(scene, name, np.zeros(2), boxes) > TIGHT:
        return
    here, low, radius = scene.position(name)[:2], corners[:, 2].min(), np.ptp(corners[:, 0]) / 2
    options = []
    for shift in (length * direction(angle) for length in (0.04, 0.06, 0.08, 0.10) for angle in np.arange(16) * np.pi / 8):
        way = here + np.linspace(0, 1, 5)[:, None] * shift
        free = clearance(np.c_[way, np.full(5, low + 0.02)], scene.obstacles(name)) - radius
        room = room_to_lift(scene, name, shift, boxes)
        options.append((min(free, 0.005) + 2 * room - 0.1 * np.linalg.norm(shift), shift))
    expert.rotation = scene.upright()
    goal = here + max(options, key=lambda option: option[0])[1]
    yield from _drag(expert, name, [goal], 0.025, lambda: np.linalg.norm(scene.position(name)[:2] - goal) < 0.012)


def _when_open(scene, name: str, region: str) -> Boxes:
    """The obstacles as they will be when the drawer is open."""
    joint = _joint_of(scene, region)
    body, shift = int(scene.model.jnt_bodyid[joint]), (PULLED - drawer_opening(scene, region)) * _opens_towards(scene, joint)
    moving = [g for g in range(scene.model.ngeom) if scene.model.geom_bodyid[g] == body]
    boxes = scene.obstacles(name)
    moved = [np.abs(scene.data.geom_xpos[moving] - centre).max(1).min() < 1e-6 for centre in boxes.centre]
    return boxes._replace(centre=boxes.centre + np.outer(moved, shift))


def push(expert, goal):
    """Drag a plate until the goal holds."""
    scene, (_, name, target) = expert.scene, goal
    way = _way(scene, name, target, np.ptp(scene.corners(name)[:, 0]) / 2)
    across = np.arctan2(*(way[0] - scene.position(name)[:2])[::-1]) + np.pi / 2
    expert.rotation = turn(same_line(across - scene.finger_angle())) @ scene.upright()
    yield from _drag(expert, name, way, 0.012, lambda: scene.holds(goal))


def _drag(expert, name: str, way, depth: float, done):
    """Drag a thing over the points [2] of `way` by the inside of its rim, the finger tips `depth` above its lower end: pulled
    from the front, it cannot turn away."""
    scene, corners = expert.scene, expert.scene.corners(name)
    low, radius = corners[:, 2].min(), np.ptp(corners[:, 0]) / 2

    def ahead():
        """Unit vector [2] to the next point of the way; points that are reached are dropped."""
        here = scene.position(name)[:2]
        while len(way) > 1 and np.linalg.norm(way[0] - here) < 0.02:
            way.pop(0)
        return (way[0] - here) / max(np.linalg.norm(way[0] - here), 1e-6)

    start = np.r_[scene.position(name)[:2] + 0.4 * radius * ahead(), low + depth]
    yield from expert.go(start + [0, 0, 0.10], CLOSED, within=0.02, steps=70)
    yield from expert.go(start, CLOSED, within=0.01, steps=30, slow=0.6)
    for _ in range(200):
        if done():
            break
        beyond = scene.position(name)[:2] + 1.1 * radius * ahead()  # the rim keeps the hand from getting there
        yield expert.towards(np.r_[beyond, start[2]], CLOSED, slow=0.6)
    yield from expert.rise(0.12, CLOSED, within=0.02, steps=20)


def _way(scene, name: str, target: str, radius: float):
    """Points [2] to pass: one of the target, before it one beside the straight line if that keeps the thing further from others."""
    here, boxes, height = scene.position(name)[:2], scene.obstacles(name), scene.position(name)[2] + 0.01
    inside = 0.5 * np.array(scene.env.object_sites_dict[target].size)[:2]
    options = []
    for there in (scene.position(target)[:2] + inside * corner for corner in ((0, 0), (-1, -1), (-1, 1), (1, -1), (1, 1))):
        along = (there - here) / np.linalg.norm(there - here)
        aside = direction(np.arctan2(*along[::-1]) + np.pi / 2)
        detours = [here + u * (there - here) + offset * aside for u in (0.2, 0.4, 0.6, 0.8, 1.0)
                   for offset in (-0.15, -0.12, -0.09, -0.06, -0.03, 0.03, 0.06, 0.09, 0.12, 0.15)]
        for points in ([there], *([detour, there] for detour in detours)):
            stops = [here, *points]
            passed = np.concatenate([a + np.linspace(0, 1, 9)[:, None] * (b - a) for a, b in zip(stops, stops[1:])])
            room = clearance(np.c_[passed, np.full(len(passed), height)], boxes) - radius
            far = max(scene.overreach(place + 0.02 * along) for place in passed)
            length = sum(np.linalg.norm(b - a) for a, b in zip(stops, stops[1:]))
            options.append((10 * min(room, 0.015) - 3 * far - 20 * max(0, far - 0.06) - 0.2 * length, len(options), points))
    return max(options)[2]
