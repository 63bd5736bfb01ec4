"""A study: arms x tasks x learning rates x seeds, each of them a cell, which is a run with its evaluation.

    name: small                       # the group of the runs: GROUP/ARM-TASK-lrRATE-sSEED
    settings: {train.steps: 300}      # keys of every cell
    seeds: [11, 12]
    rates: [1.0e-3, 2.0e-3]           # train.lr of every arm that has no `rates` of its own
    tasks:
      corner: {data.datasets: [tabletop_corner], evaluate.new_skill: corner}
    arms:
      base: {config: configs/baseline_lora.yaml}       # the model before training: one cell a task, without rate and seed
      plain: {config: configs/baseline_lora.yaml}
      gpm: {config: configs/rivals/gpm.yaml, options.energy: 0.99, rates: [2.0e-3], family: gpm}
      wise_ft: {of: plain, alphas: [0.3, 0.6]}          # made of the runs of another arm (core/derived.py): no training of its own
    rule: {subject: graded, reference: plain, choose: [1, 2, 3]}    # studies/rule.py
    stream: [corner, path]            # tasks in this order, each trained on the run of the one before; or {order: [...], frames: 64}

In a stream the key `bases` of an arm that needs an artefact says what protects from the second task on: `accumulated`, one of the run
before, of a probe with frames of each task that was learned (probe-add); `estimated`, one of the run before and the probe as it was;
`kept`, that of the base. Its key `frames` is how many of each learned task are added, in place of the stream's.

A later key overrides an earlier one: the arm's configuration, settings, task, arm, rate and seed. In an arm's value `{task}` is the task's
name, as in `probe.name: "only-{task}"`. Arms of one `family` are settings of one method. What is done is read from the files of the cell
alone (`look`), so that a study may be stopped anywhere, run in parts, and by several machines that share the storage root; of cells that
ran elsewhere a record is enough (studies/records.py).
"""

import copy
import json
import re
from collections import Counter
from dataclasses import dataclass, field, is_dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

import yaml

from vlakeep.core.base_models import model_names
from vlakeep.core.checkpoint import latest_intact, list_checkpoints
from vlakeep.core.config import Config, ConfigError, load_config, to_dict
from vlakeep.core.derived import Making, adapter_of, kept_steps, makings, mistakes, weights
from vlakeep.core.errors import quoted
from vlakeep.core.evaluated import is_evaluated
from vlakeep.core.names import evaluation_name, find_evaluation
from vlakeep.core.options import Stage
from vlakeep.core.registry import method_class
from vlakeep.core.rundir import config_differences, read_metrics
from vlakeep.core.schema import said
from vlakeep.core.stages import EVALUATE, EXPORT, INTERPOLATE, OFFLINE, PROBE_ADD, TRAIN
from vlakeep.core.storage import Storage
from vlakeep.core.strict_yaml import load_yaml, read_mapping

KEYS: Dict[str, Any] = {"name": str, "settings": dict, "seeds": list, "rates": list, "tasks": dict, "arms": dict,
                        "rule": dict, "stream": (list, dict)}
BASES = ("accumulated", "estimated", "kept")
FRAMES = 64  # of each task that was learned, in the probe
BASE = "base"  # the arm of this name is no run
OPEN, BEGUN, READY, TRAINED, DONE, OTHER = "open", "begun", "ready", "trained", "done", "other configuration"
STAGES = {"interpolate": INTERPOLATE, "export": EXPORT}


@dataclass(frozen=True)
class Cell:
    """One run and its evaluation. `pairs`: what its configuration has beyond the file, (key, value)."""

    group: str
    arm: str
    task: str
    rate: float
    seed: int
    file: Optional[str]
    pairs: Tuple[Tuple[str, Any], ...] = field(hash=False)  # lists among its values
    family: str = ""
    # In a stream: the abilities of its tasks, which this one is, the run before, and what the probe has to have beside its items.
    stream: Tuple[str, ...] = ()
    position: int = 0
    before: str = ""
    bases: str = ""
    added: Tuple[Tuple[str, Any], ...] = field(default=(), hash=False)
    # Made of the run of another cell: of which, how, and by which arm of the file.
    source: Optional["Cell"] = None
    making: Optional[Making] = None
    declared: str = ""

    @property
    def name(self) -> str:
        return f"{self.group}/{self.cell}"

    @property
    def cell(self) -> str:
        return f"base-{self.task}" if self.is_base else f"{self.arm}-{self.task}-lr{self.rate:g}-s{self.seed}"

    @property
    def chain(self) -> Tuple[Any, ...]:
        """What has to run one after the other, and on one machine."""
        if self.source is not None:
            return self.source.chain
        return (self.arm, self.rate, self.seed) if self.stream and not self.is_base else (self.cell,)

    @property
    def is_base(self) -> bool:
        return self.arm == BASE

    @property
    def target(self) -> str:
        if self.source is not None and self.making is not None:
            return self.making.target(self.source.name)
        return BASE if self.is_base else self.name

    @property
    def run(self) -> str:
        """The run that is trained for it."""
        return self.source.name if self.source is not None else self.name

    @property
    def of(self) -> Optional[Dict[str, Any]]:
        """What it is made of, for its record; None for a run of its own."""
        return self.making.said(self.source.arm) if self.source is not None and self.making is not None else None

    @property
    def closes(self) -> bool:
        return self.making is not None and self.making.how == "close_to"

    def needs(self, other: "Cell") -> bool:
        """Of two cells of one chain, the other before this one: whether this one is nothing without it."""
        return bool(self.stream) or self.source == other

    def arguments(self, stage: Optional[Stage] = None, more: Sequence[Tuple[str, Any]] = ()) -> List[str]:
        """The command line of a stage after its name, or all keys. A stage refuses keys that it does not read."""
        reads = None if stage is None else set(stage.reads())
        words = ["--config", self.file] if self.file else []
        for key, value in {**dict(self.pairs), "name": self.name, **dict(more)}.items():
            if reads is None or key in reads or (key.startswith("options.") and "options" in reads):
                words += [f"--{key}", said(value)]
        return words

    def config(self, more: Sequence[str] = ()) -> Config:
        """Raises ConfigError. Reading YAML and words takes long against thousands of cells: those of an arm and a task share it."""
        alone = ("seed", "train.lr", "train.from_run", "gains.name", "icsm.name") if self.before else ("seed", "train.lr")
        shared = {key: value for key, value in self.pairs if key not in alone}
        parsed = _loaded(self.file, tuple((key, said(value)) for key, value in shared.items()), tuple(more))
        found = copy.copy(parsed)
        for key, value in vars(parsed).items():  # sections of its own; the lists in them are shared, and nobody writes into these
            if is_dataclass(value) or isinstance(value, dict):
                setattr(found, key, copy.copy(value))
        found.name, found.evaluate.target = self.name, self.target
        if not self.is_base:
            found.seed, found.train.lr = self.seed, self.rate
        own = dict(self.pairs)
        if self.before:
            found.train.from_run, found.gains.name, found.icsm.name = self.before, own.get("gains.name"), own.get("icsm.name")
        return found

    def commands(self, state: str) -> List[List[str]]:
        """Command lines of `vlakeep` that are left to do, stage first."""
        train = ["train", *self.arguments(TRAIN, [("train.resume", True)] if state == BEGUN else [])]
        evaluate = ["evaluate", *self.arguments(EVALUATE, [("evaluate.target", self.target)])]
        if self.source is not None and self.making is not None:
            if state in (DONE, OTHER):
                return []
            run = [words for words in self.source.commands(state) if words[0] != "evaluate"] if state in (OPEN, BEGUN) else []
            words = self.making.words(self.run) if state != TRAINED else []
            made = [[words[0], *self.source.arguments(STAGES[words[0]]), *words[1:]]] if words else []
            return [*run, *made, [*evaluate, "--as", self.name]]
        if self.is_base:
            return [[*evaluate, "--as", self.name]] if state == OPEN else []
        if state == OPEN and self.makes_artefact:
            return [self.offline(), train, evaluate]
        return {OPEN: [train, evaluate], BEGUN: [train, evaluate], TRAINED: [evaluate]}.get(state, [])

    @property
    def makes_artefact(self) -> bool:
        """Whether it is of the run before, and so of this cell alone."""
        if not self.before or self.bases == "kept":
            return False
        config = self.config()
        return method_class(config.method).needs_offline(config)

    def probe_add(self) -> List[str]:
        """The command that makes the probe of a cell in a stream; [] where it is the study's own."""
        if not self.added:
            return []
        arguments = self.arguments(PROBE_ADD)
        return ["probe-add", *arguments, *(word for key, value in self.added for word in (f"--{key}", said(value)))]

    def offline(self, method: Optional[str] = None) -> List[str]:
        """method: whose artefact it is; None: that of the cell's own."""
        return ["offline", *self.arguments(OFFLINE, [("method", method)] if method else [])]


class State(NamedTuple):
    """kind: OPEN nothing is there, BEGUN training has, READY the run is there that its adapter is made of, TRAINED only the evaluation is
    left, DONE, OTHER the run in the cell's folder is of another configuration (`why`)."""

    kind: str
    why: str = ""
    evaluation: Optional[Path] = None
    record: Optional[dict] = None  # of a cell that ran elsewhere


@lru_cache(maxsize=None)
def _parsed(file: Optional[str], pairs: Tuple[Tuple[str, str], ...], more: Tuple[str, ...]) -> Union[Config, ConfigError]:
    try:
        return load_config(file, [*(word for key, value in pairs for word in (f"--{key}", value)), *more])
    except ConfigError as error:  # every cell of the arm and the task has it
        return error


def _loaded(file: Optional[str], pairs: Tuple[Tuple[str, str], ...] = (), more: Tuple[str, ...] = ()) -> Config:
    """What cells share, read once: not to be written into."""
    found = _parsed(file, pairs, more)
    if isinstance(found, ConfigError):
        raise ConfigError(str(found))
    return found


def read_tree(path) -> Dict[str, Any]:
    """A study file as it is written. ConfigError with every mistake that is seen."""
    file = Path(path)
    try:
        tree = load_yaml(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"the study {file} cannot be read: {error}") from error
    wrong = _mistakes(tree)
    if wrong:
        raise ConfigError("\n".join(f"{file}: {line}" for line in wrong))
    return tree


def read_study(path, again: bool = False) -> List[Cell]:
    """The cells of a study file, in the order arms, tasks, rates, seeds. ConfigError with every mistake that is seen.

    again: under the name NAME_again, beside those that were run."""
    file, tree, cells = Path(path), read_tree(path), []
    tree["name"] += "_again" if again else ""
    for arm, own in tree["arms"].items():
        own = dict(own or {})
        if "of" in own:
            cells += _made(arm, own, cells_of(cells, own["of"]))
            continue
        config, rates = own.pop("config", None), own.pop("rates", tree.get("rates") or [None])
        family = own.pop("family", arm)
        for task, keys in tree["tasks"].items():
            keys = {**(tree.get("settings") or {}), **(keys or {}), **_filled(own, task)}
            if arm == BASE:
                pairs = keys
                cells.append(Cell(tree["name"], arm, task, 0.0, 0, config, tuple(pairs.items()), BASE))
                continue
            for rate in rates:
                for seed in tree["seeds"]:
                    pairs = {**keys, "seed": seed}
                    pairs.update({} if rate is None else {"train.lr": float(rate)})
                    rate_of = float(rate) if rate is not None else _rate(config, pairs)
                    cells.append(Cell(tree["name"], arm, task, rate_of, int(seed), config, tuple(pairs.items()), str(family)))
    cells = _stream(tree, cells)
    twice = sorted(name for name, count in Counter(cell.name for cell in cells).items() if count > 1)
    if twice:
        raise ConfigError(f"{file}: two cells have the name {twice[0]}")
    return cells


def _filled(own: Dict[str, Any], task: str) -> Dict[str, Any]:
    """An arm's keys, with the task's name where its values have a place for it."""
    return {key: value.replace("{task}", str(task)) if isinstance(value, str) else value for key, value in own.items()}


def cells_of(cells: Sequence[Cell], arm: str) -> List[Cell]:
    return [cell for cell in cells if cell.arm == arm]


def _made(arm: str, own: Dict[str, Any], sources: Sequence[Cell]) -> List[Cell]:
    """The cells of an arm that is made of others: for every value one of each source."""
    unknown = [rate for rate in own.get("rates") or [] if float(rate) not in {cell.rate for cell in sources}]
    if unknown or not sources:
        raise ConfigError(f"`arms.{arm}`: {own['of']} " + (f"has no rate {unknown[0]:g}" if unknown else f"must stand before {arm}"))
    rates = {float(rate) for rate in own.get("rates") or []}
    return [replace(source, arm=f"{arm}_{making.value:g}", family=str(own.get("family", arm)), source=source, making=making, declared=arm)
            for making in makings(own) for source in sources if not rates or source.rate in rates]


def _stream(tree: Dict[str, Any], cells: List[Cell]) -> List[Cell]:
    """Cells one behind the other, where the study is a stream."""
    given = tree.get("stream")
    if not given:
        return cells
    order, frames = (given, FRAMES) if isinstance(given, list) else (given["order"], given.get("frames", FRAMES))
    names = tuple(dict({**(tree.get("settings") or {}), **(tree["tasks"][task] or {})}).get("evaluate.new_skill", task) for task in order)
    by_chain = {(cell.arm, cell.rate, cell.seed, cell.task): cell for cell in cells}
    found = []
    for arm, rate, seed in dict.fromkeys((cell.arm, cell.rate, cell.seed) for cell in cells):
        before: Optional[Cell] = None
        learned: List[str] = []
        for position, task in enumerate(order):
            cell = by_chain[arm, rate, seed, task]
            own = dict(cell.pairs)
            added: Dict[str, Any] = {}
            bases, added_frames = own.pop("bases", BASES[0]), int(own.pop("frames", frames))
            config = replace(cell, pairs=tuple(own.items())).config()
            if before is not None and arm != BASE:
                own["train.from_run"] = before.name
                if bases == "kept":
                    own["gains.of_first"] = True
                else:
                    own["gains.name"] = own["icsm.name"] = f"{cell.group}.{cell.cell}"
                # Whoever learns without an artefact needs no probe of its own: its drift is measured on the study's.
                if bases == "accumulated" and method_class(config.method).needs_offline(config):
                    to = "+".join([config.probe.name, *learned]) + (f"x{added_frames}" if added_frames != FRAMES else "")
                    added = {"data.datasets": list(learned), "to": to, "frames": added_frames,
                             "probe.name": config.probe.name, "probe.size": config.probe.size}
                    own["probe.name"], own["probe.size"] = to, config.probe.size + added_frames * len(learned)
            cell = replace(cell, pairs=tuple(own.items()), stream=names, position=position, before=own.get("train.from_run", ""),
                           bases=bases, added=tuple(added.items()))
            found.append(cell)
            before = cell
            learned += [name for name in config.data.datasets if name not in learned]
    return found


def _rate(config: Optional[str], pairs: Dict[str, Any]) -> float:
    return float(pairs.get("train.lr") or _loaded(config).train.lr)


def _mistakes(tree) -> List[str]:
    if not isinstance(tree, dict):
        return ["must hold the keys " + ", ".join(KEYS)]
    wrong = [f"unknown key `{key}`; there are {', '.join(KEYS)}" for key in tree if key not in KEYS]
    wrong += [f"`{key}` is missing" for key in ("name", "seeds", "tasks", "arms") if not tree.get(key)]
    wrong += [f"`{key}` must be a {'list' if isinstance(kind, tuple) else kind.__name__}" for key, kind in KEYS.items()
              if tree.get(key) is not None and not isinstance(tree[key], kind)]
    if wrong:
        return wrong
    for what in ("tasks", "arms"):
        wrong += [f"`{what}.{name}`: a name is of letters, digits, dots and underscores, as it becomes part of the name of a run"
                  for name in tree[what] if not re.fullmatch(r"[A-Za-z0-9_.]*[A-Za-z0-9_]", str(name))]
        wrong += [f"`{what}.{name}` must hold keys" for name, own in tree[what].items() if own is not None and not isinstance(own, dict)]
    order = (tree.get("stream") or {}).get("order") if isinstance(tree.get("stream"), dict) else tree.get("stream")
    if tree.get("stream") is not None and (not isinstance(order, list) or len(order) < 2 or len(set(map(str, order))) < len(order)):
        wrong.append("`stream` must be a list of at least two tasks, or have one as its `order`")
    wrong += [f"`stream`: {task} is none of the tasks" for task in order or [] if task not in tree["tasks"]]
    wrong += [f"`arms.{name}.bases` must be one of {', '.join(BASES)}" for name, own in tree["arms"].items()
              if isinstance(own, dict) and "bases" in own and (own["bases"] not in BASES or not order)]
    framed = {f"arms.{name}.frames": own["frames"] for name, own in tree["arms"].items() if isinstance(own, dict) and "frames" in own}
    if isinstance(tree.get("stream"), dict) and "frames" in tree["stream"]:
        framed["stream.frames"] = tree["stream"]["frames"]
    wrong += [f"`{where}` must be a whole number above 0, in a study with a stream, not {number!r}" for where, number in framed.items()
              if type(number) is not int or number < 1 or not order]
    wrong += [f"`seeds`: {seed!r} is no whole number, 0 or above" for seed in tree["seeds"] if type(seed) is not int or seed < 0]
    wrong += [line for name, own in tree["arms"].items() if isinstance(own, dict) and "of" in own
              for line in mistakes(name, own, tree["arms"], bool(order))]
    rates = [rate for own in [tree, *(own for own in tree["arms"].values() if isinstance(own, dict))] for rate in own.get("rates") or []]
    wrong += [f"`rates`: {rate!r} is no number above 0 (YAML reads 1e-3 as a word: write 1.0e-3)" for rate in rates
              if isinstance(rate, bool) or not isinstance(rate, (int, float)) or rate <= 0]
    return wrong


def look(cell: Cell, config: Config, storage: Storage) -> State:
    """How far a cell is, from its own files."""
    if cell.source is not None:
        return _look_made(cell, config, storage)
    if cell.is_base:
        found = [find_evaluation(storage, config.evaluate.benchmark, evaluation_name(cell.name, config.evaluate), model=name)
                 for name in model_names(config.backbone.checkpoint, storage.cache)]
        folder = next((one for one in found if is_evaluated(one, None, config)), None)
        return State(DONE, "", folder) if folder else State(OPEN)
    run = storage.run_folder(cell.name)
    if not (run / "config.yaml").is_file() or not (list_checkpoints(run) or read_rows(run)):
        return State(OPEN)
    changed = config_differences(read_mapping(run / "config.yaml", f"delete the run: rm -r {quoted(run)}"), to_dict(config))
    if changed:
        return State(OTHER, "; ".join(changed))
    checkpoint = latest_intact(run) if list_checkpoints(run) else None
    step = int(checkpoint.name.rpartition("_")[2]) if checkpoint else 0
    if step > config.train.steps:  # a longer run; what stopped at a step on its way is an arm with `at`
        return State(OTHER, f"train.steps: {step} -> {config.train.steps}")
    if checkpoint is None or step < config.train.steps or _status(run) != "finished":
        return State(BEGUN if list_checkpoints(run) or read_rows(run) else OPEN)
    return _left(cell, config, storage, adapter_of(checkpoint))


def _left(cell: Cell, config: Config, storage: Storage, adapter: Optional[str]) -> State:
    folder = find_evaluation(storage, config.evaluate.benchmark, evaluation_name(cell.name, config.evaluate))
    return State(DONE, "", folder) if adapter and is_evaluated(folder, adapter, config) else State(TRAINED)


def _look_made(cell: Cell, config: Config, storage: Storage) -> State:
    """Of a cell that is made of another's run: that run, then the adapter, then its evaluation."""
    assert cell.source is not None and cell.making is not None
    source = look(cell.source, config, storage)
    if source.kind not in (TRAINED, DONE):
        return source
    adapter = weights(cell.making, cell.run, storage)
    if adapter is None and cell.making.how == "at":
        return State(OTHER, f"{cell.run} has no checkpoint of step {cell.making.value}: it was trained with another train.save_every or "
                     "train.keep_last")
    return _left(cell, config, storage, adapter) if adapter else State(READY)


def checkpoint_problem(cell: Cell, config: Config) -> Optional[str]:
    """Where a cell is a checkpoint that its run will not have."""
    kept = kept_steps(config.train)
    if cell.making is None or cell.making.how != "at" or cell.making.value in kept:
        return None
    return (f"`at: {cell.making.value}`: the run keeps checkpoints of the steps {', '.join(map(str, kept))}; set `train.save_every` and "
            "`train.keep_last`")


def named(cells: Sequence[Cell], arms: Sequence[str] = (), tasks: Sequence[str] = (), rates: Sequence[float] = (),
          seeds: Sequence[int] = ()) -> List[Cell]:
    """The cells of these arms, tasks, rates and seeds; an empty list takes all. ConfigError for one that the study does not have."""
    found = list(cells)
    for what, wanted in (("arm", arms), ("task", tasks), ("rate", rates), ("seed", seeds)):
        have = {getattr(cell, what) for cell in cells if not (cell.is_base and what in ("rate", "seed"))}
        have |= {cell.declared for cell in cells if what == "arm" and cell.declared}
        unknown = [one for one in wanted if one not in have]
        if unknown:
            raise ConfigError(f"--{what}s {unknown[0]}: the study has {', '.join(str(one) for one in sorted(have))}")
        found = [cell for cell in found if not wanted or getattr(cell, what) in wanted or (what == "arm" and cell.declared in wanted)
                 or (cell.is_base and what in ("rate", "seed"))]
    return found


def share(cells: Sequence[Cell], part: int, parts: int) -> List[Cell]:
    """The part-th of `parts` shares, counted from 1. Cells are dealt out in turn: neighbours, which take alike, go to different shares.
    Those of a stream stay together."""
    if not 1 <= part <= parts:
        raise ConfigError(f"--part {part}: must be from 1 to --parts, {parts}")
    own = set(list(dict.fromkeys(cell.chain for cell in cells))[part - 1::parts])
    return [cell for cell in cells if cell.chain in own]


def read_rows(run: Path) -> List[dict]:
    return read_metrics(run) if (run / "metrics.jsonl").is_file() else []


def _status(run: Path) -> str:
    try:
        return json.loads((run / "provenance.json").read_text())["status"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
