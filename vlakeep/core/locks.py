"""Exclusive locks on files, of which the kernel drops those of a process that dies: a stale file locks nothing."""

import errno
import fcntl
from typing import IO, Optional


def lock(file: IO) -> Optional[OSError]:
    """Take the lock of an open file until it is closed. BlockingIOError when another process has it; the error of a file system that knows
    no locks, as some of a network, is returned."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):  # EACCES: where flock is made of record locks, as POSIX allows for these
            raise BlockingIOError(*error.args) from None
        return error
    return None
