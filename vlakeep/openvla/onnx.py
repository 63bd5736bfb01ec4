"""Weights of an ONNX file, without onnx: its initialisers, and which of them a node reads.

What an export has folded has lost its name (onnx::MatMul_1966) and is found by the node that reads it. Of the protobuf messages only
what is needed is read: ModelProto.graph 7; GraphProto.node 1, .initializer 5; NodeProto.input 1, .name 3; TensorProto.dims 1,
.data_type 2, .name 8, .raw_data 9 (onnx/onnx.proto).
"""

from pathlib import Path
from typing import Dict, List, NamedTuple

import numpy as np
import torch

from vlakeep.core.errors import CheckpointError
from vlakeep.data.tfrecord import VARINT, varint, wire_fields

FLOAT = 1  # TensorProto.DataType


class Onnx(NamedTuple):
    """`tensors`: float32 initialisers by name; `reads`: node -> names of its inputs."""

    tensors: Dict[str, torch.Tensor]
    reads: Dict[str, List[str]]

    def read_by(self, node: str) -> torch.Tensor:
        """The only weight that a node reads. KeyError when there is none."""
        return self.tensors[next((name for name in self.reads[node] if name in self.tensors), f"a weight of {node}")]


def read_onnx(file: Path) -> Onnx:
    """Raises FileNotFoundError, and CheckpointError for what is no ONNX file."""
    data = Path(file).read_bytes()
    found = Onnx({}, {})
    try:
        for number, _, start, end in wire_fields(data, 0, len(data)):
            if number != 7:
                continue
            for field, _, a, b in wire_fields(data, start, end):
                if field == 5:
                    _initialiser(data, a, b, found.tensors)
                elif field == 1:
                    parts = [(n, data[c:d].decode("utf-8")) for n, _, c, d in wire_fields(data, a, b) if n in (1, 3)]
                    found.reads["".join(text for n, text in parts if n == 3)] = [text for n, text in parts if n == 1]
    except (ValueError, IndexError) as error:
        raise CheckpointError(f"{file} is not an ONNX file that can be read ({error}): install its package again") from error
    if not found.tensors:
        raise CheckpointError(f"{file} holds no float32 weights: install its package again")
    return found


def _initialiser(data: bytes, start: int, end: int, tensors: Dict[str, torch.Tensor]) -> None:
    shape, kind, name, raw = [], 0, "", b""
    for field, wire, a, b in wire_fields(data, start, end):
        if field == 1:  # one by one, or packed
            while a < b:
                value, a = varint(data, a, b)
                shape.append(value)
        elif field == 2 and wire == VARINT:
            kind, _ = varint(data, a, b)
        elif field == 8:
            name = data[a:b].decode("utf-8")
        elif field == 9:
            raw = data[a:b]
    if kind == FLOAT:
        tensors[name] = torch.from_numpy(np.frombuffer(raw, dtype="<f4").reshape(shape).copy())
