"""The report: numbers equal the inputs, harm is said in words, what cannot be compared is not compared, the page stands alone."""

import csv
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml
from conftest import read_evaluation, wilson_by_roots

from vlakeep.benchmarks.records import wilson
from vlakeep.core.config import Config, ConfigError, to_dict
from vlakeep.core.storage import Storage
from vlakeep.report import arms_from_runs, build_report, main
from vlakeep.reporting import words
from vlakeep.reporting.arms import Arm, load_arms
from vlakeep.reporting.compare import Comparison, confounds, pair
from vlakeep.reporting.figures import figures, render, together
from vlakeep.reporting.intervals import mean_of, newcombe, paired_mean
from vlakeep.reporting.provenance import reproduce
from vlakeep.reporting.tables import differences_html

SKILLS = {"reach": 0.64, "push_left": 0.8, "touch_colour": 0.72}
QUESTIONS = {"colour": 0.97, "count": 0.93, "left_or_right": 0.95, "exists": 0.98, "shape": 0.96}
# arm -> (new-skill rate, what the old abilities lose)
RATES = {"base": (0.04, 0.0), "baseline": (0.36, 0.12), "method": (0.33, 0.11), "method_lora_input": (0.35, 0.01)}


def write_eval(folder, name, new, loss, trials=100, seed=1000, crashes=0, kl=0.3, like=None):
    """eval/<name>/ as evaluate writes it; trial i has the same difficulty in every arm, so that pairing matters."""
    rows, summary = [], {"target": name, "abilities": {}, "drift": 0.0 if name == "base" else 3.0 * loss + 0.2, "seconds": 60.0}
    entries = [("skill", "corner", new)] + [("skill", k, v - 1.2 * loss) for k, v in SKILLS.items()]
    entries += [("question", k, v - loss) for k, v in QUESTIONS.items()]
    for index, (kind, ability, rate) in enumerate(entries):
        luck = np.random.default_rng(index).random(trials)
        own = np.random.default_rng([index, *(like or name).encode()])
        success = [bool(x < rate) for x in np.where(own.random(trials) < 0.85, luck, own.random(trials))]
        crashed = [kind == "skill" and i < crashes for i in range(trials)]
        rows += [
            {
                "kind": kind,
                "ability": ability,
                "trial": i,
                "seed": seed + i,
                "success": None if c else s,
                "value": None,
                "crash": "ValueError: simulator" if c else None,
                "steps": 40,
            }
            for i, (s, c) in enumerate(zip(success, crashed))
        ]
        done = [s for s, c in zip(success, crashed) if not c]
        mean, low, high = wilson(sum(done), len(done)) if done else (0.0, 0.0, 1.0)
        value = {"mean": mean, "low": low, "high": high, "n": len(done), "crashes": sum(crashed)}
        if ability == "corner":
            summary["new_skill"] = dict(value, name=ability)
        else:
            summary["abilities"][ability] = dict(value, group=kind)
    summary["retention_kl"] = {"mean": None, "low": None, "high": None, "n": 0}
    if name != "base":
        values = np.random.default_rng(3).gamma(2.0, (kl + loss) / 2, 200)
        rows += [
            {
                "kind": "retention",
                "ability": "action_kl",
                "trial": i,
                "seed": seed,
                "success": None,
                "value": float(v),
                "crash": None,
                "steps": 0,
            }
            for i, v in enumerate(values)
        ]
        half = 1.96 * values.std(ddof=1) / 200**0.5
        summary["retention_kl"] = {"mean": values.mean(), "low": values.mean() - half, "high": values.mean() + half, "n": 200}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [{"header": {"base": "b1"}}, *rows]))
    (folder / "summary.json").write_text(json.dumps(summary))
    return summary


def write_run(folder, name, steps=600, status="finished", trace=None, change=None):
    """runs/<name>/ as train writes it."""
    rng = np.random.default_rng(len(name))
    method = name.startswith("method")
    config = to_dict(Config(name=name, method="icsm_hsw_thermostat" if method else "baseline"))
    config["hsw"]["site"] = "lora_input" if name.endswith("input") else "residual"
    for key, value in (change or {}).items():
        section, leaf = key.split(".")
        config[section][leaf] = value
    floor, gamma, beta, ema = (0.0 if name.endswith("input") else 0.5), 1.0, 1.0, 1.0
    rows = []
    for step in range(1, steps + 1):
        norm = float(2.5 * np.exp(-step / 150) + 0.6 + 0.3 * rng.random())
        row = {
            "step": step,
            "loss": float(0.9 + 2.6 * np.exp(-step / 90) + 0.12 * rng.standard_normal()),
            "accuracy": 0.5,
            "lr": 5e-4,
            "grad_norm": norm,
            "grad_norm_clipped": min(norm, 1.0),
            "seconds": 0.3 * step,
        }
        if method:
            row.update(
                beta=beta,
                gamma=gamma,
                g_norm=norm,
                g_prime_norm=norm * (0.6 + 0.4 * gamma),
                share_f=0.3 + 0.05 * rng.random(),
                share_p=0.2,
                shed=0.1,
            )
            if step % 20 == 0:
                d = float(1 + 0.06 * rng.standard_normal() + (2.2 if floor else 0.7) * (1 - np.exp(-max(0, step - 90) / 150)))
                ema = 0.5 * d + 0.5 * ema
                row.update(d=d, d_ema=ema, calibrating=float(step <= 100), leak=0.25 * gamma)
                if step >= 100:
                    row["threshold"] = 1.12
                    excess = max(0.0, ema / 1.12 - 1)
                    gamma, beta = 1 - (1 - floor) * excess / (excess + 0.5), 1 - 0.5 * excess / (excess + 0.5)
        if step in (7, 8):
            row.update(loss=None, nonfinite=["loss"])
        rows.append(row)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    session = {
        "status": status,
        "start": "2026-11-22 10:00:00",
        "end": "2026-11-22 10:03:00",
        "argv": ["/usr/bin/vlakeep", "train", "--name", name],
        "source": {"commit": "5d41402abc4b2a76b9719d911017c592aabbccdd", "dirty": name == "method", "untracked": []},
        "versions": {"python": "3.11.7", "torch": "2.13.0+cpu", "transformers": "5.23.0", "peft": "0.21.2"},
        "hardware": {"cpu": "AMD EPYC 9654 96-Core Processor", "cores": 2, "memory": 24 << 30, "gpus": []},
        "world": 1,
        "threads": 2,
        "hashes": {"base_weights": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"},
        "traceback": trace,
    }
    (folder / "provenance.json").write_text(
        json.dumps({"name": name, "method": config["method"], "seed": 7, "status": status, "sessions": [session]})
    )


def make(root, rates=RATES, evals=None, runs=None):
    """A storage root with these arms; `evals` and `runs`: arm -> keyword arguments that differ. Returns the arms dict."""
    arms = {}
    for name, (new, loss) in rates.items():
        write_eval(root / "eval" / name, name, new, loss, **(evals or {}).get(name, {}))
        if name != "base":
            write_run(root / "runs" / name, name, **(runs or {}).get(name, {}))
        arms[name] = {"eval": root / "eval" / name, "run": None if name == "base" else root / "runs" / name}
    return arms


def compare(arms):
    return Comparison(load_arms(arms), wilson)


def said(comparison, name):
    return " ".join(finding.text for finding in words.findings(comparison, comparison.arms[name]))


@pytest.fixture
def on_the_page(monkeypatch):
    """Figures are drawn for the page, wide and narrow, and not once more for two files each."""
    monkeypatch.setattr("vlakeep.report.save_files", lambda figure, folder: [])


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """One full report: (arms, folder, page)."""
    root = tmp_path_factory.mktemp("report")
    arms = make(root, evals={"method": {"crashes": 3}})
    path = build_report(root, arms, root / "report", seconds=123.0)
    return arms, path.parent, path.read_text(encoding="utf-8")


class Page(HTMLParser):
    """Tags with their attributes, the open tags around each, and the text of table rows."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.rows = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs), list(self.open)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")
        if tag not in ("meta", "link", "br"):
            self.open.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        while self.open and self.open.pop()[0] != tag:
            pass

    def handle_data(self, data):
        if self.rows and self.rows[-1] and any(tag in ("td", "th") for tag, _ in self.open):
            self.rows[-1][-1] += data


def test_summary_has_the_binding_schema_and_the_numbers_of_the_evaluations(report):
    arms, folder, _ = report
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["seconds"] == 123.0 and list(summary["arms"]) == list(RATES)
    for name, entry in summary["arms"].items():
        source = json.loads((arms[name]["eval"] / "summary.json").read_text())
        assert set(entry) == {"new_skill", "abilities", "drift", "train_seconds"}
        assert entry["new_skill"] == {key: source["new_skill"][key] for key in ("mean", "low", "high")}
        assert entry["abilities"] == {a: {key: v[key] for key in ("mean", "low", "high")} for a, v in source["abilities"].items()}
        assert entry["drift"] == source["drift"]
        assert entry["train_seconds"] == (0.0 if name == "base" else pytest.approx(0.3 * 600))


def test_tables_show_the_numbers_of_the_summary(report):
    arms, folder, text = report
    rows = {row[0]: row for row in Page(text).rows if row}
    table = list(csv.DictReader((folder / "tables" / "comparison.csv").open()))
    for column, name in enumerate(arms):
        source = json.loads((arms[name]["eval"] / "summary.json").read_text())
        for ability, value in source["abilities"].items():
            label = ability.replace("_", " ")
            row = next(r for r in Page(text).rows if r and r[0] == label + "%")
            assert row[1 + column].startswith(f"{100 * value['mean']:.1f}[{100 * value['low']:.1f}, {100 * value['high']:.1f}]")
            assert row[1 + len(arms) + column] == str(value["crashes"])
            line = next(r for r in table if r["arm"] == name and r["label"] == label)
            assert float(line["mean"]) == value["mean"] and int(line["crashes"]) == value["crashes"]
    assert rows["Training times"]  # the label and its unit
    markdown = (folder / "tables" / "comparison.md").read_text().splitlines()
    assert len({line.count("|") for line in markdown}) == 1 and "crashes: Plain LoRA" in markdown[0]


def test_page_stands_alone_and_cannot_overflow(report):
    _, folder, text = report
    found = Page(text)
    assert not re.search(r"https?://|//cdn|@import|<script|<iframe|<img", text)
    for tag, attrs, around in found.tags:
        for key in ("href", "src", "xlink:href"):
            assert attrs.get(key, "#").startswith(("#", "data:")), (tag, attrs)
        if tag == "table":
            assert around[-1][1].get("class") == "scroll"
        if tag == "svg":
            assert "viewbox" in attrs and "width" not in attrs and "height" not in attrs
    ids = [attrs["id"] for _, attrs, _ in found.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert all(target in ids for target in re.findall(r'(?:href="|url\()#([^")]+)', text))
    assert any(attrs.get("name") == "viewport" for tag, attrs, _ in found.tags if tag == "meta")
    files = {path.name for path in (folder / "figures").iterdir()}
    names = {"success_retention", "forgetting", "loss", "drift", "gains", "surgery_norms", "clip_norms", "leak"}
    assert files == {f"{name}.{kind}" for name in names for kind in ("png", "svg")}
    assert all((folder / "figures" / f"{name}.png").read_bytes()[:4] == b"\x89PNG" for name in names)


def test_the_page_says_what_happened(report):
    _, _, text = report
    headline = re.search(r"<h1>(.*?)</h1>", text)[1]
    assert "Method (LoRA input) keeps more of the old abilities than plain LoRA at matched success" in headline
    assert "Method (residual) is within noise of plain LoRA" in headline
    assert 'lang="zh-CN"' in text and "有明确遗忘" in text and "旧能力保留更多" in text
    assert "with uncommitted changes" in text and "9f86d081884c" in text and "vlakeep train --name method_lora_input" in text
    assert "Not finite: loss on 2 logged steps" in text


def test_harm_is_said_in_words(tmp_path):
    rates = dict(RATES, method=(0.06, 0.10), method_lora_input=(0.36, 0.33))
    comparison = compare(make(tmp_path, rates))
    lower = said(comparison, "method")
    assert {o.arm.name: (o.success, o.verdict) for o in words.outcomes(comparison)}["method"] == ("lower", "harms")
    assert "Harm: new-skill success is below Plain LoRA beyond the interval" in lower and "not matched" in lower
    forgot = said(comparison, "method_lora_input")
    assert "Harm: mean old ability is below Plain LoRA beyond the interval" in forgot and "matched success" in forgot
    assert re.search(r"Harm, worse than Plain LoRA beyond the interval: .*colour", forgot)
    assert "worse than plain LoRA" in words.headline(comparison) and "比普通 LoRA 更差" in words.summary_zh(comparison)


def test_less_forgetting_by_less_learning_is_not_a_win(tmp_path):
    comparison = compare(make(tmp_path, dict(RATES, method=(0.05, 0.0))))
    assert {o.arm.name: o.verdict for o in words.outcomes(comparison)} == {"method": "trades", "method_lora_input": "wins"}
    assert "success not matched" in differences_html(comparison)
    assert "but learns less" in words.headline(comparison) and "but not at matched success" in said(comparison, "method")


def test_a_few_episodes_match_nothing(tmp_path):
    """Two episodes are within noise of any others; that is no matched success."""
    comparison = compare(make(tmp_path))
    for name in ("baseline", "method_lora_input"):
        trials = next(found for (kind, _), found in comparison.arms[name].trials.items() if kind == "skill")
        for trial in sorted(trials)[2:]:
            del trials[trial]
    found = {o.arm.name: o for o in words.outcomes(comparison)}["method_lora_input"]
    assert (found.success, found.verdict) == ("unclear", "unclear") and found.new.low < -0.2
    assert "too few episodes" in words.headline(comparison) and "success may not match" in differences_html(comparison)
    text = said(comparison, "method_lora_input")
    assert "which is no match" in text and "not known whether at matched success" in text and "回合太少" in words.summary_zh(comparison)


def test_equal_arms_are_within_noise(tmp_path):
    rates = {"base": RATES["base"], "baseline": RATES["baseline"], "method": RATES["baseline"]}
    comparison = compare(make(tmp_path, rates, evals={"method": {"like": "baseline"}}))
    assert {o.verdict for o in words.outcomes(comparison)} == {"ties"}
    assert "Harm" not in said(comparison, "method") and "Within noise:" in said(comparison, "method")


def test_other_trials_are_not_paired(tmp_path):
    comparison = compare(make(tmp_path, evals={"method": {"seed": 5000}}))
    d = comparison.difference(comparison.arms["method"], comparison.arms["baseline"], "question:colour")
    assert d.verdict == "unpaired" and "different trials" in d.note and d.low is None
    assert comparison.difference(comparison.arms["method"], comparison.arms["base"], "mean").verdict == "unpaired"
    assert "different trials" in said(comparison, "method") and "could not be compared" in words.headline(comparison)
    fewer = compare(make(tmp_path / "b", evals={"method": {"trials": 40}}))
    assert fewer.difference(fewer.arms["method"], fewer.arms["baseline"], "new").verdict == "unpaired"


def test_crashes_are_neither_success_nor_failure(tmp_path):
    comparison = compare(make(tmp_path, evals={"method": {"crashes": 10}}))
    arm = comparison.arms["method"]
    assert comparison.value(arm, "new").n == 90 and comparison.crashes(arm, "new") == 10
    d = comparison.difference(arm, comparison.arms["baseline"], "new")
    assert (d.pairs, d.dropped) == (90, 10)


def test_failed_run_is_shown_as_failed(tmp_path, on_the_page):
    trace = "Traceback (most recent call last):\n  ...\nTrainingStopped: hidden states blew up: mean norm 1e+09 at step 60"
    arms = make(tmp_path, runs={"method": {"steps": 60, "status": "failed", "trace": trace}})
    (tmp_path / "eval" / "method" / "summary.json").unlink()
    text = build_report(tmp_path, arms, tmp_path / "report").read_text(encoding="utf-8")
    assert "did not finish training" in text and "hidden states blew up" in text and ">failed</span>" in text
    entry = json.loads((tmp_path / "report" / "summary.json").read_text())["arms"]["method"]
    assert entry["new_skill"] == {"mean": None, "low": None, "high": None} and entry["abilities"] == {}


def test_missing_inputs_are_named_all_at_once_with_their_commands(tmp_path):
    arms = make(tmp_path)
    (tmp_path / "eval" / "base" / "summary.json").unlink()
    for file in (tmp_path / "runs" / "method").iterdir():
        file.unlink()
    with pytest.raises(FileNotFoundError) as error:
        build_report(tmp_path, arms, tmp_path / "report")
    assert "vlakeep evaluate --config" in str(error.value) and "--evaluate.target base" in str(error.value)
    assert "vlakeep train --config configs/method_icsm_hsw_thermostat.yaml --name method`" in str(error.value)
    assert not (tmp_path / "report").exists()
    with pytest.raises(ValueError, match="at least one arm"):
        load_arms({})


def test_damaged_and_empty_inputs(tmp_path, on_the_page):
    arms = make(tmp_path, evals={"method": {"trials": 0}})
    with (tmp_path / "runs" / "baseline" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 601, "lo')
    (tmp_path / "runs" / "method_lora_input" / "metrics.jsonl").write_text("")
    comparison = compare(arms)
    assert comparison.value(comparison.arms["method"], "new") is None and comparison.arms["baseline"].last_step == 600
    assert "unfinished" in said(comparison, "baseline") and "logged no step" in said(comparison, "method_lora_input")
    build_report(None, arms, tmp_path / "report")
    text = (tmp_path / "runs" / "baseline" / "metrics.jsonl").read_text().replace('"step": 3,', '"step" 3,')
    (tmp_path / "runs" / "baseline" / "metrics.jsonl").write_text(text)
    with pytest.raises(ValueError, match="line 3 is not valid JSON"):
        load_arms(arms)


def test_stale_summary_and_confounded_arms_are_noted(tmp_path):
    arms = make(tmp_path, runs={"method": {"change": {"train.lr": 1e-4, "thermostat.every": 10}}})
    path = tmp_path / "eval" / "baseline" / "summary.json"
    summary = json.loads(path.read_text())
    summary["abilities"]["colour"]["mean"] = 0.5
    path.write_text(json.dumps(summary))
    comparison = compare(arms)
    assert "disagree on colour" in said(comparison, "baseline")
    assert len(comparison.warnings) == 1 and "train.lr (0.0001 against 0.0005)" in comparison.warnings[0]


def test_what_makes_an_arm_is_no_confound():
    config = to_dict(Config())
    plain = Arm("baseline", None, config=config)
    for section, key, value, said in (("gains", "scale", 30.0, False), ("export", "parity_frames", 1, False), ("train", "lr", 1.0, True)):
        other = Arm("graded", None, config={**config, section: {**config[section], key: value}})
        assert bool(confounds({"baseline": plain, "graded": other})) == said, key


def test_only_one_arm_and_gains_that_never_moved(tmp_path, on_the_page):
    arms = make(tmp_path, {"method": RATES["method"]})
    path = tmp_path / "runs" / "method" / "metrics.jsonl"
    rows = [dict(json.loads(line), gamma=1.0, beta=1.0) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    comparison = compare(arms)
    assert "The gains stayed at 1 throughout" in said(comparison, "method")
    assert "nothing to compare" in build_report(None, arms, tmp_path / "report").read_text(encoding="utf-8")


def test_a_run_is_labelled_by_the_site_that_it_used():
    arms = [Arm(name, None, config={"hsw": {"site": site}}) for name, site in
            (("method", "lora_input"), ("method", "both"), ("method", "residual"), ("mine", "lora_input"))]
    assert [arm.label for arm in arms] == ["Method (LoRA input)", "Method (both sites)", "Method (residual)", "mine"]
    assert Arm("method", None).label == "Method (residual)" and "LoRA" in arms[0].label_zh


def test_resumed_runs_add_up_their_time(tmp_path):
    arms = make(tmp_path, {"baseline": RATES["baseline"]})
    rows = [{"step": s, "loss": 1.0, "seconds": t} for s, t in ((1, 2.0), (2, 4.0), (3, 1.5), (4, 3.0))]
    (tmp_path / "runs" / "baseline" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert load_arms(arms)["baseline"].train_seconds == 7.0


def test_newcombe_matches_the_paper_and_covers():
    # Newcombe 1998, table II, method 10, the column of counts 36, 12, 2, 0
    assert newcombe(36, 12, 2, 0, wilson) == pytest.approx((0.2, 0.0569, 0.3404), abs=2e-4)
    # By hand where success goes together: the correlation is (20 22 - 5 3 - 50 / 2) / sqrt(25 25 23 27).
    (p, low, high), (q, lower, higher), phi = wilson(25, 50), wilson(23, 50), 400 / (25 * 25 * 23 * 27) ** 0.5
    down = ((p - low) ** 2 - 2 * phi * (p - low) * (higher - q) + (higher - q) ** 2) ** 0.5
    up = ((high - p) ** 2 - 2 * phi * (high - p) * (q - lower) + (q - lower) ** 2) ** 0.5
    assert newcombe(20, 5, 3, 22, wilson) == pytest.approx((0.04, 0.04 - down, 0.04 + up), abs=1e-9)
    assert newcombe(0, 1, 0, 29, wilson)[0] == pytest.approx(1 / 30)
    same = newcombe(50, 0, 0, 0, wilson)
    assert same[0] == 0 and same[1] < -0.03 and same[2] > 0.03  # agreement on few trials is not certainty
    rng, hit = np.random.default_rng(0), 0
    for _ in range(400):
        luck = rng.random(80)
        one, two = luck + 0.3 * rng.random(80) < 0.8, luck + 0.3 * rng.random(80) < 0.7
        _, low, high = newcombe((one & two).sum(), (one & ~two).sum(), (~one & two).sum(), (~one & ~two).sum(), wilson)
        hit += low <= 0.1 <= high  # P(one) - P(two) = 0.1 exactly, away from the edges of luck
    assert 0.92 <= hit / 400 <= 0.99


def test_other_intervals():
    assert mean_of([(0.5, 0.4, 0.6), (0.7, 0.6, 0.8)]) == pytest.approx((0.6, 0.6 - 0.05 * 2**0.5, 0.6 + 0.05 * 2**0.5))
    assert mean_of([]) is None
    values = [0.1, 0.2, 0.3, 0.2]
    half = 1.959964 * np.std(values, ddof=1) / 2
    assert paired_mean(values) == pytest.approx((0.2, 0.2 - half, 0.2 + half))
    assert paired_mean([1.0])[1:] == (-float("inf"), float("inf"))
    for bad in (lambda: newcombe(0, 0, 0, 0, wilson), lambda: paired_mean([])):
        with pytest.raises(ValueError):
            bad()
    assert pair({(0, 1): 1.0}, {(0, 2): 1.0})[2].startswith("not paired")


def test_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("VLAKEEP_ROOT", str(tmp_path))
    make(tmp_path, {"base": RATES["base"], "baseline": RATES["baseline"]})
    assert main(["--runs=base,baseline", "--out", str(tmp_path / "out"), "--title", "A <title>"]) == 0
    assert "A &lt;title&gt;" in (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert str(tmp_path / "out" / "index.html") in capsys.readouterr().out
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="mine.txt"):
        main(["--runs", "base,baseline", "--out", str(tmp_path / "out")])
    with pytest.raises(ConfigError, match="comes twice"):
        main(["--runs", "base,base"])
    storage = Storage(tmp_path)
    assert arms_from_runs("method=abc", storage)["method"]["run"] == storage.runs / "abc"


def both_sites(tmp_path, grown_at=(), residual_grown=()):
    """An arm with surgery at both sites, whose gradient grows at the LoRA input (or the residual stream) on the named steps."""
    arms = make(tmp_path, {"base": RATES["base"], "baseline": RATES["baseline"], "method": RATES["method"]},
                runs={"method": {"change": {"hsw.site": "both"}}})
    path = tmp_path / "runs" / "method" / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row.update({"lora_input/g_norm": 2.0, "lora_input/g_prime_norm": 3.0 if row["step"] in grown_at else 1.0,
                    "lora_input/share_f": 0.9, "lora_input/share_p": 0.05, "lora_input/shed": 0.1})
        row.update({"g_prime_norm": 2 * row["g_norm"]} if row["step"] in residual_grown else {})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return arms


def test_both_sites_are_judged_and_drawn(tmp_path):
    good = said(compare(both_sites(tmp_path / "good")), "method")
    assert "Residual stream: surgery never enlarged the gradient" in good and "LoRA input: surgery never enlarged the gradient" in good
    text = said(compare(both_sites(tmp_path / "bad", grown_at=(3, 4))), "method")
    assert "LoRA input: \u2016g\u2032\u2016 exceeds \u2016g\u2016 on 2 of 600 logged steps" in text
    assert "LoRA input: surgery never" not in text and "Residual stream: surgery never enlarged the gradient" in text
    text = said(compare(both_sites(tmp_path / "other", residual_grown=(3,))), "method")
    assert "Residual stream: \u2016g\u2032\u2016 exceeds" in text and "LoRA input: surgery never enlarged the gradient" in text
    one = said(compare(make(tmp_path / "one")), "method")
    assert "Surgery never enlarged the gradient" in one and "Residual stream:" not in one  # a single site needs no name
    drawn = {figure.name: figure for figure in figures(compare(both_sites(tmp_path / "drawn")))}
    assert {"surgery_norms", "surgery_norms_lora_input", "leak", "shares_lora_input"} <= set(drawn)
    lines = render(drawn["surgery_norms_lora_input"]).axes[0].get_lines()
    assert sorted({float(max(line.get_ydata())) for line in lines}) == [1.0, 2.0]  # after and before surgery


def test_a_penalty_that_was_not_finite_is_told(tmp_path):
    arms = make(tmp_path)
    path = tmp_path / "runs" / "method" / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(dict(row, penalty=None if row["step"] == 9 else 0.1)) + "\n" for row in rows))
    assert "penalty on 1 logged steps" in said(compare(arms), "method")


# The report of real evaluations


@pytest.fixture(scope="module")
def real(world, evaluated):
    """(folder of the report, evaluation of the base, evaluation of the baseline)."""
    storage, _ = world
    run, base, baseline = evaluated
    arms = {"base": {"eval": base, "run": None}, "baseline": {"eval": baseline, "run": run}}
    return build_report(storage.root, arms, storage.report / "real").parent, base, baseline


def by_ability(folder):
    """Ability -> outcomes in the order of their trials, from the records of an evaluation."""
    found = {}
    for row in read_evaluation(folder)[0]:
        found.setdefault(row["ability"], []).append(row["value"] if row["kind"] == "retention" else float(row["success"]))
    return found


def test_numbers_of_real_evaluations_come_from_their_records(real):
    folder, *evaluations = real
    summary = json.loads((folder / "summary.json").read_text())["arms"]
    table = {(line["arm"], line["measure"]): line for line in csv.DictReader((folder / "tables" / "comparison.csv").open())}
    outcomes = {arm: by_ability(evaluation) for arm, evaluation in zip(("base", "baseline"), evaluations)}
    assert list(summary) == ["base", "baseline"] and outcomes["base"] != outcomes["baseline"]
    names = {"new": "corner", "skill:pick": "pick", "skill:reach": "reach", "question:color": "color", "question:gripper": "gripper"}
    for arm, own in outcomes.items():
        rates = {}
        for measure, ability in names.items():
            mean, low, high = rates[measure] = wilson_by_roots(sum(own[ability]), len(own[ability]))
            entry = summary[arm]["new_skill"] if measure == "new" else summary[arm]["abilities"][ability]
            assert entry == {"mean": mean, "low": low, "high": high}
            line = table[arm, measure]
            assert [float(line[key]) for key in ("mean", "low", "high")] == [mean, low, high]
            assert (int(line["n"]), int(line["crashes"])) == (len(own[ability]), 0)
        old = [rates[measure][0] for measure in names if measure != "new"]
        assert float(table[arm, "mean"]["mean"]) == pytest.approx(np.mean(old)) and int(table[arm, "mean"]["n"]) == 3 + 3 + 6 + 6
        assert float(table[arm, "mean:skill"]["mean"]) == pytest.approx(np.mean([rates["skill:pick"][0], rates["skill:reach"][0]]))
    kl = np.array(outcomes["baseline"]["action_kl"])
    half = 1.959964 * kl.std(ddof=1) / 6 ** 0.5
    line = table["baseline", "kl"]
    assert [float(line[key]) for key in ("mean", "low", "high")] == pytest.approx([kl.mean(), kl.mean() - half, kl.mean() + half])
    assert float(table["base", "kl"]["mean"]) == 0.0 == summary["base"]["drift"] < summary["baseline"]["drift"]
    assert summary["base"]["train_seconds"] == 0.0 < summary["baseline"]["train_seconds"]


def test_differences_of_real_evaluations_are_baseline_minus_base(real):
    folder, *evaluations = real
    base, baseline = (by_ability(evaluation) for evaluation in evaluations)
    table = {(line["arm"], line["measure"]): line for line in csv.DictReader((folder / "tables" / "comparison.csv").open())}
    moved = set()
    for measure, ability in (("new", "corner"), ("skill:pick", "pick"), ("skill:reach", "reach"), ("question:color", "color")):
        line = table["baseline", measure]
        pairs = np.array(baseline[ability]) - np.array(base[ability])
        assert float(line["minus_base"]) == pytest.approx(pairs.mean()) and int(line["pairs_base"]) == len(pairs)
        assert float(line["minus_base_low"]) <= pairs.mean() <= float(line["minus_base_high"])
        assert (line["vs_baseline"], table["base", measure]["vs_base"]) == ("absent", "absent")
        moved.add(pairs.mean())
    line = table["baseline", "kl"]
    assert float(line["minus_base"]) == pytest.approx(np.mean(baseline["action_kl"])) and float(line["minus_base"]) > 0
    assert line["vs_base"] == ("worse" if float(line["minus_base_low"]) > 0 else "noise")
    drift = read_evaluation(evaluations[1])[1]["drift"]
    assert float(table["baseline", "drift"]["minus_base"]) == drift > 0
    assert moved != {0.0}, "the run must differ from the base in some rate, or a sign cannot be wrong"


def test_alarms_of_an_evaluation_are_in_the_report(world, evaluated, tmp_path):
    run, base, baseline = evaluated
    for source in (base, baseline):
        (tmp_path / source.name).mkdir()
        for file in ("records.jsonl", "summary.json"):
            (tmp_path / source.name / file).write_bytes((source / file).read_bytes())
    summary = json.loads((tmp_path / baseline.name / "summary.json").read_text())
    (tmp_path / baseline.name / "summary.json").write_text(json.dumps(dict(summary, alarms=["the policy stands still"])))
    arms = {"base": {"eval": tmp_path / base.name, "run": None}, "baseline": {"eval": tmp_path / baseline.name, "run": run}}
    assert "Alarm: the policy stands still." in said(compare(arms), "baseline")


def test_whether_a_prompt_is_followed_stands_on_the_page(tmp_path, one_figure):
    """One table, two prompts: a model that puts everything on one target must be seen."""
    followed = {"blue": {"prompted": 1.0, "other": 0.0, "neither": 0.0, "n": 20},
                "red": {"prompted": 0.25, "other": 0.65, "neither": 0.1, "n": 20}}
    folders = {}
    for name, rates in (("base", (0.0, 0.1)), ("baseline", (0.3, 0.1))):
        summary = write_eval(tmp_path / "eval" / name, name, *rates)
        folders[name] = {"eval": tmp_path / "eval" / name, "run": None}
        if name == "baseline":
            (tmp_path / "eval" / name / "summary.json").write_text(json.dumps({**summary, "followed": followed}))
    text = build_report(tmp_path, folders, tmp_path / "out").read_text()
    assert "Two targets on one table" in text and "25.0 / 65.0 / 10.0" in text and "100.0 / 0.0 / 0.0" in text
    (tmp_path / "eval" / "baseline" / "summary.json").write_text(json.dumps(summary))
    assert "Two targets" not in build_report(tmp_path, folders, tmp_path / "out").read_text()


MARK = "<u>"


def marked(tree):
    """The tree with markup before every text that is not a name which the report looks for."""
    known = {"skill", "question", "finished", "interrupted", "failed", "corner"}
    if isinstance(tree, dict):
        return {key: marked(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [marked(value) for value in tree]
    return MARK + tree if isinstance(tree, str) and tree not in known else tree


def test_no_text_of_the_inputs_is_taken_for_markup(tmp_path, one_figure, monkeypatch):
    """The page is built of strings: whatever comes from a file or the command line is escaped on its way."""
    names = {"baseline": "baseline", "method": "method", "mine": f"{MARK}mine"}
    arms = make(tmp_path, {"base": (0.04, 0.0), "baseline": (0.3, 0.1), "method": (0.3, 0.1)},
                runs={"method": {"status": "failed", "trace": f"Traceback\nTrainingStopped: {MARK}"}})
    arms["mine"] = dict(arms["baseline"])
    for arm in ("baseline", "method"):
        for file in ("config.yaml", "provenance.json"):
            path = arms[arm]["run"] / file
            tree = yaml.safe_load(path.read_text())
            method, name = tree["method"], tree["name"]
            path.write_text(json.dumps({**marked(tree), "method": method, "name": name}))
    for arm in ("base", "baseline", "method"):
        folder = arms[arm]["eval"]
        summary = json.loads((folder / "summary.json").read_text())
        summary["abilities"] = {MARK + name: value for name, value in summary["abilities"].items()}
        summary.update(alarms=[MARK], followed={MARK: {"prompted": 1.0, "other": 0.0, "neither": 0.0, "n": 2}})
        summary["new_skill"]["name"] = MARK + "corner"
        (folder / "summary.json").write_text(json.dumps(summary))
        rows = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
        for row in rows[1:]:
            row["ability"] = row["ability"] if row["kind"] == "retention" else MARK + row["ability"]
        (folder / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    card = tmp_path / "runs" / "baseline" / "data" / "one.json"
    card.parent.mkdir()
    card.write_text(json.dumps({"name": MARK + "data"}))
    monkeypatch.setattr("vlakeep.reporting.data_cards.lines", lambda report: [MARK])
    text = build_report(tmp_path, {names.get(arm, arm): found for arm, found in arms.items()}, tmp_path / "out", MARK).read_text()
    assert MARK not in text and text.count("&lt;u&gt;") > 40


def test_a_closed_run_is_made_again_with_its_export(tmp_path):
    arms = make(tmp_path, {"base": RATES["base"], "baseline": RATES["baseline"]})
    write_eval(tmp_path / "eval" / "baseline-closed-0.002", "baseline-closed-0.002", 0.3, 0.0)
    closed = tmp_path / "runs" / "baseline-closed-0.002"
    write_run(closed, "baseline")
    (closed / "closing.json").write_text(json.dumps({"run": "baseline", "budget": 0.002}))
    arms["closed"] = {"eval": tmp_path / "eval" / "baseline-closed-0.002", "run": closed}
    lines = reproduce(compare(arms), None)
    assert [line.replace(str(tmp_path / "runs"), "R") for line in lines] == [
        "vlakeep train --config R/baseline/config.yaml --name baseline_again",
        "vlakeep evaluate --config R/baseline/config.yaml --evaluate.target baseline_again",
        "vlakeep offline --config R/baseline-closed-0.002/config.yaml --method graded",
        "vlakeep export --config R/baseline-closed-0.002/config.yaml --export.target baseline_again --export.close_to 0.002",
        "vlakeep evaluate --config R/baseline-closed-0.002/config.yaml --evaluate.target baseline_again-closed-0.002",
        "vlakeep evaluate --config R/baseline-closed-0.002/config.yaml --evaluate.target base",
        "vlakeep report --config R/baseline-closed-0.002/config.yaml "
        "--runs base,baseline=baseline_again,closed=baseline_again-closed-0.002"]


def test_labels_of_checkpoints_that_lie_together_are_one():
    points = [(75, 98.0, 60.0), (150, 97.5, 100.0), (225, 97.9, 100.0), (300, 90.0, 100.0)]
    assert together(points) == [((98.0, 60.0), "75"), ((97.5, 100.0), "150, 225"), ((90.0, 100.0), "300")]
