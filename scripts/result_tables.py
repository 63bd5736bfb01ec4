"""Tables of docs/results.md, out of the records in studies/records; written and checked by scripts/doc_tables.py.

A rate counts as a mean over training seeds, a seed being one value, its mean over tasks; ± is half of the 95 % t interval over seeds.
"""

from functools import lru_cache
from pathlib import Path
from statistics import mean, median
from typing import Any, Dict, List, Sequence, Tuple

from vlakeep.core.study import read_study, read_tree
from vlakeep.studies.claims import Judged, judge, tables, volume_rows
from vlakeep.studies.records import read_records, values_of
from vlakeep.studies.rule import read_rule
from vlakeep.studies.streams import files
from vlakeep.studies.tables import markdown, percent, points, probability, spread

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


@lru_cache(maxsize=None)
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


def reported_of(found: Judged, records: Sequence[Record], arm: str, rate: float) -> List[Record]:
    """Those of a setting on the reported seeds."""
    return [record for record in records if record["seed"] in found.seeds and (record["arm"], record["rate"]) == (arm, rate)]


def at_chosen(found: Judged, records: Sequence[Record], family: str) -> List[Record]:
    """The same at the setting that the rule takes of a family."""
    return reported_of(found, records, *found.choices[family].setting)


def training(records: Sequence[Record]) -> str:
    """Median seconds of those that ran on a GPU."""
    return f"{median(record['seconds']['train'] for record in records if record['made']['hardware']['gpus']):.0f}"


def in_order(found: Judged) -> List[str]:
    """Families by what they keep, those first that learn enough."""
    return sorted(found.choices, key=lambda name: (not found.choices[name].matched, -found.values[name]["old"].mean))


def rivals() -> str:
    """Each family at the setting that the rule chooses, on the reported seeds."""
    found, records = judged("rivals_tabletop"), records_of("rivals_tabletop")
    ran = {(record["arm"], record["rate"]) for record in records if record["seed"] in found.rule.choose}
    tried: Dict[str, set] = {}
    for cell in read_study(str(STUDIES / "rivals_tabletop.yaml")):
        tried.setdefault(cell.family, set()).update({(cell.arm, cell.rate)} & ran)
    rows = []
    for family in in_order(found):
        one, own = found.choices[family], at_chosen(found, records, family)
        rows.append([family, f"{one.setting.arm}, {one.setting.rate:g}", str(len(tried[family])), "yes" if one.matched else "no",
                     *means(own, "new", "old", "worst", "questions", "action_kl"), training(own)])
    head = ["family", "setting", "tried", "learns enough", "new skill", "six old skills", "worst of them", "questions", "action KL"]
    return markdown([*head, "training (s)"], rows)


def rivals_against() -> str:
    """Gains with distillation less each family: at the chosen settings, and the fronts over the settings that were reported."""
    found = judged("rivals_tabletop")
    volumes = {row["family"]: row for row in volume_rows(found)}
    versus = {one.family: one for one in found.matched}
    rows = []
    for family in in_order(found):
        if family == found.rule.subject:
            continue
        one, row = versus[family], volumes[family]
        rows.append([family, points(one.new.mean, one.new.low, one.new.high), points(one.kept.mean, one.kept.low, one.kept.high),
                     probability(one.holm), f"{row['hypervolume']:.3f}",
                     f"{row['more']:+.3f} [{row['more_low']:+.3f}, {row['more_high']:+.3f}]", f"{row['p_beyond']:.2f}"])
    head = ["family", "new skill (points)", "old skills (points)", "p of both, Holm", "hypervolume", "ours has more"]
    return markdown([*head, "P(beyond everywhere)"], rows)


def rivals_abilities() -> str:
    """Each old ability at the chosen settings, percent."""
    found, records = judged("rivals_tabletop"), records_of("rivals_tabletop")
    names = sorted({name for record in records for name in record["trials"] if not name.startswith("new:")}, reverse=True)
    bases = [record for record in records if record["arm"] == "base"]
    rows = []
    for family, own in [("base", bases), *((family, at_chosen(found, records, family)) for family in in_order(found))]:
        shares = [[record["trials"][name]["outcomes"] for record in own] for name in names]
        rows.append([family, *(percent(sum(one.count("1") for one in share) / sum(map(len, share))) for share in shares)])
    return markdown(["family", *(name.partition(":")[2] for name in names)], rows)


def forms() -> str:
    """Plain LoRA's rates and the forms of gains, on the reported seeds."""
    found, records = judged("rivals_tabletop"), records_of("rivals_tabletop")
    rows = []
    for arm in ("plain", "frozen", "hard", "fixed", "graded", "graded_005", "graded_015", "ours"):
        rates = sorted({record["rate"] for record in records if record["arm"] == arm and record["seed"] in found.seeds}, reverse=True)
        for rate in rates:
            own = reported_of(found, records, arm, rate)
            rows.append([arm, f"{rate:g}", str(len(own)), *means(own, "new", "old", "worst", "questions", "action_kl", "probe_kl"),
                         training(own)])
    head = ["arm", "rate", "cells", "new skill", "six old skills", "worst of them", "questions", "action KL", "probe KL", "training (s)"]
    return markdown(head, rows)


def authors_gains() -> str:
    """How far the loop of the authors' form closed its gains, over the measurements of each run, and what was kept."""
    found, rivals = judged("rivals_tabletop"), records_of("rivals_tabletop")
    groups = [("frozen, five skills, five seeds", reported_of(found, rivals, "frozen", 2e-3))]
    for arm in ("frozen", "frozen_random", "frozen_no_order", "frozen_static", "site_both", "site_lora_input"):
        groups.append((f"{arm}, one seed", [record for record in records_of("ablations_tabletop") if record["arm"] == arm]))
    rows = []
    for said, own in groups:
        gains = [{key: [value for value in record["curves"][key] if value is not None] for key in ("gamma", "beta")} for record in own]
        lowest = sorted(min(one["gamma"]) for one in gains)
        rows.append([said, str(len(own)), f"{lowest[0]:.2f} to {lowest[-1]:.2f}",
                     *(f"{mean(mean(one[key]) for one in gains):.2f}" for key in ("gamma", "beta")), *means(own, "new", "old")])
    return markdown(["arm", "runs", "lowest gamma of a run", "gamma, mean", "beta, mean", "new skill", "six old skills"], rows)


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
    """One line an arm: new success on each of the tasks that ran, and what is kept, one seed."""
    found: Dict[str, Dict[str, Record]] = {}
    for record in records_of("ablations_tabletop"):
        found.setdefault(record["arm"], {})[record["task"]] = record
    tasks = sorted(set.union(*(set(own) for own in found.values())))
    rows = [[arm, *(f"{values_of(own[task])['new']:.2f}" for task in tasks),
             *means(list(own.values()), "old", "worst", "questions", "action_kl")] for arm, own in found.items()]
    return markdown(["arm", *(f"new: {task}" for task in tasks), "six old skills", "worst of them", "questions", "action KL"], rows)


def explained() -> str:
    """Which share of what plain LoRA loses of the old skills each part keeps, against plain LoRA of the same runs."""
    def own(study: str, arm: str, rate: float = 2e-3) -> List[Record]:
        return [record for record in records_of(study)
                if record["arm"] == arm and (record["rate"], record["seed"] > 10) in ((rate, True), (None, True))]

    groups = [
        ("tuning_tabletop", {"wide_8000": "gains at r = 1e-2 and distillation, probe of 8,000",
                             "distillation_3": "distillation alone, the same probe"}),
        ("rivals_tabletop", {"fixed": "the gains, loop off", "graded": "and the loop, set-point .002",
                             "hard": "hard cut in place of graded gains",
                             "distillation": "distillation alone, probe of 2,000", "frozen": "the authors' form"}),
        ("ablations_tabletop", {"loop_off": "the gains, loop off", "loop_off_random": "and random directions of the same spectrum",
                                "uniform": "and one gain for all directions", "graded": "the gains with the loop",
                                "random_bases": "and random directions", "site_lora_input": "the authors' form at the LoRA inputs",
                                "frozen": "the authors' form", "frozen_random": "and random directions"})]
    rows = []
    for study, arms in groups:
        tasks = {record["task"] for record in own(study, "plain")}
        base = mean(values_of(record)["old"] for record in records_of(study) if record["arm"] == "base" and record["task"] in tasks)
        plain = {(record["task"], record["seed"]): values_of(record)["old"] for record in own(study, "plain")}
        for arm, said in arms.items():
            cells = own(study, arm)
            pairs = [(values_of(record)["old"], plain[record["task"], record["seed"]]) for record in cells]
            kept = sum(old - without for old, without in pairs) / sum(base - without for _, without in pairs)
            rows.append([said, str(len(cells)), *means(cells, "new", "old"), f"{100 * kept:.0f}"])
    return markdown(["what acts", "runs", "new skill", "six old skills", "of plain LoRA's loss it keeps (%)"], rows)


LANGUAGE = ("sciq", "arc_easy", "lambada")


def midsize() -> str:
    """The mid-size base on LIBERO, one run a line: each old suite, questions about scenes over all kinds, language."""
    def rate(trials: Sequence[Dict]) -> str:
        outcomes = "".join(one["outcomes"] for one in trials)
        return f"{outcomes.count('1') / len(outcomes):.2f}"

    rows = []
    for record in records_of("libero_midsize"):
        trials = record["trials"]
        asked = [own for name, own in trials.items() if name.startswith("question:") and name.partition(":")[2] not in LANGUAGE]
        moved = "" if record["probe_kl"] is None else f"{record['probe_kl']:.3g}"
        rows.append([record["arm"], f"{record['rate']:g}" if record["rate"] else "", rate([trials["new:libero_goal"]]),
                     *(rate([trials[f"skill:{suite}"]]) for suite in ("libero_object", "libero_spatial")), rate(asked),
                     *(rate([trials[f"question:{name}"]]) for name in LANGUAGE), *means([record], "action_kl"), moved])
    head = ["arm", "rate", "new: libero_goal", "libero_object", "libero_spatial", "questions", *LANGUAGE, "action KL", "probe KL"]
    return markdown(head, rows)


def all_tables() -> Dict[str, str]:
    return {function.__name__.replace("_", "-"): function().rstrip("\n")
            for function in (tuning, tuning_claim, tuning_each_task, settings, claim, each_task, rivals, rivals_against,
                              rivals_abilities, forms, authors_gains, stream, setpoint, ablations, explained)}
