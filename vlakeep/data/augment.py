"""The official training augmentation (image_aug of the OpenVLA fine-tuning script), in NumPy.

random_resized_crop of 0.9 of the area, brightness, contrast, saturation, hue, each clipped to [0, 1].
Sources: openvla prismatic/vla/datasets/datasets.py:123-135, dlimp augmentations.py; formulas of tf.image.adjust_*.
One draw gives both corners of the crop, as in dlimp (its seeds coincide), so crops lie on the diagonal.
"""

from dataclasses import dataclass

import numpy as np

from vlakeep.data.images import crop_and_resize, to_float, to_uint8

_AREA, _BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = 0.9, 0.2, (0.8, 1.2), (0.8, 1.2), 0.05


@dataclass(frozen=True)
class Draw:
    """The random numbers of one augmentation; start and side of the square crop are fractions of the picture."""

    side: float
    start: float
    brightness: float
    contrast: float
    saturation: float
    hue: float


def draw(rng: np.random.Generator) -> Draw:
    side = float(np.sqrt(np.float32(_AREA)))
    ranges = ((0, 1 - side), (-_BRIGHTNESS, _BRIGHTNESS), _CONTRAST, _SATURATION, (-_HUE, _HUE))
    return Draw(side, *(float(rng.uniform(*limits)) for limits in ranges))


def _clip(image: np.ndarray) -> np.ndarray:
    return np.clip(image, np.float32(0), np.float32(1))


def _adjust_hsv(image_HWC: np.ndarray, saturation: float, hue: float) -> np.ndarray:
    """Scale the saturation and turn the hue (in turns) of float32 RGB in [0, 1]."""
    red, green, blue = (image_HWC[..., i] for i in range(3))
    value, low = image_HWC.max(-1), image_HWC.min(-1)
    span = value - low
    safe = np.where(span > 0, span, np.float32(1))
    turn = np.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe)
    turn = np.where(value == red, (green - blue) / safe, turn)
    turn = np.where(span > 0, turn, 0) / np.float32(6) + np.float32(hue)
    amount = np.where(value > 0, span / np.where(value > 0, value, 1), 0) * np.float32(saturation)
    chroma = np.clip(amount, 0, 1) * value
    sixth = (turn - np.floor(turn)) * np.float32(6)
    ramp = np.stack([np.abs(sixth - 3) - 1, 2 - np.abs(sixth - 2), 2 - np.abs(sixth - 4)], axis=-1)  # red, green, blue
    ramp = np.clip(ramp, np.float32(0), np.float32(1))
    return ((value - chroma)[..., None] + chroma[..., None] * ramp).astype(np.float32)


def stages(image_HWC: np.ndarray, drawn: Draw):
    """Yield (name, float32 picture in [0, 1]) after each step, starting from uint8 [H, W, 3]."""
    image = _clip(crop_and_resize(to_float(image_HWC), drawn.start, drawn.start, drawn.side, image_HWC.shape[:2]))
    yield "random_resized_crop", image
    image = _clip(image + np.float32(drawn.brightness))
    yield "random_brightness", image
    mean = image.mean(axis=(0, 1), keepdims=True, dtype=np.float64).astype(np.float32)
    image = _clip((image - mean) * np.float32(drawn.contrast) + mean)
    yield "random_contrast", image
    image = _clip(_adjust_hsv(image, drawn.saturation, 0.0))
    yield "random_saturation", image
    image = _clip(_adjust_hsv(image, 1.0, drawn.hue))
    yield "random_hue", image


def augment(image_HWC: np.ndarray, drawn: Draw) -> np.ndarray:
    """uint8 [H, W, 3], same size."""
    *_, (_, image) = stages(image_HWC, drawn)
    return to_uint8(image)
