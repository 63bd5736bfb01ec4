"""Streams of tasks: the success matrix and what is read off it.

R[k, j] is the success on task j after task k was learned, b[j] that of the base before all, K the number of tasks, k and j from 1 on.

    average   mean_j R[K, j]                                      Lopez-Paz and Ranzato 2017, "ACC"
    BWT       mean_{j<K} R[K, j] - R[j, j]                        the same; negative where earlier tasks are forgotten
    FWT       mean_{j>1} R[j-1, j] - b[j]                         the same; what earlier tasks give before a task is learned
    NBT       mean_{j<K} mean_{k>j} R[j, j] - R[k, j]             Liu et al. 2023 (LIBERO), over tasks that another follows
    AUC       mean_j (R[j, j] + sum_{k>j} R[k, j]) / (K - j + 1)  Liu et al. 2023, with R[j, j] for its learning curve
    learned   mean_j R[j, j]

LIBERO's own FWT is the mean over the checkpoints of a task's training; here a task is evaluated at its end, so that this is `learned`.
"""

from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from vlakeep.core.study import BASE
from vlakeep.reporting.intervals import t_interval
from vlakeep.studies.data import Setting
from vlakeep.studies.inference import two_sided
from vlakeep.studies.records import rate_of, values_of
from vlakeep.studies.tables import Table, percent, probability, to_csv

METRICS = ("average", "learned", "nbt", "bwt", "fwt", "auc")


class Stream(NamedTuple):
    """One stream of one seed. matrix [K, K], NaN where a task was not asked; kept: old skills and questions after the last task."""

    setting: Setting
    seed: int
    tasks: List[str]
    matrix: np.ndarray
    old: Optional[float]
    questions: Optional[float]


def metrics(matrix: np.ndarray, base: Optional[np.ndarray] = None) -> Dict[str, float]:
    """See the module. matrix [K, K] with K > 1; base [K], without it there is no fwt."""
    tasks = len(matrix)
    own = np.diag(matrix)
    later = [matrix[j + 1:, j] for j in range(tasks)]
    found = {"average": float(matrix[-1].mean()), "learned": float(own.mean()), "bwt": float((matrix[-1, :-1] - own[:-1]).mean()),
             "nbt": float(np.mean([own[j] - later[j].mean() for j in range(tasks - 1)])),
             "auc": float(np.mean([(own[j] + later[j].sum()) / (tasks - j) for j in range(tasks)]))}
    if base is not None:
        found["fwt"] = float(np.mean([matrix[j - 1, j] - base[j] for j in range(1, tasks)]))
    return found


def success(record: Dict[str, Any]) -> np.ndarray:
    """[K]: on every task of the record's stream; NaN for one that was not asked, or of which all trials crashed."""
    trials = record["trials"]
    rates = [[rate_of(trials[key]) for key in (f"new:{name}", f"stream:{name}") if key in trials] for name in record["stream"]]
    return np.array([own[0] if own and own[0] is not None else np.nan for own in rates])


def streams(records: Sequence[Dict[str, Any]]) -> List[Stream]:
    """Those that are complete, in the order of the records."""
    chains: Dict[Tuple[Setting, int], Dict[int, Dict[str, Any]]] = {}
    for record in records:
        if "stream" in record and record["arm"] != BASE:
            chains.setdefault((Setting(record["arm"], record["rate"]), record["seed"]), {})[record["position"]] = record
    found = []
    for (setting, seed), own in chains.items():
        tasks = next(iter(own.values()))["stream"]
        if sorted(own) == list(range(len(tasks))):
            last, matrix = values_of(own[len(tasks) - 1]), np.stack([success(own[k]) for k in range(len(tasks))])
            found.append(Stream(setting, seed, tasks, matrix, last["old"], last["questions"]))
    return found


def base_of(records: Sequence[Dict[str, Any]]) -> Optional[np.ndarray]:
    """The base's success on every task; None where it was not asked of one."""
    for record in records:
        if record["arm"] == BASE and "stream" in record:
            row = success(record)
            return None if np.isnan(row).any() else row
    return None


def values(found: Sequence[Stream], base: Optional[np.ndarray]) -> Dict[Setting, Dict[int, Dict[str, Optional[float]]]]:
    """Setting -> seed -> metric -> value."""
    table: Dict[Setting, Dict[int, Dict[str, Optional[float]]]] = {}
    for one in found:
        known = {metric: value for metric, value in metrics(one.matrix, base).items() if not np.isnan(value)}
        table.setdefault(one.setting, {})[one.seed] = {**known, "old": one.old, "questions": one.questions}
    return table


def over_seeds(table: Dict[Setting, Dict[int, Dict[str, Optional[float]]]], reference: Optional[str] = None) -> List[Dict[str, Any]]:
    """A row a setting and metric: mean over seeds with its 95 % t interval; and minus the same metric of the reference's arm at the same
    seeds (its first rate), with the p of the paired t test."""
    other = next((own for setting, own in table.items() if setting.arm == reference), None)
    rows = []
    for setting, seeds in table.items():
        for metric in (*METRICS, "old", "questions"):
            known = [own[metric] for own in seeds.values() if own.get(metric) is not None]
            if not known:
                continue
            row: Dict[str, Any] = {"arm": setting.arm, "rate": setting.rate, "metric": metric, **_spread("", known)}
            if other is not None and other is not seeds:
                pairs = [own[metric] - other[seed][metric] for seed, own in seeds.items() if seed in other
                         and own.get(metric) is not None and other[seed].get(metric) is not None]
                row.update(_spread("minus_", pairs) if pairs else {}, p=_paired(pairs))
            rows.append(row)
    return rows


def _spread(prefix: str, known: List[float]) -> Dict[str, Any]:
    mean, low, high = t_interval(known) if len(known) > 1 else (known[0], None, None)
    return {f"{prefix}mean": mean, f"{prefix}low": low, f"{prefix}high": high, f"{prefix}seeds": len(known)}


def _paired(pairs: List[float]) -> Optional[float]:
    if len(pairs) < 2:
        return None
    error = float(np.std(pairs, ddof=1)) / len(pairs) ** 0.5
    return two_sided(float(np.mean(pairs)) / error, len(pairs) - 1) if error else None


def tables(records: Sequence[Dict[str, Any]], reference: Optional[str] = None) -> List[Table]:
    """The metrics of every setting, and the mean matrix of each; none without a complete stream."""
    found = streams(records)
    if not found:
        return []
    rows = over_seeds(values(found, base_of(records)), reference)
    by_setting: Dict[Setting, Dict[str, Dict[str, Any]]] = {}
    for row in rows:
        by_setting.setdefault(Setting(row["arm"], row["rate"]), {})[row["metric"]] = row
    shown = [metric for metric in (*METRICS, "old", "questions") if any(metric in own for own in by_setting.values())]
    lines = [[str(setting), str(max(row["seeds"] for row in own.values())), *(_cell(own.get(metric)) for metric in shown),
              probability((own.get("nbt") or {}).get("p"))] for setting, own in by_setting.items()]
    made = [Table("streams", "Streams: success, forgetting and transfer (%), mean over seeds and 95 % t intervals",
                  ["setting", "seeds", *(metric.upper() if metric in ("nbt", "bwt", "fwt", "auc") else metric for metric in shown),
                   f"p of NBT against {reference}" if reference else "p"], lines)]
    for number, setting in enumerate(by_setting, 1):
        own = [one for one in found if one.setting == setting]
        mean = np.mean([one.matrix for one in own], axis=0)
        made.append(Table(f"matrix_{number}", f"{setting}: success on each task (columns) after each (rows), %", ["after", *own[0].tasks],
                          [[task, *(percent(value) for value in row)] for task, row in zip(own[0].tasks, mean)]))
    return made


def _cell(row: Optional[Dict[str, Any]]) -> str:
    if row is None:
        return ""
    bounds = "" if row["low"] is None else f" [{percent(row['low'])}, {percent(row['high'])}]"
    return percent(row["mean"]) + bounds


def files(records: Sequence[Dict[str, Any]], reference: Optional[str] = None) -> Dict[str, str]:
    """streams.md and streams.csv; {} without a complete stream."""
    made = tables(records, reference)
    if not made:
        return {}
    rows = over_seeds(values(streams(records), base_of(records)), reference)
    return {"streams.md": "\n".join(table.markdown() for table in made), "streams.csv": to_csv(rows)}
