"""What a model is asked beside the episodes: questions with known answers, and how far its action tokens are from its teacher's."""

from typing import Any, Callable, Iterator, List, Optional, Tuple

import numpy as np
import torch

from vlakeep.benchmarks.records import Records
from vlakeep.benchmarks.specs import Questions, Retention
from vlakeep.models.adapters import adapters_disabled

ANSWER_TOKENS = 6
QUESTION_BATCH, KL_BATCH = 250, 100
# Rows times layers times width of a batch, at most: 24 rows of a 7B model, whose keys and values take 3.5 GiB beside 14 GiB of weights.
MOST = 24 * 32 * 4096
ROUNDING = 1e-5  # nats, of a mean over float32 sums


def together(rows: int, layers: int, width: int) -> int:
    """How many of `rows` a model of this size is asked together. It follows from the model alone, since the last bits of an answer
    depend on the batch."""
    return max(1, min(rows, MOST // (layers * width)))


def _fitting(backbone, rows: int) -> int:
    return together(rows, backbone.num_layers, backbone.hidden_size)


@torch.inference_mode()
def answer_questions(backbone, samples, batch_size: Optional[int] = None) -> List[str]:
    """Greedy answers, lower case and stripped."""
    batch_size = batch_size or _fitting(backbone, QUESTION_BATCH)
    answers = []
    for start in range(0, len(samples), batch_size):
        batch = backbone.processor.encode_prompts(samples[start:start + batch_size])
        ids, _ = backbone.generate(batch.to(backbone.device), max_new_tokens=ANSWER_TOKENS, stop_at_eos=True)
        answers += [t.strip().lower() for t in backbone.processor.tokenizer.batch_decode(ids.cpu(), skip_special_tokens=True)]
    return answers


@torch.inference_mode()
def action_token_kl(backbone, samples, batch_size: Optional[int] = None) -> np.ndarray:
    """KL(teacher || student) per frame [N], averaged over the teacher's own action tokens, both models fed those tokens."""
    batch_size = batch_size or _fitting(backbone, KL_BATCH)
    values, varied, pad = [], backbone.processor.variable_answers, backbone.processor.pad_token_id
    for start in range(0, len(samples), batch_size):
        batch = backbone.processor.encode_prompts(samples[start:start + batch_size]).to(backbone.device)
        with adapters_disabled(backbone):
            tokens_BT, _ = backbone.generate(batch, max_new_tokens=backbone.action_tokens(), stop_at_eos=varied)
            if varied:
                tokens_BT = tokens_BT[:, (tokens_BT != pad).any(0)]
            teacher = backbone.log_probabilities_of_continuation(batch, tokens_BT)
        student = backbone.log_probabilities_of_continuation(batch, tokens_BT)
        said_BT = tokens_BT != pad
        if varied:  # what stands behind an answer is nobody's, and counts as no difference
            student = torch.where(said_BT[..., None], student, teacher)
        kl_B = (teacher.exp() * (teacher - student)).sum(-1).mean(1)
        kl_B = kl_B * said_BT.shape[1] / said_BT.sum(1) if varied else kl_B
        assert not (kl_B < -ROUNDING).any(), f"a KL of {float(kl_B.min()):.3g} nats: teacher and student are not both distributions"
        values.append(kl_B.clamp(min=0).cpu().numpy())
    return np.concatenate(values) if values else np.zeros(0)


def answers_lacking(records: Records, kind: str, ability: str, count: int, size: int, ask: Callable) -> Iterator[Tuple[int, Any]]:
    """(trial, answer) of the trials that `records` lacks; ask(trials) gives the answers of a batch, in its order."""
    for trials, lacking in records.missing(kind, ability, count, size):
        yield from ((trial, answer) for trial, answer in zip(trials, ask(trials)) if trial in lacking)


def ask_questions(backbone, asked: Questions, records: Records) -> None:
    """The trials of one question kind that `records` lacks."""
    def ask(trials):
        return answer_questions(backbone, asked.samples(trials))

    for trial, said in answers_lacking(records, "question", asked.kind, len(asked.answers), _fitting(backbone, QUESTION_BATCH), ask):
        records.add(kind="question", ability=asked.kind, trial=trial, seed=asked.seeds[trial], success=said == asked.answers[trial],
                    value=None, crash=None, steps=0, answer=said, expected=asked.answers[trial])


def measure_retention(backbone, frames: Retention, records: Records) -> None:
    """The KL of the frames that `records` lacks."""
    def ask(trials):
        return action_token_kl(backbone, frames.samples(trials))

    for trial, kl in answers_lacking(records, "retention", "action_kl", len(frames.seeds), _fitting(backbone, KL_BATCH), ask):
        records.add(kind="retention", ability="action_kl", trial=trial, seed=frames.seeds[trial], success=None, value=float(kl), crash=None,
                    steps=0)
