"""Trial records and intervals: one JSON line per trial, resumable; a crash is its own column and never a failure.

records.jsonl   first line {"header": ...}: what was evaluated and how; then one object per trial:
                kind, ability, trial, seed, success (true, false, null), value, crash (null or the error), steps, ...
"""

import json
import math
import os
from pathlib import Path
from typing import Dict, List, Sequence, Tuple


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
        """Raises ValueError when the file belongs to another model or other settings (`header` differs)."""
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._rows: List[dict] = []
        if self.path.is_file():
            data = self.path.read_bytes()
            whole = data[:data.rfind(b"\n") + 1]
            if len(whole) != len(data):
                with open(self.path, "r+b") as file:
                    file.truncate(len(whole))
            lines = whole.decode().splitlines()
            if lines and json.loads(lines[0]).get("header") != json.loads(json.dumps(header)):
                raise ValueError(f"{self.path} holds the trials of another model or of other settings: evaluate into another folder, or "
                                 f"remove {self.path.parent}")
            self._rows = [json.loads(line) for line in lines[1:]]
        self._seen = {(r["kind"], r["ability"], r["trial"]) for r in self._rows}
        self._file = open(self.path, "a", encoding="utf-8")
        if self.path.stat().st_size == 0:
            self._write({"header": header})

    def _write(self, row: dict) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()  # a killed process loses no finished trial; flush() makes it safe against a power cut as well

    def has(self, kind: str, ability: str, trial: int) -> bool:
        return (kind, ability, trial) in self._seen

    def add(self, **row) -> None:
        self._write(row)
        self._rows.append(row)
        self._seen.add((row["kind"], row["ability"], row["trial"]))

    def flush(self) -> None:
        self._file.flush()
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
        print("9 trials and a crash:", summarise(records.rows())[("skill", "reach")])
