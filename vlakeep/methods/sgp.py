"""Method `sgp`: as `gpm`, closed by importance. Saha and Roy 2023, Continual Learning with Scaled Gradient Projection
(arXiv 2302.01386, AAAI 2023).

    g = 1 - (a + 1) s / (a s + s_max) on the leading directions of old inputs, s = sqrt(sigma) their singular values; 1 elsewhere

As with `gpm` A is projected and not the gradient. Importances of several tasks, which the paper adds up, come from one probe here.
"""

from dataclasses import dataclass

from vlakeep.hsw import rules
from vlakeep.methods import gpm, subspace


@dataclass
class Options(gpm.Options):
    a: float = 10.0  # how fast importance saturates: 10 in the paper's classification tasks, 25 in its reinforcement learning


class SGP(gpm.GPM):
    label, label_zh, Options = "Scaled gradient projection", "SGP", Options

    @classmethod
    def limits(cls, options):
        return super().limits(options) + [("a", options.a, options.a >= 0, "0 or above")]

    def gains(self, name, spectrum):
        return rules.sgp(spectrum.values, subspace.trace(spectrum), self._options.energy, self._options.a), 1.0


METHOD = SGP
