"""What the numbers of an evaluation depend on: refused when it goes on with something else, and looked at by preflight before."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from conftest import BASELINE

from vlakeep import checks, preflight
from vlakeep.benchmarks.records import Records
from vlakeep.benchmarks.trained import crop_alarm
from vlakeep.checks import GREEN, RED, YELLOW
from vlakeep.core import checkpoint
from vlakeep.data.sample import Sample
from vlakeep.evaluate import load_target, run_evaluation
from vlakeep.libero import benchmark as libero
from vlakeep.libero import setup as libero_setup
from vlakeep.libero.evaluation import Libero, renderer_alarm
from vlakeep.probe.probe_set import write_probe
from vlakeep.train import run_training

SMALLEST = ["--evaluate.skills", "[reach]", "--evaluate.episodes", 1, "--evaluate.questions", "[color]", "--evaluate.questions_per_kind", 1,
            "--evaluate.retention_frames", 1, "--probe.size", 8]


@pytest.fixture(scope="module")
def run(world):
    """(storage, configuration of an evaluation of a small run with the given changes, the run's folder)."""
    storage, make_config = world
    folder = run_training(make_config(BASELINE, "--name", "identity", "--train.steps", 2), storage)

    def config(*changes, file=BASELINE):
        return make_config(file, "--evaluate.target", "identity", *SMALLEST, *changes)

    return storage, config, folder


def header(folder):
    return json.loads((folder / "records.jsonl").read_text().splitlines()[0])["header"]


# ---- an evaluation that goes on ----


@pytest.fixture(scope="module")
def evaluated(run):
    storage, config, _ = run
    return run_evaluation(config(), storage)


def test_the_header_says_what_the_actions_depend_on(run, evaluated):
    found = header(evaluated)
    assert {key: found["model"][key] for key in ("unnorm_key", "dtype", "attn_implementation", "source")} == {
        "unnorm_key": "tabletop_corner", "dtype": "float32", "attn_implementation": "sdpa", "source": "native"}
    assert len(found["model"]["statistics"]) == 64 and found["tabletop"] == {"max_steps": {"reach": 16}}


@pytest.mark.parametrize("change, words", [
    (["--backbone.unnorm_key", "tabletop"], "model.unnorm_key tabletop_corner -> tabletop"),
    (["--backbone.dtype", "bfloat16"], "model.dtype float32 -> bfloat16"),
    (["--backbone.attn_implementation", "eager"], "model.attn_implementation sdpa -> eager"),
    (["--evaluate.seed", 3], "evaluate.seed 1000 -> 3"),
])
def test_an_evaluation_does_not_go_on_with_another_model_setting(run, evaluated, change, words):
    storage, config, _ = run
    before = (evaluated / "records.jsonl").read_bytes()
    with pytest.raises(ValueError, match="other settings") as error:
        run_evaluation(config(*change), storage)
    assert words in str(error.value) and (evaluated / "records.jsonl").read_bytes() == before
    run_evaluation(config("--backbone.unnorm_key", "tabletop_corner"), storage)  # what is said twice is no change
    assert (evaluated / "records.jsonl").read_bytes() == before


def test_other_action_statistics_beside_the_adapter_are_another_evaluation(run, evaluated, tmp_path):
    storage, config, folder = run
    source = checkpoint.latest_intact(folder)
    copied = tmp_path / "elsewhere" / "checkpoints" / source.name
    shutil.copytree(source, copied)
    statistics = json.loads((copied / "adapter" / "dataset_statistics.json").read_text())
    statistics["tabletop_corner"]["action"]["q99"][0] += 1.0
    (copied / "adapter" / "dataset_statistics.json").write_text(json.dumps(statistics))
    manifest = json.loads((copied / "manifest.json").read_text())
    entry = manifest["files"]["adapter/dataset_statistics.json"]
    entry["sha256"] = checkpoint.file_sha256(copied / "adapter" / "dataset_statistics.json")
    entry["size"] = (copied / "adapter" / "dataset_statistics.json").stat().st_size
    (copied / "manifest.json").write_text(json.dumps(manifest))
    place = evaluated.with_name(f"elsewhere-{source.name}")
    shutil.copytree(evaluated, place)
    with pytest.raises(ValueError, match="model.statistics"):
        run_evaluation(config("--evaluate.target", str(copied)), storage)


def test_records_of_an_older_version_are_named_as_such(tmp_path):
    path, old = tmp_path / "records.jsonl", {"weights": "a", "base": "b", "evaluate": {"episodes": 1}}
    with Records(path, old) as records:
        records.add(kind="skill", ability="reach", trial=0, seed=0, success=True, value=None, crash=None, steps=1)
    with pytest.raises(ValueError, match="header does not say model .an older version.*rm -r"):
        Records(path, dict(old, model={"dtype": "float32"}))


def test_a_mistyped_key_is_an_error(run):
    storage, config, _ = run
    known = {"libero_object": {}, "mine": {}}
    with pytest.raises(ValueError, match="no action statistics of 'libero_objekt' .it has libero_object, mine.: .*--backbone.unnorm_key"):
        libero.pick_key("libero_object", "libero_objekt", known, "mine")
    assert libero.pick_key("libero_object", None, known, "mine") == "libero_object"
    with pytest.raises(ValueError, match="'tabletop_korner'.*--backbone.unnorm_key"):
        run_evaluation(config("--backbone.unnorm_key", "tabletop_korner"), storage)


# ---- alarms of a target that is named by its folder ----


def targets(folder):
    step = checkpoint.latest_intact(folder)
    return "identity", str(folder), f"{folder}/", str(step)


def test_a_checkpoint_folder_does_not_silence_the_alarms(run, monkeypatch):
    storage, config, folder = run
    monkeypatch.setattr(libero_setup, "versions", lambda: {"mujoco": "3.17.0"})
    for target in targets(folder):
        wanted = config("--evaluate.target", target, "--evaluate.benchmark", "libero_goal", "--evaluate.skills", "[]",
                        "--evaluate.questions", "[]")
        crops = replace(Libero.resolve(wanted), center_crop=True)
        line, = crop_alarm(wanted, storage, crops)
        assert "trained without random crops" in line and crop_alarm(wanted, storage, Libero.resolve(wanted)) == []
        path = folder / "config.yaml"
        text = path.read_text()
        path.write_text(text.replace("- tabletop_corner", "- libero_goal_no_noops"))
        try:
            line, = renderer_alarm(wanted, storage, "tabletop_corner")
        finally:
            path.write_text(text)
        assert "libero_goal_no_noops" in line
    assert crop_alarm(config("--evaluate.target", "base"), storage, crops) == []


def test_a_checkpoint_named_from_within_its_run_keeps_the_name_of_the_run(run, monkeypatch):
    storage, config, folder = run
    step = checkpoint.latest_intact(folder)
    named = config("--evaluate.target", f"checkpoints/{step.name}")
    monkeypatch.chdir(folder)
    assert load_target(named, storage, "cpu")[1] == f"identity-{step.name}"


# ---- preflight --stage evaluate ----


def lines(config, what=None):
    found = preflight.run_checks(config, "evaluate", "c.yaml")
    return [line for line in found if what is None or line.what == what]


def reds(config):
    found = [line for line in lines(config) if line.status == RED]
    assert all(line.remedy for line in found)
    return found


def test_preflight_passes_what_evaluate_takes(run):
    _, config, folder = run
    for target in (*targets(folder), "base"):
        assert reds(config("--evaluate.target", target)) == []
    assert [line.status for line in lines(config(), "target")] == [GREEN]
    assert [line.status for line in lines(config("--evaluate.target", "base", "--probe.name", "none"), "probe")] == []
    assert reds(config("--backbone.unnorm_key", "tabletop")) == [] == reds(config("--backbone.unnorm_key", "tabletop_corner"))


def test_preflight_wants_the_probe_of_a_run_on_the_tabletop(run):
    _, config, _ = run
    line, = reds(config("--probe.name", "none"))
    assert line.what == "probe" and "no probe set" in line.where
    line, = reds(config("--probe.size", 49))
    assert "has 48 items" in line.where or "--probe.size asks for 49" in line.where


def test_preflight_looks_at_the_target(run, tmp_path):
    storage, config, folder = run
    line, = reds(config("--evaluate.target", "nothing"))
    assert line.what == "target" and "no intact checkpoint of the run `nothing`" in line.where and "vlakeep train" in line.remedy
    step = checkpoint.latest_intact(folder)

    def copy(name):
        return shutil.copytree(step, tmp_path / name / "checkpoints" / step.name)

    damaged = copy("damaged")
    (damaged / "trainable.safetensors").write_bytes(b"x")
    line, = reds(config("--evaluate.target", str(damaged)))
    assert line.what == "target" and "trainable.safetensors is truncated" in line.where
    without = copy("without")
    (without / "adapter" / "dataset_statistics.json").unlink()
    manifest = json.loads((without / "manifest.json").read_text())
    del manifest["files"]["adapter/dataset_statistics.json"]
    (without / "manifest.json").write_text(json.dumps(manifest))
    line, = reds(config("--evaluate.target", str(without)))
    assert line.what == "target" and "no " in line.where and "dataset_statistics.json" in line.where
    other = copy("other")
    state = json.loads((other / "state.json").read_text())
    state["base_weights"] = "0" * 64
    (other / "state.json").write_text(json.dumps(state))
    manifest = json.loads((other / "manifest.json").read_text())
    path = other / "state.json"
    manifest["files"]["state.json"] = {"size": path.stat().st_size, "sha256": checkpoint.file_sha256(path)}
    (other / "manifest.json").write_text(json.dumps(manifest))
    line, = reds(config("--evaluate.target", str(other)))
    assert line.what == "target" and "trained on other base weights (000000000000" in line.where and "--backbone.checkpoint" in line.remedy
    for words, *change in (("'tabletop_korner'", "--backbone.unnorm_key", "tabletop_korner"),
                           ("'tabletop_corner'", "--backbone.unnorm_key", "tabletop_corner", "--evaluate.target", "base")):
        line, = reds(config(*change))
        assert line.what == "--backbone.unnorm_key" and words in line.where and "tabletop" in line.remedy


def test_preflight_says_when_large_base_weights_are_not_hashed(run, monkeypatch):
    _, config, folder = run
    monkeypatch.setattr(checks, "HASHED_AT_MOST", 1000)
    assert [line.status for line in lines(config(), "target")] == [GREEN]
    assert "evaluate compares" in lines(config(), "target")[0].where
    path = folder / "config.yaml"
    text = path.read_text()
    path.write_text(text.replace("checkpoint: tabletop-base", "checkpoint: someone/else"))
    try:
        line, = (line for line in lines(config(), "target") if line.status == YELLOW)
    finally:
        path.write_text(text)
    assert "someone/else" in line.where and "--backbone.checkpoint someone/else" in line.remedy


def test_preflight_looks_at_the_questions_of_a_libero_evaluation(run, monkeypatch):
    storage, config, _ = run
    monkeypatch.setattr(libero_setup, "require_libero", lambda: None)
    in_libero = ["--evaluate.benchmark", "libero_goal", "--evaluate.skills", "[]", "--evaluate.questions", "[]",
                 "--backbone.unnorm_key", "tabletop"]
    assert reds(config(*in_libero)) == []
    missing, = lines(config(*in_libero, "--probe.name", "none"), "probe")
    assert missing.status == YELLOW and "drift is not measured" in missing.where
    picture = Sample(np.zeros((64, 64, 3), np.uint8), "reach")
    write_probe(storage.probe / "asked", [picture, replace(picture, question=True, answer="red")], ["instruction", "color"])
    asking = [*in_libero, "--evaluate.probe", "asked"]
    line, = reds(config(*asking))
    assert line.what == "--evaluate.probe" and "no answers.jsonl" in line.where and "vlakeep libero-vqa" in line.remedy
    answers = storage.probe / "asked" / "answers.jsonl"
    answers.write_text(json.dumps({"item": 1, "answer": "red", "split": "heldout"}) + "\n")
    assert reds(config(*asking)) == [] and [line.status for line in lines(config(*asking), "--evaluate.probe")] == [GREEN]
    line, = reds(config(*asking, "--probe.name", "asked", "--probe.size", 2))
    assert line.what == "--evaluate.probe" and "which the method protects" in line.where
    answers.write_text(json.dumps({"item": 1, "answer": "red", "split": "probe"}) + "\n")
    line, = reds(config(*asking))
    assert "that a method may protect" in line.where and "--split heldout" in line.remedy
    answers.write_text("no json\n")
    line, = reds(config(*asking))
    assert line.what == "--evaluate.probe" and "answers.jsonl line 1 is damaged" in line.where
