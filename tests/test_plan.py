"""`vlakeep plan` against figures that were measured at the 7B shapes, and its parts against the model that ships."""

import math
from pathlib import Path

import pytest
from conftest import save_config

from vlakeep import cli, plan
from vlakeep.core.compat import import_bitsandbytes
from vlakeep.core.config import ConfigError, load_config
from vlakeep.core.hardware import CARDS, GIB, HOST, NAMES, Work, hardware, types
from vlakeep.core.options import read
from vlakeep.hsw import graded as gains
from vlakeep.methods import costs, graded
from vlakeep.models.load import make_backbone
from vlakeep.models.workload import Numbers
from vlakeep.openvla.workload import shapes_of
from vlakeep.planning import fit
from vlakeep.planning.fit import batch_choices, remedies
from vlakeep.planning.predict import Planner, find_model

NOWHERE = Path("/nonexistent")
FROZEN, GRADED = "openvla_libero", "openvla_libero_graded"
DATA = ["--data.datasets", "[tabletop_corner]"]
PLAIN = ["--method", "baseline"]
ONE = [*PLAIN, "--train.accumulation", 1]
STILL = ["--thermostat.enabled", "false"]  # the peaks of a step alone, without a measurement
AGAIN = [*ONE, "--backbone.gradient_checkpointing", "true", "--lora.layers", "all"]
WIDE = [*AGAIN, "--lora.modules", "[all-linear]"]
FOUR_BITS = ["--backbone.quantisation", "nf4"]
# Stage, configuration, options, card; GiB reserved, and seconds of a step or of the stage (docs/plan.md).
MEASURED = {
    "offline, frozen form": ("offline", FROZEN, ["--icsm.moments_gib", 2.0], "h100", 23.8, 83),
    "export": ("export", FROZEN, PLAIN, "h100", 16.2, 30),
    "plain LoRA, 8 x 2": ("train", FROZEN, PLAIN, "h100", 17.7, 0.234),
    "plain LoRA, 16 x 1": ("train", FROZEN, [*ONE, "--train.batch_size", 16], "h100", 21.0, 0.211),
    "residual, 8 x 2": ("train", FROZEN, ["--hsw.site", "residual", *STILL], "h100", 17.7, 0.249),
    "LoRA inputs, 8 x 2": ("train", FROZEN, STILL, "h100", 18.0, 0.247),
    "graded, 8 x 2": ("train", GRADED, STILL, "h100", 18.7, 0.227),
    "graded, 16 x 1": ("train", GRADED, [*STILL, "--train.batch_size", 16, "--train.accumulation", 1], "h100", 21.9, 0.213),
    "graded, float16, 4 x 1": ("train", GRADED, [*STILL, "--train.batch_size", 4, "--train.accumulation", 1, "--backbone.dtype", "float16",
                                                 "--train.autocast", "float16"], "h100", 16.9, None),
    "decoder, checkpointing, batch 2": ("train", FROZEN, [*AGAIN, "--train.batch_size", 2], "h100", 15.6, 0.408),
    "decoder, checkpointing, batch 4": ("train", FROZEN, [*AGAIN, "--train.batch_size", 4], "h100", 16.0, 0.441),
    "all linears, checkpointing, batch 2": ("train", FROZEN, [*WIDE, "--train.batch_size", 2], "h100", 17.0, 0.630),
    "all linears, checkpointing, batch 4": ("train", FROZEN, [*WIDE, "--train.batch_size", 4], "h100", 18.4, 0.548),
    "NF4, 8 x 2": ("train", FROZEN, [*PLAIN, *FOUR_BITS], "h100", 9.1, 0.317),
    "NF4, decoder, checkpointing, batch 8": ("train", FROZEN, [*AGAIN, *FOUR_BITS, "--train.batch_size", 8], "h100", 7.9, 0.613),
}


def configuration(file, *options):
    return load_config(file, [str(option) for option in options])


@pytest.fixture(scope="module")
def seven_b():
    return find_model(configuration(FROZEN), NOWHERE)


@pytest.mark.parametrize("recipe", MEASURED)
def test_a_measured_recipe_is_predicted_within_a_tenth_in_memory_and_a_fifth_in_time(seven_b, recipe):
    stage, file, options, card, memory, seconds = MEASURED[recipe]
    found = Planner(configuration(file, *DATA, *options), seven_b, CARDS[card]).plan(stage)
    assert found.reserved / GIB == pytest.approx(memory, rel=0.1)
    if seconds:
        assert (found.each or found.seconds) == pytest.approx(seconds, rel=0.2)


@pytest.mark.parametrize("sharding, memory, seconds", [("none", 20.9, 0.230), ("fsdp", 18.8, 0.266)])
def test_two_cards_are_predicted_as_they_were_measured(seven_b, sharding, memory, seconds):
    """speed/cards.py: plain LoRA, 16 samples on each of two H100 with NVLink."""
    options = [*PLAIN, *ONE, "--train.batch_size", 16, "--train.sharding", sharding]
    found = Planner(configuration(FROZEN, *DATA, *options), seven_b, CARDS["h100"], 2).plan("train")
    assert found.reserved / GIB == pytest.approx(memory, rel=0.1)
    assert found.each == pytest.approx(seconds, rel=0.2)


def test_allocated_is_that_of_the_measured_stages(seven_b):
    for recipe, allocated in (("offline, frozen form", 21.5), ("plain LoRA, 8 x 2", 17.5), ("graded, 16 x 1", 21.3), ("export", 15.7)):
        stage, file, options, card, _, _ = MEASURED[recipe]
        found = Planner(configuration(file, *DATA, *options), seven_b, CARDS[card]).plan(stage)
        assert found.allocated / GIB == pytest.approx(allocated, rel=0.03), recipe


def test_the_shapes_of_7b_are_those_of_its_parts(seven_b):
    work = seven_b.work
    assert sum(work.parameters.values()) == 7_541_237_184
    assert work.layer_parameters == 4 * 4096 ** 2 + 3 * 4096 * 11008
    assert [(tower.blocks, tower.width, tower.tokens) for tower in work.towers] == [(23, 1024, 261), (26, 1152, 256)]
    adapters = Planner(configuration(FROZEN), seven_b, CARDS["h100"]).adapters
    assert work.adapter_parameters(adapters) == 8 * 32 * (4 * 2 * 4096 + 3 * (4096 + 11008))
    assert work.inputs(adapters.leaves) == [4096, 4096, 4096, 11008]
    # Two norms in float32, q k v and the output of attention, gate SiLU up, the inputs that linears share and the rank of seven.
    assert work.layer_keeps(adapters.leaves, 32, Numbers()) == (8 + 8 + 6) * 4096 + (6 + 2) * 11008 + 7 * 2 * 32
    assert work.layer_keeps(adapters.leaves, 32, Numbers(converts=True)) == (8 + 8 + 12) * 4096 + (6 + 2) * 11008 + 7 * 2 * 32


def test_headers_of_a_checkpoint_and_its_configuration_give_the_same_shapes():
    model = find_model(load_config(), NOWHERE)
    folder = Path(model.source.rpartition(" ")[2])
    built = model.kind.workload(model.kind.read_config(folder), shapes_of(model.kind.read_config(folder)))
    assert built == model.work
    assert (folder / "model.safetensors").stat().st_size / sum(model.work.parameters.values()) == pytest.approx(2, rel=0.02)


def test_time_is_the_sum_of_products_and_streams_or_that_of_launching_them():
    card = CARDS["h100"]
    assert card.seconds(Work(half=card.half * 0.55, stream=card.stream * 0.75)) == pytest.approx(2.0)
    assert card.seconds(Work(half=card.half * 0.55, kernels=2.0 / HOST)) == pytest.approx(2.0), "the host is slower"
    assert Work(half=1, read=2).times(3) + Work(half=1) == Work(half=4, read=6)


def test_accumulation_takes_time_and_no_memory(seven_b):
    small, large = (Planner(configuration(FROZEN, *PLAIN, "--train.accumulation", n), seven_b, CARDS["h100"]).plan("train") for n in (1, 4))
    assert small.reserved == large.reserved and large.each == pytest.approx(4 * small.each, rel=0.02)


def test_the_pass_over_the_runs_data_before_training_is_counted(seven_b):
    """gains.start_of_a new_inputs: 256 frames, once for each group of moments; no step is longer for it."""
    new = ["--gains.start_of_a", "new_inputs"]
    assert (costs.START_FRAMES, costs.DENSE) == (graded.START_FRAMES, gains.DENSE)

    def train(*options, card=CARDS["h100"]):
        return Planner(configuration(GRADED, *DATA, *options), seven_b, card).plan("train")

    plain, one, two = train(), train(*new, "--icsm.moments_gib", 1000), train(*new, "--icsm.moments_gib", 1)
    assert plain.each == one.each == two.each and plain.seconds < one.seconds < two.seconds
    assert train(*new, "--gains.enabled", "false") == train("--gains.enabled", "false")
    passing = CARDS["h100"].seconds(seven_b.work.forward(256))
    moments = 8 * 4 * (3 * 4096 ** 2 + 11008 ** 2)  # of the inputs of eight layers
    assert one.seconds - plain.seconds > passing and two.seconds - one.seconds > passing * (moments // 2 ** 30 - 1)
    name = "A's start at new inputs"
    assert one.memory[name] > moments > two.memory[name] and name not in plain.memory
    wide = train(*new, "--icsm.moments_gib", 1000, "--train.batch_size", 1, "--thermostat.enabled", "false")
    assert wide.allocated == wide.reserved == sum(wide.memory[part] for part in ("weights", "adapters", "spectra", name))
    large = ["--train.batch_size", 16, "--train.accumulation", 1]
    after, before = train(*large, *new, "--icsm.moments_gib", 1), train(*large)
    assert (after.reserved, after.allocated) == (before.reserved, before.allocated), "a step takes more"
    assert any(name in note for note in one.notes) and not any(name in note for note in plain.notes)


def test_checkpointing_keeps_less_and_takes_longer(seven_b):
    options = ["--lora.layers", "all", *ONE]
    plain, again = (Planner(configuration(FROZEN, *options, "--backbone.gradient_checkpointing", on), seven_b, CARDS["h100"]).plan("train")
                    for on in ("false", "true"))
    kept = 8 * seven_b.work.columns * 4096 * 2
    assert {size for name, size in again.memory.items() if name.startswith("layer ")} == {kept}
    assert again.reserved < 0.7 * plain.reserved and 1.1 * plain.each < again.each < 1.5 * plain.each


def test_what_does_not_fit_is_told_with_what_makes_it_fit(seven_b):
    card = CARDS["rtx4090"]._replace(memory=16.5)
    config = configuration(FROZEN, *PLAIN)
    found, _ = remedies(config, seven_b, card, 1, "train")
    assert ("train.batch_size", "4") in found[0].options and found[0].options[1] == ("train.accumulation", "4")
    for remedy in found:
        changed = configuration(FROZEN, *PLAIN, *[part for key, value in remedy.options for part in (f"--{key}", value)])
        assert Planner(changed, seven_b, card).plan("train").reserved <= 16.5 * GIB, remedy.line()
    nothing, least = remedies(configuration(FROZEN, *PLAIN, "--train.from_run", "other"), seven_b, card._replace(memory=14.0), 1, "train")
    assert nothing == [] and 14.05 * GIB < least.reserved < 15 * GIB, "weights alone are larger"


def test_4_bits_are_the_last_remedy_of_a_stage_and_said_to_be_another_base(seven_b):
    card, config = CARDS["v100x8"], configuration(GRADED, "--backbone.dtype", "float16", "--train.autocast", "float16")
    for stage in ("offline", "train"):
        found, _ = remedies(config, seven_b, card, 1, stage)
        assert ("backbone.quantisation", "nf4") in found[-1].options and "another base: offline, train" in found[-1].line(), stage
        assert not any(("backbone.quantisation", "nf4") in one.options for one in found[:-1])
        found, _ = remedies(config, seven_b, card._replace(device="cpu"), 1, stage)
        assert not any("nf4" in one.line() for one in found), stage
    wide = ["--lora.modules", "[all-linear]", "--lora.layers", "all"]
    for refused in (["--train.from_run", "other"], ["--train.sharding", "fsdp"], wide):
        found, _ = remedies(configuration(FROZEN, *PLAIN, *refused), seven_b, card, 8, "train")
        assert not any("nf4" in one.line() for one in found), refused


def test_the_base_is_shared_where_training_does_not_fit_otherwise_and_4_bits_are_not_needed(seven_b):
    config, card = configuration(FROZEN, *PLAIN), CARDS["rtx4090"]

    def chosen(memory, gpus=8, *fixed, config=config):
        return {key: value for key, value, _ in fit.sharding_choice(config, seven_b, card._replace(memory=memory), gpus, fixed)}

    assert chosen(22.5) == {"train.sharding": "none"} and chosen(14.4) == {"train.sharding": "fsdp"}
    assert chosen(14.4, 1) == chosen(14.4, 8, "train.sharding") == chosen(14.4, 8, "backbone.quantisation") == chosen(1.0) == {}
    assert chosen(14.4, config=configuration(FROZEN, *PLAIN, *FOUR_BITS)) == {"train.sharding": "none"}


def test_a_profile_reckons_with_all_cards_that_train(capsys, tmp_path, monkeypatch):
    """With fsdp and eight cards 8 x 2 were planned where 16 x 1 fits, since the micro-batch was chosen for one card."""
    own = ["--config", GRADED, "--hardware", "v100x8", "--root", str(tmp_path), "--train.sharding", "fsdp"]
    _, config = read(cli.STAGES["plan"], [*own, "--gpus", "8"])
    assert (config.train.batch_size, config.train.accumulation) == (16, 1)
    _, config = read(cli.STAGES["train"], own)
    assert config.train.batch_size < 16, "one process, whose card holds the whole base"
    monkeypatch.setenv("WORLD_SIZE", "8")
    _, config = read(cli.STAGES["train"], own)
    assert (config.train.batch_size, config.train.accumulation) == (16, 1)
    capsys.readouterr()
    _, config = read(cli.STAGES["train"], own[:-2])
    assert (config.backbone.quantisation, config.train.sharding) == ("nf4", "none"), "the base that its offline step has to take"
    assert "v100x8: --train.sharding none (a base of 4 bits lies whole on each card)" in capsys.readouterr().out


def test_a_micro_batch_is_the_largest_that_fits_and_keeps_the_samples_of_a_step(seven_b):
    config, card = configuration(FROZEN, *PLAIN), CARDS["rtx4090"]

    def chosen(memory, *fixed):
        return {key: value for key, value, _ in batch_choices(config, seven_b, card._replace(memory=memory), fixed=fixed)}

    assert chosen(78.0) == {"train.batch_size": "16", "train.accumulation": "1", "backbone.gradient_checkpointing": "false"}
    assert chosen(20.0)["train.batch_size"] == "8" and chosen(20.0)["train.accumulation"] == "2"
    assert chosen(14.65)["backbone.gradient_checkpointing"] == "true"
    assert chosen(14.0) == chosen(78.0, "train.batch_size") == {}
    assert "backbone.gradient_checkpointing" not in chosen(78.0, "backbone.gradient_checkpointing")


@pytest.mark.parametrize("name, dtype, autocast", [("rtx4090", "bfloat16", "bfloat16"), ("h100", "bfloat16", "bfloat16"),
                                                   ("v100x8", "float16", "float16"), ("cpu", "float32", "none")])
def test_a_profile_beats_the_file_and_the_command_line_beats_it(capsys, tmp_path, name, dtype, autocast):
    own = ["--config", "baseline_lora", "--hardware", name, "--root", str(tmp_path)]
    _, config = read(cli.STAGES["train"], own)
    assert (config.backbone.dtype, config.train.autocast, config.device) == (dtype, autocast, "cpu" if name == "cpu" else "cuda")
    before = load_config("baseline_lora").train
    assert config.train.batch_size * config.train.accumulation == before.batch_size * before.accumulation
    said = capsys.readouterr().out
    assert f"{name}: --backbone.dtype {dtype} (" in said and f"{name}: --train.batch_size " in said
    _, config = read(cli.STAGES["train"], [*own, "--backbone.dtype", "float32", "--train.batch_size", "4", "--device", "cpu"])
    assert (config.backbone.dtype, config.train.batch_size, config.device) == ("float32", 4, "cpu")
    _, config = read(cli.STAGES["offline"], own)
    assert config.backbone.dtype == dtype and config.train.autocast == "none", "what a stage does not read is left alone"


def test_profiles_are_those_that_are_named():
    assert set(NAMES) == {"auto", "cpu", *CARDS}
    for name in NAMES:
        card = hardware(name)
        assert card.memory > 0 and {one.key for one in types(card)} == {"backbone.dtype", "train.autocast", "device",
                                                                       "backbone.attn_implementation"}
    with pytest.raises(ValueError, match="must be one of auto"):
        hardware("abacus")
    with pytest.raises(ConfigError, match="--hardware 'abacus': must be one of"):
        read(cli.STAGES["train"], ["--hardware", "abacus"])


def test_the_command_shows_every_stage_and_its_parts(capsys, tmp_path):
    assert plan.main(["--config", "method_graded", "--hardware", "cpu", "--gib", "8", "--root", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    for words in ("offline ", "train ", "evaluate ", "export ", "weights", "activations of layers 0 to 5", "optimizer", "logits", "spectra",
                  "teacher's answers", "every stage fits"):
        assert words in said, words
    assert plan.main(["--config", GRADED, "--hardware", "rtx4090", "--gib", "16", "--root", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "published shapes of openvla/openvla-7b" in said and "offline does not fit" in said and "--icsm.answered " in said
    assert list(tmp_path.iterdir()) == [], "a plan writes nothing"


def test_fewer_layers_are_the_upper_half_of_those_that_the_model_has(capsys, tmp_path):
    """A model of six layers was told to take the last 16, and the plan ended there."""
    given = ["--config", "method_graded", "--hardware", "rtx4090", "--gib", "0.02", "--root", str(tmp_path)]
    assert plan.main(given) == 1 and "train does not fit" in capsys.readouterr().out
    for layers, depth, half in (("all", 18, "last:9"), ("last:4", 32, "last:2"), ("24-31", 32, "last:4")):
        config = load_config("method_graded", ["--lora.layers", layers])
        assert fit._fewer_layers(config, depth) == {"lora.layers": half}
    for layers in ("0,2,4", "5"):
        assert fit._fewer_layers(load_config("method_graded", ["--lora.layers", layers]), 6) is None


def test_eight_bit_moments_take_a_quarter_and_the_package_is_asked_for(seven_b):
    plans = [Planner(configuration(FROZEN, *PLAIN, "--train.optimizer", name), seven_b, CARDS["h100"]).plan("train")
             for name in ("adamw", "adamw8bit")]
    full, small = (found.memory["optimizer"] for found in plans)
    assert full / small == pytest.approx(4, rel=0.05)
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        with pytest.raises(ValueError, match=r"pip install .*bitsandbytes\]', or --train.optimizer adamw"):
            import_bitsandbytes("--train.optimizer adamw8bit", "--train.optimizer adamw")


def test_adapters_in_float16_are_refused():
    with pytest.raises(ConfigError, match="lora.dtype 'model': must be float32 with --backbone.dtype float16"):
        load_config(None, ["--backbone.dtype", "float16", "--lora.dtype", "model"])


def test_a_model_whose_shapes_nobody_knows_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="no base model"):
        find_model(load_config(None, ["--backbone.checkpoint", str(tmp_path / "nothing")]), NOWHERE)
    assert math.isfinite(hardware("cpu").memory)


def test_weights_that_fill_a_card_are_quantised_by_its_profile_in_every_stage(capsys, tmp_path):
    own = ["--config", FROZEN, "--hardware", "v100x8", "--root", str(tmp_path)]
    for stage in ("offline", "train", "evaluate", "export"):
        _, config = read(cli.STAGES[stage], own)
        assert config.backbone.quantisation == "nf4", stage
        assert "v100x8: --backbone.quantisation nf4 (weights of float16 take 14.0 of 15 GiB" in capsys.readouterr().out
    assert config.train.batch_size == load_config(FROZEN).train.batch_size, "export reads no micro-batch"
    for kept in (["--hardware", "rtx4090"], ["--backbone.quantisation", "none"], ["--backbone.checkpoint", "tabletop-base"]):
        _, config = read(cli.STAGES["offline"], [*own, *kept])
        assert config.backbone.quantisation == "none"
    _, config = read(cli.STAGES["train"], [*own, "--train.sharding", "fsdp"])
    assert (config.backbone.quantisation, config.train.sharding) == ("none", "fsdp")
    shared = load_config(FROZEN, ["--train.sharding", "fsdp"])
    save_config(shared, tmp_path / "shared.yaml")
    _, config = read(cli.STAGES["train"], ["--config", str(tmp_path / "shared.yaml"), *own[2:]])
    assert config.backbone.quantisation == "none" and not config.problems(), "a file may say so too"


def test_a_base_that_cards_share_takes_its_share_and_the_layers_at_work(seven_b):
    config = configuration(FROZEN, *PLAIN, "--train.batch_size", 4, "--train.accumulation", 4)
    whole, alone = (Planner(config, seven_b, CARDS["v100x8"], gpus).plan("train") for gpus in (2, 1))
    config.train.sharding = "fsdp"
    shared, same = (Planner(config, seven_b, CARDS["v100x8"], gpus).plan("train") for gpus in (2, 1))
    layer, all_ = 2 * seven_b.work.layer_parameters, 2 * sum(seven_b.work.parameters.values())
    assert shared.memory["weights"] == all_ / 2 + (all_ - 32 * layer) + 2 * layer
    assert whole.reserved > 15 * GIB > shared.reserved and same.reserved == alone.reserved
    assert shared.each > whole.each
    found, _ = remedies(configuration(FROZEN, *PLAIN), seven_b, CARDS["v100x8"], 2, "train")
    assert any(("train.sharding", "fsdp") in remedy.options for remedy in found)


@pytest.mark.parametrize("options, memory, seconds", [
    (["--backbone.gradient_checkpointing", "false"], 16.05, 0.119), (["--backbone.gradient_checkpointing", "true"], 9.76, 0.140)])
def test_pi0_fast_is_planned_from_its_variant_and_the_cameras_asked_for(options, memory, seconds):
    """speed/pi0_full.py: a plain step of 8 rows with two cameras on an H100, weights with vision and norms in float32."""
    config = configuration("pi0_fast_libero_graded", *DATA, *ONE, *options)
    model = find_model(config, NOWHERE)
    planner = Planner(config, model, CARDS["h100"])
    assert planner.weights / GIB == pytest.approx(6.22, rel=0.01) and model.work.patches == 2 * 256
    found = planner.plan("train")
    assert found.reserved / GIB == pytest.approx(memory, rel=0.1)
    assert found.each == pytest.approx(seconds, rel=0.2)
    three = find_model(configuration("pi0_fast_libero_graded", *DATA, "--backbone.cameras", "[a, b, c]"), NOWHERE).work
    assert three.patches == 3 * 256 and len(three.towers) == 3


def test_the_small_pi0_fast_is_planned_from_its_own_sizes():
    config = configuration("method_graded", *DATA, "--backbone.checkpoint", "tabletop-pi0")
    work = find_model(config, NOWHERE).work
    model = make_backbone(config.backbone, "cpu", NOWHERE)
    assert sum(work.parameters.values()) == sum(p.numel() for p in model.parameters())
    assert (work.layers, work.width, work.patches) == (model.num_layers, model.hidden_size, len(work.towers) * model.pi0.sizes.patches)
