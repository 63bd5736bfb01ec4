"""The types that data, backbones, probes and benchmarks share: a sample, an episode, a batch, and a row of a golden check.

Axes: B batch, L text tokens, V vision backbones (3V channels), H W pixels, A action dimensions, T frames of an episode.
"""

from dataclasses import dataclass, fields
from typing import List, Optional

import numpy as np
import torch

IGNORE_INDEX = -100  # label of a position without loss, as in torch and the official collator


@dataclass(frozen=True)
class Sample:
    """One image and what is said about it.

    question False: the text is "What action should the robot take to {instruction}?" and the target is `action`.
    question True: `instruction` is the question itself and the target is the text `answer`.
    """

    image: np.ndarray  # uint8 [H, W, 3]
    instruction: str
    action: Optional[np.ndarray] = None  # float32 [A], normalised to [-1, 1]; the gripper is 1 = open, 0 = close
    answer: Optional[str] = None
    question: bool = False
    dataset: str = ""


@dataclass(frozen=True)
class Episode:
    """One demonstration as the RLDS writer takes it: actions as the data set stores them, not normalised."""

    images: np.ndarray  # uint8 [T, H, W, 3]
    actions: np.ndarray  # float32 [T, A]
    language: str
    state: Optional[np.ndarray] = None  # float32 [T, S]; None writes zeros of LIBERO's width 8
    file_path: str = ""


@dataclass
class Batch:
    """Right-padded model input of B samples."""

    input_ids: torch.Tensor  # int64 [B, L]
    attention_mask: torch.Tensor  # bool [B, L]
    labels: torch.Tensor  # int64 [B, L], IGNORE_INDEX where no loss is taken
    pixel_values: torch.Tensor  # float32 [B, 3V, H, W]
    dataset_names: List[str]
    # First column with a label in any row, at least 1. Found here, on the host, so that the loss needs no synchronisation.
    first_label: int = 0

    def __post_init__(self):
        if self.first_label < 1:
            labelled_L = (self.labels != IGNORE_INDEX).any(0)
            self.first_label = max(1, int(labelled_L.int().argmax())) if len(labelled_L) and bool(labelled_L.any()) else 1

    @property
    def size(self) -> int:
        return self.input_ids.shape[0]

    def _map(self, function) -> "Batch":
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return Batch(**{k: function(v) if torch.is_tensor(v) else v for k, v in values.items()})

    def to(self, device, non_blocking: bool = False) -> "Batch":
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        return self._map(lambda tensor: tensor.pin_memory())


@dataclass(frozen=True)
class Row:
    """One line of a golden check: how far a number is from the official one, and how far it may be."""

    name: str
    deviation: float
    tolerance: float
    note: str = ""

    @property
    def ok(self) -> bool:
        return bool(self.deviation <= self.tolerance)  # a NaN deviation fails
