"""Evaluation on the tabletop against independent numbers: own rollouts, own decoding, own KL and drift, on weights merged by hand."""

import hashlib
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import BASELINE, EVALUATION, read_evaluation, wilson_by_roots
from safetensors.torch import load_file

from vlakeep import evaluate
from vlakeep.benchmarks import policy, questions
from vlakeep.benchmarks.policy import ActionPolicy
from vlakeep.benchmarks.questions import action_token_kl
from vlakeep.benchmarks.summary import print_summary
from vlakeep.core.checkpoint import file_sha256
from vlakeep.core.errors import CheckpointError
from vlakeep.data.sample import IGNORE_INDEX, Batch, Sample
from vlakeep.evaluate import load_target, run_evaluation
from vlakeep.models.load import make_backbone
from vlakeep.openvla.backbone import OpenVLABackbone
from vlakeep.openvla.processor import Processor
from vlakeep.probe.masks import mask_from_prompt
from vlakeep.probe.probe_set import ProbeSet
from vlakeep.tabletop import benchmark as tabletop
from vlakeep.tabletop import rollout
from vlakeep.tabletop.expert import expert_actions
from vlakeep.tabletop.render import render
from vlakeep.tabletop.world import MAX_STEPS, NEW_SKILL, TabletopWorld

SKILLS, KINDS, SEED, EPISODES = ["reach", "pick", "corner"], ["color", "gripper"], 11, 3
# Few questions, where it is the episodes that matter.
BRIEF = [*EVALUATION, "--evaluate.questions", "[gripper]", "--evaluate.questions_per_kind", 1, "--probe.size", 8]


def merged_by_hand(run, step):
    """The base with scale * B A added to its weights, from the adapter's files."""
    model = make_backbone("tabletop-base").eval()
    folder = run / "checkpoints" / f"step_{step:06d}" / "adapter"
    config, state = json.loads((folder / "adapter_config.json").read_text()), load_file(folder / "adapter_model.safetensors")
    names = {name.rpartition(".lora_")[0] for name in state}
    assert len(names) == 6 * 7
    for name in names:
        weight = model.openvla.get_submodule(name.removeprefix("base_model.model.")).weight
        update = state[f"{name}.lora_B.weight"].double() @ state[f"{name}.lora_A.weight"].double() * config["lora_alpha"] / config["r"]
        weight.data = (weight.double() + update).float()
    return model


@pytest.fixture(scope="module")
def models(evaluated):
    """(base, student): freshly loaded, without adapters."""
    return make_backbone("tabletop-base").eval(), merged_by_hand(evaluated[0], 30)


def one_prompt(model, sample):
    """Token ids of a prompt, from the template and the tokenizer."""
    if sample.question:
        return model.processor.tokenizer(f"In: {sample.instruction}\nOut:")["input_ids"]
    text = f"In: What action should the robot take to {sample.instruction}?\nOut:"
    return [*model.processor.tokenizer(text)["input_ids"], model.processor.tokenizer.convert_tokens_to_ids("▁")]


@torch.no_grad()
def whole_pass(model, ids, sample):
    """Log-probabilities float64 [L, V] after each text token, by a forward pass over everything, one sample alone."""
    pixels = torch.as_tensor(model.processor.image_processor([sample.image]))
    ids_1L = torch.tensor([ids])
    batch = Batch(ids_1L, torch.ones_like(ids_1L, dtype=torch.bool), torch.full_like(ids_1L, IGNORE_INDEX), pixels, [""])
    hidden_SD = model.run_layers(model.embed(batch))[0]
    return torch.log_softmax(model.logits(hidden_SD[-(len(ids) - 1):]).double(), -1)  # text token j >= 1 ends the sequence of j


def greedy(model, sample, count, end=None):
    """Up to `count` tokens, each by a pass over all that came before."""
    ids, said = one_prompt(model, sample), []
    while len(said) < count and (not said or said[-1] != end):
        said.append(int(whole_pass(model, ids + said, sample)[-1].argmax()))
    return said


def actions_of_tokens(tokens, statistics):
    """Un-normalised action: centre of bin b (token 768 - b) of [-1, 1], then 0.5 (x + 1) (q99 - q01) + q01 where the mask is true."""
    edges = np.linspace(-1, 1, 256)
    bins = np.clip(768 - np.array(tokens) - 1, 0, 254)
    x = (edges[bins] + edges[bins + 1]) / 2
    low, high = np.array(statistics["q01"]), np.array(statistics["q99"])
    return np.where(statistics["mask"], 0.5 * (x + 1) * (high - low) + low, x)


def evaluate_base(world, folder, *overrides):
    storage, make_config = world
    run_evaluation(make_config(BASELINE, *BRIEF, *overrides), storage, folder)
    return read_evaluation(folder)


def episodes_by_hand(model, skill, trials, key=None):
    """(success, steps) of each episode, one table at a time."""
    found = []
    for trial in trials:
        table = TabletopWorld([skill], [tabletop.EVALUATION + SEED + trial])
        for _ in range(MAX_STEPS[skill]):
            if table.step(model.predict_actions(render(table), table.instructions, key))[0]:
                break
        found.append((bool(table.success()[0]), int(table.steps_N[0])))
    return found


# Skills


def test_episodes_and_rates_are_those_of_a_rollout_by_hand(evaluated, models):
    played = []
    for model, folder, skills in zip(models, evaluated[1:], (["pick"], SKILLS)):
        rows, summary = read_evaluation(folder)
        for skill in skills:
            own = [row for row in rows if (row["kind"], row["ability"]) == ("skill", skill)]
            # An episode of the new skill that fails is long: one must do.
            units, count = (None, 1) if skill == NEW_SKILL else ("tabletop", EPISODES)
            by_hand = episodes_by_hand(model, skill, range(count), units)
            assert [(row["success"], row["steps"]) for row in own][:len(by_hand)] == by_hand
            assert [(row["trial"], row["seed"]) for row in own] == [(t, tabletop.EVALUATION + SEED + t) for t in range(EPISODES)]
            mean, low, high = wilson_by_roots(sum(row["success"] for row in own), EPISODES)
            wanted = {"mean": mean, "low": low, "high": high, "n": EPISODES, "crashes": 0}
            if skill == NEW_SKILL:
                assert summary["new_skill"] == dict(wanted, name=skill) and skill not in summary["abilities"]
            else:
                assert summary["abilities"][skill] == dict(wanted, group="skill")
            played += [by_hand] if skill == "pick" else []
    assert played[0] != played[1], "the run must play otherwise than the base, or this test sees nothing"


class SeeingTheState:
    """Puts actions that follow from the tables' state in the place of the model's: `act(world)` gives them."""

    def __init__(self, monkeypatch, act):
        seen, self.calls = [], 0

        def look(world):
            seen.append(world)
            return render(world)

        def attempt(backbone, samples, key, width):
            self.calls += 1
            result = act(seen[-1])
            actions, early = result if isinstance(result, tuple) else (result, np.zeros(len(samples), dtype=bool))
            return np.asarray(actions)[:, None], early

        monkeypatch.setattr(rollout, "render", look)
        monkeypatch.setattr(policy, "attempt", attempt)


def test_an_expert_succeeds_where_it_acts_and_a_still_policy_nowhere(world, tmp_path, monkeypatch):
    """The rate of each skill is known, and differs, so that none can be taken for another."""
    original = TabletopWorld.__init__

    def numbered(self, skills, seeds):
        original(self, skills, seeds)
        self.number_N = np.array(seeds) - tabletop.EVALUATION - SEED

    def act(table):
        acts_N = (table.skills == NEW_SKILL) | (table.skills == "reach") & (table.number_N > 0)
        return np.where(acts_N[:, None], expert_actions(table), 0.0)

    monkeypatch.setattr(TabletopWorld, "__init__", numbered)
    SeeingTheState(monkeypatch, act)
    rows, summary = evaluate_base(world, tmp_path / "mixed")
    assert (summary["new_skill"]["name"], summary["new_skill"]["mean"]) == (NEW_SKILL, 1.0)
    assert {name: summary["abilities"][name]["mean"] for name in ("reach", "pick")} == {"reach": 2 / 3, "pick": 0.0}
    assert [row["success"] for row in rows if row["ability"] == "reach"] == [False, True, True]
    every = ["--evaluate.skills", "[]", "--evaluate.episodes", 4]
    SeeingTheState(monkeypatch, expert_actions)
    _, summary = evaluate_base(world, tmp_path / "expert", *every)
    skills = [value for value in summary["abilities"].values() if value["group"] == "skill"]
    assert len(skills) == 6 and {value["mean"] for value in [*skills, summary["new_skill"]]} == {1.0}
    SeeingTheState(monkeypatch, lambda table: np.zeros((table.n, 7)))
    rows, summary = evaluate_base(world, tmp_path / "still", *every)
    assert {row["success"] for row in rows if row["kind"] == "skill"} == {False}
    assert summary["new_skill"]["mean"] == 0.0 and summary["new_skill"]["n"] == 4


def test_a_table_on_which_the_policy_raises_is_a_crash_and_takes_nothing_along(world, tmp_path, monkeypatch):
    broken = TabletopWorld([NEW_SKILL], [tabletop.EVALUATION + SEED + 1]).instructions[0]
    acting = []

    def attempt(backbone, samples, key, width):
        if broken in [sample.instruction for sample in samples]:
            raise RuntimeError("no answer")
        acting.append(len(samples))
        return np.zeros((len(samples), 1, 7)), np.zeros(len(samples), dtype=bool)

    monkeypatch.setattr(policy, "attempt", attempt)
    rows, summary = evaluate_base(world, tmp_path / "crash")
    new = [row for row in rows if row["ability"] == NEW_SKILL]
    assert [(row["success"], row["crash"]) for row in new] == [(False, None), (None, "RuntimeError: no answer"), (False, None)]
    mean, low, high = wilson_by_roots(0, 2)
    assert summary["new_skill"] == {"mean": mean, "low": low, "high": high, "n": 2, "crashes": 1, "name": NEW_SKILL}
    assert summary["abilities"]["pick"]["crashes"] == 0 and summary["abilities"]["pick"]["n"] == 3


# Questions


def test_answers_are_those_of_greedy_decoding_by_hand(evaluated, models):
    for model, folder in zip(models, evaluated[1:]):
        rows, summary = read_evaluation(folder)
        tokenizer = model.processor.tokenizer
        for kind in KINDS:
            own = [row for row in rows if (row["kind"], row["ability"]) == ("question", kind)]
            trials = tabletop.question_trials(kind, 6, SEED)
            said = [tokenizer.decode(greedy(model, t.sample, 6, tokenizer.eos_token_id), skip_special_tokens=True) for t in trials]
            assert [row["answer"] for row in own] == [text.strip() for text in said]
            assert [(row["expected"], row["seed"]) for row in own] == [(t.sample.answer, t.seed) for t in trials]
            assert [row["success"] for row in own] == [row["answer"] == row["expected"] for row in own]
            mean, low, high = wilson_by_roots(sum(text.strip() == t.sample.answer for text, t in zip(said, trials)), 6)
            assert summary["abilities"][kind] == {"mean": mean, "low": low, "high": high, "n": 6, "crashes": 0, "group": "question"}


def test_a_model_that_knows_the_answers_gets_them_right_and_one_that_avoids_them_wrong(world, tmp_path, monkeypatch):
    """Told by picture and question, not by their order; of `color` every other answer is right."""
    known = {}
    for kind in KINDS:
        for t in tabletop.question_trials(kind, 6, SEED):
            known[t.sample.image.tobytes(), t.sample.instruction] = (kind, t.trial, t.sample.answer)
    original, asked = Processor.encode_prompts, []

    def encode(self, samples, width=0):
        asked[:] = [known[s.image.tobytes(), s.instruction] for s in samples]
        return original(self, samples, width)

    def generate(self, batch, max_new_tokens, stop_at_eos=True):
        right = [kind == "gripper" or trial % 2 == 0 for kind, trial, _ in asked]
        texts = [answer if ok else "nothing" for ok, (_, _, answer) in zip(right, asked)]
        rows = [self.processor.tokenizer(text, add_special_tokens=False)["input_ids"] + [2] for text in texts]
        longest = max(map(len, rows))
        ids_BT = torch.tensor([row + [self.processor.pad_token_id] * (longest - len(row)) for row in rows])
        return ids_BT, torch.ones(len(rows), dtype=torch.bool)

    SeeingTheState(monkeypatch, lambda table: np.zeros((table.n, 7)))
    monkeypatch.setattr(Processor, "encode_prompts", encode)
    monkeypatch.setattr(OpenVLABackbone, "generate", generate)
    rows, summary = evaluate_base(world, tmp_path, "--evaluate.questions", "[color,gripper]", "--evaluate.questions_per_kind", 6)
    assert summary["abilities"]["gripper"]["mean"] == 1.0 and summary["abilities"]["color"]["mean"] == 0.5
    assert [row["success"] for row in rows if row["ability"] == "color"] == [True, False] * 3


def test_an_answer_of_several_words_is_read_whole(models, monkeypatch):
    """What the model says in six tokens is compared, not its first word."""
    backbone = models[0]
    ids = backbone.processor.tokenizer("the red circle and the blue", add_special_tokens=False)["input_ids"][:6]
    words = backbone.processor.tokenizer.decode(ids).strip()
    assert len(words.split()) > 1

    def generate(self, batch, max_new_tokens, stop_at_eos=True):
        return torch.tensor([ids[:max_new_tokens]]), torch.ones(1, dtype=torch.bool)

    monkeypatch.setattr(OpenVLABackbone, "generate", generate)
    sample = Sample(np.zeros((64, 64, 3), np.uint8), "what is there", question=True)
    assert questions.answer_questions(backbone, [sample]) == [words]


# The distance from the teacher


def kl_by_hand(teacher, student, frame):
    """(KL(teacher || student), KL(student || teacher)), each a mean over the seven tokens that the teacher says."""
    tokens = greedy(teacher, frame, 7)
    ids = one_prompt(teacher, frame) + tokens
    p_TV, q_TV = (whole_pass(model, ids[:-1], frame)[-7:] for model in (teacher, student))
    return [float((a.exp() * (a - b)).sum(-1).mean()) for a, b in ((p_TV, q_TV), (q_TV, p_TV))]


def test_the_kl_is_that_of_the_teacher_to_the_student_on_the_teachers_tokens(evaluated, models):
    rows, summary = read_evaluation(evaluated[2])
    measured = [row["value"] for row in rows if row["kind"] == "retention"]
    pairs = np.array([kl_by_hand(*models, frame) for frame in tabletop.retention_frames(6, SEED)])
    assert measured == pytest.approx(pairs[:, 0], rel=1e-3, abs=1e-6) and pairs.min() > 1e-4
    assert np.abs(pairs[:, 1] / pairs[:, 0] - 1).max() > 0.02, "the other direction must be told from this one"
    mean, half = pairs[:, 0].mean(), 1.959964 * pairs[:, 0].std(ddof=1) / 6 ** 0.5
    assert summary["retention_kl"] == {"mean": pytest.approx(mean, rel=1e-3), "low": pytest.approx(mean - half, rel=1e-3, abs=1e-4),
                                       "high": pytest.approx(mean + half, rel=1e-3), "n": 6}


def test_an_adapter_of_zero_has_no_kl(world, evaluated):
    storage, make_config = world
    student, _, _ = load_target(make_config(BASELINE, "--evaluate.target", evaluated[0].name), storage, "cpu")
    frames = tabletop.retention_frames(4, 3)
    assert action_token_kl(student, frames).min() > 1e-4
    for name, weight in student.named_parameters():
        if "lora_B" in name:
            weight.data.zero_()
    assert action_token_kl(student, frames).max() <= 1e-6


def test_a_negative_kl_is_rounding_or_an_error(monkeypatch):
    base = make_backbone("tabletop-base").eval()
    frames = tabletop.retention_frames(2, 3)
    for excess, sound in ((3e-7, True), (1e-3, False)):  # of the student's log-probabilities, which then are none
        answers = iter([torch.full((2, 7, 4), 0.25).log(), torch.full((2, 7, 4), 0.25).log() + excess])
        monkeypatch.setattr(OpenVLABackbone, "log_probabilities_of_continuation", lambda *_, answers=answers: next(answers))
        if sound:
            assert action_token_kl(base, frames).tolist() == [0.0, 0.0]
        else:
            with pytest.raises(AssertionError, match="a KL of -0.001 nats"):
                action_token_kl(base, frames)


def test_the_drift_is_that_of_pooled_instruction_states_by_hand(world, evaluated, models):
    storage, _ = world
    probe, layers = ProbeSet(storage.probe_folder("tabletop")), (6 - 3, 6 - 1)
    samples = probe.samples(range(48))
    covariances = []
    for model in models:
        pooled = {layer: [] for layer in layers}
        for sample in samples:
            ids_1L = torch.tensor([one_prompt(model, sample)])
            pixels = torch.as_tensor(model.processor.image_processor([sample.image]))
            batch = Batch(ids_1L, torch.ones_like(ids_1L, dtype=torch.bool), torch.full_like(ids_1L, IGNORE_INDEX), pixels, [""])
            kept = model.num_patches + mask_from_prompt(batch, [sample], model.processor)[0].nonzero()[:, 0]  # BOS is never kept
            outputs = {}
            hooks = [model.decoder_layers[n].register_forward_hook(lambda _, __, out, n=n, found=outputs: found.update({n: out}))
                     for n in layers]
            with torch.no_grad():
                model.run_layers(model.embed(batch))
            for hook in hooks:
                hook.remove()
            for layer in layers:
                hidden_1SD = outputs[layer][0] if isinstance(outputs[layer], tuple) else outputs[layer]  # a tuple before transformers 4.55
                pooled[layer].append(hidden_1SD[0][kept].double().mean(0))
        covariances.append({layer: torch.cov(torch.stack(rows).T) for layer, rows in pooled.items()})
    teacher, student = covariances
    by_hand = np.mean([float((student[n] - teacher[n]).square().sum().sqrt()) for n in layers])
    assert read_evaluation(evaluated[2])[1]["drift"] == pytest.approx(by_hand, rel=1e-4) and by_hand > 1
    assert read_evaluation(evaluated[1])[1]["drift"] == 0.0
    assert read_evaluation(evaluated[1])[1]["retention_kl"] == {"mean": None, "low": None, "high": None, "n": 0}


def test_what_was_not_measured_is_printed_as_such(evaluated, capsys):
    summary = json.loads((evaluated[1] / "summary.json").read_text())
    print_summary(summary)
    print_summary(dict(summary, target="mine", drift=None))
    base, other = (line for line in capsys.readouterr().out.splitlines() if "action-token KL" in line)
    assert base.split() == "action-token KL 0.0000 drift 0.000".split()
    assert other.split() == "action-token KL not measured drift not measured".split()


# What is evaluated


def copy_run(run, storage, name):
    """A run of another name with the same checkpoints; its folder."""
    folder = storage.runs / name
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(run, folder)
    return folder


def edit(folder, file, change):
    """Change a file of a checkpoint, and the manifest with it."""
    (folder / file).write_bytes(change((folder / file).read_bytes()))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][file] = {"size": (folder / file).stat().st_size, "sha256": file_sha256(folder / file)}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def damage(folder):
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"no weights")


def test_the_evaluated_model_carries_the_adapter(world, evaluated, models):
    storage, make_config = world
    run, _, folder = evaluated
    frames = tabletop.retention_frames(3, 5)
    base, by_hand = ([whole_pass(model, one_prompt(model, frame), frame)[-1] for frame in frames] for model in models)
    backbone, name, weights = load_target(make_config(BASELINE, "--evaluate.target", run.name), storage, "cpu")
    for frame, one, two in zip(frames, base, by_hand):
        found = whole_pass(backbone, one_prompt(backbone, frame), frame)[-1]
        assert (found - two).abs().max() < 1e-3 < 0.1 < (found - one).abs().max()
    adapter = run / "checkpoints" / "step_000030" / "adapter" / "adapter_model.safetensors"
    assert (name, weights) == (run.name, hashlib.sha256(adapter.read_bytes()).hexdigest())
    header = json.loads((folder / "records.jsonl").read_text().splitlines()[0])["header"]
    assert header["weights"] == weights == read_evaluation(folder)[1]["weights"] and header["base"] == models[0].weights_sha256


def test_actions_come_out_in_the_units_of_the_runs_statistics(world, evaluated, models):
    storage, make_config = world
    run = copy_run(evaluated[0], storage, "eval-units")
    step = run / "checkpoints" / "step_000030"
    frames = tabletop.retention_frames(3, 5)
    tokens = [greedy(models[1], frame, 7) for frame in frames]

    def stretched(data):
        entries = json.loads(data)
        entries["tabletop_corner"]["action"].update(q01=[-3.0, 1.0, -1.0, -0.5, 0.0, 2.0, 5.0], q99=[5.0, 1.5, 1.0, 1.5, 4.0, 3.0, 9.0],
                                                    mask=[True, True, False, True, True, True, False])
        return json.dumps(entries).encode()

    actions = []
    for change in (lambda data: data, stretched):
        edit(step, "adapter/dataset_statistics.json", change)
        statistics = json.loads((step / "adapter" / "dataset_statistics.json").read_text())["tabletop_corner"]["action"]
        backbone, _, _ = load_target(make_config(BASELINE, "--evaluate.target", run.name), storage, "cpu")
        found = ActionPolicy(backbone, None)([frame.image for frame in frames], [frame.instruction for frame in frames])
        assert found == pytest.approx(np.array([actions_of_tokens(row, statistics) for row in tokens]), abs=1e-12)
        actions.append(found)
    moved = np.abs(actions[1] - actions[0]).min(0)
    assert (moved[[0, 1, 3, 4, 5]] > 0.1).all() and moved[6] == 0  # no bin centre is a fixed point of these


def test_old_skills_are_played_in_the_units_of_the_base_and_the_new_one_in_those_of_its_data(world, evaluated, tmp_path, monkeypatch):
    """Data in which the hand never moves down must not take the old skills' motions from them. Few steps: their actions are compared."""
    storage, make_config = world
    played, few = {}, 3

    class Noting(TabletopWorld):
        def step(self, actions):
            played.setdefault(str(self.skills[0]), []).append(np.array(actions))
            return super().step(actions)

    def by_hand(skill, key=None):
        table = Noting([skill], [tabletop.EVALUATION + SEED])
        played.clear()
        for _ in range(few):
            table.step(backbone.predict_actions(render(table), table.instructions, key))
        return played.pop(skill)

    run = copy_run(evaluated[0], storage, "eval-narrow")

    def narrow(data):
        entries = json.loads(data)
        entries["tabletop_corner"]["action"].update(q01=[-0.5] * 2 + [0.0] * 4 + [0.0], q99=[0.5] * 2 + [0.0] * 4 + [1.0])
        return json.dumps(entries).encode()

    edit(run / "checkpoints" / "step_000030", "adapter/dataset_statistics.json", narrow)
    one = ["--evaluate.target", run.name, "--evaluate.skills", "[pick,corner]", "--evaluate.episodes", 1]
    monkeypatch.setattr(rollout, "TabletopWorld", Noting)
    monkeypatch.setattr(rollout, "MAX_STEPS", dict.fromkeys(MAX_STEPS, few))
    run_evaluation(make_config(BASELINE, *BRIEF, *one), storage, tmp_path)
    evaluated_actions = dict(played)
    backbone, _, _ = load_target(make_config(BASELINE, "--evaluate.target", run.name), storage, "cpu")
    assert backbone.unnorm_key == "tabletop_corner"
    assert {skill: len(actions) for skill, actions in evaluated_actions.items()} == {"pick": few, "corner": few}
    assert np.array_equal(evaluated_actions["pick"], by_hand("pick", "tabletop"))
    assert np.array_equal(evaluated_actions["corner"], by_hand("corner"))
    for skill, other in (("pick", None), ("corner", "tabletop")):
        assert not np.allclose(evaluated_actions[skill][0], by_hand(skill, other)[0])
    model = json.loads((tmp_path / "records.jsonl").read_text().splitlines()[0])["header"]["model"]
    assert (model["unnorm_key"], model["old_unnorm_key"]) == ("tabletop_corner", "tabletop")
    assert model["statistics"] != model["old_statistics"]


def test_a_run_on_two_data_sets_is_played_in_the_units_of_each_skills_own():
    known = {"tabletop": 1, "tabletop_corner": 2, "tabletop_path": 3}
    assert tabletop.pick_key("path", None, known) == "tabletop_path" and tabletop.pick_key("corner", "tabletop", known) == "tabletop"
    assert tabletop.pick_key("order", None, known) is None and tabletop.old_key(known) == "tabletop"
    assert tabletop.old_key({"mine": 1}) is None


def test_a_run_is_its_newest_intact_checkpoint(world, evaluated, capsys):
    storage, make_config = world
    run = copy_run(evaluated[0], storage, "eval-damaged")
    target = make_config(BASELINE, "--evaluate.target", run.name)
    damage(run / "checkpoints" / "step_000030")
    _, name, weights = load_target(target, storage, "cpu")
    assert name == run.name and weights == file_sha256(run / "checkpoints/step_000015/adapter/adapter_model.safetensors")
    assert "skipping checkpoint step_000030" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="step_000030.*The newest intact checkpoint is .*step_000015"):
        load_target(make_config(BASELINE, "--evaluate.target", run / "checkpoints" / "step_000030"), storage, "cpu")
    damage(run / "checkpoints" / "step_000015")
    with pytest.raises(FileNotFoundError, match="no intact checkpoint.*`vlakeep train --config ... --name eval-damaged`"):
        load_target(target, storage, "cpu")


def test_targets_by_name_by_path_and_base(world, evaluated, monkeypatch):
    storage, make_config = world
    run = evaluated[0]
    step = run / "checkpoints" / "step_000015"
    old, new = (file_sha256(run / f"checkpoints/{name}/adapter/adapter_model.safetensors") for name in ("step_000015", "step_000030"))
    wanted = {"base": ("base", make_backbone("tabletop-base").weights_sha256), run.name: ("evaluated", new),
              f"{run}/": ("evaluated", new), str(step): ("evaluated-step_000015", old), "./step_000015": ("evaluated-step_000015", old)}
    configs = [make_config(BASELINE, "--evaluate.target", target) for target in [*wanted, "nobody"]]
    monkeypatch.chdir(step.parent)
    found = [load_target(config, storage, "cpu") for config in configs[:-1]]
    assert [(name, weights) for _, name, weights in found] == list(wanted.values()) and old != new
    assert [backbone.lora is None for backbone, _, _ in found] == [True] + [False] * 4
    with pytest.raises(FileNotFoundError, match="runs with checkpoints: .*evaluated.*`vlakeep train --config ... --name nobody`"):
        load_target(configs[-1], storage, "cpu")


def test_what_was_trained_on_another_base_is_refused(world, evaluated):
    storage, make_config = world
    run = copy_run(evaluated[0], storage, "eval-other-base")
    weights = make_backbone("tabletop-base").weights_sha256.encode()
    edit(run / "checkpoints" / "step_000030", "state.json", lambda data: data.replace(weights, b"0" * 64))
    with pytest.raises(CheckpointError, match="trained on other base weights"):
        load_target(make_config(BASELINE, "--evaluate.target", run.name), storage, "cpu")


# Going on


@pytest.fixture
def short(world, evaluated, monkeypatch):
    """evaluate(folder) -> (rows, summary): 14 rows of a model that is loaded once and whose drift is a constant, in batches of two."""
    storage, make_config = world
    loaded = load_target(make_config(BASELINE, "--evaluate.target", evaluated[0].name), storage, "cpu")
    frames = tabletop.retention_frames(5, SEED)
    known = {}

    def attempt(backbone, samples, key, width, attempt=policy.attempt):
        keys = [(sample.image.tobytes(), sample.instruction) for sample in samples]
        if not all(key in known for key in keys):
            known.update(zip(keys, attempt(backbone, samples, key)[0]))
        return np.array([known[key] for key in keys]), np.zeros(len(keys), dtype=bool)

    monkeypatch.setattr(evaluate, "load_target", lambda *_: loaded)
    monkeypatch.setattr(evaluate, "measure_drift", lambda *_: 1.25)
    monkeypatch.setattr(policy, "attempt", attempt)
    monkeypatch.setattr(tabletop, "retention_frames", lambda count, seed: frames[:count])
    monkeypatch.setattr(questions, "KL_BATCH", 2)
    monkeypatch.setattr(questions, "QUESTION_BATCH", 2)
    config = make_config(BASELINE, "--evaluate.target", evaluated[0].name, "--evaluate.skills", "[reach,drop]", "--evaluate.episodes", 2,
                         "--evaluate.questions", "[color,gripper]", "--evaluate.questions_per_kind", 3, "--evaluate.retention_frames", 5,
                         "--evaluate.seed", SEED)

    def run(folder):
        return read_evaluation(run_evaluation(config, storage, folder))
    return run


def test_an_evaluation_killed_after_any_row_goes_on_as_if_nothing_had_been(short, tmp_path, monkeypatch):
    rows, summary = short(tmp_path / "whole")
    assert len(rows) == 4 + 6 + 5
    lines = (tmp_path / "whole" / "records.jsonl").read_text().splitlines(keepends=True)
    batches, known = {"answer_questions": [], "action_token_kl": []}, {}
    for name, original in [(name, getattr(questions, name)) for name in batches]:
        def asked(backbone, samples, name=name, original=original):
            batches[name].append(batch := tuple(sample.image.tobytes() for sample in samples))
            if batch not in known:  # a batch gives the same values each time
                known[batch] = original(backbone, samples)
            return known[batch]
        monkeypatch.setattr(questions, name, asked)
    assert short(tmp_path / "again") == (rows, summary)
    whole = {name: list(calls) for name, calls in batches.items()}
    assert [len(calls) for calls in whole.values()] == [4, 3]
    half = '{"kind": "retention", "abil'  # of the line that was being written; the last one is a whole one
    for kept, rest in [(0, ""), (1, ""), *((kept, half) for kept in range(1, len(lines))), (len(lines), "")]:
        folder = tmp_path / f"{kept}{bool(rest)}"
        folder.mkdir()
        (folder / "records.jsonl").write_text("".join(lines[:kept]) + rest)
        for calls in batches.values():
            calls.clear()
        assert short(folder) == (rows, summary), f"killed after line {kept}"
        assert sorted((folder / "records.jsonl").read_text().splitlines()) == sorted(line.strip() for line in lines)
        for name, calls in batches.items():  # the last bits of a value depend on its batch: only batches of the whole one occur
            assert all(call in whole[name] for call in calls), name
    assert batches == {"answer_questions": [], "action_token_kl": []}, "a finished evaluation measures nothing"


def test_a_killed_evaluation_can_have_lost_lines_in_the_middle(short, tmp_path):
    rows, summary = short(tmp_path / "whole")
    lines = (tmp_path / "whole" / "records.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "holes").mkdir()
    (tmp_path / "holes" / "records.jsonl").write_text("".join(lines[:1] + lines[1::2]))
    assert short(tmp_path / "holes") == (rows, summary)


# Alarms

VARIED = np.random.default_rng(0).uniform(-0.9, 0.9, (4000, 7))


def policies():
    """Name -> (act(world), what the alarms say)."""
    numbers = iter(range(10 ** 6))

    def healthy(table):
        return VARIED[[next(numbers) % len(VARIED) for _ in range(table.n)]]

    def stuck(table):
        actions = healthy(table)
        actions[:, 1] = 1.0
        return actions

    return {"healthy": (healthy, []),
            "collapsed": (lambda table: np.full((table.n, 7), 0.3), ["the policy has collapsed: 1 different actions"]),
            "stuck": (stuck, ["action dimensions [1] are at an end of their range"]),
            "mute": (lambda table: (healthy(table), np.arange(table.n) == 0), ["answers ended before all action tokens were out"])}


@pytest.mark.parametrize("name", ["healthy", "collapsed", "stuck", "mute"])
def test_what_a_policy_does_raises_its_alarm_which_outlives_the_session(world, tmp_path, monkeypatch, name):
    act, wanted = policies()[name]
    policy = SeeingTheState(monkeypatch, act)
    rows, summary = evaluate_base(world, tmp_path)
    assert len(summary["alarms"]) == len(wanted) and all(text in alarm for text, alarm in zip(wanted, summary["alarms"]))
    policy.calls = 0
    for summary_lost in (False, True):  # the second as after a kill between the episodes and the end
        if summary_lost:
            (tmp_path / "summary.json").unlink()
        assert evaluate_base(world, tmp_path) == (rows, summary)
    assert policy.calls == 0


def test_a_skill_that_is_named_twice_is_refused(world, tmp_path):
    with pytest.raises(ValueError, match="--evaluate.skills .*'pick'.*each once"):
        evaluate_base(world, tmp_path, "--evaluate.skills", "[pick,reach,pick]")
