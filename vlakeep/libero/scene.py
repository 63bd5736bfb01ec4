"""Geometry of a LIBERO scene from the simulator's ground truth: where things are, what they collide with, where the hand fits.

Lengths in metres, angles in radians; z points up, and a horizontal direction is given by its angle. The hand is the Panda's
gripper held vertically; its position is that of the grip site between the finger tips. Axes: N points, G collision boxes.
"""

from typing import NamedTuple, Optional, Sequence, Tuple

import numpy as np

ROBOT = ("robot0", "gripper0", "mount0")
FURNITURE = 0.35  # boxes with a half size above this are table tops, walls and floors
STRETCH = 0.71  # beyond this distance from the base the arm is nearly straight, joint 4 hits its limit and the controller stalls
WRIST = 2.7  # the last joint ends at 2.9
BOX, CYLINDER, SPHERE = 6, 5, 2  # mujoco's numbers of geometry types
CORNERS_83 = np.array([[i, j, k] for i in (-1, 1) for j in (-1, 1) for k in (-1, 1)], dtype=float)


class Boxes(NamedTuple):
    """Oriented boxes: centre [G, 3], rotation [G, 3, 3], half size [G, 3]."""

    centre: np.ndarray
    rotation: np.ndarray
    half: np.ndarray


def direction(angle: float) -> np.ndarray:
    """Unit vector [2]."""
    return np.array([np.cos(angle), np.sin(angle)])


def turn(angle: float) -> np.ndarray:
    """Rotation matrix about the vertical."""
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])


def rotation_about(axis_3: np.ndarray, angle: float) -> np.ndarray:
    """Rotation matrix about a unit vector."""
    x, y, z = axis_3
    cross_33 = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * cross_33 + (1 - np.cos(angle)) * cross_33 @ cross_33


def rotation_vector(rotation_33: np.ndarray) -> np.ndarray:
    """Axis times angle [3]."""
    import mujoco

    quaternion, vector = np.zeros(4), np.zeros(3)
    mujoco.mju_mat2Quat(quaternion, np.ascontiguousarray(rotation_33).ravel())
    mujoco.mju_quat2Vel(vector, quaternion, 1.0)
    return vector


def same_line(angle: float) -> float:
    """The equivalent angle of an undirected line, in [-pi/2, pi/2): fingers are interchangeable."""
    return (angle + np.pi / 2) % np.pi - np.pi / 2


def narrow_side(points_N2: np.ndarray) -> Tuple[float, float, np.ndarray]:
    """(angle, width, centre [2]) of the direction in which a set of points is narrowest, to 3 degrees."""
    best = None
    for angle in np.linspace(0, np.pi, 61)[:-1]:
        along, across = direction(angle), direction(angle + np.pi / 2)
        p, q = points_N2 @ along, points_N2 @ across
        if best is None or np.ptp(p) < best[1] - 2e-4:
            best = angle, float(np.ptp(p)), along * (p.max() + p.min()) / 2 + across * (q.max() + q.min()) / 2
    return best


def clearance(points_N3: np.ndarray, boxes: Boxes) -> float:
    """Smallest distance of any point to any box; 1 without boxes."""
    if not len(boxes.centre):
        return 1.0
    local = np.einsum("gij,gnj->gni", boxes.rotation.transpose(0, 2, 1), points_N3[None] - boxes.centre[:, None])
    outside = np.maximum(np.abs(local) - boxes.half[:, None], 0)
    return float(np.linalg.norm(outside, axis=2).min())


def hand_points(position_3: np.ndarray, angle: float) -> np.ndarray:
    """Points [N, 3] on the open fingers and the palm of a hand at `position_3` whose fingers open along `angle`."""
    along, across, up = np.r_[direction(angle), 0], np.r_[direction(angle + np.pi / 2), 0], np.array([0, 0, 1.0])
    fingers = [side * (radius * along) + lateral * across + height * up for side in (-1, 1) for radius in (0.042, 0.058)
               for lateral in (-0.011, 0.011) for height in (-0.012, 0.01, 0.03, 0.05)]
    palm = [offset * along + lateral * across + height * up for offset in (-0.10, -0.05, 0, 0.05, 0.10)
            for lateral in (-0.035, 0.035) for height in (0.075, 0.12)]
    return position_3 + np.array(fingers + palm)


def hand_boxes(position_3: np.ndarray, angle: float) -> Boxes:
    """Such a hand with its way down: two open fingers, and the palm from its lower face to a hand's length above it."""
    along, across, up = np.r_[direction(angle), 0], np.r_[direction(angle + np.pi / 2), 0], np.array([0, 0, 1.0])
    centre = position_3 + np.array([0.052 * along + 0.019 * up, -0.052 * along + 0.019 * up, 0.155 * up])
    rotation = np.stack([along, across, up], axis=1)
    return Boxes(centre, np.tile(rotation, (3, 1, 1)), np.array([[0.011, 0.011, 0.031], [0.011, 0.011, 0.031], [0.10, 0.033, 0.12]]))


def separation(some: Boxes, others: Boxes) -> float:
    """Smallest gap between a box of the one and a box of the other set, negative where they overlap (theorem of separating axes)."""
    if not len(others.centre):
        return 1.0
    least = 1.0
    for centre, rotation, half in zip(*some):
        crossed = np.cross(rotation.T[None, :, None], others.rotation.transpose(0, 2, 1)[:, None]).reshape(-1, 9, 3)
        size = np.linalg.norm(crossed, axis=2, keepdims=True)
        usable = size[..., 0] > 1e-3
        axes = np.concatenate([np.broadcast_to(rotation.T, (len(crossed), 3, 3)), others.rotation.transpose(0, 2, 1),
                               crossed / np.maximum(size, 1e-3)], axis=1)
        extent = np.abs(axes @ rotation) @ half + np.einsum("gak,gk->ga", np.abs(axes @ others.rotation), others.half)
        gap = np.abs(np.einsum("gai,gi->ga", axes, others.centre - centre)) - extent
        gap[:, 6:][~usable] = -1.0
        least = min(least, float(gap.max(1).min()))
    return least


class Scene:
    """The present state of an environment (LiberoEnv); every answer is read from the simulator anew."""

    def __init__(self, env):
        import mujoco

        self.env = env.env
        self.model, self.data = env.control.sim.model._model, env.control.sim.data._data
        self._grip = mujoco.mj_name2id(self.model, mujoco.mjtObj.mjOBJ_SITE, "gripper0_grip_site")
        self._fingers = [self.model.body(f"gripper0_{side}finger").id for side in ("left", "right")]
        self._wrist = int(self.model.joint("robot0_joint7").qposadr[0])
        self._base_2 = self.data.xpos[self.model.body("robot0_base").id][:2].copy()

    # The robot

    def hand(self) -> np.ndarray:
        """Position [3] of the grip site."""
        return self.data.site_xpos[self._grip].copy()

    def hand_rotation(self) -> np.ndarray:
        return self.data.site_xmat[self._grip].reshape(3, 3).copy()

    def finger_angle(self) -> float:
        """Direction along which the fingers open."""
        left, right = (self.data.xpos[body] for body in self._fingers)
        return float(np.arctan2(left[1] - right[1], left[0] - right[0]))

    def finger_gap(self) -> float:
        left, right = (self.data.xpos[body] for body in self._fingers)
        return float(np.linalg.norm(left - right))

    def wrist_turn(self, yaw: float, xy: np.ndarray) -> float:
        """Turn [rad] about the vertical that brings the fingers along the line `yaw` from where they are, with the hand at `xy`
        then: half a turn more where the last joint would come to its limit."""
        azimuth = [np.arctan2(*(place[:2] - self._base_2)[::-1]) for place in (self.hand(), np.asarray(xy))]
        joint, yaw = float(self.data.qpos[self._wrist]), same_line(yaw)
        options = [turned for turned in (yaw, yaw - np.pi, yaw + np.pi)
                   if abs(joint - turned + azimuth[1] - azimuth[0]) < WRIST]
        return min(options, key=abs, default=yaw)

    def upright(self) -> np.ndarray:
        """The hand's present rotation, made exactly vertical."""
        import mujoco

        rotation = self.hand_rotation()
        down = rotation[:, 2]
        axis = np.cross(down, [0, 0, -1.0])
        size = np.linalg.norm(axis)
        if size < 1e-6:
            return rotation
        quaternion, matrix = np.zeros(4), np.zeros(9)
        mujoco.mju_axisAngle2Quat(quaternion, axis / size, float(np.arctan2(size, -down[2])))
        mujoco.mju_quat2Mat(matrix, quaternion)
        return matrix.reshape(3, 3) @ rotation

    def overreach(self, xy: np.ndarray) -> float:
        """By how much a place is too far for the arm to stay bent; 0 within reach."""
        return max(0.0, self.distance(xy) - STRETCH)

    def distance(self, xy: np.ndarray) -> float:
        """From the robot's base, horizontally."""
        return float(np.linalg.norm(np.asarray(xy)[:2] - self._base_2))

    # Things

    def is_site(self, name: str) -> bool:
        return name in self.env.object_sites_dict

    def owner(self, name: str) -> Optional[str]:
        """The object or fixture that a region belongs to; the name itself for an object."""
        if not self.is_site(name):
            return name
        return next((n for n in [*self.env.objects_dict, *self.env.fixtures_dict] if name.startswith(n)), None)

    def position(self, name: str) -> np.ndarray:
        """[3] of an object, fixture or region."""
        if self.is_site(name):
            return self.data.site(name).xpos.copy()
        return self.data.xpos[self.env.obj_body_id[name]].copy()

    def holds(self, goal: Sequence[str]) -> bool:
        """Whether a goal such as ("on", bowl, plate) is fulfilled, by the simulator's own predicate."""
        return bool(self.env._eval_predicate(list(goal)))

    def top_body(self, geom: int, bodies) -> int:
        """The first of `bodies` above a geometry in the kinematic tree, or 0."""
        body = self.model.geom_bodyid[geom]
        while body not in bodies and body != 0:
            body = self.model.body_parentid[body]
        return body

    def _collides(self, geom: int) -> bool:
        return self.model.geom_group[geom] == 0 and bool(self.model.geom_contype[geom] or self.model.geom_conaffinity[geom])

    def _half_size(self, geom: int) -> Optional[np.ndarray]:
        size, kind = self.model.geom_size[geom], self.model.geom_type[geom]
        return {BOX: size, CYLINDER: size[[0, 0, 1]], SPHERE: size[[0, 0, 0]]}.get(int(kind))

    def corners(self, name: str, slab: Optional[Tuple[float, float]] = None) -> np.ndarray:
        """Corners [N, 3] of the collision boxes of an object; with `slab` only of those that cross this range of heights."""
        body, found = self.env.obj_body_id[name], []
        for geom in range(self.model.ngeom):
            half = self._half_size(geom)
            if half is None or not self._collides(geom) or self.top_body(geom, (body,)) != body:
                continue
            box_83 = CORNERS_83 * half @ self.data.geom_xmat[geom].reshape(3, 3).T + self.data.geom_xpos[geom]
            if slab is None or (box_83[:, 2].max() >= slab[0] and box_83[:, 2].min() <= slab[1]):
                found.append(box_83)
        return np.concatenate(found)

    def surface(self, name: str, xy: np.ndarray) -> float:
        """Height of an object's or fixture's collision boxes at a place."""
        corners_N83 = self.corners(name).reshape(-1, 8, 3)
        low, high = corners_N83.min(1), corners_N83.max(1)
        there = ((low[:, :2] <= xy) & (xy <= high[:, :2])).all(1)
        return float(high[there, 2].max()) if there.any() else float(self.position(name)[2])

    def boxes(self, name: str) -> Boxes:
        """The boxes that make up an object or fixture, those of a microwave too, which only collide with what has a type."""
        body = self.env.obj_body_id[name]
        own = [geom for geom in range(self.model.ngeom) if self._half_size(geom) is not None and self.model.geom_group[geom] == 0
               and self.top_body(geom, (body,)) == body]
        return Boxes(self.data.geom_xpos[own].copy(), self.data.geom_xmat[own].reshape(-1, 3, 3).copy(),
                     np.array([self._half_size(geom) for geom in own]))

    def obstacles(self, *without: Optional[str]) -> Boxes:
        """Collision boxes of everything but the robot, the furniture and the named things."""
        skipped = [self.env.obj_body_id[name] for name in without if name in self.env.obj_body_id]
        centre, rotation, half = [], [], []
        for geom in range(self.model.ngeom):
            if not self._collides(geom) or self.model.geom_type[geom] not in (BOX, CYLINDER):
                continue
            body = int(self.model.geom_bodyid[geom])
            names = self.model.body(body).name, self.model.body(int(self.model.body_rootid[body])).name
            size = self._half_size(geom)
            of_robot = any(name.startswith(ROBOT) for name in names)
            if of_robot or self.top_body(geom, skipped) in skipped or size.max() > FURNITURE:
                continue
            centre.append(self.data.geom_xpos[geom].copy())
            rotation.append(self.data.geom_xmat[geom].reshape(3, 3).copy())
            half.append(size)
        return Boxes(np.array(centre), np.array(rotation), np.array(half))
