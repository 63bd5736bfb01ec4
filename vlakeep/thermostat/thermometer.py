"""Thermostat sensor: the student's pooled instruction states on a probe batch, and their drift from the teacher's.

The frozen part below the first adapted layer never changes, so its output is computed once for the whole probe; a measurement
costs only the layers from there up to the highest representative layer, without gradient.
"""

from typing import Dict, List

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from vlakeep.core.parallel import broadcast_float
from vlakeep.models.lean import autocast
from vlakeep.models.outputs import captured_outputs
from vlakeep.probe.pooling import masked_mean
from vlakeep.thermostat.drift import covariance_drift, paired_drift


class Thermometer:
    """`measure(k)` gives the drift of measurement number k; the probe items it draws depend on seed and k alone."""

    def __init__(self, backbone, batches, items: List[int], layers: List[int], first_adapted: int, estimator: str, draw: int, seed: int,
                 mean: Dict[int, torch.Tensor], covariance: Dict[int, torch.Tensor], teacher: Dict[int, torch.Tensor],
                 autocast: str = "none"):
        """`batches` yields (prompt Batch, instruction mask) of `items` in order; `teacher[l]` [N, D] is row-aligned with them. autocast:
        that of training, whose types the student is measured in.

        Raises ValueError when the probe has fewer items than `draw`.
        """
        if draw > len(items):
            raise ValueError(f"thermostat.batch_size {draw} is larger than the {len(items)} usable probe items: lower it with "
                             f"--thermostat.batch_size {len(items)}, or make a larger probe and run `vlakeep offline` again")
        self._backbone, self._layers, self._estimator, self._draw, self._seed = backbone, layers, estimator, draw, seed
        self._autocast = autocast
        self._first = min(first_adapted, min(layers))
        device = backbone.device
        self._mean = {layer: mean[layer].to(device) for layer in layers}
        self._covariance = {layer: covariance[layer].to(device) for layer in layers}
        self._teacher = {layer: teacher[layer].to(device) for layer in layers}
        prefixes, masks = [], []
        with torch.no_grad():
            for batch, mask_BL in tqdm(batches, desc="probe prefix", leave=False):
                prefix = backbone.embed(batch)
                if self._first > 0:
                    prefix = prefix.with_hidden(backbone.run_layers(prefix, stop=self._first))
                masks += list(backbone.sequence_mask(prefix, mask_BL).cpu())
                prefixes.append(prefix.to("cpu"))
        self._prefix = prefixes[0].join(prefixes[1:])
        self._mask_NS = pad_sequence(masks, batch_first=True)

    @torch.no_grad()
    def measure(self, number: int) -> float:
        """Drift of the student now; all ranks return rank 0's value. Synchronises once."""
        # From seed and number alone: a resumed run draws what the uninterrupted one would have drawn.
        rng = np.random.default_rng([self._seed, number])
        rows = torch.from_numpy(np.sort(rng.choice(len(self._mask_NS), self._draw, replace=False)))
        device = self._backbone.device
        prefix = self._prefix.rows(rows).trimmed().to(device)
        mask_NS = self._mask_NS[rows, :prefix.hidden_BSD.shape[1]].to(device)
        training = self._backbone.training
        self._backbone.eval()  # no dropout in a measurement
        with captured_outputs(self._backbone.decoder_layers, self._layers) as outputs, autocast(self._autocast, device):
            self._backbone.run_layers(prefix, start=self._first, stop=max(self._layers) + 1)
        self._backbone.train(training)
        student = {layer: masked_mean(outputs[layer].float(), mask_NS)[0] for layer in self._layers}
        if self._estimator == "covariance":
            drift = covariance_drift(student, self._covariance)
        else:
            drift = paired_drift(student, {layer: self._teacher[layer][rows.to(device)] for layer in self._layers}, self._mean)
        return broadcast_float(drift)
