"""What the processes of forked.py have imported before they are forked: all that a training needs, which takes longer than the training."""

from vlakeep import cli, train  # noqa: F401
from vlakeep.methods import graded, icsm_hsw_thermostat  # noqa: F401
from vlakeep.models.adapters import attach_lora
from vlakeep.models.load import make_backbone

backbone = make_backbone("tabletop-base")
attach_lora(backbone, ["language_model.model.layers.0.self_attn.q_proj"], 1, 1.0)
