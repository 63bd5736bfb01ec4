"""The language model's side of studies/language_model.py, on a tiny random Llama."""

import sys
from pathlib import Path

import pytest
import torch

from vlakeep.core.compat import import_timm
from vlakeep.methods.baseline import Baseline

sys.path.insert(0, str(Path(__file__).parents[1] / "studies"))
import language_data  # noqa: E402
import language_model as lm  # noqa: E402

ALSO = ["--train.steps", "4", "--train.batch_size", "4", "--train.log_every", "1", "--thermostat.every", "2", "--probe.size", "10"]


def rows(count, length, seed):
    return torch.randint(3, 60, (count, length), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture()
def bench():
    import_timm()
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=64, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3,
                         num_key_value_heads=1, head_dim=8, tie_word_embeddings=True)
    bench = object.__new__(lm.Bench)
    bench.model = lm.LanguageModel(LlamaForCausalLM(config).eval().requires_grad_(False))
    pairs = list(zip(rows(12, 5, 1), rows(12, 3, 2)))
    bench.data = {"train": pairs[:8], "held": pairs[8:], "text": rows(10, 9, 3), "questions": list(zip(rows(8, 4, 4), rows(8, 2, 5))),
                  "sciq": [[a, [b, b[:1]], 0] for a, b in pairs], "lambada": pairs, "sciq_text": rows(3, 9, 6),
                  "lambada_text": rows(3, 9, 7)}
    asked = lm.questions_of(pairs[:4])
    bench.also, bench.items, bench._sciq_own, bench._probes = ALSO, 8, (asked, asked.answered(bench.model)), {}
    return bench


def job(arm, args, **more):
    return {"arm": arm, "seed": 11, "probe": lm.BOTH, "distil": 0.0, "args": args, **more}


def test_the_layers_are_those_of_the_model_and_padding_is_not_seen(bench):
    short, long = rows(1, 6, 8)[0], rows(1, 11, 9)[0]
    batch = lm.batch_of([short, long], [1, 1])
    model = bench.model
    hidden_BLD = model.run_layers(model.embed(batch), stop=model.num_layers)
    ours_BLV = model.logits(model.norm(hidden_BLD))
    for number, row in enumerate((short, long)):
        theirs_LV = model.network(torch.tensor([row])).logits[0]
        assert torch.allclose(ours_BLV[number, :len(row)], theirs_LV, atol=1e-5)


def test_every_arm_runs_and_leaves_the_model_as_it_was(bench):
    before = {name: value.clone() for name, value in bench.model.network.state_dict().items()}
    found = {one["arm"]: bench.run_job(one) for one in lm.make_jobs("main") if one["seed"] == 11}
    assert len(found) == 1 + len(lm.ARMS) and found["base"]["kl_text"] == 0
    assert all(len(row["losses"]) == 4 and row["kl_text"] != 0 for arm, row in found.items() if arm != "base")
    assert found["set-point .05, text"]["settled_kl"] <= 0.05 and "settled_kl" not in found["plain 1e-3"]
    after = bench.model.network.state_dict()
    assert set(before) == set(after) and all(torch.equal(before[name], after[name]) for name in before)
    assert all(-1e-6 <= row["kl_kept_sciq_text"] <= row["kl_sciq_text"] + 1e-6 for row in found.values())
    lines = lm.table(list(found.values()))
    assert all(f"| {arm} | 1 |" in lines for arm in lm.ARMS)


def test_gains_that_are_off_are_plain_lora_to_the_bit(bench, monkeypatch):
    ways = {one["arm"]: bench.run_job(one) for one in lm.make_jobs("check")}
    monkeypatch.setattr(lm, "make_method", lambda *given: Baseline())
    ways["baseline"] = bench.run_job(job("baseline", lm.OFF))
    names = [name for name in ways["plain"] if name.startswith(("kl_", "held", "loss", "perplexity"))]
    assert len(names) > 6
    for way, row in ways.items():
        assert [row[name] for name in names] == [ways["baseline"][name] for name in names], way


def test_distillation_acts_beside_gains(bench):
    """An arm that names both is neither alone."""
    ways = {distil: [bench.run_job(job("one", [*args, "--train.lr", "0.1"], distil=distil))["loss"] for args in (lm.OFF, lm.OPEN)]
            for distil in (0.0, 1.0)}
    assert len({loss for losses in ways.values() for loss in losses}) == 4


def test_the_records_are_of_the_arms_that_there_are_and_make_a_table(monkeypatch, capsys):
    file = Path(lm.__file__).parent / "records" / "language_model.jsonl.xz"
    told = {lm.key(row): row for row in map(lm.json.loads, lm.lines_of(file))}
    jobs = {lm.key(one): one for one in lm.make_jobs("main")}
    assert told.keys() <= jobs.keys() and {arm for arm, _ in told} == {"base", *lm.ARMS}
    assert all(row[name] == jobs[key][name] for key, row in told.items() for name in ("probe", "distil", "args"))
    monkeypatch.setattr(sys, "argv", ["x", "--table", str(file)])
    assert lm.main() == 0 and "| distillation 4, text+questions | 1 |" in capsys.readouterr().out


def test_a_run_can_be_repeated(bench):
    one = job("set-point", ["--thermostat.target", "0.01"])
    first, second = bench.run_job(one), bench.run_job(one)
    assert first["losses"] == second["losses"] and first["trace"] == second["trace"]


def test_runs_that_are_there_are_left_out(bench, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(lm, "Bench", lambda *given: bench)
    monkeypatch.setattr(bench, "run_job", lambda one: made.append(one["arm"]) or dict(one), raising=False)
    jobs, out = tmp_path / "jobs.json", tmp_path / "part0.jsonl"
    jobs.write_text(lm.json.dumps([job(str(number), []) for number in range(5)]))
    out.write_text(lm.json.dumps(job("2", [])) + "\n" + lm.json.dumps(dict(job("4", []), error="memory")) + "\n")
    for part in (0, 1):
        monkeypatch.setattr(sys, "argv", ["x", str(jobs), str(tmp_path / f"part{part}.jsonl"), "--part", str(part), "--parts", "2"])
        assert lm.main() == 0
    assert made == ["0", "4", "1", "3"]


def test_blocks_of_weights():
    """Against the definition, one weight at a time."""
    pairs = torch.arange(16, dtype=torch.uint8) * 15 + 3
    head = torch.tensor([0.5, -2.0], dtype=torch.float16).view(torch.uint8)
    found = language_data.unpack(torch.cat([head, pairs]), "Q4_1", [4, 8]).flatten()
    values = [byte & 15 for byte in pairs.tolist()] + [byte >> 4 for byte in pairs.tolist()]
    assert found.tolist() == [0.5 * value - 2.0 for value in values]
    whole = torch.arange(-16, 16, dtype=torch.int8)
    found = language_data.unpack(torch.cat([head[:2], whole.view(torch.uint8)]), "Q8_0", [32])
    assert found.tolist() == [0.5 * value for value in whole.tolist()]
