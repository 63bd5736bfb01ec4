"""Demonstrations of the scripted expert: played without pictures, filtered, replayed, and rendered when pictures are wanted.

A demonstration is a function of (suite, task, seed). Its scene comes from a reset with that seed, never from the 50 initial
states of the evaluation. What is kept are actions, simulator states and the robot's own state; pictures follow from them by a
replay, at any resolution, exactly as the evaluation would show them.
"""

from pathlib import Path
from typing import List, NamedTuple, Optional

import numpy as np

from vlakeep.benchmarks.libero_env import CAMERA, LiberoEnv
from vlakeep.benchmarks.libero_expert import Expert, goals
from vlakeep.benchmarks.libero_workers import Job

NO_MOTION = 1e-4  # what the official preparation of the data sets takes for standing still


class Demo(NamedTuple):
    """T steps: what was done at each, and how things stood before it."""

    actions: np.ndarray  # float32 [T, 7], gripper -1 open, +1 closed, as LIBERO's data sets store it
    states: np.ndarray  # float64 [T + 1, S]: the simulator's; the last one is the end
    proprio: np.ndarray  # float32 [T, 8]: hand position, rotation vector, finger positions

    def save(self, path: Path) -> None:
        partial = path.with_name(f"{path.stem}.partial.npz")
        np.savez_compressed(partial, **self._asdict())
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> "Demo":
        with np.load(path, allow_pickle=False) as arrays:
            return cls(*(arrays[name] for name in cls._fields))


def without_no_ops(actions: List[np.ndarray]) -> np.ndarray:
    """float32 [T, 7]: actions that neither move nor change the gripper are left out, as in the official *_no_noops sets."""
    kept, gripper = [], None
    for action in actions:
        if np.linalg.norm(action[:-1]) >= NO_MOTION or (gripper is not None and action[-1] != gripper):
            kept.append(action)
            gripper = action[-1]
    return np.array(kept, dtype=np.float32).reshape(-1, 7)


def proprio(observation: dict) -> np.ndarray:
    """float32 [8], LIBERO's `state`: hand position, its rotation as axis times angle, the two finger joints."""
    from robosuite.utils.transform_utils import quat2axisangle

    rotation = quat2axisangle(observation["robot0_eef_quat"].copy())
    return np.r_[observation["robot0_eef_pos"], rotation, observation["robot0_gripper_qpos"]].astype(np.float32)


def play_expert(env: LiberoEnv, seed: int, limit: int) -> Optional[List[np.ndarray]]:
    """The expert's actions in the scene of this seed up to success; None when it does not come within `limit` steps."""
    env.fresh_start(seed)
    actions, script = [], Expert(env).act(goals(env.suite, env.task))
    for action in script:
        action = action.astype(np.float32)  # as it will be stored, so that a replay is the same to the bit
        actions.append(action)
        if env.step(action.tolist())[2]:
            return actions
        if len(actions) == limit:
            return None
    return None


def replay(env: LiberoEnv, seed: int, actions_TA: np.ndarray, pictures: Optional[list] = None) -> Optional[Demo]:
    """The demonstration that these actions give, up to success; None without success. `pictures` takes what the camera showed."""
    observation = env.fresh_start(seed)
    states, seen = [env.state()], []
    for step, action in enumerate(actions_TA):
        seen.append(proprio(observation))
        if pictures is not None:
            pictures.append(np.ascontiguousarray(observation[f"{CAMERA}_image"][::-1, ::-1]))
        observation, _, success = env.step(action.tolist())
        states.append(env.state())
        if success:
            return Demo(actions_TA[:step + 1], np.array(states), np.array(seen))
    return None


def record(env: LiberoEnv, job: Job):
    """For simulator processes: the Demo of seed job.number, or None when the expert failed (also after the filter)."""
    actions = play_expert(env, job.number, job.limit)
    return replay(env, job.number, without_no_ops(actions)) if actions is not None else None
    yield  # a generator, as every play of a worker, that never asks


def render(env: LiberoEnv, job: Job):
    """For simulator processes: pictures [T, H, W, 3] of a stored demonstration (job.source) into an .npy file (job.target)."""
    stored, pictures = Demo.load(Path(job.source)), []
    again = replay(env, job.number, stored.actions, pictures)
    if again is None or not np.array_equal(again.states, stored.states):
        raise ValueError(f"{job.source} does not replay: it was made with another version of the simulator; delete it")
    np.save(job.target, np.array(pictures))
    return len(pictures)
    yield
