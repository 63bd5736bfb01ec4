"""Throughput of the LIBERO evaluation against the plain sequential loop, in one run, with the same policy and the same episodes.

    make libero
    python speed/libero_throughput.py [--suite libero_object] [--tasks 2] [--episodes 2] [--steps 60] [--workers 1,2]
        [--per_worker 8]

The plain loop is written after the official protocol: hard resets, both cameras, one episode after the other. The policy is
random (a hash of the picture, so that all variants see and do the same; the table checks it) and costs next to nothing: what
is measured is the simulator. --steps is the number of policy steps of each episode; the official limits (220 to 520) make
resets weigh less. With --per_worker N every row plays N episodes for each of its workers, the plain loop N, so that starting a worker
weighs the same in all rows and many workers have enough to do; else all rows play all episodes. Episodes are compared with
those of the plain loop, and beyond these with those of the rows before.
"""

import argparse
import os
import time
import zlib

import numpy as np

from vlakeep.libero import setup as libero_setup
from vlakeep.libero.env import LiberoEnv, bddl_file, load_suite, policy_image, to_simulator
from vlakeep.libero.play import evaluate_episode
from vlakeep.libero.workers import Job, Workers


def policy(image):
    rng = np.random.default_rng(zlib.crc32(image.tobytes()))
    return np.r_[rng.uniform(-1, 1, 6), float(rng.random() < 0.5)]


def sequential(jobs):
    """Seconds and the last picture's hash per job, in the plain loop."""
    from libero.libero.envs import OffScreenRenderEnv

    hashes, start, open_task, env = {}, time.perf_counter(), None, None
    suite = load_suite(jobs[0].suite)
    for job in jobs:
        if job.task != open_task:
            if env is not None:
                env.close()
            env = OffScreenRenderEnv(bddl_file_name=bddl_file(suite.get_task(job.task)), camera_heights=256, camera_widths=256)
            env.seed(0)
            open_task, states = job.task, suite.get_task_init_states(job.task)
        env.reset()
        observation = env.set_init_state(states[job.number])
        for _ in range(10):
            observation, *_ = env.step([0, 0, 0, 0, 0, 0, -1])
        for _ in range(job.limit):
            image = policy_image(observation["agentview_image"], crop=True)
            observation, _, done, _ = env.step(to_simulator(policy(image)))
            if done:
                break
        hashes[job] = zlib.crc32(image.tobytes())
    env.close()
    return time.perf_counter() - start, hashes


def parallel(jobs, workers):
    hashes, start = {}, time.perf_counter()

    def act(asking, seen):
        hashes.update({job: zlib.crc32(one.image.tobytes()) for job, one in zip(asking, seen)})
        return [policy(one.image) for one in seen]

    with Workers(LiberoEnv, evaluate_episode, workers) as pool:
        errors = [error for _, _, error in pool.run(jobs, act) if error]
    assert not errors, errors
    return time.perf_counter() - start, hashes


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", default="libero_object")
    parser.add_argument("--tasks", type=int, default=2)
    parser.add_argument("--episodes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--workers", default="1,2")
    parser.add_argument("--per_worker", type=int, default=0, help="episodes per worker; 0: all episodes, whatever the number of workers")
    options = parser.parse_args()
    libero_setup.import_libero()  # the plain loop renders with as many threads as the library takes
    jobs = [Job(options.suite, task, k, 0, options.steps, crop=True)
            for task in range(options.tasks) for k in range(options.episodes)]
    print(f"{options.suite}: {len(jobs)} episodes of {options.steps} steps; "
          f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, "
          + ", ".join(f"{name} {version}" for name, version in libero_setup.versions().items()), flush=True)
    known, plain = {}, None
    for workers in [0, *map(int, options.workers.split(","))]:  # 0 stands for the plain loop
        played = jobs[:options.per_worker * max(1, workers)] if options.per_worker else jobs
        seconds, hashes = parallel(played, workers) if workers else sequential(played)
        rate = 60 * len(played) / seconds
        plain = plain or rate
        same = sum(known.setdefault(job, value) == value for job, value in hashes.items())
        print(f"{f'{workers} workers' if workers else 'plain loop':12s} {len(played):4d} episodes {seconds:7.1f} s  "
              f"{len(played) * options.steps / seconds:6.1f} steps/s {rate:6.1f} episodes/min {rate / plain:5.1f} x  "
              + ("the same pictures" if same == len(played) else f"OTHER PICTURES in {len(played) - same}"), flush=True)


if __name__ == "__main__":
    main()
