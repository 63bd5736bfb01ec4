"""Method `corda`: LoRA from the components of W that old inputs use least. Yang et al. 2024, CorDA: Context-Oriented Decomposition
Adaptation (arXiv 2406.05223, NeurIPS 2024), its knowledge-preserving mode, by PEFT's code (peft 0.15 or newer).

    U S V^T = SVD of W C, V <- C^-1 V; scale B0 A0 = the last components, taken out of W

C is the probe's, all tokens alike, where PEFT's own collection divides each sample by its largest value. Half of lora.rank is trained, the
other half holds B0 A0.
"""

from vlakeep.hsw import rules
from vlakeep.methods import subspace


class CorDA(subspace.Subspace):
    label, label_zh, peft_since = "CorDA", "CorDA", "0.15"
    peft_imports = ("attr", "attrs")

    @classmethod
    def takes_out(cls, options) -> bool:
        return options.enabled

    def start(self, seen):
        return rules.corda(seen.W, subspace.moment(seen.spectrum, seen.W.device), seen.rank, seen.scale)


METHOD = CorDA
