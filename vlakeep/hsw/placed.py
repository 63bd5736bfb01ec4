"""LoRA with fixed gains on its inputs, a start of its own, A frozen where wanted: the site of methods/subspace.py.

    dW = scale (B A M - B0 A0)        M = V diag(g) V^T or none; (B0, A0) is what a method takes out of W, or nothing

A method that begins at W - scale B0 A0 and trains B A from (B0, A0) is this difference on the frozen W. It takes twice the rank in the
file: half of the rows of A (and columns of B) are trained, the other half hold A0 and -B0. So base, export and merge stay what they are.

Axes: R rank, D input size, K stored directions, O output size.
"""

from typing import Dict, Optional

import torch
from torch import nn
from torch.nn.utils import parametrize

from vlakeep.hsw.rules import Start

# Up to this input size one product with M [D, D] takes less time than two thin ones and the kernels around them.
DENSE = 1024


class FixedGains:
    """M = g_rest I + V diag(g - g_rest) V^T for vectors [D, K] orthonormal and g [K]; one object for linears that share an input."""

    def __init__(self, vectors_DK: torch.Tensor, gains_K: torch.Tensor, gain_rest: float, device: torch.device):
        self.gains_K, self.gain_rest = gains_K.double(), gain_rest
        vectors_DK, weights_K = vectors_DK.double().to(device), (self.gains_K - gain_rest).to(device)
        self._matrix_DD: Optional[torch.Tensor] = None
        if len(vectors_DK) <= DENSE:
            eye_DD = torch.eye(len(vectors_DK), dtype=torch.float64, device=device)
            self._matrix_DD = (gain_rest * eye_DD + (vectors_DK * weights_K) @ vectors_DK.T).float()
        self._vectors_DK, self._weights_K = vectors_DK.float(), weights_K.float()

    def apply(self, a_RD: torch.Tensor) -> torch.Tensor:
        with torch.autocast(a_RD.device.type, enabled=False):  # half precision would let through what is closed
            x_RD = a_RD.float()
            if self._matrix_DD is not None:
                return (x_RD @ self._matrix_DD).to(a_RD.dtype)
            along_RK = (x_RD @ self._vectors_DK) * self._weights_K
            return torch.add(along_RK @ self._vectors_DK.T, x_RD, alpha=self.gain_rest).to(a_RD.dtype)


class PlacedA(nn.Module):
    """A [R, D] -> A M, below which A0 takes the second half of the rows."""

    def __init__(self, gains: Optional[FixedGains], fixed_RD: Optional[torch.Tensor]):
        super().__init__()
        self._gains, self._fixed_RD = gains, fixed_RD

    def forward(self, a_RD: torch.Tensor) -> torch.Tensor:
        a_RD = self._gains.apply(a_RD) if self._gains else a_RD
        return a_RD if self._fixed_RD is None else torch.cat([a_RD[:len(a_RD) - len(self._fixed_RD)], self._fixed_RD])


class PlacedB(nn.Module):
    """B [O, R], whose second half of the columns is -B0."""

    def __init__(self, fixed_OR: torch.Tensor):
        super().__init__()
        self._fixed_OR = fixed_OR

    def forward(self, b_OR: torch.Tensor) -> torch.Tensor:
        return torch.cat([b_OR[:, :b_OR.shape[1] - self._fixed_OR.shape[1]], self._fixed_OR], 1)


def trained_rank(rank: int, residual: bool) -> int:
    """How much of the adapters' rank is trained."""
    return rank // 2 if residual else rank


class PlacedSite:
    """Puts gains and starts on the PEFT layers `linears`, name -> layer. gains, starts: by the same names; what is absent stays LoRA's."""

    def __init__(self, linears: Dict[str, nn.Module], gains: Dict[str, FixedGains], starts: Dict[str, Start], freeze: bool):
        self._linears = dict(linears)
        self._fixed: Dict[str, Start] = {}  # what acts and is not trained: A0 and -B0, or a frozen A
        for name, linear in self._linears.items():
            a, b = linear.lora_A["default"], linear.lora_B["default"]
            start, fixed = starts.get(name), None
            with torch.no_grad():
                if start is not None:
                    rows = len(start.A)
                    a.weight[:rows] = start.A.to(a.weight)
                    if start.B is not None:
                        b.weight[:, :rows] = start.B.to(b.weight)
                        fixed = Start(start.A.to(a.weight), -start.B.to(b.weight))
            if name in gains or fixed is not None:
                parametrize.register_parametrization(a, "weight", PlacedA(gains.get(name), fixed.A if fixed else None))
            if fixed is not None:
                parametrize.register_parametrization(b, "weight", PlacedB(fixed.B))
                self._fixed[name] = fixed
            if freeze:
                for parameter in a.parameters():
                    parameter.requires_grad_(False)
                self._fixed[name] = Start(next(a.parameters()).detach())

    def state_dict(self) -> Dict[str, list]:
        return {name: [one for one in fixed if one is not None] for name, fixed in self._fixed.items()}

    def load_state_dict(self, state: Dict[str, list]) -> None:
        """ValueError for the state of another method."""
        mine = self.state_dict()
        if {name: len(own) for name, own in state.items()} != {name: len(own) for name, own in mine.items()}:
            raise ValueError("the checkpoint holds other fixed parts of the adapters than this run has: resume with the method and the "
                             "options that it was started with")
        for name, own in mine.items():
            for one, saved in zip(own, state[name]):
                one.copy_(saved.to(one))

    def detach(self) -> None:
        """Leave what acts behind as plain LoRA weights."""
        for linear in self._linears.values():
            for module in (linear.lora_A["default"], linear.lora_B["default"]):
                if parametrize.is_parametrized(module):
                    parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
                for parameter in module.parameters():
                    parameter.requires_grad_(True)
        self._linears.clear()
