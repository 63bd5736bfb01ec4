"""Fitting a configuration to a card: what a profile of `--hardware` chooses, and what to change when a stage does not fit.

    quantisation    4 bits where the weights alone nearly fill the card
    types           data type, autocast, attention, device: from the card alone (core/hardware.py)
    sharding        the base whole on each card where training fits so, and else shared among several
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
ANOTHER = "another base: offline, train, evaluate and export all need the option, and what was made without it is refused"


# (configuration, number of decoder layers) -> what to set, None where nothing is left.
Change = Callable[[Config, int], Optional[Dict[str, object]]]


class Remedy(NamedTuple):
    """Options that make a stage fit, and what it takes then."""

    options: Tuple[Tuple[str, str], ...]
    plan: StagePlan

    def line(self) -> str:
        given = " ".join(f"--{key} {value}" for key, value in self.options)
        slower = f", {self.plan.each:.3f} s a step" if self.plan.stage == "train" else ""
        other = f"; {ANOTHER}" if ("backbone.quantisation", "nf4") in self.options else ""
        return f"{given}: {self.plan.reserved / GIB:.1f} GiB{slower}{other}"


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


def takes_four_bits(config: Config) -> bool:
    """Whether the base may still be quantised (core/ranges.py has what excludes it)."""
    return (config.backbone.quantisation == "none" and config.train.from_run is None and config.train.sharding == "none"
            and "all-linear" not in config.lora.modules)


def _four_bits(config: Config, depth: int):
    """The last resort, on a GPU alone: another base."""
    return {"backbone.quantisation": "nf4"} if takes_four_bits(config) else None


# Stage -> what may be changed, in the order of how little it costs; 4 bits come after all of it.
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
    """(single changes that make the stage fit, or else all of them together if those do, and at last 4 bits; the least that it can be made
    to take)."""
    found: List[Remedy] = []
    room = card.memory * GIB

    def look(one: Config) -> StagePlan:
        return Planner(one, model, card, gpus).plan(stage)

    least = look(config)

    def step(one: Config, change) -> Optional[Tuple[Config, Dict[str, object], StagePlan]]:
        """The configuration after one change, what it sets, and its plan; None where it does not help."""
        nonlocal least
        after, new = deepcopy(one), change(one, model.work.layers)
        for key, value in (new or {}).items():
            _set(after, key, value)
        plan = look(after) if new else None
        if plan is None or plan.reserved >= look(one).reserved - 0.01 * GIB:
            return None
        least = min(least, plan, key=lambda plan: plan.reserved)
        return after, new, plan

    def together(one: Config, changed: Dict[str, object]) -> Optional[Remedy]:
        """All changes, one after the other and again, since one may help only after another has, until it fits."""
        plan, progress = look(one), True
        while progress and plan.reserved > room:
            progress = False
            for change in CHANGES[stage]:
                if plan.reserved > room and (after := step(one, change)):
                    one, new, plan = after
                    progress = True
                    changed.update(new)
        return Remedy(_options(changed), plan) if plan.reserved <= room else None

    for change in CHANGES[stage]:
        alone, own, fits = config, {}, False
        while not fits and (after := step(alone, change)):
            alone, new, plan = after
            own.update(new)
            fits = plan.reserved <= room
        if fits:
            found.append(Remedy(_options(own), plan))
    if not found and (all_ := together(config, {})):
        found.append(all_)
    if card.device == "cuda" and (after := step(config, _four_bits)):
        if after[2].reserved <= room or not found:
            found += [remedy for remedy in [together(after[0], dict(after[1]))] if remedy]
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


def quantisation_choice(config: Config, model: Model, card: Hardware, gpus: int = 1, fixed: Sequence[str] = ()) -> List[Choice]:
    """4 bits where the weights leave no room on the card; nothing where they do, where the user has said how they lie, or where such a base
    is refused. It follows from model and card alone, however many there are, since all stages of a run have to agree on it, and offline,
    evaluation and export need a base that one card holds."""
    if card.device != "cuda" or not takes_four_bits(config) or {"backbone.quantisation", "train.sharding"} & set(fixed):
        return []
    weights = Planner(config, model, card).weights / GIB
    return [Choice("backbone.quantisation", "nf4", f"weights of {config.backbone.dtype} take {weights:.1f} of {card.memory:g} GiB; several "
                   "cards can share them in training, with --train.sharding fsdp, but offline, evaluation and export need them on one")
            ] if weights > ROOM * card.memory else []


def sharding_choice(config: Config, model: Model, card: Hardware, gpus: int = 1, fixed: Sequence[str] = ()) -> List[Choice]:
    """Whether several cards share the base in training: only where no micro-batch fits with all of it on each. Nothing for one card, or
    where the user has said how the base lies. Of a base that fills a card `quantisation_choice` has made 4 bits before."""
    if gpus < 2 or card.device != "cuda" or {"backbone.quantisation", "train.sharding"} & set(fixed) or config.train.sharding != "none":
        return []
    if config.backbone.quantisation != "none":
        return [Choice("train.sharding", "none", "a base of 4 bits lies whole on each card")]
    shared = deepcopy(config)
    shared.train.sharding = "fsdp"
    if _trains(config, model, card, gpus, fixed):
        return [Choice("train.sharding", "none", "training fits with the whole base on each card, and is faster so")]
    if _trains(shared, model, card, gpus, fixed):
        return [Choice("train.sharding", "fsdp", f"training does not fit with the whole base on a card, and does where {gpus} share it")]
    return []


def _trains(config: Config, model: Model, card: Hardware, gpus: int, fixed: Sequence[str]) -> bool:
    fits = Planner(config, model, card, gpus).plan("train").reserved <= card.memory * GIB
    return fits or bool(batch_choices(config, model, card, gpus, fixed))


def fitted(config: Config, card: Hardware, cache: Path, fixed: Sequence[str] = (), training: bool = True, gpus: int = 1) -> List[Choice]:
    """Sets quantisation and, for `training` on so many cards, sharding, micro-batch and checkpointing in `config`; returns what was chosen.
    A model that nobody can reckon with is left as it is."""
    found: List[Choice] = []
    try:
        model = find_model(config, cache)
        for choose in (quantisation_choice, sharding_choice, batch_choices) if training else (quantisation_choice,):
            chosen = choose(config, model, card, gpus, fixed)
            apply(config, chosen)
            found += chosen
    except (ValueError, OSError, KeyError):  # the stage itself says what is wrong with the model
        pass
    return found


def apply(config: Config, chosen: Sequence[Choice]) -> None:
    for one in chosen:
        _set(config, one.key, one.typed)
