"""The implementation against numbers of the official code, and that the checker notices when they differ."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from vlakeep.core.compat import import_timm
from vlakeep.data.sample import Row
from vlakeep.openvla.model import OpenVLA, parameters_on_meta
from vlakeep.openvla.tiny import build_tiny_tokenizer
from vlakeep.parity import verify_golden as golden
from vlakeep.parity.golden import UNCHECKED, verify_model, verify_shapes
from vlakeep.parity.golden_text import verify_text
from vlakeep.parity.golden_weights import formula_tensor, golden_config

HERE = Path(__file__).resolve().parent


def golden_root() -> Path:
    """VLAKEEP_GOLDEN, or a folder beside the repository, or the small part that comes with it."""
    candidates = [Path(p) for p in [os.environ.get("VLAKEEP_GOLDEN")] if p] + [
        HERE.parents[1] / "shared" / "golden",
        HERE / "golden",
    ]
    return next(p for p in candidates if (p / "fused_tiny" / "golden.npz").is_file())


ROOT = golden_root()


@pytest.fixture(scope="module")
def model_rows():
    return verify_model(ROOT / "fused_tiny")


def failed(rows):
    return [row.name for row in rows if not row.ok]


def test_the_model_agrees_with_the_official_one(model_rows):
    assert failed(model_rows) == []
    names = " ".join(row.name for row in model_rows)
    for part in (
        "vision patches",
        "projector",
        "hidden states",
        "gradients of the hidden states",
        "another argmax",
        "loss",
        "loss without an image",
        "gradients of the parameters",
        "hook on layer 2, zero_patch_positions",
        "generation 0",
        "generation 1",
        "one batch",
        "predicted action 0, lab_mix",
        "predicted action 1, lab_nomask",
        "full fine-tuning",
        "LoRA, losses of 4 steps",
        "after merging",
    ):
        assert part in names, part
    assert not [row for row in model_rows if row.tolerance == UNCHECKED], "entries of golden.npz that nothing checks"


def test_text_and_pixels_agree():
    rows = verify_text(ROOT / "text")
    assert failed(rows) == [] and len(rows) > 40


def test_all_folders_through_the_command(capsys):
    """Everything but the model, which the fixture above has checked."""
    folders = [str(ROOT / name) for name in ("rlds", "eval", "augment") if (ROOT / name).is_dir()]
    assert golden.main(folders) == 0
    out = capsys.readouterr().out
    assert "0 of" not in out.splitlines()[-1] and "quantities within tolerance" in out and "not checked" in out


def test_a_parent_folder_stands_for_its_children():
    assert {p.name for p in golden.golden_folders([ROOT])} >= {"fused_tiny", "text", "rlds", "eval"}
    assert golden.golden_folders([ROOT / "text", ROOT / "text"]) == [ROOT / "text"]


def test_what_is_not_golden_is_an_error(tmp_path, capsys):
    assert golden.main([str(tmp_path)]) == 2
    assert "no golden folder" in capsys.readouterr().err
    assert golden.main([str(tmp_path / "nowhere")]) == 2
    assert "no folder" in capsys.readouterr().err


def test_a_number_past_its_tolerance_fails_the_command(tmp_path, capsys):
    shutil.copytree(ROOT / "text", tmp_path / "text")
    file = tmp_path / "text" / "text_golden.json"
    file.chmod(0o644)
    (tmp_path / "text").chmod(0o755)
    data = json.loads(file.read_text())
    data["llama2"]["actions"]["zero/float32"]["token_ids"][3] += 1
    file.write_text(json.dumps(data))
    assert golden.main([str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "FAIL text: llama2: action token ids" in out and "FAIL text: llama2: decoded actions" in out


@pytest.fixture
def small(tmp_path):
    """fused_tiny without LoRA and hooks, writable."""
    for name in ("config.json", "golden.npz", "state_dict.json"):
        (tmp_path / name).write_bytes((ROOT / "fused_tiny" / name).read_bytes())
    return tmp_path


def change(folder, **values):
    with np.load(folder / "golden.npz") as data:
        entries = {key: data[key] for key in data.files if not key.startswith(("full_finetune", "lora", "generate", "predict"))}
    for key, change in values.items():
        entries[key] = change(entries[key].copy()) if key in entries else change(None)
    np.savez(folder / "golden.npz", **entries)


def test_differences_in_the_model_are_noticed(small):
    def one_off(x):
        x[-1, 0, 5, 3] += 2e-4
        return x

    change(
        small,
        hidden_states=one_off,
        loss=lambda x: x + np.float32(5e-4),
        logits_argmax=lambda x: x + (np.arange(x.size).reshape(x.shape) == 7),
        something_new=lambda _: np.zeros(2),
    )
    rows = verify_model(small)
    assert failed(rows) == ["hidden states, embeddings and 6 layers", "logits, positions with another argmax", "loss"]
    assert [row.name for row in rows if row.tolerance == UNCHECKED] == ["golden.npz: something_new"]


def test_nan_is_a_failure():
    assert not Row("x", float("nan"), 1.0).ok
    assert golden.difference(np.array([np.nan]), np.array([1.0])) == float("inf")
    assert golden.difference(np.zeros(2), np.zeros(3)) == float("inf")


def test_weights_by_formula():
    """First, last and sum of recorded tensors; one of each rule."""
    table = {e["name"]: e for e in json.loads((ROOT / "fused_tiny" / "state_dict.json").read_text())}
    for name in (
        "language_model.lm_head.weight",
        "vision_backbone.featurizer.blocks.0.ls1.scale_factor",
        "projector.fc1.bias",
        "language_model.model.embed_tokens.weight",
        "vision_backbone.fused_featurizer.attn_pool.latent",
        "projector.fc1.weight",
    ):
        tensor, entry = formula_tensor(name, table[name]["shape"]), table[name]
        assert (tensor.flatten()[0].item(), tensor.flatten()[-1].item()) == (entry["first"], entry["last"])
        assert tensor.double().sum().item() == pytest.approx(entry["sum"], abs=1e-9 * entry["abs_sum"])


def test_sizes_of_unknown_vision_models_come_from_the_shapes(tmp_path):
    """A single ViT of another size, without class token; and shapes alone are compared key by key."""
    config = json.loads((ROOT / "fused_tiny" / "config.json").read_text())
    config.update(
        use_fused_vision_backbone=False, timm_model_ids=["lab_unknown"], image_sizes=[32], timm_override_act_layers=[None]
    )
    config["text_config"].update(
        num_hidden_layers=1, hidden_size=32, num_attention_heads=2, num_key_value_heads=2, vocab_size=32064
    )
    register = import_timm().models.register_model
    from timm.models.vision_transformer import VisionTransformer

    @register
    def golden_test_vit(pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, cache_dir=None, **options):
        return VisionTransformer(
            **dict(
                dict(patch_size=8, embed_dim=36, depth=3, num_heads=3, mlp_ratio=2.5, class_token=False, global_pool="map"),
                **options,
            )
        )

    with parameters_on_meta():
        model = OpenVLA(dict(config, timm_model_ids=["golden_test_vit"], pad_to_multiple_of=64))
    shapes = {name: list(t.shape) for name, t in model.state_dict().items()}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "keys.json").write_text(json.dumps([{"name": n, "shape": s} for n, s in shapes.items()]))
    assert golden_config(tmp_path, shapes)["timm_model_ids"] != ["lab_unknown"]
    assert golden.kind_of(tmp_path) == "shapes" and failed(verify_shapes(tmp_path)) == []
    shapes["projector.fc1.bias"] = [7]
    (tmp_path / "keys.json").write_text(json.dumps(shapes))
    assert failed(verify_shapes(tmp_path)) == ["state dict, keys and shapes that differ"]


def test_a_tokenizer_of_another_vocabulary_is_refused(tmp_path):
    from vlakeep.openvla.processor import load_tokenizer

    build_tiny_tokenizer(["pick up the cube"], [], tmp_path, 704)
    assert failed(verify_text(ROOT / "text", load_tokenizer(tmp_path))) == ["the tokenizer given is one of those recorded"]
