"""Method `adam_nscl`: LoRA open only along the directions of least old energy. Wang, Li, Sun and Xu 2021, Training Networks in Null Space
of Feature Covariance for Continual Learning (arXiv 2103.07113, CVPR 2021).

    g = 1 / sqrt(n) on the n directions with sigma <= a sigma_min, 0 elsewhere

The paper multiplies Adam's step by U U^T / ||U U^T||_F; here A_eff = A U U^T / ||U U^T||_F. Its check, at most 5 % of the trace in what is
open, is a warning. It needs all directions: wide inputs ask for --gains.columns.
"""

from dataclasses import dataclass

from vlakeep.core.log import log
from vlakeep.hsw import rules
from vlakeep.methods import subspace

TOO_MUCH = 0.05  # of the trace, in what is open (the paper's R)


@dataclass
class Options(subspace.Options):
    a: float = 10.0  # multiple of the smallest eigenvalue up to which a direction is open; 10 to 30 in the paper


class AdamNSCL(subspace.Subspace):
    label, label_zh, Options = "Adam-NSCL", "Adam-NSCL", Options

    @classmethod
    def limits(cls, options):
        return [("a", options.a, options.a >= 1, "1 or above")]

    def gains(self, name, spectrum):
        gains_K, share = rules.adam_nscl(subspace.whole(name, spectrum).values, self._options.a)
        if share > TOO_MUCH:
            log.warning(f"{name}: what is open holds {share:.0%} of the old inputs' energy; lower --options.a")
        return gains_K, 0.0


METHOD = AdamNSCL
