"""Loss trace of the official finetune.py beside that of configs/openvla_official_recipe.yaml, on the same batches.

    python scripts/official_trace.py --openvla_dir DIR --golden DIR --tokenizer DIR [--steps 24]

The official script runs as it lies in the checkout, its text edited in memory for a CPU without W&B (device calls, float32 instead of
bfloat16, one line that notes the loss). Its pipeline shuffles and augments without a seed, so the batches it made and the adapters it
started from are recorded, and our training step then gets exactly these. Needs the official environment with TensorFlow; `--golden` holds
the golden model (fused_tiny) and data (rlds/tfds), `--tokenizer` a Llama-2 tokenizer.
"""

import argparse
import contextlib
import json
import shutil
import sys
import tempfile
import types
from pathlib import Path

import torch

from vlakeep.core.compat import import_timm
from vlakeep.core.config import load_config
from vlakeep.data.sample import Batch
from vlakeep.methods.baseline import Baseline
from vlakeep.models.adapters import add_lora
from vlakeep.models.load import make_backbone
from vlakeep.openvla.backbone import OpenVLABackbone
from vlakeep.openvla.format import write_checkpoint
from vlakeep.parity.golden_weights import golden_backbone
from vlakeep.train import make_optimizer, train_step

EDITS = {
    'assert torch.cuda.is_available(), "Fine-tuning assumes at least one GPU is available!"': "pass",
    "distributed_state = PartialState()": "distributed_state = PartialState(cpu=True)",
    "torch.cuda.set_device(device_id := distributed_state.local_process_index)": 'device_id = "cpu"',
    "torch.cuda.empty_cache()": "pass",
    "device_ids=[device_id], ": "",
    'torch.autocast("cuda", dtype=torch.bfloat16)': "TRACE.no_autocast()",
    "torch.bfloat16": "torch.float32",
    "recent_losses.append(loss.item())": "recent_losses.append(loss.item()); TRACE.losses.append(loss.item()); TRACE.batches.append(batch)",
    "vla.print_trainable_parameters()": "TRACE.start = {n: p.detach().clone() for n, p in vla.named_parameters() if p.requires_grad}",
}


def write_golden_checkpoint(golden: Path, tokenizer: Path, folder: Path) -> OpenVLABackbone:
    """The golden model with its formula weights as a folder that both sides load."""
    backbone = golden_backbone(golden / "fused_tiny")
    config = dict(backbone.config)
    write_checkpoint(folder, backbone.openvla.state_dict(), config, {})
    for file in tokenizer.iterdir():
        shutil.copyfile(file, folder / file.name)
    side = config["image_sizes"][0]
    (folder / "preprocessor_config.json").write_text(json.dumps({
        "image_processor_type": "PrismaticImageProcessor", "processor_class": "PrismaticProcessor", "use_fused_vision_backbone": True,
        "image_resize_strategy": "resize-naive", "input_sizes": [[3, side, side]] * 2, "interpolations": ["bicubic"] * 2,
        "means": [[0.484375, 0.455078125, 0.40625], [0.5] * 3], "stds": [[0.228515625, 0.2236328125, 0.224609375], [0.5] * 3]}))
    return backbone


def run_official(openvla: Path, checkpoint: Path, data: Path, out: Path, steps: int, batch: int, rank: int, dataset: str):
    """(losses, batches, adapters at the start) of the official script."""
    trace = types.SimpleNamespace(losses=[], batches=[], start={}, no_autocast=contextlib.nullcontext)
    source = (openvla / "vla-scripts" / "finetune.py").read_text()
    for old, new in EDITS.items():
        if old not in source:
            raise SystemExit(f"the checkout's finetune.py does not hold {old!r}: it is of another commit")
        source = source.replace(old, new)
    wandb = types.ModuleType("wandb")
    wandb.init, wandb.log = (lambda **kwargs: None), (lambda *args, **kwargs: None)
    sys.modules["wandb"] = wandb
    sys.path.insert(0, str(openvla))
    module = types.ModuleType("official_finetune")
    module.__file__ = str(openvla / "vla-scripts" / "finetune.py")
    module.TRACE = trace
    sys.modules["official_finetune"] = module
    exec(compile(source, module.__file__, "exec"), module.__dict__)
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo", init_method=f"file://{out}/rendezvous", rank=0, world_size=1)
    config = module.FinetuneConfig(
        vla_path=str(checkpoint), data_root_dir=data, dataset_name=dataset, run_root_dir=out / "runs", adapter_tmp_dir=out / "adapters",
        batch_size=batch, max_steps=steps, save_steps=10**9, grad_accumulation_steps=1, image_aug=True, shuffle_buffer_size=1000,
        lora_rank=rank)
    module.finetune.__wrapped__(config) if hasattr(module.finetune, "__wrapped__") else module.finetune(config)
    return trace.losses[:steps], trace.batches[:steps], trace.start


def run_ours(checkpoint: Path, batches, start, rank: int, source: str, openvla: Path):
    """Losses of our training step with the official preset on these batches, from these adapters."""
    recipe = "openvla_official_recipe"
    config = load_config(recipe, ["--backbone.checkpoint", str(checkpoint), "--backbone.dtype", "float32", "--train.autocast", "none",
                                  "--lora.rank", str(rank), "--lora.alpha", str(min(rank, 16)), "--backbone.source", source,
                                  "--backbone.openvla_dir", str(openvla)])
    backbone = make_backbone(config.backbone, "cpu", checkpoint.parent)
    add_lora(backbone, config.lora, config.seed)
    ours = {name: p for name, p in backbone.model.named_parameters() if p.requires_grad}
    if set(ours) != set(start):
        raise SystemExit(f"LoRA parameters differ: {sorted(set(ours) ^ set(start))[:4]}")
    with torch.no_grad():
        for name, p in ours.items():
            p.copy_(start[name])
    backbone.train()
    optimizer = make_optimizer(list(ours.values()), config.train)
    scaler = torch.cuda.amp.GradScaler(enabled=False)
    losses = []
    for step, official in enumerate(batches, start=1):
        batch = Batch(official["input_ids"], official["attention_mask"], official["labels"], official["pixel_values"], [])
        losses.append(float(train_step(backbone, Baseline(), optimizer, scaler, [batch], config.train, step, True)["loss"]))
    return losses


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--openvla_dir", type=Path, required=True)
    parser.add_argument("--golden", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--dataset", default="libero_spatial_no_noops")
    parser.add_argument("--tolerance", type=float, default=1e-4)
    args = parser.parse_args()
    import_timm()
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary)
        checkpoint = out / "golden-tiny"
        checkpoint.mkdir()
        write_golden_checkpoint(args.golden, args.tokenizer, checkpoint)
        shutil.copytree(args.golden / "rlds" / "tfds", out / "data")  # the official pipeline writes its statistics there
        official, batches, start = run_official(args.openvla_dir.absolute(), checkpoint, out / "data", out, args.steps, args.batch,
                                                args.rank, args.dataset)
        traces = {source: run_ours(checkpoint, batches, start, args.rank, source, args.openvla_dir) for source in ("native", "official")}
    print("step  finetune.py   our step, native   our step, official classes")
    for step, values in enumerate(zip(official, traces["native"], traces["official"]), start=1):
        print(f"{step:4d}  {values[0]:.6f}      {values[1]:.6f}          {values[2]:.6f}")
    worst = {source: max(abs(a - b) for a, b in zip(official, trace)) for source, trace in traces.items()}
    print(f"largest difference over {len(official)} steps: native {worst['native']:.2e}, official classes {worst['official']:.2e}")
    return 0 if max(worst.values()) <= args.tolerance else 1


if __name__ == "__main__":
    sys.exit(main())
