"""ICSM step 2, decompose: candidate directions.

pooled_instruction: SVD of the centred matrix X [N, D]; candidates Vh.T[:, :r] (O5).
tokens: eigenvectors of an uncentred second moment [D, D]; the largest become Uf, the next Up, and the rest is Un.
"""

from typing import Dict, Tuple

import torch

from vlakeep.teacher.spectrum import fix_signs


def check_rank(rank: int, count: int, dim: int) -> None:
    """Raises ValueError when r > min(N - 1, D): N centred states span no more."""
    limit = min(count - 1, dim)
    if limit < 1:
        raise ValueError(f"{count} usable probe item(s) span no direction; make a larger probe, and look at its masks with "
                         "`vlakeep audit-probe`")
    if rank > limit:
        raise ValueError(f"icsm.rank {rank} is larger than min(N - 1, D) = {limit} ({count} usable probe items, hidden size {dim})"
                         f": lower it with --icsm.rank {limit}, or take a larger probe (--probe.size)")


def pooled_candidates(states_ND: torch.Tensor, rank: int) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(candidates [D, r], singular values [min(N, D)], mean [D]) in float64. Raises ValueError when r > min(N - 1, D)."""
    check_rank(rank, *states_ND.shape)
    x_ND = states_ND.double()
    mean_D = x_ND.mean(0)
    # Of X and not of its covariance, whose small eigenvalues are rounding.
    _, values, vh = torch.linalg.svd(x_ND - mean_D, full_matrices=False)
    return fix_signs(vh[:rank].T.contiguous()), values, mean_D


def token_bases(moment_DD: torch.Tensor, fragile: float, plastic: float) -> Dict[str, torch.Tensor]:
    """Bases of the eigenvectors of a second moment, largest first: Uf, then Up, then Un; shares are of the input dimension D.

    Returns "p" Up [D, Kp], "values" the eigenvalues [D], descending, and "f" Uf [D, Kf] or, where that has fewer columns, "n" Un
    [D, D - Kf - Kp]. Float64, on the device of the moment: the directions of least energy lie below the resolution of float32.
    """
    if not torch.isfinite(moment_DD).all():
        raise ValueError("token statistics hold NaN or infinity: the teacher overflows on the probe; use --backbone.dtype float32")
    dim = len(moment_DD)
    values, vectors = torch.linalg.eigh(moment_DD.double())
    values, vectors = values.flip(0).cpu(), vectors.flip(1).float().cpu()
    n_f, n_p = max(1, round(dim * fragile)), round(dim * plastic)
    found = {"p": vectors[:, n_f:n_f + n_p], "values": values.float()}
    # Uf, Up and Un span the space, so either of Uf and Un says the other: the one with fewer columns is kept.
    if n_f <= dim - n_f - n_p:
        found["f"] = vectors[:, :n_f]
    else:
        found["n"] = vectors[:, n_f + n_p:]
    return {name: t if name == "values" else fix_signs(t).contiguous() for name, t in found.items()}


if __name__ == "__main__":  # sanity check: python -m vlakeep.teacher.decompose
    torch.manual_seed(0)
    planted_DK = torch.linalg.qr(torch.randn(64, 4))[0]
    states_ND = 3.0 + torch.randn(200, 4) * torch.tensor([8.0, 6.0, 4.0, 2.0]) @ planted_DK.T + 0.01 * torch.randn(200, 64)
    basis_DK, singular, _ = pooled_candidates(states_ND, 4)
    cosine, energy = torch.linalg.svdvals(basis_DK.T @ planted_DK.double()).min(), singular[:4].square().sum() / singular.square().sum()
    print(f"planted directions found, smallest cosine: {cosine:.6f}")
    print(f"energy in 4 of {len(singular)} directions: {energy:.4%}")
    assert cosine > 0.9999 and energy > 0.999
