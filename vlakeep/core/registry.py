"""The arms and the benchmarks by name: a file vlakeep/methods/NAME.py that ends in `METHOD = Class` is the method NAME (methods/base.py).

Files without such a line hold what several of them share, or as NAME_offline.py an offline step. A package of one's own adds methods
through the entry point group `vlakeep.methods`, whose values name such a class. Nothing is imported before it is asked for.

A benchmark is a room with a file evaluation.py, or a file in vlakeep/benchmarks/, that ends in `BENCHMARK = Class` (benchmarks/base.py);
the class says which names it serves, and such a file imports nothing heavy. From outside: the entry point group `vlakeep.benchmarks`.
"""

import re
from functools import lru_cache
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Dict, List, Tuple

GROUP = "vlakeep.methods"
BENCHMARKS = "vlakeep.benchmarks"


@lru_cache(maxsize=None)  # it reads the metadata of every package that is installed
def _outside(group: str = GROUP) -> dict:
    return {entry.name: entry for entry in entry_points(group=group)}


@lru_cache(maxsize=None)
def _holds(file: Path, word: str) -> bool:
    return re.search(rf"^{word} = ", file.read_text(encoding="utf-8"), flags=re.M) is not None


@lru_cache(maxsize=None)  # a study asks for each of its cells
def _methods_in(folders: Tuple[str, ...]) -> List[str]:
    return sorted({file.stem for folder in folders for file in Path(folder).glob("*.py") if _holds(file, "METHOD")})


def _own() -> List[str]:
    return _methods_in(tuple(import_module(GROUP).__path__))


def method_names() -> List[str]:
    """Every name that `method` may have."""
    own = _own()
    return [*own, *(name for name in sorted(_outside()) if name not in own)]


def method_class(name: str):
    """The class of a method (methods/base.py:Method). ValueError listing the names there are."""
    if name in _own():
        return import_module(f"{GROUP}.{name}").METHOD
    outside = _outside()
    if name not in outside:
        raise ValueError(f"--method {name!r}: must be one of {', '.join(method_names())}")
    return outside[name].load()


def _own_benchmarks() -> Dict[str, type]:
    """Name -> class."""
    modules = _benchmarks_in(tuple(import_module(BENCHMARKS).__path__), tuple(import_module("vlakeep").__path__))
    return {name: found for found in (import_module(module).BENCHMARK for module in modules) for name in found.names}


@lru_cache(maxsize=None)
def _benchmarks_in(folders: Tuple[str, ...], rooms: Tuple[str, ...]) -> List[str]:
    """Modules that have one: files of the folders, evaluation.py of the rooms."""
    files = [(f"{BENCHMARKS}.{file.stem}", file) for folder in folders for file in sorted(Path(folder).glob("*.py"))]
    files += [(f"vlakeep.{file.parent.name}.evaluation", file) for folder in rooms for file in sorted(Path(folder).glob("*/evaluation.py"))]
    return [module for module, file in files if _holds(file, "BENCHMARK")]


def benchmark_names() -> List[str]:
    """Every name that `evaluate.benchmark` may have."""
    own = list(_own_benchmarks())
    return [*own, *(name for name in sorted(_outside(BENCHMARKS)) if name not in own)]


def benchmark_class(name: str):
    """The class of a benchmark (benchmarks/base.py:Benchmark). ValueError listing the names there are."""
    own = _own_benchmarks()
    if name in own:
        return own[name]
    outside = _outside(BENCHMARKS)
    if name not in outside:
        raise ValueError(f"--evaluate.benchmark {name!r}: must be one of {', '.join(benchmark_names())}")
    return outside[name].load()
