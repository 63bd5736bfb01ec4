"""Log-likelihoods of the choices of an item: one row an item, the context computed once and all choices packed behind it.

    row       [context][choice 0][choice 1] ... [padding]
    place     0 1 2 ... P-1, and from P on anew for every choice
    sees      a token sees the context before it, and of its own choice what stands before it; no choice sees another

A choice's first token is predicted by the context's last one, so that the numbers are those of rows with one choice each, to rounding.
Text alone is read, as `Backbone.read_text` says.

Axes: B rows, L columns, V vocabulary, N scored tokens.
"""

from typing import List, NamedTuple, Sequence, Tuple

import torch

from vlakeep.language.items import Item

PADDING = -1  # group of a column; 0 is the context, choice k is k + 1


class Row(NamedTuple):
    """An item as token ids."""

    context: List[int]
    choices: List[List[int]]


class Score(NamedTuple):
    """Of every choice: log-probability (sum over its tokens, nats), how many tokens these are, and whether each was the likeliest one."""

    log_p: List[float]
    tokens: List[int]
    greedy: List[bool]


def row_of(processor, item: Item) -> Row:
    """Context and choice are tokenised together, and cut where all choices are still the same: a tokenizer may join what stands at the
    seam. A choice has at least one token. ValueError where none stands before it, and for a text that is longer than the model reads."""
    alone = processor.text_ids(item.context)
    wholes = [processor.text_ids(item.context + choice) for choice in item.choices]
    shared = 0
    while all(len(ids) > shared + 1 for ids in wholes) and len(alone) > shared and len({ids[shared] for ids in [alone, *wholes]}) == 1:
        shared += 1
    if not shared:
        raise ValueError(f"nothing stands before the choices of {item.context[-60:]!r}, which could predict their first token")
    longest = max(map(len, wholes))
    if processor.max_tokens and longest > processor.max_tokens:
        raise ValueError(f"{item.context[:60]!r}... has {longest} tokens, the model reads {processor.max_tokens}: leave the item out")
    return Row(wholes[0][:shared], [ids[shared:] for ids in wholes])


def packed(rows: Sequence[Row], pad_id: int) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(ids [B, L], places [B, L], groups [B, L]) of rows."""
    columns = []
    for row in rows:
        start = len(row.context)
        ids, places, groups = list(row.context), list(range(start)), [0] * start
        for number, choice in enumerate(row.choices, 1):
            ids += choice
            places += range(start, start + len(choice))
            groups += [number] * len(choice)
        columns.append((ids, places, groups))
    length = max(len(ids) for ids, _, _ in columns)
    filled = [[values + [fill] * (length - len(values)) for values, fill in zip(column, (pad_id, 0, PADDING))] for column in columns]
    ids_BL, places_BL, groups_BL = torch.tensor(filled).unbind(1)
    return ids_BL, places_BL, groups_BL


def sight(groups_BL: torch.Tensor) -> torch.Tensor:
    """Which column (first) sees which (second), bool [B, L, L]; padding sees something, since a softmax over nothing is NaN."""
    length = groups_BL.shape[1]
    earlier_LL = torch.ones(length, length, dtype=torch.bool, device=groups_BL.device).tril()
    return earlier_LL & ((groups_BL[:, None] == 0) | (groups_BL[:, None] == groups_BL[:, :, None]))


@torch.no_grad()
def score(backbone, rows: Sequence[Row]) -> List[Score]:
    """The scores of rows, all in one pass."""
    ids_BL, places_BL, groups_BL = (t.to(backbone.device) for t in packed(rows, backbone.processor.pad_token_id))
    normed_BLD = backbone.read_text(ids_BL, places_BL, sight(groups_BL))
    lines, before, scored = [], [], []  # of every scored token: its row, the column that predicts it, its own column
    for line, row in enumerate(rows):
        start = len(row.context)
        for choice in row.choices:
            own = range(start, start + len(choice))
            lines += [line] * len(choice)
            before += [len(row.context) - 1, *own][:len(choice)]
            scored += own
            start += len(choice)
    log_p_NV = backbone.logits(normed_BLD[lines, before]).log_softmax(-1)
    wanted_N = ids_BL[lines, scored]
    log_p_N = log_p_NV.gather(-1, wanted_N[:, None])[:, 0].double().cpu()
    best_N = (log_p_NV.argmax(-1) == wanted_N).cpu()
    found, start = [], 0
    for row in rows:
        counts = [len(choice) for choice in row.choices]
        parts = list(zip(log_p_N[start:start + sum(counts)].split(counts), best_N[start:start + sum(counts)].split(counts)))
        found.append(Score([float(p.sum()) for p, _ in parts], counts, [bool(best.all()) for _, best in parts]))
        start += sum(counts)
    return found
