"""Closing pass: what a finished adapter does to old inputs is taken out of it again, and what its new task needs is kept.

    dW' = dW C_new (C_new + mu C_probe)^-1        per adapted linear

C_new and C_probe are the uncentred second moments E[x x^T] of the linear's inputs x on the new task's prompts and on the probe's. dW' is
the update that minimises E_new |dW' x - dW x|^2 + mu E_probe |dW' x|^2; with mu = 1 it is RegMean (Jin et al. 2022) of the base and the
tuned model. The factor stands on the right, so that dW = scale B A becomes scale B A' with A' = A C_new (C_new + mu C_probe)^-1: rank,
scale and file format of the adapter stay what they are.

Front to back: what a linear's input is depends on how far those before it are closed, so the moments of a decoder layer are measured
when all earlier layers are closed with the same mu (`sweep`). A new mu needs new moments, so nothing is gained by a decomposition that
would serve many mu; one Cholesky factorisation per input and mu is cheaper than an eigenvalue problem.

Axes: R rank, D input size, O output size, S sequence, B batch.
"""

import math
from typing import Callable, Dict, List, Optional, Tuple

import torch
from tqdm import tqdm

from vlakeep.teacher.answers import Part
from vlakeep.teacher.coverage import input_moments

EMPTY = 1e-7  # share of the trace below which energy is rounding of float32 sums: where neither has more, nothing passes
REACHED = 0.9  # share of the budget from which on a divergence is left as it is
MOST = 12  # measurements of a search
START, STRIDE, HIGHEST, LOWEST = 1.0, 100.0, 1e6, 1e-6  # of mu: the first one, steps until the budget lies between two, and the limits


def closed(A_RD: torch.Tensor, C_new_DD: torch.Tensor, C_probe_DD: torch.Tensor, mu: float) -> torch.Tensor:
    """A C_new (C_new + mu C_probe)^-1 [R, D] in the type of A, solved in float64; A itself for mu = 0."""
    if mu == 0:
        return A_RD.clone()
    C_new_DD = C_new_DD.double()
    both_DD = C_new_DD + mu * C_probe_DD.double()
    # Lets Cholesky pass where neither side has energy; A C_new is zero there, so nothing passes all the same.
    both_DD.diagonal().add_(EMPTY * both_DD.diagonal().sum() + torch.finfo(torch.float64).tiny)
    factor_DD = torch.linalg.cholesky(both_DD)
    return torch.cholesky_solve((A_RD.double() @ C_new_DD).T, factor_DD).T.to(A_RD.dtype)


def energy(A_RD: torch.Tensor, B_OR: torch.Tensor, C_DD: Optional[torch.Tensor] = None) -> float:
    """E |B A x|^2 of inputs x with the second moment C, or without one the squared norm of B A."""
    A_RD, B_OR = A_RD.double(), B_OR.double()
    seen_RD = A_RD if C_DD is None else A_RD @ C_DD.double()
    return float(((B_OR.T @ B_OR) * (seen_RD @ A_RD.T)).sum())


@torch.no_grad()
def sweep(backbone, old: List[Part], new: List[Part], own: Dict[str, torch.Tensor], mu: float, key_of: Callable[[str], str],
          weights_N: Optional[torch.Tensor] = None) -> Dict[int, Dict[str, float]]:
    """Close the adapters of every decoder layer, from the first adapted one to the last.

    old, new: probe and new data, run up to the first adapted layer. weights_N: of the probe's rows. own: linear -> its A [R, D] as it was
    trained; what the adapters hold is overwritten. mu = 0 puts them back. Returns per layer what is left of the update, 1 being all of
    it: of its `norm`, and of the root mean square of what it adds to `new` and to `old` inputs. The norm may grow: what is taken out of a
    direction that the probe uses is made up for in others that go with it in the new task's inputs.
    """
    linears = backbone.adapted_linears()
    first = backbone.first_adapted_layer()
    # Every mu begins with the trained adapter, never with one that another mu has closed.
    for name, A_RD in own.items():
        linears[name].lora_A["default"].weight.copy_(A_RD)
    layers = sorted({int(name.split(".")[1]) for name in own})
    if mu == 0:
        return {layer: dict.fromkeys(("norm", "new", "old"), 1.0) for layer in layers}
    left = {}
    for layer in tqdm(range(first, backbone.num_layers), desc=f"closing, mu {mu:.3g}", leave=False):
        here = {name: linear for name, linear in linears.items() if name.startswith(f"layers.{layer}.")}
        C_probe = input_moments(backbone, old, weights_N, layer, here, key_of, layer + 1)
        C_new = input_moments(backbone, new, None, layer, here, key_of, layer + 1)
        pairs = torch.zeros(3, 2, dtype=torch.float64)  # energy as trained and as closed, by norm, new and old
        for name, linear in here.items():
            A, B, C = linear.lora_A["default"].weight, linear.lora_B["default"].weight, (None, C_new[key_of(name)], C_probe[key_of(name)])
            A.copy_(closed(A, C[1], C[2], mu))
            pairs += torch.tensor([[energy(own[name], B, one), energy(A, B, one)] for one in C])
        if here:
            left[layer] = {what: (b / a) ** 0.5 if a else 1.0 for what, (a, b) in zip(("norm", "new", "old"), pairs.tolist())}
        old, new = _advanced(backbone, old, layer), _advanced(backbone, new, layer)
    return left


def _advanced(backbone, parts: List[Part], layer: int) -> List[Part]:
    """The parts behind one more decoder layer."""
    found = []
    for part in parts:
        prefix = part.to(backbone.device).prefix
        hidden_BSD = backbone.run_layers(prefix, start=layer, stop=layer + 1)
        found.append(part._replace(prefix=part.prefix.with_hidden(hidden_BSD.cpu())))
    return found


def search(measure: Callable[[float], float], budget: float, divergence: float) -> List[Tuple[float, float]]:
    """(mu, divergence) of every measurement, the one that is kept at the end: the smallest mu whose divergence is within the budget.

    measure: mu -> divergence in nats; budget: nats; divergence: that of mu = 0. The first measurements go up or down in strides until the
    budget lies between two, the others halve that interval of log mu, until a divergence lies between nine tenths of the budget and the
    budget. ValueError when not even the largest mu reaches it.
    """
    tried = [(0.0, divergence)]
    mu = START
    while not (tried[-1][1] <= budget and (tried[-1][0] == 0 or tried[-1][1] >= REACHED * budget)) and len(tried) < MOST:
        tried.append((mu, measure(mu)))
        # `not <=` instead of `>`: a divergence that is not a number counts as too large.
        above = max((one for one, value in tried if one and not value <= budget), default=None)
        below = min((one for one, value in tried if one and value <= budget and (above is None or one > above)), default=None)
        if above == HIGHEST:
            raise ValueError(f"no mu brings the divergence to {budget:g} nats: with mu = {HIGHEST:g} it is still {tried[-1][1]:.3g} "
                             f"(before closing {divergence:.3g}). Only adapters of decoder layers are closed; allow what others do, or "
                             "more, with --export.close_to")
        if below is not None and above is not None:
            mu = math.sqrt(below * above)
        elif below is None:
            mu = min(mu * STRIDE, HIGHEST)
        elif mu > LOWEST:
            mu = max(mu / STRIDE, LOWEST)
        else:
            break
    kept = min(one for one in tried if one[1] <= budget and one[0] >= max((m for m, value in tried if not value <= budget), default=0))
    return [*(one for one in tried if one != kept), kept]


if __name__ == "__main__":  # sanity check: python -m vlakeep.teacher.closing
    torch.manual_seed(0)
    new_TD, old_TD, A = torch.randn(400, 24), torch.randn(400, 24) * torch.logspace(0, -3, 24), torch.randn(4, 24)
    moments = [x.T @ x / len(x) for x in (new_TD, old_TD)]
    for mu in (0.0, 1.0, 100.0, 1e8):
        left = closed(A, moments[0], moments[1], mu)
        print(f"mu {mu:g}: {float((new_TD @ left.T).norm() / (new_TD @ A.T).norm()):.3f} of the update's effect on new inputs is left, "
              f"{float((old_TD @ left.T).norm() / (old_TD @ A.T).norm()):.1e} on old ones")
