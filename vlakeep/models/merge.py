"""Adapters merged into the base weights, written as a folder in the official format, one shard in memory at a time.

A 7B model in bfloat16 takes 15 GB; merging it in place would need the base, the result and float32 copies. Here the base files stay on
disk and are read tensor by tensor, so that the peak is one shard (5 GB) and one float32 matrix.
"""

import json
import re
from pathlib import Path
from typing import Callable, Dict, List, Optional, Sequence, Tuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tqdm import tqdm

from vlakeep.core.errors import CheckpointError
from vlakeep.models.adapters import merged, merged_state
from vlakeep.models.base import Backbone
from vlakeep.models.files import shards, tensor_table, weight_files, write_index, write_shard
from vlakeep.models.load import model_class

RECORD = "vlakeep_export.json"
_STORED = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def read_deltas(adapter: Path) -> Tuple[Dict[str, Tuple[torch.Tensor, torch.Tensor]], float]:
    """({module: (A, B)}, scale) of an adapter folder; a plain LoRA as save_adapter writes it."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    state = load_file(str(adapter / "adapter_model.safetensors"))
    pairs: Dict[str, List[Optional[torch.Tensor]]] = {}
    for name, tensor in state.items():
        found = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", name)
        if found:
            pairs.setdefault(found[1], [None, None])["AB".index(found[2])] = tensor.float()
    half = [name for name, pair in pairs.items() if pair[0] is None or pair[1] is None]
    if half or not pairs:
        what = f"{half[0]} lacks A or B" if half else "it holds no LoRA weights"
        raise CheckpointError(f"the adapter in {adapter} is not whole ({what}): use another checkpoint of the run")
    return {name: (a, b) for name, (a, b) in pairs.items()}, config["lora_alpha"] / config["r"]




def merge_checkpoint(base: Path, adapter: Path, out: Path, statistics: dict, dtype: Optional[torch.dtype] = None,
                     before: Sequence[Path] = (), rounding: Optional[Callable[[torch.Tensor], torch.Tensor]] = None) -> Dict[str, str]:
    """Write `base` with `adapter` merged in to the new folder `out`; dtype None keeps each tensor's stored type.

    The sum is taken in float32 and rounded once; processor and statistics come along. `before`: adapters that are merged first, each as
    into an export of its own (models/chain.py). rounding: what the weights of the decoder's linears went through before the adapter was
    trained on them (models/quantised.py).
    Returns the names of the merged modules and the weight file of each.
    Raises CheckpointError when the adapter is for modules that the base does not have, or of another shape.
    """
    table, where, kind = {}, {}, model_class(base)
    for file in weight_files(base):
        for name, entry in tensor_table(file).items():
            table[name], where[name] = entry, file
    stored = {kind.tensor_name(name): name for name in table}  # names of the network, which adapters have, to those of the files
    deltas, scale = read_deltas(adapter)
    earlier = [read_deltas(folder) for folder in before]
    problems = []
    for module, (a, b) in deltas.items():
        shape = table.get(stored.get(module + ".weight"), {}).get("shape")
        if shape is None:
            problems.append(f"{module} is not in the base model")
        elif [b.shape[0], *a.shape[1:]] != shape:
            problems.append(f"{module} is {shape} in the base model, {[b.shape[0], *a.shape[1:]]} in the adapter")
    if problems:
        raise CheckpointError(f"the adapter in {adapter} does not fit {base}: " + "; ".join(problems[:6]) + ": merge it into the base "
                              "model that it was trained on")
    kinds = {name: dtype or _STORED[entry["dtype"]] for name, entry in table.items()}
    plan = shards({name: torch.Size(table[name]["shape"]).numel() * kinds[name].itemsize for name in sorted(table)})
    done, total = {}, 0
    with tqdm(total=len(table), desc="merging", unit="tensor", disable=len(table) < 300, leave=False) as bar:
        for file_name, members in plan.items():
            tensors = {}
            for name in members:
                with safe_open(str(where[name]), framework="pt") as file:
                    tensor = file.get_tensor(name)
                module = kind.tensor_name(name)[:-len(".weight")] if name.endswith(".weight") else None
                if rounding and module and kind.is_decoder_linear(module):
                    tensor = rounding(tensor)
                for pairs, own_scale in earlier:
                    if module in pairs:
                        tensor = merged(tensor, pairs[module], own_scale).to(tensor.dtype)
                if module in deltas:
                    tensor = merged(tensor, deltas[module], scale)
                    done[module] = file_name
                tensors[name] = tensor.to(kinds[name]).contiguous()
                bar.update()
            write_shard(out, file_name, tensors)
            total += sum(t.nbytes for t in tensors.values())
    write_index(out, plan, total)
    kind.complete_merged(base, out, statistics, kinds[sorted(table)[0]])
    return done


def save_checkpoint(backbone: Backbone, folder, dtype: Optional[torch.dtype] = None) -> None:
    """A Backbone as a folder that vlakeep and the model's own code load; adapters are merged into the weights (in float32)."""
    backbone.write(Path(folder), merged_state(backbone, dtype), dtype)
