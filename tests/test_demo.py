"""The demo as a whole, at a small size: every arm is trained, evaluated and reported under its own name, and what is not its own stays."""

import csv
import json

import pytest
import yaml
from conftest import EVALUATION, SMALL, read_evaluation

from vlakeep import demo, tabletop_data
from vlakeep.checkpoint import file_sha256
from vlakeep.reporting.figures import CURVES
from vlakeep.rundir import read_metrics

ARMS = ["base", "baseline", "method", "method_lora_input"]
SITES = {"baseline": ("baseline", "residual"), "method": ("icsm_hsw_thermostat", "residual"),
         "method_lora_input": ("icsm_hsw_thermostat", "lora_input")}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A storage root after a demo, which held an evaluation of the base and the remains of an earlier demo."""
    root = tmp_path_factory.mktemp("demo")
    for place in ("eval/base", "eval/demo-base", "eval/demo-method", "runs/demo-method", "runs/mine"):
        (root / place).mkdir(parents=True)
        (root / place / "records.jsonl").write_text(f"of {place}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tabletop_data, "EPISODES", 12)
        assert demo.main([*SMALL, *EVALUATION, "--evaluate.episodes", "2", "--thermostat.gamma_max", "0.7", "--root", str(root)]) == 0
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
    assert head.split(" | ")[1:5] == ["Base model", "Plain LoRA", "Method (residual)", "Method (LoRA input)"]


def test_arms_differ_in_method_and_site_alone_and_are_evaluated_by_their_own_adapter(root):
    configs, adapters = {}, set()
    for arm, site in SITES.items():
        run = root / "runs" / f"demo-{arm}"
        configs[arm] = config = yaml.safe_load((run / "config.yaml").read_text())
        assert (config.pop("method"), config["hsw"].pop("site")) == site and config.pop("name") == f"demo-{arm}"
        adapter = file_sha256(run / "checkpoints" / "step_000006" / "adapter" / "adapter_model.safetensors")
        assert read_evaluation(root / "eval" / f"demo-{arm}")[1]["weights"] == adapter
        adapters.add(adapter)
    assert len(adapters) == 3
    # The baseline's file has no sections of the method, so that these hold the defaults there.
    shared = [{key: config[key] for key in ("seed", "lora", "data", "train", "backbone")} for config in configs.values()]
    assert shared[0] == shared[1] == shared[2] and configs["method"] == configs["method_lora_input"]


def test_what_the_demo_did_not_make_stays_and_an_earlier_demo_goes(root):
    for place in ("eval/base", "runs/mine"):
        assert [path.name for path in (root / place).iterdir()] == ["records.jsonl"]
        assert (root / place / "records.jsonl").read_text() == f"of {place}\n"
    assert not (root / "runs" / "demo-method" / "records.jsonl").exists()


def test_every_field_of_a_curve_is_logged_by_some_arm(root):
    logged = {key for arm in SITES for row in read_metrics(root / "runs" / f"demo-{arm}") for key in row}
    # With both sites in use the fields of the LoRA input carry its name (test_train.py); alone they do not.
    drawn = {key.removeprefix("lora_input/") for curve in CURVES for key, _ in curve.keys} | {"d", "threshold", "calibrating"}
    assert drawn - logged == set()
    assert all(len(curve.legend) in (0, len(curve.keys)) for curve in CURVES)
