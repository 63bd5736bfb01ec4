"""LIBERO's demonstrations as HDF5 (robosuite layout), as downloaded or as OpenVLA's regenerate_libero_dataset.py writes them.

    data_root_dir/<name>/<task>_demo.hdf5: data/demo_<n>/actions [T, A], data/demo_<n>/obs/agentview_rgb uint8 [T, H, W, 3], ...

A frame gives what the official RLDS set made from the same file gives (moojink/rlds_dataset_builder,
LIBERO_Spatial_dataset_builder.py):
  picture   both kinds of file hold the simulator's picture, which stands on its head; the builder turns it by 180 degrees and
            stores it as JPEG, so here it is turned and goes through JPEG (quality 95) too, as in the official evaluation.
  language  from the file name, as the builder and the simulator's task list make it. The attribute problem_info holds the text of
            the BDDL file, which differs ("Pick the akita black bowl ..." for pick_up_the_black_bowl_...), and serves other names.
  gripper   -1 open .. +1 close, as in the RLDS set; statistics.py makes it standard.
Episodes come in the order demo 0 of every file, demo 1 of every file, ...: a train_fraction below 1 then takes from every task.
Needs h5py (extra `hdf5`).
"""

import importlib.util
import json
import os
import re
import threading
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Set, Tuple

import numpy as np
from tqdm import tqdm

from vlakeep.data.bad import refuse
from vlakeep.data.conventions import FILE, DataCard
from vlakeep.data.dataset import USUAL, Conventions, DemoDataset
from vlakeep.data.images import decode_image, encode_jpeg, of_one_colour
from vlakeep.data.index import VALID, Elsewhere, EpisodeIndex, IndexBuilder, cached_index, linked_files, optional
from vlakeep.data.suggest import missing_keys

FILES = ("*.hdf5", "*.h5")
_CAMERA = "agentview_rgb"
_STATES = ("ee_states", "gripper_states")  # which the builder of the official RLDS sets joins to `state`
_BAR_FROM_FILES = 20
_AGAIN = "copy, download or make the file again"
_LAYOUT = ("this is not the layout of LIBERO and robomimic (data/demo_0/actions, data/demo_0/obs/CAMERA); bring the episodes into it, or "
           "convert them to RLDS or LeRobot (docs/bring-your-own-data.md)")


def demo_files(folder) -> List[Path]:
    """The HDF5 files of a folder, by name; hidden ones, as file systems leave them beside others, are no data."""
    return sorted(path for pattern in FILES for path in Path(folder).glob(pattern) if path.is_file() and not path.name.startswith("."))


def language_of(path: Path, problem_info=None) -> str:
    """The instruction of a file: its name without scene and `_demo`, else the text of its `problem_info`, else ""."""
    if path.stem.endswith("_demo"):
        words = path.stem[:-len("_demo")].split("_")
        scenes = [i for i, word in enumerate(words) if "SCENE" in word]
        return " ".join(words[scenes[-1] + 1 if scenes else 0:])
    if problem_info is None:
        return ""
    try:
        text = json.loads(problem_info)["language_instruction"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: its attribute problem_info holds no language_instruction ({error!r}); call the file "
                         "<words_of_the_instruction>_demo.hdf5, or mend the attribute") from error
    return "".join(text).strip().strip('"')  # LIBERO writes a text or a list of its parts


def _open(path: Path):
    h5py = optional("h5py", "hdf5", f"reading {path}")
    if importlib.util.find_spec("hdf5plugin"):  # its filters are there once it is imported
        importlib.import_module("hdf5plugin")
    try:
        return h5py.File(path, "r")
    except OSError as error:  # also what a cut file gives
        if "unable to lock" in str(error):  # another program writes to it, or its disk has no locks
            raise Elsewhere(f"{path} cannot be opened as HDF5 ({error}); wait for what writes to it, or end that; if nothing does: export "
                            "HDF5_USE_FILE_LOCKING=FALSE") from error
        raise ValueError(f"{path} cannot be opened as HDF5 ({error}); {_AGAIN}") from error


def _broken_link(group, key: str) -> str:
    """In words, the link on the way to group[key] that leads nowhere; empty without one."""
    for name in key.split("/"):
        link = group.get(name, getlink=True) if name in group else None
        try:
            group = group[name]
        except KeyError:
            told = [f"{kind} {getattr(link, kind)}" for kind in ("filename", "path") if hasattr(link, kind)]
            return f"{name!r} is a link to {', '.join(told)}, which is not there: copy that too, or mend the link" if told else ""
    return ""


def _member(group, key: str, where: str, remedy: str = _AGAIN):
    """group[key], with the keys that are there in the error."""
    try:
        return group[key]
    except KeyError as error:
        link = _broken_link(group, key)
        if link:
            raise Elsewhere(f"{where}: {link}") from error
        raise ValueError(f"{where}: no {key!r} among {', '.join(sorted(group)) or 'nothing'}; {remedy}") from error


def _file_of(one) -> str:
    """The name of the file that an object lies in, which a link may lead to; as h5py's `file.filename`, without an object for the file."""
    h5f = optional("h5py.h5f", "hdf5", "reading HDF5")
    return os.fsdecode(h5f.get_name(one.id))


def _check_array(array, where: str) -> List[Path]:
    """The other files that an array's values lie in. Elsewhere when HDF5 would give a stand-in for them, or cannot decompress."""
    plist = array.id.get_create_plist()
    if not (plist.get_nfilters() or array.is_virtual or plist.get_external_count()):  # nearly all of them
        return []
    h5py, name = optional("h5py", "hdf5", f"reading {where}"), array.name.rpartition("/")[2]
    folder = Path(array.file.filename).parent
    for number, _, _, called in (plist.get_filter(i) for i in range(plist.get_nfilters())):
        if not h5py.h5z.filter_avail(number):
            raise Elsewhere(f"{where}: {name} is compressed by the filter {called.decode(errors='replace') or 'without a name'} (number "
                            f"{number}), which is not installed: pip install hdf5plugin, or write the file without it, h5repack -f NONE "
                            "IN OUT")
    files = [source.file_name for source in array.virtual_sources()] if array.is_virtual else []
    files += [one[0] for one in array.external or ()]
    found = [folder / file for file in dict.fromkeys(files) if file != "." and "%" not in file]
    missing = [path for path in found if not path.is_file()]
    if missing:  # of a virtual array the fill value is read, zeros
        raise Elsewhere(f"{where}: the values of {name} lie in {missing[0]}, which is not there: copy that too")
    return found


def _read_state(demo, names: Sequence[str], where: str) -> np.ndarray:
    """float [T, Q]: these members of obs, one number after the other."""
    obs = _member(demo, "obs", where)
    parts = [_member(obs, name, f"{where}/obs", "choose the parts of the state with --data.state")[()] for name in names or _STATES]
    if len({len(part) for part in parts}) > 1:
        raise ValueError(f"{where}/obs: the parts of the state have {', '.join(str(len(part)) for part in parts)} steps; {_AGAIN}")
    return np.concatenate([part.reshape(len(part), -1) for part in parts], axis=1)


def _what(demo) -> Dict[str, str]:
    """Key -> picture or number, of the arrays of a demonstration."""
    found: Dict[str, str] = {}

    def note(key, one):
        if hasattr(one, "dtype"):
            found[key] = "picture" if one.dtype == np.uint8 and one.ndim == 4 else "number" if one.dtype.kind in "fiu" else "text"

    demo.visititems(note)
    return found


def _read_demo(demo, camera: str, where: str, card: Optional[DataCard] = None) -> Tuple[np.ndarray, List[Path]]:
    """(actions [T, A] of a demonstration whose pictures fit them, the files that it lies in)."""
    keys = list(card.actions) if card and card.actions else ["actions"]
    missing = [key for key in keys if key not in demo]
    arrays = [_member(demo, key, where) for key in keys if key not in missing]
    if missing:
        raise ValueError(missing_keys(where, missing, _what(demo), where.rpartition("/")[0]))
    obs = _member(demo, "obs", where, "a low-dimensional file holds no pictures: take the file that has them")
    images = _member(obs, camera, f"{where}/obs", "choose a camera with --data.camera, or `camera:` in the data card")
    linked = [Path(_file_of(one)) for one in (demo, obs, images, *arrays)]
    for array in (images, *arrays):
        linked += _check_array(array, where)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"{where}/obs/{camera}: {images.dtype} {list(images.shape)} are no pictures (uint8 [T, H, W, 3]); choose another "
                         "camera with --data.camera, or store three channels of 8 bits, decoded: several cameras are several keys")
    if len(images) and of_one_colour(images[t] for t in (0, len(images) // 2, -1)):
        raise ValueError(f"{where}/obs/{camera}: the first, the middle and the last picture are of one colour; choose another camera with "
                         "--data.camera or `camera:` in the data card, or take this demonstration out of the file")
    parts = [array[()] for array in arrays]
    if card is not None:
        parts = [part.reshape(len(part), -1) for part in parts]
    told = int(demo.attrs.get("num_samples", len(images)))
    if not {len(part) for part in parts} == {len(images)} == {told}:
        raise ValueError(f"{where}: {len(parts[0])} actions, {len(images)} pictures and num_samples {told} do not make one "
                         f"episode; {_AGAIN}")
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1), linked


def _text_of(demo, data, told: str, where: str) -> str:
    """The text that a card's `text` names: an attribute or an array of the demonstration, or of the file; NAME.FIELD one inside JSON."""
    name, _, field = told.partition(".")
    found = next((place[name] for place in (demo.attrs, demo, data.attrs) if name in place), None)
    if found is None:
        raise ValueError(f"{where}: text: {told} names no attribute and no array here; there are {', '.join(sorted(demo.attrs)) or 'none'} "
                         f"and {', '.join(sorted(demo))}; correct `text:` in the data card, or give `instruction: WORDS` for all")
    value = found[()] if hasattr(found, "shape") and hasattr(found, "file") else found
    text = value.decode("utf-8", errors="surrogateescape") if isinstance(value, bytes) else str(value)
    try:
        return str(json.loads(text)[field]) if field else text
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{where}: {name} holds no {field!r} ({error!r}); correct `text:` in the data card") from error


def _told(error: Exception, where: str) -> str:
    """Our own words, which name the place, or those of h5py with it."""
    return str(error) if isinstance(error, ValueError) and where in str(error) else f"{where} cannot be read ({error}); {_AGAIN}"


def _valid(file) -> Set[str]:
    """The demonstrations that a file itself calls those of validation or test, by robomimic's filter keys."""
    mask = file.get("mask")
    named = [mask[key] for key in mask if re.match("valid|test", key, re.I)] if hasattr(mask, "keys") else []
    found: Set[str] = set()
    for one in named:
        values = one[()] if hasattr(one, "shape") and one.dtype.kind in "SO" else ()
        found.update(value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value) for value in np.ravel(values))
    return found


def _read_file(path: Path, number: int, camera: str, state: Optional[Sequence[str]], card: Optional[DataCard],
               read: Dict[Tuple[int, int], Any]) -> Set[Path]:
    """The files that it links to. Fill `read` with (actions, text, where, upside down, states, key, of validation) of every demonstration;
    actions are the reason if it has none."""
    linked: Set[Path] = set()
    with _open(path) as file:
        data = _member(file, "data", str(path), _LAYOUT)
        numbered = [found for found in (re.fullmatch(r"demo_(\d+)", key) for key in data) if found]
        keys = {int(found[1]): found[0] for found in numbered}
        if len(keys) < len(numbered):
            raise ValueError(f"{path}: data holds two groups of one number among {', '.join(found[0] for found in numbered)}; rename one")
        if not keys:
            raise ValueError(f"{path}: data holds no demo_0, demo_1, ...; it holds {', '.join(data) or 'nothing'}; call its groups so")
        text = language_of(path, data.attrs.get("problem_info"))
        upside_down = data.attrs.get("macros_image_convention", "opengl") != "opencv"  # robosuite's default
        valid = _valid(file)
        for demo, key in keys.items():
            where, states = f"{path}: {key}", None
            actions: Any = None
            try:
                actions, files = _read_demo(_member(data, key, where), camera, where, card)
                linked.update(files)
                text = _text_of(data[key], data, card.text, where) if card and card.text else text
                states = None if state is None else _read_state(data[key], state, where)
            except (ValueError, OSError, KeyError, RuntimeError, TypeError, AttributeError) as error:
                actions = error if isinstance(error, Elsewhere) else ValueError(_told(error, where))
            read[demo, number] = (actions, text, where, upside_down, states, key, key in valid)
    return linked - {path}


def build_index(files: List[Path], camera: str, name: str, state: Optional[Sequence[str]] = None,
                card: Optional[DataCard] = None) -> EpisodeIndex:
    """Read the actions and check every demonstration. state: None reads none, () the usual one."""
    read: Dict[Tuple[int, int], Any] = {}  # by (number of the demonstration, number of the file)
    linked: Set[Path] = set()
    builder = IndexBuilder(name)
    for number, path in enumerate(tqdm(files, desc=f"index {name}", unit="file", disable=len(files) < _BAR_FROM_FILES)):
        try:
            linked |= _read_file(path, number, camera, state, card, read)
        except (ValueError, OSError, RuntimeError, TypeError, AttributeError, KeyError) as error:  # what h5py says of a damaged file
            # How many it held nobody knows.
            builder.leave_out(error if isinstance(error, Elsewhere) else _told(error, str(path)), 0)
    demos = sorted(read)
    for key in demos:
        actions, text, where, _, states = read[key][:5]
        try:
            if isinstance(actions, ValueError):
                raise actions
            builder.add(actions, [text] * len(actions), where, states)
        except ValueError as error:
            builder.leave_out(error)
    return builder.index({"demo_E": np.array([demo for demo, _ in demos], dtype=np.int32),
                          "file_E": np.array([file for _, file in demos], dtype=np.int32),
                          "key_E": np.array([read[key][5] for key in demos]),
                          VALID: np.array([read[key][6] for key in demos], dtype=bool),
                          "upside_down_E": np.array([read[key][3] for key in demos], dtype=bool), **linked_files(linked)})


class Hdf5Dataset(DemoDataset):
    """All demonstrations of a folder of LIBERO HDF5 files; its name is the folder's.

    conventions.camera: the pictures below obs, `agentview_rgb` by default. Raises FileNotFoundError, ModuleNotFoundError or
    ValueError, each naming the file and the remedy.
    """

    kind = "hdf5"
    files = FILES
    needs = ("h5py",)
    rotated = True

    def __init__(self, folder, split: str = "train", fraction: float = 1.0, cache_dir=None, conventions: Conventions = USUAL,
                 with_state: bool = False, skip_bad: bool = False):
        folder = Path(folder)
        self._open_files: Dict[int, Any] = {}
        self._lock = threading.Lock()
        self._paths = demo_files(folder)
        if not self._paths:
            raise FileNotFoundError(f"{folder} holds no *.hdf5 or *.h5 file")
        if split != "train":
            raise ValueError(f"{folder}: HDF5 sets have one split, 'train', not {split!r}")
        self.check_extra(folder)
        self._camera, name = conventions.camera or _CAMERA, folder.absolute().name
        self.camera = self._camera
        card, state = conventions.card, conventions.state_names(with_state)
        identity = [str(folder.resolve()), self._camera, *([] if state is None else [state]), *(card.reads() if card else [])]
        index = cached_index("hdf5", name, identity, self._paths, cache_dir,
                             lambda: build_index(self._paths, self._camera, name, state, card))
        refuse(folder, index.bad, skip_bad)
        if not any(index.texts) and not (card and card.instruction):
            raise ValueError(f"{folder}: no demonstration has an instruction: the files are not called <words>_demo.hdf5 and have no "
                             f"problem_info. Write `instruction: WORDS`, or `text: ATTRIBUTE` of each demonstration, to {folder}/{FILE}, "
                             "or call each file <words_of_its_instruction>_demo.hdf5")
        super().__init__(folder, name, index, (0, len(index.start_E) - 1), fraction, conventions)

    def origins(self) -> List[str]:
        return [str(self._paths[file]) for file in self.index.places["file_E"][self._numbers]]

    def _picture(self, number: int, row: int, frame: int, where: str) -> np.ndarray:
        places = self.index.places
        file, demo = int(places["file_E"][number]), str(places["key_E"][number])
        try:
            with self._lock:
                if file not in self._open_files:
                    self._open_files[file] = _open(self._paths[file])
                image = self._open_files[file][f"data/{demo}/obs/{self._camera}"][frame]
        except (OSError, KeyError, ValueError, IndexError) as error:
            raise ValueError(f"{where}: {self._paths[file]}: {demo}, frame {frame} cannot be read ({error}); the file has "
                             f"changed since it was indexed or is damaged, so {_AGAIN}") from error
        return image if places["upside_down_E"][number] else image[::-1]  # as the simulator's OpenGL gives it

    def _upright(self, image_HWC: np.ndarray) -> np.ndarray:
        return decode_image(encode_jpeg(super()._upright(image_HWC)))

    def close(self) -> None:
        for file in getattr(self, "_open_files", {}).values():
            file.close()
        self._open_files = {}
