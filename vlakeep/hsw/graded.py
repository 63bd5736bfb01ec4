"""HSW at the LoRA input with a gain per direction: a parametrisation of LoRA A in the eigenbasis of the linear's inputs.

    C = E[x x^T] = V diag(sigma) V^T          second moment of the inputs on the probe, all tokens
    g_k = (lambda / (sigma_k + lambda))^p     in (0, 1], small where old inputs have energy; p = 1 is the ridge projector
    A_eff = s * A V diag(g) V^T               lambda = r * unit of the linear

The gradient that reaches A is s * dL/dA_eff * V diag(g) V^T: without s, which is a scale of LoRA like alpha and reported apart, a
contraction, so ||g'|| <= ||g||. Lowering r takes out what was learnt along the directions that it closes; r to infinity with s = 1
is plain LoRA to the bit. What acts on the input is A_eff, so the merged adapter is a plain LoRA.
The three levels gamma, beta, 1 of hsw/lora_input.py are the case of three different gains.

Axes: R rank, D input size, K stored directions, O output size.
"""

import math
from typing import Any, Dict, List, Optional

import torch
from torch import nn
from torch.nn.utils import parametrize

from vlakeep.teacher.spectrum import gains

# Up to this input size one product with M [D, D] takes less time than two thin ones and the kernels around them.
DENSE = 1024


class GradedInput:
    """The eigenbasis of one input on the device, and A -> A M for the gains of the moment."""

    def __init__(self, spectrum, device: torch.device):
        """`spectrum`: vectors [D, K] orthonormal, values [K], rest. ValueError when the vectors are not orthonormal."""
        vectors_DK = spectrum.vectors.float().to(device)
        gram_KK = vectors_DK.T @ vectors_DK
        worst = float((gram_KK - torch.eye(len(gram_KK), device=device)).abs().max())
        if not worst < 1e-3:  # also when it is not a number
            raise ValueError(f"the eigenvectors of an input are not orthonormal (off by {worst:.1e}): rebuild the artefact with "
                             "`vlakeep offline`")
        self._vectors_DK, self._values_K, self._rest = vectors_DK, spectrum.values.double(), float(spectrum.rest)
        self.dim, self.count = vectors_DK.shape
        self.energy = float(self._values_K.sum()) + self._rest * (self.dim - self.count)  # trace of C
        self.identity, self.scale, self.gains_K, self.gain_rest = True, 1.0, torch.ones(self.count).double(), 1.0
        self._matrix_DD, self._weights_K = None, None
        self.version = 0  # counts changes of the gains

    def shape(self, lam: float, steepness: float):
        """(g [K], g of the rest) for this lambda, without the scale."""
        g_K = gains(self._values_K, lam, steepness)
        return g_K, float(gains(torch.tensor([self._rest]), lam, steepness)) if self.count < self.dim else 0.0

    def set(self, lam: float, steepness: float, scale: float) -> None:
        self.gains_K, self.gain_rest = self.shape(lam, steepness)
        self.scale, self.version = scale, self.version + 1
        rest_open = self.count == self.dim or self.gain_rest == 1.0
        self.identity = scale == 1.0 and rest_open and bool((self.gains_K == 1.0).all())
        # M = g_rest I + V diag(g - g_rest) V^T: directions that are not stored share one gain.
        weights_K = (self.gains_K - self.gain_rest).to(self._vectors_DK.device)
        self._weights_K = _renew(self._weights_K, weights_K.float())
        if self.dim <= DENSE:
            # In float64 and rounded once, so that shut directions do not carry the rounding of open ones.
            vectors_DK = self._vectors_DK.double()
            eye_DD = torch.eye(self.dim, dtype=torch.float64, device=vectors_DK.device)
            matrix_DD = self.gain_rest * eye_DD + (vectors_DK * weights_K) @ vectors_DK.T
            self._matrix_DD = _renew(self._matrix_DD, matrix_DD.float())

    def contract(self, x_RD: torch.Tensor) -> torch.Tensor:
        """x V diag(g) V^T in float32, without the scale."""
        x_RD = x_RD.float()
        if self._matrix_DD is not None:
            return x_RD @ self._matrix_DD
        along_RK = (x_RD @ self._vectors_DK) * self._weights_K
        return torch.add(along_RK @ self._vectors_DK.T, x_RD, alpha=self.gain_rest)

    def effective(self, a_RD: torch.Tensor) -> torch.Tensor:
        """s A V diag(g) V^T in the type of A."""
        return (self.contract(a_RD) * self.scale).to(a_RD.dtype)

    def passed_energy(self, lam: float, steepness: float, scale: float) -> float:
        """Probe energy behind A_eff relative to plain LoRA's: sum (s g)^2 sigma / sum sigma."""
        g_K, g_rest = self.shape(lam, steepness)
        passed = float((g_K.square() * self._values_K).sum()) + g_rest ** 2 * self._rest * (self.dim - self.count)
        return scale ** 2 * passed / max(self.energy, 1e-30)

    def open_rank(self) -> float:
        """Sum of g^2: how many directions are open, a half-open one counted by its square."""
        return float(self.gains_K.square().sum()) + self.gain_rest ** 2 * (self.dim - self.count)


def _renew(old, new: torch.Tensor) -> torch.Tensor:
    """`new` in the memory of `old` once there is one: a captured CUDA graph goes on reading the place that it was captured with."""
    return new if old is None else old.copy_(new)


class _Contract(torch.autograd.Function):
    """A -> A_eff, whose backward is the same contraction; what the meter needs is computed there anyway."""

    @staticmethod
    def forward(ctx, a_RD, effective_RD, space, meter):
        ctx.space, ctx.meter = space, meter
        return effective_RD.view_as(effective_RD)

    @staticmethod
    def backward(ctx, grad_RD):
        # M is symmetric: what acts on A forwards acts on its gradient backwards.
        contracted_RD = ctx.space.contract(grad_RD)
        if ctx.meter.on:
            ctx.meter.add(grad_RD.float(), contracted_RD)
        return (contracted_RD * ctx.space.scale).to(grad_RD.dtype), None, None, None


class GradedA(nn.Module):
    """The parametrisation A [R, D] -> s A V diag(g) V^T. Costs O(R D K), or O(R D D) up to DENSE, whatever the batch.

    A_eff is computed once per change of A or of the gains, not once per forward pass: micro-batches and measurements share it.
    """

    def __init__(self, space: GradedInput, meter: "GradientMeter"):
        super().__init__()
        self.space, self._meter = space, meter
        self._made: Optional[tuple] = None
        self._effective_RD: Any = None

    def forward(self, a_RD: torch.Tensor) -> torch.Tensor:
        if self.space.identity:
            if self._meter.on and torch.is_grad_enabled() and a_RD.requires_grad:
                a_RD = a_RD.view_as(a_RD)  # a hook on the parameter itself would outlive the step
                a_RD.register_hook(lambda grad_RD: self._meter.add(grad_RD.float(), grad_RD.float()))
            return a_RD
        # The pointer changes when a checkpoint or a merge replaces the weight, the version when it is written to.
        made = (a_RD._version, a_RD.data_ptr(), self.space.version, torch.is_grad_enabled() and a_RD.requires_grad)
        if made != self._made:
            # Half precision would let through what is closed; a tensor made in inference mode could not be trained through later.
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(a_RD.device.type, enabled=False):
                self._effective_RD = self.space.effective(a_RD)
            if made[-1]:  # one node for all micro-batches: it saves no tensor, so that it can be passed backwards again
                self._effective_RD = _Contract.apply(a_RD, self._effective_RD, self.space, self._meter)
            self._made = made
        return self._effective_RD


class GradientMeter:
    """||g||^2 and ||g'||^2 over all linears and micro-batches of a step, gathered on the device and read once."""

    def __init__(self):
        self.on, self._sums_2 = False, None

    def start(self, on: bool) -> None:
        self.on, self._sums_2 = on, None

    def add(self, grad_RD: torch.Tensor, contracted_RD: torch.Tensor) -> None:
        row_2 = torch.stack([grad_RD.square().sum(), contracted_RD.square().sum()])
        self._sums_2 = row_2 if self._sums_2 is None else self._sums_2 + row_2

    def read(self, loss_scale: float = 1.0) -> Dict[str, float]:
        """g_norm, g_prime_norm (without the scale s) and the share of the gradient's energy that is shed."""
        if self._sums_2 is None:
            return {}
        g, contracted = self._sums_2.tolist()
        return {"g_norm": math.sqrt(g) / loss_scale, "g_prime_norm": math.sqrt(contracted) / loss_scale,
                "shed": 1.0 - contracted / max(g, 1e-30)}


class GradedSite:
    """Parametrises LoRA A of every adapted linear.

    linears: name -> PEFT layer; spaces: name -> GradedInput, the same object for linears that read the same tensor;
    units: name -> the eigenvalue in which lambda is measured, lambda = r * unit.
    """

    def __init__(self, linears: Dict[str, nn.Module], spaces: Dict[str, GradedInput], units: Dict[str, float], steepness: float,
                 scale: float):
        self.meter = GradientMeter()
        self._linears, self._steepness, self._scale = dict(linears), steepness, scale
        for name, linear in self._linears.items():
            dim = linear.lora_A["default"].weight.shape[1]
            if spaces[name].dim != dim:
                raise ValueError(f"the spectrum of {name} has {spaces[name].dim} dimensions, its LoRA A {dim}: the artefact is of "
                                 "another model")
        self._spaces, self._units = dict(spaces), dict(units)
        for name, linear in self._linears.items():  # only now: a refused artefact must leave the model as it was
            parametrize.register_parametrization(linear.lora_A["default"], "weight", GradedA(self._spaces[name], self.meter))
        self.opening: Optional[float] = None

    def distinct(self) -> Dict[str, GradedInput]:
        """First linear's name -> space, each space once."""
        seen, found = set(), {}
        for name, space in self._spaces.items():
            if id(space) not in seen:
                seen.add(id(space))
                found[name] = space
        return found

    def set_opening(self, opening: float) -> None:
        """Gains for lambda = opening * unit in every linear."""
        # Gains that are set again keep their version, and A_eff need not be made again.
        if opening == self.opening:
            return
        for name, space in self.distinct().items():
            space.set(opening * self._units[name], self._steepness, self._scale)
        self.opening = opening

    def passed_energy(self, opening: float) -> float:
        """Mean over the inputs of the probe energy behind A_eff relative to plain LoRA's."""
        spaces = self.distinct()
        return sum(space.passed_energy(opening * self._units[name], self._steepness, self._scale)
                   for name, space in spaces.items()) / len(spaces)

    def opening_for(self, energy: float) -> float:
        """The opening at which passed_energy is `energy`, by bisection in its logarithm between 1e-9 and 1e3."""
        # More energy passes the wider it is open, so halving finds the place; 60 halvings go below rounding.
        low, high = -9.0, 3.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if self.passed_energy(10 ** middle) < energy else (low, middle)
        return 10 ** low

    @torch.no_grad()
    def update_norms(self) -> Dict[str, torch.Tensor]:
        """||scaling B A_eff||_F of every linear, a device scalar each."""
        found = {}
        for name, linear in self._linears.items():
            a_RD, b_OR = linear.lora_A["default"].weight.float(), linear.lora_B["default"].weight.float()
            square = ((b_OR.T @ b_OR) * (a_RD @ a_RD.T)).sum().clamp(min=0)  # ||B A||_F^2 = <B^T B, A A^T>
            found[name] = linear.scaling["default"] * square.sqrt()
        return found

    def names(self) -> List[str]:
        return list(self._linears)

    def detach(self) -> None:
        """Leave A_eff behind as the plain LoRA weight."""
        for linear in self._linears.values():
            parametrize.remove_parametrizations(linear.lora_A["default"], "weight", leave_parametrized=True)
        self._linears.clear()
