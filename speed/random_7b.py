"""A base of the shapes of OpenVLA-7B with random weights, for what depends on shapes alone: memory, time, parity of two programs.

    python speed/random_7b.py --tokenizer DIR --out FOLDER [--layers 32]      a checkpoint on the disk, 15 GB, for `vlakeep verify-openvla`

DIR holds a Llama-2 tokenizer's files (scripts/fetch_llama2_tokenizer.py). `in_memory` makes the same as a folder without bytes, whose
weights lie in this process: a stage loads them in the time of a copy to the device, and hashes nothing.
"""

import argparse
import json
import shutil
import struct
import sys
from pathlib import Path
from typing import Dict

import torch

from vlakeep.models import files
from vlakeep.models.files import INDEX, write_json
from vlakeep.openvla import format as checkpoint_format
from vlakeep.openvla.format import complete_config, write_sidecars
from vlakeep.openvla.model import OpenVLA, parameters_on_meta
from vlakeep.openvla.workload import SEVEN_B

PREPROCESSOR = {
    "image_processor_type": "PrismaticImageProcessor", "processor_class": "PrismaticProcessor", "use_fused_vision_backbone": True,
    "image_resize_strategy": "resize-naive", "input_sizes": [[3, 224, 224], [3, 224, 224]], "interpolations": ["bicubic", "bicubic"],
    "means": [[0.484375, 0.455078125, 0.40625], [0.5, 0.5, 0.5]], "stds": [[0.228515625, 0.2236328125, 0.224609375], [0.5, 0.5, 0.5]],
}
TINY = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "num_hidden_layers": 10}  # to try a script on a CPU


def shapes_config(layers: int, tiny: bool = False) -> dict:
    """config.json of the 7B shapes with this many decoder layers; tiny: with small towers and a narrow decoder."""
    text = {**SEVEN_B["text_config"], **(TINY if tiny else {"num_hidden_layers": layers})}
    towers = {"timm_model_ids": ["vlakeep_vit_tiny_patch16_dinov2", "vlakeep_vit_tiny_patch16_siglip"],
              "image_sizes": [64, 64]} if tiny else {}
    return complete_config({**SEVEN_B, **towers, "text_config": text})


def random_tensors(config: dict, device, seed: int = 0):
    """(name, bfloat16 tensor on the CPU) of every weight, small numbers drawn on the device."""
    with parameters_on_meta():
        model = OpenVLA(config)
    torch.manual_seed(seed)
    for name, meta in model.state_dict().items():
        if meta.ndim > 1:
            std = 0.02 if "embed_tokens" in name or "pos_embed" in name else min(0.05, meta[0].numel() ** -0.5)
            yield name, (torch.randn(meta.shape, device=device) * std).bfloat16().cpu()
        else:
            yield name, torch.full(meta.shape, 0.0 if name.endswith("bias") else 1.0, dtype=torch.bfloat16)


def _sidecars(folder: Path, config: dict, tokenizer: Path, tiny: bool) -> None:
    write_sidecars(folder, dict(config, torch_dtype="bfloat16"), {})
    for file in tokenizer.iterdir():
        shutil.copyfile(file, folder / file.name)
    side = 64 if tiny else 224
    write_json(folder / "preprocessor_config.json", {**PREPROCESSOR, "input_sizes": [[3, side, side]] * 2})


def write_random_checkpoint(folder: Path, tokenizer: Path, device, layers: int) -> None:
    """A folder that official code loads too, in shards of 4 GB."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config = shapes_config(layers)
    shard: Dict[str, torch.Tensor] = {}
    weight_map, number, total = {}, 1, 0

    def flush() -> None:
        file = f"model-{number:05d}.safetensors"
        save_file(shard, str(folder / file), metadata={"format": "pt"})
        weight_map.update({key: file for key in shard})
        shard.clear()

    for name, tensor in random_tensors(config, device):
        shard[name] = tensor
        total += tensor.nbytes
        if sum(one.nbytes for one in shard.values()) > 4e9:
            flush()
            number += 1
    if shard:
        flush()
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    _sidecars(folder, config, tokenizer, False)


def in_memory(folder: Path, tokenizer: Path, device, layers: int, tiny: bool = False) -> None:
    """Make `folder` the base of this process: headers and small files are there, weights are not on the disk."""
    folder.mkdir(parents=True, exist_ok=True)
    config, state, table, offset = shapes_config(layers, tiny), {}, {}, 0
    for name, tensor in random_tensors(config, device):
        state[name] = tensor
        table[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [offset, offset + tensor.nbytes]}
        offset += tensor.nbytes
    header = json.dumps(table).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + offset)  # a hole, which takes no room
    _sidecars(folder, config, tokenizer, tiny)

    def load_checkpoint(_, dtype=torch.float32, attn_implementation="sdpa"):
        with parameters_on_meta():
            model = OpenVLA(config, attn_implementation)
        model.load_state_dict({name: tensor.to(dtype) for name, tensor in state.items()}, strict=True, assign=True)
        return model.eval(), config

    checkpoint_format.load_checkpoint = load_checkpoint
    files.weights_hash = lambda folder: "0" * 64


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=32)
    args = parser.parse_args()
    write_random_checkpoint(args.out, args.tokenizer, torch.device("cuda" if torch.cuda.is_available() else "cpu"), args.layers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
