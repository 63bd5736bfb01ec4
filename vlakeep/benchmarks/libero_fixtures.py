"""Skills of the scripted expert for things that are not carried: drawers, the stove's knob, a plate that is pushed.

Every skill is a generator of actions, as in libero_expert.py; `expert` is the Expert whose hand it moves.
"""

import numpy as np

from vlakeep.benchmarks.libero_scene import clearance, direction, same_line, turn

OPEN, CLOSED = -1.0, 1.0
SLIDE, HINGE = 2, 3  # mujoco's numbers of joint types
PULLED = 0.155  # a drawer counts as open from 0.14 on; its end is at 0.16


def _joint_of(scene, region: str) -> int:
    """Number of the joint that moves a region (a drawer's inside)."""
    joint, = scene.env.object_sites_dict[region].joints
    return scene.model.joint(joint).id


def drawer_opening(scene, region: str) -> float:
    """How far the drawer is pulled out."""
    return float(abs(scene.data.qpos[scene.model.jnt_qposadr[_joint_of(scene, region)]]))


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
    """Push the handle back with a level, closed hand."""
    scene = expert.scene
    handle, out_3 = _handle(scene, region)
    expert.rotation = _level_hand(scene, -out_3)
    yield from expert.go(handle() + 0.12 * out_3 + [0, 0, 0.12], CLOSED, within=0.02, steps=70)
    yield from expert.go(handle() + 0.08 * out_3, CLOSED, within=0.015, steps=40)
    for _ in range(70):
        yield expert.towards(handle() - 0.05 * out_3, CLOSED, slow=0.8)


def _handle(scene, region: str):
    """(function that gives the middle of the handle, the direction [3] in which the drawer opens): the handle is the collision
    box of the drawer that lies furthest out."""
    joint = _joint_of(scene, region)
    out_3 = scene.data.xaxis[joint] * np.sign(scene.model.jnt_range[joint].sum())
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


def push(expert, goal):
    """Drag a flat thing by the inside of its rim until the goal holds: pulled from the front, it cannot turn away."""
    scene, (_, name, target) = expert.scene, goal
    corners = scene.corners(name)
    low, radius = corners[:, 2].min(), np.ptp(corners[:, 0]) / 2
    way = _way(scene, name, target, radius)

    def ahead():
        """Unit vector [2] to the next point of the way; points that are reached are dropped."""
        here = scene.position(name)[:2]
        while len(way) > 1 and np.linalg.norm(way[0] - here) < 0.03:
            way.pop(0)
        return (way[0] - here) / max(np.linalg.norm(way[0] - here), 1e-6)

    across = np.arctan2(*ahead()[::-1]) + np.pi / 2
    expert.rotation = turn(same_line(across - scene.finger_angle())) @ scene.upright()
    start = np.r_[scene.position(name)[:2] + 0.4 * radius * ahead(), low + 0.012]
    yield from expert.go(start + [0, 0, 0.10], CLOSED, within=0.02, steps=70)
    yield from expert.go(start, CLOSED, within=0.01, steps=30, slow=0.6)
    for _ in range(150):
        if scene.holds(goal):
            break
        beyond = scene.position(name)[:2] + 1.1 * radius * ahead()  # the rim keeps the hand from getting there
        yield expert.towards(np.r_[beyond, start[2]], CLOSED, slow=0.6)
    yield from expert.rise(0.12, CLOSED, within=0.02, steps=20)


def _way(scene, name: str, target: str, radius: float):
    """Points [2] to pass: the target, before it one beside it if that keeps the thing further away from the others."""
    here, there = scene.position(name)[:2], scene.position(target)[:2]
    boxes, height = scene.obstacles(name), scene.position(name)[2] + 0.01
    side = direction(np.arctan2(*(there - here)[::-1]) + np.pi / 2)
    options = []
    for points in ([there], *([there + offset * side, there] for offset in (-0.08, 0.08, -0.12, 0.12, -0.16, 0.16))):
        stops = [here, *points]
        passed = np.concatenate([a + np.linspace(0, 1, 9)[:, None] * (b - a) for a, b in zip(stops, stops[1:])])
        room = clearance(np.c_[passed, np.full(len(passed), height)], boxes) - radius
        options.append((min(room, 0.01), -len(points), points))
    return max(options, key=lambda option: option[:2])[2]
