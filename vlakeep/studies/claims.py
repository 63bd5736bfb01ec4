"""What a study shows by its rule: each family at its chosen setting, the subject against each of the others, the front, and the power.

rule.py says how settings are chosen, inference.py how differences are tested. Everything is worked out of the records (records.py) once, by
`judge`, and tables and pages show it.
"""

from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from vlakeep.core.study import BASE, Cell
from vlakeep.studies import power as sizes
from vlakeep.studies.data import Data, Setting
from vlakeep.studies.front import Front, beaten, front_of, hypervolume, of_family, shortfall
from vlakeep.studies.inference import LEVEL, Estimate, both, difference, holm, value
from vlakeep.studies.rule import Choice, Rule, choose, families_of, reported
from vlakeep.studies.tables import Table, percent, points, probability, to_csv

MEASURES = ("new", "old", "questions", "action_kl")
EFFECT = 0.02  # of the power table
DRAWS_OF_FRONT = 4000


class Versus(NamedTuple):
    """The subject minus a family, each at its setting. p: of "not worse on the new task, and keeps more"; holm: adjusted for all
    families."""

    family: str
    new: Optional[Estimate]
    kept: Optional[Estimate]
    not_worse: Optional[float]
    keeps_more: Optional[float]
    p: Optional[float]
    holm: Optional[float] = None

    @property
    def shown(self) -> bool:
        return self.holm is not None and self.holm < 1 - LEVEL


class Judged(NamedTuple):
    """All that is said of a study. `values`: family -> measure -> mean at its chosen setting, `base` among them."""

    rule: Rule
    data: Data
    seeds: List[int]
    choices: Dict[str, Choice]
    own_best: Dict[str, Choice]
    values: Dict[str, Dict[str, Optional[Estimate]]]
    matched: List[Versus]
    best: List[Versus]
    front: Optional[Front]
    parts: Optional[sizes.Parts]
    notes: List[str]


def judge(cells: Sequence[Cell], records: Sequence[Dict[str, Any]], rule: Rule) -> Judged:
    data, families, notes = Data(records), families_of(cells), []
    measures = tuple(dict.fromkeys((*MEASURES, rule.retention)))
    seeds = reported(rule, data)
    if not rule.choose:
        notes.append("the rule names no choosing seeds: settings are chosen on the seeds that are reported, which flatters each arm")
    choices, own_best = choose(rule, families, data), choose(rule, families, data, own_best=True)
    values = {family: {measure: value(data, choice.setting, measure, seeds, rule.draws) for measure in measures}
              for family, choice in choices.items()}
    if data.records(Setting(BASE, 0.0)):
        values[BASE] = {measure: value(data, Setting(BASE, 0.0), measure, seeds[:1], rule.draws) for measure in measures}
    asked, chosen_on = ("new", rule.retention), rule.choose or data.seeds
    notes += _crashed("on the choosing seeds, so that these settings are not chosen", data, families, asked, chosen_on)
    notes += _crashed("on the reported seeds, on which these settings have no mean", data, families, asked, seeds)
    lacking = [family for family, own in families.items()
               if family not in choices and not any(data.crashed(setting, asked, chosen_on) for setting in own)]
    if lacking:
        notes.append(f"without records on the choosing seeds: {', '.join(lacking)}")
    notes += _undone(rule, cells, data, choices)
    notes += _unlike("on the choosing seeds settings are compared by means over unlike tasks", data, families, rule.choose or data.seeds)
    shown = {family: [choice.setting, own_best[family].setting] for family, choice in choices.items()}
    notes += _unlike("on the reported seeds means are over unlike tasks, and differences over those that both have", data, shown, seeds)
    far = [family for family, one in choices.items() if not one.matched]
    if far:
        one = len(far) == 1
        notes.append(f"{', '.join(far)}: no setting comes within {100 * rule.near:g} points of the best of {rule.reference} on the "
                     f"choosing seeds; {'its' if one else 'the'} own best stands for {'it' if one else 'each'}, and what "
                     f"{'it' if one else 'that'} keeps is not what is kept at that success")
    front = None
    try:
        if choices and seeds:
            front = front_of(data, families, rule.retention, seeds, min(rule.draws, DRAWS_OF_FRONT))
            left = sum(not any(one["seed"] in seeds for one in data.records(setting)) for own in families.values() for setting in own)
            notes += [f"settings without a record on the reported seeds, which the front lacks: {left}"] if left else []
            if len(front.seeds) < len(seeds) or len(front.tasks) < len(data.tasks):
                notes.append(f"the front is over {len(front.seeds)} of {len(seeds)} seeds and {len(front.tasks)} of {len(data.tasks)} "
                             "tasks, which all its settings have"
                             + (": of one seed its draws know no difference between trainings" if len(front.seeds) == 1 else ""))
    except ValueError as error:
        notes.append(f"no front: {error}")
    known: Dict[Tuple, Optional[Estimate]] = {}  # a family's two settings are often the same
    return Judged(rule, data, seeds, choices, own_best, values, _versus(rule, data, choices, seeds, known),
                  _versus(rule, data, own_best, seeds, known), front, _parts(rule, data, choices, seeds), notes)


def _undone(rule: Rule, cells: Sequence[Cell], data: Data, choices: Dict[str, Choice]) -> List[str]:
    """Cells without a record where others stand for them: a training that fails leaves none, and is not counted against its setting."""
    done, found = set(data.keys()), []
    for said, what in (("on the choosing seeds, where settings are chosen by the others", lambda one: one.seed in rule.choose
                        or not rule.choose),
                       ("at the chosen settings on the reported seeds, where the others speak for them",
                        lambda one: one.seed not in rule.choose and choices[one.family].setting == (one.arm, one.rate))):
        counts = {}
        for family in choices:
            own = [one for one in cells if one.family == family and not one.is_base and what(one)]
            counts[family] = (sum((Setting(one.arm, one.rate), one.task, one.seed) not in done for one in own), len(own))
        alike: Dict[Tuple[int, int], List[str]] = {}
        for family, count in counts.items():
            if count[0]:
                alike.setdefault(count, []).append(family)
        lacking = [f"{', '.join(own)}{' each' if len(own) > 1 else ''} {missing} of {all_}" for (missing, all_), own in alike.items()]
        found += [f"cells without a record {said}: {'; '.join(lacking)}"] if lacking else []
    return found


def _crashed(said: str, data: Data, families: Dict[str, List[Setting]], measures: Sequence[str], seeds: Sequence[int]) -> List[str]:
    """What to say of settings of which every trial of an ability crashed: a mean over the other abilities is no mean of all."""
    found = {str(setting): names for own in families.values() for setting in own if (names := data.crashed(setting, measures, seeds))}
    lines = [f"{setting} ({', '.join(names)})" for setting, names in found.items()]
    return [f"all trials of an ability crashed {said}: {'; '.join(lines)}"] if lines else []


def _unlike(said: str, data: Data, families: Dict[str, List[Setting]], seeds: Sequence[int]) -> List[str]:
    """What to say where the settings of these families do not all have the same tasks; [] where they have."""
    groups: Dict[Tuple[str, ...], List[str]] = {}
    for family, settings in families.items():
        had = [tuple(tasks) for tasks, own in (data.complete(one, seeds) for one in settings) if own]
        for tasks in dict.fromkeys(had):
            groups.setdefault(tasks, []).append(family)
    parts = [f"{len(tasks)} of {len(data.tasks)} ({', '.join(tasks)}) of {', '.join(own)}" for tasks, own in groups.items()]
    return [f"{said}: {'; '.join(parts)}"] if len(groups) > 1 else []


def _versus(rule: Rule, data: Data, choices: Dict[str, Choice], seeds: Sequence[int],
            known: Dict[Tuple, Optional[Estimate]]) -> List[Versus]:
    """`known`: differences by both settings and measure; those that are missing are added."""
    if rule.subject not in choices or not seeds:
        return []
    own, found = choices[rule.subject].setting, []
    for family, choice in choices.items():
        if family != rule.subject:
            for measure in ("new", rule.retention):
                if (own, choice.setting, measure) not in known:
                    known[own, choice.setting, measure] = difference(data, own, choice.setting, measure, seeds, rule.draws)
            new, kept = (known[own, choice.setting, measure] for measure in ("new", rule.retention))
            not_worse = new.not_inferior(rule.margin) if new else None
            keeps_more = kept.superior() if kept else None
            found.append(Versus(family, new, kept, not_worse, keeps_more, both(not_worse, keeps_more)))
    adjusted = holm({one.family: one.p if one.family in (rule.compare or choices) else None for one in found})
    return [one._replace(holm=adjusted[one.family]) for one in found]


def _parts(rule: Rule, data: Data, choices: Dict[str, Choice], seeds: Sequence[int]) -> Optional[sizes.Parts]:
    """Variances of what the subject keeps more than the reference."""
    if not {rule.subject, rule.reference} <= set(choices) or rule.subject == rule.reference:
        return None
    settings = [choices[name].setting for name in (rule.subject, rule.reference)]
    tasks, own = data.common(settings, seeds)
    return sizes.parts_of(data.blocks(settings[0], rule.retention, tasks, own, minus=settings[1])) if tasks and len(own) > 1 else None


def best_rival(judged: Judged, oracles: bool = False) -> Optional[str]:
    """The family that keeps most among those that learn enough (of all, where none does), subject and oracles aside; or the best oracle."""
    rule = judged.rule
    others = [one for name, one in judged.choices.items() if name != rule.subject and (name in rule.oracles) == oracles]
    able = [one for one in others if one.matched] or others
    return max(able, key=lambda one: one.kept).family if able else None


def front_rows(judged: Judged) -> List[Dict[str, Any]]:
    """A row a setting: its means, and the probability of lying on the front."""
    front = judged.front
    if front is None:
        return []
    on = 1 - beaten(front.new_RK, front.kept_RK).mean(0)
    now = ~beaten(front.new[None], front.kept[None])[0]
    return [{"family": front.families[k], "arm": one.arm, "rate": one.rate, "new": float(front.new[k]), "kept": float(front.kept[k]),
             "on_front": bool(now[k]), "p_on_front": float(on[k]), "seeds": len(front.seeds), "tasks": len(front.tasks)}
            for k, one in enumerate(front.settings)]


def volume_rows(judged: Judged) -> List[Dict[str, Any]]:
    """A row a family: hypervolume of its front, the subject's less it with its interval from the draws, and how far the subject's front
    lies beyond it at worst, where `near` less success is as good."""
    front = judged.front
    if front is None or judged.rule.subject not in front.families:
        return []
    own, found = of_family(front, judged.rule.subject), []
    tail = 50 * (1 - LEVEL)
    for family in dict.fromkeys(front.families):
        other = of_family(front, family)
        volume, drawn = float(hypervolume(*other[:2])[0]), hypervolume(*other[2:])
        row: Dict[str, Any] = {"family": family, "hypervolume": volume, "settings": other[0].shape[1]}
        if family != judged.rule.subject:
            more, near = hypervolume(*own[2:]) - drawn, judged.rule.near
            row.update(more=float(hypervolume(*own[:2])[0]) - volume, more_low=float(np.percentile(more, tail)),
                       more_high=float(np.percentile(more, 100 - tail)), beyond_by=float(shortfall(own[:2], other[:2], near)[0]),
                       p_beyond=float((shortfall(own[2:], other[2:], near) >= 0).mean()))
        found.append(row)
    return found


def power_rows(judged: Judged) -> List[Dict[str, Any]]:
    """Power to find EFFECT by seeds and episodes a skill."""
    if judged.parts is None:
        return []
    grid = sizes.table(EFFECT, judged.parts)
    return [{"seeds": s, **{f"episodes_{e}": grid[i][j] for j, e in enumerate(sizes.EPISODES)}} for i, s in enumerate(sizes.SEEDS)]


def choice_rows(judged: Judged) -> List[Dict[str, Any]]:
    """A row a family: the chosen setting, what it reached on the choosing seeds, and on the reported ones."""
    found = []
    for family, choice in judged.choices.items():
        row: Dict[str, Any] = {"family": family, "arm": choice.setting.arm, "rate": choice.setting.rate, "matched": choice.matched,
                               "chosen_new": choice.new, "chosen_kept": choice.kept}
        found.append({**row, **_numbers(judged, family)})
    if BASE in judged.values:
        found.insert(0, {"family": BASE, "arm": BASE, **dict.fromkeys(("rate", "matched", "chosen_new", "chosen_kept"), ""),
                         **_numbers(judged, BASE)})
    return found


def _numbers(judged: Judged, family: str) -> Dict[str, Any]:
    found: Dict[str, Any] = {}
    for measure, one in judged.values[family].items():
        found.update({measure: one and one.mean, f"{measure}_low": one and one.low, f"{measure}_high": one and one.high})
        if measure == "new":
            found.update(seeds=one.seeds if one else 0, tasks=one.tasks if one else 0)
    return found


def versus_rows(judged: Judged) -> List[Dict[str, Any]]:
    """A row a family and way of choosing: the subject minus it."""
    found = []
    for how, versus in (("matched", judged.matched), ("own best", judged.best)):
        for one in versus:
            row: Dict[str, Any] = {"settings": how, "subject": judged.rule.subject, "family": one.family}
            for name, e in (("new", one.new), ("kept", one.kept)):
                row.update({name: e and e.mean, f"{name}_low": e and e.low, f"{name}_high": e and e.high,
                            f"{name}_seeds": e.seeds if e else 0, f"{name}_trials": e.trials if e else 0})
            found.append({**row, "p_not_worse": one.not_worse, "p_keeps_more": one.keeps_more, "p": one.p, "p_holm": one.holm,
                          "shown": one.shown})
    return found


# Text


def head(judged: Judged) -> str:
    """The rule in a sentence or two."""
    rule = judged.rule
    chosen = f"on training seeds {', '.join(map(str, rule.choose))}" if rule.choose else "on the reported seeds"
    return (f"Settings are chosen {chosen}: of each family, among those within {100 * rule.near:g} points of the best new-task success of "
            f"{rule.reference}, the one that keeps most ({rule.retention}). Reported on seeds "
            f"{', '.join(map(str, judged.seeds)) or 'none yet'}. Differences are paired over start states; intervals are 95 %, clustered "
            f"by training seed. A claim needs both: no loss of {100 * rule.margin:g} points on the new task, and more kept; p is adjusted "
            f"by Holm over {', '.join(rule.compare) if rule.compare else 'the families'}.")


def tables(judged: Judged) -> List[Table]:
    """What the text, the page and the files for a paper show."""
    rule, found = judged.rule, []
    rows = [[family, _setting(judged, family), _matched(judged, family), *(_shown(judged.values[family][m], m) for m in MEASURES)]
            for family in judged.values]
    found.append(Table("arms", "Each family at its chosen setting", ["family", "setting", "learns enough", "new (%)", "old (%)",
                                                                      "questions (%)", "action KL (nats)"], rows))
    for name, title, versus in (("matched", f"{rule.subject} minus each, at matched success (points)", judged.matched),
                                ("own_best", f"{rule.subject} minus each, each at its own best (points)", judged.best)):
        if versus:
            rows = [[one.family, _points(one.new), _points(one.kept), probability(one.not_worse), probability(one.keeps_more),
                     probability(one.holm), _claim(one)] for one in versus]
            found.append(Table(name, title, ["family", "new", "kept", "p not worse", "p keeps more", "p of both, Holm", "claim"], rows))
    volumes = volume_rows(judged)
    if volumes:
        rows = [[row["family"], f"{row['hypervolume']:.3f}", f"{row['more']:+.3f} [{row['more_low']:+.3f}, {row['more_high']:+.3f}]",
                 f"{100 * row['beyond_by']:+.1f}", f"{row['p_beyond']:.2f}"] if "more" in row
                else [row["family"], f"{row['hypervolume']:.3f}", "", "", ""] for row in volumes]
        found.append(Table("fronts", "Fronts of success and retention over all settings",
                           ["family", "hypervolume", f"{rule.subject} has more", f"{rule.subject} keeps more at worst",
                            "P(beyond everywhere)"], rows))
    if judged.parts is not None:
        rows = [[str(row["seeds"]), *(f"{row[f'episodes_{e}']:.2f}" for e in sizes.EPISODES)] for row in power_rows(judged)]
        needed = sizes.seeds_needed(EFFECT, judged.parts, 50)
        found.append(Table("power", f"Power to find {100 * EFFECT:g} points of retention against {rule.reference}, by training seeds "
                           f"and episodes a skill; with 50 episodes 80 % take {needed if needed else 'more than 1,000'} seeds",
                           ["seeds", *map(str, sizes.EPISODES)], rows))
    return found


def text(judged: Judged) -> str:
    """claims.md."""
    parts = [head(judged), *(f"**Note:** {note}." for note in judged.notes), *(table.markdown() for table in tables(judged))]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def _claim(one: Versus) -> str:
    return "" if one.holm is None else "shown" if one.shown else "not shown"


def _setting(judged: Judged, family: str) -> str:
    return str(judged.choices[family].setting) if family in judged.choices else ""


def _matched(judged: Judged, family: str) -> str:
    return "" if family not in judged.choices else "yes" if judged.choices[family].matched else "no"


def _shown(one: Optional[Estimate], measure: str) -> str:
    if one is None:
        return ""
    if measure == "action_kl":
        return f"{one.mean:.4f}"
    return percent(one.mean) + ("" if one.low is None else f" [{percent(max(one.low, 0.0))}, {percent(min(one.high, 1.0))}]")


def _points(one: Optional[Estimate]) -> str:
    return points(one.mean, one.low, one.high) if one else ""


def files(cells: Sequence[Cell], records: Sequence[Dict[str, Any]], rule: Rule) -> Dict[str, str]:
    """Tables by file name."""
    judged = judge(cells, records, rule)
    return {"claims.md": text(judged), **numbers(judged)}


def numbers(judged: Judged) -> Dict[str, str]:
    """The same without rounding, as CSV."""
    made = {"choices": choice_rows, "claims": versus_rows, "front": front_rows, "hypervolume": volume_rows, "power": power_rows}
    return {f"{name}.csv": to_csv(rows(judged)) for name, rows in made.items()}
