"""The demo as a whole, at a small size: every arm is trained, evaluated and reported under its own name, and what is not its own stays."""

import csv
import json
import multiprocessing
import os
import shutil
import time
from pathlib import Path

import pytest
import yaml
from conftest import EVALUATION, METHOD, SMALL, cut_episodes, final_adapter, read_evaluation

from vlakeep import demo, train
from vlakeep.benchmarks.records import wilson
from vlakeep.core.checkpoint import file_sha256, list_checkpoints
from vlakeep.core.config import ConfigError, load_config
from vlakeep.core.errors import TrainingStopped
from vlakeep.core.rundir import RunDir, read_metrics
from vlakeep.core.storage import Storage
from vlakeep.reporting.arms import load_arms
from vlakeep.reporting.compare import Comparison
from vlakeep.reporting.figures import CURVES
from vlakeep.tabletop import data as tabletop_data
from vlakeep.train import run_training

ARMS = ["base", "baseline", "method", "graded"]
METHODS = {"baseline": "baseline", "method": "icsm_hsw_thermostat", "graded": "graded"}
BRIEF = " ".join(SMALL).replace("--train.save_every 3 ", "").split()  # the demo says itself when it saves


def test_the_other_model_has_runs_of_its_own():
    begin, changes = demo.MODELS["pi0_fast"]
    configs = {arm: demo.arm_config(arm, changes, begin) for arm in demo.ARMS}
    assert {config.backbone.checkpoint for config in configs.values()} == {"tabletop-pi0"}
    assert [config.name for config in configs.values()] == [f"demo-pi0-{arm}" for arm in demo.ARMS]
    assert {config.backbone.checkpoint for config in (demo.arm_config(arm, []) for arm in demo.ARMS)} == {"tabletop-base"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A storage root after a demo, which held an evaluation of the base and the remains of an earlier demo."""
    root = tmp_path_factory.mktemp("demo")
    for place in ("eval/base", "eval/demo-base", "eval/demo-method", "eval/demo-method-step_000001", "runs/demo-method", "runs/mine"):
        (root / place).mkdir(parents=True)
        (root / place / "records.jsonl").write_text(f"of {place}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tabletop_data, "EPISODES", 12)
        cut_episodes(patch)
        patch.setattr(demo, "ON_THE_WAY", ["--evaluate.episodes", "1", "--evaluate.questions_per_kind", "2",
                                           "--evaluate.retention_frames", "2"])
        assert demo.main([*BRIEF, *EVALUATION, "--evaluate.episodes", "2", "--thermostat.gamma_max", "0.7", "--root", str(root)]) == 0
    return root


def test_every_arm_is_trained_evaluated_and_reported_in_order(root):
    summary = json.loads((root / "report" / "demo" / "summary.json").read_text())
    assert list(summary["arms"]) == ARMS
    table = list(csv.DictReader((root / "report" / "demo" / "tables" / "comparison.csv").open()))
    for arm in ARMS:
        rows, evaluation = read_evaluation(root / "eval" / f"demo-{arm}")
        assert evaluation["target"] == ("base" if arm == "base" else f"demo-{arm}")
        assert len(rows) == 3 * 2 + 2 * 6 + (0 if arm == "base" else 6)
        assert summary["arms"][arm]["new_skill"]["mean"] == evaluation["new_skill"]["mean"]
        assert summary["arms"][arm]["drift"] == evaluation["drift"]
        own = {line["measure"]: line for line in table if line["arm"] == arm}
        kl = 0.0 if arm == "base" else evaluation["retention_kl"]["mean"]
        assert float(own["kl"]["mean"]) == kl and float(own["drift"]["mean"]) == evaluation["drift"]
    head = (root / "report" / "demo" / "tables" / "comparison.md").read_text().splitlines()[0]
    assert head.split(" | ")[1:5] == ["Base model", "Plain LoRA", "Method (residual)", "Graded gains, set-point"]


def test_arms_differ_in_method_alone_and_are_evaluated_by_their_own_adapter(root):
    configs, adapters = {}, set()
    for arm, method in METHODS.items():
        run = root / "runs" / f"demo-{arm}"
        configs[arm] = config = yaml.safe_load((run / "config.yaml").read_text())
        assert config.pop("method") == method and config.pop("name") == f"demo-{arm}"
        adapter = file_sha256(run / "checkpoints" / "step_000006" / "adapter" / "adapter_model.safetensors")
        assert read_evaluation(root / "eval" / f"demo-{arm}")[1]["weights"] == adapter
        adapters.add(adapter)
    assert len(adapters) == 3
    # The baseline's file has no sections of the method, so that these hold the defaults there.
    shared = [{key: config[key] for key in ("seed", "lora", "data", "train", "backbone")} for config in configs.values()]
    assert shared[0] == shared[1] == shared[2]


def test_checkpoints_on_the_way_are_evaluated_with_few_trials_and_drawn(root):
    comparison = Comparison(load_arms({arm: {"eval": root / "eval" / f"demo-{arm}", "run": root / "runs" / f"demo-{arm}"}
                                       for arm in METHODS}), wilson)
    for arm in METHODS:
        run, seen = root / "runs" / f"demo-{arm}", set()
        for step in (2, 4):
            adapter = file_sha256(run / "checkpoints" / f"step_{step:06d}" / "adapter" / "adapter_model.safetensors")
            rows, summary = read_evaluation(root / "eval" / f"demo-{arm}-step_{step:06d}")
            assert summary["weights"] == adapter and len(rows) == 3 * 1 + 2 * 2 + 2 and "drift" in summary
            seen.add(adapter)
        assert len(seen) == 2 and [step for step, _, _ in comparison.path(comparison.arms[arm])] == [2, 4]
    caption = (root / "report" / "demo" / "index.html").read_text()
    assert "The thin line is the way there" in caption


def test_what_the_demo_did_not_make_stays_and_an_earlier_demo_goes(root):
    for place in ("eval/base", "runs/mine"):
        assert [path.name for path in (root / place).iterdir()] == ["records.jsonl"]
        assert (root / place / "records.jsonl").read_text() == f"of {place}\n"
    assert not (root / "runs" / "demo-method" / "records.jsonl").exists() and not (root / "eval" / "demo-method-step_000001").exists()


def test_an_arm_that_stops_before_its_first_checkpoint_is_in_the_report(tmp_path, monkeypatch, one_figure):
    def stopping(config, storage):
        if config.name != "demo-method":
            return run_training(config, storage)
        with RunDir.open(storage, config) as run:
            run.log(1, {"loss": 2.0})
            raise TrainingStopped("hidden states blew up")

    cut_episodes(monkeypatch)
    monkeypatch.setattr(train, "run_training", stopping)
    monkeypatch.setattr(tabletop_data, "EPISODES", 12)
    monkeypatch.setattr(demo, "ARMS", {arm: ("baseline_lora", []) for arm in ("baseline", "method")})
    monkeypatch.setattr(demo, "PARTS", 1)
    few = ["--train.steps", "2", "--evaluate.skills", "[corner,reach]", "--evaluate.episodes", "1", "--evaluate.questions", "[color]",
           "--evaluate.questions_per_kind", "2", "--evaluate.retention_frames", "2"]
    assert demo.main([*BRIEF, *few, "--root", str(tmp_path)]) == 0
    arms = json.loads((tmp_path / "report" / "demo" / "summary.json").read_text())["arms"]
    assert list(arms) == ["base", "baseline", "method"] and arms["method"]["new_skill"]["mean"] is None
    assert "hidden states blew up" in (tmp_path / "report" / "demo" / "index.html").read_text(encoding="utf-8")


def test_side_by_side_an_arm_is_that_of_one_process(root, tmp_path, monkeypatch, capsys, one_figure):
    for place in ("datasets", "probe", "artifacts"):  # what the first two parts of a demo make
        shutil.copytree(root / place, tmp_path / place)
    monkeypatch.setattr(tabletop_data, "write_tabletop_data", lambda config, storage: None)
    monkeypatch.setattr(demo, "ARMS", {"method": demo.ARMS["method"]})
    monkeypatch.setattr(demo, "shares", lambda config: (2, 1))
    monkeypatch.setattr(demo, "list_checkpoints", lambda run: list_checkpoints(run)[-1:])
    few = ["--evaluate.skills", "[corner]", "--evaluate.episodes", "1", "--evaluate.questions", "[color]",
           "--evaluate.questions_per_kind", "2", "--evaluate.retention_frames", "2"]
    assert demo.main([*BRIEF, *few, "--thermostat.gamma_max", "0.7", "--root", str(tmp_path)]) == 0
    assert final_adapter(tmp_path / "runs" / "demo-method") == final_adapter(root / "runs" / "demo-method")
    assert list(json.loads((tmp_path / "report" / "demo" / "summary.json").read_text())["arms"]) == ["base", "method"]
    said = capsys.readouterr().out
    assert all(f"== {title}" in said for title in ("3/5 train: method", "4/5 evaluate: base", "4/5 evaluate: method", "5/5 report"))
    assert "demo-method: icsm_hsw_thermostat," in said and "new skill corner" in said and "\r" not in said


def test_arms_share_the_threads_of_a_cpu():
    shares = {threads: demo.shares(demo.arm_config("method", ["--device", "cpu", "--threads", str(threads)])) for threads in (1, 2, 3, 7)}
    assert shares == {1: (1, 1), 2: (2, 1), 3: (3, 1), 7: (3, 2)}


TRAINS_S = 200


class Stuck(demo.Work):
    """One arm trains on, the other fails once that has begun."""

    def train(self, arm):
        begun = Path(self.begin)
        if arm == "baseline":
            begun.with_suffix(".part").write_text(str(os.getpid()))
            begun.with_suffix(".part").rename(begun)
            time.sleep(TRAINS_S)
        while not begun.exists():
            time.sleep(0.05)
        raise ConfigError("no such thing")


def test_what_ends_the_demo_ends_its_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "ARMS", {arm: demo.ARMS[arm] for arm in ("baseline", "method")})
    begun = time.monotonic()
    with pytest.raises(ConfigError, match="no such thing"):
        demo.side_by_side(Stuck([], str(tmp_path / "begun")), {arm: tmp_path / arm for arm in demo.ARMS}, 2, 1)
    assert time.monotonic() - begun < TRAINS_S  # it did not wait for the other
    child = int((tmp_path / "begun").read_text())
    assert child not in [process.pid for process in multiprocessing.active_children()] and not Path(f"/proc/{child}").exists()


def test_every_field_of_a_curve_is_logged_by_some_arm(root):
    config = load_config(METHOD, [*SMALL, "--root", str(root), "--name", "inputs", "--hsw.site", "lora_input"])
    runs = [run_training(config, Storage.from_config(config)), *(root / "runs" / f"demo-{arm}" for arm in METHODS)]
    logged = {key for run in runs for row in read_metrics(run) for key in row}
    # With both sites in use the fields of the LoRA input carry its name (test_train.py); alone they do not.
    drawn = {key.removeprefix("lora_input/") for curve in CURVES for key, _ in curve.keys} | {"d", "threshold", "calibrating"}
    assert drawn - logged == set()
    assert all(len(curve.legend) in (0, len(curve.keys)) for curve in CURVES)
