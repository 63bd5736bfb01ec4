"""vlakeep.protect in the loops of others: equal to vlakeep train, in transformers' Trainer, under DDP and Accelerate, and with every
kind of LoRA that docs/protect.md lists."""

import dataclasses
import itertools
import multiprocessing
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from conftest import GRADED, final_adapter
from test_protect import (  # noqa: F401
    HELD,
    NEW,
    OLD,
    LoraConfig,
    PeftModel,
    base_model,
    bases,
    get_peft_model,
    logits,
    lora,
    optimizer_of,
    train,
    weights,
)
from torch import nn

from vlakeep.core.parallel import process_settings
from vlakeep.data.loader import make_stream
from vlakeep.methods import graded_offline
from vlakeep.methods.graded import Graded
from vlakeep.models.adapters import add_lora, save_adapter
from vlakeep.models.load import make_backbone
from vlakeep.offline import run_offline
from vlakeep.probe.probe_set import ProbeSet
from vlakeep.protect import Probe, ProtectCallback, measure, protect
from vlakeep.teacher.answers import run_below
from vlakeep.train import learning_rate, run_training


def test_the_callback_is_there_before_peft_and_transformers_are():
    """In an interpreter that has imported neither: what they need of torchvision beside a CPU build of torch has to be mended first."""
    done = subprocess.run([sys.executable, "-c", "from vlakeep.protect import ProtectCallback"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# The framework's own trainer


def test_a_plain_loop_is_vlakeep_train_to_the_bit(world, tmp_path):
    """Bases measured here are those of `vlakeep offline`, and the adapter that the loop leaves is the one that `vlakeep train` leaves."""
    storage, make_config = world
    config = make_config(GRADED, "--name", "in-the-trainer", "--gains.name", "items-alike", "--gains.balance", 0, "--train.lr", 5e-3,
                         "--thermostat.target", 1e-4, "--thermostat.every", 2, "--train.accumulation", 2, "--train.batch_size", 2)
    run_offline(config, storage)
    wanted = final_adapter(run_training(config, storage))

    with process_settings(1, config.seed):
        backbone = make_backbone(config.backbone, torch.device("cpu"), storage.cache)
        add_lora(backbone, config.lora, config.seed)
        probe = ProbeSet(storage.probe_folder(config.probe.name))
        items = probe.spread(config.probe.size)
        fit, _ = graded_offline.split_items(items, probe.kinds(items), config.gains.holdout)
        parts = run_below(backbone.eval(), graded_offline.answered_samples(backbone, probe.samples(fit), config.icsm.batch_size), 0)
        bases = measure(backbone.model, parts, lambda model, part: backbone.run_layers(part.prefix, stop=backbone.num_layers),
                        mask=lambda part: part.prefix.attention_mask_BS)
        method, _ = Graded.prepare(config, storage, backbone)
        spectra = method._artifact.spectra()
        assert len(spectra) == len(bases.spectra)
        assert all(torch.equal(one.vectors, spectra[key[len(backbone.decoder_prefix):]].vectors) for key, one in bases.spectra.items())

        sensor, settings = method._make_sensors(backbone.train())["kl"], config.train
        handle = protect(backbone.model, bases, target=config.thermostat.target, probe=sensor.measure, every=config.thermostat.every)
        optimizer = torch.optim.AdamW([p for p in backbone.parameters() if p.requires_grad], lr=1.0, weight_decay=settings.weight_decay)
        stream = make_stream(config.data, storage.data, backbone.processor, settings.batch_size, config.seed, cache_dir=storage.cache)
        for step in range(1, settings.steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, settings)
            for _ in range(settings.accumulation):
                (backbone(next(stream)).loss / settings.accumulation).backward()
            nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], settings.clip)
            optimizer.step()
            optimizer.zero_grad()
            handle.step()
        stream.close()
        handle.merge()
    save_adapter(backbone, tmp_path)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == wanted
    assert len(handle.history) == 4 and handle.history[-1]["settled_kl"] > 0


# Transformers' Trainer


def trainer(model, folder, callback, **more):
    from transformers import Trainer, TrainingArguments
    args = TrainingArguments(**{**dict(output_dir=str(folder), max_steps=6, per_device_train_batch_size=4, save_steps=3, report_to=[],
                                       learning_rate=3e-2, lr_scheduler_type="constant", use_cpu=True, disable_tqdm=True,
                                       logging_steps=100), **more})
    items = [{name: value[i] for name, value in batch.items()} for batch in NEW for i in range(4)]
    return Trainer(model, args, train_dataset=items, callbacks=[callback])


def test_the_trainer_of_transformers(bases, tmp_path):  # noqa: F811
    def callback(**more):
        return ProtectCallback(bases, target=1e-3, probe=Probe(HELD), every=2, **more)
    model, first = lora(lora_dropout=0.1), callback()
    trainer(model, tmp_path / "a", first).train()
    rows = first.handle.history
    assert [row["step"] for row in rows] == [2, 4, 6, 6] and rows[-1]["settled_kl"] <= 1e-3
    whole = weights(model)
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight" in whole
    half = PeftModel.from_pretrained(base_model(), tmp_path / "a" / "checkpoint-3")
    assert all(value.shape == whole[name].shape for name, value in weights(half).items())

    again, second = lora(lora_dropout=0.1), callback()
    try:
        trainer(again, tmp_path / "a", second).train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    except Exception as error:
        if type(error).__name__ != "UnpicklingError":
            raise
        pytest.skip("transformers 4.40 cannot read its own random states with torch 2.6 or later")
    assert second.handle.history == rows and all(torch.equal(value, whole[name]) for name, value in weights(again).items())

    (tmp_path / "a" / "checkpoint-3" / "vlakeep_protect.safetensors").unlink()
    with pytest.raises(ValueError, match="resume_from=FOLDER"):
        trainer(lora(lora_dropout=0.1), tmp_path / "a", callback()).train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    with pytest.raises(ValueError, match="load_best_model_at_end"):
        callback().on_train_begin(type("Args", (), {"load_best_model_at_end": True}), None, None)


# More than one process, and what prepares models


def averaged(rank, world, folder, bases, result):  # noqa: F811
    """Every process trains on its own batches under DDP; the first one's weights come back."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    model = lora()
    handle = protect(model, bases, target=1e-3, probe=Probe(HELD), every=2)
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = optimizer_of(model)
    model.train()
    for batch in NEW[rank::world] * 2:
        wrapped(**batch).loss.backward()
        optimizer.step(), optimizer.zero_grad(), handle.step()
    handle.merge()
    if rank == 0:
        torch.save({"weights": weights(model), "kls": [row.get("kl") for row in handle.history]}, result)
    dist.destroy_process_group()


def test_two_processes_are_one_with_two_micro_batches(bases, tmp_path):  # noqa: F811
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=averaged, args=(rank, 2, tmp_path, bases, tmp_path / "result.pt")) for rank in range(2)]
    for worker in workers:
        worker.start()
    model = lora()
    handle, optimizer = protect(model, bases, target=1e-3, probe=Probe(HELD), every=2), optimizer_of(model)
    model.train()
    for pair in [NEW[:2], NEW[2:]] * 2:
        for batch in pair:
            (model(**batch).loss / 2).backward()
        optimizer.step(), optimizer.zero_grad(), handle.step()
    handle.merge()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0]
    found = torch.load(tmp_path / "result.pt", weights_only=True)
    assert found["kls"] == [row.get("kl") for row in handle.history]
    assert all(torch.equal(value, found["weights"][name]) for name, value in weights(model).items())


def test_what_is_wrapped_already_is_protected_alike(bases, tmp_path):  # noqa: F811
    """Some scripts have wrapped the model before its head is made, so that `protect` comes after DDP."""
    def trained(early):
        model, options = lora(), dict(target=1e-3, probe=Probe(HELD), every=2)
        handle = protect(model, bases, **options) if early else None
        wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True).train()
        handle, optimizer = handle or protect(model, bases, **options), optimizer_of(model)
        for batch in NEW:
            wrapped(**batch).loss.backward()
            optimizer.step(), optimizer.zero_grad(), handle.step()
        handle.merge()
        return weights(model)

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        first, last = trained(True), trained(False)
    finally:
        dist.destroy_process_group()
    assert any(not torch.equal(value, first[name]) for name, value in weights(lora()).items())
    assert all(torch.equal(value, first[name]) for name, value in last.items())


def test_accelerate(bases, tmp_path):  # noqa: F811
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)  # the Trainer's test has left its own
    GradientState._reset_state()
    plain = lora()
    train(plain, handle := protect(plain, bases, target=1e-3, probe=Probe(HELD), every=2), steps=6)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)

    def start(seed):
        model = lora(seed=seed)
        own = protect(model, bases, target=1e-3, probe=Probe(HELD), every=2)
        return own, *accelerator.prepare(model, optimizer_of(model))
    own, model, optimizer = start(1)
    accelerator.register_for_checkpointing(own)
    for step, batch in enumerate(itertools.islice(itertools.cycle(NEW), 6), 1):
        for _ in range(2):  # twice the same, half each
            with accelerator.accumulate(model):
                accelerator.backward(model.train()(**batch).loss)
                optimizer.step(), optimizer.zero_grad()
            if accelerator.sync_gradients:
                own.step()
        if step == 3:
            accelerator.save_state(str(tmp_path))
    assert own.history == handle.history and own.steps == 6
    assert all(torch.equal(value, weights(plain)[name]) for name, value in weights(accelerator.unwrap_model(model)).items())
    accelerator.load_state(str(tmp_path))
    assert own.steps == 3 and own.history == handle.history[:1]
    for batch in (NEW * 2)[3:6]:
        accelerator.backward(model(**batch).loss * 2)
        optimizer.step(), optimizer.zero_grad(), own.step()
    assert all(torch.equal(value, weights(plain)[name]) for name, value in weights(accelerator.unwrap_model(model)).items())


def test_fsdp_is_refused(bases, tmp_path):  # noqa: F811
    from torch.distributed.device_mesh import init_device_mesh
    try:
        from torch.distributed.fsdp import fully_shard
    except ImportError:
        pytest.skip("torch has no fully_shard yet")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = lora()
        handle = protect(model, bases, opening=1e-2)
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match="FSDP2 .fully_shard.*DistributedDataParallel"):
            handle.step()
        model = lora()
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match="FSDP2 .fully_shard.*DistributedDataParallel"):
            measure(model, OLD)
    finally:
        dist.destroy_process_group()


# Kinds of LoRA


def run_through(model, bases, tmp_path, load_into, target=1e-3, atol=2e-4, **options):  # noqa: F811
    """Trained under the loop, it keeps to its target, and its saved adapter loaded as any other does what it does."""
    probe = Probe(HELD)
    handle = protect(model, bases, target=target, probe=probe, every=2, **options)
    train(model, handle, steps=6)
    assert handle.merge()["settled_kl"] <= target and handle.report()["measurements"] == 3
    assert probe.measure(model) > 0
    model.save_pretrained(tmp_path)
    assert torch.allclose(logits(PeftModel.from_pretrained(load_into, tmp_path).eval()), logits(model), atol=atol)
    return handle


WORKS = {
    "rank-stabilised": dict(use_rslora=True),
    "ranks per module": dict(rank_pattern={"q_proj": 2}),
    "gaussian start, dropout": dict(init_lora_weights="gaussian", lora_dropout=0.2),
    "some layers": dict(layers_to_transform=[1], target_modules=["q_proj", "down_proj"]),
    "alphas per module": dict(alpha_pattern={"q_proj": 32}),
    "the head": dict(target_modules=["q_proj", "lm_head"]),
}


@pytest.mark.parametrize("kind", WORKS)
def test_kinds_of_lora_that_work(kind, tmp_path):
    model = lora(**WORKS[kind])
    run_through(model, measure(model, OLD), tmp_path, base_model())


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(bases, reentrant):  # noqa: F811
    plain, saving = lora(), lora()
    train(plain, protect(plain, bases, opening=1e-3), 4)
    saving.enable_input_require_grads()
    saving.gradient_checkpointing_enable({"use_reentrant": reentrant})
    train(saving, protect(saving, bases, opening=1e-3), 4)
    found = weights(saving)
    assert all(torch.allclose(value, found[name], atol=1e-6) for name, value in weights(plain).items())


OUTSIDE = {
    "dora": (dict(use_dora=True), "magnitudes of DoRA"),
    "modules to save": (dict(modules_to_save=["lm_head"]), "copies of whole modules"),
    "biases": (dict(bias="all"), "biases"),
    "embedding": (dict(target_modules=["q_proj", "embed_tokens"]), "LoRA of an embedding"),
    "biases of LoRA": (dict(lora_bias=True), "biases of LoRA B"),
    "rows of an embedding": (dict(trainable_token_indices=list(range(40, 60))), "single rows of an embedding"),
}


@pytest.mark.parametrize("kind", OUTSIDE)
def test_what_gains_cannot_bound_is_refused_frozen_or_told(kind, tmp_path):
    config, said = OUTSIDE[kind]
    known = {field.name for field in dataclasses.fields(LoraConfig)}
    if not set(config) <= known:
        pytest.skip("this PEFT has no such option")

    def fresh():
        return base_model(attention_bias=True) if kind == "biases" else base_model()
    model = lora(fresh(), **config)
    bases = measure(model, OLD)  # noqa: F811
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=f"not to be bounded by gains: .*{said}.*unprotected="):
        protect(model, bases, opening=1e-2)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    handle = run_through(model, bases, tmp_path, fresh(), unprotected="freeze")
    assert handle.report()["unprotected"] == []
    free = lora(fresh(), **config)
    teacher = logits(free, NEW[0])
    handle = protect(free, bases, opening=1e-20, unprotected="train")
    train(free, handle, 4)
    assert handle.report()["unprotected"] and not torch.allclose(logits(free, NEW[0]), teacher, atol=1e-2)


def test_convolutions_and_experts_are_outside(tmp_path):
    class Seen(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches, self.out = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 5)

        def forward(self, x):
            return self.out(self.patches(x).flatten(2).transpose(1, 2)).mean(1)

    model = get_peft_model(Seen(), LoraConfig(target_modules=["patches", "out"]))
    bases = measure(model, list(torch.randn(3, 2, 3, 8, 8)))  # noqa: F811
    assert set(bases.inputs) == {"out"}
    with pytest.raises(ValueError, match="is no linear .a convolution"):
        protect(model, bases, opening=1e-2)
    assert protect(model, bases, opening=1e-2, unprotected="freeze").report()["linears"] == 1


@pytest.mark.parametrize("start", ["pissa", "olora", "orthogonal", False])
def test_starts_that_change_the_base_or_the_model_are_refused(start):
    try:
        model = lora(init_lora_weights=start)
    except ValueError as error:
        pytest.skip(f"this PEFT has no such start: {error}")
    with pytest.raises(ValueError, match="PiSSA"):
        protect(model, measure(model, OLD), opening=1e-2)


def test_one_of_several_adapters(tmp_path):
    def two():
        model = lora()
        model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
        return model
    model = two()
    model.set_adapter("second")
    bases = measure(model, OLD)  # noqa: F811
    handle = protect(model, bases, opening=1e-2)
    assert handle.report()["linears"] == 2
    train(model, handle, 4)
    handle.merge()
    before = weights(two())
    assert all(torch.equal(value, before[name]) == (".second." not in name) for name, value in weights(model).items())
    model = two()
    assert protect(model, measure(model, OLD, adapter="default"), opening=1e-2, adapter="default").report()["linears"] == 14


def test_other_kinds_of_adapters_are_told_from_none():
    import peft
    kinds = {"AdaLora": dict(total_step=10), "LoHa": {}, "Vera": {}}
    for kind, more in kinds.items():
        torch.manual_seed(0)
        model = get_peft_model(base_model(), getattr(peft, f"{kind}Config")(target_modules=["q_proj"], **more))
        with pytest.raises(ValueError, match=f"adapters of the type {kind.upper()}.*LoraConfig"):
            measure(model, OLD)
    with pytest.raises(ValueError, match="no LoRA layers: make them first"):
        measure(base_model(), OLD)


class Eight(nn.Linear):
    """A linear whose weight is kept in eight bits with one scale a row."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.float() * self.scale)


def quantised(make, **sizes):
    model = base_model(**sizes).requires_grad_(False)
    for layer in model.model.layers:
        for module in (layer.self_attn, layer.mlp):
            for name, linear in list(module.named_children()):
                if isinstance(linear, nn.Linear):
                    setattr(module, name, make(linear))
    return model


def test_a_base_in_eight_bits(bases, tmp_path):  # noqa: F811
    model = lora(quantised(Eight))
    with pytest.raises(ValueError, match="type or quantisation"):
        protect(model, bases, opening=1e-2)
    run_through(model, measure(model, OLD), tmp_path, quantised(Eight))


def test_a_base_in_four_bits(tmp_path):
    bnb = pytest.importorskip("bitsandbytes")

    def four(linear):
        made = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4")
        made.weight = bnb.nn.Params4bit(linear.weight.detach().clone(), requires_grad=False, quant_type="nf4")
        return made.to("cpu")

    def base():
        # bitsandbytes packs blocks of 32 or 64 columns for some processors
        model = quantised(four, hidden_size=64, intermediate_size=128, num_attention_heads=2, num_key_value_heads=2, head_dim=32)
        model.is_loaded_in_4bit = True  # as from_pretrained sets it, and PEFT reads it
        return model
    model = lora(base())
    assert type(model.get_base_model().model.layers[0].self_attn.q_proj).__module__.startswith("peft.tuners.lora.bnb")
    run_through(model, measure(model, OLD), tmp_path, base(), atol=0.3)  # on a CPU it computes in bfloat16, of logits up to 20


def test_half_precision():
    model = lora(base_model().to(torch.bfloat16))
    handle = protect(model, measure(model, OLD), target=2e-2, probe=Probe(HELD), every=2)
    train(model, handle, steps=6)
    assert handle.merge()["settled_kl"] <= 2e-2
