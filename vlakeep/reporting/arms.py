"""Reading what an arm left behind: eval/<name>/ (summary.json, records.jsonl) and runs/<name>/ (metrics, provenance, config).

Everything is read before anything is judged, so that all missing inputs are named at once, each with the command that makes it.
"""

import glob
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

from vlakeep.core.checkpoint import list_checkpoints
from vlakeep.core.errors import quoted
from vlakeep.core.registry import method_class, method_names
from vlakeep.core.strict_yaml import read_mapping

LABELS = {
    "base": "Base model",
    "method": "Method (residual)",
    "method_lora_input": "Method (LoRA input)",
    "method_both": "Method (both sites)",
}
LABELS_ZH = {
    "base": "基座模型",
    "method": "本方法（残差处）",
    "method_lora_input": "本方法（LoRA 输入侧）",
    "method_both": "本方法（两处）",
}
# A run called like one of our arms is labelled by the site that it has really used.
SITES = {"residual": "method", "lora_input": "method_lora_input", "both": "method_both"}
# arm -> how its run is started, for the messages about missing ones
COMMANDS = {
    "base": "configs/baseline_lora.yaml",
    "baseline": "configs/baseline_lora.yaml",
    "method": "configs/method_icsm_hsw_thermostat.yaml",
    "method_lora_input": "configs/method_icsm_hsw_thermostat.yaml --hsw.site lora_input",
    "graded": "configs/method_graded.yaml",
}

Trials = Dict[Tuple[int, int], Optional[float]]  # (trial, seed) -> success 0/1 or value; None for a crash


@dataclass
class Arm:
    """One arm: `summary` is None when its training failed before there was anything to evaluate; `metrics` is [] for the base."""

    name: str
    summary: Optional[dict]
    run: str = ""  # name of the run
    trials: Dict[Tuple[str, str], Trials] = field(default_factory=dict)
    header: dict = field(default_factory=dict)
    metrics: List[dict] = field(default_factory=list)
    provenance: dict = field(default_factory=dict)
    config: dict = field(default_factory=dict)
    folders: Dict[str, Optional[Path]] = field(default_factory=dict)
    notes: List[str] = field(default_factory=list)
    path: List[Tuple[int, dict]] = field(default_factory=list)  # (step, summary) of the run's checkpoints that were evaluated

    @property
    def label(self) -> str:
        return LABELS.get(self._kind) or self._of_method("label") or self.name

    @property
    def label_zh(self) -> str:
        return LABELS_ZH.get(self._kind) or self._of_method("label_zh") or self.name

    def _of_method(self, which: str) -> Optional[str]:
        """The label of the method that the arm is called after."""
        return getattr(method_class(self.name), which) if self.name in method_names() else None

    @property
    def _kind(self) -> str:
        """Key of the labels."""
        site = (self.config.get("hsw") or {}).get("site")
        return SITES.get(site, self.name) if self.name in SITES.values() else self.name

    @property
    def status(self) -> str:
        """finished, failed, interrupted, running; `not trained` for the base; `unknown` without provenance."""
        if self.folders.get("run") is None:
            return "not trained" if self.name == "base" else "unknown"
        return self.provenance.get("status") or "unknown"

    @property
    def session(self) -> dict:
        sessions = self.provenance.get("sessions") or [{}]
        return sessions[-1]

    @property
    def failure(self) -> Optional[str]:
        """Last line of the traceback of a run that did not finish, without the exception's class."""
        trace = (self.session.get("traceback") or "").strip()
        return re.sub(r"^[\w.]+: ", "", trace.splitlines()[-1].strip()) if trace and self.status != "finished" else None

    @property
    def train_seconds(self) -> Optional[float]:
        """Wall-clock of the logged steps; 0 for the base, None when unknown. `seconds` starts anew when a run was resumed."""
        if self.folders.get("run") is None:
            return 0.0 if self.name == "base" else None
        total = last = 0.0
        seen = False
        for value in self.values("seconds")[1]:
            if value < last:
                total += last
            last, seen = value, True
        return total + last if seen else None

    def values(self, key: str) -> Tuple[List[int], List[float]]:
        """(steps, values) of a metric where it is present and finite."""
        pairs = [(row["step"], float(row[key])) for row in self.metrics if is_number(row.get(key))]
        return [step for step, _ in pairs], [value for _, value in pairs]

    def nonfinite(self, key: str) -> int:
        """Logged steps on which the metric was NaN or infinite (stored as null)."""
        return sum(key in row and not is_number(row[key]) for row in self.metrics)

    @property
    def last_step(self) -> Optional[int]:
        return self.metrics[-1]["step"] if self.metrics else None


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def load_arms(folders: Dict[str, Dict[str, Any]]) -> Dict[str, Arm]:
    """Read every arm. Its folders: "run" and "eval"; "old", where older versions have put the evaluation; and the "name" of the run.

    Raises ValueError without arms, FileNotFoundError listing every missing input with its command.
    """
    if not folders:
        raise ValueError("a report needs at least one arm, e.g. --runs base,baseline,method")
    missing, arms = [], {}
    for name, places in folders.items():
        arm = Arm(name, None, folders={key: Path(places[key]) if places.get(key) else None for key in ("eval", "run", "old")})
        arm.run = places.get("name") or next((folder.name for folder in (arm.folders["run"], arm.folders["eval"]) if folder), name)
        _load_run(arm, missing)
        _load_eval(arm, missing)
        arms[name] = arm
    _compare_drifts(arms)
    if missing:
        raise FileNotFoundError("the report lacks inputs:\n  " + "\n  ".join(missing))
    return arms


def _load_run(arm: Arm, missing: List[str]) -> None:
    folder = arm.folders["run"]
    if folder is None:
        if arm.name != "base":
            arm.notes.append("no run folder was given: training curves and provenance are missing")
        return
    config = COMMANDS.get(arm.name, "CONFIG.yaml")
    if not (folder / "metrics.jsonl").is_file() and not (folder / "provenance.json").is_file():
        missing.append(f"no training run of arm `{arm.name}` at {folder}: "
                       f"`vlakeep train --config {config} --name {quoted(arm.run)}`")
        return
    arm.metrics = [row for row in _read_jsonl(folder / "metrics.jsonl", arm.notes) if isinstance(row.get("step"), int)]
    if not arm.metrics:
        arm.notes.append("metrics.jsonl is empty: training logged no step")
    if (folder / "provenance.json").is_file():
        arm.provenance = _read_json(folder / "provenance.json")
    else:
        arm.notes.append("provenance.json is missing: what this run was made from is unknown")
    if (folder / "config.yaml").is_file():
        try:
            arm.config = read_mapping(folder / "config.yaml", "its settings are not compared")
        except ValueError as error:
            arm.notes.append(str(error))


def _load_eval(arm: Arm, missing: List[str]) -> None:
    folder = arm.folders["eval"]
    if folder is None or not (folder / "summary.json").is_file():
        if arm.status == "failed":
            arm.notes.append("not evaluated: training stopped before there was anything to evaluate")
            return
        config = quoted(arm.folders["run"] / "config.yaml") if arm.config else COMMANDS.get(arm.name, "CONFIG.yaml")
        missing.append(
            f"no evaluation of arm `{arm.name}` at {folder}: "
            f"`vlakeep evaluate --config {config} --evaluate.target {quoted(arm.run)}`"
        )
        return
    arm.summary = _read_json(folder / "summary.json")
    steps: Dict[int, Path] = {}
    for own in filter(None, (arm.folders["old"], folder)):
        for place in own.parent.glob(f"{glob.escape(own.name)}-step_*"):
            step = place.name.rpartition("_")[2]
            if step.isdigit() and (place / "summary.json").is_file():
                steps[int(step)] = place
    arm.path = [(step, _read_json(steps[step] / "summary.json")) for step in sorted(steps)]
    for row in _read_jsonl(folder / "records.jsonl", arm.notes):
        if "kind" not in row or "trial" not in row:
            arm.header.update(row.get("header") or {})
            continue
        outcome = row.get("value") if row["kind"] == "retention" else row.get("success")
        if row.get("crash") is not None or outcome is None or not is_number(outcome):
            outcome = None
        trials = arm.trials.setdefault((row["kind"], row["ability"]), {})
        trials[(row["trial"], row.get("seed", 0))] = None if outcome is None else float(outcome)
    _check_summary(arm)
    _check_weights(arm)


def _check_weights(arm: Arm) -> None:
    """Note where the evaluation is of other weights than the run's curves end with: the run went on, or was made again."""
    run, weights = arm.folders["run"], (arm.summary or {}).get("weights")
    steps: Dict[int, str] = {}
    for step, folder in list_checkpoints(run) if run is not None and weights else ():
        try:
            steps[step] = json.loads((folder / "manifest.json").read_text())["files"]["adapter/adapter_model.safetensors"]["sha256"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
    if not steps or steps[max(steps)] == weights:
        return
    known = [step for step, sha256 in steps.items() if sha256 == weights]
    of = f"the checkpoint of step {max(known)}" if known else f"an adapter ({weights[:8]}) that is no checkpoint of the run any more"
    arm.notes.append(f"the evaluation is of {of}, and the run has gone on to step {max(steps)}: its success does not belong to the end of "
                     "these curves; run `vlakeep evaluate` again")


def _compare_drifts(arms: Dict[str, Arm]) -> None:
    """Note where the drifts of two arms are over another probe, other items of it or other layers."""
    measured = [(arm, arm.summary["drift_of"]) for arm in arms.values() if arm.summary and arm.summary.get("drift_of")]
    for arm, made in measured[1:]:
        other, first = measured[0]
        differ = [f"{key} {str(first.get(key))[:12]} and {str(made.get(key))[:12]}" for key in made if made[key] != first.get(key)]
        if differ:
            arm.notes.append(f"its drift cannot be compared with that of {other.name}: {', '.join(differ)}")


def _check_summary(arm: Arm) -> None:
    """Note where summary.json and records.jsonl tell different stories (one of them is stale)."""
    entries = [("skill", (arm.summary.get("new_skill") or {}).get("name"), arm.summary.get("new_skill"))]
    entries += [(value.get("group", "skill"), name, value) for name, value in (arm.summary.get("abilities") or {}).items()]
    stale = []
    for kind, name, value in entries:
        done = [v for v in arm.trials.get((kind, name), {}).values() if v is not None]
        if value and (len(done) != value.get("n", len(done)) or (done and abs(sum(done) / len(done) - value["mean"]) > 1e-6)):
            stale.append(name)
    if stale:
        arm.notes.append(f"summary.json and records.jsonl disagree on {', '.join(stale)}: run `vlakeep evaluate` again")


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): delete it and run the stage that writes it again") from error


def _read_jsonl(path: Path, notes: List[str]) -> List[dict]:
    """Rows of a JSON-lines file; an unfinished last line (a killed process) is noted and left out."""
    if not path.is_file():
        notes.append(f"{path.name} is missing")
        return []
    lines = path.read_bytes().splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise ValueError(f"{path}, line {number} is not valid JSON ({error}): the file is damaged") from error
            notes.append(f"the last line of {path.name} is unfinished and was left out")
    return [row for row in rows if isinstance(row, dict)]
