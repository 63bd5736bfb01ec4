"""Method graded: the gains, the spectrum, the teacher's answers, the sensor and its loop, each against an independent reference; and the
laws of the framework for this method."""

import json
import math
import re
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import forked
import numpy as np
import pytest
import torch
from conftest import BASELINE, GRADED, SMALL, final_adapter
from safetensors.torch import load_file
from torch import nn

from vlakeep.benchmarks.questions import action_token_kl
from vlakeep.core.config import Config
from vlakeep.core.registry import method_class
from vlakeep.core.rundir import read_metrics
from vlakeep.evaluate import load_target
from vlakeep.hsw import graded
from vlakeep.hsw.graded import GradedInput, GradedSite
from vlakeep.methods import graded as graded_method
from vlakeep.methods import graded_offline
from vlakeep.methods.graded import Graded
from vlakeep.models.adapters import adapters_disabled, add_lora, attach_lora, select_linears, target_modules
from vlakeep.models.load import make_backbone
from vlakeep.offline import run_offline
from vlakeep.openvla.prompts import encode_prompts
from vlakeep.probe.probe_set import ProbeSet
from vlakeep.teacher import artifact, coverage
from vlakeep.teacher.answers import Answered, divergence, run_below, split_log_probabilities, teacher_answers
from vlakeep.teacher.collect import token_moments, with_own_answers
from vlakeep.teacher.folder import ArtifactError
from vlakeep.teacher.spectrum import Spectrum, gains, spectrum
from vlakeep.thermostat import loop
from vlakeep.thermostat.kl_sensor import KLSensor, batched
from vlakeep.thermostat.setpoint import SetPoint, SetPointController, replay, settle
from vlakeep.train import run_training

# Gains


def random_spectrum(dim=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))[0]
    values = torch.logspace(1, -5, dim, dtype=torch.float64)
    return Spectrum(vectors.float(), values.float(), 0.0), vectors, values


def layer(dim=24, rank=4, out=10, seed=1):
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Module()
    linear.lora_A = nn.ModuleDict({"default": nn.Linear(dim, rank, bias=False)})
    linear.lora_B = nn.ModuleDict({"default": nn.Linear(rank, out, bias=False)})
    linear.scaling = {"default": 2.0}
    with torch.no_grad():
        for module in (linear.lora_A["default"], linear.lora_B["default"]):
            module.weight.copy_(torch.randn(module.weight.shape, generator=generator))
    return linear


@pytest.mark.parametrize("dense", [1024, 0])
def test_effective_weight_and_gradient_are_those_of_the_formula(monkeypatch, dense):
    monkeypatch.setattr(graded, "DENSE", dense)
    one, vectors, values = random_spectrum()
    linear = layer()
    raw = linear.lora_A["default"].weight.detach().double().clone()
    site = GradedSite({"x": linear}, {"x": GradedInput(one, torch.device("cpu"))}, {"x": 0.5}, steepness=1.5, scale=7.0)
    site.set_opening(0.1)
    matrix = vectors @ torch.diag((0.05 / (values.float().double() + 0.05)) ** 1.5) @ vectors.T
    a = linear.lora_A["default"]
    assert torch.allclose(a.weight.double(), 7.0 * raw @ matrix, atol=1e-5)
    site.meter.start(True)
    direction = torch.randn(4, 24, generator=torch.Generator().manual_seed(3))
    (a.weight * direction).sum().backward()
    assert torch.allclose(a.parametrizations.weight.original.grad.double(), 7.0 * direction.double() @ matrix, atol=1e-5)
    read = site.meter.read()
    assert read["g_norm"] == pytest.approx(float(direction.norm()), rel=1e-5)
    assert read["g_prime_norm"] == pytest.approx(float((direction.double() @ matrix).norm()), rel=1e-4), "the scale is no part of it"
    assert read["g_prime_norm"] < read["g_norm"]
    norm = site.update_norms()["x"]
    assert float(norm) == pytest.approx(float(2.0 * (linear.lora_B["default"].weight @ a.weight).norm()), rel=1e-5)
    effective = a.weight.detach().clone()
    site.detach()
    assert torch.equal(linear.lora_A["default"].weight, effective)


@pytest.mark.parametrize("dense", [1024, 0])
def test_contractions_of_one_shape_at_once_are_those_one_by_one(monkeypatch, dense):
    """q, k and v of two layers, each layer's reading one input, and an output projection with a spectrum that is not whole."""
    monkeypatch.setattr(graded, "DENSE", dense)
    inputs = {"0": random_spectrum(seed=0)[0], "1": random_spectrum(seed=1)[0]}
    whole = random_spectrum(seed=2)[0]
    inputs["o"] = Spectrum(whole.vectors[:, :9].contiguous(), whole.values[:9], float(whole.values[9:].mean()))

    def gradients(batched):
        linears = {f"{key}{leaf}": layer(seed=number) for number, (key, leaf) in enumerate(
            [("0", "q"), ("0", "k"), ("1", "q"), ("1", "k"), ("o", "")])}
        spaces = {key: GradedInput(one, torch.device("cpu")) for key, one in inputs.items()}
        site = GradedSite(linears, {name: spaces[name[0]] for name in linears}, dict.fromkeys(linears, 0.5), 1.5, 7.0, batched)
        for opening in (0.3, 0.01):  # the second finds the places of the first
            site.set_opening(opening)
            assert linears["0q"].lora_A["default"].weight.shape == (4, 24)
        site.meter.start(True)
        used = list(linears.items())[1:]  # one takes no part
        for _ in range(2):  # two micro-batches
            sum((one.lora_A["default"].weight * torch.arange(24.0)).sum() * (number + 1) for number, (_, one) in enumerate(used)).backward()
        found = {name: one.lora_A["default"].parametrizations.weight.original.grad for name, one in linears.items()}
        values = {name: one.lora_A["default"].weight.detach().clone() for name, one in linears.items()}
        norms = {name: float(norm) for name, norm in site.update_norms().items()}
        read = site.meter.read()
        site.detach()
        assert all(torch.equal(one.lora_A["default"].weight, values[name]) for name, one in linears.items())
        return found, values, norms, read

    (together, values, norms, read), (single, wanted, own, seen) = gradients(True), gradients(False)
    assert together["0q"] is None and single["0q"] is None
    for name in wanted:
        assert torch.allclose(values[name], wanted[name], atol=1e-4), name
        assert norms[name] == pytest.approx(own[name], rel=1e-5)
        if name != "0q":
            assert torch.allclose(together[name], single[name], rtol=1e-4, atol=1e-3), name
    assert read == pytest.approx(seen, rel=1e-4)


def test_gains_fall_with_energy_rise_with_the_opening_and_stay_within_one():
    values = torch.tensor([0.0, 1e-12, 0.01, 1.0, 100.0])
    for steepness in (0.5, 1.0, 2.0):
        narrow, wide = gains(values, 0.01, steepness), gains(values, 1.0, steepness)
        assert narrow[0] == wide[0] == 1.0 and bool((narrow[1:] <= narrow[:-1]).all())
        assert bool((narrow <= wide).all()) and float(wide.max()) <= 1.0 and float(narrow.min()) > 0.0
    assert gains(torch.tensor([1.0]), 1.0, 2.0).item() == 0.25
    assert bool((gains(values, 1e30, 1.0) == 1.0).all())


def test_three_levels_are_a_special_case():
    """gamma on Uf, beta on Up and 1 elsewhere is what hsw/lora_input.py computes."""
    from vlakeep.hsw.lora_input import InputSpace
    from vlakeep.hsw.transform import Gains

    one, vectors, _ = random_spectrum()
    space = GradedInput(one, torch.device("cpu"))
    space.set(1.0, 1.0, 1.0)
    levels = torch.tensor([0.1] * 6 + [0.4] * 4 + [1.0] * 14)
    space._matrix_DD = ((vectors * levels) @ vectors.T).float()
    three = InputSpace({"f": one.vectors[:, :6], "p": one.vectors[:, 6:10]}, torch.device("cpu"))
    three.set_gains(Gains(beta=0.4, gamma=0.1))
    x = torch.randn(3, 24)
    assert torch.allclose(space.contract(x), three.apply(x), atol=1e-5)


def test_vectors_that_are_not_orthonormal_are_refused():
    one, _, _ = random_spectrum()
    with pytest.raises(ValueError, match="not orthonormal.*vlakeep offline"):
        GradedInput(one._replace(vectors=one.vectors * 1.1), torch.device("cpu"))


def test_a_truncated_spectrum_acts_as_the_whole_one_where_it_matters():
    _, vectors, _ = random_spectrum(300)
    values = torch.arange(1, 301).double() ** -2
    moment = ((vectors * values) @ vectors.T).float()
    whole, part = spectrum(moment, 300), spectrum(moment, 100)
    assert part.vectors.shape == (300, 100) and part.mean == pytest.approx(whole.mean, rel=1e-4)
    assert torch.allclose(part.values, whole.values[:100], rtol=2e-2)
    x = torch.randn(5, 300, generator=torch.Generator().manual_seed(0))
    made = []
    for one in (whole, part):
        space = GradedInput(one, torch.device("cpu"))
        space.set(1e-2 * one.mean, 1.0, 1.0)
        made.append((space.contract(x), space.passed_energy(1e-2 * one.mean, 1.0, 10.0)))
    # The cut lies in the flank on purpose: what is left out differs by a factor of nine in energy and shares one gain.
    assert float((made[0][0] - made[1][0]).norm() / made[0][0].norm()) < 0.25
    assert made[1][1] == pytest.approx(made[0][1], rel=0.15)


def test_the_starting_point_follows_from_the_spectrum():
    """Scaling all inputs changes nothing: lambda is measured in the spectrum's own unit."""
    one, _, _ = random_spectrum()
    found = []
    for factor in (1.0, 1000.0):
        space = GradedInput(one._replace(values=one.values * factor), torch.device("cpu"))
        site = GradedSite({"x": layer()}, {"x": space}, {"x": space.energy / space.dim}, 1.0, 10.0)
        opening = site.opening_for(1e-3)
        assert site.passed_energy(opening) == pytest.approx(1e-3, rel=1e-3)
        found.append(opening)
    assert found[0] == pytest.approx(found[1], rel=1e-3)


# The teacher's answers and the sensor


# Where A starts


@pytest.mark.parametrize("dense", [1024, 0])
@pytest.mark.parametrize("kept", [24, 10])
def test_a_starts_where_new_inputs_pass_the_gains_most(monkeypatch, dense, kept):
    """Against NumPy: eigenvectors of M C_new M; and of the pencil (C_new, C + lambda I), which those of A_eff are when p is a half."""
    monkeypatch.setattr(graded, "DENSE", dense)
    one, vectors, values = random_spectrum()
    moment = (lambda x: x.T @ x / len(x))(torch.randn(200, 24, generator=torch.Generator().manual_seed(3), dtype=torch.float64))
    part = one if kept == 24 else Spectrum(one.vectors[:, :kept].contiguous(), one.values[:kept], float(one.values[kept:].mean()))
    linears = {"q": layer(), "k": layer(seed=2), "alone": layer(seed=4)}
    spaces = dict.fromkeys("qk", GradedInput(part, torch.device("cpu")))
    site = GradedSite(linears, {**spaces, "alone": GradedInput(part, torch.device("cpu"))}, dict.fromkeys(linears, 1.0), 0.5, 10.0)
    site.set_opening(0.01)
    before = {name: (one.lora_A["default"].weight.clone(), one.lora_B["default"].weight.clone()) for name, one in linears.items()}
    raw = {name: one.lora_A["default"].parametrizations.weight.original for name, one in linears.items()}
    lengths = {name: float(own.detach().norm(dim=1).mean()) for name, own in raw.items()}
    kept_alone = raw["alone"].clone()
    site.start_at({name: moment.float() for name in "qk"})

    own = torch.cat([values[:kept], values[kept:].mean().expand(24 - kept)]).numpy()
    V = vectors.numpy()
    M = V @ np.diag((0.01 / (own + 0.01)) ** 0.5) @ V.T
    eigenvalues, eigenvectors = np.linalg.eigh(M @ moment.numpy() @ M)
    pencil = np.linalg.solve(V @ np.diag(own + 0.01) @ V.T, moment.numpy())
    for name in "qk":
        A, A_eff = raw[name].detach().double().numpy(), linears[name].lora_A["default"].weight.detach().double().numpy()
        assert np.allclose(A @ A.T, lengths[name] ** 2 * np.eye(4), atol=1e-5)
        assert np.allclose(np.abs(A @ eigenvectors[:, :-5:-1]), lengths[name] * np.eye(4), atol=1e-3)
        for row, value in zip(A_eff, eigenvalues[:-5:-1] / 0.01):
            assert np.allclose(pencil @ row, value * row, atol=2e-3 * value * np.linalg.norm(row))
        passed, drawn = (np.trace(a @ moment.numpy() @ a.T) for a in (A_eff, before[name][0].detach().double().numpy()))
        assert passed > 1.5 * drawn
        assert torch.equal(linears[name].lora_B["default"].weight, before[name][1])
    assert torch.equal(raw["alone"], kept_alone)


def start(world, *words):
    """(backbone, method, A of each linear as they start), prepared and attached."""
    storage, make_config = world
    config = make_config(*words)
    backbone = make_backbone(config.backbone, "cpu", storage.cache)
    add_lora(backbone, config.lora, config.seed)
    backbone.train()
    method, _ = method_class(config.method).prepare(config, storage, backbone)
    method.attach(backbone)
    assert backbone.training
    return backbone, method, {name: dict(linear.lora_A["default"].named_parameters()).popitem()[1].detach()
                              for name, linear in backbone.adapted_linears().items()}


@pytest.fixture
def few_frames(monkeypatch):
    monkeypatch.setattr(graded_method, "START_FRAMES", 6)


NEW = ["--gains.start_of_a", "new_inputs"]


def test_a_starts_at_the_inputs_of_the_runs_first_batches_or_as_it_was_drawn(world, artefact, few_frames):
    storage, make_config = world
    config = make_config(GRADED)
    plain = make_backbone(config.backbone, "cpu", storage.cache)
    add_lora(plain, config.lora, config.seed)
    drawn = {name: linear.lora_A["default"].weight.detach() for name, linear in plain.adapted_linears().items()}
    for words in ([GRADED], [GRADED, *NEW, "--gains.enabled", False], ["configs/rivals/l2_sp.yaml", *NEW]):
        assert all(torch.equal(found, drawn[name]) for name, found in start(world, *words)[2].items()), words

    size = config.train.batch_size
    batches = graded_offline.training_batches(config, storage, plain, 6)
    assert sum(batch.size for batch in batches) == -(-6 // size) * size
    moments = token_moments(plain.eval(), batches, plain.adapted_linears())
    for words in ([GRADED, *NEW, "--lora.dropout", 0.5], [GRADED, *NEW, "--method", "distillation", "--options.items", 2]):
        backbone, method, found = start(world, *words)
        for name, A in found.items():
            one, key = artefact.spectra()[plain.input_key(name)], plain.input_key(name)
            V, lam = one.vectors.double(), method._site.opening * method._site._units[name]
            M = V @ torch.diag(gains(one.values, lam, config.gains.steepness)) @ V.T
            through = A.double() @ M @ moments[key].double() @ M @ A.double().T
            best = torch.linalg.eigvalsh(M @ moments[key].double() @ M).flip(0)[:len(A)]
            assert torch.allclose(through, torch.diag(best) * drawn[name].norm(dim=1).mean() ** 2, atol=1e-4 * float(through.max())), name
            linear = backbone.adapted_linears()[name]
            effective = config.gains.scale * A.double() @ M
            assert torch.allclose(linear.lora_A["default"].weight.double(), effective, atol=1e-5 * float(effective.abs().max())), name
            assert not linear.lora_B["default"].weight.any() and len(linear.lora_A["default"].parametrizations.weight) == 1


def test_a_that_starts_open_is_the_drawn_one_behind_the_gains_as_long_as_it_was(world, artefact):
    storage, make_config = world
    config = make_config(GRADED)
    plain = make_backbone(config.backbone, "cpu", storage.cache)
    add_lora(plain, config.lora, config.seed)
    backbone, method, found = start(world, GRADED, "--gains.start_of_a", "open")
    for name, linear in plain.adapted_linears().items():
        drawn, one = linear.lora_A["default"].weight.detach().double(), artefact.spectra()[plain.input_key(name)]
        V, lam = one.vectors.double(), method._site.opening * method._site._units[name]
        M = V @ torch.diag(gains(one.values, lam, config.gains.steepness)) @ V.T
        wanted = torch.nn.functional.normalize(drawn @ M, dim=1) * drawn.norm(dim=1, keepdim=True)
        assert torch.allclose(found[name].double(), wanted, atol=1e-5 * float(drawn.abs().max())), name
        assert not backbone.adapted_linears()[name].lora_B["default"].weight.any()


def test_gains_in_some_layers_leave_the_others_plain(world, artefact):
    """The adapters of other layers have no parametrisation; all layers are the default to the bit."""
    storage, make_config = world
    backbone, method, _ = start(world, GRADED, "--gains.layers", "last:2")
    layers = range(backbone.num_layers)
    gained = {name: torch.nn.utils.parametrize.is_parametrized(linear.lora_A["default"])
              for name, linear in backbone.adapted_linears().items()}
    assert {layer: {own for name, own in gained.items() if name.startswith(f"layers.{layer}.")} for layer in layers} == {
        layer: {layer >= backbone.num_layers - 2} for layer in layers}
    runs = {"every": ["--gains.layers", f"0-{backbone.num_layers - 1}"], "some": ["--gains.layers", "last:2"], "usual": []}
    found = {name: final_adapter(run_training(make_config(GRADED, *words, "--train.steps", 2, "--name", f"layers-{name}"), storage))
             for name, words in runs.items()}
    assert found["every"] == found["usual"] != found["some"]
    for words, message in ((["--gains.layers", "0", "--lora.layers", "last:2"], "--gains.layers 0: none of these layers has adapters"),
                           (["--gains.layers", "last:99"], "--gains.layers 'last:99': the model has layers 0 to 5")):
        with pytest.raises(ValueError, match=re.escape(message)):
            start(world, GRADED, *words)


def test_a_run_from_new_inputs_resumes_bitwise_and_is_another(world, artefact, few_frames):
    storage, make_config = world
    few = ["--train.schedule", "constant", "--train.warmup", 1, "--train.save_every", 1, "--train.steps"]
    arm = [GRADED, *NEW, *few]
    whole = run_training(make_config(*arm, 3, "--name", "start-whole"), storage)
    run_training(make_config(*arm, 2, "--name", "start-part"), storage)
    part = run_training(make_config(*arm, 3, "--name", "start-part", "--train.resume", True), storage)
    assert final_adapter(part) == final_adapter(whole)
    drawn = run_training(make_config(GRADED, *few, 3, "--name", "start-drawn"), storage)
    assert final_adapter(drawn) != final_adapter(whole)


def test_two_processes_start_from_new_inputs_as_one_does(world, artefact, tmp_path):
    storage, make_config = world
    arm = [*NEW, "--train.steps", 2, "--train.batch_size", 32]  # few passes over the frames
    one = run_training(make_config(GRADED, *arm, "--name", "start-one", "--train.accumulation", 2), storage)
    forked.run_two_ranks(["train", *SMALL, "--root", storage.root, "--config", GRADED, *arm, "--name", "start-two"], tmp_path)
    assert final_adapter(storage.run_folder("start-two")) == final_adapter(one)


def test_random_directions_have_the_eigenvalues_of_the_probes():
    own, config = Spectrum(torch.eye(24)[:, :20], torch.arange(20.0, 0.0, -1.0), 0.5), Config()
    backbone = SimpleNamespace(adapted_linears=lambda: {"layers.0.x": None}, input_key=lambda name: name, num_layers=1)
    found = {}
    for directions in ("probe", "random"):
        config.gains.directions = directions
        method = graded_method.Graded(config, SimpleNamespace(spectra=lambda: {"layers.0.x": own}), dict)
        found[directions] = method._spectra(backbone)["layers.0.x"]
    drawn = found["random"]
    assert found["probe"] is own and torch.equal(drawn.values, own.values) and drawn.rest == own.rest
    assert torch.allclose(drawn.vectors.T @ drawn.vectors, torch.eye(20), atol=1e-5)
    assert (drawn.vectors - own.vectors).abs().max() > 0.3


@pytest.fixture(scope="module")
def artefact(graded_folder):
    return artifact.load_artifact(graded_folder)


@pytest.fixture(scope="module")
def student(world):
    """A backbone with adapters whose B is not zero."""
    backbone = make_backbone(Config().backbone, torch.device("cpu"), world[0].cache)
    attach_lora(backbone, target_modules(backbone, "2-5", ["attention", "mlp"]), 4, 4.0)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for linear in backbone.adapted_linears().values():
            linear.lora_B["default"].weight.copy_(0.1 * torch.randn(linear.lora_B["default"].weight.shape, generator=generator))
    return backbone.eval()


def test_divergence_over_kept_tokens_and_the_rest():
    generator = torch.Generator().manual_seed(0)
    teacher, other = torch.randn(3, 4, 40, generator=generator) * 3, torch.randn(3, 4, 40, generator=generator) * 3
    p, q = torch.log_softmax(teacher.double(), -1), torch.log_softmax(other.double(), -1)
    count = torch.tensor([4, 2, 1])
    exact = (p.exp() * (p - q)).sum(-1)
    wanted = torch.stack([exact[i, :n].mean() for i, n in enumerate(count)])
    for kept, slack in ((39, 1e-5), (8, None)):
        top = teacher.topk(kept, -1).indices
        found = divergence(Answered(None, None, None, count, top, *split_log_probabilities(teacher, top)), other).double()
        if slack:
            assert torch.allclose(found, wanted, atol=slack)
        else:
            assert bool((found <= wanted + 1e-6).all()) and bool((found > 0.3 * wanted).all()), "merging outcomes only lowers it"


def test_the_sensor_is_zero_for_the_teacher_and_the_divergence_for_a_student(world, artefact, student):
    probe = ProbeSet(world[0].probe_folder("tabletop"))
    answered, items = artefact.answers()
    processor = student.processor
    sensor = KLSensor(student, answered, batched(probe.samples(items), processor, 7), 7)
    with adapters_disabled(student):
        assert abs(float(sensor.per_item().abs().max())) < 1e-6
    found = sensor.per_item().double()
    weights = torch.linspace(0.5, 1.5, len(items))
    heavy = KLSensor(student, answered, batched(probe.samples(items), processor, 7), 7, weights)
    assert heavy.measure() == pytest.approx(float((found * weights).mean()), rel=1e-4) != pytest.approx(sensor.measure(), rel=1e-3)
    assert 1e-4 < float(found.mean()) and bool((found > -1e-6).all())
    for row, item in list(enumerate(items))[::4]:  # one prompt at a time, whole vocabulary, the whole model
        batch = encode_prompts(probe.samples([item]), processor)
        with adapters_disabled(student):
            whole = with_own_answers(student, batch, student.answer_tokens)
            tokens = whole.input_ids[:, batch.input_ids.shape[1]:]
            teacher = student.log_probabilities_of_continuation(batch, tokens).double()
        own = student.log_probabilities_of_continuation(batch, tokens).double()
        assert float(found[row]) == pytest.approx(float((teacher.exp() * (teacher - own)).sum(-1).mean()), rel=0.02, abs=1e-5)


def test_the_sensor_agrees_with_evaluation_on_action_prompts(world, student):
    """benchmarks/questions.py computes its retention KL on action tokens by another way; the end of sequence is one token more here."""
    probe = ProbeSet(world[0].probe_folder("tabletop"))
    samples = [s for s in probe.samples(range(len(probe))) if not s.question][:6]
    with adapters_disabled(student):
        own = teacher_answers(student, run_below(student, graded_offline.answered_samples(student, samples, 3), 2), 2)
    assert own.count_N.tolist() == [8] * 6
    found = KLSensor(student, own, batched(samples, student.processor, 3), 3).per_item()
    wanted = action_token_kl(student, samples)
    assert 8 * float(found.mean()) == pytest.approx(7 * float(wanted.mean()), rel=0.05)


def test_artefact_spectra_are_those_of_the_inputs_and_the_probe_is_split(world, artefact):
    storage, make_config = world
    config = make_config(GRADED)
    probe = ProbeSet(storage.probe_folder("tabletop"))
    items = probe.spread(config.probe.size)
    fit, held = graded_offline.split_items(items, probe.kinds(items), 0.2)
    assert not set(fit) & set(held) and sorted(fit + held) == items == probe.spread(48)
    counted, kept = Counter(probe.kinds(items)), Counter(probe.kinds(held))
    assert all(kept[kind] == max(min(4, n // 2), round(0.2 * n)) for kind, n in counted.items())
    assert artefact.answers()[1] == held
    backbone = make_backbone(config.backbone, torch.device("cpu"), storage.cache).eval()
    name = "layers.3.mlp.down_proj"
    linears = {name: select_linears(backbone, "all", ["mlp"])[name]}
    # One item at a time, each with its weight; a moment is a mean over tokens.
    number, moment, tokens = Counter(probe.kinds(fit)), 0.0, 0.0
    for item, kind in zip(fit, probe.kinds(fit)):
        whole, = [w for _, w in graded_offline.answered_samples(backbone, probe.samples([item]), 1)]
        share = int(whole.attention_mask.sum() + backbone.num_patches) / number[kind] ** 0.5
        moment, tokens = moment + share * token_moments(backbone, [whole], linears)[backbone.input_key(name)].double(), tokens + share
    moment = moment / tokens
    one = artefact.spectra()[backbone.input_key(name)]
    vectors = one.vectors.double()
    again = (vectors * one.values.double()) @ vectors.T
    assert float((again - moment).norm() / moment.norm()) < 1e-4
    sensitivity = artefact.sensitivity()
    assert set(sensitivity) == set(select_linears(backbone, "all", ["attention", "mlp"])) and min(sensitivity.values()) > 0
    report = json.loads((artefact.folder / "coverage.json").read_text())["groups"]
    assert report["probe"]["ratio"] == pytest.approx(1.0)
    assert any(group.startswith("held out:") for group in report) and "new:tabletop_corner" in report
    # The energy of a group along the directions, by the moment of its inputs.
    new = graded_offline.new_samples(config, storage, (64, 64))["tabletop_corner"]
    wholes = [w for _, w in graded_offline.answered_samples(backbone, new, 9)]
    other = token_moments(backbone, wholes, linears)[backbone.input_key(name)].double()
    stored = load_file(artefact.folder / "energy.safetensors")[f"new:tabletop_corner/{name}"]
    assert torch.allclose(stored[:-1], (vectors.T @ other @ vectors).diagonal(), rtol=1e-3, atol=1e-6 * float(other.trace()))


@pytest.mark.parametrize("balance, ratio", [(0.0, 3.0), (0.5, 3.0 ** 0.5), (1.0, 1.0)])
def test_kinds_count_by_a_power_of_their_number_up_to_a_limit(balance, ratio):
    config, kinds = Config(), ["often"] * 60 + ["seldom"] * 20
    config.gains.balance = balance
    weights = graded_offline.item_weights(config, kinds)
    assert float(weights[:60].sum() / weights[60:].sum()) == pytest.approx(ratio) and float(weights.mean()) == pytest.approx(1.0)
    config.gains.balance = 1.0
    once = graded_offline.item_weights(config, ["often"] * 199 + ["once"])
    assert float(once[-1] / once[0]) == pytest.approx(10.0 / (200 / 398)), "one item must not be half of everything"


def test_no_item_is_a_large_part_of_what_the_sensor_reads():
    config, kinds = Config(), ["often"] * 99 + ["once"]
    config.gains.balance = 1.0
    weights = graded_offline.sensor_weights(config, kinds)
    assert float(weights[-1] / weights[0]) == pytest.approx(3.0 / (100 / 198)) and float(weights.mean()) == pytest.approx(1.0)
    assert max(graded_offline.sensor_weights(config, ["a", "a", "b"])) < 1.3, "of few items all weigh nearly alike"


def test_rare_kinds_are_held_out_by_several_items():
    kinds = ["often"] * 90 + ["seldom"] * 9 + ["rare"] * 5 + ["pair"] * 2 + ["once"]
    fit, held = graded_offline.split_items(list(range(len(kinds))), kinds, 0.2)
    assert Counter(kinds[i] for i in held) == {"often": 18, "seldom": 4, "rare": 2, "pair": 1} and len(fit) + len(held) == len(kinds)


def test_sensitivity_is_the_squared_gradient_of_the_answers(world):
    """Against torch.autograd on one linear's output, one prompt at a time."""
    storage, _ = world
    backbone = make_backbone(Config().backbone, torch.device("cpu"), storage.cache).eval()
    samples = ProbeSet(storage.probe_folder("tabletop")).samples([0, 5])
    name = "layers.4.mlp.up_proj"
    linears = {name: select_linears(backbone, "all", ["mlp"])[name]}
    pairs = list(graded_offline.answered_samples(backbone, samples, 2))
    found = graded_offline.output_sensitivity(backbone, run_below(backbone, pairs, 4), 4, linears)[name]
    total, tokens = 0.0, 0
    for sample in samples:
        (prompt, whole), = graded_offline.answered_samples(backbone, [sample], 1)
        kept = []
        handle = linears[name].register_forward_hook(lambda m, a, out, kept=kept: kept.append(out.requires_grad_(True)) or out)
        start, length = prompt.input_ids.shape[1], whole.input_ids.shape[1]
        hidden = backbone.run_layers(backbone.embed(whole))
        handle.remove()
        patches = hidden.shape[1] - length
        log_p = torch.log_softmax(backbone.logits(hidden[0, patches + start - 1:patches + length - 1]), -1)
        said = log_p.gather(1, whole.input_ids[0, start:, None]).sum()
        grad = torch.autograd.grad(said, kept[0])[0]
        total, tokens = total + float(grad.square().mean(-1).sum()), tokens + grad.shape[1]
    assert found == pytest.approx(total / tokens, rel=1e-3)


def test_coverage_tells_inputs_like_the_probe_from_others():
    one, _, values = random_spectrum()
    spectra = {"layers.0.x": one}
    like, other = coverage.own_energy(one), torch.cat([values.flip(0), torch.zeros(1)])
    found = coverage.report({"probe": {"layers.0.x": like}, "held out:a": {"layers.0.x": 2 * like}, "keep:b": {"layers.0.x": other},
                             "new:c": {"layers.0.x": like}}, spectra, 1.0)
    assert found["held out:a"]["ratio"] == pytest.approx(2.0) and found["keep:b"]["ratio"] > coverage.NOT_COVERED
    assert [line.split(":")[0] for line in coverage.warnings(found)] == ["keep", "new"]


def test_what_passes_is_the_squared_gain_of_every_direction():
    part = Spectrum(torch.eye(6)[:, :2], torch.tensor([3.0, 1.0]), 0.5)
    assert coverage.own_energy(part).tolist() == [3.0, 1.0, 0.5 * 4] and part.mean == 1.0
    gains = [0.2 / (value + 0.2) for value in (3.0, 1.0, 0.5)]
    energy = torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64)
    assert coverage.passed(energy, part, 0.2, 1.0) == pytest.approx(sum(g * g * e for g, e in zip(gains, (1, 10, 100))))


def test_an_artefact_of_something_else_is_refused(artefact):
    meta = artefact.meta
    good = dict(weights_hash=meta["weights_sha256"], probe_hash=meta["probe_sha256"], probe_size=48, depth=6, dtype="float32",
                section={"columns": 1024, "holdout": 0.2, "balance": 0.5})
    assert artifact.check(artefact, **good) == []
    for key, value in (("weights_hash", "x"), ("probe_hash", "x"), ("probe_size", 9), ("depth", 7), ("dtype", "bfloat16"),
                       ("quantisation", "4bit"), ("section", {"columns": 5, "holdout": 0.2})):
        assert len(artifact.check(artefact, **dict(good, **{key: value}))) == 1, key


def test_moments_without_the_answers_are_what_the_setting_says(world, artefact):
    """The spectra are of the prompts alone, the sensor keeps its answers."""
    storage, make_config = world
    config = make_config(GRADED, "--icsm.tokens_generated", "false", "--gains.name", "without_answers")
    without = artifact.load_artifact(graded_offline.build(config, storage, make_backbone(config.backbone, "cpu", storage.cache)))
    assert without.meta["config"]["tokens_generated"] is False
    assert all(torch.equal(one, other) for one, other in zip(without.answers()[0], artefact.answers()[0]))
    spectra, others = without.spectra(), artefact.spectra()
    assert spectra.keys() == others.keys() and not any(torch.equal(spectra[key].values, others[key].values) for key in spectra)


def test_an_artefact_with_the_answers_is_not_taken_for_one_without(artefact):
    """One that does not say it is older than the choice, and has them."""
    meta = artefact.meta
    assert meta["config"]["tokens_generated"] is True
    older = SimpleNamespace(folder="here", meta=dict(meta, config={"columns": 1024}))
    for one in (artefact, older):
        same = dict(weights_hash=meta["weights_sha256"], probe_hash=meta["probe_sha256"], probe_size=48, depth=6, dtype="float32")
        assert artifact.check(one, **same, section={"tokens_generated": True}) == []
        (line,) = artifact.check(one, **same, section={"tokens_generated": False})
        assert "was made with icsm.tokens_generated True, this run asks for False" in line


def test_another_attention_is_said_and_refuses_nothing(world, artefact, capsys):
    storage, make_config = world
    meta = artefact.meta
    assert (meta["dtype"], meta["quantisation"], meta["attn_implementation"]) == ("float32", "none", "sdpa")
    for attention, told in (("sdpa", False), ("eager", True)):
        config = make_config(GRADED, "--backbone.attn_implementation", attention)
        graded_method.Graded.prepare(config, storage, make_backbone(config.backbone, "cpu", storage.cache))
        assert (f"was made with attn_implementation sdpa, this run uses {attention}" in capsys.readouterr().err) == told


def test_preflight_looks_at_this_methods_artefact(world, artefact, tmp_path):
    from vlakeep import checks

    storage, make_config = world
    model = json.loads((Path(checks.__file__).parent / "assets" / "tabletop-base" / "config.json").read_text())
    config = make_config(GRADED)
    line, = checks.check_artifact(config, storage, model, None, "x.yaml")
    assert line.status == checks.GREEN and line.where == str(artefact.folder)
    config.gains.holdout = 0.3
    line, = checks.check_artifact(config, storage, model, None, "x.yaml")
    assert line.status == checks.RED and "gains.holdout 0.2" in line.where and line.remedy == "vlakeep offline --config x.yaml"
    config.gains.name = "nowhere"
    assert "make it with `vlakeep offline" in checks.check_artifact(config, storage, model, None, "x.yaml")[0].where


# The loop


def law(**changes):
    return SetPoint(**dict(dict(target=0.01, start=1e-3, lowest=1e-6, highest=1.0, steepness=1.0, open_factor=1.5, close_factor=4.0),
                           **changes))


def test_larger_divergence_gives_a_smaller_opening_at_every_moment():
    for history in ([], [0.001], [0.02, 0.008], [0.001, 0.05]):
        openings = []
        for last in torch.logspace(-6, 2, 60).tolist():
            openings.append(replay(law(), [*history, last])[-1]["next_opening"])
        assert all(a >= b for a, b in zip(openings, openings[1:])) and openings[0] > openings[-1]


def test_the_loop_opens_from_closed_meets_its_target_and_does_not_wind_up():
    for response in (2.0, 3.0, 4.0, 6.0, 7.0):
        controller, size, found = SetPointController(law()), 0.0, []
        for k in range(80):
            size += 1.0 if k < 40 else 0.02  # training slows down as its rate falls
            found.append((20 * size ** 0.5 * controller.opening) ** response)
            controller.update(found[-1])
        assert max(found) < 2.0 * 0.01, response
        assert all(abs(d / 0.01 - 1) < 0.1 for d in found[-10:]), response
    stuck = SetPointController(law())
    for _ in range(100):
        stuck.update(0.0)  # nothing is forgotten: the opening goes to its limit and no further
    assert stuck.opening == 1.0
    stuck.update(10.0)
    assert stuck.opening == pytest.approx(0.25), "closing begins at once"


def test_rate_limits_values_that_are_no_numbers_and_state():
    rows = replay(law(), [0.0, 0.0, 100.0])
    assert [row["next_opening"] for row in rows] == pytest.approx([1.5e-3, 2.25e-3, 2.25e-3 / 4])
    controller = SetPointController(law())
    controller.update(0.001)
    before = (controller.opening, controller.before)
    for bad in (math.nan, math.inf, -1.0):
        controller.update(bad)
    assert (controller.opening, controller.before) == before and controller.rejected == 3
    second = SetPointController(law())
    second.load_state_dict(controller.state_dict())
    assert second.update(0.02) == controller.update(0.02)
    for wrong in ({"target": 0.0}, {"start": 2.0}, {"open_factor": 1.0}, {"steepness": 0.0}):
        with pytest.raises(ValueError):
            law(**wrong)


@pytest.mark.parametrize("name, plant", [
    ("smooth", lambda x: 0.013 * x ** 2), ("steep", lambda x: 0.05 * x ** 7), ("below", lambda x: 0.0095 * x ** 2),
    ("a little below", lambda x: 0.0085 * x ** 2), ("one item flips", lambda x: 0.005 * x ** 2 + 0.2 * max(0.0, x - 0.97)),
    ("it jumps", lambda x: 0.004 * x ** 2 + 0.02 * (x > 0.9)), ("far above", lambda x: 3.0 * x ** 2)])
def test_the_end_of_training_settles_just_below_the_target(name, plant):
    asked = []

    def measure(opening):
        asked.append(opening)
        return plant(opening / 1e-3)

    trail = settle(law(), 1e-3, plant(1.0), measure)
    opening, divergence = trail[-1]
    assert divergence == plant(opening / 1e-3) <= 0.01 and opening <= 1.1e-3 and len(asked) <= 8
    assert sorted(trail) == sorted([(1e-3, plant(1.0)), *((r, plant(r / 1e-3)) for r in asked)])
    assert divergence >= 0.009 or name == "it jumps" and opening > 0.85e-3
    assert (asked == []) == (name == "below")


def test_settling_goes_no_further_than_it_may():
    assert settle(law(), 1e-3, 0.0, lambda r: 0.0)[-1] == (pytest.approx(1.1e-3), 0.0), "what is closed is not opened untrained"
    assert settle(law(), 1e-3, math.nan, lambda r: 1 / 0) == [(1e-3, pytest.approx(math.nan, nan_ok=True))]
    trail = settle(law(), 1e-3, 5.0, lambda r: 5.0)  # nothing helps: the smallest opening that was tried
    assert trail[-1][0] == min(r for r, _ in trail) == 1e-6


# The laws


@pytest.fixture(scope="module")
def baseline(world):
    storage, make_config = world
    return run_training(make_config(BASELINE, "--name", "graded-law-baseline"), storage)


def test_all_open_and_measuring_alone_are_the_baseline_bitwise(world, artefact, baseline):
    storage, make_config = world
    # 1e30 eigenvalues: every gain is exactly 1. The sensor measures all the same.
    measured = run_training(make_config(GRADED, "--name", "graded-measured", "--gains.enabled", False), storage)
    assert final_adapter(measured) == final_adapter(baseline) and read_metrics(measured)[-1]["kl"] > 0
    wide = run_training(make_config(GRADED, "--name", "graded-wide", "--gains.opening", 1e30, "--gains.scale", 1.0,
                                    "--thermostat.enabled", False), storage)
    assert final_adapter(wide) == final_adapter(baseline)


def test_resume_is_the_uninterrupted_run_bitwise_and_the_log_replays(world, artefact):
    storage, make_config = world
    arm = [GRADED, "--lora.dropout", 0.1, "--train.schedule", "constant", "--train.lr", 5e-3, "--thermostat.target", 1e-6]
    whole = run_training(make_config(*arm, "--name", "graded-whole"), storage)
    run_training(make_config(*arm, "--name", "graded-part", "--train.steps", 3), storage)
    part = run_training(make_config(*arm, "--name", "graded-part", "--train.resume", True), storage)
    assert final_adapter(part) == final_adapter(whole)
    # The shorter run settled at its end; the longer one goes on as if it had not.
    rows = [[{k: v for k, v in row.items() if k != "seconds" and (not k.startswith("settle") or row["step"] == 6)}
             for row in read_metrics(folder)] for folder in (whole, part)]
    assert rows[0] == rows[1] and rows[0][-1]["step"] == 6
    trained = [row for row in rows[0] if row["step"]]
    assert rows[0][0]["kl"] == 0.0 and len({row["opening"] for row in trained}) > 3
    assert all(row["g_prime_norm"] <= row["g_norm"] * (1 + 1e-6) for row in trained)
    config = make_config(*arm)
    again = replay(SetPoint(target=1e-6, start=trained[0]["opening"], lowest=1e-9, highest=1e3, steepness=config.gains.steepness,
                            open_factor=config.thermostat.open_factor, close_factor=config.thermostat.close_factor),
                   [row["kl"] for row in trained])
    assert [row["next_opening"] for row in again] == [row["next_opening"] for row in trained]
    measured = {rows[0][-1][f"settle/{i}/opening"]: rows[0][-1][f"settle/{i}/kl"] for i in range(8) if f"settle/{i}/kl" in rows[0][-1]}
    measured[rows[0][-1]["settled_opening"]] = rows[0][-1]["settled_kl"]
    final = settle(SetPoint(target=1e-6, start=1e-3, lowest=1e-9, highest=1e3, steepness=config.gains.steepness,
                            open_factor=config.thermostat.open_factor, close_factor=config.thermostat.close_factor),
                   trained[-1]["opening"], trained[-1]["kl"], measured.__getitem__)
    assert final[-1] == (rows[0][-1]["settled_opening"], rows[0][-1]["settled_kl"]) and final[-1][1] <= 1e-6
    assert {"kl_new", "update_norm/0", "open_rank/layers.0.self_attn.q_proj", "shed"} <= set(trained[-1])


def asked_elsewhere_last(law, opening, divergence, measure):
    """Keeps half the opening, and has measured at another one after it."""
    kept = (opening / 2, measure(opening / 2))
    return [(opening, measure(opening)), kept]


@pytest.mark.parametrize("rule", [settle, asked_elsewhere_last])
def test_the_adapter_that_is_left_is_the_one_that_was_measured(world, artefact, rule, monkeypatch):
    """Measured again by a model that loads what the run has saved; with a last step at which the loop did not measure."""
    storage, make_config = world
    name = f"graded-{rule.__name__}"
    config = make_config(GRADED, "--name", name, "--train.lr", 5e-3, "--thermostat.target", 1e-5, "--train.steps", 5,
                         "--thermostat.every", 2, "--evaluate.target", name)
    monkeypatch.setattr(loop, "settle", rule)
    last = read_metrics(run_training(config, storage))[-1]
    assert last["step"] == 5 and "next_opening" not in last
    assert rule is not settle or last["settled_kl"] <= 1e-5
    backbone = load_target(config, storage, "cpu")[0]
    probe, (answered, items) = ProbeSet(storage.probe_folder(config.probe.name)), artefact.answers()
    sensor = KLSensor(backbone, answered, batched(probe.samples(items), backbone.processor, 8), 8)
    count = min(config.thermostat.batch_size, len(items))
    chosen = [i * len(items) // count for i in range(count)]
    each = sensor.per_item()[chosen].double().cpu().tolist()
    kinds = probe.kinds([items[i] for i in chosen])
    # A kind counts like the root of its number, but of so few no item more than the mean.
    roots = [kinds.count(kind) ** -0.5 for kind in kinds]
    weights = [min(1.0, root * count / sum(roots)) for root in roots]
    assert sum(w * d for w, d in zip(weights, each)) / sum(weights) == pytest.approx(last["settled_kl"], rel=1e-3)


def test_two_processes_are_one_with_two_micro_batches_bitwise(world, artefact, tmp_path):
    storage, make_config = world
    one = run_training(make_config(GRADED, "--name", "graded-one", "--train.accumulation", 2), storage)
    forked.run_two_ranks(["train", *SMALL, "--root", storage.root, "--config", GRADED, "--name", "graded-two"], tmp_path)
    assert final_adapter(storage.run_folder("graded-two")) == final_adapter(one)


def test_other_allocations_run_and_differ(world, artefact):
    storage, make_config = world
    found = {final_adapter(run_training(make_config(GRADED, "--name", f"graded-{allocation}", "--gains.allocation", allocation,
                                                    "--train.steps", 3), storage)) for allocation in ("linear", "model", "sensitivity")}
    assert len(found) == 3


def test_the_saved_adapter_is_the_effective_one(world, artefact):
    """What is saved is A_eff: loaded as a plain LoRA it acts as the model that was trained."""
    from safetensors.torch import load

    storage, make_config = world
    run = run_training(make_config(GRADED, "--name", "graded-saved", "--train.lr", 1e-2, "--gains.opening", 0.01,
                                   "--thermostat.enabled", False), storage)
    state = load(final_adapter(run))
    name = "base_model.model.language_model.model.layers.2.mlp.down_proj.lora_A.weight"
    one = artefact.spectra()["layers.2.mlp.down_proj"]
    coordinates = state[name].double() @ one.vectors.double()
    expected = 10.0 * gains(one.values, 0.01 * one.mean, 1.0)
    # A was drawn N(0, 1/16) per entry and moved little: along each direction its size follows the gain.
    size = coordinates.norm(dim=0) / (4 ** 0.5 * 0.25)
    ratio = size / expected
    assert 0.2 < float(ratio.median()) < 5 and float(ratio.log().std()) < 1.0


def test_the_sensitivity_leaves_no_gradients_of_weights(student, world):
    storage, make_config = world
    backbone = make_backbone(Config().backbone, torch.device("cpu"), storage.cache)
    samples = ProbeSet(storage.probe_folder("tabletop")).samples([0, 1])
    linears = select_linears(backbone, "5", ["attention"])
    parts = run_below(backbone, graded_offline.answered_samples(backbone, samples, 2), 4)
    assert all(value > 0 for value in graded_offline.output_sensitivity(backbone, parts, 4, linears).values())
    assert all(p.grad is None for p in backbone.parameters())


def test_what_is_kept_of_the_first_base_is_of_its_weights(world, graded_folder, monkeypatch):
    """gains.of_first: the artefact before any run was merged in, which `vlakeep offline` makes so too."""
    storage, make_config = world
    config = make_config(GRADED, "--gains.of_first", "true", "--gains.name", "of_first", "--train.from_run", "nobody")
    folder = shutil.copytree(graded_folder, storage.artifacts / "of_first")
    backbone = make_backbone("tabletop-base")
    first = backbone.weights_sha256
    backbone.merged(["one"], "0" * 64, first)
    assert backbone.name == "tabletop-base+one" and backbone.first_weights_sha256 == first != backbone.weights_sha256
    assert Graded.prepare(config, storage, backbone)[1]["artifact"]
    meta = json.loads((folder / "meta.json").read_text())
    meta.pop("meta_sha256")  # as those of older versions, which have none
    (folder / "meta.json").write_text(json.dumps({**meta, "weights_sha256": "1" * 64}))
    with pytest.raises(ArtifactError, match="made for other base weights"):
        Graded.prepare(config, storage, backbone)
    told = SimpleNamespace(divides_offline=False, offline=lambda config, storage, backbone: backbone.name)
    monkeypatch.setattr("vlakeep.offline.method_class", lambda name: told)
    assert run_offline(config, storage) == Path("tabletop-base")


def test_data_that_are_not_there_do_not_hide_an_artefact_that_does_not_fit(world, graded_folder):
    storage, make_config = world
    with pytest.raises(ValueError, match=r"(?s)no_such_data.*made for another number of probe items \(48, this run has 40\)"):
        run_training(make_config(GRADED, "--name", "twice-wrong", "--data.datasets", "[no_such_data]", "--probe.size", 40), storage)


def test_both_sensors_of_the_loop_are_given_the_types_of_training(world, graded_folder, monkeypatch):
    storage, make_config = world
    given = []
    monkeypatch.setattr(graded_method, "KLSensor", lambda *args, **named: given.append((*args, *named.values())))
    for name in ("run_below", "teacher_answers"):
        monkeypatch.setattr(graded_method, name, lambda *args: None)
    backbone = make_backbone("tabletop-base")
    method, _ = Graded.prepare(make_config(GRADED, "--train.autocast", "bfloat16"), storage, backbone)
    attach_lora(backbone, target_modules(backbone, "last:1", ["attention"]), 2, 2.0)
    method._make_sensors(backbone)
    assert [one[-1] for one in given] == ["bfloat16", "bfloat16"]
