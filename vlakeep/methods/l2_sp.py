"""Method `l2_sp`: the new task's loss plus the squared distance from the base weights. Li, Grandvalet and Davoine 2018, Explicit Inductive
Bias for Transfer Learning with Convolutional Networks (arXiv 1802.01483, ICML 2018).

    penalty = strength / 2 * sum over linears ||dW||_F^2        dW = scale B A

With LoRA the base is the starting point, so the paper's term for new layers does not occur. Unlike AdamW's decay of A and B it belongs to
the loss, and it is the product that is drawn to zero.
"""

from dataclasses import dataclass
from typing import Dict, List

import torch

from vlakeep.methods.measured import Measured, factors


@dataclass
class Options:
    strength: float = 0.01


class L2SP(Measured):
    label, label_zh, Options = "L2-SP", "L2-SP", Options
    decoder_only = False

    @classmethod
    def limits(cls, options):
        return [("strength", options.strength, options.strength >= 0, "0 or above")]

    @classmethod
    def problems(cls, config):
        found = super().problems(config)
        if not found and config.thermostat.enabled and "all-linear" in config.lora.modules:
            found.append("--lora.modules all-linear: the divergence on the probe is not measured there; add --thermostat.enabled false")
        return found

    def attach(self, backbone) -> None:
        super().attach(backbone)
        self._linears = {name: backbone.network.get_submodule(name) for name in backbone.lora.targets}
        self._weights = self.weights_of(list(self._linears))

    def weights_of(self, names: List[str]) -> Dict[str, float]:
        """How much each linear counts; names are in the model's order."""
        return dict.fromkeys(names, 1.0)

    def penalty(self):
        if self._options.strength == 0:
            return None
        return 0.5 * self._options.strength * sum(self._weights[name] * distance(*factors(linear))
                                                  for name, linear in self._linears.items() if self._weights[name])


def distance(A_RD: torch.Tensor, B_OR: torch.Tensor, scale: float) -> torch.Tensor:
    """||scale B A||_F^2 through the two Gram matrices; B A is never formed."""
    return scale ** 2 * ((B_OR.T @ B_OR) * (A_RD @ A_RD.T)).sum()


METHOD = L2SP
