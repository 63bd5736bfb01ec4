"""One training run's folder: who made it, with what, and every number it logged.

run_root_dir/<name>/
  config.yaml       the configuration, below a line with the run's id
  provenance.json   id, commit, uncommitted changes, versions, hardware, arguments, hashes, start, end, status; an entry per session
  dirty.diff        the uncommitted changes, when there are any
  data/             the card of each data set as it was opened, and thumbnails of its pictures (data/card.py)
  metrics.jsonl     one JSON object per logged step; a non-finite number is null and its key is listed under "nonfinite"
  tensorboard/      the same numbers (train.tensorboard)
  checkpoints/      checkpoint.py
  run.lock          held while a process works here
"""

import errno
import hashlib
import io
import json
import math
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any, Dict, List, Optional

import torch
import yaml

from vlakeep.core.checkpoint import latest_intact, list_checkpoints
from vlakeep.core.config import Config, to_dict
from vlakeep.core.errors import DiskFull, Interrupted, RunDirError, is_disk_full, quoted
from vlakeep.core.locks import lock
from vlakeep.core.log import log
from vlakeep.core.parallel import Distributed
from vlakeep.core.provenance import hardware, library_versions, source_state
from vlakeep.core.sameness import config_differences, hash_differences, run_id, same_samples
from vlakeep.core.storage import Storage, atomic_write, free_bytes, remove_leftovers


class RunLock:
    """An exclusive lock on a folder by fcntl; the kernel drops it when the process dies, so a stale file locks nothing."""

    def __init__(self, folder: Path):
        """Raises RunDirError naming the process that holds the folder."""
        self.path = folder / "run.lock"
        self._file = open(self.path, "a+", encoding="utf-8")
        try:
            unlocked = lock(self._file)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read().strip()
            self._file.close()
            raise RunDirError(
                f"{folder} is in use by another process ({holder or 'unknown'}). Wait for it, stop it, or take another --name"
            ) from None
        if unlocked:
            log.warning(f"{folder} cannot be locked ({unlocked}); make sure that only one process works there")
        self._file.truncate(0)
        self._file.write(f"pid {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        self._file.flush()

    def release(self) -> None:
        if not self._file.closed:
            self._file.truncate(0)
            self._file.close()


class RunDir:
    """A run folder that is open for one session. Attributes: folder, resume_from (checkpoint folder or None).

    As a context manager it records how the session ended: finished, failed (with the traceback) or interrupted.
    Processes other than the main one write nothing.
    """

    def __init__(self, folder: Path, is_main: bool):
        self.folder, self.is_main = Path(folder), is_main
        self.resume_from: Optional[Path] = None
        self._lock: Optional[RunLock] = None
        self._metrics: Optional[io.FileIO] = None
        self._tensorboard: Any = None
        self._wandb: Any = None
        self._provenance: Dict[str, Any] = {}

    @classmethod
    def open(cls, storage: Storage, config: Config, dist=None, hashes: Optional[Dict[str, Any]] = None) -> "RunDir":
        """Create the folder of `config.name`, or go on in it with train.resume; the same answer in every process of `dist`.

        Raises RunDirError when the folder holds another run, is locked, or has another configuration (the keys are listed).
        """
        run = cls(storage.run_folder(config.name), dist is None or dist.is_main)
        if run.is_main:
            run.refuse_as_cell_of_a_run(storage)
            run._begin(storage, config, dist.world if dist else 1, hashes or {})
        if dist is not None:
            found = dist.broadcast(str(run.resume_from) if run.resume_from else None)
            run.resume_from = Path(found) if found else None
        return run

    def refuse_as_cell_of_a_run(self, storage: Storage) -> None:
        """RunDirError when the group of `GROUP/CELL` is itself a run."""
        group = self.folder.parent
        if group != storage.runs and any((group / name).is_file() for name in ("config.yaml", "provenance.json")):
            raise RunDirError(f"{group} is a run itself and cannot be the group of another; take another --name")

    @property
    def metrics_path(self) -> Path:
        return self.folder / "metrics.jsonl"

    def _begin(self, storage: Storage, config: Config, world: int, hashes: Dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = RunLock(self.folder)
        try:
            old = self.look(config)
            remove_leftovers(self.folder)
            if config.train.resume:
                self.resume_from = latest_intact(self.folder)
                broken = [path.name for _, path in list_checkpoints(self.folder)]
                if self.resume_from is None and broken:
                    raise RunDirError(
                        f"{self.folder}: none of its checkpoints ({', '.join(broken)}) is intact, see above. Restore one, or "
                        f"start over without --train.resume: take another --name, or rm -r {quoted(self.folder)}"
                    )
                if self.resume_from is None:
                    log.warning(f"{config.name}: nothing to resume, starting at step 1")
            sessions = old.get("sessions", [])
            if self.resume_from and sessions and (changed := hash_differences(sessions[-1].get("hashes") or {}, hashes)):
                raise RunDirError(
                    f"{self.folder} was made from something else; it can only go on with the same:\n  "
                    + "\n  ".join(changed)
                    + "\nPut it back as it was, or take another --name"
                )
            self.truncate_metrics(int(self.resume_from.name.split("_")[1]) if self.resume_from else -1)
            state = source_state()
            if state["diff"]:
                with atomic_write(self.folder / "dirty.diff", "w") as file:
                    file.write(state.pop("diff"))
            else:
                state.pop("diff")
                (self.folder / "dirty.diff").unlink(missing_ok=True)
            if sessions and sessions[-1]["status"] == "running":  # the lock is ours, so that process is gone
                sessions[-1].update(
                    status="interrupted", traceback="the process ended without a word (killed, or the machine went down)"
                )
            sessions.append(
                {
                    "status": "running",
                    "start": _now(),
                    "end": None,
                    "resumed_from": self.resume_from.name if self.resume_from else None,
                    "argv": sys.argv,
                    "source": state,
                    "versions": library_versions(),
                    "hardware": hardware(),
                    "world": world,
                    "threads": torch.get_num_threads(),
                    "deterministic": torch.are_deterministic_algorithms_enabled(),
                    "hashes": hashes,
                    "traceback": None,
                }
            )
            kept = old if self.resume_from else {}  # an older version's run has no id yet, and its name as that on W&B
            identity = kept.get("id") or run_id(to_dict(config), hashes)
            on_wandb = hashlib.sha256(f"{identity} {config.name}".encode()).hexdigest()[:16]  # runs of one id may lie under two names
            self._provenance = {
                "name": config.name,
                "id": identity,
                "wandb_id": kept.get("wandb_id") or (config.name if kept else on_wandb),
                "method": config.method,
                "seed": config.seed,
                "status": "running",
                "sessions": sessions,
            }
            self._write_provenance()
            with atomic_write(self.folder / "config.yaml", "w") as file:
                file.write(f"# run {identity}\n")
                yaml.safe_dump(to_dict(config), file, sort_keys=False)
            self._open_boards(storage, config)
        except BaseException:
            if self._provenance:
                self.close("failed", traceback.format_exc())
            else:
                self._lock.release()
            raise

    def look(self, config: Config) -> dict:
        """Provenance of the run that is here already; {} for an empty folder. Refuses what must not be overwritten."""
        config_path, path = self.folder / "config.yaml", self.folder / "provenance.json"
        try:
            old = dict(json.loads(path.read_text())) if path.is_file() else {}
            if old:
                old["sessions"] = [dict(session, status=session["status"]) for session in old["sessions"]]
        except (ValueError, TypeError, KeyError):
            old = {}  # a record of earlier sessions is not worth refusing to go on
        foreign = [entry.name for entry in self.folder.iterdir() if entry.name != "run.lock" and not entry.name.startswith(".")]
        if foreign and not config_path.is_file() and not old:
            raise RunDirError(
                f"{self.folder} holds files of something else ({', '.join(sorted(foreign)[:5])}). Take another --name"
            )
        hashed = (old.get("sessions") or [{}])[-1].get("hashes") or {}
        has_results = bool(list_checkpoints(self.folder)) or (
            self.metrics_path.is_file() and self.metrics_path.stat().st_size > 0
        )
        if not config.train.resume:
            if has_results:
                try:
                    changed = config_differences(dict(yaml.safe_load(config_path.read_text())), to_dict(config), hashed)
                except (OSError, ValueError, TypeError, yaml.YAMLError):
                    changed = []
                raise RunDirError(
                    f"{self.folder} already holds a run (status: {old.get('status', 'unknown')}). "
                    + (f"It has another configuration ({'; '.join(changed)}): " if changed else "Go on in it with --train.resume true, ")
                    + f"take another --name, or delete it: rm -r {quoted(self.folder)}"
                )
            return old  # a session that ended before its first logged step left nothing worth keeping
        if has_results:
            try:
                before = dict(yaml.safe_load(config_path.read_text()))
            except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
                raise RunDirError(
                    f"{config_path} is missing or damaged ({error}), so nobody knows whether the run had this configuration; "
                    "restore the file, or take another --name"
                ) from error
            job = Distributed.current()
            worlds = (old.get("sessions") or [{}])[-1].get("world", 1), job.world if job else 1
            changed = same_samples(config_differences(before, to_dict(config), hashed), before, to_dict(config), worlds)
            if changed:
                raise RunDirError(
                    f"{self.folder} was made with another configuration; it can only go on with the same one:\n  "
                    + "\n  ".join(changed)
                    + f"\nUndo these changes (see {config_path}), or take another --name"
                )
        return old

    def _write_provenance(self) -> None:
        with atomic_write(self.folder / "provenance.json", "w") as file:
            json.dump(self._provenance, file, indent=1, default=str)

    def _open_boards(self, storage: Storage, config: Config) -> None:
        first = int(self.resume_from.name.split("_")[1]) + 1 if self.resume_from else None
        if config.train.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter

                self._tensorboard = SummaryWriter(str(self.folder / "tensorboard"), purge_step=first)
            except ImportError:
                log.warning("tensorboard is not installed; metrics.jsonl has the same numbers")
        if config.train.use_wandb:
            try:
                import wandb
            except ImportError as error:
                raise ValueError("--train.use_wandb needs the package: pip install wandb, or leave it off") from error
            self._wandb = wandb.init(
                project="vlakeep",
                name=config.name,
                id=self._provenance["wandb_id"],
                group=config.name.rpartition("/")[0] or None,
                resume="allow",
                dir=str(storage.wandb),
                config=to_dict(config),
            )

    def log(self, step: int, values: Dict[str, Any]) -> None:
        """Append one line to metrics.jsonl (and the boards). Values: numbers, bools, 0-d tensors, strings. Raises DiskFull."""
        if not self.is_main:
            return
        row: Dict[str, Any] = {"step": int(step)}
        bad, numbers = [], {}
        for key, value in values.items():
            if hasattr(value, "item"):
                value = value.item()
            if isinstance(value, float) and not math.isfinite(value):
                bad.append(key)
                value = None
            row[key] = value
            if isinstance(value, (int, float)):
                numbers[key] = value
        if bad:
            row["nonfinite"] = bad
        self._append((json.dumps(row, allow_nan=False) + "\n").encode())
        if self._tensorboard is not None:
            try:
                for key, value in numbers.items():
                    self._tensorboard.add_scalar(key, value, int(step))
            except OSError as error:
                log.warning(f"tensorboard stops ({error}); {self.metrics_path} has the same numbers")
                self._tensorboard = None
        if self._wandb is not None:
            self._wandb.log(numbers, step=int(step))

    def _append(self, line: bytes) -> None:
        """Write a whole line or nothing, so that a full disk leaves no half line behind."""
        if self._metrics is None:
            self._metrics = open(self.metrics_path, "ab", buffering=0)
        size = os.fstat(self._metrics.fileno()).st_size
        try:
            if self._metrics.write(line) == len(line):
                return
            error: OSError = OSError(errno.ENOSPC, "short write")
        except OSError as caught:
            error = caught
        os.ftruncate(self._metrics.fileno(), size)
        if not is_disk_full(error):
            raise error
        raise DiskFull(
            f"the disk was full while writing {self.metrics_path}: {free_bytes(self.folder)} bytes free; its earlier lines and "
            "the checkpoints are whole. Free some space and go on with --train.resume true"
        ) from error

    def truncate_metrics(self, step: int) -> None:
        """Drop the lines after `step`, and a last line that a killed process left unfinished."""
        if not self.is_main or not self.metrics_path.is_file():
            return
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None
        kept = [json.dumps(row) + "\n" for row in read_metrics(self.folder) if row["step"] <= step]
        with atomic_write(self.metrics_path, "w") as file:
            file.writelines(kept)

    def interrupted(self) -> None:
        """Record that a signal ended the session; a `with` block that a KeyboardInterrupt or SystemExit ends does so itself."""
        self.close("interrupted")

    def close(self, status: str, trace: Optional[str] = None) -> None:
        if not self.is_main or self._lock is None:
            return
        ends = [board.close for board in (self._metrics, self._tensorboard) if board is not None]
        ends += [self._wandb.finish] if self._wandb is not None else []
        for end in ends:
            try:
                end()
            except OSError as error:  # boards repeat metrics.jsonl; the status below matters more
                log.warning(f"could not close a board of {self.folder}: {error}")
        self._metrics = self._tensorboard = self._wandb = None
        self._provenance["status"] = status
        self._provenance["sessions"][-1].update(status=status, end=_now(), traceback=trace)
        try:
            self._write_provenance()
        finally:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> "RunDir":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is None:
            self.close("finished")
        elif issubclass(kind, (KeyboardInterrupt, Interrupted)) or (issubclass(kind, SystemExit) and _is_signal(error.code)):
            self.close("interrupted", f"{kind.__name__}: {error}")
        else:
            text = "".join(traceback.format_exception(kind, error, trace))
            try:
                self.close("failed", text)
            except OSError as second:  # a full disk must not hide the first error
                log.warning(f"could not record the failure in {self.folder / 'provenance.json'}: {second}")


def _is_signal(code: Any) -> bool:
    return isinstance(code, int) and code - 128 in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def read_metrics(folder) -> List[dict]:
    """The rows of a run's metrics.jsonl in order; an unfinished last line is left out.

    Raises ValueError naming the line when one in the middle cannot be read, FileNotFoundError without the file.
    """
    path = Path(folder) / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"no {path}; `vlakeep train` writes it")
    lines = path.read_bytes().splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            row["step"] = int(row["step"])
            rows.append(row)
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines):
                break
            raise ValueError(f"{path} line {number} is damaged ({error}); delete that line") from error
    return rows


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
