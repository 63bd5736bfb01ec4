"""Stage `vlakeep study`: arms x tasks x learning rates x seeds, trained and evaluated; stopped anywhere, it goes on where it was.

    vlakeep study studies/rivals_small.yaml --dry-run
    vlakeep study studies/rivals_small.yaml --workers 2
    vlakeep study studies/rivals_small.yaml --cell gpm-corner-lr0.002-s11      # one cell, as a job of a cluster calls it
    vlakeep study studies/rivals_small.yaml --table
    vlakeep study studies/rivals_small.yaml --report
    vlakeep study studies/rivals_small.yaml --paper T1
    vlakeep study studies/rivals_small.yaml --rerun 3                 # random cells once more, against their records
    vlakeep study studies/rivals_small.yaml --part 1 --parts 4 --seconds 500 --export part1.jsonl      # on one machine of four
    vlakeep study studies/rivals_small.yaml --import part1.jsonl,part2.jsonl
    vlakeep study studies/libero_7b.yaml --hardware v100x8 --workers 8        # what the cells take is chosen for a card (studies/cards.py)

core/study.py says what a study file holds, studies/records.py what is exported. Artefacts that are missing are made first. A cell is a
process of its own, `--workers` of them at a time, each on the next GPU where there are several; one that fails is told with the end of its
log, and the others go on. Several machines that share the storage root may each run cells: a run is locked while it is trained.

reads:  the study file; what `vlakeep offline`, train and evaluate read; records of cells that ran elsewhere
writes: run_root_dir/<study>/<cell>/ and its evaluation, as train and evaluate do; run_root_dir/<study>/study/: cells.csv, arms.md, with a
        rule claims.md and its tables, imported.jsonl, logs/
"""

import functools
import shlex
import sys
import threading
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

from vlakeep import checks, cli
from vlakeep.core.base_models import name_in_store
from vlakeep.core.config import Config, ConfigError, load_config
from vlakeep.core.log import log
from vlakeep.core.next_step import completed_remedy
from vlakeep.core.options import split
from vlakeep.core.registry import method_class
from vlakeep.core.stages import STUDY
from vlakeep.core.storage import Storage, atomic_write
from vlakeep.core.study import BEGUN, DONE, OPEN, OTHER, Cell, State, checkpoint_problem, look, named, read_study, read_tree, share
from vlakeep.studies import again, claims, paper, report, streams, tables
from vlakeep.studies.cards import card_words, on_card
from vlakeep.studies.records import differences, line_of, read_records, record_of, same, write_records
from vlakeep.studies.rule import Rule, of_reported, read_rule, to_report
from vlakeep.studies.schedulers import Launcher, at_once, scheduler

TAIL = 6  # lines of a failed cell's log that are shown


class Study(NamedTuple):
    """The cells with their configurations, and the words that every command of theirs gets (the folders)."""

    file: str
    cells: List[Cell]
    configs: Dict[Cell, Config]
    storage: Storage
    folders: List[str]
    card: Sequence[str] = ()  # --hardware and the keys that beat it, which every call of the study needs

    def states(self) -> Dict[Cell, State]:
        imported = self.imported()
        return {cell: self._state(cell, imported.get(cell.cell)) for cell in self.cells}

    def _state(self, cell: Cell, record: Optional[Dict[str, Any]]) -> State:
        state = look(cell, self.configs[cell], self.storage)
        if record is None or state.kind in (DONE, OTHER):
            return state
        changed = differences(record, self.configs[cell], cell.of)
        return State(OTHER, f"its record has {'; '.join(changed)}") if changed else State(DONE, record=record)

    def imported(self) -> Dict[str, Dict[str, Any]]:
        """Records of cells that ran elsewhere, by cell."""
        file = self.folder() / "imported.jsonl"
        return {record["cell"]: record for record in read_records(file)} if file.is_file() else {}

    def records(self, states: Optional[Dict[Cell, State]] = None) -> List[Dict[str, Any]]:
        """Of all cells that are done, in the order of the study. states: as they were just found; None looks."""
        known = self.states() if states is None else states
        found = [record_of(cell, self.configs[cell], self.storage, known[cell]) for cell in self.cells]
        return [record for record in found if record is not None]

    def folder(self) -> Path:
        return self.storage.run_folder(self.cells[0].group) / "study"


def open_study(file: str, folders: Sequence[str], again: bool = False, only: Optional[str] = None, card: Sequence[str] = ()) -> Study:
    """ConfigError with the mistakes of all cells and of the rule. only: a cell; thousands of others then get no configuration. card: NAME
    of --hardware and pairs --key=value that beat it."""
    cells, configs, wrong = read_study(file, again), {}, {}
    read_rule(read_tree(file), cells)
    if card:
        cells, lines = on_card(cells, card, Storage.from_config(load_config(None, list(folders)), create=False).cache)
        log.info("\n".join(lines))
    for cell in [cell for cell in cells if only is None or cell.cell == only] or cells[:1]:
        try:
            configs[cell] = cell.config(folders)
            problem = checkpoint_problem(cell, configs[cell])
            if problem:
                raise ConfigError(problem)
        except ConfigError as error:
            wrong.setdefault(str(error), cell.cell)
    if wrong:
        raise ConfigError("\n".join(f"{file}, cell {cell}: {error}" for error, cell in wrong.items()))
    return Study(file, cells, configs, Storage.from_config(next(iter(configs.values()))), list(folders), list(card))


class Artefact(NamedTuple):
    """The cells that read it, and the command that makes it."""

    cells: List[Cell]
    words: List[str]


def artefacts(study: Study) -> Dict[Path, Artefact]:
    """Artefact's folder -> who reads it. A closing pass reads that of method `graded`, beside the one that its run is trained with."""
    found: Dict[Path, Artefact] = {}
    for cell, config in study.configs.items():
        own = [] if cell.makes_artefact or not method_class(config.method).needs_offline(config) else [config.method]
        for method in dict.fromkeys([*own, *(["graded"] if cell.closes else [])]):
            base = name_in_store(config.backbone.checkpoint, study.storage.cache)
            folder = method_class(method).artifact_folder(config, study.storage, base)
            other = method if method != config.method else None
            if folder not in found:
                found[folder] = Artefact([], cell.offline(other))
            found[folder].cells.append(cell)
    return found


def probes(study: Study, cells: Sequence[Cell]) -> Dict[str, List[str]]:
    """Probe that a stream needs and that is not there -> the command that makes it."""
    return {study.configs[cell].probe.name: cell.probe_add() for cell in cells
            if cell.added and cell.makes_artefact and not study.storage.probe_folder(study.configs[cell].probe.name).is_dir()}


def missing(study: Study, cells: Sequence[Cell]) -> List[str]:
    """What these cells need and nobody makes for them, each with its remedy."""
    lines: List[str] = []
    seen = set()

    def first(*key) -> bool:
        new = key not in seen
        seen.add(key)
        return new

    reading = [cell for cell in cells if (method_class(study.configs[cell].method).needs_offline(study.configs[cell]) or cell.closes)
               and not cell.added]
    largest = {study.configs[cell].probe.name: cell for cell in sorted(reading, key=lambda cell: study.configs[cell].probe.size)}
    for cell in cells:
        config, found = study.configs[cell], []
        if first("base", config.backbone.checkpoint):
            found += [line for line in checks.check_checkpoint(config, study.storage.cache)[0] if line.what == "base model"]
        names = config.data.datasets if cell.is_base else method_class(config.method).data_sets(config)
        found += checks.check_data(config, study.storage, [name for name in names if first("data", name)])
        if cell in reading and largest[config.probe.name] == cell:  # as large as any asks for, and told once
            found += checks.check_probe(config, study.storage)[0]
        if config.evaluate.probe and first("evaluate.probe", config.evaluate.probe, config.probe.name):
            found += checks.check_heldout(config, study.storage)
        lines += [f"{line.what}: {line.where}\n    {completed_remedy(line.remedy, ['offline', *study.folders])}"
                  for line in found if line.status == checks.RED]
    return list(dict.fromkeys(lines))


def command(*words: str) -> str:
    return shlex.join(["vlakeep", *words])


def show_plan(study: Study, states: Dict[Cell, State]) -> None:
    """Cells and how far they are, their commands, the cost, what is missing."""
    todo = [cell for cell in study.cells if states[cell].kind not in (DONE, OTHER)]
    for words in probes(study, todo).values():
        print(f"first    {command(*words, *study.folders)}")
    for folder, needed in artefacts(study).items():
        if not folder.is_dir() and any(cell in todo for cell in needed.cells):
            print(f"first    {command(*needed.words, *study.folders)}")
    for cell in study.cells:
        state = states[cell]
        print(f"{state.kind:8s} {cell.cell}" + (f": {state.why}" if state.why else ""))
        for words in cell.commands(state.kind):
            if cell.source not in todo or words[0] not in ("offline", "train"):  # else the cell that it is made of shows them
                print(f"             {command(*words, *study.folders)}")
    runs = {cell.run: study.configs[cell].train.steps for cell in todo if not cell.is_base and states[cell].kind in (OPEN, BEGUN)}
    known = [spent for record in study.records(states) if (spent := took(record)) is not None]
    price = f", about {human(sum(known) / len(known) * len(todo))} on one worker as the {len(known)} done took" if known else ""
    print(f"{len(todo)} of {len(study.cells)} cells to do, {len(runs)} trainings, {sum(runs.values())} steps in all{price}")
    for line in missing(study, todo):
        print(f"MISSING {line}")


def took(record: Dict[str, Any]) -> Optional[float]:
    """Seconds of its own training and evaluation; None where one is not known."""
    parts = [record["seconds"]["evaluate"], *([] if record["arm"] == "base" or "of" in record else [record["seconds"]["train"]])]
    return None if None in parts else sum(parts)


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


def run_study(study: Study, workers: int, launch: Optional[Callable[[List[str], Path], int]] = None, most: Optional[float] = None,
              export: Optional[Path] = None) -> Dict[str, str]:
    """Run what is left; returns cell -> why it failed. Writes the tables.

    most: seconds after which no cell is started; export: file that gets the records of what is done, a line with each cell that ends.
    """
    launcher: Callable[[List[str], Path], int] = launch or Launcher(workers, _gpus())
    states, logs, failed = study.states(), study.folder() / "logs", {}
    todo = [cell for cell in study.cells if states[cell].kind != DONE]
    begun = time.perf_counter()
    if export:
        write_records(export, study.records())
    log.info(f"{study.cells[0].group}: {len(study.cells)} cells, {len(study.cells) - len(todo)} of them done")
    for number, (name, words) in enumerate(probes(study, todo).items()):
        if launcher([*words, *study.folders], logs / f"probe-{number}.log"):
            failed.update({cell.cell: f"its probe {name} could not be made, see {logs / f'probe-{number}.log'}" for cell in todo
                           if study.configs[cell].probe.name == name})
    lacking = [(folder, needed, logs / f"offline-{number}.log") for number, (folder, needed) in enumerate(artefacts(study).items())
               if not folder.is_dir() and any(cell in todo for cell in needed.cells)]
    statuses = at_once(launcher, workers, [functools.partial(launcher, [*needed.words, *study.folders], file)
                                           for _, needed, file in lacking])
    for (folder, needed, file), status in zip(lacking, statuses):
        if status:
            failed.update({cell.cell: f"its artefact {folder.name} could not be made: {_why(status, file)}" for cell in needed.cells
                           if cell in todo})
    started, ended = time.perf_counter(), 0
    queued = [cell for cell in todo if cell.cell not in failed]
    chains: Dict[Any, List[Cell]] = {}
    for cell in queued:
        chains.setdefault(cell.chain, []).append(cell)
    told = threading.Lock()

    def ran(cell: Cell, status: int) -> bool:
        """Tell how a cell ended; whether it is done."""
        nonlocal ended
        with told:
            ended += 1
            state = look(cell, study.configs[cell], study.storage)
            if state.kind == DONE and export:
                with open(export, "a", encoding="utf-8") as file:
                    file.write(line_of(record_of(cell, study.configs[cell], study.storage, state)))
            if status or state.kind != DONE:
                failed[cell.cell] = _why(status, logs / f"{cell.cell}.log")
            # All workers are busy until the last cells, so that the mean time per ended cell holds for those that are left.
            left = (time.perf_counter() - started) / ended * (len(queued) - ended)
            log.info(f"[{ended}/{len(queued)}, about {human(left)} left] {cell.cell}: "
                     + (f"FAILED, {failed[cell.cell]}" if cell.cell in failed else "done"))
            return cell.cell not in failed

    def start(chain: List[Cell]) -> int:
        """Run cells one after the other; how many were not started."""
        for number, cell in enumerate(chain):
            if cell.cell in failed:
                continue
            if most is not None and time.perf_counter() - begun > most:
                return len([later for later in chain[number:] if later.cell not in failed])
            if not ran(cell, launcher(cell_words(study, cell), logs / f"{cell.cell}.log")):
                failed.update({later.cell: f"the run before it failed: {cell.cell}" for later in chain[number + 1:] if later.needs(cell)})
        return 0

    left_out = sum(at_once(launcher, workers, [functools.partial(start, chain) for chain in chains.values()]))
    if left_out:
        log.info(f"{left_out} cells were not started: {most:g} s were over; the same command goes on")
    if export:
        write_records(export, study.records())
    write_tables(study)
    return failed


def rerun(study: Study, count: int, workers: int, launch: Optional[Callable[[List[str], Path], int]] = None,
          seed: Optional[int] = None) -> int:
    """Run `count` cells of which there are records again, under the name NAME_again, and show how they compare; 1 unless all are the
    same."""
    records = {record["cell"]: record for record in study.records()}
    chosen = {cell.cell for cell in again.drawn([cell for cell in study.cells if cell.cell in records], count, seed)}
    second = open_study(study.file, study.folders, again=True, card=study.card)
    second = second._replace(cells=[cell for cell in second.cells if cell.cell in chosen])
    failed = run_study(second, workers, launch)
    found = {record["cell"]: again.compared(records[record["cell"]], record) for record in second.records() if record["cell"] in records}
    print(again.table(found).markdown(), end="")
    for cell, why in failed.items():
        log.warning(f"FAILED {cell}: {why}")
    return 1 if failed or not found or any(one["differs"] for one in found.values()) else 0


def take_in(study: Study, files: Sequence[str]) -> str:
    """Merge records of cells that ran elsewhere into those of the study; what to say about it.

    ConfigError for a record of another configuration, and for two of one cell that differ.
    """
    cells, found = {cell.cell: cell for cell in study.cells}, study.imported()
    before, foreign, wrong = len(found), 0, []
    for file in files:
        for record in read_records(file):
            cell = cells.get(record["cell"])
            if cell is None or record["study"] != cell.group:
                foreign += 1
                continue
            lines = differences(record, study.configs[cell], cell.of)
            lines += [f"{key} is not that of the record that is there" for key in same(found.get(cell.cell, record), record)]
            wrong += [f"{file}, {cell.cell}: {line}" for line in lines]
            found[cell.cell] = record
    if wrong:
        raise ConfigError("\n".join(wrong))
    write_records(study.storage.guard_write(study.folder(), what="records") / "imported.jsonl",
                  [found[cell.cell] for cell in study.cells if cell.cell in found])
    return f"{len(found) - before} cells taken in" + (f"; {foreign} records are of cells that the study does not have" if foreign else "")


def cell_words(study: Study, cell: Cell) -> List[str]:
    """The command line that runs a cell."""
    beside = ["--again"] if cell.group.endswith("_again") and read_tree(study.file)["name"] != cell.group else []
    return ["study", study.file, "--cell", cell.cell, *beside, *study.card, *study.folders]


def _gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _why(status: int, log_file: Path) -> str:
    lines = log_file.read_text(encoding="utf-8", errors="replace").splitlines() if log_file.is_file() else []
    return f"exit status {status}, see {log_file}" + "".join(f"\n    {line}" for line in [one for one in lines if one.strip()][-TAIL:])


# Tables


def write_tables(study: Study) -> str:
    folder = study.storage.guard_write(study.folder(), what="tables")
    folder.mkdir(parents=True, exist_ok=True)
    states = study.states()
    records = study.records(states)
    rows = tables.rows(study.cells, records, {cell.cell: state.kind for cell, state in states.items()})
    text = tables.summary(rows)
    files = {"cells.csv": tables.to_csv(rows), "arms.md": text}
    rule = read_rule(read_tree(study.file), read_study(study.file))
    if rule is not None:
        files.update(claims.files(study.cells, records, rule))
        text += "\n" + files["claims.md"]
    found = streams.files(of_reported(rule, records), rule.reference if rule else None)
    text += "\n" + found["streams.md"] if found else ""
    for name, content in {**files, **found}.items():
        with atomic_write(folder / name, "w") as file:
            file.write(content)
    return text


def judged_by(study: Study) -> Tuple[Rule, List[Dict[str, Any]]]:
    """The rule of the study and its records. ConfigError where one is missing."""
    rule = read_rule(read_tree(study.file), read_study(study.file))
    if rule is None:
        raise ConfigError(f"{study.file} has no `rule`: a report needs to know what is compared (docs/study.md)")
    records = study.records()
    if not records:
        raise ConfigError(f"no cell is done: run `{command('study', study.file, *study.card)}`, or take records in with --import")
    return rule, records


def write_report(study: Study, out: Path) -> Path:
    rule, records = judged_by(study)
    commands = [command("study", study.file, *study.card), command("study", study.file, *study.card, "--report")]
    return report.build(study.cells, records, rule, out.expanduser().absolute(), commands)


def main(argv: List[str]) -> int:
    args, _, pairs = split(STUDY, argv)
    folders, card = card_words(pairs, args.hardware, args.scheduler)
    study = open_study(args.study, folders, args.again, args.cell, card)
    if args.cell:
        found = [cell for cell in study.cells if cell.cell == args.cell]
        if not found:
            listed = command("study", args.study, *card, "--dry-run")
            raise ConfigError(f"--cell {args.cell}: the study has no such cell; `{listed}` lists them")
        return run_cell(study, found[0])
    taken = getattr(args, "import")
    if taken:
        print(take_in(study, taken))
    cells, states = study.cells, None
    if args.chosen:
        states = study.states()
        cells = to_report(read_rule(read_tree(study.file), cells), cells, study.records(states), args.chosen == "best")
    some = study._replace(cells=share(named(cells, args.arms, args.tasks, args.rates, args.seeds), args.part, args.parts))
    if not some.cells and not (args.table or args.report or args.paper or taken):
        print(f"nothing to do: no cell is left for --part {args.part} of --parts {args.parts}")  # no failure of a job of many
        if args.export:
            write_records(args.export, [])
        return 0
    if getattr(args, "dry-run"):
        show_plan(some, states or some.states())
        return 0
    if args.paper:
        rule, records = judged_by(study)
        for path in paper.write(study.cells, records, rule, args.paper, Path(args.out or study.folder() / "paper").expanduser().absolute()):
            print(path)
        return 0
    if args.report:
        print(write_report(study, Path(args.out or study.folder() / "report")))
        return 0
    launch = scheduler(args.scheduler, some.storage.root, study.folder() / "logs" / "jobs", args.resources)
    if args.rerun:
        return rerun(some, args.rerun, args.workers, launch)
    failed: Dict[str, str] = {}
    if not args.table and not taken:
        lacking = missing(some, [cell for cell, state in some.states().items() if state.kind == OPEN])
        if lacking:
            raise ConfigError("what the study needs is missing:\n" + "\n".join(lacking))
        failed = run_study(some, args.workers, launch, most=args.seconds, export=Path(args.export) if args.export else None)
        for cell, why in failed.items():
            log.warning(f"FAILED {cell}: {why}")
    elif args.export:
        write_records(args.export, some.records())
    print(write_tables(study), end="")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
