"""Actions as token ids, bit for bit as openvla prismatic/vla/action_tokenizer.py.

An action in [-1, 1] falls into one of 256 bins; bin b is the token vocab_size - b, so the last 256 ids of the vocabulary (without
added tokens) are actions. The official quirks are kept: float32 actions meet float64 bin edges, there are 255 bin centres for
256 ids (the two lowest ids both decode to the last centre), and ids outside the range decode to an end.
"""

import numpy as np


class ActionTokenizer:
    """vocab_size: size of the vocabulary without added tokens (32000 for Llama-2)."""

    def __init__(self, vocab_size: int, bins: int = 256):
        if vocab_size <= bins:
            raise ValueError(f"a vocabulary of {vocab_size} tokens has no room for {bins} action tokens")
        self.vocab_size = vocab_size
        self.bins = np.linspace(-1, 1, bins)
        self.bin_centers = (self.bins[:-1] + self.bins[1:]) / 2.0

    @property
    def action_token_begin_idx(self) -> int:
        """Ids above this one are actions (31743 for Llama-2)."""
        return self.vocab_size - (len(self.bins) + 1)

    def encode(self, action) -> np.ndarray:
        """[..., A] values in [-1, 1] (clipped) -> int64 ids of the same shape. NaN lands in the last bin, as officially."""
        return self.vocab_size - np.digitize(np.clip(action, -1.0, 1.0), self.bins)

    def decode(self, ids) -> np.ndarray:
        """[..., A] ids -> float64 bin centres; ids that are no action tokens give an end of the range."""
        return self.bin_centers[self.bin_of(ids)]

    def bin_of(self, ids) -> np.ndarray:
        """[..., A] ids -> numbers of their bins; other ids than actions fall into the first or the last."""
        return np.clip(self.vocab_size - np.asarray(ids) - 1, 0, len(self.bin_centers) - 1)
