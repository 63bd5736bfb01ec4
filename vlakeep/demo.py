"""Stage `vlakeep demo`: the main job from end to end on the small model, its arms side by side, on CPU in minutes.

    make demo        or        vlakeep demo [--model pi0_fast] [--root DIR] [--key value ...]

tabletop-data -> offline -> train (baseline; method as frozen; graded gains with a set-point) -> evaluate -> report

Three checkpoints on the way are evaluated with fewer trials, so that the report can show success against retention over training.
On a CPU the arms run side by side, each in a process with its share of the threads: one thread does 0.85 of the work of two.

--model pi0_fast takes the small pi0-FAST, whose runs start with demo-pi0-.

writes: below the storage root the same folders as the single stages, run names starting with demo-, the evaluation
        of the base in eval/demo-base, the report in report/demo; an earlier demo of the model is replaced
"""

import contextlib
import io
import json
import multiprocessing
import shutil
import sys
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Optional, Tuple

import torch
from tqdm import tqdm

from vlakeep.core import log
from vlakeep.core.checkpoint import list_checkpoints
from vlakeep.core.config import Config, load_config
from vlakeep.core.options import split
from vlakeep.core.parallel import pick_device
from vlakeep.core.rundir import read_metrics
from vlakeep.core.signals import end_on_signals, follow_parent
from vlakeep.core.stages import DEMO
from vlakeep.core.storage import Storage

# Arm -> (configuration that ships, what differs from it). Every arm gets the same seed, data, steps and evaluation states.
ARMS = {
    "baseline": ("baseline_lora", []),
    "method": ("method_icsm_hsw_thermostat", []),
    "graded": ("method_graded", []),
}
# Model -> (how its runs begin, what its configurations have beyond those above). Labels of the demonstrations are what an expert did who
# was disturbed, so that of a chunk the first actions are the surest.
MODELS = {"openvla": ("demo", []), "pi0_fast": ("demo-pi0", [
    "--backbone.checkpoint", "tabletop-pi0", "--evaluate.chunk", "2", "--icsm.sensitivity_items", "16"])}  # of longer rows: minutes
PARTS = 4  # of a training run; a checkpoint is evaluated at the end of each
PATIENCE_S = 30.0  # with a process that was asked to end
POLL_S = 1.0  # between two looks at how far the trainings are
ON_THE_WAY = ["--evaluate.episodes", "10", "--evaluate.questions_per_kind", "20", "--evaluate.retention_frames", "20"]


def arm_config(arm: str, extra: List[str], begin: str = "demo") -> Config:
    file, changes = ARMS[arm]
    config = load_config(file, changes + extra + ["--name", f"{begin}-{arm}"])
    config.train.save_every, config.train.keep_last = -(-config.train.steps // PARTS), PARTS
    return config


class Work(NamedTuple):
    """The trainings and evaluations of one demo, as they are handed to a process. argv: with --root; begin: of the names of its runs."""

    argv: List[str]
    begin: str

    def config(self, arm: str) -> Config:
        return arm_config("method" if arm == "base" else arm, self.argv, self.begin)

    def train(self, arm: str) -> None:
        from vlakeep.train import TrainingStopped, run_training

        config = self.config(arm)
        try:
            run_training(config, Storage.from_config(config))
        except TrainingStopped as error:  # a guard stopping the literal form is a result, and is reported as one
            print(f"{arm} stopped: {error}", file=sys.stderr)

    def evaluate(self, arm: str, checkpoint: Optional[Path] = None) -> None:
        """The end of an arm, or a checkpoint on its way with fewer trials."""
        from vlakeep.evaluate import run_evaluation

        config = self.config(arm)
        storage = Storage.from_config(config)
        place = storage.eval / f"{self.begin}-{arm}"
        if checkpoint is None:
            config.evaluate.target = "base" if arm == "base" else config.name
            run_evaluation(config, storage, place)
        else:
            brief = load_config(ARMS[arm][0], [*ARMS[arm][1], *self.argv, *ON_THE_WAY, "--evaluate.target", str(checkpoint)])
            run_evaluation(brief, storage, place.with_name(f"{place.name}-{checkpoint.name}"), drift=False)


class Piece(NamedTuple):
    """One training or one evaluation. arm: of a training."""

    title: str
    run: Callable[..., None]
    arguments: tuple
    arm: str = ""


def main(argv: List[str]) -> int:
    from vlakeep.offline import run_offline
    from vlakeep.report import build_report
    from vlakeep.tabletop.data import write_tabletop_data

    started = time.perf_counter()
    own, _, argv = split(DEMO, argv)
    begin, changes = MODELS[own.model]
    argv = [*changes, *argv]
    storage = Storage.from_config(arm_config("method", argv, begin), demo=True)
    argv = argv + ["--root", str(storage.root)]
    configs: Dict[str, Config] = {arm: arm_config(arm, argv, begin) for arm in ARMS}
    runs = {arm: storage.run_folder(config.name) for arm, config in configs.items()}
    places = {arm: storage.eval / f"{begin}-{arm}" for arm in ["base", *ARMS]}
    on_the_way = [folder for arm in ARMS for folder in storage.eval.glob(f"{begin}-{arm}-step_*")]
    for folder in [*places.values(), *on_the_way, *runs.values()]:
        shutil.rmtree(folder, ignore_errors=True)  # a demo shows its own run, never a mixture with an earlier one

    headline("1/5 data: demonstrations of the new skill, and the probe")
    write_tabletop_data(configs["method"], storage)
    headline("2/5 offline: the teacher's subspaces")
    for config in {config.method: config for config in configs.values() if config.method != "baseline"}.values():
        run_offline(config, storage)
    processes, threads = shares(configs["method"])
    if processes > 1:
        side_by_side(Work([*argv, "--threads", str(threads)], begin), runs, processes, threads)
    else:
        one_by_one(Work(argv, begin), runs)
    headline("5/5 report")
    arms = {arm: {"eval": place if place.is_dir() else None, "run": runs.get(arm)} for arm, place in places.items()}
    page = build_report(storage.root, arms, storage.report / begin, "vlakeep demo: a new tabletop skill", time.perf_counter() - started)
    summary = Path(page).parent / "summary.json"
    print(f"report  {page}\nsummary {summary}\n{json.loads(summary.read_text())['seconds']:.0f} seconds")
    return 0


def shares(config: Config) -> Tuple[int, int]:
    """(processes, CPU threads of each). On a GPU one run comes after the other."""
    threads = config.threads or torch.get_num_threads()
    processes = min(threads, len(ARMS)) if pick_device(config.device).type == "cpu" else 1
    return processes, threads // processes


def first_pieces(work: Work) -> List[Piece]:
    return [*(Piece(f"3/5 train: {arm}", work.train, (arm,), arm) for arm in ARMS), Piece("4/5 evaluate: base", work.evaluate, ("base",))]


def evaluations(work: Work, arm: str, run: Path) -> List[Piece]:
    """What follows an arm's training: its end, and its checkpoints on the way."""
    checkpoints = [path for _, path in list_checkpoints(run)]
    if not checkpoints:  # stopped before its first one, which the report says
        print(f"{arm} cannot be evaluated: no checkpoint in {run}", file=sys.stderr)
        return []
    return [Piece(f"4/5 evaluate: {arm}", work.evaluate, (arm,)),
            *(Piece(f"4/5 evaluate: {arm} at {path.name}", work.evaluate, (arm, path)) for path in checkpoints[:-1])]


def one_by_one(work: Work, runs: Dict[str, Path]) -> None:
    def each(pieces: List[Piece]) -> None:
        for piece in pieces:
            headline(piece.title)
            piece.run(*piece.arguments)

    each(first_pieces(work))
    for arm, run in runs.items():
        each(evaluations(work, arm, run))


def side_by_side(work: Work, runs: Dict[str, Path], processes: int, threads: int) -> None:
    """What a piece says is shown when it has ended. What ends this process ends the others."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, spawn, _begin, (threads,)) as pool, \
            tqdm(total=1 + (1 + PARTS) * len(runs), desc="demo", unit="part", mininterval=1 if sys.stderr.isatty() else 30) as bar:
        try:
            pieces: Dict[Future, Piece] = {pool.submit(_aloud, piece): piece for piece in first_pieces(work)}
            while pieces:
                for future in wait(pieces, POLL_S, FIRST_COMPLETED).done:
                    piece, said = pieces.pop(future), future.result()
                    with tqdm.external_write_mode():
                        headline(piece.title)
                        print(said, end="", flush=True)
                    bar.update()
                    if piece.arm:
                        pieces.update({pool.submit(_aloud, one): one for one in evaluations(work, piece.arm, runs[piece.arm])})
                bar.set_postfix_str(", ".join(f"{arm} at step {step}" for arm, run in runs.items() if (step := _step(run))), refresh=False)
                bar.update(0)
        except BaseException:
            children = multiprocessing.active_children()
            pool.shutdown(wait=False, cancel_futures=True)
            for child in children:
                child.terminate()  # a training saves first
            for child in children:
                child.join(PATIENCE_S)
                child.kill()
            raise


def _begin(threads: int) -> None:
    """A process, before its first piece."""
    end_on_signals()
    follow_parent()
    log.install()
    torch.set_num_threads(threads)


def _aloud(piece: Piece) -> str:
    """Run it. Returns what it said, without what a progress bar has overwritten."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        piece.run(*piece.arguments)
    return "\n".join(line.rpartition("\r")[2] for line in said.getvalue().split("\n"))


def _step(run: Path) -> int:
    try:
        return max((row["step"] for row in read_metrics(run)), default=0)
    except FileNotFoundError:
        return 0


def headline(text: str) -> None:
    print(f"\n== {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
