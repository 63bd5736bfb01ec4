"""Demonstrations of the scripted expert: played without pictures, filtered, replayed, and rendered when pictures are wanted.

A demonstration is a function of (suite, task, seed). Its scene comes from a reset with that seed, never from the 50 initial
states of the evaluation. What is kept are actions, simulator states and the robot's own state; pictures follow from them by a
replay, at any resolution, exactly as the evaluation would show them.

With noise a demonstration is a function of (suite, task, seed, noise). The simulator is pushed off the expert's way, the expert
sees where it has got to, and what is learned from is what the expert meant to do there (as in DART, Laskey et al. 2017). A push is
as large as the motion that it disturbs: at its last few millimetres a hand that is pushed with full force knocks things over (with
0.5 in libero_object, tasks 0 to 2, 24 of 30 episodes then succeeded, and 30 of 30 as it is).
"""

import zipfile
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, NamedTuple, Optional, Tuple

import numpy as np

from vlakeep.core.storage import atomic_path
from vlakeep.libero.env import LiberoEnv, NoPlacement, robot_state
from vlakeep.libero.expert import Expert, goals
from vlakeep.libero.workers import Job

NO_MOTION = 1e-4  # what the official preparation of the data sets takes for standing still
ROBOT = ("robot0_joint_pos", "robot0_eef_quat")  # what LIBERO's HDF5 holds of the robot beside `proprio`
ELSEWHERE = 1e-2  # metres or radians after one step; the last bits of a state make 1e-4 of it
STRETCH = (5, 15)  # steps with noise, then steps without, in turn


class Elsewhere(Exception):
    """A stored demonstration is not what its actions make here. No ValueError, as the simulator's own errors are."""


class Demo(NamedTuple):
    """T steps: what was meant and done at each, and how things stood before it."""

    actions: np.ndarray  # float32 [T, 7]: the expert's, gripper -1 open, +1 closed, as LIBERO's data sets store it
    executed: np.ndarray  # float32 [T, 7]: what the simulator was given, the expert's action and the noise
    states: np.ndarray  # float64 [T + 1, S]: the simulator's; the last one is the end
    proprio: np.ndarray  # float32 [T, 8]: hand position, rotation vector, finger positions

    def save(self, path: Path) -> None:
        with atomic_path(path) as partial:
            np.savez_compressed(partial, **self._asdict())

    @classmethod
    def load(cls, path: Path) -> "Demo":
        """ValueError for a file that is none. One without `executed` is older than the noise: its actions are what was executed."""
        try:
            with np.load(path, allow_pickle=False) as arrays:
                found = {"executed": arrays["actions"], **arrays}
            return cls(*(found[name] for name in cls._fields))
        except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is no stored demonstration ({error}); delete it") from error


def without_no_ops(actions: np.ndarray) -> np.ndarray:
    """bool [T]: False for actions [T, 7] that neither move nor change the gripper, as the official *_no_noops sets leave them out."""
    kept, gripper = np.zeros(len(actions), dtype=bool), None
    for step, action in enumerate(actions):
        kept[step] = np.linalg.norm(action[:-1]) >= NO_MOTION or (gripper is not None and action[-1] != gripper)
        if kept[step]:
            gripper = action[-1]
    return kept


def disturbances(noise: float, task: int, seed: int) -> Iterator[np.ndarray]:
    """float64 [7] for each step, at full speed: normal noise on the six dimensions of motion, in every other stretch of steps."""
    rng = np.random.default_rng([seed, task])  # its own: NumPy's global generator belongs to the simulator
    noisy = bool(rng.integers(2))
    while True:
        for _ in range(rng.integers(STRETCH[0], STRETCH[1] + 1)):
            yield np.r_[noise * noisy * rng.standard_normal(6), 0.0]
        noisy = not noisy


class Manner(NamedTuple):
    """How the expert plays: standard deviation of the noise, and the way it takes hold of things (libero_expert.APPROACHES)."""

    noise: float = 0.0
    approach: str = "above"


USUAL = Manner()


def play_expert(env: LiberoEnv, seed: int, limit: int, manner: Manner = USUAL) -> Optional[Tuple[np.ndarray, np.ndarray]]:
    """(meant, executed), float32 [T, 7], in the scene of this seed up to success; None when it does not come within `limit` steps, or the
    seed has no scene."""
    try:
        env.fresh_start(seed)
    except NoPlacement:
        return None
    meant, executed, pushes = [], [], disturbances(manner.noise, env.task, seed)
    for action in Expert(env, manner.approach).act(goals(env.suite, env.task)):
        meant.append(action.astype(np.float32))  # as it will be stored, so that a replay is the same to the bit
        speed = np.abs(action[:6]).max()
        executed.append(np.clip(action + speed * next(pushes), -1, 1).astype(np.float32) if manner.noise else meant[-1])
        if env.step(executed[-1].tolist())[2]:
            return np.array(meant), np.array(executed)
        if len(meant) == limit:
            return None
    return None


def replay(env: LiberoEnv, seed: int, actions_TA: np.ndarray, executed_TA: np.ndarray,
           watch: Callable[[dict], None] = lambda observation: None, known_TS: Optional[np.ndarray] = None) -> Optional[Demo]:
    """The demonstration that these give, up to success; None without success. `watch` is shown what is seen before each step.

    known_TS: states of an earlier run, which are followed: on another processor the same steps differ in the last bits, and that
    would grow. Raises Elsewhere where a step leads elsewhere.
    """
    def follow():
        state_S = env.state()
        if known_TS is not None and len(states) == len(known_TS):
            raise Elsewhere("no success at its end")
        if known_TS is not None and not np.array_equal(state_S, known_TS[len(states)]):
            came_S, state_S = state_S, known_TS[len(states)]
            if came_S.shape != state_S.shape or np.abs(came_S - state_S)[env.positions].max() > ELSEWHERE:
                raise Elsewhere(f"step {len(states)} leads elsewhere")
            env.put(state_S)
        states.append(state_S)

    observation = env.fresh_start(seed)
    states, seen = [], []
    follow()
    for step, action in enumerate(executed_TA):
        seen.append(robot_state(observation))
        watch(observation)
        observation, _, success = env.step(action.tolist())
        follow()
        if success:
            return Demo(actions_TA[:step + 1], executed_TA[:step + 1], np.array(states), np.array(seen))
    return None


def record(env: LiberoEnv, job: Job, manner: Manner = USUAL):
    """For simulator processes: the Demo of seed job.number, or None when the expert failed (also after the filter)."""
    played = play_expert(env, job.number, job.limit, manner)
    if played is None:
        return None
    meant, executed = played
    kept = without_no_ops(meant)
    return replay(env, job.number, meant[kept], executed[kept])
    yield  # a generator, as every play of a worker, that never asks


def render(env: LiberoEnv, job: Job):
    """For simulator processes: what a stored demonstration (job.source) looks like, into an .npz file (job.target). Returns "", or why it
    does not replay here; whatever else is wrong is raised.

    <camera>_image uint8 [T, H, W, 3] of each camera of the environment, as the simulator gives them (on their heads), and ROBOT.
    """
    stored = Demo.load(Path(job.source))
    seen = {key: [] for key in (*(f"{camera}_image" for camera in env.env.camera_names), *ROBOT)}

    def watch(observation):
        for key, values in seen.items():
            values.append(np.array(observation[key]))

    try:
        again = replay(env, job.number, stored.actions, stored.executed, watch, stored.states)
        reason = "no success" if again is None else "" if len(again.states) == len(stored.states) else "success comes earlier"
    except Elsewhere as error:
        reason = str(error)
    if reason:
        return f"{job.source} does not replay here ({reason}): it was made with another version of the simulator, or on another machine"
    pictures: Dict[str, Any] = {key: np.array(values) for key, values in seen.items()}
    np.savez(job.target, **pictures)
    return ""
    yield
