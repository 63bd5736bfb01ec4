"""vlakeep.protect: gains and loop on any PEFT model, in a plain loop, in the Trainer, with every kind of LoRA; equal to vlakeep train."""

import copy
import itertools

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from vlakeep.core.compat import import_timm
from vlakeep.protect import Bases, Probe, fingerprint, measure, protect, read_state
from vlakeep.protection.layers import adapters_off

import_timm()  # transformers imports torchvision, which must be mended first beside a CPU build of torch
from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SIZES = dict(vocab_size=64, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1,
             head_dim=8)


def base_model(seed=0, **more):
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, **more}))
    with torch.no_grad():  # sharper than a fresh model, so that there is something to forget
        model.lm_head.weight.mul_(20)
    return model.eval()


def texts(count, length, seed, low=3, high=40):
    ids = torch.randint(low, high, (count, length), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": ids[i:i + 4], "attention_mask": torch.ones_like(ids[i:i + 4])} for i in range(0, count, 4)]


OLD, HELD, NEW = texts(24, 8, 1), texts(8, 8, 2), [{**one, "labels": one["input_ids"]} for one in texts(16, 6, 3, 40, 60)]


def lora(model=None, seed=1, **config):
    torch.manual_seed(seed)
    return get_peft_model(model or base_model(), LoraConfig(**{**dict(r=4, lora_alpha=8, target_modules=ALL), **config}))


def optimizer_of(model, lr=3e-2):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)


def train(model, handle=None, steps=10, optimizer=None, skip=0):
    """A plain loop, as docs/protect.md shows it."""
    optimizer = optimizer or optimizer_of(model)
    model.train()
    for batch in itertools.islice(itertools.cycle(NEW), skip, skip + steps):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if handle:
            handle.step()
    return model.eval()


@pytest.fixture(scope="module")
def bases():
    return measure(lora(), OLD)


def logits(model, batch=OLD[0]):
    with torch.no_grad():
        return model(**batch).logits


def weights(model):
    return {name: p.detach().clone() for name, p in model.state_dict().items() if "lora_" in name}


# Bases


def test_spectra_are_those_of_the_inputs_and_shared_inputs_are_found(bases):
    model = base_model()
    seen = {}
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "down_proj", "up_proj")):
            module.register_forward_pre_hook(lambda m, args, name=name: seen.setdefault(name, []).append(args[0].detach().flatten(0, 1)))
    for batch in OLD:
        logits(model, batch)
    for name, parts in seen.items():
        x = torch.cat(parts).double()
        one = bases.spectra[bases.inputs[name]]
        rebuilt = (one.vectors.double() * one.values.double()) @ one.vectors.double().T
        assert torch.allclose(rebuilt, x.T @ x / len(x), atol=1e-5), name
    for number in "01":
        layer = f"model.layers.{number}."
        assert len({bases.inputs[f"{layer}self_attn.{leaf}_proj"] for leaf in "qkv"}) == 1
        assert bases.inputs[layer + "mlp.gate_proj"] == bases.inputs[layer + "mlp.up_proj"]
    assert len(bases.spectra) == 8 and len(bases.inputs) == 14 and bases.meta["tokens"] == 24 * 8 and bases.meta["batches"] == 6


def test_padding_does_not_count_and_a_mask_that_fits_nothing_is_refused(bases):
    padded = []
    for batch in OLD:
        padded.append({"input_ids": F.pad(batch["input_ids"], (0, 3), value=9), "attention_mask": F.pad(batch["attention_mask"], (0, 3))})
    found = measure(lora(), padded)
    for key, one in bases.spectra.items():
        assert torch.allclose(one.values, found.spectra[key].values, rtol=1e-3, atol=1e-6), key
    with pytest.raises(ValueError, match="padding.*give mask="):
        measure(lora(), padded, mask=lambda batch: batch["attention_mask"][:, 1:])


def test_a_forward_pass_under_autocast_is_summed_in_float32(bases):
    def under_autocast(model, batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(**batch)
    found = measure(lora(), OLD, under_autocast)
    for key, one in found.spectra.items():
        gram_KK = one.vectors.T @ one.vectors
        assert torch.allclose(gram_KK, torch.eye(len(gram_KK)), atol=1e-5)
        whole = bases.spectra[key].values
        assert torch.allclose(one.values, whole, atol=2e-2 * float(whole.max()))
        assert float(one.values.min()) > -1e-6 * float(whole.max())  # sums in half precision are off by 4e-3


def test_within_a_small_budget_there_are_more_passes_and_the_same_spectra(bases):
    found = measure(lora(), OLD, budget_gib=24 * 24 * 4 * 3 / 2**30)
    assert all(torch.equal(one.vectors, found.spectra[key].vectors) for key, one in bases.spectra.items())
    assert torch.equal(measure(lora(), iter(OLD)).spectra["model.layers.0.self_attn.q_proj"].values,
                       bases.spectra["model.layers.0.self_attn.q_proj"].values)
    with pytest.raises(ValueError, match="gone through once"):
        measure(lora(), iter(OLD), budget_gib=1e-9)
    with pytest.raises(ValueError, match="no batches"):
        measure(lora(), [])


def test_bases_survive_their_file_and_belong_to_one_model(bases, tmp_path):
    path = bases.save(tmp_path / "bases.safetensors")
    again = Bases.load(path)
    assert again.inputs == bases.inputs and again.meta == bases.meta and again.fingerprint == fingerprint(base_model())
    assert all(torch.equal(one.values, again.spectra[key].values) for key, one in bases.spectra.items())
    with pytest.raises(ValueError, match="other weights"):
        protect(lora(base_model(seed=5)), again, opening=1e-3)
    with pytest.raises(ValueError, match="other weights"):
        protect(lora(base_model().to(torch.bfloat16)), again, opening=1e-3)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="is damaged"):
        Bases.load(path)


# The loop


def test_it_keeps_to_the_target_where_plain_lora_does_not(bases):
    probe, plain = Probe(HELD), lora().train()
    first = plain.get_base_model().model.layers[0].eval()
    probe.prepare(plain)
    assert probe.measure(plain) == 0.0 and plain.training and not first.training, "each module is in the mode that it was in"
    train(plain, steps=30)
    lost = probe.measure(plain)
    model = lora()
    handle = protect(model, bases, target=lost / 50, probe=Probe(HELD), every=3)
    train(model, handle, steps=30)
    kls = [row["kl"] for row in handle.history]
    assert len(kls) == 10 and len({row["opening"] for row in handle.history}) > 3
    row = handle.merge()
    kept = probe.measure(model)
    assert row["settled_kl"] <= lost / 50 and kept == pytest.approx(row["settled_kl"], rel=1e-3, abs=1e-7)
    report = handle.report()
    assert report["kl"] == row["settled_kl"] and report["linears"] == 14 and report["inputs"] == 8 and report["steps"] == 30
    assert all(norm > 0 for norm in report["update_norms"].values()) and report["unprotected"] == []
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    with pytest.raises(ValueError, match="merge\\(\\) has ended"):
        handle.step()


def test_the_divergence_is_that_of_the_whole_vocabulary(bases):
    model = lora()
    probe = Probe(HELD)
    probe.prepare(model)
    teacher = [logits(model, batch).log_softmax(-1) for batch in HELD]
    train(model, steps=5)
    p, q = torch.cat(teacher)[:, :-1], torch.cat([logits(model, batch) for batch in HELD]).log_softmax(-1)[:, :-1]
    exact = (p.exp() * (p - q)).sum(-1).mean()
    assert probe.measure(model) == pytest.approx(float(exact), rel=0.02)
    labelled = [{**batch, "labels": torch.where(torch.arange(8) < 5, -100, batch["input_ids"])} for batch in HELD]
    some = Probe(labelled)
    with adapters_off(model):
        some.prepare(model)
    assert some.measure(model) == pytest.approx(float((p.exp() * (p - q)).sum(-1)[:, 4:].mean()), rel=0.02)


def test_all_open_is_plain_lora_to_the_bit_and_what_is_closed_changes_nothing(bases):
    plain, wide, shut = lora(), lora(), lora()
    train(plain)
    train(wide, protect(wide, bases, opening=1e30, scale=1.0))
    before = logits(shut)
    handle = protect(shut, bases, opening=1e-20)
    train(shut, handle)
    handle.merge()
    assert torch.allclose(logits(shut), before, atol=1e-3) and not torch.allclose(logits(plain), before, atol=1.0)
    protected = weights(wide)
    assert all(torch.equal(value, protected[name]) for name, value in weights(plain).items())


def test_fused_optimizers_are_noticed(bases):
    """They write the weights without raising their version: a stale A_eff would be trained."""
    found = []
    for fused in (False, True):
        model = lora()
        handle = protect(model, bases, opening=1e-2)
        train(model, handle, 4, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2, fused=fused))
        found.append(weights(model))
    assert all(torch.allclose(value, found[1][name], atol=1e-4) for name, value in found[0].items())


def test_checkpoints_in_training_are_plain_adapters_and_resume_is_to_the_bit(bases, tmp_path):
    def start():
        model = lora(lora_dropout=0.1)
        return model, protect(model, bases, target=1e-3, probe=Probe(HELD), every=2), optimizer_of(model)
    whole, handle, optimizer = start()
    torch.manual_seed(3)
    train(whole, handle, 5, optimizer)
    with handle.settled() as row:
        assert row["settled_kl"] <= 1e-3
        whole.save_pretrained(tmp_path / "settled")
        used = logits(whole)
        with pytest.raises(ValueError, match="call unsettle"):
            handle.step()
    whole.save_pretrained(tmp_path / "adapter")
    saved, draw, seen = handle.save(tmp_path / "handle.safetensors"), torch.get_rng_state(), logits(whole)
    moments = copy.deepcopy(optimizer.state_dict())
    train(whole, handle, 5, optimizer, skip=5)
    for folder, wanted in (("adapter", seen), ("settled", used)):
        assert not [name for name in load_file(tmp_path / folder / "adapter_model.safetensors") if "parametrizations" in name]
        assert torch.allclose(logits(PeftModel.from_pretrained(base_model(), tmp_path / folder).eval()), wanted, atol=1e-4)
    # From the adapter's file, and from a fresh adapter.
    for model in (PeftModel.from_pretrained(base_model(), tmp_path / "adapter", is_trainable=True), lora(lora_dropout=0.1)):
        again = protect(model, bases, target=1e-3, probe=Probe(HELD), every=2, state=read_state(saved))
        optimizer = optimizer_of(model)
        optimizer.load_state_dict(copy.deepcopy(moments))  # it takes the tensors themselves
        torch.set_rng_state(draw)
        train(model, again, 5, optimizer, skip=5)
        assert again.history == handle.history
        assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(model).items())


def test_loading_the_model_alone_is_not_enough(bases):
    model = lora()
    handle = protect(model, bases, opening=1e-2)
    train(model, handle, 3)
    state, kept = handle.state_dict(), {name: value.clone() for name, value in model.state_dict().items()}
    train(model, handle, 3)
    model.load_state_dict(kept)
    with pytest.raises(ValueError, match="load_state_dict"):
        handle.step()
    other = {**state, "tensors": {name: value + 1 for name, value in state["tensors"].items()}}
    with pytest.raises(ValueError, match="not of the checkpoint that was loaded"):
        handle.load_state_dict(other)
    handle.load_state_dict(state)
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items()) and handle.steps == 3
    trained = lora()
    train(trained, steps=2)
    with pytest.raises(ValueError, match="has been trained already"):
        protect(trained, bases, opening=1e-2)


def test_other_mistakes_are_told(bases):
    model = lora()
    for options, said in ((dict(), None), (dict(target=0.1), "belong together"), (dict(probe=Probe(HELD)), "belong together"),
                          (dict(target=0.1, probe=Probe(HELD), opening=1.0), "give one of them"), (dict(every=0), "every must be"),
                          (dict(unprotected="skip"), "must be one of"), (dict(allocation="sensitivity"), "must be linear or model")):
        if said:
            with pytest.raises(ValueError, match=said):
                protect(model, bases, **options)
    with pytest.raises(ValueError, match="no LoRA layers"):
        measure(base_model(), OLD)
    handle = protect(model, bases, opening=1.0)
    with pytest.raises(ValueError, match="protected once"):
        protect(model, bases, opening=1.0)
    handle.merge()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="no linear of the model has LoRA weights of an adapter 'third'"):
        protect(model, bases, opening=1.0, adapter="third")
    model.set_adapter("second")
    handle = protect(model, bases, opening=1.0)
    assert handle.report()["linears"] == 2


class Head(nn.Module):
    """A policy without tokens: what it says are numbers."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)))


def test_a_policy_that_says_numbers():
    torch.manual_seed(0)
    model = get_peft_model(Head(), LoraConfig(r=4, target_modules=["body", "head"]))
    old, held, new = [torch.randn(4, 9, 6) * torch.tensor([1, 1, 1, 0.01, 0.01, 0.01]) for _ in range(3)]
    probe = Probe(list(held), sigma=0.1)
    handle = protect(model, measure(model, list(old)), target=1e-3, probe=probe, every=2)
    before = model(held[0]).detach()
    optimizer = optimizer_of(model, 1e-2)
    for _ in range(20):
        (model(new[0] + 1) - 1).square().mean().backward()
        optimizer.step(), optimizer.zero_grad(), handle.step()
    assert handle.merge()["settled_kl"] <= 1e-3
    with torch.no_grad(), adapters_off(model):
        teacher = model(held)
    assert torch.equal(teacher[0], before)
    with torch.no_grad():
        by_hand = float((model(held) - teacher).square().mean() / (2 * 0.1 ** 2))
    assert probe.measure(model) == pytest.approx(by_hand, rel=1e-4)


def test_pictures_before_the_text_move_no_answer():
    """Logits of nine columns, of which the last five are text: answers 3 and 4 are predicted at columns 6 and 7."""
    model = torch.nn.Linear(1, 1)
    now = torch.randn(1, 9, 6, generator=torch.Generator().manual_seed(0))
    probe = Probe([{"labels": torch.tensor([[-100, -100, -100, 1, 2]])}], lambda model, batch: now)
    probe.prepare(model)
    told = now.clone()
    now[:, :6], now[:, 8] = 7.0, 7.0
    assert probe.measure(model) == pytest.approx(0.0, abs=1e-6)
    now[:, 6:8, 0] += 2.0
    log_p, log_q = torch.log_softmax(told[0, 6:8], -1), torch.log_softmax(now[0, 6:8], -1)
    assert probe.measure(model) == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()), rel=1e-4)
