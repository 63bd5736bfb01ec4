"""Probe sets: the items on which the teacher and the student are measured. No gradient flows from them; actions are absent.

    <probe>/items.jsonl   one line per item: {"instruction", "question": bool, "kind", "state"}
    <probe>/images.npy    uint8 [N, H, W, 3]
    <probe>/probe.json    {"format": 1, "count": N, "sha256": content hash}

The hash covers items and pixels in a canonical form, so it does not depend on key order or on how NumPy writes its header.
Axes: N items, H W pixels.
"""

import hashlib
import json
from pathlib import Path
from typing import Dict, List, Optional, Sequence

import numpy as np

from vlakeep.core.storage import atomic_dir
from vlakeep.data.sample import Sample

FORMAT = 1
_REMEDY = "make it again with `vlakeep tabletop-data`, or write your own with write_probe (vlakeep/probe/probe_set.py)"
_FIELDS = {"instruction": str, "question": bool, "kind": str, "state": str}


class ProbeError(ValueError):
    """A probe folder that cannot be used; the message names the file and the remedy."""


def content_hash(items: Sequence[Dict], images_NHWC: np.ndarray) -> str:
    """sha256 over the shape, every item as JSON with sorted keys, and the pixels."""
    digest = hashlib.sha256(json.dumps({"format": FORMAT, "shape": list(images_NHWC.shape)}, sort_keys=True).encode())
    for item in items:
        line = json.dumps({key: item[key] for key in _FIELDS}, sort_keys=True, ensure_ascii=True).encode()
        digest.update(len(line).to_bytes(8, "little") + line)
    for image in images_NHWC:  # one by one: a memory-mapped array never has to fit into memory
        digest.update(np.ascontiguousarray(image).tobytes())
    return digest.hexdigest()


def write_probe(folder, samples: List[Sample], kinds: List[str], states: Optional[List[str]] = None) -> str:
    """Write a probe folder (replacing one that is there) and return its content hash.

    kinds: what each item asks about, e.g. a skill or a question kind. states: robot state text per item, "" when None.
    Raises ValueError for no samples, lists of different lengths or pictures of different shapes.
    """
    states = states if states is not None else [""] * len(samples)
    if not samples or len(kinds) != len(samples) or len(states) != len(samples):
        raise ValueError(f"a probe needs at least one sample and as many kinds and states, not {len(samples)}, {len(kinds)} and "
                         f"{len(states)}")
    shapes = {(sample.image.shape, str(sample.image.dtype)) for sample in samples}
    if len(shapes) != 1 or samples[0].image.ndim != 3 or samples[0].image.shape[-1] != 3 or samples[0].image.dtype != np.uint8:
        raise ValueError(f"probe pictures must all be uint8 [H, W, 3] of one size, not {sorted(map(str, shapes))}")
    images = np.stack([sample.image for sample in samples])
    items = [{"instruction": s.instruction, "question": bool(s.question), "kind": kind, "state": state}
             for s, kind, state in zip(samples, kinds, states)]
    sha256 = content_hash(items, images)
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()) and not (folder / "probe.json").is_file():
        raise ValueError(f"{folder} exists and is no probe folder; it is left alone, choose another name with --probe.name")
    with atomic_dir(folder) as partial:
        np.save(partial / "images.npy", images, allow_pickle=False)
        text = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
        (partial / "items.jsonl").write_text(text, encoding="utf-8")
        info = {"format": FORMAT, "count": len(items), "sha256": sha256}
        (partial / "probe.json").write_text(json.dumps(info, indent=2) + "\n")
    return sha256


def evenly(count: int, size: int) -> List[int]:
    """`size` of the numbers 0 to count - 1, evenly spaced, ascending; different ones for size <= count."""
    return [i * count // size for i in range(size)]


class ProbeSet:
    """A probe folder, verified against its hash when it is opened; pictures stay memory-mapped.

    Attributes: folder, sha256, items (list of dict), answers (item number -> answer; empty unless a reader of answers.jsonl fills it).
    Raises ProbeError (missing, truncated or changed files).
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        info = self._info()
        self.items = self._items()
        self.answers: Dict[int, str] = {}
        self._images = self._open_images()
        if not (info["count"] == len(self.items) == len(self._images)):
            raise ProbeError(f"{self.folder}: probe.json says {info['count']} items, items.jsonl has {len(self.items)} and "
                             f"images.npy {len(self._images)}; {_REMEDY}")
        self.sha256 = content_hash(self.items, self._images)
        if self.sha256 != info["sha256"]:
            raise ProbeError(f"{self.folder}: its content hash is {self.sha256[:16]}, probe.json says {info['sha256'][:16]}: "
                             f"it was changed after it was written; {_REMEDY}")

    def _info(self) -> Dict:
        path = self.folder / "probe.json"
        if not path.is_file():
            raise ProbeError(f"no probe set at {self.folder} (probe.json is missing); {_REMEDY}")
        try:
            info = json.loads(path.read_text())
            if info["format"] != FORMAT:
                raise ProbeError(f"{path} has format {info['format']!r}, this version reads {FORMAT}; {_REMEDY}")
            return {"count": int(info["count"]), "sha256": str(info["sha256"])}
        except ProbeError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise ProbeError(f"{path} cannot be read ({error!r}); {_REMEDY}") from error

    def _items(self) -> List[Dict]:
        path, items = self.folder / "items.jsonl", []
        if not path.is_file():
            raise ProbeError(f"{path} is missing; {_REMEDY}")
        # split, not splitlines(): an instruction may hold other Unicode line breaks
        for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
            try:
                item = json.loads(line)
                if not all(isinstance(item[key], kind) for key, kind in _FIELDS.items()):
                    raise TypeError(f"needs {', '.join(_FIELDS)}")
            except (KeyError, TypeError, ValueError) as error:
                raise ProbeError(f"{path}, line {number} is no probe item ({error!r}); {_REMEDY}") from error
            items.append(item)
        return items

    def _open_images(self) -> np.ndarray:
        path = self.folder / "images.npy"
        try:
            images = np.load(path, mmap_mode="r", allow_pickle=False)
        except FileNotFoundError as error:
            raise ProbeError(f"{path} is missing; {_REMEDY}") from error
        except (ValueError, OSError, EOFError) as error:  # a truncated file cannot be mapped
            raise ProbeError(f"{path} is truncated or damaged ({error}); {_REMEDY}") from error
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise ProbeError(f"{path} must be uint8 [N, H, W, 3], not {images.dtype} {list(images.shape)}; {_REMEDY}")
        return images

    def __len__(self) -> int:
        return len(self.items)

    def spread(self, size: int) -> List[int]:
        """`size` item numbers, evenly spaced over the probe, ascending. ProbeError when the probe has fewer."""
        if size > len(self):
            raise ProbeError(f"{self.folder} has {len(self)} items, --probe.size asks for {size}; lower it or make a larger "
                             "probe with `vlakeep tabletop-data`")
        return evenly(len(self), size)

    def samples(self, indices: Sequence[int]) -> List[Sample]:
        """The items as samples without target, pictures copied into memory."""
        return [Sample(np.array(self._images[i]), self.items[i]["instruction"], question=self.items[i]["question"],
                       dataset="probe") for i in indices]

    def kinds(self, indices: Sequence[int]) -> List[str]:
        return [self.items[i]["kind"] for i in indices]
