"""The model of a configuration: what kind a checkpoint folder holds is read from its config.json, and that kind's own `load` makes it.

A folder vlakeep/KIND with a file load.py is a kind of model, and the `MODEL` in there its class (models/base.py:Backbone). A package of
one's own adds kinds through the entry point group `vlakeep.models`, whose values name such a class. Nothing is imported before it is asked
for, so that a model whose libraries are missing is in nobody's way.
"""

import json
import os
from functools import lru_cache
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import List, Optional

import torch

from vlakeep.core.base_models import AmbiguousModel
from vlakeep.core.config import BackboneConfig
from vlakeep.core.errors import CheckpointError
from vlakeep.core.storage import PACKAGE, find_checkpoint, pick_root
from vlakeep.models.quantised import quantise

GROUP = "vlakeep.models"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def model_name(folder: Path) -> str:
    """Name of a checkpoint folder; in the hub's cache (models--openvla--openvla-7b/snapshots/<commit>) that of the model."""
    folder = Path(folder).absolute()
    if folder.parent.name == "snapshots":
        return folder.parents[1].name.replace("models--", "").replace("--", "-")
    return folder.name


def name_in_store(checkpoint: str, cache: Path) -> str:
    """model_name of a base model; of one that is not there yet, the name that it will have."""
    try:
        return model_name(find_checkpoint(checkpoint, cache))
    except AmbiguousModel:
        raise
    except FileNotFoundError:
        return Path(checkpoint.partition("@")[0]).name


@lru_cache(maxsize=None)  # it reads the metadata of every package that is installed
def _outside() -> dict:
    return {entry.name: entry for entry in entry_points(group=GROUP)}


def _own() -> List[str]:
    return sorted(file.parent.name for file in PACKAGE.glob("*/load.py") if file.parent.name != "models")


def model_kinds() -> List[str]:
    """Every kind of model there is."""
    own = _own()
    return [*own, *(name for name in sorted(_outside()) if name not in own)]


def kind_of(config: dict) -> str:
    """The kind that a config.json names; it may be none of model_kinds."""
    return str(config.get("model_type", config.get("type", "openvla")))


def class_of(kind: str):
    """The class of a kind of model (models/base.py:Backbone), one of model_kinds."""
    return import_module(f"vlakeep.{kind}.load").MODEL if kind in _own() else _outside()[kind].load()


def model_kind(folder: Path) -> str:
    """The kind of the checkpoint in a folder. CheckpointError when it is none of model_kinds."""
    file = Path(folder) / "config.json"
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "openvla"  # its reader says what is wrong with the folder, and what to do
    kind = kind_of(said) if isinstance(said, dict) else "openvla"
    if kind not in model_kinds():
        raise CheckpointError(f"{file}: model_type is {kind!r}; vlakeep knows {', '.join(model_kinds())}: name a checkpoint of one of "
                              "these with --backbone.checkpoint")
    return kind


def model_class(folder: Path):
    """The class of the model in a checkpoint folder. CheckpointError when it is of no kind that is known."""
    return class_of(model_kind(folder))


def _refuse_unusable(settings, device: torch.device) -> None:
    """ValueError for what this device or environment cannot run, before any weight is read."""
    if settings.dtype == "float16" and device.type == "cpu":
        raise ValueError("--backbone.dtype float16: not on a CPU; use --backbone.dtype float32, or a GPU with --device cuda")
    if settings.attn_implementation == "flash_attention_2" and (device.type == "cpu" or find_spec("flash_attn") is None):
        why = "it needs a GPU" if device.type == "cpu" else "the package flash_attn is not installed"
        raise ValueError(f"--backbone.attn_implementation flash_attention_2: {why}; use --backbone.attn_implementation sdpa, "
                         "which gives the same result")


def make_backbone(source, device="cpu", cache: Optional[Path] = None, runs_on=None):
    """The Backbone of a folder, or of the backbone section of a configuration (config.BackboneConfig), in evaluation mode.

    cache: where base models lie by name; None takes HF_HOME, else hf_cache below the storage root.
    runs_on: the device it is moved to before it runs, where that is another one than it is loaded to.
    Raises FileNotFoundError or CheckpointError with the remedy.
    """
    settings = source if isinstance(source, BackboneConfig) else BackboneConfig(checkpoint=str(source))
    cache = Path(cache or os.environ.get("HF_HOME") or Path(pick_root()) / "hf_cache")
    _refuse_unusable(settings, torch.device(runs_on or device))
    folder = find_checkpoint(settings.checkpoint, cache)
    if settings.quantisation == "none":
        return model_class(folder).load(settings, folder, device)
    backbone = model_class(folder).load(settings, folder, "cpu")
    quantise(backbone, torch.device(device))
    return backbone.eval()
