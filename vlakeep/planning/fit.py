"""Fitting a configuration to a card: what a profile of `--hardware` chooses, and what to change when a stage does not fit.

    quantisation    4 bits where the weights alone nearly fill the card
    types           data type, autocast, attention, device: from the card alone (core/hardware.py)
    micro-batch     the largest divisor of the samples of a step that fits, so that the step stays what it was
    checkpointing   only where no micro-batch fits without

A key on the command line beats the profile, which beats the file.
"""

from copy import deepcopy
from operator import attrgetter
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

from vlakeep.core.config import Config
from vlakeep.core.hardware import GIB, Choice, Hardware
from vlakeep.models.adapters import layer_numbers
from vlakeep.planning.predict import Model, Planner, StagePlan, find_model

ROOM = 0.9  # share of a card that weights may take


# (configuration, number of decoder layers) -> what to set, None where nothing is left.
Change = Callable[[Config, int], Optional[Dict[str, object]]]


class Remedy(NamedTuple):
    """Options that make a stage fit, and what it takes then."""

    options: Tuple[Tuple[str, str], ...]
    plan: StagePlan

    def line(self) -> str:
        given = " ".join(f"--{key} {value}" for key, value in self.options)
        slower = f", {self.plan.each:.3f} s a step" if self.plan.stage == "train" else ""
        return f"{given}: {self.plan.reserved / GIB:.1f} GiB{slower}"


def _set(config: Config, key: str, value) -> None:
    section, _, name = key.rpartition(".")
    setattr(attrgetter(section)(config) if section else config, name, value)


def _halved(key: str, least: int = 1) -> Change:
    def change(config: Config, depth: int):
        value = attrgetter(key)(config)
        return {key: max(least, value // 2)} if value > least else None
    return change


def _smaller_batch(config: Config, depth: int):
    """Half of a micro-batch, as many samples a step."""
    train = config.train
    return {"train.batch_size": train.batch_size // 2, "train.accumulation": train.accumulation * 2} if train.batch_size % 2 == 0 else None


def _fewer_layers(config: Config, depth: int):
    """The upper half of them; None where they are not the last ones of the model."""
    numbers = layer_numbers(config.lora.layers, depth)
    if len(numbers) < 2 or numbers != list(range(depth - len(numbers), depth)) or "all-linear" in config.lora.modules:
        return None
    return {"lora.layers": f"last:{len(numbers) // 2}"}


def _fewer_moments(config: Config, depth: int):
    gib = config.icsm.moments_gib
    return {"icsm.moments_gib": gib / 2} if gib > 0.5 else None


def _shared_base(config: Config, depth: int):
    """Helps where several processes train."""
    free = config.train.sharding == "none" and config.backbone.quantisation == "none"
    return {"train.sharding": "fsdp"} if free else None


# Stage -> what may be changed, in the order of how little it costs.
CHANGES: Dict[str, Sequence[Change]] = {
    "offline": (_halved("icsm.answered"), _halved("icsm.batch_size"), _fewer_moments, _halved("gains.columns", 64)),
    "train": (_smaller_batch, _halved("thermostat.batch_size", 4), _fewer_moments,
              lambda config, depth: None if config.backbone.gradient_checkpointing else {"backbone.gradient_checkpointing": True},
              _shared_base,
              lambda config, depth: {"train.optimizer": "paged_adamw8bit"} if config.train.optimizer == "adamw" else None, _fewer_layers),
    "evaluate": (_halved("evaluate.batch"), _halved("evaluate.parallel")),
    "export": (lambda config, depth: {"export.parity_frames": 0} if config.export.parity_frames else None,),
}


def remedies(config: Config, model: Model, card: Hardware, gpus: int, stage: str) -> Tuple[List[Remedy], StagePlan]:
    """(single changes that make the stage fit, or else all of them together if those do; the least that it can be made to take)."""
    found, least, together = [], Planner(config, model, card, gpus).plan(stage), deepcopy(config)
    changed: Dict[str, object] = {}

    def look(one: Config) -> StagePlan:
        return Planner(one, model, card, gpus).plan(stage)

    def step(one: Config, change) -> Optional[Tuple[Config, Dict[str, object], StagePlan]]:
        """The configuration after one change, what it sets, and its plan; None where it does not help."""
        after, new = deepcopy(one), change(one, model.work.layers)
        for key, value in (new or {}).items():
            _set(after, key, value)
        plan = look(after) if new else None
        return (after, new, plan) if plan and plan.reserved < look(one).reserved - 0.01 * GIB else None

    for change in CHANGES[stage]:
        alone, own, fits = config, {}, False
        while not fits and (after := step(alone, change)):
            alone, new, plan = after
            own.update(new)
            fits = plan.reserved <= card.memory * GIB
            least = min(least, plan, key=lambda plan: plan.reserved)
        if fits:
            found.append(Remedy(_options(own), plan))
    progress = not found
    while progress:  # one may help only after another has
        progress = False
        for change in CHANGES[stage]:
            if least.reserved > card.memory * GIB and (after := step(together, change)):
                together, new, plan = after
                progress = True
                changed.update(new)
                least = min(least, plan, key=lambda plan: plan.reserved)
    if changed and least.reserved <= card.memory * GIB:
        found.append(Remedy(_options(changed), least))
    return found, least


def _options(changed: Dict[str, object]) -> Tuple[Tuple[str, str], ...]:
    return tuple((key, str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value))
                 for key, value in changed.items())


def batch_choices(config: Config, model: Model, card: Hardware, gpus: int = 1, fixed: Sequence[str] = ()) -> List[Choice]:
    """Micro-batch and checkpointing for this card, the samples of a step as they are; nothing where the user has fixed the micro-batch or
    nothing fits. `fixed`: keys that the command line gives."""
    train = config.train
    if {"train.batch_size", "train.accumulation"} & set(fixed):
        return []
    samples = train.batch_size * train.accumulation
    checkpointing = [config.backbone.gradient_checkpointing] if "backbone.gradient_checkpointing" in fixed else [False, True]
    for recompute in checkpointing:
        for rows in (rows for rows in range(samples, 0, -1) if samples % rows == 0):
            one = deepcopy(config)
            one.train.batch_size, one.train.accumulation, one.backbone.gradient_checkpointing = rows, samples // rows, recompute
            plan = Planner(one, model, card, gpus).plan("train")
            if plan.reserved <= card.memory * GIB:
                takes = f"{plan.reserved / GIB:.1f} of {card.memory:g} GiB"
                found = [Choice("train.batch_size", str(rows), f"the largest share of the {samples} samples of a step that fits: {takes}"),
                         Choice("train.accumulation", str(samples // rows), f"the step keeps its {samples} samples")]
                why = "no micro-batch fits without" if recompute else "not needed: slower, and it fits without"
                return [*found, Choice("backbone.gradient_checkpointing", str(recompute).lower(), why)] if len(checkpointing) > 1 else found
    return []


def quantisation_choice(config: Config, model: Model, card: Hardware, fixed: Sequence[str] = ()) -> List[Choice]:
    """4 bits where the weights leave no room on the card; nothing where they do, where the user has said how they lie, or where such a base
    is refused. It follows from model and card alone, since all stages of a run have to agree on it."""
    allowed = card.device == "cuda" and config.backbone.quantisation == "none" and config.train.from_run is None
    allowed = allowed and config.train.sharding == "none"
    if not allowed or "all-linear" in config.lora.modules or {"backbone.quantisation", "train.sharding"} & set(fixed):
        return []
    weights = Planner(config, model, card).weights / GIB
    return [Choice("backbone.quantisation", "nf4", f"weights of {config.backbone.dtype} take {weights:.1f} of {card.memory:g} GiB; several "
                   "cards can share them in training, with --train.sharding fsdp")] if weights > ROOM * card.memory else []


def fitted(config: Config, card: Hardware, cache: Path, fixed: Sequence[str] = (), training: bool = True) -> List[Choice]:
    """Sets quantisation and, for `training`, micro-batch and checkpointing in `config`; returns what was chosen. A model that nobody can
    reckon with is left as it is."""
    found: List[Choice] = []
    try:
        model = find_model(config, cache)
        for choose in (quantisation_choice, batch_choices) if training else (quantisation_choice,):
            chosen = choose(config, model, card, fixed=fixed)
            for key, value, _ in chosen:
                _set(config, key, value == "true" if value in ("true", "false") else int(value) if value.isdigit() else value)
            found += chosen
    except (ValueError, OSError, KeyError):  # the stage itself says what is wrong with the model
        pass
    return found
