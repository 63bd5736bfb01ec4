"""The tabletop world: N small tables side by side as NumPy arrays; physics, skills and success, no rendering.

The table is the unit square, x to the right, y downwards as in the image; the gripper hangs at height z in [0, 1]. Objects are a colour
and a shape, no two alike on one table. A tray lies in the top right corner.
Actions [N, 7] as LIBERO's: dx dy dz droll dpitch dyaw in [-1, 1] (rotations are accepted and do nothing), gripper 1 = open, 0 = close.

Axes: N tables, K object slots.
"""

from typing import List, Sequence, Union

import numpy as np

from vlakeep.tabletop import skills as tabletop_skills
from vlakeep.tabletop.skills import (  # noqa: F401 (the facts of the table, for whoever has the world)
    ALL_SKILLS,
    COLOR_NAMES,
    COLORS,
    CONTROLS,
    GRASP_DISTANCE,
    HOLD,
    LOW,
    MAX_STEPS,
    NEW_SKILL,
    NEW_SKILLS,
    ON,
    RADIUS,
    SHAPES,
    SIDES,
    SKILLS,
    SLOTS,
    STEP_XY,
    STEP_Z,
    STILL,
    TRAY,
    TRAY_RADIUS,
    object_name,
)


class TabletopWorld:
    """`skills[n]` and `seeds[n]` define table n; the same pair gives the same start whatever N."""

    def __init__(self, skills: Union[Sequence[str], np.ndarray], seeds: Union[Sequence[int], np.ndarray]):
        unknown = sorted(set(skills) - set(ALL_SKILLS))
        if unknown:
            raise ValueError(f"unknown tabletop skills {unknown}; known are {', '.join(ALL_SKILLS)}")
        self.n = len(skills)
        self.skills = np.array(list(skills))
        n = self.n
        self.grip_N2, self.z_N, self.closed_N = np.zeros((n, 2)), np.ones(n), np.zeros(n, dtype=bool)
        self.held_N = np.full(n, -1)
        self.xy_NK2 = np.zeros((n, SLOTS, 2))
        self.color_NK, self.shape_NK = np.zeros((n, SLOTS), dtype=int), np.zeros((n, SLOTS), dtype=int)
        self.present_NK = np.zeros((n, SLOTS), dtype=bool)
        self.target_N, self.goal_N, self.side_N = np.zeros(n, dtype=int), np.full(n, -1), np.full(n, -1)
        self.rival_N = np.full(n, -1)  # the other of two targets
        self.stage_N = np.zeros(n, dtype=int)  # how far a skill of several stages has come
        self.release_z_N = np.full(n, np.nan)
        self.streak_N, self.steps_N = np.zeros(n, dtype=int), np.zeros(n, dtype=int)  # streak: steps running with the condition true
        self.instructions: List[str] = [self._reset(i, seed) for i, seed in enumerate(seeds)]
        self.start_NK2 = self.xy_NK2.copy()

    def _reset(self, i: int, seed: int) -> str:
        skill = self.skills[i]
        shared = {control: new for new, control in CONTROLS.items()}
        rng = np.random.default_rng([int(seed), ALL_SKILLS.index(shared.get(skill, skill))])
        if skill in (*SKILLS, NEW_SKILL):
            self._scatter(i, rng)
            return self._draw_task(i, skill, rng)
        instruction = ""
        while not instruction:
            self._scatter(i, rng)
            instruction = tabletop_skills.draw_task(self, i, skill, rng)
        return instruction

    def _scatter(self, i: int, rng) -> None:
        """Two to four objects anywhere but on the tray, and the gripper anywhere."""
        count = int(rng.integers(2, SLOTS + 1))
        kinds = rng.choice(len(COLORS) * len(SHAPES), count, replace=False)
        placed: List[np.ndarray] = []
        while len(placed) < count:
            xy = rng.uniform(0.12, 0.88, 2)
            if np.linalg.norm(xy - TRAY) > 0.3 and all(np.linalg.norm(xy - other) > 0.25 for other in placed):
                placed.append(xy)
            elif rng.random() < 0.02:  # a crowded draw that leaves no room starts over
                placed.clear()
        self.present_NK[i] = np.arange(SLOTS) < count
        self.xy_NK2[i, :count] = placed
        self.color_NK[i, :count], self.shape_NK[i, :count] = kinds // len(SHAPES), kinds % len(SHAPES)
        self.grip_N2[i] = rng.uniform(0.1, 0.9, 2)

    def _draw_task(self, i: int, skill: str, rng) -> str:
        """Choose what a known skill, or the first new one, is about; its instruction."""
        count = int(self.present_NK[i].sum())
        target, goal = rng.choice(count, 2, replace=False)
        self.target_N[i] = target
        name = object_name(self.color_NK[i, target], self.shape_NK[i, target])
        if skill == "place":
            self.goal_N[i] = goal
            return f"put the {name} on the {object_name(self.color_NK[i, goal], self.shape_NK[i, goal])}"
        if skill == "side":
            # Only sides that are not reached yet.
            names = list(SIDES)
            x, y = self.grip_N2[i]
            far = [k for k, away in enumerate((x > 0.3, x < 0.7, y > 0.3, y < 0.7)) if away]
            self.side_N[i] = rng.choice(far)
            return f"go to the {names[self.side_N[i]]} side"
        if skill == "drop":
            self.held_N[i], self.closed_N[i] = target, True
            self.xy_NK2[i, target] = self.grip_N2[i] = self._free_spot(i, target, rng)
            return f"let go of the {name}"
        return {"reach": "move to the {}", "pick": "pick up the {}", "tap": "tap the {}", NEW_SKILL: "stash the {}"}[skill].format(name)

    def _free_spot(self, i: int, target: int, rng) -> np.ndarray:
        others = [k for k in np.flatnonzero(self.present_NK[i]) if k != target]
        while True:
            xy = rng.uniform(0.15, 0.85, 2)
            if np.linalg.norm(xy - TRAY) > 0.3 and all(np.linalg.norm(xy - self.xy_NK2[i, k]) > 0.2 for k in others):
                return xy

    def subset(self, rows: np.ndarray) -> "TabletopWorld":
        """The tables numbered `rows`, as copies."""
        world = object.__new__(TabletopWorld)
        world.n = len(rows)
        world.instructions = [self.instructions[r] for r in rows]
        for name, value in vars(self).items():
            if isinstance(value, np.ndarray):
                setattr(world, name, value[rows].copy())
        return world

    def target_xy(self) -> np.ndarray:
        return self.xy_NK2[np.arange(self.n), self.target_N]

    def step(self, action_N7: np.ndarray) -> np.ndarray:
        """One control step of every table; returns success [N]. Raises ValueError for a wrong shape or a non-finite action."""
        action_N7 = np.asarray(action_N7, dtype=np.float64)
        if action_N7.shape != (self.n, 7):
            raise ValueError(f"actions have shape {action_N7.shape}; {self.n} tables take ({self.n}, 7)")
        if not np.isfinite(action_N7).all():
            raise ValueError(f"action of table {int(np.flatnonzero(~np.isfinite(action_N7).all(1))[0])} is not finite")
        move_N6 = np.clip(action_N7[:, :6], -1, 1)
        self.grip_N2 = np.clip(self.grip_N2 + STEP_XY * move_N6[:, :2], 0.04, 0.96)
        self.z_N = np.clip(self.z_N + STEP_Z * move_N6[:, 2], 0, 1)
        close_N = action_N7[:, 6] < 0.5
        rows = np.arange(self.n)
        distance_NK = np.where(self.present_NK, np.linalg.norm(self.xy_NK2 - self.grip_N2[:, None], axis=2), np.inf)
        nearest_N = distance_NK.argmin(1)
        grasp_N = close_N & ~self.closed_N & (self.held_N < 0) & (self.z_N <= LOW) & (distance_NK[rows, nearest_N] <= GRASP_DISTANCE)
        release_N = ~close_N & (self.held_N >= 0)
        self.held_N = np.where(grasp_N, nearest_N, np.where(release_N, -1, self.held_N))
        self.release_z_N = np.where(release_N, self.z_N, self.release_z_N)
        self.closed_N = close_N
        holding = self.held_N >= 0
        self.xy_NK2[rows[holding], self.held_N[holding]] = self.grip_N2[holding]
        self.steps_N += 1
        self.stage_N = tabletop_skills.advance(self)
        self.streak_N = np.where(self._condition(), self.streak_N + 1, 0)
        return self.success()

    def success(self) -> np.ndarray:
        """Whether each skill's condition has held for its HOLD steps running, [N]."""
        return self.streak_N >= np.array([HOLD[skill] for skill in self.skills], dtype=int)

    def misplaced(self) -> np.ndarray:
        """Whether the object has been put on the other of two targets, [N]; False where there are no two."""
        rows, rival_N = np.arange(self.n), np.maximum(self.rival_N, 0)
        near_N = np.linalg.norm(self.target_xy() - self.xy_NK2[rows, rival_N], axis=1) < ON
        still_N = np.linalg.norm(self.xy_NK2 - self.start_NK2, axis=2)[rows, rival_N] < STILL
        return (self.rival_N >= 0) & (self.held_N < 0) & ~self.closed_N & near_N & still_N

    def _condition(self) -> np.ndarray:
        """The skill's condition on the state now, [N].

        Each excludes what the other skills do on their way: a model that has come to do one skill whatever it is told must fail at
        the others, or forgetting could not be seen.
        """
        target_N2 = self.target_xy()
        to_grip_N = np.linalg.norm(target_N2 - self.grip_N2, axis=1)
        goal_N2 = self.xy_NK2[np.arange(self.n), np.maximum(self.goal_N, 0)]
        let_go_N = (self.held_N < 0) & ~self.closed_N
        moved_NK = np.where(self.present_NK, np.linalg.norm(self.xy_NK2 - self.start_NK2, axis=2), 0)
        untouched_N = (self.held_N < 0) & (moved_NK.max(1) < STILL)
        target_moved_N = moved_NK[np.arange(self.n), self.target_N]
        goal_moved_N = moved_NK[np.arange(self.n), np.maximum(self.goal_N, 0)]
        x_N, y_N = self.grip_N2.T
        at_side_N = np.choose(np.maximum(self.side_N, 0), [x_N < 0.16, x_N > 0.84, y_N < 0.16, y_N > 0.84])
        done = {
            "reach": (to_grip_N < 0.06) & (self.z_N > 0.6) & ~self.closed_N & untouched_N,
            "side": at_side_N & untouched_N,
            "pick": (self.held_N == self.target_N) & (self.z_N > 0.7) & (target_moved_N < 0.28),  # lifted, not carried off
            "tap": self.closed_N & (self.held_N < 0) & (self.z_N <= LOW) & (to_grip_N < GRASP_DISTANCE),
            "drop": let_go_N & (self.release_z_N <= LOW) & (target_moved_N < 0.15),
            "place": let_go_N & (np.linalg.norm(target_N2 - goal_N2, axis=1) < ON) & (goal_moved_N < STILL),
            **tabletop_skills.conditions(self, untouched_N, let_go_N, goal_moved_N),
        }
        return np.select([self.skills == skill for skill in ALL_SKILLS], [done[skill] for skill in ALL_SKILLS]).astype(bool)
