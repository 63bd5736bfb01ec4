"""Simulator processes without a simulator: order, retries, crashes, hangs; and batches of one shape for the policy."""

import functools
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from vlakeep import preflight
from vlakeep.benchmarks import libero, libero_setup
from vlakeep.benchmarks.libero import FixedBatch
from vlakeep.benchmarks.libero_env import to_simulator
from vlakeep.benchmarks.libero_record import without_no_ops
from vlakeep.benchmarks.libero_workers import Job, Seen, Workers


class Counter:
    """An environment that counts; what it shows depends on the episode and on the actions so far alone."""

    def __init__(self, suite, task, seed, folder=None):
        self.task, self.folder, self.total = task, folder and Path(folder), 0.0

    def close(self):
        pass


def count(env, job):
    env.total = 0.0
    for step in range(job.limit):
        if env.folder and step == 1:
            trouble(env.folder, job)
        action = yield Seen(np.full((2, 2, 3), (job.task * 16 + job.number + step) % 256, np.uint8), f"task {job.task}")
        env.total += float(action[0])
    return {"total": env.total, "pid": os.getpid()}


def trouble(folder, job):
    """Task 1 dies at its first try, task 2 always, task 3 raises, task 4 hangs."""
    tried = folder / f"{job.task}-{job.number}"
    first = not tried.exists()
    tried.touch()
    if job.task == 2 or (job.task == 1 and first):
        os._exit(9)
    if job.task == 3:
        raise RuntimeError("the arm fell off")
    if job.task == 4:
        time.sleep(60)


def act(jobs, seen):
    return [np.array([s.image.mean() + 1.0]) for s in seen]


JOBS = [Job("s", task, number, 0, limit=4) for task in range(2) for number in range(3)]


def test_results_do_not_depend_on_the_number_of_workers():
    found = []
    for workers in (1, 3):
        with Workers(Counter, count, workers) as pool:
            results = list(pool.run(JOBS, act))
            found.append({job: result["total"] for job, result, error in results if error is None})
            assert len({result["pid"] for _, result, _ in results}) <= workers and pool.restarts == 0
    assert found[0] == found[1] == {job: sum(job.task * 16 + job.number + s + 1.0 for s in range(4)) for job in JOBS}


def test_a_dead_worker_is_replaced_and_its_episode_retried_once(tmp_path):
    jobs = [Job("s", task, 0, 0, limit=3) for task in range(5)]
    with Workers(functools.partial(Counter, folder=tmp_path), count, 2, silence=8.0) as pool:
        results = {job.task: (result, error) for job, result, error in pool.run(jobs, act)}
    assert results[0][1] is None and results[1][1] is None and results[1][0]["total"] == 16 * 3 + 6
    assert results[2] == (None, "the simulator process died (exit status 9)")
    assert results[3] == (None, "RuntimeError: the arm fell off")
    assert results[4] == (None, "the simulator was silent for 8 s")
    assert pool.restarts == 1 + 2 + 2 + 2


def test_an_error_of_the_policy_ends_its_own_episode_only():
    def failing(jobs, seen):
        return ["no words" if job.number == 1 else np.ones(1) for job in jobs]

    with Workers(Counter, count, 2) as pool:
        results = {job: (result, error) for job, result, error in pool.run(JOBS, failing)}
    assert {error for job, (_, error) in results.items() if job.number == 1} == {"no words"}
    assert all(result["total"] == 4 for job, (result, _) in results.items() if job.number != 1) and pool.restarts == 0


def broken(suite, task, seed):
    raise RuntimeError("no display")


def test_a_simulator_that_never_works_is_an_error_with_a_remedy():
    with pytest.raises(ChildProcessError, match="no display.*libero-check"), Workers(broken, count, 1) as pool:
        list(pool.run(JOBS, act))


def test_the_policy_is_always_asked_in_one_shape_and_rows_keep_their_errors():
    shapes = []

    def policy(images, instructions):
        shapes.append((images.shape, instructions[-1]))
        if any(image.max() == 7 for image in images):
            raise ValueError("seven")
        return np.where(images.reshape(len(images), -1)[:, :1] == 9, np.nan, 1.0) * np.ones((1, 7))

    seen = [Seen(np.full((2, 2, 3), value, np.uint8), "short") for value in (1, 7, 9, 4)]
    found = FixedBatch(policy, 3, "a longer instruction")(None, seen)
    assert set(shapes) == {((4, 2, 2, 3), "a longer instruction")}
    assert found[1] == "ValueError: seven" and "not finite" in found[2]
    assert np.array_equal(found[0], np.ones(7)) and np.array_equal(found[3], np.ones(7))


def test_the_model_gives_a_row_the_same_numbers_whoever_else_is_in_its_batch():
    """To the bit, for one shape of the batch: what FixedBatch relies on."""
    from vlakeep.backbones.base import make_backbone
    from vlakeep.data.prompts import encode_prompts
    from vlakeep.data.sample import Sample

    backbone = make_backbone("tabletop-base")
    rng = np.random.default_rng(0)
    samples = [Sample(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8), text) for text in
               ("pick the red cube", "tap the blue ball", "reach the green cube", "place the red cube on the tray")]

    def logits(order):
        batch = encode_prompts([samples[i] for i in order] + [samples[3]], backbone.processor)
        ids, _ = backbone.generate(batch, max_new_tokens=7, stop_at_eos=False)
        return {i: row for i, row in zip(order, backbone.log_probabilities_of_continuation(batch, ids))}

    one, two = logits([0, 1, 2]), logits([2, 3, 0])
    assert all(torch.equal(one[i], two[i]) for i in (0, 2))


def test_gripper_and_statistics_follow_the_official_rules():
    assert to_simulator([0.1, 0, 0, 0, 0, 0, 1.0])[-1] == -1.0 and to_simulator([0.1, 0, 0, 0, 0, 0, 0.0])[-1] == 1.0
    assert to_simulator([0.25] * 6 + [0.7]) == [0.25] * 6 + [-1.0]
    known = {"libero_object_no_noops": 1, "mine": 2}
    assert libero.pick_key("libero_object", None, known, "mine") == "libero_object_no_noops"
    assert libero.pick_key("libero_object", "mine", known, None) == "mine"
    assert libero.pick_key("libero_goal", None, known, "mine") == "mine"
    with pytest.raises(ValueError, match="libero_goal or libero_goal_no_noops .*unnorm_key"):
        libero.pick_key("libero_goal", None, known, None)


def test_steps_that_do_nothing_are_left_out():
    still, move = np.zeros(7), np.r_[0.1, np.zeros(6)]
    closing, closed = np.r_[np.zeros(6), 1.0], np.r_[0.1, np.zeros(5), 1.0]
    kept = without_no_ops([still, move, still, closing, closing, closed])
    assert np.allclose(kept, [move, closing, closed]) and kept.dtype == np.float32
    assert without_no_ops([still]).shape == (0, 7)


def test_the_renderer_is_chosen_by_what_is_there(tmp_path, monkeypatch):
    monkeypatch.delenv("MUJOCO_GL", raising=False)

    def pick(*libraries):
        return libero_setup.pick_renderer(tmp_path, lambda name: name if name in libraries else None)

    assert pick("OSMesa", "EGL", "EGL_nvidia") == "osmesa"  # no GPU
    assert pick("EGL", "EGL_mesa") == "egl"
    with pytest.raises(OSError, match="apt-get install .*libosmesa6"):
        pick("EGL")
    (tmp_path / "nvidia0").touch()
    assert pick("OSMesa", "EGL", "EGL_nvidia") == "egl" and pick("OSMesa", "EGL") == "osmesa"
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    assert pick() == "osmesa"


def test_a_missing_simulator_names_the_command(monkeypatch):
    monkeypatch.setattr(libero_setup.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="make libero"):
        libero_setup.require_libero()
    line, = preflight.check_libero()
    assert (line.status, line.where) == ("FAIL", "the LIBERO simulator is not installed")
    assert line.remedy.startswith("make libero")
    assert libero_setup.warnings_about({"mujoco": "2.3.7"}) == []
    assert "darker" in libero_setup.warnings_about({"mujoco": "3.17.0"})[0]
