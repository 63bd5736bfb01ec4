"""A base whose decoder linears hold 4 bits a weight (NF4 of QLoRA, arXiv 2305.14314, through bitsandbytes): --backbone.quantisation nf4.

Blocks of 64 weights share a scale, and 256 scales a second one: 4.127 bits a weight. Frozen weights alone are quantised: towers, projector,
embeddings, lm_head and adapters keep their type. A quantised base is another function, so it is another base to every hash and check
(`identity`), and what is merged into for an export are the rounded weights that the adapter was trained on (`rounded`).
"""

import hashlib
from typing import Dict

import torch
from torch import nn

from vlakeep.core.compat import import_bitsandbytes

BYTES = (4 + 8 / 64 + 32 / (64 * 256)) / 8  # a weight


def _library():
    return import_bitsandbytes("--backbone.quantisation nf4", "--backbone.quantisation none")


def identity(weights_sha256: str, quantisation: str) -> str:
    """The fingerprint of base weights that are quantised so after they were read."""
    return weights_sha256 if quantisation == "none" else hashlib.sha256(f"{weights_sha256} {quantisation}".encode()).hexdigest()


def quantise(backbone, device) -> None:
    """Move a model that was loaded to the CPU to the device, its decoder linears as NF4, one by one. ValueError without bitsandbytes."""
    bnb = _library()
    for layer in backbone.decoder_layers:
        for parent in list(layer.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is nn.Linear:
                    setattr(parent, name, _quantised(bnb, child, device))
    backbone.quantisation = "nf4"
    backbone.to(device)


def _quantised(bnb, linear: nn.Linear, device) -> nn.Module:
    with torch.device("meta"):
        made = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=linear.bias is not None, compute_dtype=linear.weight.dtype,
                                 quant_type="nf4", compress_statistics=True)
    made.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True,
                                    module=made).to(device)
    made.bias = linear.bias
    made.support_avx512bf16_for_cpu = False  # it would pack the weights anew at each change between training and evaluation
    return made.train(linear.training)


def is_quantised(linear: nn.Module) -> bool:
    return getattr(getattr(linear, "weight", None), "quant_state", None) is not None


def plain_weight(linear: nn.Module) -> torch.Tensor:
    """The weight [O, D] that a linear computes with, in its own type; of a quantised one a copy."""
    if not is_quantised(linear):
        return linear.weight.detach()
    return _library().functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state)


@torch.no_grad()
def rounded(weight: torch.Tensor, dtype: torch.dtype, device) -> torch.Tensor:
    """The weight that a linear computes with whose checkpoint holds `weight`, loaded as `dtype` and quantised; on the CPU, in `dtype`."""
    functional = _library().functional
    packed, state = functional.quantize_4bit(weight.to(device, dtype).contiguous(), blocksize=64, compress_statistics=True,
                                             quant_type="nf4")
    return functional.dequantize_4bit(packed, state).cpu()


def plain_state(network: nn.Module) -> Dict[str, torch.Tensor]:
    """network.state_dict() with quantised weights as they compute, and without what belongs to their packing."""
    packed = {name: module for name, module in network.named_modules() if is_quantised(module)}
    state = {}
    for key, tensor in network.state_dict().items():
        owner = key.rpartition(".")[0]
        if owner in packed and key.endswith(".weight"):
            tensor = plain_weight(packed[owner])
        elif ".weight." in key and key.partition(".weight.")[0] in packed:
            continue
        state[key] = tensor
    return state
