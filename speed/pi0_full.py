"""Memory and time of pi0-FAST at the size of the published model, with random weights, under a limit of GPU memory.

    python speed/pi0_full.py --root DIR [--gib 22.5] [--steps 12] [--arms baseline,graded] [--out FILE]

Writes a random checkpoint of lerobot's gemma_2b (7 GB), a data set with two cameras and a state of 8, and a probe; then chunks, offline and
training at batch 8, each with its peak of allocated and reserved memory. The tokenizer is a small one whose prompts are as long as
PaliGemma's to a few tokens; the vocabulary is whole. Beside the time of a step stands its floor: its floating-point operations, counted
by torch, at the rate of a large product of matrices. --small runs the same on a tiny model, to see that it runs.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from vlakeep.core.config import load_config
from vlakeep.core.loss_scale import LossScaler
from vlakeep.core.registry import method_class
from vlakeep.core.rundir import read_metrics
from vlakeep.core.storage import Storage
from vlakeep.data.loader import make_stream
from vlakeep.data.sample import Episode, Sample
from vlakeep.data.writer import write_rlds
from vlakeep.models.adapters import add_lora
from vlakeep.models.load import make_backbone
from vlakeep.offline import run_offline
from vlakeep.pi0_fast.format import VARIANTS, write_checkpoint
from vlakeep.pi0_fast.model import EMBEDDING, HEAD, Sizes, expected_shapes, precise
from vlakeep.pi0_fast.tiny import SMALL, lerobot_config, make_folder, sizes_json
from vlakeep.probe.probe_set import write_probe
from vlakeep.train import make_optimizer, run_training, train_step

FILE, SET, PROBE = "pi0_fast_libero_graded", "libero_spatial_random", "random"
TASKS = ["pick up the black bowl between the plate and the ramekin and place it on the plate",
         "pick up the black bowl on the cookie box and place it on the plate"]
CHUNK, STATE, ACTIONS = 50, 8, 7
ANSWER = 60  # tokens of a chunk that are generated: random weights never end one


def smooth(rng, shape):
    """Chunks or states [.., T, A] of four low frequencies, within [-1, 1]: a chunk takes 30 to 60 tokens, as real ones."""
    steps = shape[-2]
    waves_TK = np.cos(np.pi * (np.arange(steps)[:, None] + 0.5) * np.arange(4) / CHUNK)
    return (waves_TK @ rng.normal(0, 0.3, (*shape[:-2], 4, shape[-1]))).clip(-1, 1).astype(np.float32)


def write_model(folder: Path, sizes: Sizes, device) -> None:
    """Random weights: bfloat16, vision, projector and norms float32, one vocabulary for both ends."""
    rng = np.random.default_rng(0)
    words = "0123456789 " + " ".join(TASKS)
    make_folder(folder, [*TASKS, words], list(smooth(rng, (300, CHUNK, ACTIONS))), {}, ("base_0_rgb",), state=STATE, codes=1024)
    (folder / "sizes.json").unlink()
    torch.manual_seed(0)
    state = {}
    for name, shape in expected_shapes(sizes).items():
        dtype = torch.float32 if precise(name) else torch.bfloat16
        if len(shape) == 1:
            ones = name.endswith("weight") and ".vision_tower." in name
            state[name] = torch.full(shape, float(ones), dtype=dtype)
        elif name != EMBEDDING:  # a file with lm_head alone is one of both
            std = shape[-1] ** -0.5 if name == HEAD else min(0.05, shape[1:].numel() ** -0.5)
            state[name] = (torch.randn(shape, device=device) * std).to(dtype).cpu()
    config = lerobot_config(("base_0_rgb", "left_wrist_0_rgb"), STATE, ACTIONS, CHUNK, sizes.vision.image_size, ANSWER)
    extra = {} if sizes in VARIANTS.values() else {"sizes": sizes_json(sizes)}
    write_checkpoint(folder, state, {**config, "dtype": "bfloat16", **extra}, {})


def write_data(storage: Storage, side: int, episodes: int = 4, steps: int = 24, items: int = 64) -> None:
    rng = np.random.default_rng(0)

    def pictures(count):
        small = rng.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
        return small.repeat(side // 8, axis=1).repeat(side // 8, axis=2)

    def actions():
        found = smooth(rng, (steps, ACTIONS))
        found[:, -1] = np.where(found[:, -1] > 0, 1, -1)  # LIBERO: open is -1
        return found

    write_rlds(storage.data, SET, [Episode(pictures(steps), actions(), TASKS[i % 2], smooth(rng, (steps, STATE)), wrist=pictures(steps))
                                   for i in range(episodes)], overwrite=True)
    samples = [Sample(None, TASKS[i % 2], cameras={"base_0_rgb": pictures(1)[0], "left_wrist_0_rgb": pictures(1)[0]},
                      state=smooth(rng, (1, STATE))[0]) for i in range(items)]
    write_probe(storage.probe_folder(PROBE), samples, ["skill"] * items)


def step_of(config, storage: Storage, backbone, device):
    """(a plain training step as a function of its number, its batch)."""
    add_lora(backbone, config.lora, config.seed)
    backbone.train()
    method, _ = method_class("baseline").prepare(config, storage, backbone)
    optimizer = make_optimizer([p for p in backbone.parameters() if p.requires_grad], config.train)
    batch = next(make_stream(config.data, storage.data, backbone.processor, config.train.batch_size, config.seed, 0, 1, storage.cache))
    batch = batch.to(device)
    return lambda number: train_step(backbone, method, optimizer, LossScaler(False), [batch], config.train, number, False), batch


def rate_of(device) -> float:
    """FLOP/s of a large product of matrices."""
    side, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)
    a = torch.randn(side, side, device=device, dtype=dtype)
    return 2 * side ** 3 / timed(lambda: a @ a, device, 10)


def timed(work, device, rounds: int) -> float:
    """Median seconds, after two rounds that do not count."""
    times = []
    for _ in range(rounds + 2):
        wait(device)
        begin = time.perf_counter()
        work()
        wait(device)
        times.append(time.perf_counter() - begin)
    return statistics.median(times[2:])


def measured(name: str, device, work, rows: list):
    """work(), with its time and peaks of memory as a row."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    begin, result, error = time.perf_counter(), None, None
    try:
        result = work()
    except Exception as caught:  # the other stages are still worth measuring
        error = f"{type(caught).__name__}: {caught}"[:600]
    peaks = (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()) if device.type == "cuda" else (0, 0)
    allocated, reserved = (round(value / 2**30, 2) for value in peaks)
    rows.append({"stage": name, "seconds": round(time.perf_counter() - begin, 1), "allocated_gib": allocated, "reserved_gib": reserved,
                 "error": error})
    print(f"RESULT {json.dumps(rows[-1])}", flush=True)
    return result


def operations(step, backbone, recompute: bool) -> int:
    """Of a plain step. Not while memory is measured: the counter's hooks on modules may keep recomputed layers alive."""
    backbone.pi0.gradient_checkpointing = recompute
    step(1)
    with FlopCounterMode(display=False) as counter:
        step(2)
    return counter.get_total_flops()


def plain_step(step, batch, backbone, recompute: bool, device, flops: int, rate: float) -> dict:
    """Time of the plain step beside its floor: its operations at the rate of a product of matrices."""
    backbone.pi0.gradient_checkpointing = recompute
    seconds = timed(lambda: step(3), device, 8)
    return {"step_ms": round(seconds * 1e3, 1), "floor_ms": round(flops / rate * 1e3, 1), "step_tflop": round(flops / 1e12, 2),
            "tflop_per_s": round(rate / 1e12, 1), "rows": batch.size, "text_columns": batch.input_ids.shape[1],
            "picture_columns": batch.pixel_values.shape[1] * backbone.pi0.sizes.patches, "label_columns": batch.longest}


def chunks(backbone, rows: int, device) -> dict:
    """Time of a chunk of ANSWER tokens for so many robots at once; the floor of a token is one reading of the weights that it needs."""
    rng, side = np.random.default_rng(1), backbone.processor.picture_size[0]
    samples = [Sample(None, TASKS[0], state=smooth(rng, (1, STATE))[0],
                      cameras={name: rng.integers(0, 256, (side, side, 3), dtype=np.uint8) for name in backbone.processor.named})
               for _ in range(rows)]
    batch = backbone.processor.encode_prompts(samples).to(device)
    read = sum(p.numel() * p.element_size() for p in [*backbone.decoder_layers.parameters(), backbone.pi0.paligemma.lm_head.weight])
    with torch.inference_mode():
        first, whole = (timed(lambda count=count: backbone.generate(batch, count, stop_at_eos=False), device, 3) for count in (1, ANSWER))
    found = {"rows": rows, "prefix_and_first_token_ms": round(first * 1e3, 1), f"chunk_of_{ANSWER}_tokens_ms": round(whole * 1e3, 1),
             "token_ms": round((whole - first) / (ANSWER - 1) * 1e3, 2), "weights_gb": round(read / 1e9, 2)}
    if device.type == "cuda":
        a = torch.empty(2**30, dtype=torch.uint8, device=device)
        found["token_floor_ms"] = round(read / (2 * 2**30 / timed(a.clone, device, 5)) * 1e3, 2)
    return found


def wait(device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, help="storage root; the checkpoint takes 7 GB there")
    parser.add_argument("--gib", type=float, default=22.5)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--arms", default="baseline,graded")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--no-step", action="store_true", dest="no_step", help="without the plain step and its floor")
    parser.add_argument("--write-only", action="store_true", dest="write_only")
    parser.add_argument("--out", default=None, help="JSON lines, one a stage, written at once")
    args, rest = parser.parse_known_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda" and not args.write_only:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, args.gib * 2**30 / total))
    sizes = SMALL._replace(vocab_size=8192, vision=SMALL.vision._replace(image_size=16)) if args.small else VARIANTS["gemma_2b"]
    base = Path(args.root) / "hf_cache" / "random-pi0"
    common = ["--root", args.root, "--backbone.checkpoint", str(base), "--data.datasets", f"[{SET}]",
              "--data.cameras", "[image, wrist_image]", "--data.train_fraction", "1.0",
              "--probe.name", PROBE, "--probe.size", "64", "--train.steps", str(args.steps),
              "--train.log_every", "1", "--train.accumulation", "1", "--train.tensorboard", "false", "--thermostat.every", "5",
              "--train.save_every", str(args.steps), "--device", device.type, *rest]
    common += ["--lora.layers", "last:2"] if args.small else []
    rows: list = []

    def stage(name, work, facts=None):
        result = measured(name, device, work, rows)
        rows[-1].update(facts(result) if facts and result is not None else result if isinstance(result, dict) else {})
        if args.out:
            with open(args.out, "a") as file:
                file.write(json.dumps(rows[-1]) + "\n")

    def of_run(run) -> dict:
        steps = [row for row in read_metrics(run) if "loss" in row][2:]  # kernels are chosen in the first ones
        windows = [(b["seconds"] - a["seconds"], "kl" in b) for a, b in zip(steps, steps[1:])]
        quiet = [seconds for seconds, measuring in windows if not measuring]
        return {"ms_per_step": round(statistics.median(quiet) * 1e3, 1),
                "ms_with_measurement": [round(seconds * 1e3, 1) for seconds, measuring in windows if measuring],
                "loss": [round(steps[0]["loss"], 3), round(steps[-1]["loss"], 3)]}

    if not (base / "model.safetensors").is_file():
        stage("write random checkpoint", lambda: write_model(base, sizes, device))
    config = load_config(FILE, common)
    storage = Storage.from_config(config)
    stage("write data", lambda: write_data(storage, sizes.vision.image_size))
    if args.write_only:
        return 0
    loaded: dict = {}

    def load():
        loaded["model"] = make_backbone(config.backbone, device)

    stage("load", load)
    if loaded:
        for count in (1, 8):
            stage(f"chunk, {count} robots", lambda count=count: chunks(loaded["model"], count, device))
        step = batch = None
        try:
            step, batch = (None, None) if args.no_step else step_of(config, storage, loaded["model"], device)
        except Exception as error:
            print(f"no plain step: {error!r}", flush=True)
        rate = rate_of(device)
        for recompute in (True, False) if step else ():
            flops = operations(step, loaded["model"], recompute)
            stage(f"plain step, recomputing {str(recompute).lower()}", lambda recompute=recompute, flops=flops: plain_step(
                step, batch, loaded["model"], recompute, device, flops, rate))
        loaded.clear()
        step = batch = None
    stage("offline", lambda: run_offline(config, storage))
    for arm in args.arms.split(","):
        own = load_config(FILE, [*common, "--method", arm, "--name", arm])
        stage(f"train {arm}", lambda own=own: run_training(own, storage), of_run)
    return 0


if __name__ == "__main__":
    sys.exit(main())
