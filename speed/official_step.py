"""A step of the official OpenVLA fine-tuning script beside vlakeep's, at the shapes of OpenVLA-7B with random weights, in one run.

    git clone https://github.com/openvla/openvla DIR
    pip install --no-deps --target FOLDER -c constraints-openvla.txt transformers tokenizers timm peft accelerate huggingface_hub
    pip install --target FOLDER requests                    # where it is missing: that huggingface_hub wants it
    python speed/official_step.py --tokenizer DIR --openvla-dir DIR --official-path FOLDER [--out FILE]

LoRA of rank 32 on all linears, 16 x 1, bfloat16, AdamW at 5e-4; the same weights, batch and adapters at the start. Lines of JSON: seconds
of a step (median of blocks without a wait between steps), samples a second, GPU memory, the floor beside them, losses of the first steps.

    recipe     configs/openvla_official_recipe.yaml: the same arithmetic
    own        our own layers with adapters in float32, as `everywhere` of seven_b.py
    compiled   the same, compiled, on a GPU
    official   the script of the checkout, in a process of its own with the official libraries (official_side.py)
    ratios     samples a second and memory above the weights, ours over the official script's, beside what is aimed at

--official-path puts FOLDER first on that process's path; --official-python INTERPRETER runs it in another environment, such as the official
one. Without --openvla-dir it is left out. DIR of --tokenizer holds a Llama-2 tokenizer's files. --tiny: small shapes in float32, on a CPU.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from official_side import ADAPTER, fingerprint
from random_7b import in_memory
from safetensors.torch import save_file
from seven_b import DATA, Session, attempt, floor, floors, steps

from vlakeep.core.hardware import GIB
from vlakeep.core.loss_scale import LossScaler
from vlakeep.core.storage import Storage
from vlakeep.data.writer import write_rlds
from vlakeep.methods.base import Method
from vlakeep.models.adapters import add_lora
from vlakeep.tabletop import benchmark as tabletop
from vlakeep.train import make_optimizer, train_step

HERE = Path(__file__).resolve().parent
SIZE, LOSSES = 16, 4
AIMS = {"samples": 1.8, "memory_above_weights": 0.6}
PARTS = ("input_ids", "attention_mask", "labels", "pixel_values")
RECIPE, OWN, COMPILED, OFFICIAL = "recipe", "own", "compiled", "official"


class Comparison(Session):
    """A session in which all sides see one batch, made by the first that asks."""

    def __init__(self, args):
        super().__init__(args)
        self.rows, self.given = {}, {}
        self.counts = {"warm": LOSSES, **({"count": args.count, "blocks": args.blocks} if self.gpu else {"count": 2, "blocks": 1})}

    def batches(self, config, backbone, size: int, count: int):
        if not self.given:
            [batch] = super().batches(config, backbone, size, count)
            self.given = {name: getattr(batch, name).cpu().contiguous() for name in PARTS}
            self.batch = batch
        return [self.batch]

    def keep(self, name: str, row: dict) -> None:
        """A side's figures, with what follows from them."""
        row["samples_per_second"] = SIZE / row["seconds"]
        if "allocated_gib" in row:
            row.update(above_weights_gib=row["allocated_gib"] - row["weights_gib"],
                       reserved_above_weights_gib=row["reserved_gib"] - row["weights_gib"])
        self.rows[name] = row
        self.note(name, **row)


def first_losses(session, config, backbone) -> list:
    """Losses of the first steps, from the adapters as they are."""
    optimizer = make_optimizer([p for p in backbone.parameters() if p.requires_grad], config.train)
    batches = session.batches(config, backbone, SIZE, 1)
    losses = [train_step(backbone, Method(), optimizer, LossScaler(False), batches, config.train, step, False)["loss"]
              for step in range(1, LOSSES + 1)]
    optimizer.zero_grad(set_to_none=True)
    return torch.stack(losses).tolist()


def ours(session, name: str, config) -> None:
    session.fresh()
    backbone = session.model(config, lora=False)
    mark = fingerprint(backbone.network.state_dict())
    add_lora(backbone, config.lora, config.seed)
    backbone.train()
    if name == COMPILED:
        backbone.compile_layers()
    weights = torch.cuda.memory_allocated() / GIB if session.gpu else 0.0
    session.batches(config, backbone, SIZE, 1)
    if name == RECIPE:
        session.start = {ADAPTER + key: p.detach().cpu().clone() for key, p in backbone.model.named_parameters() if p.requires_grad}
        session.floor = floors(session, config, backbone, SIZE, 1)
    losses = first_losses(session, config, backbone)
    row = steps(session, config, backbone, Method(), SIZE, 1, session.counts["count"], session.counts["blocks"])
    session.keep(name, {**row, "weights_gib": weights, "losses": losses, "fingerprint": mark})


def side(args, *more: str) -> int:
    """Exit status of official_side.py, run with the official libraries."""
    path = [args.official_path, str(HERE.parent), os.environ.get("PYTHONPATH")]
    command = [args.official_python or sys.executable, str(HERE / "official_side.py"), "--openvla-dir", args.openvla_dir, *more]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}).returncode


def official(session) -> None:
    with tempfile.TemporaryDirectory() as folder:
        given, out = Path(folder) / "given.safetensors", Path(folder) / "figures.json"
        save_file({**session.given, **session.start}, str(given))
        numbers = [word for key, value in session.counts.items() for word in (f"--{key}", str(value))]
        if status := side(session.args, "--given", str(given), "--out", str(out), "--layers", str(session.args.layers), *numbers,
                          *(["--tiny"] if session.args.tiny else [])):
            raise RuntimeError(f"the process of the official script ended with status {status}; what it said stands above")
        session.keep(OFFICIAL, {**json.loads(out.read_text()), **session.floor, "micro": f"{SIZE} x 1"})


def ratios(session) -> None:
    """Ours over the official script's: samples a second and memory above the weights; and how far the losses lie apart."""
    theirs = session.rows[OFFICIAL]
    for name in (RECIPE, OWN, COMPILED):
        if name not in session.rows:
            continue
        row = session.rows[name]
        found = {"samples": theirs["seconds"] / row["seconds"]}
        if session.gpu:
            found["memory_above_weights"] = row["above_weights_gib"] / theirs["above_weights_gib"]
        apart = [abs(a - b) for a, b in zip(row["losses"], theirs["losses"])]
        session.note("ratios", of=name, **found, aims=AIMS, same_weights=row["fingerprint"] == theirs["fingerprint"],
                     first_loss_apart=f"{apart[0]:.1e}", losses_apart=f"{max(apart):.1e}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--openvla-dir", default=None)
    parser.add_argument("--official-path", default=None)
    parser.add_argument("--official-python", default=None)
    parser.add_argument("--root", default="/dev/shm/official_step")
    parser.add_argument("--out", default=None)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--count", type=int, default=10)
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    if args.openvla_dir and side(args):  # before minutes of a GPU are spent
        return 2
    session = Comparison(args)
    session.limit(1000)
    in_memory(session.base, args.tokenizer, session.device, args.layers, args.tiny)
    write_rlds(Storage.from_config(session.config()).data, DATA, tabletop.collect_demos("corner", 12, seed=1, noise=0.2), overwrite=True)
    everywhere = ["--method", "baseline", "--lora.layers", "all", "--lora.modules", "[all-linear]"]
    attempt(session, "floor", floor, session)
    attempt(session, RECIPE, ours, session, RECIPE, session.config(file="openvla_official_recipe"))
    for name in (OWN, COMPILED) if session.gpu else (OWN,):
        attempt(session, name, ours, session, name, session.config(*everywhere))
    if args.openvla_dir is None:
        session.note(OFFICIAL, left_out="no --openvla-dir names a checkout of the official repository")
        return 0
    attempt(session, OFFICIAL, official, session)
    if OFFICIAL not in session.rows:
        return 1
    ratios(session)
    return 0


if __name__ == "__main__":
    sys.exit(main())
