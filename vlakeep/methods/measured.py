"""What the rivals are built on: plain LoRA beside which the divergence on the probe is measured; and what several of them need.

With thermostat.enabled the sensor of method `graded` measures every thermostat.every steps. It moves nothing, so an arm is trained the
same with it and without, and the drift of all arms is told in the same unit. The gains of the section `gains` belong to other methods.

reads: artifact_dir/graded_<backbone>/ and the probe, for the sensor and where the method uses them
"""

from typing import Dict, List, Tuple

import torch

from vlakeep.core.config import Config
from vlakeep.core.storage import Storage
from vlakeep.methods import graded_offline
from vlakeep.methods.base import Problem
from vlakeep.methods.graded import Graded
from vlakeep.models.quantised import plain_weight
from vlakeep.probe.probe_set import open_probe
from vlakeep.teacher.answers import Part, run_below
from vlakeep.thermostat.loop import Loop


class Measured(Graded):
    """See the module's first line."""

    reads = (*Graded.reads, "options")

    @classmethod
    def uses_probe(cls, config: Config) -> bool:
        """Whether the method itself needs the artefact."""
        return False

    @classmethod
    def needs_offline(cls, config: Config) -> bool:
        return config.thermostat.enabled or cls.uses_probe(config)

    def __init__(self, config: Config, artifact, make_sensors):
        super().__init__(config, artifact, make_sensors)
        self._options = self.options(config)

    def _place_a(self, storage: Storage, backbone) -> None:
        pass

    @classmethod
    def check_model(cls, config: Config, depth: int, width: int) -> List[Problem]:
        return []

    def attach(self, backbone) -> None:
        if self._config.thermostat.enabled:
            self._sensors = self._make_sensors(backbone)
            self._loop = Loop(self._sensors["kl"].measure, None, self._act)

    @classmethod
    def problems(cls, config: Config) -> List[str]:
        found = super().problems(config)
        return found or [f"--options.{name} {value!r}: must be {allowed}" for name, value, ok, allowed in cls.limits(cls.options(config))
                         if not ok]

    @classmethod
    def limits(cls, options) -> List[Tuple[str, object, bool, str]]:
        """(option, its value, whether that will do, what would)."""
        return []


def factors(linear) -> Tuple[torch.Tensor, torch.Tensor, float]:
    """(A [R, D], B [O, R], scale) of a PEFT layer in float32, differentiable: its update is scale B A. A convolution's are flattened."""
    return (linear.lora_A["default"].weight.flatten(1).float(), linear.lora_B["default"].weight.flatten(1).float(),
            float(linear.scaling["default"]))


def answered_items(config: Config, storage: Storage, backbone, count: int) -> Tuple[List[Part], torch.Tensor]:
    """Up to `count` probe items that the sensor does not measure, with the teacher's answers, in front of the first adapted layer; and
    their weights, 1 in the mean, by which kinds of prompts count alike. The adapters must not have moved yet."""
    probe, size = open_probe(config, storage), config.icsm.batch_size
    items = probe.spread(config.probe.size)
    fit, _ = graded_offline.split_items(items, probe.kinds(items), config.gains.holdout)
    count = min(count, len(fit))
    chosen = [fit[i * len(fit) // count] for i in range(count)]
    pairs = graded_offline.answered_samples(backbone, probe.samples(chosen), size)
    return run_below(backbone, pairs, backbone.first_adapted_layer()), graded_offline.item_weights(config, probe.kinds(chosen))


def weights(linears: Dict[str, torch.nn.Module]) -> Dict[str, torch.Tensor]:
    """Frozen W [O, D] of PEFT layers."""
    return {name: plain_weight(linear.get_base_layer()) for name, linear in linears.items()}
