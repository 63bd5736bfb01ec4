"""Simulators for tests/test_libero_workers.py: one that counts, and one that never works.

A worker imports this file in a process of its own and in every one that replaces it, so nothing here is heavy.
"""

import os
import time
from pathlib import Path

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


def broken(suite, task, seed):
    raise RuntimeError("no display")
