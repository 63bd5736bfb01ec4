"""Thermostat sensor `kl`: KL(teacher || student) at the teacher's own answers, in nats per answer token.

The teacher's answers and their log-probabilities come from the offline stage (teacher/answers.py), so no teacher runs in training. What
the frozen layers below the first adapted one give is computed once; a measurement runs the adapted layers on the prompts with their
answers, and lm_head on the answer columns alone. The items are always the same ones: what moves is the student, not the sample.

Axes: N items, S sequence, D hidden, T answer positions.
"""

from typing import Iterator, List, Optional, Tuple

import torch
from torch.nn.utils import parametrize

from vlakeep.core.parallel import broadcast_float
from vlakeep.data.sample import Batch
from vlakeep.models.lean import autocast
from vlakeep.teacher.answers import Answered, divergence, logits_at

KEEP = 256 * 2**20  # bytes of cached hidden states that stay on the device; more are sent there at each measurement
MEASURED = 32  # items that run together in a measurement, which keeps nothing for a backward pass


class KLSensor:
    """`measure()` gives the mean divergence over the items."""

    def __init__(self, backbone, answered: Answered, seen: Iterator[Batch], batch_size: int = 32,
                 weights_N: Optional[torch.Tensor] = None, autocast: str = "none"):
        """seen: the items in order, in batches of `batch_size`, of which all but the text is taken. weights_N: of the items, 1 in the mean;
        None weighs all alike. autocast: that of training, whose types the student is measured in. ValueError without items."""
        if not len(answered.start_N):
            raise ValueError("the sensor kl has no items: enlarge the probe (--probe.size) and run `vlakeep offline` again")
        self._backbone, self._autocast = backbone, autocast
        self._first = min(backbone.first_adapted_layer(), backbone.num_layers)
        prefixes = []
        with torch.no_grad():
            for start, batch in zip(range(0, len(answered.start_N), batch_size), seen):
                part = slice(start, start + batch_size)
                prefix = backbone.embed(batch.with_text(answered.text_NL[part], answered.valid_NL[part]))
                if self._first:
                    prefix = prefix.with_hidden(backbone.run_layers(prefix, stop=self._first))
                prefixes.append(prefix.to("cpu"))
        self._prefix = prefixes[0].join(prefixes[1:])
        self._count = len(self._prefix.hidden_BSD)
        if self._prefix.hidden_BSD.nbytes <= KEEP:
            self._prefix = self._prefix.to(backbone.device)
        self._measured = max(batch_size, min(self._count, MEASURED))
        self._length = answered.text_NL.shape[1]
        device = backbone.device
        self._answered = Answered(*[value.to(device) for value in answered])
        self._weights_N = None if weights_N is None else weights_N.double().to(device)
        # On the CPU, where items are drawn: from the device they would be waited for in every micro-batch.
        self._chances_N = torch.ones(self._count) if weights_N is None else weights_N.float().cpu()

    @torch.no_grad()
    def per_item(self) -> torch.Tensor:
        """Divergence [N] of every item, on the device."""
        backbone, found = self._backbone, []
        training = backbone.training
        backbone.eval()  # no dropout in a measurement
        with parametrize.cached(), autocast(self._autocast, self.device):
            for start in range(0, self._count, self._measured):
                found.append(self.divergence_of(slice(start, start + self._measured)))
        backbone.train(training)
        return torch.cat(found)

    def divergence_of(self, rows) -> torch.Tensor:
        """Divergence of some items, a slice or numbers on the CPU, on the device; differentiable where gradients are taken."""
        backbone = self._backbone
        prefix = self._prefix.rows(rows).to(backbone.device)
        last = prefix.with_hidden(backbone.run_layers(prefix, start=self._first, stop=backbone.num_layers))
        answered = Answered(*[value[rows] for value in self._answered])
        logits_BTV = logits_at(backbone, last, self._length, answered.start_N, answered.top_NTK.shape[1])
        return divergence(answered, logits_BTV)

    def draw(self, count: int, key: Tuple[int, int, int]) -> torch.Tensor:
        """Numbers [B] of up to `count` items, each once, the more probable the larger its weight; a function of `key` alone."""
        seed, step, number = key
        generator = torch.Generator().manual_seed((seed * 1_000_003 + step) * 1_009 + number)
        return torch.multinomial(self._chances_N, min(count, self._count), generator=generator)

    def __len__(self) -> int:
        return self._count

    @property
    def device(self) -> torch.device:
        return self._backbone.device

    def measure(self) -> float:
        """Weighted mean over the items; all ranks return rank 0's value. Synchronises once. Rounding below zero counts as zero."""
        each_N = self.per_item().double()
        return without_rounding(broadcast_float((each_N if self._weights_N is None else each_N * self._weights_N).mean()))


def without_rounding(value: float) -> float:
    """A mean divergence, of which a little below zero is rounding. More is none: it is handed on, and the controller rejects it."""
    return max(value, 0.0) if value > -1e-5 else value


def batched(samples: List, processor, size: int) -> Iterator[Batch]:
    """The prompts of samples in batches, as KLSensor takes them."""
    for start in range(0, len(samples), size):
        yield processor.encode_prompts(samples[start:start + size])
