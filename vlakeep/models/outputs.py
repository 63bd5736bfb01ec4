"""What comes out of a forward pass: the loss with its companions, and the outputs of decoder layers.

Axes: B batch, L text tokens, S sequence, D hidden, V vocabulary.
"""

from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch.nn import functional as F

from vlakeep.data.sample import IGNORE_INDEX


class LossOutput(NamedTuple):
    """All tensors stay on the device; nothing is read by the host."""

    loss: torch.Tensor  # float32, mean cross entropy over labelled tokens
    num_labelled: torch.Tensor  # how many tokens that are
    correct: torch.Tensor  # how many of them the model would have chosen
    last_hidden_norm: torch.Tensor  # mean norm of the last layer's output before the final norm, over valid positions


def loss_output(logits_BLV: torch.Tensor, labels_BL: torch.Tensor, last_BSD: torch.Tensor, valid_BS: torch.Tensor) -> LossOutput:
    """The LossOutput of logits that stand above their labels, and of the last layer's raw output."""
    loss = F.cross_entropy(logits_BLV.flatten(0, 1), labels_BL.flatten(), ignore_index=IGNORE_INDEX)
    with torch.no_grad():
        labelled_BL = labels_BL != IGNORE_INDEX
        correct = ((logits_BLV.argmax(-1) == labels_BL) & labelled_BL).sum()
        norm_BS = last_BSD.detach().float().norm(dim=-1)
        weight_BS = valid_BS.float()
        mean_norm = (norm_BS * weight_BS).sum() / weight_BS.sum()
    return LossOutput(loss, labelled_BL.sum(), correct, mean_norm)


@contextmanager
def captured_outputs(decoder_layers, numbers):
    """Within the context, a dictionary fills with the raw output [B, S, D] of each numbered decoder layer."""
    outputs, handles = {}, []

    def keep(number):
        def hook(module, args, output):
            outputs[number] = (output[0] if isinstance(output, tuple) else output).detach()
        return hook

    try:
        for number in numbers:
            handles.append(decoder_layers[number].register_forward_hook(keep(number)))
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
