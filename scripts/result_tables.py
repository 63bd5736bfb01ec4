"""Tables of docs/results.md, out of the records in studies/records; written and checked by scripts/doc_tables.py.

A rate counts as a mean over training seeds, a seed being one value, its mean over tasks; ± is half of the 95 % t interval over seeds.
"""

from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

from vlakeep.core.study import read_study, read_tree
from vlakeep.studies.claims import Judged, judge, tables
from vlakeep.studies.records import read_records, values_of
from vlakeep.studies.rule import read_rule
from vlakeep.studies.streams import files
from vlakeep.studies.tables import markdown, percent, spread

REPO = Path(__file__).resolve().parents[1]
STUDIES = REPO / "studies"
TARGETS, RANKS, RATES = {"t002": 0.002, "t005": 0.005, "t015": 0.015}, (8, 32), (5e-4, 1e-3, 2e-3)
FORMS = {"": "gains alone", "both_": "with distillation"}
Record = Dict[str, Any]


def records_of(name: str) -> List[Record]:
    return read_records(STUDIES / "records" / f"{name}.jsonl.xz")


def means(records: Sequence[Record], *keys: str) -> List[str]:
    values = [(record["seed"], values_of(record)) for record in records]
    return [spread([(seed, found[key]) for seed, found in values if found.get(key) is not None]) for key in keys]


def judged(name: str) -> Judged:
    """What the rule of a study says of its records."""
    file = str(STUDIES / f"{name}.yaml")
    cells = read_study(file)
    rule = read_rule(read_tree(file), cells)
    assert rule is not None
    return judge(cells, records_of(name), rule)


def settings(name: str = "final_tabletop") -> str:
    """Every arm and rate of a study, on the seeds that choose and on those that are reported."""
    file = str(STUDIES / f"{name}.yaml")
    rule = read_rule(read_tree(file), read_study(file))
    found: Dict[Tuple, List[Record]] = {}
    for record in records_of(name):
        side = "" if record["arm"] == "base" else "chooses" if record["seed"] in rule.choose else "reported"
        found.setdefault((record["arm"], record["rate"], side), []).append(record)
    rows = [[arm, f"{rate:g}" if rate else "", side, str(len(own)), *means(own, "new", "old", "worst", "questions", "action_kl")]
            for (arm, rate, side), own in found.items()]
    return markdown(["arm", "rate", "seeds", "cells", "new skill", "six old skills", "worst of them", "questions", "action KL"], rows)


def claim(name: str = "final_tabletop") -> str:
    """The families at their chosen settings, and the difference with its tests, by the rule of the study's file."""
    return "\n".join(markdown(one.head, one.rows) for one in tables(judged(name))[:2])


def each_task(name: str = "final_tabletop", arms: Sequence[str] = ("base", "ours", "plain")) -> str:
    """New skill by task, and each old ability, on the reported seeds: rate over all trials, lowest of any run behind it."""
    found: Dict[str, Dict[str, List[float]]] = {}
    for record in records_of(name):
        if record["arm"] in arms and (record["arm"] == "base" or record["seed"] > 10):
            for key, trials in record["trials"].items():
                kind, _, ability = key.partition(":")
                told = f"new: {record['task']}" if kind == "new" else ability
                found.setdefault(told, {}).setdefault(record["arm"], []).append(
                    trials["outcomes"].count("1") / len(trials["outcomes"]))
    rows = [[told, *(f"{percent(sum(own[arm]) / len(own[arm]))} ({percent(min(own[arm]))})" for arm in arms)]
            for told, own in sorted(found.items(), key=lambda pair: (not pair[0].startswith("new"), pair[0]))]
    return markdown(["ability", *arms], rows)


def tuning() -> str:
    return settings("tuning_tabletop")


def tuning_claim() -> str:
    return claim("tuning_tabletop")


def tuning_each_task() -> str:
    return each_task("tuning_tabletop", ("base", "wide_8000", "plain"))


def rivals() -> str:
    """Each family at the setting that the rule chooses, on the cells that choose: means over two tasks of one seed."""
    found, records = judged("rivals_tabletop"), records_of("rivals_tabletop")
    tried: Dict[str, set] = {}
    for cell in read_study(str(STUDIES / "rivals_tabletop.yaml")):
        tried.setdefault(cell.family, set()).add((cell.arm, cell.rate))
    rows = []
    for family, one in sorted(found.choices.items(), key=lambda pair: (not pair[1].matched, -pair[1].kept)):
        own = [record for record in records if record["seed"] in found.rule.choose
               and (record["arm"], record["rate"]) == (one.setting.arm, one.setting.rate)]
        rows.append([family, f"{one.setting.arm}, {one.setting.rate:g}", str(len(tried[family])), "yes" if one.matched else "no",
                     *means(own, "new", "old", "worst", "questions", "action_kl")])
    head = ["family", "setting", "tried", "learns enough", "new skill", "six old skills", "worst of them", "questions", "action KL"]
    return markdown(head, rows)


def stream() -> str:
    """Measures of the streams that were run to their end."""
    records = records_of("stream_tabletop")
    done = {(record["arm"], record["seed"]) for record in records if record.get("position") == 4}
    return files([record for record in records if (record["arm"], record["seed"]) in done], None)["streams.md"].strip()


def setpoint() -> str:
    """Divergence on the probe at the end, as a multiple of the target."""
    found = {(record["arm"], record["rate"]): record for record in records_of("setpoint_tabletop")}
    rows = []
    for key, said in FORMS.items():
        for word, target in TARGETS.items():
            for rank in RANKS:
                own = [found[f"{key}{word}_rank{rank}", rate] for rate in RATES]
                rows.append([said, f"{target:g}", str(rank), *(f"{record['probe_kl'] / target:.2f}" for record in own)])
    rows += [["fixed gains, nats", "none", str(rank), *(f"{found[f'fixed_rank{rank}', rate]['probe_kl']:.2g}" for rate in RATES)]
             for rank in RANKS]
    return markdown(["arm", "target (nats)", "rank", *(f"rate {rate:g}" for rate in RATES)], rows)


def ablations() -> str:
    """One line an arm: new success on each of the two tasks, and what is kept, one seed."""
    found: Dict[str, Dict[str, Record]] = {}
    for record in records_of("ablations_tabletop"):
        found.setdefault(record["arm"], {})[record["task"]] = record
    rows = [[arm, *(f"{values_of(own[task])['new']:.2f}" for task in ("corner", "order")),
             *means(list(own.values()), "old", "worst", "questions", "action_kl")] for arm, own in found.items()]
    return markdown(["arm", "new: corner", "new: order", "six old skills", "worst of them", "questions", "action KL"], rows)


def all_tables() -> Dict[str, str]:
    return {function.__name__.replace("_", "-"): function().rstrip("\n")
            for function in (tuning, tuning_claim, tuning_each_task, settings, claim, each_task, rivals, stream, setpoint, ablations)}
