"""Simulators for tests/test_libero_workers.py: one that counts, one that never works, and one with demonstrations of two steps.

A worker imports this file in a process of its own and in every one that replaces it, so nothing here is heavy.
"""

import os
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from vlakeep.libero.workers import Seen


class Counter:
    """An environment that counts; what it shows depends on the episode and on the actions so far alone."""

    def __init__(self, suite, task, seed, folder=None):
        self.task, self.folder, self.total = task, folder and Path(folder), 0.0

    def close(self):
        pass


def count(env, job):
    env.total = 0.0
    for step in range(job.limit):
        if env.folder and step == 1:
            trouble(env.folder, job)
        action = yield Seen(np.full((2, 2, 3), (job.task * 16 + job.number + step) % 256, np.uint8), f"task {job.task}")
        env.total += float(action[0])
    return {"total": env.total, "pid": os.getpid()}


def trouble(folder, job):
    """Task 1 dies at its first try, task 2 always, task 3 raises, task 4 hangs."""
    tried = folder / f"{job.task}-{job.number}"
    first = not tried.exists()
    tried.touch()
    if job.task == 2 or (job.task == 1 and first):
        os._exit(9)
    if job.task == 3:
        raise RuntimeError("the arm fell off")
    if job.task == 4:
        time.sleep(60)


def slow_scene(suite, task, seed):
    """Task 2 takes long to load."""
    time.sleep(6.0 if task == 2 else 0.0)
    return Counter(suite, task, seed)


def broken(suite, task, seed):
    raise RuntimeError("no display")


class Line:
    """As vlakeep/libero/record.py sees LiberoEnv: a place on a line, which an action moves, and 2 of which is success.

    In the folder that the variable FAKE_LINE names, files say what is wrong: `dead` with every seed's machine, `dead-SEED` with one's.
    """

    positions = np.array([True])
    env = SimpleNamespace(camera_names=["agentview"])

    def __init__(self, suite, task, seed, **options):
        from vlakeep.libero import record

        self.place, record.robot_state = 0.0, lambda observation: np.zeros(8, np.float32)  # in this process; the real one needs robosuite

    def fresh_start(self, seed):
        if any((Path(os.environ["FAKE_LINE"]) / name).exists() for name in ("dead", f"dead-{seed}")):
            raise ValueError("no memory on the card")
        self.place = 0.0
        return self._look()

    def step(self, action):
        self.place += action[0]
        return self._look(), 0.0, self.place >= 2

    def state(self):
        return np.array([self.place])

    def put(self, state):
        self.place = float(state[0])

    def _look(self):
        return {"agentview_image": np.full((4, 4, 3), int(self.place), np.uint8), "robot0_joint_pos": np.zeros(7),
                "robot0_eef_quat": np.zeros(4)}

    def close(self):
        pass


def walked(env, job, manner=None):
    """A demonstration, of an odd seed without success."""
    from vlakeep.libero.record import replay

    actions = np.ones((2, 7), np.float32)
    demo = replay(env, job.number, actions, actions)
    return None if job.number % 2 else demo
    yield
