"""How far a model has gone from what it said before training, in nats, on items that were held out of the bases.

    logits    KL(teacher || student) of the next token at every answer position, over the most probable tokens and the rest as one
    values    (student - teacher)^2 / (2 sigma^2) per number: KL of two normal distributions of this width, for heads without tokens

Axes: B batch, L tokens, T answer positions, V vocabulary.
"""

from collections.abc import Mapping
from typing import Any, Callable, Iterable, List, Optional

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from vlakeep.protection.bases import run
from vlakeep.protection.layers import adapters_off, measuring
from vlakeep.teacher.answers import TOP, Answered, divergence, split_log_probabilities
from vlakeep.thermostat.kl_sensor import without_rounding


def answer_tokens(batch) -> Optional[torch.Tensor]:
    """The tokens of a batch that are answers: those with a label, else all that are no padding."""
    if not isinstance(batch, Mapping):
        return None
    labels = batch.get("labels")
    if isinstance(labels, torch.Tensor) and labels.dim() == 2:
        return labels != -100
    return batch.get("attention_mask")


class Probe:
    """Held-out batches. `prepare` asks the teacher once, `measure` the student.

    - `forward(model, batch)` returns logits [B, L, V] or [B, V], or an output with `.logits`; with `sigma`, any tensor [B, ...].
    - `answers(batch)`: bool [B, L] of the tokens that count, each predicted one position earlier. Logits of more positions than that, as
      of models that put pictures before the text, are counted from the end.
    - `sigma`: the width in which values are measured, such as the noise of a demonstrated action; None for logits.

    Keeps 12 x 32 bytes an answer position, or the teacher's values; `measure` costs a forward pass of all batches without gradients.
    """

    def __init__(self, batches: Iterable, forward: Callable[[nn.Module, Any], Any] = run, *,
                 answers: Callable[[Any], Optional[torch.Tensor]] = answer_tokens, sigma: Optional[float] = None):
        """ValueError without batches, or for a sigma that is not above 0."""
        self._batches, self._forward, self._answers, self._sigma = list(batches), forward, answers, sigma
        if not self._batches:
            raise ValueError("the probe has no batches: hold back some items of everything that shall be kept, a hundred or more in all")
        if sigma is not None and not sigma > 0:
            raise ValueError(f"sigma must be above 0, got {sigma}")
        self._teacher: List[Any] = []

    def prepare(self, model: nn.Module) -> None:
        """Ask the frozen model; its answers stay with the probe. ValueError when an output has not the form that is described above."""
        with measuring(model), adapters_off(model):
            self._teacher = [self._ask(model, batch) for batch in self._batches]

    def _ask(self, model: nn.Module, batch) -> Any:
        out = self._output(model, batch)
        if self._sigma is not None:
            return out.cpu()
        logits_BTV, count_B = self._at_answers(out, batch)
        top_BTK = logits_BTV.topk(min(TOP, logits_BTV.shape[-1] - 1), dim=-1).indices
        kept_BTK, rest_BT = split_log_probabilities(logits_BTV, top_BTK)
        return [one.cpu() for one in (count_B, top_BTK, kept_BTK, rest_BT)]

    def _output(self, model: nn.Module, batch) -> torch.Tensor:
        out = self._forward(model, batch)
        out = getattr(out, "logits", out["logits"] if isinstance(out, Mapping) and "logits" in out else out)
        if not isinstance(out, torch.Tensor):
            raise ValueError(f"the probe's forward returned {type(out).__name__}: it must return logits, or with sigma= a tensor of values")
        return out.float()

    def _at_answers(self, logits: torch.Tensor, batch):
        """(logits [B, T, V] at the answer positions, moved to the front, their numbers [B])."""
        if logits.dim() == 2:
            return logits[:, None], torch.ones(len(logits), dtype=torch.long, device=logits.device)
        answers_BL = self._answers(batch)
        if answers_BL is None:
            answers_BL = torch.ones(logits.shape[:2], dtype=torch.bool)
        length = answers_BL.shape[1]
        if logits.dim() != 3 or logits.shape[1] < length or len(logits) != len(answers_BL):
            raise ValueError(f"the probe's logits have the shape {list(logits.shape)}, and its answers {list(answers_BL.shape)}: one row "
                             "an item, and at least one position for each token")
        keep_BL = answers_BL.to(logits.device).bool()[:, 1:]  # nothing predicts the first
        if not bool(keep_BL.any(1).all()):
            raise ValueError("an item of the probe has no answer token behind its first one: give answers=, or leave the item out")
        logits = logits[:, logits.shape[1] - length:-1]
        rows = [row[keep] for row, keep in zip(logits, keep_BL)]
        return pad_sequence(rows, batch_first=True), keep_BL.sum(1)

    def per_item(self, model: nn.Module) -> torch.Tensor:
        """Divergence of every item [N], float64, on the model's device."""
        if not self._teacher:
            raise ValueError("the probe has not asked the teacher yet: call prepare(model) before training")
        found = []
        with measuring(model):
            for batch, told in zip(self._batches, self._teacher):
                out = self._output(model, batch)
                if self._sigma is not None:
                    found.append((out - told.to(out.device)).square().flatten(1).mean(1).double() / (2 * self._sigma ** 2))
                    continue
                logits_BTV, _ = self._at_answers(out, batch)
                count_B, *kept = [one.to(out.device) for one in told]
                found.append(divergence(Answered(None, None, None, count_B, *kept), logits_BTV).double())
        return torch.cat(found)

    def measure(self, model: nn.Module) -> float:
        """Mean over the items; all processes get that of the first one. Waits for the device once."""
        return without_rounding(of_first_process(self.per_item(model).mean()))


def of_first_process(value: torch.Tensor) -> float:
    """Process 0's number in every process, where torch.distributed is in use. value: float64 scalar on the model's device."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        holder = value.detach().clone().reshape(1)
        dist.broadcast(holder, src=0)
        return float(holder.item())
    return float(value)
