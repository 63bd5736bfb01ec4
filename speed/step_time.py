"""Time of one training step, method over baseline, interleaved in one process, so that a noisy machine disturbs all arms alike.

    vlakeep tabletop-data --config configs/method_icsm_hsw_thermostat.yaml
    vlakeep offline --config configs/method_icsm_hsw_thermostat.yaml
    python speed/step_time.py [--rounds 30] [--device cuda] [--key value ...]

Each round times one step of every arm; the table gives medians and the median of the per-round ratios to the baseline. The Thermostat's
measurement is timed by itself and added as measurement / K. The floor is the arithmetic of the baseline step at the machine's measured
matrix-product rate.
"""

import argparse
import statistics
import sys
import time

import torch

from vlakeep.core.config import load_config
from vlakeep.core.loss_scale import LossScaler
from vlakeep.core.parallel import pick_device, set_threads
from vlakeep.core.registry import method_class
from vlakeep.core.storage import Storage
from vlakeep.data.loader import make_stream
from vlakeep.models.adapters import add_lora
from vlakeep.models.load import make_backbone
from vlakeep.train import make_optimizer, train_step

METHOD = "configs/method_icsm_hsw_thermostat.yaml"
ARMS = {
    "baseline": ["--method", "baseline"],
    "method, everything off": ["--hsw.enabled", "false", "--thermostat.enabled", "false"],
    "residual": ["--hsw.site", "residual"],
    "lora_input": ["--hsw.site", "lora_input"],
    "both": ["--hsw.site", "both"],
}


def synchronise(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def build(overrides, device):
    """(one step as a function of (step, observe), the method, its config)."""
    config = load_config(METHOD, overrides + ["--thermostat.calibration", "1000000", "--hsw.gamma", "0.5", "--hsw.beta", "0.8"])
    storage = Storage.from_config(config)
    torch.manual_seed(0)
    backbone = make_backbone(config.backbone, device)
    add_lora(backbone, config.lora, config.seed)
    backbone.train()
    method, _ = method_class(config.method).prepare(config, storage, backbone)
    method.attach(backbone)
    for site in getattr(method, "_sites", []):
        site.set_gains(method._fixed)  # gains of 1 would skip the surgery that is to be timed
    optimizer = make_optimizer([p for p in backbone.parameters() if p.requires_grad], config.train)
    scaler = LossScaler(False)
    stream = make_stream(config.data, storage.data, backbone.processor, config.train.batch_size, config.seed, 0, 1, storage.cache)
    batch = next(stream).to(device)

    def step(number, observe):
        train_step(backbone, method, optimizer, scaler, [batch], config.train, number, observe)

    return step, method, config, backbone, batch


def floor_seconds(backbone, batch, device) -> float:
    """Least time of the baseline step: its multiply-adds at the rate of a large product of the model's dtype."""
    side = 1536 if device.type == "cpu" else 8192
    a = torch.randn(side, side, device=device, dtype=backbone.dtype)
    for _ in range(3):
        a @ a
    synchronise(device)
    begin = time.perf_counter()
    for _ in range(5):
        a @ a
    synchronise(device)
    rate = 5 * 2 * side ** 3 / (time.perf_counter() - begin)
    tokens = batch.size * (batch.input_ids.shape[1] + backbone.num_patches)
    llm = sum(p.numel() for p in backbone.decoder_layers.parameters() if not p.requires_grad)
    vision = sum(p.numel() for p in backbone.openvla.vision_backbone.parameters())
    head = backbone.language_model.lm_head.weight.numel()
    labelled = batch.size * (batch.input_ids.shape[1] - batch.first_label)
    # Frozen weights: forward and the gradient of the activations, 2 + 2 FLOPs a weight and token; the vision tower forward alone.
    flops = 4 * llm * tokens + 2 * vision * batch.size * backbone.num_patches + 4 * head * labelled
    return flops / rate


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=2)
    args, rest = parser.parse_known_args(argv)
    set_threads(args.threads)
    device = pick_device(args.device)
    arms = {name: build(overrides + rest, device) for name, overrides in ARMS.items()}
    times = {name: [] for name in arms}
    for number in range(-3, args.rounds):
        for name, (step, _, config, _, _) in arms.items():
            synchronise(device)
            begin = time.perf_counter()
            # Step numbers that are no multiple of K, so that no measurement falls into a timed step; not observed, as between logs.
            step(number * config.thermostat.every + 1, False)
            synchronise(device)
            if number >= 0:
                times[name].append(time.perf_counter() - begin)
    _, method, config, _, _ = arms["residual"]
    readings = []
    for number in range(8):
        begin = time.perf_counter()
        method._thermometer.measure(number)
        readings.append(time.perf_counter() - begin)
    reading = statistics.median(readings[2:])
    _, _, _, backbone, batch = arms["baseline"]
    floor, base = floor_seconds(backbone, batch, device), statistics.median(times["baseline"])
    print(f"{device}, batch {batch.size}, {batch.input_ids.shape[1] + backbone.num_patches} tokens, {args.rounds} rounds")
    print(f"arithmetic floor of the baseline step {floor * 1e3:.1f} ms, measured {base * 1e3:.1f} ms: {base / floor:.1f} times the floor")
    print(f"Thermostat: {reading * 1e3:.1f} ms a measurement, every {config.thermostat.every} steps: "
          f"{reading / config.thermostat.every * 1e3:.2f} ms a step")
    print(f"{'arm':24s} {'ms':>8s} {'ratio':>7s} {'with Thermostat':>16s}")
    for name, values in times.items():
        ratio = statistics.median(v / b for v, b in zip(values, times["baseline"]))
        extra = reading / config.thermostat.every / base if name in ("residual", "lora_input", "both") else 0.0
        print(f"{name:24s} {statistics.median(values) * 1e3:8.1f} {ratio:7.3f} {ratio + extra:16.3f}")


if __name__ == "__main__":
    main(sys.argv[1:])
