"""pi0-FAST in LIBERO: both cameras, the state and chunks reach the model as lerobot and openpi hand them over.

tests/fake_libero.py stands for the simulator, and for the model a function of everything in its batch: an episode succeeds only with the
actions that this file works out from the fake's pictures and states.
"""

import json
from dataclasses import replace

import fake_libero
import numpy as np
import pytest
import torch
from conftest import BASELINE, read_evaluation

from vlakeep.benchmarks.specs import ObservationSpec, observation_problems
from vlakeep.core.config import load_config
from vlakeep.core.storage import Storage
from vlakeep.data.images import center_crop
from vlakeep.data.sample import Sample, SampleSpec
from vlakeep.data.statistics import normalise_state
from vlakeep.evaluate import run_evaluation
from vlakeep.libero import benchmark as libero
from vlakeep.libero import setup as libero_setup
from vlakeep.libero.env import policy_image
from vlakeep.models.load import make_backbone
from vlakeep.pi0_fast.backbone import Pi0FastBackbone
from vlakeep.pi0_fast.tiny import make_folder

SUITE, CAMERAS, CHUNK, PLAYED, STEPS = "libero_object", ("base_0_rgb", "left_wrist_0_rgb"), 3, 2, 5
ACTION = {"q01": [-0.9] * 6 + [0.0], "q99": [0.9] * 6 + [1.0], "min": [-1.0] * 6 + [0.0], "max": [1.0] * 7, "mean": [0.0] * 7,
          "std": [1.0] * 7, "mask": [True] * 6 + [False]}
PROPRIO = {"q01": [-1.0] * 8, "q99": [1.5] * 8, "min": [-2.0] * 8, "max": [2.0] * 8, "mean": [0.0] * 8, "std": [1.0] * 8}


def answer(batch):
    """Chunks [N, CHUNK, 7], normalised, a smooth function of every picture, its orientation, and every token of the prompt."""
    pixels_NCX = batch.pixel_values.flatten(2).double()
    ids_NL = torch.where(batch.attention_mask, batch.input_ids, 0).double()
    weights = (torch.arange(size, dtype=torch.float64) % 97 / 97 for size in (pixels_NCX.shape[2], ids_NL.shape[1]))
    seen_NC, told_N = (x @ w for x, w in zip((pixels_NCX, ids_NL), weights))
    number_N = seen_NC @ torch.tensor([0.01, 0.023], dtype=torch.float64)[:seen_NC.shape[1]] + told_N
    return torch.sin(number_N[:, None] + torch.arange(CHUNK * 7)).view(-1, CHUNK, 7).numpy()


@pytest.fixture
def model(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    chunks = [rng.uniform(-1, 1, (CHUNK, 7)) for _ in range(50)]
    folder = tmp_path / "pi0"
    make_folder(folder, list(fake_libero.TASKS[SUITE]), chunks, {SUITE: {"action": ACTION, "proprio": PROPRIO}}, CAMERAS, state=8)

    def attempt(self, batch, key=None):
        return self.unnormalise(answer(batch), key), np.zeros(batch.size, dtype=bool)

    monkeypatch.setattr(Pi0FastBackbone, "attempt_chunks", attempt)
    monkeypatch.setattr(libero, "LiberoEnv", fake_libero.Env)
    monkeypatch.setattr(libero, "load_suite", fake_libero.Suite)
    monkeypatch.setattr(libero, "require_libero", lambda: None)
    monkeypatch.setattr(libero_setup, "versions", lambda: {"mujoco": "3.3.7"})
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    monkeypatch.setenv("FAKE_LIBERO", str(tmp_path / "plan.json"))
    monkeypatch.setitem(libero.MAX_STEPS, SUITE, STEPS)
    return make_backbone(folder)


def wanted(model, task, init, change=lambda sample: sample, crop=False):
    """The actions of an episode in the simulator's terms: PLAYED of each chunk, then the model looks again."""
    actions = []
    for step in range(0, STEPS, PLAYED):
        views = [fake_libero.picture(SUITE, task, init, step, seed) for seed in (0, fake_libero.WRIST)]
        pictures = {name: center_crop(view) if crop else view for name, view in zip(CAMERAS, views)}
        state = normalise_state(fake_libero.state(init, step)[None], model.norm_stats[SUITE])[0]
        batch = model.processor.encode_prompts([change(Sample(None, fake_libero.TASKS[SUITE][task], cameras=pictures, state=state))])
        chunk = model.unnormalise(answer(batch), SUITE)[0, :PLAYED]
        actions += np.c_[chunk[:, :6], np.where(chunk[:, 6] > 0.5, -1.0, 1.0)].tolist()
    return actions[:STEPS]


def evaluate(model, tmp_path, plan, *more):
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    config = load_config(BASELINE, [
        "--root", str(tmp_path), "--threads", "1", "--device", "cpu", "--backbone.checkpoint", str(model.processor.folder),
        "--evaluate.target", "base", "--evaluate.benchmark", SUITE, "--evaluate.episodes", "2", "--evaluate.skills", "[0, 2]",
        "--evaluate.batch", "3", "--evaluate.workers", "2", "--evaluate.center_crop", "false", "--evaluate.chunk", str(PLAYED), *more])
    rows, _ = read_evaluation(run_evaluation(config, Storage.from_config(config)))
    return {(row["trial"] // 50, row["init"]): row["success"] for row in rows if row["kind"] == "skill"}


@pytest.mark.parametrize("crop", [False, True])
def test_cameras_state_and_chunks_reach_the_model(model, tmp_path, crop):
    swapped = {CAMERAS[0]: CAMERAS[1], CAMERAS[1]: CAMERAS[0]}
    changes = {
        (0, 0): lambda sample: sample,
        (0, 1): lambda sample: replace(sample, cameras={swapped[name]: view for name, view in sample.cameras.items()}),
        (2, 0): lambda sample: sample,
        (2, 1): lambda sample: replace(sample, state=sample.state[::-1].copy()),
    }
    plan = {f"{SUITE}/{task}/{init}": wanted(model, task, init, change, crop) for (task, init), change in changes.items()}
    found = evaluate(model, tmp_path, plan, "--evaluate.center_crop", str(crop).lower())
    assert found == {(0, 0): True, (0, 1): False, (2, 0): True, (2, 1): False}


def test_a_grey_picture_is_grey_for_both_cameras(model, tmp_path):
    def grey(sample):
        return sample.with_pictures(lambda view: np.full_like(view, 128))

    plan = {f"{SUITE}/{task}/{init}": wanted(model, task, init, grey) for task in (0, 2) for init in (0, 1)}
    assert set(evaluate(model, tmp_path, plan, "--evaluate.blank", "true").values()) == {True}


def test_pictures_are_turned_and_nothing_else():
    raw = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    assert np.array_equal(policy_image(raw, False, plain=True), raw[::-1, ::-1])


def test_cameras_are_told_apart_by_their_order():
    shown = ObservationSpec(("agentview", "wrist"), state=True, by_order=True)
    for cameras, state, lacking in (((), 0, ""), (("a",), 8, ""), (("a", "b"), 8, ""), (("a", "b", "c"), 8, "looks at c")):
        found = observation_problems("libero_object", shown, SampleSpec(cameras, state, 1))
        assert bool(found) == bool(lacking) and all(lacking in line for line in found)
