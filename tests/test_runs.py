"""Runs beside one another: many in a process, in groups, one after the other, and what tells them apart."""

import json
import logging
import random
import re
import shutil
import signal
import sys
import threading
import types

import numpy as np
import pytest
import torch
import yaml
from conftest import BASELINE, METHOD, cut_episodes, final_adapter, read_evaluation
from safetensors.torch import load_file, save_file

from vlakeep.checks import GREEN, RED, check_artifact, check_from_run, check_run, check_target
from vlakeep.core import checkpoint
from vlakeep.core.checkpoint import save_checkpoint
from vlakeep.core.config import BackboneConfig, Config, TrainConfig, load_config
from vlakeep.core.errors import CheckpointError, RunDirError
from vlakeep.core.log import PlainLines, install, log
from vlakeep.core.names import is_run_name
from vlakeep.core.parallel import Distributed
from vlakeep.core.registry import benchmark_class
from vlakeep.core.rundir import RunDir
from vlakeep.core.storage import Storage, find_checkpoint
from vlakeep.core.target import run_config, target_checkpoint
from vlakeep.data.formats import open_datasets
from vlakeep.evaluate import load_target, run_evaluation
from vlakeep.export import run_export
from vlakeep.methods.baseline import Baseline
from vlakeep.models.adapters import merged_state
from vlakeep.models.chain import Chain, Link, chain_hash, merge_chain, read_chain, spoken
from vlakeep.models.files import weights_hash
from vlakeep.models.load import make_backbone
from vlakeep.models.merge import merge_checkpoint
from vlakeep.offline import run_offline
from vlakeep.report import arms_from_runs, build_report
from vlakeep.reporting.arms import load_arms
from vlakeep.train import run_training

BRIEF = ("--evaluate.skills", "[reach,corner]", "--evaluate.episodes", 2, "--evaluate.questions", "[color]",
         "--evaluate.questions_per_kind", 2, "--evaluate.retention_frames", 2, "--probe.size", 8)
SHORT = ("--train.steps", 2, "--train.tensorboard", False)
DROPOUT = (*SHORT, "--lora.dropout", 0.1)  # draws from the process's random state


# ---- many in a process ----


def of_the_process():
    """What a process has one of, as far as training touches it."""
    return {"handlers": [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)],
            "threads": torch.get_num_threads(), "dtype": torch.get_default_dtype(), "grad": torch.is_grad_enabled(),
            "deterministic": torch.are_deterministic_algorithms_enabled(), "job": Distributed.current(),
            "python": random.getstate(), "numpy": str(np.random.get_state()), "torch": torch.get_rng_state().tolist(),
            "others": sorted(thread.name for thread in threading.enumerate())}


def test_the_same_run_twice_in_a_process_with_another_between_them_gives_the_same_bits(world):
    storage, make_config = world
    before = of_the_process()
    first = run_training(make_config(BASELINE, "--name", "runs-first", *DROPOUT), storage)
    assert of_the_process() == before
    run_training(make_config(METHOD, "--name", "runs-between", *SHORT, "--threads", 2, "--seed", 8, "--data.workers", 1), storage)
    assert of_the_process() == before
    torch.rand(5), np.random.rand(5), random.random()
    second = run_training(make_config(BASELINE, "--name", "runs-second", *DROPOUT), storage)
    assert final_adapter(first) == final_adapter(second)
    other = run_training(make_config(BASELINE, "--name", "runs-other", *DROPOUT, "--seed", 8), storage)
    assert final_adapter(first) != final_adapter(other)


def test_training_in_a_thread_gives_the_same_bits_and_leaves_the_process_as_it_was(world):
    storage, make_config = world
    here = run_training(make_config(BASELINE, "--name", "runs-here", *DROPOUT), storage)
    before, ended = of_the_process(), []
    thread = threading.Thread(target=lambda: ended.append(run_training(make_config(BASELINE, "--name", "runs-thread", *DROPOUT), storage)))
    thread.start()
    thread.join()
    assert of_the_process() == before and final_adapter(ended[0]) == final_adapter(here)


def test_two_trainings_at_a_time_in_one_process_are_refused(world):
    """They would draw from one random state."""
    storage, make_config = world
    with Distributed("cpu"), pytest.raises(ValueError, match="training already.*one after the other"):
        run_training(make_config(BASELINE, "--name", "runs-nested", *SHORT), storage)
    assert not storage.run_folder("runs-nested").exists() and Distributed.current() is None
    run_training(make_config(BASELINE, "--name", "runs-nested", *SHORT), storage)


def test_control_c_ends_a_run_that_can_go_on_in_the_same_process(world, monkeypatch):
    storage, make_config = world
    steps = ("--train.steps", 4, "--train.save_every", 2, "--train.tensorboard", False, "--lora.dropout", 0.1)
    whole = run_training(make_config(BASELINE, "--name", "runs-whole", *steps), storage)
    before = of_the_process()

    class Stopped(Baseline):
        def after_step(self, step, loss_scale):
            if step == 3:
                raise KeyboardInterrupt
            return {}

    config = make_config(BASELINE, "--name", "runs-stopped", *steps)
    with monkeypatch.context() as patch:
        patch.setattr(Baseline, "prepare", lambda *args: (Stopped(), {}))
        with pytest.raises(KeyboardInterrupt):
            run_training(config, storage)
    folder = storage.run_folder("runs-stopped")
    assert of_the_process() == before and json.loads((folder / "provenance.json").read_text())["status"] == "interrupted"
    config.train.resume = True
    assert final_adapter(run_training(config, storage)) == final_adapter(whole) and of_the_process() == before


@pytest.fixture
def library(monkeypatch):
    """As a program that has not asked for the command line's lines."""
    monkeypatch.setattr(log, "handlers", [])
    monkeypatch.setattr(log, "propagate", True)
    monkeypatch.setattr(log, "level", logging.NOTSET)
    log.manager._clear_cache()
    yield log
    log.manager._clear_cache()


def test_the_library_logs_and_prints_nothing(world, library, capsys, caplog):
    storage, make_config = world
    with caplog.at_level(logging.INFO, "vlakeep"):
        run_training(make_config(BASELINE, "--name", "runs-quiet", *SHORT), storage)
    assert capsys.readouterr().out == ""
    said = [r.getMessage().split(",")[0] for r in caplog.records if r.name == "vlakeep" and not r.getMessage().startswith(" ")]
    assert said == ["data tabletop_corner (rlds): 12 of 12 episodes", "runs-quiet: baseline"]


def test_the_command_line_shows_each_line_once_where_it_belongs(library, capsys):
    install(), install()
    log.info("a line")
    log.warning("a notice with 100 %% of %s", "it")
    log.debug("nothing")
    done = capsys.readouterr()
    assert (done.out, done.err) == ("a line\n", "a notice with 100 % of it\n")
    assert [type(handler) for handler in log.handlers] == [PlainLines] and not log.propagate


def test_a_level_that_was_set_is_kept(library, capsys):
    log.setLevel(logging.ERROR)
    install()
    log.warning("a notice")
    assert capsys.readouterr().err == ""


# ---- names ----


@pytest.mark.parametrize("name, good", [("a", True), ("study/arm-s3", True), (".a", True), ("", False), ("a/b/c", False), ("/a", False),
                                        ("a/", False), ("a//b", False), ("../a", False), ("a/..", False), ("./a", False), ("base", False),
                                        ("base/a", False), ("a/base", False), ("~", True)])
def test_a_run_is_called_cell_or_group_and_cell(name, good):
    assert is_run_name(name) == good
    found = [line for line in Config(name=name).problems() if line.startswith("--name")]
    assert (found == []) == good and all("GROUP/CELL" in line for line in found)


@pytest.fixture(scope="module")
def grouped(world):
    """Run folder of `study/arm-s1`, 3 steps with a checkpoint at 2."""
    storage, make_config = world
    return run_training(make_config(BASELINE, "--name", "study/arm-s1", "--train.steps", 3, "--train.save_every", 2), storage)


def asked(world, target, *changes):
    storage, make_config = world
    return run_evaluation(make_config(BASELINE, *BRIEF, "--evaluate.target", target, *changes), storage)


def test_the_name_of_a_group_is_no_name_for_a_run_nor_the_other_way_round(world, grouped):
    storage, make_config = world
    assert grouped == storage.runs / "study" / "arm-s1" and (grouped / "checkpoints").is_dir()
    with pytest.raises(RunDirError, match="holds files of something else .*arm-s1"):
        run_training(make_config(BASELINE, "--name", "study", *SHORT), storage)
    run_training(make_config(BASELINE, "--name", "runs-single", *SHORT), storage)
    for refuse in (lambda config: run_training(config, storage), lambda config: RunDir.open(storage, config)):
        with pytest.raises(RunDirError, match="runs-single is a run itself"):
            refuse(make_config(BASELINE, "--name", "runs-single/cell", *SHORT))
    assert not (storage.runs / "runs-single" / "cell").exists()
    line, = (line for line in check_run(make_config(BASELINE, "--name", "runs-single/cell"), storage, {}) if line.status == RED)
    assert "is a run itself" in line.where


@pytest.fixture(autouse=True)
def evaluations_of_this_file(own_evaluations, monkeypatch):
    """They are moved about here, and compared with one another."""
    cut_episodes(monkeypatch)
    with own_evaluations():
        yield


def test_a_target_of_two_parts_is_a_run_before_it_is_a_path(world, grouped, tmp_path, monkeypatch):
    storage, _ = world
    monkeypatch.chdir(tmp_path)
    step = grouped / "checkpoints" / "step_000003"
    for target in ("study/arm-s1", str(grouped), f"{grouped}/", str(step)):
        assert target_checkpoint(target, storage) == step and run_config(target, storage)["name"] == "study/arm-s1"
    (tmp_path / "study" / "arm-s1").mkdir(parents=True)
    assert target_checkpoint("study/arm-s1", storage) == step
    monkeypatch.chdir(grouped)
    assert target_checkpoint("checkpoints/step_000003", storage) == step
    with pytest.raises(FileNotFoundError) as error:
        target_checkpoint("study/arm-s2", storage)
    assert f"under {storage.runs / 'study' / 'arm-s2'}" in str(error.value) and "--name study/arm-s2`" in str(error.value)
    assert "study/arm-s1" in str(error.value).split("runs with checkpoints:")[1]


def test_evaluations_lie_below_model_benchmark_and_run(world, grouped):
    storage, _ = world
    key = f"tabletop-base-{weights_hash(find_checkpoint('tabletop-base', storage.cache))[:8]}"
    done = asked(world, "study/arm-s1")
    assert done == storage.eval / key / "tabletop" / "study" / "arm-s1"
    assert json.loads((done / "summary.json").read_text())["target"] == "study/arm-s1"
    assert asked(world, str(grouped / "checkpoints" / "step_000002")) == done.with_name("arm-s1-step_000002")
    assert asked(world, "base") == storage.eval / key / "tabletop" / "base"


def test_two_base_models_of_one_root_do_not_meet(world, grouped, tmp_path):
    storage, _ = world
    shipped = find_checkpoint("tabletop-base", storage.cache)
    other = shutil.copytree(shipped, tmp_path / "tabletop-base")  # of the same name too
    tensors = load_file(other / "model.safetensors")
    tensors["projector.fc1.bias"] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    first, second = asked(world, "base"), asked(world, "base", "--backbone.checkpoint", other)
    assert first != second and {one.parent.parent.name.rpartition("-")[0] for one in (first, second)} == {"tabletop-base"}
    with pytest.raises(ValueError, match="evaluations of `base` on tabletop by several base models .tabletop-base-.*put aside"):
        arms_from_runs("base", storage, model="tabletop-base")
    assert arms_from_runs("base,baseline=study/arm-s1", storage, model="tabletop-base")["base"]["eval"] == first
    shutil.rmtree(second)
    assert arms_from_runs("base", storage, model="tabletop-base")["base"]["eval"] == first


def test_an_evaluation_that_an_older_version_began_goes_on_where_it_is(world, grouped):
    storage, make_config = world
    new = asked(world, "study/arm-s1")
    rows, _ = read_evaluation(new)
    old = storage.eval / "study" / "arm-s1"  # older versions had no groups, but put a run there
    shutil.move(new, old)
    records = old / "records.jsonl"
    lines = records.read_text().splitlines(keepends=True)
    records.write_text("".join(lines[:-3]))
    assert arms_from_runs("a=study/arm-s1", storage)["a"]["eval"] == old
    assert asked(world, "study/arm-s1") == old and read_evaluation(old)[0] == rows and not new.exists()
    # That of other weights under the same name is nothing to go on with, and stays as it is.
    header = json.loads(lines[0])
    header["header"]["base"] = "0" * 64
    records.write_text(json.dumps(header) + "\n" + "".join(lines[1:]))
    before = records.read_bytes()
    assert asked(world, "study/arm-s1") == new and records.read_bytes() == before and read_evaluation(new)[0] == rows
    assert arms_from_runs("a=study/arm-s1", storage)["a"]["eval"] == new
    shutil.rmtree(old)


def test_a_report_reads_evaluations_at_either_place(world, grouped, tmp_path, one_figure):
    storage, _ = world
    for target in ("base", "study/arm-s1", str(grouped / "checkpoints" / "step_000002")):
        done = asked(world, target)
    shutil.move(asked(world, "base"), storage.eval / "base")
    (storage.eval / "study").mkdir(exist_ok=True)
    shutil.move(done, storage.eval / "study" / done.name)
    arms = arms_from_runs("base,baseline=study/arm-s1", storage, model="tabletop-base")
    assert arms["base"]["eval"] == storage.eval / "base" and arms["baseline"]["eval"].parts[-3:] == ("tabletop", "study", "arm-s1")
    assert [step for step, _ in load_arms(arms)["baseline"].path] == [2]
    page = build_report(storage.root, arms, tmp_path / "report")
    assert "study/arm-s1_again" in page.read_text(encoding="utf-8")
    for place in ("base", "study"):
        shutil.rmtree(storage.eval / place)


def test_what_is_missing_is_named_with_the_place_and_the_run(world, grouped):
    storage, _ = world
    arms = arms_from_runs("base,a=study/arm-s9", storage, "libero_goal", model="tabletop-base")
    assert arms["base"]["eval"] == storage.eval / "tabletop-base-*" / "libero_goal" / "base"
    with pytest.raises(FileNotFoundError) as error:
        load_arms(arms)
    assert "--name study/arm-s9`" in str(error.value) and "--evaluate.target study/arm-s9`" in str(error.value)


# ---- what tells runs apart ----


def plain(name="a", resume=False, **train):
    config = Config(name=name)
    for key, value in dict(train, tensorboard=False, resume=resume).items():
        setattr(config.train, key, value)
    return config


MADE_OF = {"base_weights": "b" * 64, "data": {"tabletop_corner": "d" * 64}, "artifact": {"U2_f.pt": "u" * 64}, "probe": "p" * 64}


def session(storage, config, hashes=MADE_OF, save=True):
    """(provenance, id at the head of config.yaml) after a session of one step."""
    with RunDir.open(storage, config, hashes=hashes) as run:
        step = 1 if run.resume_from is None else int(run.resume_from.name.split("_")[1]) + 1
        run.log(step, {"loss": 1.0})
        save and save_checkpoint(run.folder, step, {}, {"step": step})
    head = (run.folder / "config.yaml").read_text().splitlines()[0]
    return json.loads((run.folder / "provenance.json").read_text()), head


@pytest.fixture
def own(tmp_path):
    return Storage.from_config(Config(root=str(tmp_path / "root")))


def test_an_id_follows_from_what_matters_and_from_nothing_else(own):
    first, head = session(own, plain())
    assert re.fullmatch("[0-9a-f]{16}", first["id"]) and head == f"# run {first['id']}"
    assert yaml.safe_load((own.runs / "a" / "config.yaml").read_text())["name"] == "a"  # and --config takes it
    assert load_config(str(own.runs / "a" / "config.yaml")).train.steps == 1000
    free = plain("study/a", steps=7, save_every=3, log_every=2, keep_last=9)
    free.evaluate.episodes, free.export.dtype, free.data.workers = 3, "float32", 2
    same, _ = session(own, free)
    assert same["id"] == first["id"] and same["wandb_id"] != first["wandb_id"]
    ids = {first["id"]}
    for number, (section, key, value) in enumerate([("train", "lr", 1e-3), ("lora", "rank", 3), (None, "seed", 8), (None, "method", "x"),
                                                    ("options", "strength", 1.0)]):
        config = plain(f"c{number}")
        config.method = "x" if section == "options" else config.method  # the baseline has none
        place = getattr(config, section) if section else config
        place.update({key: value}) if section == "options" else setattr(place, key, value)
        ids.add(session(own, config)[0]["id"])
    for number, key in enumerate(MADE_OF):
        other = {key: "0" * 64} if isinstance(MADE_OF[key], str) else {key: dict.fromkeys(MADE_OF[key], "0" * 64)}
        ids.add(session(own, plain(f"h{number}"), {**MADE_OF, **other})[0]["id"])
    assert len(ids) == 1 + 5 + 4


def test_an_id_is_kept_when_a_run_goes_on(own):
    first, _ = session(own, plain())
    again, head = session(own, plain(resume=True, steps=2000))
    assert (again["id"], again["wandb_id"], head) == (first["id"], first["wandb_id"], f"# run {first['id']}")
    path = own.runs / "a" / "provenance.json"
    old = {key: value for key, value in again.items() if key not in ("id", "wandb_id")}  # as an older version leaves it
    path.write_text(json.dumps(old))
    older, _ = session(own, plain(resume=True))
    assert older["id"] == first["id"] and older["wandb_id"] == "a"  # its curve on W&B goes on


@pytest.mark.parametrize("change, line", [({"data": {"tabletop_corner": "0" * 64}}, "data.tabletop_corner: dddddddddddd -> 000000000000"),
                                          ({"artifact": {"U2_f.pt": "0" * 64}}, "artifact.U2_f.pt: uuuuuuuuuuuu -> 000000000000"),
                                          ({"probe": "0" * 64}, "probe: pppppppppppp -> 000000000000")])
def test_a_run_does_not_go_on_with_something_else_under_the_same_name(own, change, line):
    session(own, plain())
    before = (own.runs / "a" / "provenance.json").read_bytes()
    with pytest.raises(RunDirError, match="made from something else") as error:
        RunDir.open(own, plain(resume=True), hashes={**MADE_OF, **change})
    assert [text.strip() for text in str(error.value).splitlines()[1:-1]] == [line]
    assert (own.runs / "a" / "provenance.json").read_bytes() == before
    session(own, plain(resume=True), {**MADE_OF, "new": "0"})  # what an older version did not note is no difference


def test_a_folder_with_another_run_says_what_is_another(own):
    session(own, plain())
    with pytest.raises(RunDirError, match=r"status: finished\). It has another configuration \(train.lr: 0.0005 -> 1.0\)"):
        RunDir.open(own, plain(lr=1.0))
    with pytest.raises(RunDirError, match="Go on in it with --train.resume true"):
        RunDir.open(own, plain(steps=5))


def test_wandb_gets_an_id_of_its_own_for_each_run(own, monkeypatch):
    calls = []
    board = types.SimpleNamespace(log=lambda *args, **kwargs: None, finish=lambda: None)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **given: calls.append(given) or board))
    for name in ("one/arm-s1", "two/arm-s1", "arm"):
        session(own, plain(name, use_wandb=True))
    session(own, plain("arm", use_wandb=True, resume=True))
    assert [call["name"] for call in calls] == ["one/arm-s1", "two/arm-s1", "arm", "arm"]
    assert [call["group"] for call in calls] == ["one", "two", None, None]
    assert len({call["id"] for call in calls}) == 3 and calls[2]["id"] == calls[3]["id"]
    assert all(re.fullmatch("[0-9a-f]{16}", call["id"]) and call["resume"] == "allow" for call in calls)  # W&B takes no slash


def test_training_notes_what_it_was_made_from(world, grouped):
    storage, _ = world
    found = json.loads((grouped / "provenance.json").read_text())
    hashes = found["sessions"][0]["hashes"]
    assert hashes["base_weights"] == weights_hash(find_checkpoint("tabletop-base", storage.cache)) and len(found["id"]) == 16
    with open_datasets(storage.data, ["tabletop_corner"])[0] as data:
        assert hashes["data"] == {"tabletop_corner": data.fingerprint()}


# ---- one after the other ----

FIRST = ("--train.steps", 3, "--train.lr", 2e-2, "--train.tensorboard", False)
SECOND = ("--train.steps", 2, "--train.lr", 2e-2, "--train.tensorboard", False, "--seed", 8)


@pytest.fixture(scope="module")
def first(world):
    """(folder of `tasks/first`, its export)."""
    storage, make_config = world
    config = make_config(BASELINE, "--name", "tasks/first", *FIRST, "--export.parity_frames", 2)
    return run_training(config, storage), run_export(config, storage)


@pytest.fixture(scope="module")
def second(world, first):
    """Folder of `tasks/second`, trained from it."""
    storage, make_config = world
    return run_training(make_config(BASELINE, "--name", "tasks/second", *SECOND, "--train.from_run", "tasks/first"), storage)


def provenance(run):
    return json.loads((run / "provenance.json").read_text())


def hashes_of(run):
    return provenance(run)["sessions"][-1]["hashes"]


def test_training_from_a_run_is_training_from_its_export_bitwise(world, first, second):
    storage, make_config = world
    detour = run_training(make_config(BASELINE, "--name", "tasks/detour", *SECOND, "--backbone.checkpoint", first[1]), storage)
    assert final_adapter(second) == final_adapter(detour)
    assert hashes_of(second)["base_weights"] == hashes_of(detour)["base_weights"] == weights_hash(first[1])
    plain = run_training(make_config(BASELINE, "--name", "tasks/plain", *SECOND), storage)
    assert final_adapter(second) != final_adapter(plain) and hashes_of(plain)["base_weights"] != hashes_of(second)["base_weights"]


def test_merged_weights_are_those_of_the_export_whatever_is_stored_and_loaded(world, first, tmp_path):
    """A base stored in bfloat16 (as the shipped one) is rounded so also where it is loaded in float32; one in float32 is rounded once."""
    storage, make_config = world
    adapter = checkpoint.latest_intact(first[0]) / "adapter"
    shipped = find_checkpoint("tabletop-base", storage.cache)
    wide = shutil.copytree(shipped, tmp_path / "wide")
    stored = load_file(shipped / "model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.bfloat16}
    save_file({name: t.float() * 1.001 for name, t in stored.items()}, wide / "model.safetensors")  # bits that bfloat16 has no room for
    for number, base in enumerate((shipped, wide)):
        chain = Chain(weights_hash(base), [Link(run, "step_000003", "", adapter.parent) for run in ("first", "a/b")])
        places = [tmp_path / f"{number}-{i}" for i in range(2)]
        for place, before in zip(places, (base, places[0])):
            place.mkdir()
            merge_checkpoint(before, adapter, place, {})
        both = tmp_path / f"{number}-both"
        both.mkdir()
        merge_checkpoint(base, adapter, both, {}, before=[adapter])
        assert chain_hash(base, chain) == weights_hash(places[1]) == weights_hash(both) != weights_hash(base)
        shutil.copy(shipped / "dataset_statistics.json", places[1])
        for file in shipped.glob("*token*"):
            shutil.copy(file, places[1])
        shutil.copy(shipped / "preprocessor_config.json", places[1])
        for dtype in ("float32", "bfloat16"):
            wanted = make_backbone(BackboneConfig(str(places[1]), dtype=dtype))
            found = make_backbone(BackboneConfig(str(base), dtype=dtype))
            merge_chain(found, chain)
            assert all(torch.equal(a, b) for a, b in zip(found.state_dict().values(), wanted.state_dict().values()))
            assert found.weights_sha256 == wanted.weights_sha256 and found.name == f"{base.name}+first+a.b"


def test_the_artefact_that_a_closing_pass_lacks_is_made_for_the_run_that_came_before(world, second):
    storage, make_config = world
    closing = ("--name", "tasks/second", "--export.close_to", 0.5, "--export.parity_frames", 0, "--gains.name", "nowhere")
    with pytest.raises(ValueError, match="no artefact of the graded") as error:
        run_export(make_config(BASELINE, *closing), storage, "vlakeep offline --method graded")
    assert str(error.value).endswith("\n  vlakeep offline --method graded --train.from_run tasks/first")
    chain = read_chain(second)
    older = chain._replace(links=[chain.links[0]._replace(checkpoint="step_000001")])
    assert spoken(older, storage) == str(storage.run_folder("tasks/first") / "checkpoints" / "step_000001")


def test_a_run_from_a_run_is_evaluated_and_exported_as_a_whole(world, first, second, tmp_path):
    storage, make_config = world
    done = asked(world, "tasks/second")
    key = f"tabletop-base+tasks.first-{weights_hash(first[1])[:8]}"
    assert done == storage.eval / key / "tabletop" / "tasks" / "second"
    assert json.loads((done / "records.jsonl").read_text().splitlines()[0])["header"]["base"] == weights_hash(first[1])
    assert arms_from_runs("base,b=tasks/second", storage, model="tabletop-base")["b"]["eval"] == done
    backbone, name, _ = load_target(make_config(BASELINE, "--evaluate.target", "tasks/second"), storage, "cpu")
    out = run_export(make_config(BASELINE, "--export.target", "tasks/second", "--export.parity_frames", 4, "--export.folder",
                                 storage.runs / "tasks-whole"), storage)
    whole = make_backbone(str(out))
    expected = merged_state(backbone, torch.bfloat16)  # as the base is stored
    assert name == "tasks/second" and all(torch.equal(t, expected[key].float()) for key, t in whole.openvla.state_dict().items())
    record = json.loads((out / "vlakeep_export.json").read_text())
    assert [one["run"] for one in record["before"]] == ["tasks/first"] and record["run"] == "tasks/second"
    assert record["base_sha256"] == weights_hash(first[1]) and record["parity"]["frames_identical"] == 4
    assert set(backbone.norm_stats) == {"tabletop", "tabletop_corner"}
    adapter_config = json.loads((checkpoint.latest_intact(second) / "adapter" / "adapter_config.json").read_text())
    assert adapter_config["base_model_name_or_path"] == "tabletop-base+tasks.first"
    lines = check_target(benchmark_class("tabletop")(make_config(BASELINE, "--evaluate.target", "tasks/second"), storage),
                         {"model_type": "openvla"})
    assert [line.status for line in lines if line.what == "target"] == [GREEN]


def test_the_chain_is_noted_and_kept_whatever_becomes_of_the_first_run(world, first, second):
    storage, make_config = world
    sha256 = checkpoint.file_sha256(checkpoint.latest_intact(first[0]) / "adapter" / "adapter_model.safetensors")
    assert hashes_of(second)["from_run"] == {"tasks/first": sha256}
    assert hashes_of(second)["original_base_weights"] == hashes_of(first[0])["base_weights"]
    moved = storage.runs / "elsewhere"
    first[0].rename(moved)
    try:
        before = final_adapter(second)
        config = make_config(BASELINE, "--name", "tasks/second", *SECOND, "--train.from_run", "tasks/first", "--train.resume", True,
                             "--train.steps", 3)
        assert final_adapter(run_training(config, storage)) != before
        assert provenance(second)["id"] and hashes_of(second)["from_run"] == {"tasks/first": sha256}
        third = run_training(make_config(BASELINE, "--name", "tasks/third", *SECOND, "--train.from_run", "tasks/second"), storage)
        assert [link.run for link in read_chain(third).links] == list(hashes_of(third)["from_run"]) == ["tasks/first", "tasks/second"]
        with pytest.raises(FileNotFoundError, match="no intact checkpoint of the run `tasks/first`"):
            run_training(make_config(BASELINE, "--name", "tasks/fourth", *SECOND, "--train.from_run", "tasks/first"), storage)
    finally:
        moved.rename(first[0])
    with pytest.raises(RunDirError, match="train.from_run: tasks/first -> None"):
        run_training(make_config(BASELINE, "--name", "tasks/second", *SECOND, "--train.resume", True), storage)


def test_a_chain_that_does_not_fit_is_refused(world, second, tmp_path):
    storage, make_config = world
    shipped = find_checkpoint("tabletop-base", storage.cache)
    other = shutil.copytree(shipped, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["projector.fc1.bias"] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    for change in (("--name", "tasks/wrong", "--train.from_run", "tasks/first"), ("--evaluate.target", "tasks/second")):
        config = make_config(BASELINE, *SECOND, *change, "--backbone.checkpoint", other)
        with pytest.raises(CheckpointError, match="tasks/first, step_000003, was trained on other base weights.*--backbone.checkpoint"):
            run_training(config, storage) if change[0] == "--name" else load_target(config, storage, "cpu")
    copied = shutil.copytree(second, storage.runs / "tasks" / "copied")
    weights = copied / "from" / "00" / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match="the adapter in .*copied/from/00 is not that of tasks/first"):
        load_target(make_config(BASELINE, "--evaluate.target", "tasks/copied"), storage, "cpu")
    shutil.rmtree(copied)
    assert [line for line in Config(name="a", train=TrainConfig(from_run="a")).problems() if line.startswith("--train.from_run")]


def test_the_teacher_of_a_run_from_a_run_is_the_merged_model(world, first):
    storage, make_config = world
    changes = ("--train.from_run", "tasks/first", "--train.steps", 2, "--train.tensorboard", False)
    config = make_config(METHOD, "--name", "tasks/method", *changes)
    line, = (line for line in check_artifact(config, storage, {}, None, "c.yaml") if line.status == RED)
    assert "icms_tabletop-base-tasks.first" in line.where and line.remedy == "vlakeep offline --config c.yaml --train.from_run tasks/first"
    with pytest.raises(ValueError, match="made for other base weights"):  # the artefact of the base
        run_training(make_config(METHOD, "--name", "tasks/method", *changes, "--icsm.name", "icms_tabletop-base"), storage)
    folder = run_offline(config, storage)
    meta = json.loads((folder / "meta.json").read_text())
    assert folder.name == "icms_tabletop-base-tasks.first" and meta["weights_sha256"] == weights_hash(first[1])
    assert [line.status for line in [*check_artifact(config, storage, {}, None, ""), *check_from_run(config, storage)]] == [GREEN, GREEN]
    assert hashes_of(run_training(config, storage))["artifact"] == meta["files"]
    line, = check_from_run(make_config(METHOD, "--train.from_run", "tasks/none"), storage)
    assert line.status == RED and "no intact checkpoint of the run `tasks/none`" in line.where
