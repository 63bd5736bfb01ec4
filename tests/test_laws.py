"""The laws of the framework on the real model and the real loop: bitwise switches, bitwise resume, processes, contraction."""

import json
import math
import os
import random
import time
from pathlib import Path

import forked
import pytest
import torch
from conftest import BASELINE, METHOD, SMALL, final_adapter

from vlakeep import train
from vlakeep.core.checkpoint import latest_intact
from vlakeep.core.rundir import read_metrics
from vlakeep.train import TrainingStopped, run_training


@pytest.fixture(scope="module")
def baseline(world):
    storage, make_config = world
    return run_training(make_config(BASELINE, "--name", "law-baseline"), storage)


def test_the_rates_of_a_run_are_those_of_its_schedule(world, baseline):
    """Warm-up over two steps, then a cosine to a tenth, at the steps that the log names."""
    peak = world[1](BASELINE).train.lr
    wanted = [peak / 2, peak] + [peak * (0.1 + 0.45 * (1 + math.cos(math.pi * k / 4))) for k in (1, 2, 3, 4)]
    assert [row["lr"] for row in read_metrics(baseline)] == pytest.approx(wanted)


def test_a_measurement_between_two_logged_steps_is_logged(world):
    """The loop must be replayable from the log."""
    storage, make_config = world
    run = run_training(make_config(METHOD, "--name", "law-between", "--train.log_every", 5, "--thermostat.every", 2), storage)
    steps = {row["step"]: "d" in row for row in read_metrics(run) if row["step"]}
    assert steps == {2: True, 4: True, 5: False, 6: True}


@pytest.mark.parametrize("site", ["residual", "lora_input", "both"])
def test_gains_held_at_one_are_the_baseline_bitwise(world, baseline, site):
    """All hooks in place, the Thermostat measuring, and not a bit moves while beta = gamma = 1."""
    storage, make_config = world
    held = run_training(make_config(METHOD, "--name", f"law-ones-{site}", "--hsw.site", site, "--thermostat.gamma_min", 1.0,
                                    "--thermostat.beta_min", 1.0), storage)
    assert final_adapter(held) == final_adapter(baseline)
    drifts = [row["d"] for row in read_metrics(held)]  # calibration rows (exactly 0 when paired) and one measurement a step
    assert min(drifts) >= 0 and drifts[-1] > 0


@pytest.mark.parametrize("site", ["residual", "lora_input"])
def test_gains_of_one_through_the_whole_arithmetic_are_the_baseline_bitwise(world, baseline, site, monkeypatch):
    """As above without the short cut for gains of one: it saves time, and what it skips adds an exact zero (the weights are gain - 1)."""
    from vlakeep.hsw import lora_input, residual
    from vlakeep.hsw.transform import Gains
    calls, surgery, product, start = [], residual.surgery, lora_input.InputSpace._thin_product, lora_input.InputSpace.__init__

    def begin(self, *args):
        start(self, *args)
        self.set_gains(Gains())

    monkeypatch.setattr(Gains, "identity", False)
    monkeypatch.setattr(lora_input.InputSpace, "__init__", begin)
    monkeypatch.setattr(lora_input, "DENSE", 0)
    monkeypatch.setattr(residual, "surgery", lambda *args: calls.append("residual") or surgery(*args))
    monkeypatch.setattr(lora_input.InputSpace, "_thin_product", lambda *args: calls.append("lora_input") or product(*args))
    storage, make_config = world
    whole = run_training(make_config(METHOD, "--name", f"law-whole-ones-{site}", "--hsw.site", site, "--thermostat.gamma_min", 1.0,
                                     "--thermostat.beta_min", 1.0), storage)
    assert set(calls) == {site}
    assert final_adapter(whole) == final_adapter(baseline)


@pytest.mark.parametrize("site", ["residual", "lora_input"])
def test_gains_below_one_change_the_result(world, baseline, site):
    storage, make_config = world
    run = run_training(make_config(METHOD, "--name", f"law-strong-{site}", "--hsw.site", site, "--hsw.gamma", 0.3, "--hsw.beta", 0.8,
                                   "--thermostat.enabled", False), storage)
    assert final_adapter(run) != final_adapter(baseline)
    rows = read_metrics(run)
    assert all(row["g_prime_norm"] <= row["g_norm"] * (1 + 1e-6) for row in rows), "||g'|| <= ||g|| on every step"
    assert any(row["g_prime_norm"] < 0.999 * row["g_norm"] for row in rows)


@pytest.mark.parametrize("site", ["residual", "lora_input"])
def test_resume_is_the_uninterrupted_run_bitwise(world, site):
    storage, make_config = world
    arm = [METHOD, "--hsw.site", site, "--lora.dropout", 0.1, "--thermostat.threshold_sigmas", 0.0, "--train.schedule", "constant"]
    whole = run_training(make_config(*arm, "--name", f"law-whole-{site}"), storage)
    run_training(make_config(*arm, "--name", f"law-part-{site}", "--train.steps", 3), storage)
    part = run_training(make_config(*arm, "--name", f"law-part-{site}", "--train.resume", True), storage)
    assert final_adapter(part) == final_adapter(whole)
    states = [(latest_intact(folder) / "state.safetensors").read_bytes() for folder in (part, whole)]
    assert states[0] == states[1], "random states of NumPy and Python too, whatever was drawn in this process before"

    def numbers(folder):
        return [{k: v for k, v in row.items() if k != "seconds"} for row in read_metrics(folder)]  # the calibration rows too
    assert numbers(part) == numbers(whole)


def test_a_cosine_that_broke_off_goes_on_as_if_it_had_not_bitwise(world, monkeypatch, capsys):
    """The same train.steps in both parts: the fifth step fails, and the checkpoint of the third is where the run goes on."""
    storage, make_config = world
    kind = [METHOD, "--hsw.site", "lora_input", "--lora.dropout", 0.1, "--train.schedule", "cosine", "--name"]
    whole = run_training(make_config(*kind, "law-cosine"), storage)
    step = train.train_step
    with monkeypatch.context() as broken:
        broken.setattr(train, "train_step", lambda *args: step(*args) if args[6] < 5 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_training(make_config(*kind, "law-broken"), storage)
    assert [row["step"] for row in read_metrics(storage.run_folder("law-broken")) if row["step"]] == [1, 2, 3, 4]
    part = run_training(make_config(*kind, "law-broken", "--train.resume", True), storage)
    assert final_adapter(part) == final_adapter(whole)
    rates = [[row["lr"] for row in read_metrics(folder) if row["step"]] for folder in (part, whole)]
    assert rates[0] == rates[1] and len(set(rates[0])) > 4
    assert "note: --train.steps" not in capsys.readouterr().err


def test_a_cosine_with_another_end_is_another_run_and_that_is_said(world, capsys):
    storage, make_config = world
    kind = [BASELINE, "--train.schedule", "cosine", "--name"]
    whole = run_training(make_config(*kind, "law-six"), storage)
    run_training(make_config(*kind, "law-three", "--train.steps", 3), storage)
    part = run_training(make_config(*kind, "law-three", "--train.resume", True), storage)
    assert final_adapter(part) != final_adapter(whole)
    assert capsys.readouterr().err.count("law-three: note: --train.steps was 3 and is 6 now") == 1
    constant, cosine = ({"train": {"steps": 3, "schedule": name}} for name in ("constant", "cosine"))
    assert train.schedule_note(constant, {"train": {"steps": 6, "schedule": "constant"}}) == train.schedule_note(cosine, cosine) == ""


def command(root, *args):
    return ["train", *SMALL, "--root", str(root), *[str(a) for a in args]]


def test_killed_at_random_moments_and_resumed_is_the_uninterrupted_run_bitwise(world, tmp_path):
    """kill -9 lands anywhere, in the middle of saving too (a checkpoint is written after every step)."""
    storage, make_config = world
    args = ["--config", METHOD, "--train.steps", 12, "--train.save_every", 1]
    whole = run_training(make_config(METHOD, "--name", "law-unkilled", *args[2:]), storage)
    rng = random.Random(0)
    resume, kills = [], int(os.environ.get("VLAKEEP_KILLS", "3"))
    folder = storage.run_folder("law-killed")
    for _ in range(kills):
        child = forked.start(command(storage.root, *args, "--name", "law-killed", *resume), tmp_path / "log")
        seen = len(read_metrics(folder)) if (folder / "metrics.jsonl").is_file() else 0
        deadline = time.monotonic() + 90
        while child.is_alive() and time.monotonic() < deadline:
            rows = len(read_metrics(folder)) if (folder / "metrics.jsonl").is_file() else 0
            if rows > seen:
                break
            time.sleep(0.01)
        time.sleep(rng.random() * 0.3)
        child.kill()  # -9
        child.join()
        resume = ["--train.resume", "true"]
    child = forked.start(command(storage.root, *args, "--name", "law-killed", *resume), tmp_path / "log")
    child.join()
    assert child.exitcode == 0, (tmp_path / "log").read_text()
    assert final_adapter(folder) == final_adapter(whole)
    assert [r["step"] for r in read_metrics(folder) if r["step"]] == list(range(1, 13))


def test_two_processes_are_one_process_with_two_micro_batches_bitwise(world, tmp_path):
    """(g0 + g1) / 2 either way: the sample order does not depend on the number of processes, and halving is exact."""
    storage, make_config = world
    one = run_training(make_config(METHOD, "--name", "law-one", "--train.accumulation", 2), storage)
    forked.run_two_ranks(command(storage.root, "--config", METHOD, "--name", "law-two"), tmp_path)
    assert final_adapter(storage.run_folder("law-two")) == final_adapter(one)


def test_accumulation_of_small_batches_is_the_large_batch(world):
    storage, make_config = world
    # Without clipping, which would hide a gradient of the wrong size; with SGD, because Adam would too.
    common = ["--train.steps", 3, "--train.optimizer", "sgd", "--train.lr", 0.01, "--train.clip", 0]
    large = run_training(make_config(BASELINE, "--name", "law-large", "--train.batch_size", 8, *common), storage)
    small = run_training(make_config(BASELINE, "--name", "law-small", "--train.batch_size", 4, "--train.accumulation", 2, *common), storage)
    from safetensors.torch import load
    a, b = load(final_adapter(large)), load(final_adapter(small))
    assert max((a[k] - b[k]).abs().max().item() for k in a) < 1e-6


@pytest.mark.parametrize("config", [BASELINE, METHOD])
def test_the_loss_falls_as_the_configurations_have_it(world, config):
    """And the surgery never lengthens a gradient."""
    storage, make_config = world
    name = f"law-falls-{Path(config).stem}"
    rows = read_metrics(run_training(make_config(config, "--name", name, "--train.steps", 30, "--thermostat.every", 10), storage))
    losses = [row["loss"] for row in rows if row["step"]]
    assert len(losses) == 30 and sum(losses[-5:]) < 0.8 * sum(losses[:5]), losses
    norms = [(row["g_prime_norm"], row["g_norm"]) for row in rows if "g_norm" in row]
    assert bool(norms) == (config != BASELINE) and all(after <= before * (1 + 1e-6) for after, before in norms)


def test_drift_and_gains_move_in_the_log_and_can_be_replayed(world):
    from vlakeep.methods.icsm_hsw_thermostat import control_law
    from vlakeep.thermostat.controller import replay
    storage, make_config = world
    config = make_config(METHOD, "--name", "law-loop", "--hsw.site", "lora_input", "--thermostat.estimator", "paired",
                         "--thermostat.gamma_max", 1.0,
                         "--train.steps", 10, "--train.lr", 5e-3)
    rows = read_metrics(run_training(config, storage))
    assert rows[0]["calibrating"] == 1.0 and rows[-1]["calibrating"] == 0.0
    assert len({row["d"] for row in rows}) > 5
    trained = [row for row in rows if row["step"]]
    gammas = [row["gamma"] for row in trained]
    assert gammas[0] == 1.0 and min(gammas) < 1.0
    replayed = replay(control_law(config), [row["d"] for row in rows])
    assert [r["gamma"] for r in replayed] == [row["next_gamma"] for row in rows]
    for row in trained:
        assert {"step", "loss", "d", "beta", "gamma", "g_norm", "g_prime_norm", "grad_norm", "grad_norm_clipped"} <= set(row)


def test_sigterm_saves_and_the_run_goes_on_bitwise(world, tmp_path):
    storage, make_config = world
    args = ["--config", BASELINE, "--train.steps", 200, "--train.save_every", 1000]
    folder = storage.run_folder("law-term")
    child = forked.start(command(storage.root, *args, "--name", "law-term"), tmp_path / "log")
    while child.is_alive() and not ((folder / "metrics.jsonl").is_file() and len(read_metrics(folder)) >= 2):
        time.sleep(0.02)
    child.terminate()  # SIGTERM
    child.join(60)
    assert child.exitcode == 143, (tmp_path / "log").read_text()
    assert json.loads((folder / "provenance.json").read_text())["status"] == "interrupted"
    steps = len(read_metrics(folder))
    assert [p.name for p in (folder / "checkpoints").iterdir()] == [f"step_{steps:06d}"]


def test_a_loss_that_is_not_a_number_stops_the_run_and_keeps_the_last_good_checkpoint(world, monkeypatch):
    from vlakeep.openvla.backbone import OpenVLABackbone
    storage, make_config = world
    original, calls = OpenVLABackbone.loss, []

    def broken(self, batch):
        calls.append(1)
        out = original(self, batch)
        return out._replace(loss=out.loss * float("nan")) if len(calls) > 4 else out

    monkeypatch.setattr(OpenVLABackbone, "loss", broken)
    with pytest.raises(TrainingStopped, match="step 5; the checkpoint of step 3 is kept"):
        run_training(make_config(BASELINE, "--name", "law-nan"), storage)
    folder = storage.run_folder("law-nan")
    assert json.loads((folder / "provenance.json").read_text())["status"] == "failed"
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step_000003"]
    assert torch.isfinite(torch.tensor([r["loss"] for r in read_metrics(folder)[:4]])).all()


def test_hidden_states_that_blow_up_stop_the_run_with_a_remedy(world):
    storage, make_config = world
    with pytest.raises(TrainingStopped, match="hidden states blew up.*Lower --train.lr"):
        run_training(make_config(BASELINE, "--name", "law-blowup", "--train.lr", 3.0, "--train.clip", 0.0, "--train.steps", 40,
                                 "--train.blowup_factor", 1.5, "--train.warmup", 0), storage)
