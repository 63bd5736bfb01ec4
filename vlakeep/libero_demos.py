"""Stage `vlakeep libero-demos`: demonstrations of LIBERO tasks by a scripted expert, as an RLDS data set.

    vlakeep libero-demos --suite libero_object --demos 20 --workers 8 [--tasks 0,1,4] [--resolution 256] [--first 1000]

Tasks that the expert has no skill for are named and left out. Demonstration k of a task
starts from a reset with seed --first + k; where the expert fails, later seeds take the place. The same options give the same
bytes, whatever the number of workers. Stored states are not simulated again: a second call with another --resolution only
renders.

writes: data_root_dir/<suite>_expert/1.0.0/ (RLDS), states/ beside it (per demonstration: actions, states, proprio) and demos.json
        (successes and failures per task, versions)
"""

import functools
import json
import sys
import tempfile
from pathlib import Path
from typing import Dict, Iterator, List, Tuple

import numpy as np
from tqdm import tqdm

from vlakeep.benchmarks.libero import SPLITS, stage_options
from vlakeep.benchmarks.libero_env import MAX_STEPS, LiberoEnv, load_suite
from vlakeep.benchmarks.libero_expert import NotCovered, goals
from vlakeep.benchmarks.libero_record import Demo, record, render
from vlakeep.benchmarks.libero_setup import versions
from vlakeep.benchmarks.libero_workers import Job, Workers
from vlakeep.config import ConfigError, config_from_argv
from vlakeep.data.sample import Episode
from vlakeep.data.writer import write_rlds
from vlakeep.storage import Storage, atomic_write

OPTIONS = {"suite": "libero_object", "demos": "20", "tasks": "", "workers": "1", "resolution": "256", "first": "1000"}
PATIENCE = 3  # seeds tried per demonstration that is wanted
Key = Tuple[int, int]  # task, seed


def main(argv: List[str]) -> int:
    own, rest = stage_options(argv, OPTIONS)
    storage = Storage.from_config(config_from_argv(rest))
    suite, name = own["suite"], f"{own['suite']}_expert"
    if own["first"] + PATIENCE * own["demos"] > SPLITS["probe"]:
        raise ConfigError(f"--first {own['first']}: seeds from {SPLITS['probe']} on are those of `vlakeep libero-vqa`")
    folder = storage.guard_write(storage.data / name, what="data set")
    states = folder / "states"
    states.mkdir(parents=True, exist_ok=True)

    tasks = with_skills(suite, own["tasks"])
    found = collect(suite, tasks, own["demos"], own["first"], own["workers"], states)
    chosen = {task: [seed for seed, demo in found[task].items() if demo][:own["demos"]] for task in tasks}
    report(suite, found, chosen, folder)
    order = [(task, chosen[task][k]) for k in range(own["demos"]) for task in tasks if k < len(chosen[task])]
    episodes = rendered(suite, order, own["resolution"], own["workers"], states, storage.tmp)
    path = write_rlds(storage.data, name, episodes, image_format="jpeg", overwrite=True)
    size = f"{own['resolution']} x {own['resolution']}"
    print(f"wrote {path}: {len(order)} demonstrations at {size}; train with --data.datasets '[{name}]'")
    return 0


def with_skills(suite: str, tasks: List[int]) -> List[int]:
    """Those of the tasks that the expert has skills for; ConfigError when there is none."""
    covered = []
    for task in tasks:
        try:
            goals(suite, task)
            covered.append(task)
        except NotCovered as error:
            print(f"left out: {error}", file=sys.stderr)
    if not covered:
        raise ConfigError("the expert has skills for none of these tasks; choose others with --tasks")
    return covered


def stored(states: Path, key: Key) -> Path:
    return states / f"task{key[0]:02d}_seed{key[1]}.npz"


def collect(suite: str, tasks: List[int], demos: int, first: int, workers: int, states: Path) -> Dict[int, Dict[int, bool]]:
    """Task -> seed -> success, in the order of the seeds, from as many seeds as are needed; successes are stored on the way.

    A failure is stored as an empty demonstration; a task without any success in its first seeds is given up. Later seeds are
    tried only for what is missing when all earlier ones are known, so which are used does not depend on the order of endings.
    """
    found: Dict[int, Dict[int, bool]] = {task: {} for task in tasks}
    empty = Demo(np.zeros((0, 7), np.float32), np.zeros((0, 0)), np.zeros((0, 8), np.float32))
    with Workers(functools.partial(LiberoEnv, render=False), record, workers) as pool:
        while True:
            wanted = [(task, first + len(found[task]) + i) for task in tasks if sum(found[task].values()) or not found[task]
                      for i in range(min(demos - sum(found[task].values()), PATIENCE * demos - len(found[task])))]
            if not wanted:
                return found
            new = [key for key in wanted if not stored(states, key).is_file()]
            jobs = [Job(suite, task, seed, 0, MAX_STEPS[suite]) for task, seed in new]
            for job, demo, error in tqdm(pool.run(jobs, None), total=len(jobs), desc=f"{suite}: expert", mininterval=1.0):
                if error:
                    print(f"task {job.task}, seed {job.number}: {error}", file=sys.stderr)
                (demo or empty).save(stored(states, (job.task, job.number)))
            for task, seed in wanted:
                found[task][seed] = len(Demo.load(stored(states, (task, seed))).actions) > 0


def report(suite: str, found: Dict[int, Dict[int, bool]], chosen: Dict[int, List[int]], folder: Path) -> None:
    """Print and store the successes and failures of each task."""
    names, lines = load_suite(suite).get_task_names(), {}
    for task, seeds in found.items():
        won = sum(seeds.values())
        print(f"  task {task:2d}  {won:3d} of {len(seeds):3d} attempts succeeded  {names[task]}")
        lines[names[task]] = {"task": task, "attempts": len(seeds), "failures": len(seeds) - won, "seeds": chosen[task]}
    with atomic_write(folder / "demos.json", "w") as file:
        json.dump({"suite": suite, "tasks": lines, "versions": versions()}, file, indent=1)


def rendered(suite: str, order: List[Key], resolution: int, workers: int, states: Path, tmp: Path) -> Iterator[Episode]:
    """Episodes in the given order. Pictures of later ones wait in files: a task's demonstrations are rendered in one process."""
    suite_object = load_suite(suite)
    tmp.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=tmp) as waiting, \
            Workers(functools.partial(LiberoEnv, resolution=resolution), render, workers) as pool:
        def target(key):
            return Path(waiting) / f"{key[0]}_{key[1]}.npy"

        jobs = [Job(suite, task, seed, 0, source=str(stored(states, (task, seed))), target=str(target((task, seed))))
                for task, seed in order]
        upcoming, done = list(order), set()
        for job, _, error in tqdm(pool.run(jobs, None), total=len(jobs), desc=f"{suite}: render", mininterval=1.0):
            if error:
                raise ValueError(error)
            done.add((job.task, job.number))
            while upcoming and upcoming[0] in done:
                key = upcoming.pop(0)
                demo, language = Demo.load(stored(states, key)), suite_object.get_task(key[0]).language
                yield Episode(np.load(target(key)), demo.actions, language, demo.proprio, file_path=f"{suite}/{key[0]}/{key[1]}")
                target(key).unlink()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
