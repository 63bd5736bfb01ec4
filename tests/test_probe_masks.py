"""Instruction masks and pooling: exactly the instruction's tokens, explained, and no NaN from empty rows."""

import numpy as np
import pytest
import torch
from test_data_prompts import IMAGE, processor  # noqa: F401  (a fixture)

from vlakeep.data.sample import Sample
from vlakeep.openvla.prompts import encode_batch, encode_prompts
from vlakeep.probe.masks import audit, mask_from_loss_mask, mask_from_prompt
from vlakeep.probe.pooling import masked_mean

ACTION = np.zeros(7, dtype=np.float32)


def kept_text(sample, processor):  # noqa: F811
    return "".join(row.text for row in audit(sample, processor) if row.kept)


@pytest.mark.parametrize("sample,kept", [
    (Sample(IMAGE, "Push the red block"), "push the red block"),
    (Sample(IMAGE, "what color is the left block?", question=True), "what color is the left block?"),
    (Sample(IMAGE, "pick up the black bowl, State: 12 34;"), "pick up the black bowl,"),
    (Sample(IMAGE, ""), ""), (Sample(IMAGE, "   "), ""), (Sample(IMAGE, "?"), "?"),
    (Sample(IMAGE, "to"), "to"),  # the same word stands in the template
])
def test_kept_are_the_tokens_of_the_instruction(processor, sample, kept):  # noqa: F811
    assert kept_text(sample, processor).strip() == kept


def test_every_other_token_has_its_reason(processor):  # noqa: F811
    rows = audit(Sample(IMAGE, "push, State: 1;"), processor)
    reasons = {row.reason for row in rows if not row.kept}
    assert reasons >= {"special token", "template", "newline", "empty token", "state text"}
    assert [row.position for row in rows] == list(range(len(rows)))
    assert (rows[0].reason, rows[0].piece) == ("special token", "<s>")
    assert (rows[-1].reason, rows[-1].id) == ("empty token", processor.empty_token_id)


def test_mask_equals_audit_in_a_padded_batch(processor):  # noqa: F811
    samples = [Sample(IMAGE, "push the red block to the corner"), Sample(IMAGE, ""), Sample(IMAGE, "überprüfe – 42"),
               Sample(IMAGE, "what color is the left block?", question=True)]
    batch = encode_prompts(samples, processor)
    mask = mask_from_prompt(batch, samples, processor)
    assert mask.dtype == torch.bool and mask.shape == batch.input_ids.shape and not (mask & ~batch.attention_mask).any()
    for row, sample in zip(mask.tolist(), samples):
        kept = [r.kept for r in audit(sample, processor)]
        assert row == kept + [False] * (len(row) - len(kept))
    assert not mask[1].any() and mask[0].any() and mask[2].any()


def test_mask_of_a_training_batch_leaves_actions_and_eos_out(processor):  # noqa: F811
    samples = [Sample(IMAGE, "push the red block", ACTION), Sample(IMAGE, "reach", ACTION)]
    batch = encode_batch(samples, processor)
    mask = mask_from_prompt(batch, samples, processor)
    assert mask.any(1).all() and not (mask & (batch.labels != -100)).any()
    inside = mask_from_loss_mask(batch.labels != -100, batch.attention_mask)  # the user's formula keeps the template too
    assert (mask & ~inside).sum() == 0 and inside.sum() > mask.sum()


def test_mask_of_other_prompts_is_refused(processor):  # noqa: F811
    batch = encode_prompts([Sample(IMAGE, "push the red block")], processor)
    with pytest.raises(ValueError, match="row 0"):
        mask_from_prompt(batch, [Sample(IMAGE, "push the left block")], processor)
    with pytest.raises(ValueError, match="2 samples"):
        mask_from_prompt(batch, [Sample(IMAGE, "push")] * 2, processor)


def test_mask_from_loss_mask_formula():
    loss = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 0]]).bool()
    attention = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    assert mask_from_loss_mask(loss, attention).tolist() == [[True, True, False, False], [True, False, False, False]]
    with pytest.raises(ValueError, match="one shape"):
        mask_from_loss_mask(loss, attention[:, :3])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_masked_mean_against_a_loop(dtype):
    torch.manual_seed(0)
    hidden = torch.randn(4, 6, 5, dtype=torch.float64).to(dtype)
    mask = torch.rand(4, 6) < 0.5
    mask[2] = False
    hidden[~mask] = float("nan")  # what is dropped must never enter
    pooled, empty = masked_mean(hidden, mask)
    assert pooled.dtype == dtype and empty.tolist() == [False, False, True, False] and (pooled[2] == 0).all()
    for b in (0, 1, 3):
        wanted = torch.stack([hidden[b, t].double() for t in range(6) if mask[b, t]]).mean(0)
        assert torch.allclose(pooled[b].double(), wanted, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6)


def test_masked_mean_gradient_is_finite_and_checks_its_mask():
    hidden = torch.randn(2, 3, 4, requires_grad=True)
    masked_mean(hidden, torch.tensor([[True, False, True], [False] * 3]))[0].sum().backward()
    assert torch.isfinite(hidden.grad).all() and hidden.grad[1].eq(0).all() and hidden.grad[0, 0].eq(0.5).all()
    with pytest.raises(ValueError, match="must be bool"):
        masked_mean(hidden, torch.ones(2, 3))
