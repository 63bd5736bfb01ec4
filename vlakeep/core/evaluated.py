"""Whether the evaluation that is there is the one that a configuration asks for.

The header of its records (benchmarks/identity.py) has what each trial depends on. How many trials there are, and of what, need not be in
it: some benchmarks add trials to those that are there. So summary.json has, as `asked`, all that was asked for; those of older versions
lack it, and are taken where their header says nothing else.
"""

import json
from pathlib import Path
from typing import Any, Dict, List, Optional

from vlakeep.core.config import Config, EvaluateConfig, to_dict
from vlakeep.core.registry import benchmark_class

# Of the evaluate section what is no part of the question: who is evaluated, and how the trials are played. Where a benchmark's trials
# depend on one of them (LIBERO's on the batch), the header has it.
HOW = ("target", "parallel", "workers", "batch", "cuda_graph", "videos")
MODEL = "backbone.checkpoint"


def asked_for(config: Config, settings: EvaluateConfig) -> Dict[str, Any]:
    """Dotted key -> value, for summary.json. settings: the evaluate section as the benchmark resolves it."""
    return {MODEL: config.backbone.checkpoint,
            **{f"evaluate.{key}": value for key, value in to_dict(settings).items() if key not in HOW}}


def is_evaluated(folder: Path, weights: Optional[str], config: Config) -> bool:
    """Whether the folder holds the finished evaluation of these weights (None: of the base's), as the configuration asks for it."""
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        with open(folder / "records.jsonl", encoding="utf-8") as file:
            made = json.loads(file.readline())["header"]["evaluate"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    asked = dict(summary.get("asked") or {})
    if not asked and summary.get("tasks"):  # LIBERO's header never had the number
        asked["evaluate.episodes"] = max(task["n"] + task["crashes"] for task in summary["tasks"].values())
    if weights is not None:
        asked.pop(MODEL, None)  # an adapter's hash says more than the place where its base lay
    made = {**{f"evaluate.{key}": value for key, value in made.items()}, **asked}
    return weights in (None, summary.get("weights")) and not _differences(made, config)


def evaluation_differences(made: Dict[str, Any], config: Config) -> List[str]:
    """What of an evaluation's settings (its header's) is not as the configuration asks."""
    return _differences({f"evaluate.{key}": value for key, value in made.items()}, config)


def _differences(made: Dict[str, Any], config: Config) -> List[str]:
    """An empty list asks for all there is: one that was not empty is another."""
    settings = benchmark_class(config.evaluate.benchmark).resolve(config)
    now = {MODEL: config.backbone.checkpoint, **{f"evaluate.{key}": value for key, value in to_dict(settings).items()}}
    return [f"{key}: {value} -> {now[key]}" for key, value in made.items() if key in now and now[key] != value]
