"""The official augmentation, made fast: to the bit what the plain formulas of tf.image give, which stand here as they are written."""

import numpy as np
import pytest

from vlakeep.data.augment import augment, draw, stages
from vlakeep.data.images import crop_and_resize, to_float

SIZE = 33, 27


def plain_crop(image_HWC, y0, x0, side, size):
    def axis(length_in, start, length_out):
        position = np.float32(start) * (length_in - 1) + np.arange(length_out, dtype=np.float32) * (
            np.float32(side) * (length_in - 1) / (length_out - 1))
        low = np.clip(np.floor(position).astype(np.int64), 0, length_in - 1)
        return low, np.minimum(low + 1, length_in - 1), (position - low).astype(np.float32)

    top, bottom, fy = axis(image_HWC.shape[0], y0, size[0])
    left, right, fx = axis(image_HWC.shape[1], x0, size[1])
    fy, fx = fy[:, None, None], fx[None, :, None]
    upper = image_HWC[top][:, left] + (image_HWC[top][:, right] - image_HWC[top][:, left]) * fx
    lower = image_HWC[bottom][:, left] + (image_HWC[bottom][:, right] - image_HWC[bottom][:, left]) * fx
    return upper + (lower - upper) * fy


def plain_hsv(image_HWC, saturation, hue):
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
    ramp = np.stack([np.abs(sixth - 3) - 1, 2 - np.abs(sixth - 2), 2 - np.abs(sixth - 4)], axis=-1)
    ramp = np.clip(ramp, np.float32(0), np.float32(1))
    return ((value - chroma)[..., None] + chroma[..., None] * ramp).astype(np.float32)


def plain_stages(image_HWC, drawn):
    def clip(image):
        return np.clip(image, np.float32(0), np.float32(1))

    image = clip(plain_crop(to_float(image_HWC), drawn.start, drawn.start, drawn.side, image_HWC.shape[:2]))
    yield image
    image = clip(image + np.float32(drawn.brightness))
    yield image
    mean = image.mean(axis=(0, 1), keepdims=True, dtype=np.float64).astype(np.float32)
    image = clip((image - mean) * np.float32(drawn.contrast) + mean)
    yield image
    image = clip(plain_hsv(image, drawn.saturation, 0.0))
    yield image
    yield clip(plain_hsv(image, 1.0, drawn.hue))


def picture(kind):
    noise = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    return {"noise": noise, "black": noise * 0, "white": noise * 0 + 255, "grey": np.repeat(noise[..., :1], 3, axis=-1),
            "pure colours": (noise // 128 * 255).astype(np.uint8), "dark": noise // 64}[kind]


@pytest.mark.parametrize("kind", ["noise", "black", "white", "grey", "pure colours", "dark"])
def test_every_step_has_the_bits_of_the_plain_formulas(kind):
    image = picture(kind)
    before = image.copy()
    for seed in range(8):
        drawn = draw(np.random.default_rng(seed))
        for (name, got), wanted in zip(stages(image, drawn), plain_stages(image, drawn)):
            assert got.dtype == np.float32 and np.array_equal(got, wanted), (name, seed)
        wanted = np.clip(wanted * np.float32(255.5), 0, 255).astype(np.uint8)
        got = augment(image, drawn)
        assert got.flags.c_contiguous and np.array_equal(got, wanted)
    assert np.array_equal(image, before)


@pytest.mark.parametrize("size", [(33, 27), (8, 50), (1, 1)])
def test_a_crop_of_any_size_has_the_bits_of_the_plain_formula(size):
    image = to_float(picture("noise"))
    for y0, x0, side in ((0.0, 0.0, 1.0), (0.02, 0.05, 0.9), (0.5, 0.1, 0.5)):
        if size == (1, 1):
            assert np.array_equal(crop_and_resize(image, y0, x0, side, size)[0, 0], plain_crop(image, y0, x0, side, (2, 2))[0, 0])
        else:
            assert np.array_equal(crop_and_resize(image, y0, x0, side, size), plain_crop(image, y0, x0, side, size))
