"""examples/keep_language.py on a tiny model and made-up texts."""

import sys
from pathlib import Path

import pytest
import torch
from test_protect import base_model

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import keep_language as example  # noqa: E402


def rows(count, length, seed):
    return torch.randint(3, 60, (count, length), generator=torch.Generator().manual_seed(seed)).tolist()


PAIRS = list(zip(rows(8, 5, 1), rows(8, 3, 2)))
ANSWERS = [[5, 6], [9], [5, 7], [8]]


def frozen():
    return base_model().requires_grad_(False)


def test_the_example_runs_and_draws(tmp_path):
    data = {"train": PAIRS, "held": PAIRS[:2], "text": rows(6, 9, 3), "questions": list(zip(rows(6, 4, 4), rows(6, 2, 5))),
            "sciq": [[a, [b, b[:1]], 0] for a, b in PAIRS], "lambada": PAIRS, "sciq_text": rows(3, 9, 6), "lambada_text": rows(3, 9, 7)}
    found = list(example.run(frozen(), data, [11], steps=6, items=4, probe_items=12, layers=1, shape=dict(example.SHAPE, every=2)))
    assert [row["arm"] for row in found] == ["base", "plain", "protected"] and 0 < found[1]["kl"]
    assert 0 < found[2]["kl"] <= example.ARMS["protected"] and 0 < found[2]["other"]
    assert len(found[1]["losses"]) == 6 and found[1]["losses"][0] == found[2]["losses"][0]
    texts = example.prepare(frozen(), data, 1, 4, 12)
    assert len(texts["fit"]) == len(texts["sensor"]) == 6 and len(texts["questions"]) == 4
    lines = example.table([*found, dict(found[1], seed=12, kl=0.0)], 4).splitlines()
    assert len(lines) == 5 and lines[3].count("±") == 5 and lines[2].count("±") == lines[4].count("±") == 2
    example.figure(found, tmp_path / "figure.png", 4)
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_the_layers_above_go_on_where_those_below_ended():
    pairs = [([4, 5], [6]), ([7], [8, 9, 10])]
    texts = example.run_below(frozen(), pairs, 1)
    top = example.top_of(frozen(), 1)
    batch = example.batch_of(texts)
    assert batch["labels"].tolist() == [[-100, -100, 6, -100], [-100, 8, 9, 10]] and batch["attention_mask"].tolist()[0] == [1, 1, 1, 0]
    assert len(top.model.layers) == 1
    with torch.no_grad():
        whole = [frozen()(input_ids=torch.tensor([prompt + answer])).logits[0] for prompt, answer in pairs]
        for found, wanted in zip(example.logits(top, batch), whole):
            assert torch.allclose(found[:len(wanted)], wanted, atol=1e-4)
        found, following = example.at_answers(top, batch)
        assert torch.allclose(found, torch.cat([whole[0][1:2], whole[1][:3]]), atol=1e-4) and following.tolist() == [6, 8, 9, 10]


@pytest.mark.parametrize("context", rows(4, 6, 8))
def test_answers_that_share_a_row_are_scored_as_if_each_had_its_own(context):
    model = frozen()
    with torch.no_grad():
        alone = []
        for answer in ANSWERS:
            log_p = model(input_ids=torch.tensor([context + answer])).logits[0].log_softmax(-1)
            alone.append(sum(float(log_p[len(context) - 1 + i, token]) for i, token in enumerate(answer)))
    starts = example.by_beginning(ANSWERS)
    assert starts == {(5,): [(0, 6), (2, 7)], (): [(1, 9), (3, 8)]}
    texts = example.run_below(model, [(context, list(start)) for start in starts], 1)
    top, best = example.top_of(model, 1), alone.index(max(alone))
    assert [example.right_answer(top, texts, list(starts.values()), i) for i in range(4)] == [i == best for i in range(4)]


def test_intervals_are_over_seeds_and_questions():
    mean, half = example.interval([0.2, 0.4, 0.6])
    assert mean == pytest.approx(0.4) and half == pytest.approx(4.30 * 0.2 / 3 ** 0.5)
    assert example.interval([0.4], 96) == (0.4, pytest.approx(1.96 * (0.4 * 0.6 / 96) ** 0.5))
    assert example.interval([0.2, 0.4, 0.6], 96)[1] == pytest.approx((half ** 2 + 1.96 ** 2 * 0.24 / 96) ** 0.5)
    assert example.spread([0.4]) == "0.400" and example.spread([0.2, 0.4, 0.6]) == "0.400 ±0.497"
