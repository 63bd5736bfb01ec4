"""Norms of gradients before and after surgery, gathered on the device and read once per logged step."""

import math
from typing import Dict, Optional

import torch


class NormMeter:
    """Sums of squares over sites and micro-batches: ||g||^2, ||g'||^2, ||gf||^2, ||gp||^2. Reading is the only synchronisation."""

    def __init__(self):
        self.on = False
        self._sums_4: Optional[torch.Tensor] = None

    def start(self, on: bool) -> None:
        self.on, self._sums_4 = on, None

    def add(self, grad: torch.Tensor, edited: torch.Tensor, basis_DK: torch.Tensor, first: int, complement: bool = False) -> None:
        """The first columns of the basis span Uf or, with `complement`, the directions in neither Uf nor Up; the rest span Up."""
        if not self.on:
            return
        # The columns are orthonormal, so squared coefficients add up to the squared norm of the projection.
        coefficients_K = (grad.to(basis_DK.dtype) @ basis_DK).float().square().flatten(0, -2).sum(0)
        total, fragile, plastic = grad.float().square().sum(), coefficients_K[:first].sum(), coefficients_K[first:].sum()
        if complement:
            # What lies in neither Un nor Up lies in Uf; rounding may take the difference below zero.
            fragile = (total - fragile - plastic).clamp(min=0)
        row_4 = torch.stack([total, edited.float().square().sum(), fragile, plastic])
        self._sums_4 = row_4 if self._sums_4 is None else self._sums_4 + row_4

    def read(self, loss_scale: float = 1.0) -> Dict[str, float]:
        """g_norm, g_prime_norm and the shares of the gradient's energy in Uf and Up; empty when nothing was observed."""
        if self._sums_4 is None:
            return {}
        g, edited, fragile, plastic = self._sums_4.tolist()
        # A gradient of exactly zero has no shares and is no error.
        total = max(g, 1e-30)
        return {
            "g_norm": math.sqrt(g) / loss_scale, "g_prime_norm": math.sqrt(edited) / loss_scale,
            "share_f": fragile / total, "share_p": plastic / total, "shed": 1.0 - edited / total,
        }
