"""One entrance to a network (models/entrance.py), and what it is for: the same training on weights that FSDP2 has sharded, to the bit."""

from types import SimpleNamespace

import pytest
import torch
from conftest import BASELINE, GRADED
from test_model_inputs import toy_kind  # noqa: F401 (a fixture)
from test_models import Case, graded_of
from torch import nn
from toy_model import Toy, make_folder

from vlakeep.benchmarks.policy import attempt
from vlakeep.benchmarks.questions import action_token_kl, answer_questions
from vlakeep.core import checkpoint as ckpt
from vlakeep.core.loss_scale import LossScaler
from vlakeep.core.parallel import Distributed
from vlakeep.core.sharded import is_sharded, whole_tree
from vlakeep.methods.baseline import Baseline
from vlakeep.models.adapters import adapter_state, add_lora, load_trainable, select_linears, trainable_state
from vlakeep.models.alarms import check_vision
from vlakeep.probe.masks import mask_from_prompt
from vlakeep.teacher.collect import pooled_states, token_moments
from vlakeep.teacher.sensitivity import sensitivities
from vlakeep.train import make_optimizer, train_step

KEYS = ("loss", "accuracy", "grad_norm", "hidden_norm")


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return Case("toy", str(make_folder(tmp_path_factory.mktemp("models") / "toy")))


def watched(backbone):
    """(module names that ran outside a call, how often the model was called) as lists that grow."""
    outside, calls = [], []
    backbone.register_forward_pre_hook(lambda module, args: calls.append(1))
    for name, module in backbone.named_modules():
        if module is not backbone and list(module.parameters(recurse=False)):
            module.register_forward_pre_hook(lambda module, args, name=name: None if backbone.inside else outside.append(name))
    return outside, calls


def test_whoever_asks_for_something_comes_through_the_call(case):
    """Training, sensors of all kinds, offline statistics, alarms, questions, episodes."""
    backbone = case.make()
    method_of, samples = graded_of(case, case.config(GRADED)), case.samples(backbone)
    outside, calls = watched(backbone)
    backbone.network.head(torch.zeros(1, backbone.hidden_size))
    assert outside == ["model.head"] and not calls
    outside.clear()
    batch, prompts = backbone.processor.encode_batch(samples), backbone.processor.encode_prompts(samples)
    masked = [(prompts, mask_from_prompt(prompts, samples, backbone.processor))]
    linears = select_linears(backbone, "last:1", ["out"])
    ask = [lambda: backbone(batch), lambda: check_vision(backbone), lambda: backbone.generate(prompts, 3),
           lambda: attempt(backbone, samples, None),
           lambda: answer_questions(backbone, case.samples(backbone, 2, question=True)), lambda: backbone.logits(torch.zeros(1, 32)),
           lambda: pooled_states(backbone, masked, [1], quiet=True), lambda: token_moments(backbone, [prompts], linears),
           lambda: sensitivities(backbone, masked, 1, torch.eye(32)[:, :2], 0.1), lambda: backbone.run_layers(backbone.embed(prompts))]
    for number, one in enumerate(ask):
        calls.clear()
        one()
        assert calls and not outside, number
        assert number not in (0, 2, 3) or len(calls) == 1, "one call for a whole answer"
    method = method_of(backbone)
    add_lora(backbone, case.config().lora, 0)
    method.attach(backbone)
    method.before_training()
    action_token_kl(backbone, samples)
    assert not outside and backbone.inside == 0
    with pytest.raises(ValueError):
        backbone.run_layers(backbone.embed(prompts), stop=99)
    assert backbone.inside == 0


def test_a_model_says_its_loss_and_no_forward():
    with pytest.raises(TypeError, match="Own defines forward, .*: define `loss`"):
        class Own(Toy):
            def forward(self, batch):
                return None

    class Other(Toy):
        def embed(self, batch):
            assert self.inside
            return super().embed(batch)

    assert Other.embed.__name__ == "embed" and Other.embed is not Toy.embed and not hasattr(Other.text_columns, "__wrapped__")


# ---- sharded weights ----


@pytest.fixture
def process_group():
    """A job of one process: its tensors are real DTensors, and all collectives run."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def started(case, config, method_of, shard=None):
    backbone = case.make()
    method = method_of(backbone)
    add_lora(backbone, config.lora, seed=3)
    backbone.train()
    method.attach(backbone)
    if shard:
        for layer in backbone.decoder_layers:
            shard(layer)
        shard(backbone)
    return backbone, method, make_optimizer([p for p in backbone.parameters() if p.requires_grad], config.train)


def steps(case, config, run, first, last):
    backbone, method, optimizer = run
    scaler, job = LossScaler(enabled=False), Distributed("cpu")
    batch = case.make().processor.encode_batch(case.samples(backbone))
    return [job.mean_metrics(train_step(backbone, method, optimizer, scaler, [batch], config.train, step, True))
            for step in range(first, last + 1)]


def state(run):
    return trainable_state(run[0]), adapter_state(run[0]), whole_tree(run[2].state_dict())


def same(one, other):
    if isinstance(one, torch.Tensor):
        return not is_sharded(one) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return len(one) == len(other) and all(map(same, one, other)) if isinstance(one, (list, tuple)) else one == other


@pytest.mark.parametrize("arm", ["baseline", "graded"])
def test_sharded_weights_train_measure_save_and_load_as_whole_ones_do_bitwise(case, process_group, arm, tmp_path):
    """Of the baseline everything is sharded; of the graded arm the frozen base, since its site works on whole adapters."""
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    if not hasattr(fsdp, "fully_shard"):
        pytest.skip("this torch has no FSDP2")
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (1,))

    def shard(module: nn.Module):
        whole = {p for p in module.parameters() if p.requires_grad and arm == "graded"}
        fsdp.fully_shard(module, mesh=mesh, **({"ignored_params": whole} if whole else {}))

    config = case.config(GRADED if arm == "graded" else BASELINE, "--thermostat.every", "1", "--train.steps", "3",
                         "--thermostat.batch_size", "6")
    method_of = graded_of(case, config) if arm == "graded" else lambda backbone: Baseline()
    plain, sharded = started(case, config, method_of), started(case, config, method_of, shard)
    assert {p.requires_grad for p in sharded[0].parameters() if is_sharded(p)} == ({False} if arm == "graded" else {True, False})
    assert plain[1].before_training() == sharded[1].before_training(), "a sensor may be the first to come"
    rows = [steps(case, config, run, 1, 2) for run in (plain, sharded)]
    assert rows[0] == rows[1]
    assert same(state(sharded), state(plain))
    trainable, _, moments = state(sharded)
    tensors, rest = ckpt.split_optimizer(moments)
    kept = {"optimizer": rest, "method": sharded[1].state_dict()}
    ckpt.save_checkpoint(tmp_path, 2, {"trainable": trainable, "optimizer": tensors}, kept)
    wanted = steps(case, config, plain, 3, 3)
    for make in (None, shard):  # by one process, and by many
        again = started(case, config, method_of, make)
        saved, found = ckpt.load_checkpoint(tmp_path / "checkpoints" / "step_000002")
        load_trainable(again[0], saved["trainable"])
        ckpt.join_optimizer(again[2], saved["optimizer"], found["optimizer"])
        again[1].load_state_dict(found["method"])
        assert steps(case, config, again, 3, 3) == wanted and same(state(again), state(plain))
    assert SimpleNamespace(**wanted[0]).loss > 0 and set(KEYS) <= set(wanted[0])
