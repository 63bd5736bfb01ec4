"""Names of runs, and where what belongs to a run or a base model lies.

A run is called `cell` or `group/cell`, and lies in run_root_dir/cell or run_root_dir/group/cell. Evaluations lie in
ROOT/eval/<model>/<benchmark>/<cell>: the base model by name and hash (model_key), the benchmark, and the run (or `base`), so that neither
two base models nor a run called like a suite can meet. Older versions had them in ROOT/eval/<cell> for the tabletop, and in
ROOT/eval/<benchmark>/<cell> for the others; those are still found, and one that was begun there goes on there.
"""

import glob
import json
from pathlib import Path
from typing import List, Optional, Sequence

from vlakeep.core.registry import benchmark_class
from vlakeep.core.storage import Storage

RECORDS = "records.jsonl"
HASH = 8  # characters of a model's hash in the name of a folder


def is_run_name(name: str) -> bool:
    """Whether a run may be called so: one part or two, none of which is empty, `.`, `..` or `base`, which names the untrained model."""
    parts = name.split("/")
    return len(parts) <= 2 and all(part not in ("", ".", "..", "base") for part in parts)


def run_name(folder: Path, storage: Storage) -> str:
    """Name of the run in a folder; of one that lies elsewhere the folder's own."""
    folder = Path(folder).absolute()
    name = folder.relative_to(storage.runs).as_posix() if storage.runs in folder.parents else folder.name
    return name if is_run_name(name) else folder.name


def closed_name(run: str, budget: float) -> str:
    """Name of the run that a closing pass makes of another's adapter (closing_pass.py)."""
    return f"{run}-closed-{budget:g}"


def interpolated_name(run: str, alpha: float, modules: Sequence[str] = ()) -> str:
    """Name of the run whose adapter is that of another times alpha (interpolate.py), in these linears (none: all)."""
    return f"{run}-alpha-{alpha:g}" + "".join(f"-{name}" for name in modules)


def target_folder(target: str, storage: Storage) -> Path:
    """Where the name of a run, RUN/checkpoints/step_N of one, or a path leads. `group/cell` is a run where there is such a run, or nothing
    else of this path."""
    if "/" not in target or (is_run_name(target) and ((storage.runs / target).is_dir() or not Path(target).exists())):
        return storage.run_folder(target)
    inside = storage.runs / target  # RUN/checkpoints/step_N
    return inside if (inside / "manifest.json").is_file() and not Path(target).exists() else Path(target).absolute()


def model_key(name: str, weights_sha256: str) -> str:
    """Folder of the evaluations of a base model and its runs, e.g. openvla-7b-0123abcd."""
    return f"{name}-{weights_sha256[:HASH]}"


def evaluation_name(name: str, settings) -> str:
    """Under which the evaluation of a target, or of what it is kept as, lies: with what its benchmark tells controls apart by. settings:
    config.evaluate."""
    return name + benchmark_class(settings.benchmark).suffix_of(settings)


def old_evaluation_folder(storage: Storage, benchmark: str, cell: str) -> Path:
    """Where older versions have put an evaluation."""
    return storage.eval / cell if benchmark == "tabletop" else storage.eval / benchmark / cell


def evaluation_folder(storage: Storage, model: str, benchmark: str, cell: str, weights: str, base: str) -> Path:
    """Where an evaluation belongs. `model`: model_key, or what stands for it; `cell`: the run, `RUN-step_N`, `base`.

    An evaluation of the same weights (`weights`, on those of the base, `base`) that an older version has begun goes on at its old place.
    """
    new, old = storage.eval / model / benchmark / cell, old_evaluation_folder(storage, benchmark, cell)
    return old if not (new / RECORDS).is_file() and _begun(old) == (weights, base) else new


def _begun(folder: Path) -> Optional[tuple]:
    """(weights, base weights) of the records in a folder; None without any."""
    try:
        with open(folder / RECORDS, encoding="utf-8") as file:
            header = json.loads(file.readline())["header"]
        return header.get("weights"), header.get("base")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def find_evaluation(storage: Storage, benchmark: str, cell: str, base: Optional[str] = None, model: Optional[str] = None) -> Path:
    """The evaluation that is there, else the place where it is missing. `base`: hash of the base weights; `model`: the base model's name.

    Where the hash is known it decides, and the name only between copies. Raises ValueError where evaluations of several models are left.
    """
    key = f"{glob.escape(model) if model else '*'}-{base[:HASH] if base else '?' * HASH}"
    found: List[Path] = []
    for pattern in [key] + ([f"*-{base[:HASH]}"] if base else []):
        found = found or sorted(storage.eval.glob(f"{pattern}/{glob.escape(benchmark)}/{glob.escape(cell)}"))
    if len(found) > 1:
        raise ValueError(f"{storage.eval} has evaluations of `{cell}` on {benchmark} by several base models "
                         f"({', '.join(path.relative_to(storage.eval).parts[0] for path in found)}): put aside those that are not meant")
    old = old_evaluation_folder(storage, benchmark, cell)
    if not found and any((old / name).is_file() for name in ("summary.json", RECORDS)):
        return old
    return found[0] if found else storage.eval / key.replace("?" * HASH, "*") / benchmark / cell
