"""Second moments of a linear's inputs, summed over batches as they come: C = sum w x x^T / sum w, uncentred, in float32.

Axes: B batch, S sequence, T tokens, D input size.
"""

from typing import Dict, Iterator, Mapping, Optional, Tuple

import torch


class Moments:
    """Sums by input; `add` keeps nothing of x. Costs O(T D^2) a batch and D^2 float32 an input, on the device of x."""

    def __init__(self):
        self._sums: Dict[str, torch.Tensor] = {}

    def add(self, key: str, x: torch.Tensor, keep: Optional[torch.Tensor] = None, root: Optional[torch.Tensor] = None) -> None:
        """x [..., D]; keep: bool [...] of the tokens that count, None for all; root: [...] the root of each token's weight, because the
        weight belongs to x x^T."""
        x_TD = (x if keep is None else x[keep]).reshape(-1, x.shape[-1]).float()
        if root is not None:
            x_TD = x_TD * (root if keep is None else root[keep]).reshape(-1)[:, None]
        with torch.autocast(x.device.type, enabled=False):  # a forward pass that brings autocast would sum in half precision
            if key in self._sums:
                self._sums[key].addmm_(x_TD.T, x_TD)
            else:
                self._sums[key] = x_TD.T @ x_TD

    def divided(self, weight: float) -> Dict[str, torch.Tensor]:
        """C [D, D] of every input, with this sum of weights."""
        return {key: sum_DD.div_(max(weight, 1e-12)) for key, sum_DD in self._sums.items()}

    def each(self, weights: Mapping[str, float]) -> Iterator[Tuple[str, torch.Tensor]]:
        """(input, C [D, D]) one by one, with an input's own sum of weights; its memory is given back after its turn."""
        for key in list(self._sums):
            yield key, self._sums.pop(key).div_(max(weights[key], 1e-12))
