"""Errors that a user can cause, and how the command line prints them: one message with its remedy, no traceback."""

import errno
import re
import shlex
from pathlib import Path


class StorageError(ValueError):
    """A big file would land where the storage policy forbids it; the message names the place and the flag that mends it."""


class DiskFull(OSError):
    """Too little space; the message names the folder, the bytes needed and the bytes free. `errno` is ENOSPC."""

    def __init__(self, message: str):
        super().__init__(errno.ENOSPC, message)

    def __str__(self) -> str:
        return self.strerror


class CheckpointError(ValueError):
    """A truncated, corrupt or ill-fitting checkpoint; the message names the file and the newest intact checkpoint."""


class RunDirError(ValueError):
    """A run folder that is taken, locked, or does not fit the configuration that wants to go on in it."""


class TrainingStopped(RuntimeError):
    """Training was stopped by a guard; the message says which, at which step, and what was kept."""


class ProcessLost(ValueError):
    """Another process of the job has ended without a word."""


class Interrupted(BaseException):
    """A stage has ended and said so. `status` is the exit status of the process: after a signal 128 + the signal, with its things in order;
    2 in a process of a job another of which has failed.

    As KeyboardInterrupt no Exception, so that what goes on after an error does not go on after a signal.
    """

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


def is_user_error(error: BaseException) -> bool:
    """Whether the message alone helps: a wrong value, a missing or forbidden file, a full disk, a failed call, a guard, an extra
    that is not installed."""
    return isinstance(error, (ValueError, OSError, TrainingStopped)) or (
        isinstance(error, ModuleNotFoundError) and "pip install" in str(error))


def explain(error: BaseException) -> str:
    """The message of a user's error; what the system or a library worded without a remedy gets one."""
    text = str(error)
    if is_disk_full(error) and not isinstance(error, DiskFull):
        return f"a disk or a quota is full ({text}). Free some space, or choose another storage root with --root DIR"
    if isinstance(error, PermissionError) and error.filename is not None:
        return f"{text}. Change the permissions of that place, or choose another storage root with --root DIR"
    return text


def is_disk_full(error: BaseException) -> bool:
    """ENOSPC, a quota, or a file-size limit, also when a library (safetensors, NumPy) has put it into its own words."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    if re.fullmatch(r"\d+ requested and \d+ written", str(error)):  # numpy.save
        return True
    found = re.search(r"(?:os error |Os \{ code: )(\d+)", str(error))  # safetensors 0.8, safetensors 0.4
    return found is not None and int(found[1]) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def quoted(place) -> str:
    """A path, or a name, as a shell reads it as one word: what is printed as part of a command is copied into one."""
    return shlex.quote(str(place))


def is_pointer(path: Path) -> bool:
    """Whether a file is what a git clone leaves in the place of a large file when git-lfs did not run."""
    path = Path(path)
    if path.stat().st_size > 1024:
        return False
    with open(path, "rb") as file:
        return file.read(40).startswith(b"version https://git-lfs")


def install_extra(extra: str) -> str:
    """The pip command for an extra of this package, which is on no index: from the clone that it runs from, or to be run in one."""
    clone = Path(__file__).resolve().parents[2]
    if (clone / "pyproject.toml").is_file():
        return f"pip install -e {quoted(f'{clone}[{extra}]')}"
    return f"pip install -e '.[{extra}]' (in a clone of vlakeep)"


def human_bytes(count: float) -> str:
    """1234567 -> '1.2 MB' (decimal units, as disks are sold)."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
