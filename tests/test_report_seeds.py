"""The report over training seeds: runs of one arm are one value each, with Student's t, and a report of single seeds is what it was."""

import csv
import json

import numpy as np
import pytest
import yaml
from test_report import compare, make, write_eval, write_run

from vlakeep.report import build_report
from vlakeep.reporting import seeds
from vlakeep.reporting.intervals import t_interval, t_quantile


def seeded(root, rates, name="study/{}-s{}", loss=None):
    """Arms with one run per seed: arm -> new-skill rate of each; `loss(arm, seed)` of the old abilities. Seeds count from 3."""
    write_eval(root / "eval" / "base", "base", 0.04, 0.0)
    arms = {"base": {"eval": root / "eval" / "base", "run": None, "name": "base"}}
    for arm, news in rates.items():
        for seed, new in enumerate(news, 3):
            run = name.format(arm, seed)
            write_eval(root / "eval" / run, run, new, loss(arm, seed) if loss else 0.1)
            write_run(root / "runs" / run, arm)
            path = root / "runs" / run / "config.yaml"
            path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "name": run, "seed": seed}))
            arms[run] = {"eval": root / "eval" / run, "run": root / "runs" / run, "name": run}
    return arms


def test_t_quantiles_are_those_of_the_tables():
    """Abramowitz and Stegun, table 26.10."""
    for freedom, value in ((1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (10, 2.228), (30, 2.042), (120, 1.980)):
        assert t_quantile(freedom) == pytest.approx(value, abs=6e-4)
    assert t_quantile(4, 0.99) == pytest.approx(4.604, abs=6e-4) and t_quantile(10**4) == pytest.approx(1.9602, abs=1e-3)
    assert t_interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), abs=1e-3)
    with pytest.raises(ValueError):
        t_quantile(0)


def test_t_intervals_hold_what_they_promise():
    rng = np.random.default_rng(0)
    hits = [low <= 5.0 <= high for _, low, high in (t_interval(list(rng.normal(5.0, 2.0, 3))) for _ in range(2000))]
    assert 0.935 <= np.mean(hits) <= 0.965


def test_seeds_of_an_arm_are_one_arm_with_an_interval_over_seeds(tmp_path, one_figure):
    rates = {"baseline": [0.30, 0.42, 0.36], "method": [0.31, 0.40, 0.37]}
    arms = seeded(tmp_path, rates, loss=lambda arm, seed: 0.01 * seed + (0.12 if arm == "baseline" else 0.0))
    comparison = compare(arms)
    baseline, method = seeds.families(comparison)
    assert [f.name for f in (baseline, method)] == ["study/baseline", "study/method"] and list(method.runs) == [3, 4, 5]
    assert baseline.label == "Plain LoRA" and seeds.mixed(method) == []
    for key in ("new", "mean", "kl", "skill:reach"):
        values = [comparison.value(arm, key).mean for arm in method.runs.values()]
        found = seeds.family_value(comparison, method, key)
        assert (found.mean, found.n) == (pytest.approx(np.mean(values)), 3)
        assert found.high - found.mean == pytest.approx(4.30265 * np.std(values, ddof=1) / 3**0.5, rel=1e-4)
        pairs = [comparison.value(method.runs[s], key).mean - comparison.value(baseline.runs[s], key).mean for s in (3, 4, 5)]
        d = seeds.family_difference(comparison, method, baseline, key)
        assert d.mean == pytest.approx(np.mean(pairs)) and d.pairs == 3
        assert d.mean - d.low == pytest.approx(4.30265 * np.std(pairs, ddof=1) / 3**0.5, rel=1e-4)
    assert seeds.family_difference(comparison, method, baseline, "mean").verdict == "better"
    assert seeds.family_difference(comparison, method, None, "new").mean == pytest.approx(
        seeds.family_value(comparison, method, "new").mean - comparison.value(comparison.arms["base"], "new").mean)
    page = build_report(tmp_path, arms, tmp_path / "out")
    text = page.read_text(encoding="utf-8")
    assert "Over seeds" in text and "Method (residual) (3 seeds)" in text and "study/method-s4" in text
    table = list(csv.DictReader((tmp_path / "out" / "tables" / "seeds.csv").open()))
    row, = (row for row in table if row["measure"] == "mean" and row["arm"] == "study/method")
    assert (row["seeds"], row["n"], row["vs_baseline"], row["pairs_baseline"]) == ("3 4 5", "3", "better", "3")
    entry = json.loads((tmp_path / "out" / "summary.json").read_text())["seeds"]["study/method"]
    assert entry["runs"] == [f"study/method-s{s}" for s in (3, 4, 5)] and entry["measures"]["new"]["low"] < entry["measures"]["new"]["mean"]


def test_runs_of_one_configuration_are_seeds_of_an_arm_whatever_they_are_called(tmp_path):
    arms = seeded(tmp_path, {"baseline": [0.3, 0.4], "method": [0.3, 0.4]}, name="{}{}")
    found = seeds.families(compare(arms))
    assert [(f.name, list(f.runs)) for f in found] == [("baseline3", [3, 4]), ("method3", [3, 4])]
    path = tmp_path / "runs" / "method4" / "config.yaml"
    config = yaml.safe_load(path.read_text())
    config["train"]["lr"] = 1.0
    path.write_text(yaml.safe_dump(config))
    assert [f.name for f in seeds.families(compare(arms))] == ["baseline3"]
    arms["closed"] = dict(arms["baseline3"], name="closed")  # as a run of another seed, but closed
    place = tmp_path / "runs" / "closed"
    write_run(place, "baseline")
    (place / "config.yaml").write_text(yaml.safe_dump({**yaml.safe_load((tmp_path / "runs" / "baseline3" / "config.yaml").read_text()),
                                                       "seed": 9}))
    arms["closed"]["run"] = place
    assert [list(f.runs) for f in seeds.families(compare(arms))] == [[3, 4, 9]]
    (place / "closing.json").write_text(json.dumps({"run": "baseline9", "budget": 0.002}))
    assert [list(f.runs) for f in seeds.families(compare(arms))] == [[3, 4]]
    named = seeded(tmp_path, {"method": [0.3, 0.4]})
    path = tmp_path / "runs" / "study" / "method-s4" / "config.yaml"
    path.write_text(yaml.safe_dump({**config, "name": "study/method-s4"}))
    family, = seeds.families(compare(named))
    for seed in (3, 4):
        family.runs[seed].config = {**family.runs[3].config, "train": {**config["train"], "from_run": f"study/first-s{seed}"}}
    assert seeds.mixed(family) == []
    family, = seeds.families(compare(named))
    assert "more than their seed" in seeds.mixed(family)[0]


def test_seeds_without_a_partner_are_left_out_of_a_difference(tmp_path):
    comparison = compare(seeded(tmp_path, {"baseline": [0.3, 0.4, 0.35], "method": [0.3, 0.4]}))
    baseline, method = seeds.families(comparison)
    assert seeds.family_difference(comparison, method, baseline, "new").pairs == 2
    del method.runs[4]
    assert seeds.family_difference(comparison, method, baseline, "new").verdict == "absent"
    assert seeds.family_value(comparison, method, "new") is None


def test_a_report_of_single_seeds_is_what_it_was(tmp_path, one_figure):
    arms = make(tmp_path)
    page = build_report(tmp_path, arms, tmp_path / "out")
    assert seeds.families(compare(arms)) == [] and "Over seeds" not in page.read_text(encoding="utf-8")
    assert "seeds" not in json.loads((tmp_path / "out" / "summary.json").read_text())
    assert not list((tmp_path / "out").rglob("seeds.*"))
