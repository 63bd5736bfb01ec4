"""Text, token rows and labels of pi0-FAST, in either of the two layouts in which it is spoken.

    lerobot   <bos>Task: {task}, State: {bins};\\n <bos>Action: {codes}|<eos>     loss from "Action" on
    openpi    <bos>Task: {task}, State: {bins};\\n Action: {codes}|<eos>          loss from "Action" on, predicted from the newline
    question  <bos>answer en {question}\\n {answer}<eos>                          PaliGemma's own prompt for questions, in both

The part before the second blank is the prefix, which sees all of itself; what follows is causal. Rows are compact (no padding between
prompt and actions): lerobot pads both parts, and leaves the padding out of attention and positions, so that the numbers are the same.

Sources: lerobot 7427f318 processor_pi0_fast.py:53-81, processor/tokenizer_processor.py:446-561; openpi 15a9616a models/tokenizer.py:52-104.
Axes: B batch, L text tokens.
"""

import threading
from typing import Dict, List, NamedTuple, Tuple

import numpy as np

from vlakeep.core.errors import CheckpointError
from vlakeep.data.sample import Sample

TASK, STATE, END = "Task: ", ", State: ", ";\n"
ACTION, BAR = "Action: ", "|"
QUESTION, QUESTION_END = "answer en ", "\n"
BINS = 256


class Layout(NamedTuple):
    """How rows, pictures and losses are made; one name for all of it, which artefacts and checkpoints record."""

    name: str
    lower: bool  # the task in lower case, its newlines kept
    second_bos: bool  # before the actions
    black: bool  # a camera that a sample lacks is seen as a black picture; else it is masked
    row_means: bool  # the loss is the mean over rows of each row's mean; else over all tokens of the batch


LAYOUTS = {"lerobot": Layout("lerobot", False, True, False, False), "openpi": Layout("openpi", True, False, True, True)}
DEFAULT = "lerobot"  # until it is measured which one lerobot/pi0fast-base speaks (docs/pi0-fast.md)


def layout_named(name) -> Layout:
    if name not in LAYOUTS:
        raise CheckpointError(f"layout {name!r}: must be one of {', '.join(LAYOUTS)}: choose with --backbone.layout {DEFAULT}")
    return LAYOUTS[name]


def state_bins(state_Q: np.ndarray) -> List[int]:
    """Of a normalised state: 0 to 255 over [-1, 1), -1 below, 255 from 127/128 on and above."""
    return (np.digitize(np.asarray(state_Q), np.linspace(-1, 1, BINS + 1)[:-1]) - 1).tolist()


def task_text(instruction: str, layout: Layout) -> str:
    if layout.lower:
        return instruction.lower().strip().replace("_", " ")
    return instruction.strip().replace("_", " ").replace("\n", " ")


def prompt_text(sample: Sample, layout: Layout) -> str:
    """The prefix's text."""
    if sample.question:
        return f"{QUESTION}{sample.instruction.strip()}{QUESTION_END}"
    bins = [] if sample.state is None else state_bins(sample.state)
    return f"{TASK}{task_text(sample.instruction, layout)}{STATE}{' '.join(map(str, bins))}{END}"


def instruction_span(text: str) -> Tuple[int, int]:
    """(start, end) of the task or question. The last ", State: " ends it: a task may hold one too, a state does not."""
    if text.startswith(TASK) and text.endswith(END) and STATE in text:
        return len(TASK), max(len(TASK), text.rindex(STATE))
    if text.startswith(QUESTION) and text.endswith(QUESTION_END):
        return len(QUESTION), len(text) - len(QUESTION_END)
    raise ValueError(f"{text!r} follows no known prompt template, so its instruction cannot be located; known are "
                     f"{TASK + '...' + STATE + '...' + END!r} and {QUESTION + '...' + QUESTION_END!r}")


def state_spans(text: str) -> List[Tuple[int, int]]:
    """Where the state stands: its label and its numbers, not the punctuation around them."""
    if not text.startswith(TASK):
        return []
    return [(text.rindex(STATE) + 2, len(text) - len(END))]


class Words:
    """The text tokenizer with the ids that the rows need; ids of a prompt are kept, for a data set has few tasks."""

    def __init__(self, tokenizer, skip: int):
        """skip: lerobot's fast_skip_tokens, rows at the end of the vocabulary that are no codes."""
        self.tokenizer = tokenizer
        self.bos, self.eos, self.pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
        self.vocab_size: int = tokenizer.vocab_size  # without added tokens
        self._lock = threading.Lock()  # a fast tokenizer used from two threads raises "Already borrowed"
        self._known: Dict[str, List[int]] = {}
        self.action = self.plain(ACTION)
        bar = self.plain(BAR)
        if len(bar) != 1 or not self.action or None in (self.bos, self.eos, self.pad):
            raise CheckpointError(f"the text tokenizer writes {BAR!r} as {len(bar)} tokens, or lacks one of bos, eos and pad: it "
                                  "is none of "
                                  "PaliGemma's type; copy tokenizer.json of google/paligemma-3b-pt-224 to the checkpoint's text_tokenizer")
        self.bar = bar[0]
        self.first_code = self.vocab_size - 1 - skip  # of code 0; codes go downwards

    def plain(self, text: str) -> List[int]:
        """Without BOS."""
        with self._lock:
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def ids(self, text: str) -> List[int]:
        """BOS first; the caller must not change the list."""
        found = self._known.get(text)
        if found is None:
            found = [self.bos, *self.plain(text)]
            if len(self._known) < 65536:
                self._known[text] = found
        return found

    def answer(self, codes: List[int]) -> List[int]:
        """What is learnt of an action: the mark, the codes, the bar and the end."""
        return [*self.action, *(self.first_code - code for code in codes), self.bar, self.eos]

    def codes(self, ids: List[int]) -> Tuple[List[int], bool]:
        """(codes of an answer, whether it ended): up to the first bar or end, without the marks, as lerobot reads it. A code that is none
        of the codec's is left for the codec to judge."""
        ends = [place for place, one in enumerate(ids) if one in (self.bar, self.eos)]
        said, mark = list(ids[:ends[0]] if ends else ids), self.action
        place = 0
        while place <= len(said) - len(mark):
            if said[place:place + len(mark)] == mark:
                del said[place:place + len(mark)]
            else:
                place += 1
        return [self.first_code - one for one in said], bool(ends)
