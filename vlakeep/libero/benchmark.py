"""Episodes of a LIBERO suite, many simulators in front of one policy, and what the room's stages share.

An episode is a function of (task, initial state, seed) and of the policy: neither the number of workers nor the order changes it.
"""

import functools
import sys
from pathlib import Path
from typing import Callable, Dict, List, Mapping, Optional, Sequence

import numpy as np
from tqdm import tqdm

from vlakeep.benchmarks.records import Records, summarise
from vlakeep.core.log import log
from vlakeep.libero.env import CAMERA, INIT_STATES, MAX_STEPS, SUITES, LiberoEnv, load_suite  # noqa: F401 (the room's interface)
from vlakeep.libero.play import evaluate_episode, require_video
from vlakeep.libero.setup import require_libero
from vlakeep.libero.workers import Job, Seen, Workers

# First seeds of fresh scenes, by what they are for; demonstrations have those below the first of these.
SPLITS = {"probe": 100_000, "heldout": 200_000}
SPLIT_SIZE = 100_000
SEED = 0  # the official script seeds its environments with it


def pick_tasks(suite: str, chosen: Sequence[str], option: str = "--evaluate.skills") -> List[int]:
    """Task numbers; all of the suite for an empty list. ValueError for what is no number of a task."""
    count = load_suite(suite).n_tasks
    if not all(text.isdigit() and int(text) < count for text in chosen):
        raise ValueError(f"{option} {list(chosen)}: {suite} has the tasks 0 to {count - 1}")
    return sorted({int(text) for text in chosen}) if chosen else list(range(count))


def pick_key(suite: str, given: Optional[str], known: Dict, own: Optional[str]) -> str:
    """The key of the action statistics: the given one, else the suite, else SUITE_no_noops (as the official script), else `own`,
    the only data set that the run was trained on. ValueError when the model has none of these, or not the given one."""
    for key in (suite, f"{suite}_no_noops", own) if given is None else (given,):
        if key is not None and key in known:
            return key
    lacking = f"{suite} or {suite}_no_noops" if given is None else repr(given)
    raise ValueError(f"the model has no action statistics of {lacking} (it has {', '.join(known) or 'none'}): name one with "
                     "--backbone.unnorm_key")


def check(settings) -> None:
    """Raise for whatever an evaluation lacks that is known before a model is loaded; `settings` is config.evaluate."""
    require_libero()
    if settings.videos:
        require_video()
    if settings.episodes > INIT_STATES:
        raise ValueError(f"--evaluate.episodes {settings.episodes}: a LIBERO task has {INIT_STATES} initial states")
    pick_tasks(settings.benchmark, settings.skills)


def say_idle_rows(settings) -> None:
    """A line on stderr when the policy's batch is larger than what the workers fill."""
    if settings.batch > settings.workers:
        print(f"--evaluate.batch {settings.batch} with --evaluate.workers {settings.workers}: no more than {settings.workers} wait for the "
              f"policy, so its calls use {settings.workers} of {settings.batch} rows at most. --evaluate.batch {settings.workers} does the "
              "same with less work; take one size for all models that are compared", file=sys.stderr)


def instructions(suite: str, tasks: Sequence[int]) -> List[str]:
    found = load_suite(suite)
    return [found.get_task(task).language for task in tasks]


def tasks_by_instruction(suite: str) -> Dict[str, List[int]]:
    """Instruction -> the tasks that are called so: several in libero_90, whose scenes share some."""
    found: Dict[str, List[int]] = {}
    for task, text in enumerate(instructions(suite, pick_tasks(suite, []))):
        found.setdefault(text, []).append(task)
    return found


class Replay:
    """A policy without eyes: step t of an episode gets action t of a demonstration of its task, and no motion after the last.

    demos: task -> the actions [T, 7] of one demonstration or several, as the evaluation takes them, not normalised, gripper
    1 = open. Initial state k gets demonstration k, from the first again after the last: the result is that of no single one.
    """

    def __init__(self, demos: Mapping[int, Sequence[np.ndarray]]):
        self._demos = demos

    def __call__(self, jobs: Sequence[Job], seen: Sequence[Seen]) -> List[np.ndarray]:
        demos = [self._demos[job.task] for job in jobs]
        return [self._action(known[job.number % len(known)], one.step) for known, job, one in zip(demos, jobs, seen)]

    def _action(self, actions_TA: np.ndarray, step: int) -> np.ndarray:
        return actions_TA[step] if step < len(actions_TA) else np.r_[np.zeros(6), actions_TA[-1, 6]]


def run_suite(act: Callable, settings, crop: bool, records: Records, videos: Path, desc: str = "", cameras: Sequence[str] = (CAMERA,),
              state: bool = False, plain: bool = False) -> int:
    """Play every episode that `records` lacks and add its line; returns how many simulators had to be replaced.

    cameras, state, plain: what the policy is shown (workers.Job).

    act(jobs, [Seen]) gives an action or an error text per job, as policy.FixedBatch does; `settings` is config.evaluate.
    """
    suite, seed = settings.benchmark, SEED if settings.seed is None else settings.seed
    tasks, names = pick_tasks(suite, settings.skills), load_suite(suite).get_task_names()
    jobs = [Job(suite, task, k, seed, MAX_STEPS[suite], crop,
                target=str(videos / f"task{task:02d}_{k:02d}.mp4") if k < settings.videos else None, cameras=tuple(cameras),
                state=state, plain=plain)
            for task in tasks for k in range(settings.episodes) if not records.has("skill", suite, trial(task, k))]
    jobs = records.share(jobs)
    bar = tqdm(total=len(jobs), desc=f"{desc}: {suite}", mininterval=1.0)
    rendered = tuple(dict.fromkeys((CAMERA, *cameras)))  # a video shows the usual one
    with bar, Workers(functools.partial(LiberoEnv, cameras=rendered), evaluate_episode, settings.workers) as workers:
        for job, result, crash in workers.run(jobs, act):
            records.add(kind="skill", ability=suite, trial=trial(job.task, job.number), seed=seed,
                        success=result["success"] if result else None, value=None, crash=crash,
                        steps=result["steps"] if result else 0, task=names[job.task], init=job.number)
            bar.update()
        if jobs:
            log.info(f"{suite}: {workers.clock.line()}; {workers.pace.line()}")
        return workers.restarts


def trial(task: int, init: int) -> int:
    """Number of an episode within its suite."""
    return task * INIT_STATES + init


def by_task(rows: Sequence[dict]) -> Dict[str, dict]:
    """Task -> success rate with its Wilson interval, suite by suite and in the suite's order."""
    skills = sorted((row for row in rows if row["kind"] == "skill"), key=lambda row: (row["ability"], row["trial"]))
    named = [dict(row, ability=row["task"]) for row in skills]
    return {task: value for (_, task), value in summarise(named).items()}
