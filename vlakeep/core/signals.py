"""What schedulers send: SIGTERM and SIGUSR1, to the command line, to every process of a job, and to one whose launcher is gone.

A stage is ended by an exception, so that locks, temporary files and the run's status are put in order; training only notes the signal
(train.py: signals_noted) and saves first. Both leave with 128 + the signal.
"""

import ctypes
import os
import signal
import sys
import threading
from typing import Any, Callable, Optional

NUMBERS = (signal.SIGTERM, signal.SIGUSR1)
AGAIN_S = 0.1  # after a signal whose exception was lost
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_on_signals() -> None:
    """From now on each of NUMBERS raises SystemExit in the main thread, also where Python would drop the exception."""
    for number in NUMBERS:
        signal.signal(number, _terminate)
    if not getattr(sys.unraisablehook, "sends_again", False):
        sys.unraisablehook = _once_more(sys.unraisablehook)


def _terminate(number, frame):
    raise SystemExit(128 + number)


def _once_more(before: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """An exception that comes in a destructor is printed and forgotten, and the process would go on: the signal is sent again."""
    def hook(unraisable):
        code = getattr(unraisable.exc_value, "code", None)
        if not isinstance(unraisable.exc_value, SystemExit) or not isinstance(code, int) or code - 128 not in NUMBERS:
            before(unraisable)
            return
        timer = threading.Timer(AGAIN_S, os.kill, (os.getpid(), code - 128))
        timer.daemon = True
        timer.start()

    hook.sends_again = True  # type: ignore[attr-defined]
    return hook


def follow_parent() -> None:
    """SIGTERM when the process that started this one dies, in whatever way: a rank whose torchrun was killed saves and leaves, instead of
    holding the GPU and the run. Linux only; elsewhere nothing."""
    parent = os.getppid()
    try:
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    except (OSError, AttributeError):
        return
    if os.getppid() != parent:  # it died in between
        os.kill(os.getpid(), signal.SIGTERM)


class StopVote:
    """Whether any process of a job (parallel.py:Distributed) has noted a signal: the same answer in all, at the same step.

    A signal may reach one process only, and all have to come to the save. The question goes from host to host (gloo) beside the work of the
    devices, and is answered a step later, so that nobody waits for it.
    """

    def __init__(self, world: int):
        self._world, self._group = world, None
        self._asked: Any = None  # (tensor, work) of the question that is out
        if world > 1:
            import torch.distributed

            self._group = torch.distributed.new_group(backend="gloo")

    def ask(self, mine: Optional[int]) -> int:
        """At the end of every step, in every process: the largest signal that any had noted a step ago, 0 for none. A single process gets
        its own at once."""
        if self._world == 1:
            return int(mine or 0)
        import torch

        asked = self._asked
        noted = torch.tensor([int(mine or 0)], dtype=torch.int64)
        self._asked = noted, torch.distributed.all_reduce(noted, torch.distributed.ReduceOp.MAX, group=self._group, async_op=True)
        return self._answer(asked)

    def last(self) -> None:
        """After the last step: waits for the question that is still out, which no process may leave the others alone with."""
        asked, self._asked = self._asked, None
        self._answer(asked)

    @staticmethod
    def _answer(asked) -> int:
        if asked is None:
            return 0
        noted, work = asked
        work.wait()
        return int(noted[0])
