"""Stages over several processes: what one process leaves, to the byte; and a job that fails says so once."""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import forked
import numpy as np
import pytest
from conftest import BASELINE, EVALUATION, GRADED, METHOD, read_evaluation

from vlakeep.benchmarks.records import Records
from vlakeep.core.errors import Interrupted
from vlakeep.core.parallel import Distributed
from vlakeep.core.storage import Storage
from vlakeep.evaluate import play, run_evaluation
from vlakeep.models.alarms import ActionWatch
from vlakeep.offline import run_offline
from vlakeep.teacher.collect import dealt

OFFLINE = ["offline", "--threads", "1", "--device", "cpu", "--probe.size", "48", "--icsm.rank", "24", "--icsm.sensitivity_items", "8"]


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- offline ----


@pytest.mark.parametrize("file, name, options", [(METHOD, "icms_tabletop-base", ("--icsm.moments_gib", 1e-3)),
                                                 (GRADED, "graded_tabletop-base", ())], ids=["frozen, in passes", "graded"])
def test_two_processes_make_the_artefact_of_one_byte_for_byte(world, tmp_path, file, name, options):
    """Batches of ten, of which one process has more than the other, and the last is short."""
    storage, make_config = world
    options = ["--icsm.batch_size", 10, *options]
    one = run_offline(make_config(file, *options, "--artifact_dir", f"{tmp_path.name}-one"),
                      Storage.from_config(make_config(file, "--artifact_dir", f"{tmp_path.name}-one")))
    forked.run_two_ranks([*OFFLINE, "--root", storage.root, "--config", file, "--artifact_dir", f"{tmp_path.name}-two", *options], tmp_path)
    two = storage.root / f"{tmp_path.name}-two" / name
    assert len(files(one)) > 4 and files(two) == files(one)
    assert "wrote" in (tmp_path / "rank0").read_text() and (tmp_path / "rank1").read_text() == ""


def test_inputs_are_dealt_by_their_work_and_stay_together():
    class Linear:
        def __init__(self, width):
            self.in_features = width

    linears = {f"{layer}.{leaf}": Linear(3 if leaf == "down" else 1) for layer in range(4) for leaf in ("q", "k", "o", "down")}

    def key_of(name):
        return name.replace(".k", ".q")

    hands = dealt(linears, key_of, 4)
    assert sorted(name for hand in hands for name in hand) == sorted(linears)
    assert all(sum(name.endswith("down") for name in hand) == 1 for hand in hands)
    assert all((f"{layer}.q" in hand) == (f"{layer}.k" in hand) for hand in hands for layer in range(4))
    assert sum(map(bool, dealt(linears, key_of, 40))) == 12 and dealt(linears, key_of, 1) == [linears]
    one_wide = {"0.down": Linear(3), **{f"{layer}.o": Linear(1) for layer in range(5)}}
    assert sorted(map(len, dealt(one_wide, key_of, 2))) == [1, 5]  # a moment of three columns costs nine of one


# ---- evaluate ----

ASKED = ["--threads", "1", "--device", "cpu", "--probe.size", "48", "--config", BASELINE, *EVALUATION]


def test_two_processes_leave_the_records_and_the_summary_of_one(world, evaluated, tmp_path):
    storage, _ = world
    run, _, one = evaluated
    forked.run_two_ranks(["evaluate", *ASKED, "--root", storage.root, "--evaluate.target", run.name, "--as", "spread"], tmp_path)
    two = one.with_name("spread")
    assert read_evaluation(two) == read_evaluation(one)
    assert sorted((two / "records.jsonl").read_bytes().splitlines()) == sorted((one / "records.jsonl").read_bytes().splitlines())
    assert files(two).keys() == files(one).keys()
    assert "wrote" in (tmp_path / "rank0").read_text() and (tmp_path / "rank1").read_text() == ""


class Rank:
    """One of two processes, without the other."""

    def __init__(self, rank):
        self.rank, self.world, self.is_main = rank, 2, rank == 0

    def broadcast(self, rows):
        return rows or []


def test_a_benchmark_that_does_not_divide_is_played_whole_by_the_first(tmp_path):
    """Whatever it asks of the records; and what comes behind it is dealt out as evenly as before."""
    def played(target, records, folder):
        for trials, _ in records.missing("skill", "pick", 6, 2):
            [add(records, "pick", trial) for trial in trials]
        [add(records, "tap", trial) for trial in records.share(range(4)) if records.gather(trial) == [trial]]

    def add(records, ability, trial):
        records.add(kind="skill", ability=ability, trial=trial, seed=0, success=True, value=None, crash=None, steps=1)

    found, asked = [], []
    for rank in range(2):
        with Records(tmp_path / str(rank) / "records.jsonl", {}, Rank(rank)) as records:
            play(SimpleNamespace(divides=False, play=played), None, records, tmp_path)
            found += [(row["ability"], row["trial"]) for row in records.rows()]
            asked += [trial for trials, _ in records.missing("question", "color", 10, 2) for trial in trials]
    assert found == [("pick", trial) for trial in range(6)] + [("tap", trial) for trial in range(4)] and sorted(asked) == list(range(10))


def test_an_evaluation_whose_processes_were_killed_goes_on_in_one(world, evaluated, tmp_path):
    storage, make_config = world
    run, _, one = evaluated
    folder = one.with_name("spread-killed")
    _, processes = forked.started_two(["evaluate", *ASKED, "--root", storage.root, "--evaluate.target", run.name, "--as", folder.name],
                                      tmp_path)
    left, deadline = folder / "records.rank1.jsonl", time.monotonic() + 300
    while not (left.is_file() and left.read_bytes().count(b"\n") > 2) and time.monotonic() < deadline:
        time.sleep(0.05)
    [process.kill() for process in processes]
    [process.join() for process in processes]
    theirs = left.read_bytes().splitlines()[1:3]
    with open(left, "ab") as file:
        file.write(b'{"kind": "skill", "abil')
    again = run_evaluation(make_config(BASELINE, *EVALUATION, "--evaluate.target", run.name), storage, name=folder.name)
    assert again == folder and read_evaluation(folder) == read_evaluation(one)
    assert not left.exists() and set(theirs) < set((folder / "records.jsonl").read_bytes().splitlines())


def test_what_is_left_by_an_evaluation_of_another_model_is_refused(tmp_path):
    path = tmp_path / "records.jsonl"
    row = dict(kind="skill", ability="reach", trial=1, seed=0, success=True, value=None, crash=None, steps=1)
    (tmp_path / "records.rank3.jsonl").write_text(json.dumps({"header": {"weights": "b"}}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=r"records.rank3.jsonl holds the trials of another model"):
        Records(path, {"weights": "a"})
    with Records(path, {"weights": "b"}) as records:
        assert [found["trial"] for found in records.rows()] == [1]
    with Records(path, {"weights": "b"}) as records:
        assert [found["trial"] for found in records.rows()] == [1]


def test_what_all_processes_saw_makes_the_alarms():
    statistics = {"q01": [0.0, -1.0], "q99": [1.0, 1.0]}
    rng = np.random.default_rng(0)
    actions = np.concatenate([rng.uniform(0, 0.5, (150, 2)), np.full((200, 2), 1.0)])
    whole, *parts = (ActionWatch(statistics, "said") for _ in range(3))
    whole.add(actions, [True] * 3)
    for part, own in zip(parts, (actions[:60], actions[60:])):
        part.add(own, [True] * (3 if len(own) == 60 else 0))
    sent = []
    [part.with_others(lambda mine: sent.append(mine) or [mine]) for part in parts]
    assert parts[0].with_others(lambda mine: sent).alarms() == whole.alarms() != parts[0].alarms()


# ---- dividing ----


def _merging():
    with Distributed("cpu") as job:
        for count in (0, 1, 2, 5, 8):
            whole = [(i, i / 3, [i] * i) for i in range(count)]
            for at_once in (0, 1, 2):
                assert job.merged(job.share(whole), at_once) == whole, (count, at_once)
            assert job.merged(job.share(whole), 1, everywhere=False) == (whole if job.is_main else [])


def test_what_is_dealt_out_comes_together_in_order():
    forked.two_ranks(_merging)
    alone = Distributed.here()
    assert alone.is_main and alone.merged(alone.share([3, 1, 2])) == [3, 1, 2]


# ---- failures ----


def _alone_in_trouble(folder):
    try:
        with Distributed("cpu") as job:
            job.barrier()
            if job.rank == 1:
                raise ValueError("only here")
            job.barrier()
    except BaseException as error:
        (folder / f"end{os.environ['RANK']}").write_text(f"{type(error).__name__} {error}")


def test_the_error_of_one_process_ends_the_others_without_a_word_of_theirs(tmp_path):
    forked.two_ranks(_alone_in_trouble, tmp_path)
    assert (tmp_path / "end1").read_text() == "ValueError only here"
    assert (tmp_path / "end0").read_text().startswith("Interrupted another process")
    assert not issubclass(Interrupted, Exception)


def _killed(folder):
    try:
        with Distributed("cpu") as job:
            job.barrier()
            if job.rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            job.barrier()
    except BaseException as error:
        (folder / "end").write_text(f"{type(error).__name__} {error}")


def test_a_process_that_was_killed_is_missed_by_name(tmp_path):
    with pytest.raises(AssertionError):
        forked.two_ranks(_killed, tmp_path)
    assert (tmp_path / "end").read_text().startswith("ProcessLost process 0 of 2 has lost another one")


def command(*words):
    return [sys.executable, "-m", "vlakeep.cli", *map(str, words)]


def test_gpus_starts_torchrun_and_what_is_wrong_for_all_is_said_once(world):
    storage, _ = world
    run = subprocess.run(command(*OFFLINE, "--root", storage.root, "--config", METHOD, "--icsm.rank", 100, "--gpus", 2),
                         capture_output=True, text=True, timeout=300)
    assert run.returncode == 2 and run.stderr.count("error: ") == 1 and "icsm.rank 100" in run.stderr, run.stderr
    assert "Traceback" not in run.stderr


def test_a_signal_to_the_command_ends_its_processes(world):
    storage, _ = world
    child = subprocess.Popen(command(*OFFLINE, "--root", storage.root, "--config", METHOD, "--gpus", 2, "--artifact_dir", "ended"),
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while "teacher" not in (line := child.stdout.readline()):
        assert line, "it ended by itself"
    ranks = subprocess.run(["pgrep", "-P", str(child.pid)], capture_output=True, text=True).stdout.split()
    child.terminate()
    said = child.communicate(timeout=60)[0]
    assert child.returncode == 143 and "Traceback" not in said, said
    deadline = time.monotonic() + 20
    while (left := [pid for pid in ranks if os.path.exists(f"/proc/{pid}")]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(ranks) >= 2 and left == []
    assert not (storage.root / "ended" / "icms_tabletop-base").exists()
