"""Simulator processes without a simulator: order, retries, crashes, hangs; and batches of one shape for the policy."""

import functools
import itertools
import json
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fake_simulator import Counter, Line, broken, count, slow_scene, walked

from vlakeep.benchmarks.policy import FixedBatch
from vlakeep.benchmarks.summary import make_summary, print_summary
from vlakeep.core.config import BackboneConfig, Config, EvaluateConfig
from vlakeep.core.storage import Storage
from vlakeep.libero import benchmark as libero
from vlakeep.libero import demos, evaluation, pace
from vlakeep.libero import setup as libero_setup
from vlakeep.libero.env import NoPlacement, to_simulator
from vlakeep.libero.record import Demo, Manner, disturbances, play_expert, without_no_ops
from vlakeep.libero.scene import Boxes, clearance, rotation_about, separation
from vlakeep.libero.workers import Job, Seen, Workers


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


def test_the_clock_tells_the_policys_seconds_from_those_of_the_simulators():
    def slow(jobs, seen):
        time.sleep(0.02)
        return act(jobs, seen)

    with Workers(Counter, count, 2) as pool:
        began = time.perf_counter()
        list(pool.run(JOBS, slow))
        seconds, clock = time.perf_counter() - began, pool.clock
    assert (clock.episodes, clock.pictures) == (6, 24) and 12 <= clock.answers <= 24
    assert 0.02 * clock.answers <= clock.busy < clock.seconds <= seconds
    assert clock.line().startswith("6 episodes in ") and f"answered {clock.answers} times" in clock.line()


@pytest.mark.parametrize("better", pace.SHARES)
def test_the_policy_is_asked_when_as_many_wait_as_was_faster(better):
    time_now = [0.0]
    own = pace.Pace(4, lambda: time_now[0])
    shares = []
    while not own.decided:
        shares.append(own.share)
        time_now[0] += 1.0 if own.share == better else 1.5
        own.answered(4)
    assert own.share == better and shares[:10] == [0.5] * 10  # ten pictures a worker are before the trials
    assert [share for share, _ in itertools.groupby(shares)] == [0.5, 1.0, 0.5, 1.0]
    assert own.rate(better) == pytest.approx(4.0) and own.rate(1.5 - better) == pytest.approx(4 / 1.5)
    assert f"{own.rate(1.0):.0f} a second when all waited" in own.line()
    time_now[0] += 1e6
    own.answered(1)
    assert own.share == better  # it stays
    assert pace.Pace(1).decided and pace.Pace(1).share == 0.5


@pytest.mark.parametrize("share", pace.SHARES)
def test_results_do_not_depend_on_the_pace_and_nobody_waits_for_a_scene_that_loads(share, monkeypatch):
    asked = []

    def counting(jobs, seen):
        asked.append(sorted(job.task for job in jobs))
        time.sleep(0.02)
        return act(jobs, seen)

    monkeypatch.setattr(pace, "SHARES", (share,))
    jobs = [Job("s", task, 0, 0, limit=100) for task in range(3)]
    with Workers(slow_scene, count, 3) as pool:
        results = {job.task: result["total"] for job, result, _ in pool.run(jobs, counting)}
    assert results == {task: sum(task * 16 + s + 1.0 for s in range(100)) for task in range(3)}
    assert asked[-100:] == [[2]] * 100  # the others were over before its scene was there
    assert share < 1 or asked.count([0, 1]) > 20


def test_a_dead_worker_is_replaced_and_its_episode_retried_once(tmp_path):
    jobs = [Job("s", task, 0, 0, limit=3) for task in range(5)]
    with Workers(functools.partial(Counter, folder=tmp_path), count, 2, silence=4.0) as pool:
        results = {job.task: (result, error) for job, result, error in pool.run(jobs, act)}
    assert results[0][1] is None and results[1][1] is None and results[1][0]["total"] == 16 * 3 + 6
    assert results[2] == (None, "the simulator process died (exit status 9)")
    assert results[3] == (None, "RuntimeError: the arm fell off")
    assert results[4] == (None, "the simulator was silent for 4 s")
    assert pool.restarts == 1 + 2 + 2 + 2


def test_an_error_of_the_policy_ends_its_own_episode_only():
    def failing(jobs, seen):
        return ["no words" if job.number == 1 else np.ones(1) for job in jobs]

    with Workers(Counter, count, 2) as pool:
        results = {job: (result, error) for job, result, error in pool.run(JOBS, failing)}
    assert {error for job, (_, error) in results.items() if job.number == 1} == {"no words"}
    assert all(result["total"] == 4 for job, (result, _) in results.items() if job.number != 1) and pool.restarts == 0


def test_a_simulator_that_never_works_is_an_error_with_a_remedy():
    with pytest.raises(ChildProcessError, match="no display.*libero-check"), Workers(broken, count, 1) as pool:
        list(pool.run(JOBS, act))


def test_the_policy_is_always_asked_in_one_shape_and_rows_keep_their_errors():
    shapes = []

    def policy(images, instructions, count):
        shapes.append((images.shape, len(instructions)))
        if any(image.max() == 7 for image in images):
            raise ValueError("seven")
        return np.where(images.reshape(len(images), -1)[:, :1] == 9, np.nan, 1.0) * np.ones((1, 7))

    seen = [Seen(np.full((2, 2, 3), value, np.uint8), "short") for value in (1, 7, 9, 4)]
    found = FixedBatch(policy, 3)(None, seen)
    assert set(shapes) == {((3, 2, 2, 3), 3)}
    assert found[1] == "ValueError: seven" and "not finite" in found[2]
    assert np.array_equal(found[0], np.ones(7)) and np.array_equal(found[3], np.ones(7))


def test_rows_that_nobody_fills_are_said(capsys):
    libero.say_idle_rows(EvaluateConfig(batch=4, workers=4))
    assert capsys.readouterr().err == ""
    libero.say_idle_rows(EvaluateConfig(batch=4, workers=3))
    assert "use 3 of 4 rows at most. --evaluate.batch 3 does the same" in capsys.readouterr().err


def test_the_model_gives_a_row_the_same_numbers_whoever_else_is_in_its_batch():
    """To the bit, for one shape of the batch: what FixedBatch relies on."""
    from vlakeep.data.sample import Sample
    from vlakeep.models.load import make_backbone
    from vlakeep.openvla.prompts import encode_prompts, whole_prompt

    backbone = make_backbone("tabletop-base")
    rng = np.random.default_rng(0)
    samples = [Sample(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8), text) for text in
               ("pick the red cube", "tap the blue ball", "reach the green cube", "place the red cube on the tray")]

    width = len(whole_prompt(samples[3], backbone.processor))

    def logits(order):
        batch = encode_prompts([samples[i] for i in order], backbone.processor, width)
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
    kept = without_no_ops(np.array([still, move, still, closing, closing, closed]))
    assert kept.tolist() == [False, True, False, True, False, True]
    assert without_no_ops(np.array([still])).tolist() == [False]


def test_noise_comes_in_stretches_and_follows_from_task_and_seed():
    def drawn(noise, task, seed):
        return np.array(list(itertools.islice(disturbances(noise, task, seed), 2000)))

    pushes = drawn(0.5, 3, 1000)
    noisy = pushes[:, :6].any(axis=1)
    changes = np.flatnonzero(np.diff(noisy))
    assert pushes.shape == (2000, 7) and not pushes[:, 6].any()
    assert np.diff(changes).min() >= 5 and np.diff(changes).max() <= 15 and 0.45 < noisy.mean() < 0.55
    assert 0.48 < pushes[noisy][:, :6].std() < 0.52
    assert np.array_equal(pushes, drawn(0.5, 3, 1000)) and not np.array_equal(pushes, drawn(0.5, 4, 1000))


@pytest.fixture
def line(tmp_path, monkeypatch):
    """(folder of what is wrong with the simulator, folder of stored demonstrations)."""
    monkeypatch.setenv("FAKE_LINE", str(tmp_path))
    monkeypatch.setattr(demos, "LiberoEnv", Line)
    monkeypatch.setattr(demos, "record", walked)
    monkeypatch.setitem(demos.MAX_STEPS, "line", 5)
    (tmp_path / "states").mkdir()
    return tmp_path, tmp_path / "states"


def test_a_seed_whose_simulator_died_is_named_and_asked_again(line):
    """As a failure it would be one for good, whatever was wrong with the machine; the next seed must not take its place."""
    folder, states = line
    (folder / "dead-1002").touch()
    with pytest.raises(ChildProcessError, match="no answer to 1 of 3 seeds .task 0, seed 1002: ValueError: no memory on the.*--first"):
        demos.collect("line", [0], 3, 1000, 1, states, Manner())
    assert sorted(path.name for path in states.iterdir()) == ["task00_seed1000.npz", "task00_seed1001.npz"]
    (folder / "dead-1002").unlink()
    found = demos.collect("line", [0], 3, 1000, 1, states, Manner())
    assert found == {0: {1000 + number: number % 2 == 0 for number in range(5)}}


@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_demonstrations_that_do_not_replay_are_left_out_and_any_other_trouble_ends_it(line, workers, capsys):
    folder, states = line
    keys = [(0, seed) for seed in range(1000, 1016, 2)]
    demos.collect("line", [0], len(keys), 1000, workers, states, Manner())

    def shown():
        lost = []
        return [shot.key for shot in demos.rendered("line", keys, 4, ["agentview"], workers, states, folder / "tmp", lost)], lost

    assert shown() == (keys, [])
    demo = Demo.load(demos.stored(states, keys[0]))
    short = demo._replace(actions=demo.actions[:1], executed=demo.executed[:1], states=demo.states[:2])
    for key, spoilt in zip(keys[1:], [demo._replace(states=demo.states + [[0], [0.5], [0]]), short] * 3):
        spoilt.save(demos.stored(states, key))
    kept, lost = shown()
    assert kept == [keys[0], keys[7]] and sorted(lost) == keys[1:7]
    said = capsys.readouterr().err
    assert "seed 1002: " in said and "(step 1 leads elsewhere)" in said and "(no success)" in said
    (folder / "dead-1014").touch()
    with pytest.raises(ChildProcessError, match="task 0, seed 1014 cannot be rendered: ValueError: no memory on the card"):
        shown()
    (folder / "dead-1014").unlink()
    with pytest.raises(ValueError, match="none of 6 stored demonstrations replay here"):
        keys[:] = keys[1:7]
        shown()


def test_a_seed_without_a_scene_is_a_failure_as_any_other():
    def fresh_start(seed):
        raise NoPlacement("line task 0: no collision-free placement in 50 attempts")

    env = SimpleNamespace(fresh_start=fresh_start, task=0, suite="line")
    assert play_expert(env, 1000, 5) is None


def test_demonstrations_of_before_the_noise_were_executed_as_they_stand(tmp_path):
    demo = Demo(np.ones((2, 7), np.float32), np.zeros((2, 7), np.float32), np.zeros((3, 5)), np.zeros((2, 8), np.float32))
    demo.save(tmp_path / "new.npz")
    assert all(np.array_equal(a, b) for a, b in zip(Demo.load(tmp_path / "new.npz"), demo))
    np.savez(tmp_path / "old.npz", **{key: value for key, value in demo._asdict().items() if key != "executed"})
    assert np.array_equal(Demo.load(tmp_path / "old.npz").executed, demo.actions)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "new.npz").read_bytes()[:200])
    with pytest.raises(ValueError, match="cut.npz is no stored demonstration.*delete it"):
        Demo.load(tmp_path / "cut.npz")


def test_the_amount_of_noise_is_checked_and_names_the_set():
    from vlakeep.core.options import split
    from vlakeep.libero.demos import set_name
    from vlakeep.libero.stages import DEMOS

    for bad in ("-0.1", "much", "nan", ""):
        with pytest.raises(ValueError, match="--noise .* must be a number, 0 or above"):
            split(DEMOS, ["--noise", bad])
    assert [set_name("libero_goal", Manner(*how)) for how in ((), (0.3,), (1.0, "side"))] == [
        "libero_goal_expert", "libero_goal_expert_noise0_3", "libero_goal_expert_side_noise1"]


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
    line, = libero_setup.lines()
    assert (line.status, line.where) == ("FAIL", "the LIBERO simulator is not installed")
    assert line.remedy.startswith("make libero")


def test_a_replay_acts_by_the_step_alone_and_rests_at_the_end():
    actions_TA = np.arange(14.0).reshape(2, 7)
    act = libero.Replay({0: [actions_TA]})
    picture, job = np.zeros((2, 2, 3), np.uint8), Job("s", 0, 3, 7)
    found = act([job] * 3, [Seen(picture, "lift it", step) for step in (1, 0, 5)])
    assert [row.tolist() for row in found] == [actions_TA[1].tolist(), actions_TA[0].tolist(), [0.0] * 6 + [13.0]]


def test_a_replay_takes_the_demonstrations_in_turn():
    act = libero.Replay({0: [np.zeros((1, 7)), np.ones((1, 7))]})
    jobs = [Job("s", 0, number, 7) for number in range(4)]
    found = act(jobs, [Seen(np.zeros((2, 2, 3), np.uint8), "lift it", 0)] * 4)
    assert [row[0] for row in found] == [0, 1, 0, 1]


def suite(monkeypatch, *texts):
    """A suite of tasks that are called so."""
    tasks = [SimpleNamespace(language=text) for text in texts]
    names = [f"SCENE{number}_{text.replace(' ', '_')}" for number, text in enumerate(texts)]
    monkeypatch.setattr(libero, "load_suite", lambda suite: SimpleNamespace(get_task=tasks.__getitem__, n_tasks=len(tasks),
                                                                            get_task_names=lambda: names))


def test_tasks_that_share_an_instruction_have_their_own_demonstrations(monkeypatch, tmp_path):
    """By what libero-demos and LIBERO's files say; where nothing does, another task's would be played in silence."""
    suite(monkeypatch, "lift it", "push it", "lift it")
    like = {"action": {"mask": [False] * 7, "q01": [0] * 7, "q99": [1] * 7}}
    origins = ["libero_90/2/1000", "libero_goal/0/1000", "", "libero_90/0/1001", "/a/SCENE2_lift_it_demo.hdf5", "libero_90/2/1002"]
    data = SimpleNamespace(name="mine", statistics=like, languages=["lift it"] * 2 + ["push it"] + ["lift it"] * 3,
                           actions=lambda episode: np.full((1, 7), float(episode)), origins=lambda: origins)
    found = evaluation.demonstrations([data], "libero_90", [0, 1, 2], count=2)
    assert {k: [a[0, 0] for a in v] for k, v in found.items()} == {0: [3], 1: [2], 2: [0, 4]}
    origins[3] = "somewhere"
    with pytest.raises(ValueError, match="mine: libero_90 has the tasks 0, 2 of .*'lift it', and episode 3 does not say .*'somewhere'"):
        evaluation.demonstrations([data], "libero_90", [0, 1, 2], count=2)
    assert list(evaluation.demonstrations([data], "libero_90", [1], count=2)) == [1]
    # As the formats say it.
    from vlakeep.data.rlds import RldsDataset
    from vlakeep.data.sample import Episode
    from vlakeep.data.writer import write_rlds

    rng = np.random.default_rng(0)
    actions = np.outer([-1, 1], np.ones(7)).astype(np.float32)
    write_rlds(tmp_path, "libero_mine", [Episode(rng.integers(0, 256, (2, 32, 32, 3), dtype=np.uint8), actions, text,
                                                 file_path=f"libero_90/2/{seed}")
                                         for seed, text in ((1, "lift it"), (2, ""), (3, "lift it"))])
    assert RldsDataset(tmp_path / "libero_mine").origins() == ["libero_90/2/1", "libero_90/2/3"]


def test_demonstrations_are_found_by_their_instruction(monkeypatch):
    suite(monkeypatch, "lift it", "push it")
    like = {"action": {"mask": [False] * 7, "q01": [0] * 7, "q99": [1] * 7}}
    data = SimpleNamespace(name="mine", statistics=like, languages=["push it", "lift it", "lift it", "other", "lift it"],
                           actions=lambda episode: np.full((1, 7), float(episode)))
    found = evaluation.demonstrations([data], "s", [0, 1], count=2)
    assert {k: [a[0, 0] for a in v] for k, v in found.items()} == {0: [1, 2], 1: [0]}
    data.languages[0] = "other"
    with pytest.raises(FileNotFoundError, match="no demonstration of .'push it'.: make them with `vlakeep libero-demos"):
        evaluation.demonstrations([data], "s", [0, 1], count=2)


def test_a_mujoco_that_is_too_new_is_named():
    with pytest.raises(ValueError, match="cannot use mujoco .*: pip install 'mujoco<3.9'"):
        with libero_setup.fitting_mujoco():
            raise AssertionError


def test_data_of_another_renderer_are_named():
    found = {"mujoco": "3.17.0"}
    assert libero_setup.mixed_renderers({"mine": "3.17.0"}, found) == []
    lines = libero_setup.mixed_renderers({"mine": "3.17.0", "older": "3.3.7", "official": None}, found)
    assert len(lines) == 2 and "older was rendered as by mujoco 3.3.7" in lines[0]
    assert "official was rendered as by mujoco 2.3.7" in lines[1]
    # What is installed now looks like the official data; what was made before this was noted looks like its version.
    found = {"mujoco": "3.17.0", libero_setup.AS: "2.3.7"}
    lines = libero_setup.mixed_renderers({"mine": "2.3.7", "before": "3.17.0", "official": None}, found)
    assert [line.split()[0] for line in lines] == ["before"]


def test_a_base_model_of_another_renderer_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(libero_setup, "versions", lambda: {"mujoco": "3.17.0"})
    model = tmp_path / "hf_cache" / "mine"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    config = Config(backbone=BackboneConfig(checkpoint="mine"), root=str(tmp_path))
    storage = Storage.from_config(config)
    line, = evaluation.renderer_alarm(config, storage, "libero_object_no_noops")
    assert "libero_object_no_noops was rendered as by mujoco 2.3.7" in line
    assert evaluation.renderer_alarm(config, storage, "libero_object") == []
    for version, lines in (("3.17.0", 0), ("3.3.7", 1)):
        (model / "PROVENANCE.json").write_text(json.dumps({"renderers": {"libero_object_expert": version}}))
        assert len(evaluation.renderer_alarm(config, storage, "libero_object")) == lines


def test_tasks_are_listed_suite_by_suite():
    rows = [{"kind": "skill", "ability": suite, "trial": trial, "task": f"{suite} {trial}", "success": True, "crash": None}
            for suite, trial in (("libero_object", 0), ("libero_goal", 50), ("libero_object", 50), ("libero_goal", 0))]
    assert list(libero.by_task(rows)) == ["libero_goal 0", "libero_goal 50", "libero_object 0", "libero_object 50"]


def test_boxes_are_apart_or_overlap_as_points_inside_them_say():
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, 9)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)

    def box():
        axis = rng.normal(size=3)
        rotation = rotation_about(axis / np.linalg.norm(axis), rng.uniform(0, 3))
        return Boxes(rng.uniform(-0.3, 0.3, (1, 3)), rotation[None], rng.uniform(0.05, 0.2, (1, 3)))

    assert separation(box(), Boxes(np.zeros((0, 3)), np.zeros((0, 3, 3)), np.zeros((0, 3)))) == 1.0
    gaps = []
    for _ in range(60):
        one, other = box(), box()
        gap, points = separation(one, other), one.centre + grid * one.half @ one.rotation[0].T
        gaps.append(gap)
        assert np.isclose(gap, separation(other, one)) and gap <= clearance(points, other) + 1e-9
        if clearance(points, other) == 0:
            assert gap <= 1e-9
    assert min(gaps) < -0.05 and max(gaps) > 0.1


def test_a_kl_that_was_not_measured_is_not_printed_as_none(capsys):
    rows = [{"kind": "skill", "ability": "libero_object", "trial": 0, "task": "lift it", "success": True, "crash": None}]
    for name, told in (("baseline", "not measured"), ("base", "0.0000")):
        summary = make_summary(name, rows, None, "sha", "libero_object")
        print_summary({**summary, "alarms": [], "seconds": 1.0})
        assert f"action-token KL          {told}   drift not measured" in capsys.readouterr().out
