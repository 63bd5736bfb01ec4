"""Pictures that a LeRobot data set keeps in the rows of its parquet files."""

import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any, Dict, Tuple

import numpy as np

from vlakeep.data.dataset import optional

_PICTURE_BYTES = 256 << 20  # encoded pictures of the row groups read last
_AGAIN = "copy, download or make the data set again"


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
