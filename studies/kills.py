#!/usr/bin/env python3
"""What SIGTERM, SIGUSR1 and kill -9 cost: processes are hit at random moments, go on, and are compared with ones that were left alone.

    python studies/kills.py FOLDER [--kinds script,torchrun,evaluate,offline,export] [--moments 8] [--seed 0]

FOLDER becomes a storage root of its own (small model, 12 episodes). Each kind is started and hit `--moments` times, the three signals in
turn, then runs to its end. script and torchrun (two ranks) are real command lines; the others are forked, so that a moment is not spent on
importing. A signal goes to the outermost process alone, as a scheduler or a user sends it.

Printed for each kind: how often it was hit and how often it had ended before; steps or trials lost, per signal; processes that stayed;
files that were visible and not whole; whether the end is that of the undisturbed one to the bit.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from vlakeep import cli, evaluate, export, offline, train  # noqa: F401  (loaded before anything is forked)
from vlakeep.core.checkpoint import broken, latest_intact, list_checkpoints
from vlakeep.core.config import load_config
from vlakeep.core.rundir import read_metrics
from vlakeep.core.storage import Storage

REPO = Path(__file__).resolve().parents[1]
SIGNALS = (signal.SIGTERM, signal.SIGKILL, signal.SIGUSR1)
SMALL = ["--threads", "1", "--device", "cpu"]
TRAIN = [*SMALL, "--lora.layers", "last:1", "--lora.rank", "4", "--train.batch_size", "2", "--train.schedule", "constant",
         "--train.warmup", "0", "--train.save_every", "25", "--train.tensorboard", "false"]
EVALUATE = [*SMALL, "--probe.size", "48", "--evaluate.skills", "[reach, pick]", "--evaluate.episodes", "12", "--evaluate.parallel", "3",
            "--evaluate.questions", "[color]", "--evaluate.questions_per_kind", "12", "--evaluate.retention_frames", "6"]
OFFLINE = [*SMALL, "--method", "graded", "--probe.size", "48"]
EXPORT = [*SMALL, "--export.parity_frames", "8", "--export.overwrite", "true"]
PATIENCE = 90.0  # seconds in which all processes of what was hit must be gone


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--kinds", default="script,torchrun,evaluate,offline,export")
    parser.add_argument("--moments", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    root = Path(args.folder).resolve()
    if not (root / "datasets").is_dir():
        make_data(root)
    for kind in args.kinds.split(","):
        found = study(kind, root, args.moments, random.Random(f"{kind} {args.seed}"))
        print(json.dumps({"kind": kind, **found}), flush=True)
    return 0


def make_data(root: Path) -> None:
    from vlakeep.tabletop import data

    data.EPISODES = 12
    config = load_config("configs/baseline_lora.yaml", ["--root", str(root), "--probe.size", "48"])
    data.write_tabletop_data(config, Storage.from_config(config))


# ---- starting and hitting ----


def start(command, root: Path) -> int:
    """Process id of a process in a session of its own: a command line, or arguments of vlakeep, forked."""
    environ = dict(os.environ, VLAKEEP_ROOT=str(root), OMP_NUM_THREADS="1", PYTHONPATH=str(REPO),
                   PATH=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    log = open(root / "kills.log", "ab")
    if command[0] != "vlakeep":
        return subprocess.Popen(command, cwd=REPO, env=environ, stdout=log, stderr=log, start_new_session=True).pid
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
    os.environ.update(environ)
    sys.argv = command
    status = 1
    try:
        status = cli.main()
    except SystemExit as end:
        status = end.code
    finally:
        os._exit(status)


def of_session(session: int) -> list:
    """Processes of a session that are not yet dead."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, _, _, its = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
            except OSError:
                continue
            if int(its) == session and state != "Z":
                found.append(int(entry.name))
    return found


def run(command, root: Path, number=None, delay: float = 0.0) -> dict:
    """Start, hit after `delay` seconds with signal `number`, wait for all to be gone. {"hit", "status", "stayed", "seconds"}."""
    pid, begun = start(command, root), time.monotonic()
    hit = False
    while os.waitpid(pid, os.WNOHANG)[0] == 0:
        if number and not hit and time.monotonic() - begun > delay:
            os.kill(pid, number)
            hit, begun = True, time.monotonic()
        if hit and time.monotonic() - begun > PATIENCE:
            break
        time.sleep(0.02)
    until = time.monotonic() + (PATIENCE if hit else 5)
    while (stayed := of_session(pid)) and time.monotonic() < until:
        time.sleep(0.05)
    for one in stayed:
        os.kill(one, signal.SIGKILL)
    return {"hit": hit, "stayed": len(stayed), "seconds": time.monotonic() - begun}


# ---- what was lost ----


def study(kind: str, root: Path, moments: int, rng: random.Random) -> dict:
    measure = {"script": training, "torchrun": training, "evaluate": evaluation, "offline": folders, "export": folders}[kind](root, kind)
    command = line(kind)
    if kind == "export" and not (root / "runs" / "script").is_dir():
        run(line("script"), root)
    measure.clear()
    longest, reference = run(command, root)["seconds"], measure.result()
    measure.clear()
    found = {"moments": 0, "ended before": 0, "stayed": 0, "not whole": 0, "slowest exit, s": 0.0, "ends": 0, "ends that differ": 0}
    lost = {signal.Signals(number).name: 0 for number in SIGNALS}
    for moment in range(moments):
        number = SIGNALS[moment % len(SIGNALS)]
        before = measure.have()
        done = run(command, root, number, rng.uniform(0, longest))
        if done["hit"]:
            found["moments"] += 1
            found["slowest exit, s"] = round(max(found["slowest exit, s"], done["seconds"]), 1)
        else:
            found["ended before"] += 1
        found["stayed"] += done["stayed"]
        found["not whole"] += measure.not_whole()
        lost[signal.Signals(number).name] += measure.lost(before)
        if not done["hit"] or moment == moments - 1:  # to its end, and from the beginning again
            if done["hit"]:
                run(command, root)
            found["ends"] += 1
            found["ends that differ"] += measure.result() != reference
            measure.clear()
    return {**found, "lost": lost}


def line(kind: str) -> list:
    """What is started."""
    script = ["bash", "scripts/run_baseline_lora.sh", "--gpus", "2" if kind == "torchrun" else "1", *TRAIN, "--name", kind]
    steps = ["--train.steps", "240", "--train.resume", "true"]
    return {
        "script": [*script, *steps], "torchrun": [*script, *steps],
        "evaluate": ["vlakeep", "evaluate", "--config", "configs/baseline_lora.yaml", *EVALUATE, "--evaluate.target", "base"],
        "offline": ["vlakeep", "offline", "--config", "configs/method_graded.yaml", *OFFLINE],
        "export": ["vlakeep", "export", "--config", "configs/baseline_lora.yaml", *EXPORT, "--export.target", "script"],
    }[kind]


class training:
    """A run that goes on after every hit; its steps may be lost back to the last checkpoint."""

    def __init__(self, root: Path, kind: str):
        self.root, self.folder = root, root / "runs" / kind

    def have(self) -> tuple:
        """Step of the newest whole checkpoint, and of the last row of the log."""
        newest = latest_intact(self.folder, say=lambda text: None) if self.folder.is_dir() else None
        rows = read_metrics(self.folder) if (self.folder / "metrics.jsonl").is_file() else []
        return int(newest.name.split("_")[1]) if newest else 0, max((row["step"] for row in rows), default=0)

    def lost(self, before: tuple) -> int:
        kept, logged = self.have()
        assert kept >= before[0], "a checkpoint that was there is gone"
        return 0 if (kept, logged) == before else max(0, logged - kept)  # hit before it began: what the log has was lost by an earlier hit

    def not_whole(self) -> int:
        return sum(broken(folder) is not None for _, folder in list_checkpoints(self.folder))

    def result(self):
        newest = latest_intact(self.folder)
        return newest.name, (newest / "adapter" / "adapter_model.safetensors").read_bytes()

    def clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


class evaluation:
    """Every trial that had ended before the hit is there after it."""

    def __init__(self, root: Path, kind: str):
        self.root = root

    def rows(self) -> list:
        found = list((self.root / "eval").glob("*/tabletop/base/records.jsonl"))
        data = found[0].read_bytes() if found else b""
        return [json.loads(line) for line in data[:data.rfind(b"\n") + 1].splitlines()[1:]]

    def have(self) -> list:
        return self.rows()

    def lost(self, before: list) -> int:
        now = self.rows()
        return sum(row not in now for row in before)

    def not_whole(self) -> int:
        return sum(not path.read_text().endswith("}") for path in (self.root / "eval").glob("*/tabletop/base/summary.json"))

    def result(self):
        summary, = (self.root / "eval").glob("*/tabletop/base/summary.json")
        said = json.loads(summary.read_text())
        said.pop("seconds")
        return sorted(self.rows(), key=lambda row: (row["kind"], row["ability"], row["trial"])), said

    def clear(self) -> None:
        shutil.rmtree(self.root / "eval", ignore_errors=True)


class folders:
    """A folder that is whole or not there."""

    def __init__(self, root: Path, kind: str):
        self.root, self.kind, self.whole = root, kind, {}

    @property
    def folder(self) -> Path:
        if self.kind == "offline":
            return self.root / "artifacts" / "graded_tabletop-base"
        return next(iter((self.root / "runs" / "script").glob("merged-step_*")), self.root / "runs" / "script" / "merged")

    def files(self) -> dict:
            return {path.name: path.read_bytes() for path in sorted(self.folder.iterdir())} if self.folder.is_dir() else {}

    def have(self) -> None:
        return None

    def lost(self, before) -> int:
        return 0

    def not_whole(self) -> int:
        return int(bool(self.files()) and self.files().keys() != self.whole.keys())

    def result(self):
        found = self.files()
        self.whole = self.whole or found
        left = [path.name for path in self.folder.parent.iterdir() if path.name.startswith(".")]
        return {**found, **{name: b"left behind" for name in left}}

    def clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
