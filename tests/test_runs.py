"""Runs beside one another: many in a process, in groups, one after the other, and what tells them apart."""

import json
import logging
import random
import signal
import threading

import numpy as np
import pytest
import torch
from conftest import BASELINE, METHOD, final_adapter

from vlakeep.core.log import PlainLines, install, log
from vlakeep.core.parallel import Distributed
from vlakeep.methods.baseline import Baseline
from vlakeep.train import run_training

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
    run_training(make_config(METHOD, "--name", "runs-between", *SHORT, "--threads", 2, "--seed", 8, "--data.workers", 2), storage)
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
    assert [r.getMessage().split(",")[0] for r in caplog.records if r.name == "vlakeep"] == [
        "data tabletop_corner (rlds): 12 episodes", "runs-quiet: baseline"]


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
