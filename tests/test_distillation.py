"""Method distillation: the term that it adds, its draws, the loop on its weight, and resuming."""

import pytest
import torch
from conftest import GRADED, final_adapter
from test_graded import artefact  # noqa: F401 (a fixture)

from vlakeep.core.config import ConfigError
from vlakeep.core.rundir import read_metrics
from vlakeep.methods.distillation import HEAVIEST, Distillation
from vlakeep.models.adapters import adapters_disabled, add_lora
from vlakeep.models.load import make_backbone
from vlakeep.probe.probe_set import ProbeSet
from vlakeep.thermostat.kl_sensor import KLSensor
from vlakeep.thermostat.loop import set_point
from vlakeep.thermostat.setpoint import SetPoint, replay
from vlakeep.train import run_training

ARM = [GRADED, "--method", "distillation", "--gains.enabled", False]


@pytest.fixture
def attached(world, artefact):  # noqa: F811
    """(config, backbone whose adapters have moved, the method)."""
    storage, make_config = world
    config = make_config(*ARM, "--options.items", 3, "--options.weight", 2.0)
    backbone = make_backbone(config.backbone, "cpu", storage.cache)
    add_lora(backbone, config.lora, config.seed)
    method, _ = Distillation.prepare(config, storage, backbone)
    method.attach(backbone)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for linear in backbone.adapted_linears().values():
            weight = linear.lora_B["default"].weight
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.02)
    return config, backbone, method


def test_the_term_is_the_weighted_divergence_of_the_drawn_items(attached, world):
    """Against log-probabilities of the whole vocabulary, made by another path of the model."""
    storage, _ = world
    config, backbone, method = attached
    method.before_step(4, False)
    term = method.penalty()
    assert term.requires_grad and float(term) > 1e-4
    term.backward()
    assert all(p.grad is not None for p in backbone.parameters() if p.requires_grad)
    practice = method._practice
    rows = practice.draw(3, (config.seed, 4, 0))
    probe = ProbeSet(storage.probe_folder(config.probe.name))
    held = set(method._artifact.answers()[1])
    items = [item for item in probe.spread(config.probe.size) if item not in held]
    assert len(items) == len(practice)
    values = []
    for row in rows.tolist():
        prompts = backbone.processor.encode_prompts(probe.samples([items[row]]))
        count = int(practice._answered.count_N[row])
        start = int(practice._answered.start_N[row])
        tokens = practice._answered.text_NL[row, start:start + count][None]
        with torch.no_grad(), adapters_disabled(backbone):
            teacher = backbone.log_probabilities_of_continuation(prompts, tokens)
        with torch.no_grad():
            student = backbone.log_probabilities_of_continuation(prompts, tokens)
        values.append(float((teacher.exp() * (teacher - student)).sum(-1).mean()))
    assert float(term) == pytest.approx(2.0 * sum(values) / 3, rel=0.02), "32 outcomes and the rest for the whole vocabulary"


def test_every_micro_batch_of_every_process_draws_items_of_its_own(attached):
    config, _, method = attached
    drawn = [method._practice.draw(3, (config.seed, step, number)).tolist() for step in (1, 2, 3) for number in (0, 1, 2)]
    assert len({tuple(one) for one in drawn}) > 6 and all(len(set(one)) == 3 for one in drawn)
    assert drawn[0] == method._practice.draw(3, (config.seed, 1, 0)).tolist()
    method.before_step(1, False)
    terms = [float(method.penalty().detach()) for _ in range(2)]
    method.before_step(1, False)
    assert [float(method.penalty().detach()) for _ in range(2)] == terms and terms[0] != terms[1]


def test_rare_kinds_are_drawn_as_often_as_others(attached):
    _, _, method = attached
    practice = method._practice
    assert torch.equal(practice._chances_N, practice._weights_N.float()) and len(practice._chances_N.unique()) > 1
    practice._chances_N = torch.ones(len(practice))
    practice._chances_N[0] = 50.0
    first = sum(0 in practice.draw(2, (0, step, 0)).tolist() for step in range(100))
    assert first > 60


def test_the_weight_rises_above_the_target_falls_below_it_and_resumes(world, artefact):  # noqa: F811
    storage, make_config = world
    arm = [*ARM, "--train.schedule", "constant", "--train.lr", 5e-3, "--thermostat.target", 1e-6, "--options.items", 2,
           "--options.moves", "weight"]
    whole = run_training(make_config(*arm, "--name", "distil-whole"), storage)
    run_training(make_config(*arm, "--name", "distil-part", "--train.steps", 3), storage)
    part = run_training(make_config(*arm, "--name", "distil-part", "--train.resume", True), storage)
    assert final_adapter(part) == final_adapter(whole)
    rows = [row for row in read_metrics(whole) if row["step"]]
    assert [row.get("weight") for row in rows] == [row.get("weight") for row in read_metrics(part) if row["step"]]
    assert all(row["next_weight"] > row["weight"] or row["weight"] == HEAVIEST for row in rows if row["kl"] > 2e-6)
    assert 1.0 < rows[-1]["weight"] <= HEAVIEST
    thermostat = make_config(*arm).thermostat
    law = SetPoint(target=1e-6, start=1.0, lowest=1 / HEAVIEST, highest=1e3, steepness=0.5, open_factor=thermostat.open_factor,
                   close_factor=thermostat.close_factor)
    again = replay(law, [row["kl"] for row in rows])
    assert [1 / row["next_opening"] for row in again] == [row["next_weight"] for row in rows]
    assert all(row["penalty"] >= 0 for row in rows) and "settled_kl" not in rows[-1]
    loose = run_training(make_config(*arm, "--name", "distil-loose", "--thermostat.target", 10.0), storage)
    assert read_metrics(loose)[-1]["weight"] < 1.0


def test_the_loop_may_move_the_opening_of_the_gains_and_resumes(world, artefact):  # noqa: F811
    storage, make_config = world
    target = 1e-6
    arm = [GRADED, "--method", "distillation", "--options.moves", "opening", "--options.items", 2, "--train.schedule", "constant",
           "--train.lr", 5e-3, "--thermostat.target", target]
    config = make_config(*arm, "--name", "opened-whole", "--evaluate.target", "opened-whole")
    whole = run_training(config, storage)
    run_training(make_config(*arm, "--name", "opened-part", "--train.steps", 3), storage)
    part = run_training(make_config(*arm, "--name", "opened-part", "--train.resume", True), storage)
    assert final_adapter(part) == final_adapter(whole)
    rows = [row for row in read_metrics(whole) if row["step"]]
    law = set_point(target, rows[0]["opening"], config.gains.steepness, config.thermostat.open_factor, config.thermostat.close_factor)
    assert [row["next_opening"] for row in replay(law, [row["kl"] for row in rows])] == [row["next_opening"] for row in rows]
    assert len({row["next_opening"] for row in rows}) > 2 and all(row["penalty"] > -1e-6 and "weight" not in row for row in rows)
    assert rows[-1]["settled_kl"] <= target
    # The gains of the run are those that its log names: another law with the same measurements leaves another adapter.
    faster = run_training(make_config(*arm, "--name", "opened-fast", "--thermostat.open_factor", 8), storage)
    assert final_adapter(faster) != final_adapter(whole)


@pytest.mark.parametrize("wrong", [["--options.weight", -1.0], ["--options.items", 0], ["--options.weigth", 1.0],
                                   ["--options.moves", "sideways"], ["--options.moves", "opening"]])
def test_wrong_options_are_refused(world, wrong):
    with pytest.raises(ConfigError, match=wrong[0].replace(".", r"\.")):
        world[1](*ARM, *wrong)


def test_drawing_items_waits_for_no_device():
    """Weights on the device meta stand for those on a card: nothing can be brought from there."""
    sensor = object.__new__(KLSensor)
    sensor._count, sensor._weights_N, sensor._chances_N = 4, torch.ones(4, device="meta"), torch.tensor([0.0, 0.0, 1.0, 0.0])
    assert sensor.draw(1, (0, 1, 2)).tolist() == [2]
