"""The word for the color of a thing in a picture, from the pixels that show it; no word where people would not agree on one.

Every pixel gets a word by its place in CIELAB (lightness L, chroma C, hue h in degrees), or none between two words: a white mug in
the dark room and a gray one look alike, so gray has no word at all. The bounds were set by looking at LIBERO's things.
Axes: H W pixels, N pixels of the thing.
"""

from typing import Optional

import numpy as np

LEAST = 0.36  # share of the thing's pixels that must have the word
RIVAL = 0.25  # how much of that share any other word may have
NOTICED = 6.0  # distance in CIELAB that is seen at once
FEW = 60  # pixels, less the edge, below which nothing is said
# Linear sRGB to CIE XYZ under D65, and that white: IEC 61966-2-1.
_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
_WHITE = np.array([0.9505, 1.0, 1.0890])


def lab(rgb_N3: np.ndarray) -> np.ndarray:
    """CIELAB [N, 3] of uint8 sRGB."""
    value = rgb_N3.astype(np.float64) / 255
    linear = np.where(value > 0.04045, ((value + 0.055) / 1.055) ** 2.4, value / 12.92)
    t = linear @ _XYZ.T / _WHITE
    f = np.where(t > (6 / 29) ** 3, np.cbrt(t), t / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=1)


def shares(rgb_N3: np.ndarray) -> dict:
    """Word -> share of the pixels that it fits."""
    L, a, b = lab(rgb_N3).T
    C, h = np.hypot(a, b), np.degrees(np.arctan2(b, a)) % 360
    colored = (C >= 12) & (L >= 10)
    fits = {
        "black": (L < 4) | ((L < 22) & (C < 2.5)),
        "white": (L >= 72) & (C < 12),
        "red": colored & ((h < 42) | (h > 345)) & (L < 60),
        "orange": colored & (h >= 48) & (h < 75) & (C >= 45) & (L >= 45),
        "yellow": colored & (h >= 80) & (h < 110) & (C >= 30) & (L >= 55),
        "green": colored & (h >= 120) & (h < 200),
        "blue": colored & (h >= 240) & (h < 300),
        "brown": colored & (h >= 70) & (h < 85) & (C < 45) & (L < 55),
        "": (L >= 4) & (L < 22) & (C >= 6) & ~colored,  # too dark to tell, and not black
    }
    return {word: float(fit.mean()) for word, fit in fits.items()}


def edge_contrast(picture_HWC: np.ndarray, mask_HW: np.ndarray) -> float:
    """Share of the mask's edge at which the two pixels on its sides look different."""
    lab_HW3 = lab(picture_HWC.reshape(-1, 3)).reshape(picture_HWC.shape)
    different = []
    for one, other in ((np.s_[:, 1:], np.s_[:, :-1]), (np.s_[1:], np.s_[:-1])):
        edge = mask_HW[one] != mask_HW[other]
        different.append(np.linalg.norm(lab_HW3[one][edge] - lab_HW3[other][edge], axis=1) > NOTICED)
    return float(np.concatenate(different).mean()) if sum(map(len, different)) else 0.0


def color_of(picture_HWC: np.ndarray, mask_HW: np.ndarray) -> Optional[str]:
    """The word for what `mask_HW` covers, its edge left out, where colors of two things mix."""
    inner = mask_HW[1:-1, 1:-1] & mask_HW[:-2, 1:-1] & mask_HW[2:, 1:-1] & mask_HW[1:-1, :-2] & mask_HW[1:-1, 2:]
    if inner.sum() < FEW:
        return None
    found = shares(picture_HWC[1:-1, 1:-1][inner])
    word = max((word for word in found if word), key=found.get)
    clear = all(share <= RIVAL * found[word] for other, share in found.items() if other != word)
    return word if found[word] >= LEAST and clear else None
