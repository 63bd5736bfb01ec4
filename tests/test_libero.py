"""LIBERO with the real simulator: the official loop, to the bit, and an evaluation from end to end. Skipped without it."""

import functools
import importlib.util
import json
import os
import shutil
import sys
import zlib

import numpy as np
import pytest

if importlib.util.find_spec("libero") is None or importlib.util.find_spec("robosuite") is None:
    pytest.skip("the LIBERO simulator is not installed (make libero)", allow_module_level=True)

from vlakeep.data.dataset import Conventions
from vlakeep.data.images import center_crop, decode_image, encode_jpeg, resize_uint8
from vlakeep.libero import benchmark as libero
from vlakeep.libero import official
from vlakeep.libero import setup as libero_setup
from vlakeep.libero.env import IDLE, MAX_STEPS, LiberoEnv, blind, load_suite, policy_image, to_simulator
from vlakeep.libero.expert import Expert, NotCovered, goals
from vlakeep.libero.play import evaluate_episode
from vlakeep.libero.questions import look, questions
from vlakeep.libero.record import Demo, Manner, record, render
from vlakeep.libero.scene import Scene
from vlakeep.libero.view import noun_of, owners, pixels_alone, segment
from vlakeep.libero.workers import Job, Workers

STEPS = 5


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    with libero_setup.variables(libero_setup.environment()):
        yield


def actions(number):
    """A fixed sequence of model actions, gripper opening and closing."""
    rng = np.random.default_rng(number)
    return np.concatenate([rng.uniform(-1, 1, (STEPS, 6)), rng.integers(0, 2, (STEPS, 1))], axis=1)


def official_loop(suite, task, episodes):
    """The plain loop, written after the official protocol, on the installed simulator: (pictures, rewards, final state) per episode."""
    libero_setup.import_libero()
    from libero.libero import get_libero_path
    from libero.libero.envs import OffScreenRenderEnv

    found = load_suite(suite)
    info, states = found.get_task(task), found.get_task_init_states(task)
    file = os.path.join(get_libero_path("bddl_files"), info.problem_folder, info.bddl_file)
    env = OffScreenRenderEnv(bddl_file_name=file, camera_heights=256, camera_widths=256)
    env.seed(0)
    results = []
    for number in range(episodes):
        env.reset()
        observation = env.set_init_state(states[number])
        for _ in range(10):
            observation, _, _, _ = env.step([0, 0, 0, 0, 0, 0, -1])
        pictures, rewards = [], []
        for action in actions(number):
            image = np.ascontiguousarray(observation["agentview_image"][::-1, ::-1])
            pictures.append(center_crop(resize_uint8(decode_image(encode_jpeg(image, 95)), (224, 224))))
            action[6] = -np.sign(2 * action[6] - 1)
            observation, reward, _, _ = env.step(action.tolist())
            rewards.append(reward)
        results.append((pictures, rewards, env.get_sim_state()))
    env.close()
    return results, info.language


@pytest.fixture
def simulator_as_official(monkeypatch):
    """The plain simulator with contacts and colours as the official data have them: two passes of the same arithmetic and no shortcut."""
    libero_setup.import_libero()
    from robosuite.utils.binding_utils import MjSim

    def forward(sim):
        model, data = sim.model._model, sim.data._data
        official.step1(model, data, official.boxes(model))
        for part in (mujoco.mj_fwdActuation, mujoco.mj_fwdAcceleration, mujoco.mj_fwdConstraint, mujoco.mj_sensorAcc):
            part(model, data)

    def step(sim, with_udd=True):
        model, data = sim.model._model, sim.data._data
        official.step1(model, data, official.boxes(model))
        mujoco.mj_step2(model, data)

    import mujoco

    if not official.halves_depth():
        monkeypatch.setattr(MjSim, "forward", forward)
        monkeypatch.setattr(MjSim, "step", step)
    with official.colours():
        yield


@pytest.mark.parametrize("as_official", [True, False])
def test_episodes_are_those_of_the_official_loop_to_the_bit(request, as_official):
    """A task with a drawer, whose placement takes random numbers at every reset; our episodes in another order."""
    if as_official:
        request.getfixturevalue("simulator_as_official")
    expected, language = official_loop("libero_spatial", 4, 2)
    env = LiberoEnv("libero_spatial", 4, as_official=as_official)
    assert env.language == language == "pick up the black bowl in the top drawer of the wooden cabinet and place it on the plate"
    for number in (1, 0):
        observation = env.start(number)
        pictures, rewards, state = expected[number]
        for step, action in enumerate(actions(number)):
            assert np.array_equal(policy_image(observation["agentview_image"], crop=True), pictures[step]), (number, step)
            observation, reward, _ = env.step(to_simulator(action))
            assert reward == rewards[step]
        assert np.array_equal(env.state(), state)
    with pytest.raises(ValueError, match="tasks 0 to 9"):
        LiberoEnv("libero_spatial", 10)
    env.close()


def test_an_expert_policy_succeeds_through_the_evaluation():
    """The expert's actions, handed over as a model would give them, in the first official episode."""
    env = LiberoEnv("libero_goal", 1)
    observation, known = env.start(0), []
    with blind(env.control.sim):
        for action in Expert(env).act(goals("libero_goal", 1)):
            known.append(action)
            if env.step(action)[2]:
                break
    game = evaluate_episode(env, Job("libero_goal", 1, 0, 0, limit=300))
    seen = next(game)
    assert np.array_equal(seen.image, policy_image(observation["agentview_image"], crop=False))
    assert seen.instruction == env.language
    with pytest.raises(StopIteration) as end:
        for action in known:
            game.send(np.r_[action[:6], 1.0 if action[6] < 0 else 0.0])
    assert end.value.value == {"success": True, "steps": len(known)}
    env.close()


def test_demonstrations_are_played_stored_rendered_and_read_back(tmp_path, capsys):
    from vlakeep import cli
    from vlakeep.data.rlds import RldsDataset

    command = ["libero-demos", "--suite", "libero_goal", "--tasks", "1", "--demos", "1", "--resolution", "64"]
    folder = tmp_path / "datasets" / "libero_goal_expert"
    assert cli.run([*command, "--root", str(tmp_path), "--simulate"]) == 0 and "simulated 1 demonstrations" in capsys.readouterr().out
    assert [path.name for path in folder.iterdir()] == ["states"]
    assert cli.run([*command, "--root", str(tmp_path)]) == 0 and "1 of   1 attempts succeeded" in capsys.readouterr().out
    demo = Demo.load(folder / "states" / "task01_seed1000.npz")
    steps = len(demo.actions)
    assert demo.proprio.shape == (steps, 8) and len(demo.states) == steps + 1
    assert set(np.unique(demo.actions[:, 6])) == {-1.0, 1.0} and np.array_equal(demo.executed, demo.actions)
    data = RldsDataset(folder, cache_dir=tmp_path / "cache")
    frame = data.frame(0, steps - 1)
    assert list(data.lengths) == [steps] and frame.instruction == "put the bowl on the stove" and frame.image.shape[2] == 3
    assert json.loads((folder / "demos.json").read_text())["tasks"]["put_the_bowl_on_the_stove"]["seeds"] == [1000]
    compare_formats(folder, command, tmp_path)
    spoiled = demo._replace(states=demo.states + 0.1 * (np.arange(steps + 1) >= 40)[:, None])
    spoiled.save(folder / "states" / "task01_seed1001.npz")
    assert cli.run([*command, "--root", str(tmp_path), "--demos", "2"]) == 0
    said = capsys.readouterr()
    assert "task 1, seed 1001: " in said.err and "does not replay here (step 0" in said.err and "left out: 1 of 2" in said.err
    assert f"rm {folder / 'states' / 'task01_seed1001.npz'}" in said.err and "1 demonstrations at 64 x 64" in said.out
    about = json.loads((folder / "demos.json").read_text())["tasks"]["put_the_bowl_on_the_stove"]
    assert about["seeds"] == [1000] and about["lost"] == [1001] and list(RldsDataset(folder, cache_dir=tmp_path / "c").lengths) == [steps]
    spoiled.save(folder / "states" / "task01_seed1000.npz")
    with pytest.raises(ValueError, match="none of 1 stored demonstrations replay here"):
        cli.run([*command, "--root", str(tmp_path)])
    with pytest.raises(NotCovered, match="libero_90 task 39"):
        goals("libero_90", 39)
    with pytest.raises(ValueError, match="those of `vlakeep libero-vqa`"):
        cli.run(["libero-demos", "--suite", "libero_goal", "--first", "100000", "--root", str(tmp_path)])
    with pytest.raises(ValueError, match="skills for none"):
        cli.run(["libero-demos", "--suite", "libero_90", "--tasks", "39", "--root", str(tmp_path)])


@pytest.mark.parametrize("suite, task", [("libero_goal", 3), ("libero_goal", 5), ("libero_10", 3), ("libero_10", 8), ("libero_10", 9)])
def test_the_expert_opens_pushes_closes_stacks_side_by_side_and_reaches_inside(suite, task):
    env = LiberoEnv(suite, task, render=False)
    demo = next_result(record(env, Job(suite, task, 1000, 0, limit=MAX_STEPS[suite])))
    assert demo is not None and np.abs(demo.actions).max() <= 1 and set(demo.actions[:, 6]) <= {-1.0, 1.0}
    env.close()


def test_a_thing_is_grasped_from_the_side_and_closed_on_the_way_up():
    """No pause where fingers close, and an open hand is never where a closed one goes up."""
    env = LiberoEnv("libero_object", 0, render=False)
    demo = next_result(record(env, Job("libero_object", 0, 1000, 0, limit=280), Manner(approach="side")))
    closing = int(np.argmax(demo.actions[:, 6] > 0))
    assert (np.abs(demo.actions[closing:closing + 20, :3]).max(axis=1) > 0.05).all()
    low = demo.proprio[:closing, 2] < demo.proprio[closing, 2] + 0.04
    assert np.linalg.norm(demo.proprio[:closing][low][:, :2] - demo.proprio[closing + 15, :2], axis=1).min() > 0.008
    env.close()


def test_the_four_suites_are_covered():
    for suite in ("libero_spatial", "libero_object", "libero_goal", "libero_10"):
        assert all(goals(suite, task) for task in range(10))


def test_what_hdf5_needs_is_said_before_anything_is_simulated(tmp_path, monkeypatch):
    from vlakeep.libero import demos as libero_demos

    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ModuleNotFoundError, match=r"--format both needs the package h5py.*pip install"):
        libero_demos.main(["--format", "both", "--root", str(tmp_path)])
    with pytest.raises(ValueError, match="--camera 'wrist': must be one of agentview, robot0_eye_in_hand, frontview"):
        libero_demos.main(["--camera", "wrist"])


def compare_formats(rlds, command, root):
    """The same demonstration as HDF5, its states being stored, and from another camera: what it holds and what is read from it."""
    h5py = pytest.importorskip("h5py")
    from vlakeep import cli
    from vlakeep.data.formats import open_dataset

    assert cli.run([*command, "--format", "hdf5", "--root", str(root)]) == 0
    a, b = open_dataset(rlds), open_dataset(root / "datasets" / "libero_goal_expert_hdf5")
    assert list(a.lengths) == list(b.lengths) and a.languages == b.languages
    for step in range(a.lengths[0]):
        one, other = a.frame(0, step), b.frame(0, step)
        assert np.array_equal(one.image, other.image) and np.array_equal(one.action, other.action)
    with h5py.File(b.folder / "put_the_bowl_on_the_stove_demo.hdf5") as file:
        data, demo = file["data"], file["data/demo_0"]
        assert data.attrs["total"] == demo.attrs["num_samples"] == a.lengths[0] and data.attrs["num_demos"] == 1
        assert "bowl" in json.loads(data.attrs["problem_info"])["language_instruction"].lower()
        assert json.loads(data.attrs["env_args"])["env_kwargs"]["camera_heights"] == 64
        assert set(demo) == {"actions", "states", "robot_states", "rewards", "dones", "obs"} and demo["dones"][-1] == 1
        assert demo["obs/eye_in_hand_rgb"].shape == demo["obs/agentview_rgb"].shape and demo["obs/joint_states"].shape[1] == 7
        assert np.allclose(demo["robot_states"][:, 2:5], demo["obs/ee_pos"][:])
    assert cli.run([*command, "--format", "both", "--camera", "robot0_eye_in_hand", "--root", str(root)]) == 0
    wrist = open_dataset(root / "datasets" / "libero_goal_expert_robot0_eye_in_hand")
    again = open_dataset(b.folder, conventions=Conventions(camera="eye_in_hand_rgb"))
    assert np.array_equal(wrist.frame(0, 3).image, again.frame(0, 3).image)
    assert not np.array_equal(wrist.frame(0, 3).image, a.frame(0, 3).image)


def test_noisy_demonstrations_hold_what_was_meant_and_replay_what_was_done():
    env = LiberoEnv("libero_object", 0, render=False)
    job = Job("libero_object", 0, 1000, 0, limit=280)
    demo, again = (next_result(record(env, job, Manner(0.3))) for _ in range(2))
    clean = next_result(record(env, job))
    assert all(np.array_equal(a, b) for a, b in zip(demo, again))
    push = demo.executed - demo.actions
    assert 0.3 < push[:, :6].any(axis=1).mean() < 0.7 and not push[:, 6].any() and np.abs(demo.executed).max() <= 1
    assert not np.array_equal(clean.states[:40], demo.states[:40]) and np.array_equal(clean.states[0], demo.states[0])
    env.close()


def test_states_of_another_processor_are_followed_and_those_of_another_simulator_refused(tmp_path):
    env = LiberoEnv("libero_object", 0, resolution=32)
    job = Job("libero_object", 0, 1000, 0, limit=280, source=str(tmp_path / "states.npz"), target=str(tmp_path / "pictures.npz"))
    demo = next_result(record(env, job))

    def shown(states):
        demo._replace(states=states).save(tmp_path / "states.npz")
        told = next_result(render(env, job))
        if told:
            return told
        assert np.array_equal(env.state(), states[-1])
        with np.load(tmp_path / "pictures.npz") as file:
            return file["agentview_image"].astype(int)

    last_bits = np.random.default_rng(0).normal(scale=1e-9, size=demo.states.shape)
    difference = shown(demo.states + last_bits) - shown(demo.states)
    assert (difference != 0).mean() < 1e-3 and np.abs(difference).max() <= 8
    assert "does not replay here (step 40 leads elsewhere)" in shown(demo.states + 0.1 * (np.arange(len(demo.states)) >= 40)[:, None])
    env.close()


def test_questions_are_answered_as_the_turned_picture_shows_it():
    """Left and front from the table's own coordinates: the camera looks along -x, and in the turned picture +y is on the left."""
    env = LiberoEnv("libero_object", 0)
    picture, language, view = next_result(look(env, Job("libero_object", 0, seed_of_moment("middle"), 0, limit=1)))
    assert picture.shape == (224, 224, 3) and language == env.language
    asked, scene = questions(view), Scene(env)
    by_noun = {noun_of(name): scene.position(name) for name in env.env.obj_body_id}
    for kind, words, axis in (("left", " left of the ", 1), ("front", " in front of the ", 0)):
        assert {answer for _, answer in asked[kind]} == {"yes", "no"}
        for question, answer in asked[kind]:
            one, other = question.removeprefix("is the ").removesuffix("?").split(words)
            assert (by_noun[one][axis] > by_noun[other][axis]) == (answer == "yes"), question
    assert {("is there a basket?", "yes"), ("is there a plate?", "no")} <= set(asked["exists"])
    assert {("how many baskets are there?", "one"), ("how many mugs are there?", "zero")} <= set(asked["count"])
    assert ("what is the basket on?", "floor") in asked["on"] and asked["in"] == [("what is in the basket?", "nothing")]
    for question, answer in asked["nearest"]:
        one = by_noun.pop(question.removeprefix("which thing is nearest to the ").removesuffix("?"))
        assert answer == min(by_noun, key=lambda noun: np.linalg.norm(by_noun[noun] - one))
        by_noun = {noun_of(name): scene.position(name) for name in env.env.obj_body_id}
    view = next_result(look(env, Job("libero_object", 0, seed_of_moment("end"), 0, limit=300))).view
    assert scene.holds(goals("libero_object", 0)[0]) and "alphabet soup" in view.hidden  # the can is at the bottom of the basket
    picture, owner_G = functools.partial(env.control.sim.render, camera_name="agentview", width=64, height=64), owners(scene)
    before = picture()
    labels_HW, names = segment(env, owner_G), list(env.env.obj_body_id)
    alone = {noun_of(name): pixels_alone(env, name, owner_G) for name in names}
    shown = {noun_of(name): int((labels_HW == number).sum()) for number, name in enumerate(names)}
    assert all(alone[noun] >= shown[noun] for noun in alone) and shown["milk"] > 0.9 * alone["milk"]
    assert shown["alphabet soup"] < 0.4 * alone["alphabet soup"] and np.array_equal(before, picture())
    assert questions(view)["in"] == [] and "alphabet soup" not in " ".join(text for text, _ in questions(view)["exists"])
    env.close()


def test_colors_drawers_and_what_is_in_them_are_those_of_the_picture():
    """The expert puts the wine bottle into the open drawer."""
    env = LiberoEnv("libero_90", 26)
    view = next_result(look(env, Job("libero_90", 26, seed_of_moment("end"), 0, limit=300))).view
    assert questions(view)["in"] == [("what is in the bottom drawer of the cabinet?", "wine bottle")]
    assert {thing.noun: thing.color for thing in view.things}["wine bottle"] == "black"
    assert set(questions(view)["drawer"]) == {(f"is the {which} drawer of the cabinet open?", "yes" if which == "bottom" else "no")
                                              for which in ("top", "middle", "bottom")}
    env.close()


def seed_of_moment(moment):
    """A seed of the probe's with which task 0 or 26 is looked at in the middle or at the end of an episode."""
    return next(seed for seed in range(100_000, 100_100)
                if all((np.random.default_rng([seed, task]).random() < 0.5) == (moment == "end") for task in (0, 26)))


def test_the_stage_writes_balanced_questions_whatever_the_number_of_workers(tmp_path, capsys):
    from vlakeep import cli

    found = []
    for workers in ("1", "2"):
        command = ["libero-vqa", "--suite", "libero_object", "--tasks", "0,1", "--items", "18", "--questions_per_scene", "2"]
        assert cli.run([*command, "--split", "heldout", "--workers", workers, "--root", str(tmp_path / workers)]) == 0
        folder, = (tmp_path / workers / "probe").iterdir()
        found.append([(folder / name).read_bytes() for name in ("images.npy", "items.jsonl", "answers.jsonl", "balance.json")])
    assert found[0] == found[1]
    rows, balance = [json.loads(line) for line in found[0][2].splitlines()], json.loads(found[0][3])
    assert set(rows[0]) == {"item", "kind", "question", "answer", "suite", "task", "seed", "split"}
    assert {row["seed"] for row in rows} <= set(range(200_000, 200_006)) and {row["split"] for row in rows} == {"heldout"}
    assert balance["kinds"]["all"]["n"] == len(rows) and "text only" in capsys.readouterr().out
    for kind in {"exists", "left", "front"} & set(balance["kinds"]):
        assert balance["kinds"][kind]["text_told"] == 0.5
    with pytest.raises(ValueError, match="--split heldout"):
        cli.run(["libero-vqa", "--first", "200000", "--root", str(tmp_path)])
    with pytest.raises(ValueError, match="must be one of probe, heldout"):
        cli.run(["libero-vqa", "--split", "test", "--root", str(tmp_path)])


def next_result(generator):
    with pytest.raises(StopIteration) as end:
        next(generator)
    return end.value.value


def test_fresh_scenes_follow_from_their_seed_alone():
    env = LiberoEnv("libero_object", 0, render=False)
    first = {}
    for seed in (1000, 1001, 1000):
        env.fresh_start(seed)
        state = env.state()
        env.step([1.0] * 7)
        assert np.array_equal(first.setdefault(seed, state), state)
    assert not np.array_equal(first[1000], first[1001])
    assert env.step(IDLE)[1:] == (0.0, False)
    env.close()


def test_the_number_of_workers_changes_no_picture():
    """What the policy sees, step by step, from one process and from two."""
    jobs = [Job("libero_object", task, number, 0, limit=3) for task in (0, 1) for number in (0, 1)]
    found = []
    for count in (1, 2):
        pictures = {}

        def act(jobs, seen, pictures=pictures):
            for job, one in zip(jobs, seen):
                pictures.setdefault(job, []).append(zlib.crc32(one.image.tobytes()))
            return [actions(zlib.crc32(one.image.tobytes()))[0] for one in seen]

        with Workers(LiberoEnv, evaluate_episode, count) as workers:
            assert {job for job, result, _ in workers.run(jobs, act) if result == {"success": False, "steps": 3}} == set(jobs)
        found.append(pictures)
    assert found[0] == found[1] and all(len(set(hashes)) == 3 for hashes in found[0].values())


def test_one_command_evaluates_a_suite_resumes_and_is_read_by_the_report(tmp_path, monkeypatch, capsys):
    from vlakeep import cli
    from vlakeep.benchmarks import policy
    from vlakeep.data.sample import Sample
    from vlakeep.probe.probe_set import write_probe
    from vlakeep.tabletop.benchmark import question_trials

    def act(backbone, samples, key, width):
        assert [sample.image.shape for sample in samples] == [(224, 224, 3)] * 2 and key == "tabletop" and width > 20
        return np.tile([0.0, 0, 0, 0, 0, 0, 1.0], (2, 1, 1)), np.zeros(2, bool)

    monkeypatch.setattr(policy, "attempt", act)
    monkeypatch.setitem(libero.MAX_STEPS, "libero_object", 3)
    folder = tmp_path / "probe" / "asked"
    trials = question_trials("color", 4, 0)
    write_probe(folder, [Sample(trials[0].sample.image, "reach")] + [t.sample for t in trials], ["instruction"] + ["color"] * 4)
    answers = [{"item": i + 1, "kind": "color", "answer": t.sample.answer} for i, t in enumerate(trials)]
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    place = ["--root", str(tmp_path), "--evaluate.benchmark", "libero_object"]
    command = ["evaluate", *place, "--threads", "1", "--device", "cpu", "--evaluate.skills", "[0]", "--evaluate.episodes", "1",
               "--evaluate.batch", "2", "--evaluate.videos", "1", "--backbone.unnorm_key", "tabletop"]
    asking = ["--evaluate.probe", "asked"]
    assert cli.run([*command, *asking]) == 0
    asked = json.loads(next(tmp_path.glob("eval/*/libero_object/base/summary.json")).read_text())["abilities"]["color"]
    assert (asked["n"], asked["mean"], asked["group"]) == (4, 1.0, "question")
    with pytest.raises(ValueError, match="other settings"):
        cli.run(command)
    shutil.rmtree(tmp_path / "eval")
    with pytest.raises(ValueError, match="which the method protects"):
        cli.run([*command, *asking, "--probe.name", "asked"])
    (tmp_path / "probe" / "asked" / "answers.jsonl").write_text(json.dumps(dict(answers[0], split="probe")) + "\n")
    with pytest.raises(ValueError, match="that a method may protect"):
        cli.run([*command, *asking])
    assert cli.run(command) == 0
    folder, = tmp_path.glob("eval/*/libero_object/base")
    rows = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    assert rows[0]["header"]["evaluate"] == {"benchmark": "libero_object", "skills": ["0"], "seed": 0, "batch": 2,
                                             "center_crop": False}
    assert rows[1:] == [{"kind": "skill", "ability": "libero_object", "trial": 0, "seed": 0, "success": False, "value": None,
                         "crash": None, "steps": 3, "task": "pick_up_the_alphabet_soup_and_place_it_in_the_basket", "init": 0}]
    assert (folder / "videos" / "task00_00.mp4").stat().st_size > 1000
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["new_skill"]["name"] == "libero_object" and summary["new_skill"]["n"] == 1 and len(summary["tasks"]) == 1
    assert "suite libero_object" in capsys.readouterr().out
    more = [*command, "--evaluate.episodes", "2"]
    assert cli.run(more) == 0
    extended = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    assert extended[:2] == rows and [row["init"] for row in extended[2:]] == [1]
    command, summary = more, json.loads((folder / "summary.json").read_text())
    assert summary["new_skill"]["n"] == 2
    monkeypatch.setattr(Workers, "_start", None)  # the third time nothing is left to simulate
    assert cli.run(command) == 0
    assert json.loads((folder / "summary.json").read_text())["new_skill"] == summary["new_skill"]
    assert cli.run(["report", *place, "--runs", "base", "--out", str(tmp_path / "report")]) == 0
    assert "New skill: libero_object" in (tmp_path / "report" / "tables" / "comparison.md").read_text()
