"""The order of samples: an endless sequence of (episode, frame) in which any position can be computed at once.

Epoch e takes the episodes in an order drawn from (seed, e), lines up their frames, cuts the line into blocks of `block` frames
and shuffles each block with a draw from (seed, e, block number). A block is the shuffle buffer: memory is O(block), every frame
comes exactly once per epoch, and a resumed run starts at a position instead of replaying everything before it. With
block >= frames each epoch is a full shuffle.
"""

from typing import Any, Tuple

import numpy as np


class SampleOrder:
    """lengths: frames of every episode, all data sets one after the other."""

    def __init__(self, lengths, block: int, seed: int):
        self._lengths = np.asarray(lengths, dtype=np.int64)
        if block < 1:
            raise ValueError(f"data.shuffle_buffer {block} must be at least 1")
        self.frames = int(self._lengths.sum())
        self._block, self._seed = min(block, self.frames), seed
        self._epoch: Tuple[int, Any, Any] = (-1, None, None)  # epoch, episodes in order, end position of each
        self._cached: Tuple[Tuple[int, int], Any] = ((-1, -1), None)  # (epoch, block), its (episode, frame) rows

    def _line(self, epoch: int) -> Tuple[np.ndarray, np.ndarray]:
        if self._epoch[0] != epoch:
            episodes = np.random.default_rng([self._seed, epoch]).permutation(len(self._lengths))
            self._epoch = (epoch, episodes, np.cumsum(self._lengths[episodes]))
        return self._epoch[1], self._epoch[2]

    def _shuffled(self, epoch: int, block: int) -> np.ndarray:
        """int64 [block, 2] of (episode, frame)."""
        if self._cached[0] != (epoch, block):
            episodes, ends = self._line(epoch)
            place = np.arange(block * self._block, min((block + 1) * self._block, self.frames))
            place = np.random.default_rng([self._seed, epoch, block + 1]).permutation(place)
            which = np.searchsorted(ends, place, side="right")
            starts = ends[which] - self._lengths[episodes[which]]
            self._cached = ((epoch, block), np.stack([episodes[which], place - starts], axis=1))
        return self._cached[1]

    def keys(self, start: int, count: int) -> np.ndarray:
        """int64 [count, 2]: (episode, frame) at the positions start .. start + count - 1 of the endless sequence."""
        rows = []
        while count > 0:
            epoch, inside = divmod(start, self.frames)
            block, first = divmod(inside, self._block)
            part = self._shuffled(epoch, block)[first:first + count]
            rows.append(part)
            start, count = start + len(part), count - len(part)
        return np.concatenate(rows)
