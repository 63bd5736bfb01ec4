"""Images as the official pipeline sees them, without TensorFlow: decode, lanczos3 resize, evaluation picture, centre crop.

tf.image.decode_jpeg uses libjpeg's fast integer DCT; simplejpeg with fastdct=True and fastupsample=False is bit-identical, PIL
(the accurate DCT) differs in most values. tf.image.resize(lanczos3, antialias=True) is separable with the kernel widened by the
shrink factor; PIL's LANCZOS differs by up to 3 grey levels.
Sources: openvla experiments/robot/libero/libero_utils.py:33-57, experiments/robot/openvla_utils.py:81-155; tensorflow
core/kernels/image/scale_and_translate_op.cc.
Axes: H W pixels, C colours.
"""

import functools
import io
import struct
from typing import Iterable, Tuple

import numpy as np
from PIL import Image

_JPEG, _PNG = b"\xff\xd8", b"\x89PNG"


def is_picture(head: bytes) -> bool:
    """Whether bytes begin as those of a JPEG or PNG do."""
    return head[:2] == _JPEG or head[:4] == _PNG


def of_one_colour(pictures: Iterable[np.ndarray]) -> bool:
    """Whether each of these pictures [H, W, C] shows one colour and nothing else."""
    return all((picture == picture[0, 0]).all() for picture in pictures)


def may_be_of_one_colour(data: bytes) -> bool:
    """Whether JPEG or PNG bytes are so few for the picture's size that it is worth decoding them to see."""
    try:
        if data[:4] == _PNG:
            width, height = struct.unpack(">II", data[16:24])
        else:
            import simplejpeg
            height, width = simplejpeg.decode_jpeg_header(data)[:2]
    except (ValueError, struct.error):  # a damaged one is found when it is decoded
        return False
    return len(data) < 1000 + 0.03 * width * height


class _TooDeep(ValueError):
    """A picture that is whole and none that a model sees."""


def decode_image(data: bytes, where: str = "image") -> np.ndarray:
    """uint8 [H, W, 3] of JPEG (as tf.image.decode_jpeg) or PNG bytes. ValueError names `where` for what cannot be read."""
    try:
        if data[:2] == _JPEG:
            import simplejpeg
            return simplejpeg.decode_jpeg(data, colorspace="RGB", fastdct=True, fastupsample=False)
        if data[:4] == _PNG:
            with Image.open(io.BytesIO(data)) as image:
                deep = image.mode if image.mode.startswith(("I", "F")) else ""  # which convert() would cut to white
                if not deep:
                    return np.array(image if image.mode == "RGB" else image.convert("RGB"))
            raise _TooDeep(f"{where}: a PNG of more than 8 bits (mode {deep}), such as depth in millimetres, is no colour picture: choose "
                           "another with --data.camera or `camera:` in the data card, or store it as 8-bit colour")
    except _TooDeep:
        raise
    except (ValueError, OSError, SyntaxError) as error:  # PIL raises SyntaxError for a damaged PNG
        raise ValueError(f"{where}: {len(data)} bytes of a damaged picture ({error}); copy or make the file again") from error
    raise ValueError(f"{where}: {len(data)} bytes that are neither JPEG nor PNG (they start with {data[:4]!r})")


def encode_jpeg(image_HWC: np.ndarray, quality: int = 95) -> bytes:
    """JPEG bytes whose scan data equal tf.image.encode_jpeg's."""
    out = io.BytesIO()
    Image.fromarray(image_HWC).save(out, format="JPEG", quality=quality)
    return out.getvalue()


def encode_png(image_HWC: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image_HWC).save(out, format="PNG", compress_level=6)
    return out.getvalue()


@functools.lru_cache(maxsize=32)
def _lanczos3_taps(size_in: int, size_out: int) -> Tuple[np.ndarray, np.ndarray]:
    """Source indices and float32 weights, [taps, size_out] each, computed in float32 step by step as TensorFlow does."""
    f32 = np.float32
    inverse_scale = f32(1) / (f32(size_out) / f32(size_in))
    widen = max(inverse_scale, f32(1))
    centre = (np.arange(size_out, dtype=f32) + f32(0.5)) * inverse_scale
    source = np.arange(size_in, dtype=f32) + f32(0.5)
    x = np.abs((source[None, :] - centre[:, None]) * (f32(1) / widen))
    pi = f32(np.pi)
    with np.errstate(divide="ignore", invalid="ignore"):
        weights = f32(3) * np.sin(pi * x) * np.sin(pi * x / f32(3)) / (pi * pi * x * x)
    weights = np.where(x <= f32(1e-3), f32(1), np.where(x > f32(3), f32(0), weights))
    weights = weights * (f32(1) / np.cumsum(weights, axis=1)[:, -1:])  # cumsum adds in order, sum() pairwise
    first = (weights != 0).argmax(1)
    last = size_in - 1 - (weights[:, ::-1] != 0).argmax(1)
    taps = int((last - first).max()) + 1
    index = np.minimum(first[:, None], size_in - taps) + np.arange(taps)[None, :]
    return np.ascontiguousarray(index.T), np.ascontiguousarray(np.take_along_axis(weights, index, axis=1).T)


def _resample_rows(image_RN: np.ndarray, size: int) -> np.ndarray:
    """float32 [size, N]. Tap by tap, not as a matrix product: equal to TensorFlow and independent of BLAS and its threads."""
    index, weights = _lanczos3_taps(image_RN.shape[0], size)
    out = np.zeros((size, image_RN.shape[1]), np.float32)
    term = np.empty_like(out)
    for rows, weight in zip(index, weights):
        np.take(image_RN, rows, axis=0, out=term, mode="clip")
        term *= weight[:, None]
        out += term
    return out


def lanczos3(image_HWC: np.ndarray, size: Tuple[int, int]) -> np.ndarray:
    """float32 [h, w, C]: tf.image.resize(image, size, "lanczos3", antialias=True), not rounded. Rows first, as there."""
    height, width, channels = image_HWC.shape
    rows = _resample_rows(image_HWC.reshape(height, -1).astype(np.float32), size[0])
    columns = np.ascontiguousarray(rows.reshape(size[0], width, channels).transpose(1, 0, 2)).reshape(width, -1)
    resized = _resample_rows(columns, size[1])
    return np.ascontiguousarray(resized.reshape(size[1], size[0], channels).transpose(1, 0, 2))


def resize_uint8(image_HWC: np.ndarray, size: Tuple[int, int]) -> np.ndarray:
    """uint8 [h, w, C]: lanczos3, rounded half to even and clipped, as the official data loading does. A no-op at equal size."""
    if image_HWC.shape[:2] == tuple(size):
        return image_HWC
    return np.clip(np.rint(lanczos3(image_HWC, size)), 0, 255).astype(np.uint8)


def libero_image(raw_HWC: np.ndarray, size: Tuple[int, int] = (224, 224)) -> np.ndarray:
    """The official get_libero_image: turn the camera picture by 180 degrees, JPEG it as the training data were, resize."""
    turned = np.ascontiguousarray(raw_HWC[::-1, ::-1])
    return resize_uint8(decode_image(encode_jpeg(turned)), size)


def crop_and_resize(image_HWC: np.ndarray, y0: float, x0: float, side: float, size: Tuple[int, int]) -> np.ndarray:
    """float32 [h, w, C]: tf.image.crop_and_resize (bilinear) of a box; corner (y0, x0) and side are fractions of the image."""
    def axis(length_in, start, length_out):
        position = np.float32(start) * (length_in - 1) + np.arange(length_out, dtype=np.float32) * (
            np.float32(side) * (length_in - 1) / (length_out - 1) if length_out > 1 else 0.0)
        low = np.clip(np.floor(position).astype(np.int64), 0, length_in - 1)
        return low, np.minimum(low + 1, length_in - 1), (position - low).astype(np.float32)

    top, bottom, fy = axis(image_HWC.shape[0], y0, size[0])
    left, right, fx = axis(image_HWC.shape[1], x0, size[1])
    fy, fx = fy[:, None, None], fx[None, :, None]
    # Along each row that is used once, and not once for the row above and once for the one below: the same bits.
    first = int(top.min())
    used = image_HWC[first:int(bottom.max()) + 1]
    at_left = np.take(used, left, axis=1)
    across = np.take(used, right, axis=1)
    across -= at_left
    across *= fx
    across += at_left
    upper = np.take(across, top - first, axis=0)
    lower = np.take(across, bottom - first, axis=0)
    lower -= upper
    lower *= fy
    lower += upper
    return lower


def to_float(image_HWC: np.ndarray) -> np.ndarray:
    """float32 in [0, 1], as tf.image.convert_image_dtype."""
    return image_HWC.astype(np.float32) * np.float32(1.0 / 255.0)


def to_uint8(image_HWC: np.ndarray) -> np.ndarray:
    """uint8 from float32 in [0, 1], as tf.image.convert_image_dtype with saturate: truncates x * 255.5."""
    return np.clip(image_HWC * np.float32(255.5), 0, 255).astype(np.uint8)


def center_crop(image_HWC: np.ndarray, area: float = 0.9) -> np.ndarray:
    """uint8 [H, W, 3]: the official evaluation crop for models trained with crops: the central `area`, back at full size."""
    side = float(np.sqrt(area))
    start = (1.0 - side) / 2.0
    cropped = crop_and_resize(to_float(image_HWC), start, start, side, image_HWC.shape[:2])
    return to_uint8(np.clip(cropped, 0.0, 1.0))
