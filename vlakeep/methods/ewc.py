"""Method `ewc`: the new task's loss plus the squared change of each weight, weighed by how much old answers depend on it. Kirkpatrick et
al. 2017, Overcoming catastrophic forgetting in neural networks (arXiv 1612.00796).

    penalty = strength / 2 * sum_ij F_ij dW_ij^2        F_ij = E[(d log p(y) / dW_ij)^2], dW = scale B A

y is the teacher's own greedy answer to a probe prompt, so no old data and no labels are needed; F is that of the whole dW, as in EWC-LoRA
(arXiv 2602.17559), not of A and B. F and each dW are as large as the adapted weights: for 7B adapt few layers.

reads: the probe; F is made at the start of training, in one backward pass an item
"""

from dataclasses import dataclass

from vlakeep.methods.measured import Measured, answered_items, factors
from vlakeep.teacher.fisher import fisher_diagonal


@dataclass
class Options:
    strength: float = 100.0
    items: int = 128  # probe items that F is made of


class EWC(Measured):
    label, label_zh, Options = "EWC", "EWC", Options

    @classmethod
    def uses_probe(cls, config) -> bool:
        return cls.options(config).strength > 0

    @classmethod
    def limits(cls, options):
        return [("strength", options.strength, options.strength >= 0, "0 or above"), ("items", options.items, options.items > 0, "above 0")]

    @classmethod
    def prepare(cls, config, storage, backbone):
        method, hashes = super().prepare(config, storage, backbone)
        if method._options.strength:
            method._measure_importance(storage, backbone)
        return method, hashes

    def _measure_importance(self, storage, backbone) -> None:
        parts, weights_N = answered_items(self._config, storage, backbone, self._options.items)
        self._fisher = fisher_diagonal(backbone, parts, backbone.first_adapted_layer(), backbone.adapted_linears(), weights_N)

    def attach(self, backbone) -> None:
        super().attach(backbone)
        self._linears = backbone.adapted_linears()

    def penalty(self):
        if self._options.strength == 0:
            return None
        return 0.5 * self._options.strength * sum(self.cost(name, *factors(linear)) for name, linear in self._linears.items())

    def cost(self, name, A_RD, B_OR, scale):
        """Of one linear's update scale B A, a differentiable scalar."""
        return scale ** 2 * (self._fisher[name] * (B_OR @ A_RD).square()).sum()


METHOD = EWC
