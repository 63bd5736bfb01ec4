"""Pictures as lerobot and openpi show them to SigLIP: [0, 1], aspect kept, black borders, then [-1, 1].

Source: lerobot 7427f318 policies/common/vla_utils.py:141-205 (resize), policies/pi0_fast/modeling_pi0_fast.py:964-1028.
Axes: H W pixels, h w of the model.
"""

from typing import Optional, Tuple

import numpy as np
import torch
from torch.nn import functional as F


def model_picture(image_HWC: Optional[np.ndarray], size: Tuple[int, int]) -> torch.Tensor:
    """uint8 [H, W, 3] -> float32 [3, h, w] in [-1, 1]; None gives the black picture of a camera that is not there.

    Bilinear without antialiasing; of borders that differ by a pixel the right and the lower one are wider. ValueError for anything that
    is not 8-bit RGB.
    """
    height, width = size
    if image_HWC is None:
        return torch.full((3, height, width), -1.0)
    array = np.asarray(image_HWC)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(f"an image must be uint8 [H, W, 3], not {array.dtype} {list(array.shape)}")
    pixels_3HW = torch.from_numpy(np.ascontiguousarray(array)).permute(2, 0, 1).float() / 255
    if array.shape[:2] != (height, width):
        ratio = max(array.shape[1] / width, array.shape[0] / height)
        inner = max(1, int(array.shape[0] / ratio)), max(1, int(array.shape[1] / ratio))
        pixels_3HW = F.interpolate(pixels_3HW[None], size=inner, mode="bilinear", align_corners=False)[0].clamp(0, 1)
        top, left = (height - inner[0]) // 2, (width - inner[1]) // 2
        pixels_3HW = F.pad(pixels_3HW, (left, width - inner[1] - left, top, height - inner[0] - top))
    return pixels_3HW * 2 - 1
