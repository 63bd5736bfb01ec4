"""Probe items as model input: prompts with their instruction masks, in the order of the probe."""

from typing import Iterator, List, Tuple

import torch

from vlakeep.data.sample import Batch
from vlakeep.probe.masks import mask_from_prompt


def prompt_batches(probe, items: List[int], processor, batch_size: int) -> Iterator[Tuple[Batch, torch.Tensor]]:
    """Yield (prompt Batch, instruction mask [B, L]) for the numbered items."""
    for start in range(0, len(items), batch_size):
        samples = probe.samples(items[start:start + batch_size])
        batch = processor.encode_prompts(samples)
        yield batch, mask_from_prompt(batch, samples, processor)
