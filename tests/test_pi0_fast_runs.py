"""pi0-FAST through the stages: two cameras, a state as text, chunks; offline, plain, graded and frozen-form training, resume, evaluation,
export. The data are those of test_model_inputs.py."""

import json
import shutil
import tempfile
from types import SimpleNamespace

import forked
import numpy as np
import pytest
import torch
from conftest import BASELINE, GRADED, METHOD, final_adapter, read_evaluation
from test_model_inputs import NAME, STEPS, configured, episodes, probe_samples, written  # noqa: F401 (two of them are fixtures)

from vlakeep.core.base_models import find_checkpoint
from vlakeep.core.checkpoint import file_sha256, latest_intact
from vlakeep.core.config import load_config
from vlakeep.core.errors import CheckpointError
from vlakeep.core.rundir import read_metrics
from vlakeep.core.storage import Storage
from vlakeep.data.formats import open_configured
from vlakeep.evaluate import run_evaluation
from vlakeep.export import run_export
from vlakeep.models.load import make_backbone
from vlakeep.models.sharded_base import refuse_sharding
from vlakeep.offline import run_offline
from vlakeep.openvla import audit
from vlakeep.pi0_fast.model import DECODER
from vlakeep.pi0_fast.tiny import SMALL, make_folder
from vlakeep.preflight import main as preflight
from vlakeep.probe.probe_set import write_probe
from vlakeep.tabletop import benchmark as tabletop
from vlakeep.tabletop.data import write_tabletop_data
from vlakeep.tabletop.pretrain_pi0_fast import batches, normalised
from vlakeep.tabletop.pretrain_pi0_fast import main as pretrain
from vlakeep.teacher.folder import ArtifactError
from vlakeep.train import run_training

TEXTS = ["open the red door", "close the blue box", "open the box", "close the red box"]


@pytest.fixture(scope="module")
def runs(written, tmp_path_factory):  # noqa: F811
    """(storage, make): data, probe, a pi0-FAST with random weights and both artefacts; `make(file, *overrides)` gives a small run."""
    root = tmp_path_factory.mktemp("pi0")
    samples = probe_samples(written, root) * 2
    shutil.copytree(written / "rlds", root / "datasets")
    write_probe(root / "probe" / "pairs", samples, ["skill"] * len(samples))
    rng = np.random.default_rng(0)
    # A state of other size and other cameras than the data have: both are chosen below, as for the published base.
    make_folder(root / "pi0", TEXTS, [rng.uniform(-1, 1, (2, 3)) for _ in range(200)], {}, ("base_0_rgb", "left_wrist_0_rgb", "right"),
                state=32)

    def words(*overrides):
        return [
            "--root", str(root), "--threads", "1", "--device", "cpu", "--backbone.checkpoint", str(root / "pi0"), "--backbone.state", "2",
            "--backbone.cameras", "[left, right]", "--probe.name", "pairs", "--probe.size", "24", "--lora.rank", "4", "--lora.alpha", "8",
            "--lora.layers", "last:2", "--train.steps", "3", "--train.batch_size", "4", "--train.warmup", "0", "--train.save_every", "2",
            "--thermostat.every", "1", "--thermostat.batch_size", "4", "--data.datasets", f"[{NAME}]", "--data.gripper", "standard",
            "--data.cameras", "[image, wrist_image]", "--data.train_fraction", "0.5", *map(str, overrides)]

    def make(file, *overrides):
        return load_config(file, words(*overrides))

    make.words = words
    storage = Storage.from_config(make(BASELINE))
    run_offline(make(GRADED), storage)
    run_offline(make(METHOD, "--icsm.rank", 12, "--icsm.sensitivity_items", 4), storage)
    return storage, make


def test_the_artefacts_tell_layout_and_how_directions_were_measured(runs):
    storage, make = runs
    meta = json.loads((storage.artifact_folder("icms_pi0") / "meta.json").read_text())
    assert (meta["layout"], meta["cameras"], meta["state"]) == ("lerobot", ["left", "right"], 2)
    assert {layer: (one["injected_at"], one["measured_on"]) for layer, one in meta["per_layer"].items()} == {
        "1": ("output", "answers"), "3": ("input", "answers")}
    assert all(max(one["kl"]) > 0 for one in meta["per_layer"].values())
    with pytest.raises(ArtifactError, match="was made with --backbone.layout lerobot, this run has openpi"):
        run_training(make(GRADED, "--backbone.layout", "openpi", "--name", "other"), storage)


@pytest.mark.parametrize("site", ["graded", "residual"])
def test_a_run_learns_and_resumes_to_the_bit(runs, site):
    storage, make = runs
    arm = [GRADED] if site == "graded" else [
        METHOD, "--hsw.site", site, "--icsm.rank", 12, "--icsm.sensitivity_items", 4, "--thermostat.calibration", 2,
        "--thermostat.batch_size", 12]
    arm += ["--train.schedule", "constant"]
    whole = run_training(make(*arm, "--name", f"{site}-whole"), storage)
    losses = [row["loss"] for row in read_metrics(whole) if "loss" in row]
    assert len(losses) == 3 and np.isfinite(losses).all()
    run_training(make(*arm, "--name", f"{site}-part", "--train.steps", 2), storage)
    part = run_training(make(*arm, "--name", f"{site}-part", "--train.resume", True), storage)
    assert final_adapter(part) == final_adapter(whole)


def _train(file, words):
    config = load_config(file, words)
    run_training(config, Storage.from_config(config))


@pytest.mark.parametrize("sharding", ["none", "fsdp"])
def test_two_processes_are_one_with_two_micro_batches_bitwise(runs, sharding):
    """Gains, sensor and loop included; the base whole in each, and shared."""
    storage, make = runs
    if sharding == "fsdp":
        try:
            refuse_sharding("fsdp", 2)
        except ValueError as error:
            pytest.skip(str(error))
    one = run_training(make(GRADED, "--name", f"one-{sharding}", "--train.accumulation", 2), storage)
    forked.two_ranks(_train, GRADED, make.words("--name", f"two-{sharding}", "--train.sharding", sharding))
    assert final_adapter(storage.run_folder(f"two-{sharding}")) == final_adapter(one)


def test_held_out_episodes_are_judged_and_an_export_is_lerobots(runs, tmp_path, capsys):
    storage, make = runs
    run_training(make(BASELINE, "--name", "plain", "--train.lr", 0.01), storage)
    folder = run_evaluation(make(BASELINE, "--evaluate.benchmark", "dataset", "--evaluate.target", "plain", "--evaluate.episodes", 2,
                                 "--evaluate.retention_frames", 4), storage)
    rows, summary = read_evaluation(folder)
    assert summary["open_loop"][NAME]["error"]["n"] == 2 and [row["steps"] for row in rows] == list(STEPS[2:])
    assert all(0 <= row["accuracy"] <= 1 and row["kl"] >= 0 for row in rows) and summary["open_loop"][NAME]["early"] > 0
    out = run_export(make(BASELINE, "--export.target", "plain"), storage)
    record = json.loads((out / "vlakeep_export.json").read_text())
    assert record["parity"]["frames_identical"] == record["parity"]["frames"] > 0 and record["merged_modules"] == 14
    config = json.loads((out / "config.json").read_text())
    assert [name for name in config["input_features"]] == ["observation.images.left", "observation.images.right", "observation.state"]
    assert config["input_features"]["observation.state"]["shape"] == [2] and config["output_features"]["action"]["shape"] == [3]
    assert config["normalization_mapping"]["ACTION"] == "QUANTILES" and "layout" not in config
    assert set(json.loads((out / "dataset_stats.json").read_text())) == {"action", "observation.state"}
    before, behind = (json.loads((out / f"policy_{kind}processor.json").read_text()) for kind in ("pre", "post"))
    assert [step["registry_name"] for step in before["steps"]] == [
        "rename_observations_processor", "to_batch_processor", "relative_actions_processor", "normalizer_processor",
        "pi0_fast_prepare_state_tokenizer_processor_step", "tokenizer_processor", "action_tokenizer_processor", "device_processor"]
    assert [step["registry_name"] for step in behind["steps"]] == [
        "unnormalizer_processor", "absolute_actions_processor", "device_processor"]
    assert before["steps"][3]["config"]["features"] == {**config["input_features"], **config["output_features"]}
    # A reader that has lerobot's files alone scales as the run did: the gripper, which is 0 or 1, not at all.
    own = make_backbone(out).norm_stats[NAME]
    for name in ("dataset_statistics.json", "dataset_stats.json"):
        (out / name).rename(tmp_path / name)
    (theirs,) = make_backbone(out).norm_stats.values()
    for name, end in (("q01", -1.0), ("q99", 1.0)):
        assert np.allclose(theirs["action"][name], [*own["action"][name][:2], end])
        assert np.allclose(theirs["proprio"][name], own["proprio"][name])
    for name in ("dataset_statistics.json", "dataset_stats.json"):
        (tmp_path / name).rename(out / name)
    merged = make_backbone(out)
    data, = open_configured(configured("rlds"), storage.data, tmp_path, merged.processor.spec)
    chunks, _ = merged.attempt_chunks(merged.processor.encode_prompts([data.frame(0, 0)]))
    assert chunks.shape == (1, 2, 3)
    adapter = latest_intact(storage.run_folder("plain")) / "adapter"
    targets = json.loads((adapter / "adapter_config.json").read_text())["target_modules"]
    assert all(name.startswith(DECODER + "layers.") for name in targets) and len(targets) == 14


def test_an_export_with_all_statistics_speaks_both_and_lerobots_files_are_of_the_new_ones(runs, tmp_path):
    """Of a base that was made normal by mean and deviation, as it was published, and data by quantiles."""
    storage, make = runs
    run_training(make(BASELINE, "--name", "both"), storage)
    words = [BASELINE, "--export.target", "both", "--export.parity_frames", 2]
    with pytest.raises(CheckpointError, match="--export.statistics all: .*pi0 has no action statistics"):
        run_export(make(*words, "--export.statistics", "all"), storage)
    plain = run_export(make(*words, "--export.folder", storage.runs / "both-new"), storage)
    base = shutil.copytree(storage.root / "pi0", tmp_path / "base")
    action = {"mean": [1.0, 2.0, 3.0], "std": [0.5, 0.5, 2.0], "min": [-9.0] * 3, "max": [9.0] * 3}
    (base / "dataset_stats.json").write_text(json.dumps({"action": action}))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "normalization_mapping": {
        **config["normalization_mapping"], "STATE": "MEAN_STD", "ACTION": "MEAN_STD"}}))
    out = run_export(make(*words, "--export.statistics", "all", "--backbone.checkpoint", base), storage)
    merged, known = make_backbone(out), make_backbone(plain)
    assert list(merged.norm_stats) == [NAME, "lerobot"] and list(known.norm_stats) == [NAME]
    assert np.allclose(merged.unnormalise(np.ones((1, 3)), "lerobot"), [[1.5, 2.5, 5.0]])
    assert np.array_equal(merged.unnormalise(np.ones((1, 3)), NAME), known.unnormalise(np.ones((1, 3)), NAME))
    names = sorted(path.name for path in plain.iterdir())
    assert sorted(path.name for path in out.iterdir()) == names
    own = {"dataset_statistics.json", "vlakeep_export.json"}
    files = [name for name in names if (out / name).is_file() and name not in own]
    assert [name for name in files if (out / name).read_bytes() != (plain / name).read_bytes()] == []


def test_preflight_and_audit_know_it(runs, capsys, monkeypatch):
    storage, make = runs
    monkeypatch.setenv("COLUMNS", "1000")  # else the table folds lines
    options = ["--root", str(storage.root), "--backbone.checkpoint", str(storage.root / "pi0"), "--backbone.state", "2",
               "--backbone.cameras",
               "[left, right]", "--probe.name", "pairs", "--probe.size", "24"]
    assert audit.main(options) == 0
    out = capsys.readouterr().out
    assert "state text" in out and "special token" in out and "empty masks: 0" in out
    preflight(["--stage", "train", *options, "--data.datasets", f"[{NAME}]", "--data.gripper", "standard", "--data.cameras",
               "[image, wrist_image]", "--device", "cpu", "--lora.layers", "last:2"])
    said = capsys.readouterr().out
    assert "4decoderlayers,D=32" in "".join(said.replace("│", "").replace("┃", "").split()), said


def test_a_small_one_is_made_for_the_tabletop_learns_a_skill_and_plays_chunks(tmp_path):
    assert pretrain(["--root", str(tmp_path), "--out", str(tmp_path / "pi0"), "--minutes", "0.001", "--frames", "120", "--processes", "1",
                     "--device", "cpu", "--batch", "4", "--hidden", "32", "--mlp", "32", "--layers", "4", "--heads", "2",
                     "--codes", "192"]) == 0
    provenance = json.loads((tmp_path / "pi0" / "PROVENANCE.json").read_text())
    assert provenance["steps"] >= 1 and {"model.safetensors", "action_tokenizer/tokenizer.json"} <= set(provenance["sha256"])
    config = load_config(BASELINE, [
        "--root", str(tmp_path), "--threads", "1", "--device", "cpu", "--backbone.checkpoint", str(tmp_path / "pi0"), "--name", "plain",
        "--evaluate.target", "plain", "--evaluate.skills", "[reach, corner]", "--evaluate.episodes", "1", "--evaluate.questions", "[color]",
        "--evaluate.questions_per_kind", "2", "--evaluate.retention_frames", "3", "--probe.size", "12", "--train.steps", "2",
        "--train.batch_size", "2", "--train.save_every", "2", "--train.warmup", "0", "--train.schedule", "constant",
        "--evaluate.chunk", "2"])
    storage = Storage.from_config(config)
    write_tabletop_data(config, storage, episodes=2)
    run_training(config, storage)
    folder = run_evaluation(config, storage, drift=False)
    rows, summary = read_evaluation(folder)
    assert {row["ability"] for row in rows if row["kind"] == "skill"} == {"reach", "corner"} and not any(row["crash"] for row in rows)
    assert summary["retention_kl"]["n"] == 3 and summary["retention_kl"]["mean"] > 0
    assert json.loads((folder / "records.jsonl").read_text().splitlines()[0])["header"]["model"]["chunk"] == 2  # played of 4


def test_pretraining_makes_the_batches_of_the_processor():
    """What lies on the device is, row by row, what the processor makes of the same samples."""
    frames = tabletop.mixed_frames(40, tabletop.PRETRAINING, questions=0.4, chunk=4)
    samples, statistics = normalised(frames.samples())
    assert np.array_equal(statistics["action"]["q99"][:3], [1, 1, 1]) and len({sample.question for sample in samples}) == 2
    with tempfile.TemporaryDirectory() as folder:
        chunks = [sample.action for sample in samples if sample.action is not None]
        make_folder(folder, [*tabletop.corpus(), *tabletop.words()], chunks, {}, ("top",), sizes=SMALL._replace(
            vision=SMALL.vision._replace(image_size=64, patch_size=16)))
        processor = make_backbone(folder).processor
    picked = [0, 7, 7, 31]
    made = batches(frames.images, samples, processor, SimpleNamespace(device="cpu", batch=4))(torch.tensor(picked))
    own = processor.encode_batch([samples[i] for i in picked])
    length = own.input_ids.shape[1]
    assert made.input_ids.shape[1] % 8 == 0 and not made.attention_mask[:, length:].any() and made.longest >= own.longest
    for name in ("input_ids", "attention_mask", "labels"):
        assert torch.equal(getattr(made, name)[:, :length], getattr(own, name)), name
    assert torch.equal(made.prefix, own.prefix) and torch.equal(made.cameras, own.cameras)
    assert torch.allclose(made.pixel_values, own.pixel_values, atol=1e-6)


def test_labels_of_pretraining_are_what_the_undisturbed_expert_does():
    world = tabletop.TabletopWorld(["reach", "place"], [3, 4])
    planned = tabletop.planned(world, 3)
    for t in range(3):
        assert np.array_equal(planned[:, t], tabletop.expert_actions(world))
        world.step(planned[:, t])
    frames = [tabletop.mixed_frames(20, 5, questions=0.3, chunk=chunk) for chunk in (0, 3)]
    assert np.array_equal(frames[0].images, frames[1].images) and frames[0].answers == frames[1].answers
    assert np.array_equal(frames[0].actions, frames[1].actions[:, 0])


def test_the_one_that_ships_does_what_it_was_trained_on(tmp_path):
    """Its files are those of PROVENANCE.json; the known skills succeed on tables that it has not seen, and questions are answered."""
    folder = find_checkpoint("tabletop-pi0", tmp_path)
    provenance = json.loads((folder / "PROVENANCE.json").read_text())
    assert provenance["sha256"] == {file.relative_to(folder).as_posix(): file_sha256(file) for file in sorted(folder.rglob("*"))
                                    if file.is_file() and file.name != "PROVENANCE.json"}
    config = load_config(BASELINE, [
        "--root", str(tmp_path), "--threads", "1", "--device", "cpu", "--backbone.checkpoint", "tabletop-pi0", "--evaluate.target", "base",
        "--evaluate.skills", "[reach, pick, drop]", "--evaluate.episodes", "6", "--evaluate.questions", "[shape]",
        "--evaluate.questions_per_kind", "12", "--evaluate.retention_frames", "1", "--evaluate.chunk", "2"])
    rows, _ = read_evaluation(run_evaluation(config, Storage.from_config(config)))
    right = {kind: [row["success"] for row in rows if row["kind"] == kind] for kind in ("skill", "question")}
    assert sum(right["skill"]) >= 17 and sum(right["question"]) >= 9, right
