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
import weakref
from typing import Any, Callable, Dict, List, Optional, Sequence

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.optim.optimizer import register_optimizer_step_post_hook

from vlakeep.hsw.rules import leading_eigenvectors
from vlakeep.teacher.spectrum import gains, leading

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
        self._matrix_DD: Optional[torch.Tensor] = None
        self._weights_K: Optional[torch.Tensor] = None
        self._rest_1: Optional[torch.Tensor] = None  # gain_rest where a Block reads it
        self.version = 0  # counts changes of the gains

    def vectors(self) -> torch.Tensor:
        """V [D, K] on the device."""
        return self._vectors_DK

    def lie_in(self, vectors_DK, weights_K, rest_1, matrix_DD) -> None:
        """Take these places for what a contraction reads. vectors_DK must hold `vectors()` already; the others are filled by `set`."""
        self._vectors_DK, self._weights_K, self._rest_1, self._matrix_DD = vectors_DK, weights_K, rest_1, matrix_DD

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
        if self._rest_1 is not None:
            self._rest_1.fill_(self.gain_rest)
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

    def through(self, x_ND: torch.Tensor) -> torch.Tensor:
        """x M with the gains of now, in float64: what passes is small beside what is shut."""
        vectors_DK, excess_K = self._vectors_DK.double(), (self.gains_K - self.gain_rest).to(self._vectors_DK.device)
        return self.gain_rest * x_ND.double() + ((x_ND.double() @ vectors_DK) * excess_K) @ vectors_DK.T

    def most_open(self, moment_DD: torch.Tensor, count: int) -> torch.Tensor:
        """Orthonormal rows [count, D] float64 along which inputs of second moment C_new [D, D] pass the gains of now most, D at most: the
        eigenvectors of M C_new M of the largest eigenvalues, M = V diag(g) V^T. Above DENSE by subspace iteration.

        p = 1/2 means M^2 = lambda (C + lambda I)^-1. Then M C_new M u = mu u says of the row v = M u of A_eff that
        C_new v = (mu / lambda) (C + lambda I) v: A_eff begins with the leading generalised eigenvectors of (C_new, C + lambda I).
        """
        passing_DD = self.through(self.through(moment_DD).T)
        return (leading_eigenvectors(passing_DD, count) if self.dim <= DENSE else leading(passing_DD, count)[1]).T

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
    """All A -> all A_eff as one node, whose backward is the same contraction; what the meter needs is computed there anyway."""

    @staticmethod
    def forward(ctx, together, effective, *raw):
        ctx.together = together
        ctx.set_materialize_grads(False)
        return tuple(one.view_as(one) for one in effective)

    @staticmethod
    def backward(ctx, *grads):
        # M is symmetric: what acts on A forwards acts on its gradient backwards.
        return (None, None, *ctx.together.backward(grads))


class Together:
    """A_eff of every adapted linear, computed at once after a change of A or of the gains and read by all micro-batches and measurements.

    One by one, as on a CPU, the contractions of a 7B model are hundreds of small kernels, and starting them takes longer than running
    them. On a GPU those of one shape are a batched product: their eigenvectors lie in one block of memory, of which each space holds
    its part. Axes: G spaces of one shape, M linears that read each of them.
    """

    def __init__(self, linears: Dict[str, nn.Module], spaces: Dict[str, GradedInput], meter: "GradientMeter",
                 batched: Optional[bool] = None, adapter: str = "default"):
        """batched: whether contractions of one shape are one product; None: on a GPU."""
        self._modules = [linear.lora_A[adapter] for linear in linears.values()]
        self._spaces, self._meter = [spaces[name] for name in linears], meter
        self._made: List[Optional[tuple]] = [None] * len(self._modules)
        self._held = False
        self._steps = 0  # of any optimizer
        self._plain: List[Any] = [None] * len(self._modules)  # A_eff as values
        self._traced: List[Any] = [None] * len(self._modules)  # the same with the way back to A; None until a training pass asks
        groups: Dict[tuple, Dict[int, List[int]]] = {}
        readers: Dict[int, List[int]] = {}
        for i, space in enumerate(self._spaces):
            readers.setdefault(id(space), []).append(i)
        for rows in readers.values():
            weight, space = self._modules[rows[0]].weight, self._spaces[rows[0]]
            shape = (space.dim, space.count, len(rows), weight.shape[0], weight.dtype)
            if weight.device.type == "cuda" if batched is None else batched:
                groups.setdefault(shape, {})[id(space)] = rows
        self._groups = [([self._spaces[rows[0]] for rows in group.values()], [i for rows in group.values() for i in rows])
                        for group in groups.values()]
        self._blocks = [Block(own) for own, _ in self._groups]

    def effective(self, index: int, a_RD: torch.Tensor) -> torch.Tensor:
        """A_eff [R, D] of the linear number `index`, whose A is a_RD; with a way back to A where gradients are taken."""
        if self._held:
            return self._plain[index]
        if self._state(index, a_RD) != self._made[index]:
            raw = self._raw()
            # Half precision would let through what is closed; a tensor made in inference mode could not be trained through later.
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(a_RD.device.type, enabled=False):
                self._plain = self._contract([one.detach() for one in raw])
            self._made, self._traced = [self._state(i, one) for i, one in enumerate(raw)], [None] * len(raw)
        if not (torch.is_grad_enabled() and a_RD.requires_grad):
            return self._plain[index]
        if self._traced[index] is None:  # one node for all micro-batches: it saves no tensor, so that it can be passed backwards again
            self._traced = list(_Contract.apply(self, self._plain, *self._raw()))
        return self._traced[index]

    def _raw(self) -> List[torch.Tensor]:
        return [module.parametrizations.weight.original for module in self._modules]

    def _state(self, index: int, a_RD: torch.Tensor) -> tuple:
        # The pointer changes when a checkpoint or a merge replaces the weight, the version when it is written to; but fused optimizers
        # write without raising it (torch 2.13: AdamW(fused=True)), which is why their steps are counted.
        return a_RD._version, a_RD.data_ptr(), self._spaces[index].version, self._steps

    def stepped(self) -> None:
        """An optimizer has made a step."""
        self._steps += 1

    def hold(self) -> None:
        """Keep the A_eff of now, whatever becomes of A: the parametrisations are about to be taken off one after the other."""
        for index, space in enumerate(self._spaces):
            if not space.identity:
                with torch.no_grad():
                    self.effective(index, self._modules[index].parametrizations.weight.original)
        self._held = True

    def _contract(self, values: Sequence[Optional[torch.Tensor]], meter: Optional["GradientMeter"] = None) -> List[Any]:
        """s x V diag(g) V^T of every x [R, D] in its own type; None stays None."""
        found: List[Any] = [None] * len(values)
        for block, (spaces, rows) in zip(self._blocks, self._groups):
            if all(values[i] is not None for i in rows):
                x_GRD = torch.stack([values[i] for i in rows]).view(len(spaces), -1, spaces[0].dim).float()
                contracted_GRD = block.contract(x_GRD)
                if meter:
                    meter.add(x_GRD, contracted_GRD)
                scaled = (contracted_GRD * spaces[0].scale).to(values[rows[0]].dtype).view(len(rows), -1, spaces[0].dim)
                for i, one in zip(rows, scaled.unbind(0)):
                    found[i] = one
        for i, (x_RD, space) in enumerate(zip(values, self._spaces)):
            if x_RD is not None and found[i] is None:
                contracted_RD = space.contract(x_RD)
                if meter:
                    meter.add(x_RD.float(), contracted_RD)
                found[i] = (contracted_RD * space.scale).to(x_RD.dtype)
        return found

    def backward(self, grads: Sequence[Optional[torch.Tensor]]) -> List[Any]:
        """Gradients of A from those of A_eff; None for a linear that took no part."""
        with torch.autocast(self._modules[0].parametrizations.weight.original.device.type, enabled=False):
            return self._contract(grads, self._meter if self._meter.on else None)


class Block:
    """Contractions of G spaces of one shape as one batched product. The spaces hold parts of its memory, so that it sees their gains."""

    def __init__(self, spaces: List[GradedInput]):
        self._dense = spaces[0].dim <= DENSE
        self._vectors_GDK = torch.stack([space.vectors() for space in spaces])
        device = self._vectors_GDK.device
        count, dim = len(spaces), spaces[0].dim
        self._weights_G1K = torch.zeros(count, 1, spaces[0].count, device=device)
        self._rest_G11 = torch.zeros(count, 1, 1, device=device)
        self._matrix_GDD = torch.zeros(count, dim, dim, device=device) if self._dense else None
        for i, space in enumerate(spaces):
            space.lie_in(self._vectors_GDK[i], self._weights_G1K[i, 0], self._rest_G11[i, 0],
                         self._matrix_GDD[i] if self._matrix_GDD is not None else None)

    def contract(self, x_GRD: torch.Tensor) -> torch.Tensor:
        """x V diag(g) V^T of every space, float32 [G, R, D], without the scale."""
        if self._matrix_GDD is not None:
            return torch.bmm(x_GRD, self._matrix_GDD)
        along_GRK = torch.bmm(x_GRD, self._vectors_GDK) * self._weights_G1K
        return torch.baddbmm(x_GRD * self._rest_G11, along_GRK, self._vectors_GDK.transpose(1, 2))


class GradedA(nn.Module):
    """The parametrisation A [R, D] -> s A V diag(g) V^T of linear number `index`. Costs O(R D K), or O(R D D) up to DENSE, whatever the
    batch."""

    def __init__(self, space: GradedInput, meter: "GradientMeter", together: Together, index: int):
        super().__init__()
        self.space, self._meter, self._index = space, meter, index
        self._together = [together]  # in a list: it holds modules, which would be taken for children

    def forward(self, a_RD: torch.Tensor) -> torch.Tensor:
        if self.space.identity:
            if self._meter.on and torch.is_grad_enabled() and a_RD.requires_grad:
                a_RD = a_RD.view_as(a_RD)  # a hook on the parameter itself would outlive the step
                a_RD.register_hook(lambda grad_RD: self._meter.add(grad_RD.float(), grad_RD.float()))
            return a_RD
        return self._together[0].effective(self._index, a_RD)


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
    units: name -> the eigenvalue in which lambda is measured, lambda = r * unit. batched: see Together. adapter: its name in PEFT.
    """

    def __init__(self, linears: Dict[str, nn.Module], spaces: Dict[str, GradedInput], units: Dict[str, float], steepness: float,
                 scale: float, batched: Optional[bool] = None, adapter: str = "default"):
        self.meter, self._adapter = GradientMeter(), adapter
        self._linears, self._steepness, self._scale = dict(linears), steepness, scale
        for name, linear in self._linears.items():
            dim = linear.lora_A[adapter].weight.shape[1]
            if spaces[name].dim != dim:
                raise ValueError(f"the spectrum of {name} has {spaces[name].dim} dimensions, its LoRA A {dim}: the artefact is of "
                                 "another model")
        self._spaces, self._units = dict(spaces), dict(units)
        self._together = Together(self._linears, self._spaces, self.meter, batched, adapter)
        for index, (name, linear) in enumerate(self._linears.items()):  # only now: a refused artefact must leave the model as it was
            made = GradedA(self._spaces[name], self.meter, self._together, index)
            parametrize.register_parametrization(linear.lora_A[self._adapter], "weight", made)
        self.opening: Optional[float] = None
        together = weakref.ref(self._together)  # a site that was dropped is not kept alive

        def stepped(*_) -> None:
            if (own := together()) is not None:
                own.stepped()

        self._counter = register_optimizer_step_post_hook(stepped)

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

    @torch.no_grad()
    def start_at(self, moments_DD: Dict[str, torch.Tensor]) -> None:
        """Put A of these linears, name -> C_new [D, D] of its inputs on the device, to `most_open` of the opening of now. All rows get the
        length that A's have in the mean. B stays."""
        made: Dict[tuple, torch.Tensor] = {}
        for name, moment_DD in moments_DD.items():
            space, a_RD = self._spaces[name], self._linears[name].lora_A[self._adapter].parametrizations.weight.original
            key = (id(space), len(a_RD))
            if key not in made:
                made[key] = space.most_open(moment_DD, len(a_RD))
            rows_RD = made[key]
            a_RD[:len(rows_RD)] = (rows_RD * a_RD.double().norm(dim=1).mean()).to(a_RD)

    @torch.no_grad()
    def start_open(self) -> None:
        """Put each row of A behind the gains of now, at the length that it had: into the open space. B stays."""
        for name, linear in self._linears.items():
            a_RD = linear.lora_A[self._adapter].parametrizations.weight.original
            open_RD = self._spaces[name].through(a_RD)
            a_RD.copy_(open_RD * (a_RD.double().norm(dim=1) / open_RD.norm(dim=1).clamp(min=1e-30))[:, None])

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
        shapes: Dict[tuple, List[str]] = {}
        for name, linear in self._linears.items():
            shapes.setdefault((linear.lora_A[self._adapter].weight.shape, linear.lora_B[self._adapter].weight.shape), []).append(name)
        found: Dict[str, torch.Tensor] = {}
        for names in shapes.values():  # those of one shape at once: one by one most of the time goes into starting kernels
            linears = [self._linears[name] for name in names]
            a_GRD = torch.stack([linear.lora_A[self._adapter].weight for linear in linears]).float()
            b_GOR = torch.stack([linear.lora_B[self._adapter].weight for linear in linears]).float()
            # ||B A||_F^2 = <B^T B, A A^T>
            square_G = (torch.bmm(b_GOR.mT, b_GOR) * torch.bmm(a_GRD, a_GRD.mT)).sum((1, 2)).clamp(min=0)
            for name, linear, norm in zip(names, linears, square_G.sqrt().unbind(0)):
                found[name] = linear.scaling[self._adapter] * norm
        return {name: found[name] for name in self._linears}

    def names(self) -> List[str]:
        return list(self._linears)

    def detach(self) -> None:
        """Leave A_eff behind as the plain LoRA weight."""
        self._counter.remove()
        self._together.hold()
        for linear in self._linears.values():
            parametrize.remove_parametrizations(linear.lora_A[self._adapter], "weight", leave_parametrized=True)
        self._linears.clear()


def make_site(linears: Dict[str, nn.Module], spectra: Dict[str, Any], key_of: Callable[[str], str], steepness: float, scale: float,
              allocation: str = "linear", sensitivity: Optional[Dict[str, float]] = None, adapter: str = "default") -> GradedSite:
    """The site of these PEFT layers. spectra: input -> Spectrum; key_of: a linear's input; allocation as in config.GainsConfig, of which
    "sensitivity" reads the linears' sensitivities."""
    made: Dict[tuple, GradedInput] = {}
    spaces = {}
    for name, linear in linears.items():
        # With one lambda per linear those that share an input still need gains of their own.
        key = (key_of(name), name if allocation == "sensitivity" else "")
        if key not in made:
            made[key] = GradedInput(spectra[key[0]], linear.lora_A[adapter].weight.device)
        spaces[name] = made[key]
    return GradedSite(linears, spaces, _units(spaces, allocation, sensitivity), steepness, scale, adapter=adapter)


def _units(spaces: Dict[str, GradedInput], allocation: str, sensitivity: Optional[Dict[str, float]]) -> Dict[str, float]:
    """Eigenvalue in which lambda is measured, per linear."""
    own = {name: space.energy / space.dim for name, space in spaces.items()}
    if allocation == "linear":
        return own
    if allocation == "model":
        mean = sum(own.values()) / len(own)
        return {name: mean for name in own}
    middle = sorted(sensitivity[name] for name in own)[len(own) // 2]
    typical = sorted(own.values())[len(own) // 2]
    # The floor keeps a linear that the answers hardly depend on from being opened without bound.
    return {name: typical * middle / max(sensitivity[name], 1e-3 * middle) for name in own}
