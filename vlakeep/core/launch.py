"""`--gpus N`: a stage in N processes of this machine, one a GPU, by torchrun. Several machines: docs/reference.md."""

import logging
import os
import signal
import sys
from typing import List

from vlakeep.core.config import ConfigError


def launch(gpus: int, stage: str, argv: List[str]) -> int:
    """Run `vlakeep STAGE ARGV` without its --gpus in so many processes; the exit status of the first that failed, or 128 + the signal that
    ended the job. What is wrong says the process that found it, and nobody else. ConfigError inside torchrun."""
    if "RANK" in os.environ:
        raise ConfigError(f"--gpus {gpus} inside torchrun, which has started the processes: leave it out")
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    # torchrun's own choice is one thread a process.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // gpus)))
    for name in ("torch.distributed.elastic", "torch.distributed.run", "torch.distributed.launcher"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        run(parse_args(["--standalone", "--nproc-per-node", str(gpus), "-m", "vlakeep.cli", stage, *without_gpus(argv)]))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            return failure.exitcode
        print(f"error: process {rank} of {gpus} was ended by {signal.Signals(-failure.exitcode).name} (SIGKILL: often for want of memory); "
              "run the same command again", file=sys.stderr)
        return 128 - failure.exitcode
    except SignalException as end:
        return 128 + end.sigval
    return 0


def without_gpus(argv: List[str]) -> List[str]:
    found, left = [], list(argv)
    while left:
        word = left.pop(0)
        if word == "--gpus":
            left.pop(0)
        elif not word.startswith("--gpus="):
            found.append(word)
    return found
