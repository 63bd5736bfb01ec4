"""Adapters: where they go, that they start as nothing, that the teacher can be had back, and their files."""

import json

import pytest
import test_backbone
import torch
from torch import nn
from torch.nn.utils import parametrize

from vlakeep.core.config import BackboneConfig, LoraConfig
from vlakeep.core.errors import CheckpointError
from vlakeep.models.adapters import (
    adapter_state,
    adapters_disabled,
    add_lora,
    layer_numbers,
    load_adapter,
    load_adapter_state,
    load_trainable,
    save_adapter,
    select_linears,
    target_modules,
    trainable_state,
)
from vlakeep.models.load import make_backbone
from vlakeep.models.merge import save_checkpoint
from vlakeep.openvla.prompts import encode_batch

samples = test_backbone.samples
folder = test_backbone.folder  # the fixture of the tiny checkpoint


def adapted(folder, seed=7, dtype="float32", train=True, **changes):
    backbone = make_backbone(BackboneConfig(checkpoint=str(folder), dtype=dtype))
    add_lora(backbone, LoraConfig(**dict(dict(rank=4, alpha=8), **changes)), seed)
    if train:
        batch, params = encode_batch(samples(), backbone.processor), [p for p in backbone.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(params, lr=1e-2)
        for _ in range(2):
            optimizer.zero_grad()
            backbone(batch).loss.backward()
            optimizer.step()
    return backbone


def loss(backbone):
    with torch.no_grad():
        return backbone(encode_batch(samples(), backbone.processor)).loss


class Halve(nn.Module):
    def forward(self, a):
        return 0.5 * a


@pytest.mark.parametrize(
    "spec, numbers",
    [
        ("all", [0, 1, 2, 3, 4, 5, 6, 7]),
        ("last:3", [5, 6, 7]),
        ("2-4", [2, 3, 4]),
        ("0,2,4", [0, 2, 4]),
        ("6-7,0", [0, 6, 7]),
        ("last:8", list(range(8))),
        ("5", [5]),
    ],
)
def test_layer_specifications(spec, numbers):
    assert layer_numbers(spec, 8) == numbers


@pytest.mark.parametrize("spec", ["last:9", "last:0", "8", "4-8", "5-3", "first:2", "", "-1", "1.5", "last"])
def test_a_layer_outside_the_model_is_refused_with_the_range(spec):
    with pytest.raises(ValueError, match="layers 0 to 7"):
        layer_numbers(spec, 8)


def test_targets_in_the_order_of_the_model(folder):
    backbone = make_backbone(folder)
    assert target_modules(backbone, "1,2", ["mlp", "q_proj"]) == [
        f"language_model.model.layers.{n}.{leaf}"
        for n in (1, 2)
        for leaf in ("self_attn.q_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    ]
    assert len(select_linears(backbone, "all", ["attention", "mlp"])) == 21
    for modules in (["lm_head"], []):
        with pytest.raises(ValueError, match="attention, mlp"):
            target_modules(backbone, "all", modules)


def test_adapters_start_as_nothing_and_only_they_train(folder):
    base, backbone = make_backbone(folder), adapted(folder, train=False, layers="last:2", modules=["attention"])
    assert torch.equal(loss(base), loss(backbone))
    names = [n for n, p in backbone.named_parameters() if p.requires_grad]
    assert len(names) == 2 * 8 and all(".lora_" in n for n in names)
    assert list(backbone.adapted_linears()) == [f"layers.{n}.self_attn.{leaf}_proj" for n in (1, 2) for leaf in "qkvo"]
    assert backbone.first_adapted_layer() == 1 and base.first_adapted_layer() == 3
    with pytest.raises(ValueError, match="already has adapters"):
        add_lora(backbone, LoraConfig(), 0)


def test_the_seed_alone_draws_a(folder):
    one, same, other = (adapter_state(adapted(folder, seed=seed, train=False)) for seed in (7, 7, 8))
    a = [name for name in one if "lora_A" in name]
    assert all(torch.equal(one[n], same[n]) for n in one) and not any(torch.equal(one[n], other[n]) for n in a)
    assert torch.cat([one[n].flatten() for n in a]).std().item() == pytest.approx(1 / 4, rel=0.05)
    uniform = adapter_state(adapted(folder, train=False, init="kaiming"))
    assert max(uniform[n].abs().max() * uniform[n].shape[1] ** 0.5 for n in a).item() == pytest.approx(1, abs=0.05)


def test_the_teacher_can_be_had_back(folder):
    base, backbone = make_backbone(folder), adapted(folder)
    student = loss(backbone)
    assert not torch.equal(student, loss(base))
    with adapters_disabled(backbone):
        assert torch.equal(loss(backbone), loss(base))
        assert any(p.requires_grad for p in backbone.parameters())
    with pytest.raises(RuntimeError), adapters_disabled(backbone):
        raise RuntimeError
    assert torch.equal(loss(backbone), student)


def test_adapters_stay_float32_on_a_bfloat16_model(folder):
    backbone = adapted(folder, dtype="bfloat16")
    assert {p.dtype for p in backbone.parameters() if p.requires_grad} == {torch.float32}
    assert backbone.dtype == torch.bfloat16 and torch.isfinite(loss(backbone))


def test_files_bring_the_student_back_here_and_in_plain_peft(folder, tmp_path):
    from peft import PeftModel

    backbone = adapted(folder, layers="0,2")
    save_adapter(backbone, tmp_path)
    again = make_backbone(folder)
    load_adapter(again, tmp_path)
    assert torch.equal(loss(again), loss(backbone)) and again.lora.targets == backbone.lora.targets
    plain = make_backbone(folder)
    plain.model = PeftModel.from_pretrained(plain.model, str(tmp_path))
    assert torch.equal(loss(plain), loss(backbone))
    plain.model.save_pretrained(str(tmp_path / "peft"))
    third = make_backbone(folder)
    load_adapter(third, tmp_path / "peft")
    assert torch.equal(loss(third), loss(backbone))


def test_a_parametrisation_is_merged_into_what_is_saved(folder, tmp_path):
    backbone = adapted(folder)
    for linear in backbone.adapted_linears().values():
        parametrize.register_parametrization(linear.lora_A["default"], "weight", Halve())
    save_adapter(backbone, tmp_path)
    again = make_backbone(folder)
    load_adapter(again, tmp_path)
    assert torch.equal(loss(again), loss(backbone))
    raw = trainable_state(backbone)
    assert any(name.endswith("original") for name in raw)
    other = adapted(folder, seed=1, train=False)
    with pytest.raises(CheckpointError, match="other trainable parameters"):
        load_trainable(other, raw)
    for linear in other.adapted_linears().values():
        parametrize.register_parametrization(linear.lora_A["default"], "weight", Halve())
    load_trainable(other, raw)
    assert torch.equal(loss(other), loss(backbone))
    with pytest.raises(ValueError, match="parametrisation"):
        load_adapter_state(backbone, adapter_state(backbone))


def test_merging_keeps_the_function(folder, tmp_path):
    backbone = adapted(folder)
    save_checkpoint(backbone, tmp_path)
    merged = make_backbone(tmp_path)
    assert loss(merged).item() == pytest.approx(loss(backbone).item(), abs=1e-5)
    assert merged.openvla.state_dict().keys() == make_backbone(folder).openvla.state_dict().keys()


def test_a_wrong_adapter_is_refused(folder, tmp_path):
    save_adapter(adapted(folder, train=False), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    with pytest.raises(FileNotFoundError, match="adapter_config.json"):
        load_adapter(make_backbone(folder), tmp_path / "nowhere")
    (tmp_path / "adapter_config.json").write_text(json.dumps(dict(config, r=8)))
    with pytest.raises(CheckpointError, match="must be"):
        load_adapter(make_backbone(folder), tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(dict(config, use_dora=True)))
    with pytest.raises(CheckpointError, match="plain LoRA"):
        load_adapter(make_backbone(folder), tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_adapter(make_backbone(folder), tmp_path)
