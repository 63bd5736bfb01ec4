"""Shared set-up: a storage root with a few real tabletop episodes, a small probe and its artefact, on the shipped base model."""

import contextlib
import json
import os
import tempfile

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest
import torch
import yaml

from vlakeep.core import log
from vlakeep.core.compat import import_timm
from vlakeep.core.config import load_config, to_dict
from vlakeep.tabletop import rollout

torch.set_num_threads(1)
log.install()  # tests read what the command line shows

SMALL = ["--threads", "1", "--device", "cpu", "--probe.size", "48", "--icsm.rank", "24", "--icsm.sensitivity_items", "8",
         "--train.steps", "6", "--train.batch_size", "4", "--train.warmup", "2", "--train.save_every", "3", "--lora.rank", "4",
         "--lora.alpha", "4", "--thermostat.every", "1", "--thermostat.batch_size", "16", "--thermostat.calibration", "2",
         "--data.shuffle_buffer", "64"]
# A seed that is not the default: what ignores it gives other start states.
EVALUATION = ["--evaluate.skills", "[reach,pick,corner]", "--evaluate.episodes", "3", "--evaluate.questions", "[color,gripper]",
              "--evaluate.questions_per_kind", "6", "--evaluate.retention_frames", "6", "--evaluate.seed", "11"]
METHOD, BASELINE = "configs/method_icsm_hsw_thermostat.yaml", "configs/baseline_lora.yaml"
GRADED = "configs/method_graded.yaml"


# Long files first, as far as they were measured: processes that take one file after the other then end together (make test).
LONG = ["test_study", "test_graded", "test_evaluate", "test_runs", "test_laws", "test_report", "test_demo", "test_tabletop",
        "test_base_training", "test_rivals", "test_bad_input", "test_methods", "test_train", "test_open_loop", "test_signals",
        "test_distillation", "test_closing", "test_evaluate_libero", "test_protect_loops", "test_cli", "test_models", "test_identity",
        "test_pretraining"]


def pytest_configure(config):
    # The process that leads pytest-xdist's workers reads their warnings, peft's own kinds among them, and so imports peft.
    if getattr(config.option, "numprocesses", None) and not hasattr(config, "workerinput"):
        import_timm()


def pytest_collection_modifyitems(items):
    place = {name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


def save_config(config, path) -> None:
    path.write_text(yaml.safe_dump(to_dict(config), sort_keys=False))


@pytest.fixture(autouse=True)
def exports_end_with_the_test():
    """What a stage exports for its process (the cache variables of core/storage.py) is not seen by the next test of that process."""
    variables, folder = dict(os.environ), tempfile.tempdir
    yield
    for name in set(os.environ) - set(variables):
        del os.environ[name]
    os.environ.update(variables)
    tempfile.tempdir = folder


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """(storage root, make_config): data, probe and artefact are there; `make_config(file, *overrides)` gives small runs in it."""
    from vlakeep.core.storage import Storage
    from vlakeep.offline import run_offline
    from vlakeep.tabletop import data as tabletop_data

    root = tmp_path_factory.mktemp("root")

    def make_config(file, *overrides):
        return load_config(file, SMALL + ["--root", str(root)] + [str(o) for o in overrides])

    config = make_config(METHOD)
    storage = Storage.from_config(config)
    episodes, tabletop_data.EPISODES = tabletop_data.EPISODES, 12
    try:
        tabletop_data.write_tabletop_data(config, storage)
    finally:
        tabletop_data.EPISODES = episodes
    run_offline(config, storage)
    return storage, make_config


@pytest.fixture(scope="session")
def graded_folder(world):
    """Folder of the artefact of method graded, in the same root."""
    from vlakeep.offline import run_offline

    storage, make_config = world
    run_offline(make_config(GRADED), storage)
    return storage.artifacts / "graded_tabletop-base"


@pytest.fixture(scope="session")
def evaluated(world):
    """(run folder, evaluation of the base, evaluation of the run): a baseline run that differs from the base, checkpoints 15 and 30."""
    from vlakeep.evaluate import run_evaluation
    from vlakeep.train import run_training

    storage, make_config = world
    run = run_training(make_config(BASELINE, "--name", "evaluated", "--train.steps", 30, "--train.lr", 5e-3, "--train.batch_size", 8,
                                   "--train.save_every", 15), storage)
    folders = [run_evaluation(make_config(BASELINE, *EVALUATION, "--evaluate.target", target), storage) for target in ("base", run.name)]
    return run, *folders


@pytest.fixture(scope="module")
def own_evaluations(world, tmp_path_factory):
    """Gives a context in which the shared root holds the evaluations of this module alone, and as its last context left them."""
    storage, _ = world
    own, others = (tmp_path_factory.mktemp("evaluations") / name for name in ("own", "others"))

    def swap(put_away, put_back):
        if storage.eval.exists():
            storage.eval.rename(put_away)
        if put_back.exists():
            put_back.rename(storage.eval)

    @contextlib.contextmanager
    def context():
        swap(others, own)
        try:
            yield
        finally:
            swap(own, others)

    return context


def cut_episodes(patch):
    """Episodes of a single step, where what is played is compared with nothing or with itself; the header says the usual lengths."""
    patch.setattr(rollout, "MAX_STEPS", dict.fromkeys(rollout.MAX_STEPS, 1))


@pytest.fixture
def one_figure(monkeypatch):
    """For reports that are read for their words: figures take nearly all of the time, and those of test_report.py are all drawn."""
    from vlakeep.reporting.figures import figures

    monkeypatch.setattr("vlakeep.report.figures", lambda comparison: figures(comparison)[:1])


def read_evaluation(folder):
    """(rows in a fixed order, summary without its seconds) of an evaluation's folder."""
    rows = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()[1:]]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary.pop("seconds") > 0
    return sorted(rows, key=lambda row: (row["kind"], row["ability"], row["trial"])), summary


def wilson_by_roots(successes, n):
    """(mean, low, high): Wilson's 95 % interval as the two solutions of (p - x)^2 = z^2 x (1 - x) / n."""
    z2, p = 1.959964 ** 2, successes / n
    low, high = sorted(np.roots([1 + z2 / n, -(2 * p + z2 / n), p * p]).real)
    return p, pytest.approx(low, abs=1e-9), pytest.approx(high, abs=1e-9)


def final_adapter(folder):
    """Bytes of the newest checkpoint's adapter weights."""
    from vlakeep.core.checkpoint import latest_intact
    return (latest_intact(folder) / "adapter" / "adapter_model.safetensors").read_bytes()
