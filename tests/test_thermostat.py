"""Thermostat: the law is monotone, bounded, calibrated, replayable; the drift estimators against closed forms."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import METHOD

from vlakeep.core.config import load_config
from vlakeep.core.errors import TrainingStopped
from vlakeep.methods.icsm_hsw_thermostat import IcsmHswThermostat, control_law
from vlakeep.thermostat.controller import Controller, Law, replay
from vlakeep.thermostat.drift import covariance, covariance_drift, paired_drift
from vlakeep.thermostat.thermometer import Thermometer


def law(**changes):
    values = dict(gamma_min=0.0, gamma_max=1.0, beta_min=0.4, beta_max=1.0, calibration=3, threshold_sigmas=2.0, half_excess=0.5,
                  ema=1.0, dead_band=0.0, rate_limit=10.0)
    values.update(changes)
    return Law(**values)


def test_larger_drift_gives_smaller_gains_and_beta_never_reaches_zero():
    gains = [law().target(d, threshold=1.0, noise=0.1) for d in torch.linspace(0, 1000, 200).tolist()]
    betas, gammas = zip(*gains)
    assert all(a >= b for a, b in zip(betas, betas[1:])) and all(a >= b for a, b in zip(gammas, gammas[1:]))
    assert gammas[-1] < gammas[100] < gammas[1] < gammas[0] == 1.0 and betas[-1] < betas[100] < betas[1] < betas[0] == 1.0
    assert min(betas) >= 0.4 > 0 and min(gammas) >= 0


def test_gamma_falls_when_drift_rises_and_recovers_when_it_falls():
    rows = replay(law(), [1.0, 1.1, 0.9, 1.0, 2.0, 4.0, 8.0, 1.0])
    gammas = [row["gamma"] for row in rows]
    assert gammas[4] > gammas[5] > gammas[6] < gammas[7] == 1.0


def test_calibration_only_measures_and_sets_the_threshold_from_the_noise():
    rows = replay(law(ema=0.5), [1.0, 2.0, 3.0, 2.0])
    assert [row["calibrating"] for row in rows] == [1.0, 1.0, 1.0, 0.0]
    assert all(row["gamma"] == row["beta"] == 1.0 for row in rows[:3])
    # The standard deviation of the three is 1; a moving average of weight 1/2 has sqrt(1/3) of it.
    assert rows[3]["threshold"] == pytest.approx(2.0 + 2.0 * math.sqrt(1 / 3))


def test_rate_limit_dead_band_and_moving_average():
    rows = replay(law(rate_limit=0.1), [1, 1, 1, 100, 100, 100])
    assert [round(row["gamma"], 6) for row in rows[3:]] == [0.9, 0.8, 0.7]
    held = replay(law(dead_band=0.5), [1, 1, 1, 3.0, 3.3])
    assert held[4]["gamma"] == held[3]["gamma"]
    smoothed = replay(law(ema=0.25), [1, 1, 1, 5.0])
    assert smoothed[3]["d_ema"] == pytest.approx(2.0)


def test_an_estimator_without_noise_gets_the_floor():
    """Paired drift is exactly zero during calibration; the floor says what counts as one noise level."""
    rows = replay(law(noise_floor=0.01, threshold_sigmas=2.0, half_excess=1.0), [0, 0, 0, 0.02, 0.03, 0.05])
    assert rows[3]["threshold"] == pytest.approx(0.02) and rows[3]["gamma"] == 1.0
    assert rows[4]["gamma"] == pytest.approx(0.5) and rows[5]["gamma"] == pytest.approx(0.25)


def test_a_value_that_is_not_a_number_holds_the_gains_and_is_counted():
    controller = Controller(law())
    for d in [1, 1, 1, 4.0]:
        controller.update(d)
    before = (controller.beta, controller.gamma, controller.average)
    controller.update(math.nan)
    controller.update(math.inf)
    assert (controller.beta, controller.gamma, controller.average) == before and controller.rejected == 2


def test_state_round_trip_continues_the_same_trajectory():
    drifts = [1.0, 1.2, 0.8, 1.5, 3.0, 2.0, 4.0]
    whole = replay(law(ema=0.5, rate_limit=0.2), drifts)
    first = Controller(law(ema=0.5, rate_limit=0.2))
    for d in drifts[:4]:
        first.update(d)
    second = Controller(law(ema=0.5, rate_limit=0.2))
    second.load_state_dict(first.state_dict())
    assert [second.update(d) for d in drifts[4:]] == whole[4:]


@pytest.mark.parametrize("drift", [float("nan"), float("inf"), -1.0])
def test_a_drift_that_is_no_number_stops_the_calibration(drift):
    config = load_config(METHOD)
    method, drifts = IcsmHswThermostat(config), iter([1.0, drift] * 10 ** 4)
    method._controller, method._thermometer = Controller(control_law(config)), SimpleNamespace(measure=lambda number: drift)
    with pytest.raises(TrainingStopped, match=f"{config.thermostat.calibration + 1} of .* measurements of the drift"):
        method.before_training()
    method._controller, method._thermometer = Controller(control_law(config)), SimpleNamespace(measure=lambda number: next(drifts))
    rows = method.before_training()
    assert sum(row["d"] == 1.0 for row in rows) == config.thermostat.calibration, "one that is not finite now and then is left out"


@pytest.mark.parametrize("changes", [{"gamma_min": -0.1}, {"gamma_max": 1.5}, {"beta_min": 0.0}, {"calibration": 1}, {"ema": 0.0},
                                     {"half_excess": 0.0}, {"rate_limit": 0.0}])
def test_a_law_out_of_range_is_refused(changes):
    with pytest.raises(ValueError):
        law(**changes)


def test_covariance_against_torch_and_drift_of_a_scaled_cloud():
    torch.manual_seed(0)
    x = torch.randn(50, 8)
    assert torch.allclose(covariance(x), torch.cov(x.T.double()), atol=1e-10)
    teacher = {3: covariance(x)}
    assert covariance_drift({3: x}, teacher).item() == 0.0
    # (1 + a) x has covariance (1 + a)^2 C, so d = ((1 + a)^2 - 1) ||C||.
    wanted = (1.5 ** 2 - 1) * torch.linalg.matrix_norm(teacher[3]).item()
    assert covariance_drift({3: 1.5 * x}, teacher).item() == pytest.approx(wanted, rel=1e-6)


def test_paired_drift_is_zero_at_zero_drift_and_relative_otherwise():
    torch.manual_seed(0)
    x = torch.randn(30, 8)
    mean = {0: x.mean(0)}
    assert paired_drift({0: x}, {0: x}, mean).item() == 0.0
    scaled = mean[0] + 1.25 * (x - mean[0])
    assert paired_drift({0: scaled}, {0: x}, mean).item() == pytest.approx(0.25, rel=1e-5)


SEED, DRAW = 11, 12


@pytest.fixture(scope="module")
def student(world):
    """(backbone with dropout and adapters that do something, in training mode; items; pooled states of teacher and student; batches)."""
    from vlakeep.models.adapters import add_lora
    from vlakeep.models.load import make_backbone
    from vlakeep.probe.batches import prompt_batches
    from vlakeep.probe.probe_set import ProbeSet
    from vlakeep.teacher.collect import pooled_states

    storage, make_config = world
    config = make_config(METHOD, "--lora.dropout", 0.5)
    backbone, probe = make_backbone(config.backbone).eval(), ProbeSet(storage.probe_folder(config.probe.name))
    items, layers = list(range(30)), [3, 5]

    def pooled():
        return pooled_states(backbone, prompt_batches(probe, items, backbone.processor, 7), layers, quiet=True).states

    teacher = pooled()
    add_lora(backbone, config.lora, 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for linear in backbone.adapted_linears().values():
            weight = linear.lora_B["default"].weight
            weight.copy_(0.02 * torch.randn(weight.shape, generator=generator))
    moved = pooled()
    return backbone.train(), items, teacher, moved, lambda: prompt_batches(probe, items, backbone.processor, 7)


@pytest.mark.parametrize("estimator", ["paired", "covariance"])
def test_a_measurement_is_the_drift_of_the_items_that_it_draws(student, estimator):
    """Only the layers above the first adapter are run, without dropout, and the model is left as it was."""
    backbone, items, teacher, moved, batches = student
    mean, wide = ({layer: function(x) for layer, x in teacher.items()} for function in (lambda x: x.mean(0), covariance))
    thermometer = Thermometer(backbone, batches(), items, [3, 5], backbone.first_adapted_layer(), estimator, DRAW, SEED, mean, wide,
                              teacher)
    assert backbone.training
    for number in (0, 4):
        rows = np.sort(np.random.default_rng([SEED, number]).choice(len(items), DRAW, replace=False))
        some = {layer: x[rows] for layer, x in moved.items()}
        expected = (covariance_drift(some, wide) if estimator == "covariance" else
                    paired_drift(some, {layer: x[rows] for layer, x in teacher.items()}, mean))
        assert float(expected) > 0.01 and thermometer.measure(number) == pytest.approx(float(expected), rel=1e-3)
    assert backbone.training and thermometer.measure(0) != thermometer.measure(4)
    with pytest.raises(ValueError, match="thermostat.batch_size 31 is larger than the 30"):
        Thermometer(backbone, batches(), items, [3, 5], 0, estimator, 31, SEED, mean, wide, teacher)


def test_drift_is_the_mean_over_layers():
    torch.manual_seed(0)
    one, other = torch.randn(30, 8), torch.randn(30, 8)
    wide = {0: covariance(one), 1: covariance(other)}
    single = covariance_drift({1: 1.5 * other}, {1: wide[1]}).item()
    assert covariance_drift({0: one, 1: 1.5 * other}, wide).item() == pytest.approx(single / 2)
    mean, scaled = {0: one.mean(0), 1: other.mean(0)}, other.mean(0) + 1.25 * (other - other.mean(0))
    assert paired_drift({0: one, 1: scaled}, {0: one, 1: other}, mean).item() == pytest.approx(0.125, rel=1e-5)
    half = one + 0.5 * (other - one)
    wanted = 0.5 * (other - one).square().sum(1).mean().sqrt() / (one - one.mean(0)).square().sum(1).mean().sqrt()
    assert paired_drift({0: half}, {0: one}, {0: one.mean(0)}).item() == pytest.approx(wanted.item(), rel=1e-5)
