"""What every model must do (models/base.py), for the one that is shipped and for a model of another kind that is one file, toy_model.py."""

import json
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_parts
import torch
from conftest import BASELINE, GRADED
from torch.nn.utils.rnn import pad_sequence
from toy_model import Toy, make_folder

from vlakeep.core.checkpoint import check_base
from vlakeep.core.config import load_config
from vlakeep.core.errors import CheckpointError
from vlakeep.core.loss_scale import LossScaler
from vlakeep.data.sample import IGNORE_INDEX, Sample, SampleSpec
from vlakeep.methods.baseline import Baseline
from vlakeep.methods.graded import Graded
from vlakeep.models import load
from vlakeep.models.adapters import adapters_disabled, add_lora, all_linear, load_adapter, save_adapter, select_linears
from vlakeep.models.alarms import check_vision
from vlakeep.models.base import Backbone
from vlakeep.models.chain import Chain, Link, chain_hash, merge_chain
from vlakeep.models.files import STATISTICS, weights_hash, write_json
from vlakeep.models.load import make_backbone, model_class, model_kinds
from vlakeep.models.merge import merge_checkpoint, save_checkpoint
from vlakeep.models.outputs import captured_outputs
from vlakeep.openvla.load import OpenVLAKind
from vlakeep.pi0_fast.backbone import Pi0FastBackbone
from vlakeep.pi0_fast.tiny import make_folder as make_pi0_folder
from vlakeep.probe.masks import audit, mask_from_prompt
from vlakeep.teacher.answers import run_below, teacher_answers
from vlakeep.teacher.collect import pooled_states, token_moments, with_own_answers
from vlakeep.teacher.coverage import input_moments
from vlakeep.teacher.sensitivity import sensitivities
from vlakeep.teacher.spectrum import spectrum
from vlakeep.thermostat.kl_sensor import KLSensor, batched
from vlakeep.train import make_optimizer, train_step


def pi0_folder(folder):
    """A pi0-FAST of two cameras with random weights."""
    rng = np.random.default_rng(0)
    chunks = [rng.uniform(-1, 1, (3, 3)).astype(np.float32) for _ in range(200)]
    ends = {"action": {"q01": [-2.0, 0.0, 0.0], "q99": [2.0, 1.0, 1.0], "mask": [True, True, False]}}
    make_pi0_folder(folder, ["open the red door", "close the blue box .", "what is it? the red box"], chunks, {"pi0_data": ends},
                    ("base_0_rgb", "left_wrist_0_rgb"), state=2, scale=20.0)
    return folder


def midsize_folder(folder):
    """A mid-size OpenVLA of tiny parts: grouped queries, tied embeddings, one vision tower, byte-level tokens."""
    ends = {"action": {"q01": [-2.0, 0.0, 0.0], "q99": [2.0, 1.0, 1.0], "mask": [True, True, False]}}
    write_json(tiny_parts.make_folder(folder) / STATISTICS, {"midsize_data": ends})
    return folder


# Model -> (its class, what is said to it, a question and its answer).
MODELS = {
    "tabletop-base": (OpenVLAKind, ["pick up the red block", "reach the blue ring and stop"], ("what color is the block?", "red")),
    "pi0_fast": (Pi0FastBackbone, ["open the red door", "close the blue box ."], ("what is it?", "the red box")),
    "midsize": (OpenVLAKind, ["open the red door", "close the blue box ."], ("what is it?", "the red box")),
    "toy": (Toy, ["open the red door", "close the blue box ."], ("what is it", "the red box")),
}


class Case:
    """One model under the contract."""

    def __init__(self, name, checkpoint):
        self.kind, self.texts, self.asked = MODELS[name]
        self.name, self.checkpoint = name, checkpoint

    def make(self):
        return make_backbone(self.checkpoint)

    def config(self, file=BASELINE, *overrides):
        return load_config(file, ["--backbone.checkpoint", self.checkpoint, "--lora.rank", "4", "--lora.alpha", "8", "--lora.layers",
                                  "last:2", "--lora.modules", "[attention, mlp]", "--train.lr", "0.01", "--device", "cpu", *overrides])

    def samples(self, backbone, count=4, question=False):
        """With targets; pictures, states and actions differ."""
        rng, spec, found = np.random.default_rng(0), backbone.processor.spec, []
        size = (spec.chunk, backbone.action_dim()) if spec.chunk > 1 else backbone.action_dim()
        for i in range(count):
            one = spec.blank(0, backbone.processor.picture_size, self.asked[0] if question else self.texts[i % len(self.texts)])
            one = one.with_pictures(lambda picture: rng.integers(0, 256, picture.shape, dtype=np.uint8))
            state = None if one.state is None else rng.uniform(-1, 1, spec.state).astype(np.float32)
            target = {"question": True, "answer": self.asked[1]} if question else {"action": rng.uniform(-1, 1, size).astype(np.float32)}
            found.append(replace(one, state=state, **target))
        return found


@pytest.fixture(scope="module", autouse=True)
def toy_kind():
    """The toy is made known as a package of its own would do it."""
    def entries(group):
        return [EntryPoint("toy", "toy_model:Toy", group)] if group == load.GROUP else []

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load, "entry_points", entries)
        load._outside.cache_clear()
        yield
    load._outside.cache_clear()


@pytest.fixture(scope="module", params=sorted(MODELS))
def case(request, tmp_path_factory):
    name, made = request.param, {"toy": make_folder, "pi0_fast": pi0_folder, "midsize": midsize_folder}
    return Case(name, str(made[name](tmp_path_factory.mktemp("models") / name)) if name in made else name)


@pytest.fixture(scope="module")
def backbone(case):
    return case.make()


def same(a, b, tolerance=1e-5):
    return torch.allclose(a, b, atol=tolerance, rtol=1e-4)


# ---- what it is ----


def test_the_kind_of_a_folder_is_found_and_knows_its_sizes(case, backbone, tmp_path):
    assert model_kinds() == ["openvla", "pi0_fast", "toy"]
    kind = model_class(backbone.checkpoint)
    assert kind is case.kind and isinstance(backbone, Backbone) and not backbone.training
    config = kind.read_config(backbone.checkpoint)
    assert kind.sizes(config) == (backbone.num_layers, backbone.hidden_size)
    linears = select_linears(backbone, "all", ["attention", "mlp"])
    assert len(linears) == backbone.num_layers * len(kind.linears)
    for name, linear in linears.items():
        assert kind.linear_shapes(config)[name.rpartition(".")[2]] == (linear.in_features, linear.out_features)
    assert kind.read_statistics(backbone.checkpoint, config).keys() == backbone.norm_stats.keys()
    assert kind.read_spec(config) in (None, backbone.processor.spec)
    assert all(any((Path(backbone.checkpoint) / name).is_file() for name in group) for group in kind.processor_files)
    check_base(tmp_path, {"base_weights": backbone.weights_sha256}, backbone.weights_sha256)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "other"}))
    with pytest.raises(CheckpointError, match="'other'; vlakeep knows openvla, pi0_fast, toy"):
        make_backbone(tmp_path)


def test_linears_that_share_an_input_read_the_same_tensor(case, backbone):
    seen = {}
    handles = [linear.register_forward_pre_hook(lambda module, args, name=name: seen.setdefault(name, args[0]))
               for name, linear in select_linears(backbone, "all", ["attention", "mlp"]).items()]
    with torch.no_grad():
        backbone.run_layers(backbone.embed(backbone.processor.encode_prompts(case.samples(backbone))))
    for handle in handles:
        handle.remove()
    keys = {name: backbone.input_key(name) for name in seen}
    assert set(keys.values()) < set(seen) and all(torch.equal(seen[name], seen[key]) for name, key in keys.items())
    distinct = sorted(set(keys.values()))
    assert not any(seen[a].shape == seen[b].shape and torch.equal(seen[a], seen[b]) for a in distinct for b in distinct if a < b)


@pytest.mark.parametrize("module", ["lm_head", "nowhere"])
def test_a_linear_that_is_none_of_the_model_is_refused(backbone, module):
    with pytest.raises(ValueError, match=f"--lora.modules .*{module}.*: must be among attention, mlp, {next(iter(backbone.linears))}"):
        select_linears(backbone, "all", [module])


# ---- what goes in ----


def test_a_sample_that_lacks_something_is_refused_naming_both(case, backbone):
    processor, whole = backbone.processor, case.samples(backbone, 1)[0]
    lacking = [replace(whole, image=None, cameras={}), replace(whole, action=np.zeros((7, 3, 2), dtype=np.float32))]
    lacking += [replace(whole, state=None)] if processor.spec.state else []
    for sample in lacking:
        with pytest.raises(ValueError, match=f"{whole.instruction!r} of data set '' lacks .*, which the model .* takes; it has"):
            processor.encode_batch([whole, sample])
    with pytest.raises(ValueError, match="lacks"):
        processor.encode_prompts(lacking[:1])


@torch.no_grad()
def test_text_stands_where_the_model_says_and_pictures_elsewhere(case, backbone):
    samples = case.samples(backbone)
    batch = backbone.processor.encode_prompts(samples)
    prefix = backbone.embed(batch)
    other = backbone.embed(backbone.processor.encode_prompts([one.with_pictures(lambda picture: 255 - picture) for one in samples]))
    text_BS = backbone.sequence_mask(prefix, torch.ones_like(batch.attention_mask))
    assert text_BS.sum(1).tolist() == [batch.input_ids.shape[1]] * batch.size
    changed_BS = (prefix.hidden_BSD != other.hidden_BSD).any(-1)
    assert not changed_BS[text_BS].any() and changed_BS.any(1).all()
    columns = backbone.text_columns(prefix, batch.input_ids.shape[1]).expand(batch.input_ids.shape)
    assert torch.equal(prefix.attention_mask_BS.gather(1, columns), batch.attention_mask)
    mask_BL = torch.rand(batch.input_ids.shape, generator=torch.Generator().manual_seed(0)) > 0.5
    assert torch.equal(backbone.sequence_mask(prefix, mask_BL).gather(1, columns), mask_BL)


def test_the_instruction_is_found_in_the_prompt(case, backbone):
    samples, processor = case.samples(backbone) + case.samples(backbone, 1, question=True), backbone.processor
    batch = processor.encode_prompts(samples)
    for sample, ids, kept_L in zip(samples, batch.input_ids, mask_from_prompt(batch, samples, processor)):
        said = processor.tokenizer.decode(ids[kept_L]).replace(" ", "")
        assert said == sample.instruction.lower().replace(" ", "")
        assert [row.kept for row in audit(sample, processor)] == kept_L[:len(processor.whole_prompt(sample))].tolist()


def test_prompts_are_padded_on_the_right_to_the_width_that_is_asked(case, backbone):
    samples = case.samples(backbone, 2)
    plain, wide = backbone.processor.encode_prompts(samples), backbone.processor.encode_prompts(samples, 50)
    assert wide.input_ids.shape == (2, 50) and (wide.labels == IGNORE_INDEX).all()
    assert torch.equal(wide.input_ids[:, :plain.input_ids.shape[1]], plain.input_ids) and torch.equal(
        wide.attention_mask.sum(1), plain.attention_mask.sum(1))
    rows = [backbone.processor.whole_prompt(sample) for sample in samples]
    assert [ids[mask].tolist() for ids, mask in zip(plain.input_ids, plain.attention_mask)] == rows


# ---- what it computes ----


@torch.no_grad()
def test_a_range_of_layers_gives_what_the_whole_gives(case, backbone):
    prefix = backbone.embed(backbone.processor.encode_prompts(case.samples(backbone)))
    middle, last = backbone.num_layers // 2, backbone.num_layers
    with captured_outputs(backbone.decoder_layers, [middle - 1]) as outputs:
        whole = backbone.run_layers(prefix)
    halfway = prefix.with_hidden(backbone.run_layers(prefix, stop=middle))
    valid = prefix.attention_mask_BS
    assert same(halfway.hidden_BSD[valid], outputs[middle - 1][valid])
    assert same(backbone.run_layers(halfway, start=middle)[valid], whole[valid])
    assert same(backbone.norm(backbone.run_layers(halfway, middle, last))[valid], whole[valid])
    with pytest.raises(ValueError, match=f"layers 0 to {last - 1}"):
        backbone.run_layers(prefix, stop=last + 1)


@torch.no_grad()
def test_prefixes_can_be_cut_and_joined(case, backbone):
    """What the sensors do with prefixes that they keep."""
    samples, processor = case.samples(backbone), backbone.processor
    whole = backbone.embed(processor.encode_prompts(samples, 50))
    kept = [backbone.embed(processor.encode_prompts([sample])).to("cpu") for sample in samples]
    joined = kept[0].join(kept[1:])
    assert type(joined) is type(whole) and joined.attention_mask_BS.shape[1] < whole.attention_mask_BS.shape[1]
    assert whole.trimmed().hidden_BSD.shape == joined.hidden_BSD.shape
    first, again = backbone.run_layers(whole.trimmed().rows(slice(1, 3))), backbone.run_layers(joined.rows(torch.tensor([1, 2])))
    valid = joined.attention_mask_BS[1:3]
    assert same(first[valid], again[valid])


@torch.no_grad()
def test_text_alone_is_read_or_refused(case, backbone):
    """What a token sees is what it depends on."""
    ids_BL = torch.tensor([backbone.processor.text_ids(case.asked[0])] * 2)
    length = ids_BL.shape[1]
    places_BL, sees_BLL = torch.arange(length).expand(2, -1), torch.ones(2, length, length, dtype=torch.bool).tril()
    if case.kind.read_text is Backbone.read_text:
        with pytest.raises(ValueError, match="reads no text without a picture"):
            backbone.read_text(ids_BL, places_BL, sees_BLL)
        return
    sees_BLL[1, -1, 1] = False
    ids_BL[1, 1] += 1
    normed = backbone.read_text(ids_BL, places_BL, sees_BLL)
    assert normed.shape == (2, length, backbone.hidden_size) and same(normed[0, 0], normed[1, 0]) and not same(normed[0, 1], normed[1, 1])
    sees_BLL[1, 2:, 1] = sees_BLL[0, 2:, 1] = False
    blind = backbone.read_text(ids_BL, places_BL, sees_BLL)
    assert same(blind[0, 2:], blind[1, 2:]) and not same(blind[0, 2:], normed[0, 2:])


@torch.no_grad()
def test_the_loss_is_the_mean_over_labelled_tokens(case, backbone):
    """Of actions and of questions: by the model's forward, by the plain one, and from the log-probabilities."""
    for question in (False, True):
        samples = case.samples(backbone, question=question)
        batch = backbone.processor.encode_batch(samples)
        targets = [labels[labels != IGNORE_INDEX] for labels in batch.labels]
        prompts, whole = backbone.processor.encode_prompts(samples), pad_sequence(targets, True, backbone.processor.pad_token_id)
        log_p = backbone.log_probabilities_of_continuation(prompts, whole).gather(-1, whole[..., None])[..., 0]
        wanted = -torch.cat([row[:len(target)] for row, target in zip(log_p, targets)]).mean()
        out, plain = backbone(batch), Backbone.loss(backbone, batch)
        assert out.num_labelled == sum(len(row) for row in targets) and torch.equal(out.correct, plain.correct)
        assert same(out.loss, wanted) and same(plain.loss, wanted) and same(out.last_hidden_norm, plain.last_hidden_norm)
        if not question:
            spec = backbone.processor.spec
            lengths = {len(row) for row in targets}
            most = backbone.action_tokens() + 1
            assert max(lengths) <= most if backbone.processor.variable_answers else lengths == {most}
            decoded = backbone.processor.decode_actions((whole if backbone.processor.variable_answers else whole[:, :-1]).numpy())
            given = np.stack([sample.action for sample in samples]).reshape(len(samples), spec.chunk, -1)
            assert decoded.shape == given.shape and np.abs(decoded - given).max() < 0.13


@torch.no_grad()
def test_answers_are_the_same_alone_in_a_batch_and_without_a_cache(case, backbone):
    samples, processor = case.samples(backbone) + case.samples(backbone, 1, question=True), backbone.processor
    batch = processor.encode_prompts(samples)
    assert len(set(batch.attention_mask.sum(1).tolist())) > 1
    for stop in (True, False):
        ids, ended = backbone.generate(batch, 6, stop_at_eos=stop)
        plain = Backbone.generate(backbone, batch, 6, stop_at_eos=stop)
        assert torch.equal(ids, plain[0]) and torch.equal(ended, plain[1])
        for row, sample in enumerate(samples):
            assert torch.equal(backbone.generate(processor.encode_prompts([sample]), 6, stop_at_eos=stop)[0][0], ids[row])
    assert torch.equal(backbone.next_logits(batch).argmax(-1), ids[:, 0])
    log_p = backbone.log_probabilities_of_continuation(batch, ids)
    assert torch.equal(log_p.argmax(-1), ids) and same(log_p.exp().sum(-1), torch.ones(ids.shape))


@torch.no_grad()
def test_actions_come_in_chunks_and_in_the_units_of_the_data(case, backbone):
    batch = backbone.processor.encode_prompts(case.samples(backbone))
    key, dims, chunk = backbone.action_key(), backbone.action_dim(), backbone.processor.spec.chunk
    chunks, early = backbone.attempt_chunks(batch, key)
    first, again = backbone.attempt_batch(batch, key)
    assert chunks.shape == (batch.size, chunk, dims) and first.shape == (batch.size, dims) and chunks.dtype == np.float64
    assert np.array_equal(first, chunks[:, 0]) and np.array_equal(early, again) and early.dtype == bool
    one = backbone.action_statistics(key)
    low, high, mask = (np.array(one[name]) for name in ("q01", "q99", "mask"))
    far = backbone.processor.action_limit  # of decoded values; what a transform makes of random coefficients is not within 1
    middle, half = (low + high) / 2, (high - low) / 2
    assert (np.abs(chunks - np.where(mask, middle, 0)) <= np.where(mask, half, 1) * far + 1e-9).all()
    assert np.allclose(backbone.unnormalise(np.ones((2, dims)), key)[0][mask], high[mask])
    with pytest.raises(ValueError, match="no action statistics of 'else'"):
        backbone.action_statistics("else")


def test_it_looks(backbone):
    check_vision(backbone)


# ---- what it learns ----


def trained(case, method_of, config, steps=2):
    """(the model after these steps of the real training step, metrics of each step)."""
    backbone = case.make()
    before = backbone.weights_sha256
    method = method_of(backbone)
    add_lora(backbone, config.lora, seed=3)
    backbone.train()
    method.attach(backbone)
    method.before_training()
    optimizer = make_optimizer([p for p in backbone.parameters() if p.requires_grad], config.train)
    scaler = LossScaler(False)
    batch = backbone.processor.encode_batch(case.samples(backbone))
    rows = [train_step(backbone, method, optimizer, scaler, [batch], config.train, step, True) for step in range(1, steps + 1)]
    assert before == backbone.weights_sha256
    return backbone.eval(), method, rows


def graded_of(case, config):
    """The method of a teacher whose spectra and answers are measured on samples that are at hand."""
    def method_of(backbone):
        samples, linears = case.samples(backbone, 6), select_linears(backbone, config.lora.layers, config.lora.modules)
        first = backbone.num_layers - 2
        prompts = backbone.processor.encode_prompts(samples)
        parts = run_below(backbone, [(prompts, with_own_answers(backbone, prompts, backbone.answer_tokens))], first)
        moments = input_moments(backbone, parts, None, first, linears, backbone.input_key)
        spectra = {key: spectrum(moment, 64) for key, moment in moments.items()}
        answered = teacher_answers(backbone, parts, first)

        def sensors(student):
            return {"kl": KLSensor(student, answered, batched(samples, student.processor, 4), 4), "kl_new": None}

        return Graded(config, SimpleNamespace(spectra=lambda: spectra, folder="here"), sensors)
    return method_of


def test_second_moments_are_those_of_the_prompts_alone_where_answers_are_left_out(case, backbone):
    linears, first = select_linears(backbone, "last:2", ["attention", "mlp"]), backbone.num_layers - 2
    prompts = backbone.processor.encode_prompts(case.samples(backbone, 6))
    whole = with_own_answers(backbone, prompts, backbone.answer_tokens)
    answered, alone = (run_below(backbone, [(prompts, other)], first) for other in (whole, prompts))
    mask_BL = answered[0].answer_mask_BL()
    assert mask_BL.sum(1).tolist() == answered[0].count_B.tolist() and mask_BL.any(1).all() and not alone[0].answer_mask_BL().any()
    every, without, wanted = (input_moments(backbone, parts, None, first, linears, backbone.input_key, answers=answers)
                              for parts, answers in ((answered, True), (answered, False), (alone, True)))
    for key in wanted:
        torch.testing.assert_close(without[key], wanted[key], rtol=1e-3, atol=1e-5 * float(wanted[key].abs().max()))
        assert (every[key] - wanted[key]).norm() > 1e-3 * wanted[key].norm()


def test_plain_adapters_learn_and_the_teacher_can_be_had_back(case, backbone):
    student, _, rows = trained(case, lambda backbone: Baseline(), case.config(), steps=4)
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"]) and float(rows[0]["accuracy"]) <= 1
    assert student.first_adapted_layer() == student.num_layers - 2
    assert list(student.adapted_linears()) == list(select_linears(backbone, "last:2", ["attention", "mlp"]))
    batch = backbone.processor.encode_batch(case.samples(backbone))
    with torch.no_grad():
        assert abs(float(student(batch).loss - backbone(batch).loss)) > 1e-3
        with adapters_disabled(student):
            assert torch.equal(student(batch).loss, backbone(batch).loss)


def test_the_graded_method_trains_it(case):
    config = case.config(GRADED, "--thermostat.every", "1", "--train.steps", "2", "--thermostat.batch_size", "6")
    student, method, rows = trained(case, graded_of(case, config), config)
    assert all(np.isfinite(float(row["loss"])) and row["kl"] >= 0 for row in rows) and rows[-1]["kl"] > 0
    assert {"opening", "settled_opening"} <= set(rows[-1])
    layers = {name.rpartition("/")[2] for name in rows[-1] if name.startswith("update_norm/")}
    assert layers == {str(student.num_layers - 2), str(student.num_layers - 1)}
    before = method._sensors["kl"].measure()
    method.detach()
    # Without the site the effective weights are those that were trained: nothing in the sensor changes.
    assert method._sensors["kl"].measure() == pytest.approx(before, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("gains", [["--gains.enabled", "false"], ["--gains.opening", "1e30", "--gains.scale", "1"]])
def test_without_gains_and_with_gains_of_one_it_is_the_baseline_bitwise(case, gains):
    config = case.config(GRADED, "--thermostat.enabled", "false", *gains)
    plain, other = (trained(case, method, config)[0] for method in (lambda backbone: Baseline(), graded_of(case, config)))
    for name, linear in plain.adapted_linears().items():
        for part in ("lora_A", "lora_B"):
            a, b = (getattr(one, part)["default"].weight for one in (linear, other.adapted_linears()[name]))
            assert torch.equal(a, b), name


def test_the_statistics_of_its_instructions_can_be_taken(case, backbone):
    samples, processor = case.samples(backbone, 6), backbone.processor
    batch = processor.encode_prompts(samples)
    batches = [(batch, mask_from_prompt(batch, samples, processor))]
    layer = backbone.num_layers - 2
    pooled = pooled_states(backbone, batches, [layer], quiet=True)
    assert pooled.states[layer].shape == (6, backbone.hidden_size) and pooled.empty == 0 and pooled.scale[layer] > 0
    directions = torch.linalg.qr(torch.randn(backbone.hidden_size, 2, generator=torch.Generator().manual_seed(0)))[0]
    assert (sensitivities(backbone, batches, layer, directions, step=pooled.scale[layer]) > 0).all()
    linears = select_linears(backbone, "last:1", ["attention", "mlp"])
    moments = token_moments(backbone, [batch], linears)
    assert set(moments) == {backbone.input_key(name) for name in linears}


# ---- its files ----


def test_adapters_and_merged_folders_bring_the_student_back(case, tmp_path):
    student, _, _ = trained(case, lambda backbone: Baseline(), case.config())
    batch = student.processor.encode_batch(case.samples(student))
    save_adapter(student, tmp_path / "adapter")
    again = case.make()
    load_adapter(again, tmp_path / "adapter")
    out = tmp_path / "merged"
    out.mkdir()
    merge_checkpoint(Path(student.checkpoint), tmp_path / "adapter", out, student.norm_stats)
    save_checkpoint(student, tmp_path / "saved")
    with torch.no_grad():
        wanted = student(batch).loss
        assert torch.equal(again.eval()(batch).loss, wanted)
        for folder in (out, tmp_path / "saved"):
            merged = make_backbone(folder)
            assert type(merged) is type(student) and merged.norm_stats == student.norm_stats and same(merged(batch).loss, wanted, 1e-4)
            assert merged.weights_sha256 != student.weights_sha256


def test_a_run_that_is_merged_in_memory_is_its_merged_folder_bitwise(case, tmp_path):
    student, _, _ = trained(case, lambda backbone: Baseline(), case.config())
    save_adapter(student, tmp_path / "adapter")
    (tmp_path / "adapter" / "dataset_statistics.json").write_text(json.dumps({"mine": next(iter(student.norm_stats.values()))}))
    out, base = tmp_path / "merged", Path(student.checkpoint)
    out.mkdir()
    merge_checkpoint(base, tmp_path / "adapter", out, {})
    chain = Chain(weights_hash(base), [Link("study/first", "step_000002", "", tmp_path)])
    found, wanted = case.make(), make_backbone(out).network.state_dict()
    merge_chain(found, chain)
    assert found.weights_sha256 == chain_hash(base, chain) == weights_hash(out) != student.weights_sha256
    assert found.name == f"{student.name}+study.first" and found.norm_stats.keys() == {*student.norm_stats, "mine"}
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.network.state_dict().items())


def test_all_linear_adapts_more_than_the_decoder(case, backbone):
    assert {backbone.decoder_prefix + name for name in select_linears(backbone, "all", ["attention", "mlp"])} < set(all_linear(backbone))


# ---- samples ----


def test_what_a_sample_needs_is_said_and_one_camera_is_the_image():
    picture, one = np.zeros((4, 4, 3), dtype=np.uint8), SampleSpec()
    named = Sample(None, "look", cameras={"wrist": picture, "front": picture + 1})
    spec = SampleSpec(cameras=("front", "wrist"), state=2, chunk=2)
    assert [int(p[0, 0, 0]) for p in spec.pictures(named)] == [1, 0] and one.pictures(Sample(picture, "look")) == [picture]
    with pytest.raises(ValueError, match="'look' of data set '' lacks a state of 2 numbers, which the model two takes; it has the camera"):
        spec.check([named], "two")
    with pytest.raises(ValueError, match="lacks an image, which the model one takes; it has the camera 'wrist', the camera 'front'"):
        one.check([named], "one")
    action = np.zeros(3, dtype=np.float32)
    with pytest.raises(ValueError, match=r"lacks a chunk of 2 actions, .*, an action \[3\]"):
        spec.check([replace(named, state=np.zeros(2), action=action)], "two")
    with pytest.raises(ValueError, match="lacks a chunk of 2 actions"):
        spec.check([replace(named, state=np.zeros(2), action=np.zeros((3, 3)))], "two")
    with pytest.raises(ValueError, match=r"lacks an action \[A\]"):
        one.check([Sample(picture, "look", np.zeros((2, 3)))], "one")
    spec.check([replace(named, state=np.zeros(2), action=np.zeros((2, 3)))], "two")
    one.check([Sample(picture, "look", action)], "one")
