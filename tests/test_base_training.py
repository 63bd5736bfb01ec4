"""A mid-size base: what is trained of assembled parts, in pieces and beside texts, and its difference from the parts as a small file."""

import json
import os
import shutil
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_parts
import torch
from commands import REPO, wrong_options
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch._dynamo.backends.debugging import aot_eager

from vlakeep import cli
from vlakeep.core.config import ConfigError
from vlakeep.core.errors import CheckpointError
from vlakeep.core.storage import DEFAULT_ROOT
from vlakeep.data.sample import IGNORE_INDEX, Episode, Sample
from vlakeep.data.writer import write_rlds
from vlakeep.libero import train_base
from vlakeep.libero.pretrain import shrink
from vlakeep.models.files import read_tensors, weight_files, weights_hash
from vlakeep.models.load import make_backbone
from vlakeep.models.merge import save_checkpoint
from vlakeep.openvla import delta, pieces
from vlakeep.openvla.backbone import OpenVLABackbone
from vlakeep.openvla.change import BesideTexts, begin_with, kl_of_words, make_trainable, make_whole, words_of
from vlakeep.openvla.pieces import Plan
from vlakeep.openvla.texts import OPENINGS, drawn, read_texts
from vlakeep.probe.probe_set import write_probe

WORDS = len(tiny_parts.words())


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return tiny_parts.make_folder(tmp_path_factory.mktemp("parts") / "midsize")


def pictured(backbone, count=3):
    rng = np.random.default_rng(0)
    return backbone.processor.encode_batch([
        Sample(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8), text, rng.uniform(-1, 1, 7).astype(np.float32))
        for text in ["the red block", "the block", "red"][:count]])


def texts_for(backbone, batch, rows=2):
    length = backbone.num_patches + batch.input_ids.shape[1]
    return torch.randint(3, WORDS, (rows, length), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def moved(backbone, size=0.05):
    """Everything that is trained, as far as a training would move it."""
    generator = torch.Generator().manual_seed(3)
    for parameter in backbone.parameters():
        if parameter.requires_grad:
            parameter += size * torch.randn(parameter.shape, generator=generator)


def stepped(backbone, lr=0.05):
    """One step of everything that is trained, into B too, and once more so that A moves."""
    batch = pictured(backbone)
    loss = BesideTexts(backbone, 1.0)
    optimizer = torch.optim.SGD([p for p in backbone.parameters() if p.requires_grad], lr=lr)
    for _ in range(2):
        optimizer.zero_grad()
        loss((batch, texts_for(backbone, batch))).loss.backward()
        optimizer.step()
    return loss


# What is trained


def test_the_change_begins_as_nothing_and_leaves_what_is_not_its_own(parts):
    backbone, before = make_backbone(parts), dict(read_tensors(weight_files(parts)))
    batch = pictured(backbone)
    first = backbone.loss(batch).loss
    make_trainable(backbone, 4, 0)
    assert torch.equal(BesideTexts(backbone, 1.0)((batch, None)).loss, first)
    stepped(backbone)
    make_whole(backbone)
    after = {name: tensor.detach() for name, tensor in backbone.network.state_dict().items()}
    whole = {name.replace(".base_layer", ""): tensor for name, tensor in after.items() if ".lora_" not in name}
    assert whole.keys() == before.keys()
    changed = {name for name in whole if not torch.equal(whole[name], before[name])}
    embeddings = "language_model.model.embed_tokens.weight"
    assert changed == {"projector.fc1.weight", "projector.fc1.bias", "projector.fc2.weight", "projector.fc2.bias", embeddings}
    assert torch.equal(whole[embeddings][:WORDS], before[embeddings][:WORDS]) and len(before[embeddings]) == WORDS + 256 + 64
    adapted = {name.split(".lora_B")[0] for name, tensor in after.items() if ".lora_B" in name and tensor.abs().max() > 0}
    expected = {name[:-len(".weight")] for name, tensor in before.items() if tensor.ndim == 2 and (
        name.startswith("language_model.model.layers.") or ".blocks." in name and ".blocks.3." not in name)}
    assert adapted == expected and len(expected) == 4 * 7 + 3 * 4  # of the tower's four blocks the last is not run


def test_models_that_are_not_assembled_are_refused():
    with pytest.raises(CheckpointError, match="the head of tabletop-base is not its embeddings.*assemble-openvla"):
        make_trainable(make_backbone("tabletop-base"), 4, 0)
    llama = SimpleNamespace(tokenizer=SimpleNamespace(vocab_size=32000, convert_ids_to_tokens={31744: "給"}.get))
    with pytest.raises(CheckpointError, match="stand on rows of words.*assemble-openvla"):
        words_of(llama)


# Beside texts


def test_texts_are_rows_of_the_same_pass_and_the_teacher_is_the_model_without_its_change(parts):
    backbone, teacher = make_backbone(parts), make_backbone(parts)
    make_trainable(backbone, 4, 0)
    moved(backbone, 0.2)
    loss = BesideTexts(backbone, 1.0)
    batch = pictured(backbone)
    ids_TS = texts_for(backbone, batch)
    alone = BesideTexts(backbone, 1.0)((batch, None)).loss
    out = loss((batch, ids_TS))
    with torch.no_grad():
        places, sees = torch.arange(ids_TS.shape[1])[None], torch.ones(1, ids_TS.shape[1], ids_TS.shape[1], dtype=torch.bool).tril()
        said = [model.logits(model.read_text(ids_TS, places, sees)).double() for model in (teacher, backbone)]
    p, q = said[0][..., :WORDS].softmax(-1), said[1].softmax(-1)[..., :WORDS]
    expected = (p * (p.log() - q.log())).sum(-1).mean()
    assert float(loss.kl) == pytest.approx(float(expected), rel=1e-4)
    # Not only what action tokens cost: words have moved too.
    assert expected + (1 - said[1].softmax(-1)[..., WORDS:].sum(-1)).log().mean() > 0.01
    assert out.loss.item() == pytest.approx((alone + loss.kl).item(), rel=1e-5)
    assert float(loss((batch, ids_TS))._replace(loss=None).num_labelled) == float(BesideTexts(backbone, 1.0)((batch, None)).num_labelled)


def test_logits_of_the_labelled_columns_give_the_same_step(parts):
    """Texts of several lengths, and a row with fewer labels than the others whose last one stands at the end."""
    def gradients(labels):
        backbone = make_backbone(parts)
        make_trainable(backbone, 4, 0)
        moved(backbone)
        batch = pictured(backbone)
        longest = int((batch.labels[:, -1] != IGNORE_INDEX).nonzero()[0, 0])
        batch.labels[longest, :-3] = IGNORE_INDEX
        out = BesideTexts(backbone, 1.0, labels)((batch, texts_for(backbone, batch)))
        out.loss.backward()
        return out, {name: p.grad for name, p in backbone.named_parameters() if p.requires_grad}

    (one, plain), (other, few) = gradients(None), gradients(8)
    assert (int(one.num_labelled), int(one.correct)) == (int(other.num_labelled), int(other.correct)) and int(one.num_labelled) == 8 + 8 + 3
    assert one.loss.item() == pytest.approx(other.loss.item(), rel=1e-6)
    assert all(torch.allclose(plain[name], few[name], atol=1e-6, rtol=1e-4) for name in plain)


@pytest.mark.skipif(bool(OpenVLABackbone.compile_problem()), reason=OpenVLABackbone.compile_problem())
def test_compiled_layers_have_no_breaks_and_give_the_same_step(parts):
    """Both passes of a step and the tower's adapters, without a compiler's own kernels; a break of the graph is an error."""
    def gradients(compile):
        backbone, graphs = make_backbone(parts), []

        def backend(graph, inputs):
            graphs.append(graph)
            return aot_eager(graph, inputs)

        make_trainable(backbone, 4, 0)
        moved(backbone)
        torch._dynamo.reset()
        if compile:
            backbone.compile_layers(backend=backend, fullgraph=True)
        stepped(backbone)
        return {name: p.detach() for name, p in backbone.named_parameters() if p.requires_grad}, len(graphs)

    (plain, _), (compiled, count) = gradients(False), gradients(True)
    assert plain.keys() == compiled.keys() and 3 <= count <= 4  # blocks, layers, layers without adapters
    assert all(torch.allclose(plain[name], compiled[name], atol=1e-5) for name in plain)


def test_action_tokens_in_a_text_cost_and_a_copy_costs_nothing():
    logits = torch.randn(2, 5, 9, generator=torch.Generator().manual_seed(0))
    teacher = logits[..., :6].log_softmax(-1)
    shut = logits.clone()
    shut[..., 6:] = -1e9
    assert float(kl_of_words(teacher, shut)) == pytest.approx(0, abs=1e-6)
    spoken = logits.softmax(-1)[..., 6:].sum(-1)
    assert float(kl_of_words(teacher, logits)) == pytest.approx(float(-(1 - spoken).log().mean()), rel=1e-4)


def test_texts_are_drawn_word_by_word_from_the_model(parts, tmp_path):
    backbone = make_backbone(parts)
    ids = drawn(backbone, 8, 24, 3, 7)
    assert ids.shape == (8, 24) and int(ids.max()) < WORDS and torch.equal(ids, drawn(backbone, 8, 24, 3, 7))
    assert not torch.equal(ids, drawn(backbone, 8, 24, 3, 8))
    begun = [backbone.processor.text_ids(opening) for opening in OPENINGS]
    assert [ids[row, :len(begun[k])].tolist() == begun[k] for row, k in enumerate([0, 0, 0, 0, 1, 1, 2, 2])] == [True] * 8
    # Without a cache, and with the same random numbers: three rows, then one, of documents.
    generator, again = torch.Generator().manual_seed(7), []
    with torch.no_grad():
        for rows in (3, 1):
            text = torch.tensor([begun[0]] * rows)
            while text.shape[1] < 24:
                size = text.shape[1]
                read = backbone.read_text(text, torch.arange(size)[None], torch.ones(1, size, size, dtype=torch.bool).tril())
                p = backbone.logits(read[:, -1])[:, :WORDS].softmax(-1)
                text = torch.cat([text, torch.multinomial(p, 1, generator=generator)], 1)
            again.append(text)
    assert torch.equal(torch.cat(again), ids[:4])
    with pytest.raises(ConfigError, match="alone has"):
        drawn(backbone, 8, 4, 3, 7)


def test_texts_of_another_model_or_too_short_are_refused(parts, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("VLAKEEP_ROOT", str(tmp_path / "root"))
    file = tmp_path / "root" / "texts.safetensors"
    command = ["own-texts", "--base", str(parts), "--out", str(file), "--texts", "4", "--length", "24", "--device", "cpu"]
    assert cli.run(command) == 0 and cli.run(command) == 0 and "is there" in capsys.readouterr().out
    ids, facts = read_texts(file, 20, weights_hash(parts))
    assert ids.shape == (4, 20) and str(tmp_path) not in json.dumps(facts)
    with pytest.raises(ValueError, match="was said by another model"):
        read_texts(file, 20, "0" * 64)
    with pytest.raises(ValueError, match="texts of 24 tokens, a sample has 25: make them with --length 25"):
        read_texts(file, 25, weights_hash(parts))
    with pytest.raises(ValueError, match="cannot be read"):
        read_texts(tmp_path / "none", 20, "")


# In pieces


@pytest.fixture(scope="module")
def world(parts, tmp_path_factory):
    """(root, command of a training of four steps): two data sets with statistics of their own, a probe with answers, texts."""
    root = tmp_path_factory.mktemp("base")
    rng = np.random.default_rng(1)
    for name, scale in (("libero_a", 1.0), ("libero_b", 0.25)):
        episodes = []
        for k in range(3):
            actions = (rng.uniform(-scale, scale, (4, 7))).astype(np.float32)
            actions[:, 6] = [-1, -1, 1, 1]
            episodes.append(Episode(rng.integers(0, 256, (4, 64, 64, 3), dtype=np.uint8), actions, f"the red {'b' * (k + 1)}"))
        write_rlds(root / "datasets", name, episodes)
    asked = [Sample(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8), "is it red?", question=True) for _ in range(3)]
    write_probe(root / "probe" / "asked", asked, ["exists"] * 3)
    (root / "probe" / "asked" / "answers.jsonl").write_text("".join(
        json.dumps({"item": i, "question": "is it red?", "answer": "yes"}) + "\n" for i in range(3)))
    texts = root / "texts.safetensors"
    save_file({"ids": torch.randint(3, WORDS, (5, 220), dtype=torch.int32, generator=torch.Generator().manual_seed(0))}, str(texts),
              metadata={"facts": json.dumps({"weights": weights_hash(parts)})})
    return root, ["train-base", "--base", str(parts), "--data", "libero_one=libero_a,libero_two=libero_b",
                  "--questions", "asked", "--texts", str(texts), "--steps", "4", "--batch", "3", "--text_rows", "2", "--rank", "4",
                  "--lr", "0.01", "--processes", "1", "--device", "cpu", "--out"]


def test_pieces_leave_the_weights_of_one_piece_to_the_bit(world, parts, capsys, monkeypatch):
    root, command = world
    monkeypatch.setenv("VLAKEEP_ROOT", str(root))
    with pytest.raises(ConfigError, match="--stop_after ends a piece of --steps, --done_after the whole training: give one"):
        cli.run([*command, str(root / "whole"), "--stop_after", "1", "--done_after", "2"])
    assert cli.run([*command, str(root / "whole")]) == 0
    for piece in range(4):
        assert not (root / "pieced").is_dir()
        assert cli.run([*command, str(root / "pieced"), "--stop_after", "0.001"]) == 0  # a step each
        if piece == 1:
            with pytest.raises(ConfigError, match=r"training with other settings: lr 0.02 \(was 0.01\)"):
                cli.run([*command, str(root / "pieced"), "--lr", "0.02"])
            with pytest.raises(ConfigError, match=r"training with other settings: near True \(was None\)"):
                cli.run([*command, str(root / "pieced"), "--near"])
    said = capsys.readouterr().out
    assert said.count("the same command goes on") == 3 and "goes on behind step 3 of 4" in said
    assert weights_hash(root / "pieced") == weights_hash(root / "whole") != weights_hash(parts)
    statistics = json.loads((root / "whole" / "dataset_statistics.json").read_text())
    assert list(statistics) == ["libero_one", "libero_two"]
    assert statistics["libero_one"]["action"]["q99"][0] > 2 * statistics["libero_two"]["action"]["q99"][0] > 0.1
    facts = json.loads((root / "pieced" / "PROVENANCE.json").read_text())
    assert facts["steps"] == 4 and facts["samples"] == 27 and len(facts["final"]) == 4
    assert str(root) not in facts["command"] and "--texts ROOT/texts.safetensors" in facts["command"]
    assert cli.run([*command, str(root / "whole")]) == 0 and "is trained" in capsys.readouterr().out
    backbone = make_backbone(root / "whole")
    assert backbone.dtype == torch.float32
    assert backbone.predict_actions(np.zeros((1, 64, 64, 3), np.uint8), ["red"], "libero_two").shape == (1, 7)


def test_a_training_with_an_end_makes_the_steps_that_fit_and_goes_on_where_the_clock_stood(parts, tmp_path, monkeypatch, capsys):
    """Each step takes a second of a clock of its own, and so does each look at it."""
    clock = [0.0]
    monkeypatch.setattr(pieces, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def trained(folder, end, stop=None):
        backbone = make_backbone(parts)
        batch = pictured(backbone)
        make_trainable(backbone, 4, 0)

        def passed(pick_B):
            clock[0] += 1.0
            return batch, None
        plan = Plan(tmp_path / folder, None, 3, 0.02, 0, {"steps": None}, stop and clock[0] + stop, clock[0] + end)
        return pieces.train_in_pieces(backbone, BesideTexts(backbone, 1.0), passed, lambda: torch.zeros(3, dtype=torch.int64),
                                      torch.Generator(), plan)

    rates = []
    monkeypatch.setattr(pieces, "rate", lambda *given, real=pieces.rate: rates.append(real(*given)) or rates[-1])
    done = trained("whole", 20)
    assert done["steps"] == 20 and done["final"][0] == 20 and done["seconds"] == 20
    assert rates[0] == pytest.approx(0.02 / 500, rel=0.1) and max(rates) == rates[2] > 0.019 and rates[-1] < 0.001
    rates.clear()
    assert trained("pieced", 20, stop=10) is None and len(rates) == 10
    assert trained("pieced", 5)["steps"] == 15 and "goes on behind step 10 of as many as the time allows" in capsys.readouterr().out
    assert rates[10] == pytest.approx(0.01, rel=0.1) and rates[-1] < 0.002
    with pytest.raises(ConfigError, match="the time was over before the first step: give --done_after more"):
        trained("late", -1)
    assert trained("cut", 1000, stop=10) is None
    with pytest.raises(ConfigError, match="the time was over before the first step behind 10: give --done_after more"):
        trained("cut", -1)
    assert trained("cut", 5)["steps"] == 15


def test_it_learns_actions_and_holds_to_what_it_said(parts, tmp_path):
    """The same steps with and without the KL: actions are learnt either way, and texts are kept by it."""
    def trained(weight):
        backbone = make_backbone(parts)
        batch = pictured(backbone)
        ids_TS = texts_for(backbone, batch)
        make_trainable(backbone, 8, 0)
        loss = BesideTexts(backbone, weight)
        plan = Plan(tmp_path / str(weight), 60, 3, 0.02, 0, {})
        done = pieces.train_in_pieces(backbone, loss, lambda pick_B: (batch, ids_TS), lambda: torch.zeros(3, dtype=torch.int64),
                                      torch.Generator(), plan, lambda: {"kl": loss.kl.item()})
        return done["final"]

    (_, _, accuracy, kl), (_, _, beside, kept) = trained(0.0), trained(1.0)
    assert accuracy > 0.5 and beside > 0.5 and kept < 0.3 * kl


def test_pictures_are_made_once_and_anew_for_other_data(tmp_path):
    made, device = [], torch.device("cpu")

    def make():
        made.append(1)
        yield np.full((2, 5, 5, 3), 7, np.uint8)
        yield np.full((1, 5, 5, 3), 9, np.uint8)

    for facts, times in (({"side": 5, "data": "a"}, 1), ({"side": 5, "data": "a"}, 1), ({"side": 5, "data": "b"}, 2)):
        images = train_base.pictures(tmp_path / "p.npy", facts, 3, device, make)
        assert len(made) == times and images[:, 0, 0, 0].tolist() == [7, 7, 9]
    with pytest.raises(AssertionError, match="3 pictures of 4 samples"):
        train_base.pictures(tmp_path / "p.npy", {"side": 5, "data": "c"}, 4, device, make)


def test_near_pictures_are_off_by_a_grey_level_here_and_there():
    rng = np.random.default_rng(0)
    picture = np.kron(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8))
    exact, near = shrink(picture, 133), shrink(picture, 133, near=True)
    off = np.abs(exact.astype(int) - near)
    assert near.shape == (133, 133, 3) and 0 < off.mean() < 0.2 and off.max() <= 3


def test_a_batch_has_samples_then_texts_and_a_share_of_questions():
    samples = [Sample(None, "a", question=number < 4, answer="b") for number in range(40)]
    generator = torch.Generator()
    picked = train_base.picker(samples, 300, 0.5, generator, "cpu")
    texts = torch.arange(10)[:, None].repeat(1, 6)
    rows = train_base.Rows(picked, lambda pick_B: pick_B, texts, 30, generator, "cpu")
    batch, ids = rows.batch(rows.pick())
    assert rows.size == 330 and batch.shape == (300,) and ids.shape == (30, 6) and 0.4 < (batch < 4).float().mean() < 0.6
    assert set(ids[:, 0].tolist()) <= set(range(10)) and len(set(ids[:, 0].tolist())) > 5
    plain = train_base.Rows(picked, lambda pick_B: pick_B, None, 30, generator, "cpu")
    assert plain.size == 300 and plain.batch(plain.pick())[1] is None


def test_data_are_named_with_their_key():
    assert train_base.sets_by_key(["a=x", "b=y", "a=z"]) == {"a": ["x", "z"], "b": ["y"]}
    with pytest.raises(ConfigError, match="--data x: must be KEY=NAME"):
        train_base.sets_by_key(["x"])


def test_the_rate_warms_up_and_ends_at_nothing_whatever_the_pieces(tmp_path):
    plan = Plan(tmp_path, 10_000, 1, 2.0, 0, {})
    assert [round(pieces.rate(plan, step), 3) for step in (0, 249, 499, 5_000, 9_999)] == [0.004, 0.998, 1.988, 1.0, 0.0]
    generator = torch.Generator()
    drawn_ = []
    for seed, step in ((0, 1), (0, 1), (0, 2), (1, 1)):
        pieces.draw_by(seed, step, generator)
        drawn_.append((float(torch.rand(())), float(torch.rand((), generator=generator))))
    assert drawn_[0] == drawn_[1] and len(set(drawn_)) == 3


def test_a_state_of_another_model_is_refused(parts):
    backbone = make_backbone(parts)
    make_trainable(backbone, 4, 0)
    weights = {name: p for name, p in backbone.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(weights.values())
    kept = pieces.state_of(weights, optimizer, copy=True)
    stepped(backbone)
    pieces.put_back(weights, optimizer, kept)
    assert all(torch.equal(weights[name], kept["weights"][name]) for name in weights)
    del kept["weights"]["model.base_model.model.projector.fc1.bias"]
    with pytest.raises(ConfigError, match="of another model .1 weights differ, first .*projector.fc1.bias"):
        pieces.put_back(weights, optimizer, kept)


# The difference


@pytest.fixture(scope="module")
def trained(parts, tmp_path_factory):
    """A change of rank 4, large enough to see, with a provenance."""
    backbone = make_backbone(parts)
    make_trainable(backbone, 4, 0)
    moved(backbone)
    make_whole(backbone)
    folder = tmp_path_factory.mktemp("trained") / "m"
    backbone.norm_stats = {"libero_one": {"action": {"q01": [0.0] * 7, "q99": [1.0] * 7}}}
    save_checkpoint(backbone, folder)
    (folder / "PROVENANCE.json").write_text('{"steps": 4}')
    return folder


@pytest.mark.parametrize("script", ["build_libero_base", "build_midsize_base", "study_libero_7b"])
def test_scripts_take_the_default_root_and_name_the_environment(tmp_path, script):
    (tmp_path / "vlakeep").write_text("#!/bin/sh\necho $0 in $VLAKEEP_ROOT $*\nexit 9\n")
    (tmp_path / "python").write_text("#!/bin/sh\necho $0 in $VLAKEEP_ROOT $*\nexit 9\n")
    for name in ("vlakeep", "python"):
        (tmp_path / name).chmod(0o755)
    for given, root in (({}, DEFAULT_ROOT), ({"VLAKEEP_ROOT": str(tmp_path)}, tmp_path)):
        done = subprocess.run(["bash", f"scripts/{script}.sh"], cwd=REPO, env={"PATH": f"{tmp_path}:{os.environ['PATH']}", **given},
                              capture_output=True, text=True)
        assert done.returncode == 9 and f" in {root} " in done.stdout
        assert "the conda environment 'openvla' is not active" in done.stderr


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Tiny matrices are to be those that are compressed, and half of a tiny vocabulary is new."""
    monkeypatch.setattr(delta, "SMALL", 1000)
    monkeypatch.setattr(delta, "FEW_ROWS", 0.6)


def test_parts_and_difference_give_the_trained_base_again(parts, trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("VLAKEEP_ROOT", str(tmp_path))
    file, out = tmp_path / "d.safetensors", tmp_path / "base"
    assert cli.run(["base-delta", "make", "--parts", str(parts), "--trained", str(trained), "--delta", str(file)]) == 0
    assert "language_model" not in capsys.readouterr().out.split("wrote")[-1]
    assert cli.run(["base-delta", "apply", "--parts", str(parts), "--delta", str(file), "--out", str(out)]) == 0
    before, wanted, found = (dict(read_tensors(weight_files(folder))) for folder in (parts, trained, out))
    assert found.keys() == wanted.keys() and {t.dtype for t in found.values()} == {torch.bfloat16}
    with safe_open(str(file), framework="pt") as opened:
        facts, stored = json.loads(opened.metadata()["facts"]), {name: opened.get_tensor(name) for name in opened.keys()}
    how = {name: set(parts_) for name, parts_ in delta.by_tensor(stored).items()}
    low = [name for name, one in how.items() if "a" in one]
    assert len(low) == 4 * 5 + 3 * 4 and all(stored[f"{name}:a"].shape[0] == 4 and stored[f"{name}:a"].dtype == torch.int8 for name in low)
    for name in wanted:  # the rounding to bfloat16 is that of any base; what is whole has no other
        change = wanted[name] - before[name]
        lost = found[name].float() - (before[name] + change).to(torch.bfloat16).float()
        assert lost.norm() <= (0.05 * change.norm() if name in low else 0), name
    assert facts["result"] == weights_hash(out) == json.loads((out / "PROVENANCE.json").read_text())["weights"]
    assert facts["made"] == {"steps": 4} and max(row["error"] for row in facts["table"]) < 0.02
    assert make_backbone(out).norm_stats == make_backbone(trained).norm_stats
    # Rows of words are those of the parts.
    name = "language_model.model.embed_tokens.weight"
    assert torch.equal(found[name][:WORDS], before[name][:WORDS].to(torch.bfloat16)) and facts["rows"][name][0] >= WORDS
    shutil.rmtree(out)
    assert delta.apply(parts, file, out) == facts["result"]
    second = tmp_path / "again.safetensors"
    for _ in range(3):
        delta.make(parts, trained, second, 40.0)
        assert second.read_bytes() == file.read_bytes()


def test_a_training_goes_on_from_a_difference(world, parts, tmp_path, monkeypatch):
    """Adapters, projector and new rows begin as what the file holds; the teacher is still the parts."""
    root, command = world
    monkeypatch.setenv("VLAKEEP_ROOT", str(root))
    first, file = root / "begun", root / "begun.safetensors"
    assert cli.run([*command, str(first), "--lr", "0.05"]) == 0
    delta.make(parts, first, file, 40.0)
    before, wanted = (dict(read_tensors(weight_files(folder))) for folder in (parts, first))

    for rank in (4, 6, 2):  # as many directions, more, fewer
        backbone = make_backbone(parts)
        make_trainable(backbone, rank, 1)
        batch, ids_TS = pictured(backbone), texts_for(backbone, pictured(backbone))
        loss = BesideTexts(backbone, 1.0)
        begin_with(backbone, file)
        loss((batch, ids_TS)).loss.backward()  # the teacher is still there
        make_whole(backbone)
        save_checkpoint(backbone, tmp_path / str(rank))
        found = dict(read_tensors(weight_files(tmp_path / str(rank))))
        for name in wanted:
            change = wanted[name] - before[name]
            lost = (found[name] - wanted[name]).norm()
            assert lost <= (0.05 if rank >= 4 or name.startswith("projector") else 0.9) * change.norm() + 4e-3 * wanted[name].norm() * (
                change.norm() > 0), name

    wider = tmp_path / "wide.safetensors"  # a matrix in 8 bits for each weight
    monkeypatch.setattr(delta, "chosen", lambda spectra, room: {name: 10 ** 6 for name in spectra})
    delta.make(parts, first, wider, 40.0)
    backbone = make_backbone(parts)
    make_trainable(backbone, 4, 1)
    begin_with(backbone, wider)
    assert cli.run([*command, str(root / "gone_on"), "--begin_with", str(file)]) == 0
    made = json.loads((root / "gone_on" / "PROVENANCE.json").read_text())
    assert made["begun"]["made"]["steps"] == 4 and len(made["begun"]["sha256"]) == 64
    assert weights_hash(root / "gone_on") != weights_hash(first)
    assert cli.run([*command, str(root / "cut"), "--begin_with", str(file), "--stop_after", "0.001"]) == 0
    with pytest.raises(ConfigError, match="training with other settings: begun None"):
        cli.run([*command, str(root / "cut")])
    # Parts with another projector and other new rows, as another processor may compute them, are the difference's all the same.
    drawn = make_backbone(tiny_parts.make_folder(tmp_path / "x" / "drawn", seed=1))
    make_trainable(drawn, 4, 1)
    assert begin_with(drawn, file)["result"] == delta.read_difference(file)[0]["result"]
    wrong = tmp_path / "wrong"
    shutil.copytree(parts, wrong)
    state = load_file(str(wrong / "model.safetensors"))
    state["language_model.model.layers.1.mlp.up_proj.weight"][3, 5] += 1e-3
    save_file(state, str(wrong / "model.safetensors"), metadata={"format": "pt"})
    others = make_backbone(wrong)
    make_trainable(others, 4, 1)
    with pytest.raises(CheckpointError, match="1 tensors are others, first language_model.model.layers.1.mlp.up_proj.weight"):
        begin_with(others, file)
    with pytest.raises(CheckpointError, match="has format None, this version reads 1"):
        cli.run([*command, str(root / "no"), "--begin_with", str(root / "texts.safetensors")])


def test_sums_of_the_difference_are_exact():
    """So that no machine gives other last bits: against integers of 64 bits."""
    generator = torch.Generator().manual_seed(0)
    found = {"b": torch.randint(-127, 128, (33, 90), generator=generator, dtype=torch.int8), "b_scale": torch.rand(33, generator=generator),
             "a": torch.randint(-127, 128, (90, 51), generator=generator, dtype=torch.int8), "a_scale": torch.rand(51, generator=generator)}
    exact = (found["b"].long() @ found["a"].long()).float()
    assert torch.equal(delta.restored(found), exact * found["b_scale"][:, None] * found["a_scale"])
    with pytest.raises(AssertionError, match="not exact"):
        delta.restored({**found, "b": torch.ones(2, 1041, dtype=torch.int8), "a": torch.ones(1041, 2, dtype=torch.int8)})


def test_directions_compete_for_the_bytes_and_a_full_matrix_takes_no_more_than_its_weights():
    generator = torch.Generator().manual_seed(0)
    strong, weak = torch.randn(40, 3, generator=generator) @ torch.randn(3, 60, generator=generator), 0.01 * torch.randn(
        40, 60, generator=generator)
    spectra = {"strong": delta.spectrum(strong), "weak": delta.spectrum(weak)}
    assert spectra["strong"].needed == 3 and spectra["weak"].needed > 35
    assert delta.chosen(spectra, 650) == {"strong": 2, "weak": 0}  # a direction takes 100 bytes, the scales 400
    assert delta.chosen(spectra, 1500) == {"strong": 3, "weak": 4}
    everything = delta.chosen(spectra, 10**6)
    assert everything["weak"] * 100 > 2400 and delta.chosen(spectra, 300 + 2400 + 800) == everything
    for kept, most in ((1, 0.9), (3, 0.01)):
        left = strong - delta.restored(delta.in_directions(strong, kept))
        best = float(torch.linalg.svdvals(strong)[kept:].norm())
        assert float(left.norm()) == pytest.approx(best, abs=0.02 * float(strong.norm())) and left.norm() < most * strong.norm()
    for matrix in (weak, weak.T):
        full = delta.in_full(matrix)
        assert (matrix - delta.restored(full)).norm() < 0.01 * matrix.norm() and full["full"].dtype == torch.int8
        low = delta.in_directions(matrix, 40)
        assert (matrix - delta.restored(low)).norm() < 0.03 * matrix.norm()


def test_other_parts_damaged_files_and_too_little_room_are_refused(parts, trained, tmp_path, monkeypatch):
    file = tmp_path / "d.safetensors"
    delta.make(parts, trained, file, 40.0)
    other = tiny_parts.make_folder(tmp_path / "x" / "other", seed=1)  # another projector and other new rows, which are all replaced
    assert delta.apply(other, file, tmp_path / "same") == delta.apply(parts, file, tmp_path / "base")
    wrong = tmp_path / "wrong"
    shutil.copytree(parts, wrong)
    state = load_file(str(wrong / "model.safetensors"))
    state["language_model.model.layers.1.mlp.up_proj.weight"][3, 5] += 1e-3
    save_file(state, str(wrong / "model.safetensors"), metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="1 tensors are others, first language_model.model.layers.1.mlp.up_proj.weight"):
        delta.apply(wrong, file, tmp_path / "no")
    with safe_open(str(file), framework="pt") as opened:
        least = sum(opened.get_tensor(name).nbytes for name in opened.keys() if name.endswith(":whole")) + delta.ROOM
    rows = delta.make(parts, trained, tmp_path / "tight.safetensors", (least + 9_000) / 1e6)  # there is room for a few directions alone
    left = {row["how"]: row for row in rows}
    assert left["none"]["error"] == 1.0 and left["low"]["bytes"] <= 9_000 and left["low"]["error"] > 0.1
    assert delta.apply(parts, tmp_path / "tight.safetensors", tmp_path / "tight")
    with pytest.raises(ValueError, match="what is stored whole takes"):
        delta.make(parts, trained, tmp_path / "e.safetensors", 0.01)
    with pytest.raises(CheckpointError, match="was not trained from .*: .* tensors differ"):
        delta.make(make_backbone("tabletop-base").checkpoint, trained, tmp_path / "e.safetensors", 40.0)
    with safe_open(str(file), framework="pt") as opened:
        told, stored = opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}
    name = next(name for name in stored if name.endswith(":b"))
    stored[name][0, 0] += 1
    save_file(stored, str(file), metadata=told)
    with pytest.raises(CheckpointError, match="is not the one that was made"):
        delta.apply(parts, file, tmp_path / "no")
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="is no difference of a base"):
        delta.apply(parts, file, tmp_path / "no")
    assert not (tmp_path / "no").exists() and not (tmp_path / "e.safetensors").exists()
    with pytest.raises(ConfigError, match="base-delta apply needs --out"):
        cli.run(["base-delta", "apply", "--parts", str(parts), "--delta", str(file)])


# The script

# Stands for vlakeep: notes its words, and makes what the stage makes. A training is done with its second piece.
STAND_IN = """#!/usr/bin/env bash
echo "vlakeep $*" >> "$VLAKEEP_ROOT/calls"
word() { local wanted="$1"; while [ "$2" != "$wanted" ]; do shift; done; echo "$3"; }
made() { mkdir -p "$(dirname "$1")"; touch "$1"; }
case "$1" in
  assemble-openvla) made "$(word --out "$@")/PROVENANCE.json" ;;
  libero-demos) set="$VLAKEEP_ROOT/datasets/$(word --suite "$@")_expert_side_noise0_3"
    case "$*" in *--simulate*) ;; *) made "$set/demos.json" ;; esac ;;
  libero-vqa) made "$VLAKEEP_ROOT/probe/$(word --probe.name "$@")/answers.jsonl" ;;
  own-texts) made "$(word --out "$@")" ;;
  train-base) out="$(word --out "$@")"; [ ! -f "$out-state" ] || made "$out/PROVENANCE.json"; touch "$out-state" ;;
  base-delta) case "$2" in make) made "$(word --delta "$@")" ;; apply) made "$(word --out "$@")/PROVENANCE.json" ;; esac ;;
esac
"""


def test_the_script_goes_on_where_it_stopped_and_calls_what_there_is(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    for name, text in (("vlakeep", STAND_IN), ("python", "#!/bin/sh\nexit 0\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def called(stop="", **more):
        before = len((root / "calls").read_text().splitlines()) if (root / "calls").is_file() else 0
        environment = {"VLAKEEP_ROOT": str(root), "PATH": f"{tmp_path}:{os.environ['PATH']}", "STOP": stop, **more}
        done = subprocess.run(["bash", "scripts/build_midsize_base.sh", "4", "60"], cwd=REPO, env=environment, capture_output=True)
        return done.returncode, (root / "calls").read_text().splitlines()[before:]

    def stages(lines):
        return [" ".join(line.split()[1:3 if "base-delta" in line else 2]) for line in lines]

    code, first = called("states")
    assert code == 0 and stages(first) == ["assemble-openvla", *["libero-demos"] * 3]
    assert all(line.endswith("--simulate") for line in first[1:])
    code, second = called()
    assert code == 75 and stages(second) == [*["libero-demos"] * 3, *["libero-vqa"] * 3, "own-texts", "train-base"]
    assert "libero_90=libero_90_expert_side_noise0_3,libero_spatial=libero_spatial_expert_side_noise0_3,libero_object=" in second[-1]
    code, third = called("base")
    assert code == 0 and stages(third) == ["train-base", "base-delta make", "base-delta apply"] and third[0] == second[-1]
    code, last = called()
    assert code == 0 and stages(last) == ["libero-vqa", *["evaluate"] * 7]
    assert not any("--data" in line and ("goal" in line or "libero_10" in line) for line in (*first, *second, *third))
    (root / "midsize-trained" / "PROVENANCE.json").unlink()
    code, by_the_clock = called("training", DONE_AFTER="500")
    assert code == 0 and len(by_the_clock) == 1 and by_the_clock[0] == third[0].replace("--stop_after 60", "--done_after 500")
    assert [wrong_options(line) for line in (*first, *second, *third, *last, *by_the_clock)] == [[]] * (4 + 8 + 3 + 8 + 1)
