"""Scripted experts of all tabletop skills: a pure function of the world's state, closed loop, coarse actions.

Coarse because a small token model has to name each component: 0, a quarter, a half or a whole step, either way.
"""

import numpy as np

from vlakeep.benchmarks.tabletop_world import LOW, NEW_SKILL, SIDES, STEP_XY, TRAY, TabletopWorld

_NEAR = 0.035


def coarse(step: np.ndarray) -> np.ndarray:
    """Nearest of 0, 0.25, 0.5, 1 with the sign of `step` (in units of one full step)."""
    size = np.abs(step)
    return np.sign(step) * np.select([size >= 0.75, size >= 0.375, size >= 0.15], [1.0, 0.5, 0.25], 0.0)


def expert_actions(world: TabletopWorld) -> np.ndarray:
    """[N, 7] for the skill of each table."""
    n, rows, skill = world.n, np.arange(world.n), world.skills
    target_N2 = world.target_xy()
    side_N2 = world.grip_N2.copy()
    for index, (x, y) in enumerate(SIDES.values()):
        where = world.side_N == index
        if x is not None:
            side_N2[where, 0] = x
        if y is not None:
            side_N2[where, 1] = y
    carry_N = np.isin(skill, ["place", NEW_SKILL])
    goal_N2 = np.where((skill == "place")[:, None], world.xy_NK2[rows, np.maximum(world.goal_N, 0)], TRAY)
    has_N = world.held_N == world.target_N
    wrong_N = (world.held_N >= 0) & ~has_N
    aim_N2 = np.where((skill == "side")[:, None], side_N2, np.where((carry_N & has_N)[:, None], goal_N2, target_N2))
    step_N2 = coarse((aim_N2 - world.grip_N2) / STEP_XY)
    near_N = np.linalg.norm(aim_N2 - world.grip_N2, axis=1) < _NEAR
    up_N = np.where(world.z_N < 0.9, 1.0, 0.0)
    low_N = world.z_N <= LOW

    dz_N, close_N = np.zeros(n), np.zeros(n, dtype=bool)
    manipulate_N = np.isin(skill, ["pick", "place", NEW_SKILL])
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
    reach_N = np.isin(skill, ["reach", "side"])
    dz_N = np.where(reach_N, up_N, dz_N)
    close_N &= ~(wrong_N & ~tap_N)  # a wrong object is let go of first
    action_N7 = np.zeros((n, 7))
    action_N7[:, :2], action_N7[:, 2], action_N7[:, 6] = step_N2, dz_N, ~close_N
    settle_N = seek_N & near_N & low_N | (carry_N & near_N & low_N)  # the hand is still while it grasps and lets go
    action_N7[settle_N, :2] = 0
    return action_N7
