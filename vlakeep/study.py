"""Stage `vlakeep study`: arms x tasks x learning rates x seeds, trained and evaluated; stopped anywhere, it goes on where it was.

    vlakeep study studies/rivals_small.yaml --dry-run
    vlakeep study studies/rivals_small.yaml --workers 2
    vlakeep study studies/rivals_small.yaml --cell gpm-corner-lr0.002-s11      # one cell, as a job of a cluster calls it
    vlakeep study studies/rivals_small.yaml --table

core/study.py says what a study file holds. Artefacts that are missing are made first. A cell is a process of its own, `--workers` of them
at a time, each on the next GPU where there are several; one that fails is told with the end of its log, and the others go on. Several
machines that share the storage root may each run cells: a run is locked while it is trained.

reads:  the study file; what `vlakeep offline`, train and evaluate read
writes: run_root_dir/<study>/<cell>/ and its evaluation, as train and evaluate do; run_root_dir/<study>/study/: cells.csv, arms.md, logs/
"""

import csv
import io
import os
import queue
import shlex
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

from vlakeep import checks, cli
from vlakeep.core.config import Config, ConfigError
from vlakeep.core.log import log
from vlakeep.core.options import split
from vlakeep.core.registry import method_class
from vlakeep.core.stages import STUDY
from vlakeep.core.storage import Storage, atomic_write, find_checkpoint
from vlakeep.core.study import DONE, OPEN, OTHER, Cell, State, look, read_study, row, seconds
from vlakeep.models.load import model_name
from vlakeep.reporting.intervals import t_interval

SHOWN = ("new", "old", "worst", "questions", "action_kl", "probe_kl")
TAIL = 6  # lines of a failed cell's log that are shown


class Study(NamedTuple):
    """The cells with their configurations, and the words that every command of theirs gets (the folders)."""

    file: str
    cells: List[Cell]
    configs: Dict[Cell, Config]
    storage: Storage
    folders: List[str]

    def states(self) -> Dict[Cell, State]:
        return {cell: look(cell, self.configs[cell], self.storage) for cell in self.cells}

    def folder(self) -> Path:
        return self.storage.run_folder(self.cells[0].group) / "study"


def open_study(file: str, folders: Sequence[str]) -> Study:
    """ConfigError with the mistakes of all cells."""
    cells, configs, wrong = read_study(file), {}, {}
    for cell in cells:
        try:
            configs[cell] = cell.config(folders)
        except ConfigError as error:
            wrong.setdefault(str(error), cell.cell)
    if wrong:
        raise ConfigError("\n".join(f"{file}, cell {cell}: {error}" for error, cell in wrong.items()))
    return Study(file, cells, configs, Storage.from_config(configs[cells[0]]), list(folders))


def artefacts(study: Study) -> Dict[Path, List[Cell]]:
    """Artefact's folder -> the cells that read it."""
    found: Dict[Path, List[Cell]] = {}
    for cell, config in study.configs.items():
        kind = method_class(config.method)
        if kind.needs_offline(config):
            base = model_name(find_checkpoint(config.backbone.checkpoint, study.storage.cache))
            found.setdefault(kind.artifact_folder(config, study.storage, base), []).append(cell)
    return found


def missing(study: Study, cells: Sequence[Cell]) -> List[str]:
    """What these cells need and nobody makes for them, each with its remedy."""
    lines, seen = [], set()
    for cell in cells:
        config = study.configs[cell]
        data = (tuple(config.data.datasets), config.probe.name)
        if data not in seen:
            seen.add(data)
            found = checks.check_data(config, study.storage)
            found += checks.check_probe(config, study.storage)[0] if method_class(config.method).needs_offline(config) else []
            lines += [f"{line.what}: {line.where}\n    {line.remedy}" for line in found if line.status == checks.RED]
    return list(dict.fromkeys(lines))


def command(*words: str) -> str:
    return shlex.join(["vlakeep", *words])


def show_plan(study: Study) -> None:
    """Cells and how far they are, their commands, the cost, what is missing."""
    states = study.states()
    todo = [cell for cell in study.cells if states[cell].kind not in (DONE, OTHER)]
    for folder, cells in artefacts(study).items():
        if not folder.is_dir() and any(cell in todo for cell in cells):
            print(f"first    {command(*cells[0].offline(), *study.folders)}")
    for cell in study.cells:
        state = states[cell]
        print(f"{state.kind:8s} {cell.cell}" + (f": {state.why}" if state.why else ""))
        for words in cell.commands(state.kind):
            print(f"             {command(*words, *study.folders)}")
    steps = sum(study.configs[cell].train.steps for cell in todo)
    known = [spent for cell in study.cells if (spent := seconds(cell, study.storage, states[cell])) is not None]
    price = f", about {human(sum(known) / len(known) * len(todo))} on one worker as the {len(known)} done took" if known else ""
    print(f"{len(todo)} of {len(study.cells)} cells to do, {steps} steps of training{price}")
    for line in missing(study, todo):
        print(f"MISSING {line}")


def human(spent: float) -> str:
    return f"{spent:.0f} s" if spent < 120 else f"{spent / 60:.0f} min" if spent < 7200 else f"{spent / 3600:.1f} h"


# Running


def run_cell(study: Study, cell: Cell, call: Callable[[List[str]], int] = cli.run) -> int:
    """Do what is left of a cell, in this process; the exit status."""
    state = look(cell, study.configs[cell], study.storage)
    if state.kind == OTHER:
        raise ConfigError(f"the run {cell.name} was made with another configuration: {state.why}\nGive the study another `name`, or move "
                          f"{study.storage.run_folder(cell.name)} away")
    for words in cell.commands(state.kind):
        status = call([*words, *study.folders])
        if status:
            return status
    return 0


class Launcher:
    """Runs command lines of `vlakeep` as processes, at most `workers` at a time, each on a GPU of its own where there are several."""

    def __init__(self, workers: int, gpus: int = 0):
        self._slots: "queue.Queue[int]" = queue.Queue()
        for slot in range(workers):
            self._slots.put(slot)
        self._gpus, self._running, self._lock, self._stopped = gpus, set(), threading.Lock(), False

    def __call__(self, words: List[str], log_file: Path) -> int:
        slot = self._slots.get()
        try:
            environment = dict(os.environ)
            if self._gpus > 1:
                environment["CUDA_VISIBLE_DEVICES"] = str(slot % self._gpus)
            log_file.parent.mkdir(parents=True, exist_ok=True)
            with open(log_file, "wb") as file:
                with self._lock:
                    if self._stopped:
                        return 143
                    process = subprocess.Popen([sys.executable, "-m", "vlakeep.cli", *words], stdout=file, stderr=subprocess.STDOUT,
                                               env=environment)
                    self._running.add(process)
                try:
                    return process.wait()
                finally:
                    with self._lock:
                        self._running.discard(process)
        finally:
            self._slots.put(slot)

    def stop(self) -> None:
        """Ask the processes to save and end; none is started after this."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                process.terminate()


def run_study(study: Study, workers: int, launch: Optional[Callable[[List[str], Path], int]] = None) -> Dict[str, str]:
    """Run what is left; returns cell -> why it failed. Writes the tables."""
    launcher = launch or Launcher(workers, _gpus())
    states, logs, failed = study.states(), study.folder() / "logs", {}
    todo = [cell for cell in study.cells if states[cell].kind != DONE]
    log.info(f"{study.cells[0].group}: {len(study.cells)} cells, {len(study.cells) - len(todo)} of them done")
    for number, (folder, cells) in enumerate(artefacts(study).items()):
        waiting = [cell for cell in cells if cell in todo]
        if not folder.is_dir() and waiting:
            status = launcher([*cells[0].offline(), *study.folders], logs / f"offline-{number}.log")
            if status:
                why = _why(status, logs / f"offline-{number}.log")
                failed.update({cell.cell: f"its artefact {folder.name} could not be made: {why}" for cell in waiting})
    started, ended = time.perf_counter(), 0
    queued = [cell for cell in todo if cell.cell not in failed]
    with ThreadPoolExecutor(workers) as pool:
        jobs = {pool.submit(launcher, ["study", study.file, "--cell", cell.cell, *study.folders], logs / f"{cell.cell}.log"): cell
                for cell in queued}
        try:
            for job in as_completed(jobs):
                cell, ended = jobs[job], ended + 1
                status = job.result()
                kind = look(cell, study.configs[cell], study.storage).kind
                if status or kind != DONE:
                    failed[cell.cell] = _why(status, logs / f"{cell.cell}.log")
                # All workers are busy until the last cells, so that the mean time per ended cell holds for those that are left.
                left = (time.perf_counter() - started) / ended * (len(queued) - ended)
                log.info(f"[{ended}/{len(queued)}, about {human(left)} left] {cell.cell}: "
                         + (f"FAILED, {failed[cell.cell]}" if cell.cell in failed else "done"))
        except BaseException:
            if isinstance(launcher, Launcher):
                launcher.stop()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    write_tables(study)
    return failed


def _gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _why(status: int, log_file: Path) -> str:
    lines = log_file.read_text(encoding="utf-8", errors="replace").splitlines() if log_file.is_file() else []
    return f"exit status {status}, see {log_file}" + "".join(f"\n    {line}" for line in [one for one in lines if one.strip()][-TAIL:])


# Tables


def rows_of(study: Study) -> List[Dict[str, Any]]:
    return [row(cell, study.configs[cell], study.storage, state) for cell, state in study.states().items()]


def to_csv(rows: Sequence[Dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(key for one in rows for key in one))
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def summary_of(rows: Sequence[Dict[str, Any]]) -> str:
    """Markdown, a line for every arm and rate: means over its cells with 95 % t intervals over training seeds, a seed counting as one
    value, its mean over tasks."""
    lines = ["| arm | rate | cells | " + " | ".join(SHOWN) + " |", "|---" * (3 + len(SHOWN)) + "|"]
    for arm, rate in dict.fromkeys((one["arm"], one["rate"]) for one in rows):
        own = [one for one in rows if (one["arm"], one["rate"]) == (arm, rate)]
        done = [one for one in own if one["state"] == DONE]
        cells = [spread([(one["seed"], one[key]) for one in done if one.get(key) is not None]) for key in SHOWN]
        lines.append(f"| {arm} | {rate:g} | {len(done)} of {len(own)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def spread(values: Sequence[Tuple[int, float]]) -> str:
    """Mean over seeds and half of its interval, of (seed, value)."""
    seeds: Dict[int, List[float]] = {}
    for seed, value in values:
        seeds.setdefault(seed, []).append(value)
    means = [sum(own) / len(own) for own in seeds.values()]
    if not means:
        return ""
    if len(means) == 1:
        return f"{means[0]:.3g}"
    mean, low, _ = t_interval(means)
    return f"{mean:.3g} ±{mean - low:.2g}"


def write_tables(study: Study) -> str:
    folder = study.storage.guard_write(study.folder(), what="tables")
    folder.mkdir(parents=True, exist_ok=True)
    rows = rows_of(study)
    text = summary_of(rows)
    for name, content in (("cells.csv", to_csv(rows)), ("arms.md", text)):
        with atomic_write(folder / name, "w") as file:
            file.write(content)
    return text


def main(argv: List[str]) -> int:
    args, _, folders = split(STUDY, argv)
    study = open_study(args.study, folders)
    if args.cell:
        found = [cell for cell in study.cells if cell.cell == args.cell]
        if not found:
            raise ConfigError(f"--cell {args.cell}: the study has no such cell; `{command('study', args.study, '--dry-run')}` lists them")
        return run_cell(study, found[0])
    if getattr(args, "dry-run"):
        show_plan(study)
        return 0
    if not args.table:
        lacking = missing(study, [cell for cell, state in study.states().items() if state.kind == OPEN])
        if lacking:
            raise ConfigError("what the study needs is missing:\n" + "\n".join(lacking))
        failed = run_study(study, args.workers)
        for cell, why in failed.items():
            log.warning(f"FAILED {cell}: {why}")
        print((study.folder() / "arms.md").read_text(encoding="utf-8"), end="")
        return 1 if failed else 0
    print(write_tables(study), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
