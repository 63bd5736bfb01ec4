"""The level above single runs: runs that differ in their training seed alone are one arm, with a mean and an interval over seeds.

Runs called `<arm>-s<seed>` belong together, and runs whose configurations are the same but for the seed. A seed counts as one value, the
mean over its own episodes: those of one training are alike, so that more of them make no second training. Intervals are Student's t over
the seeds' values; differences are taken between runs of the same seed. Nothing is added to a report with one seed per arm.
"""

import json
import math
import re
from dataclasses import dataclass, replace
from typing import Dict, List, Optional, Tuple

from vlakeep.reporting.arms import Arm
from vlakeep.reporting.compare import ARM_KEYS, Comparison, Difference, Measure, Value, flatten
from vlakeep.reporting.intervals import t_interval
from vlakeep.reporting.provenance import closing_of, interpolation_of
from vlakeep.reporting.tables import BADGES, escape, facts_html, to_csv, unit_of
from vlakeep.reporting.words import difference_text, value_text

# May differ between the seeds of an arm: what names a run or a folder, and what moves no bit.
APART = {key for key in ARM_KEYS if key == "name" or key == "root" or key.endswith("_dir") or "." in key} | {"seed", "evaluate", "export"}


@dataclass(frozen=True)
class Family:
    """Runs of one arm, by training seed. `name` is theirs without the seed."""

    name: str
    label: str
    runs: Dict[int, Arm]


def _settings(arm: Arm) -> str:
    kept = {key: value for key, value in flatten(arm.config).items() if key not in APART and key.split(".")[0] not in APART}
    before = kept.get("train.from_run")  # each seed goes on from the earlier run of its own seed
    kept.update({"train.from_run": re.sub(r"-s\d+$", "", before) if isinstance(before, str) else None,
                 # What is made of a run's adapter has the configuration of that run.
                 "closed to": (closing_of(arm) or {}).get("budget"), **{
                     f"interpolated {key}": (interpolation_of(arm) or {}).get(key) for key in ("alpha", "modules")}})
    return json.dumps(kept, sort_keys=True, default=str)


def families(comparison: Comparison) -> List[Family]:
    """Arms with at least two seeds, in the order of the report."""
    groups: Dict[str, Dict[int, Arm]] = {}
    for arm in comparison.tuned:
        seed = arm.config.get("seed")
        called = re.fullmatch(r"(.+)-s(\d+)", arm.run or arm.name)
        if not isinstance(seed, int):
            continue
        key = called[1] if called else _settings(arm)
        groups.setdefault(key, {}).setdefault(seed, arm)
    found = []
    for key, runs in groups.items():
        if len(runs) > 1:
            first = next(iter(runs.values()))
            name = first.name if key.startswith("{") else key
            found.append(Family(name, replace(first, name=name.rpartition("/")[2]).label, dict(sorted(runs.items()))))
    return found


def mixed(family: Family) -> List[str]:
    """A sentence when runs that are called seeds of one arm differ in more than the seed."""
    if len({_settings(arm) for arm in family.runs.values()}) == 1:
        return []
    return [f"the runs of {family.label} differ in more than their seed: their spread is not that of seeds alone"]


def family_value(comparison: Comparison, family: Family, key: str) -> Optional[Value]:
    """Mean and 95 % t interval over the seeds that have a value; n is their number. None for fewer than two."""
    values = [value.mean for value in (comparison.value(arm, key) for arm in family.runs.values()) if value is not None]
    return Value(*t_interval(values), n=len(values)) if len(values) > 1 else None


def family_difference(comparison: Comparison, family: Family, reference: Optional[Family], key: str) -> Difference:
    """Family minus reference, seed by seed; a reference of None is the base, which has no seed."""
    pairs: List[Tuple[float, float]] = []
    for seed, arm in family.runs.items():
        other = comparison.arms.get("base") if reference is None else reference.runs.get(seed)
        one, two = comparison.value(arm, key), comparison.value(other, key) if other is not None else None
        if one is not None and two is not None:
            pairs.append((one.mean, two.mean))
    if len(pairs) < 2:
        return Difference("absent", note="fewer than two seeds that both arms have")
    mean, low, high = t_interval([a - b for a, b in pairs])
    verdict = "noise"
    if low > 0 or high < 0:
        verdict = "better" if (low > 0) == comparison.measure(key).higher_is_better else "worse"
    return Difference(verdict, mean, low, high, len(pairs))


def reference_of(found: List[Family]) -> Optional[Family]:
    """The family of plain LoRA."""
    return next((family for family in found if family.name.rpartition("/")[2] == "baseline"), None) or next(
        (family for family in found if all(arm.config.get("method") == "baseline" for arm in family.runs.values())), None)


def rows(comparison: Comparison) -> List[Dict[str, object]]:
    """One row per arm and measure, full precision; rates are fractions."""
    found, made = families(comparison), []
    baseline = reference_of(found)
    for measure in comparison.measures:
        for family in found:
            value = family_value(comparison, family, measure.key)
            row: Dict[str, object] = {"measure": measure.key, "label": measure.label, "arm": family.name,
                                      "seeds": " ".join(map(str, family.runs)), "mean": value and value.mean, "low": value and value.low,
                                      "high": value and value.high, "n": value.n if value else 0}
            for name, d in (("baseline", _minus(comparison, family, baseline, measure)),
                            ("base", family_difference(comparison, family, None, measure.key))):
                row.update({f"minus_{name}": d.mean, f"minus_{name}_low": d.low, f"minus_{name}_high": d.high, f"vs_{name}": d.verdict,
                            f"pairs_{name}": d.pairs})
            made.append(row)
    return made


def _minus(comparison: Comparison, family: Family, baseline: Optional[Family], measure: Measure) -> Difference:
    if baseline is None or family is baseline:
        return Difference("absent")
    return family_difference(comparison, family, baseline, measure.key)


def _cells(comparison: Comparison) -> Tuple[List[str], List[List[str]]]:
    """Head and rows of the table, as text."""
    found = families(comparison)
    baseline = reference_of(found)
    others = [family for family in found if baseline is not None and family is not baseline]
    head = ["measure", *[f"{f.label} ({len(f.runs)} seeds)" for f in found]]
    head += [f"{family.label} minus {baseline.label}" for family in others if baseline]
    lines = []
    for measure in comparison.measures:
        cells = [measure.label + unit_of(measure), *[value_text(family_value(comparison, f, measure.key), measure) for f in found]]
        for family in others:
            d = _minus(comparison, family, baseline, measure)
            cells.append(f"{difference_text(d, measure)} {BADGES[d.verdict]}".strip())
        lines.append(cells)
    return head, lines


def files(comparison: Comparison) -> Dict[str, str]:
    """Tables by file name; none without an arm of several seeds."""
    if not families(comparison):
        return {}
    head, lines = _cells(comparison)
    text = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in (head, *lines)]
    text.insert(1, "|" + " --- |" * len(head))
    return {"tables/seeds.md": "\n".join(text) + "\n", "tables/seeds.csv": to_csv(rows(comparison))}


def seeds_html(comparison: Comparison) -> str:
    """The section of the page; empty without an arm of several seeds."""
    found = families(comparison)
    if not found:
        return ""
    head, lines = _cells(comparison)
    notes = "".join(f'<p class="hint">{escape(text[0].upper() + text[1:])}.</p>' for family in found for text in mixed(family))
    return ('<p class="hint">Mean over training seeds with 95 % t intervals; a seed counts as one value, the mean over its own trials. '
            "Differences are taken between runs of the same seed. The runs themselves stand above.</p>" + notes
            + facts_html([escape(cell) for cell in head], [[escape(cell) for cell in line] for line in lines], "Means over training seeds"))


def summary(comparison: Comparison) -> Dict[str, dict]:
    """For summary.json: family -> its seeds and, per measure, mean, low, high over them."""
    def entry(family: Family, key: str) -> dict:
        value = family_value(comparison, family, key)
        return {part: _finite(getattr(value, part)) if value else None for part in ("mean", "low", "high")}

    return {family.name: {"seeds": list(family.runs), "runs": [arm.name for arm in family.runs.values()],
                          "measures": {measure.key: entry(family, measure.key) for measure in comparison.measures}}
            for family in families(comparison)}


def _finite(value: Optional[float]) -> Optional[float]:
    return value if value is not None and math.isfinite(value) else None
