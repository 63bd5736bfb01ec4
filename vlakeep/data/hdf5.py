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

import json
import re
import threading
from pathlib import Path
from typing import Any, Dict, List, Tuple

import numpy as np
from tqdm import tqdm

from vlakeep.data.bad import refuse
from vlakeep.data.dataset import USUAL, Conventions, DemoDataset, EpisodeIndex, IndexBuilder, cached_index, optional
from vlakeep.data.images import decode_image, encode_jpeg

FILES = ("*.hdf5", "*.h5")
_CAMERA = "agentview_rgb"
_BAR_FROM_FILES = 20
_AGAIN = "copy, download or make the file again"


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
    try:
        return h5py.File(path, "r")
    except OSError as error:  # also what a cut file gives
        raise ValueError(f"{path} cannot be opened as HDF5 ({error}); {_AGAIN}") from error


def _member(group, key: str, where: str, remedy: str = _AGAIN):
    """group[key], with the keys that are there in the error."""
    try:
        return group[key]
    except KeyError as error:
        raise ValueError(f"{where}: no {key!r} among {', '.join(sorted(group)) or 'nothing'}; {remedy}") from error


def _read_demo(demo, camera: str, where: str) -> np.ndarray:
    """actions [T, A] of a demonstration whose pictures fit them."""
    actions = _member(demo, "actions", where)
    images = _member(_member(demo, "obs", where), camera, f"{where}/obs", "choose a camera, they end in _rgb, with --data.camera")
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"{where}/obs/{camera}: {images.dtype} {list(images.shape)} are no pictures (uint8 [T, H, W, 3])")
    told = int(demo.attrs.get("num_samples", len(images)))
    if not len(actions) == len(images) == told:
        raise ValueError(f"{where}: {len(actions)} actions, {len(images)} pictures and num_samples {told} do not make one "
                         f"episode; {_AGAIN}")
    return actions[()]


def _told(error: Exception, where: str) -> str:
    """Our own words, which name the place, or those of h5py with it."""
    return str(error) if isinstance(error, ValueError) and where in str(error) else f"{where} cannot be read ({error}); {_AGAIN}"


def _read_file(path: Path, number: int, camera: str, read: Dict[Tuple[int, int], Any]) -> None:
    """Fill `read` with (actions, text, where, upside down) of every demonstration; actions are the reason where they cannot be had."""
    with _open(path) as file:
        data = _member(file, "data", str(path))
        numbers = [int(found[1]) for found in (re.fullmatch(r"demo_(\d+)", key) for key in data) if found]
        if not numbers:
            raise ValueError(f"{path}: data holds no demo_0, demo_1, ...; it holds {', '.join(data) or 'nothing'}")
        text = language_of(path, data.attrs.get("problem_info"))
        upside_down = data.attrs.get("macros_image_convention", "opengl") != "opencv"  # robosuite's default
        for demo in numbers:
            where = f"{path}: demo_{demo}"
            actions: Any = None
            try:
                actions = _read_demo(data[f"demo_{demo}"], camera, where)
            except (ValueError, OSError, KeyError, RuntimeError, TypeError, AttributeError) as error:
                actions = _told(error, where)
            read[demo, number] = (actions, text, where, upside_down)


def build_index(files: List[Path], camera: str, name: str) -> EpisodeIndex:
    """Read the actions and check every demonstration. ValueError names file, demonstration and frame."""
    read: Dict[Tuple[int, int], Any] = {}  # by (number of the demonstration, number of the file)
    builder = IndexBuilder(name)
    for number, path in enumerate(tqdm(files, desc=f"index {name}", unit="file", disable=len(files) < _BAR_FROM_FILES)):
        try:
            _read_file(path, number, camera, read)
        except (ValueError, OSError, RuntimeError, TypeError, AttributeError, KeyError) as error:  # what h5py says of a damaged file
            builder.leave_out(_told(error, str(path)), 0)  # how many it held nobody knows
    demos = sorted(read)
    for key in demos:
        actions, text, where, _ = read[key]
        try:
            if isinstance(actions, str):
                raise ValueError(actions)
            builder.add(actions, [text] * len(actions), where)
        except ValueError as error:
            builder.leave_out(str(error))
    return builder.index({"demo_E": np.array([demo for demo, _ in demos], dtype=np.int32),
                          "file_E": np.array([file for _, file in demos], dtype=np.int32),
                          "upside_down_E": np.array([read[key][3] for key in demos], dtype=bool)})


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
                 skip_bad: bool = False):
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
        index = cached_index("hdf5", name, [str(folder.resolve()), self._camera], self._paths, cache_dir,
                             lambda: build_index(self._paths, self._camera, name))
        refuse(folder, index.bad, skip_bad)
        super().__init__(folder, name, index, (0, len(index.start_E) - 1), fraction, conventions)

    def _picture(self, number: int, row: int, frame: int, where: str) -> np.ndarray:
        places = self.index.places
        file, demo = int(places["file_E"][number]), int(places["demo_E"][number])
        try:
            with self._lock:
                if file not in self._open_files:
                    self._open_files[file] = _open(self._paths[file])
                image = self._open_files[file][f"data/demo_{demo}/obs/{self._camera}"][frame]
        except (OSError, KeyError, ValueError, IndexError) as error:
            raise ValueError(f"{where}: {self._paths[file]}: demo_{demo}, frame {frame} cannot be read ({error}); the file has "
                             f"changed since it was indexed or is damaged, so {_AGAIN}") from error
        return image if places["upside_down_E"][number] else image[::-1]  # as the simulator's OpenGL gives it

    def _upright(self, image_HWC: np.ndarray) -> np.ndarray:
        return decode_image(encode_jpeg(super()._upright(image_HWC)))

    def close(self) -> None:
        for file in getattr(self, "_open_files", {}).values():
            file.close()
        self._open_files = {}
