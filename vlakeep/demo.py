"""Stage `vlakeep demo`: the main job from end to end on the small model, three arms side by side, on CPU in minutes.

    make demo        or        vlakeep demo [--root DIR] [--key value ...]

tabletop-data -> offline -> train (baseline; method as frozen; method with hsw.site=lora_input) -> evaluate -> report

writes: below the storage root the same folders as the single stages, run names starting with demo-, the evaluation
        of the base in eval/demo-base; an earlier demo is replaced
"""

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Dict, List

from vlakeep.config import Config, load_config

CONFIGS = Path(__file__).parent.parent / "configs"
# Arm -> (configuration file, what differs from it). Every arm gets the same seed, data, steps and evaluation states.
ARMS = {
    "baseline": ("baseline_lora.yaml", []),
    "method": ("method_icsm_hsw_thermostat.yaml", []),
    "method_lora_input": ("method_icsm_hsw_thermostat.yaml", ["--hsw.site", "lora_input"]),
}


def arm_config(arm: str, extra: List[str]) -> Config:
    file, changes = ARMS[arm]
    return load_config(str(CONFIGS / file), changes + extra + ["--name", f"demo-{arm}"])


def main(argv: List[str]) -> int:
    from vlakeep.evaluate import run_evaluation
    from vlakeep.offline import run_offline
    from vlakeep.report import build_report
    from vlakeep.storage import Storage
    from vlakeep.tabletop_data import write_tabletop_data
    from vlakeep.train import TrainingStopped, run_training

    started = time.perf_counter()
    method = arm_config("method", argv)
    storage = Storage.from_config(method, demo=True)
    argv = argv + ["--root", str(storage.root)]
    configs: Dict[str, Config] = {arm: arm_config(arm, argv) for arm in ARMS}
    method = configs["method"]
    places = {arm: storage.eval / f"demo-{arm}" for arm in ["base", *ARMS]}
    for folder in [*places.values(), *(storage.run_folder(config.name) for config in configs.values())]:
        shutil.rmtree(folder, ignore_errors=True)  # a demo shows its own run, never a mixture with an earlier one

    headline("1/5 data: demonstrations of the new skill, and the probe")
    write_tabletop_data(method, storage)
    headline("2/5 offline: the teacher's subspaces")
    run_offline(method, storage)
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
        except FileNotFoundError as error:
            print(f"{arm} cannot be evaluated: {error}", file=sys.stderr)
    headline("5/5 report")
    page = build_report(storage.root, arms, storage.report / "demo", "vlakeep demo: a new tabletop skill", time.perf_counter() - started)
    summary = Path(page).parent / "summary.json"
    print(f"report  {page}\nsummary {summary}\n{json.loads(summary.read_text())['seconds']:.0f} seconds")
    return 0


def headline(text: str) -> None:
    print(f"\n== {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
