"""The backbone against independent references: transformers' own Llama and generation, formulas, damaged files."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from vlakeep.core.config import BackboneConfig
from vlakeep.core.errors import CheckpointError
from vlakeep.data.sample import IGNORE_INDEX, Batch, Sample
from vlakeep.models.base import EarlyStop
from vlakeep.models.files import weights_hash
from vlakeep.models.load import make_backbone
from vlakeep.models.merge import save_checkpoint
from vlakeep.openvla.action_tokenizer import ActionTokenizer
from vlakeep.openvla.format import init_checkpoint
from vlakeep.openvla.processor import ImageProcessor, Processor
from vlakeep.openvla.prompts import encode_batch, encode_prompts
from vlakeep.openvla.tiny import build_tiny_tokenizer

VOCABULARY = 704
TEXTS = [
    "In: What color is the cube left of the ring?\nOut: red",
    "pick up the green ring and put it on the left",
    "reach the cube",
]
STATISTICS = {"tabletop": {"action": {"q01": [-2.0] * 6 + [0.0], "q99": [1.0] * 6 + [1.0], "mask": [True] * 6 + [False]}}}


def tiny_config(**changes):
    return dict(
        {
            "model_type": "openvla",
            "use_fused_vision_backbone": True,
            "image_sizes": [64, 64],
            "timm_model_ids": ["vlakeep_vit_tiny_patch16_dinov2", "vlakeep_vit_tiny_patch16_siglip"],
            "text_config": {
                "model_type": "llama",
                "hidden_size": 48,
                "intermediate_size": 96,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
                "vocab_size": VOCABULARY + 64,
            },
        },
        **changes,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "tiny-base"
    build_tiny_tokenizer(TEXTS, ["blue"], path, VOCABULARY)
    init_checkpoint(tiny_config(), path, seed=3)
    state = load_file(str(path / "model.safetensors"))
    state["language_model.lm_head.weight"] *= 8  # far apart logits, so that greedy choices are no accidents of rounding
    save_file(state, str(path / "model.safetensors"), metadata={"format": "pt"})
    (path / "dataset_statistics.json").write_text(json.dumps(STATISTICS))
    return path


@pytest.fixture
def backbone(folder):
    return make_backbone(folder)


def samples(count=3):
    rng = np.random.default_rng(5)
    words = ["reach the cube", "pick up the green ring and put it on the left", "reach the green ring", "put it on the cube"]
    return [
        Sample(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8), words[i % 4], rng.uniform(-1, 1, 7).astype(np.float32))
        for i in range(count)
    ]


def official_inputs(backbone, batch):
    """inputs_embeds, attention_mask and labels as modeling_prismatic.py:372-401 builds them."""
    model = backbone.openvla
    text = model.language_model.model.embed_tokens(batch.input_ids)
    patches = model.projector(model.vision_backbone(batch.pixel_values))
    count = patches.shape[1]
    ones, ignore = torch.ones(len(text), count), torch.full((len(text), count), IGNORE_INDEX)
    return {
        "inputs_embeds": torch.cat([text[:, :1], patches, text[:, 1:]], dim=1),
        "attention_mask": torch.cat([batch.attention_mask[:, :1].long(), ones.long(), batch.attention_mask[:, 1:].long()], dim=1),
        "labels": torch.cat([batch.labels[:, :1], ignore, batch.labels[:, 1:]], dim=1),
    }


# Tokenizer, actions, images

def test_every_word_is_one_piece_and_ids_have_their_places(folder):
    processor = Processor.from_folder(folder)
    tokenizer = processor.tokenizer
    text = "In: What action should the robot take to pick up the green ring?\nOut: blue"
    pieces = tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])
    assert pieces == [
        "<s>",
        "▁In",
        ":",
        "▁What",
        "▁action",
        "▁should",
        "▁the",
        "▁robot",
        "▁take",
        "▁to",
        "▁pick",
        "▁up",
        "▁the",
        "▁green",
        "▁ring",
        "?",
        "<0x0A>",
        "Out",
        ":",
        "▁blue",
    ]
    assert tokenizer(text + "</s>")["input_ids"][-1] == tokenizer.eos_token_id == 2
    assert (tokenizer.vocab_size, tokenizer.pad_token_id, processor.pad_token_id) == (VOCABULARY, VOCABULARY, VOCABULARY)
    assert tokenizer.convert_ids_to_tokens(processor.empty_token_id) == "▁"
    assert tokenizer.decode(tokenizer("größe 42 – ok")["input_ids"], skip_special_tokens=True) == "größe 42 – ok"  # by bytes


def test_action_tokens_survive_decoding_and_encoding(folder):
    tokenizer = Processor.from_folder(folder).tokenizer
    ids = list(range(VOCABULARY - 256, VOCABULARY))
    assert tokenizer("Out: " + tokenizer.decode(ids), add_special_tokens=False)["input_ids"][-256:] == ids


def test_auto_tokenizer_gives_the_same_ids(folder):
    from transformers import AutoTokenizer

    mine, auto = Processor.from_folder(folder).tokenizer, AutoTokenizer.from_pretrained(str(folder))
    for text in TEXTS:
        assert auto(text)["input_ids"] == mine(text)["input_ids"]
    assert auto.pad_token_id == mine.pad_token_id


def test_too_small_a_vocabulary_says_what_fits(tmp_path):
    with pytest.raises(ValueError, match="vocab_size must be at least") as error:
        build_tiny_tokenizer(TEXTS, [], tmp_path, 520)
    smallest = int(str(error.value).split("at least ")[1].split(",")[0])
    build_tiny_tokenizer(TEXTS, [], tmp_path, smallest)


def test_action_tokens_follow_the_official_formula():
    tokenizer = ActionTokenizer(32000)
    assert tokenizer.encode([-1.0, 1.0, 0.0, -7.0, np.nan]).tolist() == [31999, 31744, 31872, 31999, 31744]
    assert (32000 - tokenizer.encode(np.array([-0.6], np.float32)), 32000 - tokenizer.encode(np.array([-0.6]))) == (51, 52)
    assert tokenizer.decode([31744, 31745, 31999, 5]) == pytest.approx([0.99608, 0.99608, -0.99608, 0.99608], abs=1e-5)
    assert tokenizer.action_token_begin_idx == 31743


def test_image_processor_is_resize_then_normalise(folder):
    from PIL import Image

    processor = Processor.from_folder(folder).image_processor
    image = np.random.default_rng(0).integers(0, 256, (90, 70, 3), dtype=np.uint8)
    small = np.asarray(Image.fromarray(image).resize((64, 64), Image.BICUBIC)).astype(np.float64) / 255
    views = [(small - m) / s for m, s in (([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]), ([0.5] * 3, [0.5] * 3))]
    wanted = np.concatenate(views, axis=2).transpose(2, 0, 1)
    got = processor([image, Image.fromarray(image)])
    assert got.dtype == torch.float32 and got.shape == (2, 6, 64, 64)
    assert np.abs(got[0].numpy() - wanted).max() < 1e-6 and torch.equal(got[0], got[1])
    for strategy in ("letterbox", "resize-crop"):
        assert ImageProcessor([[3, 64, 64]] * 2, processor.means, processor.stds, strategy=strategy)([image]).shape == (
            1,
            6,
            64,
            64,
        )
    with pytest.raises(ValueError, match="uint8"):
        processor([image.astype(np.float32)])
    with pytest.raises(ValueError, match="resize-naive"):
        ImageProcessor([[3, 64, 64]], [[0.5] * 3], [[0.5] * 3], strategy="stretch")


# Forward

@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_loss_and_hidden_states_equal_transformers(folder, attention):
    backbone = make_backbone(BackboneConfig(checkpoint=str(folder), attn_implementation=attention))
    batch = encode_batch(samples(), backbone.processor)
    assert not batch.attention_mask.all()  # lengths differ, so padding is in the test
    with torch.no_grad():
        official = backbone.language_model(**official_inputs(backbone, batch), output_hidden_states=True)
        out, states = backbone(batch), backbone.hidden_states(batch)
    assert out.loss.item() == pytest.approx(official.loss.item(), abs=1e-5)
    assert int(out.num_labelled) == 24
    assert len(states) == backbone.num_layers + 1
    for ours, theirs in zip(states, official.hidden_states):
        assert torch.allclose(ours, theirs, atol=1e-5)
    predicted = official.logits[:, backbone.num_patches:-1].argmax(-1)
    labels = batch.labels[:, 1:]
    assert int(out.correct) == int(((predicted == labels) & (labels != IGNORE_INDEX)).sum())


def test_gradients_equal_those_through_transformers(backbone):
    batch = encode_batch(samples(), backbone.processor)
    backbone.language_model(**official_inputs(backbone, batch)).loss.backward()
    official = {n: p.grad.clone() for n, p in backbone.named_parameters() if p.grad is not None}
    backbone.zero_grad(set_to_none=True)
    backbone(batch).loss.backward()
    assert official.keys() == {n for n, p in backbone.named_parameters() if p.grad is not None}
    for name, p in backbone.named_parameters():
        if name in official:
            assert torch.allclose(p.grad, official[name], atol=1e-6, rtol=1e-4), name


def test_gradient_checkpointing_changes_no_gradient(folder):
    grads = []
    for recompute in (False, True):
        backbone = make_backbone(BackboneConfig(checkpoint=str(folder), gradient_checkpointing=recompute)).train()
        seen = []
        backbone.decoder_layers[0].self_attn.register_forward_pre_hook(lambda *_, seen=seen: seen.append(1))
        backbone(encode_batch(samples(), backbone.processor)).loss.backward()
        assert len(seen) == (2 if recompute else 1)
        grads.append(backbone.decoder_layers[0].self_attn.q_proj.weight.grad)
    assert torch.equal(*grads)


@pytest.mark.skipif(int(transformers.__version__.split(".")[0]) < 5, reason="the library's own layers draw theirs there")
def test_initial_weights_are_not_drawn_where_none_are_held(folder, monkeypatch):
    """torch does that in Python for tensors without memory, which takes longer than reading the real ones."""
    drawn, draw = [], torch.Tensor.normal_
    monkeypatch.setattr(torch.Tensor, "normal_", lambda tensor, *args, **more: drawn.append(tensor.is_meta) or draw(tensor, *args, **more))
    torch.nn.init.normal_(torch.zeros(2))
    make_backbone(str(folder))
    assert drawn == [False]


def test_padding_and_neighbours_change_nothing(backbone):
    batch = encode_batch(samples(), backbone.processor)
    with torch.no_grad():
        whole = backbone(batch)
        alone = [backbone(encode_batch([s], backbone.processor)) for s in samples()]
    assert whole.loss.item() == pytest.approx(np.mean([a.loss.item() for a in alone]), abs=1e-5)


def test_the_forward_never_waits_for_the_device(backbone):
    """Fake tensors have shapes and no values, so any value that the host would read is an error."""
    from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

    batch = encode_batch(samples(), backbone.processor)
    with FakeTensorMode(allow_non_fake_inputs=True):
        loss = backbone(batch).loss
        with pytest.raises(DataDependentOutputException):
            loss.item()


def test_a_range_of_layers_can_be_run_by_itself(backbone):
    batch = encode_batch(samples(), backbone.processor)
    with torch.no_grad():
        prefix, states = backbone.embed(batch), backbone.hidden_states(batch)
        middle = backbone.run_layers(prefix, stop=2)
        end = backbone.run_layers(prefix.with_hidden(middle), start=2)
        normed = backbone.run_layers(prefix.with_hidden(end), start=3, stop=3)
    valid = prefix.attention_mask_BS
    assert torch.allclose(middle[valid], states[2][valid], atol=1e-6) and torch.allclose(end[valid], states[3][valid], atol=1e-6)
    assert torch.equal(normed, end)
    text = states[0][:, backbone.text_columns(prefix, batch.input_ids.shape[1])]
    assert torch.equal(text, backbone.language_model.model.embed_tokens(batch.input_ids))
    with pytest.raises(ValueError, match="layers 0 to 2"):
        backbone.run_layers(prefix, start=1, stop=4)


# Generation

def test_batched_generation_is_one_by_one_generation(backbone):
    many = samples(4) + [Sample(samples(1)[0].image, "What color is the cube?", question=True)]
    ids, _ = backbone.generate(encode_prompts(many, backbone.processor), 8, stop_at_eos=False)
    assert len({tuple(row) for row in ids.tolist()}) > 1
    for i, sample in enumerate(many):
        prompt = encode_prompts([sample], backbone.processor)
        assert torch.equal(backbone.generate(prompt, 8, stop_at_eos=False)[0][0], ids[i])
        inputs = official_inputs(backbone, prompt)
        inputs.pop("labels")
        official = backbone.language_model.generate(
            **inputs, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert official[0, -8:].tolist() == ids[i].tolist()


def test_an_answer_that_ends_early(backbone):
    prompts = encode_prompts(samples(3), backbone.processor)
    free, _ = backbone.generate(prompts, 7, stop_at_eos=False)
    tokenizer = backbone.processor.tokenizer
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(int(free[1, 2]))
    ids, ended = backbone.generate(prompts, 7, stop_at_eos=True)
    for row, had in zip(free.tolist(), ids.tolist()):
        end = row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else 7
        assert had == row[:end] + [backbone.processor.pad_token_id] * (7 - end)
    assert ended.tolist() == [tokenizer.eos_token_id in row for row in free.tolist()] and ended[1]
    instructions = [s.instruction for s in samples(3)]
    with pytest.raises(EarlyStop, match=r"row \d ended before all 7 action tokens"):
        backbone.predict_actions([s.image for s in samples(3)], instructions)
    found, early = backbone.attempt_batch(prompts)
    assert early.tolist() == ended.tolist()
    for row, said in enumerate(ids):  # the official code takes the last 7 of all tokens, the prompt's among them
        prompt = prompts.input_ids[row, :int(prompts.attention_mask[row].sum())].tolist()
        whole = prompt + said[said != backbone.processor.pad_token_id].tolist()
        expected = backbone.unnormalise(backbone.processor.action_tokenizer.decode(np.array(whole[-7:])))
        assert np.array_equal(found[row], expected)


def test_actions_are_unnormalised_by_the_quantiles(backbone):
    given = samples(3)
    actions = backbone.predict_actions([s.image for s in given], [s.instruction for s in given])
    ids, _ = backbone.generate(encode_prompts(given, backbone.processor), 7)
    x = backbone.processor.action_tokenizer.decode(ids.numpy())
    assert actions.dtype == np.float64 and actions.shape == (3, 7)
    assert np.allclose(actions[:, :6], 0.5 * (x[:, :6] + 1) * 3.0 - 2.0) and np.array_equal(actions[:, 6], x[:, 6])
    with pytest.raises(ValueError, match="libero.*tabletop.*--backbone.unnorm_key"):
        backbone.action_statistics("libero")
    backbone.norm_stats = {**STATISTICS, "other": {}}
    with pytest.raises(ValueError, match="choose one with --backbone.unnorm_key"):
        backbone.action_statistics()


# Files

def test_a_saved_checkpoint_is_the_same_model(backbone, folder, tmp_path):
    save_checkpoint(backbone, tmp_path / "copy")
    again = make_backbone(tmp_path / "copy")
    batch = encode_batch(samples(), backbone.processor)
    assert torch.equal(again(batch).loss, backbone(batch).loss)
    assert again.norm_stats == STATISTICS and (again.name, again.weights_sha256) == ("copy", backbone.weights_sha256)
    assert (tmp_path / "copy" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert json.loads((tmp_path / "copy" / "config.json").read_text())["torch_dtype"] == "float32"


def test_shards_and_types(backbone, tmp_path, monkeypatch):
    monkeypatch.setattr("vlakeep.models.files.MAX_SHARD", 400_000)
    save_checkpoint(backbone, tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2 and not (tmp_path / "model.safetensors").exists()
    assert weights_hash(tmp_path) == backbone.weights_sha256
    half = make_backbone(BackboneConfig(checkpoint=str(tmp_path), dtype="bfloat16"))
    assert half.dtype == torch.bfloat16 and half(encode_batch(samples(), half.processor)).loss.dtype == torch.float32
    monkeypatch.undo()
    save_checkpoint(backbone, tmp_path, dtype=torch.bfloat16)  # one file now: the shards must not stay behind
    assert sorted(p.name for p in tmp_path.glob("model*")) == ["model.safetensors"]
    assert weights_hash(tmp_path) != backbone.weights_sha256
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        make_backbone(tmp_path)


def test_initialisation_depends_on_the_seed_alone(folder, tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        init_checkpoint(tiny_config(), tmp_path / name, seed=seed)
    assert weights_hash(tmp_path / "a") == weights_hash(tmp_path / "b") != weights_hash(tmp_path / "c")


def broken_copy(folder, tmp_path) -> Path:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_damaged_weights_are_refused(folder, tmp_path):
    path = broken_copy(folder, tmp_path) / "model.safetensors"
    whole = path.read_bytes()
    for damaged, words in (
        (whole[:-1000], "truncated"),
        (whole + b"x", "corrupt"),
        (b"", "not a readable"),
        (b"\xff" * 40, "not a readable"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=words) as error:
            make_backbone(tmp_path)
        assert str(path) in str(error.value)


def test_keys_must_fit_and_all_that_do_not_are_named(folder, tmp_path):
    path = broken_copy(folder, tmp_path) / "model.safetensors"
    state = load_file(str(path))
    del state["projector.fc3.bias"]
    state["projector.fc9.bias"] = torch.zeros(2)
    state["language_model.model.norm.weight"] = torch.ones(5)
    save_file(state, str(path))
    with pytest.raises(
        CheckpointError,
        match=r"missing: projector.fc3.bias; unexpected: projector.fc9.bias; other shape: .*norm.weight is \[5\], must be \[48\]",
    ):
        make_backbone(tmp_path)


@pytest.mark.parametrize("change, words", [
    ({"model_type": "llava"}, "model_type is 'llava'"),
    ({"timm_model_ids": ["vlakeep_vit_tiny_patch16_dinov2"]}, "timm_model_ids has 1 entries"),
    ({"timm_model_ids": ["vit_nowhere", "vlakeep_vit_tiny_patch16_siglip"]}, "vit_nowhere"),
    ({"text_config": None}, "text_config"),
    ({"image_sizes": None}, "image_sizes is missing"),
])
def test_a_wrong_configuration_says_what_is_wrong(folder, tmp_path, change, words):
    path = broken_copy(folder, tmp_path) / "config.json"
    config = {k: v for k, v in dict(json.loads(path.read_text()), **change).items() if v is not None}
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=words):
        make_backbone(tmp_path)
    path.write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        make_backbone(tmp_path)


def test_missing_files_are_named(folder, tmp_path):
    path = broken_copy(folder, tmp_path)
    (path / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match="tokenizer"):
        make_backbone(path)
    (path / "preprocessor_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="preprocessor_config.json"):
        make_backbone(path)
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="pickle"):
        make_backbone(path)
    with pytest.raises(FileNotFoundError, match="config.json"):
        make_backbone(tmp_path / "nowhere")


def test_a_single_vision_backbone(folder, tmp_path):
    broken_copy(folder, tmp_path)
    init_checkpoint(
        tiny_config(use_fused_vision_backbone=False, timm_model_ids=["vlakeep_vit_tiny_patch16_siglip"], image_sizes=[64]),
        tmp_path,
    )
    preprocessor = json.loads((tmp_path / "preprocessor_config.json").read_text())
    for key in ("input_sizes", "means", "stds", "interpolations"):
        preprocessor[key] = preprocessor[key][1:]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    backbone = make_backbone(tmp_path)
    assert not hasattr(backbone.openvla.projector, "fc3") and backbone.num_patches == 16
    assert torch.isfinite(backbone(encode_batch(samples(), backbone.processor)).loss)


def test_text_alone(backbone):
    batch = encode_batch(samples(), backbone.processor)
    text = Batch(batch.input_ids, batch.attention_mask, batch.labels, None, batch.dataset_names)
    with torch.no_grad():
        official = backbone.language_model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask.long(), labels=batch.labels
        ).loss
        assert backbone(text).loss.item() == pytest.approx(official.item(), abs=1e-5)
