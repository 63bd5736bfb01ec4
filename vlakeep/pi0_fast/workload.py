"""Shapes of a pi0-FAST as a Workload (models/workload.py): from config.json, which names the variant, the cameras and the chunk.

PUBLISHED holds what is known of checkpoints that are often asked about before they are fetched.
"""

import math
from typing import Dict

from vlakeep.models.workload import Tower, Workload
from vlakeep.pi0_fast.format import PICTURE, STATE, cameras, complete_config, sizes_of
from vlakeep.pi0_fast.model import EMBEDDING, HEAD, expected_shapes, precise

_PICTURES = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
# Cameras and state as openpi's robots have them: --backbone.cameras and --backbone.state say others, and neither has weights.
PUBLISHED = {"lerobot/pi0fast-base": {
    "type": "pi0_fast", "paligemma_variant": "gemma_2b", "chunk_size": 50,
    "input_features": {**{PICTURE + name: {"type": "VISUAL", "shape": [3, 224, 224]} for name in _PICTURES},
                       STATE: {"type": "STATE", "shape": [8]}},
    "output_features": {"action": {"type": "ACTION", "shape": [7]}},
}}
# A step of a smooth chunk of seven numbers takes 1.2 codes; around the codes of a row with a state stand 52 tokens of prompt, and 25 that
# are labelled with them, padding to the longest row of a batch of 8 included (speed/pi0_full.py).
CODES, PROMPT, AROUND = 1.2, 52, 25


def workload(kind, config: dict) -> Workload:
    """`kind` is the class of the model."""
    config = complete_config(config)
    sizes, linears, seen = sizes_of(config), kind.linear_shapes(config), cameras(config)
    vision, answer = sizes.vision, math.ceil(CODES * config["chunk_size"])
    parameters: Dict[str, int] = {}
    kept = 0
    for name, shape in expected_shapes(sizes).items():
        if name == EMBEDDING:  # one with the head
            continue
        part = ("vision" if ".vision_tower." in name else "projector" if ".multi_modal_projector." in name else
                "embeddings and head" if name == HEAD else "decoder")
        parameters[part] = parameters.get(part, 0) + math.prod(shape)
        kept += math.prod(shape) * precise(name)
    towers = [Tower(camera, vision.num_hidden_layers, vision.hidden_size, vision.intermediate_size, sizes.patches) for camera in seen]
    return Workload(layers=sizes.depth, width=sizes.width, mlp=sizes.mlp_dim, heads=sizes.num_heads, linears=linears,
                    shared=kind.shared_inputs, vocabulary=sizes.vocab_size, towers=towers, projector=[(vision.hidden_size, sizes.width)],
                    patches=sizes.patches * len(seen), text=PROMPT + AROUND + answer, labelled=AROUND + answer, answer=answer,
                    chunk=config["chunk_size"], parameters=parameters, precise=kept)
