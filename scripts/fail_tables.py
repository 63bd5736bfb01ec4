"""Tables of docs/where-it-fails.md, out of the records in studies/records; written and checked by scripts/doc_tables.py.

± is half of the 95 % t interval over training seeds, a seed being one value (its mean over tasks where there are several); differences
are paired by task and seed. A measurement is one of the loop: step, divergence on held-out probe items, opening r.
"""

import json
import lzma
from functools import lru_cache
from statistics import mean, median
from typing import Dict, List, Optional, Sequence, Tuple

from result_tables import STUDIES, Record, means, records_of

from vlakeep.reporting.intervals import t_interval
from vlakeep.studies.records import values_of
from vlakeep.studies.tables import markdown, spread

TASKS = ("corner", "path", "order", "relation", "repeat")
HARD = TASKS[1:]  # share scene and words with old skills
TARGETS = {"graded": 0.002, "graded_005": 0.005, "graded_015": 0.015}  # arm of rivals_tabletop -> nats
GAINS = [*((arm, 2e-3) for arm in ("graded", "graded_005", "graded_015", "fixed")), ("ours", 4e-3)]
NAMES = {"graded": "gains, set-point .002", "graded_005": "gains, set-point .005", "graded_015": "gains, set-point .015",
         "fixed": "gains, r = 1e-3, no loop", "ours": "gains with distillation", "distillation": "distillation alone",
         "plain": "plain LoRA", "low_lr": "plain LoRA", "self_replay": "self-distilled replay",
         "wide_8000": "gains with distillation, 8,000 items", "distillation_3": "distillation, w = 3, 8,000 items"}
Cells = Dict[Tuple[str, int], Record]  # (task, seed) -> record
HIGH, LOW, OFTEN, SHUT = 3.0, 0.5, 10, 0.1  # what `swings` and `closes` count
KEPT = {"new": "new skill", "old": "six old skills", "worst": "worst of them"}
ABLATED = ("corner", "order", "repeat")
TRACED = (40, 80, 150, 200, 300, 380, 390, 400)
STEPS = 5  # logged values, of ten steps each, in a mean of the loss


@lru_cache(maxsize=None)
def cells(study: str, arm: str, rate: float = 2e-3, reported: bool = True) -> Cells:
    """Those of the seeds that are reported, or that choose."""
    return {(record["task"], record["seed"]): record for record in records_of_once(study)
            if (record["arm"], record["rate"]) == (arm, rate) and (record["seed"] > 10) == reported}


@lru_cache(maxsize=None)
def records_of_once(study: str) -> List[Record]:
    return records_of(study)


def mean_of(found: Cells, key: str, task: str = "") -> float:
    """Over the cells, of one task or of all."""
    return mean(values_of(record)[key] for (own, _), record in found.items() if task in ("", own))


def less(one: Cells, other: Cells, key: str, tasks: Sequence[str]) -> str:
    """Mean difference in points over the cells that both have, and half of the interval over seeds."""
    seeds: Dict[int, List[float]] = {}
    for (task, seed), record in one.items():
        if task in tasks and (task, seed) in other:
            seeds.setdefault(seed, []).append(values_of(record)[key] - values_of(other[task, seed])[key])
    middle, low, _ = t_interval([100 * mean(own) for own in seeds.values()])
    return f"{middle:+.1f} ±{middle - low:.1f}"


def as_good(one: Cells, other: Cells, tasks: Sequence[str]) -> str:
    """In how many cells `other` has at least as much of the new skill and of the old ones."""
    own = [key for key in one if key[0] in tasks]
    good = [key for key in own if all(values_of(other[key])[name] > values_of(one[key])[name] - 1e-9 for name in ("new", "old"))]
    return f"{len(good)} of {len(own)}"


# The loop


def measurements(record: Record) -> List[Tuple[int, float, float]]:
    curves = record["curves"]
    return [one for one in zip(curves["step"], curves["kl"], curves["opening"]) if None not in one]


def swings(rows: Sequence[Tuple[int, float, float]], target: float) -> int:
    """Neighbouring measurements of which one lies above HIGH times the target and the other below LOW times."""
    return sum(max(a[1], b[1]) > HIGH * target and min(a[1], b[1]) < LOW * target for a, b in zip(rows, rows[1:]))


def fallen(rows: Sequence[Tuple[int, float, float]], until: Optional[int] = None) -> float:
    """The last opening as a share of the largest, up to a step."""
    own = [r for step, _, r in rows if until is None or step <= until]
    return own[-1] / max(own)


def kind_of(record: Record, target: float) -> str:
    rows = measurements(record)
    swinging, shut = swings(rows, target) >= OFTEN, fallen(rows) < SHUT
    return "swings and shuts" if swinging and shut else "swings" if swinging else "shuts without swinging" if shut else "neither"


def counted(records: Sequence[Record]) -> str:
    """`order 3, repeat 2`."""
    number = {task: sum(record["task"] == task for record in records) for task in TASKS}
    return ", ".join(f"{task} {count}" for task, count in number.items() if count)


def between(values: Sequence[float], form: str = ".2f") -> str:
    """Mean, and in brackets the lowest and the highest."""
    return f"{mean(values):{form}} ({min(values):{form}} to {max(values):{form}})" if values else ""


def fails_loop() -> str:
    """What became of the loop in each of the 25 runs of a target."""
    rows = []
    for arm, target in TARGETS.items():
        found: Dict[str, List[Record]] = {}
        for record in cells("rivals_tabletop", arm).values():
            found.setdefault(kind_of(record, target), []).append(record)
        for kind in ("swings and shuts", "swings", "shuts without swinging", "neither"):
            for title, own in [(kind, [record for record in found.get(kind, []) if kind != "neither" or record["task"] in HARD]),
                               *([("neither, `corner`", [one for one in found[kind] if one["task"] == "corner"])]
                                 if kind == "neither" else [])]:
                if own:
                    largest = [max(kl for _, kl, _ in measurements(record)) for record in own]
                    rows.append([f"{target:g}", title, f"{len(own)}: {counted(own)}" if title == kind else str(len(own)),
                                 str(sum(record["probe_kl"] < 0.9 * target for record in own)),
                                 between([values_of(record)["new"] for record in own]),
                                 f"{median(largest):.3f} ({median(largest) / target:.1f} times)",
                                 between([fallen(measurements(record)) for record in own])])
    head = ["target", "the loop", "runs", "below .9 of the target at the end", "new skill", "largest measurement, median (nats)"]
    return markdown([*head, "last r as a share of its largest"], rows)


def fails_traces() -> str:
    """Two runs at .002: divergence as a multiple of the target, and r, at some steps."""
    rows = []
    for said, task, seed in (("swings and shuts", "repeat", 12), ("shuts without swinging", "relation", 15), ("neither", "relation", 14)):
        record = cells("rivals_tabletop", "graded")[task, seed]
        found = {step: f"{kl / TARGETS['graded']:.2f} at {r:.1e}" for step, kl, r in measurements(record)}
        rows.append([f"{said} (`{task}`, seed {seed})", *(found[step] for step in TRACED), f"{values_of(record)['new']:.2f}"])
    return markdown(["run", *(f"step {step}" for step in TRACED), "new skill"], rows)


def fails_shut() -> str:
    """The same in the other studies, at their own targets."""
    # Where layers have no gains the loop shuts what is not at fault: told on its own.
    ablations = [record for record in records_of_once("ablations_tabletop") if record["probe_kl"] is not None
                 and record["settings"]["method"] == "graded" and not record["arm"].startswith("gains_")]
    groups = [(f"settings of the loop, probe of 500 or as the line says, `{task}`",
               [(record, 0.002) for record in ablations if record["task"] == task]) for task in ABLATED]
    words = {"002": 0.002, "005": 0.005, "015": 0.015}
    tuned = [(record, target) for word, target in words.items()
             for record in cells("tuning_tabletop", f"setpoint_{word}", reported=False).values()]
    groups.append(("with distillation, 8,000 items, 800 steps, three targets, five skills", tuned))
    points = [(record, target) for word, target in words.items() for record in records_of_once("setpoint_tabletop")
              if f"t{word}_" in record["arm"]]
    groups.append(("three targets, three rates, two ranks, with and without distillation, `corner`", points))
    rows = []
    for said, own in groups:
        kinds = [kind_of(record, target) for record, target in own]
        shut = [record for (record, _), kind in zip(own, kinds) if "shuts" in kind]
        rows.append([said, str(len(own)), str(kinds.count("swings")), str(len(shut)),
                     str(sum(record["probe_kl"] < 0.9 * target for record, target in own)),
                     between([values_of(one)["new"] for one in shut]),
                     between([values_of(record)["new"] for (record, _), kind in zip(own, kinds) if "shuts" not in kind])])
    head = ["runs with a loop", "runs", "swing only", "shut", "below .9 of the target at the end", "new skill of those that shut"]
    return markdown([*head, "of the others"], rows)


def signs(record: Record, target: float) -> Tuple[bool, bool]:
    """What a run shows early: a measurement above HIGH times the target up to step 100; r at step 200 below a quarter of its largest."""
    rows = measurements(record)
    return max(kl for step, kl, _ in rows if step <= 100) > HIGH * target, fallen(rows, 200) < 0.25


def fails_signs() -> str:
    """The four hard skills, by what a run of 400 steps shows in its first half."""
    rows = []
    for arm, target in TARGETS.items():
        own = [(record, *signs(record, target)) for record in cells("rivals_tabletop", arm).values() if record["task"] in HARD]
        for title, those in (("a measurement above 3 times the target up to step 100", [one for one, high, _ in own if high]),
                             ("r at step 200 below a quarter of its largest", [one for one, _, low in own if low]),
                             ("neither of the two", [one for one, high, low in own if not (high or low)])):
            rows.append([f"{target:g}", title, str(len(those)), str(sum(kind_of(record, target) != "neither" for record in those)),
                         between([values_of(record)["new"] for record in those])])
    return markdown(["target", "seen early", "runs", "that swing or shut by the end", "new skill"], rows)


# Skills


def fails_skills() -> str:
    """New skill and six old skills, by task."""
    arms = [("plain", 2e-3), ("plain", 1e-3), ("plain", 5e-4), ("low_lr", 2.5e-4), ("distillation", 2e-3), ("self_replay", 2e-3), *GAINS]
    rows = []
    for arm, rate in arms:
        own = cells("rivals_tabletop", arm, rate)
        rows.append([NAMES[arm], f"{rate:g}", *(f"{mean_of(own, 'new', task):.3f} / {mean_of(own, 'old', task):.3f}" for task in TASKS),
                     f"{mean_of(own, 'new'):.3f} / {mean_of(own, 'old'):.3f}"])
    return markdown(["arm", "rate", *TASKS, "all five"], rows)


def fails_against() -> str:
    """Each form of gains less plain LoRA at 2e-3 and less distillation, by task."""
    plain, rival = cells("rivals_tabletop", "plain"), cells("rivals_tabletop", "distillation")
    rows = []
    for arm, rate in GAINS:
        own = cells("rivals_tabletop", arm, rate)
        for task in ("", *TASKS):
            tasks = (task,) if task else TASKS
            rows.append([NAMES[arm], task or "all five", less(own, plain, "new", tasks), less(own, rival, "new", tasks),
                         less(own, rival, "old", tasks), less(own, rival, "worst", tasks), as_good(own, rival, tasks)])
    head = ["arm", "new skill learnt", "new, less plain LoRA", "new, less distillation", "old, less distillation"]
    return markdown([*head, "worst old, less distillation", "cells in which distillation is as good or better in both"], rows)


def at_equal(points: Sequence[Tuple[float, float]], new: float) -> Optional[float]:
    """What is kept where as much is learnt, between the two neighbouring points (new, old); None outside of them."""
    for (low, kept), (high, left) in zip(points, points[1:]):
        if low <= new <= high:
            return kept + (left - kept) * (new - low) / (high - low)
    return None


def fails_equal() -> str:
    """Old skills at the gains' own success, beside plain LoRA at the smaller rate that learns as much."""
    plain = [cells("rivals_tabletop", *one) for one in (("low_lr", 2.5e-4), ("plain", 5e-4), ("plain", 1e-3), ("plain", 2e-3))]
    rows = []
    for task in TASKS:
        points = sorted((mean_of(own, "new", task), mean_of(own, "old", task)) for own in plain)
        told = []
        for arm, rate in GAINS:
            own = cells("rivals_tabletop", arm, rate)
            there = at_equal(points, mean_of(own, "new", task))
            told.append(f"{mean_of(own, 'old', task):.3f} for " + ("…" if there is None else f"{there:.3f}"))
        rows.append([task, *told])
    return markdown(["new skill", *(NAMES[arm] for arm, _ in GAINS)], rows)


# How soon


def fails_speed() -> str:
    """Success of the new skill at checkpoints, in the cells that both arms have."""
    def at(arm: str, step: int) -> Cells:
        return cells("final_tabletop", arm if step == 800 else f"{arm}_at_{step}")

    both = sorted(set(at("plain", 200)) & set(at("ours", 200)))
    rows = []
    for task in ("", *TASKS):
        own = [key for key in both if task in ("", key[0])]
        if own:
            rows.append([task or "all", str(len(own)), *(
                " / ".join(f"{mean(values_of(at(arm, step)[key])['new'] for key in own):.2f}" for arm in ("plain", "ours"))
                for step in (200, 400, 600, 800))])
    return markdown(["new skill", "runs", *(f"step {step}" for step in (200, 400, 600, 800))], rows)


def smooth(record: Record) -> Dict[int, float]:
    """Step -> mean of the STEPS logged losses up to it."""
    curves = record["curves"]
    rows = [(step, loss) for step, loss in zip(curves["step"], curves["loss"]) if loss is not None and step > 0]
    return {rows[i][0]: mean(loss for _, loss in rows[i - STEPS + 1:i + 1]) for i in range(STEPS - 1, len(rows))}


def reached(losses: Dict[int, float], loss: float) -> Optional[int]:
    """The first step with that loss; None where it never comes."""
    return next((step for step in sorted(losses) if losses[step] <= loss), None)


def fails_steps() -> str:
    """When the training loss is where plain LoRA's is at steps 100 and 200, same task, seed and batches."""
    plain = {key: smooth(record) for key, record in cells("rivals_tabletop", "plain").items()}
    rows = []
    for arm, rate in [("plain", 1e-3), ("plain", 5e-4), ("distillation", 2e-3), ("self_replay", 2e-3), GAINS[4], GAINS[3], *GAINS[2::-1]]:
        told = []
        for step in (100, 200):
            steps = [reached(smooth(record), plain[key][step]) for key, record in cells("rivals_tabletop", arm, rate).items()]
            last = median(401 if one is None else one for one in steps)
            told += ["never" if last > 400 else f"{last:.0f}", f"{sum(one is None for one in steps)} of {len(steps)}"]
        rows.append([NAMES[arm], f"{rate:g}", *told])
    head = ["arm", "rate", "as plain LoRA at step 100: median step", "never", "as plain LoRA at step 200: median step", "never"]
    return markdown(head, rows)


# What a target says


def fails_target() -> str:
    """How often a single old skill is lost though the divergence is held."""
    base = {key: value for key, value in values_of(next(one for one in records_of_once("rivals_tabletop") if one["arm"] == "base")).items()
            if key.startswith("skill:")}
    arms = [("rivals_tabletop", "distillation", 2e-3), *(("rivals_tabletop", *one) for one in GAINS),
            ("tuning_tabletop", "wide_8000", 2e-3), ("tuning_tabletop", "distillation_3", 2e-3)]
    rows = []
    for study, arm, rate in arms:
        own = list(cells(study, arm, rate).values())
        falls = [max((base[key] - values_of(record)[key], key) for key in base) for record in own]
        kinds = {key: sum(fall >= 0.099 and name == key for fall, name in falls) for key in base}
        kl = [record["probe_kl"] for record in own if record["probe_kl"] and record["curves"].get("kl")]
        rows.append([NAMES[arm], str(len(own)), f"{median(kl):.4f}" if kl else "",
                     *means(own, "action_kl", "old"), *(str(sum(fall >= least - 0.001 for fall, _ in falls)) for least in (0.1, 0.2)),
                     ", ".join(f"{key[6:]} {count}" for key, count in kinds.items() if count), f"{100 * max(falls)[0]:.0f}"])
    head = ["arm", "runs", "probe KL, median", "action KL", "six old skills", "runs with a skill 10 points lower", "20 points lower"]
    return markdown([*head, "which falls most (10 points or more)", "most points lost"], rows)


# Settings, one seed


def ablation_rows(arms: Sequence[Tuple[str, str]], keys: Dict[str, str]) -> str:
    """Three cells a line, `corner / order / repeat`; r as a share of its largest and the end of the loop, where there is one."""
    found: Dict[str, Dict[str, Record]] = {}
    for record in records_of_once("ablations_tabletop"):
        found.setdefault(record["arm"], {})[record["task"]] = record

    def pair(arm: str, told) -> str:
        return " / ".join(told(found[arm][task]) for task in ABLATED)

    def loop(told):
        return lambda record: told(record) if record["probe_kl"] is not None and measurements(record) else ""

    rows = []
    for arm, said in arms:
        looped = all(record["probe_kl"] is not None for record in found[arm].values())
        rows.append([said, *(pair(arm, lambda record, key=key: f"{values_of(record)[key]:.2f}") for key in keys),
                     pair(arm, lambda record: f"{values_of(record)['action_kl']:.2g}"),
                     pair(arm, loop(lambda record: f"{record['probe_kl'] / 0.002:.2f}")) if looped else "",
                     pair(arm, loop(lambda record: f"{measurements(record)[-1][2]:.1e}")) if looped else "",
                     pair(arm, loop(lambda record: f"{fallen(measurements(record)):.2f}")) if looped else ""])
    return markdown(["changed", *keys.values(), "action KL", "probe KL / target", "last r", "last r / largest"], rows)


def fails_probe() -> str:
    return ablation_rows([
        ("plain", "plain LoRA"), ("graded", "500 items, the default"), ("probe_50", "50 items"), ("probe_200", "200"),
        ("probe_2000", "2,000"), ("probe_questions", "questions alone, 500"), ("probe_skills", "skills alone, 500"),
        ("probe_downstream", "the new task's frames alone, 500")],
        {**KEPT, "questions": "questions"})


def fails_settings() -> str:
    return ablation_rows([
        ("graded", "none: p = 1, s = 10, loop"), ("random_bases", "random directions"), ("loop_off", "no loop, r = 1e-3"),
        ("loop_off_random", "no loop, r = 1e-3, random directions"), ("r_1e4", "no loop, r = 1e-4"), ("r_1e2", "no loop, r = 1e-2"),
        ("r_1e1", "no loop, r = 1e-1"), ("uniform", "no gains, a tenth of the scale"), ("p_05", "p = 0.5"), ("p_2", "p = 2"),
        ("p_4", "p = 4"), ("s_1", "s = 1"), ("s_3", "s = 3"), ("s_30", "s = 30"), ("s_100", "s = 100"),
        ("last_four", "LoRA in the last four layers"), ("attention", "attention alone"), ("mlp", "MLP alone"),
        ("gate_up", "gate and up alone"), ("gains_last_four", "gains in the last four layers, plain LoRA in the first"),
        ("gains_first_four", "gains in the first four layers"), ("graded_no_answers", "spectra without the teacher's answers"),
        ("unit_model", "one λ for the model"), ("kinds_alike", "kinds count alike"), ("init_kaiming", "A as kaiming draws it"),
        ("init_open", "A in the open space"), ("init_new_inputs", "A at the new inputs"),
        ("sgd", "SGD, rate .3"), ("plain_sgd", "plain LoRA, SGD, rate .3")], KEPT)


def fails_rates() -> str:
    """`corner / order` on the seed that chooses: the rate, with and without gains."""
    rows = []
    for arm, rates in (("plain", (5e-4, 1e-3, 2e-3)), ("fixed", (5e-4, 1e-3, 2e-3)), ("ours", (1e-3, 2e-3, 4e-3))):
        for rate in rates:
            own = cells("rivals_tabletop", arm, rate, reported=False)
            rows.append([NAMES[arm], f"{rate:g}", *(" / ".join(f"{mean_of(own, key, task):.2f}" for task in ("corner", "order"))
                                                   for key in ("new", "old", "worst"))])
    return markdown(["arm", "rate", "new skill", "six old skills", "worst of them"], rows)


def fails_ranks() -> str:
    """`corner`, one seed, 20 episodes: rates at one divergence; two ranks, with and without distillation."""
    rows = []
    for word, target in (("002", "0.002"), ("005", "0.005"), ("015", "0.015"), ("", "no loop, r = 1e-3")):
        for rate in (5e-4, 1e-3, 2e-3):
            arms = {f"{form}{word}_rank{rank}" for form in ("t", "both_t") for rank in (8, 32)} if word else {"fixed_rank8", "fixed_rank32"}
            own = [record for record in records_of_once("setpoint_tabletop") if record["arm"] in arms and record["rate"] == rate]
            kl = [record["probe_kl"] for record in own]
            rows.append([target, f"{rate:g}", str(len(own)), f"{min(kl):.2g} to {max(kl):.2g}",
                         *(between([values_of(record)[key] for record in own]) for key in ("new", "old", "worst"))])
    return markdown(["target", "rate", "runs", "probe KL at the end", "new skill", "six old skills", "worst of them"], rows)


# Together, and one after the other


def fails_both() -> str:
    """Gains with distillation less distillation alone, by task."""
    rows = []
    for said, one, other in (("2,000 items, 400 steps", cells("rivals_tabletop", "ours", 4e-3), cells("rivals_tabletop", "distillation")),
                             ("8,000 items, 800 steps", cells("tuning_tabletop", "wide_8000"), cells("tuning_tabletop", "distillation_3"))):
        for task in ("", *TASKS):
            tasks = (task,) if task else TASKS
            rows.append([said, task or "all five", *(less(one, other, key, tasks) for key in ("new", "old", "worst", "questions")),
                         as_good(one, other, tasks)])
    head = ["probe", "new skill learnt", "new", "old", "worst old", "questions", "cells in which distillation is as good or better in both"]
    return markdown(head, rows)


def fails_stream() -> str:
    """What a stream learns of each skill and what is left of it at the end, three streams."""
    def at(arm: str, place: Optional[int] = None) -> Cells:
        return {key: record for key, record in cells("stream_tabletop", arm).items() if place in (None, record["position"])}

    plain, rows = at("plain"), []
    for arm, said in (("plain", "plain LoRA"), ("ours", "gains with distillation, 2,000 items"),
                      ("ours_8000", "gains with distillation, 8,000 items")):
        own = at(arm)
        last = {seed: values_of(record) for (_, seed), record in at(arm, 4).items()}
        left = {task: mean(values[f"stream:{task}"] if f"stream:{task}" in values else values["new"] for values in last.values())
                for task in ("corner", "path", "order", "relation", "repeat")}
        rows.append([said, *(f"{mean_of(own, 'new', task):.2f}, {left[task]:.2f}" for task in left),
                     "" if arm == "plain" else less(own, plain, "new", TASKS),
                     spread([(seed, values["worst"]) for seed, values in last.items()])])
    return markdown(["arm", *TASKS, "learnt, less plain LoRA", "worst old skill at the end"], rows)


LANGUAGE = {"exact": "exact answers to new requests", "held_loss": "loss on them", "kl_text": "KL on other text",
            "kl_questions": "KL at answers to questions", "sciq": "SciQ", "lambada": "LAMBADA", "kl_probe": "KL on held-out probe items"}


def fails_language() -> str:
    """Of studies/language_model.py, whose records are no study's: one line an arm."""
    with lzma.open(STUDIES / "records" / "language_model.jsonl.xz", "rt") as file:
        found = [json.loads(line) for line in file]
    rows = []
    for arm in dict.fromkeys(row["arm"] for row in found):
        own = [row for row in found if row["arm"] == arm]
        rows.append([arm, str(len(own)), *(spread([(row["seed"], row[key]) for row in own]) for key in LANGUAGE)])
    return markdown(["arm, probe", "runs", *LANGUAGE.values()], rows)


def all_tables() -> Dict[str, str]:
    return {function.__name__.replace("_", "-"): function().rstrip("\n")
            for function in (fails_skills, fails_against, fails_equal, fails_loop, fails_traces, fails_shut, fails_signs, fails_target,
                             fails_speed, fails_steps, fails_probe, fails_settings, fails_rates, fails_ranks, fails_both, fails_stream,
                             fails_language)}
