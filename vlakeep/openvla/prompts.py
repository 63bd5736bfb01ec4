"""Text and labels exactly as the official OpenVLA pipeline makes them, for actions and for questions.

    action     <s>In: What action should the robot take to {instruction}?\\nOut: ▁ a1 .. aA </s>      loss on a1 .. aA </s>
    question   <s>In: {question}\\nOut: {answer}</s>                                               loss on answer </s>

Sources: openvla prismatic/vla/datasets/datasets.py:35-66 (RLDSBatchTransform), models/backbones/llm/prompting/base_prompter.py,
util/data_utils.py:111-142 (collator), experiments/robot/openvla_utils.py:163 and modeling_prismatic.py:512 (evaluation).
The official code writes the action ids as text and tokenises the whole string. Appending the ids to the prompt's ids gives the
same sequence for both golden tokenizers and costs no second pass through the tokenizer.
Axes: B batch, L text tokens, V vision backbones, H W pixels.
"""

import re
import threading
import weakref
from typing import Dict, List, Sequence, Tuple

import numpy as np
import torch

from vlakeep.data.sample import IGNORE_INDEX, Batch, Sample

_HEAD, _TAIL = "In: ", "\nOut:"
_ACTION_HEAD, _ACTION_TAIL = "What action should the robot take to ", "?"
# pi0-FAST puts the discretised robot state into the text: "Task: pick up the cup, State: 12 34;\nAction:"
_STATE_TEMPLATE = re.compile(r"^Task: (?P<instruction>.*?), State: [^;]*;\nAction:", re.DOTALL)
MAX_LENGTH = 2048  # the official model_max_length
_CACHE_LIMIT = 65536  # prompts kept per tokenizer; a data set has few instructions, each with very many frames

_cache = weakref.WeakKeyDictionary()  # tokenizer -> {text: ids}
_lock = threading.Lock()  # a fast tokenizer used from two threads raises "Already borrowed"


def action_prompt(instruction: str) -> str:
    """The prompt that asks for an action, up to and including "Out:"; training and evaluation share it."""
    return f"{_HEAD}{_ACTION_HEAD}{instruction.lower()}{_ACTION_TAIL}{_TAIL}"


def question_prompt(question: str) -> str:
    """The prompt that asks a visual question, up to and including "Out:"."""
    return f"{_HEAD}{question.strip()}{_TAIL}"


def prompt_text(sample: Sample) -> str:
    """The prompt of a sample, as evaluation writes it."""
    return question_prompt(sample.instruction) if sample.question else action_prompt(sample.instruction)


def training_text(sample: Sample) -> str:
    """The prompt of a sample, as training writes it: the official prompt builder deletes "<image>" from the human's turn."""
    text = prompt_text(sample)
    if "<image>" not in text:
        return text
    return _HEAD + text[len(_HEAD):-len(_TAIL)].replace("<image>", "").strip() + _TAIL


def instruction_span(text_prompt: str) -> Tuple[int, int]:
    """Character offsets (start, end) of the instruction or question inside a prompt.

    Raises ValueError for a text that none of the known templates made.
    """
    found = _STATE_TEMPLATE.match(text_prompt)
    if found:
        return found.span("instruction")
    end = text_prompt.rfind(_TAIL)
    if not text_prompt.startswith(_HEAD) or end < 0:
        raise ValueError(f"{text_prompt!r} follows no known prompt template, so its instruction cannot be located; known are "
                         f"{action_prompt('...')!r}, {question_prompt('...')!r} and 'Task: ..., State: ...;\\nAction:'")
    start = len(_HEAD)
    if text_prompt.startswith(_ACTION_HEAD, start) and text_prompt[start:end].endswith(_ACTION_TAIL):
        return start + len(_ACTION_HEAD), end - len(_ACTION_TAIL)
    return start, end


def prompt_ids(text: str, tokenizer) -> List[int]:
    """Token ids of a prompt, BOS first. Cached per tokenizer; the caller must not change the list."""
    with _lock:
        known = _cache.setdefault(tokenizer, {})
        ids = known.get(text)
        if ids is None:
            ids = list(tokenizer(text, add_special_tokens=True)["input_ids"])
            if len(known) < _CACHE_LIMIT:
                known[text] = ids
        return ids


def _answer_ids(text: str, ids: List[int], answer: str, tokenizer) -> List[int]:
    whole = prompt_ids(f"{text} {answer}", tokenizer)
    if whole[:len(ids)] == ids and len(whole) > len(ids):
        return whole[len(ids):]
    # The tokenizer merges across "Out:"; tokenise the turn by itself, so that training still continues the evaluated prompt.
    with _lock:
        return list(tokenizer(answer, add_special_tokens=False)["input_ids"])


def encode_text(sample: Sample, processor) -> Tuple[List[int], List[int]]:
    """Token ids and labels of a sample with its target, both of length L.

    Raises ValueError for a sample without a target or with a non-finite action.
    """
    tokenizer = processor.tokenizer
    text = training_text(sample)
    ids = prompt_ids(text, tokenizer)
    if sample.question:
        if not sample.answer or not sample.answer.strip():
            raise ValueError(f"question {sample.instruction!r} of data set {sample.dataset!r} has no answer to learn")
        target = _answer_ids(text, ids, sample.answer.strip(), tokenizer)
    else:
        if sample.action is None:
            raise ValueError(f"instruction {sample.instruction!r} of data set {sample.dataset!r} has no action to learn; "
                             "encode_prompts makes a batch without targets")
        if not np.isfinite(sample.action).all():
            raise ValueError(f"action {np.asarray(sample.action).tolist()} of {sample.instruction!r} in data set "
                             f"{sample.dataset!r} is not finite; it would silently become an end of the action range")
        ids = ids + [processor.empty_token_id]
        target = [int(i) for i in processor.action_tokenizer.encode(sample.action)]
    target = target + [tokenizer.eos_token_id]
    return ids + target, [IGNORE_INDEX] * len(ids) + target


def encode(sample: Sample, processor) -> Dict[str, torch.Tensor]:
    """input_ids [L], labels [L] (int64) and pixel_values [3V, H, W] of one sample, as the official RLDSBatchTransform."""
    ids, labels = encode_text(sample, processor)
    return {
        "input_ids": torch.tensor(ids),
        "labels": torch.tensor(labels),
        "pixel_values": torch.as_tensor(processor.image_processor([sample.image]))[0],
        "dataset_name": sample.dataset,
    }


def _pad(rows: Sequence, value: int, width: int = 0) -> torch.Tensor:
    longest = max(width, *(len(row) for row in rows))
    if longest > MAX_LENGTH:  # the official collator cuts here, which would cut the labels off and leave a loss of NaN
        raise ValueError(f"a prompt of {longest} tokens is longer than the model's {MAX_LENGTH}; shorten its instruction")
    padded = torch.full((len(rows), longest), value, dtype=torch.int64)
    for i, row in enumerate(rows):
        padded[i, :len(row)] = torch.as_tensor(row)
    return padded


def _batch(ids: Sequence, labels: Sequence, pixel_values: torch.Tensor, names: List[str], pad_id: int, width: int = 0) -> Batch:
    input_ids_BL = _pad(ids, pad_id, width)
    length_B = torch.tensor([len(row) for row in ids])
    mask_BL = torch.arange(input_ids_BL.shape[1])[None, :] < length_B[:, None]
    return Batch(input_ids_BL, mask_BL, _pad(labels, IGNORE_INDEX, width), pixel_values, names)


def collate(encoded: List[dict], pad_id: int) -> Batch:
    """Right-padded batch of `encode` results: input_ids with pad_id, labels with IGNORE_INDEX.

    Raises ValueError for an empty list or a text longer than MAX_LENGTH.
    """
    if not encoded:
        raise ValueError("collate needs at least one sample")
    return _batch([e["input_ids"] for e in encoded], [e["labels"] for e in encoded],
                  torch.stack([e["pixel_values"] for e in encoded]), [e.get("dataset_name", "") for e in encoded], pad_id)


def encode_batch(samples: List[Sample], processor) -> Batch:
    """collate([encode(s) for s in samples]) with one call of the image processor."""
    if not samples:
        raise ValueError("encode_batch needs at least one sample")
    texts = [encode_text(sample, processor) for sample in samples]
    pixel_values = torch.as_tensor(processor.image_processor([sample.image for sample in samples]))
    return _batch([ids for ids, _ in texts], [labels for _, labels in texts], pixel_values,
                  [sample.dataset for sample in samples], processor.pad_token_id)


def whole_prompt(sample: Sample, processor) -> List[int]:
    """Token ids of what the model has seen before the first target token: an action prompt ends in "Out:" and the empty token that
    the official predict_action appends, a question ends in "Out:" because its answer brings its own leading space."""
    return prompt_ids(prompt_text(sample), processor.tokenizer) + ([] if sample.question else [processor.empty_token_id])


def encode_prompts(samples: List[Sample], processor, width: int = 0) -> Batch:
    """Batch of prompts (whole_prompt) without targets (labels all IGNORE_INDEX), for evaluation and probes.

    width: tokens that rows are padded to at least, so that batches of other instructions have the same shape.
    """
    if not samples:
        raise ValueError("encode_prompts needs at least one sample")
    rows = [whole_prompt(sample, processor) for sample in samples]
    pixel_values = torch.as_tensor(processor.image_processor([sample.image for sample in samples]))
    return _batch(rows, [[IGNORE_INDEX] * len(row) for row in rows], pixel_values,
                  [sample.dataset for sample in samples], processor.pad_token_id, width)
