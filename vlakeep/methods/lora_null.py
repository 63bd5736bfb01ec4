"""Method `lora_null`: LoRA in the directions of least old energy. LoRA-Null, 2025 (arXiv 2503.02659, AAAI 2026).

    scale B0 A0 = W U U^T, U the last eigenvectors of old inputs' X X^T, halved by an SVD; training begins at W - scale B0 A0 and B0 A0

With `freeze`, the paper's v2, A keeps its start; then B0 makes no difference to the course of B, and B starts at zero. Without it, v1,
half of lora.rank is trained and the other half holds B0 A0, which v1 takes out of W. It needs all directions: wide inputs ask for
--gains.columns.
"""

from dataclasses import dataclass

from vlakeep.hsw import rules
from vlakeep.methods import subspace


@dataclass
class Options(subspace.Options):
    freeze: bool = True  # v2; false is v1


class LoRANull(subspace.Subspace):
    label, label_zh, Options = "LoRA-Null", "LoRA-Null", Options

    @classmethod
    def freezes(cls, options) -> bool:
        return options.enabled and options.freeze

    @classmethod
    def takes_out(cls, options) -> bool:
        return options.enabled and not options.freeze

    def start(self, seen):
        null_DR = subspace.whole(seen.name, seen.spectrum).vectors[:, -seen.rank:].to(seen.W.device)
        found = rules.lora_null(seen.W, null_DR, seen.scale)
        return rules.Start(found.A) if self._options.freeze else found


METHOD = LoRANull
