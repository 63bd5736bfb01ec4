"""summary.json of an evaluation (docs/formats.md), made from its trial records, and the same for the eye."""

import json
import time
from pathlib import Path
from typing import Dict, List

from vlakeep.benchmarks import open_loop
from vlakeep.benchmarks.records import mean_interval, summarise
from vlakeep.core.storage import atomic_write
from vlakeep.libero import benchmark as libero
from vlakeep.tabletop import benchmark as tabletop


def make_summary(name: str, rows: List[dict], drift, weights: str, benchmark: str = "tabletop",
                 new_skill: str = tabletop.NEW_SKILL) -> Dict:
    """The summary.json of docs/formats.md from the trial records. A LIBERO suite is one skill, with its tasks listed below it."""
    groups = summarise(rows)
    learnt = benchmark if benchmark in libero.SUITES else new_skill
    abilities = {ability: dict(value, group=kind) for (kind, ability), value in groups.items()
                 if kind in ("skill", "question") and ability not in (learnt, tabletop.CONTROLS.get(learnt))}
    new = groups.get(("skill", learnt))
    kl = [row["value"] for row in rows if row["kind"] == "retention"]
    summary = {"target": name, "weights": weights, "new_skill": dict(new, name=learnt) if new else None, "abilities": abilities,
               "retention_kl": mean_interval(kl), "drift": drift}
    summary.update(tabletop.followed(rows))
    return dict(summary, tasks=libero.by_task(rows)) if benchmark in libero.SUITES else summary


def write_summary(folder: Path, summary: Dict, alarms: List[str], started: float) -> Path:
    summary["alarms"] = alarms
    summary["seconds"] = time.perf_counter() - started
    with atomic_write(folder / "summary.json", "w") as file:
        json.dump(summary, file, indent=1)
    print_summary(summary)
    return folder


def print_summary(summary: Dict) -> None:
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
    for skill, ends in summary.get("followed", {}).items():
        print(f"  {'prompt of ' + skill:24s} ends at " + ", ".join(f"{end} {ends[end]:.3f}" for end in tabletop.ENDS))
    for text in open_loop.lines(summary.get("open_loop", {})):
        print(text)
    for alarm in summary["alarms"]:
        print(f"  ALARM: {alarm}")
    drift = "not measured" if summary["drift"] is None else f"{summary['drift']:.3f}"
    kl = 0.0 if summary["target"] == "base" else summary["retention_kl"]["mean"]  # the base is the teacher
    kl = "not measured" if kl is None else f"{kl:.4f}"
    print(f"  {'action-token KL':24s} {kl}   drift {drift}")
