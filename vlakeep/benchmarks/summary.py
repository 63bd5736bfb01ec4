"""summary.json of an evaluation (docs/formats.md), made from its trial records, and the same for the eye."""

import json
import time
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

from vlakeep.benchmarks.records import mean_interval, summarise
from vlakeep.core.storage import atomic_write


def make_summary(name: str, rows: List[dict], drift, weights: str, learnt: str = "", controls: Sequence[str] = (),
                 asked: Optional[Dict[str, Any]] = None) -> Dict:
    """What the summaries of all benchmarks have, from the trial records. learnt: the new ability; controls: those in no table; asked: what
    was asked for (core/evaluated.py)."""
    groups = summarise(rows)
    abilities = {ability: dict(value, group=kind) for (kind, ability), value in groups.items()
                 if kind in ("skill", "question") and ability not in (learnt, *controls)}
    new = groups.get(("skill", learnt))
    kl = [row["value"] for row in rows if row["kind"] == "retention"]
    return {"target": name, "weights": weights, "new_skill": dict(new, name=learnt) if new else None, "abilities": abilities,
            "retention_kl": mean_interval(kl), "drift": drift, **({"asked": asked} if asked else {})}


def write_summary(folder: Path, summary: Dict, alarms: List[str], started: float, said: Sequence[str] = ()) -> Path:
    """`said`: lines about what the benchmark has added, for the eye."""
    summary["alarms"] = alarms
    summary["seconds"] = time.perf_counter() - started
    with atomic_write(folder / "summary.json", "w") as file:
        json.dump(summary, file, indent=1)
    print_summary(summary, said)
    return folder


def print_summary(summary: Dict, said: Sequence[str] = ()) -> None:
    def line(label, value, end=""):
        crashes = f", {value['crashes']} crashed" if value.get("crashes") else ""
        print(f"  {label:24s} {value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]{crashes}{end}")

    print(f"{summary['target']} ({summary['seconds']:.0f} s)")
    if summary["new_skill"]:
        line(("suite " if "tasks" in summary else "new skill ") + summary["new_skill"]["name"], summary["new_skill"])
    for task, value in summary.get("tasks", {}).items():
        line(f"({value['n']} episodes)", value, end=f"  {task}")
    for ability, value in summary["abilities"].items():
        line(ability, value)
    for text in said:
        print(text)
    for alarm in summary["alarms"]:
        print(f"  ALARM: {alarm}")
    drift = "not measured" if summary["drift"] is None else f"{summary['drift']:.3f}"
    kl = 0.0 if summary["target"] == "base" else summary["retention_kl"]["mean"]  # the base is the teacher
    kl = "not measured" if kl is None else f"{kl:.4f}"
    print(f"  {'action-token KL':24s} {kl}   drift {drift}")
