"""LIBERO's evaluation from end to end, with tests/fake_libero.py instead of the simulator and the real model, workers and records.

An episode of the fake succeeds only with the very actions that this file works out for its pictures, so a success says that
picture, crop, instruction, adapter, un-normalisation, gripper, order and initial state were all right.
"""

import copy
import json
import shutil
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace

import fake_libero
import numpy as np
import pytest
import torch
from conftest import BASELINE

from vlakeep import evaluate
from vlakeep.core.names import evaluation_name
from vlakeep.data.images import center_crop, libero_image
from vlakeep.data.sample import Episode, Sample
from vlakeep.data.writer import write_rlds
from vlakeep.libero import benchmark as libero
from vlakeep.libero import setup as libero_setup
from vlakeep.libero.workers import Workers
from vlakeep.models import alarms as safeguards
from vlakeep.models.adapters import load_adapter
from vlakeep.models.load import make_backbone
from vlakeep.openvla.backbone import OpenVLABackbone
from vlakeep.openvla.prompts import encode_prompts
from vlakeep.probe.probe_set import write_probe
from vlakeep.tabletop.benchmark import question_trials
from vlakeep.train import run_training

OBJECT, GOAL = "libero_object", "libero_goal"
LIMITS = {OBJECT: 4, GOAL: 3, "libero_spatial": 3}
SETS = {OBJECT: "libero_object_no_noops", GOAL: GOAL}
TEXTS = Path(__file__).parent / "texts"
RUN, HELDOUT = "evaluate-libero", "evaluate-libero-heldout"
DEMOS = {OBJECT: (2, 1, 2), GOAL: (1, 1)}  # per task
MUJOCO = "2.3.7"


def demonstrations(model):
    """Suite -> [(task, pictures, actions [3, 7] as LIBERO stores them)]: the base model's own motions, the other way round.

    The two suites move at different scales.
    """
    found = {}
    for suite, counts in DEMOS.items():
        tasks = [task for task, count in enumerate(counts) for _ in range(count)]
        scale = np.r_[np.full(6, 0.9 if suite == OBJECT else 0.3), 1.0]
        found[suite] = []
        for number, task in enumerate(tasks):
            pictures = np.stack([fake_libero.picture(suite, task, 100 + number, step) for step in range(3)])
            moves = spoken(model, pictures, fake_libero.TASKS[suite][task])
            actions = scale * np.c_[-moves[:, :3], moves[:, 3:6], [-1.0, 1.0, 1.0 if number % 2 else -1.0]]
            found[suite].append((task, pictures, actions.astype(np.float32)))
    return found


def write_data(storage, demos):
    for suite, name in SETS.items():
        write_rlds(storage.data, name, [Episode(pictures, actions, fake_libero.TASKS[suite][task])
                                        for task, pictures, actions in demos[suite]])
    (storage.data / GOAL / "demos.json").write_text(json.dumps({"versions": {"mujoco": MUJOCO}}))  # the other's are official


def write_questions(folder, split="heldout"):
    """Instructions and questions by turns: an item's number is not its trial's. Returns (kinds, samples, answers)."""
    asked = {kind: question_trials(kind, 3, 0) for kind in ("color", "exists")}
    samples, kinds = [], []
    for k in range(3):
        samples += [Sample(asked["color"][k].sample.image, fake_libero.TASKS[OBJECT][k]), *(asked[kind][k].sample for kind in asked)]
        kinds += ["instruction", *asked]
    write_probe(folder, samples, kinds)
    rows = [{"item": i, "kind": kind, "answer": s.answer, "split": split} for i, (s, kind) in enumerate(zip(samples, kinds)) if s.question]
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return kinds, samples, [sample.answer for sample in samples]


@pytest.fixture(autouse=True)
def simulator(monkeypatch, tmp_path):
    """The fake instead of the simulator. What is returned writes down what the episodes want."""
    monkeypatch.setattr(libero, "LiberoEnv", fake_libero.Env)
    monkeypatch.setattr(libero, "load_suite", fake_libero.Suite)
    monkeypatch.setattr(libero, "require_libero", lambda: None)
    monkeypatch.setattr(libero_setup, "versions", lambda: {"mujoco": MUJOCO})
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    monkeypatch.setenv("FAKE_LIBERO", str(tmp_path / "plan.json"))
    for suite, steps in LIMITS.items():
        monkeypatch.setitem(libero.MAX_STEPS, suite, steps)
    return lambda plan: (tmp_path / "plan.json").write_text(json.dumps(plan))


@pytest.fixture(scope="module")
def place(world):
    """(storage, evaluation(*options) -> (rows, summary, folder), {"base", "run": model}, statistics of the run)."""
    storage, make_config = world
    models = {"base": make_backbone("tabletop-base").eval()}
    demos = demonstrations(models["base"])
    write_data(storage, demos)
    common = ["--data.datasets", f"[{', '.join(SETS.values())}]", "--data.image_aug", True]
    folder = run_training(make_config(BASELINE, "--name", RUN, *common, "--train.lr", 0.005, "--train.steps", 12), storage)
    checkpoint = sorted((folder / "checkpoints").iterdir())[-1]
    models["run"] = copy.deepcopy(models["base"])
    load_adapter(models["run"], checkpoint / "adapter")
    statistics = json.loads((checkpoint / "adapter" / "dataset_statistics.json").read_text())
    statistics["tabletop"] = models["base"].norm_stats["tabletop"]

    def config(*options):
        return make_config(BASELINE, *common, "--probe.size", 8, "--evaluate.benchmark", OBJECT, "--evaluate.batch", 2, *options)

    def evaluation(*options):
        done = evaluate.run_evaluation(config(*options), storage)
        trials = [row for row in read(done)[1:] if row["kind"] in ("skill", "question", "retention")]
        return trials, json.loads((done / "summary.json").read_text()), done

    return SimpleNamespace(storage=storage, config=config, evaluation=evaluation, models=models, statistics=statistics, demos=demos)


@pytest.fixture(autouse=True)
def afresh(place, monkeypatch, own_evaluations):
    """Nothing is evaluated yet, and the base model is a copy of one that was loaded once."""
    monkeypatch.setattr(evaluate, "make_backbone", lambda *_: copy.deepcopy(place.models["base"]))
    with own_evaluations():
        shutil.rmtree(place.storage.eval, ignore_errors=True)
        yield


def read(folder):
    return [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]


def in_units(actions_TA, statistics):
    """Normalised actions in the simulator's units: [-1, 1] to [q01, q99], and the gripper, 1 = open, to -1 = open."""
    low, high = (np.array(statistics["action"][key])[:6] for key in ("q01", "q99"))
    return np.c_[low + (actions_TA[:, :6] + 1) / 2 * (high - low), np.where(actions_TA[:, 6] > 0.5, -1.0, 1.0)]


@torch.no_grad()
def spoken(model, images, text):
    """Normalised actions [N, 7] of one forward pass, whose rows are pictures of one instruction."""
    batch = encode_prompts([Sample(image, text) for image in images], model.processor)
    ids_NA, ended_N = model.generate(batch, 7)
    assert not ended_N.any()
    return model.processor.action_tokenizer.decode(ids_NA.numpy())


def wanted(model, statistics, suite, task, init, steps, crop=True, seed=0):
    """The actions, in the simulator's terms, that the model gives for the first pictures of an episode."""
    raw = [fake_libero.picture(suite, task, init, step, seed)[::-1, ::-1] for step in range(steps)]
    images = [center_crop(libero_image(image)) if crop else libero_image(image) for image in raw]
    return in_units(spoken(model, images, fake_libero.TASKS[suite][task]), statistics).tolist()


def spoilt(actions):
    """Wrong in one number of the last action."""
    return [*actions[:-1], [actions[-1][0] + 0.05, *actions[-1][1:]]]


def row(suite, task, init, success, steps, seed=0, crash=None):
    return {"kind": "skill", "ability": suite, "trial": task * 50 + init, "seed": seed, "success": success, "value": None, "crash": crash,
            "steps": steps, "task": fake_libero.TASKS[suite][task].replace(" ", "_"), "init": init}


MAIN = ["--evaluate.target", RUN, "--evaluate.skills", "[0, 2]", "--evaluate.episodes", 2, "--evaluate.other_suites", f"[{GOAL}]",
        "--evaluate.probe", HELDOUT, "--evaluate.questions_per_kind", 2, "--evaluate.retention_frames", 2]
# (suite, task, init) -> steps after which the episode succeeds; None for one that wants something else than the model does
OUTCOMES = {(OBJECT, 0, 0): 3, (OBJECT, 0, 1): None, (OBJECT, 2, 0): 4, (OBJECT, 2, 1): 4,
            (GOAL, 0, 0): 3, (GOAL, 0, 1): None, (GOAL, 1, 0): None, (GOAL, 1, 1): 2}


@pytest.fixture(scope="module")
def planned(place):
    plan = {}
    for (suite, task, init), steps in OUTCOMES.items():
        actions = wanted(place.models["run"], place.statistics[SETS[suite]], suite, task, init, steps or 2)
        plan[f"{suite}/{task}/{init}"] = actions if steps else spoilt(actions)
    return plan


def main_rows():
    return [row(suite, task, init, steps is not None, steps or LIMITS[suite]) for (suite, task, init), steps in sorted(OUTCOMES.items())]


def test_the_plan_tells_right_from_wrong(place):
    """Otherwise the successes below would say nothing: adapter, crop, statistics, task, initial state, step and seed all matter."""
    run, base, known = place.models["run"], place.models["base"], place.statistics

    def told(suite, task, init, steps, model=run, key=None, **others):
        return np.array(wanted(model, known[key or SETS[suite]], suite, task, init, steps, **others))

    winners = [(*episode, steps) for episode, steps in OUTCOMES.items() if steps]
    changes = [lambda s, k, i, n: told(s, k, i, n, model=base), lambda s, k, i, n: told(s, k, i, n, key="tabletop"),
               lambda s, k, i, n: told(s, k, i, n, key=SETS[GOAL if s == OBJECT else OBJECT]),
               lambda s, k, i, n: told(s, k, i, n, crop=False), lambda s, k, i, n: told(s, k, 1 - i, n),
               lambda s, k, i, n: told(s, k, i, n, seed=1), lambda s, k, i, n: told(s, k, i, n + 1)[1:]]
    blind = [number for number, change in enumerate(changes)
             if not any(np.abs(told(*winner) - change(*winner)).max() > 1e-3 for winner in winners)]
    assert blind == []


@pytest.mark.parametrize("graph", [True, False])
def test_each_suite_is_answered_by_a_graph_of_its_own_unless_it_is_turned_off(place, planned, simulator, monkeypatch, graph):
    simulator(planned)
    write_questions(place.storage.probe / HELDOUT)
    said, ask = [], OpenVLABackbone.attempt_chunks

    @contextmanager
    def recorded(backbone):
        said.append("recorded")
        yield
        said.append("over")

    monkeypatch.setattr("vlakeep.models.graphs.recorded", recorded)
    monkeypatch.setattr(OpenVLABackbone, "attempt_chunks", lambda *given: said.append("asked") or ask(*given))
    place.evaluation(*MAIN, "--evaluate.cuda_graph", graph)
    told = [word for word, _ in groupby(said)]
    assert told == ["recorded", "asked", "over"] * 2 if graph else told == ["asked"]


def test_language_is_asked_beside_the_episodes_as_it_is_alone(place, planned, simulator, tmp_path):
    simulator(planned)
    write_questions(place.storage.probe / HELDOUT)
    texts = ["--evaluate.texts", str(TEXTS)]
    rows, summary, _ = place.evaluation(*MAIN, *texts, "--evaluate.language", True)
    alone, alone_summary, _ = place.evaluation("--evaluate.benchmark", "language", *texts, "--evaluate.target", RUN,
                                               "--evaluate.questions_per_kind", 2)
    assert [row for row in rows if row["ability"] in ("pick", "last")] == alone and len(alone) == 4
    assert summary["nats"] == alone_summary["nats"] and set(summary["nats"]) == {"pick", "last"}
    groups = {name: one["group"] for name, one in summary["abilities"].items()}
    assert groups == {GOAL: "skill", "color": "question", "exists": "question", "pick": "question", "last": "question"}
    # What sees nothing is a control, which reads nothing either; other kinds of questions are chosen without it.
    blank, _, _ = place.evaluation(*MAIN, *texts, "--evaluate.language", True, "--evaluate.blank", True, "--evaluate.skills", "[0]")
    assert {row["ability"] for row in blank} == {OBJECT, GOAL}
    shutil.rmtree(place.storage.eval)
    chosen, _, _ = place.evaluation(*MAIN, *texts, "--evaluate.language", True, "--evaluate.questions", "[color]", "--evaluate.skills",
                                    "[0]")
    assert {row["ability"] for row in chosen if row["kind"] == "question"} == {"color", "pick", "last"}
    (tmp_path / "color.jsonl").write_bytes((TEXTS / "pick.jsonl").read_bytes())
    with pytest.raises(ValueError, match="--evaluate.texts has color, as kinds of questions of the probe"):
        place.evaluation(*MAIN, "--evaluate.texts", str(tmp_path), "--evaluate.language", True)
    with pytest.raises(FileNotFoundError, match="--evaluate.texts"):
        place.evaluation(*MAIN, "--evaluate.texts", str(TEXTS / "none"), "--evaluate.language", True)


def test_episodes_are_counted_by_task_and_suite_whatever_the_workers_and_interruptions(place, planned, simulator):
    simulator(planned)
    write_questions(place.storage.probe / HELDOUT)
    rows, summary, folder = place.evaluation(*MAIN, "--evaluate.workers", 3)  # of which two wait when the policy is asked
    assert sorted((r for r in rows if r["kind"] == "skill"), key=lambda r: (r["ability"], r["trial"])) == main_rows()
    new, old = summary["new_skill"], summary["abilities"][GOAL]
    assert (new["name"], new["n"], new["mean"], new["crashes"]) == (OBJECT, 4, 0.75, 0)
    assert (old["group"], old["n"], old["mean"]) == ("skill", 4, 0.5) and OBJECT not in summary["abilities"]
    assert {task: value["mean"] for task, value in summary["tasks"].items()} == {
        "move_to_the_red_square": 0.5, "move_to_the_blue_circle": 0.5, "pick_up_the_red_square": 0.5, "pick_up_the_green_circle": 1.0}
    assert summary["drift"] > 0 and summary["alarms"] == []
    assert folder.parents[2] == place.storage.eval and folder.parts[-2:] == (OBJECT, RUN)

    # One worker goes on after two finished trials and half a line of a third, and plays neither of the two again.
    lines = (folder / "records.jsonl").read_bytes().splitlines(keepends=True)
    kept = [lines[0], lines[1], json.dumps(dict(json.loads(lines[2]), mark="kept")).encode() + b"\n"]
    (folder / "records.jsonl").write_bytes(b"".join(kept) + lines[3][:20])
    again, resumed, _ = place.evaluation(*MAIN)
    assert (folder / "records.jsonl").read_bytes().startswith(b"".join(kept))

    def order(found):
        return sorted(({k: v for k, v in r.items() if k != "mark"} for r in found), key=lambda r: (r["kind"], r["ability"], r["trial"]))
    assert order(again) == order(rows)
    assert {k: v for k, v in resumed.items() if k != "seconds"} == {k: v for k, v in summary.items() if k != "seconds"}


def test_records_of_other_settings_are_not_continued(place, simulator, monkeypatch):
    simulator({})
    options = ["--evaluate.skills", "[1]", "--evaluate.episodes", 1]
    _, _, folder = place.evaluation(*options)
    before = (folder / "records.jsonl").read_bytes()
    monkeypatch.setattr(Workers, "_start", None)  # they are refused before anything is simulated
    for change in (["--evaluate.seed", 5], ["--evaluate.center_crop", False], ["--evaluate.batch", 1], ["--evaluate.skills", "[0]"]):
        with pytest.raises(ValueError, match="other settings"):
            place.evaluation(*options, *change)
    monkeypatch.setattr(libero_setup, "versions", lambda: {"mujoco": "3.3.7"})
    with pytest.raises(ValueError, match="other settings .mujoco"):
        place.evaluation(*options)
    assert (folder / "records.jsonl").read_bytes() == before


def test_the_seed_reaches_the_environment_and_episodes_are_added(place, simulator, capsys):
    """The base model knows one key, which is taken although it is no suite's, and that is said."""
    base, statistics = place.models["base"], place.statistics["tabletop"]
    simulator({f"{OBJECT}/1/{init}": wanted(base, statistics, OBJECT, 1, init, init + 1, seed=3) for init in range(2)})
    options = ["--evaluate.skills", "[1]", "--evaluate.seed", 3, "--evaluate.episodes"]
    rows, summary, folder = place.evaluation(*options, 1)
    assert rows == [row(OBJECT, 1, 0, True, 1, seed=3)] and "those of tabletop: they are used for libero_object" in capsys.readouterr().err
    assert (summary["drift"], summary["retention_kl"]["n"]) == (0.0, 0)
    before = (folder / "records.jsonl").read_bytes()
    rows, summary, _ = place.evaluation(*options, 2)
    assert rows == [row(OBJECT, 1, 0, True, 1, seed=3), row(OBJECT, 1, 1, True, 2, seed=3)] and summary["new_skill"]["n"] == 2
    assert (folder / "records.jsonl").read_bytes().startswith(before)


def test_a_crash_of_the_simulator_is_no_failure_of_the_policy(place, simulator):
    base, statistics = place.models["base"], place.statistics["tabletop"]
    simulator({f"{OBJECT}/1/0": "crash", f"{OBJECT}/1/1": wanted(base, statistics, OBJECT, 1, 1, 1)})
    rows, summary, _ = place.evaluation("--evaluate.skills", "[1]", "--evaluate.episodes", 3)
    assert sorted(rows, key=lambda r: r["trial"]) == [row(OBJECT, 1, 0, None, 0, crash="RuntimeError: the arm fell off"),
                                                      row(OBJECT, 1, 1, True, 1), row(OBJECT, 1, 2, False, LIMITS[OBJECT])]
    assert (summary["new_skill"]["n"], summary["new_skill"]["mean"], summary["new_skill"]["crashes"]) == (2, 0.5, 1)


def test_a_blank_evaluation_shows_grey_and_is_kept_apart(place, simulator, monkeypatch):
    """The alarm counts the actions of the two rows that the policy was asked for, not those that fill its batch."""
    monkeypatch.setattr(safeguards, "SEEN_AT_LEAST", 3)
    write_questions(place.storage.probe / HELDOUT)
    grey = np.full((1, 224, 224, 3), 128, np.uint8)
    action, = in_units(spoken(place.models["base"], grey, fake_libero.TASKS[OBJECT][1]), place.statistics["tabletop"]).tolist()
    simulator({f"{OBJECT}/1/0": [action] * 4})
    rows, summary, folder = place.evaluation("--evaluate.skills", "[1]", "--evaluate.episodes", 1, "--evaluate.blank", True,
                                             "--evaluate.probe", HELDOUT)
    assert rows == [row(OBJECT, 1, 0, True, 4)] and folder.name == "base-blank" and summary["target"] == "base-blank"
    assert any("collapsed: 1 different actions in 4 steps" in alarm for alarm in summary["alarms"])
    # Under a name of one's own too; and no trial of it counts for one that sees, wherever it lies.
    asked = ["--evaluate.skills", "[1]", "--evaluate.episodes", 1]
    config = place.config(*asked, "--evaluate.blank", True)
    named = evaluate.run_evaluation(config, place.storage, name="group/cell")
    assert named.parts[-2:] == ("group", "cell-blank") == tuple(evaluation_name("group/cell", config.evaluate).split("/"))
    assert json.loads((named / "records.jsonl").read_text().split("\n")[0])["header"]["blank"] is True
    _, _, seeing = place.evaluation(*asked)
    assert "blank" not in read(seeing)[0]["header"] and evaluation_name("group/cell", place.config(*asked).evaluate) == "group/cell"
    for one, other, told in ((named, place.config(*asked), "blank True -> .not set"), (seeing, config, "header does not say blank")):
        with pytest.raises(ValueError, match=told):
            evaluate.run_evaluation(other, place.storage, one)


def test_another_crop_than_that_of_the_training_is_used_and_named(place, simulator):
    for crop, alarms in ((False, ["the run was trained with random crops, and this evaluation does not cut"]), (True, [])):
        simulator({f"{OBJECT}/1/0": wanted(place.models["run"], place.statistics[SETS[OBJECT]], OBJECT, 1, 0, 2, crop=crop)})
        rows, summary, folder = place.evaluation("--evaluate.target", RUN, "--evaluate.skills", "[1]", "--evaluate.episodes", 1,
                                                 "--evaluate.center_crop", crop)
        assert rows == [row(OBJECT, 1, 0, True, 2)]
        assert [alarm.split(" the centre")[0] for alarm in summary["alarms"]] == alarms
        shutil.rmtree(folder)


def test_a_camera_that_is_turned_and_another_renderer_are_named(place, simulator, monkeypatch):
    monkeypatch.setattr(libero_setup, "versions", lambda: {"mujoco": "3.3.7"})
    simulator({"turned": True})
    _, summary, _ = place.evaluation("--evaluate.target", RUN, "--evaluate.episodes", 1)
    for name in SETS.values():
        assert any(alarm.startswith(f"{name} was rendered as by mujoco 2.3.7, this evaluation renders as mujoco 3.3.7")
                   for alarm in summary["alarms"])
    assert any("fit the training data better turned by 180 degrees" in alarm for alarm in summary["alarms"])
    assert len(summary["alarms"]) == 3


def test_a_key_that_is_given_is_taken_and_a_missing_one_is_named(place, simulator, monkeypatch):
    simulator({f"{OBJECT}/1/0": wanted(place.models["run"], place.statistics["tabletop"], OBJECT, 1, 0, 1)})
    rows, _, _ = place.evaluation("--evaluate.target", RUN, "--evaluate.skills", "[1]", "--evaluate.episodes", 1,
                                  "--backbone.unnorm_key", "tabletop")
    assert rows == [row(OBJECT, 1, 0, True, 1)]
    monkeypatch.setattr(Workers, "_start", None)
    with pytest.raises(ValueError, match="no action statistics of libero_spatial or libero_spatial_no_noops"):
        place.evaluation("--evaluate.target", RUN, "--evaluate.benchmark", "libero_spatial")


def test_a_replay_takes_demonstration_k_for_initial_state_k(place, simulator):
    found = [actions for _, _, actions in place.demos[OBJECT]]
    everything = np.concatenate(found)
    low, high = np.quantile(everything[:, :6], [0.01, 0.99], axis=0)
    demos = [np.c_[np.clip(actions[:, :6], low, high), actions[:, 6]] for actions in found]  # the statistics clip
    rest = np.r_[np.zeros(6), demos[1][-1, 6]]  # behind its end: no motion, the gripper as it was
    simulator({f"{OBJECT}/0/0": demos[0].tolist(), f"{OBJECT}/0/1": [*demos[1].tolist(), rest.tolist()],
               f"{OBJECT}/0/2": demos[0].tolist(), f"{OBJECT}/1/0": demos[2].tolist(), f"{OBJECT}/1/1": demos[1].tolist(),
               f"{OBJECT}/2/1": demos[4].tolist()})
    rows, summary, folder = place.evaluation("--evaluate.target", "replay", "--evaluate.episodes", 3, "--evaluate.workers", 2)
    good = {(0, 0): 3, (0, 1): 4, (0, 2): 3, (1, 0): 3, (2, 1): 3}
    assert sorted(rows, key=lambda r: r["trial"]) == [row(OBJECT, task, init, (task, init) in good, good.get((task, init), LIMITS[OBJECT]))
                                                      for task in range(3) for init in range(3)]
    assert (summary["new_skill"]["n"], folder.name, summary["drift"]) == (9, "replay", None)


@torch.no_grad()
def test_questions_and_kl_are_those_of_the_cut_pictures_of_the_probe(place, planned, simulator):
    kinds, samples, answers = write_questions(place.storage.probe / HELDOUT)
    simulator({})
    rows, summary, _ = place.evaluation(*MAIN, "--evaluate.skills", "[1]", "--evaluate.episodes", 1, "--evaluate.other_suites", "[]")
    student, teacher = place.models["run"], place.models["base"]
    cut = [Sample(center_crop(s.image), s.instruction, question=s.question) for s in samples]

    def told(item):
        ids, _ = student.generate(encode_prompts([cut[item]], student.processor), 6)
        return student.processor.tokenizer.batch_decode(ids, skip_special_tokens=True)[0].strip().lower()

    for kind in ("color", "exists"):
        items = [i for i, own in enumerate(kinds) if own == kind][:2]
        asked = sorted((r for r in rows if r["ability"] == kind), key=lambda r: r["trial"])
        assert [(r["trial"], r["seed"], r["success"]) for r in asked] == [
            (trial, item, told(item) == answers[item]) for trial, item in enumerate(items)]
        assert (summary["abilities"][kind]["n"], summary["abilities"][kind]["group"]) == (2, "question")
    items = [i for i, own in enumerate(kinds) if own == "instruction"][:2]

    def kl(which):
        batch = encode_prompts([which[i] for i in items], teacher.processor)
        tokens, _ = teacher.generate(batch, 7, stop_at_eos=False)
        one, two = (m.log_probabilities_of_continuation(batch, tokens) for m in (teacher, student))
        return (one.exp() * (one - two)).sum(-1).mean(1).numpy()

    measured = sorted((r for r in rows if r["kind"] == "retention"), key=lambda r: r["trial"])
    assert [(r["trial"], r["seed"]) for r in measured] == list(enumerate(items))
    values = np.array([r["value"] for r in measured])
    assert np.allclose(values, kl(cut), rtol=1e-3) and not np.allclose(kl(samples), kl(cut), rtol=0.02) and values.max() > 1e-3
    assert summary["retention_kl"]["mean"] == pytest.approx(values.mean())


def test_a_probe_that_a_method_may_protect_is_refused(place, simulator, monkeypatch):
    simulator({})
    monkeypatch.setattr(Workers, "_start", None)
    folder = place.storage.probe / "evaluate-libero-own"
    write_questions(folder, split="probe")
    with pytest.raises(ValueError, match="that a method may protect"):
        place.evaluation("--evaluate.probe", folder.name)
    with pytest.raises(ValueError, match="which the method protects"):
        place.evaluation("--evaluate.probe", folder.name, "--probe.name", folder.name)
    (folder / "answers.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="answers.jsonl"):
        place.evaluation("--evaluate.probe", folder.name)
