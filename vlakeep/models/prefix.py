"""The input of a decoder layer, whatever a model keeps with it.

Axes: B batch, S sequence, D hidden.
"""

from dataclasses import dataclass, fields, replace
from typing import Callable, Sequence

import torch
from torch.nn.utils.rnn import pad_sequence


@dataclass(frozen=True, eq=False)
class Prefix:
    """Input of a decoder layer, made by the model's `embed`: hidden states, which positions are not padding, and what else its layers need.

    A model adds fields in a subclass (positions, which columns see one another). All are tensors with rows on their first axis and, where
    there are two or more, the sequence on the second. Others hold, cut, move and join prefixes without knowing what is in them.
    """

    hidden_BSD: torch.Tensor
    attention_mask_BS: torch.Tensor  # bool

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Prefix":
        return replace(self, **{f.name: change(getattr(self, f.name)) for f in fields(self)})

    def to(self, device) -> "Prefix":
        return self.map(lambda tensor: tensor.to(device))

    def rows(self, which) -> "Prefix":
        """The rows of a slice or an index tensor."""
        return self.map(lambda tensor: tensor[which])

    def trimmed(self) -> "Prefix":
        """Without the columns at the end that are padding in every row."""
        width = int(self.attention_mask_BS.any(0).nonzero().max()) + 1
        return self.map(lambda tensor: tensor[:, :width] if tensor.ndim > 1 else tensor)

    def with_hidden(self, hidden_BSD: torch.Tensor) -> "Prefix":
        """The same positions with other hidden states, such as the output of a layer."""
        return replace(self, hidden_BSD=hidden_BSD)

    def join(self, others: Sequence["Prefix"]) -> "Prefix":
        """The rows of this one and of others, shorter ones padded on the right with zeros."""
        joined = {}
        for f in fields(self):
            rows = [row for part in (self, *others) for row in getattr(part, f.name)]
            joined[f.name] = pad_sequence(rows, batch_first=True) if rows[0].ndim else torch.stack(rows)
        return replace(self, **joined)
