"""Tables and figures of a paper, each from one command and the records of one study.

    vlakeep study studies/rivals_tabletop.yaml --paper T1 --out paper

| name | is | of a study |
|---|---|---|
| T1 | every arm at its chosen setting: the new task, old skills, questions, divergences, drift, time | of arms |
| T2 | the subject minus each arm at matched success | of arms |
| T3 | streams: success, NBT, BWT, FWT, AUC | with `stream` |
| T4 | two prompts on one table: which of two targets episodes end on | whose new skill has a control, such as blue |
| T6 | ablations: each arm minus the subject, at its own best setting | of ablations |
| T7 | cost | of arms |
| F1 | success against retention, and the probability of lying on the front | of arms |
| F3 | set-point, divergence and opening over training | with a method that has a loop |

T5 (the new task out of distribution) and F2 (recovery) need trials that no study has: they are told as missing.
"""

from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Union

from vlakeep.core.config import ConfigError
from vlakeep.core.storage import atomic_dir
from vlakeep.core.study import BASE, Cell
from vlakeep.reporting.figures import Figure, save_files
from vlakeep.studies import claims, report
from vlakeep.studies.claims import Judged, Versus
from vlakeep.studies.figures import figures
from vlakeep.studies.rule import Rule
from vlakeep.studies.tables import Table, percent, points, probability

Made = Union[Table, Figure]


def t1(judged: Judged) -> Table:
    """Arms and costs side by side."""
    arms = {table.name: table for table in claims.tables(judged)}["arms"]
    cost = report.cost(judged)
    more = {row[0]: row[1:5] for row in cost.rows}
    rows = [[*row, *more.get(row[0], [""] * 4)] for row in arms.rows]
    return Table("T1", "Every arm at its chosen setting", [*arms.head, *cost.head[1:5]], rows)


def t2(judged: Judged) -> Optional[Table]:
    return _named("T2", claims.tables(judged), "matched")


def t3(judged: Judged) -> Optional[Table]:
    return _named("T3", report.streams_of(judged), "streams")


def t4(judged: Judged) -> Optional[Table]:
    """Means over tasks and reported seeds of the shares at which episodes end; those of the base beside them."""
    rows = []
    for family in judged.values:
        records = [one for one in judged.data.records(report.setting_of(judged, family)) if one.get("followed")]
        kept = [one for one in records if family == BASE or one["seed"] in judged.seeds]
        for skill in dict.fromkeys(name for one in kept for name in one["followed"]):
            ends = [one["followed"][skill] for one in kept if skill in one["followed"]]
            rows.append([family, skill, *(percent(sum(end[key] for end in ends) / len(ends)) for key in ("prompted", "other", "neither")),
                         str(len(ends))])
    head = ["family", "prompt", "ends at the one named (%)", "at the other (%)", "at neither (%)", "runs"]
    return Table("T4", "Two targets on one table", head, rows) if rows else None


def t6(judged: Judged) -> Optional[Table]:
    """What is lost when a part is taken away: the sign is that of the arm minus the subject."""
    def line(one: Versus) -> List[str]:
        new, kept = (points(-e.mean, -e.high, -e.low) if e and e.high is not None else points(-e.mean) if e else ""
                     for e in (one.new, one.kept))
        return [one.family, new, kept, probability(one.keeps_more)]

    rows = [line(one) for one in judged.best]
    head = ["arm", "new (points)", "kept (points)", f"p that {judged.rule.subject} keeps more"]
    return Table("T6", f"Each arm minus {judged.rule.subject}, at its own best setting", head, rows) if rows else None


def t7(judged: Judged) -> Optional[Table]:
    cost = report.cost(judged)
    return cost._replace(name="T7") if cost.rows else None


def f1(judged: Judged) -> Optional[Figure]:
    return _named("F1", figures(judged), "front")


def f3(judged: Judged) -> Optional[Figure]:
    """The divergence with its budget, where the opening was logged too."""
    found = {figure.name: figure for figure in figures(judged)}
    return found["kl"]._replace(name="F3") if {"kl", "opening"} <= set(found) else None


MADE: Dict[str, Callable[[Judged], Optional[Made]]] = {"T1": t1, "T2": t2, "T3": t3, "T4": t4, "T6": t6, "T7": t7, "F1": f1, "F3": f3}
NAMES = (*MADE, "all")


def _named(name: str, found: Sequence[Any], which: str):
    own = next((one for one in found if one.name == which), None)
    return own._replace(name=name) if own else None


def write(cells: Sequence[Cell], records: Sequence[Dict[str, Any]], rule: Rule, name: str, out: Path) -> List[Path]:
    """The files of a table (md, csv, tex) or figure (png, svg), each in a folder of its name below `out`; ConfigError where the records do
    not hold it, ValueError where such a folder holds files of something else. `all`: those that they hold."""
    wanted = list(MADE) if name == "all" else [name]
    for one in wanted:
        report.refuse_foreign(out / one, [f"{one}.{ending}" for ending in ("md", "csv", "tex", "png", "svg")])
    judged = claims.judge(cells, records, rule)
    written = []
    for one in wanted:
        made = MADE[one](judged)
        if made is None:
            if name == "all":
                continue
            raise ConfigError(f"--paper {one}: the records of this study do not hold it (vlakeep/studies/paper.py says what it needs)")
        with atomic_dir(out / one) as folder:
            if isinstance(made, Table):
                report.write_table(made, folder)
            else:
                save_files(made, folder)
        written.append(out / one)
    return written
