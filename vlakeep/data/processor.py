"""What data, probes and stages ask of a model's processor: samples to batches, prompts, and actions to tokens and back.

Each kind of model has its own (openvla/processor.py); nothing else knows how a prompt is written or what an action token means.
Axes: N samples or rows, L text tokens, T answer tokens, C actions of a chunk, A action dimensions.
"""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, List, Optional, Tuple

import numpy as np

from vlakeep.data.sample import Batch, Sample, SampleSpec


class BaseProcessor(ABC):
    """tokenizer (a fast one of transformers, for it gives character offsets) and pad_token_id are set by the subclass."""

    tokenizer: Any
    pad_token_id: int
    spec = SampleSpec()
    max_tokens = 0  # of a prompt and its answer; 0 where there is no such limit
    action_limit = 1.0  # largest magnitude of a decoded normalised value
    variable_answers = False  # whether answers to action prompts differ in length
    own_resize = False  # whether pictures are taken as a camera gives them; else as OpenVLA's evaluation hands them over

    @property
    def ends(self) -> Tuple[int, ...]:
        """Tokens each of which ends an answer."""
        return (self.tokenizer.eos_token_id,)

    @property
    @abstractmethod
    def picture_size(self) -> Tuple[int, int]:
        """(height, width) in pixels that the model sees."""

    @abstractmethod
    def encode_batch(self, samples: List[Sample]) -> Batch:
        """Prompts with their targets. ValueError for a sample without a target, or that lacks what `spec` names."""

    @abstractmethod
    def encode_prompts(self, samples: List[Sample], width: int = 0) -> Batch:
        """Prompts alone, right-padded to at least `width` tokens; all labels are IGNORE_INDEX."""

    @abstractmethod
    def whole_prompt(self, sample: Sample) -> List[int]:
        """Token ids of what the model has seen before the first target token."""

    def text_ids(self, text: str) -> List[int]:
        """Token ids of a text that is no prompt, begun as the model's prompts are."""
        return list(self.tokenizer(text, add_special_tokens=True)["input_ids"])

    @abstractmethod
    def prompt_text(self, sample: Sample) -> str:
        """The prompt as text; its tokens begin whole_prompt."""

    @abstractmethod
    def instruction_span(self, text: str) -> Tuple[int, int]:
        """Character offsets (start, end) of the instruction or question inside a prompt_text. ValueError when there is none."""

    def state_spans(self, text: str) -> Optional[List[Tuple[int, int]]]:
        """Character offsets of a robot's state inside a prompt_text; None: the model writes none, and what looks like one counts."""
        return None

    @abstractmethod
    def encode_actions(self, actions: np.ndarray) -> np.ndarray:
        """Normalised actions [..., A] to ids: [..., A] where the model has a token for each number, else [..., T]."""

    @abstractmethod
    def decode_actions(self, ids_NT: np.ndarray) -> np.ndarray:
        """Answers to normalised actions [N, C, A], float64; ids that are no action tokens give something inside the range."""

    @abstractmethod
    def action_bins(self, ids: np.ndarray) -> np.ndarray:
        """The number of each action token's bin, so that differences are steps of the action."""

    @abstractmethod
    def save(self, path) -> List[Path]:
        """Write the files that this processor is read from, and return them."""
