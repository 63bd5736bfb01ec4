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


def start(argv, log, **environ):
    """A process that runs `vlakeep ARGV` with these variables set; what it says goes to the file `log`."""
    process = FORKS.Process(target=_run, args=([str(a) for a in argv], environ, str(log)))
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
        process.start()
    return process


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def two_ranks(argv, folder):
    """`vlakeep ARGV` in two processes with the variables that torchrun gives them, to its end; test_signals.py has torchrun itself."""
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [start(argv, folder / rank, RANK=rank, LOCAL_RANK=rank, **place) for rank in "01"]
    for rank, process in zip("01", ranks):
        process.join(300)
        assert process.exitcode == 0, (folder / rank).read_text()[-3000:]
