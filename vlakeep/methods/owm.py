"""Method `owm`: LoRA behind the inverse covariance of old inputs. Zeng, Chen, Cui and Yu 2019, Continual Learning of Context-dependent
Processing in Neural Networks (arXiv 1810.01256).

    P = I - X (X^T X + alpha I)^-1 X^T = alpha (C + alpha I)^-1, so g = alpha / (sigma + alpha)

`alpha` is in the units of the inputs' energy and the same for all linears, where method `graded` measures lambda by each linear's mean. The
paper updates P with every batch and lets alpha decay within a task; here C is that of the probe, once. The form is that of Duncker,
Driscoll, Shenoy, Sahani and Sussillo 2020 too, who use it on both sides.
"""

from dataclasses import dataclass

from vlakeep.hsw import rules
from vlakeep.methods import subspace


@dataclass
class Options(subspace.Options):
    alpha: float = 1e-3


class OWM(subspace.Subspace):
    label, label_zh, Options = "OWM", "OWM", Options

    @classmethod
    def limits(cls, options):
        return [("alpha", options.alpha, options.alpha > 0, "above 0")]

    def gains(self, name, spectrum):
        return rules.owm(spectrum.values, self._options.alpha), self._options.alpha / (spectrum.rest + self._options.alpha)


METHOD = OWM
