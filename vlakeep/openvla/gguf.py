"""GGUF files, in which llama.cpp keeps language models: their metadata, and their tensors unpacked to float32.

    "GGUF" | version u32 | tensors u64 | entries u64 | entries | tensors' names, shapes, types and offsets | padding | data, little endian

An entry is a name, a type and a value. Quantised types are blocks of 32 weights. Source: ggml docs/gguf.md and ggml-common.h.
Axes: O outputs, I inputs of a linear.
"""

import struct
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Tuple

import torch

from vlakeep.core.errors import CheckpointError

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _LIST = 8, 9
# Type -> (name, bytes of a block, weights of a block).
_TYPES = {0: ("F32", 4, 1), 1: ("F16", 2, 1), 3: ("Q4_1", 20, 32), 8: ("Q8_0", 34, 32)}


class GGUF(NamedTuple):
    """`about`: the metadata by name; `tensors`: float32 by name, shaped [O, I] as torch has them."""

    about: Dict[str, Any]
    tensors: Dict[str, torch.Tensor]


def unpack(raw: torch.Tensor, kind: str, shape) -> torch.Tensor:
    """Blocks of 32 weights as uint8 -> float32 of this shape. Q4_1: scale, offset, 16 bytes of two; Q8_0: scale, 32 bytes."""
    if kind in ("F32", "F16"):
        return raw.view(torch.float32 if kind == "F32" else torch.float16).float().reshape(shape)
    blocks = raw.reshape(-1, 20 if kind == "Q4_1" else 34)
    scale = blocks[:, :2].contiguous().view(torch.float16).float()
    if kind == "Q8_0":
        return (scale * blocks[:, 2:].contiguous().view(torch.int8).float()).reshape(shape)
    offset, pairs = blocks[:, 2:4].contiguous().view(torch.float16).float(), blocks[:, 4:]
    return (scale * torch.cat([pairs & 15, pairs >> 4], 1).float() + offset).reshape(shape)


def to_halves(weight_OI: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of q and k from the order of the file, whose rotary pairs are neighbours, to that of transformers, where they are halves."""
    size = len(weight_OI) // heads
    return weight_OI.reshape(heads, size // 2, 2, -1).transpose(1, 2).reshape(weight_OI.shape)


class _Reader:
    def __init__(self, data: bytes):
        self.data, self.at = data, 0

    def number(self, kind: str) -> Any:
        value, = struct.unpack_from("<" + kind, self.data, self.at)
        self.at += struct.calcsize(kind)
        return value

    def text(self) -> str:
        length = self.number("Q")
        self.at += length
        if self.at > len(self.data):
            raise ValueError("it is truncated")
        return self.data[self.at - length:self.at].decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _LIST:
            inner, count = self.number("I"), self.number("Q")
            return [self.value(inner) for _ in range(count)]
        return self.text() if kind == _TEXT else self.number(_NUMBERS[kind])


def read_gguf(file: Path) -> GGUF:
    """Raises FileNotFoundError, and CheckpointError for what is no whole GGUF file of the types that are known."""
    data = Path(file).read_bytes()
    try:
        if data[:4] != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        reader = _Reader(data)
        reader.at = 4
        version, tensors, entries = reader.number("I"), reader.number("Q"), reader.number("Q")
        if version not in (2, 3):
            raise ValueError(f"version {version}; 2 and 3 are read")
        about = {}
        for _ in range(entries):
            name = reader.text()
            about[name] = reader.value(reader.number("I"))
        places = [_place(reader) for _ in range(tensors)]
        align = about.get("general.alignment", 32)
        start = -(-reader.at // align) * align
        return GGUF(about, {name: _tensor(data, start, shape, kind, offset) for name, shape, kind, offset in places})
    except (ValueError, KeyError, struct.error, UnicodeDecodeError, RuntimeError) as error:
        raise CheckpointError(f"{file} is not a GGUF file that can be read ({error}): install its package again") from error


def _place(reader: _Reader) -> Tuple[str, List[int], int, int]:
    name = reader.text()
    shape = [reader.number("Q") for _ in range(reader.number("I"))]
    return name, shape[::-1], reader.number("I"), reader.number("Q")


def _tensor(data: bytes, start: int, shape: List[int], kind: int, offset: int) -> torch.Tensor:
    name, width, block = _TYPES[kind]
    size = torch.Size(shape).numel() // block * width
    piece = data[start + offset:start + offset + size]
    if len(piece) < size:
        raise ValueError("it is truncated")
    return unpack(torch.frombuffer(bytearray(piece), dtype=torch.uint8), name, shape)
