"""Method `consft`: samples that the model is not confident about teach less. Conservative Supervised Fine-Tuning, 2026 (arXiv 2605.08879).

    gradient = sum_b w_b dl_b / B        w_b = p_b ^ sharpness, p_b = exp(-l_b), l_b the mean loss of sample b's labelled tokens

w is a number, not a function that is differentiated, and it is not normalised: while the new task is far, steps are small, and they grow
as confidence does. The paper's models match flows and take their confidence from the error of that match; for tokens it is the geometric
mean probability of the labels. No old data and no teacher. The loss in the log is the unweighted one. Published statements were read in
the paper's abstract only, so the form of w is ours.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from vlakeep.data.sample import IGNORE_INDEX
from vlakeep.methods.measured import Measured
from vlakeep.models.entrance import Request


@dataclass
class Options:
    sharpness: float = 0.5  # 0 is plain LoRA


class _Weighed(torch.autograd.Function):
    """x as it is; the gradient of each row times its weight."""

    @staticmethod
    def forward(ctx, x, weights_B):
        ctx.save_for_backward(weights_B)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0].view(-1, *[1] * (grad.ndim - 1)).to(grad), None


def confidence(logits_BLV: torch.Tensor, labels_BL: torch.Tensor) -> torch.Tensor:
    """Geometric mean probability [B] of each row's labelled tokens; no gradient."""
    with torch.no_grad():
        loss_BL = F.cross_entropy(logits_BLV.float().transpose(1, 2), labels_BL, ignore_index=IGNORE_INDEX, reduction="none")
        return torch.exp(-loss_BL.sum(1) / (labels_BL != IGNORE_INDEX).sum(1).clamp(min=1))


def weigh(logits_BLV: torch.Tensor, labels_BL: torch.Tensor, sharpness: float) -> torch.Tensor:
    """The same logits, whose gradient is weighed by confidence."""
    return _Weighed.apply(logits_BLV, confidence(logits_BLV, labels_BL) ** sharpness)


class ConSFT(Measured):
    label, label_zh, Options = "ConSFT", "ConSFT", Options
    decoder_only = False

    @classmethod
    def limits(cls, options):
        return [("sharpness", options.sharpness, options.sharpness >= 0, "0 or above")]

    def attach(self, backbone) -> None:
        super().attach(backbone)
        self._handles, self._backbone, self._labels_BL = [], backbone, None
        if self._options.sharpness == 0:
            return
        logits = backbone.logits

        def weighed(hidden):
            found = logits(hidden)
            if self._labels_BL is None or not found.requires_grad:  # a measurement, or a generation
                return found
            return weigh(found, self._labels_BL, self._options.sharpness)

        def before(module, args):
            batch = args[0]  # or what else is asked of the model, such as a measurement, which has no labels (models/entrance.py)
            self._labels_BL = None if isinstance(batch, Request) else batch.labels[:, batch.first_label:].to(backbone.device)

        def after(module, args, output):
            self._labels_BL = None

        # On the object, below its class: it goes in `detach`. The hooks say when a batch with labels is under way.
        backbone.logits = weighed
        self._handles = [backbone.register_forward_pre_hook(before), backbone.register_forward_hook(after)]

    def detach(self) -> None:
        super().detach()
        for handle in self._handles:
            handle.remove()
        self._backbone.__dict__.pop("logits", None)
        self._handles = []


METHOD = ConSFT
