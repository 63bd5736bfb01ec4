"""Method `distillation`: the new task's loss plus w times the divergence from the teacher on probe items, and what the Thermostat moves.

    loss = loss of the new task + w * KL(teacher || student) at the teacher's own answers to probe prompts, in nats per answer token

It works by correction where methods/graded.py works by prevention, and costs a forward and a backward pass of the adapted layers on
`items` probe items per micro-batch. With gains.enabled both act. What the loop moves, with d the divergence on held-out items:

    nothing   w and the gains' opening stay as they are
    opening   r, by the law of methods/graded.py: prevention holds the target, correction lets it open further
    weight    w <- w * clip((d / target)^(1 / 2), 1 / open, close), every K steps: the multiplier of a constrained problem (least loss
              of the new task with a divergence of at most `target`), raised while the constraint is broken

Distillation on old inputs against forgetting: Li and Hoiem 2016, Learning without Forgetting (arXiv 1606.09282).

reads: artifact_dir/graded_<backbone>/ and the probe; the teacher's answers to the items that the sensor does not measure are made at the
start of training.
"""

from dataclasses import dataclass
from typing import Callable, Dict, Optional

import torch

from vlakeep.core.config import Config
from vlakeep.core.parallel import Distributed
from vlakeep.core.storage import Storage
from vlakeep.methods import costs, graded_offline
from vlakeep.methods.graded import Graded
from vlakeep.models.adapters import adapters_disabled
from vlakeep.models.lean import autocast
from vlakeep.probe.probe_set import open_probe
from vlakeep.teacher.answers import Answered, run_below, teacher_answers
from vlakeep.thermostat.kl_sensor import KLSensor, batched
from vlakeep.thermostat.setpoint import SetPoint

# Of w. What the student learns by heart on the practised items does not lower the divergence on others: beyond ten, w rose without end and
# only the new skill was lost (docs/log.md).
LIGHTEST, HEAVIEST = 1e-3, 10.0
# The divergence falls about as 1 / w^2 while the update is small; the exponent of the law in units of 1 / w.
STEEPNESS = 0.5
MOVES = ("nothing", "opening", "weight")


@dataclass
class Options:
    weight: float = 1.0  # w at the start
    moves: str = "nothing"  # what the Thermostat moves: nothing (it measures), opening (of the gains) or weight (w)
    items: int = 8  # probe items per micro-batch


class Distillation(Graded):
    """See the module's first line."""

    label, label_zh = "Distillation on the probe", "探针蒸馏"
    reads = (*Graded.reads, "options")
    Options = Options

    @classmethod
    def needs_offline(cls, config: Config) -> bool:
        return super().needs_offline(config) or cls.options(config).weight > 0

    @classmethod
    def costs(cls, config: Config, work, adapters, numbers):
        return costs.practice(config, work, adapters, numbers, cls.options(config).items)

    @classmethod
    def problems(cls, config: Config):
        found = super().problems(config)
        if not found:
            options = cls.options(config)
            if not 0 <= options.weight <= HEAVIEST:
                found.append(f"--options.weight {options.weight}: must be 0 or above, at most {HEAVIEST:g}")
            if options.items < 1:
                found.append(f"--options.items {options.items}: must be above 0")
            if options.moves not in MOVES:
                found.append(f"--options.moves {options.moves}: must be one of {', '.join(MOVES)}")
            if options.moves == "opening" and not config.gains.enabled:
                found.append("--options.moves opening: there is no opening without gains; add --gains.enabled true")
        return found

    @classmethod
    def prepare(cls, config: Config, storage: Storage, backbone):
        method, hashes = super().prepare(config, storage, backbone)

        def practice(backbone) -> KLSensor:
            """The divergence on the items that the sensor does not measure."""
            probe, size = open_probe(config, storage), config.icsm.batch_size
            held = set(method._artifact.answers()[1])
            items = [item for item in probe.spread(config.probe.size) if item not in held]
            samples = probe.samples(items)
            with adapters_disabled(backbone):
                first = backbone.first_adapted_layer()
                parts = run_below(backbone, graded_offline.answered_samples(backbone, samples, size), first)
                answered = method.targets(teacher_answers(backbone, parts, first))
            return KLSensor(backbone, answered, batched(samples, backbone.processor, size), size,
                            graded_offline.item_weights(config, probe.kinds(items)))

        method._make_practice = practice
        return method, hashes

    def __init__(self, config: Config, artifact, make_sensors):
        super().__init__(config, artifact, make_sensors)
        self._options = self.options(config)
        self._weight = self._options.weight
        self._make_practice: Optional[Callable] = None
        self._practice: Optional[KLSensor] = None
        self._step, self._micro_batch = 0, 0

    def targets(self, answered: Answered) -> Answered:
        """What the practised items are to answer."""
        return answered

    def attach(self, backbone) -> None:
        super().attach(backbone)
        if self._options.weight > 0 and self._make_practice:
            self._practice = self._make_practice(backbone)

    @property
    def _moves_weight(self) -> bool:
        return self._options.moves == "weight"

    def _law(self) -> Optional[SetPoint]:
        thermostat = self._config.thermostat
        if self._options.moves == "opening":
            return super()._law()
        if self._options.weight == 0 or not self._moves_weight:
            return None
        return SetPoint(target=thermostat.target, start=1 / self._options.weight, lowest=1 / HEAVIEST, highest=1 / LIGHTEST,
                        steepness=STEEPNESS, open_factor=thermostat.open_factor, close_factor=thermostat.close_factor)

    def _act(self, opening: float) -> None:
        if self._moves_weight:
            self._weight = 1 / opening
        else:
            super()._act(opening)

    def _settle(self, measured: Dict[str, float]) -> Dict[str, float]:
        return {} if self._moves_weight else super()._settle(measured)  # w has no effect on weights that are finished

    def _measure(self, act: bool = True) -> Dict[str, float]:
        row = super()._measure(act)
        if self._loop.controller and act and self._moves_weight:
            row.update(opening=self._site.opening if self._site else 0.0, weight=1 / row["opening"], next_weight=self._weight)
            row.pop("next_opening")
        return row

    def before_step(self, step: int, observe: bool) -> None:
        super().before_step(step, observe)
        self._step, self._micro_batch = step, 0

    def penalty(self) -> Optional[torch.Tensor]:
        """w times the mean divergence of some probe items, drawn anew for every micro-batch by their weights."""
        if self._practice is None:
            return None
        job = Distributed.current()
        rank, world = (job.rank, job.world) if job else (0, 1)
        number = self._micro_batch * world + rank  # of the micro-batch among those of all processes
        self._micro_batch += 1
        rows_B = self._practice.draw(self._options.items, (self._config.seed, self._step, number))
        with autocast(self._config.train.autocast, self._practice.device):
            return self._weight * self._practice.divergence_of(rows_B).mean()


METHOD = Distillation
