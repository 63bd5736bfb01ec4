"""Pictures that a LeRobot data set keeps in the rows of its parquet files."""

import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any, Dict, Tuple

import numpy as np

from vlakeep.data.images import decode_image, is_picture, may_be_of_one_colour, of_one_colour
from vlakeep.data.index import Elsewhere, optional

_LOOKED_AT = 256  # pictures in memory while a file is looked at
_PICTURE_BYTES = 256 << 20  # encoded pictures of the row groups read last
_AGAIN = "copy, download or make the data set again"


def bytes_of(cell: dict, folder: Path, column: str, where: str) -> bytes:
    """The encoded picture of a row's {"bytes", "path"}; a path is below the data set's folder. ValueError or Elsewhere without one."""
    if cell.get("bytes") is not None:
        return bytes(cell["bytes"])
    if not cell.get("path"):
        raise ValueError(f"{where}: the row of {column} holds no picture; {_AGAIN}")
    path = folder / cell["path"]
    if not path.is_file():
        raise Elsewhere(f"{where}: {path} is missing; {_AGAIN}")
    return path.read_bytes()


class PictureLooks:
    """Every picture of one parquet file, looked at when the set is opened: is there one, and does each episode show anything?

    As the reader of RLDS does: pictures are told by how they begin, and the first, the middle and the last one of an episode are decoded if
    all three are suspiciously small. episodes_N: the number of the episode in each row.
    """

    def __init__(self, folder: Path, path: Path, column: str, episodes_N: np.ndarray):
        pq = optional("pyarrow.parquet", "lerobot", f"reading {path}")
        self.column, self._problems, self._small = column, {}, {}
        change = np.flatnonzero(np.diff(episodes_N)) + 1
        starts, ends = np.concatenate([[0], change]), np.concatenate([change, [len(episodes_N)]])
        wanted = {int(row) for a, b in zip(starts, ends) for row in _three(a, b - a)}
        row = 0
        for batch in pq.ParquetFile(path).iter_batches(_LOOKED_AT, columns=[column]):
            for cell in batch.column(0).to_pylist():
                self._look(row, cell, folder, f"{path}, row {row}", row in wanted)
                row += 1

    def _look(self, row: int, cell: Any, folder: Path, where: str, wanted: bool) -> None:
        try:
            data = bytes_of(cell if isinstance(cell, dict) else {}, folder, self.column, where)
        except ValueError as error:
            self._problems[row] = error
            return
        if not is_picture(data[:4]):
            self._problems[row] = ValueError(f"{where}: {len(data)} bytes of {self.column} that are neither JPEG nor PNG (they start with "
                                             f"{data[:4]!r}); write them as one of these, or leave this episode out")
        elif wanted and may_be_of_one_colour(data):
            self._small[row] = data

    def check(self, first: int, count: int, where: str) -> None:
        """ValueError for the first of the rows from `first` on that holds no picture, and for pictures that show nothing."""
        problem = next((self._problems[row] for row in range(first, first + count) if row in self._problems), None)
        if problem:
            raise problem
        three = [self._small.get(row) for row in _three(first, count)]
        try:
            plain = all(three) and of_one_colour(decode_image(data) for data in three if data)
        except ValueError:  # a damaged one is found when it is decoded for a sample
            plain = False
        if plain:
            raise ValueError(f"{where}: the first, the middle and the last picture of {self.column} are of one colour; choose another "
                             "camera with --data.camera or `camera:` in the data card, or leave this episode out")


def _three(first: int, count: int) -> Tuple[int, int, int]:
    """Rows of the first, the middle and the last picture of an episode."""
    return first, first + count // 2, first + count - 1


class ParquetPictures:
    """Encoded pictures of parquet rows. A row group is the smallest piece that can be read, so the last ones are kept."""

    def __init__(self, column: str):
        self._column, self._lock = column, threading.Lock()
        self._starts: Dict[Path, np.ndarray] = {}
        self._groups: "OrderedDict[Tuple[Path, int], Any]" = OrderedDict()
        self._bytes = 0

    def read(self, path: Path, row: int) -> dict:
        """{"bytes": encoded picture or None, "path": file name or None}."""
        pq, pa = (optional(module, "lerobot", f"reading {path}") for module in ("pyarrow.parquet", "pyarrow"))
        try:
            with self._lock:
                if path not in self._starts:
                    meta = pq.read_metadata(path)
                    sizes = [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]
                    self._starts[path] = np.concatenate([[0], np.cumsum(sizes)])
            starts = self._starts[path]
            group = int(np.searchsorted(starts, row, side="right")) - 1
            with self._lock:
                cells = self._groups.get((path, group))
                if cells is not None:
                    self._groups.move_to_end((path, group))
            if cells is None:
                cells = pq.ParquetFile(path).read_row_group(group, columns=[self._column])[self._column]
                self._keep((path, group), cells)
            return cells[row - int(starts[group])].as_py() or {}
        except (pa.ArrowException, OSError, IndexError) as error:
            raise ValueError(f"{path}, row {row}: the picture cannot be read ({error}); the file has changed since it was "
                             f"indexed or is damaged, so {_AGAIN}") from error

    def _keep(self, key, cells) -> None:
        with self._lock:
            if key not in self._groups:
                self._groups[key] = cells
                self._bytes += cells.nbytes
            while self._bytes > _PICTURE_BYTES and len(self._groups) > 1:
                self._bytes -= self._groups.popitem(last=False)[1].nbytes
