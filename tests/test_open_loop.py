"""Benchmark `dataset`: held-out frames of demonstrations in every format, each figure against an independent computation."""

import shutil

import numpy as np
import pytest
import yaml
from conftest import BASELINE, read_evaluation

from vlakeep import checks, evaluate, preflight
from vlakeep.benchmarks import open_loop, policy
from vlakeep.benchmarks.questions import action_token_kl
from vlakeep.core.config import ConfigError
from vlakeep.data.formats import open_dataset
from vlakeep.data.sample import Episode
from vlakeep.data.writer import write_rlds
from vlakeep.evaluate import load_target, run_evaluation
from vlakeep.openvla.prompts import encode_prompts
from vlakeep.tabletop import benchmark as tabletop

BRIEF = ["--evaluate.benchmark", "dataset", "--data.train_fraction", "0.5", "--evaluate.episodes", "3", "--evaluate.retention_frames", "6"]


@pytest.fixture(scope="module")
def run(world, evaluated):
    return evaluated[0]


@pytest.fixture(scope="module")
def held(world):
    """The second half of the data set, by a way of its own: (whole data set, episode numbers)."""
    storage, _ = world
    whole = open_dataset(storage.data / "tabletop_corner", 1.0, storage.cache)
    count = len(whole)
    return whole, list(range(round(0.5 * count), count))


def chosen(held):
    return [held[(2 * i + 1) * len(held) // 6] for i in range(3)]


def test_figures_are_those_of_a_pass_by_hand(world, run, held, tmp_path):
    storage, make_config = world
    config = make_config(BASELINE, *BRIEF, "--evaluate.target", run.name)
    folder = run_evaluation(config, storage)
    assert folder.parent.parent.parent == storage.eval and folder.parts[-2:] == ("dataset", run.name)
    rows, summary = read_evaluation(folder)
    whole, numbers = held
    assert [row["trial"] for row in rows] == chosen(numbers)
    backbone, _, _ = load_target(config, storage, "cpu")
    one = whole.statistics["action"]
    span = np.array(one["q99"]) - np.array(one["q01"])
    span[-1] = 1.0
    moving = np.array(one["max"]) > np.array(one["min"])
    for row in rows:
        episode = row["trial"]
        samples = [whole.frame(episode, t) for t in range(whole.lengths[episode])]
        said = np.concatenate([backbone.attempt_batch(encode_prompts([s], backbone.processor))[0] for s in samples])
        wanted = whole.episode(episode).actions.astype(float)  # the tabletop stores standard actions
        error = np.abs(said - wanted).mean(0)
        assert row["errors"] == pytest.approx(error.tolist(), abs=1e-6) and row["steps"] == len(samples)
        assert row["value"] == pytest.approx((error[moving] / span[moving]).mean(), rel=1e-5)
        normal = [whole.actions(episode), np.where(one["mask"], 2 * (said - one["q01"]) / (span + 1e-8) - 1, said)]
        bins = [np.digitize(np.clip(np.where(moving, x, 0), -1, 1), np.linspace(-1, 1, 256)) for x in normal]
        assert row["accuracy"] == pytest.approx((bins[0] == bins[1]).mean(), abs=1e-9)
        looked = [samples[i * len(samples) // 2] for i in range(2)]
        assert row["kl"] == pytest.approx(float(action_token_kl(backbone, looked).mean()), rel=1e-3)
    values = [row["value"] for row in rows]
    half = 1.959964 * np.std(values, ddof=1) / 3 ** 0.5
    found = summary["open_loop"]["tabletop_corner"]
    assert found["error"] == pytest.approx({"mean": np.mean(values), "low": np.mean(values) - half, "high": np.mean(values) + half, "n": 3})
    assert [one["mean"] for one in found["per_dimension"]] == pytest.approx(np.mean([row["errors"] for row in rows], 0).tolist())
    assert summary["retention_kl"]["mean"] == pytest.approx(np.mean([row["kl"] for row in rows]))
    assert found["frames"] == sum(row["steps"] for row in rows) and summary["new_skill"] is None


def test_the_demonstrated_action_has_no_error_and_a_still_hand_has_one(world, held, tmp_path, monkeypatch):
    storage, make_config = world
    whole, numbers = held
    said = {}
    for episode in chosen(numbers):
        for t in range(whole.lengths[episode]):
            frame = whole.frame(episode, t)
            said[frame.image.tobytes(), frame.instruction] = whole.episode(episode).actions[t]

    def knows(backbone, samples, key):
        return np.array([[said[one.image.tobytes(), one.instruction]] for one in samples], dtype=float), np.zeros(len(samples), dtype=bool)

    for name, attempt in (("right", knows), ("still", lambda b, s, k: (np.zeros((len(s), 1, 7)), np.ones(len(s), dtype=bool)))):
        monkeypatch.setattr(policy, "attempt", attempt)
        _, summary = read_evaluation(run_evaluation(make_config(BASELINE, *BRIEF), storage, tmp_path / name))
        found = summary["open_loop"]["tabletop_corner"]
        if name == "right":
            assert found["error"]["mean"] == 0.0 and found["token_accuracy"]["mean"] == 1.0 and found["early"] == 0
        else:
            assert found["error"]["mean"] > 0.1 and found["token_accuracy"]["mean"] < 0.9 and found["early"] == found["frames"]
        assert summary["retention_kl"]["n"] == 0, "the base is the teacher"


def test_data_that_training_would_refuse_are_refused_before_the_model_is_loaded(world, monkeypatch):
    storage, make_config = world
    actions = np.random.default_rng(0).uniform(0, 1, (8, 7)).astype(np.float32)
    still = np.repeat(np.arange(768, dtype=np.uint8).reshape(1, 16, 16, 3), 8, axis=0)
    write_rlds(storage.data, "tabletop_still", [Episode(still, actions, "push")] * 4)
    monkeypatch.setattr(evaluate, "make_backbone", lambda *args: pytest.fail("the model was loaded"))
    with pytest.raises(ValueError, match="pictures looked at are the same"):
        run_evaluation(make_config(BASELINE, *BRIEF, "--data.datasets", "[tabletop_still]", "--evaluate.target", "base"), storage)


def test_it_goes_on_where_it_stopped_and_refuses_another_share(world, run, tmp_path, monkeypatch):
    storage, make_config = world
    config = make_config(BASELINE, *BRIEF, "--evaluate.target", run.name)
    whole, _ = read_evaluation(run_evaluation(config, storage, tmp_path / "whole"))
    calls, attempt = [], policy.attempt

    def dies(*given):
        calls.append(len(given[1]))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return attempt(*given)

    monkeypatch.setattr(policy, "attempt", dies)
    with pytest.raises(KeyboardInterrupt):
        run_evaluation(config, storage, tmp_path / "part")
    monkeypatch.undo()
    rows, _ = read_evaluation(run_evaluation(config, storage, tmp_path / "part"))
    assert rows == whole
    for other, named in ((["--data.train_fraction", "0.6"], "data"), (["--evaluate.center_crop", "true"], "center_crop")):
        with pytest.raises(ValueError, match=named):
            run_evaluation(make_config(BASELINE, *BRIEF, "--evaluate.target", run.name, *other), storage, tmp_path / "part")


def test_episodes_that_the_run_has_seen_are_no_held_out_ones(world, run, tmp_path):
    storage, make_config = world
    told = yaml.safe_load((run / "config.yaml").read_text())["data"]
    assert told["train_fraction"] == 1.0 and not told["image_aug"]

    def alarms(*more):
        config = make_config(BASELINE, *BRIEF, *more)
        benchmark = open_loop.OpenLoop(config, storage)
        with benchmark.opened():
            return benchmark.alarms(None)

    whole = len(open_dataset(storage.data / "tabletop_corner", 1.0, storage.cache))
    line, = alarms("--evaluate.target", run.name)
    assert line.startswith(f"{whole - round(0.5 * whole)} of {whole - round(0.5 * whole)} episodes of tabletop_corner are not held out") \
        and "trained on 100 %" in line
    assert alarms("--evaluate.target", "base") == []
    crop, _ = alarms("--evaluate.target", run.name, "--evaluate.center_crop", "true")
    assert "without random crops" in crop
    copied = shutil.copytree(run, storage.runs / "half-seen")
    try:
        for share, seen in ((0.5, 0), (0.6, round(0.6 * whole) - round(0.5 * whole))):
            text = (run / "config.yaml").read_text().replace("train_fraction: 1.0", f"train_fraction: {share}")
            (copied / "config.yaml").write_text(text)
            found = alarms("--evaluate.target", "half-seen")
            assert len(found) == bool(seen) and (not seen or found[0].startswith(f"{seen} of"))
            assert not seen or "--data.train_fraction 0.6 fits it" in found[0]
    finally:
        shutil.rmtree(copied)


def test_what_cannot_be_held_out_is_said(world):
    storage, make_config = world
    with pytest.raises(ValueError, match="no episode of .* is held out with --data.train_fraction 1.0; train and evaluate with a smaller"):
        run_evaluation(make_config(BASELINE, "--evaluate.benchmark", "dataset"), storage)
    config = make_config(BASELINE, *BRIEF, "--data.datasets", "[tabletop_none]")
    red = [line for line in preflight.run_checks(config, "evaluate") if line.status == checks.RED]
    assert any("tabletop_none" in line.where for line in red)
    with pytest.raises(ConfigError, match="evaluate.benchmark 'data': must be one of tabletop, dataset, language, libero_spatial"):
        make_config(BASELINE, "--evaluate.benchmark", "data")


@pytest.mark.parametrize("kind", ["hdf5", "lerobot"])
def test_other_formats_give_the_same_figures(world, tmp_path, kind):
    """One episode of two, in the format's own files. Raw pictures of HDF5 are read as the official conversion stores them, as JPEG."""
    pytest.importorskip("h5py" if kind == "hdf5" else "pyarrow")
    pytest.importorskip("av")
    import test_data_formats as formats

    from vlakeep.data.writer import write_rlds

    storage, make_config = world
    made = sorted(tabletop.collect_demos("corner", 2, seed=3), key=lambda e: e.language)
    episodes = [formats.Episode(e.images, np.concatenate([e.actions[:, :-1], 1 - 2 * e.actions[:, -1:]], axis=1), e.language) for e in made]
    errors = []
    for what in ("rlds", kind):
        root = storage.root / "open-loop" / kind / what
        if what == "rlds":
            write_rlds(root, formats.NAME, episodes, "jpeg" if kind == "hdf5" else "png")
        elif what == "hdf5":
            formats.write_hdf5(root / formats.NAME, episodes)
        else:
            formats.write_lerobot(root / formats.NAME, episodes, "v2.1", "png")
        config = make_config(BASELINE, *BRIEF, "--data.datasets", f"[{formats.NAME}]", "--data_root_dir", root, "--evaluate.episodes", "2")
        _, summary = read_evaluation(run_evaluation(config, evaluate.Storage.from_config(config), tmp_path / f"eval-{what}"))
        errors.append(summary["open_loop"][formats.NAME])
    assert errors[0]["error"]["n"] == 1
    assert errors[0]["error"]["mean"] == pytest.approx(errors[1]["error"]["mean"], rel=1e-5) and errors[0]["frames"] == errors[1]["frames"]


def test_spans_leave_out_what_never_moves():
    statistics = {"action": {"q01": [0.0, 0.2, 0.0, 0.0], "q99": [0.5, 0.2, 0.0, 1.0], "min": [0.0] * 4, "max": [1.0, 0.3, 0.0, 1.0],
                             "mask": [True, True, True, False]}}
    assert open_loop.spans(statistics).tolist() == [0.5, 0.0, 0.0, 1.0]
    assert open_loop.chosen_episodes(7, 3) == [1, 3, 5] and open_loop.chosen_episodes(2, 5) == [0, 1]
