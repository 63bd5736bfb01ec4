"""Import shims for environments that vlakeep does not control.

timm imports torchvision. Beside a CPU build of torch, torchvision's compiled operators cannot load and its import dies with
"operator torchvision::nms does not exist". vlakeep uses none of these operators, so declaring their schemas is enough.
"""

import importlib
import re
import sys
from typing import List, Tuple

import numpy as np
import torch

from vlakeep.core.errors import install_extra

EIGHT_BIT = {"adamw8bit": "AdamW8bit", "paged_adamw8bit": "PagedAdamW8bit"}  # --train.optimizer -> class of bitsandbytes.optim
# CUDA 13 has no kernels for cards before Turing (compute capability 7.5); of torch 2.11 to 2.14, the last with CUDA 12, those of 12.6 have.
OLD_CARDS = "--index-url https://download.pytorch.org/whl/cu126"
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
    except (ImportError, OSError, RuntimeError, AttributeError) as error:  # one that does not fit torch or its own parts fails anyhow
        raise ValueError(f"{key}: the package bitsandbytes cannot be loaded ({error}): {install_extra('bitsandbytes')}, or "
                         f"{instead}") from error


def runs_on(built: str, capability: Tuple[int, int]) -> bool:
    """Whether code for `built`, as torch.cuda.get_arch_list() names it, runs on a GPU of this compute capability.

    sm_XY is machine code, for the same X and at least this Y; compute_XY is compiled on the spot, for any newer GPU. With an a
    behind it, it is for this one alone; with an f for its family, which here is the same X.
    """
    found = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", built)
    if found is None:
        return False
    own = int(found[2]), int(found[3])
    if found[4] == "a":
        return own == capability
    if found[1] == "compute" and not found[4]:
        return own <= capability
    return own[0] == capability[0] and own[1] <= capability[1]


def built_for() -> List[str]:
    """What torch was built for; empty where it does not say, as for AMD's cards, whose names are no such numbers."""
    return [name for name in torch.cuda.get_arch_list() if re.match(r"(sm|compute)_\d", name)]


def kernel_trouble(index: int) -> Tuple[str, str]:
    """(what keeps torch from computing on a GPU, what mends it), or two empty texts."""
    built, capability = built_for(), torch.cuda.get_device_capability(index)
    if not built or any(runs_on(name, capability) for name in built):
        return "", ""
    old = all((int(digits[:-1]), int(digits[-1])) > capability for digits in (re.sub(r"\D", "", name) for name in built))
    found = (f"torch {torch.__version__} has no kernels for {torch.cuda.get_device_name(index)}, compute capability "
             f"{capability[0]}.{capability[1]} (it was built for {', '.join(built)})")
    return found, f"pip uninstall -y torch torchvision && pip install torch torchvision{' ' + OLD_CARDS if old else ''}"
