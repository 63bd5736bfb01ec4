"""FAST: a chunk of actions as a few tokens. Pertsch et al. 2025 (FAST), as lerobot and openpi use it.

    coefficients = round(scale * DCT-II(chunk over time))     orthonormal
    characters   = coefficient - min_token, frequency by frequency: all dimensions of the mean first
    tokens       = BPE over these characters

Files, as the published codec has them: tokenizer.json (tokenizers' BPE) and processor_config.json (scale, min_token). The class that the
hub ships runs as remote code; nothing of it is loaded here. Source: lerobot 7427f318
src/lerobot/policies/molmoact2/molmoact2_hf_model/action_tokenizer.py (51-190), modeling_pi0_fast.py (1047-1110).

Axes: T steps of a chunk, A action dimensions, K frequencies.
"""

import json
from functools import lru_cache
from pathlib import Path
from typing import List, Sequence, Tuple

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from vlakeep.core.errors import CheckpointError
from vlakeep.core.storage import atomic_write

TOKENIZER_FILE, CONFIG_FILE = "tokenizer.json", "processor_config.json"
LARGEST = 4096  # characters that are looked for in a codec; the published one has about 700


@lru_cache(maxsize=None)
def dct_matrix(steps: int) -> np.ndarray:
    """[K, T] float64, orthonormal: the DCT-II over time; its transpose is the inverse. The same numbers as scipy.fft.dct(norm="ortho")."""
    frequency_K1, time_T = np.arange(steps)[:, None], np.arange(steps)
    matrix_KT = np.sqrt(2 / steps) * np.cos(np.pi * (2 * time_T + 1) * frequency_K1 / (2 * steps))
    matrix_KT[0] /= np.sqrt(2)
    return matrix_KT


class FastCodec:
    """Chunks [T, A] to lists of ids and back."""

    def __init__(self, bpe: Tokenizer, scale: float, min_token: int):
        self.bpe, self.scale, self.min_token = bpe, float(scale), int(min_token)
        self.vocab_size: int = bpe.get_vocab_size()
        tried = [chr(i) for i in range(LARGEST) if not 0xD800 <= i < 0xE000]
        known = [ord(c) for c, one in zip(tried, bpe.encode_batch(tried)) if one.ids and bpe.decode(one.ids) == c]
        if not known:
            raise CheckpointError(f"the codec knows none of the characters 0 to {LARGEST}: its {TOKENIZER_FILE} is no FAST codec")
        self._known = np.array(known)
        self._bpe_json: str = bpe.to_str()

    @classmethod
    def from_folder(cls, folder) -> "FastCodec":
        """FileNotFoundError or CheckpointError, with the remedy."""
        folder = Path(folder)
        for name in (TOKENIZER_FILE, CONFIG_FILE):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"no {name} in {folder}: copy tokenizer.json and processor_config.json of the FAST codec "
                                        "there, those of lerobot/fast-action-tokenizer or of physical-intelligence/fast")
        try:
            config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
            return cls(Tokenizer.from_file(str(folder / TOKENIZER_FILE)), config["scale"], config["min_token"])
        except CheckpointError:
            raise
        except Exception as error:  # tokenizers raises a bare Exception for a file that it cannot read
            raise CheckpointError(f"the FAST codec in {folder} cannot be read ({error!r}): fetch its two files again") from error

    @property
    def lowest(self) -> int:
        """The lowest coefficient that there is a character for."""
        return int(self._known[0]) + self.min_token

    @property
    def highest(self) -> int:
        return int(self._known[-1]) + self.min_token

    def limit(self, steps: int) -> float:
        """Largest magnitude that a decoded value can have."""
        return max(abs(self.lowest), abs(self.highest)) / self.scale * float(np.abs(dct_matrix(steps)).sum(0).max())

    def coefficients(self, chunk_TA: np.ndarray) -> Tuple[np.ndarray, int]:
        """(coefficients int [K, A], how many of them the codec has no character for, which got its nearest one)."""
        wanted_KA = np.rint(dct_matrix(len(chunk_TA)) @ np.asarray(chunk_TA, dtype=np.float64) * self.scale).astype(np.int64)
        places_KA = np.searchsorted(self._known, wanted_KA - self.min_token).clip(1, max(1, len(self._known) - 1))
        near = self._known[np.stack([places_KA - 1, places_KA.clip(max=len(self._known) - 1)])] + self.min_token
        closer = np.abs(near - wanted_KA).argmin(0)
        found_KA = np.take_along_axis(near, closer[None], 0)[0]
        return found_KA, int((found_KA != wanted_KA).sum())

    def encode(self, chunk_TA: np.ndarray) -> List[int]:
        """Ids of a normalised chunk, 0 to vocab_size - 1. Coefficients outside the codec are clipped (`coefficients` counts them)."""
        found_KA, _ = self.coefficients(chunk_TA)
        return list(self.bpe.encode("".join(map(chr, (found_KA - self.min_token).ravel().tolist())), add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int], steps: int, dims: int) -> Tuple[np.ndarray, str]:
        """(actions [T, A] float64, what is wrong with the ids or ""). Nothing raises: too few coefficients are followed by zeros, too many
        are cut, and ids that are none of the codec's make it all zeros, as lerobot's relaxed decoding."""
        problem = ""
        if any(not 0 <= one < self.vocab_size for one in ids):
            # What lerobot does with these differs: below zero an exception makes zeros, above the tokenizer drops the token.
            problem = "ids that are none of the codec's"
            ids = [] if any(one < 0 for one in ids) else [one for one in ids if one < self.vocab_size]
        coefficients = np.array([ord(c) for c in self.bpe.decode(list(ids))], dtype=np.int64)
        strange = coefficients > self._known[-1]  # U+FFFD of broken UTF-8, which lerobot takes for a coefficient of 65533
        if strange.any():
            coefficients, problem = np.where(strange, -self.min_token, coefficients), "characters that are none of the codec's"
        wanted = steps * dims
        if len(coefficients) != wanted:
            problem = problem or f"{len(coefficients)} coefficients in place of {wanted}"
        whole = np.zeros(wanted)
        part = coefficients[:wanted] + self.min_token
        whole[:len(part)] = part
        return dct_matrix(steps).T @ (whole.reshape(steps, dims) / self.scale), problem

    @classmethod
    def fit(cls, chunks: Sequence[np.ndarray], vocab_size: int = 256, scale: float = 10.0, margin: int = 5) -> "FastCodec":
        """A codec of one's own from normalised chunks [T, A]. margin: coefficients beyond those seen that get characters too.

        ValueError when vocab_size does not hold the characters, with the smallest that does.
        """
        rounded = [np.rint(dct_matrix(len(c)) @ np.asarray(c, dtype=np.float64) * scale).astype(np.int64).ravel() for c in chunks]
        if not rounded:
            raise ValueError("a FAST codec is fitted on chunks of actions, and there are none")
        low, high = min(int(r.min()) for r in rounded) - margin, max(int(r.max()) for r in rounded) + margin
        alphabet = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        letters = sorted({letter for i in range(high - low + 1) for piece, _ in alphabet.pre_tokenize_str(chr(i)) for letter in piece})
        if len(letters) > vocab_size:
            raise ValueError(f"coefficients from {low} to {high} need {len(letters)} characters: vocab_size must be at least that, not "
                             f"{vocab_size}, or the scale {scale:g} smaller")
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer, bpe.decoder = alphabet, decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=vocab_size, min_frequency=2, show_progress=False, special_tokens=[],
                                      initial_alphabet=letters)
        bpe.train_from_iterator(("".join(map(chr, (r - low).tolist())) for r in rounded), trainer)
        return cls(bpe, scale, low)

    def save(self, folder) -> List[Path]:
        """The two files, in the form that lerobot reads too."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"processor_class": "UniversalActionProcessor", "scale": self.scale if self.scale % 1 else int(self.scale),
                  "vocab_size": self.vocab_size, "min_token": self.min_token, "action_dim": None, "time_horizon": None}
        for name, text in ((TOKENIZER_FILE, readable(self._bpe_json)), (CONFIG_FILE, json.dumps(config, indent=1) + "\n")):
            with atomic_write(folder / name, "w") as file:
                file.write(text)
        return [folder / TOKENIZER_FILE, folder / CONFIG_FILE]


def readable(bpe_json: str) -> str:
    """A tokenizer's JSON with merges as strings "a b" where no piece holds a space: tokenizers 0.19 reads no pairs."""
    found = json.loads(bpe_json)
    merges = found["model"]["merges"]
    if any(isinstance(pair, str) or any(" " in piece for piece in pair) for pair in merges):
        return bpe_json
    found["model"]["merges"] = [" ".join(pair) for pair in merges]
    return json.dumps(found, ensure_ascii=False)


if __name__ == "__main__":  # sanity check: python -m vlakeep.pi0_fast.codec
    rng = np.random.default_rng(0)
    smooth = [np.cumsum(rng.normal(0, 0.1, (8, 3)), 0).clip(-1, 1) for _ in range(200)]
    codec = FastCodec.fit(smooth)
    worst = max(float(np.abs(dct_matrix(8) @ (codec.decode(codec.encode(c), 8, 3)[0] - c)).max()) for c in smooth)
    said = np.mean([len(codec.encode(c)) for c in smooth])
    print(f"{said:.1f} tokens for 24 values; largest error of a coefficient {worst:.3f} of {0.5 / 10}")
    assert worst <= 0.5 / 10 + 1e-9
