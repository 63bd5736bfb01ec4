"""The seam of the benchmarks: every one that the registry knows keeps the contract, and a new one is a single file of 16 lines."""

import ast
import json
import textwrap
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import fake_libero
import pytest
from conftest import BASELINE, read_evaluation, save_config
from test_evaluate_libero import simulator  # noqa: F401 (the fake instead of LIBERO's simulator)
from test_layout import PACKAGE

import vlakeep.benchmarks
from vlakeep import checks, cli, preflight
from vlakeep.benchmarks import specs
from vlakeep.benchmarks.base import NEW, QUESTION, SKILL, Benchmark
from vlakeep.benchmarks.specs import ActionSpec, ObservationSpec
from vlakeep.benchmarks.trained import check_conventions
from vlakeep.core import registry
from vlakeep.core.config import ConfigError, EvaluateConfig
from vlakeep.core.registry import benchmark_class, benchmark_names
from vlakeep.evaluate import run_evaluation
from vlakeep.libero import setup as libero_setup
from vlakeep.libero.env import SUITES
from vlakeep.report import arms_from_runs

TOY = '''
    """Benchmark `toy`: one step before a picture of noise; whoever keeps the hand open has waved."""

    import numpy as np

    from vlakeep.benchmarks.base import NEW, Ability, Benchmark


    class Toy(Benchmark):
        names, drift = ("toy",), "never"

        def abilities(self):
            return [Ability("wave", role=NEW), Ability("nod")]

        def play(self, target, records, folder):
            policy = target.policy()
            for skill, trial in [(one.name, k) for one in self.abilities() for k in range(self.settings.episodes)]:
                if not records.has("skill", skill, trial):
                    noise = np.random.default_rng(self.settings.seed + trial).integers(0, 256, (1, 64, 64, 3), dtype=np.uint8)
                    opened = bool(policy(noise, [skill])[0, -1] > 0.5)
                    records.add(kind="skill", ability=skill, trial=trial, seed=self.settings.seed + trial, success=opened, value=None,
                                crash=None, steps=1)


    BENCHMARK = Toy
'''
# Benchmark -> a small evaluation of it. LIBERO is played by tests/fake_libero.py.
SMALL = {
    "tabletop": ["--evaluate.skills", "[reach]", "--evaluate.episodes", 2, "--evaluate.questions", "[color]",
                 "--evaluate.questions_per_kind", 2],
    "dataset": ["--data.train_fraction", 0.5, "--evaluate.episodes", 3],
    "toy": ["--evaluate.episodes", 2],
    "language": ["--evaluate.texts", Path(__file__).parent / "texts", "--evaluate.questions_per_kind", 3],
    **{suite: ["--evaluate.skills", "[0]", "--evaluate.episodes", 2, "--evaluate.batch", 1] for suite in SUITES},
}


@pytest.fixture(scope="module", autouse=True)
def toy(tmp_path_factory):
    """A benchmark that is one file in a folder of its own."""
    folder = tmp_path_factory.mktemp("benchmarks")
    (folder / "toy.py").write_text(textwrap.dedent(TOY))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vlakeep.benchmarks, "__path__", [*vlakeep.benchmarks.__path__, str(folder)])
        yield


@pytest.fixture(autouse=True)
def suites(simulator, monkeypatch):  # noqa: F811
    """Every suite has a task."""
    monkeypatch.setattr(libero_setup, "require_libero", lambda: None)
    for suite in set(SUITES) - set(fake_libero.TASKS):
        monkeypatch.setitem(fake_libero.TASKS, suite, ("tap the red square",))
    simulator({})


@pytest.fixture
def made(world):
    """made(name, *options) -> (configuration, the benchmark of it)."""
    storage, make_config = world

    def make(name, *options):
        config = make_config(BASELINE, "--evaluate.benchmark", name, *SMALL[name], *options)
        return config, benchmark_class(name)(config, storage)
    return make


# ---- a benchmark of one file ----


def test_a_benchmark_in_one_file_is_evaluated_compared_and_resumed(world, capsys):
    assert len([line for line in TOY.splitlines() if line.strip()]) == 16
    storage, _ = world
    command = ["evaluate", "--config", BASELINE, "--root", str(storage.root), "--threads", "1", "--device", "cpu",
               "--evaluate.benchmark", "toy", "--evaluate.episodes"]
    assert cli.run([*command, "3"]) == 0
    assert "new skill wave" in capsys.readouterr().out
    folder, = storage.eval.glob("tabletop-base-*/toy/base")
    rows, summary = read_evaluation(folder)
    waved = [row["success"] for row in rows if row["ability"] == "wave"]
    assert [row["seed"] for row in rows] == [0, 1, 2] * 2 and len(waved) == 3
    assert summary["new_skill"] == {**summary["new_skill"], "name": "wave", "n": 3, "mean": sum(waved) / 3}
    assert list(summary["abilities"]) == ["nod"] and summary["drift"] is None and summary["retention_kl"]["n"] == 0
    before = (folder / "records.jsonl").read_bytes()
    assert cli.run([*command, "3"]) == 0 and (folder / "records.jsonl").read_bytes() == before
    with pytest.raises(ValueError, match="other settings .evaluate.episodes 3 -> 2"):
        cli.run([*command, "2"])
    arms = arms_from_runs("base", storage, "toy")
    assert arms["base"]["eval"] == folder and arms["base"]["run"] is None
    assert cli.run(["preflight", *command[1:], "3", "--stage", "evaluate"]) == 0
    assert "un-normalised as tabletop" in capsys.readouterr().out


def test_a_package_brings_a_benchmark_by_its_entry_point(monkeypatch, made):
    class Guest(Benchmark):
        names = ("guest",)

    entry = SimpleNamespace(name="guest", load=lambda: Guest)
    entries = {"vlakeep.benchmarks": {"guest": entry}}
    with monkeypatch.context() as patch:
        patch.setattr(registry, "_outside", lambda group=registry.GROUP: entries.get(group, {}))
        assert benchmark_names()[-1] == "guest" and benchmark_class("guest") is Guest
        with pytest.raises(ConfigError, match="--evaluate.benchmark 'gest': must be one of tabletop, dataset, .*, guest"):
            made("toy", "--evaluate.benchmark", "gest")
    with pytest.raises(ValueError, match="--evaluate.benchmark 'none': must be one of dataset, toy"):
        benchmark_class("none")


def test_the_driver_knows_no_benchmark_by_name():
    """What all share names none, in no text outside its docstrings, and imports no benchmark's room."""
    names = set(benchmark_names()) - {"toy"}
    shared = [PACKAGE / f"{stage}.py" for stage in ("evaluate", "preflight", "report")]
    shared += [PACKAGE / "core" / "ranges.py", PACKAGE / "core" / "registry.py"]
    shared += [file for file in (PACKAGE / "benchmarks").glob("*.py") if file.name != "open_loop.py"]
    for file in [*shared, PACKAGE / "checks.py"]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert not {"tabletop", "libero"} & set((node.module or "").split(".")), f"{file}:{node.lineno}"
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and file in shared:
                assert node.value not in names, f"{file}:{node.lineno}: {node.value}"
    assert len((PACKAGE / "evaluate.py").read_text().splitlines()) <= 200


# ---- the contract ----


def test_every_benchmark_of_the_registry_is_under_the_contract():
    assert set(benchmark_names()) == set(SMALL)


@pytest.mark.parametrize("name", sorted(SMALL))
def test_a_benchmark_says_what_it_takes_shows_and_measures(made, name):
    config, benchmark = made(name)
    assert issubclass(type(benchmark), Benchmark) and name in benchmark.names and benchmark.name == name
    assert isinstance(benchmark.actions, ActionSpec) and isinstance(benchmark.observations, ObservationSpec)
    assert len(benchmark.observations.cameras) == (2 if name.startswith("libero") else 1)
    benchmark.check()
    abilities = benchmark.abilities()
    assert len(abilities) == len({(one.kind, one.name) for one in abilities}) > 0
    assert [one.name for one in abilities if one.role == NEW and one.kind != SKILL] == []
    assert sum(one.role == NEW for one in abilities) <= 1
    assert set(benchmark.decides) <= {field.name for field in fields(EvaluateConfig)} and "benchmark" in benchmark.decides
    with benchmark.opened():
        assert json.loads(json.dumps(benchmark.identity())) == benchmark.identity()
        assert benchmark.actions.dimensions == 7
    assert [line for line in benchmark.lines() if line.status == checks.RED] == []


@pytest.mark.parametrize("name", sorted(SMALL))
def test_what_a_benchmark_does_not_know_is_refused_before_a_model_is_loaded(made, name):
    with pytest.raises(ValueError, match="--evaluate.skills"):
        made(name, "--evaluate.skills", "[juggle]")[1].check()
    for option, key in ((["--evaluate.blank", True], "blank"), (["--evaluate.target", "replay"], "replay"),
                        (["--evaluate.other_suites", "[libero_goal, libero_object]"], "other_suites")):
        if key not in benchmark_class(name).knows:
            with pytest.raises(ConfigError, match=f"--evaluate.benchmark '{name}': must be one of libero_spatial, .* for evaluate.*{key}"):
                made(name, *option)
    if "other_suites" in benchmark_class(name).knows:
        with pytest.raises(ConfigError, match="--evaluate.other_suites"):
            made(name, "--evaluate.other_suites", f"[{name}]")


@pytest.mark.parametrize("name", ["tabletop", "dataset", "toy", "language", "libero_object"])
def test_an_evaluation_that_was_killed_goes_on(world, made, name, tmp_path):
    """After the header and a trial, in the middle of the next line."""
    storage, _ = world
    config, _ = made(name)
    folder = run_evaluation(config, storage, tmp_path / "whole")
    whole = read_evaluation(folder)
    assert {row["kind"] for row in whole[0]} <= {SKILL, QUESTION, "open_loop", "alarm"} and len(whole[0]) >= 2
    lines = (folder / "records.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "records.jsonl").write_bytes(b"".join(lines[:2]) + lines[2][:20])
    assert read_evaluation(run_evaluation(config, storage, tmp_path / "part")) == whole
    again = (tmp_path / "part" / "records.jsonl").read_bytes().splitlines(keepends=True)
    assert again[:2] == lines[:2] and sorted(again) == sorted(lines)


# ---- specs ----


@pytest.mark.parametrize("change, words", [
    ({"actions": ActionSpec(14)}, "toy takes actions of 14 values, the model's action statistics 'tabletop' are of 7: choose others with "
                                  "--backbone.unnorm_key"),
    ({"actions": ActionSpec(7, gripper_range=(0.5, 1.0))}, "toy takes a gripper from 0.5 .close. to 1 .open., that of the model's action "
                                                           "statistics 'tabletop' goes from 0 to 1.*--data.gripper"),
    ({"observations": ObservationSpec(("front", "wrist"))}, "toy shows front, wrist; the model looks at one picture"),
])
def test_what_does_not_fit_the_model_is_an_error_before_the_first_episode(world, made, monkeypatch, change, words, tmp_path):
    storage, _ = world
    config, benchmark = made("toy")
    for name, value in change.items():
        monkeypatch.setattr(type(benchmark), name, value)
    with pytest.raises(ValueError, match=words):
        run_evaluation(config, storage, tmp_path / "eval")
    assert not (tmp_path / "eval").exists()
    line, = [line for line in preflight.run_checks(config, "evaluate") if line.status == checks.RED]
    assert "toy " in line.where and "--backbone.unnorm_key one of: tabletop" in line.remedy


def test_every_key_that_is_used_is_compared():
    """Also those of old abilities."""
    seven, six = ({"action": {"q01": [0.0] * width, "q99": [1.0] * width}} for width in (7, 6))
    fitting = ActionSpec(7), ObservationSpec()
    specs.compare("mine", *fitting, {"new": seven, "old": six}, ["new"])
    with pytest.raises(ValueError, match="statistics 'old' are of 6"):
        specs.compare("mine", *fitting, {"new": seven, "old": six}, ["new", "old"])
    signed = {"action": {"q01": [0.0] * 7, "q99": [1.0] * 7, "min": [-1.0] * 7, "max": [1.0] * 7}}
    assert "goes from -1 to 1" in specs.action_problems("mine", ActionSpec(7), "new", signed["action"])[0]
    assert specs.action_problems("mine", ActionSpec(7, gripper=None), "new", signed["action"]) == []
    assert specs.action_problems("mine", ActionSpec(None), "new", six["action"]) == []


def test_pictures_of_another_shape_are_an_alarm(world, made, monkeypatch, tmp_path):
    storage, _ = world
    config, benchmark = made("toy")
    monkeypatch.setattr(type(benchmark), "observations", ObservationSpec(size=(480, 640)))
    _, summary = read_evaluation(run_evaluation(config, storage, tmp_path))
    assert len(summary["alarms"]) == 1 and "different shapes (480 x 640 and 64 x 64)" in summary["alarms"][0]
    assert specs.observation_alarms("mine", ObservationSpec(size=(128, 128)), (64, 64)) == []


def test_data_that_are_read_otherwise_than_in_the_training_are_refused(world):
    storage, make_config = world
    folder = storage.runs / "read-otherwise"
    folder.mkdir(parents=True)

    def check(*options):
        check_conventions(make_config(BASELINE, "--evaluate.target", folder.name, *options), storage)

    save_config(make_config(BASELINE), folder / "config.yaml")
    check("--data.rotate", True, "--data.gripper", "standard")
    save_config(make_config(BASELINE, "--data.gripper", "standard", "--data.rotate", True), folder / "config.yaml")
    check("--data.gripper", "standard")
    check("--data.gripper", "libero", "--data.datasets", "[other]")
    with pytest.raises(ValueError, match="--data.gripper libero: the run was trained on tabletop_corner with standard; --data.gripper "
                                         "standard fits it"):
        check("--data.gripper", "libero")
    with pytest.raises(ValueError, match="--data.rotate False: .*--data.rotate true fits it"):
        check("--data.rotate", False)
