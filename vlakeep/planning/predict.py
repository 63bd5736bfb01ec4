"""Peak memory and time of every stage, from shapes, options and a card (core/hardware.py); nothing is loaded.

Reserved is what the allocator takes from the driver, which decides whether a stage fits: weights, what is alive at the peak with a slack,
and all phases whose blocks have other sizes, since cached blocks of one do not serve the other and no stage gives them back.
"""

from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

from vlakeep.core.config import Config
from vlakeep.core.hardware import SLACK, Hardware, Work, total
from vlakeep.core.registry import method_class
from vlakeep.core.storage import find_checkpoint
from vlakeep.models.adapters import layer_numbers
from vlakeep.models.files import tensor_table, weight_files
from vlakeep.models.load import class_of, model_class, model_kinds
from vlakeep.models.quantised import BYTES
from vlakeep.models.workload import Adapters, Numbers, Workload
from vlakeep.planning.evaluation import Evaluation

STAGES = ("offline", "train", "evaluate", "export")
OPTIMIZER = {"adamw": 8.0, "adamw8bit": 2.03, "paged_adamw8bit": 2.03, "sgd": 0.0}  # bytes of state a parameter; 8 bit: and a scale a block
PARITY = 8  # frames that export asks together


class StagePlan(NamedTuple):
    """What a stage takes. memory: bytes by part; seconds: of the whole stage; `each`: of a step or an action, or None."""

    stage: str
    memory: Dict[str, float]
    allocated: float
    reserved: float
    seconds: float
    each: Optional[float] = None
    notes: Tuple[str, ...] = ()


class Model(NamedTuple):
    """Shapes of a model and where they are from."""

    work: Workload
    kind: Any  # a class of Backbone
    source: str


def find_model(config: Config, cache: Path) -> Model:
    """Shapes from config.json and the headers of the safetensors files; of a well-known checkpoint that is not there, as published.

    Raises FileNotFoundError or CheckpointError with the remedy.
    """
    name = config.backbone.checkpoint
    try:
        folder = find_checkpoint(name, cache)
    except FileNotFoundError:
        for kind in map(class_of, model_kinds()):
            if published := kind.published(name, config.backbone):
                return Model(kind.workload(published), kind, f"published shapes of {name}, which is not there yet")
        raise
    kind = model_class(folder)
    shapes = {key: tuple(entry["shape"]) for file in weight_files(folder) for key, entry in tensor_table(file).items()}
    said = kind.whole_config(folder, kind.read_config(folder), config.backbone)
    return Model(kind.workload(said, shapes), kind, f"config.json and tensor headers in {folder}")


def find_adapters(config: Config, model: Model) -> Adapters:
    lora, work = config.lora, model.work
    if list(lora.modules) == ["all-linear"]:
        return Adapters(list(work.linears), range(work.layers), lora.rank, everywhere=True)
    return Adapters(model.kind.leaf_names(lora.modules), layer_numbers(lora.layers, work.layers), lora.rank)


class Planner:
    """Predictions for one configuration on one card."""

    def __init__(self, config: Config, model: Model, card: Hardware, gpus: int = 1):
        self.config, self.work, self.kind, self.card, self.gpus = config, model.work, model.kind, card, gpus
        self.adapters, self.numbers = find_adapters(config, model), Numbers.of(config)
        packed = self.work.layers * self.work.layer_parameters if self.numbers.packed else 0
        plain = sum(self.work.parameters.values()) - packed - self.work.precise
        self.weights = float(self.numbers.weight * plain + BYTES * packed + 4 * self.work.precise)
        self.costs = method_class(config.method).costs(config, self.work, self.adapters, self.numbers)
        # Read into memory and, to know which weights they are, hashed.
        self.loading = Work(read=2 * self.weights)

    def plan(self, stage: str) -> Optional[StagePlan]:
        """None for a stage that this configuration does not have."""
        return getattr(self, f"_{stage}")()

    def _made(self, stage, held: Dict[str, float], phases: Dict[str, float], seconds: float, each=None, notes=(), given_back=False,
              weights: Optional[float] = None) -> StagePlan:
        """held: alive through the stage; phases: needed one after the other; given_back: the blocks of each before the next."""
        weights = self.weights if weights is None else weights
        memory = {"weights": weights, **held, **phases}
        alive = weights + sum(held.values())
        allocated = alive + max(phases.values(), default=0.0)
        moving = sum(size for name, size in {**held, **phases}.items() if name.startswith(("layer ", "logits")))
        needed = max(phases.values(), default=0.0) if given_back else sum(phases.values())
        reserved = alive + needed + SLACK * moving
        return StagePlan(stage, memory, allocated, reserved, seconds, each, tuple(notes))

    def _offline(self) -> Optional[StagePlan]:
        if not self.costs.offline:
            return None
        largest: Dict[str, float] = {phase.name: phase.memory for phase in self.costs.offline}
        work = total(phase.work for phase in self.costs.offline)
        times = sum(self.card.seconds(phase.work) for phase in self.costs.offline)
        loading = self.card.seconds(self.loading)
        assert work.half > 0
        return self._made("offline", {}, largest, loading + times, None, [f"{loading:.0f} s of it loading and hashing the weights"],
                          self.costs.given_back)

    def _train(self) -> StagePlan:
        train, adapters, work = self.config.train, self.adapters, self.work
        count = work.adapter_parameters(adapters)
        size = 4.0 if self.config.lora.dtype == "float32" else float(self.numbers.weight)
        state = OPTIMIZER[train.optimizer] * (size / 4.0 if train.optimizer == "adamw" else 1.0)
        shared = train.sharding == "fsdp" and self.gpus > 1
        held = {"adapters": size * count, "gradients": size * count, "optimizer": state * count, **self.costs.resident}
        if self.gpus > 1:
            held["buckets of DDP"] = (1.0 if shared else 0.05) * size * count  # in DDP gradients are views of them
        kept = work.kept(adapters, self.numbers, train.batch_size)
        # The gradient has left the logits when it comes to the layers.
        phases = {"logits": work.logits(self.numbers, train.batch_size)}
        phases["backward pass"] = work.backward_needs(self.numbers, train.batch_size)
        if self.numbers.recompute:
            leaves = adapters.leaves
            phases["a layer computed again"] = work.layer_keeps(leaves, adapters.rank, self.numbers) * train.batch_size * work.columns
        if self.costs.measurement:
            phases["measurement"] = self.costs.measurement
        one = work.training_step(adapters, self.numbers, train.batch_size) + self.costs.step
        step = one.times(train.accumulation) + work.optimizer_step(count)
        each = self.card.seconds(step)
        weights = self.weights
        if shared:
            layer = float(self.numbers.weight * work.layer_parameters)
            decoder = layer * work.layers
            # Its share; and what lies outside the layers whole, with two layers, the one at work and the next.
            weights = self.weights / self.gpus + (self.weights - decoder) + 2 * layer
            gathered = decoder * (1 + (work.layers - adapters.first) / work.layers) * (self.gpus - 1) / self.gpus
            each += train.accumulation * gathered / self.card.link
        if self.gpus > 1:
            each += 2 * size * count / self.card.link
        if self.costs.every:
            each += self.card.seconds(self.costs.measuring) / self.costs.every
        begin = sum(self.card.seconds(phase.work) for phase in self.costs.begin)
        seconds = self.card.seconds(self.loading) + begin + train.steps * each
        samples = train.batch_size * train.accumulation * self.gpus
        notes = [f"{each:.3f} s a step of {samples} samples", *(f"{begin:.0f} s before the first: {one.name}" for one in self.costs.begin)]
        made = self._made("train", {**held, **kept}, phases, seconds, each, notes, weights=weights)
        # Before the first step there are no gradients yet, and a step that asks for more gets the blocks.
        alive = weights + held["adapters"] + sum(self.costs.resident.values())
        first = {phase.name: phase.memory for phase in self.costs.begin}
        most = alive + max(first.values(), default=0.0)
        return made._replace(memory={**made.memory, **first}, allocated=max(made.allocated, most), reserved=max(made.reserved, most))

    def _evaluate(self) -> StagePlan:
        return Evaluation(self).plan()

    def _export(self) -> StagePlan:
        frames = self.config.export.parity_frames
        held = {"adapters": 4.0 * self.work.adapter_parameters(self.adapters)}
        phases, work = {}, Work(read=self.weights, write=self.weights)  # merging goes shard by shard, on the CPU
        if frames:
            rows = min(frames, PARITY)
            phases = {"keys and values": self.work.cache(self.numbers, rows), "a layer": self.work.passing(self.numbers, rows)}
            work = work + self.work.generate(frames, rows).times(2) + Work(read=2 * self.weights)  # adapter on base, and the merged model
        return self._made("export", held, phases, self.card.seconds(work))


def plan_all(config: Config, model: Model, card: Hardware, gpus: int = 1) -> List[StagePlan]:
    """Every stage that the configuration has."""
    planner = Planner(config, model, card, gpus)
    return [found for found in map(planner.plan, STAGES) if found]
