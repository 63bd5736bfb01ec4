"""What the cells of a study need, imported once in the process that they are forked from (studies/schedulers.py)."""

from vlakeep.core.compat import import_timm

import_timm()  # before peft: what transformers imports needs torchvision to load

import peft  # noqa: E402, F401
from transformers.models.llama import modeling_llama  # noqa: E402, F401

from vlakeep import cli, evaluate, export, interpolate, offline, study, train  # noqa: E402, F401
