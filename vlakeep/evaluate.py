"""Stage `vlakeep evaluate`: new skill, old skills, visual questions, teacher-relative retention and drift of one model.

    vlakeep evaluate --config configs/baseline_lora.yaml --evaluate.target baseline
    vlakeep evaluate --config configs/baseline_lora.yaml --evaluate.benchmark libero_object --evaluate.workers 8 [--gpus 8]
    vlakeep evaluate --config configs/baseline_lora.yaml --evaluate.benchmark dataset --data.train_fraction 0.9

reads:  base checkpoint; for a run, the adapter of its newest intact checkpoint; probe_root_dir/<probe.name> for the drift
writes: ROOT/eval/<base model>/<benchmark>/<target>/ (core/names.py): records.jsonl (one line per trial, resumable), summary.json, and
        what the benchmark adds, such as videos/

The same for every benchmark: benchmarks/base.py says what one is, core/registry.py finds it.
"""

import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Dict, List, Optional

import torch

from vlakeep.benchmarks.base import CONTROL, NEVER, NEW, REQUIRED, SKILL, Benchmark
from vlakeep.benchmarks.identity import make_header
from vlakeep.benchmarks.policy import Target
from vlakeep.benchmarks.questions import ask_questions, measure_retention
from vlakeep.benchmarks.records import Records
from vlakeep.benchmarks.specs import observation_alarms
from vlakeep.benchmarks.summary import make_summary, write_summary
from vlakeep.core.compat import require_numpy
from vlakeep.core.config import Config, ConfigError
from vlakeep.core.evaluated import asked_for
from vlakeep.core.launch import launch
from vlakeep.core.log import log
from vlakeep.core.names import evaluation_folder, evaluation_name, is_run_name, run_name
from vlakeep.core.options import read
from vlakeep.core.parallel import DAY, HOST, Distributed, alone, pick_device, set_threads
from vlakeep.core.registry import benchmark_class
from vlakeep.core.stages import EVALUATE
from vlakeep.core.storage import Storage
from vlakeep.core.target import load_manifest, read_action_statistics, target_checkpoint
from vlakeep.models.adapters import adapters_disabled, load_adapter
from vlakeep.models.chain import merge_chain, read_chain
from vlakeep.models.load import make_backbone
from vlakeep.probe.batches import prompt_batches
from vlakeep.probe.probe_set import open_probe
from vlakeep.teacher.collect import pooled, pooled_batches
from vlakeep.teacher.icsm_artifact import default_layers, layer_map
from vlakeep.thermostat.drift import covariance, covariance_drift


def load_target(config: Config, storage: Storage, device):
    """(backbone with the target's adapter, its name, what identifies its weights). `base` has no adapter."""
    backbone = make_backbone(config.backbone, device, storage.cache)
    target = config.evaluate.target
    if target == "base":
        return backbone.eval(), "base", backbone.weights_sha256
    folder = target_checkpoint(target, storage)
    merge_chain(backbone, read_chain(folder.absolute().parents[1]))
    manifest = load_manifest(folder, backbone.weights_sha256)
    load_adapter(backbone, folder / "adapter")
    statistics = read_action_statistics(folder)
    backbone.norm_stats = {**backbone.norm_stats, **statistics}
    if backbone.unnorm_key is None and len(statistics) == 1:
        backbone.unnorm_key = next(iter(statistics))
    # A step of a run that was named by its folder gets its own records.
    run = run_name(folder.absolute().parents[1], storage)
    name = f"{run}-{folder.name}" if Path(target).name == folder.name else run
    return backbone.eval(), name, manifest


@torch.inference_mode()
def measure_drift(backbone, config: Config, storage: Storage) -> float:
    """||C_S - C_T||_F over the whole probe, averaged over the representative layers; 0 for the base itself."""
    probe = open_probe(config, storage)
    layers = config.icsm.layers or default_layers(backbone.num_layers)
    layer_map(backbone.num_layers, layers)  # raises for a layer that the model does not have
    items, size, job = probe.spread(config.probe.size), config.icsm.batch_size, Distributed.here()
    mine = job.share([items[start:start + size] for start in range(0, len(items), size)])

    def states():
        batches = (pair for part in mine for pair in prompt_batches(probe, part, backbone.processor, size))
        return pooled(job.merged(pooled_batches(backbone, batches, layers, quiet=True)), layers, str(probe.folder)).states

    with adapters_disabled(backbone):
        teacher = {layer: covariance(x) for layer, x in states().items()}
    return float(covariance_drift(states(), teacher))


def drift_identity(config: Config, storage: Storage, backbone) -> Dict:
    """What the drift depends on beside the weights: two drifts are compared where all of it is the same."""
    return {"probe_sha256": open_probe(config, storage).sha256, "probe_items": config.probe.size,
            "layers": list(config.icsm.layers or default_layers(backbone.num_layers))}


def run_evaluation(config: Config, storage: Storage, folder: Optional[Path] = None, drift: bool = True, name: Optional[str] = None) -> Path:
    """Evaluate one target and return its folder (`folder`, or its own). Interrupted evaluations go on where they stopped, in as many
    processes as there are then: those of a job divide what is to be done, and the first of them writes.

    name: under which it is kept in place of the target's, of a control with its suffix.
    drift: whether the drift over the probe is measured, which takes a pass of both models over all of it.
    """
    with nullcontext(Distributed.here()) if alone() else Distributed(config.device, DAY, HOST) as job:
        return _run(config, storage, folder, drift, name, job)


def _run(config: Config, storage: Storage, folder: Optional[Path], drift: bool, name: Optional[str], job: Distributed) -> Path:
    set_threads(config.threads)
    require_numpy()
    started = time.perf_counter()
    benchmark = benchmark_class(config.evaluate.benchmark)(config, storage)
    benchmark.check()
    with benchmark.opened():
        target = benchmark.stand_in() or take_model(benchmark)
        called = evaluation_name(name, config.evaluate) if name else target.name
        folder = folder or evaluation_folder(storage, target.model, benchmark.name, called, target.weights, target.base)
        with Records(folder / "records.jsonl", make_header(benchmark, target), job) as records:
            # First, while a bad probe costs nothing yet.
            distance = drift_of(benchmark, target) if drift else None
            alarms = benchmark.alarms(target) + shape_alarms(benchmark, target)
            play(benchmark, target, records, folder)
            if target.backbone is not None:
                ask(benchmark, target, records)
            records.collect()
            if not job.is_main:
                return folder
            roles = {role: [one.name for one in benchmark.abilities() if (one.kind, one.role) == (SKILL, role)] for role in (NEW, CONTROL)}
            rows = benchmark.counted(records.rows())
            summary = make_summary(target.name, rows, distance, target.weights, "".join(roles[NEW]), roles[CONTROL],
                                   asked_for(config, benchmark.settings))
            summary.update(benchmark.additions(rows))
            if distance:
                summary["drift_of"] = drift_identity(config, storage, target.backbone)
            return write_summary(folder, summary, alarms + records.alarms(), started, benchmark.lines_of(summary))


def take_model(benchmark: Benchmark) -> Target:
    """The model with the action statistics that the benchmark picks, if it plays actions. ValueError where there are none, or where they do
    not fit it."""
    config, storage = benchmark.config, benchmark.storage
    backbone, name, weights = load_target(config, storage, pick_device(config.device, Distributed.here().local_rank))
    name = evaluation_name(name, config.evaluate)
    if not benchmark.acts:
        return Target(name, weights, backbone)
    own = backbone.unnorm_key or (next(iter(backbone.norm_stats)) if len(backbone.norm_stats) == 1 else None)
    key = backbone.action_key(benchmark.pick_key(config.backbone.unnorm_key, backbone.norm_stats, own))
    benchmark.compare(key, backbone.norm_stats, backbone.processor.spec)
    backbone.unnorm_key = key
    return Target(name, weights, backbone, key)


def play(benchmark: Benchmark, target: Target, records: Records, folder: Path) -> None:
    """The episodes: in all processes, or all of them in the first, whatever of `records` the benchmark asks."""
    if benchmark.divides:
        benchmark.play(target, records, folder)
    elif records.is_main:
        with records.undivided():
            benchmark.play(target, records, folder)


def shape_alarms(benchmark: Benchmark, target: Target) -> List[str]:
    return observation_alarms(benchmark.name, benchmark.observations, target.picture_size) if target.backbone is not None else []


def ask(benchmark: Benchmark, target: Target, records: Records) -> None:
    """The benchmark's questions, and how far the run is from its base on the frames of what the base can do."""
    for asked in benchmark.questions():
        ask_questions(target.backbone, asked, records)
    frames = None if target.is_base else benchmark.retention()
    if frames:
        measure_retention(target.backbone, frames, records)


def drift_of(benchmark: Benchmark, target: Target) -> Optional[float]:
    """The drift, 0 for the base itself; None where it is not measured: without a model, or without a probe where that is no error."""
    config, storage = benchmark.config, benchmark.storage
    if benchmark.drift == NEVER or target.backbone is None:
        return None
    if config.evaluate.target == "base":
        return 0.0
    if benchmark.drift != REQUIRED and not storage.probe_folder(config.probe.name).is_dir():
        log.warning(f"no probe `{config.probe.name}`: the drift is not measured")
        return None
    return measure_drift(target.backbone, config, storage)


def main(argv: List[str]) -> int:
    args, config = read(EVALUATE, argv)
    if args.gpus > 1:
        return launch(args.gpus, EVALUATE.name, argv)
    name = getattr(args, "as")
    if name is not None and not is_run_name(name):
        raise ConfigError(f"--as {name}: must be a folder name, or GROUP/CELL, two of them; and not base")
    log.info(f"wrote {run_evaluation(config, Storage.from_config(config), name=name)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
