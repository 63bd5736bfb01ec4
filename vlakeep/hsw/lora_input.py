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
from vlakeep.hsw.transform import Gains, join_bases

# Up to this input size one product with M [D, D] takes less time than two thin ones and the kernels around them.
DENSE = 1024


class InputSpace:
    """The subspaces of one input, shared by all linears that read it, and M for the gains of the moment.

    When Uf takes most of the space its complement Un, the directions in neither Uf nor Up, says the same in fewer columns:
        M = gamma I + (1 - gamma) Un Un^T + (beta - gamma) Up Up^T
    """

    def __init__(self, bases: Dict[str, torch.Tensor], device: torch.device):
        """`bases` holds Up [D, Kp] as "p", and Uf [D, Kf] as "f" or Un [D, Kn] as "n"; raises ValueError unless orthonormal."""
        self._complement = "n" in bases
        basis_DK, self._first = join_bases(bases["n" if self._complement else "f"].to(device), bases["p"].to(device))
        self._basis_DK = basis_DK
        self.gains = Gains()
        self._outside, self._weights_K, self._matrix_DD = 1.0, None, None

    def set_gains(self, gains: Gains) -> None:
        self.gains = gains
        dim, columns = self._basis_DK.shape
        self._outside, first = (gains.gamma, 1.0) if self._complement else (1.0, gains.gamma)
        gains_K = torch.tensor([first] * self._first + [gains.beta] * (columns - self._first))
        self._weights_K = (gains_K - self._outside).to(self._basis_DK)
        # Made when the gains change, once per measurement, and used in every forward pass until then.
        self._matrix_DD = self._thin_product(torch.eye(dim).to(self._basis_DK)) if dim <= DENSE else None

    def _thin_product(self, x: torch.Tensor) -> torch.Tensor:
        return self._outside * x + ((x @ self._basis_DK) * self._weights_K) @ self._basis_DK.T

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """x M over the last axis; x itself when both gains are 1, so that they cost nothing and change no bit."""
        if self.gains.identity:
            return x
        return x @ self._matrix_DD if self._matrix_DD is not None else self._thin_product(x)

    def observe(self, meter: NormMeter, grad_RD: torch.Tensor) -> None:
        grad_RD = grad_RD.to(self._basis_DK.dtype)
        meter.add(grad_RD, self.apply(grad_RD), self._basis_DK, self._first, self._complement)

    def fragile_part(self, x_RD: torch.Tensor) -> torch.Tensor:
        """x Uf Uf^T."""
        basis_DK = self._basis_DK if self._complement else self._basis_DK[:, :self._first]
        inside = (x_RD @ basis_DK) @ basis_DK.T
        return x_RD - inside if self._complement else inside


class InputGains(nn.Module):
    """The parametrisation A [rank, D] -> A_eff = A M. Costs O(rank * D * 2 K), or O(rank * D * D) up to DENSE, whatever the batch."""

    def __init__(self, space: InputSpace, meter: NormMeter):
        super().__init__()
        self.space, self._meter = space, meter

    def forward(self, a_RD: torch.Tensor) -> torch.Tensor:
        with torch.autocast(a_RD.device.type, enabled=False):  # in half precision what gamma closes would leak through by rounding
            effective_RD = self.space.apply(a_RD)
        if self._meter.on and torch.is_grad_enabled() and a_RD.requires_grad:
            if effective_RD is a_RD:
                effective_RD = a_RD.view_as(a_RD)  # a hook on the parameter itself would outlive the step
            effective_RD.register_hook(self._observe)
        return effective_RD

    def _observe(self, grad_RD):
        self.space.observe(self._meter, grad_RD)


class LoraInputSite:
    """Parametrises LoRA A of every adapted linear; `bases` maps a linear's name to the bases of its input, as InputSpace takes them."""

    def __init__(self, adapted: Dict[str, nn.Module], bases: Dict[str, Dict[str, torch.Tensor]]):
        """Linears whose entry in `bases` is the same dictionary share one copy on the device."""
        self.meter = NormMeter()
        self.gains = Gains()
        self._linears, self._spaces, shared = {}, {}, {}
        for name, linear in adapted.items():
            if name not in bases:
                raise ValueError(f"the artefact holds no input subspace for the adapted linear {name}: rebuild it with "
                                 "`vlakeep offline --icsm.tokens true` and the same lora section")
            weight = linear.lora_A["default"].weight
            dim = len(bases[name]["p"])
            if dim != weight.shape[1]:
                raise ValueError(f"input subspace of {name} has {dim} dimensions, its LoRA A {weight.shape[1]}: the artefact is of "
                                 "another model")
            key = id(bases[name])
            if key not in shared:
                shared[key] = InputSpace(bases[name], weight.device)
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
        for name, space in self._spaces.items():
            a_RD = self._linears[name].lora_A["default"].weight.float()
            b_OR = self._linears[name].lora_B["default"].weight.float()
            # R x R only: the update itself [O, D] is never formed.
            gram_RR = b_OR.T @ b_OR  # ||B A||_F^2 = <B^T B, A A^T>
            in_f_RD = space.fragile_part(a_RD)
            inside = inside + (gram_RR * (in_f_RD @ in_f_RD.T)).sum()
            total = total + (gram_RR * (a_RD @ a_RD.T)).sum()
        # B starts at zero: before the first step there is no update to take a share of.
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
    site = LoraInputSite({"linear": linear}, {"linear": {"f": basis_DK[:, :6], "p": basis_DK[:, 6:]}})
    odds = None  # of Uf against the rest: they fall with gamma squared
    for gamma in (1.0, 0.2, 0.0):
        site.set_gains(Gains(beta=0.8, gamma=gamma))
        leak = site.leak()
        print(f"gamma {gamma}: share of the update that acts on inputs in Uf {leak:.4f}")
        odds = leak / (1 - leak) if odds is None else odds
        assert odds > 0.01 and abs(leak / (1 - leak) - gamma ** 2 * odds) < 1e-5
