"""Training small models from nothing: batches, windows of pictures, and a model that learns and is read back."""

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vlakeep.core.config import BackboneConfig
from vlakeep.core.options import Stage, split
from vlakeep.data.sample import Sample
from vlakeep.data.statistics import action_statistics
from vlakeep.libero.pretrain import LIGHT, Windows, shrink, stored_side
from vlakeep.models.load import make_backbone
from vlakeep.openvla import pretraining
from vlakeep.openvla.pretraining import compile_layers, fit, new_model, picker, save
from vlakeep.openvla.sizes import model_options


def samples(asked, others):
    return [Sample(None, "is it red?", question=True, answer="yes") for _ in range(asked)] + [
        Sample(None, "lift", np.zeros(7, np.float32)) for _ in range(others)]


def test_a_share_of_each_batch_asks_questions_however_few_there_are():
    found = samples(3, 1000)
    generator = torch.Generator().manual_seed(0)
    rows = picker(found, 4000, 0.25, generator, "cpu")()
    assert 0.22 < (rows < 3).float().mean() < 0.28 and int(rows.max()) > 900
    assert (picker(samples(0, 10), 50, 0.25, generator, "cpu")() < 10).all()
    assert (picker(found, 4000, None, generator, "cpu")() < 3).float().mean() < 0.02


def test_layers_that_are_run_are_the_compiled_ones(monkeypatch):
    """On a GPU that halves a step; compiling here would take a minute."""
    compiled, used = [], []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(module))
    backbone = make_backbone("tabletop-base")
    compile_layers(backbone.openvla)
    for module in compiled:
        module.register_forward_hook(lambda module, *_: used.append(module))
    backbone.predict_actions([np.zeros((64, 64, 3), np.uint8)], ["pick the red cube"])
    assert set(used) == set(compiled) and len(compiled) == len(set(compiled)) > 10
    inside = sum(p.numel() for module in compiled for p in module.parameters())
    assert inside > 0.8 * sum(p.numel() for p in backbone.parameters())


def test_windows_are_parts_of_the_picture_under_another_light():
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(60, 190, (2, 20, 20, 3), dtype=np.uint8))
    torch.manual_seed(0)
    cut = Windows(images, 18)(torch.tensor([1] * 64))
    assert cut.shape == (64, 18, 18, 3) and 0 <= float(cut.min()) and float(cut.max()) <= 255
    means = cut.mean(dim=(1, 2, 3)) - images[1].float().mean()
    assert 0.5 * 255 * LIGHT < means.abs().max() < 1.1 * 255 * LIGHT
    windows = images[1].float().unfold(0, 18, 1).unfold(1, 18, 1).permute(0, 1, 3, 4, 2).reshape(-1, 18, 18, 3)
    for one in cut[:8]:  # up to light, each is one of the nine windows
        likeness = [torch.corrcoef(torch.stack([one.flatten(), window.flatten()]))[0, 1] for window in windows]
        assert max(likeness) > 0.95 and sorted(likeness)[-2] < 0.5


def test_the_window_is_nine_tenths_of_the_stored_picture():
    assert stored_side(128) == 135 and (128 / 135) ** 2 == pytest.approx(0.9, abs=2e-3)
    assert shrink(np.full((256, 256, 3), 77, np.uint8), 135).shape == (135, 135, 3)


def test_a_small_model_learns_and_is_read_back(tmp_path, monkeypatch):
    # A clock that counts steps: the schedule follows it, and a busy machine would make a third of them.
    monkeypatch.setattr(pretraining, "time", SimpleNamespace(perf_counter=itertools.count(step=9 / 150).__next__))
    sizes = model_options(hidden=48, heads=6, layers=2, mlp=64, vocab=720, batch=8, patch=16, lr=3e-3)
    args, _, _ = split(Stage("x", "x", "y", own=sizes), ["--out", str(tmp_path / "m"), "--minutes", "0.15", "--device", "cpu"])
    backbone, processor = new_model(args, ["move left", "move right"], ["move", "left", "right"], 64, "tiny")
    actions = {"move left": np.full(7, -0.5, np.float32), "move right": np.full(7, 0.5, np.float32)}
    data = [Sample(None, text, action) for text, action in actions.items() for _ in range(4)]
    backbone.norm_stats = {"libero_x": action_statistics(np.stack([np.full(7, v, np.float32) for v in (-1, 1)]), 1)}
    images = torch.zeros(len(data), 64, 64, 3, dtype=torch.uint8)
    trained = fit(backbone, processor, data, lambda pick_B: images[pick_B], args, 0.2)
    save(backbone, args, "vlakeep x", trained, samples=len(data))
    again = make_backbone(BackboneConfig(checkpoint=str(tmp_path / "m")), torch.device("cpu")).eval()
    said = again.predict_actions(np.zeros((2, 224, 224, 3), np.uint8), list(actions), "libero_x")
    assert said[0, 0] < -0.3 and said[1, 0] > 0.3
    facts = json.loads((tmp_path / "m" / "PROVENANCE.json").read_text())
    assert facts["steps"] == trained["steps"] > 20 and "model.safetensors" in facts["sha256"]
