"""Loss scaling for float16: it changes no bit of what a step does, surgery and loop included, and skips alike on all ranks."""

import math
from contextlib import closing

import forked
import pytest
import torch
from conftest import BASELINE, GRADED, METHOD, final_adapter

from vlakeep import train
from vlakeep.core.loss_scale import LossScaler
from vlakeep.core.parallel import Distributed
from vlakeep.core.rundir import read_metrics
from vlakeep.methods.baseline import Baseline
from vlakeep.models.adapters import add_lora
from vlakeep.models.load import make_backbone
from vlakeep.train import run_training, train_step

# Per arm what puts its surgery and its loop to work from the first steps on.
ARMS = {
    "baseline": (BASELINE, []),
    "residual": (METHOD, ["--thermostat.gamma_max", 0.7, "--thermostat.beta_max", 0.9]),
    "lora_input": (METHOD, ["--hsw.site", "lora_input"]),
    "graded": (GRADED, ["--thermostat.batch_size", 4]),
}


def stepped(gradients, **options):
    """(weight after each step, scaler) of SGD at rate 1, whose gradients these are."""
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer, scaler = torch.optim.SGD([weight], lr=1.0), LossScaler(True, **options)
    trail = []
    for gradient in gradients:
        optimizer.zero_grad()
        scaler.scale((weight * torch.tensor([gradient, 1.0])).sum()).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        trail.append(weight[1].item())
    return trail, scaler


def test_an_overflow_is_skipped_and_halves_the_factor_and_good_steps_double_it():
    trail, scaler = stepped([1.0, math.inf, math.nan, 1.0, 1.0], factor=64.0, interval=2)
    assert trail == [-1.0, -1.0, -1.0, -2.0, -3.0] and scaler.skipped == 2
    assert scaler.get_scale() == 32.0 and scaler.log() == {"loss_scale": 32.0, "skipped_steps": 2.0}


def test_its_state_goes_on_and_that_of_torch_is_read():
    _, scaler = stepped([1.0, math.inf, 1.0], factor=64.0, interval=2)
    other = LossScaler(True)
    other.load_state_dict(scaler.state_dict())
    assert other.state_dict() == scaler.state_dict() == {"scale": 32.0, "_growth_tracker": 1, "skipped": 1}
    older = {"scale": 1024.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000, "_growth_tracker": 7}
    other.load_state_dict(older)
    assert other.state_dict() == {"scale": 1024.0, "_growth_tracker": 7, "skipped": 0}
    other.load_state_dict({})  # of a run without scaling
    assert other.get_scale() == 1024.0


def test_without_it_nothing_is_touched():
    scaler, loss = LossScaler(False), torch.ones(())
    assert scaler.scale(loss) is loss and scaler.get_scale() == 1.0 and scaler.state_dict() == {} and scaler.log() == {}
    with pytest.raises(ValueError, match="power of two"):
        LossScaler(True, factor=1000.0)


@pytest.mark.parametrize("arm", ARMS)
def test_no_bit_of_a_run_depends_on_the_factor(world, graded_folder, monkeypatch, arm):
    """In float32, where powers of two are exact: weights, gradient norms, what surgery takes, drift and gains."""
    storage, make_config = world
    file, own = ARMS[arm]
    runs = []
    for name, scaler in (("plain", LossScaler(False)), ("scaled", LossScaler(True, factor=2.0**12))):
        monkeypatch.setattr(train, "LossScaler", lambda enabled, scaler=scaler: scaler)
        config = make_config(file, *own, "--name", f"{name}-{arm}", "--train.accumulation", 2, "--train.steps", 2)
        runs.append(run_training(config, storage))
    assert final_adapter(runs[0]) == final_adapter(runs[1])
    plain, scaled = (read_metrics(run) for run in runs)
    assert {row["loss_scale"] for row in scaled if row["step"]} == {4096.0}
    for one, other in zip(plain, scaled):
        for key in one.keys() - {"seconds"}:
            assert one[key] == pytest.approx(other[key], rel=1e-5, abs=1e-12), key


def test_one_gradient_that_overflows_is_enough():
    good, bad = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer, scaler = torch.optim.SGD([good, bad], lr=0.5), LossScaler(True, factor=8.0)
    scaler.scale(good.sum() + (bad * torch.tensor([1.0, math.inf])).sum()).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(good, torch.ones(2)) and scaler.skipped == 1 and scaler.get_scale() == 4.0


def test_a_step_in_float16_is_that_of_float32_within_its_rounding(world):
    """The real model in half precision: weights, activations and their gradients; adapters, norms and the loss are float32."""
    storage, make_config = world
    moved = {}
    for dtype in ("float32", "float16"):
        config = make_config(BASELINE, "--train.clip", 0, "--lora.layers", "last:2")
        backbone = make_backbone(config.backbone, "cpu", storage.cache)
        with closing(train.make_stream(config.data, storage.data, backbone.processor, 1, config.seed, 0, 1)) as stream:
            batch = next(stream)
        if dtype == "float16":
            backbone.half()
            config.train.autocast = dtype
        add_lora(backbone, config.lora, config.seed)
        for number, (name, p) in enumerate((n, p) for n, p in backbone.named_parameters() if p.requires_grad):
            assert p.dtype == torch.float32, name
            if "lora_B" in name:  # zero at the start, which would hide A's gradient
                torch.nn.init.normal_(p, std=0.02, generator=torch.Generator().manual_seed(number))
        params = [p for p in backbone.parameters() if p.requires_grad]
        before = [p.detach().clone() for p in params]
        scaler = LossScaler(dtype == "float16")
        metrics = train_step(backbone.train(), Baseline(), torch.optim.SGD(params, lr=0.1), scaler, [batch], config.train, 1, True)
        assert scaler.skipped == 0 and metrics["loss"].dtype == torch.float32
        moved[dtype] = torch.cat([(p.detach() - old).flatten() for p, old in zip(params, before)]), float(metrics["loss"])
    (exact, loss), (half, half_loss) = moved["float32"], moved["float16"]
    assert half_loss == pytest.approx(loss, rel=0.03)
    assert torch.cosine_similarity(exact, half, dim=0) > 0.999 and float(half.norm() / exact.norm()) == pytest.approx(1, abs=0.02)
    assert (half == 0).float().mean() <= (exact == 0).float().mean() + 0.001, "gradients have vanished"


def _rank(folder):
    """One of two processes whose gradients stay its own, as those of sharded parameters do; the second one's overflows once."""
    with Distributed("cpu", timeout_s=60) as job:
        trail, scaler = stepped([1.0, math.inf if job.rank else 1.0, 1.0], factor=64.0)
        (folder / str(job.rank)).write_text(f"{trail} {scaler.state_dict()}")


def test_ranks_skip_a_step_together(tmp_path):
    forked.two_ranks(_rank, tmp_path)
    said = [(tmp_path / str(rank)).read_text() for rank in range(2)]
    assert said[0] == said[1] == "[-1.0, -1.0, -2.0] {'scale': 32.0, '_growth_tracker': 1, 'skipped': 1}"
