"""The seam of the methods: every one that the registry knows obeys the laws, and a new one is a single file."""

import textwrap

import pytest
from conftest import BASELINE, GRADED, METHOD, final_adapter

import vlakeep.methods
from vlakeep import checks, preflight
from vlakeep.core.config import ConfigError
from vlakeep.core.registry import method_class, method_names
from vlakeep.core.rundir import read_metrics
from vlakeep.methods.base import Method
from vlakeep.models.adapters import add_lora
from vlakeep.models.load import make_backbone
from vlakeep.offline import run_offline
from vlakeep.reporting.arms import Arm
from vlakeep.train import run_training

# Method -> (its configuration, what switches it off).
METHODS = {
    "baseline": (BASELINE, []),
    "icsm_hsw_thermostat": (METHOD, ["--hsw.enabled", False, "--thermostat.enabled", False]),
    "graded": (GRADED, ["--gains.enabled", False, "--thermostat.enabled", False]),
    "distillation": ("configs/method_distillation.yaml", ["--gains.enabled", False, "--thermostat.enabled", False,
                              "--options.weight", 0.0]),
    "toy": (BASELINE, ["--method", "toy"]),
    **{name: (BASELINE, ["--method", name, "--thermostat.enabled", False, *off]) for name, off in {
        "gpm": ["--options.enabled", False], "l2_sp": ["--options.strength", 0.0], "ewc": ["--options.strength", 0.0],
        "consft": ["--options.sharpness", 0.0], "replay": ["--options.weight", 0.0]}.items()},
}
# Method -> the one whose laws hold for it, because it overrides nothing that the loop asks. test_rivals.py has what they change.
LIKE = {**dict.fromkeys(["sgp", "adam_nscl", "owm", "inflora", "keeplora", "lora_null", "sc_lora", "corda", "eva"], "gpm"),
        "maps": "l2_sp", "kfac": "ewc", "self_replay": "distillation"}
ASKED = ("prepare", "before_training", "before_step", "penalty", "after_step", "logs", "state_dict", "load_state_dict", "detach")
TOY = '''
    """Method `toy`: pulls the LoRA weights to zero, as weight decay in the loss does."""

    from dataclasses import dataclass

    from vlakeep.methods.base import Method


    @dataclass
    class Options:
        strength: float = 0.0


    class Toy(Method):
        label, Options = "Toy decay", Options

        def __init__(self, strength):
            self._strength = strength

        @classmethod
        def prepare(cls, config, storage, backbone):
            return cls(cls.options(config).strength), {}

        def attach(self, backbone):
            self._weights = [p for p in backbone.parameters() if p.requires_grad]

        def penalty(self):
            return self._strength * sum(w.square().sum() for w in self._weights) if self._strength else None


    METHOD = Toy
'''


@pytest.fixture(scope="module", autouse=True)
def toy(tmp_path_factory):
    """A method that is one file in a folder of its own."""
    folder = tmp_path_factory.mktemp("methods")
    (folder / "toy.py").write_text(textwrap.dedent(TOY))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vlakeep.methods, "__path__", [*vlakeep.methods.__path__, str(folder)])
        yield


def member(name, asked):
    """What answers for a method, whatever it is bound to."""
    found = getattr(method_class(name), asked)
    return getattr(found, "__func__", found)


@pytest.fixture(scope="module")
def baseline(world):
    storage, make_config = world
    return run_training(make_config(BASELINE, "--name", "methods-baseline"), storage)


def test_every_method_of_the_registry_is_under_the_laws():
    assert set(method_names()) == {*METHODS, *LIKE}
    for name in method_names():
        assert issubclass(method_class(name), Method) and method_class(name).label
    for name, like in LIKE.items():
        assert [one for one in ASKED if member(name, one) is not member(like, one)] == [], f"{name} is no longer like {like}"
    with pytest.raises(ValueError, match="--method 'none': must be one of adam_nscl, baseline, .*icsm_hsw_thermostat, .*toy"):
        method_class("none")


@pytest.mark.parametrize("name", sorted(METHODS))
def test_switched_off_every_method_is_the_baseline_bitwise(world, baseline, name):
    storage, make_config = world
    file, off = METHODS[name]
    run = run_training(make_config(file, "--name", f"methods-off-{name}", *off), storage)
    assert final_adapter(run) == final_adapter(baseline)
    assert [row["loss"] for row in read_metrics(run)] == [row["loss"] for row in read_metrics(baseline)]


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_method_leaves_the_model_as_it_was(world, graded_folder, name):
    """No hook and no parametrisation is left behind; state goes through state_dict."""
    storage, make_config = world
    file, off = METHODS[name]
    # What a rival adds is on, if it needs nothing more.
    on = {"replay": ["--options.weight", 0.0], "ewc": ["--options.items", 2]}.get(name, [])
    config = make_config(file, *(["--method", name] if file == BASELINE else []), *on)
    backbone = make_backbone(config.backbone, "cpu", storage.cache)
    add_lora(backbone, config.lora, config.seed)

    def traces():
        return [(path, len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks), hasattr(m, "parametrizations"))
                for path, m in backbone.named_modules() if "parametrizations" not in path]

    before = traces()
    method, _ = method_class(name).prepare(config, storage, backbone)
    method.attach(backbone)
    method.load_state_dict(method.state_dict())
    method.detach()
    assert traces() == before


def test_a_method_in_one_file_trains_resumes_and_takes_its_options(world, baseline):
    storage, make_config = world
    arm = [BASELINE, "--method", "toy", "--options.strength", "1e-3", "--train.schedule", "constant"]
    assert make_config(*arm).options == {"strength": 1e-3}
    whole = run_training(make_config(*arm, "--name", "toy-whole"), storage)
    run_training(make_config(*arm, "--name", "toy-part", "--train.steps", 3), storage)
    part = run_training(make_config(*arm, "--name", "toy-part", "--train.resume", True), storage)
    assert final_adapter(part) == final_adapter(whole) != final_adapter(baseline)
    assert all(row["penalty"] > 0 for row in read_metrics(whole))
    assert Arm("toy", None).label == "Toy decay" and Arm("mine", None).label == "mine"
    with pytest.raises(ValueError, match="method toy needs no offline step"):
        run_offline(make_config(*arm), storage)
    lines = preflight.run_checks(make_config(*arm, "--name", "toy-new"))
    assert not [line for line in lines if line.status == checks.RED and "rtefact" in line.what]


RIVALS = [("sc_lora", ["--options.frames", 4, "--lora.layers", "last:1"]),
          ("replay", ["--options.datasets", "tabletop_corner", "--options.items", 2]), ("consft", [])]


@pytest.mark.parametrize("name, options", RIVALS, ids=[name for name, _ in RIVALS])
def test_rivals_train_and_resume_bitwise(world, graded_folder, baseline, name, options):
    """One that keeps in its state what is not trained, one that draws old data, one that acts inside the model's call, like the sensor."""
    storage, make_config = world
    arm = [BASELINE, "--method", name, "--train.schedule", "constant", "--train.save_every", 2, *options]
    whole = run_training(make_config(*arm, "--name", f"{name}-whole", "--train.steps", 4), storage)
    run_training(make_config(*arm, "--name", f"{name}-part", "--train.steps", 2), storage)
    part = run_training(make_config(*arm, "--name", f"{name}-part", "--train.steps", 4, "--train.resume", True), storage)
    assert final_adapter(part) == final_adapter(whole) != final_adapter(baseline)
    rows = read_metrics(whole)
    for key in ("step", "loss", "kl"):
        assert [row.get(key) for row in read_metrics(part)] == [row.get(key) for row in rows]
    assert ("penalty" in rows[-1]) == (name == "replay")
    assert rows[0]["kl"] < 1e-6 < rows[-1]["kl"] and "opening" not in rows[-1], "the divergence is measured, and moves nothing"


@pytest.mark.parametrize("given, words", [
    (["--options.strenght", "1"], "--options.strenght: method toy has the options strength"),
    (["--options.strength", "strong"], "--options.strength 'strong': must be of type float, such as 0.0"),
    (["--options.strength", "true"], "--options.strength True: must be of type float"),
    (["--options.strength"], "--options.strength on the command line has no value"),
    (["--options", "1"], "`options` in the command line is a section"),
    (["--option.strength", "1"], "unknown key `option.strength`"),
])
def test_wrong_options_are_told_by_name(world, given, words):
    with pytest.raises(ConfigError) as caught:
        world[1](BASELINE, "--method", "toy", *given)
    assert words in str(caught.value)


def test_options_of_a_method_without_any_are_refused(world):
    with pytest.raises(ConfigError, match="--options.strength: method baseline has no options"):
        world[1](BASELINE, "--options.strength", "1")
