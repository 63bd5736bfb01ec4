"""Trial records and intervals: one JSON line per trial, resumable; a crash is its own column and never a failure.

records.jsonl   first line {"header": ...}: what was evaluated and how; then one object per trial:
                kind, ability, trial, seed, success (true, false, null), value, crash (null or the error), steps, ...
"""

import errno
import fcntl
import json
import math
import os
from pathlib import Path
from typing import Dict, List, Sequence, Tuple

from vlakeep.storage import naming_full_disk


def wilson(successes: int, n: int, z: float = 1.959964) -> Tuple[float, float, float]:
    """(mean, low, high) of a success rate, Wilson score interval; (0, 0, 1) of no trials."""
    if n == 0:
        return 0.0, 0.0, 1.0
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return p, max(0.0, centre - half), min(1.0, centre + half)


def mean_interval(values: Sequence[float], z: float = 1.959964) -> Dict[str, float]:
    """{"mean", "low", "high", "n"} of real values, normal interval."""
    n = len(values)
    if n == 0:
        return {"mean": 0.0, "low": 0.0, "high": 0.0, "n": 0}
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


class Records:
    """Append-only trial file. A half-written last line (the process was killed) is cut off when the file is opened again."""

    def __init__(self, path, header: dict):
        """Raises ValueError when the file is damaged, in use, or of another model or other settings (`header` differs)."""
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "ab", buffering=0)
        try:
            self._lock()
            self._rows = self._resume(json.loads(json.dumps(header)))
            self._seen = {(r["kind"], r["ability"], r["trial"]) for r in self._rows}
            if not self._rows:
                self._file.truncate(0)
                self._write({"header": header})
        except BaseException:
            self._file.close()
            raise

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{self.path} is in use by another evaluation of this model; wait for it, or stop it") from None
        except OSError:
            pass  # some network file systems know no locks

    def _resume(self, header: dict) -> List[dict]:
        """The trials that are there; an unfinished last line goes. A file without trials belongs to whoever comes."""
        data = self.path.read_bytes()
        whole = data[:data.rfind(b"\n") + 1]
        self._file.truncate(len(whole))
        lines = []
        for number, line in enumerate(whole.split(b"\n")[:-1], 1):
            try:
                lines.append(json.loads(line))
                wanted = ("header",) if number == 1 else ("kind", "ability", "trial", "success", "value", "crash")
                missing = [key for key in wanted if key not in lines[-1]]
                if missing:
                    raise ValueError(f"no {missing[0]}")
            except (ValueError, TypeError) as error:
                raise ValueError(f"{self.path} line {number} is damaged ({error}); delete that line, or start over: "
                                 f"rm -r {self.path.parent}") from error
        if len(lines) > 1 and lines[0]["header"] != header:
            old, changed = lines[0]["header"], []
            for key in header:
                if old.get(key) != header[key]:
                    changed.append({"weights": "another model", "base": "another base model"}.get(key, f"other settings ({key})"))
            raise ValueError(f"{self.path} holds the trials of {' and '.join(changed) or 'an older version'}; put them aside or "
                             f"delete them: rm -r {self.path.parent}")
        return lines[1:]

    def _write(self, row: dict) -> None:
        with naming_full_disk(self.path):  # unbuffered: a killed process loses no finished trial
            line = (json.dumps(row) + "\n").encode()
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, "short write")

    def has(self, kind: str, ability: str, trial: int) -> bool:
        return (kind, ability, trial) in self._seen

    def add(self, **row) -> None:
        self._write(row)
        self._rows.append(row)
        self._seen.add((row["kind"], row["ability"], row["trial"]))

    def flush(self) -> None:
        """Make the trials safe against a power cut as well."""
        os.fsync(self._file.fileno())

    def rows(self) -> List[dict]:
        """All trials in a fixed order, whatever the order in which they ended."""
        return sorted(self._rows, key=lambda r: (r["kind"], r["ability"], r["trial"]))

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
