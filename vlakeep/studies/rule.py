"""The rule of a study: what is compared with what, on which seeds, and how each arm's setting is chosen. Stated before anything is run.

    rule:
      subject: graded            # the family whose claim is tested
      reference: plain           # whose new-task success is to be matched
      choose: [1, 2, 3]          # training seeds on which settings are chosen; all others are reported
      margin: 0.05               # the new task counts as not worse when a loss of this much is excluded
      near: 0.03                 # a setting learns enough when its success is within this of the reference's best, on the choosing seeds
      retention: old             # old (skills), questions, or all (both)
      compare: [plain, gpm]      # families that the claim is against; without it all others, which costs power
      oracles: [replay_oracle]   # families that see old data: compared, and no rivals for the best of those that do not
      draws: 10000               # of the bootstrap

**Matched success.** Of each family, among the settings (arm and rate) whose new-task success on the choosing seeds is within `near` of the
best that the reference reaches there, the one that keeps most; ties go to the higher success and then to the lower rate. A family of which
no setting learns enough takes its own best, and is marked: what it keeps is no answer to what is kept at that success.

**Own best.** Of each family the setting of the highest new-task success on the choosing seeds.
"""

from dataclasses import dataclass, field, fields
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

from vlakeep.core.config import ConfigError
from vlakeep.core.study import BASE, Cell
from vlakeep.studies.data import Data, Setting

RETENTION = ("old", "questions", "all")


@dataclass(frozen=True)
class Rule:
    subject: str
    reference: str
    choose: List[int] = field(default_factory=list)
    margin: float = 0.05
    near: float = 0.03
    retention: str = "old"
    compare: List[str] = field(default_factory=list)
    oracles: List[str] = field(default_factory=list)
    draws: int = 10000


class Choice(NamedTuple):
    """A family's setting, its means on the choosing seeds, and whether it learns enough there."""

    family: str
    setting: Setting
    new: float
    kept: float
    matched: bool


def read_rule(tree: Dict[str, Any], cells: Sequence[Cell]) -> Optional[Rule]:
    """The rule of a study file; None without one. ConfigError with all that is wrong with it."""
    given = tree.get("rule")
    if given is None:
        return None
    if not isinstance(given, dict):
        raise ConfigError(f"`rule` must be a table of names and values, such as `subject: graded`, not {given!r}")
    known = {one.name: one for one in fields(Rule)}
    families = {cell.family for cell in cells if not cell.is_base}
    wrong = [f"`rule.{key}` is unknown; there are {', '.join(known)}" for key in given if key not in known]
    wrong += [f"`rule.{key}` is missing" for key in ("subject", "reference") if not given.get(key)]
    named = [given.get("subject"), given.get("reference"), *_list(given.get("oracles")), *_list(given.get("compare"))]
    wrong += [f"`rule`: {one} is no family of the study, which has {', '.join(sorted(families))}" for one in named
              if one and not (isinstance(one, str) and one in families)]
    if given.get("subject") and given.get("subject") == given.get("reference"):
        wrong.append(f"`rule`: {given['subject']} is subject and reference: nothing would be compared")
    if given.get("subject") in _list(given.get("compare")):
        wrong.append(f"`rule.compare` names the subject, {given['subject']}, itself")
    seeds = {cell.seed for cell in cells if not cell.is_base}
    wrong += [f"`rule.choose`: the study has no seed {seed}" for seed in _list(given.get("choose")) if seed not in seeds]
    if seeds and set(_list(given.get("choose"))) >= seeds:
        wrong.append("`rule.choose` has all seeds of the study: none is left that could be reported")
    wrong += [f"`rule.{key}` must be a number above 0 and below 1" for key in ("margin", "near")
              if key in given and not (isinstance(given[key], float) and 0 < given[key] < 1)]
    wrong += [f"`rule.{key}` must be a list" for key in ("choose", "compare", "oracles") if not isinstance(given.get(key, []), list)]
    if given.get("retention", "old") not in RETENTION:
        wrong.append(f"`rule.retention` must be one of {', '.join(RETENTION)}")
    if not isinstance(given.get("draws", 1), int) or given.get("draws", 100) < 100:
        wrong.append("`rule.draws` must be a whole number from 100 on")
    if wrong:
        raise ConfigError("\n".join(wrong))
    return Rule(**given)


def _list(value) -> list:
    return value if isinstance(value, list) else []


def families_of(cells: Sequence[Cell]) -> Dict[str, List[Setting]]:
    """Family -> its settings, in the order of the study."""
    found: Dict[str, List[Setting]] = {}
    for cell in cells:
        if not cell.is_base:
            found.setdefault(cell.family, [])
            if (setting := Setting(cell.arm, cell.rate)) not in found[cell.family]:
                found[cell.family].append(setting)
    return found


def reported(rule: Rule, data: Data) -> List[int]:
    """Seeds that are reported."""
    return [seed for seed in data.seeds if seed not in rule.choose]


def to_report(rule: Optional[Rule], cells: Sequence[Cell], records: Sequence[Dict[str, Any]], own_best: bool = False) -> List[Cell]:
    """The cells of the chosen settings on the seeds that do not choose, and the base's. ConfigError while nothing is chosen yet."""
    if rule is None or not rule.choose:
        raise ConfigError("--chosen: the study's rule names no seeds that choose (`rule.choose`, docs/study.md)")
    found = choose(rule, families_of(cells), Data(records), own_best)
    if not found:
        seeds = ", ".join(map(str, rule.choose))
        raise ConfigError(f"--chosen: no cell of {rule.reference} on the choosing seeds {seeds} is done: run these with --seeds first")
    settings = {one.setting for one in found.values()}
    return [cell for cell in cells if cell.is_base or (Setting(cell.arm, cell.rate) in settings and cell.seed not in rule.choose)]


def of_reported(rule: Optional[Rule], records: Sequence[Dict[str, Any]]) -> List[Dict[str, Any]]:
    """The records of the base and of the seeds that are reported; all without a rule."""
    return [one for one in records if rule is None or one["arm"] == BASE or one["seed"] not in rule.choose]


def choose(rule: Rule, families: Dict[str, List[Setting]], data: Data, own_best: bool = False) -> Dict[str, Choice]:
    """Family -> its setting by the rule, from the choosing seeds (all, where the rule names none). Families without a record are left out.

    own_best: the setting of the highest new-task success, whatever it keeps.
    """
    seeds = rule.choose or data.seeds
    means: Dict[str, List[Choice]] = {}
    for family, settings in families.items():
        for setting in settings:
            new, kept = (data.mean(setting, measure, seeds) for measure in ("new", rule.retention))
            if new is not None and kept is not None:
                means.setdefault(family, []).append(Choice(family, setting, new, kept, False))
    if rule.reference not in means:
        return {}
    enough = max(one.new for one in means[rule.reference]) - rule.near
    found = {}
    for family, choices in means.items():
        able = [one for one in choices if one.new >= enough - 1e-12]
        by_success = max(choices, key=lambda one: (one.new, one.kept, -one.setting.rate))
        best = by_success if own_best or not able else max(able, key=lambda one: (one.kept, one.new, -one.setting.rate))
        found[family] = best._replace(matched=best.new >= enough - 1e-12)
    return found
