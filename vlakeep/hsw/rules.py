"""Published ways of choosing gains per direction and the start of LoRA, as functions of a spectrum, a moment or a gradient.

Gains act on the inputs of a linear, A_eff = A V diag(g) V^T with C = E[x x^T] = V diag(sigma) V^T on old inputs:

    GPM            g = 0 on the fewest leading directions that hold the share `energy` of the trace, 1 elsewhere
    SGP            g = 1 - (a + 1) s / (a s + s_max) on them, s = sqrt(sigma), 1 elsewhere
    Adam-NSCL      g = 1 / sqrt(n) on the n directions with sigma <= a sigma_min, 0 elsewhere
    OWM            g = alpha / (sigma + alpha), alpha in the units of sigma

Starts give (A, B) with scale B A = what the method takes out of W before it trains; B is None where it starts at zero:

    InfLoRA        A: leading eigenvectors of (I - P) C_new (I - P), P the protected directions, divided by sqrt(3)
    KeepLoRA       A: leading right singular vectors of G (I - P), G the new task's gradient, P old inputs and leading ones of W
    LoRA-Null      B A = W U U^T, U the eigenvectors of least old energy, halved by an SVD
    SC-LoRA        B = Q, A = Q^T W, Q the leading eigenvectors of (1 - beta) W C_new W^T - beta W C_old W^T
    CorDA          B A = the last components of the SVD of W C, with C^-1 undone (PEFT's code)
    EVA            A: leading principal components of the new inputs (PEFT's code)

References stand in the files of vlakeep/methods/ that use them. Axes: R rank, D input size, O output size, K directions.
"""

import math
from importlib import import_module
from types import SimpleNamespace
from typing import NamedTuple, Optional, Tuple

import torch


class Start(NamedTuple):
    """A [R, D], and B [O, R] or None for zero."""

    A: torch.Tensor
    B: Optional[torch.Tensor] = None


def leading_count(values_K: torch.Tensor, trace: float, energy: float) -> int:
    """The fewest leading directions that hold the share `energy` of the trace; all that are given where these hold less."""
    # Rounding must not ask for one direction more where the share is reached exactly.
    reached_K = values_K.double().cumsum(0) >= energy * trace * (1 - 1e-9)
    return int(reached_K.float().argmax()) + 1 if bool(reached_K.any()) else len(values_K)


def gpm(values_K: torch.Tensor, trace: float, energy: float) -> torch.Tensor:
    g_K = torch.ones(len(values_K), dtype=torch.float64)
    g_K[:leading_count(values_K, trace, energy)] = 0.0
    return g_K


def sgp(values_K: torch.Tensor, trace: float, energy: float, a: float) -> torch.Tensor:
    count, s_K = leading_count(values_K, trace, energy), values_K.double().sqrt()
    g_K = torch.ones(len(values_K), dtype=torch.float64)
    g_K[:count] = 1.0 - (a + 1) * s_K[:count] / (a * s_K[:count] + s_K[0])
    return g_K


def adam_nscl(values_K: torch.Tensor, a: float) -> Tuple[torch.Tensor, float]:
    """(g [K] with the norm of the projector divided out, share of the trace that stays open)."""
    values_K = values_K.double()
    # Below rounding there is no smallest one to be a multiple of.
    open_K = values_K <= a * max(float(values_K.min()), 1e-7 * float(values_K.max()))
    return open_K.double() / math.sqrt(int(open_K.sum())), float(values_K[open_K].sum() / values_K.sum())


def owm(values_K: torch.Tensor, alpha: float) -> torch.Tensor:
    return alpha / (values_K.double() + alpha)


def without(x_RD: torch.Tensor, basis_DK: torch.Tensor) -> torch.Tensor:
    """x (I - V V^T) for orthonormal V."""
    return x_RD - (x_RD @ basis_DK) @ basis_DK.T


def leading_eigenvectors(moment_DD: torch.Tensor, count: int) -> torch.Tensor:
    """[D, count] of the largest eigenvalues, the largest first."""
    return torch.linalg.eigh((moment_DD + moment_DD.T) / 2)[1].flip(1)[:, :count]


def halved(left_OR: torch.Tensor, values_R: torch.Tensor, right_RD: torch.Tensor, scale: float) -> Start:
    """(sqrt(S) V^T, U sqrt(S)) of a product U S V^T = scale B A."""
    root_R = (values_R / scale).sqrt()
    return Start(root_R[:, None] * right_RD, left_OR * root_R)


def inflora(C_new_DD: torch.Tensor, protected_DK: torch.Tensor, rank: int) -> Start:
    C_new_DD, protected_DK = C_new_DD.double(), protected_DK.double()
    free_DD = without(without(C_new_DD, protected_DK).T, protected_DK)
    # Once more: where fewer directions are free than the rank has, the last eigenvectors are any.
    return Start((without(leading_eigenvectors(free_DD, rank).T, protected_DK) / math.sqrt(3)).float())


def keeplora(G_OD: torch.Tensor, W_OD: torch.Tensor, old_DK: torch.Tensor, weight_energy: float, rank: int) -> Start:
    values, right_KD = torch.linalg.svd(W_OD.double(), full_matrices=False)[1:]
    count = leading_count(values.square(), float(values.square().sum()), weight_energy)
    both_DK = torch.cat([old_DK.double(), right_KD[:count].T], 1)
    # The two overlap: an orthonormal basis of what they span together, by the singular vectors above rounding.
    left_DK, strength = torch.linalg.svd(both_DK, full_matrices=False)[:2]
    closed_DK = left_DK[:, strength > 1e-6 * strength[0]]
    free_OD = without(G_OD.double(), closed_DK)
    return Start(without(torch.linalg.svd(free_OD, full_matrices=False)[2][:rank], closed_DK).float())  # twice, as above


def lora_null(W_OD: torch.Tensor, null_DR: torch.Tensor, scale: float) -> Start:
    U, S, Vh = torch.linalg.svd(W_OD.double() @ null_DR.double() @ null_DR.double().T, full_matrices=False)
    rank = null_DR.shape[1]
    return Start(*[one.float() for one in halved(U[:, :rank], S[:rank], Vh[:rank], scale)])


def sc_lora(W_OD: torch.Tensor, C_new_DD: torch.Tensor, C_old_DD: torch.Tensor, beta: float, rank: int, scale: float) -> Start:
    W_OD = W_OD.double()
    contrast_OO = W_OD @ ((1 - beta) * C_new_DD.double() - beta * C_old_DD.double()) @ W_OD.T
    Q_OR = leading_eigenvectors(contrast_OO, rank)
    return Start((Q_OR.T @ W_OD / scale).float(), Q_OR.float())


def corda(W_OD: torch.Tensor, C_old_DD: torch.Tensor, rank: int, scale: float) -> Start:
    """PEFT's decomposition, of which the knowledge-preserving mode takes the last components. Needs peft 0.15."""
    linear = torch.nn.Linear(W_OD.shape[1], W_OD.shape[0], bias=False, device=W_OD.device)
    linear.weight.data = W_OD.float()
    linear.covariance_matrix = C_old_DD.float()  # where PEFT's code looks for it
    found = import_module("peft.tuners.lora.corda").collect_eigens_for_layer(linear, SimpleNamespace())
    U_OR, V_DR, S_R = (one.to(W_OD.device) for one in (found.U_WC[:, -rank:], found.V_WC[:, -rank:], found.S_WC[-rank:]))
    return halved(U_OR, S_R, V_DR.T, scale)


class Components:
    """Leading principal components of inputs that come in batches, as PEFT finds them for EVA. Needs peft 0.14."""

    def __init__(self, rank: int):
        self._pca, self._rank = import_module("peft.utils.incremental_pca").IncrementalPCA(n_components=rank), rank

    def add(self, x_TD: torch.Tensor) -> None:
        # The library refuses fewer rows than components.
        if len(x_TD) >= self._rank:
            self._pca.partial_fit(x_TD.float())

    def start(self) -> Start:
        return Start(self._pca.components_.float())


if __name__ == "__main__":  # sanity check: python -m vlakeep.hsw.rules
    sigma_K = torch.arange(1, 65).double() ** -2.0
    for name, g_K in (("gpm", gpm(sigma_K, float(sigma_K.sum()), 0.97)), ("sgp", sgp(sigma_K, float(sigma_K.sum()), 0.97, 10.0)),
                      ("owm", owm(sigma_K, 1e-3)), ("adam_nscl", adam_nscl(sigma_K, 10.0)[0] * 8)):
        passed = float((g_K.square() * sigma_K).sum() / sigma_K.sum())
        print(f"{name:10s} sum of squared gains {float(g_K.square().sum()):5.1f} of 64, old energy that passes {passed:.1e}")
        assert passed < 0.05
