"""Stage `vlakeep demo`: the main job from end to end on the small model, its arms side by side, on CPU in minutes.

    make demo        or        vlakeep demo [--model pi0_fast] [--root DIR] [--key value ...]

tabletop-data -> offline -> train (baseline; method as frozen; graded gains with a set-point) -> evaluate -> report

Three checkpoints on the way are evaluated with fewer trials, so that the report can show success against retention over training.

--model pi0_fast takes the small pi0-FAST, whose runs start with demo-pi0-.

writes: below the storage root the same folders as the single stages, run names starting with demo-, the evaluation
        of the base in eval/demo-base, the report in report/demo; an earlier demo of the model is replaced
"""

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Dict, List

from vlakeep.core.config import Config, load_config
from vlakeep.core.options import split
from vlakeep.core.stages import DEMO

# Arm -> (configuration that ships, what differs from it). Every arm gets the same seed, data, steps and evaluation states.
ARMS = {
    "baseline": ("baseline_lora", []),
    "method": ("method_icsm_hsw_thermostat", []),
    "graded": ("method_graded", []),
}
# Model -> (how its runs begin, what its configurations have beyond those above). Labels of the demonstrations are what an expert did who
# was disturbed, so that of a chunk the first actions are the surest.
MODELS = {"openvla": ("demo", []), "pi0_fast": ("demo-pi0", [
    "--backbone.checkpoint", "tabletop-pi0", "--evaluate.chunk", "2", "--icsm.sensitivity_items", "16"])}  # of longer rows: minutes
PARTS = 4  # of a training run; a checkpoint is evaluated at the end of each
ON_THE_WAY = ["--evaluate.episodes", "10", "--evaluate.questions_per_kind", "20", "--evaluate.retention_frames", "20"]


def arm_config(arm: str, extra: List[str], begin: str = "demo") -> Config:
    file, changes = ARMS[arm]
    config = load_config(file, changes + extra + ["--name", f"{begin}-{arm}"])
    config.train.save_every, config.train.keep_last = -(-config.train.steps // PARTS), PARTS
    return config


def main(argv: List[str]) -> int:
    from vlakeep.core.checkpoint import list_checkpoints
    from vlakeep.core.storage import Storage
    from vlakeep.evaluate import run_evaluation
    from vlakeep.offline import run_offline
    from vlakeep.report import build_report
    from vlakeep.tabletop.data import write_tabletop_data
    from vlakeep.train import TrainingStopped, run_training

    started = time.perf_counter()
    own, _, argv = split(DEMO, argv)
    begin, changes = MODELS[own.model]
    argv = [*changes, *argv]
    method = arm_config("method", argv, begin)
    storage = Storage.from_config(method, demo=True)
    argv = argv + ["--root", str(storage.root)]
    configs: Dict[str, Config] = {arm: arm_config(arm, argv, begin) for arm in ARMS}
    method = configs["method"]
    places = {arm: storage.eval / f"{begin}-{arm}" for arm in ["base", *ARMS]}
    on_the_way = [folder for arm in ARMS for folder in storage.eval.glob(f"{begin}-{arm}-step_*")]
    for folder in [*places.values(), *on_the_way, *(storage.run_folder(config.name) for config in configs.values())]:
        shutil.rmtree(folder, ignore_errors=True)  # a demo shows its own run, never a mixture with an earlier one

    headline("1/5 data: demonstrations of the new skill, and the probe")
    write_tabletop_data(method, storage)
    headline("2/5 offline: the teacher's subspaces")
    for config in {config.method: config for config in configs.values() if config.method != "baseline"}.values():
        run_offline(config, storage)
    runs = {}
    for arm, config in configs.items():
        headline(f"3/5 train: {arm}")
        try:
            runs[arm] = run_training(config, storage)
        except TrainingStopped as error:  # a guard stopping the literal form is a result, and is reported as one
            print(f"{arm} stopped: {error}", file=sys.stderr)
            runs[arm] = storage.run_folder(config.name)
    arms = {}
    for arm, place in places.items():
        headline(f"4/5 evaluate: {arm}")
        config = configs.get(arm, method)
        config.evaluate.target = "base" if arm == "base" else config.name
        try:
            arms[arm] = {"eval": run_evaluation(config, storage, place), "run": runs.get(arm)}
            for _, checkpoint in list_checkpoints(runs[arm])[:-1] if arm in runs else ():
                brief = load_config(ARMS[arm][0], [*ARMS[arm][1], *argv, *ON_THE_WAY, "--evaluate.target", str(checkpoint)])
                run_evaluation(brief, storage, place.with_name(f"{place.name}-{checkpoint.name}"), drift=False)
        except FileNotFoundError as error:
            print(f"{arm} cannot be evaluated: {error}", file=sys.stderr)
            if arm in runs and not list_checkpoints(runs[arm]):  # stopped before its first one, which the report says
                arms[arm] = {"eval": None, "run": runs[arm]}
    headline("5/5 report")
    page = build_report(storage.root, arms, storage.report / begin, "vlakeep demo: a new tabletop skill", time.perf_counter() - started)
    summary = Path(page).parent / "summary.json"
    print(f"report  {page}\nsummary {summary}\n{json.loads(summary.read_text())['seconds']:.0f} seconds")
    return 0


def headline(text: str) -> None:
    print(f"\n== {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
