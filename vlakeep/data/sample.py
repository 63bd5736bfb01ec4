"""The types that data, backbones, probes and benchmarks share: a sample, an episode, a batch, and a row of a golden check.

Axes: B batch, L text tokens, V vision backbones (3V channels), H W pixels, A action dimensions, T frames of an episode or steps of a
chunk of actions, Q numbers of a robot's state.
"""

from dataclasses import dataclass, field, fields, replace
from typing import Callable, Dict, List, Optional, Tuple

import numpy as np
import torch

IGNORE_INDEX = -100  # label of a position without loss, as in torch and the official collator


@dataclass(frozen=True)
class Sample:
    """What is seen at one moment, and what is said about it. What of it a model takes, its SampleSpec says.

    question False: the text is "What action should the robot take to {instruction}?" and the target is `action`.
    question True: `instruction` is the question itself and the target is the text `answer`.
    """

    image: Optional[np.ndarray]  # uint8 [H, W, 3], of the one camera; None where all pictures have names
    instruction: str
    action: Optional[np.ndarray] = None  # float32 [A] or a chunk [T, A], normalised to [-1, 1]; the gripper is 1 = open, 0 = close
    answer: Optional[str] = None
    question: bool = False
    dataset: str = ""
    cameras: Dict[str, np.ndarray] = field(default_factory=dict)  # uint8 [H, W, 3] by name
    # float32 [Q]; q01 to q99 of the data are -1 to 1, and what lies outside of them lies outside of these
    state: Optional[np.ndarray] = None

    def with_pictures(self, change: Callable[[np.ndarray], np.ndarray]) -> "Sample":
        """The sample with each of its pictures changed."""
        image = None if self.image is None else change(self.image)
        return replace(self, image=image, cameras={name: change(picture) for name, picture in self.cameras.items()})


@dataclass(frozen=True)
class SampleSpec:
    """What a model takes of a sample."""

    # By name, in the model's order; () is the sample's `image`. To a model of one camera the only picture goes, whatever it is called.
    cameras: Tuple[str, ...] = ()
    state: int = 0  # numbers of the robot's state; 0 takes none
    chunk: int = 1  # actions of one answer

    def pictures(self, sample: Sample) -> List[np.ndarray]:
        """The pictures of the model's cameras, in its order."""
        only = self.only(sample)
        return [sample.cameras[name] for name in self.cameras] if only is None else [only]

    def only(self, sample: Sample) -> Optional[np.ndarray]:
        """The picture for a model of one camera that has no name for it, or a name of its own; None where pictures go by their names."""
        if len(self.cameras) > 1 or any(name in sample.cameras for name in self.cameras):
            return None
        return sample.image if sample.image is not None or len(sample.cameras) != 1 else next(iter(sample.cameras.values()))

    def check(self, samples: List[Sample], model: str) -> None:
        """ValueError naming the sample, the model and what the one lacks that the other needs."""
        for sample in samples:
            only = self.only(sample)
            lacking = [f"a picture of the camera {name!r}" for name in self.cameras if name not in sample.cameras] if only is None else []
            if not self.cameras and only is None:
                lacking.append("an image")
            if self.state and (sample.state is None or np.shape(sample.state) != (self.state,)):
                lacking.append(f"a state of {self.state} numbers")
            if sample.action is not None and np.ndim(sample.action) != (1 if self.chunk == 1 else 2):
                lacking.append("an action [A]" if self.chunk == 1 else f"a chunk of {self.chunk} actions")
            elif sample.action is not None and self.chunk > 1 and len(sample.action) != self.chunk:
                lacking.append(f"a chunk of {self.chunk} actions")
            if lacking:
                has = [*(["an image"] if sample.image is not None else []), *(f"the camera {name!r}" for name in sample.cameras)]
                has += [f"{what} {list(np.shape(one))}" for what, one in (("a state", sample.state), ("an action", sample.action))
                        if one is not None]
                raise ValueError(f"{sample.instruction!r} of data set {sample.dataset!r} lacks {' and '.join(lacking)}, which the model "
                                 f"{model} takes; it has {', '.join(has) or 'nothing'}: choose other data with --data.datasets, or another "
                                 "model with --backbone.checkpoint")

    def blank(self, value: int, size: Tuple[int, int], instruction: str) -> Sample:
        """A sample that is whole for the model, with every byte of its pictures this value and a state of zeros. size: (H, W)."""
        picture = np.full((*size, 3), value, dtype=np.uint8)
        return Sample(None if self.cameras else picture, instruction, cameras={name: picture for name in self.cameras},
                      state=np.zeros(self.state, dtype=np.float32) if self.state else None)


ONE_PICTURE = SampleSpec()  # one camera, one action, no state: what OpenVLA takes


@dataclass(frozen=True)
class Episode:
    """One demonstration as the RLDS writer takes it: actions as the data set stores them, not normalised."""

    images: np.ndarray  # uint8 [T, H, W, 3]
    actions: np.ndarray  # float32 [T, A]
    language: str
    state: Optional[np.ndarray] = None  # float32 [T, S]; None writes zeros of LIBERO's width 8
    file_path: str = ""
    wrist: Optional[np.ndarray] = None  # uint8 [T, h, w, 3]: a second camera, on the hand; None writes none


@dataclass
class Batch:
    """Right-padded model input of B samples."""

    input_ids: torch.Tensor  # int64 [B, L]
    attention_mask: torch.Tensor  # bool [B, L]
    labels: torch.Tensor  # int64 [B, L], IGNORE_INDEX where no loss is taken
    pixel_values: torch.Tensor  # float32 [B, 3V, H, W], or as the model's processor makes them
    dataset_names: List[str]
    # First column with a label in any row, at least 1. Found here, on the host, so that the loss needs no synchronisation.
    first_label: int = 0
    state: Optional[torch.Tensor] = None  # float32 [B, Q], for models that take one

    def __post_init__(self):
        if self.first_label < 1:
            labelled_L = (self.labels != IGNORE_INDEX).any(0)
            self.first_label = max(1, int(labelled_L.int().argmax())) if len(labelled_L) and bool(labelled_L.any()) else 1

    @property
    def size(self) -> int:
        return self.input_ids.shape[0]

    def with_text(self, input_ids_BL: torch.Tensor, attention_mask_BL: torch.Tensor) -> "Batch":
        """Other text, without labels, under what this batch sees."""
        labels_BL = torch.full_like(input_ids_BL, IGNORE_INDEX)
        return replace(self, input_ids=input_ids_BL, attention_mask=attention_mask_BL, labels=labels_BL, first_label=1)

    def _map(self, function) -> "Batch":
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return type(self)(**{k: function(v) if torch.is_tensor(v) else v for k, v in values.items()})

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
