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
    """In place."""
    return np.clip(image, np.float32(0), np.float32(1), out=image)


def _adjust_hsv(image_CHW: np.ndarray, saturation: float, hue: float) -> np.ndarray:
    """Scale the saturation and turn the hue (in turns) of float32 RGB in [0, 1]."""
    one = np.float32(1)
    red, green, blue = image_CHW
    value = np.maximum(np.maximum(red, green), blue)
    span = value - np.minimum(np.minimum(red, green), blue)
    # Where there is no colour or no light at all the quotients are 0 over 1.
    safe, bright = span + (span == 0), value + (value == 0)
    turn = np.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe)
    turn = np.where(value == red, (green - blue) / safe, turn)
    turn /= np.float32(6)
    turn += np.float32(hue)
    chroma = span / bright
    chroma *= np.float32(saturation)
    np.clip(chroma, np.float32(0), one, out=chroma)
    chroma *= value
    turn -= np.floor(turn)
    turn *= np.float32(6)
    rest = value - chroma
    found = np.empty_like(image_CHW)
    for plane, (centre, sign) in zip(found, ((3, 1), (2, -1), (4, -1))):  # |sixth - 3| - 1, 2 - |sixth - 2|, 2 - |sixth - 4|
        np.subtract(turn, np.float32(centre), out=plane)
        np.abs(plane, out=plane)
        np.subtract(*((plane, one) if sign > 0 else (np.float32(2), plane)), out=plane)
        _clip(plane)
        plane *= chroma
        plane += rest
    return found


def stages(image_HWC: np.ndarray, drawn: Draw):
    """Yield (name, float32 picture [H, W, 3] in [0, 1]) after each step, starting from uint8 [H, W, 3]; the next step may overwrite it."""
    image = _clip(crop_and_resize(to_float(image_HWC), drawn.start, drawn.start, drawn.side, image_HWC.shape[:2]))
    yield "random_resized_crop", image
    image += np.float32(drawn.brightness)
    _clip(image)
    yield "random_brightness", image
    # Column by column: the last bit of a sum depends on its order, which is not to change.
    mean = np.ascontiguousarray(image.transpose(1, 0, 2)).mean(axis=(0, 1), keepdims=True, dtype=np.float64).astype(np.float32)
    image -= mean
    image *= np.float32(drawn.contrast)
    image += mean
    _clip(image)
    yield "random_contrast", image
    # Colour by colour from here on: arithmetic on planes takes a third of the time.
    image_CHW = _clip(_adjust_hsv(np.ascontiguousarray(image.transpose(2, 0, 1)), drawn.saturation, 0.0))
    yield "random_saturation", image_CHW.transpose(1, 2, 0)
    image_CHW = _clip(_adjust_hsv(image_CHW, 1.0, drawn.hue))
    yield "random_hue", image_CHW.transpose(1, 2, 0)


def augment(image_HWC: np.ndarray, drawn: Draw) -> np.ndarray:
    """uint8 [H, W, 3], same size."""
    *_, (_, image) = stages(image_HWC, drawn)
    return np.ascontiguousarray(to_uint8(image))
