"""Thermostat sensor `kl`: KL(teacher || student) at the teacher's own answers, in nats per answer token.

The teacher's answers and their log-probabilities come from the offline stage (teacher/answers.py), so no teacher runs in training. What
the frozen layers below the first adapted one give is computed once; a measurement runs the adapted layers on the prompts with their
answers, and lm_head on the answer columns alone. The items are always the same ones: what moves is the student, not the sample.

Axes: N items, S sequence, D hidden, T answer positions.
"""

from typing import Iterator, List, Optional

import torch
from torch.nn.utils.rnn import pad_sequence

from vlakeep.core.parallel import broadcast_float
from vlakeep.data.sample import IGNORE_INDEX, Batch
from vlakeep.openvla.backbone import Prefix
from vlakeep.teacher.answers import Answered, divergence, logits_at

KEEP = 256 * 2**20  # bytes of cached hidden states that stay on the device; more are sent there at each measurement
MEASURED = 32  # items that run together in a measurement, which keeps nothing for a backward pass


class KLSensor:
    """`measure()` gives the mean divergence over the items."""

    def __init__(self, backbone, answered: Answered, pixels: Iterator[torch.Tensor], batch_size: int = 32,
                 weights_N: Optional[torch.Tensor] = None):
        """pixels: pixel values [B, C, H, W] of the items in order, in batches of `batch_size`. weights_N: of the items, 1 in the mean;
        None weighs all alike. ValueError without items."""
        if not len(answered.start_N):
            raise ValueError("the sensor kl has no items: enlarge the probe (--probe.size) and run `vlakeep offline` again")
        self._backbone = backbone
        self._first = min(backbone.first_adapted_layer(), backbone.num_layers)
        hidden, valid = [], []
        with torch.no_grad():
            for start, pixels_BCHW in zip(range(0, len(answered.start_N), batch_size), pixels):
                part = slice(start, start + batch_size)
                ids_BL, mask_BL = answered.text_NL[part], answered.valid_NL[part]
                batch = Batch(ids_BL, mask_BL, torch.full_like(ids_BL, IGNORE_INDEX), pixels_BCHW, [""] * len(ids_BL), first_label=1)
                prefix = backbone.embed(batch)
                if self._first:
                    prefix = prefix._replace(hidden_BSD=backbone.run_layers(prefix, stop=self._first))
                # Row by row: batches are padded to their own longest prompt, and all rows to one width below.
                hidden += list(prefix.hidden_BSD.cpu())
                valid += list(prefix.attention_mask_BS.cpu())
        self._hidden_NSD, self._valid_NS = pad_sequence(hidden, batch_first=True), pad_sequence(valid, batch_first=True)
        if self._hidden_NSD.nbytes <= KEEP:
            self._hidden_NSD, self._valid_NS = self._hidden_NSD.to(backbone.device), self._valid_NS.to(backbone.device)
        self._measured = max(batch_size, min(len(hidden), MEASURED))
        self._length = answered.text_NL.shape[1]
        device = backbone.device
        self._answered = Answered(*[value.to(device) for value in answered])
        self._weights_N = None if weights_N is None else weights_N.double().to(device)

    @torch.no_grad()
    def per_item(self) -> torch.Tensor:
        """Divergence [N] of every item, on the device."""
        backbone, device, found = self._backbone, self._backbone.device, []
        training = backbone.training
        backbone.eval()  # no dropout in a measurement
        for start in range(0, len(self._hidden_NSD), self._measured):
            part = slice(start, start + self._measured)
            prefix = Prefix(self._hidden_NSD[part].to(device), self._valid_NS[part].to(device))
            hidden_BSD = backbone.run_layers(prefix, start=self._first, stop=backbone.num_layers)
            answered = Answered(*[value[part] for value in self._answered])
            logits_BTV = logits_at(backbone, hidden_BSD, self._length, answered.start_N, answered.top_NTK.shape[1])
            found.append(divergence(answered, logits_BTV))
        backbone.train(training)
        return torch.cat(found)

    def measure(self) -> float:
        """Weighted mean over the items; all ranks return rank 0's value. Synchronises once. Rounding below zero counts as zero."""
        each_N = self.per_item().double()
        value = broadcast_float((each_N if self._weights_N is None else each_N * self._weights_N).mean())
        # Further below zero is no rounding: it is handed on, and the controller rejects it.
        return max(value, 0.0) if value > -1e-5 else value


def batched(samples: List, processor, encode, size: int) -> Iterator[torch.Tensor]:
    """Pixel values of samples in batches, as KLSensor takes them; `encode(samples, processor)` gives a Batch."""
    for start in range(0, len(samples), size):
        yield encode(samples[start:start + size], processor).pixel_values
