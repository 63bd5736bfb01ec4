"""Method `gpm`: LoRA closed along the leading directions of old inputs. Saha, Garg and Roy 2021, Gradient Projection Memory
(arXiv 2103.09762, ICLR 2021).

    g = 0 on the fewest leading directions that hold the share `energy` of the old inputs' trace, 1 elsewhere

The paper projects the gradient of W after each backward pass of SGD; here A is projected, so that no optimizer leaks into what is closed.
The paper's shares by layer (.95 to .99) and their growth by task are one number here.
"""

from dataclasses import dataclass

from vlakeep.hsw import rules
from vlakeep.methods import subspace


@dataclass
class Options(subspace.Options):
    energy: float = 0.97  # share of the old inputs' energy that is closed


class GPM(subspace.Subspace):
    label, label_zh, Options = "GPM", "GPM", Options

    @classmethod
    def limits(cls, options):
        return [("energy", options.energy, 0 < options.energy <= 1, "in (0, 1]")]

    def gains(self, name, spectrum):
        return rules.gpm(spectrum.values, subspace.trace(spectrum), self._options.energy), 1.0


METHOD = GPM
