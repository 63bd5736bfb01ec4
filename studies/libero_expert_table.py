"""How often the scripted expert succeeds at the first try, how long its demonstrations are, and what one costs.

    make libero
    python studies/libero_expert_table.py --suite libero_goal --episodes 20 --workers 16 [--first 1000] [--tasks 0,3] [--out rows.json]

Episode k of a task is the scene of seed --first + k, as in `vlakeep libero-demos`. A success is one that also holds after the filter,
in the replay. Seconds are CPU time of the simulator process per attempt (play, filter and replay, without pictures, without the
creation of the environment), failures included: divided by the rate of success they are what a demonstration costs.

writes: --out, a JSON file with one row per task (suite, task, name, episodes, successes, crashes, mean_steps, cpu_s_per_demo,
        failed_seeds) and the versions
"""

import argparse
import functools
import json
import os
import time
from pathlib import Path

from vlakeep.libero import setup as libero_setup
from vlakeep.libero.env import MAX_STEPS, LiberoEnv, load_suite
from vlakeep.libero.expert import NotCovered, goals
from vlakeep.libero.record import record
from vlakeep.libero.workers import Job, Workers


def timed_record(env, job):
    """For simulator processes: (steps of the demonstration or None, CPU seconds)."""
    start = time.process_time()
    demo = yield from record(env, job)
    return None if demo is None else len(demo.actions), time.process_time() - start


def row(suite, task, name, results, first):
    """One line of the table from [(seed, steps or None, seconds, error or None)]."""
    steps = [length for _, length, _, _ in results if length]
    return {"suite": suite, "task": task, "name": name, "episodes": len(results), "successes": len(steps),
            "crashes": sum(error is not None for *_, error in results),
            "mean_steps": round(sum(steps) / len(steps), 1) if steps else None,
            "cpu_s_per_demo": round(sum(seconds for _, _, seconds, _ in results) / len(steps), 2) if steps else None,
            "first_seed": first, "failed_seeds": sorted(seed for seed, length, _, _ in results if not length)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", default="libero_goal", choices=MAX_STEPS)
    parser.add_argument("--tasks", default="", help="numbers, separated by commas; all without it")
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--first", type=int, default=1000)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    names = load_suite(options.suite).get_task_names()
    tasks = [int(task) for task in options.tasks.split(",")] if options.tasks else range(len(names))
    results = {}
    for task in tasks:
        try:
            goals(options.suite, task)
            results[task] = []
        except NotCovered as error:
            print(f"left out: {error}")
    seeds = range(options.first, options.first + options.episodes)
    jobs = [Job(options.suite, task, seed, 0, MAX_STEPS[options.suite]) for task in results for seed in seeds]
    print(f"{options.suite}: {len(jobs)} attempts, {options.workers} workers, {os.cpu_count()} cores, "
          + ", ".join(f"{name} {version}" for name, version in libero_setup.versions().items()), flush=True)
    rows, start = [], time.perf_counter()
    with Workers(functools.partial(LiberoEnv, render=False), timed_record, options.workers) as pool:
        for job, result, error in pool.run(jobs, None):
            steps, seconds = result or (None, 0.0)
            results[job.task].append((job.number, steps, seconds, error))
            if len(results[job.task]) == len(seeds):
                rows.append(row(options.suite, job.task, names[job.task], results[job.task], options.first))
                print_row(rows[-1])
    rows.sort(key=lambda line: line["task"])
    won, tried = (sum(line[key] for line in rows) for key in ("successes", "episodes"))
    print(f"all      {won:4d} of {tried:4d} (first try), {time.perf_counter() - start:.0f} s of wall clock")
    if options.out:
        options.out.write_text(json.dumps({"rows": rows, "versions": libero_setup.versions()}, indent=1) + "\n")


def print_row(line):
    steps, seconds = (line[key] if line[key] is not None else float("nan") for key in ("mean_steps", "cpu_s_per_demo"))
    crashes = f", {line['crashes']} crashes" if line["crashes"] else ""
    failed = f"  failed seeds {line['failed_seeds']}" if line["failed_seeds"] else ""
    print(f"task {line['task']:2d}  {line['successes']:4d} of {line['episodes']:4d} (first try), mean {steps:5.1f} steps, "
          f"{seconds:5.2f} s per demonstration (CPU){crashes}  {line['name']}{failed}", flush=True)


if __name__ == "__main__":
    main()
