"""TFRecord files and tf.train.Example messages without TensorFlow: reading, writing, and byte ranges for single-frame reads.

A record is  length u64 | masked crc32c(length) u32 | payload | masked crc32c(payload) u32,  little endian
(tensorflow/core/lib/io/record_writer.h). An Example is a protobuf map from a feature name to one list of bytes, float32 or int64
(tensorflow/core/example/example.proto); the few wire rules needed are implemented here.
"""

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, Iterator, List, Mapping, Tuple, Union

import google_crc32c
import numpy as np

_HEADER, _FOOTER = struct.Struct("<QI"), struct.Struct("<I")
HEADER_BYTES, FRAME_BYTES = _HEADER.size, _HEADER.size + _FOOTER.size  # 12 before the payload, 16 around it
_COMPRESSED = (b"\x1f\x8b", b"\x78\x01", b"\x78\x5e", b"\x78\x9c", b"\x78\xda")  # gzip, zlib: how such a file begins
LENGTH_DELIMITED, FIXED32, FIXED64, VARINT = 2, 5, 1, 0


class RecordError(ValueError):
    """A TFRecord file that cannot be read; the message names the file, the record and the byte offset."""


def masked_crc32c(data) -> int:
    crc = google_crc32c.value(bytes(data))
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def read_records(path, check: bool = True) -> Iterator[Tuple[int, bytes]]:
    """Yield (byte offset of the payload, payload) of every record; memory holds one record at a time.

    Raises RecordError for a truncated file and, with `check`, for a checksum that does not match.
    """
    for start, payload, problem in scan_records(path, check):
        if problem:
            raise RecordError(problem)
        yield start, payload


def scan_records(path, check: bool = True) -> Iterator[Tuple[int, bytes, str]]:
    """As read_records, with (offset, b"", what is wrong) for a record that cannot be read; after a length that cannot be believed nothing
    more comes."""
    path = Path(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        offset, record = 0, 0
        while offset < size:
            where = f"{path}: record {record} at byte {offset}"
            header = file.read(HEADER_BYTES)
            if len(header) < HEADER_BYTES:
                yield offset, b"", f"{where} is truncated: {len(header)} of {HEADER_BYTES} header bytes; copy or make it again"
                return
            length, length_crc = _HEADER.unpack(header)
            if check and masked_crc32c(header[:8]) != length_crc:
                what = ("it is compressed, which is not read: decompress it (gzip, zlib)" if not record and header[:2] in _COMPRESSED
                        else "so this is no TFRecord or it is damaged; copy or make the file again")
                yield offset, b"", f"{where}: checksum of the length does not match, {what}"
                return
            if offset + FRAME_BYTES + length > size:
                yield offset, b"", (f"{where} is truncated: it needs {FRAME_BYTES + length} bytes and the file ends after "
                                    f"{size - offset}; copy or make the file again")
                return
            payload = file.read(length)
            footer = file.read(4)
            if len(payload) < length or len(footer) < 4:
                yield offset, b"", f"{where} became shorter while it was read"
                return
            if check and masked_crc32c(payload) != _FOOTER.unpack(footer)[0]:
                yield offset, b"", (f"{where}: checksum of its {length} bytes does not match; the file is damaged, copy or make it "
                                    "again")
            else:
                yield offset + HEADER_BYTES, payload, ""
            offset += FRAME_BYTES + length
            record += 1


class RecordWriter:
    """Appends records to a new file; a context manager. `payload_bytes` and `records` count what was written."""

    def __init__(self, path):
        self._file = open(path, "xb")
        self.payload_bytes = 0
        self.records = 0

    def write(self, payload: bytes) -> None:
        length = struct.pack("<Q", len(payload))
        self._file.write(length + _FOOTER.pack(masked_crc32c(length)))
        self._file.write(payload)
        self._file.write(_FOOTER.pack(masked_crc32c(payload)))
        self.payload_bytes += len(payload)
        self.records += 1

    def __enter__(self) -> "RecordWriter":
        return self

    def __exit__(self, *error) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


@dataclass(frozen=True)
class Feature:
    """One feature of an Example, not yet decoded.

    kind: "bytes", "float" or "int64" ("empty" for a list without kind). ranges: (start, end) inside the payload, one per value
    for bytes, one per packed run or single value for numbers.
    """

    kind: str
    payload: bytes
    ranges: List[Tuple[int, int]]

    def bytes(self) -> List[bytes]:
        self._expect("bytes")
        return [self.payload[a:b] for a, b in self.ranges]

    def floats(self) -> np.ndarray:
        """float32 [values]"""
        self._expect("float")
        return np.frombuffer(b"".join(self.payload[a:b] for a, b in self.ranges), dtype="<f4")

    def ints(self) -> np.ndarray:
        """int64 [values]"""
        self._expect("int64")
        values = []
        for position, end in self.ranges:
            while position < end:
                value, position = varint(self.payload, position, end)
                values.append(value - (1 << 64) if value >> 63 else value)
        return np.array(values, dtype=np.int64)

    def _expect(self, kind: str) -> None:
        if self.kind not in (kind, "empty"):
            raise ValueError(f"the feature holds {self.kind} values, not {kind}")


def varint(data: bytes, position: int, end: int) -> Tuple[int, int]:
    """(the number that begins at `position`, where the next thing begins). ValueError for one that does not end before `end`."""
    if position < end and data[position] < 0x80:  # nearly all of them
        return data[position], position + 1
    value = shift = 0
    while True:
        if position >= end or shift > 63:
            raise ValueError(f"broken protobuf number at byte {position} of the record")
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position += 1
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, position
        shift += 7


def wire_fields(data: bytes, position: int, end: int) -> Iterator[Tuple[int, int, int, int]]:
    """Yield (field number, wire type, start, end) of the fields of the message in data[position:end]."""
    while position < end:
        tag, position = varint(data, position, end)
        number, wire = tag >> 3, tag & 7
        start = position
        if wire == LENGTH_DELIMITED:
            length, start = varint(data, position, end)
            position = start + length
        elif wire == FIXED32:
            position = start + 4
        elif wire == FIXED64:
            position = start + 8
        elif wire == VARINT:
            _, position = varint(data, position, end)
        else:
            raise ValueError(f"unknown protobuf wire type {wire} at byte {start} of the record")
        if position > end:
            raise ValueError(f"protobuf field at byte {start} of the record runs past its message")
        yield number, wire, start, position


def _feature(data: bytes, start: int, end: int) -> Feature:
    for number, _, a, b in wire_fields(data, start, end):
        kind = {1: "bytes", 2: "float", 3: "int64"}.get(number)
        if kind:
            return Feature(kind, data, [(c, d) for field, _, c, d in wire_fields(data, a, b) if field == 1])
    return Feature("empty", data, [])


def parse_example(payload: bytes) -> Dict[str, Feature]:
    """The features of a serialised tf.train.Example by name; values stay undecoded. ValueError for a broken message."""
    features = {}
    for number, _, start, end in wire_fields(payload, 0, len(payload)):
        if number != 1:  # Example.features
            continue
        for _, _, entry_start, entry_end in wire_fields(payload, start, end):  # Features.feature, a map entry each
            name, span = "", (entry_start, entry_start)
            for field, _, a, b in wire_fields(payload, entry_start, entry_end):
                if field == 1:
                    name = payload[a:b].decode("utf-8")
                elif field == 2:
                    span = (a, b)
            features[name] = _feature(payload, *span)
    return features


def _encode_varint(value: int) -> bytes:
    value &= 0xFFFFFFFFFFFFFFFF
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _delimited(number: int, data: bytes) -> bytes:
    return _encode_varint(number << 3 | LENGTH_DELIMITED) + _encode_varint(len(data)) + data


def write_example(features: Mapping[str, Union[List[bytes], np.ndarray]]) -> bytes:
    """Serialise a tf.train.Example: per name a list of bytes, or an array of floats (float32) or integers and bools (int64)."""
    entries = []
    for name in sorted(features):
        value = features[name]
        if isinstance(value, list):
            encoded = _delimited(1, b"".join(_delimited(1, item) for item in value))
        elif np.issubdtype(value.dtype, np.floating):
            encoded = _delimited(2, _delimited(1, np.ascontiguousarray(value, dtype="<f4").tobytes()))
        else:
            encoded = _delimited(3, _delimited(1, b"".join(_encode_varint(int(v)) for v in value.reshape(-1))))
        entries.append(_delimited(1, _delimited(1, name.encode("utf-8")) + _delimited(2, encoded)))
    return _delimited(1, b"".join(entries))
