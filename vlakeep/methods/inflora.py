"""Method `inflora`: A from the new task's inputs in the space that old inputs leave free, and frozen. Liang and Li 2024, InfLoRA:
Interference-Free Low-Rank Adaptation for Continual Learning (arXiv 2404.00228, CVPR 2024).

    A = leading left singular vectors of (I - P) X_new, divided by sqrt(3); P the leading directions of old inputs; only B is trained

Old inputs are the probe's; the paper's DualGPM, which keeps P or its complement over many tasks, is not needed for one.
"""

from dataclasses import dataclass

from vlakeep.hsw import rules
from vlakeep.methods import subspace


@dataclass
class Options(subspace.NewOptions):
    energy: float = 0.95  # share of the old inputs' energy that is closed


class InfLoRA(subspace.Subspace):
    label, label_zh, Options, asks = "InfLoRA", "InfLoRA", Options, ("old", "inputs")

    @classmethod
    def limits(cls, options):
        return super().limits(options) + [("energy", options.energy, 0 < options.energy <= 1, "in (0, 1]")]

    @classmethod
    def freezes(cls, options) -> bool:
        return options.enabled

    def start(self, seen):
        count = rules.leading_count(seen.spectrum.values, subspace.trace(seen.spectrum), self._options.energy)
        return rules.inflora(seen.C_new, seen.spectrum.vectors[:, :count].to(seen.C_new), seen.rank)


METHOD = InfLoRA
