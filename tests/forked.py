"""Processes of `vlakeep` for tests that are not about its start: forked from one in which warm.py has imported the libraries.

That one is started for the first of them. It has computed no gradient and touched no GPU, after which torch cannot be forked.
"""

import multiprocessing
import os
import socket
import sys
from unittest import mock

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["warm"])


def _run(argv, environ, log):
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(environ)
    sys.argv = ["vlakeep", *argv]
    from vlakeep import cli

    sys.exit(cli.main())


def _start(target, *args):
    process = FORKS.Process(target=target, args=args)
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
        process.start()
    return process


def start(argv, log, **environ):
    """A process that runs `vlakeep ARGV` with these variables set; what it says goes to the file `log`."""
    return _start(_run, [str(a) for a in argv], environ, str(log))


def _ranks():
    """What torchrun tells two processes; test_signals.py has torchrun itself."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return [dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port) for rank in "01"]


def _ranked(environ, body, args):
    os.environ.update(environ)
    body(*args)


def two_ranks(body, *args):
    """body(*args), a function of a module, in two processes that Distributed finds to be one job, to the end of both."""
    processes = [_start(_ranked, environ, body, args) for environ in _ranks()]
    [process.join(120) for process in processes]
    assert [process.exitcode for process in processes] == [0, 0]


def started_two(argv, folder):
    """(logs, processes) of `vlakeep ARGV` in two such processes."""
    logs = [folder / "rank0", folder / "rank1"]
    return logs, [start(argv, log, **environ) for log, environ in zip(logs, _ranks())]


def run_two_ranks(argv, folder):
    """`vlakeep ARGV` in two such processes."""
    logs, processes = started_two(argv, folder)
    for process, log in zip(processes, logs):
        process.join(300)
        assert process.exitcode == 0, log.read_text()[-3000:]
