"""What schedulers send, to real processes: the command line, two ranks, a launcher that is killed, a job that is put back in the queue."""

import json
import multiprocessing
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch.distributed
from conftest import BASELINE, SMALL, final_adapter

from vlakeep.core import signals
from vlakeep.core.rundir import read_metrics
from vlakeep.train import run_training, signals_noted

REPOSITORY = Path(__file__).parent.parent
ENDINGS = {signal.SIGTERM: 143, signal.SIGUSR1: 138}
FORK = multiprocessing.get_context("fork")


def child(body, *args):
    """(process, our end of a pipe) of a forked process that runs body(its end, *args)."""
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=body, args=(theirs, *args))
    process.start()
    theirs.close()
    return process, ours


def wait_for(said, pipe):
    assert pipe.poll(20) and pipe.recv() == said


# ---- a stage ends by an exception ----


def _cleaned(pipe):
    signals.end_on_signals()
    try:
        pipe.send("ready")
        time.sleep(20)
    finally:
        pipe.send("cleaned up")


@pytest.mark.parametrize("number", ENDINGS)
def test_a_signal_runs_the_clean_up_of_a_stage(number):
    process, pipe = child(_cleaned)
    wait_for("ready", pipe)
    os.kill(process.pid, number)
    wait_for("cleaned up", pipe)
    process.join(20)
    assert process.exitcode == ENDINGS[number]


class Destroyed:
    """Gets a signal in its destructor, where Python drops exceptions."""

    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(1000):
            pass


def _in_a_destructor(pipe):
    signals.end_on_signals()
    pipe.send("ready")
    Destroyed()
    pipe.send("went on")
    time.sleep(20)


def test_a_signal_whose_exception_is_dropped_is_sent_again():
    process, pipe = child(_in_a_destructor)
    wait_for("ready", pipe)
    wait_for("went on", pipe)
    process.join(10)
    assert process.exitcode == 143


def test_another_dropped_exception_is_shown_as_before(monkeypatch):
    shown = []
    hook = signals._once_more(shown.append)

    class Ignored:
        exc_value = ValueError("x")

    hook(Ignored)
    Ignored.exc_value = SystemExit(2)
    hook(Ignored)
    assert shown == [Ignored, Ignored]


def test_the_first_of_two_signals_gives_the_status():
    before = [signal.getsignal(number) for number in ENDINGS]
    caught = []
    for number in ENDINGS:
        signal.signal(number, lambda number, frame: caught.append(number))
    try:
        with signals_noted() as noted:
            signal.raise_signal(signal.SIGUSR1)
            signal.raise_signal(signal.SIGTERM)
            assert noted["signal"] == signal.SIGUSR1
        assert caught == [signal.SIGUSR1]  # after the loop's last look, to the handler of before
    finally:
        for number, handler in zip(ENDINGS, before):
            signal.signal(number, handler)


# ---- ranks ----


def _votes(pipe, rank, port, steps, noted_at):
    store = torch.distributed.TCPStore("127.0.0.1", port, 2, rank == 0)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    vote, said = signals.StopVote(2), []
    for step in range(1, steps + 1):
        said.append(vote.ask(signal.SIGUSR1 if noted_at and step >= noted_at else None))
        if said[-1]:
            break
    vote.last()
    torch.distributed.destroy_process_group()
    pipe.send(said)


def test_a_signal_to_one_rank_stops_all_at_the_same_step():
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    answers = [child(_votes, rank, port, 9, noted_at) for rank, noted_at in ((0, None), (1, 4))]
    found = [pipe.recv() if pipe.poll(30) else None for _, pipe in answers]
    for process, _ in answers:
        process.join(20)
    assert found == [[0, 0, 0, 0, signal.SIGUSR1]] * 2


def test_a_single_process_hears_itself_at_once():
    vote = signals.StopVote(1)
    assert vote.ask(None) == 0 and vote.ask(signal.SIGTERM) == signal.SIGTERM
    vote.last()


def test_the_question_that_is_out_at_the_end_is_waited_for():
    """A process that left earlier would leave the others alone with it."""
    class Work:
        waited = 0

        def wait(self):
            self.waited += 1

    vote, work = signals.StopVote(1), Work()
    vote._asked = ([0], work)
    vote.last()
    assert work.waited == 1
    vote.last()
    assert work.waited == 1


def _launcher(pipe):
    _, inner = child(_follower)
    wait_for("ready", inner)
    pipe.send(inner.recv())
    time.sleep(20)


def _follower(pipe):
    signals.end_on_signals()
    signals.follow_parent()
    pipe.send("ready")
    pipe.send(os.getpid())
    time.sleep(20)


@pytest.mark.skipif(sys.platform != "linux", reason="prctl")
def test_a_rank_whose_launcher_is_killed_does_not_stay():
    process, pipe = child(_launcher)
    assert pipe.poll(20)
    rank = pipe.recv()
    os.kill(process.pid, signal.SIGKILL)
    process.join(10)
    for _ in range(200):
        try:
            state = Path(f"/proc/{rank}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return
        if state == "Z":  # nobody is there to wait for it
            return
        time.sleep(0.02)
    os.kill(rank, signal.SIGKILL)
    pytest.fail("the rank went on without its launcher")


def alive(folder, process, rows=2):
    """Whether the run in a folder has logged some rows; waits for it while the process lives."""
    while process.poll() is None:
        if (folder / "metrics.jsonl").is_file() and len(read_metrics(folder)) >= rows:
            return True
        time.sleep(0.05)
    return False


def test_a_job_of_two_ranks_is_put_back_into_the_queue_and_goes_on(world, tmp_path):
    """scripts/requeue.sbatch > run script > torchrun > two ranks; SIGUSR1 reaches the outermost alone."""
    storage, make_config = world
    folder = storage.run_folder("signals-two")
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\necho \"$@\" > {shlex.quote(str(tmp_path / 'asked'))}\n")
    (tmp_path / "scontrol").chmod(0o755)
    environ = dict(os.environ, SLURM_JOB_ID="77",
                   PATH=os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]]))
    arguments = [*SMALL, "--root", str(storage.root), "--name", "signals-two", "--train.steps", "400", "--train.save_every", "1000",
                 "--train.log_every", "2", "--train.batch_size", "2", "--train.tensorboard", "false", "--lora.layers", "last:1"]
    job = subprocess.Popen(["bash", "scripts/requeue.sbatch", "scripts/run_baseline_lora.sh", "--gpus", "2", *arguments], cwd=REPOSITORY,
                           env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)
    told = []
    reader = threading.Thread(target=lambda: told.append(job.stderr.read()))
    reader.start()
    try:
        assert alive(folder, job)
        job.send_signal(signal.SIGUSR1)
        assert job.wait(120) == 138
        reader.join(20)
        assert (tmp_path / "asked").read_text() == "requeue 77\n"
        saved, = (folder / "checkpoints").iterdir()
        step = int(saved.name.split("_")[1])
        found = json.loads((folder / "provenance.json").read_text())
        assert found["status"] == "interrupted" and found["sessions"][0]["world"] == 2
        config = make_config(BASELINE, *arguments[len(SMALL) + 2:], "--train.steps", step + 1, "--train.resume", "true")
        run_training(config, storage)
        again = json.loads((folder / "provenance.json").read_text())["sessions"]
        assert [session["resumed_from"] for session in again] == [None, saved.name] and again[1]["status"] == "finished"
    finally:
        try:
            os.killpg(job.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        reader.join(20)
        job.stderr.close()


def test_two_launchers_leave_the_bits_of_one_process(world, tmp_path):
    """NNODES and RDZV of the run scripts: two machines of one process each, here on one; each rank is the first of its machine."""
    storage, make_config = world
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{free.getsockname()[1]}"
    arguments = [*SMALL, "--root", str(storage.root), "--train.tensorboard", "false"]
    environ = dict(os.environ, NNODES="2", RDZV=place, PATH=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    logs = [tmp_path / "one", tmp_path / "two"]
    command = ["bash", "scripts/run_baseline_lora.sh", *arguments, "--name", "signals-nodes"]
    machines = [subprocess.Popen(command, cwd=REPOSITORY, env=environ, stdout=log.open("w"), stderr=subprocess.STDOUT,
                                 start_new_session=True) for log in logs]
    try:
        assert [machine.wait(200) for machine in machines] == [0, 0], "\n".join(log.read_text()[-2000:] for log in logs)
    finally:
        for machine in machines:
            try:
                os.killpg(machine.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
    folder = storage.run_folder("signals-nodes")
    assert json.loads((folder / "provenance.json").read_text())["sessions"][0]["world"] == 2
    one = run_training(make_config(BASELINE, *arguments[len(SMALL) + 2:], "--name", "signals-one", "--train.accumulation", 2), storage)
    assert final_adapter(folder) == final_adapter(one)


def test_several_machines_must_say_where_they_meet():
    environ = dict(os.environ, NNODES="2")
    done = subprocess.run(["bash", "scripts/run_baseline_lora.sh"], cwd=REPOSITORY, env=environ, capture_output=True, text=True)
    assert done.returncode and "NNODES=2: set RDZV to HOST:PORT of one of the machines" in done.stderr
