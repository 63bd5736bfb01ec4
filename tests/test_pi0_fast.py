"""pi0-FAST: lerobot's recorded numbers, its file format in every form it comes in, the prompt, the codec, masks and generation.

What every model must do is in test_models.py. The goldens are a model of other sizes than the tiny one here, and nothing knows either.
"""

import json
import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from vlakeep.core.config import BackboneConfig
from vlakeep.core.errors import CheckpointError
from vlakeep.data.sample import IGNORE_INDEX, Sample
from vlakeep.models.adapters import add_lora, target_modules
from vlakeep.models.files import weights_hash
from vlakeep.models.load import DTYPES, make_backbone, model_kind
from vlakeep.parity import verify_pi0_fast as verify_pi0_fast_stage
from vlakeep.parity.golden_pi0_fast import golden_samples, verify_pi0_fast
from vlakeep.pi0_fast import format as pi0_format
from vlakeep.pi0_fast.backbone import Pi0FastBackbone
from vlakeep.pi0_fast.codec import FastCodec, dct_matrix
from vlakeep.pi0_fast.model import DECODER, EMBEDDING, HEAD, PALIGEMMA, Pi0Fast, Sizes, expected_shapes
from vlakeep.pi0_fast.processor import Pi0FastBatch
from vlakeep.pi0_fast.prompts import state_bins
from vlakeep.pi0_fast.tiny import build_tokenizer, make_folder
from vlakeep.probe.masks import audit, mask_from_prompt
from vlakeep.teacher.sensitivity import measured, sensitivities

GOLDEN = Path(__file__).resolve().parent / "golden" / "pi0_fast_tiny"


@pytest.fixture(scope="module")
def golden():
    return make_backbone(BackboneConfig(checkpoint=str(GOLDEN)))


@pytest.fixture(scope="module")
def samples():
    with np.load(GOLDEN / "golden.npz") as data:
        return golden_samples(GOLDEN, dict(data))


@pytest.fixture
def copy(tmp_path):
    return Path(shutil.copytree(GOLDEN, tmp_path / "copy"))


def rewritten(folder, change):
    """The folder with its weights changed by change(state)."""
    state = load_file(str(folder / "model.safetensors"))
    save_file(change(state) or state, str(folder / "model.safetensors"))
    return make_backbone(BackboneConfig(checkpoint=str(folder)))


# ---- lerobot's numbers ----


def test_lerobots_numbers_are_reproduced():
    rows = verify_pi0_fast(GOLDEN)
    assert [f"{row.name}: {row.deviation}" for row in rows if not row.ok] == [] and len(rows) > 30


def test_the_checker_notices_other_weights(copy):
    def change(state):
        state[DECODER + "layers.2.mlp.up_proj.weight"][0] += 0.05
    rewritten(copy, change)
    wrong = {row.name for row in verify_pi0_fast(copy) if not row.ok}
    assert {"hidden states", "loss", "LoRA: loss"} <= wrong and "embeddings" not in wrong


def test_all_604_tensors_of_the_full_model_are_known():
    """No weight is made: names, shapes and the number of parameters, with the two vocabularies tied."""
    wanted = {name: torch.Size(shape) for name, shape in json.loads((GOLDEN / "full_size_keys.json").read_text()).items()}
    found = expected_shapes(Sizes())
    assert found == wanted and len(found) == 604
    with torch.device("meta"):
        network = Pi0Fast({}, Sizes())
    assert sum(p.numel() for p in network.parameters()) == 3_449_982_704
    network.paligemma.lm_head.weight = network.gemma.embed_tokens.weight
    assert sum(p.numel() for p in network.parameters()) == 2_923_335_408 and network.tied


# ---- files ----


def test_every_form_of_the_file_loads(golden, copy, samples):
    def loss(backbone):
        with torch.no_grad():
            return float(backbone(backbone.processor.encode_batch(samples)).loss)

    wanted = loss(golden)
    assert not golden.network.tied and model_kind(copy) == "pi0_fast"
    assert loss(rewritten(copy, lambda state: {name[len("model."):]: t for name, t in state.items()})) == wanted
    assert loss(rewritten(copy, lambda state: {name.replace("vision_tower.vision_model.", "vision_tower."): t for name, t in state.items()})
                ) == wanted
    one = rewritten(copy, lambda state: {name: t for name, t in state.items() if "embed_tokens" not in name})
    assert one.network.tied and loss(one) != wanted
    assert len(list(one.network.parameters())) == len(golden.network.state_dict()) - 1


def test_a_file_that_does_not_fit_is_refused_by_name(copy):
    """lerobot gives random weights for each of these."""
    def change(state):
        state["model.paligemma_with_expert.extra"] = torch.zeros(2)
        state.pop(DECODER + "layers.1.mlp.up_proj.weight")
        state[DECODER + "norm.weight"] = torch.zeros(5)
    with pytest.raises(CheckpointError,
                       match=r"missing: .*layers.1.mlp.up_proj.weight; unexpected: .*extra; other shape: .*norm.weight is \[5\]"):
        rewritten(copy, change)
    with pytest.raises(CheckpointError, match="missing: .*lm_head.weight"):
        rewritten(copy, lambda state: {name: tensor for name, tensor in state.items() if name not in (EMBEDDING, HEAD)})


@pytest.mark.parametrize("key, value, message", [
    ("type", "pi0", "type is 'pi0', must be 'pi0_fast'"), ("input_features", {}, "names no picture"),
    ("output_features", {}, "lacks the action"),
    ("image_resolution", [32, 32], r"image_resolution is \[32, 32\], the vision model takes 28"),
    ("normalization_mapping", {"ACTION": "LOG"}, "ACTION LOG: vlakeep knows QUANTILES")])
def test_a_configuration_says_what_is_wrong_with_it(copy, key, value, message):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(CheckpointError, match=message):
        pi0_format.read_config(copy)


def test_sizes_follow_the_variant_without_a_file(copy):
    (copy / "sizes.json").unlink()
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "image_resolution": [224, 224]}))
    assert pi0_format.sizes_of(pi0_format.read_config(copy)) == Sizes()
    with pytest.raises(CheckpointError, match="other shape"):
        make_backbone(BackboneConfig(checkpoint=str(copy)))


def test_tokenizers_are_found_by_name_or_asked_for(copy, samples):
    (copy / "text_tokenizer").rename(copy / "words")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "text_tokenizer_name": "words"}))
    assert make_backbone(BackboneConfig(checkpoint=str(copy))).processor.whole_prompt(samples[0])
    shutil.rmtree(copy / "action_tokenizer")
    with pytest.raises(FileNotFoundError, match="no FAST codec for .*: put the files of action_tokenizer into .*action_tokenizer"):
        make_backbone(BackboneConfig(checkpoint=str(copy)))


def test_statistics_come_from_where_lerobot_keeps_them(golden, copy):
    action = golden.action_statistics()
    wanted = json.loads((GOLDEN / "dataset_stats.json").read_text())["action"]
    assert action["q01"] == wanted["q01"] and action["mask"] == [True] * 3
    stats = json.loads((copy / "dataset_stats.json").read_text())
    (copy / "dataset_stats.json").unlink()
    save_file({f"{feature}.{name}": torch.tensor(v) for feature, one in stats.items() for name, v in one.items()},
              str(copy / "state.safetensors"))
    step = {"registry_name": "normalizer_processor", "state_file": "state.safetensors"}
    (copy / "policy_preprocessor.json").write_text(json.dumps({"steps": [{"registry_name": "device_processor"}, step]}))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "normalization_mapping": {"STATE": "MEAN_STD", "ACTION": "MEAN_STD"}}))
    backbone = make_backbone(BackboneConfig(checkpoint=str(copy)))
    assert np.allclose(backbone.unnormalise(np.ones((1, 3))), np.array(wanted["mean"]) + np.array(wanted["std"]))


def test_what_is_written_is_lerobots_and_loads(golden, samples, tmp_path):
    golden.write(tmp_path, golden.network.state_dict())
    config = json.loads((tmp_path / "config.json").read_text())
    assert not {"sizes", "layout", "model_type"} & set(config), "lerobot refuses keys that it does not know"
    assert config["text_tokenizer_name"] == "text_tokenizer" and (tmp_path / "text_tokenizer" / "tokenizer.json").is_file()
    assert set(load_file(str(tmp_path / "model.safetensors"))) == set(json.loads((GOLDEN / "keys.json").read_text()))
    again = make_backbone(BackboneConfig(checkpoint=str(tmp_path)))
    with torch.no_grad():
        assert torch.equal(again(again.processor.encode_batch(samples)).loss, golden(golden.processor.encode_batch(samples)).loss)
    assert weights_hash(tmp_path) == golden.weights_sha256 and again.norm_stats == golden.norm_stats


def test_layout_cameras_and_state_are_chosen_and_kept(copy, samples):
    settings = BackboneConfig(checkpoint=str(copy), layout="openpi", cameras=["left_wrist_0_rgb", "other"], state=2)
    backbone = make_backbone(settings)
    assert backbone.processor.spec.cameras == ("left_wrist_0_rgb", "other") and backbone.processor.spec.state == 2
    Pi0FastBackbone.record_settings(copy, settings)
    again = make_backbone(BackboneConfig(checkpoint=str(copy)))
    assert again.recorded() == backbone.recorded() == {"layout": "openpi", "cameras": ["left_wrist_0_rgb", "other"], "state": 2}
    assert again.processor.layout.name == "openpi" and "layout" not in json.loads((copy / "config.json").read_text())
    with pytest.raises(ValueError, match="name at least one camera"):
        make_backbone(replace(settings, cameras=[]))


# ---- prompts ----


@pytest.mark.parametrize("task", ["pick, up 3 red blocks", "say State: 12 34; twice", "go to the State, State: 7 now", "a_b\nc"])
def test_the_instruction_is_the_task_and_nothing_else(golden, samples, task):
    sample, processor = replace(samples[0], instruction=task), golden.processor
    text = processor.prompt_text(sample)
    start, end = processor.instruction_span(text)
    assert text[start:end] == task.replace("_", " ").replace("\n", " ")
    rows = audit(sample, processor)
    for row in rows:
        if row.kept:
            assert row.text.strip() and row.reason.startswith("instruction")
        else:
            assert row.reason in ("special token", "template", "state text", "space", "newline", "state text, template"), row
    kept = "".join(row.text for row in rows if row.kept)
    assert kept.replace(" ", "").rstrip(",") == text[start:end].replace(" ", "")
    assert [row.reason for row in rows][0] == [row.reason for row in rows][-1] == "special token"  # the prompt's BOS and the action's
    batch = processor.encode_batch([sample])
    mask_L = mask_from_prompt(processor.encode_prompts([sample]), [sample], processor)[0]
    assert not (batch.labels[0, :len(mask_L)][mask_L] != IGNORE_INDEX).any()
    prefix, longer = golden.embed(batch), batch.input_ids.shape[1] - len(mask_L)
    assert not golden.sequence_mask(prefix, torch.nn.functional.pad(mask_L, (0, longer))[None])[prefix.picture_BS].any()


def test_states_are_binned_as_lerobot_does():
    assert state_bins(np.array([-1.01, -1.0, -0.9999, 0.0, 127 / 128, 1.0, 9.0])) == [-1, 0, 0, 128, 255, 255, 255]


def test_published_ids_follow_from_the_vocabulary():
    """Code 0 is <loc1023> where 128 <seg> rows stand behind 1024 <loc> ones."""
    tokenizer = build_tokenizer(["Action"], 1024, 128)
    size = tokenizer.get_vocab_size()
    assert tokenizer.id_to_token(size - 1 - 128) == "<loc1023>" and tokenizer.id_to_token(size - 1) == "<seg127>"


# ---- the network ----


@torch.no_grad()
def test_ranges_of_layers_are_the_whole_to_the_bit(golden, samples):
    for batch in (golden.processor.encode_prompts(samples), golden.processor.encode_batch(samples)):
        prefix, states = golden.embed(batch), golden.hidden_states(batch)
        for start in (1, 3, 5):
            assert torch.equal(golden.run_layers(prefix.with_hidden(states[start]), start), golden.norm(states[-1]))
    # The prompt never sees the actions.
    prompts, whole = (golden.processor.encode_prompts(samples), golden.processor.encode_batch(samples))
    alone, both = golden.hidden_states(prompts)[-1], golden.hidden_states(whole)[-1]
    inside = golden.embed(prompts).both_ways_BS & golden.embed(prompts).attention_mask_BS
    assert torch.allclose(alone[inside], both[:, :alone.shape[1]][inside], atol=2e-5)


@torch.no_grad()
def test_batch_mates_padding_and_absent_cameras_change_no_row(golden, samples):
    processor = golden.processor
    # Absent between others: at the end it takes no columns, and at the start it would only shift all positions alike.
    lacking = replace(samples[1], cameras={"base_0_rgb": samples[1].cameras["base_0_rgb"]})
    first = [samples[0], lacking, samples[2]]
    together = golden(processor.encode_batch(first))
    each = [golden(processor.encode_batch([one])) for one in first]
    total = sum(float(out.loss) * int(out.num_labelled) for out in each) / int(together.num_labelled)
    assert abs(total - float(together.loss)) < 2e-6
    logits = golden.next_logits(processor.encode_prompts(first, 90))
    for row, one in zip(logits, first):
        assert torch.allclose(row, golden.next_logits(processor.encode_prompts([one]))[0], atol=1e-5)
    assert processor.encode_batch([first[1]]).pixel_values.shape[1] == 1, "a camera that no row has takes no columns"
    with pytest.raises(ValueError, match="lacks"):
        processor.encode_batch([replace(first[0], cameras={})])


@torch.no_grad()
def test_a_row_that_ended_holds_padding(golden, samples):
    processor, prompts = golden.processor, golden.processor.encode_prompts(samples)
    with np.load(GOLDEN / "golden.npz") as data:
        bar = torch.from_numpy(data["bar_row_of_lm_head"])
    head = golden.network.paligemma.lm_head.weight
    before = head[processor.words.bar].clone()
    head[processor.words.bar] = bar
    ids, ended = golden.generate(prompts, 20)
    head[processor.words.bar] = before
    assert ids.shape == (3, 20) and ended.all()
    for row in ids.tolist():
        end = row.index(processor.words.bar)
        assert set(row[end + 1:]) == {processor.pad_token_id}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_half_precision_keeps_frequencies_and_norms_and_has_no_nan(samples, implementation):
    for name in ("bfloat16", "float16"):
        network, config = pi0_format.load_checkpoint(GOLDEN, DTYPES[name], implementation)
        kinds = {tensor.dtype for key, tensor in network.state_dict().items() if "norm" in key or "vision" in key or "projector" in key}
        assert kinds == {torch.float32} and network.gemma.layers[0].mlp.up_proj.weight.dtype == DTYPES[name]
        place = torch.tensor([[0, 256, 1000]])
        angle = place[0, :, None] * 10000.0 ** -(torch.arange(0, 16, 2) / 16)
        assert torch.allclose(network.rope(place, torch.float32)[0][0, 0, :, :8], angle.cos(), atol=1e-4)
        processor = make_backbone(BackboneConfig(checkpoint=str(GOLDEN))).processor
        half = Pi0FastBackbone(network, processor, {}, GOLDEN).eval()
        out = half(processor.encode_batch([samples[0], replace(samples[1], instruction="a")]))  # rows of different lengths
        assert torch.isfinite(out.loss) and torch.isfinite(half.hidden_states(processor.encode_batch(samples))[-1]).all()


def test_checkpointing_changes_nothing_and_hooks_fire_once(golden, samples):
    gradients = []
    for recompute in (False, True):
        backbone = make_backbone(BackboneConfig(checkpoint=str(GOLDEN), gradient_checkpointing=recompute))
        config = type("Lora", (), dict(layers="last:2", modules=["attention", "mlp"], rank=4, alpha=8, dropout=0.0, init="gaussian",
                                       dtype="float32"))
        add_lora(backbone, config, 0)
        backbone.train()
        calls, grads = [], {}
        layers = backbone.decoder_layers
        handles = [layer.register_forward_hook(
            lambda module, args, output, number=number, calls=calls, grads=grads: (calls.append(number), output.register_hook(
                lambda g: grads.__setitem__(number, g)))[0]) for number, layer in enumerate(layers) if number >= 4]
        batch = backbone.processor.encode_batch(samples)
        backbone(batch).loss.backward()
        [handle.remove() for handle in handles]
        # A checkpointed layer runs again in the backward pass, and its hooks with it: once each.
        assert sorted(set(calls)) == [4, 5] and (recompute or len(calls) == 2)
        prefix = backbone.embed(batch).both_ways_BS
        assert not grads[5][prefix].any(), "nothing reads the prefix after the last layer"
        assert grads[4][prefix].any()
        gradients.append([p.grad.clone() for p in backbone.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_lora_reaches_the_decoder_alone():
    """Of the full model: 56 linears for last:8, by full names; suffixes would hit SigLIP's q_proj and v_proj too."""
    with torch.device("meta"):
        network = Pi0Fast({}, Sizes())
    backbone = Pi0FastBackbone(network, None, {})
    names = target_modules(backbone, "last:8", ["attention", "mlp"])
    known = dict(network.named_modules())
    assert len(names) == 56 and all(isinstance(known[name], torch.nn.Linear) for name in names)
    assert all(name.startswith(DECODER + "layers.") and int(name[len(DECODER):].split(".")[1]) >= 10 for name in names)
    shapes = Pi0FastBackbone.linear_shapes(json.loads((GOLDEN / "config.json").read_text()) | {"image_resolution": [224, 224]})
    assert 32 * 8 * sum(sum(shape) for shape in shapes.values()) == 17_432_576
    assert {PALIGEMMA + "lm_head"} | set(names) < set(target_modules(backbone, "all", ["all-linear"]))


# ---- sensitivity ----


def test_directions_of_the_last_layer_are_injected_before_it(golden, samples):
    batch = golden.processor.encode_prompts(samples)
    batches = [(batch, mask_from_prompt(batch, samples, golden.processor))]
    directions = torch.linalg.qr(torch.randn(48, 3, generator=torch.Generator().manual_seed(0)))[0]
    last = golden.num_layers - 1
    assert measured(golden, last) == {"injected_at": "input", "measured_on": "answers"}
    assert measured(golden, last - 2) == {"injected_at": "output", "measured_on": "answers"}
    for layer in (last, last - 2):
        assert (sensitivities(golden, batches, layer, directions, 5.0) > 0).all()
    # The output of the last layer reaches no answer: what the decision is for.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vlakeep.teacher.sensitivity.measured", lambda *_: {"injected_at": "output", "measured_on": "answers"})
        assert (sensitivities(golden, batches, last, directions, 5.0) == 0).all()


# ---- the codec ----


@pytest.fixture(scope="module")
def codec():
    rng = np.random.default_rng(1)
    return FastCodec.fit([np.cumsum(rng.normal(0, 0.2, (6, 2)), 0).clip(-1, 1) for _ in range(150)], 200)


def test_the_transform_is_the_orthonormal_one():
    for steps in (1, 5, 50):
        matrix = dct_matrix(steps)
        assert np.allclose(matrix @ matrix.T, np.eye(steps))
    fft = pytest.importorskip("scipy.fft")
    x = np.random.default_rng(0).normal(size=(50, 7))
    assert np.allclose(dct_matrix(50) @ x, fft.dct(x, axis=0, norm="ortho"))


def test_chunks_come_back_within_half_a_step(codec, golden):
    rng = np.random.default_rng(2)
    for one, shape in ((codec, (6, 2)), (golden.processor.codec, (8, 3)), (golden.processor.codec, (5, 7))):
        for _ in range(50):
            coefficients = rng.uniform(one.lowest + 0.5, one.highest - 0.5, shape) / one.scale * (rng.random(shape) < 0.4)
            chunk = dct_matrix(shape[0]).T @ coefficients
            again, problem = one.decode(one.encode(chunk), *shape)
            assert problem == "" and np.abs(dct_matrix(shape[0]) @ (again - chunk)).max() <= 0.5 / one.scale + 1e-9


def test_broken_characters_are_no_coefficients(codec, monkeypatch):
    class Broken:
        def decode(self, ids):
            return chr(-codec.min_token + 2) + "\ufffd" * 11

    monkeypatch.setattr(codec, "bpe", Broken())
    chunk, problem = codec.decode([0], 6, 2)
    assert problem == "characters that are none of the codec's"
    assert np.allclose(chunk[:, 0], 2 / codec.scale / 6 ** 0.5) and not chunk[:, 1].any(), "the mean of the first dimension alone"


def test_ids_that_make_no_chunk_are_named_and_never_raise(codec):
    good = codec.encode(np.full((6, 2), 0.3))
    chunk, problem = codec.decode(good[:-1], 6, 2)
    assert "coefficients in place of 12" in problem and chunk.shape == (6, 2)
    assert "coefficients in place of 12" in codec.decode(good * 2, 6, 2)[1]
    for bad in ([-1, *good], [codec.vocab_size + 5]):
        chunk, problem = codec.decode(bad, 6, 2)
        assert "none of the codec's" in problem and not chunk.any()
    assert codec.coefficients(np.full((6, 2), 90.0))[1] > 0
    assert np.abs(codec.decode(codec.encode(np.full((6, 2), 90.0)), 6, 2)[0]).max() <= codec.limit(6)


def test_a_codec_keeps_its_codes_when_it_is_written(codec, tmp_path):
    codec.save(tmp_path)
    again = FastCodec.from_folder(tmp_path)
    chunk = np.random.default_rng(3).uniform(-1, 1, (6, 2))
    assert again.encode(chunk) == codec.encode(chunk) and (again.scale, again.min_token) == (codec.scale, codec.min_token)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="cannot be read"):
        FastCodec.from_folder(tmp_path)
    with pytest.raises(ValueError, match="vocab_size must be at least"):
        FastCodec.fit([np.random.default_rng(0).uniform(-40, 40, (6, 2))], 20)


def test_malformed_answers_are_counted(golden, samples):
    processor = golden.processor
    row = processor.encode_batch([samples[0]])
    good = row.labels[0][row.labels[0] != IGNORE_INDEX].numpy()
    words = processor.words
    rows = [good, good[:-2], good[good != good[6]], np.r_[good[:4], words.eos], np.r_[words.bos, good]]
    ids = np.full((len(rows), len(good) + 2), processor.pad_token_id)
    for at, one in zip(ids, rows):
        at[:len(one)] = one
    chunks, problems = processor.read(ids)
    assert problems[0] == "" and chunks.shape == (5, 8, 3) and np.array_equal(chunks[0], chunks[4] * 0 + chunks[0])
    assert "coefficients" in problems[2] and "coefficients" in problems[3] and "none of" in problems[1] + problems[4]


def test_a_chunk_is_chunk_size_long_whatever_is_played(copy, samples):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "n_action_steps": 3}))
    backbone = make_backbone(BackboneConfig(checkpoint=str(copy)))
    chunks, malformed = backbone.attempt_chunks(backbone.processor.encode_prompts(samples))
    assert chunks.shape == (3, 8, 3) and malformed.all()


def test_one_camera_takes_the_samples_only_picture(tmp_path):
    rng = np.random.default_rng(0)
    make_folder(tmp_path / "one", ["go"], [rng.uniform(-1, 1, (4, 2)) for _ in range(20)], {}, ("front",))
    processor = make_backbone(tmp_path / "one").processor
    picture = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
    batches = [processor.encode_prompts([one]) for one in (Sample(picture, "go"), Sample(None, "go", cameras={"front": picture}))]
    assert torch.equal(batches[0].pixel_values, batches[1].pixel_values) and processor.spec.cameras == ()


# ---- the command that looks at a folder ----


class PaddedPolicy:
    """Stands for lerobot's policy, which needs an environment of its own: the same network, with a gap between prompt and actions."""

    def __init__(self, backbone):
        self.backbone, self.state_dict = backbone, backbone.network.state_dict
        self.head = torch.nn.Identity()  # where lerobot's lm_head is
        self.model = SimpleNamespace(paligemma_with_expert=SimpleNamespace(paligemma=SimpleNamespace(lm_head=self.head)))

    def _prefix(self, batch, actions=True):
        backbone, names = self.backbone, ("observation.language.", "action.")
        ids = [batch[names[0] + "tokens"], *([batch[names[1] + "tokens"]] if actions else [])]
        masks = [batch[names[0] + "attention_mask"], *([batch[names[1] + "token_mask"]] if actions else [])]
        pictures = torch.stack([value * 2 - 1 for name, value in batch.items() if name.startswith("observation.images.")], 1)
        row = Pi0FastBatch(torch.cat(ids, 1), torch.cat(masks, 1), torch.full_like(torch.cat(ids, 1), IGNORE_INDEX), pictures, [],
                           prefix=torch.full((len(ids[0]),), ids[0].shape[1]), cameras=torch.ones(pictures.shape[:2], dtype=torch.bool))
        return backbone.embed(row)

    def forward(self, batch):
        backbone = self.backbone
        normed = backbone.run_layers(self._prefix(batch))[:, -batch["action.tokens"].shape[1]:]
        logits = self.head(backbone.logits(normed))[:, :-1]
        each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch["action.tokens"][:, 1:], reduction="none")
        mask = batch["action.token_mask"][:, 1:]
        return (each * mask).sum() / mask.sum(), {}

    def predict_action_chunk(self, batch):
        steps = self.backbone.processor.config["max_decoding_steps"]
        batch = {**batch, "action.tokens": torch.full((len(batch["action.tokens"]), 1), self.backbone.processor.words.bos),
                 "action.token_mask": torch.ones(len(batch["action.tokens"]), 1, dtype=torch.bool)}
        chosen = []
        for _ in range(steps):
            prefix = self._prefix(batch)
            # BOS belongs to the prefix here.
            length = prefix.picture_BS.sum(1)[0] + batch["observation.language.tokens"].shape[1] + 1
            prefix = replace(prefix, both_ways_BS=torch.arange(prefix.hidden_BSD.shape[1])[None] < length)
            chosen.append(self.backbone.logits(self.backbone.run_layers(prefix)[:, -1]).argmax(-1))
            batch["action.tokens"] = torch.cat([batch["action.tokens"], chosen[-1][:, None]], 1)
            batch["action.token_mask"] = torch.ones_like(batch["action.tokens"], dtype=torch.bool)
        return torch.from_numpy(self.backbone.processor.decode_actions(torch.stack(chosen, 1).numpy()))


def test_a_folder_is_looked_at_and_lerobot_is_asked_for(capsys):
    assert verify_pi0_fast_stage.main(["--checkpoint", str(GOLDEN), "--frames", "2", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "two vocabularies" in said and "loss in the layout lerobot" in said and "loss in the layout openpi" in said
    found = verify_pi0_fast_stage.main(["--checkpoint", str(GOLDEN), "--lerobot", "--device", "cpu", "--frames", "2"])
    said = capsys.readouterr()
    if find_spec("lerobot"):
        assert found == 0 and said.out.count("  ok    lerobot: ") == 4
    else:
        assert found == 2 and "lerobot cannot be imported" in said.err


def test_lerobots_policy_is_compared_with_the_same_rows(golden, copy):
    drawn = verify_pi0_fast_stage.random_samples(golden.processor, 3, 2)
    rows = verify_pi0_fast_stage.judge_policy(golden, PaddedPolicy(golden), drawn, "float32")
    assert [row.name for row in rows if not row.ok] == [] and len(rows) == 4

    def change(state):
        state[DECODER + "layers.2.mlp.up_proj.weight"] += 0.05
    other = rewritten(copy, change)
    rows = verify_pi0_fast_stage.judge_policy(golden, PaddedPolicy(other), drawn, "float32")
    assert [row.ok for row in rows[:3]] == [False, False, False] and "up_proj" in rows[0].note
