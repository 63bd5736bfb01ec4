"""Stage `vlakeep report`: compare evaluated runs in tables, figures and one self-contained HTML page.

    vlakeep report --config configs/method_icsm_hsw_thermostat.yaml --runs base,baseline,method,method_lora_input --out DIR

--runs names the arms; `arm=run` takes a run of another name (method=my_run). The arms base and baseline are the references of all
differences. --evaluate.benchmark says which of their evaluations is meant, as for `vlakeep evaluate`. --out is a folder,
ROOT/report when left out; --title and --seconds (time of the whole experiment) are optional.

reads:  ROOT/eval/<base model>/<benchmark>/<run>/summary.json and records.jsonl, or where older versions have put them (core/names.py);
        run_root_dir/<run>/metrics.jsonl, provenance.json and config.yaml
writes: index.html, summary.json, provenance.json, tables/*.md and *.csv, figures/*.png and *.svg

Runs that differ in their seed alone, or are called <arm>-s<seed>, are summed up over seeds as well (reporting/seeds.py).
"""

import json
import sys
import time
from pathlib import Path
from typing import Any, Dict, List, Optional

from tqdm import tqdm

from vlakeep.core.config import ConfigError, EvaluateConfig
from vlakeep.core.names import find_evaluation, old_evaluation_folder
from vlakeep.core.options import read
from vlakeep.core.stages import REPORT
from vlakeep.core.storage import Storage, atomic_dir, find_checkpoint
from vlakeep.core.target import base_of
from vlakeep.reporting import seeds, tables, words
from vlakeep.reporting.arms import Arm, load_arms
from vlakeep.reporting.compare import Comparison
from vlakeep.reporting.figures import figures, save_files
from vlakeep.reporting.page import page

OURS = {"index.html", "summary.json", "provenance.json", "tables", "figures"}


def build_report(
    root: Optional[Path],
    arms: Dict[str, Dict[str, Any]],
    out: Path,
    title: str = "vlakeep report",
    seconds: Optional[float] = None,
) -> Path:
    """Write the report of `arms` (arm -> what load_arms takes) to the folder `out`; returns its index.html.

    `root` (storage root or None) shortens the paths on the page. `seconds`: what the whole experiment took; when None, training
    and evaluation times are added up. Raises FileNotFoundError naming every missing input with the command that makes it, and
    ValueError for damaged inputs or when `out` holds files of something else.
    """
    from vlakeep.benchmarks.records import wilson

    comparison = Comparison(load_arms(arms), wilson)
    if seconds is None:
        seconds = total_seconds(comparison)
    out = Path(out).expanduser().absolute()
    foreign = {entry.name for entry in out.iterdir()} - OURS if out.is_dir() else set()
    if foreign or (out.exists() and not out.is_dir()):
        raise ValueError(
            f"{out} holds files of something else ({', '.join(sorted(foreign)[:5]) or 'it is a file'}): "
            "give an empty folder with --out"
        )
    drawings = figures(comparison)
    with atomic_dir(out) as folder:
        for name in ("tables", "figures"):
            (folder / name).mkdir()
        for figure in tqdm(drawings, desc="figures", leave=False):
            save_files(figure, folder / "figures")
        files = {
            "index.html": page(comparison, drawings, title, seconds, root),
            "summary.json": json.dumps(make_summary(comparison, seconds), indent=1, allow_nan=False) + "\n",
            "provenance.json": json.dumps({name: arm.provenance for name, arm in comparison.arms.items()}, indent=1) + "\n",
            "tables/comparison.md": tables.comparison_md(comparison),
            "tables/differences.md": tables.differences_md(comparison),
            "tables/comparison.csv": tables.to_csv(tables.rows_csv(comparison)),
            **seeds.files(comparison),
        }
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
    print(words.headline(comparison))
    return out / "index.html"


def make_summary(comparison: Comparison, seconds: float) -> dict:
    """The report's summary.json; rates are fractions, a value that is not known is null."""

    def interval(value) -> dict:
        return {key: getattr(value, key) if value else None for key in ("mean", "low", "high")}

    def entry(arm: Arm) -> dict:
        drift = comparison.value(arm, "drift")
        abilities = {
            name: interval(comparison.value(arm, f"{group}:{name}"))
            for name, group in comparison.abilities.items()
            if arm.summary is not None and name in (arm.summary.get("abilities") or {})
        }
        return {
            "new_skill": interval(comparison.value(arm, "new")),
            "abilities": abilities,
            "drift": drift.mean if drift else None,
            "train_seconds": arm.train_seconds,
        }

    found = seeds.summary(comparison)
    return {"seconds": seconds, "arms": {name: entry(arm) for name, arm in comparison.arms.items()}, **({"seeds": found} if found else {})}


def total_seconds(comparison: Comparison) -> float:
    """Training and evaluation times of all arms together."""
    return sum((arm.train_seconds or 0.0) + ((arm.summary or {}).get("seconds") or 0.0) for arm in comparison.arms.values())


def arms_from_runs(runs: str, storage: Storage, benchmark: str = EvaluateConfig.benchmark, model: Optional[str] = None
                   ) -> Dict[str, Dict[str, Any]]:
    """`base,baseline,method=my_run` -> folders of each arm. `model`: name of the base model. Raises ConfigError for an empty or doubled
    name."""
    names: Dict[str, str] = {}
    for part in runs.split(","):
        arm, _, run = (piece.strip() for piece in part.partition("="))
        if not arm or arm in names:
            raise ConfigError(
                f"--runs {runs}: {f'the arm {arm} comes twice' if arm else 'an arm has no name'}; "
                "write e.g. --runs base,baseline,method=my_run"
            )
        names[arm] = run or arm
    bases = {run: base_of(storage.runs / run) for run in names.values() if run != "base"}
    originals = {base.original for base in bases.values() if base is not None}
    only = originals.pop() if len(originals) == 1 else None
    arms: Dict[str, Dict[str, Any]] = {}
    for arm, run in names.items():
        # The base of a report is the one that its runs were trained on.
        known = bases.get(run)
        base = only if run == "base" else known.trained if known else None
        place = find_evaluation(storage, benchmark, run, base, model if run == "base" or base else None)
        arms[arm] = {"eval": place, "run": None if run == "base" else storage.runs / run, "name": run,
                     "old": old_evaluation_folder(storage, benchmark, run)}
    return arms


def base_name(config, storage: Storage) -> Optional[str]:
    """Name of the base model of a configuration; None where it is not on this machine."""
    from vlakeep.core.base_models import model_name

    try:
        return model_name(find_checkpoint(config.backbone.checkpoint, storage.cache))
    except FileNotFoundError:
        return None


def main(argv: List[str]) -> int:
    started = time.perf_counter()
    args, config = read(REPORT, argv)
    storage = Storage.from_config(config)
    arms = arms_from_runs(args.runs, storage, config.evaluate.benchmark, base_name(config, storage))
    path = build_report(storage.root, arms, Path(args.out or storage.report), args.title, args.seconds)
    print(f"{path} ({time.perf_counter() - started:.0f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
