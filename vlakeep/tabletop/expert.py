"""Scripted experts of all tabletop skills: a pure function of the world's state, closed loop, coarse actions.

Coarse because a small token model has to name each component: 0, a quarter, a half or a whole step, either way.
"""

import numpy as np

from vlakeep.tabletop.skills import BESIDE, BOTTOM, COLUMN, HIGH_END, LANE, LANE_END, LOW_END, TURN_HIGH, TURN_LOW, at_bottom
from vlakeep.tabletop.world import LOW, NEW_SKILL, SIDES, STEP_XY, TRAY, TabletopWorld

_NEAR = 0.035
_PUT_DOWN = ["place", NEW_SKILL, "order", "relation", "blue", "red"]  # skills that carry something somewhere and let go of it there


def coarse(step: np.ndarray) -> np.ndarray:
    """Nearest of 0, 0.25, 0.5, 1 with the sign of `step` (in units of one full step)."""
    size = np.abs(step)
    return np.sign(step) * np.select([size >= 0.75, size >= 0.375, size >= 0.15], [1.0, 0.5, 0.25], 0.0)


def wanted_slots(world: TabletopWorld) -> np.ndarray:
    """The object that each table's hand should take or go to next, [N]: the second one once the first of an order is done."""
    done_N = (world.skills == "order") & at_bottom(world, world.target_N)
    return np.where(done_N, np.maximum(world.goal_N, 0), world.target_N)


def destinations(world: TabletopWorld) -> np.ndarray:
    """Where the held object is to be let go of, [N, 2]."""
    skill, goal_N2 = world.skills, world.xy_NK2[np.arange(world.n), np.maximum(world.goal_N, 0)]
    below_N2 = np.stack([world.grip_N2[:, 0], np.full(world.n, BOTTOM)], axis=1)
    cases = {"order": below_N2, "relation": goal_N2 + BESIDE}
    cases.update({name: goal_N2 for name in ("place", "blue", "red")})
    return np.select([(skill == name)[:, None] for name in cases], list(cases.values()), TRAY)


def path_points(world: TabletopWorld) -> np.ndarray:
    """Where the hand goes next, [N, 2]: straight to the lane, along it, down the target's column."""
    target_N2, grip_N2 = world.target_xy(), world.grip_N2
    aligned_N = np.abs(grip_N2[:, 0] - target_N2[:, 0]) < COLUMN - 0.06
    corner_x_N = np.where(grip_N2[:, 1] < LANE_END - 0.05, target_N2[:, 0], grip_N2[:, 0])
    return np.where(aligned_N[:, None], target_N2, np.stack([corner_x_N, np.full(world.n, LANE)], axis=1))


def turning_points(world: TabletopWorld):
    """(where the hand goes next to and fro [N, 2], whether it is closed on that way [N]).

    The closed hand is on its way to the right or the bottom: a picture must tell the two directions apart.
    """
    axis_N, rows = np.maximum(world.side_N, 0) // 2, np.arange(world.n)
    along_N = world.grip_N2[rows, axis_N]
    forth_N = np.where(world.closed_N, along_N <= HIGH_END, along_N < LOW_END)
    point_N2 = world.grip_N2.copy()
    point_N2[rows, axis_N] = np.where(forth_N, TURN_HIGH, TURN_LOW)
    return point_N2, forth_N


def expert_actions(world: TabletopWorld) -> np.ndarray:
    """[N, 7] for the skill of each table."""
    n, rows, skill = world.n, np.arange(world.n), world.skills
    wanted_N = wanted_slots(world)
    target_N2 = world.xy_NK2[rows, wanted_N]
    side_N2 = world.grip_N2.copy()
    for index, (x, y) in enumerate(SIDES.values()):
        where = world.side_N == index
        if x is not None:
            side_N2[where, 0] = x
        if y is not None:
            side_N2[where, 1] = y
    carry_N = np.isin(skill, _PUT_DOWN)
    goal_N2 = destinations(world)
    has_N = world.held_N == wanted_N
    wrong_N = (world.held_N >= 0) & ~has_N
    turn_N2, forth_N = turning_points(world)
    hold_N = (skill == "carry") & has_N
    aim_N2 = np.where(((skill == "side") | hold_N)[:, None], side_N2, np.where((carry_N & has_N)[:, None], goal_N2, target_N2))
    aim_N2 = np.select([(skill == "path")[:, None], (skill == "repeat")[:, None]], [path_points(world), turn_N2], aim_N2)
    step_N2 = coarse((aim_N2 - world.grip_N2) / STEP_XY)
    near_N = np.linalg.norm(aim_N2 - world.grip_N2, axis=1) < _NEAR
    up_N = np.where(world.z_N < 0.9, 1.0, 0.0)
    low_N = world.z_N <= LOW

    dz_N, close_N = np.zeros(n), np.zeros(n, dtype=bool)
    manipulate_N = np.isin(skill, ["pick", "carry", *_PUT_DOWN])
    seek_N = manipulate_N & ~has_N
    dz_N = np.where(seek_N, np.where(near_N, np.where(low_N, 0.0, -1.0), up_N), dz_N)
    close_N |= seek_N & near_N & low_N & ~world.closed_N
    lift_N = (skill == "pick") & has_N
    dz_N, close_N = np.where(lift_N, 1.0, dz_N), close_N | lift_N
    step_N2[lift_N] = 0
    carry_N &= has_N
    dz_N = np.where(carry_N, np.where(near_N, np.where(low_N, 0.0, -1.0), up_N), dz_N)
    close_N |= carry_N & ~(near_N & low_N)
    tap_N = skill == "tap"
    ready_N = world.closed_N & ~(world.held_N >= 0)
    dz_N = np.where(tap_N, np.where(near_N & ready_N, np.where(low_N, 0.0, -1.0), up_N), dz_N)
    close_N |= tap_N & ~(world.held_N >= 0) & ((world.z_N > LOW) | world.closed_N)
    drop_N = skill == "drop"
    dz_N = np.where(drop_N & has_N, np.where(low_N, 0.0, -1.0), dz_N)
    close_N |= drop_N & has_N & ~low_N
    step_N2[drop_N] = 0
    dz_N = np.where(np.isin(skill, ["reach", "side", "path", "repeat"]) | hold_N, up_N, dz_N)
    close_N |= hold_N | ((skill == "repeat") & forth_N) | (skill == "path")
    close_N &= ~(wrong_N & ~tap_N)  # a wrong object is let go of first
    action_N7 = np.zeros((n, 7))
    action_N7[:, :2], action_N7[:, 2], action_N7[:, 6] = step_N2, dz_N, ~close_N
    settle_N = seek_N & near_N & low_N | (carry_N & near_N & low_N)  # the hand is still while it grasps and lets go
    action_N7[settle_N, :2] = 0
    return action_N7
