"""Arms of a study that train nothing: each of their cells is made of the run of another arm's cell.

    wise_ft: {of: plain, alphas: [0.2, 0.4, 0.6, 0.8]}                    # vlakeep interpolate
    retain:  {of: plain, alphas: [0.5], modules: [q_proj, v_proj]}        # the same, of these linears alone
    regmean: {of: plain, close_to: [0.002, 0.015]}                        # vlakeep export --closed-only: budgets in nats
    stopped: {of: plain, at: [100, 200, 300], family: plain}              # checkpoints on the way: points of the same family

Every value is an arm of its own, ARM_VALUE, and all of them are settings of one family; `rates` takes some of the other arm's.
"""

import json
import re
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

from vlakeep.core.checkpoint import checkpoint_folder, latest_intact
from vlakeep.core.config import TrainConfig
from vlakeep.core.names import closed_name, interpolated_name
from vlakeep.core.storage import Storage

LISTS = {"alphas": "alpha", "close_to": "close_to", "at": "at"}  # key of an arm -> what one of its values is
KEYS = ("of", *LISTS, "modules", "family", "rates")
ADAPTER = "adapter/adapter_model.safetensors"
RECORDS = {"alpha": "interpolation.json", "close_to": "closing.json"}  # what interpolate.py and closing_pass.py leave beside the adapter


class Making(NamedTuple):
    """How an adapter is made of a run: `alpha` (of `modules`, none: all), `close_to` nats, or its checkpoint `at` a step."""

    how: str
    value: float
    modules: Tuple[str, ...] = ()

    def said(self, arm: str) -> Dict[str, Any]:
        """For a record."""
        return {"arm": arm, self.how: self.value, **({"modules": list(self.modules)} if self.modules else {})}

    def target(self, run: str) -> str:
        """What is evaluated."""
        if self.how == "at":
            return f"{run}/{checkpoint_folder('', int(self.value))}"
        return interpolated_name(run, self.value, self.modules) if self.how == "alpha" else closed_name(run, self.value)

    def words(self, run: str) -> List[str]:
        """The stage that makes the adapter, and its words; [] where it is there already."""
        if self.how == "at":
            return []
        own = ["--alphas", f"{self.value:g}", *(["--modules", ",".join(self.modules)] if self.modules else [])]
        closed = ["--export.close_to", f"{self.value:g}", "--closed-only"]
        stage, own = ("interpolate", own) if self.how == "alpha" else ("export", closed)
        return [stage, "--export.target", run, "--export.overwrite", "true", *own]


def weights(making: Making, run: str, storage: Storage) -> Optional[str]:
    """SHA-256 of the adapter that was made of the run's newest checkpoint in this way, or of its checkpoint; None where none is there."""
    if making.how == "at":
        return adapter_of(checkpoint_folder(storage.run_folder(run), int(making.value)))
    folder, source = storage.run_folder(making.target(run)), latest_intact(storage.run_folder(run))
    try:
        record = json.loads((folder / RECORDS[making.how]).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    made = latest_intact(folder) if record.get("adapter_sha256") == (source and adapter_of(source)) else None
    return adapter_of(made) if made else None


def adapter_of(checkpoint: Path) -> Optional[str]:
    """The hash in a checkpoint's manifest; None where there is none."""
    try:
        return json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))["files"][ADAPTER]["sha256"]
    except (OSError, ValueError, KeyError):
        return None


def kept_steps(train: TrainConfig) -> List[int]:
    """Steps of which a finished run has a checkpoint."""
    saved = [*range(train.save_every, train.steps, train.save_every), train.steps]
    return saved[-train.keep_last:]


def mistakes(name: str, own: Dict[str, Any], arms: Dict[str, Any], stream: bool) -> List[str]:
    """What is wrong with an arm of a study file that has `of`."""
    where, lists = f"`arms.{name}`", [key for key in LISTS if key in own]
    wrong = [f"{where}: an arm that is made of another takes {', '.join(KEYS)}, and not `{key}`" for key in own if key not in KEYS]
    of = arms.get(str(own["of"]), {"of": ""})
    if own["of"] == "base" or (isinstance(of, dict) and "of" in of):
        wrong.append(f"{where}: `of: {own['of']}` is no arm of the study that is trained")
    if stream:
        wrong.append(f"{where}: in a stream every task is trained on the run before, and no arm is made of another")
    if len(lists) != 1:
        return [*wrong, f"{where} needs one of {', '.join(LISTS)}"]
    values, whole = own[lists[0]], lists[0] == "at"
    if not isinstance(values, list) or not values or not all(_positive(one, whole) for one in values) or len(set(values)) < len(values):
        wrong.append(f"{where}: `{lists[0]}` must be a list of different {'whole ' if whole else ''}numbers above 0")
    modules = own.get("modules", [])
    if not isinstance(modules, list) or (modules and lists[0] != "alphas") or not all(re.fullmatch(r"\w+", str(one)) for one in modules):
        wrong.append(f"{where}: `modules` must be a list of linears such as q_proj, and belongs to `alphas`")
    return wrong


def _positive(value: Any, whole: bool) -> bool:
    return not isinstance(value, bool) and isinstance(value, int if whole else (int, float)) and value > 0


def makings(own: Dict[str, Any]) -> List[Making]:
    """One for each value of an arm."""
    key = next(key for key in LISTS if key in own)
    return [Making(LISTS[key], value, tuple(own.get("modules", ()))) for value in own[key]]
