"""The spectrum of a linear's inputs: eigenvectors and eigenvalues of their uncentred second moment C = E[x x^T] over all tokens.

Gains per direction (hsw/graded.py) need every direction whose gain differs from that of its neighbours. For inputs of up to `columns`
values these are all of them; for wider ones the leading `columns`, and the rest, whose eigenvalues are small and alike, share their mean.

Axes: D input size, K stored directions.
"""

from typing import Dict, NamedTuple

import torch

# Subspace iteration: directions beyond those wanted, and passes. With the spectra of transformer inputs (half of the trace in a few
# directions, then a power law) four passes give eigenvalues to about 1e-3 at the cut, where gains change slowly.
OVERSAMPLING, PASSES = 64, 4


def fix_signs(basis_DK: torch.Tensor) -> torch.Tensor:
    """Make the largest entry of each column positive: an SVD leaves the sign open, artefacts must not."""
    largest = basis_DK.abs().argmax(0)
    return basis_DK * torch.sign(basis_DK[largest, torch.arange(basis_DK.shape[1], device=basis_DK.device)])


class Spectrum(NamedTuple):
    """vectors [D, K] float32 orthonormal, values [K] float32 descending, rest: mean eigenvalue of the D - K directions left out."""

    vectors: torch.Tensor
    values: torch.Tensor
    rest: float

    @property
    def mean(self) -> float:
        """Mean eigenvalue of all D directions: the trace over D."""
        dim, count = self.vectors.shape
        return (float(self.values.double().sum()) + self.rest * (dim - count)) / dim


def spectrum(moment_DD: torch.Tensor, columns: int) -> Spectrum:
    """The Spectrum of a second moment, on the CPU. ValueError when the moment is not finite."""
    if not torch.isfinite(moment_DD).all():
        raise ValueError("token statistics hold NaN or infinity: the teacher overflows on the probe; use --backbone.dtype float32")
    dim = len(moment_DD)
    if dim <= columns:
        # float64: directions of least energy, which are those that open, lie below what float32 resolves of the trace.
        values, vectors = torch.linalg.eigh(moment_DD.double())
        # A second moment has no negative eigenvalue, its rounding has.
        values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
        return Spectrum(fix_signs(vectors.float().cpu()).contiguous(), values.float().cpu(), 0.0)
    values, vectors = leading(moment_DD, columns)
    # The trace is the sum of all eigenvalues: those left out need no decomposition to be summed.
    rest = (float(moment_DD.diagonal().double().sum()) - float(values.double().sum())) / (dim - columns)
    return Spectrum(fix_signs(vectors.float().cpu()).contiguous(), values.float().cpu(), max(rest, 0.0))


def leading(moment_DD: torch.Tensor, columns: int, seed: int = 0):
    """(values [K] descending, vectors [D, K]) of the largest eigenvalues by subspace iteration with a Rayleigh-Ritz step."""
    dim = len(moment_DD)
    wide = min(dim, columns + OVERSAMPLING)
    # Drawn on the CPU, so that every device starts from the same numbers.
    start_DK = torch.randn(dim, wide, generator=torch.Generator().manual_seed(seed)).to(moment_DD)
    basis_DK = torch.linalg.qr(moment_DD @ start_DK)[0]
    for _ in range(PASSES):
        basis_DK = torch.linalg.qr(moment_DD @ basis_DK)[0]
    small_KK = (basis_DK.T @ (moment_DD @ basis_DK)).double()
    # Symmetric but for rounding, and eigh reads one triangle only.
    values, rotation = torch.linalg.eigh((small_KK + small_KK.T) / 2)
    order = torch.arange(wide - 1, wide - 1 - columns, -1, device=values.device)
    vectors_DK = basis_DK @ rotation[:, order].to(basis_DK.dtype)
    return values[order].clamp(min=0), torch.linalg.qr(vectors_DK)[0]  # the product of two float32 bases is orthonormal to 1e-5 only


def gains(values: torch.Tensor, lam: float, steepness: float) -> torch.Tensor:
    """g_k = (lam / (sigma_k + lam))^p [K] float64 of eigenvalues [K], in (0, 1]; exactly 1 where sigma / lam is below rounding."""
    return (1.0 + values.double() / lam) ** -steepness


def to_tensors(spectra: Dict[str, Spectrum]) -> Dict[str, torch.Tensor]:
    """Flat names for a safetensors file: <input>.vectors, <input>.values, <input>.rest."""
    flat = {}
    for key, one in spectra.items():
        flat.update({f"{key}.vectors": one.vectors, f"{key}.values": one.values, f"{key}.rest": torch.tensor([one.rest])})
    return flat


def from_tensors(flat: Dict[str, torch.Tensor]) -> Dict[str, Spectrum]:
    keys = sorted({name.rpartition(".")[0] for name in flat if name.endswith(".vectors")})
    return {key: Spectrum(flat[f"{key}.vectors"], flat[f"{key}.values"], float(flat[f"{key}.rest"])) for key in keys}


if __name__ == "__main__":  # sanity check: python -m vlakeep.teacher.spectrum
    torch.manual_seed(0)
    wanted_D = torch.arange(1, 257).double() ** -1.5
    rotation_DD = torch.linalg.qr(torch.randn(256, 256).double())[0]
    moment_DD = ((rotation_DD * wanted_D) @ rotation_DD.T).float()
    part = spectrum(moment_DD, 64)
    worst = float((part.values.double() / wanted_D[:64] - 1).abs().max())
    print(f"64 of 256 directions by subspace iteration: largest relative deviation of an eigenvalue {worst:.1e}")
    assert worst < 1e-2 and abs(part.mean / float(wanted_D.mean()) - 1) < 1e-4
