"""Stage `vlakeep libero-demos`: demonstrations of LIBERO tasks by a scripted expert, as an RLDS data set or as LIBERO's HDF5.

    vlakeep libero-demos --suite libero_object --demos 20 --workers 8 [--tasks 0,1,4] [--resolution 256] [--first 1000]
        [--noise 0.3] [--approach above|side] [--format rlds|hdf5|both] [--camera agentview|robot0_eye_in_hand|frontview]

Tasks that the expert has no skill for are named and left out. Demonstration k of a task
starts from a reset with seed --first + k; where the expert fails, later seeds take the place. The same options give the same
bytes, whatever the number of workers. Stored states are not simulated again: a second call with another --resolution, --format
or --camera only renders.

--noise is the standard deviation of the noise that pushes the hand off its way in stretches of 5 to 15 steps, as a share of the
expert's own motion. The recorded actions are what the expert meant to do from wherever it had got to, so that a policy learns to
come back. Noisy and clean demonstrations are data sets of their own.

--approach side: the hand comes down beside a thing, slides over it and closes on the way up, so that each place on the way has one
action. A policy without memory learns that, and not the pause in which fingers close that its picture hardly shows.

--camera is the picture of the RLDS set. HDF5 files hold agentview and the camera in the hand, as LIBERO's do, and --camera as well.

writes: data_root_dir/<suite>_expert/1.0.0/ (RLDS) and beside it states/ (per demonstration: actions, executed, states, proprio) and
        demos.json (successes and failures per task, versions); data_root_dir/<suite>_expert_hdf5/<task>_demo.hdf5 and demos.json
        The sets are called <suite>_expert_noise0_3 for --noise 0.3 and <suite>_expert_frontview for --camera frontview.
"""

import functools
import json
import sys
import tempfile
from pathlib import Path
from typing import Callable, Dict, Iterator, List, NamedTuple, Tuple

import numpy as np
from tqdm import tqdm

from vlakeep.core.config import ConfigError
from vlakeep.core.errors import quoted
from vlakeep.core.options import read
from vlakeep.core.storage import Storage, atomic_dir, atomic_write
from vlakeep.data.hdf5_writer import Demonstration, append_demo, need_h5py
from vlakeep.data.sample import Episode
from vlakeep.data.writer import write_rlds
from vlakeep.libero.benchmark import SPLITS, pick_tasks, require_libero
from vlakeep.libero.env import CAMERA, MAX_STEPS, WRIST, LiberoEnv, about_task, load_suite
from vlakeep.libero.expert import NotCovered, goals
from vlakeep.libero.record import Demo, Manner, record, render
from vlakeep.libero.setup import versions
from vlakeep.libero.stages import DEMOS
from vlakeep.libero.workers import Job, Workers

PATIENCE = 3  # seeds tried per demonstration that is wanted
Key = Tuple[int, int]  # task, seed


class Shot(NamedTuple):
    """A demonstration and what it looked like."""

    key: Key
    demo: Demo
    seen: Dict[str, np.ndarray]  # <camera>_image uint8 [T, H, W, 3], on their heads, and more of the robot


def main(argv: List[str]) -> int:
    args, config = read(DEMOS, argv)
    own = vars(args)
    require_libero()
    own["tasks"] = pick_tasks(own["suite"], own["tasks"], "--tasks")
    if own["format"] != "rlds":
        need_h5py(f"--format {own['format']}")
    storage = Storage.from_config(config)
    suite, manner = own["suite"], Manner(own["noise"], own["approach"])
    name = set_name(suite, manner)
    if own["first"] + PATIENCE * own["demos"] > SPLITS["probe"]:
        raise ConfigError(f"--first {own['first']}: seeds from {SPLITS['probe']} on are those of `vlakeep libero-vqa`")
    states = storage.guard_write(storage.data / name, what="data set") / "states"
    states.mkdir(parents=True, exist_ok=True)

    tasks = with_skills(suite, own["tasks"])
    found = collect(suite, tasks, own["demos"], own["first"], own["workers"], states, manner)
    chosen = {task: [seed for seed, demo in found[task].items() if demo][:own["demos"]] for task in tasks}
    summary = report(suite, found, chosen, manner)
    order = [(task, chosen[task][k]) for k in range(own["demos"]) for task in tasks if k < len(chosen[task])]
    if not order:
        raise ValueError("the expert failed at every seed of these tasks; try others with --tasks or --first")
    if own["simulate"]:
        print(f"simulated {len(order)} demonstrations in {states}; the same command without --simulate renders them, here or elsewhere")
        return 0
    more = [WRIST] if own["wrist"] else []
    cameras = list(dict.fromkeys([own["camera"], *(more if own["format"] == "rlds" else [CAMERA, WRIST])]))
    lost: List[Key] = []
    shots = rendered(suite, order, own["resolution"], cameras, own["workers"], states, storage.tmp, lost)
    written = write(own, storage, name if own["camera"] == CAMERA else f"{name}_{own['camera']}", shots, lambda: without(summary, lost))
    if lost:
        files = " ".join(quoted(stored(states, key)) for key in lost)
        print(f"left out: {len(lost)} of {len(order)} demonstrations, which do not replay here; for others in their place: rm {files}"
              ", and the same command", file=sys.stderr)
    for path in written:
        size = f"{own['resolution']} x {own['resolution']}"
        print(f"wrote {path}: {len(order) - len(lost)} demonstrations at {size}; train with --data.datasets '[{path.name}]'")
    return 0


def set_name(suite: str, manner: Manner) -> str:
    """Letters, digits and underscores: tensorflow_datasets takes nothing else in a name."""
    noise = f"_noise{np.format_float_positional(manner.noise, trim='-')}".replace(".", "_") if manner.noise else ""
    return f"{suite}_expert" + ("" if manner.approach == "above" else f"_{manner.approach}") + noise


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


def collect(suite: str, tasks: List[int], demos: int, first: int, workers: int, states: Path,
            manner: Manner) -> Dict[int, Dict[int, bool]]:
    """Task -> seed -> success, in the order of the seeds, from as many seeds as are needed; successes are stored on the way.

    A failure is stored as an empty demonstration; a task without any success in its first seeds is given up. Later seeds are
    tried only for what is missing when all earlier ones are known, so which are used does not depend on the order of endings.
    Of a seed whose simulator died, hung or raised nothing is known, and none may take its place: ChildProcessError once the others of its
    round are stored.
    """
    found: Dict[int, Dict[int, bool]] = {task: {} for task in tasks}
    nothing_TA = np.zeros((0, 7), np.float32)
    empty = Demo(nothing_TA, nothing_TA, np.zeros((0, 0)), np.zeros((0, 8), np.float32))
    with Workers(functools.partial(LiberoEnv, render=False), functools.partial(record, manner=manner), workers) as pool:
        while True:
            wanted = [(task, first + len(found[task]) + i) for task in tasks if sum(found[task].values()) or not found[task]
                      for i in range(min(demos - sum(found[task].values()), PATIENCE * demos - len(found[task])))]
            if not wanted:
                return found
            new = [key for key in wanted if not stored(states, key).is_file()]
            jobs, unknown = [Job(suite, task, seed, 0, MAX_STEPS[suite]) for task, seed in new], []
            for job, demo, error in tqdm(pool.run(jobs, None), total=len(jobs), desc=f"{suite}: expert", mininterval=1.0):
                if error:
                    unknown.append(f"task {job.task}, seed {job.number}: {error}")
                else:
                    (demo or empty).save(stored(states, (job.task, job.number)))
            if unknown:
                raise ChildProcessError(f"{suite}: the simulator gave no answer to {len(unknown)} of {len(jobs)} seeds "
                                        f"({'; '.join(unknown)}). The others are stored, and the same command tries these again; if it "
                                        "fails at the same ones each time, leave out their tasks with --tasks, or begin behind them with "
                                        "--first")
            for task, seed in wanted:
                found[task][seed] = len(Demo.load(stored(states, (task, seed))).actions) > 0


def report(suite: str, found: Dict[int, Dict[int, bool]], chosen: Dict[int, List[int]], manner: Manner) -> dict:
    """Print the successes and failures of each task; returns what demos.json holds."""
    names, lines = load_suite(suite).get_task_names(), {}
    for task, seeds in found.items():
        won = sum(seeds.values())
        print(f"  task {task:2d}  {won:3d} of {len(seeds):3d} attempts succeeded  {names[task]}")
        lines[names[task]] = {"task": task, "attempts": len(seeds), "failures": len(seeds) - won, "seeds": chosen[task]}
    return {"suite": suite, **manner._asdict(), "tasks": lines, "versions": versions()}


def without(summary: dict, lost: List[Key]) -> dict:
    """What demos.json holds once it is known which demonstrations did not replay; a task names its own as `lost`."""
    tasks = {name: dict(line) for name, line in summary["tasks"].items()}
    for line in tasks.values():
        gone = [seed for task, seed in lost if task == line["task"]]
        line.update({"seeds": [seed for seed in line["seeds"] if seed not in gone], "lost": gone} if gone else {})
    return {**summary, "tasks": tasks}


def rendered(suite: str, order: List[Key], resolution: int, cameras: List[str], workers: int, states: Path, tmp: Path,
             lost: List[Key]) -> Iterator[Shot]:
    """In the given order. Pictures of later ones wait in files: a task's demonstrations are rendered in one process.

    One that does not replay here is said and goes into `lost`; the others go on. ValueError when none does, ChildProcessError for
    whatever else keeps one from being rendered.
    """
    tmp.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=tmp) as waiting, \
            Workers(functools.partial(LiberoEnv, resolution=resolution, cameras=cameras), render, workers) as pool:
        def target(key):
            return Path(waiting) / f"{key[0]}_{key[1]}.npz"

        jobs = [Job(suite, task, seed, 0, source=str(stored(states, (task, seed))), target=str(target((task, seed))))
                for task, seed in order]
        upcoming, done = list(order), set()
        for job, reason, error in tqdm(pool.run(jobs, None), total=len(jobs), desc=f"{suite}: render", mininterval=1.0):
            if error:
                raise ChildProcessError(f"task {job.task}, seed {job.number} cannot be rendered: {error}")
            if reason:
                print(f"task {job.task}, seed {job.number}: {reason}", file=sys.stderr)
                lost.append((job.task, job.number))
            if len(lost) == len(order):
                raise ValueError(f"none of {len(order)} stored demonstrations replay here: simulate them where they are rendered, "
                                 f"rm -r {quoted(states)}, and the same command")
            done.add((job.task, job.number))
            while upcoming and upcoming[0] in done:
                key = upcoming.pop(0)
                if key in lost:
                    continue
                with np.load(target(key)) as file:
                    seen = dict(file)
                yield Shot(key, Demo.load(stored(states, key)), seen)
                target(key).unlink()


def write(own: dict, storage: Storage, name: str, shots: Iterator[Shot], summary: Callable[[], dict]) -> List[Path]:
    """The data set in the formats that are wanted, each complete or not at all; returns the folders. `summary` is asked after the shots."""
    rlds, hdf5 = storage.guard_write(storage.data / name, what="data set"), storage.data / f"{name}_hdf5"
    if own["format"] == "rlds":
        write_rlds(storage.data, name, as_episodes(own, shots), image_format="jpeg", overwrite=True)
    else:
        with atomic_dir(storage.guard_write(hdf5, what="data set")) as partial:
            shots = through_hdf5(own, shots, partial)
            if own["format"] == "both":
                write_rlds(storage.data, name, as_episodes(own, shots), image_format="jpeg", overwrite=True)
            for _ in shots:
                pass
            store(summary(), partial)
    if own["format"] != "hdf5":
        store(summary(), rlds)
    return {"rlds": [rlds], "hdf5": [hdf5], "both": [rlds, hdf5]}[own["format"]]


def store(summary: dict, folder: Path) -> None:
    with atomic_write(folder / "demos.json", "w") as file:
        json.dump(summary, file, indent=1)


def as_episodes(own: dict, shots: Iterator[Shot]) -> Iterator[Episode]:
    """Pictures are turned by 180 degrees, as in the official RLDS sets and in the evaluation."""
    suite = load_suite(own["suite"])
    for (task, seed), demo, seen in shots:
        images, *wrist = (np.ascontiguousarray(seen[f"{camera}_image"][:, ::-1, ::-1])
                          for camera in (own["camera"], *([WRIST] if own["wrist"] else [])))
        yield Episode(images, demo.actions, suite.get_task(task).language, demo.proprio, f"{own['suite']}/{task}/{seed}", *wrist)


def through_hdf5(own: dict, shots: Iterator[Shot], folder: Path) -> Iterator[Shot]:
    """Hands the shots on and writes each to the file of its task. Cameras are called as in LIBERO's files."""
    suite = load_suite(own["suite"])
    for shot in shots:
        (task, _), demo, seen = shot
        info = suite.get_task(task)
        cameras = [key[:-len("_image")] for key in seen if key.endswith("_image")]
        pictures = {f"{camera.replace('robot0_', '')}_rgb": seen[f"{camera}_image"] for camera in cameras}
        append_demo(folder, info.name, about_task(info, cameras, own["resolution"]), Demonstration(
            demo.actions, demo.states[:-1], pictures, demo.proprio[:, :6], seen["robot0_eef_quat"], demo.proprio[:, 6:],
            seen["robot0_joint_pos"], {"executed": demo.executed} if own["noise"] else {}))
        yield shot


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
