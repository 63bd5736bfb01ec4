"""The closing pass: its formula against least squares, its search, the sweep from front to back, and what an export with it leaves."""

import json
import shlex
from dataclasses import replace

import pytest
import torch
from conftest import BASELINE, final_adapter
from safetensors.torch import load_file

from vlakeep import closing_pass
from vlakeep.core.config import load_config
from vlakeep.core.errors import CheckpointError
from vlakeep.core.schema import ConfigError
from vlakeep.core.target import target_checkpoint
from vlakeep.evaluate import load_target
from vlakeep.export import offline_command, run_export
from vlakeep.methods import graded_offline
from vlakeep.models.adapters import adapters_disabled, load_adapter
from vlakeep.models.load import make_backbone
from vlakeep.openvla.prompts import encode_prompts
from vlakeep.probe.probe_set import ProbeSet
from vlakeep.teacher import artifact, closing
from vlakeep.teacher.collect import token_moments, with_own_answers
from vlakeep.train import run_training

# The formula


def inputs(seed=0, dim=20):
    generator = torch.Generator().manual_seed(seed)
    new_TD = torch.randn(300, dim, generator=generator, dtype=torch.float64) * torch.logspace(0, -2, dim, dtype=torch.float64)
    old_TD = torch.randn(500, dim, generator=generator, dtype=torch.float64) * torch.logspace(-2, 0.5, dim, dtype=torch.float64)
    mixing_DD = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))[0]
    return new_TD, old_TD @ mixing_DD, torch.randn(4, dim, generator=generator, dtype=torch.float64)


def moment(x_TD):
    return x_TD.T @ x_TD / len(x_TD)


@pytest.mark.parametrize("mu", [1e-3, 0.5, 30.0])
def test_the_closed_update_is_the_least_squares_solution(mu):
    """Minimise E_new |A' x - A x|^2 + mu E_probe |A' x|^2 over A', by QR on the samples themselves."""
    new_TD, old_TD, A = inputs()
    rows = torch.cat([new_TD / len(new_TD) ** 0.5, old_TD * (mu / len(old_TD)) ** 0.5])
    wanted = torch.cat([new_TD @ A.T / len(new_TD) ** 0.5, torch.zeros(len(old_TD), 4, dtype=torch.float64)])
    solution = torch.linalg.lstsq(rows, wanted).solution.T
    found = closing.closed(A, moment(new_TD), moment(old_TD), mu)
    assert torch.allclose(found, solution, rtol=1e-2, atol=1e-3 * float(solution.abs().max()))
    B = torch.randn(7, 4, dtype=torch.float64)
    dense = (B @ A) @ moment(new_TD) @ torch.linalg.inv(moment(new_TD) + mu * moment(old_TD))
    assert torch.allclose(B @ found, dense, rtol=1e-2, atol=1e-3 * float(dense.abs().max()))


def test_nothing_is_closed_by_mu_zero_and_all_by_a_large_one():
    new_TD, old_TD, A = inputs()
    assert torch.equal(closing.closed(A, moment(new_TD), moment(old_TD), 0.0), A)
    sizes = [float(old_TD.matmul(closing.closed(A, moment(new_TD), moment(old_TD), mu).T).norm()) for mu in (1e-3, 1.0, 1e3, 1e6)]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] < 1e-4 * float((old_TD @ A.T).norm())
    assert closing.closed(A.float(), moment(new_TD).float(), moment(old_TD).float(), 1.0).dtype == torch.float32


def test_directions_of_one_side_alone_and_of_neither():
    generator = torch.Generator().manual_seed(1)
    new_TD, old_TD = torch.randn(100, 9, generator=generator), torch.randn(100, 9, generator=generator)
    new_TD[:, 3:] = 0  # directions 0 to 2 belong to the new task, 3 to 5 to the probe, 6 to 8 to neither
    old_TD[:, :3] = old_TD[:, 6:] = 0
    A = torch.randn(4, 9, generator=generator)
    for mu in (1e-2, 1.0, 1e4):
        found = closing.closed(A, moment(new_TD), moment(old_TD), mu)
        assert torch.allclose(found[:, :3], A[:, :3], atol=2e-2 if mu == 1e4 else 1e-4) and float(found[:, 3:].abs().max()) < 1e-5
    assert not closing.closed(A, 0 * moment(new_TD), 0 * moment(old_TD), 1.0).any(), "no inputs at all"


# The search


@pytest.mark.parametrize("name, plant", [
    ("smooth", lambda mu: 0.2 / (1 + mu)), ("steep", lambda mu: 0.2 / (1 + 30 * mu) ** 2), ("flat", lambda mu: 0.2 / (1 + 1e4 * mu) ** 0.4),
    ("late", lambda mu: 0.2 / (1 + 1e-4 * mu)), ("it jumps", lambda mu: 0.05 if mu < 20 else 0.001),
    ("at the least mu", lambda mu: 0.2 if mu == 0 else 0.001), ("it rises in between", lambda mu: 0.2 / (1 + mu) * (1 + (mu > 60) / 3))])
def test_the_search_ends_just_within_the_budget(name, plant):
    asked = []
    trail = closing.search(lambda mu: asked.append(mu) or plant(mu), 0.004, plant(0))
    mu, divergence = trail[-1]
    assert divergence == plant(mu) <= 0.004 and len(asked) < closing.MOST
    assert sorted(trail) == sorted([(0.0, plant(0)), *((one, plant(one)) for one in asked)])
    if name == "it jumps":
        assert 20 <= mu < 20.5 and asked[-1] != mu, "what is kept need not be what was tried last"
    elif name != "at the least mu":
        assert divergence >= 0.0036, trail


def test_nothing_is_measured_within_the_budget_and_one_that_is_out_of_reach_is_said():
    assert closing.search(lambda mu: 1 / 0, 0.01, 0.004) == [(0.0, 0.004)]
    with pytest.raises(ValueError, match=r"no mu brings the divergence to 0.01 nats: with mu = 1e\+06 it is still 0.5 .*--export.close_to"):
        closing.search(lambda mu: 0.5, 0.01, 0.6)
    with pytest.raises(ValueError, match="still nan"):
        closing.search(lambda mu: float("nan"), 0.01, 0.6)


# A student


@pytest.fixture(scope="module")
def run(world, graded_folder):
    """(config of an export, storage): plain LoRA with three times the usual scale, trained far enough to forget; the artefact is there."""
    storage, make_config = world
    config = make_config(BASELINE, "--name", "open", "--lora.alpha", 12, "--train.steps", 20, "--train.lr", 5e-3, "--train.batch_size", 8,
                         "--train.save_every", 20, "--export.dtype", "float32", "--export.parity_frames", 4, "--icsm.batch_size", 16)
    run_training(config, storage)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(closing_pass, "NEW_FRAMES", 48)
        yield config, storage


@pytest.fixture(scope="module")
def student(run):
    """(backbone, probe parts, parts of the new task, sensor, A as trained)."""
    config, storage = run
    backbone = make_backbone(config.backbone, "cpu", storage.cache)
    load_adapter(backbone, target_checkpoint("open", storage) / "adapter")
    probe = ProbeSet(storage.probe_folder("tabletop"))
    items = probe.spread(config.probe.size)
    fit, _ = graded_offline.split_items(items, probe.kinds(items), config.gains.holdout)
    old = closing_pass._parts(backbone, probe.samples(fit), 16, teacher=True)
    new = closing_pass._parts(backbone, closing_pass._new_samples(config, storage, backbone), 16, teacher=False)
    art = artifact.load_artifact(storage.artifacts / "graded_tabletop-base")
    own = {name: linear.lora_A["default"].weight.detach().clone() for name, linear in backbone.adapted_linears().items()}
    return backbone, old, new, closing_pass.make_sensor(config, backbone, probe, art), own


def as_trained(backbone, own):
    return all(torch.equal(linear.lora_A["default"].weight, own[name]) for name, linear in backbone.adapted_linears().items())


def test_the_divergence_falls_as_mu_grows(student):
    backbone, old, new, sensor, own = student
    before, found = sensor.measure(), []
    for mu in (0.3, 100.0, 1e6):
        closing.sweep(backbone, old, new, own, mu, backbone.input_key)
        found.append(sensor.measure())
    assert before > found[0] and found == sorted(found, reverse=True) and found[-1] < 1e-3 * before
    closing.sweep(backbone, old, new, own, 0.0, backbone.input_key)
    assert as_trained(backbone, own) and sensor.measure() == before


def test_each_layer_is_closed_for_what_reaches_it_when_those_before_are_closed(run, student):
    """The moments by icsm's own collector, on whole prompts, in a model whose other layers are as the sweep left them."""
    config, storage = run
    backbone, old, new, _, own = student
    try:
        closing.sweep(backbone, old, new, own, 2.0, backbone.input_key)
        linears = {name: linear for name, linear in backbone.adapted_linears().items() if name.startswith("layers.4.")}
        found = {name: linear.lora_A["default"].weight.detach().clone() for name, linear in linears.items()}
        probe = ProbeSet(storage.probe_folder("tabletop"))
        items = probe.spread(config.probe.size)
        fit, _ = graded_offline.split_items(items, probe.kinds(items), config.gains.holdout)
        prompts = encode_prompts(probe.samples(fit), backbone.processor)
        with adapters_disabled(backbone):
            asked = with_own_answers(backbone, prompts, backbone.answer_tokens)
        closed_A = {name: linear.lora_A["default"].weight.detach().clone() for name, linear in backbone.adapted_linears().items()}
        with torch.no_grad():  # the student answers as it was trained
            for name, linear in backbone.adapted_linears().items():
                linear.lora_A["default"].weight.copy_(own[name])
            samples = closing_pass._new_samples(config, storage, backbone)
            batches = [with_own_answers(backbone, encode_prompts(samples[i:i + 16], backbone.processor), backbone.answer_tokens)
                       for i in (0, 16, 32)]
            for name, linear in backbone.adapted_linears().items():
                linear.lora_A["default"].weight.copy_(own[name] if name in linears else closed_A[name])
        C_new, C_probe = token_moments(backbone, batches, linears), token_moments(backbone, [asked], linears)
        for name, A_RD in found.items():
            C, P = C_new[backbone.input_key(name)].double(), C_probe[backbone.input_key(name)].double()
            dense = own[name].double() @ C @ torch.linalg.inv(C + 2.0 * P + 1e-7 * (C + 2.0 * P).trace() * torch.eye(len(C)))
            assert torch.allclose(A_RD.double(), dense, atol=2e-3 * float(dense.abs().max())), name
    finally:
        closing.sweep(backbone, old, new, own, 0.0, backbone.input_key)


# The export


def exact_divergence(teacher, model, probe, items):
    """Whole vocabulary, one prompt at a time, two whole models."""
    found = []
    for item in items:
        batch = encode_prompts(probe.samples([item]), teacher.processor)
        tokens = with_own_answers(teacher, batch, teacher.answer_tokens).input_ids[:, batch.input_ids.shape[1]:]
        p, q = (m.log_probabilities_of_continuation(batch, tokens).double() for m in (teacher, model))
        found.append(float((p.exp() * (p - q)).sum(-1).mean()))
    kinds = probe.kinds(items)
    # A kind counts like the root of its number, but of so few no item more than the mean.
    roots = [kinds.count(kind) ** -0.5 for kind in kinds]
    weights = [min(1.0, root * len(kinds) / sum(roots)) for root in roots]
    return sum(weight * one for weight, one in zip(weights, found)) / sum(weights)


def test_the_exported_model_keeps_to_the_budget_and_is_the_base_plus_the_closed_update(run, capsys):
    config, storage = run
    config.export.close_to = 0.01
    try:
        folder = run_export(config, storage)
        with pytest.raises(FileExistsError, match="--evaluate.target open-closed-0.01.*--export.overwrite true"):
            run_export(config, storage)
    finally:
        config.export.close_to = None
    run_folder = storage.run_folder("open-closed-0.01")
    assert folder == run_folder / "merged-step_000020"
    record = json.loads((folder / "vlakeep_export.json").read_text())
    found = record["closing"]
    assert found["mu"] > 0 and found["kl_before"] > 0.015 and 0.009 <= found["kl_after"] <= 0.01, found
    assert json.loads((run_folder / "closing.json").read_text()) == {k: v for k, v in found.items() if k != "kl_merged"}
    assert found["new_frames"] == 48 and found["probe_items"] + found["held_out_items"] == 48
    assert len(found["left"]) == 6 and all(0 < one["old"] < 0.8 * one["new"] < 0.8 for one in found["left"].values()), found["left"]
    said = capsys.readouterr().out
    assert f"mu {found['mu']:.4g}" in said and "what is left of the update" in said and "divergence of the merged model" in said
    # The divergence, by two whole models.
    teacher, merged = make_backbone(config.backbone, "cpu", storage.cache), make_backbone(str(folder), "cpu")
    probe = ProbeSet(storage.probe_folder("tabletop"))
    items = artifact.load_artifact(storage.artifacts / "graded_tabletop-base").answers()[1]
    exact = exact_divergence(teacher, merged, probe, items)
    assert exact == pytest.approx(found["kl_merged"], rel=0.02) == pytest.approx(found["kl_after"], rel=0.02)
    # Base + closed update; B as it was trained, A closed.
    checkpoint = target_checkpoint("open-closed-0.01", storage)
    before = load_file(target_checkpoint("open", storage) / "adapter" / "adapter_model.safetensors")
    after = load_file(checkpoint / "adapter" / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) == name.endswith("lora_B.weight") for name in before)
    base, got = teacher.openvla.state_dict(), merged.openvla.state_dict()
    for name, tensor in base.items():
        A = after.get(f"base_model.model.{name[:-len('.weight')]}.lora_A.weight")
        B = after.get(f"base_model.model.{name[:-len('.weight')]}.lora_B.weight")
        assert torch.allclose(got[name], tensor if A is None else tensor + 3.0 * B @ A, atol=1e-6), name
    # It is a run for all stages behind it.
    config.evaluate.target = "open-closed-0.01"
    backbone, name, _ = load_target(config, storage, "cpu")
    assert name == "open-closed-0.01" and backbone.norm_stats.keys() >= {"tabletop_corner"}
    with pytest.raises(CheckpointError, match="nothing to train it further with"):
        run_training(replace(config, name="open-closed-0.01", train=replace(config.train, resume=True, steps=21)), storage)
    assert final_adapter(run_folder) == (checkpoint / "adapter" / "adapter_model.safetensors").read_bytes()


def test_without_a_closing_pass_the_export_is_what_it_was(run):
    from vlakeep.models.adapters import merged_state

    config, storage = run
    assert config.export.close_to is None
    folder = run_export(config, storage)
    record = json.loads((folder / "vlakeep_export.json").read_text())
    assert "closing" not in record and record["run"] == "open" and folder.parent.name == "open"
    backbone = make_backbone(config.backbone, "cpu", storage.cache)
    load_adapter(backbone, target_checkpoint("open", storage) / "adapter")
    wanted, found = merged_state(backbone, torch.float32), make_backbone(str(folder), "cpu").openvla.state_dict()
    assert all(torch.equal(found[name], wanted[name].float()) for name in wanted)


def test_an_adapter_within_the_budget_is_left_as_it_is(run, capsys):
    config, storage = run
    config.export.close_to = 50.0
    try:
        folder = run_export(config, storage)
    finally:
        config.export.close_to = None
    record = json.loads((folder / "vlakeep_export.json").read_text())["closing"]
    assert record["mu"] == 0 and record["kl_before"] == record["kl_after"]
    assert all(set(one.values()) == {1.0} for one in record["left"].values())
    assert "nothing is closed" in capsys.readouterr().out
    assert final_adapter(storage.run_folder("open-closed-50")) == final_adapter(storage.run_folder("open"))


# Mistakes


def test_what_is_missing_is_said_with_the_command_that_makes_it(run, world):
    config, storage = run
    make_config = world[1]
    argv = ["--config", "my run/it's.yaml", "--export.target=open", "--export.close_to", "0.01", "--root", "a b", "--export.dtype=float32"]
    command = offline_command(argv)
    assert shlex.split(command) == ["vlakeep", "offline", "--config", "my run/it's.yaml", "--root", "a b", "--method", "graded"]
    arm = [BASELINE, "--name", "open", "--export.close_to", 0.5, "--export.parity_frames", 0]
    for more, message in ((["--gains.name", "nowhere"], "no artefact of the graded"), (["--gains.holdout", 0.3], "gains.holdout 0.2")):
        with pytest.raises(ValueError, match=message) as error:
            run_export(make_config(*arm, *more), storage, command)
        assert str(error.value).splitlines()[-1].strip() == command
    with pytest.raises(FileNotFoundError, match="no data set elsewhere.*--data.datasets"):
        run_export(make_config(*arm, "--export.close_to", 1e-3, "--data.datasets", "[elsewhere]"), storage)
    (storage.run_folder("open-closed-0.25")).mkdir()
    with pytest.raises(FileExistsError, match="was not made by a closing pass"):
        run_export(make_config(*arm, "--export.close_to", 0.25, "--export.overwrite", True), storage)
    assert not storage.run_folder("open-closed-0.5").exists() and not storage.run_folder("open-closed-0.001").exists()
    with pytest.raises(ConfigError, match="--closed-only needs --export.close_to"):
        run_export(config, storage, closed_only=True)
    with pytest.raises(ConfigError, match="export.close_to -1.0: must be greater than 0"):
        load_config(BASELINE, ["--export.close_to", "-1"])
