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


class InputGains(nn.Module):
    """A [rank, D] -> A_eff [rank, D]. Costs O(rank * D * K), whatever the batch."""

    def __init__(self, basis_DK: torch.Tensor, fragile: int, meter: NormMeter):
        super().__init__()
        self.register_buffer("basis_DK", basis_DK, persistent=False)
        self.register_buffer("weights_K", torch.zeros_like(basis_DK[0]), persistent=False)
        self.fragile = fragile
        self.identity = True  # a host flag, so that gains of 1 cost nothing and change no bit
        self._meter = [meter]  # in a list: not a submodule

    def forward(self, a_RD: torch.Tensor) -> torch.Tensor:
        effective_RD = a_RD if self.identity else scale_in_subspace(a_RD, self.basis_DK, self.weights_K.to(a_RD.dtype))
        meter = self._meter[0]
        if meter.on and torch.is_grad_enabled() and a_RD.requires_grad:
            if self.identity:
                effective_RD = a_RD.view_as(a_RD)  # a hook on the parameter itself would outlive the step
            effective_RD.register_hook(self._observe)
        return effective_RD

    def _observe(self, grad_RD):
        edited_RD = grad_RD if self.identity else scale_in_subspace(grad_RD, self.basis_DK, self.weights_K)
        self._meter[0].add(grad_RD, edited_RD, self.basis_DK, self.fragile)


class LoraInputSite:
    """Parametrises LoRA A of every adapted linear; `bases` maps a linear's name to its (Uf [D, Kf], Up [D, Kp])."""

    def __init__(self, adapted: Dict[str, nn.Module], bases: Dict[str, tuple]):
        self.meter = NormMeter()
        self.gains = Gains()
        self._linears, self._params = adapted, {}
        for name, linear in adapted.items():
            if name not in bases:
                raise ValueError(f"the artefact holds no input subspace for the adapted linear {name}: rebuild it with "
                                 "`vlakeep offline --icsm.tokens true` and the same lora section")
            lora_a = linear.lora_A["default"]
            if bases[name][0].shape[0] != lora_a.weight.shape[1]:
                raise ValueError(f"input subspace of {name} has {bases[name][0].shape[0]} dimensions, "
                                 f"its LoRA A {lora_a.weight.shape[1]}: the artefact is of another model")
            basis_DK, fragile = join_bases(*bases[name])
            gains = InputGains(basis_DK.to(lora_a.weight.device), fragile, self.meter)
            parametrize.register_parametrization(lora_a, "weight", gains)
            self._params[name] = gains

    def set_gains(self, gains: Gains) -> None:
        if gains != self.gains:
            for p in self._params.values():
                p.weights_K.copy_(gain_weights(gains, p.fragile, len(p.weights_K)))
                p.identity = gains.identity
            self.gains = gains

    @torch.no_grad()
    def leak(self) -> float:
        """Share of the squared norm of the effective update B A_eff that acts on inputs in Uf, over all adapted linears."""
        inside, total = 0.0, 0.0
        for name, p in self._params.items():
            a_RD = self._linears[name].lora_A["default"].weight.float()
            b_OR = self._linears[name].lora_B["default"].weight.float()
            gram_RR = b_OR.T @ b_OR  # ||B A||_F^2 = <B^T B, A A^T>
            in_f_RK = a_RD @ p.basis_DK[:, :p.fragile].float()
            inside = inside + (gram_RR * (in_f_RK @ in_f_RK.T)).sum()
            total = total + (gram_RR * (a_RD @ a_RD.T)).sum()
        return float(inside / total) if float(total) > 0 else 0.0

    def detach(self) -> None:
        """Leave A_eff behind as the plain LoRA weight."""
        for name in self._params:
            parametrize.remove_parametrizations(self._linears[name].lora_A["default"], "weight", leave_parametrized=True)
        self._params.clear()


if __name__ == "__main__":  # sanity check: python -m vlakeep.hsw.lora_input
    linear = nn.Module()
    linear.lora_A, linear.lora_B = (nn.ModuleDict({"default": nn.Linear(*size, bias=False)}) for size in ((32, 4), (4, 16)))
    basis_DK = torch.linalg.qr(torch.randn(32, 12, generator=torch.Generator().manual_seed(0)))[0]
    site = LoraInputSite({"linear": linear}, {"linear": (basis_DK[:, :6], basis_DK[:, 6:])})
    for gamma in (1.0, 0.2, 0.0):
        site.set_gains(Gains(beta=0.8, gamma=gamma))
        print(f"gamma {gamma}: share of the update that acts on inputs in Uf {site.leak():.4f}")
