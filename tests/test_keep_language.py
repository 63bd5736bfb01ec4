"""examples/keep_language.py on a tiny model and made-up texts."""

import sys
from pathlib import Path

import torch
from test_protect import base_model

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import keep_language as example  # noqa: E402


def rows(count, length, seed):
    return torch.randint(3, 60, (count, length), generator=torch.Generator().manual_seed(seed)).tolist()


def test_the_example_runs_and_draws(tmp_path):
    pairs = list(zip(rows(8, 5, 1), rows(8, 3, 2)))
    data = {"train": pairs, "held": pairs[:2], "text": rows(6, 9, 3), "questions": list(zip(rows(6, 4, 4), rows(6, 2, 5))),
            "sciq": [[a, [b, b[:1]], 0] for a, b in pairs], "lambada": pairs}
    found = example.run(lambda: base_model().requires_grad_(False), data, [11], steps=6, items=4, probe_items=12)
    assert [row["arm"] for row in found] == ["base", "plain", "protected"] and 0 < found[1]["kl"]
    assert 0 < found[2]["kl"] <= example.ARMS["protected"]
    assert len(found[1]["losses"]) == 6 and found[1]["losses"][0] == found[2]["losses"][0]
    batch = example.batch_of([([4, 5], [6]), ([7], [8, 9, 10])])
    assert batch["labels"].tolist() == [[-100, -100, 6, -100], [-100, 8, 9, 10]] and batch["attention_mask"].tolist()[0] == [1, 1, 1, 0]
    fit, held = example.probe_texts(data, 12)
    assert sum(len(one["input_ids"]) for one in fit) == sum(len(one["input_ids"]) for one in held) == 6
    lines = example.table([*found, dict(found[1], seed=12, words=0.0)]).splitlines()
    assert len(lines) == 5 and "±" in lines[3] and "±" not in lines[2]
    example.figure(found, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
