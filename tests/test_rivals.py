"""Rival methods: each formula against an independent reference, a published property, or the library that it comes from; on small cases."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from toy_model import Toy, make_folder

from vlakeep import interpolate
from vlakeep.core.checkpoint import latest_intact, load_checkpoint, save_checkpoint
from vlakeep.core.compat import import_timm
from vlakeep.core.config import load_config, to_dict
from vlakeep.core.registry import method_class, method_names
from vlakeep.core.schema import SHIPPED
from vlakeep.core.storage import Storage
from vlakeep.data.sample import IGNORE_INDEX
from vlakeep.hsw import placed, rules
from vlakeep.hsw.placed import FixedGains, PlacedSite
from vlakeep.hsw.rules import Start
from vlakeep.methods import consft, measured, subspace
from vlakeep.methods.l2_sp import distance
from vlakeep.methods.maps import MAPS
from vlakeep.methods.measured import Measured, factors
from vlakeep.methods.self_replay import hard
from vlakeep.models.adapters import attach_lora, merged_state
from vlakeep.teacher import fisher
from vlakeep.teacher.answers import Answered, divergence, run_below
from vlakeep.teacher.collect import token_moments, with_own_answers
from vlakeep.teacher.spectrum import spectrum

D, OUT, R = 24, 10, 4
import_timm()  # before peft: what transformers imports needs torchvision to load


@pytest.fixture
def inputs():
    """(old inputs [T, D], new inputs [T, D], W [OUT, D], G [OUT, D]), float64; old energy falls along a rotated axis."""
    generator = torch.Generator().manual_seed(1)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    mixing_DD = torch.linalg.qr(normal(D, D))[0]
    return (normal(400, D) * torch.logspace(0, -2, D, dtype=torch.float64)) @ mixing_DD, normal(300, D), normal(OUT, D), normal(OUT, D)


def moment(x_TD):
    return x_TD.T @ x_TD / len(x_TD)


def test_gpm_is_the_projection_of_the_reference(inputs):
    """The paper's loop: fewest left singular vectors of the representation whose squared values reach the threshold; G - G U U^T."""
    old_TD, _, _, G_OD = inputs
    U, S, _ = torch.linalg.svd(old_TD.T, full_matrices=False)
    share = S.square() / S.square().sum()
    count = int((share.cumsum(0) < 0.9).sum()) + 1
    found = spectrum(moment(old_TD), 1024)
    gains = FixedGains(found.vectors, rules.gpm(found.values, subspace.trace(found), 0.9), 1.0, torch.device("cpu"))
    wanted = G_OD - G_OD @ U[:, :count] @ U[:, :count].T
    assert torch.allclose(gains.apply(G_OD.float()).double(), wanted, atol=1e-5)
    assert int((gains.gains_K == 0).sum()) == count < D
    assert rules.leading_count(torch.tensor([3.0, 1.0]), 4.0, 0.75) == 1, "reached exactly"


def test_sgp_scales_by_importance_and_is_gpm_when_all_are_equal(inputs):
    """importance = (a + 1) s / (a s + max s) of the singular values, as the authors' code has it."""
    old_TD, _, _, G_OD = inputs
    U, S, _ = torch.linalg.svd(old_TD.T, full_matrices=False)
    count = int(((S.square() / S.square().sum()).cumsum(0) < 0.9).sum()) + 1
    importance = (10 + 1) * S[:count] / (10 * S[:count] + S[:count].max())
    found = spectrum(moment(old_TD), 1024)
    gains = FixedGains(found.vectors, rules.sgp(found.values, subspace.trace(found), 0.9, 10.0), 1.0, torch.device("cpu"))
    wanted = G_OD - G_OD @ U[:, :count] @ torch.diag(importance) @ U[:, :count].T
    assert torch.allclose(gains.apply(G_OD.float()).double(), wanted, atol=1e-5)
    equal = torch.full((5,), 2.0)
    assert torch.equal(rules.sgp(equal, 10.0, 0.6, 10.0), rules.gpm(equal, 10.0, 0.6))


def test_adam_nscl_is_the_null_space_projector_over_its_norm(inputs):
    old_TD, _, _, G_OD = inputs
    C = moment(old_TD)
    values, vectors = torch.linalg.eigh(C)
    U2 = vectors[:, values <= 10 * values.min()]
    projector = U2 @ U2.T
    found = spectrum(C, 1024)
    g_K, share = rules.adam_nscl(found.values, 10.0)
    gains = FixedGains(found.vectors, g_K, 0.0, torch.device("cpu"))
    assert 1 < U2.shape[1] < D
    assert torch.allclose(gains.apply(G_OD.float()).double(), G_OD @ projector / projector.norm(), atol=1e-5)
    assert share == pytest.approx(float((values[values <= 10 * values.min()]).sum() / values.sum()), rel=1e-4)


def test_owm_is_the_recursive_projector_of_the_paper(inputs):
    """P <- P - k x^T P with k = P x / (alpha + x^T P x), one old input after the other (Zeng et al., equation 2)."""
    old_TD = inputs[0][:60]
    P, alpha = torch.eye(D, dtype=torch.float64), 0.3
    for x in old_TD:
        k = P @ x / (alpha + x @ P @ x)
        P = P - torch.outer(k, x @ P)
    found = spectrum(old_TD.T @ old_TD, 1024)
    gains = FixedGains(found.vectors, rules.owm(found.values, alpha), 1.0, torch.device("cpu"))
    assert torch.allclose(gains.apply(torch.eye(D)).double(), P, atol=1e-4)


def test_directions_that_are_not_stored_have_the_gain_of_the_rest(inputs):
    old_TD = inputs[0]
    whole, part = spectrum(moment(old_TD), 1024), spectrum(moment(old_TD), 6)
    g_K = torch.linspace(0, 0.5, 6, dtype=torch.float64)
    x = inputs[3].float()
    wanted = 0.7 * (x - (x @ part.vectors) @ part.vectors.T) + (x @ part.vectors * g_K.float()) @ part.vectors.T
    dense = FixedGains(part.vectors, g_K, 0.7, torch.device("cpu"))
    assert torch.allclose(dense.apply(x), wanted, atol=1e-5)
    dense._matrix_DD = None
    assert torch.allclose(dense.apply(x), wanted, atol=1e-5)
    assert torch.allclose(subspace.moment(whole, torch.device("cpu")).double(), moment(old_TD), atol=1e-5)
    assert subspace.trace(part) == pytest.approx(float(moment(old_TD).trace()), rel=1e-4)
    with pytest.raises(subspace.ArtifactError, match=f"--gains.columns {D}"):
        subspace.whole("layers.0.q", part)


def test_inflora_follows_the_authors_steps(inputs):
    """Their design of A: the new inputs' covariance, minus what the old feature space holds of it, then the left singular vectors."""
    old_TD, new_TD, _, _ = inputs
    P = torch.linalg.svd(old_TD.T)[0][:, :8]
    cur = moment(new_TD)
    projected = cur - P @ P.T @ cur
    wanted = torch.linalg.svd(projected @ projected.T)[0][:, :R] / 3 ** 0.5
    found = rules.inflora(moment(new_TD), P, R)
    assert found.B is None and float((found.A.double() @ P).abs().max()) < 1e-6, "old inputs are not seen"
    assert torch.allclose(found.A @ found.A.T, torch.eye(R) / 3, atol=1e-6)
    # (I - P) C and (I - P) C (I - P) lean differently inside the free space; both hold the new inputs' free energy to a few percent.
    def energy(A_RD):
        return float((A_RD.double() @ cur @ A_RD.double().T).trace())
    assert energy(found.A) >= 0.97 * energy(wanted.T)
    everything = torch.linalg.eigh(projected @ (torch.eye(D).double() - P @ P.T))
    assert energy(found.A) == pytest.approx(float(everything[0].real[-R:].sum()) / 3, rel=1e-5)


def test_keeplora_takes_the_gradient_that_neither_old_inputs_nor_weights_use(inputs):
    old_TD, _, W, G = inputs
    old = torch.linalg.svd(old_TD.T)[0][:, :6]
    found = rules.keeplora(G, W, old, 0.3, R).A.double()
    values, right = torch.linalg.svd(W)[1:]
    count = int(((values.square() / values.square().sum()).cumsum(0) < 0.3).sum()) + 1
    both = torch.linalg.qr(torch.cat([old, right[:count].T], 1))[0]
    wanted = torch.linalg.svd(G @ (torch.eye(D) - both @ both.T))[2][:R]
    assert torch.allclose(found.T @ found, wanted.T @ wanted, atol=1e-5)
    assert float((found @ both).abs().max()) < 1e-6
    # The same basis twice must not count twice.
    twice = rules.keeplora(G, W, torch.cat([old, old], 1), 0.3, R).A.double()
    assert torch.allclose(twice.T @ twice, found.T @ found, atol=1e-5)


def test_lora_null_takes_out_what_old_inputs_do_not_use(inputs):
    old_TD, _, W, _ = inputs
    null = torch.linalg.eigh(moment(old_TD))[1][:, :R]
    A, B = rules.lora_null(W, null, 0.5)
    assert torch.allclose(0.5 * (B @ A).double(), W @ null @ null.T, atol=1e-5)
    part = (W @ null @ null.T @ old_TD.T).norm() / (W @ old_TD.T).norm()
    assert part < 0.05, "old outputs are those of the rest"
    assert torch.allclose(A.norm(dim=1), B.norm(dim=0), atol=1e-5), "halved"


def test_frozen_lora_null_trains_as_if_its_start_were_in_b(inputs):
    """v2: with A frozen the course of dW is the same whether B begins at B0 and B0 A0 is taken out of W, or at zero."""
    old_TD, new_TD, W, G = (one.float() for one in inputs)
    A, B0 = rules.lora_null(W, torch.linalg.eigh(moment(old_TD))[1][:, :R], 1.0)
    target = new_TD @ (W + G).T

    def course(start, base):
        B, size = start.clone().requires_grad_(True), 0
        for _ in range(20):
            grad = torch.autograd.grad((new_TD @ (base + B @ A).T - target).square().mean(), B)[0]
            size = 0.9 * size + 0.1 * grad.square()  # steps of RMSprop: as with Adam they do not follow the gradient's length
            B = (B - 1e-2 * grad / (size.sqrt() + 1e-8)).detach().requires_grad_(True)
        return (base + B @ A - W).detach()

    assert torch.allclose(course(B0, W - B0 @ A), course(torch.zeros_like(B0), W), atol=1e-4)


def test_sc_lora_is_a_subspace_that_rewards_new_and_punishes_old_outputs(inputs):
    """Its reward (1 - beta) E|Q^T y_new|^2 - beta E|Q^T y_old|^2 is the largest that R directions can have."""
    old_TD, new_TD, W, _ = inputs
    A, B = rules.sc_lora(W, moment(new_TD), moment(old_TD), 0.7, R, 0.5)
    new, old, Q = new_TD @ W.T, old_TD @ W.T, B.double()

    def reward(Q):
        return float(0.3 * (new @ Q).square().sum(1).mean() - 0.7 * (old @ Q).square().sum(1).mean())

    contrast = 0.3 * new.T @ new / len(new) - 0.7 * old.T @ old / len(old)
    assert reward(Q) == pytest.approx(float(torch.linalg.eigvalsh(contrast)[-R:].sum()), rel=1e-4)
    assert torch.allclose(0.5 * (B @ A).double(), Q @ Q.T @ W, atol=1e-5) and torch.allclose(Q.T @ Q, torch.eye(R).double(), atol=1e-5)


needs_corda = pytest.mark.skipif(bool(subspace.too_old("0.15")), reason="peft has no CorDA")


@needs_corda
def test_corda_is_what_peft_initialises_by_itself(inputs):
    """The library's whole way, from its own collection of the covariance to the adapter, on one linear."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    old_TD, _, W, _ = (one.float() for one in inputs)
    model = torch.nn.Sequential(torch.nn.Linear(D, OUT, bias=False))
    model[0].weight.data = W.clone()
    config = LoraConfig(r=R, lora_alpha=2 * R, target_modules=["0"], init_lora_weights="corda",
                        corda_config=CordaConfig(corda_method="kpm"))
    preprocess_corda(model, config, run_model=lambda: model(old_TD))
    layer = get_peft_model(model, config).base_model.model[0]
    A, B = rules.corda(W, moment(old_TD), R, 2.0)
    theirs = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    assert torch.allclose(B @ A, theirs, atol=1e-3 * float(theirs.detach().abs().max()))
    assert torch.allclose(layer.base_layer.weight, W - 2.0 * B @ A, atol=1e-4)


@pytest.mark.skipif(bool(subspace.too_old("0.14")), reason="peft has no EVA")
def test_eva_is_what_peft_finds(inputs):
    from peft import LoraConfig, get_eva_state_dict, get_peft_model
    from peft.tuners.lora.config import EvaConfig

    new_TD = inputs[1].float() * torch.linspace(3, 0.1, D)
    model = torch.nn.Sequential(torch.nn.Linear(D, OUT, bias=False))
    config = LoraConfig(r=R, target_modules=["0"], init_lora_weights="eva", eva_config=EvaConfig(rho=1.0))
    batches = list(new_TD.split(100))
    state = get_eva_state_dict(get_peft_model(model, config), batches, forward_fn=lambda m, x: m(x), prepare_model_inputs_fn=None,
                               prepare_layer_inputs_fn=lambda layer, inputs, name: layer[0], show_progress_bar=False)
    mine = rules.Components(R)
    for batch in batches * 2:
        mine.add(batch)
    wanted = next(iter(state.values()))
    overlap = torch.linalg.svdvals(mine.start().A @ wanted.T.float())
    assert float(overlap.min()) > 0.98, "the same span; the library stops at a batch of its own choice"


def lora(seed=0, rank=R):
    """A PEFT-like layer: W x + scale B A x, B not zero."""
    generator = torch.Generator().manual_seed(seed)
    layer = torch.nn.Module()
    layer.lora_A = torch.nn.ModuleDict({"default": torch.nn.Linear(D, rank, bias=False)})
    layer.lora_B = torch.nn.ModuleDict({"default": torch.nn.Linear(rank, OUT, bias=False)})
    layer.scaling = {"default": 0.5}
    with torch.no_grad():
        for part in (layer.lora_A, layer.lora_B):
            part["default"].weight.copy_(torch.randn(part["default"].weight.shape, generator=generator))
    return layer


def delta(layer):
    A, B, scale = factors(layer)
    return scale * B @ A


def test_what_is_taken_out_begins_at_nothing_and_trains_half_of_the_rank():
    generator = torch.Generator().manual_seed(0)
    layer, start = lora(rank=2 * R), Start(torch.randn(R, D, generator=generator), torch.randn(OUT, R, generator=generator))
    site = PlacedSite({"one": layer}, {}, {"one": start}, freeze=False)
    assert float(delta(layer).detach().abs().max()) < 1e-5
    delta(layer).square().sum().backward()
    x = torch.randn(7, D, generator=generator)
    (x @ delta(layer).T - 1.0).square().sum().backward()
    raw_A = layer.lora_A["default"].parametrizations.weight.original
    raw_B = layer.lora_B["default"].parametrizations.weight.original
    assert float(raw_A.grad[R:].abs().max()) == 0.0 == float(raw_B.grad[:, R:].abs().max()) and float(raw_A.grad[:R].abs().max()) > 0
    with torch.no_grad():
        raw_A -= 0.1 * raw_A.grad
        raw_B -= 0.1 * raw_B.grad
    wanted = 0.5 * (raw_B[:, :R] @ raw_A[:R] - start.B @ start.A)
    assert torch.allclose(delta(layer), wanted, atol=1e-4)
    # A checkpoint brings back what is not trained.
    state = {name: [one.clone() for one in own] for name, own in site.state_dict().items()}
    for one in site.state_dict()["one"]:
        one.zero_()
    assert not torch.allclose(delta(layer), wanted, atol=1e-2)
    site.load_state_dict(state)
    assert torch.allclose(delta(layer), wanted, atol=1e-4)
    with pytest.raises(ValueError, match="resume with the method"):
        site.load_state_dict({})
    site.detach()
    assert torch.allclose(delta(layer), wanted, atol=1e-4) and not torch.nn.utils.parametrize.is_parametrized(layer.lora_A["default"])


def test_a_frozen_start_behind_gains_stays_and_is_exported_closed():
    layer, start = lora(), Start(torch.eye(R, D))
    gains = FixedGains(torch.eye(D)[:, :2], torch.zeros(2), 1.0, torch.device("cpu"))
    site = PlacedSite({"one": layer}, {"one": gains}, {"one": start}, freeze=True)
    assert [p.requires_grad for p in layer.parameters()].count(False) == 1
    delta(layer).sum().backward()
    assert layer.lora_B["default"].weight.grad is not None
    site.detach()
    assert torch.equal(layer.lora_A["default"].weight.detach(), torch.eye(R, D).index_fill(1, torch.tensor([0, 1]), 0.0))
    assert all(p.requires_grad for p in layer.parameters())


def test_the_distance_of_l2_sp_is_that_of_the_product():
    layer = lora()
    assert float(distance(*factors(layer)).detach()) == pytest.approx(float(delta(layer).detach().square().sum()), rel=1e-5)


def test_maps_falls_linearly_from_the_input_to_the_output():
    method = object.__new__(MAPS)
    method._prefix = "lm.layers."
    names = ["vision.layers.9.q", "projector.fc1", "lm.layers.0.q", "lm.layers.0.k", "lm.layers.1.q", "lm.layers.2.q", "lm.head"]
    found = method.weights_of(names)
    assert [found[name] for name in names] == [1.0, 1.0, 0.75, 0.75, 0.5, 0.25, 0.0]
    assert method.weights_of(["lm.layers.3.q"]) == {"lm.layers.3.q": 1.0}


def test_consft_is_the_gradient_of_the_weighed_losses():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 7, generator=generator, requires_grad=True)
    labels = torch.randint(0, 7, (3, 5), generator=generator)
    labels[0, :3] = IGNORE_INDEX
    log_p = torch.log_softmax(logits.detach(), -1)
    losses = [torch.stack([-log_p[b, t, labels[b, t]] for t in range(5) if labels[b, t] != IGNORE_INDEX]).mean() for b in range(3)]
    assert torch.allclose(consft.confidence(logits, labels), torch.exp(-torch.stack(losses)), atol=1e-6)

    def per_row(x):
        return torch.nn.functional.cross_entropy(x.transpose(1, 2), labels, ignore_index=IGNORE_INDEX, reduction="none").sum(1)

    weighed = consft.weigh(logits, labels, 0.5)
    assert torch.equal(weighed, logits)
    per_row(weighed).sum().backward()
    other = logits.detach().clone().requires_grad_(True)
    (torch.exp(-0.5 * torch.stack(losses)) * per_row(other)).sum().backward()
    assert torch.allclose(logits.grad, other.grad, atol=1e-6)


def test_the_divergence_from_a_hard_answer_is_its_cross_entropy():
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(0, 9, (2, 6), generator=generator)
    start, count = torch.tensor([2, 3]), torch.tensor([3, 2])
    soft = Answered(text, torch.ones(2, 6, dtype=torch.bool), start, count, torch.zeros(2, 3, 4, dtype=torch.int64),
                    torch.zeros(2, 3, 4), torch.zeros(2, 3))
    logits = torch.randn(2, 3, 9, generator=generator, requires_grad=True)
    found = divergence(hard(soft), logits)
    log_p = torch.log_softmax(logits, -1)
    wanted = [-torch.stack([log_p[b, t, text[b, start[b] + t]] for t in range(count[b])]).mean() for b in range(2)]
    assert torch.allclose(found, torch.stack(wanted), atol=1e-6)
    found.sum().backward()
    assert torch.isfinite(logits.grad).all()


# On a model of four layers with random weights


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    from vlakeep.core.config import BackboneConfig

    folder = make_folder(tmp_path_factory.mktemp("toy"), depth=2, width=16)
    backbone = Toy.load(BackboneConfig(), folder, "cpu")
    attach_lora(backbone, backbone.linear_names([1], ["attention", "mlp"]), R, 2 * R, seed=3)
    return backbone


def samples(backbone, count=3):
    import numpy as np
    rng = np.random.default_rng(0)
    blank = backbone.processor.spec.blank(0, backbone.processor.picture_size, "open the red door")
    texts = ["open the red door", "close the blue box", "what is it", "open it"]
    from dataclasses import replace
    return [replace(blank, instruction=text, action=rng.uniform(-1, 1, (2, 3)), state=rng.normal(size=2).astype("float32"),
                    dataset="toy_data").with_pictures(lambda picture: rng.integers(0, 256, picture.shape, dtype=np.uint8))
            for text in texts[:count]]


def test_gradients_of_the_new_task_are_those_of_the_frozen_weights(toy):
    batches = [toy.processor.encode_batch(samples(toy)), toy.processor.encode_batch(samples(toy, 2))]
    linears = toy.adapted_linears()
    found = fisher.weight_gradients(toy, batches, linears)
    base = [linear.get_base_layer().weight.requires_grad_(True) for linear in linears.values()]
    sums = [torch.zeros_like(w) for w in base]
    for batch in batches:
        for total, grad in zip(sums, torch.autograd.grad(toy(batch).loss, base)):
            total += grad / 2
    for w in base:
        w.requires_grad_(False)
    for name, wanted in zip(linears, sums):
        assert torch.allclose(found[name], wanted, atol=1e-5 * float(wanted.abs().max())), name
    assert all(p.grad is None for p in toy.parameters()) and not any(m._forward_hooks for m in toy.modules())


def test_fisher_information_is_that_of_single_items(toy):
    """The diagonal against autograd, item by item; K-FAC's factor, with the inputs' moment, as the same where one token is seen."""
    few, linears = samples(toy, 4), toy.adapted_linears()

    def answered(some):
        prompts = toy.processor.encode_prompts(some)
        return prompts, with_own_answers(toy, prompts, 3)

    pairs, first = [answered([one]) for one in few], toy.first_adapted_layer()
    parts = run_below(toy, [answered(few[:3]), answered(few[3:])], first)  # of several items, with padding
    weights = torch.tensor([1.0, 0.5, 1.5, 1.0]).double()
    found = fisher.fisher_diagonal(toy, parts, first, linears, weights)
    base = {name: linear.get_base_layer().weight.requires_grad_(True) for name, linear in linears.items()}
    wanted = {name: 0 for name in linears}
    outputs = {name: 0 for name in linears}
    for weight, (prompts, whole) in zip(weights.tolist(), pairs):
        start = int(prompts.attention_mask.sum())
        tokens = whole.input_ids[:, start:]
        prefix = toy.embed(whole)
        kept, handles = {}, []
        for name, linear in linears.items():
            handles.append(linear.register_forward_hook(lambda m, a, out, name=name, kept=kept: kept.__setitem__(name, out)))
        hidden = toy.run_layers(prefix)
        columns = toy.text_columns(prefix, whole.input_ids.shape[1])[start:] - 1
        log_p = torch.log_softmax(toy.logits(hidden[0, columns]), -1).gather(-1, tokens[0][:, None]).sum()
        grads = torch.autograd.grad(log_p, [*base.values(), *kept.values()])
        for name, grad, out in zip(base, grads[:len(base)], grads[len(base):]):
            wanted[name] = wanted[name] + weight * grad.square() / 4
            outputs[name] = outputs[name] + weight * out[0].T @ out[0] / 4
        for handle in handles:
            handle.remove()
    for w in base.values():
        w.requires_grad_(False)
    factor = fisher.output_fisher(toy, parts, first, linears, weights)
    for name in linears:
        assert torch.allclose(found[name], wanted[name], atol=1e-5 * float(wanted[name].max())), name
        assert torch.allclose(factor[name], outputs[name], atol=1e-5 * float(outputs[name].abs().max())), name


def test_kfac_is_the_quadratic_form_of_the_kronecker_product(inputs):
    """tr(F dW C dW^T) = vec(dW)^T (C x F) vec(dW), columns stacked; of one softmax linear it is the divergence."""
    layer, C = lora(), moment(inputs[0]).float()
    A, B, scale = factors(layer)
    F = moment(torch.randn(50, OUT, generator=torch.Generator().manual_seed(0)))
    vec = (B @ A).T.flatten()
    assert float(fisher.kfac_energy(A, B, C, F)) == pytest.approx(float(vec @ torch.kron(C, F) @ vec), rel=1e-4)
    W, x = inputs[2].float(), inputs[0][0].float()
    p = torch.softmax(W @ x, 0)
    exact = torch.diag(p) - torch.outer(p, p)  # E_y[d d^T] of one token
    dW = 1e-2 * delta(layer)
    kl = float((p * (torch.log_softmax(W @ x, 0) - torch.log_softmax((W + dW) @ x, 0))).double().sum())
    A, B, scale = factors(layer)
    assert 0.5 * 1e-4 * scale ** 2 * float(fisher.kfac_energy(A, B, torch.outer(x, x), exact)) == pytest.approx(kl, rel=0.05)


SUBSPACES = {"gpm": [], "sgp": [], "adam_nscl": [], "owm": [], "inflora": [], "keeplora": [], "lora_null": [],
             "lora_null v1": ["--options.freeze", "false"], "sc_lora": [], "corda": [], "eva": []}


@pytest.fixture(scope="module")
def seen(toy):
    """What the offline step leaves, and batches of the new task."""
    batches = [toy.processor.encode_batch(samples(toy, 4))] * 2
    linears = toy.adapted_linears()
    moments = token_moments(toy, batches, linears)
    return SimpleNamespace(spectra=lambda: {key: spectrum(one, 1024) for key, one in moments.items()}, folder="artefact"), batches


@pytest.mark.parametrize("case", SUBSPACES)
def test_methods_at_the_input_begin_as_the_base_and_move_where_they_may(toy, seen, case, monkeypatch):
    """From the registry through the statistics of a model to its adapters: at the start the function is the base's, then what is frozen
    stays, what is taken out comes back, and a switched-off one leaves no trace."""
    name = case.split()[0]
    if subspace.too_old(method_class(name).peft_since):
        pytest.skip("peft is too old")
    artifact, batches = seen
    kind = method_class(name)
    monkeypatch.setattr(subspace, "training_batches", lambda *args: batches)
    config = load_config(None, ["--method", name, "--lora.rank", str(R), "--thermostat.enabled", "false", *SUBSPACES[case]])
    method = kind(config, artifact, None)
    before = {key: value.clone() for key, value in toy.state_dict().items()}
    method._look(None, toy)
    method.attach(toy)
    try:
        moved = begins_and_moves(toy, batches[0])
        if case in ("gpm", "inflora"):
            one = artifact.spectra()["layers.1.look.ask"]
            count = rules.leading_count(one.values, subspace.trace(one), method._options.energy)
            change = moved["trunk.layers.1.look.ask.weight"] - before["model.base_model.model.trunk.layers.1.look.ask.base_layer.weight"]
            assert count < 16 and float((change @ one.vectors[:, :count]).norm()) < 1e-4 * float(change.norm()), "old inputs see it"
        method.detach()
        assert all(torch.allclose(merged_state(toy)[key], moved[key], atol=1e-6) for key in moved), "what acted is what is left"
    finally:
        method.detach()
        toy.load_state_dict(before)
        toy.zero_grad()


def begins_and_moves(toy, batch):
    """The merged weights after a step of gradient descent, of a method that has just been attached."""
    base = {name: layer.get_base_layer().weight for name, layer in toy.adapted_linears().items()}
    start = merged_state(toy)
    assert all(torch.allclose(start[f"trunk.{name}.weight"], weight, atol=1e-5) for name, weight in base.items())
    trainable = [p for p in toy.parameters() if p.requires_grad]
    toy(batch).loss.backward()
    with torch.no_grad():
        for p in trainable:
            assert p.grad is not None
            p -= 0.5 * p.grad
    moved = merged_state(toy)
    assert any(not torch.allclose(moved[key], start[key], atol=1e-6) for key in moved)
    return moved


def test_interpolation_makes_a_run_of_every_strength(tmp_path):
    """WiSE-FT: base + alpha dW to the bit of a float product, a range of it from one run; and RETAIN's choice of modules."""
    config = load_config(None, ["--root", str(tmp_path), "--export.target", "group/one"])
    storage = Storage.from_config(config)
    run = storage.run_folder("group/one")
    generator = torch.Generator().manual_seed(0)
    state = {f"base_model.model.layers.0.{leaf}.lora_{part}.weight": torch.randn(3, 3, generator=generator)
             for leaf in ("q_proj", "up_proj") for part in "AB"}

    def adapter(folder):
        (folder / "adapter").mkdir()
        save_file(state, str(folder / "adapter" / interpolate.WEIGHTS))
        (folder / "adapter" / "adapter_config.json").write_text("{}")

    save_checkpoint(run, 7, {}, {"step": 7, "base_weights": "abc"}, adapter)
    (run / "config.yaml").write_text("method: baseline\n")
    found = interpolate.run_interpolation(config, storage, [0.25, 1.0])
    assert [folder.relative_to(storage.runs).as_posix() for folder in found] == ["group/one-alpha-0.25", "group/one-alpha-1"]
    for alpha, folder in zip((0.25, 1.0), found):
        checkpoint = latest_intact(folder)
        mine = load_file(str(checkpoint / "adapter" / interpolate.WEIGHTS))
        assert checkpoint.name == "step_000007" and load_checkpoint(checkpoint)[1] == {"step": 7, "base_weights": "abc"}
        assert all(torch.equal(mine[name], one * (alpha if "lora_B" in name else 1)) for name, one in state.items())
        assert json.loads((folder / "interpolation.json").read_text())["alpha"] == alpha and (folder / "config.yaml").is_file()
        assert (checkpoint / "adapter" / "adapter_config.json").is_file()
    part = interpolate.weakened(state, 0.5, ["q_proj"])
    changed = [name for name in state if not torch.equal(part[name], state[name])]
    assert changed == ["base_model.model.layers.0.q_proj.lora_B.weight"]
    with pytest.raises(ValueError, match="--modules k_proj: the adapter is on q_proj, up_proj"):
        interpolate.weakened(state, 0.5, ["k_proj"])
    with pytest.raises(FileExistsError, match="--export.overwrite true"):
        interpolate.run_interpolation(config, storage, [0.25])
    (storage.run_folder("group/one-alpha-0.5")).mkdir()
    with pytest.raises(FileExistsError, match="is no interpolation"):
        interpolate.run_interpolation(config, storage, [0.5])


def test_configurations_of_rivals_differ_from_plain_lora_in_what_they_are():
    """The same budget: every key but those that make the arm is the baseline's."""
    plain = to_dict(load_config("configs/baseline_lora.yaml"))
    files = sorted((SHIPPED / "rivals").glob("*.yaml"))
    own = {"low_lr": {"train.lr"}, "early_stopping": {"train.save_every", "train.keep_last", "train.schedule"},
           "weight_decay": {"train.weight_decay"}, **dict.fromkeys(["attention_only", "gate_up", "mlp_only"], {"lora.modules"}),
           **dict.fromkeys(["sc_lora", "corda"], {"lora.rank", "lora.alpha"}), "self_replay": {"gains.enabled"}}
    measured = {"thermostat.every", "thermostat.batch_size"}
    for file in files:
        config = to_dict(load_config(f"configs/rivals/{file.name}"))
        changed = {f"{section}.{key}" for section, keys in config.items() if isinstance(keys, dict) and section != "options"
                   for key, value in keys.items() if value != plain[section][key]}
        method = config["method"] != "baseline"
        assert changed == own.get(file.stem, set()) | (measured if method else set()), file.name
        assert config["name"] == file.stem and (not method or config["method"] == file.stem)
        assert config["lora"]["rank"] == config["lora"]["alpha"]
    methods = {name for name in method_names() if issubclass(method_class(name), Measured)} | {"self_replay"}
    assert methods <= {file.stem for file in files}


def test_options_and_versions_are_told(monkeypatch):
    from vlakeep.core.config import ConfigError
    wrong = [("gpm", "energy", "0.0"), ("sgp", "a", "-1.0"), ("adam_nscl", "a", "0.5"), ("owm", "alpha", "0.0"), ("sc_lora", "beta", "2.0"),
             ("keeplora", "weight_energy", "0.0"), ("inflora", "frames", "0"), ("l2_sp", "strength", "-1.0"), ("ewc", "items", "0"),
             ("consft", "sharpness", "-1.0"), ("replay", "datasets", "''"), ("owm", "alpha", ".inf"), ("ewc", "strength", ".nan")]
    for name, option, value in wrong:
        with pytest.raises(ConfigError, match=rf"--options\.{option}"):
            load_config(None, ["--method", name, f"--options.{option}", value] if name != "replay" else ["--method", name])
    with pytest.raises(ConfigError, match="--lora.rank 5: must be even with --method corda"):
        load_config(None, ["--method", "corda", "--lora.rank", "5"])
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.11.1")
    found = method_class("corda").check_model(load_config(None, ["--method", "corda"]), 2, 16)
    assert found[0].severe and "peft 0.11.1 is installed" in found[0].where and found[0].remedy.startswith("pip install 'peft>=0.15'")
    assert method_class("gpm").check_model(load_config(None, ["--method", "gpm"]), 2, 16) == []


@needs_corda
def test_what_peft_imports_and_does_not_ask_for_is_named(monkeypatch):
    monkeypatch.setattr(subspace, "find_spec", lambda module: None)
    assert method_class("corda").lacking("corda") == ("peft imports attrs for method corda, which is not installed", "pip install attrs")
    assert method_class("eva").lacking("eva") == ("", "")


# What a class makes of its formula: factors, the gain of what is not stored, which moment goes where, what is frozen


def of_class(name, *given):
    """A method with its options and nothing else."""
    kind = method_class(name)
    method = object.__new__(kind)
    method._options, method._config = kind.options(load_config(None, ["--method", name, "--lora.rank", str(R), *given])), None
    return method


def test_penalties_are_half_the_strength_times_the_squares_of_the_update():
    layers = {f"layers.{i}.q": lora(i) for i in range(3)}
    generator = torch.Generator().manual_seed(5)
    fisher_OD, F, C = torch.rand(OUT, D, generator=generator), moment(torch.randn(50, OUT, generator=generator)), moment(
        torch.randn(50, D, generator=generator))
    squares = {name: delta(layer).detach().square() for name, layer in layers.items()}
    wanted = {"l2_sp": sum(float(one.sum()) for one in squares.values()),
              "maps": float(squares["layers.0.q"].sum() + 0.5 * squares["layers.1.q"].sum()),
              "ewc": sum(float((fisher_OD * one).sum()) for one in squares.values()),
              "kfac": sum(float(torch.trace(F @ delta(layer) @ C @ delta(layer).T).detach()) for layer in layers.values())}
    for name, value in wanted.items():
        method = of_class(name, "--options.strength", "3.0")
        method._linears, method._prefix = layers, "layers."
        method._fisher = dict.fromkeys(layers, F if name == "kfac" else fisher_OD)
        method._moments = dict.fromkeys(layers, C)
        method._weights = method.weights_of(list(layers)) if name in ("l2_sp", "maps") else None
        assert float(method.penalty().detach()) == pytest.approx(1.5 * value, rel=1e-4), name


def test_what_is_not_stored_has_the_gain_of_its_mean_energy(inputs):
    part = spectrum(moment(inputs[0]), 6)
    assert 0 < part.rest < float(part.values[-1])
    gains = {name: of_class(name, *given).gains("one", part) for name, given in {
        "gpm": ["--options.energy", "0.5"], "sgp": ["--options.energy", "0.5"], "owm": ["--options.alpha", "0.02"]}.items()}
    assert gains["gpm"][1] == gains["sgp"][1] == 1.0 == float(gains["gpm"][0][-1]) == float(gains["sgp"][0][-1])
    assert gains["owm"][1] == pytest.approx(0.02 / (0.02 + part.rest)) and float(gains["owm"][0][0]) < gains["owm"][1] < 1
    assert of_class("adam_nscl").gains("one", spectrum(moment(inputs[0]), 1024))[1] == 0.0
    C = subspace.moment(part, torch.device("cpu"))
    assert float(C.trace()) == pytest.approx(subspace.trace(part), rel=1e-5), "what is not stored has its mean"
    assert float(torch.linalg.eigvalsh(C)[0]) == pytest.approx(part.rest, rel=1e-3)


def test_starts_take_the_moments_and_directions_that_they_name(inputs):
    old_TD, new_TD, W, G = inputs
    seen = subspace.Seen("layers.0.q", W.float(), spectrum(moment(old_TD), 1024), moment(new_TD).float(), G.float(), R, 0.5)
    A, B = of_class("sc_lora", "--options.beta", "0.8").start(seen)
    wanted = rules.sc_lora(W, moment(new_TD), moment(old_TD), 0.8, R, 0.5)
    assert torch.allclose(B @ A, wanted.B @ wanted.A, atol=1e-4)
    null = of_class("lora_null").start(seen)
    assert null.B is None and float((null.A.double() @ old_TD.T).norm()) < 0.1 * float(
        rules.lora_null(W, torch.linalg.eigh(moment(old_TD))[1][:, -R:], 0.5).A.double().matmul(old_TD.T).norm())
    assert of_class("lora_null", "--options.freeze", "false").start(seen).B is not None
    for name, energy in (("inflora", 0.9), ("keeplora", 0.9)):
        method = of_class(name, "--options.energy", str(energy))
        count = rules.leading_count(seen.spectrum.values, subspace.trace(seen.spectrum), energy)
        assert float((method.start(seen).A @ seen.spectrum.vectors[:, :count]).abs().max()) < 1e-5, name


def test_what_is_frozen_and_what_is_taken_out():
    frozen, taken = {"inflora", "keeplora", "lora_null"}, {"sc_lora", "corda", "lora_null v1"}
    for case, given in SUBSPACES.items():
        method = of_class(case.split()[0], *given)
        assert (method.freezes(method._options), method.takes_out(method._options)) == (case in frozen, case in taken), case
        method._options.enabled = False
        assert not method.freezes(method._options) and not method.takes_out(method._options)
    assert (placed.trained_rank(8, True), placed.trained_rank(8, False)) == (4, 8)


def test_replay_draws_from_the_memory_anew_for_every_step_and_micro_batch():
    drawn = []
    order = SimpleNamespace(keys=lambda position, count: drawn.append(position) or [(0, position)])
    method = of_class("replay", "--options.datasets", "old", "--options.items", "50", "--options.weight", "0.25")
    method._config, method._size, method._old = load_config(None, []), 7, SimpleNamespace(order=order, sample=lambda e, t: t)

    class Loss:
        device = torch.device("cpu")
        processor = SimpleNamespace(encode_batch=lambda samples: SimpleNamespace(to=lambda device: samples))

        def __call__(self, batch):
            return SimpleNamespace(loss=torch.tensor(8.0))

    method._backbone, method._step, method._micro_batch, found = Loss(), 3, 0, []
    for step in (3, 3, 4):
        if step == 4:
            method._step, method._micro_batch = 4, 0
        drawn.clear()
        assert float(method.penalty()) == 2.0
        found.append(list(drawn))
    assert set(found[0]) == set(range(7)) and found[0] != found[1] and found[0] != found[2]
    method._step, method._micro_batch = 3, 0
    drawn.clear()
    method.penalty()
    assert drawn == found[0], "a resumed run draws the same"


def test_importance_is_estimated_on_items_that_the_sensor_does_not_measure(monkeypatch):
    kinds = ["act"] * 60 + ["ask"] * 40
    probe = SimpleNamespace(spread=lambda size: list(range(size)), kinds=lambda items: [kinds[i] for i in items],
                            samples=lambda items: asked.extend(items) or items)
    asked = []
    monkeypatch.setattr(measured, "open_probe", lambda config, storage: probe)
    monkeypatch.setattr(measured, "run_below", lambda backbone, pairs, first: list(pairs))
    monkeypatch.setattr(measured.graded_offline, "answered_samples", lambda backbone, samples, size: samples)
    config = load_config(None, ["--method", "ewc", "--probe.size", "100"])
    _, weights = measured.answered_items(config, SimpleNamespace(probe_folder=str), SimpleNamespace(first_adapted_layer=lambda: 0), 70)
    fit, held = measured.graded_offline.split_items(list(range(100)), kinds, config.gains.holdout)
    assert len(asked) == 70 == len(set(asked)) and set(asked) <= set(fit) and held and len(weights) == 70
    assert {kinds[i] for i in asked} == {"act", "ask"} and float(weights.mean()) == pytest.approx(1.0)


def test_consft_weighs_no_measurement():
    class Toy(torch.nn.Module):
        device = torch.device("cpu")

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(4, 7, generator=torch.Generator().manual_seed(0)))

        def logits(self, hidden):
            return hidden @ self.weight

        def forward(self, batch):
            return self.logits(batch.hidden)

    model, hidden = Toy(), torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))
    batch = SimpleNamespace(hidden=hidden, labels=torch.tensor([[9, 0, 1, 2], [9, 3, 4, 5]]), first_label=1)
    method = of_class("consft", "--options.sharpness", "2.0")
    method._config, method._sensors = load_config(None, ["--thermostat.enabled", "false"]), {}
    method._site = None
    method.attach(model)
    calls = []
    monkey, consft.weigh = consft.weigh, lambda *args: calls.append(1) or monkey(*args)
    try:
        model(batch)
        with torch.no_grad():
            model(batch)
        model.logits(hidden)
        assert len(calls) == 1, "in training alone"
    finally:
        consft.weigh = monkey
        method.detach()
    assert "logits" not in model.__dict__ and not model._forward_hooks and not model._forward_pre_hooks
