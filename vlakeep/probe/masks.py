"""Instruction masks (ICSM step 1): which text positions of a prompt belong to the instruction.

Two ways, by what the tokenizer offers:
    mask_from_loss_mask   instr_mask = ~loss_mask & attention_mask, for tokenizers that give an action loss_mask
    mask_from_prompt      the instruction's span in the prompt template, through the tokenizer's character offsets
Positions are text positions; image patches are no text, so they are out by construction. The template is the processor's
(data/processor.py). `audit` explains every token.
Axes: B batch, L text tokens.
"""

import re
from dataclasses import dataclass
from typing import List, Sequence, Tuple

import torch

from vlakeep.data.sample import Batch, Sample

# A robot state written into the text, as pi0-FAST does: "State: 12 34;". Neither its label nor its digits are instruction.
_STATE = re.compile(r"\bstate:\s*-?\d[-\d\s.,]*;?", re.IGNORECASE)


@dataclass(frozen=True)
class AuditRow:
    """One text position: its token and whether, and why, it counts as instruction."""

    position: int
    id: int
    piece: str  # as the vocabulary spells it
    text: str  # the characters of the prompt that it covers
    kept: bool
    reason: str


def mask_from_loss_mask(loss_mask_BL: torch.Tensor, attention_mask_BL: torch.Tensor) -> torch.Tensor:
    """bool [B, L]: instr_mask = ~loss_mask & attention_mask. ValueError when the shapes differ."""
    if loss_mask_BL.shape != attention_mask_BL.shape:
        raise ValueError(f"loss_mask {list(loss_mask_BL.shape)} and attention_mask {list(attention_mask_BL.shape)} must have "
                         "one shape")
    return ~loss_mask_BL.bool() & attention_mask_BL.bool()


def _tokenize(text: str, tokenizer) -> Tuple[List[int], List[Tuple[int, int]]]:
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"{type(tokenizer).__name__} gives no character offsets, so the instruction cannot be located; load the "
                         "fast tokenizer (tokenizer.json)")
    encoded = tokenizer(text, add_special_tokens=True, return_offsets_mapping=True)
    return list(encoded["input_ids"]), [tuple(span) for span in encoded["offset_mapping"]]


def _classify(text: str, processor, ids: Sequence[int], offsets: Sequence[Tuple[int, int]], special: set) -> List[Tuple[bool, str]]:
    """(kept, reason) of each token of a prompt. Whitespace belongs to no one, so a token counts by its visible characters."""
    start, end = processor.instruction_span(text)
    states = processor.state_spans(text)
    if states is None:
        states = [found.span() for found in _STATE.finditer(text)]

    def owner(index: int) -> str:
        if any(a <= index < b for a, b in states):
            return "state text"
        return "instruction" if start <= index < end else "template"

    rows = []
    for token, (a, b) in zip(ids, offsets):
        owners = {owner(i) for i in range(a, b) if not text[i].isspace()}
        if token in special:
            rows.append((False, "special token"))
        elif not owners:
            rows.append((False, "newline" if "\n" in text[a:b] else "space"))
        elif "instruction" in owners:
            others = ", ".join(sorted(owners - {"instruction"}))
            rows.append((True, "instruction" + (f", in one token with {others}" if others else "")))
        else:
            rows.append((False, ", ".join(sorted(owners))))
    return rows


def mask_from_prompt(batch: Batch, samples: List[Sample], processor) -> torch.Tensor:
    """bool [B, L] over text tokens: True for tokens of the instruction (of the question, for question samples).

    Out are BOS, template words, spaces and newlines, the empty token, answers and actions, state text and padding. An instruction
    that tokenises to nothing gives an all-False row. Raises ValueError when `batch` does not hold the prompts of `samples`.
    """
    if len(samples) != batch.size:
        raise ValueError(f"{len(samples)} samples do not belong to a batch of {batch.size}")
    special = set(processor.tokenizer.all_special_ids)
    mask_BL = torch.zeros(batch.input_ids.shape, dtype=torch.bool)
    for i, sample in enumerate(samples):
        text = processor.prompt_text(sample)
        ids, offsets = _tokenize(text, processor.tokenizer)
        if batch.input_ids[i, :len(ids)].tolist() != ids:
            raise ValueError(f"row {i} of the batch does not start with the tokens of {text!r}; the mask would be wrong")
        mask_BL[i, :len(ids)] = torch.tensor([kept for kept, _ in _classify(text, processor, ids, offsets, special)])
    return mask_BL.to(batch.input_ids.device)


def audit(sample: Sample, processor) -> List[AuditRow]:
    """Every text position of the sample's probe prompt with what became of it; `kept` equals mask_from_prompt."""
    tokenizer, text = processor.tokenizer, processor.prompt_text(sample)
    ids, offsets = _tokenize(text, tokenizer)
    rows = [(token, text[a:b], kept, reason) for token, (a, b), (kept, reason)
            in zip(ids, offsets, _classify(text, processor, ids, offsets, set(tokenizer.all_special_ids)))]
    for token in processor.encode_prompts([sample]).input_ids[0, len(ids):].tolist():
        rows.append((token, "", False, "special token" if token in tokenizer.all_special_ids else "empty token"))
    pieces = tokenizer.convert_ids_to_tokens([row[0] for row in rows])
    return [AuditRow(position, token, piece, covered, kept, reason)
            for position, (piece, (token, covered, kept, reason)) in enumerate(zip(pieces, rows))]
