"""The merged folder: same actions as the adapter, official format, nothing merged twice, nothing half-written."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import BASELINE
from safetensors.torch import load_file, save_file

from vlakeep import export
from vlakeep.checks import RED, check_target
from vlakeep.core.errors import CheckpointError
from vlakeep.core.registry import benchmark_class
from vlakeep.core.storage import find_checkpoint
from vlakeep.core.target import target_checkpoint
from vlakeep.evaluate import load_target, run_evaluation
from vlakeep.export import run_export
from vlakeep.models import merge
from vlakeep.models.adapters import load_adapter, merged_state
from vlakeep.models.chain import Chain, Link
from vlakeep.models.files import STATISTICS
from vlakeep.models.load import make_backbone
from vlakeep.train import run_training


@pytest.fixture(scope="module")
def run(world):
    storage, make_config = world
    config = make_config(BASELINE, "--name", "export", "--backbone.dtype", "float32", "--export.parity_frames", 6,
                         "--lora.alpha", 12)  # three times the rank: a scale of 1 would hide one that is forgotten
    run_training(config, storage)
    return config, storage




def test_adapter_and_merged_model_give_the_same_actions(run):
    config, storage = run
    config.export.dtype, config.export.folder = "float32", str(storage.runs / "merged-float32")
    folder = run_export(config, storage)
    record = json.loads((folder / "vlakeep_export.json").read_text())
    assert record["parity"]["frames_identical"] == 6 == record["parity"]["frames"] and record["merged_modules"] > 0
    backbone = make_backbone(config.backbone, "cpu")
    load_adapter(backbone, target_checkpoint("export", storage) / "adapter")
    wanted, found = merged_state(backbone, torch.float32), make_backbone(str(folder), "cpu").openvla.state_dict()
    assert set(wanted) == set(found) and all(torch.equal(found[name], wanted[name].float()) for name in wanted)
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "dataset_statistics.json", "preprocessor_config.json", "tokenizer.json",
            "generation_config.json"} <= names and not [n for n in names if n.endswith(".partial")]
    assert "auto_map" not in json.loads((folder / "config.json").read_text())


def test_shards_are_those_of_the_official_index(run, monkeypatch):
    config, storage = run
    monkeypatch.setattr("vlakeep.models.files.MAX_SHARD", 2_000_000)
    config.export.dtype, config.export.folder = "stored", str(storage.runs / "merged-shards")
    folder = run_export(config, storage)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in folder.glob("model-*.safetensors"))
    assert len(files) > 3 and set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(t.nbytes for f in files for t in load_file(folder / f).values())


def test_the_statistics_are_those_of_the_run_alone_to_the_byte(run):
    """As the official script has it; its evaluation then has nothing to choose."""
    config, storage = run
    config.export.dtype, config.export.folder = "stored", str(storage.runs / "merged-new")
    folder = run_export(config, storage)
    own = (target_checkpoint("export", storage) / "adapter" / STATISTICS).read_bytes()
    assert (folder / STATISTICS).read_bytes() == own + b"\n"
    assert json.loads((folder / "config.json").read_text())["norm_stats"] == json.loads(own)
    assert "statistics" not in json.loads((folder / "vlakeep_export.json").read_text())


def test_a_folder_with_all_statistics_plays_what_the_adapter_on_its_base_plays(run, world):
    config, storage = run
    config.export.dtype, config.export.folder, config.export.statistics = "float32", str(storage.runs / "merged-all"), "all"
    config.backbone.unnorm_key = "tabletop"  # the check of the merge can be of the base's actions too
    folder = run_export(config, storage)
    config.export.statistics, config.backbone.unnorm_key = "new", None
    adapted, *_ = load_target(world[1](BASELINE, "--evaluate.target", "export"), storage, "cpu")
    merged, spread = make_backbone(str(folder), "cpu"), np.linspace(-1, 1, 14).reshape(2, 7)
    assert list(merged.norm_stats) == ["tabletop_corner", "tabletop"] and merged.norm_stats == adapted.norm_stats
    for file, entry in (("config.json", "norm_stats"), (STATISTICS, None)):
        found = json.loads((folder / file).read_text())
        assert (found[entry] if entry else found) == adapted.norm_stats
    assert merged.norm_stats["tabletop"] != merged.norm_stats["tabletop_corner"]
    for key in merged.norm_stats:
        assert np.array_equal(merged.unnormalise(spread, key), adapted.unnormalise(spread, key))
    record = json.loads((folder / "vlakeep_export.json").read_text())
    assert record["statistics"] == ["tabletop_corner", "tabletop"] and record["parity"]["frames_identical"] == 6
    asked = world[1](BASELINE, "--backbone.checkpoint", folder, "--evaluate.skills", "[reach,corner]", "--evaluate.episodes", 2,
                     "--evaluate.questions_per_kind", 1, "--evaluate.retention_frames", 2)
    assert not [line for line in check_target(benchmark_class("tabletop")(asked, storage), {"model_type": "openvla"}) if line.status == RED]
    header = json.loads((run_evaluation(asked, storage) / "records.jsonl").read_text().splitlines()[0])["header"]["model"]
    assert (header["unnorm_key"], header["old_unnorm_key"]) == ("tabletop_corner", "tabletop")


def test_all_statistics_are_of_base_and_runs_before_and_of_one_name_the_newest(run, tmp_path, capsys):
    config, _ = run
    config = replace(config, export=replace(config.export, statistics="all"))

    def entry(end):
        return {"action": {"q01": [-end], "q99": [end]}}

    base = shutil.copytree(find_checkpoint("tabletop-base", tmp_path), tmp_path / "base")
    (base / STATISTICS).write_text(json.dumps({"old": entry(1.0), "same": entry(2.0), "task": entry(3.0)}))
    (tmp_path / "00" / "adapter").mkdir(parents=True)
    (tmp_path / "00" / "adapter" / STATISTICS).write_text(json.dumps({"task": entry(4.0), "first": entry(5.0)}))
    chain = Chain("", [Link("first", "step_000001", "", tmp_path / "00")])
    found = export.merged_statistics(config, base, chain, {"second": entry(6.0), "same": entry(2.0)})
    assert {name: one["action"]["q99"] for name, one in found.items()} == {
        "second": [6.0], "same": [2.0], "old": [1.0], "task": [4.0], "first": [5.0]} and next(iter(found)) == "second"
    assert "note" not in capsys.readouterr().err
    assert export.merged_statistics(config, base, chain, {"old": entry(7.0)})["old"] == entry(7.0)
    assert "statistics of old are the run's, which differ" in capsys.readouterr().err


def test_a_base_without_statistics_is_told_before_anything_is_merged(run, tmp_path, monkeypatch):
    config, storage = run
    base = shutil.copytree(find_checkpoint("tabletop-base", tmp_path), tmp_path / "base")
    (base / STATISTICS).unlink()
    model = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**model, "norm_stats": {}}))
    config = replace(config, export=replace(config.export, statistics="all", folder=str(storage.runs / "merged-none")),
                     backbone=replace(config.backbone, checkpoint=str(base)))
    monkeypatch.setattr(export, "merge_checkpoint", None)
    with pytest.raises(CheckpointError, match=f"all: {base} has no action statistics.*; use --export.statistics new, or put the"):
        run_export(config, storage)
    assert not (storage.runs / "merged-none").exists()


def test_nothing_is_merged_twice_or_over_another_model(run, tmp_path):
    config, storage = run
    config.export.dtype, config.export.folder = "stored", str(storage.runs / "merged-once")
    folder = run_export(config, storage)
    with pytest.raises(FileExistsError, match="--export.overwrite true"):
        run_export(config, storage)
    before = config.backbone.checkpoint
    config.backbone.checkpoint, config.export.folder = str(folder), str(storage.runs / "merged-again")
    with pytest.raises(CheckpointError, match="already holds this adapter.*merging it twice"):
        run_export(config, storage)
    (folder / "vlakeep_export.json").unlink()
    with pytest.raises(CheckpointError, match="other base weights|base"):
        run_export(config, storage)
    config.backbone.checkpoint = before
    assert not (storage.runs / "merged-again").exists()


def test_an_adapter_of_another_model_is_refused(run, tmp_path):
    config, storage = run
    adapter = tmp_path / "adapter"
    shutil.copytree(target_checkpoint("export", storage) / "adapter", adapter)
    state = load_file(adapter / "adapter_model.safetensors")
    name = next(name for name in state if name.endswith("lora_A.weight"))
    state[name] = state[name][:, :-8].contiguous()
    save_file(state, adapter / "adapter_model.safetensors")
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(CheckpointError, match="does not fit.*in the adapter"):
        merge.merge_checkpoint(find_checkpoint("tabletop-base", tmp_path), adapter, out, {})
    assert list(out.iterdir()) == []


def test_a_merge_that_changes_the_actions_leaves_nothing(run, monkeypatch):
    config, storage = run
    config.export.dtype, config.export.folder = "float32", str(storage.runs / "merged-wrong")
    monkeypatch.setattr(merge, "merged", lambda weight, pair, scale: -weight.float())
    with pytest.raises(CheckpointError, match="different actions.*nothing was written"):
        run_export(config, storage)
    assert not (storage.runs / "merged-wrong").exists()


def test_a_sum_that_is_stored_in_half_precision_may_move_an_action(run, monkeypatch):
    """The shipped base is stored in bfloat16 and runs in float32: a token at a tie is no wrong merge, many are."""
    config, storage = run
    config.export.dtype, config.export.folder = "stored", str(storage.runs / "merged-stored")
    asked = []

    def one_moves(backbone, samples, key):
        asked.append(export.action_ids.original(backbone, samples, key))
        asked[-1][0, 0] += len(asked) - 1  # in the merged model
        return asked[-1]

    one_moves.original = export.action_ids
    monkeypatch.setattr(export, "action_ids", one_moves)
    record = json.loads((run_export(config, storage) / "vlakeep_export.json").read_text())
    assert record["parity"]["frames_identical"] == 5
    monkeypatch.undo()
    config.export.folder = str(storage.runs / "merged-stored-wrong")
    monkeypatch.setattr(merge, "merged", lambda weight, pair, scale: -weight.float())
    with pytest.raises(CheckpointError, match="which no rounding explains.*nothing was written"):
        run_export(config, storage)


def test_a_convolution_merges_like_a_linear():
    weight = torch.zeros(6, 3, 2, 2)
    a, b = torch.randn(4, 3, 2, 2), torch.randn(6, 4, 1, 1)
    wanted = torch.einsum("or,rihw->oihw", b[:, :, 0, 0], a)
    assert torch.allclose(merge.merged(weight, (a, b), 0.5), 0.5 * wanted, atol=1e-6)
