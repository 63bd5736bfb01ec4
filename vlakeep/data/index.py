"""The index of a data set: everything about its episodes but the pictures, collected by a format and kept between runs.

Axes: E episodes, N frames, A action dimensions, Q numbers of a robot's state.
"""

import hashlib
import importlib
import io
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Callable, Dict, Iterable, List, Optional, Tuple, Union, cast

import google_crc32c
import numpy as np

from vlakeep.core.errors import install_extra, is_pointer, quoted
from vlakeep.core.storage import atomic_write
from vlakeep.data.bad import nothing_left
from vlakeep.data.conventions import FILE

_INDEX_FORMAT = 6
_CHECKED = 4  # bytes of the checksum behind a kept index
_CORE = ("start_E", "text_N", "actions_NA", "texts")
CONTENT = "content"  # among the places of an index: a hash of all that its episodes hold, pictures too, where that costs nothing
LINKED = "linked"  # among the places of an index: files outside the list that it was made from, with their marks, as JSON
MOST = 1e15  # of an action's value; what is larger is damage, and its square no float32
VALID = "valid_E"  # among the places of an index: episodes that the files themselves call those of validation or test
STATES = "state_NQ"  # among the places of an index, for models that take the robot's state


def _checksum(data) -> bytes:
    return google_crc32c.value(bytes(data)).to_bytes(_CHECKED, "little")


def optional(module: str, extra: str, what: str) -> ModuleType:
    """The module of an extra; ModuleNotFoundError with the pip command when it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise ModuleNotFoundError(
            f"{what} needs the package {package}, which cannot be imported ({error}): pip install {package}, or all that this "
            f"format needs with {install_extra(extra)}", name=package) from error


@dataclass
class EpisodeIndex:
    """Everything about the episodes of a data set except the pictures, in their order."""

    start_E: np.ndarray  # int64 [E + 1]: first frame of each episode
    text_N: np.ndarray  # int32: number of the frame's instruction in `texts`
    actions_NA: np.ndarray  # float32, as stored
    texts: List[str]
    places: Dict[str, np.ndarray]  # where the pictures are; the keys are the format's own
    bad: Dict[str, int] = field(default_factory=dict)  # why episodes cannot be used -> how many; they are there with no frame (bad.py)
    key: str = ""  # of the files it was made from; empty where it is not kept
    lasting: bool = True  # False: what makes episodes bad is not in these files, so that the index is not kept

    def save(self, path: Path) -> None:
        arrays: Dict[str, Any] = {"start_E": self.start_E, "text_N": self.text_N, "actions_NA": self.actions_NA}
        made = io.BytesIO()  # a text list goes in as JSON: arrays of objects would need pickle
        np.savez(made, **arrays, texts=np.array(json.dumps(self.texts)), bad=np.array(json.dumps(self.bad)),
                 **cast(Dict[str, Any], self.places))
        data = made.getbuffer()
        with atomic_write(path) as file:
            file.write(data)
            file.write(_checksum(data))

    @classmethod
    def load(cls, path: Path) -> "EpisodeIndex":
        whole = memoryview(path.read_bytes())
        if _checksum(whole[:-_CHECKED]) != whole[-_CHECKED:]:  # a zip file checks what is in it, not its list of what there is
            raise ValueError(f"{path} is not what was written")
        with np.load(io.BytesIO(whole[:-_CHECKED]), allow_pickle=False) as data:
            arrays = {key: data[key] for key in data.files}
        core = {key: arrays.pop(key) for key in _CORE}
        bad = json.loads(str(arrays.pop("bad", "{}")))  # an older version's has none
        return cls(**{**core, "texts": json.loads(str(core["texts"]))}, places=arrays, bad=bad)


class Elsewhere(ValueError):
    """An episode that cannot be used by reason of what the files of an index do not say: a package, a lock, a file that they name."""


class IndexBuilder:
    """Collects episodes in order and checks what every format must hold; `where` in the errors is the format's."""

    def __init__(self, name: str):
        self.name = name
        self._texts: Dict[str, int] = {}
        self._text_numbers, self._actions, self.lengths = [], [], []
        self._states: List[np.ndarray] = []
        self.bad: Dict[str, int] = {}
        self.lasting = True

    def add(self, actions, texts: List[str], where: str, state: Optional[np.ndarray] = None) -> None:
        """actions [T, A] as stored, texts: one per frame; state [T, Q], if it is read. ValueError for other shapes, another A or Q, or
        what is not finite."""
        actions = np.asarray(actions)
        if actions.ndim != 2 or not actions.size or len(texts) != len(actions) or actions.dtype.kind not in "fiu":
            raise ValueError(f"{where}: actions {actions.dtype} {list(actions.shape)} and {len(texts)} instructions are not "
                             "numbers [T, A] with one instruction per frame; name the right keys with `actions:` and `text:` in the "
                             f"data set's {FILE}")
        actions = actions.astype(np.float32)
        if self._actions and actions.shape[1] != self._actions[0].shape[1]:
            raise ValueError(f"{where}: {actions.shape[1]} action dimensions, the first episode has {self._actions[0].shape[1]}; episodes "
                             "of several robots go into a data set each")
        bad = np.flatnonzero(~(np.abs(actions) < MOST).all(axis=1))
        if len(bad):
            what = f"beyond {MOST:g}" if np.isfinite(actions[bad[0]]).all() else "not finite"
            raise ValueError(f"{where} (episode {len(self.lengths)} of {self.name}), frame {bad[0]}: action "
                             f"{actions[bad[0]].tolist()} is {what} ({len(bad)} of {len(actions)} frames); "
                             "mend or leave out this episode and make the data set again")
        for text in dict.fromkeys(texts):
            if text not in self._texts:
                _check_text(text, where)
        if state is not None:
            self._add_state(state, len(actions), where)
        self.lengths.append(len(actions))
        self._actions.append(actions)
        self._text_numbers.append(np.array([self._texts.setdefault(text, len(self._texts)) for text in texts], dtype=np.int32))

    def _add_state(self, state: np.ndarray, steps: int, where: str) -> None:
        if state.ndim != 2 or len(state) != steps or (self._states and state.shape[1] != self._states[0].shape[1]):
            expected = f"[{steps}, {self._states[0].shape[1] if self._states else 'Q'}]"
            raise ValueError(f"{where}: the state is {list(state.shape)} and not {expected}; choose its features with --data.state")
        bad = np.flatnonzero(~np.isfinite(state).all(axis=1))
        if len(bad):
            raise ValueError(f"{where} (episode {len(self.lengths)} of {self.name}), frame {bad[0]}: state {state[bad[0]].tolist()} is not "
                             f"finite ({len(bad)} of {steps} frames); mend or leave out this episode and make the data set again")
        self._states.append(state.astype(np.float32))

    def leave_out(self, reason: Union[str, Exception], episodes: int = 1) -> None:
        """In the place of `add`: this many episodes cannot be used. They keep their numbers, and have no frame."""
        self.lasting = self.lasting and not isinstance(reason, Elsewhere)
        self.bad[str(reason)] = self.bad.get(str(reason), 0) + episodes
        self.lengths += [0] * episodes

    def index(self, places: Dict[str, np.ndarray]) -> EpisodeIndex:
        if self.bad and not self._actions:
            raise ValueError(nothing_left(self.bad))
        if not self.lengths:
            raise ValueError(f"data set {self.name} has no episodes; `vlakeep tabletop-data` makes the tabletop sets")
        start_E = np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int64)
        places = {**places, **({STATES: np.concatenate(self._states)} if self._states else {})}
        return EpisodeIndex(start_E, np.concatenate(self._text_numbers), np.concatenate(self._actions), list(self._texts), places, self.bad,
                            lasting=self.lasting)


def _check_text(text: str, where: str) -> None:
    """ValueError for bytes that were no UTF-8, which readers hand on as surrogates: replaced, two instructions may become one."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: the text {text[:60]!a} is no UTF-8; write the set's texts as UTF-8, or name a key of others with "
                         f"`text:` in its {FILE}") from error


def all_files(top: Path) -> List[Path]:
    """The files below a folder, in order and without hidden ones; folders that are links are entered too, once each."""
    found: List[Path] = []
    entered = set()
    for folder, inside, names in os.walk(top, followlinks=True):
        real = os.path.realpath(folder)
        inside[:] = sorted(name for name in inside if not name.startswith(".")) if real not in entered else []
        found += [Path(folder) / name for name in names if not name.startswith(".")] if real not in entered else []
        entered.add(real)
    return sorted(path for path in found if path.is_file())


def _marks(files: Iterable[Path]) -> List[Tuple[str, int, int, int]]:
    """What changes when a file does. The change time too: a tool that mends it in place may keep its size and put its old time back."""
    told = [(path.name, path.stat()) for path in files]
    return [(name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for name, stat in told]


def linked_files(files: Iterable[Path]) -> Dict[str, np.ndarray]:
    """For the places of an index: files that the listed ones lead to, so that it is made anew when one of these changes."""
    found = sorted(set(files))
    return {LINKED: np.array(json.dumps([list(map(str, found)), _marks(found)]))} if found else {}


def _same_linked(index: EpisodeIndex) -> bool:
    if LINKED not in index.places:
        return True
    files, marks = json.loads(str(index.places[LINKED]))
    try:
        return [list(mark) for mark in _marks(map(Path, files))] == marks
    except OSError:
        return False


def cached_index(kind: str, name: str, identity, files: List[Path], cache_dir, build: Callable[[], EpisodeIndex]) -> EpisodeIndex:
    """The index kept in cache_dir for exactly these files (name, size, times) and `identity`; built when there is none."""
    pointers = [path for path in files if is_pointer(path)]
    if pointers:
        raise ValueError(f"{len(pointers)} of the {len(files)} files of {name} are git-lfs pointers and not data, such as {pointers[0]}: "
                         f"run `git -C {quoted(pointers[0].parent)} lfs pull`, or download the data set in another way")
    if cache_dir is None:
        return build()
    key = hashlib.sha256(json.dumps([_INDEX_FORMAT, kind, identity, _marks(files)]).encode()).hexdigest()[:16]
    path = Path(cache_dir) / f"{kind}_index_{name}_{key}.npz"
    if path.is_file():
        try:
            index = EpisodeIndex.load(path)
            index.key = _whole_key(key, index)
            if _same_linked(index):
                return index
        except Exception:  # a damaged cache is a cache miss, whatever way NumPy finds to say so
            pass
    index = build()
    if not index.lasting:
        return index
    path.parent.mkdir(parents=True, exist_ok=True)
    index.save(path)
    index.key = _whole_key(key, index)
    return index


def _whole_key(key: str, index: EpisodeIndex) -> str:
    linked = index.places.get(LINKED)
    return key if linked is None else hashlib.sha256((key + str(linked)).encode()).hexdigest()[:16]
