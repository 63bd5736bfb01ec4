"""Studies: the cells of a file, what is read from a cell's own files, failures beside the rest, and a resumed study against a whole one."""

import functools
import importlib
import json
import lzma
import multiprocessing
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from conftest import SMALL, cut_episodes
from test_layout import REPO

from vlakeep import cli, study
from vlakeep.benchmarks.records import changes
from vlakeep.benchmarks.summary import make_summary
from vlakeep.core import evaluated
from vlakeep.core import study as study_cells
from vlakeep.core.checkpoint import save_checkpoint
from vlakeep.core.config import ConfigError, load_config, to_dict
from vlakeep.core.errors import install_extra
from vlakeep.core.options import read
from vlakeep.core.registry import benchmark_class
from vlakeep.core.schema import find_config
from vlakeep.core.stages import EVALUATE, TRAIN
from vlakeep.core.storage import Storage
from vlakeep.core.study import BEGUN, DONE, OPEN, OTHER, READY, TRAINED, named, read_study, said, share
from vlakeep.studies import again, records, schedulers, tables

TINY = {"lora.layers": "last:1", "train.steps": 2, "train.save_every": 1, "train.batch_size": 2, "evaluate.skills": ["reach", "corner"],
        "evaluate.episodes": 1, "evaluate.questions": ["color"], "evaluate.questions_per_kind": 2, "evaluate.retention_frames": 2,
        "train.warmup": 1, "train.schedule": "constant", "train.tensorboard": False}


STREAM = {"stream": {"order": ["corner", "again"], "frames": 6}, "seeds": [1], "rates": [2e-3],
          "tasks": {name: {"data.datasets": ["tabletop_corner"], "evaluate.new_skill": "corner"} for name in ("corner", "again")}}


@pytest.fixture
def one_step(monkeypatch):
    cut_episodes(monkeypatch)


def write(path, **changed):
    tree = {"name": "small", "settings": {}, "seeds": [1, 2], "rates": [1e-3, 2e-3],
            "tasks": {"corner": {"data.datasets": ["tabletop_corner"], "evaluate.new_skill": "corner"}},
            "arms": {"plain": {"config": "configs/baseline_lora.yaml"},
                     "gpm": {"config": "configs/rivals/gpm.yaml", "options.energy": 0.99, "rates": [5e-4]}}, **changed}
    path.write_text(yaml.safe_dump({key: value for key, value in tree.items() if value is not None}, sort_keys=False))
    return str(path)


def call(words):
    """A stage as the command line comes to it, in this process."""
    stage = cli.STAGES[words[0]]
    return getattr(importlib.import_module(stage.module), stage.function)(words[1:]) or 0


def test_cells_are_every_combination_with_the_later_key_on_top(tmp_path):
    cells = read_study(write(tmp_path / "one.yaml", settings={"train.steps": 7, "train.lr": 9.0}))
    assert [cell.cell for cell in cells] == [f"plain-corner-lr{rate}-s{seed}" for rate in ("0.001", "0.002") for seed in (1, 2)] + [
        "gpm-corner-lr0.0005-s1", "gpm-corner-lr0.0005-s2"]
    config = cells[-1].config()
    assert (config.name, config.method, config.seed, config.train.lr) == ("small/gpm-corner-lr0.0005-s2", "gpm", 2, 5e-4)
    assert config.train.steps == 7 and config.options == {"energy": 0.99} and config.evaluate.target == config.name
    assert config.data.datasets == ["tabletop_corner"]
    alone = read_study(write(tmp_path / "two.yaml", rates=None, arms={"plain": {"config": "configs/baseline_lora.yaml"}}))
    assert [cell.rate for cell in alone] == [2e-3, 2e-3], "the rate of the configuration"
    task, arm = {"evaluate.new_skill": "corner", "train.steps": 6}, {"config": "configs/baseline_lora.yaml"}
    for own, steps in (({}, 6), ({"train.steps": 5}, 5)):
        three = read_study(write(tmp_path / "three.yaml", settings={"train.steps": 7}, tasks={"corner": task},
                                 arms={"plain": {**arm, **own}}))
        assert three[0].config().train.steps == steps
    # Each command takes the keys that its stage reads, and together they say the cell's configuration.
    train, evaluate = cells[-1].commands(OPEN)
    assert (train[0], evaluate[0]) == ("train", "evaluate")
    assert "--evaluate.new_skill" not in train and "--train.lr" not in evaluate and "--options.energy" in train
    for words, stage in ((train, TRAIN), (evaluate, EVALUATE)):
        study.split(stage, words[1:])
    assert "--train.resume" in cells[0].commands(BEGUN)[0] and [one[0] for one in cells[0].commands(TRAINED)] == ["evaluate"]
    assert cells[0].commands(DONE) == cells[0].commands(OTHER) == []
    assert [said(value) for value in (None, True, 5e-4, ["a", "b"], "x", 3)] == ["null", "true", "0.0005", "[a, b]", "x", "3"]


def test_an_arms_value_may_name_the_task(tmp_path):
    tasks = {name: {"data.datasets": [f"tabletop_{name}"]} for name in ("corner", "path")}
    arm = {"config": "configs/method_graded.yaml", "probe.name": "only-{task}", "gains.name": "of_{task}", "probe.size": 9}
    cells = read_study(write(tmp_path / "one.yaml", tasks=tasks, seeds=[1], rates=[1e-3], arms={"own": arm, "base": arm}))
    for cell, task in zip(cells, ["corner", "path"] * 2):
        config = cell.config()
        assert (config.probe.name, config.gains.name, config.probe.size) == (f"only-{task}", f"of_{task}", 9)


def test_an_evaluation_is_one_of_the_weights_that_are_there(tmp_path):
    config = load_config("configs/baseline_lora.yaml")
    (tmp_path / "summary.json").write_text(json.dumps({"weights": "these"}))
    (tmp_path / "records.jsonl").write_text(json.dumps({"header": {"evaluate": {"episodes": config.evaluate.episodes}}}) + "\n")
    assert [evaluated.is_evaluated(tmp_path, weights, config) for weights in ("these", "others", None)] == [True, False, True]
    config.evaluate.episodes += 1
    assert not evaluated.is_evaluated(tmp_path, "these", config)


def as_evaluated(folder, words, **summary):
    """An evaluation of these settings, as its benchmark leaves it: header and summary."""
    config = load_config("configs/baseline_lora.yaml", words)
    benchmark = benchmark_class(config.evaluate.benchmark)(config, None)
    header = {"evaluate": {key: value for key, value in to_dict(benchmark.settings).items() if key in benchmark.decides}}
    made = make_summary("run", [], None, "these", asked=evaluated.asked_for(config, benchmark.settings))
    (folder / "summary.json").write_text(json.dumps({**made, **summary}))
    (folder / "records.jsonl").write_text(json.dumps({"header": header}) + "\n")


@pytest.mark.parametrize("words", [["episodes", 50], ["other_suites", "[libero_goal]"], ["language", True], ["chunk", 1], ["blank", True],
                                   ["probe", "x"], ["skills", "[3]"]], ids=lambda words: words[0])
def test_an_evaluation_of_something_else_is_done_again(tmp_path, words):
    """Also where the header of the records leaves it out, since trials can be added to those that are there."""
    suite, name = ["--evaluate.benchmark", "libero_object", "--evaluate.episodes", "10"], f"--evaluate.{words[0]}"
    as_evaluated(tmp_path, suite)
    same, other = (load_config("configs/baseline_lora.yaml", [*suite, *more]) for more in ([], [name, str(words[1])]))
    same.evaluate.workers, same.evaluate.target, same.evaluate.seed = 7, "run", 0  # how it is played, who, and the suite's own seed
    assert [evaluated.is_evaluated(tmp_path, "these", one) for one in (same, other)] == [True, False]


def test_an_evaluation_of_some_skills_is_none_of_all(tmp_path):
    for name in ("skills", "questions"):
        as_evaluated(tmp_path, [f"--evaluate.{name}", "[reach]" if name == "skills" else "[color]"], asked=None)
        assert not evaluated.is_evaluated(tmp_path, "these", load_config("configs/baseline_lora.yaml"))
    as_evaluated(tmp_path, [], asked=None)  # an older version's
    assert evaluated.is_evaluated(tmp_path, "these", load_config("configs/baseline_lora.yaml"))


def test_episodes_of_an_older_suite_are_counted(tmp_path):
    suite = ["--evaluate.benchmark", "libero_object", "--evaluate.episodes"]
    as_evaluated(tmp_path, [*suite, "10"], asked=None, tasks={"one": {"n": 9, "crashes": 1}})
    found = [evaluated.is_evaluated(tmp_path, "these", load_config("configs/baseline_lora.yaml", [*suite, n])) for n in ("10", "50")]
    assert found == [True, False]


def test_an_evaluation_that_sees_nothing_is_looked_for_under_its_own_name(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(study_cells, "find_evaluation", lambda storage, benchmark, name, **more: asked.append(name) or tmp_path)
    cell = SimpleNamespace(name="s/plain", source=None, is_base=True)
    for words in ([], ["--evaluate.blank", "true"]):
        config = load_config("configs/baseline_lora.yaml", ["--evaluate.benchmark", "libero_object", *words])
        study_cells.look(cell, config, Storage(tmp_path))
    assert asked == ["s/plain", "s/plain-blank"]


def test_a_blind_evaluation_goes_on_as_no_other():
    """Under one name, which a study gives."""
    words = ["--evaluate.benchmark", "libero_object", "--evaluate.blank"]
    seen, blind = (benchmark_class("libero_object")(load_config("configs/baseline_lora.yaml", [*words, blank]), None).identity()
                   for blank in ("false", "true"))
    assert seen != blind and changes(blind, seen) == ["other settings (blank True -> (not set))"] and len(changes(seen, blind)) == 1


def test_only_the_episodes_that_were_asked_for_are_in_a_suites_summary():
    config = load_config("configs/baseline_lora.yaml", ["--evaluate.benchmark", "libero_object", "--evaluate.episodes", "2"])
    rows = [{"kind": "skill", "ability": suite, "init": init} for suite in ("libero_object", "libero_goal") for init in range(3)]
    assert benchmark_class("libero_object")(config, None).counted([*rows, {"kind": "question", "ability": "color"}]) == [
        *rows[:2], {"kind": "question", "ability": "color"}]


def trained(run, config, steps):
    """What a finished training of so many steps leaves."""
    def adapter(folder):
        (folder / "adapter").mkdir()
        (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"weights")

    save_checkpoint(run, steps, {}, {"step": steps}, adapter)
    (run / "config.yaml").write_text(yaml.safe_dump({**to_dict(config), "train": {**to_dict(config)["train"], "steps": steps}}))
    (run / "provenance.json").write_text(json.dumps({"status": "finished"}))


def test_a_longer_training_is_none_of_the_cells(tmp_path):
    """What stopped on its way is another arm, whose run has its own number of steps."""
    arms = {"plain": {"config": "configs/baseline_lora.yaml"}, "early": {"of": "plain", "at": [300]}}
    made = study.open_study(write(tmp_path / "s.yaml", settings={"train.steps": 600, "train.save_every": 300}, arms=arms, seeds=[1],
                                  rates=[1e-3]), ["--root", str(tmp_path)])
    plain, early = made.cells
    trained(made.storage.run_folder(plain.name), made.configs[plain], 600)
    trained(made.storage.run_folder(plain.name), made.configs[plain], 300)
    assert [state.kind for state in made.states().values()] == [TRAINED, TRAINED]
    for config in made.configs.values():
        config.train.steps = 300
    assert made.states()[plain] == (OTHER, "train.steps: 600 -> 300", None, None) and made.states()[early].kind == OTHER
    made.configs[plain].train.steps = 700
    assert made.states()[plain].kind == BEGUN
    record = {"arm": "plain", "settings": {"train.steps": 600}, "evaluate": {}}
    assert "train.steps: 600 -> 700" in records.differences(record, made.configs[plain])
    base = {**record, "arm": "base", "settings": {"train.steps": 600, "backbone.checkpoint": "another"}}
    assert records.differences(base, made.configs[plain]) == ["backbone.checkpoint: another -> tabletop-base"]
    made.configs[plain].evaluate.blank = True
    assert "evaluate.blank: False -> True" in records.differences(record, made.configs[plain])


def test_the_base_is_that_of_the_study(tmp_path):
    folder = tmp_path / "eval" / "tabletop-base-0123abcd" / "tabletop" / "small" / "base-corner"
    folder.mkdir(parents=True)

    def state(checkpoint):
        file = write(tmp_path / "s.yaml", settings={"backbone.checkpoint": checkpoint}, arms={"base": None})
        made = study.open_study(file, ["--root", str(tmp_path)])
        return made.states()[made.cells[0]].kind

    for older in (False, True):  # an older version's is told by its folder
        as_evaluated(folder, [], **({"asked": None} if older else {}))
        assert [state(checkpoint) for checkpoint in ("tabletop-base", "another", "tabletop-pi0")] == [DONE, OPEN, OPEN]
    as_evaluated(folder, ["--backbone.checkpoint", "somewhere/tabletop-base"])
    assert state("tabletop-base") == OPEN


@pytest.mark.parametrize("changed, words", [
    ({"seeds": None}, "`seeds` is missing"), ({"arm": {}}, "unknown key `arm`"), ({"seeds": ["a"]}, "`seeds`: 'a' is no whole number"),
    ({"arms": {"a b": {}}}, "`arms.a b`: a name is of letters"), ({"rates": 3}, "`rates` must be a list"),
    ({"seeds": [1, 1]}, "two cells have the name small/gpm-corner-lr0.0005-s1"),
])
def test_mistakes_of_a_study_are_told(tmp_path, changed, words):
    with pytest.raises(ConfigError) as caught:
        read_study(write(tmp_path / "wrong.yaml", **changed))
    assert words in str(caught.value)


def test_mistakes_of_the_cells_configurations_are_told_once_each(tmp_path):
    with pytest.raises(ConfigError, match="cell plain-corner-lr0.001-s1: .*train.steps") as caught:
        study.open_study(write(tmp_path / "wrong.yaml", settings={"train.steps": 0}), ["--root", str(tmp_path)])
    assert str(caught.value).count("train.steps") == 1


def test_what_cells_share_is_read_once_and_is_no_others_to_write_into(tmp_path, monkeypatch):
    """Of an arm and a task one reading, a wrong one too; each cell with sections of its own."""
    read, load = [], study_cells.load_config
    monkeypatch.setattr(study_cells, "load_config", lambda *words: read.append(words) or load(*words))
    arms = {"plain": {"config": "configs/baseline_lora.yaml"}, "wrong": {"config": "configs/rivals/gpm.yaml", "options.energy": 7.5}}
    file = write(tmp_path / "one.yaml", arms=arms, settings={"train.save_every": 331})
    with pytest.raises(ConfigError, match="energy"):
        study.open_study(file, ["--root", str(tmp_path)])
    assert [name for name, _ in read] == ["configs/baseline_lora.yaml", "configs/rivals/gpm.yaml"]
    one, two = (cell.config() for cell in read_study(file)[:2])
    one.lora.rank, one.train.steps, one.options["a"] = 3, 5, 1
    assert (two.lora.rank, two.train.steps, two.options) == (load_config("configs/baseline_lora.yaml").lora.rank, two.train.steps, {})
    assert two.train.steps != 5


def test_cells_are_looked_at_once_for_a_plan_of_what_is_chosen(tmp_path, monkeypatch, capsys):
    rule = {"subject": "gpm", "reference": "plain", "choose": [1]}
    file, seen, look = write(tmp_path / "one.yaml", rule=rule), [], study.look
    monkeypatch.setattr(study, "look", lambda cell, *more: seen.append(cell.cell) or look(cell, *more))
    monkeypatch.setattr(study, "to_report", lambda rule, cells, records, best: cells[1::2])
    study.main([file, "--chosen", "matched", "--dry-run", "--root", str(tmp_path / "root")])
    assert len(seen) == len(set(seen)) == 6 and "3 of 3 cells to do" in capsys.readouterr().out
    seen.clear()
    study.write_tables(study.open_study(file, ["--root", str(tmp_path / "root")]))
    assert len(seen) == 6


@pytest.mark.parametrize("value", [[], ["a", "b"], ["a, b", "[c]", "", "true", "null", "12", "1e-3", "- x", "#", "a: b", "it's", "ü", "*"],
                                   [1, True, None, 1.0, "1"], [[1, "a, b"], {"k": None}], {"k": ["a, b", True]}, None, True, False])
def test_a_value_is_said_as_yaml_says_it(value):
    assert said(value) == yaml.safe_dump(value, default_flow_style=True, width=10_000).strip().removesuffix("\n...").strip()


@pytest.mark.parametrize("file", sorted((REPO / "studies").glob("*.yaml")), ids=lambda file: file.name)
def test_shipped_studies_are_sound_and_headed_by_their_launch_line(file):
    cells = read_study(file)
    assert f"vlakeep study studies/{file.name}" in file.read_text() and cells[0].group == file.stem
    arms = yaml.safe_load(file.read_text())["arms"]
    for name, own in arms.items():  # configurations that ship are tested by themselves: what an arm adds, and once what the study adds
        assert "of" in own or find_config(own["config"])
        if set(own) - {"config", "rates", "family", "bases"} or name == "plain":
            cell = next(cell for cell in cells if name in (cell.arm, cell.declared))
            assert study_cells.checkpoint_problem(cell, cell.config()) is None


def test_a_failed_cell_is_told_and_the_rest_goes_on(tmp_path, capsys):
    made = study.open_study(write(tmp_path / "one.yaml", arms={"plain": {"config": "configs/baseline_lora.yaml"}}),
                            ["--root", str(tmp_path / "root")])
    called = []

    def launch(words, log_file):
        called.append(words[words.index("--cell") + 1])
        log_file.parent.mkdir(parents=True, exist_ok=True)
        log_file.write_text("loading\nerror: no such thing: make it\n")
        return 2 if called[-1].endswith("s1") else 0

    failed = study.run_study(made, 1, launch)
    assert called == [cell.cell for cell in made.cells]
    assert "exit status 2" in failed["plain-corner-lr0.001-s1"] and "error: no such thing" in failed["plain-corner-lr0.001-s1"]
    # One that ends well and left nothing has failed too.
    assert set(failed) == {cell.cell for cell in made.cells}
    assert (made.folder() / "cells.csv").read_text().splitlines()[1] == "plain,corner,0.001,1,open"
    assert "[4/4, about 0 s left]" in capsys.readouterr().out


def test_a_process_of_the_launcher_leaves_its_log_and_status(tmp_path):
    launcher = study.Launcher(1)
    assert launcher(["--version"], tmp_path / "logs" / "one.log") == 0 and "vlakeep" in (tmp_path / "logs" / "one.log").read_text()
    launcher.stop()
    assert launcher(["--version"], tmp_path / "two.log") == 143, "none is started after the end"


def _says(words, log_file, environment):
    """In place of a cell: which card it was given."""
    Path(log_file).write_text(str(environment.get("CUDA_VISIBLE_DEVICES")))
    if words == ["wait"]:
        time.sleep(60)


def test_processes_of_the_launcher_are_forked_with_the_libraries_and_share_the_cards(tmp_path, monkeypatch):
    asked: list = []
    monkeypatch.setattr(schedulers, "_forked", _says)
    monkeypatch.setattr(type(multiprocessing.get_context("forkserver")), "set_forkserver_preload", lambda _, names: asked.append(names))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    launcher = study.Launcher(3, gpus=2)
    assert asked == [["vlakeep.warm"]] and importlib.util.find_spec("vlakeep.warm")
    assert schedulers.at_once(launcher, 1, [functools.partial(launcher, [], tmp_path / f"{i}.log") for i in range(3)]) == [0, 0, 0]
    assert [(tmp_path / f"{i}.log").read_text() for i in range(3)] == ["5", "7", "5"]
    ended: list = []
    slow = threading.Thread(target=lambda: ended.append(launcher(["wait"], tmp_path / "slow.log")))
    slow.start()
    until = time.monotonic() + 60
    while not (tmp_path / "slow.log").exists() and time.monotonic() < until:
        time.sleep(0.05)
    launcher.stop()
    slow.join(30)
    assert ended == [-signal.SIGTERM], "what runs is asked to end"


def test_cards_that_were_given_are_dealt_out(monkeypatch):
    for given, count, wanted in (("2,3", 2, ["2", "3"]), ("GPU-1a, GPU-2b", 2, ["GPU-1a", "GPU-2b"]), ("", 2, ["0", "1"]),
                                 ("4,7,9", 2, ["4", "7"]), ("5", 1, ["5"]), ("0", 0, [])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
        assert schedulers.cards(count) == wanted
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert schedulers.cards(2) == ["0", "1"]


def test_a_part_without_cells_is_no_failure(tmp_path, capsys):
    file, out = write(tmp_path / "s.yaml", seeds=[1], rates=[1e-3], arms={"plain": PLAIN}), tmp_path / "2"
    assert study.main([file, "--part", "2", "--parts", "2", "--export", str(out), "--root", str(tmp_path)]) == 0
    assert out.read_text() == "" and capsys.readouterr().out == "nothing to do: no cell is left for --part 2 of --parts 2\n"
    assert study.main([file, "--part", "2", "--parts", "2", "--table", "--root", str(tmp_path)]) == 0


def test_a_cell_is_opened_without_the_configurations_of_the_others(tmp_path):
    arms = {"plain": {"config": "configs/baseline_lora.yaml"}, "other": {"config": "configs/baseline_lora.yaml", "train.steps": -1}}
    file = write(tmp_path / "one.yaml", arms=arms)
    with pytest.raises(ConfigError, match="train.steps"):
        study.open_study(file, ["--root", str(tmp_path)])
    cell = "plain-corner-lr0.001-s1"
    made = study.open_study(file, ["--root", str(tmp_path)], only=cell)
    assert [one.cell for one in made.configs] == [cell] and len(made.cells) == 8


def test_intervals_are_over_seeds_and_not_over_cells():
    assert tables.spread([(1, 0.2), (1, 0.4), (2, 0.5)]) == "0.4 ±1.3", "two means, .3 and .5: t of one degree of freedom, 12.7"
    assert tables.spread([(1, 0.25)]) == "0.25" and tables.spread([]) == ""


def small(world, path, name):
    storage, _ = world
    settings = {**dict(zip([word[2:] for word in SMALL[::2]], [yaml.safe_load(word) for word in SMALL[1::2]])), **TINY}
    file = write(path / f"{name}.yaml", name=name, settings=settings, seeds=[1], rates=[2e-3],
                 arms={"base": {"config": "configs/baseline_lora.yaml"}, "decay": {"config": "configs/rivals/weight_decay.yaml"}})
    return study.open_study(file, ["--root", str(storage.root)])


def run_here(made):
    """A launcher that runs cells in this process."""
    by_name = {cell.cell: cell for cell in made.cells}
    return lambda words, log_file: study.run_cell(made, by_name[words[words.index("--cell") + 1]], call)


def test_a_study_that_was_killed_gives_the_table_of_one_that_was_not(world, tmp_path, capsys, one_step):
    """Once after the first step and once between training and evaluation; what is done is not done again; and what was exported and taken
    in elsewhere gives the same tables."""
    whole, killed = small(world, tmp_path, "whole"), small(world, tmp_path, "killed")
    study.show_plan(whole, whole.states())
    assert "2 of 2 cells to do, 1 trainings, 2 steps in all" in capsys.readouterr().out
    part = tmp_path / "part.jsonl"
    assert study.run_study(whole, 1, run_here(whole), export=part) == {}
    base, first = killed.cells
    assert (base.is_base, base.cell, base.commands(OPEN)[0][-2:]) == (True, "base-corner", ["--as", "killed/base-corner"])
    assert call([*first.commands(OPEN)[0], *killed.folders, "--train.steps", "1"]) == 0
    assert killed.states()[first].kind == BEGUN
    assert call([*first.commands(BEGUN)[0], *killed.folders]) == 0
    assert killed.states()[first].kind == TRAINED
    assert study.run_study(killed, 1, run_here(killed)) == {}
    table = (killed.folder() / "cells.csv").read_bytes()
    assert table == (whole.folder() / "cells.csv").read_bytes() and b"done" in table and b"skill:reach" in table
    assert (killed.folder() / "arms.md").read_bytes() == (whole.folder() / "arms.md").read_bytes()
    assert study.run_study(killed, 1, lambda words, log_file: pytest.fail("done is done")) == {}
    assert all(study.took(record) > 0 for record in killed.records())
    of_base, of_run = killed.records()
    assert of_base["action_kl"] is None and of_base["curves"] == {"step": []} and of_run["curves"]["loss"] and of_run["made"]["versions"]
    assert of_run["trials"]["skill:reach"]["seeds"][1] == 1 and len(of_run["action_kl"]) == 2
    summary = json.loads((killed.states()[first].evaluation / "summary.json").read_text())
    row = tables.rows(killed.cells, [of_run], {cell.cell: DONE for cell in killed.cells})[1]
    assert row["skill:reach"] == summary["abilities"]["reach"]["mean"] and row["action_kl"] == summary["retention_kl"]["mean"]

    # Again: a random cell is what it was.
    def once_more(words, log_file):
        second = study.open_study(words[1], whole.folders, again="--again" in words)
        return run_here(second)(words, log_file)

    capsys.readouterr()
    assert study.rerun(whole, 1, 1, once_more, seed=0) == 0
    assert "| decay-corner-lr0.002-s1 | the same to the bit | 0 of 4 |" in capsys.readouterr().out
    assert whole.storage.run_folder("whole_again/decay-corner-lr0.002-s1").is_dir()

    # Elsewhere: nothing was run there, and the records are enough.
    far = study.open_study(str(tmp_path / "whole.yaml"), ["--root", str(tmp_path / "far")])
    assert study.take_in(far, [str(part)]) == "2 cells taken in" and study.take_in(far, [str(part), str(part)]) == "0 cells taken in"
    study.write_tables(far)
    assert (far.folder() / "cells.csv").read_bytes() == (whole.folder() / "cells.csv").read_bytes()
    assert [records.same(one, two) for one, two in zip(far.records(), whole.records())] == [[], []]
    assert "2 records are of cells that the study does not have" in study.take_in(killed, [str(part)])

    # Another evaluation is asked for: only that is done again. Another training: the cell is told, and nothing is overwritten.
    config = killed.configs[first]
    config.evaluate.episodes = 2
    assert study.look(first, config, killed.storage).kind == TRAINED
    config.evaluate.episodes = 1
    config.train.weight_decay = 0.5
    state = study.look(first, config, killed.storage)
    assert state.kind == OTHER and "train.weight_decay: 10.0 -> 0.5" in state.why
    with pytest.raises(ConfigError, match="was made with another configuration"):
        study.run_cell(killed, first, call)
    far.configs[far.cells[1]].train.weight_decay = 0.5
    assert far.states()[far.cells[1]].kind == OTHER
    with pytest.raises(ConfigError, match="decay-corner-lr0.002-s1: train.weight_decay: 10.0 -> 0.5"):
        study.take_in(far, [str(part)])


# Arms that are made of another


PLAIN = {"config": "configs/baseline_lora.yaml"}
MADE = {"plain": PLAIN, "soft": {"of": "plain", "alphas": [0.5, 0.25], "modules": ["q_proj"], "rates": [1e-3]},
        "shut": {"of": "plain", "close_to": [0.01]}, "early": {"of": "plain", "at": [100], "family": "plain"}}


def test_an_arm_that_is_made_of_another_has_a_cell_for_each_value_and_run(tmp_path):
    cells = read_study(write(tmp_path / "one.yaml", arms=MADE, seeds=[1], settings={"train.save_every": 100, "train.keep_last": 3}))
    assert [(cell.cell, cell.family) for cell in cells[2:]] == [
        ("soft_0.5-corner-lr0.001-s1", "soft"), ("soft_0.25-corner-lr0.001-s1", "soft"), ("shut_0.01-corner-lr0.001-s1", "shut"),
        ("shut_0.01-corner-lr0.002-s1", "shut"), ("early_100-corner-lr0.001-s1", "plain"), ("early_100-corner-lr0.002-s1", "plain")]
    plain, soft, shut, early = cells[0], cells[2], cells[4], cells[6]
    run = "small/plain-corner-lr0.001-s1"
    assert [cell.target for cell in (soft, shut, early)] == [
        f"{run}-alpha-0.5-q_proj", f"{run}-closed-0.01", f"{run}/checkpoints/step_000100"]
    assert soft.of == {"arm": "plain", "alpha": 0.5, "modules": ["q_proj"]} and early.of == {"arm": "plain", "at": 100}
    assert plain.of is None and {cell.run for cell in (plain, soft, shut, early)} == {run}
    assert (early.config().train.lr, early.config().name) == (1e-3, early.name)
    stages = [[words[0] for words in shut.commands(kind)] for kind in (OPEN, BEGUN, READY, TRAINED, DONE, OTHER)]
    assert stages == [["train", "export", "evaluate"]] * 2 + [["export", "evaluate"], ["evaluate"], [], []]
    assert [words[0] for words in early.commands(READY)] == ["evaluate"] and "--train.resume" in soft.commands(BEGUN)[0]
    assert soft.commands(OPEN)[0] == plain.commands(OPEN)[0], "the run is that of the other arm, word for word"
    for words in (*soft.commands(READY), *shut.commands(READY), *early.commands(READY)):
        study.split(cli.STAGES[words[0]], words[1:])
    assert soft.commands(TRAINED)[0][-2:] == ["--as", soft.name]
    assert [len(share(cells, part, 2)) for part in (1, 2)] == [5, 3], "what is made of a run stays with it"
    assert [cell.arm for cell in named(cells, arms=["soft", "early_100"], rates=[1e-3])] == ["soft_0.5", "soft_0.25", "early_100"]
    assert again.drawn(cells, 1, 3) in [[cell] for cell in cells]


@pytest.mark.parametrize("own, words", [
    ({"of": "plain"}, "`arms.x` needs one of alphas, close_to, at"),
    ({"of": "plain", "alphas": [0.5], "at": [1]}, "`arms.x` needs one of"),
    ({"of": "plain", "at": [0.5]}, "`at` must be a list of different whole numbers above 0"),
    ({"of": "plain", "alphas": [0.5, 0.5]}, "`alphas` must be a list of different numbers above 0"),
    ({"of": "plain", "alphas": [0.5], "train.steps": 3}, "an arm that is made of another takes of, alphas"),
    ({"of": "plain", "close_to": [0.5], "modules": ["q_proj"]}, "`modules` must be a list of linears"),
    ({"of": "plane", "alphas": [0.5]}, "`of: plane` is no arm of the study that is trained"),
    ({"of": "y", "alphas": [0.5]}, "`of: y` is no arm of the study that is trained"),
    ({"of": "plain", "alphas": [0.5], "rates": [3e-3]}, "`arms.x`: plain has no rate 0.003"),
])
def test_mistakes_of_an_arm_that_is_made_of_another_are_told(tmp_path, own, words):
    with pytest.raises(ConfigError) as caught:
        read_study(write(tmp_path / "wrong.yaml", arms={"plain": PLAIN, "y": {"of": "plain", "alphas": [0.5]}, "x": own}))
    assert words in str(caught.value)


def test_a_checkpoint_that_the_run_will_not_keep_is_told(tmp_path):
    settings = {"train.steps": 400, "train.save_every": 100, "train.keep_last": 3}
    for at, keep, told in (([200, 300], 3, ""), ([100], 3, "`at: 100`: the run keeps checkpoints of the steps 200, 300, 400"),
                           ([150], 9, "the steps 100, 200, 300, 400"), ([400], 1, "")):
        file = write(tmp_path / "one.yaml", settings={**settings, "train.keep_last": keep},
                     arms={"plain": PLAIN, "x": {"of": "plain", "at": at}})
        try:
            study.open_study(file, ["--root", str(tmp_path)])
            found = ""
        except ConfigError as error:
            found = str(error)
        assert bool(found) == bool(told) and told in found


def test_cells_are_made_of_a_run_that_is_trained_once(world, tmp_path, one_step):
    """Alone each trains the run that it is made of; made anew when that run is another; a sibling's failure holds none back; and their
    records say what they are made of."""
    storage, _ = world
    settings = {**dict(zip([word[2:] for word in SMALL[::2]], [yaml.safe_load(word) for word in SMALL[1::2]])), **TINY}
    arms = {**MADE, "soft": {"of": "plain", "alphas": [0.5]}, "shut": {"of": "plain", "close_to": [0.4, 0.5]},
            "early": {"of": "plain", "at": [1], "family": "plain"}}
    made = study.open_study(write(tmp_path / "made.yaml", name="made", settings=settings, seeds=[1], rates=[2e-3], arms=arms),
                            ["--root", str(storage.root)])
    plain, soft, never, shut, early = made.cells
    called, by_name = [], {cell.cell: cell for cell in made.cells}

    def counted(words):
        called.append(words[0])
        return call(words)

    assert study.run_cell(made, soft, counted) == 0 and called == ["train", "interpolate", "evaluate"]
    assert {cell.cell: state.kind for cell, state in made.states().items()} == {
        plain.cell: TRAINED, soft.cell: DONE, never.cell: READY, shut.cell: READY, early.cell: TRAINED}
    graded = study.artefacts(made)[storage.artifacts / "graded_tabletop-base"]
    assert (graded.cells, graded.words[-2:]) == ([never, shut], ["--method", "graded"])

    def run(words, log_file):
        if words[0] != "study":
            return counted(words)
        return 2 if words[3] == never.cell else study.run_cell(made, by_name[words[3]], counted)

    called.clear()
    assert list(study.run_study(made, 1, run)) == [never.cell], "what stands behind it in the chain was run"
    assert "train" not in called and called.count("export") == 1
    found = {record["cell"]: record for record in made.records()}
    assert [found[cell.cell].get("of", {}).get("arm") for cell in (plain, soft, shut, early)] == [None, "plain", "plain", "plain"]
    kl = json.loads((storage.run_folder(shut.target) / "closing.json").read_text())["kl_after"]
    assert (found[shut.cell]["probe_kl"], found[shut.cell]["curves"]) == (kl, {"step": []})
    assert found[early.cell]["curves"]["step"] == [1]
    assert len({found[cell.cell]["weights"] for cell in (plain, soft, early)}) == 3
    assert found[early.cell]["seconds"]["train"] <= found[plain.cell]["seconds"]["train"] == found[soft.cell]["seconds"]["train"]
    assert not list(storage.run_folder(shut.target).glob("merged-*")), "nothing is merged"
    assert records.differences(found[soft.cell], made.configs[soft], soft.of) == []
    other = records.differences(found[soft.cell], made.configs[soft], {"arm": "plain", "alpha": 0.25})
    assert len(other) == 1 and other[0].startswith("of: {'arm': 'plain'")

    # The adapter is one of another run of the same name: it counts for nothing.
    record = storage.run_folder(soft.target) / "interpolation.json"
    record.write_text(record.read_text().replace('"adapter_sha256": "', '"adapter_sha256": "0'))
    assert study.look(soft, made.configs[soft], made.storage).kind == READY


def test_the_driver_of_a_borrowed_machine_runs_parts_and_cleans_up(tmp_path):
    """With an interpreter that writes its words down in place of vlakeep."""
    fake = tmp_path / "python"
    fake.write_text(f"""#!/usr/bin/env bash
shift 2
echo "$VLAKEEP_ROOT $*" >>{tmp_path}/calls
while [ $# -gt 0 ]; do [ "$1" != --export ] || echo "{{}}" >"$2"; shift; done
[ ! -f {tmp_path}/bad ]
""")
    fake.chmod(0o755)
    out, script = tmp_path / "out", REPO / "scripts" / "run_studies.sh"
    base = {key: value for key, value in os.environ.items() if key not in ("VLAKEEP_ROOT", "TAKE", "WORKERS", "DATA")}
    environment = {**base, "PYTHON": str(fake), "TMPDIR": str(tmp_path), "WORKERS": "3"}

    def driver(*words, **more):
        (tmp_path / "calls").unlink(missing_ok=True)
        done = subprocess.run(["bash", str(script), *words], env={**environment, **more}, capture_output=True, text=True)
        calls = (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
        return done, [line.split(" ", 1) for line in calls]

    done, calls = driver("100", str(out), "a.yaml --seeds 1,2", "b.yaml", TAKE="old.jsonl")
    assert done.returncode == 0 and "1 records in" in done.stdout, done.stderr
    assert [words.split()[0] for _, words in calls[:3]] == ["tabletop-data"] * 3
    assert [words for _, words in calls[3::2]] == ["study a.yaml --import old.jsonl", "study b.yaml --import old.jsonl"]
    assert re.fullmatch(r"study a.yaml --seeds 1,2 --workers 3 --seconds \d+ --export .*/out/part1.jsonl", calls[4][1])
    assert {path.name for path in out.iterdir()} == {"log.txt", "part1.jsonl", "part2.jsonl"}
    roots = {root for root, _ in calls}
    assert len(roots) == 1 and not Path(roots.pop()).exists(), "the folder that was made is gone"
    (tmp_path / "own").mkdir()
    (tmp_path / "bad").touch()
    done, calls = driver("100", str(out), "a.yaml", DATA="0", VLAKEEP_ROOT=str(tmp_path / "own"))
    assert done.returncode == 1 and len(calls) == 1 and (tmp_path / "own").is_dir()
    assert driver("0", str(out), "a.yaml", DATA="0")[1] == [] and driver("100")[0].returncode == 2


def record(**changed):
    return {"format": 1, "study": "small", "cell": "plain-corner-lr0.001-s1", "arm": "plain", "task": "corner", "rate": 0.001, "seed": 1,
            "settings": {}, "evaluate": {}, "weights": "1", "trials": {}, "action_kl": [0.5], "drift": 0.0, "probe_kl": None,
            "followed": None, "curves": {}, "seconds": {"train": 1.0, "evaluate": 2.0}, "made": {}, **changed}


def test_records_that_disagree_are_refused_and_half_a_line_is_left_out(tmp_path):
    made = study.open_study(write(tmp_path / "one.yaml"), ["--root", str(tmp_path / "root")])
    good = record(settings=records.settings_of(made.configs[made.cells[0]]))
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    files[0].write_text(records.line_of(good) + records.line_of(good)[:40])
    files[1].write_text(records.line_of({**good, "weights": "2", "seconds": {"train": 9.0, "evaluate": 9.0}}))
    assert study.take_in(made, [str(files[0])]) == "1 cells taken in"
    with pytest.raises(ConfigError, match="b.jsonl, plain-corner-lr0.001-s1: weights is not that of the record that is there"):
        study.take_in(made, [str(files[1])])
    assert len(made.imported()) == 1 and made.imported()[good["cell"]]["weights"] == "1", "nothing of what was refused is kept"
    files[1].write_text("{}\n" + records.line_of(good))
    with pytest.raises(ConfigError, match="b.jsonl, line 1 is no record of a cell"):
        study.take_in(made, [str(files[1])])
    with pytest.raises(ConfigError, match="none.jsonl cannot be read: No such file"):
        study.take_in(made, [str(tmp_path / "none.jsonl")])


def test_records_may_be_compressed(tmp_path):
    lines = [records.line_of(record(cell=f"cell-{i}")) for i in range(3)]
    packed = tmp_path / "a.jsonl.xz"
    packed.write_bytes(lzma.compress("".join(lines).encode()))
    assert [one["cell"] for one in records.read_records(packed)] == ["cell-0", "cell-1", "cell-2"]
    packed.write_bytes(packed.read_bytes()[:-30])
    with pytest.raises(ConfigError, match="a.jsonl.xz are no whole .xz file"):
        records.read_records(packed)


def test_outcomes_are_a_digit_a_trial_and_crashes_are_neither():
    def rows(*seeds):
        return [{"kind": "skill", "ability": "reach", "trial": i, "seed": seed, "success": i == 0, "crash": "x" if i == 1 else None}
                for i, seed in enumerate(seeds)]

    for seeds, kept in (((7, 8, 9), [7, 1]), ((7, 7, 7), [7, 0]), ((7, 9, 8), [7, 9, 8]), ((7, 5), [7, -2]), ((7,), [7, 1])):
        found = records._trials(rows(*seeds))
        assert found["outcomes"] == "1x0"[:len(seeds)] and found["seeds"] == kept and records.states_of(found) == list(seeds)
    assert records.rate_of({"outcomes": "1x0"}) == 0.5 and records.rate_of({"outcomes": "x"}) is None


def test_what_a_second_run_changes_is_counted():
    one = record(trials={"skill:reach": {"outcomes": "110x", "seeds": [1, 1]}, "new:corner": {"outcomes": "11", "seeds": [1, 1]}})
    two = {**one, "seconds": {"train": 9.0, "evaluate": 9.0}, "made": {"commit": "2"}}
    assert again.compared(one, two) == {"differs": [], "moved": 0, "trials": 6, "kl": 0.0}
    two = {**two, "weights": "2", "action_kl": [0.25], "trials": {**one["trials"], "skill:reach": {"outcomes": "10xx", "seeds": [1, 1]}}}
    assert again.compared(one, two) == {"differs": ["weights", "trials", "action_kl"], "moved": 2, "trials": 6, "kl": 0.25}
    assert "| a | weights, trials, action_kl | 2 of 6 | 0.25 |" in again.table({"a": again.compared(one, two)}).markdown()


def test_of_a_stream_the_runs_before_are_drawn_too(tmp_path):
    cells = read_study(write(tmp_path / "one.yaml", **STREAM, arms={"plain": {"config": "configs/baseline_lora.yaml"}}), again=True)
    assert cells[0].name == "small_again/plain-corner-lr0.002-s1" and cells[1].before == cells[0].name
    assert {len(again.drawn(cells, 1, seed)) for seed in range(9)} == {1, 2} and again.drawn(cells, 9) == cells


def test_a_share_and_a_choice_of_the_cells(tmp_path):
    cells = read_study(write(tmp_path / "one.yaml", arms={"base": {}, "plain": {"config": "configs/baseline_lora.yaml"},
                                                          "gpm": {"config": "configs/rivals/gpm.yaml", "family": "gpm"}}))
    assert len(cells) == 1 + 2 * 2 * 2 and cells[0].target == "base" and cells[0].config().evaluate.target == "base"
    shares = [share(cells, part, 4) for part in (1, 2, 3, 4)]
    assert sorted(cell.cell for own in shares for cell in own) == sorted(cell.cell for cell in cells)
    assert {len(own) for own in shares} == {2, 3}
    assert [cell.cell for cell in named(cells, arms=["gpm"], rates=[2e-3], seeds=[1])] == ["gpm-corner-lr0.002-s1"]
    assert [cell.arm for cell in named(cells, seeds=[2], rates=[1e-3])] == ["base", "plain", "gpm"], "the base has neither"
    with pytest.raises(ConfigError, match="--arms x: the study has base, gpm, plain"):
        named(cells, arms=["x"])
    with pytest.raises(ConfigError, match="--part 5: must be from 1 to --parts, 4"):
        share(cells, 5, 4)


def test_a_stream_trains_each_task_on_the_run_before(world, tmp_path, one_step):
    """With an artefact of its own from a probe that has the task before, and with that of the base."""
    storage, _ = world
    settings = {**dict(zip([word[2:] for word in SMALL[::2]], [yaml.safe_load(word) for word in SMALL[1::2]])), **TINY}
    graded = {"config": "configs/method_graded.yaml", "thermostat.every": 1}
    file = write(tmp_path / "flow.yaml", name="flow", settings=settings, **STREAM,
                 arms={"base": {"config": "configs/baseline_lora.yaml"}, "more": {**graded, "bases": "accumulated"},
                       "kept": {**graded, "bases": "kept"}})
    made = study.open_study(file, ["--root", str(storage.root)])
    first, second = made.cells[2:4]
    assert (first.before, second.before) == ("", "flow/more-corner-lr0.002-s1") and second.stream == ("corner", "corner")
    config = made.configs[second]
    assert (config.train.from_run, config.probe.name, config.probe.size) == (first.name, "tabletop+tabletop_cornerx6", 48 + 6)
    assert [words[0] for words in second.commands(OPEN)] == ["offline", "train", "evaluate"] and first.commands(OPEN)[0][0] == "train"
    assert list(study.artefacts(made)[storage.artifacts / "graded_tabletop-base"].cells) == [first, *made.cells[4:]]
    assert study.share(made.cells, 3, 4) == [first, second], "what belongs together stays together"

    cells = run_here(made)
    assert study.run_study(made, 1, lambda words, log_file: call(words) if words[0] != "study" else cells(words, log_file)) == {}
    probe = storage.probe_folder("tabletop+tabletop_cornerx6")
    kinds = [json.loads(line)["kind"] for line in (probe / "items.jsonl").read_text().splitlines()]
    assert len(kinds) == 54 and kinds.count("task:tabletop_corner") == 6 and kinds[-1] == "task:tabletop_corner"
    meta = json.loads((storage.artifacts / f"flow.{second.cell}" / "meta.json").read_text())
    assert meta["probe_items"] == 54 and meta["backbone"] == "tabletop-base+flow.more-corner-lr0.002-s1"
    assert json.loads((storage.run_folder(second.name) / "from" / "chain.json").read_text())["links"][0]["run"] == first.name
    used = {cell.cell: json.loads((storage.run_folder(cell.name) / "provenance.json").read_text())["sessions"][0]["hashes"]["artifact"]
            for cell in made.cells[2:]}
    of_base = json.loads((storage.artifacts / "graded_tabletop-base" / "meta.json").read_text())["files"]
    assert [used[cell.cell] == of_base for cell in made.cells[2:]] == [True, False, True, True] and used[second.cell] == meta["files"]
    tables_of = study.write_tables(made)
    assert "Streams: success, forgetting and transfer" in tables_of and "more at 0.002: success on each task" in tables_of
    assert len((made.folder() / "streams.csv").read_text().splitlines()) == 1 + 2 * 8


def test_frames_of_a_task_in_a_stream_are_of_the_sets_that_it_is_trained_on(tmp_path):
    """Whoever names them: the task, the settings, a word in place of a list."""
    def added(settings, tasks):
        file = write(tmp_path / "sets.yaml", name="sets", settings=settings, tasks=tasks, seeds=[1], rates=[2e-3],
                     stream=["one", "two", "three"], arms={"more": {"config": "configs/method_graded.yaml"}})
        return [dict(cell.added).get("data.datasets") for cell in read_study(file)]

    tasks = {name: {"data.datasets": [f"tabletop_{name}"], "evaluate.new_skill": "corner"} for name in ("one", "two", "three")}
    assert added({}, tasks) == [None, ["tabletop_one"], ["tabletop_one", "tabletop_two"]]
    words = {name: {**own, "data.datasets": f"[tabletop_{name}]"} for name, own in tasks.items()}
    assert added({}, words) == [None, ["tabletop_one"], ["tabletop_one", "tabletop_two"]]
    alike = {name: {"evaluate.new_skill": "corner"} for name in tasks}
    assert added({"data.datasets": ["tabletop_all"]}, alike) == [None, ["tabletop_all"], ["tabletop_all"]]


def test_an_arm_says_how_many_frames_of_learned_tasks_its_probe_gets(tmp_path):
    """Each number is a probe of its own: two arms of one study must not read one another's."""
    tasks = {name: {"data.datasets": [f"tabletop_{name}"], "evaluate.new_skill": "corner"} for name in ("one", "two", "three")}
    arms = {"few": {"config": "configs/method_graded.yaml"}, "many": {"config": "configs/method_graded.yaml", "frames": 500}}
    cells = read_study(write(tmp_path / "sets.yaml", name="sets", tasks=tasks, seeds=[1], rates=[2e-3], stream=list(tasks), arms=arms))
    found = {(cell.arm, cell.task): (dict(cell.added), cell.config().probe) for cell in cells if cell.task != "one"}
    assert {key: (added["frames"], probe.size, probe.name) for key, (added, probe) in found.items()} == {
        ("few", "two"): (64, 564, "tabletop+tabletop_one"), ("few", "three"): (64, 628, "tabletop+tabletop_one+tabletop_two"),
        ("many", "two"): (500, 1000, "tabletop+tabletop_onex500"), ("many", "three"): (500, 1500, "tabletop+tabletop_one+tabletop_twox500")}
    assert all(added["to"] == probe.name for added, probe in found.values())


def test_an_arm_without_an_artefact_needs_no_probe_of_its_own_in_a_stream(tmp_path):
    """A probe with frames of earlier tasks is made for who protects with it; an evaluation that asks for one that nobody makes fails."""
    arms = {"plain": {"config": "configs/baseline_lora.yaml"}, "gpm": {"config": "configs/rivals/gpm.yaml"}}
    made = study.open_study(write(tmp_path / "one.yaml", **STREAM, arms=arms), ["--root", str(tmp_path / "root")])
    needed = {made.configs[cell].probe.name for cell in made.cells}
    assert {made.configs[cell].probe.name for cell in made.cells if cell.arm == "plain"} == {"tabletop"}
    assert set(study.probes(made, made.cells)) == needed - {"tabletop"} == {"tabletop+tabletop_cornerx6"}


def test_a_task_whose_run_before_failed_is_not_begun(tmp_path):
    made = study.open_study(write(tmp_path / "one.yaml", **STREAM, arms={"plain": {"config": "configs/baseline_lora.yaml"}}),
                            ["--root", str(tmp_path / "root")])
    called = []
    failed = study.run_study(made, 1, lambda words, log_file: called.append(words) or 2)
    assert len(called) == 1 and failed["plain-again-lr0.002-s1"] == "the run before it failed: plain-corner-lr0.002-s1"


@pytest.mark.parametrize("changed, words", [
    ({"stream": ["corner"]}, "`stream` must be a list of at least two tasks"),
    ({"stream": ["corner", "x"]}, "`stream`: x is none of the tasks"),
    ({"arms": {"plain": {"bases": "kept"}}}, "`arms.plain.bases` must be one of accumulated, estimated, kept"),
    ({"arms": {"plain": {"frames": 64}}}, "`arms.plain.frames` must be a whole number above 0, in a study with a stream, not 64"),
    ({"stream": {"order": ["corner", "order"], "frames": "many"}}, "`stream.frames` must be a whole number above 0"),
])
def test_mistakes_of_a_stream_are_told(tmp_path, changed, words):
    with pytest.raises(ConfigError) as caught:
        read_study(write(tmp_path / "wrong.yaml", **changed))
    assert words in str(caught.value)


def test_after_the_time_no_cell_is_started(tmp_path, capsys):
    made = study.open_study(write(tmp_path / "one.yaml", rule={"subject": "gpm", "reference": "plain", "choose": [1]},
                                  arms={"plain": {"config": "configs/baseline_lora.yaml"}, "gpm": {"config": "configs/rivals/gpm.yaml"}}),
                            ["--root", str(tmp_path / "root")])
    called = []

    def launch(words, log_file):
        called.append(words)
        time.sleep(4.2)
        return 2

    # A choice of cells that has neither the rule's subject nor a seed that is reported.
    made = made._replace(cells=[cell for cell in made.cells if cell.seed == 1 and cell.arm == "plain"])
    failed = study.run_study(made, 1, launch, most=4, export=tmp_path / "part.jsonl")
    assert len(called) == len(failed) == 1 and "1 cells were not started: 4 s were over" in capsys.readouterr().out
    assert (tmp_path / "part.jsonl").read_text() == ""


def test_what_is_missing_is_told_with_its_remedy(tmp_path):
    tasks = {task: {"data.datasets": [f"tabletop_{task}"], "evaluate.new_skill": task} for task in ("corner", "path")}
    made = study.open_study(write(tmp_path / "one.yaml", tasks=tasks), ["--root", str(tmp_path / "root")])
    lines = "\n".join(study.missing(made, made.cells))
    assert "tabletop_corner" in lines and "vlakeep tabletop-data" in lines
    said = [shlex.split(line) for line in lines.splitlines() if line.startswith("    vlakeep tabletop-data")]
    sets = {name for cell in made.cells for name in made.configs[cell].data.datasets}
    told = [read(cli.STAGES[words[1]], words[2:])[1] for words in said]
    assert {name for config in told for name in config.data.datasets} == sets == {"tabletop_corner", "tabletop_path"}
    assert {config.root for config in told} == {str(tmp_path / "root")}
    assert "\nprobe: " in lines, "of an arm behind the first too"
    folder = next(iter(study.artefacts(made)))
    assert folder.name == "graded_tabletop-base" and [cell.arm for cell in study.artefacts(made)[folder].cells] == ["gpm"] * 4
    assert json.dumps(load_config(None).train.lr) and Path(folder).parent == made.storage.artifacts


# Schedulers


def test_resources_are_numbers_where_they_are_and_a_missing_library_is_told(tmp_path, monkeypatch):
    assert schedulers.resources(["num_gpus=0.25", "num_cpus=2", "slurm_partition=gpu"]) == {
        "num_gpus": 0.25, "num_cpus": 2, "slurm_partition": "gpu"}
    with pytest.raises(ConfigError, match="--resources gpu: write NAME=VALUE"):
        schedulers.resources(["gpu"])
    with pytest.raises(ConfigError, match="--resources are for --scheduler slurm or ray"):
        schedulers.scheduler("local", tmp_path, tmp_path, ["num_gpus=1"])
    assert schedulers.scheduler("local", tmp_path, tmp_path, []) is None
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match="--scheduler needs the package ray: " + re.escape(install_extra("ray"))):
        schedulers.scheduler("ray", tmp_path, tmp_path, [])


def test_a_cell_elsewhere_is_a_process_with_its_log_status_and_root(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    given = schedulers.environment(tmp_path / "root")
    assert given["VLAKEEP_ROOT"] == str(tmp_path / "root") and given["OMP_NUM_THREADS"] == "1" and "HOME" not in given
    assert schedulers.execute(["--version"], str(tmp_path / "logs" / "one.log"), given) == 0
    assert "vlakeep" in (tmp_path / "logs" / "one.log").read_text()
    assert schedulers.execute(["nothing"], str(tmp_path / "two.log"), given) == 2
    assert "no stage `nothing`" in (tmp_path / "two.log").read_text()


class Jobs(schedulers._Scheduler):
    """A scheduler whose jobs are numbers; the last one waits until it is stopped."""

    def __init__(self):
        super().__init__("root")
        self.cancelled = []

    def _submit(self, words, log_file):
        return int(words[0])

    def _wait(self, job):
        if job == 9:
            self.stop()
        return job

    def _cancel(self, job):
        self.cancelled.append(job)


def test_a_scheduler_is_stopped_with_what_it_runs():
    jobs = Jobs()
    assert (jobs(["0"], "log"), jobs(["3"], "log"), jobs(["9"], "log"), jobs(["0"], "log")) == (0, 3, 9, schedulers.STOPPED)
    assert jobs.cancelled == [9] and jobs._running == []


def test_submitit_runs_a_cell(tmp_path):
    pytest.importorskip("submitit")
    slurm = schedulers.Slurm(tmp_path / "root", tmp_path / "jobs", {"timeout_min": 5}, cluster="local")
    assert slurm(["--version"], tmp_path / "one.log") == 0 and "vlakeep" in (tmp_path / "one.log").read_text()
    assert slurm(["nothing"], tmp_path / "two.log") == 2


def test_two_ray_workers_run_cells(tmp_path):
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False)
    try:
        run = schedulers.Ray(tmp_path / "root", {"num_cpus": 1})
        with ThreadPoolExecutor(2) as pool:
            assert list(pool.map(lambda n: run([["--version"], ["nothing"]][n], tmp_path / f"{n}.log"), (0, 1))) == [0, 2]
    finally:
        ray.shutdown()
