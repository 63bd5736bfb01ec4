"""Adapters that were trained elsewhere, as runs."""

import json
import shutil

import pytest
import test_backbone
import torch
from safetensors.torch import load_file
from test_lora import loss

from vlakeep import cli
from vlakeep.core.checkpoint import latest_intact, load_checkpoint
from vlakeep.core.config import ConfigError, load_config
from vlakeep.core.errors import CheckpointError
from vlakeep.core.storage import Storage
from vlakeep.evaluate import load_target
from vlakeep.models.adapters import WEIGHTS_FILE, adapters_disabled
from vlakeep.models.load import make_backbone

folder = test_backbone.folder  # the fixture of the tiny checkpoint
STATISTICS = {"theirs": {"action": {"q01": [-1.0] * 7, "q99": [1.0] * 7, "mask": [True] * 6 + [False]}, "num_transitions": 3}}


@pytest.fixture
def trained(folder, tmp_path):
    """(the model with an adapter on all linears but the head, as the official finetune.py has them, and the folders of adapter and run)."""
    backbone = make_backbone(folder)
    from peft import LoraConfig, get_peft_model  # behind the model, which mends torchvision beside a CPU build of torch

    linears = [name for name, module in backbone.model.named_modules() if isinstance(module, torch.nn.Linear) and "lm_head" not in name]
    backbone.model = get_peft_model(backbone.model, LoraConfig(r=4, lora_alpha=4, target_modules=linears, init_lora_weights="gaussian"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    adapter, run = tmp_path / "adapter-tmp", tmp_path / "their run"
    backbone.model.save_pretrained(str(adapter))
    run.mkdir()
    (run / "dataset_statistics.json").write_text(json.dumps(STATISTICS))
    return backbone, adapter, run


def words(folder, tmp_path, adapter, *more):
    return ["adopt", "--root", str(tmp_path / "root"), "--backbone.checkpoint", str(folder), "--name", "theirs", "--adapter", str(adapter),
            *more]


def test_an_adapter_of_peft_becomes_a_run_with_its_outputs_to_the_bit(folder, trained, tmp_path, capsys):
    theirs, adapter, run = trained
    before = loss(make_backbone(folder))
    assert cli.run(words(folder, tmp_path, adapter, "--statistics", str(run / "dataset_statistics.json"), "--step", "50")) == 0
    assert "actions of theirs" in capsys.readouterr().out
    config = load_config(None, ["--root", str(tmp_path / "root"), "--backbone.checkpoint", str(folder), "--evaluate.target", "theirs"])
    backbone, name, _ = load_target(config, Storage.from_config(config), torch.device("cpu"))
    assert name == "theirs" and backbone.unnorm_key == "theirs" and backbone.norm_stats["theirs"] == STATISTICS["theirs"]
    assert torch.equal(loss(backbone), loss(theirs)) and not torch.equal(loss(backbone), before)
    with adapters_disabled(backbone):
        assert torch.equal(loss(backbone), before)
    place = tmp_path / "root" / "runs" / "theirs"
    checkpoint = latest_intact(place)
    assert checkpoint.name == "step_000050" and load_checkpoint(checkpoint)[1] == {"step": 50, "base_weights": backbone.weights_sha256}
    record = json.loads((place / "adopted.json").read_text())
    assert record["step"] == 50 and len(record["adapter_sha256"]) == len(record["statistics_sha256"]) == 64
    assert all(".lora_" in key for key in load_file(str(checkpoint / "adapter" / WEIGHTS_FILE)))
    # What follows takes it as any other run.
    there = ["--root", str(tmp_path / "root"), "--export.target", "theirs"]
    assert cli.run(["interpolate", *there, "--alphas", "0.5"]) == 0
    assert cli.run(["export", "--backbone.checkpoint", str(folder), *there]) == 0
    merged = make_backbone(next(place.glob("merged-*")))
    assert float((loss(merged) - loss(theirs)).abs()) < 0.02 and list(merged.norm_stats) == ["theirs"]
    with pytest.raises(FileExistsError, match="exists already: take another --name"):
        cli.run(words(folder, tmp_path, adapter, "--statistics", str(run / "dataset_statistics.json")))
    shutil.rmtree(checkpoint)  # as a kill before it leaves the run
    assert cli.run(words(folder, tmp_path, adapter, "--statistics", str(run / "dataset_statistics.json"))) == 0 and latest_intact(place)


def test_what_cannot_be_taken_is_said_before_a_run_is_there(folder, trained, tmp_path):
    theirs, adapter, run = trained
    with pytest.raises(FileNotFoundError, match="dataset_statistics.json, without which the adapter's actions mean nothing: give --sta"):
        cli.run(words(folder, tmp_path, adapter))
    shutil.copyfile(run / "dataset_statistics.json", adapter / "dataset_statistics.json")
    (run / "dataset_statistics.json").write_text('{"theirs": {"action": {"q01": [0.0]}}}')
    with pytest.raises(CheckpointError, match="holds no action statistics"):
        cli.run(words(folder, tmp_path, adapter, "--statistics", str(run / "dataset_statistics.json")))
    with pytest.raises(ConfigError, match="--name 'base': must be a folder name"):
        cli.run([*words(folder, tmp_path, adapter), "--name", "base"])
    told = json.loads((adapter / "adapter_config.json").read_text())
    for name, value in {"alpha_pattern": {"q_proj": 32}, "rank_pattern": {"q_proj": 8}, "use_dora": True, "modules_to_save": ["projector"],
                        "bias": "all"}.items():
        (adapter / "adapter_config.json").write_text(json.dumps({**told, name: value}))
        with pytest.raises(CheckpointError, match=rf"is not a plain LoRA adapter \({name}\)"):
            cli.run(words(folder, tmp_path, adapter))
    (adapter / "adapter_config.json").write_text(json.dumps(told))
    (adapter / WEIGHTS_FILE).rename(adapter / "adapter_model.bin")
    with pytest.raises(ConfigError, match="adapter_model.bin is a pickle, which is not opened here"):
        cli.run(words(folder, tmp_path, adapter))
    (adapter / "adapter_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match="no adapter_model.safetensors in .*adapter-tmp"):
        cli.run(words(folder, tmp_path, adapter))
    assert not (tmp_path / "root" / "runs" / "theirs").exists()
