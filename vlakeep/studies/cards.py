"""The cells of a study on one kind of card: what a profile of `--hardware` changes in them (core/hardware.py, planning/fit.py).

    vlakeep study studies/libero_7b.yaml --hardware v100x8

A key that the study file or an arm's configuration names stays where the card can do it, since the study is what is written there; the
profile sets what nobody names and what the card cannot do, and the command line beats both. All cells of one base agree in how its weights
lie on the card: another type, or 4 bits, is another base, whose artefact, runs and evaluations are its own. A cell runs on one card.
"""

from dataclasses import replace
from functools import lru_cache
from operator import attrgetter
from pathlib import Path
from typing import Any, Dict, FrozenSet, List, NamedTuple, Optional, Sequence, Tuple

from vlakeep.core.config import Config, ConfigError
from vlakeep.core.hardware import DECIDED, GIB, Choice, Hardware, able, hardware, types
from vlakeep.core.sameness import flat
from vlakeep.core.schema import find_config, read_pairs, read_yaml, said
from vlakeep.core.study import Cell
from vlakeep.planning.fit import apply, batch_choices, quantisation_choice
from vlakeep.planning.predict import Model, Planner, find_model

SPLIT = {"train.batch_size", "train.accumulation"}  # of the samples of a step
# Keys of a cell that are its own among those of its arm and task, and decide nothing here.
OWN = ("seed", "train.lr", "train.from_run", "gains.name", "icsm.name")
Like = Tuple[Any, ...]


class _Group(NamedTuple):
    """Cells that differ in seed and rate alone: one of them, its configuration as it will be, and the keys that somebody names."""

    cell: Cell
    config: Config
    named: FrozenSet[str]
    chosen: Dict[str, Any]

    def choose(self, choices: Sequence[Choice]) -> None:
        apply(self.config, choices)
        self.chosen.update({one.key: one.typed for one in choices})

    @property
    def label(self) -> str:
        return f"{self.cell.declared or self.cell.arm}, {self.cell.task}"


def card_words(pairs: Sequence[str], name: Optional[str], scheduler: str) -> Tuple[List[str], List[str]]:
    """(the folders among the command line's pairs, --hardware NAME with the pairs that beat it). ConfigError for what it does not take."""
    decided = [pair for pair in pairs if pair[2:].partition("=")[0] in DECIDED]
    if decided and not name:
        raise ConfigError(f"{decided[0]}: the study file says it for its cells; here it goes with --hardware NAME, and beats "
                          "what that chooses")
    if name == "auto" and scheduler != "local":
        raise ConfigError("--hardware auto looks at this machine, and the cells run on others: name their card")
    return [pair for pair in pairs if pair not in decided], ["--hardware", name, *decided] if name else []


def on_card(cells: Sequence[Cell], words: Sequence[str], cache: Path) -> Tuple[List[Cell], List[str]]:
    """(the cells with what the profile and the command line set, a line for each choice with its reason). words: --hardware NAME and pairs.
    Cells whose configuration is wrong are left as they are: who reads it tells why."""
    card, given = hardware(words[1]), read_pairs(Config, list(words[2:]))
    groups: Dict[Like, _Group] = {}
    for cell in cells:
        if _like(cell) not in groups:
            try:
                config = cell.config([word for key, value in given for word in (f"--{key}", value)])
            except ConfigError:
                continue
            groups[_like(cell)] = _Group(cell, config, _named(cell.file) | {key for key, _ in cell.pairs}, dict(given))
    told: Dict[str, List[str]] = {}  # line -> who it is about
    bases: Dict[str, List[_Group]] = {}
    for group in groups.values():
        bases.setdefault(group.config.backbone.checkpoint, []).append(group)
    fixed = {key for key, _ in given}
    for base, own in bases.items():
        _set_types(own, card, fixed, told)
        try:
            model = find_model(own[0].config, cache)
        except (ValueError, OSError, KeyError) as error:
            told[f"what of {base} fits is decided when it is there: {str(error).partition(' (')[0]}"] = []
            continue
        _set_quantisation(own, model, card, fixed, told)
        for group in own:
            _set_batch(group, model, card, fixed, told)
    lines = [f"{card.name}: {line}" + (f" [{'; '.join(dict.fromkeys(who))}]" if who else "") for line, who in told.items()]
    return _replaced(cells, groups), lines


def _like(cell: Cell) -> Like:
    return cell.file, cell.is_base, bool(cell.before), *((key, said(value)) for key, value in cell.pairs if key not in OWN)


@lru_cache(maxsize=None)
def _named(file: Optional[str]) -> FrozenSet[str]:
    """Keys that a configuration file names."""
    return frozenset(key for key, _ in flat(read_yaml(Config, find_config(file)))) if file else frozenset()


def _set_types(own: Sequence[_Group], card: Hardware, fixed, told) -> None:
    for choice in types(card):
        values = {said(attrgetter(choice.key)(group.config)) for group in own if choice.key in group.named}
        if choice.key in fixed or (values and all(able(card, choice.key, value) for value in values)):
            continue
        for group in own:
            group.choose([choice])
        instead = f", in place of {' and '.join(sorted(values))}" if values - {choice.value} else ""
        told[f"--{choice.key} {choice.value} ({choice.reason}){instead}"] = []


def _set_quantisation(own: Sequence[_Group], model: Model, card: Hardware, fixed, told) -> None:
    whole = [group for group in own if group.config.backbone.quantisation == "none"]
    found = {group.label: quantisation_choice(group.config, model, card, fixed=fixed) for group in whole}
    choices = next((one for one in found.values() if one), [])
    refusing = [label for label, one in found.items() if not one]
    if choices and refusing:
        told[f"--backbone.quantisation none, though {choices[0].reason}: all cells of a base agree, and some refuse 4 bits (a run that is "
             "trained on, LoRA on all linears, a shared base)"] = refusing
    elif choices:
        for group in whole:
            group.choose(choices)
        told[f"--backbone.quantisation {choices[0].value} ({choices[0].reason})"] = []


def _set_batch(group: _Group, model: Model, card: Hardware, fixed, told) -> None:
    """Micro-batch and checkpointing, and a line for each stage that does not fit all the same."""
    config = group.config
    stages = ["evaluate"] if group.cell.is_base else ["offline", "train", "evaluate"]

    def too_much(stage: str) -> float:
        plan = Planner(config, model, card).plan(stage)
        return plan.reserved / GIB - card.memory if plan else 0.0

    if "train" in stages and (too_much("train") > 0 or not SPLIT & group.named):
        still = {"backbone.gradient_checkpointing"} & group.named if too_much("train") <= 0 else set()
        choices = batch_choices(config, model, card, fixed=[*fixed, *still])
        group.choose(choices)
        for one in choices:
            told.setdefault(f"--{one.key} {one.value} ({one.reason})", []).append(group.label)
    for stage in stages:
        if too_much(stage) > 0:
            told.setdefault(f"{stage} does not fit: {too_much(stage):.1f} GiB too much; `vlakeep plan` says what to change", []).append(
                group.label)


def _replaced(cells: Sequence[Cell], groups: Dict[Like, _Group]) -> List[Cell]:
    def one(cell: Cell) -> Cell:
        group = groups.get(_like(cell))
        pairs = {**dict(cell.pairs), **(group.chosen if group else {})}
        return replace(cell, pairs=tuple(pairs.items()), source=one(cell.source) if cell.source is not None else None)

    return [one(cell) for cell in cells]
