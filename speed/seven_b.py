"""Memory and time of every stage at the size of OpenVLA-7B, with random weights, under a limit of GPU memory.

    python speed/seven_b.py --tokenizer DIR [--gib 24] [--steps 20] [--root DIR] [--arms baseline,graded]

Writes a random checkpoint of the 7B shapes (15 GB), then runs offline (of both methods), the arms (baseline, residual, lora_input, graded;
all unless said) and export on tabletop pictures and prompts, each stage with its peak of allocated and reserved memory. DIR holds a
Llama-2 tokenizer's files.
"""

import argparse
import gc
import json
import shutil
import statistics
import sys
import time
from pathlib import Path

import torch

from vlakeep.core.config import load_config
from vlakeep.core.storage import Storage, pick_root
from vlakeep.export import run_export
from vlakeep.models.files import INDEX, write_json
from vlakeep.offline import run_offline
from vlakeep.openvla.format import complete_config, write_sidecars
from vlakeep.openvla.model import OpenVLA, parameters_on_meta
from vlakeep.openvla.workload import SEVEN_B
from vlakeep.tabletop.data import write_tabletop_data
from vlakeep.train import run_training

PREPROCESSOR = {
    "image_processor_type": "PrismaticImageProcessor", "processor_class": "PrismaticProcessor", "use_fused_vision_backbone": True,
    "image_resize_strategy": "resize-naive", "input_sizes": [[3, 224, 224], [3, 224, 224]], "interpolations": ["bicubic", "bicubic"],
    "means": [[0.484375, 0.455078125, 0.40625], [0.5, 0.5, 0.5]], "stds": [[0.228515625, 0.2236328125, 0.224609375], [0.5, 0.5, 0.5]],
}


def write_random_checkpoint(folder: Path, tokenizer: Path, device, layers: int) -> int:
    """The 7B shapes (or fewer of the 32 decoder layers) with small random weights in bfloat16, in shards; returns the number of tensors."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config = complete_config({**SEVEN_B, "text_config": {**SEVEN_B["text_config"], "num_hidden_layers": layers}})
    with parameters_on_meta():
        model = OpenVLA(config)
    torch.manual_seed(0)
    shapes, weight_map, shard, room, number, total = model.state_dict(), {}, {}, 4_000_000_000, 1, 0
    for position, (name, meta) in enumerate(shapes.items()):
        if meta.ndim > 1:
            std = 0.02 if "embed_tokens" in name or "pos_embed" in name else min(0.05, meta[0].numel() ** -0.5)
            tensor = (torch.randn(meta.shape, device=device) * std).bfloat16().cpu()
        else:
            tensor = torch.full(meta.shape, 0.0 if name.endswith("bias") else 1.0, dtype=torch.bfloat16)
        shard[name] = tensor
        room -= tensor.nbytes
        total += tensor.nbytes
        if room < 0 or position == len(shapes) - 1:
            file = f"model-{number:05d}.safetensors"
            save_file(shard, str(folder / file), metadata={"format": "pt"})
            weight_map.update({key: file for key in shard})
            shard, room, number = {}, 4_000_000_000, number + 1
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    write_sidecars(folder, dict(config, torch_dtype="bfloat16"), {})
    for file in tokenizer.iterdir():
        shutil.copyfile(file, folder / file.name)
    write_json(folder / "preprocessor_config.json", PREPROCESSOR)
    return len(shapes)


def measured(name: str, device, work, rows: list):
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    error = None
    try:
        result = work()
    except Exception as caught:  # the other stages are still worth measuring
        result, error = None, f"{type(caught).__name__}: {caught}"[:600]
    seconds = time.perf_counter() - started
    peaks = (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()) if device.type == "cuda" else (0, 0)
    allocated, reserved = (round(value / 2**30, 2) for value in peaks)
    rows.append({"stage": name, "seconds": round(seconds, 1), "allocated_gib": allocated, "reserved_gib": reserved, "error": error})
    print(f"RESULT {json.dumps(rows[-1])}", flush=True)
    return result


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--gib", type=float, default=24.0)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--root", default=str(pick_root(quiet=True)), help="storage root; the checkpoint takes 15 GB there")
    parser.add_argument("--out", default=None)
    parser.add_argument("--arms", default="baseline,residual,lora_input,graded")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--write_only", action="store_true", help="stop after the checkpoint, for verify-openvla")
    args, rest = parser.parse_known_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, args.gib * 2**30 / total))
    base = Path(args.root) / "hf_cache" / "random-7b"
    rows = []
    measured("write random checkpoint", device, lambda: write_random_checkpoint(base, Path(args.tokenizer), device, args.layers), rows)
    if args.write_only:
        return 0
    file, graded = "openvla_libero", "openvla_libero_graded"
    common = ["--root", args.root, "--backbone.checkpoint", str(base), "--data.datasets", "[tabletop_corner]", "--probe.name", "tabletop",
              "--train.steps", str(args.steps), "--train.log_every", "1", "--thermostat.every", "5",
              "--train.save_every", str(args.steps), *rest]
    config = load_config(file, common)
    storage = Storage.from_config(config)
    write_tabletop_data(config, storage)
    arms = {"baseline": (file, ["--method", "baseline"]), "residual": (file, ["--hsw.site", "residual"]), "lora_input": (file, []),
            "graded": (graded, [])}
    arms = {name: arms[name] for name in args.arms.split(",")}
    if {"residual", "lora_input"} & set(arms):
        measured("offline", device, lambda: run_offline(config, storage), rows)
    if "graded" in arms:
        measured("offline graded", device, lambda: run_offline(load_config(graded, common), storage), rows)
    for name, (own, extra) in arms.items():
        arm = load_config(own, common + extra + ["--name", name])
        run = measured(f"train {name}", device, lambda arm=arm: run_training(arm, storage), rows)
        if run is not None:
            lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            steps = [row for row in lines if "loss" in row][1:]  # kernels are chosen in the first ones
            windows = [(b["step"] - a["step"], b["seconds"] - a["seconds"], "d" in b) for a, b in zip(steps, steps[1:])]
            quiet = [seconds / count for count, seconds, measuring in windows if not measuring]
            whole = (steps[-1]["seconds"] - steps[0]["seconds"]) / (steps[-1]["step"] - steps[0]["step"])
            rows[-1].update(seconds_per_step=round(statistics.median(quiet), 4), with_measurements=round(whole, 4),
                            loss=[round(steps[0]["loss"], 3), round(steps[-1]["loss"], 3)])
            print(f"RESULT {json.dumps(rows[-1])}", flush=True)
    own, extra = list(arms.values())[-1]
    arm = load_config(own, common + extra + ["--name", list(arms)[-1]])
    measured("export", device, lambda: run_export(arm, storage), rows)
    if args.out:
        Path(args.out).write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
