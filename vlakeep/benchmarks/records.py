"""Trial records and intervals: one JSON line per trial, resumable; a crash is its own column and never a failure.

records.jsonl   first line {"header": ...}: what was evaluated and how; then one object per trial:
                kind, ability, trial, seed, success (true, false, null), value, crash (null or the error), steps, ...
                What looked wrong about the trials is kept in the same form, with the kind `alarm`.

Several processes divide the trials; each but the first writes a file of its own beside it, records.rank<R>.jsonl in the same form, which
the first takes into records.jsonl at the end, or when it opens what a job that was killed has left. Many processes that append to one file
would not be safe on file systems of a network.
"""

import errno
import json
import math
import os
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple, TypeVar

from vlakeep.core.errors import quoted
from vlakeep.core.locks import lock
from vlakeep.core.storage import naming_full_disk

One = TypeVar("One")


def wilson(successes: int, n: int, z: float = 1.959964) -> Tuple[float, float, float]:
    """(mean, low, high) of a success rate, Wilson score interval; (0, 0, 1) of no trials."""
    if n == 0:
        return 0.0, 0.0, 1.0
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return p, max(0.0, centre - half), min(1.0, centre + half)


def mean_interval(values: Sequence[float], z: float = 1.959964) -> Dict[str, Optional[float]]:
    """{"mean", "low", "high", "n"} of real values, normal interval; without a value nothing is known, and all but n is None."""
    n = len(values)
    if n == 0:
        return {"mean": None, "low": None, "high": None, "n": 0}
    mean = sum(values) / n
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n) if n > 1 else 0.0
    return {"mean": mean, "low": mean - z * spread, "high": mean + z * spread, "n": n}


def summarise(rows: List[dict]) -> Dict[Tuple[str, str], dict]:
    """(kind, ability) -> {"mean", "low", "high", "n", "crashes"} over trials that did not crash."""
    groups: Dict[Tuple[str, str], List[dict]] = {}
    for row in rows:
        if row["success"] is not None or row["crash"] is not None:
            groups.setdefault((row["kind"], row["ability"]), []).append(row)
    result = {}
    for key, trials in groups.items():
        counted = [t for t in trials if t["crash"] is None]
        mean, low, high = wilson(sum(bool(t["success"]) for t in counted), len(counted))
        result[key] = {"mean": mean, "low": low, "high": high, "n": len(counted), "crashes": len(trials) - len(counted)}
    return result


def changes(old: dict, new: dict) -> List[str]:
    """What of the header `new` is another in the header `old`, in words; empty when all of it is there."""
    found = []
    for key in (key for key in {**new, **old} if old.get(key) != new.get(key)):
        was, now = old.get(key), new.get(key)
        if key in ("weights", "base"):
            found.append("another model" if key == "weights" else "another base model")
        elif key not in new:
            found.append(f"other settings ({key} {was} -> (not set))")
        elif key not in old:
            found.append(f"an evaluation whose header does not say {key} (an older version's, or one that did not need it)")
        elif key not in new:
            found.append(f"other settings ({key} {was if isinstance(was, (str, int, float)) else 'set'} -> (not set))")
        elif isinstance(was, dict) and isinstance(now, dict):
            pairs = {name: (was.get(name, "(not set)"), now.get(name, "(not set)")) for name in sorted({**was, **now})}
            inner = [f"{key}.{name} {one} -> {two}" for name, (one, two) in pairs.items() if one != two]
            found.append(f"other settings ({', '.join(inner)})")
        else:
            found.append(f"other settings ({key} {was} -> {now})")
    return found


def _key(row: dict) -> Tuple[str, str, int]:
    return row["kind"], row["ability"], row["trial"]


def _lock(file, path: Path) -> None:
    try:
        lock(file)
    except BlockingIOError:
        raise ValueError(f"{path} is in use by another evaluation of this model; wait for it, or stop it") from None


class Records:
    """Append-only trial file. A half-written last line (the process was killed) is cut off when the file is opened again."""

    def __init__(self, path, header: dict, job: Any = None):
        """job: the processes that divide the trials (core/parallel.py: Distributed), all of which open the records; None: one alone.
        Raises ValueError when the file is damaged, in use, or of another model or other settings (`header` differs)."""
        self.path, self._job = Path(path), job if job is not None and job.world > 1 else None
        self.is_main = self._job is None or self._job.is_main
        self._turn = 0
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.is_main:
            self._rows = job.broadcast(None)
            self.path = self._of_rank(job.rank)
        self._file = open(self.path, "ab", buffering=0)
        try:
            _lock(self._file, self.path)
            if self.is_main:
                self._rows = self._resume(json.loads(json.dumps(header)))
            self._seen = {_key(row) for row in self._rows}
            if not self._rows or not self.is_main:
                self._file.truncate(0)
                self._write({"header": header})
            if self.is_main:
                self._take_in_what_is_left(json.loads(json.dumps(header)))
                if self._job:
                    self._job.broadcast(self._rows)
            self._known = len(self._rows)
        except BaseException:
            self._file.close()
            raise

    def _of_rank(self, rank) -> Path:
        return self.path.with_name(f"{self.path.stem}.rank{rank}{self.path.suffix}")

    def _take_in_what_is_left(self, header: dict) -> None:
        """The trials of the other processes of a job that was killed."""
        for path in sorted(self.path.parent.glob(self._of_rank("*").name)):
            with open(path, "ab") as file:
                _lock(file, path)
                data = path.read_bytes()
                self._take_in(self._read(path, data[:data.rfind(b"\n") + 1], header))
            path.unlink()

    def _take_in(self, rows: Sequence[dict]) -> None:
        for row in rows:
            if not self.has(*_key(row)):
                self.add(**row)
        self.flush()

    def _resume(self, header: dict) -> List[dict]:
        """The trials that are there; an unfinished last line goes. A file without trials belongs to whoever comes."""
        data = self.path.read_bytes()
        whole = data[:data.rfind(b"\n") + 1]
        self._file.truncate(len(whole))
        return self._read(self.path, whole, header)

    def _read(self, path: Path, whole: bytes, header: dict) -> List[dict]:
        """The trials of a file of whole lines."""
        lines, seen = [], {}
        for number, line in enumerate(whole.split(b"\n")[:-1], 1):
            try:
                lines.append(json.loads(line))
                wanted = ("header",) if number == 1 else ("kind", "ability", "trial", "success", "value", "crash")
                missing = [key for key in wanted if key not in lines[-1]]
                if missing:
                    raise ValueError(f"no {missing[0]}")
                if number > 1 and seen.setdefault(_key(lines[-1]), number) != number:
                    raise ValueError(f"the trial of line {seen[_key(lines[-1])]} again")
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path} line {number} is damaged ({error}); delete that line, or start over: "
                                 f"rm -r {quoted(path.parent)}") from error
        if len(lines) > 1 and lines[0]["header"] != header:
            raise ValueError(f"{path} holds the trials of {' and '.join(changes(lines[0]['header'], header)) or 'an older version'}; "
                             f"put them aside or delete them: rm -r {quoted(path.parent)}")
        return lines[1:]

    def _write(self, row: dict) -> None:
        with naming_full_disk(self.path):  # unbuffered: a killed process loses no finished trial
            line = (json.dumps(row) + "\n").encode()
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, "short write")

    def has(self, kind: str, ability: str, trial: int) -> bool:
        return (kind, ability, trial) in self._seen

    def add(self, **row) -> None:
        """Append a trial. ValueError for one that is there already: it would count twice."""
        if self.has(*_key(row)):
            raise ValueError(f"{self.path} has trial {row['trial']} of {row['kind']} {row['ability']} already")
        self._write(row)
        self._rows.append(row)
        self._seen.add(_key(row))

    def missing(self, kind: str, ability: str, count: int, size: int) -> Iterator[Tuple[range, List[int]]]:
        """(trials of a batch, those of them that are not there) for each batch of `size` among `count` trials that lacks one.

        The last bits of a model's output depend on its batch, so that a batch is asked again as a whole.
        """
        for start in range(0, count, size):
            batch = range(start, min(start + size, count))
            lacking = [trial for trial in batch if not self.has(kind, ability, trial)]
            if lacking and self._my_turn():
                yield batch, lacking

    @contextmanager
    def undivided(self) -> Iterator[None]:
        """Within it nothing is dealt out or gathered: what one process does alone is all of it."""
        job, self._job = self._job, None
        try:
            yield
        finally:
            self._job = job

    def _my_turn(self) -> bool:
        """Batches go round: whether it is this process's turn, which all ask as often."""
        if self._job is None:
            return True
        self._turn += 1
        return self._turn % self._job.world == self._job.rank

    def share(self, items: Sequence[One]) -> List[One]:
        """This process's part of a list that all have: a stretch of it, so that what lies together stays together."""
        if self._job is None:
            return list(items)
        first, last = (len(items) * rank // self._job.world for rank in (self._job.rank, self._job.rank + 1))
        return list(items[first:last])

    def gather(self, value: Any) -> List[Any]:
        """The value of each process, in all of them."""
        return [value] if self._job is None else self._job.gather(value)

    def collect(self) -> None:
        """Once all trials are there: those of all processes are in the file of the first."""
        if self._job is None:
            return
        self.flush()
        rows = self.gather(self._rows[self._known:])
        if self.is_main:
            for own in rows[1:]:
                self._take_in(own)
        self._job.barrier()
        if not self.is_main:
            self.path.unlink(missing_ok=True)

    def add_alarms(self, texts: Sequence[str]) -> None:
        """Keep what looked wrong beside the trials that showed it: an evaluation that goes on does not see them again. Of several processes
        the first keeps it."""
        for text in texts if self.is_main else ():
            known = self.alarms()
            if text not in known:
                self.add(kind="alarm", ability="actions", trial=len(known), seed=None, success=None, value=None, crash=None, steps=0,
                         text=text)

    def alarms(self) -> List[str]:
        """The texts of all sessions, in the order in which they came."""
        return [row["text"] for row in self.rows() if row["kind"] == "alarm"]

    def flush(self) -> None:
        """Make the trials safe against a power cut as well."""
        os.fsync(self._file.fileno())

    def rows(self) -> List[dict]:
        """All trials in a fixed order, whatever the order in which they ended."""
        return sorted(self._rows, key=_key)

    def __enter__(self) -> "Records":
        return self

    def __exit__(self, *error) -> None:
        self.flush()
        self._file.close()


if __name__ == "__main__":  # sanity check: python -m vlakeep.benchmarks.records
    import tempfile

    with tempfile.TemporaryDirectory() as folder, Records(Path(folder) / "records.jsonl", {"weights": "none"}) as records:
        for trial in range(10):
            crash = "ValueError: an example" if trial == 9 else None
            row = dict(kind="skill", ability="reach", trial=trial, seed=trial, success=trial < 6, value=None, crash=crash, steps=1)
            records.add(**row)
        found = summarise(records.rows())[("skill", "reach")]
        print("9 trials and a crash:", found)
        assert (found["n"], found["crashes"]) == (9, 1) and abs(found["mean"] - 6 / 9) < 1e-9
        assert abs(found["low"] - 0.3542) < 1e-4 and abs(found["high"] - 0.8794) < 1e-4  # Wilson by hand
