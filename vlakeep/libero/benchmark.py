"""Episodes of a LIBERO suite, many simulators in front of one policy, and what the room's stages share.

An episode is a function of (task, initial state, seed) and of the policy: neither the number of workers nor the order changes it.
"""

import re
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np
from tqdm import tqdm

from vlakeep.benchmarks.records import Records, summarise
from vlakeep.libero.env import INIT_STATES, MAX_STEPS, SUITES, LiberoEnv, load_suite  # noqa: F401 (the room's interface)
from vlakeep.libero.play import evaluate_episode, require_video
from vlakeep.libero.setup import require_libero
from vlakeep.libero.workers import Job, Seen, Workers

# First seeds of fresh scenes, by what they are for; demonstrations have those below the first of these.
SPLITS = {"probe": 100_000, "heldout": 200_000}
SPLIT_SIZE = 100_000
SEED = 0  # the official script seeds its environments with it


def stage_options(argv: List[str], defaults: Dict[str, str],
                  choices: Optional[Mapping[str, Sequence[str]]] = None) -> Tuple[dict, List[str]]:
    """(a stage's own options, numbers as such; the arguments for the configuration). Raises ValueError for a bad value.

    Options whose default is a whole number take whole numbers, those with a point in it take numbers from 0 on; `suite` must be a
    suite, `tasks` becomes a list of task numbers. choices: option -> the values that it may have.
    """
    own: Dict[str, Any] = dict(defaults)
    rest, arguments = [], iter(argv)
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key[:2] == "--" and key[2:] in defaults:
            own[key[2:]] = value if equals else next(arguments, "")
        else:
            rest.append(argument)
    for key, default in defaults.items():
        if default.isdigit():
            if not own[key].isdigit() or (int(own[key]) < 1 and key != "first"):
                raise ValueError(f"--{key} {own[key]!r}: must be a whole number above 0")
            own[key] = int(own[key])
        elif default.replace(".", "", 1).isdigit():
            if not re.fullmatch(r"\d+\.?\d*|\.\d+", own[key]):
                raise ValueError(f"--{key} {own[key]!r}: must be a number, 0 or above")
            own[key] = float(own[key])
    for key, known in {"suite": SUITES, **(choices or {})}.items():
        if own[key] not in known:
            raise ValueError(f"--{key} {own[key]!r}: must be one of {', '.join(known)}")
    require_libero()
    own["tasks"] = pick_tasks(own["suite"], [part.strip() for part in own["tasks"].split(",") if part.strip()], "--tasks")
    return own, rest


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
    filled = -(-settings.workers // 2)
    if settings.batch > filled:
        print(f"--evaluate.batch {settings.batch} with --evaluate.workers {settings.workers}: the policy is asked as soon as half of the "
              f"workers wait, so most of its calls use {filled} of {settings.batch} rows. --evaluate.batch {filled} does the same with "
              "less work; take one size for all models that are compared", file=sys.stderr)


def instructions(suite: str, tasks: Sequence[int]) -> List[str]:
    found = load_suite(suite)
    return [found.get_task(task).language for task in tasks]


class Replay:
    """A policy without eyes: step t of an episode gets action t of a demonstration of its instruction, and no motion after the last.

    demos: instruction -> the actions [T, 7] of one demonstration or several, as the evaluation takes them, not normalised, gripper
    1 = open. Initial state k gets demonstration k, from the first again after the last: the result is that of no single one.
    """

    def __init__(self, demos: Mapping[str, Sequence[np.ndarray]]):
        self._demos = demos

    def __call__(self, jobs: Sequence[Job], seen: Sequence[Seen]) -> List[np.ndarray]:
        demos = [self._demos[one.instruction] for one in seen]
        return [self._action(known[job.number % len(known)], one.step) for known, job, one in zip(demos, jobs, seen)]

    def _action(self, actions_TA: np.ndarray, step: int) -> np.ndarray:
        return actions_TA[step] if step < len(actions_TA) else np.r_[np.zeros(6), actions_TA[-1, 6]]


def run_suite(act: Callable, settings, crop: bool, records: Records, videos: Path, desc: str = "") -> int:
    """Play every episode that `records` lacks and add its line; returns how many simulators had to be replaced.

    act(jobs, [Seen]) gives an action or an error text per job, as policy.FixedBatch does; `settings` is config.evaluate.
    """
    suite, seed = settings.benchmark, SEED if settings.seed is None else settings.seed
    tasks, names = pick_tasks(suite, settings.skills), load_suite(suite).get_task_names()
    jobs = [Job(suite, task, k, seed, MAX_STEPS[suite], crop,
                target=str(videos / f"task{task:02d}_{k:02d}.mp4") if k < settings.videos else None)
            for task in tasks for k in range(settings.episodes) if not records.has("skill", suite, trial(task, k))]
    bar = tqdm(total=len(jobs), desc=f"{desc}: {suite}", mininterval=1.0)
    with bar, Workers(LiberoEnv, evaluate_episode, settings.workers) as workers:
        for job, result, crash in workers.run(jobs, act):
            records.add(kind="skill", ability=suite, trial=trial(job.task, job.number), seed=seed,
                        success=result["success"] if result else None, value=None, crash=crash,
                        steps=result["steps"] if result else 0, task=names[job.task], init=job.number)
            bar.update()
        return workers.restarts


def trial(task: int, init: int) -> int:
    """Number of an episode within its suite."""
    return task * INIT_STATES + init


def by_task(rows: Sequence[dict]) -> Dict[str, dict]:
    """Task -> success rate with its Wilson interval, suite by suite and in the suite's order."""
    skills = sorted((row for row in rows if row["kind"] == "skill"), key=lambda row: (row["ability"], row["trial"]))
    named = [dict(row, ability=row["task"]) for row in skills]
    return {task: value for (_, task), value in summarise(named).items()}
