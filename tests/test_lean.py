"""LoRA linears without conversions, and compiled layers (models/lean.py)."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.utils import parametrize

from vlakeep.core.config import Config, LoraConfig, TrainConfig
from vlakeep.core.loss_scale import LossScaler
from vlakeep.core.storage import Storage
from vlakeep.hsw.graded import make_site
from vlakeep.hsw.residual import ResidualSite
from vlakeep.hsw.transform import Gains
from vlakeep.methods.baseline import Baseline
from vlakeep.models import adapters, lean
from vlakeep.models.adapters import adapter_state, add_lora
from vlakeep.models.lean import autocast, converting, lean_class
from vlakeep.models.load import make_backbone
from vlakeep.openvla.backbone import OpenVLABackbone
from vlakeep.pi0_fast.backbone import Pi0FastBackbone
from vlakeep.teacher.spectrum import spectrum
from vlakeep.thermostat.kl_sensor import KLSensor
from vlakeep.thermostat.thermometer import Thermometer
from vlakeep.train import make_optimizer, run_training, train_step

LORA = LoraConfig(rank=4, alpha=8, layers="last:2")


def batch_of(backbone, rows=3, words="push it"):
    from vlakeep.data.sample import Sample

    generator = torch.Generator().manual_seed(rows)
    size = (*backbone.processor.picture_size, 3)
    return backbone.processor.encode_batch([
        Sample(torch.randint(0, 255, size, dtype=torch.uint8, generator=generator).numpy(), words,
               torch.rand(7, generator=generator).numpy() * 2 - 1) for _ in range(rows)])


def made(lora=LORA, dtype=torch.float32):
    backbone = make_backbone("tabletop-base").to(dtype)
    add_lora(backbone, lora, 0)
    for name, p in backbone.named_parameters():  # B starts at zero, and would hide A
        if "lora_B" in name:
            p.data.normal_(0, 0.02, generator=torch.Generator().manual_seed(len(name)))
    return backbone.train()


def gradients(backbone, kind="none", rows=3):
    batch = batch_of(backbone, rows)
    with autocast(kind, torch.device("cpu")), parametrize.cached():
        loss = backbone(batch).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in backbone.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("dtype, kind", [(torch.float32, "none"), (torch.bfloat16, "bfloat16"), (torch.bfloat16, "none")])
def test_a_lean_linear_gives_loss_and_gradients_of_pefts_own_to_the_bit(monkeypatch, dtype, kind):
    lean, linear = made(dtype=dtype), lean_class().__mro__[1]
    assert all(type(layer) is lean_class() and isinstance(layer, linear) for layer in lean.adapted_linears().values())
    monkeypatch.setattr(adapters, "make_lean", lambda layers: None)
    whole = made(dtype=dtype)
    assert all(type(layer) is linear for layer in whole.adapted_linears().values())
    (loss, grads), (wanted, expected) = gradients(lean, kind), gradients(whole, kind)
    assert torch.equal(loss, wanted) and grads.keys() == expected.keys()
    assert all(torch.equal(grads[name], expected[name]) for name in grads)
    assert all(bool(grad.abs().max() > 0) for grad in grads.values())


def test_a_lean_linear_keeps_no_copy_of_its_input(monkeypatch):
    def kept():
        seen, total = set(), [0]

        def pack(tensor):
            if tensor.data_ptr() not in seen:
                seen.add(tensor.data_ptr())
                total[0] += tensor.nbytes
            return tensor

        backbone = made(dtype=torch.bfloat16)
        seen.update(p.data_ptr() for p in backbone.parameters())
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast("bfloat16", torch.device("cpu")):
            backbone(batch_of(backbone))
        return total[0]

    lean = kept()
    monkeypatch.setattr(adapters, "make_lean", lambda layers: None)
    assert lean < 0.9 * kept()


def compiled(backbone):
    """Compiled without a compiler's own kernels, so that it works here; a break of the graph is an error."""
    made_graphs = []

    def backend(graph, inputs):
        from torch._dynamo.backends.debugging import aot_eager

        made_graphs.append(graph)
        return aot_eager(graph, inputs)

    torch._dynamo.reset()
    backbone.compile_layers(backend=backend, fullgraph=True)
    return made_graphs


def graded_site(backbone):
    linears = backbone.adapted_linears()
    keys = {backbone.input_key(name): linear.in_features for name, linear in linears.items()}
    spectra = {key: spectrum(torch.cov(torch.randn(dim, 3 * dim, generator=torch.Generator().manual_seed(i))), 1024)
               for i, (key, dim) in enumerate(keys.items())}
    site = make_site(linears, spectra, backbone.input_key, 1.0, 10.0)
    site.set_opening(0.3)
    return site


def residual_site(backbone):
    basis = torch.linalg.qr(torch.randn(backbone.hidden_size, 16, generator=torch.Generator().manual_seed(1)))[0]
    site = ResidualSite(backbone.decoder_layers, {4: basis.split(8, 1), 5: basis.split(8, 1)}, 1e-12, torch.float32)
    site.set_gains(Gains(beta=0.5, gamma=0.1))
    return site


@pytest.mark.skipif(bool(OpenVLABackbone.compile_problem()), reason=OpenVLABackbone.compile_problem())
@pytest.mark.parametrize("site", [lambda backbone: None, graded_site, residual_site], ids=["plain", "graded", "residual"])
def test_compiled_layers_have_no_breaks_share_their_code_and_train_alike(site):
    """Parametrised A and hooks on a layer's output included; other lengths and sizes compile nothing anew."""
    def trained(compile):
        backbone = made()
        graphs = compiled(backbone) if compile else []
        kept, method, config = site(backbone), Baseline(), TrainConfig(lr=1e-3, clip=1.0, optimizer="sgd")
        optimizer = make_optimizer([p for p in backbone.parameters() if p.requires_grad], config)
        rows = []
        for step, (size, words) in enumerate([(3, "push it"), (2, "push the red one into the blue one"), (4, "go")], 1):
            row = train_step(backbone, method, optimizer, LossScaler(False), [batch_of(backbone, size, words)], config, step, False)
            rows.append(float(row["loss"]))
            rows.append(float(row["grad_norm"]))
        with torch.no_grad():
            prompts = batch_of(backbone, 2)
            prompts = prompts.with_text(prompts.input_ids[:, :9], prompts.attention_mask[:, :9])
            rows += backbone.eval().generate(prompts, 3)[0].flatten().tolist()
        return rows, adapter_state(backbone), graphs, kept

    rows, state, graphs, _ = trained(True)
    wanted, expected, _, _ = trained(False)
    assert rows == pytest.approx(wanted, rel=2e-4)
    assert all(torch.allclose(state[name], expected[name], rtol=1e-3, atol=1e-5) for name in state)
    # Frozen and adapted decoder layers and the blocks of two towers; the pass without gradients is another graph of each decoder layer.
    assert 3 <= len(graphs) <= 8, [len(graph.graph.nodes) for graph in graphs]


def with_versions(monkeypatch, torch_version, transformers_version):
    monkeypatch.setattr(lean, "library_versions", lambda: {"torch": torch_version, "transformers": transformers_version})


def test_layers_are_compiled_with_libraries_that_can_and_refused_with_others(monkeypatch):
    """OpenVLA's layers are those of transformers; pi0-FAST's are written here, and ask torch alone."""
    for torch_version, transformers_version, openvla, pi0 in (
            ("2.13.0+cpu", "5.0.0", "", ""), ("2.5.1", "5.23.0.dev0", "", ""), ("2.10.0", "4.57.1", "transformers 4.57.1", ""),
            ("2.5.0", "4.40.1", "transformers 4.40.1", ""), ("2.2.0+cu121", "5.1", "torch 2.2.0", "torch 2.2.0"),
            ("2.4", None, "torch 2.4", "torch 2.4")):
        with_versions(monkeypatch, torch_version, transformers_version)
        for kind, wanted in ((OpenVLABackbone, openvla), (Pi0FastBackbone, pi0)):
            problem = kind.compile_problem()
            assert wanted in problem and bool(problem) == bool(wanted), (torch_version, transformers_version, kind, problem)


def test_a_training_that_cannot_be_compiled_ends_before_any_weight_is_read(monkeypatch, tmp_path):
    monkeypatch.setattr("vlakeep.train.make_backbone", lambda *args: pytest.fail("the model was loaded"))
    monkeypatch.setattr("vlakeep.train.look", lambda *args: [])
    config = Config(name="r", root=str(tmp_path), device="cpu")
    config.train.compile = True
    with_versions(monkeypatch, "2.13.0", "4.40.1")
    with pytest.raises(ValueError, match=r"--train.compile: decoder layers of transformers 4.40.1 .* breaks .* use --train.compile false"):
        run_training(config, Storage.from_config(config))
    with pytest.raises(ValueError, match="--train.compile: decoder layers of transformers 4.40.1"):
        OpenVLABackbone.compile_layers(object.__new__(OpenVLABackbone))


@pytest.mark.parametrize("kind", ["none", "bfloat16"])
def test_a_measurement_is_in_the_types_of_training(kind):
    """Of both sensors: a divergence of weights in other types than those that act is not theirs."""
    seen, here = [], torch.device("cpu")

    def run_layers(*given, **named):
        seen.append(converting(torch.zeros(1)))
        raise EOFError

    backbone = SimpleNamespace(training=True, eval=lambda: None, train=lambda training: None, device=here, num_layers=1,
                               run_layers=run_layers, decoder_layers=torch.nn.ModuleList([torch.nn.Identity()]))
    prefix = SimpleNamespace(rows=lambda rows: prefix, trimmed=lambda: prefix, to=lambda device: prefix, with_hidden=None,
                             hidden_BSD=torch.zeros(1, 2, 3))
    for sensor, own, measure in ((KLSensor, {"_count": 1, "_measured": 1}, lambda one: one.per_item()),
                                 (Thermometer, {"_seed": 0, "_draw": 1, "_mask_NS": torch.ones(1, 2), "_layers": [0]},
                                  lambda one: one.measure(0))):
        made_one = object.__new__(sensor)
        made_one.__dict__.update(_backbone=backbone, _autocast=kind, _prefix=prefix, _first=0, **own)
        with pytest.raises(EOFError):
            measure(made_one)
    assert seen == [kind != "none"] * 2


@torch.no_grad()
def test_a_measurement_in_half_precision_scales_the_update():
    layer = next(iter(made(dtype=torch.bfloat16).adapted_linears().values()))
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(5, a.shape[1], generator=torch.Generator().manual_seed(0)).bfloat16()
    with autocast("bfloat16", torch.device("cpu")):
        update = layer(x).float() - layer.base_layer(x).float()
    assert layer.scaling["default"] == 2.0
    wanted = 2.0 * x.float() @ a.float().T @ b.float().T
    assert float((update - wanted).norm() / wanted.norm()) < 0.2
