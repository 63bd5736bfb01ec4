"""What stands for the LIBERO simulator in tests/test_evaluate_libero.py, at the boundary of the worker processes.

Suites, tasks and environments with the interface of vlakeep/libero/env.py. A worker imports this file in a process of
its own, so nothing here is heavy, and what an episode wants lies in the file that the variable FAKE_LIBERO names:

    {"<suite>/<task>/<init>": [[7 numbers], ...]}   the actions that an episode wants, in the simulator's terms, or "crash"
    {"turned": true}                                cameras that hang the wrong way round
"""

import functools
import json
import os
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from vlakeep.tabletop.render import render
from vlakeep.tabletop.world import TabletopWorld

TASKS = {"libero_object": ("pick up the red square", "pick up the blue cross", "pick up the green circle"),
         "libero_goal": ("move to the red square", "move to the blue circle"),
         "libero_spatial": ("tap the red square",)}
SKILLS = {"pick": "pick", "move": "reach", "tap": "tap"}
WRIST = 1000  # added to the seed of what the other camera sees
TABLES = 300  # that are looked through for those which a task is about


class Suite:
    def __init__(self, name):
        self.texts = TASKS[name]
        self.n_tasks = len(self.texts)

    def get_task(self, number):
        return SimpleNamespace(language=self.texts[number], name=self.get_task_names()[number])

    def get_task_names(self):
        return [text.replace(" ", "_") for text in self.texts]


@functools.lru_cache(maxsize=None)
def tables(text):
    """Seeds of the tabletop's tables on which `text` can be done."""
    skill = SKILLS[text.split()[0]]
    found = TabletopWorld([skill] * TABLES, range(TABLES)).instructions
    return [seed for seed, instruction in enumerate(found) if instruction == text]


def picture(suite, task, init, step, seed=0):
    """uint8 [256, 256, 3], upright: another table for every task, initial state, step and seed."""
    text = TASKS[suite][task]
    seeds = tables(text)
    number = zlib.crc32(f"{suite} {task} {init} {seed}".encode()) + step
    small = render(TabletopWorld([SKILLS[text.split()[0]]], [seeds[number % len(seeds)]]))[0]
    return np.repeat(np.repeat(small, 4, axis=0), 4, axis=1)


def state(init, step):
    """float32 [8]."""
    return np.sin(np.arange(8) + init + 0.1 * step).astype(np.float32)


class Env:
    """An episode succeeds with the last action that it wants, if all were received as wanted and in that order."""

    def __init__(self, suite, task, seed, cameras=("agentview",)):
        self.cameras = cameras
        self.suite, self.task, self.seed, self.language = suite, task, seed, TASKS[suite][task]
        self.plan = json.loads(Path(os.environ["FAKE_LIBERO"]).read_text())

    def start(self, init):
        self.init, self.taken, self.good = init, 0, True
        self.wanted = self.plan.get(f"{self.suite}/{self.task}/{init}", [])
        return self._look()

    def step(self, action):
        if self.wanted == "crash":
            raise RuntimeError("the arm fell off")
        self.good &= self.taken < len(self.wanted) and np.allclose(action, self.wanted[self.taken], rtol=0, atol=1e-6)
        self.taken += 1
        return self._look(), 0.0, bool(self.good and self.taken == len(self.wanted))

    def _look(self):
        upright = picture(self.suite, self.task, self.init, self.taken, self.seed)
        views = {"agentview": upright, "robot0_eye_in_hand": picture(self.suite, self.task, self.init, self.taken, self.seed + WRIST)}
        return {f"{name}_image": views[name] if self.plan.get("turned") else views[name][::-1, ::-1]  # the real cameras are turned
                for name in self.cameras}

    def robot_state(self, observation):
        """Of the fake's arm: where it is, by how far its episode is."""
        return state(self.init, self.taken)

    def close(self):
        pass
