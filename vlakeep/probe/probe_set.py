"""Probe sets: the items on which the teacher and the student are measured. No gradient flows from them; actions are absent.

    <probe>/items.jsonl   one line per item: {"instruction", "question": bool, "kind", "state"}
    <probe>/images.npy    uint8 [N, H, W, 3]
    <probe>/probe.json    {"format": 1, "count": N, "sha256": content hash}

A probe with known answers has them in answers.jsonl, one {"item", "answer", ...} a line (`vlakeep libero-vqa`).

For models of several cameras, or that take the robot's state, there are also images_1.npy, images_2.npy, ... (one file a camera, each of
its own size), states.npy (float32 [N, Q]), and in probe.json format 2, the cameras' names and Q.

The hash covers items and pixels in a canonical form, so it does not depend on key order or on how NumPy writes its header.
Axes: N items, H W pixels, Q numbers of a robot's state.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import numpy as np

from vlakeep.core.config import Config, ProbeConfig
from vlakeep.core.errors import quoted
from vlakeep.core.storage import Storage, atomic_dir
from vlakeep.data.sample import Sample

FORMAT, WIDE_FORMAT = 1, 2  # the second has more than one picture an item, or a state
TASK = "task:"  # how kinds begin that are frames of a new task's data (probe/extend.py)
# How the names of benchmarks, their data sets and their probes begin -> what makes a probe of theirs.
_MAKERS = {"tabletop": "`vlakeep tabletop-data --probe.name {name} --probe.size {size}`",
           "libero": "`vlakeep libero-vqa --probe.name {name} --items {size}`"}
_OWN = "of a data set or pictures of your own as docs/bring-your-own-data.md says (The probe)"
_FIELDS = {"instruction": str, "question": bool, "kind": str, "state": str}


class ProbeError(ValueError):
    """A probe folder that cannot be used; the message names the file and the remedy."""


def content_hash(items: Sequence[Dict], images_NHWC: np.ndarray, cameras: Sequence[str] = (), others: Sequence[np.ndarray] = ()) -> str:
    """sha256 over the shape, every item as JSON with sorted keys, and the pixels; then, if there are any, the names of the cameras, and
    shape and bytes of the other cameras' pictures and of the states."""
    digest = hashlib.sha256(json.dumps({"format": FORMAT, "shape": list(images_NHWC.shape)}, sort_keys=True).encode())
    for item in items:
        line = json.dumps({key: item[key] for key in _FIELDS}, sort_keys=True, ensure_ascii=True).encode()
        digest.update(len(line).to_bytes(8, "little") + line)
    for image in images_NHWC:  # one by one: a memory-mapped array never has to fit into memory
        digest.update(np.ascontiguousarray(image).tobytes())
    if cameras or others:
        digest.update(json.dumps([list(cameras), [list(array.shape) for array in others]]).encode())
        for array in others:
            for row in array:
                digest.update(np.ascontiguousarray(row).tobytes())
    return digest.hexdigest()


def _pictures(samples: List[Sample], name: Optional[str]) -> np.ndarray:
    """uint8 [N, H, W, 3] of `image`, or of the camera of this name."""
    found = [sample.image if name is None else sample.cameras.get(name) for sample in samples]
    shapes = {str(None if one is None else (one.shape, str(one.dtype))) for one in found}
    if len(shapes) != 1 or found[0] is None or found[0].ndim != 3 or found[0].shape[-1] != 3 or found[0].dtype != np.uint8:
        of = "" if name is None else f" of the camera {name!r}"
        raise ValueError(f"probe pictures{of} must all be uint8 [H, W, 3] of one size, not {sorted(shapes)}")
    return np.stack(found)


def _states(samples: List[Sample]) -> Optional[np.ndarray]:
    """float32 [N, Q]; None where no sample has a state."""
    found = [sample.state for sample in samples]
    if all(state is None for state in found):
        return None
    if len({np.shape(state) for state in found}) != 1 or np.ndim(found[0]) != 1:
        raise ValueError("probe samples must all have a state of one size, or none: " + ", ".join(
            sorted({"none" if state is None else str(list(np.shape(state))) for state in found})))
    return np.stack(found).astype(np.float32)


def write_probe(folder, samples: List[Sample], kinds: List[str], states: Optional[List[str]] = None, answers: str = "",
                replace: bool = True) -> str:
    """Write a probe folder (replacing one that is there) and return its content hash.

    kinds: what each item asks about, e.g. a skill or a question kind. states: robot state text per item, "" when None. The samples' own
    cameras and states (normalised, as a data set gives them) are kept too. answers: text of answers.jsonl. replace: False refuses to put
    it in the place of another probe.
    Raises ValueError for no samples, lists of different lengths, pictures of different shapes, or what only some samples have.
    """
    states = states if states is not None else [""] * len(samples)
    if not samples or len(kinds) != len(samples) or len(states) != len(samples):
        raise ValueError(f"a probe needs at least one sample and as many kinds and states, not {len(samples)}, {len(kinds)} and "
                         f"{len(states)}")
    cameras = sorted({name for sample in samples for name in sample.cameras})
    images, *others = [_pictures(samples, name) for name in cameras or [None]]
    state_NQ = _states(samples)
    items = [{"instruction": s.instruction, "question": bool(s.question), "kind": kind, "state": state}
             for s, kind, state in zip(samples, kinds, states)]
    sha256 = content_hash(items, images, cameras, [*others, *([] if state_NQ is None else [state_NQ])])
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()) and not (folder / "probe.json").is_file():
        raise ValueError(f"{folder} exists and is no probe folder; it is left alone, choose another name with --probe.name")
    if not replace and folder.exists() and any(folder.iterdir()) and sha256 not in (folder / "probe.json").read_text():
        raise ValueError(f"{folder} holds another probe; take another name, or remove it first: `rm -r {quoted(folder)}`")
    with atomic_dir(folder) as partial:
        np.save(partial / "images.npy", images, allow_pickle=False)
        for number, other in enumerate(others, 1):
            np.save(partial / f"images_{number}.npy", other, allow_pickle=False)
        if state_NQ is not None:
            np.save(partial / "states.npy", state_NQ, allow_pickle=False)
        text = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
        (partial / "items.jsonl").write_text(text, encoding="utf-8")
        if answers:
            (partial / "answers.jsonl").write_text(answers, encoding="utf-8")
        info: Dict[str, Any] = {"format": FORMAT, "count": len(items), "sha256": sha256}
        if cameras or state_NQ is not None:
            info.update(format=WIDE_FORMAT, cameras=cameras, state=0 if state_NQ is None else state_NQ.shape[1])
        (partial / "probe.json").write_text(json.dumps(info, indent=2) + "\n")
    return sha256


def evenly(count: int, size: int) -> List[int]:
    """`size` of the numbers 0 to count - 1, evenly spaced, ascending; different ones for size <= count."""
    return [i * count // size for i in range(size)]


def remedy(name: str, size: int, *told: str) -> str:
    """How a probe of this name with `size` items is made. told: names of data sets and benchmarks, which say whose pictures it is to have
    when its own name does not."""
    family = next((family for word in (name, *told) for family in _MAKERS if word.startswith(family)), None)
    made = {one: command.format(name=quoted(name), size=size) for one, command in _MAKERS.items()}
    if family == "tabletop":
        return f"make it with {made[family]}"
    if family == "libero":
        return f"make it of LIBERO scenes with {made[family]}, or {_OWN}"
    return f"make it {_OWN}, of LIBERO scenes with {made['libero']}, or of the tabletop with {made['tabletop']}"


def open_probe(config: Config, storage: Storage) -> "ProbeSet":
    """The probe of a configuration. Raises ProbeError."""
    return ProbeSet(storage.probe_folder(config.probe.name), config.probe.name, config.probe.size)


class ProbeSet:
    """A probe folder, verified against its hash when it is opened; pictures stay memory-mapped.

    Attributes: folder, sha256, items (list of dict), answers (item number -> answer; empty unless a reader of answers.jsonl fills it).
    Raises ProbeError (missing, truncated or changed files).
    """

    def __init__(self, folder, name: str = "", size: int = ProbeConfig.size):
        """name, size: of --probe.name and --probe.size, for messages."""
        self.folder = Path(folder)
        self._name = name or self.folder.name
        self._remedy = remedy(self._name, size)
        info = self._info()
        self.items = self._items()
        self.answers: Dict[int, str] = {}
        self._images = self._open_images()
        self._cameras: List[str] = info["cameras"]
        self._others = [self._open_images(f"images_{number}.npy") for number in range(1, len(self._cameras))]
        self._state_NQ = self._open_states(info["state"]) if info["state"] else None
        others = [*self._others, *([] if self._state_NQ is None else [self._state_NQ])]
        if not (info["count"] == len(self.items) == len(self._images)) or any(len(array) != info["count"] for array in others):
            raise ProbeError(f"{self.folder}: probe.json says {info['count']} items, items.jsonl has {len(self.items)} and "
                             f"images.npy {len(self._images)}{', the others ' if others else ''}{', '.join(str(len(a)) for a in others)}; "
                             f"{self._remedy}")
        self.sha256 = content_hash(self.items, self._images, self._cameras, others)
        if self.sha256 != info["sha256"]:
            raise ProbeError(f"{self.folder}: its content hash is {self.sha256[:16]}, probe.json says {info['sha256'][:16]}: "
                             f"it was changed after it was written; {self._remedy}")

    def _info(self) -> Dict:
        path = self.folder / "probe.json"
        if not path.is_file():
            raise ProbeError(f"no probe set at {self.folder} (probe.json is missing); {self._remedy}")
        try:
            info = json.loads(path.read_text())
            if info["format"] not in (FORMAT, WIDE_FORMAT):
                raise ProbeError(f"{path} has format {info['format']!r}, this version reads {FORMAT}; {self._remedy}")
            return {"count": int(info["count"]), "sha256": str(info["sha256"]), "cameras": [str(name) for name in info.get("cameras", [])],
                    "state": int(info.get("state", 0))}
        except ProbeError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise ProbeError(f"{path} cannot be read ({error!r}); {self._remedy}") from error

    def _items(self) -> List[Dict]:
        path, items = self.folder / "items.jsonl", []
        if not path.is_file():
            raise ProbeError(f"{path} is missing; {self._remedy}")
        # split, not splitlines(): an instruction may hold other Unicode line breaks
        for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
            try:
                item = json.loads(line)
                if not all(isinstance(item[key], kind) for key, kind in _FIELDS.items()):
                    raise TypeError(f"needs {', '.join(_FIELDS)}")
            except (KeyError, TypeError, ValueError) as error:
                raise ProbeError(f"{path}, line {number} is no probe item ({error!r}); {self._remedy}") from error
            items.append({key: item[key] for key in _FIELDS})  # what is hashed, and nothing that damage may have added
        return items

    def _open(self, name: str) -> np.ndarray:
        path = self.folder / name
        try:
            return np.load(path, mmap_mode="r", allow_pickle=False)
        except FileNotFoundError as error:
            raise ProbeError(f"{path} is missing; {self._remedy}") from error
        except Exception as error:  # a truncated file cannot be mapped; NumPy reads the header as Python and says so in many ways
            raise ProbeError(f"{path} is truncated or damaged ({error}); {self._remedy}") from error

    def _open_states(self, size: int) -> np.ndarray:
        states = self._open("states.npy")
        if states.dtype != np.float32 or states.shape[1:] != (size,):
            raise ProbeError(f"{self.folder / 'states.npy'} must be float32 [N, {size}], not {states.dtype} "
                             f"{list(states.shape)}; {self._remedy}")
        return states

    def _open_images(self, name: str = "images.npy") -> np.ndarray:
        images, path = self._open(name), self.folder / name
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise ProbeError(f"{path} must be uint8 [N, H, W, 3], not {images.dtype} {list(images.shape)}; {self._remedy}")
        return images

    def __len__(self) -> int:
        return len(self.items)

    def spread(self, size: int) -> List[int]:
        """`size` item numbers, evenly spaced over the probe, ascending. ProbeError when the probe has fewer."""
        if size > len(self):
            raise ProbeError(f"{self.folder} has {len(self)} items, --probe.size asks for {size}; lower it or take a larger "
                             f"probe: {remedy(self._name, size)}")
        return evenly(len(self), size)

    def samples(self, indices: Sequence[int]) -> List[Sample]:
        """The items as samples without target, pictures copied into memory."""
        return [Sample(None if self._cameras else np.array(self._images[i]), self.items[i]["instruction"],
                       question=self.items[i]["question"], dataset="probe", cameras=self._named(i),
                       state=None if self._state_NQ is None else np.array(self._state_NQ[i])) for i in indices]

    def _named(self, index: int) -> Dict[str, np.ndarray]:
        return {name: np.array(images[index]) for name, images in zip(self._cameras, [self._images, *self._others])}

    def kinds(self, indices: Sequence[int]) -> List[str]:
        return [self.items[i]["kind"] for i in indices]
