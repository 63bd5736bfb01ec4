"""A base in 4 bits (models/quantised.py)."""

import sys

import pytest
import torch
from conftest import BASELINE, GRADED, final_adapter

from vlakeep.core.checkpoint import check_base
from vlakeep.core.config import BackboneConfig, ConfigError, load_config
from vlakeep.core.errors import CheckpointError
from vlakeep.core.hardware import GIB
from vlakeep.evaluate import load_target
from vlakeep.export import run_export
from vlakeep.methods.measured import weights
from vlakeep.models.adapters import LoraInfo, add_lora, merged_state
from vlakeep.models.load import make_backbone
from vlakeep.models.quantised import BYTES, identity, is_quantised, plain_weight, rounded
from vlakeep.teacher.folder import ArtifactError
from vlakeep.train import run_training

NF4 = ["--backbone.quantisation", "nf4"]


@pytest.fixture
def library():
    """bitsandbytes, which is an extra."""
    return pytest.importorskip("bitsandbytes")


def test_without_the_package_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match=r"--backbone.quantisation nf4: .*pip install .*bitsandbytes\]', or --backbone.quant"):
        make_backbone(BackboneConfig(quantisation="nf4"))


@pytest.mark.parametrize("options", [["--train.from_run", "first"], ["--lora.layers", "all", "--lora.modules", "[all-linear]"],
                                     ["--train.sharding", "fsdp"]])
def test_what_does_not_go_with_4_bits_is_refused(options):
    with pytest.raises(ConfigError, match=r"--(backbone.quantisation|train.sharding) '\w+': must be none with"):
        load_config(BASELINE, [*NF4, *options])


def test_a_quantised_base_is_another_base_to_every_check():
    plain, packed = "a" * 64, identity("a" * 64, "nf4")
    assert identity(plain, "none") == plain and packed != plain and len(packed) == 64
    check_base("run", {"base_weights": packed}, packed)
    with pytest.raises(CheckpointError, match="other base weights.*--backbone.quantisation"):
        check_base("run", {"base_weights": packed}, plain)
    assert BYTES * 6.476e9 / GIB == pytest.approx(3.1, abs=0.05), "the decoder linears of 7B"


def test_decoder_linears_are_packed_and_compute_with_rounded_weights(library):
    packed, plain = (make_backbone(BackboneConfig(quantisation=kind)) for kind in ("nf4", "none"))
    linears = {name: module for name, module in packed.network.named_modules() if is_quantised(module)}
    assert set(linears) == {name for name, _ in plain.network.named_modules() if plain.is_decoder_linear(name)} and len(linears) == 42
    for name, linear in list(linears.items())[:3]:
        weight = plain.network.get_submodule(name).weight.detach()
        own = plain_weight(linear)
        assert torch.equal(own, rounded(weight, torch.float32, "cpu")) and linear.weight.numel() * 2 == weight.numel()
        assert 0.02 < float((own - weight).norm() / weight.norm()) < 0.15
        x = torch.randn(2, weight.shape[1], generator=torch.Generator().manual_seed(0))
        assert torch.allclose(linear(x), x @ own.T, atol=1e-4)
    assert packed.weights_sha256 == identity(plain.weights_sha256, "nf4")
    add_lora(packed, load_config(BASELINE, ["--lora.layers", "last:1"]).lora, 0)
    assert isinstance(packed.lora, LoraInfo)
    one = next(iter(packed.adapted_linears()))
    assert torch.equal(weights(packed.adapted_linears())[one], plain_weight(packed.adapted_linears()[one].get_base_layer()))
    state = merged_state(packed)
    assert state.keys() == plain.network.state_dict().keys()
    assert all(state[name].shape == value.shape for name, value in plain.network.state_dict().items())


def test_training_export_and_evaluation_of_a_quantised_base(library, world, graded_folder):
    """With everything off the method is plain LoRA to the bit; the export is what was trained; what is of another base is refused."""
    storage, make_config = world
    short = [*NF4, "--train.steps", 2, "--lora.layers", "last:1", "--train.batch_size", 2]
    plain = run_training(make_config(BASELINE, *short, "--name", "nf4-plain"), storage)
    off = run_training(make_config(GRADED, *short, "--name", "nf4-off", "--gains.enabled", False, "--thermostat.enabled", False), storage)
    assert final_adapter(plain) == final_adapter(off)
    with pytest.raises(ArtifactError, match="weights quantised as none, this run as nf4"):
        run_training(make_config(GRADED, *short, "--name", "nf4-graded", "--gains.name", graded_folder.name), storage)
    with pytest.raises(CheckpointError, match="--backbone.quantisation"):
        load_target(make_config(BASELINE, "--evaluate.target", "nf4-plain"), storage, "cpu")
    with pytest.raises(CheckpointError, match="--backbone.quantisation"):
        run_export(make_config(BASELINE, "--name", "nf4-plain"), storage)
    config = make_config(BASELINE, *NF4, "--name", "nf4-plain", "--evaluate.target", "nf4-plain", "--export.dtype", "float32",
                         "--export.parity_frames", 2)
    out = run_export(config, storage)
    trained = load_target(config, storage, "cpu")[0]
    exported = make_backbone(str(out))
    for name, value in merged_state(trained).items():
        assert torch.allclose(exported.network.get_parameter(name), value.float(), atol=1e-6), name
