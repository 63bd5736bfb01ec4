"""Shapes of an OpenVLA checkpoint as a Workload (models/workload.py): from config.json and the tensors' shapes, without weights.

PUBLISHED holds config.json's shapes of checkpoints that are often asked about before they are fetched.
"""

import json
import math
import re
from functools import lru_cache
from typing import Dict, Optional, Tuple

from vlakeep.models.workload import Tower, Workload

Shapes = Dict[str, Tuple[int, ...]]
# The released OpenVLA-7B.
SEVEN_B = {
    "model_type": "openvla", "use_fused_vision_backbone": True, "image_sizes": [224, 224],
    "timm_model_ids": ["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"], "timm_override_act_layers": [None, None],
    "pad_to_multiple_of": 64, "pad_token_id": 32000, "text_config": {"model_type": "llama", "vocab_size": 32064, "pad_token_id": 32000},
}
# The checkpoints of LIBERO suites are the same network, trained on.
_NAMES = ["openvla-7b", *(f"openvla-7b-finetuned-libero-{suite}" for suite in ("spatial", "object", "goal", "10"))]
PUBLISHED = {f"{owner}{name}": SEVEN_B for name in _NAMES for owner in ("openvla/", "")}


def shapes_of(config: dict) -> Shapes:
    """Shapes of the tensors of a model that is not there, built without memory."""
    return _built(json.dumps(config, sort_keys=True))


@lru_cache(maxsize=4)  # seconds, and a profile asks as often as the plan
def _built(config: str) -> Shapes:
    from vlakeep.openvla.format import complete_config
    from vlakeep.openvla.model import OpenVLA, parameters_on_meta

    with parameters_on_meta():
        model = OpenVLA(complete_config(json.loads(config)))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def workload(kind, config: dict, shapes: Optional[Shapes]) -> Workload:
    """`kind` is the class of the model; shapes None builds them. The vision towers run but for their last block."""
    shapes = shapes or shapes_of(config)
    layers, width = kind.sizes(config)
    linears = kind.linear_shapes(config)
    text = config.get("text_config") or {}
    towers, patches = [], 0
    for prefix in ("vision_backbone.featurizer.", "vision_backbone.fused_featurizer."):
        weight = shapes.get(prefix + "patch_embed.proj.weight")
        if weight is None:
            continue
        side = config["image_sizes"][len(towers)] // weight[-1]
        patches = side * side
        prefixes = sum(math.prod(shapes[prefix + name][:-1]) for name in ("cls_token", "reg_token") if prefix + name in shapes)
        blocks = len({name for name in shapes if re.match(re.escape(prefix) + r"blocks\.\d+\.mlp\.fc1\.weight$", name)})
        mlp, tower_width = shapes[prefix + "blocks.0.mlp.fc1.weight"]
        towers.append(Tower(prefix.split(".")[1], blocks - 1, tower_width, mlp, patches + prefixes))
    projector = [(shape[1], shape[0]) for name, shape in sorted(shapes.items()) if re.fullmatch(r"projector\.fc\d\.weight", name)]
    parameters: Dict[str, int] = {}
    for name, shape in shapes.items():
        part = ("vision" if name.startswith("vision_backbone.") else "projector" if name.startswith("projector.") else
                "decoder" if ".layers." in name else "embeddings and head")
        parameters[part] = parameters.get(part, 0) + math.prod(shape)
    return Workload(layers=layers, width=width, mlp=linears["gate_proj"][1], heads=int(text.get("num_attention_heads", 32)),
                    linears=linears, shared=kind.shared_inputs, towers=towers,
                    vocabulary=shapes["language_model.model.embed_tokens.weight"][0],
                    projector=projector, patches=patches, answer=kind.answer_tokens,
                    action=kind.answer_tokens - 1, parameters=parameters)
