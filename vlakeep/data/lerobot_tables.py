"""The tables of a LeRobot data set: parquet files, JSON lines, and columns of lists as arrays.

Errors say which file, row or column, and what to do. Axes: A action dimensions.
"""

import json
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

import numpy as np

from vlakeep.data.conventions import FILE
from vlakeep.data.index import optional

AGAIN = "copy, download or make the data set again"


def parquet_table(path: Path, columns=None, unread=(), maybe=()):
    """A table of a parquet file. ValueError for a damaged file or a missing column; `unread` ones only have to be there, and those of
    `maybe` need not be."""
    pq, pa = optional("pyarrow.parquet", "lerobot", f"reading {path}"), optional("pyarrow", "lerobot", f"reading {path}")
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: the download or copy is incomplete; {AGAIN}")
    try:
        file = pq.ParquetFile(path)
        missing = [name for name in [*(columns or ()), *unread] if name not in file.schema_arrow.names]
        if missing:
            raise ValueError(f"{path}: no column {', '.join(missing)} among {', '.join(file.schema_arrow.names)}; "
                             f"name the columns that are there with `actions:` or `text:` in the set's {FILE}, or {AGAIN}")
        there = [name for name in maybe if name in file.schema_arrow.names]
        return file.read(columns=[*columns, *there] if columns is not None else None)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as parquet ({error}); {AGAIN}") from error


def json_lines(path: Path) -> List[dict]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: the download or copy is incomplete; {AGAIN}")
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):  # a text may hold other Unicode line breaks
        try:
            rows += [dict(json.loads(line))] if line.strip() else []
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: {error}; {AGAIN}") from error
    return rows


def number_rows(column, shape: Sequence[int], where: str, what: str = "action") -> np.ndarray:
    """float32 [rows, A] of a list column. ValueError names the first row of another width than info.json says."""
    pa, pc = (optional(module, "lerobot", f"reading {where}") for module in ("pyarrow", "pyarrow.compute"))
    values = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    values = getattr(values, "storage", values)  # of an extension type such as the Array2D of datasets
    if int(np.prod(shape)) == 1 and (pa.types.is_floating(values.type) or pa.types.is_integer(values.type)):
        return np.asarray(values.to_numpy(zero_copy_only=False), dtype=np.float32)[:, None]
    if not (pa.types.is_list(values.type) or pa.types.is_fixed_size_list(values.type) or pa.types.is_large_list(values.type)):
        raise ValueError(f"{where}: {what}s are {values.type} and not lists of numbers; name those that are with `actions:` in {FILE}")
    if pa.types.is_nested(values.type.value_type):
        return _of_lists(values.to_pylist(), shape, where, what)
    widths = np.array([-1 if n is None else n for n in pc.list_value_length(values).to_pylist()])
    wrong = np.flatnonzero(widths != int(np.prod(shape)))
    if len(wrong):
        raise ValueError(f"{where}, row {wrong[0]}: {max(widths[wrong[0]], 0)} {what} values, and info.json says shape {list(shape)} "
                         f"({len(wrong)} of {len(widths)} rows); correct the shape there, or {AGAIN}")
    return np.asarray(values.flatten().to_numpy(zero_copy_only=False), dtype=np.float32).reshape(len(widths), -1)


def _of_lists(rows: List[Any], shape: Sequence[int], where: str, what: str) -> np.ndarray:
    """float32 [rows, A] of lists in lists, such as the chunk of actions that a frame holds."""
    try:
        found = np.array(rows, dtype=np.float32)
    except (TypeError, ValueError) as error:  # of unequal lengths, or without a value
        raise ValueError(f"{where}: {what}s are lists of lists that do not all have the shape {list(shape)} of info.json ({error}); "
                         f"{AGAIN}") from error
    if found.shape[1:] != tuple(shape):
        raise ValueError(f"{where}: {what}s have the shape {list(found.shape[1:])}, and info.json says {list(shape)}; correct it there, or "
                         f"{AGAIN}")
    return found.reshape(len(found), -1)


def runs_of(episodes_N: np.ndarray) -> Dict[Any, Tuple[int, int, bool]]:
    """Episode -> (its first row, its rows, whether they are one after the other), of the number of the episode in each row. In one pass: a
    file may hold all episodes of a set."""
    starts = np.flatnonzero(np.concatenate([[True], episodes_N[1:] != episodes_N[:-1]])) if len(episodes_N) else np.empty(0, np.int64)
    found: Dict[Any, Tuple[int, int, bool]] = {}
    for number, start, end in zip(episodes_N[starts].tolist(), starts.tolist(), [*starts[1:].tolist(), len(episodes_N)]):
        first, count, _ = found.get(number, (start, 0, True))
        found[number] = (first, count + end - start, count == 0)
    return found
