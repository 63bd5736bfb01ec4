"""Import shims for environments that vlakeep does not control.

timm imports torchvision. Beside a CPU build of torch, torchvision's compiled operators cannot load and its import dies with
"operator torchvision::nms does not exist". vlakeep uses none of these operators, so declaring their schemas is enough.
"""

import importlib
import sys

import numpy as np
import torch

from vlakeep.core.errors import install_extra

NUMPY_1 = "pip install 'numpy<2' 'opencv-python<4.12' 'av<13'   (the newer versions of the other two want NumPy 2)"

_SCHEMAS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


def import_timm():
    """Import and return timm, whether or not torchvision's compiled operators can load."""
    if "timm" not in sys.modules:
        try:
            importlib.import_module("torchvision")
        except RuntimeError as error:  # only the missing operators; a missing package stays an ImportError
            if "torchvision::" not in str(error):
                raise
            for module in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
                del sys.modules[module]
            for name, schema in _SCHEMAS.items():
                try:
                    torch.library.define(f"torchvision::{name}", schema)
                except RuntimeError:
                    pass  # defined by the failed import
            importlib.import_module("torchvision")
    return importlib.import_module("timm")


def numpy_trouble() -> str:
    """What keeps torch from reading NumPy's arrays, or nothing: torch 2.2 is built for NumPy 1, and the simulator brings NumPy 2."""
    try:
        torch.from_numpy(np.zeros(1))
    except RuntimeError as error:
        return f"torch {torch.__version__} cannot use NumPy {np.__version__} ({error})"
    return ""


def require_numpy() -> None:
    """ValueError with the remedy when torch cannot read NumPy's arrays."""
    if trouble := numpy_trouble():
        raise ValueError(f"{trouble}: {NUMPY_1}")


def import_bitsandbytes(key: str, instead: str):
    """Import and return bitsandbytes. ValueError with the remedy where it is missing; `key` is the option that asks for it."""
    try:
        return importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise ValueError(f"{key}: the package bitsandbytes cannot be loaded ({error}): {install_extra('bitsandbytes')}, or "
                         f"{instead}") from error
