"""Method `sc_lora`: LoRA from the outputs that the new task has and old inputs have not. SC-LoRA, 2025 (arXiv 2505.23724).

    Q: leading eigenvectors of (1 - beta) W C_new W^T - beta W C_old W^T; B0 = Q, A0 = Q^T W / scale, taken out of W

Second moments stand for the paper's covariances of outputs. Half of lora.rank is trained, the other half holds B0 A0.
"""

from dataclasses import dataclass

from vlakeep.hsw import rules
from vlakeep.methods import subspace


@dataclass
class Options(subspace.NewOptions):
    beta: float = 0.5  # how much old inputs count against new ones


class SCLoRA(subspace.Subspace):
    label, label_zh, Options, asks = "SC-LoRA", "SC-LoRA", Options, ("old", "inputs")

    @classmethod
    def limits(cls, options):
        return super().limits(options) + [("beta", options.beta, 0 <= options.beta <= 1, "in [0, 1]")]

    @classmethod
    def takes_out(cls, options) -> bool:
        return options.enabled

    def start(self, seen):
        C_old = subspace.moment(seen.spectrum, seen.W.device)
        return rules.sc_lora(seen.W, seen.C_new, C_old, self._options.beta, seen.rank, seen.scale)


METHOD = SCLoRA
