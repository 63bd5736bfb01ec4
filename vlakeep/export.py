"""Stage `vlakeep export`: merge a run's adapter into the base weights, as a folder that the official OpenVLA code loads unchanged.

    vlakeep export --config configs/baseline_lora.yaml --export.target baseline
    vlakeep export --config configs/baseline_lora.yaml --export.target baseline --export.close_to 0.002

reads:  base checkpoint; the adapter of the run's newest intact checkpoint; for the closing pass what closing_pass.py says
writes: run_root_dir/<run>/merged-step_N/ (or --export.folder): weights in shards, config.json, dataset_statistics.json, processor files,
        and vlakeep_export.json, which says what was merged and how well adapter and merged model agree. With --export.close_to also
        run_root_dir/<run>-closed-<budget>/, and merged-step_N in there
"""

import gc
import json
import shlex
import sys
from pathlib import Path
from typing import Callable, List, Optional, Tuple

import numpy as np
import torch

import vlakeep
from vlakeep import closing_pass
from vlakeep.core.config import BackboneConfig, Config, ConfigError
from vlakeep.core.errors import CheckpointError, human_bytes, quoted
from vlakeep.core.log import log
from vlakeep.core.names import run_name
from vlakeep.core.options import read, split
from vlakeep.core.parallel import pick_device, set_threads
from vlakeep.core.stages import EXPORT, OFFLINE
from vlakeep.core.storage import Storage, atomic_dir, find_checkpoint, need_free
from vlakeep.core.target import load_manifest, read_action_statistics, target_checkpoint
from vlakeep.data.formats import closing_all, open_configured
from vlakeep.data.images import resize_uint8
from vlakeep.data.sample import Sample
from vlakeep.models.adapters import load_adapter
from vlakeep.models.base import Backbone
from vlakeep.models.chain import Chain, chain_hash, merge_chain, read_chain, spoken
from vlakeep.models.files import STATISTICS, tensor_table, weight_files, weights_hash
from vlakeep.models.load import DTYPES, make_backbone, model_class
from vlakeep.models.merge import RECORD, merge_checkpoint
from vlakeep.models.quantised import identity, rounded

PARITY_BATCH = 8


def parity_samples(config: Config, storage: Storage, processor) -> Tuple[List[Sample], str]:
    """`export.parity_frames` frames of the run's data, spread evenly, or random pictures where the data are not there."""
    count, size = config.export.parity_frames, tuple(processor.picture_size)
    try:
        datasets = open_configured(config.data, storage.data, storage.cache, processor.spec)
    except FileNotFoundError:
        rng = np.random.default_rng(config.seed)
        blank = processor.spec.blank(0, size, "pick up the red block")
        return [blank.with_pictures(lambda picture: rng.integers(0, 256, picture.shape, dtype=np.uint8)) for _ in range(count)], \
            "random pictures"
    samples = []
    with closing_all(datasets):
        keys = [(d, e, t) for d in datasets for e, length in enumerate(d.lengths) for t in range(int(length))]
        for index in np.linspace(0, len(keys) - 1, count).astype(int):
            dataset, episode, frame = keys[index]
            samples.append(dataset.frame(episode, frame).with_pictures(lambda picture: resize_uint8(picture, size)))
    return samples, "frames of " + ", ".join(config.data.datasets)


@torch.inference_mode()
def action_ids(backbone: Backbone, samples: List[Sample], unnorm_key) -> np.ndarray:
    """Greedy action token ids [N, T]."""
    tokens = backbone.action_tokens(unnorm_key)
    found = []
    for start in range(0, len(samples), PARITY_BATCH):
        batch = backbone.processor.encode_prompts(samples[start:start + PARITY_BATCH]).to(backbone.device)
        # What follows an end is nobody's answer where answers differ in length.
        found.append(backbone.generate(batch, tokens, stop_at_eos=backbone.processor.variable_answers)[0].cpu().numpy())
    return np.concatenate(found)


def check_parity(config: Config, storage: Storage, adapter: Path, merged: Path, statistics: dict, unnorm_key: str) -> dict:
    """Actions of base + adapter against those of the merged folder; one model in memory at a time."""
    device = pick_device(config.device)
    ids, samples = [], None
    for folder in (None, merged):
        settings = config.backbone if folder is None else BackboneConfig(
            checkpoint=str(folder), dtype=config.backbone.dtype, attn_implementation=config.backbone.attn_implementation)
        backbone = make_backbone(settings, device, storage.cache)
        if folder is None:
            merge_chain(backbone, read_chain(adapter.absolute().parents[1]))
            load_adapter(backbone, adapter / "adapter")
            backbone.norm_stats = statistics
            samples, source = parity_samples(config, storage, backbone.processor)
        processor = backbone.processor
        ids.append(action_ids(backbone.eval(), samples, unnorm_key))
        del backbone
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    same = ids[0] == ids[1]
    bins = [processor.action_bins(i) for i in ids]  # other tokens than actions fall into the last bins, as in decoding
    return {"frames": len(samples), "source": source, "frames_identical": int(same.all(1).sum()), "tokens_identical": float(same.mean()),
            "largest_bin_difference": int(np.abs(bins[0] - bins[1]).max())}


def refuse_second_merge(base: Path, adapter_sha256: str) -> None:
    path = base / RECORD
    record = json.loads(path.read_text()) if path.is_file() else {}
    if adapter_sha256 in (record.get("adapter_sha256"), record.get("closing", {}).get("adapter_sha256")):
        raise CheckpointError(f"{base} already holds this adapter ({path} says so); merging it twice would double its effect: give the "
                              "base model that the run was trained on with --backbone.checkpoint")


def merged_statistics(config: Config, base: Path, chain: Optional[Chain], new: dict) -> dict:
    """The merged folder's dataset_statistics.json: those of the run (`new`), with --export.statistics all also those with which `evaluate`
    plays its adapter. The run's come first: lerobot's files of a pi0-FAST are after the first."""
    if config.export.statistics == "new":
        return new
    kind = model_class(base)
    old = kind.read_statistics(base, kind.read_config(base))
    for link in chain.links if chain else ():
        old = {**old, **read_action_statistics(link.folder)}
    if not old:
        raise CheckpointError(f"--export.statistics all: {base} has no action statistics, neither in {STATISTICS} nor in its other files; "
                              f"use --export.statistics new, or put the {STATISTICS} of the data that it was trained on beside its weights")
    for name in new.keys() & old.keys():
        if new[name]["action"] != old[name]["action"]:
            log.warning(f"note: the action statistics of {name} are the run's, which differ from those that its base has by this name: "
                        "what the base learnt with its own cannot be played with the merged folder")
    return {**new, **{name: entry for name, entry in old.items() if name not in new}}


def offline_command(argv: List[str]) -> str:
    """The command that makes what the closing pass reads, for the model, probe and storage root of an export's command line."""
    _, file, pairs = split(EXPORT, argv)
    shared = {f"--{key}" for key in OFFLINE.reads()} - {"--method"}
    kept = ["--config", file] if file else []
    kept += [word for pair in pairs if pair.partition("=")[0] in shared for word in pair.split("=", 1)]
    return shlex.join(["vlakeep", "offline", *kept, "--method", "graded"])


def run_export(config: Config, storage: Storage, command: str = "vlakeep offline --config ... --method graded",
               closed_only: bool = False) -> Path:
    """Close the adapter if that is wanted, merge, check and return the folder; closed_only: that of the closed run, without a merge.

    command: see offline_command; for messages.
    """
    if closed_only and config.export.close_to is None:
        raise ConfigError("--closed-only needs --export.close_to, the budget in nats per answer token")
    if config.export.folder:
        storage.guard_write(config.export.folder, what="merged model")  # before the base's weights are read
    set_threads(config.threads)
    target = config.export.target or config.name
    checkpoint = target_checkpoint(target, storage)
    base = find_checkpoint(config.backbone.checkpoint, storage.cache)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    adapter_sha256 = manifest["files"]["adapter/adapter_model.safetensors"]["sha256"]
    refuse_second_merge(base, adapter_sha256)
    chain = read_chain(checkpoint.absolute().parents[1])
    command += f" --train.from_run {quoted(spoken(chain, storage))}" if chain else ""
    base_sha256 = chain_hash(base, chain) if chain else identity(weights_hash(base), config.backbone.quantisation)
    load_manifest(checkpoint, base_sha256)  # raises for a damaged checkpoint, and for other base weights
    run, budget = checkpoint.parents[1], config.export.close_to
    closed = None if budget is None else closing_pass.free_folder(storage, run_name(run, storage), budget, config.export.overwrite)
    out = Path(config.export.folder) if config.export.folder else (closed or run) / f"merged-{checkpoint.name}"
    out = storage.guard_write(out, what="merged model")
    if closed and closed_only:
        closing_pass.close(config, storage, checkpoint, closed, command)
        return told(closed, storage)
    if out.exists() and not config.export.overwrite:
        raise FileExistsError(f"{out} exists already; give another --export.folder, or replace it with --export.overwrite true")
    need_free(out.parent, 2 * sum(file.stat().st_size for file in weight_files(base)) if config.export.dtype == "float32"
              else sum(file.stat().st_size for file in weight_files(base)), "the merged model")
    statistics = merged_statistics(config, base, chain, read_action_statistics(checkpoint))
    record = {"base": str(config.backbone.checkpoint), "base_sha256": base_sha256, "run": run_name(run, storage),
              "checkpoint": checkpoint.name, "adapter_sha256": adapter_sha256, "merged_modules": 0, "dtype": config.export.dtype,
              "vlakeep": vlakeep.__version__}
    if chain:
        record["before"] = [{"run": link.run, "checkpoint": link.checkpoint, "adapter_sha256": link.adapter_sha256} for link in chain.links]
    if config.export.statistics == "all":
        record["statistics"] = list(statistics)
    if closed:
        checkpoint, record["closing"] = closing_pass.close(config, storage, checkpoint, closed, command)
        record.update(run=run_name(closed, storage), adapter_sha256=load_manifest(checkpoint, base_sha256))
        told(closed, storage)
    with atomic_dir(out) as temporary:
        modules = merge_checkpoint(base, checkpoint / "adapter", Path(temporary), statistics, DTYPES.get(config.export.dtype),
                                   chain.adapters if chain else (), rounding(config))
        model_class(base).record_settings(Path(temporary), config.backbone)
        record["merged_modules"] = len(modules)
        if config.export.parity_frames:
            key = config.backbone.unnorm_key or next(iter(statistics))
            record["parity"] = check_parity(config, storage, checkpoint, Path(temporary), statistics, key)
            _judge(record["parity"], config, Path(temporary))
        if closed:
            record["closing"]["kl_merged"] = closing_pass.divergence_of(config, storage, Path(temporary), base_sha256,
                                                                            chain.names if chain else [])
            _judge_merged(record["closing"], config)
        (Path(temporary) / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    size = sum(file.stat().st_size for file in out.iterdir())
    log.info(f"wrote {out} ({human_bytes(size)}, {len(modules)} adapters merged)")
    return out


def told(closed: Path, storage: Storage) -> Path:
    log.info(f"wrote {closed} (evaluate it with --evaluate.target {quoted(run_name(closed, storage))})")
    return closed


def rounding(config: Config) -> Optional[Callable[[torch.Tensor], torch.Tensor]]:
    """What quantisation does to a weight of the decoder's linears, which the merged ones have to carry too; None without it."""
    if config.backbone.quantisation == "none":
        return None
    return lambda weight: rounded(weight, DTYPES[config.backbone.dtype], pick_device(config.device))


def _judge(parity: dict, config: Config, merged: Path) -> None:
    """Say how well the two agree; where no weight was rounded they must give the same actions."""
    log.info(f"parity on {parity['frames']} {parity['source']}: {parity['frames_identical']} with identical actions, "
             f"{parity['tokens_identical']:.1%} of the action tokens, largest difference {parity['largest_bin_difference']} bins")
    # As stored, a base in half precision, such as those that ship, gives sums in half precision, whatever it ran in.
    rounded_off = config.backbone.dtype != "float32" or any(entry["dtype"] != "F32" for file in weight_files(merged)
                                                            for entry in tensor_table(file).values())
    rounded_off = rounded_off or config.backbone.quantisation != "none"  # sums of 4-bit products are taken in another order
    if parity["frames_identical"] < parity["frames"] and not rounded_off:
        raise CheckpointError("adapter and merged model give different actions although both are float32, so the merge is wrong; "
                              "nothing was written. Please report it with the line above")
    if parity["tokens_identical"] < 0.5:
        raise CheckpointError("adapter and merged model agree in less than half of the action tokens, which no rounding explains, so the "
                              "merge is wrong; nothing was written. Please report it with the line above")
    if parity["tokens_identical"] < 0.95:
        log.warning("note: rounding the sum to half precision changes more than one action token in twenty; evaluate the adapter and the "
                    "merged model both, or export with --export.dtype float32")


def _judge_merged(found: dict, config: Config) -> None:
    log.info(f"divergence of the merged model: {found['kl_merged']:.3g} nats per answer token")
    if found["kl_merged"] > max(found["budget"], found["kl_after"]) * (1 + 1e-3):
        log.warning(f"note: that is more than the {found['budget']:g} allowed, since the sum was rounded; the closed adapter on the base "
                    f"as it is has {found['kl_after']:.3g}. Export with --export.dtype float32, or with a lower --export.close_to")


def main(argv: List[str]) -> int:
    args, config = read(EXPORT, argv)
    run_export(config, Storage.from_config(config), offline_command(argv), getattr(args, "closed-only"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
