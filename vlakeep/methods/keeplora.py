"""Method `keeplora`: A from the new task's gradient in the space that old inputs and W leave free, and frozen. KeepLoRA, 2026
(arXiv 2601.19659, ICLR 2026).

    A = leading right singular vectors of G (I - P); P spans the leading directions of old inputs and of W; only B is trained, from zero

Where leading directions of inputs and W together span the whole input nothing is left, and the start of such a linear has no effect on old
inputs either: lower --options.weight_energy. The paper has .85 for vision and .2 for text, and .99 for inputs.
"""

from dataclasses import dataclass

from vlakeep.hsw import rules
from vlakeep.methods import subspace


@dataclass
class Options(subspace.NewOptions):
    energy: float = 0.99  # share of the old inputs' energy that is closed
    weight_energy: float = 0.2  # share of the squared singular values of W that is closed


class KeepLoRA(subspace.Subspace):
    label, label_zh, Options, asks = "KeepLoRA", "KeepLoRA", Options, ("old", "gradient")

    @classmethod
    def limits(cls, options):
        shares = {"energy": options.energy, "weight_energy": options.weight_energy}
        return super().limits(options) + [(name, value, 0 < value <= 1, "in (0, 1]") for name, value in shares.items()]

    @classmethod
    def freezes(cls, options) -> bool:
        return options.enabled

    def start(self, seen):
        count = rules.leading_count(seen.spectrum.values, subspace.trace(seen.spectrum), self._options.energy)
        W = seen.W.cpu().float()  # decompositions of this size are as quick there, and the gradient lies there
        return rules.keeplora(seen.G, W, seen.spectrum.vectors[:, :count], self._options.weight_energy, seen.rank)


METHOD = KeepLoRA
