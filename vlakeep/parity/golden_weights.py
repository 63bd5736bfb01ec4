"""Golden models without stored weights: every weight follows from its name by a formula, and vision sizes from the shapes.

golden_backbone(folder) gives the model of a folder with config.json and state_dict.json.
"""

import json
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Callable, Dict, Optional, cast

import numpy as np
import torch
from tqdm import tqdm

from vlakeep.core.compat import import_timm
from vlakeep.data.sample import SampleSpec
from vlakeep.openvla.action_tokenizer import ActionTokenizer
from vlakeep.openvla.backbone import OpenVLABackbone
from vlakeep.openvla.format import complete_config
from vlakeep.openvla.model import OpenVLA, parameters_on_meta
from vlakeep.openvla.processor import Processor

LAB_HEAD_DIM = 12  # of the tiny ViTs made for the golden data
EMPTY_TOKEN, EOS = 29871, 2  # of the Llama-2 vocabulary that the golden models speak


def uniform(name: str, count: int) -> np.ndarray:
    """count values of unit variance, float64, from splitmix64 over (crc32(name), index)."""
    with np.errstate(over="ignore"):
        z = np.arange(count, dtype=np.uint64)
        z += np.uint64(((zlib.crc32(name.encode()) << 32) + 0x9E3779B97F4A7C15) % 2**64)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return (2.0 * ((z >> np.uint64(11)).astype(np.float64) * 2.0**-53) - 1.0) * np.sqrt(3.0)


def formula_tensor(name: str, shape) -> torch.Tensor:
    """The float32 weight that the golden data define for a state-dict key (or a LoRA name without .default and .weight)."""
    shape, last = tuple(shape), name.rsplit(".", 1)[-1]
    u = uniform(name, int(np.prod(shape)))
    fan_in = int(np.prod(shape[1:])) if len(shape) > 1 else 1
    offset, scale = 0.0, fan_in ** -0.5
    if last == "scale_factor":
        offset, scale = 0.5, 0.2
    elif last == "bias":
        scale = 0.1
    elif name.endswith("lora_B"):
        scale = 0.05
    elif last in ("pos_embed", "cls_token", "reg_token", "latent"):
        scale = 0.5
    elif name.endswith("embed_tokens.weight"):
        scale = 1.0
    elif len(shape) == 1:
        offset, scale = 1.0, 0.1
    elif name.endswith("lm_head.weight"):
        scale = 2.0 * fan_in ** -0.5
    value = (offset + scale * u).astype(np.float32).reshape(shape)
    if name.endswith("lm_head.weight") and len(shape) == 2:
        value[31744:32000] = (3.0 * scale * u).astype(np.float32).reshape(shape)[31744:32000]
    return torch.from_numpy(value)


def fill(module: torch.nn.Module, prefix: str = "") -> Dict[str, torch.Tensor]:
    names = module.state_dict()
    total = sum(t.numel() for t in names.values())
    bar = tqdm(names.items(), desc="weights by formula", disable=total < 50_000_000, leave=False)
    return {name: formula_tensor(prefix + name, tensor.shape) for name, tensor in bar}


# Models

def _lab_vit(shapes: Dict[str, list], prefix: str) -> Callable:
    """An entry point for timm with the sizes that the shapes below `prefix` show."""
    from timm.models.vision_transformer import VisionTransformer

    def shape(name):
        return shapes.get(prefix + name)

    dim, patch = shape("patch_embed.proj.weight")[0], shape("patch_embed.proj.weight")[-1]
    depth = 1 + max(int(name[len(prefix):].split(".")[1]) for name in shapes if name.startswith(prefix + "blocks."))
    sizes = dict(
        patch_size=patch,
        embed_dim=dim,
        depth=depth,
        num_heads=max(1, dim // LAB_HEAD_DIM),
        mlp_ratio=(shape("blocks.0.mlp.fc1.weight")[0] + 0.5) / dim,  # + 0.5: timm truncates dim * ratio
        class_token=shape("cls_token") is not None,
        reg_tokens=(shape("reg_token") or [0, 0])[1],
        init_values=1e-5 if shape("blocks.0.ls1.scale_factor") else None,
        global_pool="map" if shape("attn_pool.latent") else "token",
    )
    if not sizes["class_token"] and sizes["global_pool"] == "token":
        sizes["global_pool"] = "avg"
    sizes["no_embed_class"] = sizes["class_token"]

    def entry(pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, cache_dir=None, **options):
        return VisionTransformer(**dict(sizes, **options))

    entry.__name__ = f"golden_vit_{zlib.crc32(repr(sorted(sizes.items())).encode()):08x}"
    return entry


def named_shapes(tree) -> Dict[str, list]:
    """name -> shape from a list of {"name", "shape"} or a dictionary name -> shape (or -> {"shape"})."""
    if isinstance(tree, dict) and not any("." in key for key in tree):
        tree = next((value for value in tree.values() if isinstance(value, (list, dict)) and named_shapes(value)), {})
    if isinstance(tree, dict):
        return {name: list(value["shape"] if isinstance(value, dict) else value) for name, value in tree.items()}
    return {entry["name"]: list(entry["shape"]) for entry in tree if isinstance(entry, dict) and "shape" in entry}


def golden_config(folder, shapes: Dict[str, list]) -> dict:
    """config.json with vision ids that timm does not know replaced by ViTs of the shapes that state_dict.json shows."""
    config = complete_config(json.loads((Path(folder) / "config.json").read_text()), str(Path(folder) / "config.json"))
    timm = import_timm()
    for i, part in enumerate(("featurizer", "fused_featurizer")[:len(config["timm_model_ids"])]):
        if not timm.is_model(config["timm_model_ids"][i]):
            entry = _lab_vit(shapes, f"vision_backbone.{part}.")
            if not timm.is_model(entry.__name__):
                timm.models.register_model(entry)
            config["timm_model_ids"][i] = entry.__name__
    return config


def golden_backbone(folder, state: Optional[Dict[str, torch.Tensor]] = None) -> OpenVLABackbone:
    """The golden model with its formula weights. It has no tokenizer; ids are those of Llama-2."""
    shapes = named_shapes(json.loads((Path(folder) / "state_dict.json").read_text()))
    config = golden_config(folder, shapes)
    with parameters_on_meta():
        model = OpenVLA(config, "sdpa")
    model.load_state_dict(state if state is not None else fill(model), strict=True, assign=True)
    vocabulary = config["text_config"]["vocab_size"] - config["pad_to_multiple_of"]
    codec = ActionTokenizer(vocabulary)
    ids_only = SimpleNamespace(
        tokenizer=SimpleNamespace(eos_token_id=EOS),
        pad_token_id=config["pad_token_id"],
        empty_token_id=EMPTY_TOKEN,
        spec=SampleSpec(),
        action_tokenizer=codec,
        decode_actions=lambda ids: codec.decode(ids)[:, None],
    )
    return OpenVLABackbone(model.eval(), cast(Processor, ids_only), config.get("norm_stats") or {}, Path(folder))
