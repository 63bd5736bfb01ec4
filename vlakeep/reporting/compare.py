"""Arms side by side: values, paired differences and their verdicts.

A difference is "better" or "worse" only when its 95 % interval excludes zero, and it is taken only over the same initial states:
arms that were evaluated on other trials are not compared (verdict "unpaired", with the reason).
"""

from dataclasses import dataclass, field, replace
from typing import Callable, Dict, List, Optional, Tuple

from vlakeep.reporting.arms import Arm, Trials, is_number
from vlakeep.reporting.intervals import mean_of, newcombe, paired_mean

# Keys in which arms may differ by what they are; any other difference between configurations confounds the comparison.
ARM_KEYS = (
    "name",
    "method",
    "options",
    "hsw",
    "thermostat",
    "icsm",
    "gains",
    "probe",
    "evaluate",
    "export",
    "root",
    "cache_dir",
    "data_root_dir",
    "probe_root_dir",
    "artifact_dir",
    "run_root_dir",
    "tmp_dir",
    "train.resume",
    "train.tensorboard",
    "train.use_wandb",
    "train.log_every",
    "train.save_every",
    "train.keep_last",
    "data.workers",
)

# Success counts as matched when the interval of the difference excludes that it is lower by more than this share. A difference
# within noise is no match by itself: that of two episodes always is.
MATCHED = 0.2


@dataclass(frozen=True)
class Measure:
    """One row of the tables. Units: percent (stored as a fraction), nats, seconds, or number."""

    key: str
    label: str
    section: str
    unit: str = "percent"
    higher_is_better: bool = True


@dataclass(frozen=True)
class Value:
    mean: float
    low: Optional[float] = None
    high: Optional[float] = None
    n: int = 0
    crashes: int = 0


@dataclass(frozen=True)
class Difference:
    """Arm minus reference. verdict: better, worse, noise, unpaired (see note), absent (one of the two has no value)."""

    verdict: str
    mean: Optional[float] = None
    low: Optional[float] = None
    high: Optional[float] = None
    pairs: int = 0
    dropped: int = 0
    note: str = ""


@dataclass
class Comparison:
    """All arms of one report. `wilson(successes, n) -> (mean, low, high)` sets the confidence level of paired rates."""

    arms: Dict[str, Arm]
    wilson: Callable[[int, int], Tuple[float, float, float]]
    measures: List[Measure] = field(default_factory=list)
    warnings: List[str] = field(default_factory=list)

    def __post_init__(self):
        self.abilities = _abilities(self.arms)
        names = {(arm.summary or {}).get("new_skill", {}).get("name") for arm in self.evaluated if arm.summary.get("new_skill")}
        self.new_skill = names.pop() if len(names) == 1 else None
        if names:
            self.warnings.append(
                f"the arms were evaluated on different new skills ({', '.join(sorted(map(str, names)))} and others)"
            )
        self.measures = self._measures()
        self.warnings += confounds(self.arms)

    @property
    def evaluated(self) -> List[Arm]:
        return [arm for arm in self.arms.values() if arm.summary is not None]

    @property
    def tuned(self) -> List[Arm]:
        return [arm for arm in self.arms.values() if arm.name != "base"]

    @property
    def methods(self) -> List[Arm]:
        return [arm for arm in self.tuned if arm.name != "baseline"]

    def _measures(self) -> List[Measure]:
        rows = [Measure("new", f"New skill: {self.new_skill}" if self.new_skill else "New skill", "Task")]
        for kind, title in (("skill", "Old skills"), ("question", "Visual questions")):
            names = [name for name, group in self.abilities.items() if group == kind]
            rows += [Measure(f"{kind}:{name}", name.replace("_", " "), title) for name in names]
            if len(names) > 1:
                rows.append(Measure(f"mean:{kind}", "mean", title))
        if self.abilities:
            rows.append(Measure("mean", "Mean old ability", "Retention"))
        rows += [
            Measure("kl", "Action-token KL from the base", "Retention", "nats", False),
            Measure("drift", "Representation drift", "Retention", "number", False),
            Measure("seconds", "Training time", "Cost", "seconds", False),
        ]
        return rows

    def measure(self, key: str) -> Measure:
        return next(measure for measure in self.measures if measure.key == key)

    def parts(self, key: str) -> List[str]:
        """Measures that a mean is taken over."""
        kinds = [key.split(":")[1]] if ":" in key else ["skill", "question"]
        return [f"{group}:{name}" for name, group in self.abilities.items() if group in kinds]

    def value(self, arm: Arm, key: str) -> Optional[Value]:
        """What an arm reached; None when it was not measured or had no trial that counts."""
        if key == "seconds":
            return None if arm.train_seconds is None else Value(arm.train_seconds)
        if arm.summary is None:
            return None
        if key == "drift":
            return Value(arm.summary["drift"]) if is_number(arm.summary.get("drift")) else None
        if key == "mean" or key.startswith("mean:"):
            parts = [self.value(arm, part) for part in self.parts(key)]
            if not parts or any(part is None for part in parts):
                return None
            mean, low, high = mean_of((part.mean, part.low, part.high) for part in parts)
            return Value(mean, low, high, sum(part.n for part in parts), sum(part.crashes for part in parts))
        if key == "kl":
            entry = arm.summary.get("retention_kl")
            if arm.name == "base" and not (entry or {}).get("n"):
                return Value(0.0)  # the base is the teacher
        elif key == "new":
            entry = arm.summary.get("new_skill")
        else:
            entry = (arm.summary.get("abilities") or {}).get(key.split(":", 1)[1])
        if not entry or not entry.get("n") or not is_number(entry.get("mean")):
            return None
        return Value(entry["mean"], entry.get("low"), entry.get("high"), entry["n"], entry.get("crashes", 0))

    def crashes(self, arm: Arm, key: str) -> Optional[int]:
        """Crashed trials, also where no trial at all is left to give a rate; None where crashes mean nothing."""
        if arm.summary is None or key in ("kl", "drift", "seconds"):
            return None
        if key == "new":
            return (arm.summary.get("new_skill") or {}).get("crashes", 0)
        if key == "mean" or key.startswith("mean:"):
            return sum(self.crashes(arm, part) for part in self.parts(key))
        return ((arm.summary.get("abilities") or {}).get(key.split(":", 1)[1]) or {}).get("crashes", 0)

    def difference(self, arm: Arm, reference: Arm, key: str) -> Difference:
        """Arm minus reference with a paired interval, or the reason why there is none."""
        measure = self.measure(key)
        if key == "mean" or key.startswith("mean:"):
            parts = [self.difference(arm, reference, part) for part in self.parts(key)]
            bad = [part for part in parts if part.verdict in ("unpaired", "absent")]
            if bad or not parts:
                return bad[0] if bad else Difference("absent", note="no abilities were evaluated")
            interval = mean_of((part.mean, part.low, part.high) for part in parts)
            return _judged(interval, measure, sum(p.pairs for p in parts), sum(p.dropped for p in parts))
        one, two = self.value(arm, key), self.value(reference, key)
        if one is None or two is None:
            return Difference("absent", note="no value for one of the two arms")
        if key in ("drift", "seconds"):
            return Difference("unpaired", one.mean - two.mean, note="one number per arm, so there is no interval")
        if key == "kl" and reference.name == "base":
            return _judged((one.mean, one.low, one.high), measure, one.n, 0)  # the KL is itself taken against the base
        pairs, dropped, why = pair(self._trials(arm, key), self._trials(reference, key))
        if why:
            return Difference("unpaired", one.mean - two.mean, note=why)
        if key == "kl":
            return _judged(paired_mean([a - b for a, b in pairs]), measure, len(pairs), dropped)
        both, first, second, neither = (sum(a == x and b == y for a, b in pairs) for x, y in ((1, 1), (1, 0), (0, 1), (0, 0)))
        return _judged(newcombe(both, first, second, neither, self.wilson), measure, len(pairs), dropped)

    def _trials(self, arm: Arm, key: str) -> Trials:
        if key == "new":
            return arm.trials.get(("skill", (arm.summary.get("new_skill") or {}).get("name")), {})
        if key == "kl":
            return next((trials for (kind, _), trials in arm.trials.items() if kind == "retention"), {})
        kind, name = key.split(":", 1)
        return arm.trials.get((kind, name), {})

    def path(self, arm: Arm) -> List[Tuple[int, Value, Value]]:
        """(step, mean old ability, new skill) of the arm's checkpoints that were evaluated on the same abilities, in order."""
        found = []
        for step, summary in sorted(arm.path, key=lambda pair: pair[0]):
            at = replace(arm, summary=summary)
            x, y = self.value(at, "mean"), self.value(at, "new")
            if x and y and summary["new_skill"].get("name") == self.new_skill:
                found.append((step, x, y))
        return found

    def matched(self, arm: Arm) -> Tuple[str, Difference]:
        """Is forgetting comparable with the baseline's? matched or higher: yes; lower: it learned less; unclear: too few trials
        to exclude that it learned much less (MATCHED); unknown: no pairing."""
        if "baseline" not in self.arms:
            return "unknown", Difference("absent", note="no baseline in this report")
        d = self.difference(arm, self.arms["baseline"], "new")
        if d.verdict == "noise":
            return "matched" if d.low >= -MATCHED else "unclear", d
        return {"better": "higher", "worse": "lower"}.get(d.verdict, "unknown"), d


def pair(one: Trials, two: Trials) -> Tuple[List[Tuple[float, float]], int, str]:
    """(pairs of outcomes, pairs dropped because one side crashed, reason for refusing or "")."""
    if not one or not two:
        return [], 0, "not paired: one arm has no trial records"
    if one.keys() != two.keys():
        only = len(one.keys() ^ two.keys())
        return (
            [],
            0,
            f"not paired: the arms were evaluated on different trials ({only} without a partner); evaluate both "
            "with the same settings",
        )
    pairs = [(one[key], two[key]) for key in sorted(one) if one[key] is not None and two[key] is not None]
    if not pairs:
        return [], len(one), "not paired: no trial ended without a crash in both arms"
    return pairs, len(one) - len(pairs), ""


def _judged(interval, measure: Measure, pairs: int, dropped: int) -> Difference:
    mean, low, high = interval
    verdict = "noise"
    if low > 0 or high < 0:
        verdict = "better" if (low > 0) == measure.higher_is_better else "worse"
    return Difference(verdict, mean, low, high, pairs, dropped)


def _abilities(arms: Dict[str, Arm]) -> Dict[str, str]:
    """Old abilities in reading order (skills first), name -> skill or question, over all arms."""
    found: Dict[str, str] = {}
    for arm in arms.values():
        for name, value in ((arm.summary or {}).get("abilities") or {}).items():
            found.setdefault(name, value.get("group", "skill"))
    return dict(sorted(found.items(), key=lambda item: item[1] != "skill"))


def flatten(tree: dict, prefix: str = "") -> Dict[str, object]:
    """Nested configuration -> dotted keys."""
    flat: Dict[str, object] = {}
    for key, value in tree.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


def config_changes(arm: Arm, reference: Arm) -> Dict[str, Tuple[object, object]]:
    """Keys that differ from the reference's configuration (names and folders left out): key -> (reference, arm)."""
    mine, theirs = flatten(arm.config), flatten(reference.config)
    skip = ("name", "root", "evaluate")
    return {
        key: (theirs.get(key), mine.get(key))
        for key in sorted({**mine, **theirs})
        if mine.get(key) != theirs.get(key) and key.split(".")[0] not in skip and not key.endswith("_dir")
    }


def confounds(arms: Dict[str, Arm]) -> List[str]:
    """What besides the method differs between the arms, one sentence each."""
    found = []
    reference = arms.get("baseline")
    for arm in arms.values():
        if reference is None or arm is reference or not arm.config or not reference.config:
            continue
        for key, (theirs, mine) in config_changes(arm, reference).items():
            if key not in ARM_KEYS and key.split(".")[0] not in ARM_KEYS:
                found.append(
                    f"{arm.label} and {reference.label} differ in {key} ({mine} against {theirs}): "
                    "a difference between them is not due to the method alone"
                )
    trained = [arm for arm in arms.values() if arm.provenance]
    for what, read in (
        ("base weights", lambda session: (session.get("hashes") or {}).get("base_weights")),
        ("commits of the code", lambda session: (session.get("source") or {}).get("commit")),
    ):
        values = {read(arm.session) for arm in trained} - {None}
        if len(values) > 1:
            found.append(f"the runs were made from different {what} ({', '.join(sorted(str(v)[:12] for v in values))})")
    bases = {arm.header.get("base") for arm in arms.values()} - {None}
    if len(bases) > 1:
        found.append("the arms were evaluated on different base models")
    return found
