"""HSW at the LoRA input: the same formula on the rows of dL/dA, as a parametrisation of A.

    A_eff = A M        M = I + (gamma - 1) Uf Uf^T + (beta - 1) Up Up^T

The gradient that reaches A is then dL/dA_eff M = gn + beta gp + gamma gf exactly; Adam cannot leak out of it, because what acts
on the input is A_eff; M is a contraction, so ||g'|| <= ||g|| by construction; and lowering gamma removes what A has already
learned in Uf, which gives the Thermostat an actuator with authority. Uf and Up span the inputs of the adapted linear.
"""

from typing import Dict

import torch
from torch import nn
from torch.nn.utils import parametrize

from vlakeep.hsw.meter import NormMeter
from vlakeep.hsw.transform import Gains, gain_weights, join_bases, scale_in_subspace


class InputSpace:
    """The subspaces of one input, shared by all linears that read it, and M for the gains of the moment."""

    def __init__(self, basis_DK: torch.Tensor, fragile: int):
        self.basis_DK, self.fragile = basis_DK, fragile
        self.gains = Gains()
        self._weights_K, self._matrix_DD = None, None

    def set_gains(self, gains: Gains) -> None:
        self.gains = gains
        dim, columns = self.basis_DK.shape
        self._weights_K = gain_weights(gains, self.fragile, columns).to(self.basis_DK)
        # With many columns one product with M is less work, and fewer kernels, than two thin ones.
        dense = 2 * columns > dim
        self._matrix_DD = scale_in_subspace(torch.eye(dim).to(self.basis_DK), self.basis_DK, self._weights_K) if dense else None

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """x M over the last axis; x itself when both gains are 1, so that they cost nothing and change no bit."""
        if self.gains.identity:
            return x
        if self._matrix_DD is not None:
            return x @ self._matrix_DD
        return scale_in_subspace(x, self.basis_DK, self._weights_K)


class InputGains(nn.Module):
    """The parametrisation A [rank, D] -> A_eff = A M. Costs O(rank * D * min(D, 2 K)), whatever the batch."""

    def __init__(self, space: InputSpace, meter: NormMeter):
        super().__init__()
        self.space, self._meter = space, meter

    def forward(self, a_RD: torch.Tensor) -> torch.Tensor:
        effective_RD = self.space.apply(a_RD)
        if self._meter.on and torch.is_grad_enabled() and a_RD.requires_grad:
            if effective_RD is a_RD:
                effective_RD = a_RD.view_as(a_RD)  # a hook on the parameter itself would outlive the step
            effective_RD.register_hook(self._observe)
        return effective_RD

    def _observe(self, grad_RD):
        self._meter.add(grad_RD, self.space.apply(grad_RD), self.space.basis_DK, self.space.fragile)


class LoraInputSite:
    """Parametrises LoRA A of every adapted linear; `bases` maps a linear's name to its (Uf [D, Kf], Up [D, Kp])."""

    def __init__(self, adapted: Dict[str, nn.Module], bases: Dict[str, tuple]):
        """Linears whose entry in `bases` is the same pair of tensors share one copy on the device."""
        self.meter = NormMeter()
        self.gains = Gains()
        self._linears, self._spaces, shared = {}, {}, {}
        for name, linear in adapted.items():
            if name not in bases:
                raise ValueError(f"the artefact holds no input subspace for the adapted linear {name}: rebuild it with "
                                 "`vlakeep offline --icsm.tokens true` and the same lora section")
            weight = linear.lora_A["default"].weight
            fragile_DK, plastic_DK = bases[name]
            if fragile_DK.shape[0] != weight.shape[1]:
                raise ValueError(f"input subspace of {name} has {fragile_DK.shape[0]} dimensions, "
                                 f"its LoRA A {weight.shape[1]}: the artefact is of another model")
            key = (id(fragile_DK), id(plastic_DK))
            if key not in shared:
                basis_DK, fragile = join_bases(fragile_DK, plastic_DK)
                shared[key] = InputSpace(basis_DK.to(weight.device), fragile)
            self._linears[name], self._spaces[name] = linear, shared[key]
        for name, linear in self._linears.items():  # only now: a refused artefact must leave the model as it was
            parametrize.register_parametrization(linear.lora_A["default"], "weight", InputGains(self._spaces[name], self.meter))

    def set_gains(self, gains: Gains) -> None:
        if gains != self.gains:
            for space in {id(space): space for space in self._spaces.values()}.values():
                space.set_gains(gains)
            self.gains = gains

    @torch.no_grad()
    def leak(self) -> float:
        """Share of the squared norm of the effective update B A_eff that acts on inputs in Uf, over all adapted linears."""
        inside, total = 0.0, 0.0
        for name, p in self._spaces.items():
            a_RD = self._linears[name].lora_A["default"].weight.float()
            b_OR = self._linears[name].lora_B["default"].weight.float()
            gram_RR = b_OR.T @ b_OR  # ||B A||_F^2 = <B^T B, A A^T>
            in_f_RK = a_RD @ p.basis_DK[:, :p.fragile].float()
            inside = inside + (gram_RR * (in_f_RK @ in_f_RK.T)).sum()
            total = total + (gram_RR * (a_RD @ a_RD.T)).sum()
        return float(inside / total) if float(total) > 0 else 0.0

    def detach(self) -> None:
        """Leave A_eff behind as the plain LoRA weight."""
        for name in self._spaces:
            parametrize.remove_parametrizations(self._linears[name].lora_A["default"], "weight", leave_parametrized=True)
        self._spaces.clear()


if __name__ == "__main__":  # sanity check: python -m vlakeep.hsw.lora_input
    linear = nn.Module()
    linear.lora_A, linear.lora_B = (nn.ModuleDict({"default": nn.Linear(*size, bias=False)}) for size in ((32, 4), (4, 16)))
    basis_DK = torch.linalg.qr(torch.randn(32, 12, generator=torch.Generator().manual_seed(0)))[0]
    site = LoraInputSite({"linear": linear}, {"linear": (basis_DK[:, :6], basis_DK[:, 6:])})
    for gamma in (1.0, 0.2, 0.0):
        site.set_gains(Gains(beta=0.8, gamma=gamma))
        print(f"gamma {gamma}: share of the update that acts on inputs in Uf {site.leak():.4f}")
