"""Identity is that of the content: which model a name means, which artefact, what a run may go on with, what a report may compare."""

import ast
import json
import os
import shutil
import subprocess
import time
from dataclasses import fields, replace
from pathlib import Path

import pytest
from config_reads import Reads
from conftest import BASELINE
from safetensors.torch import load_file, save_file

from vlakeep.checks import check_checkpoint
from vlakeep.core.base_models import PACKAGE, AmbiguousModel, find_checkpoint
from vlakeep.core.config import Config, load_config, to_dict
from vlakeep.core.errors import CheckpointError
from vlakeep.core.registry import method_class, method_names
from vlakeep.core.sameness import SECTIONS, config_differences, run_id, same_samples
from vlakeep.models.files import INDEX, WEIGHTS, weight_files
from vlakeep.reporting.arms import Arm, _check_weights, _compare_drifts
from vlakeep.teacher.folder import of_weights
from vlakeep.train import run_training

ASSET = PACKAGE / "assets" / "tabletop-base"


def model(folder):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def hub(tmp_path):
    """Two snapshots of lab/vla; the one that is not main is newer."""
    place = tmp_path / "hub" / "models--lab--vla"
    main, other = model(place / "snapshots" / ("a" * 40)), model(place / "snapshots" / ("b" * 40))
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("a" * 40)
    os.utime(main, (time.time() - 9e5,) * 2)
    return place, main, other


# ---- which folder a name means ----


def test_the_snapshot_is_that_of_refs_main_or_of_the_commit_that_is_said(hub, tmp_path):
    place, main, other = hub
    assert find_checkpoint("lab/vla", tmp_path) == main
    assert find_checkpoint("lab/vla@" + "b" * 40, tmp_path) == find_checkpoint("lab/vla@bbb", tmp_path) == other
    (place / "refs" / "v2").write_text("b" * 40)
    assert find_checkpoint("lab/vla@v2", tmp_path) == other
    with pytest.raises(AmbiguousModel, match=f"{'a' * 40}, {'b' * 40}"):
        find_checkpoint("lab/vla@c", tmp_path)
    (place / "refs" / "main").write_text("c" * 40)
    with pytest.raises(AmbiguousModel, match=f"refs/main names {'c' * 40}, which is not among its snapshots .{'a' * 40}, {'b' * 40}.: .*"
                                             f"--backbone.checkpoint lab/vla@{'a' * 40}"):
        find_checkpoint("lab/vla", tmp_path)
    (place / "refs" / "main").unlink()
    with pytest.raises(AmbiguousModel, match="no refs/main, and several snapshots"):
        find_checkpoint("lab/vla", tmp_path)
    shutil.rmtree(other)
    assert find_checkpoint("lab/vla", tmp_path) == main


def test_a_model_of_another_owner_does_not_answer_to_the_name(tmp_path):
    cache = tmp_path / "机器人 cache"
    model(cache / "vla")
    with pytest.raises(AmbiguousModel, match="does not say whose it is") as error:
        find_checkpoint("lab/vla", cache)
    assert find_checkpoint("vla", cache) == cache / "vla"
    command = str(error.value).split("`")[1]
    subprocess.run(["bash", "-c", command], check=True)  # the first remedy, as it is printed
    assert find_checkpoint("lab/vla", cache) == find_checkpoint("vla", cache) == cache / "lab" / "vla"
    model(cache / "other" / "vla")
    assert find_checkpoint("lab/vla", cache) == cache / "lab" / "vla"
    with pytest.raises(AmbiguousModel, match="several folders answer") as error:
        find_checkpoint("vla", cache)
    assert str(cache / "lab" / "vla") in str(error.value) and str(cache / "other" / "vla") in str(error.value)
    line, = check_checkpoint(load_config(None, ["--backbone.checkpoint", "vla"]), cache)[0]
    assert "several folders" in line.where and "other" in line.where and "--backbone.checkpoint" in line.remedy


def test_a_link_without_its_owner_is_linked_again_and_not_moved(tmp_path):
    cache = tmp_path / "机器人 cache"
    model(tmp_path / "models" / "vla")
    cache.mkdir()
    (cache / "vla").symlink_to("../models/vla")
    with pytest.raises(AmbiguousModel) as error:
        find_checkpoint("lab/vla", cache)
    subprocess.run(["bash", "-c", str(error.value).split("`")[1]], check=True)
    assert find_checkpoint("lab/vla", cache).resolve() == (tmp_path / "models" / "vla").resolve()


def test_two_places_of_one_name_are_refused_and_one_place_twice_is_not(hub, tmp_path, monkeypatch):
    _, main, _ = hub
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab" / "vla").symlink_to(main)
    assert find_checkpoint("lab/vla", tmp_path).resolve() == main
    (tmp_path / "lab" / "vla").unlink()
    own = model(tmp_path / "lab" / "vla")
    with pytest.raises(AmbiguousModel, match="several folders answer"):
        find_checkpoint("lab/vla", tmp_path)
    assert find_checkpoint(str(own), tmp_path) == own
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AmbiguousModel):
        find_checkpoint("lab/vla", tmp_path)


def test_an_index_that_was_left_behind(tmp_path):
    """transformers takes the single file; what two programs would read differently is refused."""
    for name in ("config.json", "whatever"):
        (tmp_path / name).write_text("{}")
    (tmp_path / WEIGHTS).write_bytes(b"")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    assert weight_files(tmp_path) == [tmp_path / WEIGHTS]
    (tmp_path / "one.safetensors").write_bytes(b"")
    assert weight_files(tmp_path) == [tmp_path / WEIGHTS]
    (tmp_path / "two.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="two sets of weights, model.safetensors and .*index.json with one.safetensors, two") as error:
        weight_files(tmp_path)
    subprocess.run(["bash", "-c", str(error.value).split("`")[1]], check=True)
    assert weight_files(tmp_path) == [tmp_path / WEIGHTS]
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": WEIGHTS}}))
    assert weight_files(tmp_path) == [tmp_path / WEIGHTS]


# ---- what a run may go on with ----


def test_places_whose_content_is_known_are_not_compared():
    old, new = to_dict(Config(method="graded")), to_dict(Config(method="graded"))
    new["backbone"]["checkpoint"], new["probe"]["name"], new["gains"]["name"] = "/mnt/b/base", "/mnt/b/probe", "other"
    assert len(config_differences(old, new)) == 3
    assert config_differences(old, new, {"base_weights": "x", "probe": "y", "artifact": {}}) == []
    assert config_differences(old, new, {"base_weights": "x", "probe": "y"}) == ["gains.name: None -> other"]
    hashes = {"base_weights": "x", "probe": "y", "artifact": {"f": "z"}}
    assert run_id(old, hashes) == run_id(new, hashes) != run_id(new, {**hashes, "probe": "other"})
    for was, now, same in (("/a/runs/one", "/b/runs/one", True), ("one", "/b/runs/one", True), ("one", "two", False),
                           ("/a/one/checkpoints/step_2", "/b/one/checkpoints/step_2", True), ("g/one", "h/one", False),
                           ("/a/one/checkpoints/step_2", "/b/two/checkpoints/step_2", False), (None, "/a/one", False)):
        old["train"]["from_run"], new["train"]["from_run"] = was, now
        assert ([] == config_differences(old, new, hashes | {"from_run": {}})) == same, (was, now)


def test_keys_that_the_method_does_not_read_end_no_run():
    plain, other = to_dict(Config()), to_dict(Config())
    other["icsm"]["rank"], other["gains"]["scale"], other["backbone"]["unnorm_key"] = 3, 2.0, "x"
    assert config_differences(plain, other) == [] and run_id(plain, {}) == run_id(other, {})
    for config in (plain, other):
        config["method"] = "icsm_hsw_thermostat"
    assert config_differences(plain, other) == ["icsm.rank: 128 -> 3"] and run_id(plain, {}) != run_id(other, {})
    for config in (plain, other):
        config["method"] = "of a package that is not here"
    assert len(config_differences(plain, other)) == 2


def test_micro_batches_of_a_step_may_move_between_processes():
    one, two = to_dict(Config()), to_dict(Config())
    two["train"]["accumulation"] = 2
    lines = config_differences(one, two)
    assert lines == ["train.accumulation: 1 -> 2"]
    assert same_samples(lines, one, two, (2, 1)) == []
    assert same_samples(lines, one, two, (1, 1)) == same_samples(lines, one, two, (1, 2)) == lines


@pytest.mark.parametrize("name", method_names())
def test_a_method_declares_what_it_reads(name):
    cls = method_class(name)
    own = {c.__module__.rpartition(".")[2] for c in cls.__mro__ if c.__module__.startswith("vlakeep.methods")} - {"base"}
    reads = Reads([ast.parse((PACKAGE / "methods" / f"{stem}.py").read_text(encoding="utf-8")) for stem in own])
    found = {key for key in [*reads.nodes, *reads.whole] if key.split(".")[0] in SECTIONS}
    found -= {"icsm.moments_gib", "icsm.answered"}  # memory, and no bit of a result
    assert {key for key in found if not any(key == one or key.startswith(one + ".") for one in cls.reads)} == set()
    assert ("options" in cls.reads) == bool(fields(cls.Options)), "they are read by base.py for all methods"


def test_a_run_of_another_strength_is_another_run():
    one, two = (dict(to_dict(Config()), method="ewc", options={"strength": strength}) for strength in (100.0, 1.0))
    assert config_differences(one, two) == ["options.strength: 100.0 -> 1.0"] and run_id(one, {}) != run_id(two, {})


@pytest.fixture
def disk(world, tmp_path):
    """(make_config with a base model that lies at a path of its own, that path)."""
    storage, make_config = world
    base = shutil.copytree(ASSET, tmp_path / "disk a" / "base")
    arguments = ["--train.steps", 2, "--train.save_every", 2, "--train.batch_size", 2, "--lora.layers", "last:1",
                 "--train.tensorboard", "false"]
    return storage, lambda *more: make_config(BASELINE, *arguments, *more), base


def test_a_run_goes_on_when_the_disk_of_its_base_was_moved_and_not_with_another_base(disk, tmp_path):
    storage, config, base = disk
    run_training(config("--name", "content-moved", "--backbone.checkpoint", base), storage)
    moved = Path(shutil.move(tmp_path / "disk a", tmp_path / "disk b")) / "base"
    more = ("--name", "content-moved", "--backbone.checkpoint", moved, "--train.resume", "true", "--train.steps", 3, "--icsm.rank", 5)
    run_training(config(*more), storage)
    found = json.loads((storage.run_folder("content-moved") / "provenance.json").read_text())
    assert [session["status"] for session in found["sessions"]] == ["finished"] * 2
    tensors = load_file(moved / WEIGHTS)
    tensors["projector.fc1.bias"] += 0.5
    save_file(tensors, moved / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="trained on other base weights"):
        run_training(config(*more, "--train.steps", 4), storage)


# ---- artefacts, reports ----


def test_artefacts_of_two_models_of_one_name_do_not_replace_each_other(tmp_path):
    plain = tmp_path / "icms_vla"
    assert of_weights(plain, "1" * 64) == of_weights(plain, None) == plain
    plain.mkdir()
    (plain / "meta.json").write_text(json.dumps({"weights_sha256": "1" * 64}))
    assert of_weights(plain, "1" * 64) == plain
    assert of_weights(plain, "2" * 64) == tmp_path / "icms_vla-22222222"
    assert of_weights(plain, "2" * 64, chosen=True) == plain
    own = tmp_path / "icms_vla-11111111"
    own.mkdir()
    (own / "meta.json").write_text("{}")
    assert of_weights(plain, "1" * 64) == own


def test_a_report_says_when_success_and_curves_are_of_different_weights(tmp_path):
    arm = Arm("baseline", {"weights": "first"}, folders={"run": tmp_path})
    for step, sha256 in ((1, "first"), (2, "second")):
        folder = tmp_path / "checkpoints" / f"step_{step:06d}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text(json.dumps({"files": {"adapter/adapter_model.safetensors": {"sha256": sha256}}}))
    _check_weights(arm)
    assert "the checkpoint of step 1, and the run has gone on to step 2" in arm.notes[0]
    arm.summary["weights"] = "gone"
    _check_weights(arm)
    assert "that is no checkpoint of the run any more" in arm.notes[1]
    arm.summary["weights"] = "second"
    _check_weights(arm)
    _check_weights(replace(arm, folders={"run": None}))
    assert len(arm.notes) == 2


def test_a_report_says_when_drifts_are_over_different_probes():
    made = {"probe_sha256": "a" * 64, "probe_items": 48, "layers": [1, 3]}
    arms = {name: Arm(name, {"drift_of": dict(made)}) for name in ("one", "two", "three")}
    arms["base"] = Arm("base", {"drift": 0.0})
    arms["three"].summary["drift_of"].update(probe_sha256="b" * 64)
    _compare_drifts(arms)
    assert [len(arm.notes) for arm in arms.values()] == [0, 0, 1, 0]
    assert f"with that of one: probe_sha256 {'a' * 12} and {'b' * 12}" in arms["three"].notes[0]
