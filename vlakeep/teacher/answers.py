"""The teacher's own answers to probe prompts, and how far a student's distribution at these answers is from the teacher's, in nats.

The teacher answers greedily; at every answer position its `TOP` most probable tokens are kept with their log-probabilities, and the
mass of all others as one outcome. The divergence over these TOP + 1 outcomes is a lower bound of KL(teacher || student) over the whole
vocabulary (merging outcomes never raises it); with 32 of them the difference is below a hundredth of it where it was measured.

Axes: N items, L text tokens, T answer positions, K kept outcomes, V vocabulary.
"""

from dataclasses import fields, replace
from typing import Dict, Iterable, List, Mapping, NamedTuple, Tuple

import torch
from torch.nn.utils.rnn import pad_sequence

from vlakeep.data.sample import Batch
from vlakeep.models.base import Prefix

TOP = 32


class Answered(NamedTuple):
    """Prompts with the teacher's answers behind them, one row an item; `text_NL` holds both."""

    text_NL: torch.Tensor  # int64, right-padded
    valid_NL: torch.Tensor  # bool
    start_N: torch.Tensor  # int64: column of the first answer token, which is predicted one column earlier
    count_N: torch.Tensor  # int64: answer tokens
    top_NTK: torch.Tensor  # int64: most probable tokens of the teacher
    log_p_NTK: torch.Tensor  # float32: their log-probabilities
    log_rest_NT: torch.Tensor  # float32: log of the mass of all others

    @property
    def mask_NT(self) -> torch.Tensor:
        return torch.arange(self.top_NTK.shape[1], device=self.count_N.device) < self.count_N[:, None]


def answer_columns(start_N: torch.Tensor, steps: int) -> torch.Tensor:
    """Text columns [N, T] whose output predicts the answer tokens."""
    return start_N[:, None] - 1 + torch.arange(steps, device=start_N.device)


def split_log_probabilities(logits_NTV: torch.Tensor, top_NTK: torch.Tensor):
    """(log-probabilities of the kept tokens [N, T, K], log of the rest's mass [N, T]), both exact."""
    logits_NTV = logits_NTV.float()
    total_NT = logits_NTV.logsumexp(-1)
    kept_NTK = logits_NTV.gather(-1, top_NTK) - total_NT[..., None]
    # Not as log(1 - sum p): where the kept tokens hold nearly all of the mass, that difference is rounding.
    rest_NT = logits_NTV.scatter(-1, top_NTK, float("-inf")).logsumexp(-1) - total_NT
    return kept_NTK, rest_NT


def divergence(answered: Answered, logits_NTV: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) per item [N] in nats per answer token, the mean over its answer positions. No synchronisation."""
    log_q_NTK, rest_q_NT = split_log_probabilities(logits_NTV, answered.top_NTK)
    p_NTK, p_rest_NT = answered.log_p_NTK.exp(), answered.log_rest_NT.exp()
    kl_NT = (p_NTK * (answered.log_p_NTK - log_q_NTK)).sum(-1)
    # A vocabulary with no other tokens, or a teacher that is certain: 0 * (-inf - x) is nothing.
    kl_NT = kl_NT + torch.where(p_rest_NT > 0, p_rest_NT * (answered.log_rest_NT - rest_q_NT), torch.zeros_like(p_rest_NT))
    mask_NT = answered.mask_NT
    return (kl_NT * mask_NT).sum(1) / mask_NT.sum(1).clamp(min=1)


class Part(NamedTuple):
    """A batch of prompts with the teacher's answers, run up to the first adapted layer; everything on the CPU."""

    prefix: Prefix
    text_BL: torch.Tensor  # int64, prompts and answers
    start_B: torch.Tensor
    count_B: torch.Tensor

    def to(self, device) -> "Part":
        return Part(self.prefix.to(device), *[t.to(device) for t in self[1:]])

    def answer_mask_BL(self) -> torch.Tensor:
        """Which text tokens are the teacher's answer."""
        index_L = torch.arange(self.text_BL.shape[1], device=self.text_BL.device)
        return (index_L >= self.start_B[:, None]) & (index_L < (self.start_B + self.count_B)[:, None])

    def tensors(self) -> Dict[str, torch.Tensor]:
        """All that is in it, by name; `like` makes a Part of it."""
        return {**{f"prefix.{f.name}": getattr(self.prefix, f.name) for f in fields(self.prefix)}, **dict(zip(self._fields[1:], self[1:]))}

    def like(self, tensors: Mapping[str, torch.Tensor]) -> "Part":
        """Another Part of the same kind of model."""
        prefix = replace(self.prefix, **{f.name: tensors[f"prefix.{f.name}"] for f in fields(self.prefix)})
        return Part(prefix, *[tensors[name] for name in self._fields[1:]])

    def split(self, rows: int) -> List["Part"]:
        """Parts of at most so many rows."""
        cuts = [slice(start, start + rows) for start in range(0, len(self.text_BL), rows)]
        return [Part(self.prefix.rows(cut), *[t[cut] for t in self[1:]]) for cut in cuts]


@torch.no_grad()
def run_below(backbone, prompts_and_wholes: Iterable[Tuple[Batch, Batch]], first: int) -> List[Part]:
    """The Parts of batches (prompts, the same with the teacher's answers): the layers below `first` run once for all that follows."""
    parts = []
    for prompts, whole in prompts_and_wholes:
        prefix = backbone.embed(whole)
        if first:
            prefix = prefix.with_hidden(backbone.run_layers(prefix, stop=first))
        start_B = prompts.attention_mask.sum(1).cpu()
        count_B = whole.attention_mask.sum(1).cpu() - start_B
        parts.append(Part(prefix.to("cpu"), whole.input_ids.cpu(), start_B, count_B))
    return parts


def teacher_answers(backbone, parts: Iterable[Part], first: int, top: int = TOP) -> Answered:
    """The Answered of all items, on the CPU; the layers from `first` on are run."""
    return joined([answer_rows(backbone, part, first, top) for part in parts])


@torch.no_grad()
def answer_rows(backbone, part: Part, first: int, top: int = TOP) -> Dict[str, List[torch.Tensor]]:
    """The fields of Answered for the items of a Part: a tensor an item, without padding."""
    part = part.to(backbone.device)
    hidden_BSD = backbone.run_layers(part.prefix, start=first, stop=backbone.num_layers)
    last = part.prefix.with_hidden(hidden_BSD)
    logits_BTV = logits_at(backbone, last, part.text_BL.shape[1], part.start_B, int(part.count_B.max()))
    # One less than there are tokens, so that the rest is never empty.
    top_BTK = logits_BTV.float().topk(min(top, logits_BTV.shape[-1] - 1), dim=-1).indices
    kept_BTK, rest_BT = split_log_probabilities(logits_BTV, top_BTK)
    rows: Dict[str, List[torch.Tensor]] = {name: [] for name in Answered._fields}
    for row, (start, count) in enumerate(zip(part.start_B.tolist(), part.count_B.tolist())):
        for name, value in (("text_NL", part.text_BL[row, :start + count]), ("valid_NL", torch.ones(start + count, dtype=torch.bool)),
                            ("start_N", part.start_B[row]), ("count_N", part.count_B[row]), ("top_NTK", top_BTK[row, :count]),
                            ("log_p_NTK", kept_BTK[row, :count]), ("log_rest_NT", rest_BT[row, :count])):
            rows[name].append(value.cpu())
    return rows


def joined(parts: Iterable[Dict[str, List[torch.Tensor]]]) -> Answered:
    """One Answered of the rows of several Parts, in order."""
    rows: Dict[str, List[torch.Tensor]] = {name: [] for name in Answered._fields}
    for part in parts:
        for name, values in part.items():
            rows[name] += values
    return Answered(**{name: torch.stack(values) if name in ("start_N", "count_N") else pad_sequence(values, batch_first=True)
                       for name, values in rows.items()})


def logits_at(backbone, last: Prefix, length: int, start_N: torch.Tensor, steps: int) -> torch.Tensor:
    """The model's head on the answer columns of `length` text tokens, [N, T, V]; `last` holds the last layer's raw output."""
    hidden_BSD = last.hidden_BSD
    # Columns behind a shorter answer are masked later; here they only have to exist.
    columns_NT = answer_columns(start_N.to(hidden_BSD.device), steps).clamp(max=length - 1)
    positions_NT = backbone.text_columns(last, length).expand(len(columns_NT), length).gather(1, columns_NT)
    rows_N1 = torch.arange(len(columns_NT), device=hidden_BSD.device)[:, None]
    return backbone.logits(backbone.norm(hidden_BSD[rows_N1, positions_NT]))


def answer_log_probability(backbone, last_BSD: torch.Tensor, part: Part) -> torch.Tensor:
    """Sum over the items of log p(the teacher's answer), a differentiable scalar; `last_BSD` is the last layer's raw output."""
    steps, length = int(part.count_B.max()), part.text_BL.shape[1]
    log_p_BTV = torch.log_softmax(logits_at(backbone, part.prefix.with_hidden(last_BSD), length, part.start_B, steps).float(), -1)
    said_BT = part.text_BL.gather(1, (answer_columns(part.start_B, steps) + 1).clamp(max=length - 1))
    chosen_BT = log_p_BTV.gather(-1, said_BT[..., None])[..., 0]
    return (chosen_BT * (torch.arange(steps, device=last_BSD.device) < part.count_B[:, None])).sum()


if __name__ == "__main__":  # sanity check: python -m vlakeep.teacher.answers
    torch.manual_seed(0)
    logits_NTV, other_NTV = torch.randn(3, 4, 50) * 3, torch.randn(3, 4, 50) * 3
    top_NTK = logits_NTV.topk(49, -1).indices
    kept_NTK, rest_NT = split_log_probabilities(logits_NTV, top_NTK)
    answered = Answered(None, None, None, torch.full((3,), 4), top_NTK, kept_NTK, rest_NT)
    p, q = torch.log_softmax(logits_NTV, -1), torch.log_softmax(other_NTV, -1)
    exact_N = (p.exp() * (p - q)).sum(-1).mean(1)
    found_N = divergence(answered, other_NTV)
    print(f"deviation from the divergence over all 50 outcomes: {float((exact_N - found_N).abs().max()):.1e}")
    assert torch.allclose(exact_N, found_N, atol=1e-5)
