"""Figures of a study: the front of success and retention, forgetting per ability, values over training. Few families have colours, the rest
are grey: more than five are told apart by nobody."""

from typing import Dict, List, Optional, Tuple

import numpy as np

from vlakeep.core.study import BASE
from vlakeep.reporting.figures import INK, LINE, MUTED, PAPER, Figure, Style
from vlakeep.reporting.figures import legend as draw_legend
from vlakeep.studies.claims import Judged, best_rival
from vlakeep.studies.data import Setting
from vlakeep.studies.front import beaten, of_family
from vlakeep.studies.inference import difference

ROLES = {"subject": ("#cc79a7", "#e59cc4", "D"), "reference": ("#d55e00", "#ff8b3d", "o"), "rival": ("#0072b2", "#56b4e9", "^"),
         "oracle": ("#7b5ea7", "#b49ae0", "P"), BASE: ("#6f7680", "#a3abb5", "s")}
OVER_TIME = (("loss", "Training loss", "Cross entropy of the new task's action tokens.", "loss"),
             ("kl", "Divergence from the base on the probe", "Nats per answer token on probe items that nothing was estimated from; "
              "dashed: the budget of the loop.", "KL (nats)"),
             ("opening", "Opening", "What the loop opens: 0 closes all, 1 is plain LoRA.", "opening"),
             ("d", "Drift d", "What the Thermostat measures.", "drift d"),
             ("gamma", "Gain of fragile directions", "What the Thermostat sets.", "gamma"),
             ("beta", "Gain of plastic directions", "What the Thermostat sets.", "beta"))


def highlighted(judged: Judged) -> Dict[str, str]:
    """Family -> its role: the subject, the reference, the best rival and the best oracle."""
    rule = judged.rule
    found = {rule.reference: "reference", rule.subject: "subject"}
    for role, family in (("rival", best_rival(judged)), ("oracle", best_rival(judged, oracles=True))):
        if family is not None:
            found.setdefault(family, role)
    return {family: role for family, role in found.items() if family in judged.choices}


def style_of(judged: Judged) -> Style:
    found = {family: ROLES[role] for family, role in highlighted(judged).items()}
    return {**found, BASE: ROLES[BASE]} if BASE in judged.values else found


def figures(judged: Judged) -> List[Figure]:
    """Those that the records fill."""
    found, style = [], style_of(judged)
    if judged.front is not None:
        found.append(Figure(
            "front", "Success on the new task against what is kept",
            "A small mark is a setting, a line the front of a family over its settings; large marks are the settings that the rule chose, "
            "with 95 % intervals over training seeds. Up is more learned, right is more kept. Grey: the other families.",
            lambda figure, narrow: _front(figure, judged, style), (6.6, 5.0), (4.1, 4.4)))
    ways = {family: way for family in highlighted(judged) if (way := _way(judged, family))}
    if ways:
        found.append(Figure(
            "steps", "Success and retention over training", "Each line is a family's chosen rate from the base on, a mark a checkpoint "
            "with its step: up is more learned, right is more kept. The large mark is the end of the runs; means over tasks and reported "
            "seeds.",
            lambda figure, narrow: _steps(figure, judged, style, ways), (6.6, 5.0), (4.1, 4.4)))
    abilities = _abilities(judged)
    if abilities and BASE in judged.values and style:
        height = 1.2 + len(abilities) * (0.2 + 0.13 * (len(style) - 1))
        found.append(Figure(
            "forgetting", "Forgetting per ability", "Base minus arm in percentage points at the chosen settings: to the right is lost, to "
            "the left gained. Whiskers are 95 % intervals, paired over start states and clustered by training seed.",
            lambda figure, narrow: _forgetting(figure, judged, style, abilities), (6.6, max(4.6, height)), (4.1, height)))
    for key, title, caption, label in OVER_TIME:
        having = {family: curve for family in style if (curve := _curve(judged, family, key)) is not None}
        if having:
            found.append(Figure(key, title, caption + " Lines are means over tasks and seeds, bands from the lowest to the highest seed.",
                                lambda figure, narrow, key=key, label=label, having=having: _over_time(
                                    figure, judged, style, key, label, having), (4.1, 2.9)))
    return found


def _abilities(judged: Judged) -> List[str]:
    return [name for kind in ("old", "questions") for name in judged.data.abilities(kind)]


def _front(figure, judged: Judged, style: Style) -> None:
    axes, front = figure.add_subplot(), judged.front
    for family in dict.fromkeys(front.families):
        colour, _, marker = style.get(family, (MUTED, MUTED, "."))
        new, kept = (values[0] for values in of_family(front, family)[:2])
        known = family in style
        axes.plot(100 * kept, 100 * new, linestyle="none", color=colour, marker=marker, markersize=4 if known else 5,
                  alpha=0.65 if known else 0.45, zorder=2)
        best = ~beaten(new[None], kept[None])[0]
        order = np.argsort(kept[best])
        if known:
            axes.plot(100 * kept[best][order], 100 * new[best][order], color=colour, linewidth=1.1, alpha=0.8, zorder=2)
    # Where words stand already, and the large marks, which would hide some.
    named = [(values[judged.rule.retention].mean, values["new"].mean) for family, values in judged.values.items()
             if family in style and values["new"] and values[judged.rule.retention]]
    for family, values in judged.values.items():
        new, kept = values["new"], values[judged.rule.retention]
        if new is None or kept is None:
            continue
        colour, _, marker = style.get(family, (MUTED, MUTED, "."))
        if family in style:
            # A t interval of few seeds goes beyond what a rate can be.
            bars = [[[100 * (e.mean - max(0.0, e.low))], [100 * (min(1.0, e.high) - e.mean)]] if e.low is not None else None
                    for e in (kept, new)]
            axes.errorbar(100 * kept.mean, 100 * new.mean, xerr=bars[0], yerr=bars[1], color=colour, marker=marker, markersize=9, capsize=3,
                          elinewidth=1.3, linestyle="none", label=family, markeredgecolor=PAPER, zorder=4)
            continue
        axes.plot(100 * kept.mean, 100 * new.mean, linestyle="none", color=colour, marker=marker, markersize=5, alpha=0.45, zorder=2)
        if all(abs(kept.mean - x) > 0.12 or abs(new.mean - y) > 0.035 for x, y in named):
            named.append((kept.mean, new.mean))
            axes.annotate(family, (100 * kept.mean, 100 * new.mean), xytext=(4, 3), textcoords="offset points", fontsize=6.5, color=MUTED)
    axes.margins(0.08)
    for limits, of in ((axes.set_xlim, axes.get_xlim()), (axes.set_ylim, axes.get_ylim())):
        limits(max(-4.0, of[0]), min(104.0, of[1]))
    axes.set_xlabel("old abilities kept (%)  \u2192 keeps more")
    axes.set_ylabel("success on the new task (%)  \u2192 learns more")
    draw_legend(figure, axes)


Way = List[Tuple[int, float, float]]  # step, new, kept


def _way(judged: Judged, family: str) -> Way:
    """Means over the reported seeds at the checkpoints of the chosen setting's runs, the base at step 0 before them; [] without any."""
    def point(step: int, setting: Setting) -> Way:
        new, kept = (judged.data.mean(setting, measure, judged.seeds) for measure in ("new", judged.rule.retention))
        return [] if new is None or kept is None else [(step, new, kept)]

    on_the_way = [one for step, setting in judged.data.stops(judged.choices[family].setting) for one in point(step, setting)]
    return [*point(0, Setting(BASE, 0.0)), *on_the_way] if len(on_the_way) > 1 else []


def _steps(figure, judged: Judged, style: Style, ways: Dict[str, Way]) -> None:
    axes = figure.add_subplot()
    for family, way in ways.items():
        colour, _, marker = style[family]
        steps, new, kept = np.array(way).T * np.array([[1], [100], [100]])
        axes.plot(kept, new, color=colour, marker=marker, markersize=4, linewidth=1.2, zorder=3)
        axes.plot(kept[-1:], new[-1:], color=colour, marker=marker, markersize=9, linestyle="none", markeredgecolor=PAPER, label=family,
                  zorder=4)
        shown: List[Tuple[float, float]] = []  # numbers on one another are read by nobody
        for step, x, y in zip(steps, kept, new):
            if step and all(abs(x - a) > 3 or abs(y - b) > 4 for a, b in shown):
                shown.append((x, y))
                axes.annotate(f"{step:g}", (x, y), xytext=(5, -3), textcoords="offset points", fontsize=6.5, color=MUTED)
    axes.margins(0.1)
    axes.set_xlabel("old abilities kept (%)  \u2192 keeps more")
    axes.set_ylabel("success on the new task (%)  \u2192 learns more")
    draw_legend(figure, axes)


def _forgetting(figure, judged: Judged, style: Style, abilities: List[str]) -> None:
    axes = figure.add_subplot()
    families = [family for family in style if family != BASE]
    thick = 0.8 / len(families)
    for index, family in enumerate(families):
        drawn = False
        for row, name in enumerate(abilities):
            own = judged.choices[family].setting
            e = difference(judged.data, own, Setting(BASE, 0.0), name, judged.seeds, judged.rule.draws)
            if e is None:
                continue
            bars = [[100 * (e.high - e.mean)], [100 * (e.mean - e.low)]] if e.low is not None else None
            axes.barh(row - 0.4 + thick * (index + 0.5), -100 * e.mean, thick * 0.9, color=style[family][0],
                      label=None if drawn else family, xerr=bars, error_kw={"ecolor": INK, "elinewidth": 0.9, "capsize": 2})
            drawn = True
    axes.axvline(0, color=INK, linewidth=1.0)
    axes.set_yticks(range(len(abilities)), [name.partition(":")[2].replace("_", " ") for name in abilities])
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.invert_yaxis()
    axes.set_xlabel("base minus arm (points)  \u2192 forgotten")
    draw_legend(figure, axes)


Curve = Tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # steps, mean, lowest seed, highest seed


def _curve(judged: Judged, family: str, key: str) -> Optional[Curve]:
    """Over the steps that all runs of the chosen setting have."""
    if family not in judged.choices:
        return None
    seeds: Dict[int, List[Dict[int, float]]] = {}
    for record in judged.data.records(judged.choices[family].setting):
        columns = record["curves"]
        if key in columns and (record["seed"] in judged.seeds or not judged.seeds):
            own = {step: value for step, value in zip(columns["step"], columns[key]) if value is not None}
            seeds.setdefault(record["seed"], []).append(own)
    runs = [run for own in seeds.values() for run in own]
    steps = sorted(set.intersection(*(set(run) for run in runs))) if runs else []
    if len(steps) < 2:
        return None
    table = np.array([[np.mean([run[step] for run in own]) for step in steps] for own in seeds.values()])
    return np.array(steps), table.mean(0), table.min(0), table.max(0)


def _over_time(figure, judged: Judged, style: Style, key: str, label: str, having: Dict[str, Curve]) -> None:
    axes, positive, values = figure.add_subplot(), True, []
    for family, (steps, mean, low, high) in having.items():
        axes.fill_between(steps, low, high, color=style[family][0], alpha=0.16, linewidth=0)
        axes.plot(steps, mean, color=style[family][0], label=family)
        values += [*mean]
        positive = positive and low.min() > 0
    target = budget(judged)
    if key == "kl" and target is not None:
        axes.axhline(target, color=INK, linestyle="--", linewidth=1.0)
    if positive and max(values) / min(values) > 30:
        axes.set_yscale("log")
    elif key == "kl" and min(values) >= 0 and max(values) > 0:
        axes.set_yscale("symlog", linthresh=1e-3)
        axes.set_ylim(bottom=0)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(label)
    axes.grid(True, color=LINE)
    draw_legend(figure, axes)


def budget(judged: Judged) -> Optional[float]:
    """The subject's thermostat.target, where its loop has one."""
    choice = judged.choices.get(judged.rule.subject)
    records = judged.data.records(choice.setting) if choice else []
    if not records or "opening" not in records[0]["curves"]:
        return None
    from vlakeep.core.config import ThermostatConfig

    return records[0]["settings"].get("thermostat.target", ThermostatConfig.target)
