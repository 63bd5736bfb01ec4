"""Exclusive locks on files, of which the kernel drops those of a process that dies: a stale file locks nothing."""

import fcntl
from typing import IO, Optional


def lock(file: IO) -> Optional[OSError]:
    """Take the lock of an open file until it is closed. BlockingIOError when another process has it; the error of a file system that knows
    no locks, as some of a network, is returned."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        return error
    return None
