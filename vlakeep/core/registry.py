"""The arms by name: a file vlakeep/methods/NAME.py is the method NAME, and its `METHOD` the class (methods/base.py).

NAME_offline.py beside it may hold its offline step. A package of one's own adds methods through the entry point group `vlakeep.methods`,
whose values name such a class. Nothing is imported before it is asked for.
"""

from functools import lru_cache
from importlib import import_module
from importlib.metadata import entry_points
from pkgutil import iter_modules
from typing import List

GROUP = "vlakeep.methods"


@lru_cache(maxsize=None)  # it reads the metadata of every package that is installed
def _outside() -> dict:
    return {entry.name: entry for entry in entry_points(group=GROUP)}


def _own() -> List[str]:
    folders = import_module(GROUP).__path__
    names = sorted(module.name for module in iter_modules(folders))
    return [name for name in names if name != "base" and not name.endswith("_offline")]


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
