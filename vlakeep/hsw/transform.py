"""HSW: the gradient transform, pure maths.

    gf = Uf Uf^T g        gp = Up Up^T g        gn = g - gf - gp
    g' = gn + beta * gp + gamma * gf            g' <- g' * min(1, ||g|| / (||g'|| + eps))

With U = [Uf | Up] and w = (gamma - 1, ..., beta - 1, ...) the first two lines are one pair of thin products,
g' = g + ((g U) * w) U^T, which is exactly g when both gains are 1.

Axes: D hidden size, K directions of Uf and Up together, ... any leading axes.
"""

from dataclasses import dataclass
from typing import Tuple

import torch


@dataclass(frozen=True)
class Gains:
    """beta damps plastic directions (never 0), gamma fragile ones; both in [0, 1], 1 changes nothing."""

    beta: float = 1.0
    gamma: float = 1.0

    def __post_init__(self):
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma {self.gamma} must be in [0, 1]")
        if not 0 < self.beta <= 1:
            raise ValueError(f"beta {self.beta} must be in (0, 1]: plastic directions are damped, never closed")

    @property
    def identity(self) -> bool:
        return self.beta == 1.0 and self.gamma == 1.0


def join_bases(fragile_DK: torch.Tensor, plastic_DK: torch.Tensor, tolerance: float = 1e-3) -> Tuple[torch.Tensor, int]:
    """[Uf | Up] and the number of fragile columns; raises ValueError unless all columns are orthonormal.

    Orthonormality is what makes the transform a contraction, so a damaged artefact must not pass.
    """
    basis_DK = torch.cat([fragile_DK, plastic_DK], dim=1).float()
    if not torch.isfinite(basis_DK).all():
        raise ValueError("subspace basis holds NaN or infinity: rebuild the artefact with `vlakeep offline`")
    gram_KK = basis_DK.T @ basis_DK
    # Without columns there is no largest entry to ask for.
    worst = (gram_KK - torch.eye(len(gram_KK), device=gram_KK.device)).abs().max().item() if len(gram_KK) else 0.0
    if worst > tolerance:
        raise ValueError(f"subspace basis is not orthonormal (off by {worst:.1e}): rebuild the artefact with `vlakeep offline`")
    return basis_DK, fragile_DK.shape[1]


def gain_weights(gains: Gains, fragile: int, total: int) -> torch.Tensor:
    """w_K: gamma - 1 for the fragile columns, beta - 1 for the plastic ones."""
    # Gain minus 1: with both gains 1 all weights are 0, and g comes back untouched.
    return torch.tensor([gains.gamma - 1.0] * fragile + [gains.beta - 1.0] * (total - fragile))


def scale_in_subspace(x: torch.Tensor, basis_DK: torch.Tensor, weights_K: torch.Tensor) -> torch.Tensor:
    """x + ((x U) * w) U^T over the last axis; `x` [..., D]."""
    return x + ((x @ basis_DK) * weights_K) @ basis_DK.T


def surgery(grad: torch.Tensor, basis_DK: torch.Tensor, weights_K: torch.Tensor, eps: float) -> torch.Tensor:
    """g' of the module's formula, in the dtype of the basis, returned in the dtype of `grad`; norms are of the whole tensor.

    No host synchronisation. The limiter matters only for rounding: with orthonormal columns and gains in [0, 1] the transform is
    a contraction already.
    """
    # In the type of the basis, which hsw.dtype decides, not in what autocast made of the gradient.
    work = grad.to(basis_DK.dtype)
    edited = scale_in_subspace(work, basis_DK, weights_K)
    exact = torch.promote_types(work.dtype, torch.float32)  # norms of half-precision tensors are summed in float32
    limit = torch.linalg.vector_norm(work, dtype=exact) / (torch.linalg.vector_norm(edited, dtype=exact) + eps)
    return (edited * limit.clamp(max=1.0).to(edited.dtype)).to(grad.dtype)


def split(grad: torch.Tensor, fragile_DK: torch.Tensor, plastic_DK: torch.Tensor):
    """(gf, gp, gn), the literal three parts; used by tests and by nobody in the hot path."""
    gf = (grad @ fragile_DK) @ fragile_DK.T
    gp = (grad @ plastic_DK) @ plastic_DK.T
    return gf, gp, grad - gf - gp


def random_basis(dim: int, columns: int, seed: int) -> torch.Tensor:
    """[D, K] orthonormal columns that know nothing of the model (the random-subspace ablation)."""
    # A generator of its own: the basis does not depend on what was drawn before.
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(dim, columns, generator=generator, dtype=torch.float64))[0].float()


if __name__ == "__main__":  # sanity check: python -m vlakeep.hsw.transform
    U = random_basis(64, 24, seed=0)
    g = torch.randn(4, 10, 64)
    gains = Gains(beta=0.7, gamma=0.2)
    gf, gp, gn = split(g, U[:, :8], U[:, 8:])
    edited = surgery(g, U, gain_weights(gains, 8, 24), 1e-12)
    deviation = (edited - (gn + 0.7 * gp + 0.2 * gf)).abs().max()
    print(f"deviation from gn + beta gp + gamma gf: {deviation:.1e}")
    print(f"||g|| {g.norm():.4f} -> ||g'|| {edited.norm():.4f}")
    assert deviation < 1e-5 and edited.norm() < g.norm()
