"""Which format a data set folder has, and the data set opened in it: RLDS, LIBERO's HDF5 or LeRobot.

    data_root_dir/<name>/[<version>/]dataset_info.json    RLDS, a TFDS folder
    data_root_dir/<name>/*_demo.hdf5                      LIBERO's HDF5, one file per task
    data_root_dir/<name>/meta/info.json                   LeRobot v2.0, v2.1 or v3.0
"""

import difflib
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Type, Union

from vlakeep.core.errors import quoted
from vlakeep.data.conventions import find_card
from vlakeep.data.dataset import USUAL, Conventions, DemoDataset
from vlakeep.data.hdf5 import Hdf5Dataset, demo_files
from vlakeep.data.lerobot import INFO, LeRobotDataset
from vlakeep.data.rlds import RldsDataset
from vlakeep.data.sample import ONE_PICTURE, SampleSpec

FORMATS: Dict[str, Type[Any]] = {"rlds": RldsDataset, "hdf5": Hdf5Dataset, "lerobot": LeRobotDataset}


def _kinds(folder: Path) -> List[str]:
    found = {
        "rlds": (folder / "dataset_info.json").is_file() or any(folder.glob("*/dataset_info.json")),
        "hdf5": bool(demo_files(folder)),
        "lerobot": (folder / INFO).is_file(),
    }
    return [kind for kind, there in found.items() if there]


def find_format(folder) -> str:
    """`rlds`, `hdf5` or `lerobot`. FileNotFoundError says what was looked for, ValueError when there is more than one."""
    folder = Path(folder)
    kinds = _kinds(folder)
    if len(kinds) > 1:
        raise ValueError(f"{folder} holds files of several formats ({', '.join(kinds)}); keep one format to a folder")
    if not kinds:
        names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
        deeper = [path for path in sorted(folder.glob("*/")) if path.is_dir() and _kinds(path)]
        if deeper:
            inside = quoted(f"[{folder.name}/{deeper[0].name}]")
            raise FileNotFoundError(f"no data set at {folder}, but one in {deeper[0]}: name it, --data.datasets {inside}, or move it up")
        there = (f"it holds {', '.join(names[:5])}{', ...' if names[5:] else ''}" if names
                 else "it is empty" if folder.is_dir() else "it does not exist")
        raise FileNotFoundError(
            f"no data set at {folder} ({there}). Looked for: dataset_info.json, there or in a version folder such as 1.0.0 "
            f"(RLDS); *.hdf5 or *.h5 (LIBERO's HDF5); {INFO} (LeRobot). `vlakeep tabletop-data` makes the tabletop sets; others "
            "go below --data_root_dir, named as in --data.datasets")
    return kinds[0]


def open_dataset(folder, fraction: float = 1.0, cache_dir=None, conventions: Conventions = USUAL,
                 spec: Optional[SampleSpec] = None, skip_bad: bool = False, name: str = "",
                 cards: Optional[Dict[str, Any]] = None) -> DemoDataset:
    """The training split of the data set in `folder`, whatever its format, as its data card says (that of `cards` under the set's name,
    or the file beside the data), with samples as a model of this spec takes them. None: no model is at hand, and whoever asks looks
    through one camera. skip_bad: see bad.py.

    Every camera is a reader of its own with an index of its own; they are compared, and share the rest.
    """
    if conventions.card is None:
        conventions = conventions.with_card(find_card(Path(folder), name or Path(folder).name, cards))
    names: List[Optional[str]] = list(conventions.cameras or [conventions.camera])
    if spec is None:
        names, spec = names[:1], ONE_PICTURE
    elif not conventions.cameras and len(spec.cameras) > 1:
        names = list(spec.cameras)
    if len(names) != max(1, len(spec.cameras)):
        raise ValueError(f"--data.cameras {list(names)}: the model has {', '.join(spec.cameras) or 'one'}; name one for each, in its order")
    if len(names) > 1 and conventions.camera is not None:
        raise ValueError(f"--data.camera {conventions.camera}: the model looks through {', '.join(spec.cameras)}; say what these are "
                         "called in the data with --data.cameras")
    kind, views = FORMATS[find_format(folder)], []
    with ExitStack() as on_error:
        for camera in names:
            one = kind(folder, "train", fraction, cache_dir, replace(conventions, camera=camera), spec.state > 0 and not views, skip_bad)
            views.append(on_error.enter_context(one))
        if spec != ONE_PICTURE:
            views[0].take(spec, dict(zip(spec.cameras, views)) if len(views) > 1 else {})
        on_error.pop_all()
    return views[0]


def open_datasets(root, names: List[str], fraction: float = 1.0, cache_dir: Union[str, Path, None] = None,
                  conventions: Conventions = USUAL, spec: Optional[SampleSpec] = None,
                  skip_bad: bool = False, cards: Optional[Dict[str, Any]] = None) -> List[DemoDataset]:
    """The data sets `names` below `root`, in that order; spec: see open_dataset.

    Whoever opens them closes them; when one cannot be opened, none stays open.
    """
    for stray in sorted(set(cards or {}) - set(names)):  # a configuration may have cards of more sets than are opened; but no mistyped one
        if not (Path(root) / stray).is_dir():
            close = difflib.get_close_matches(stray, names, n=1)
            raise ValueError(f"data.cards has a card of {stray}, and there is no data set {Path(root) / stray}; "
                             + (f"did you mean {close[0]}?" if close else "take it out, or correct its name"))
    if not names:
        raise ValueError("no data set is named; give --data.datasets, e.g. '[tabletop_corner]' after `vlakeep tabletop-data`")
    opened: List[DemoDataset] = []
    with ExitStack() as on_error:
        for name in names:
            one = open_dataset(Path(root) / name, fraction, cache_dir, conventions, spec, skip_bad, name, cards)
            opened.append(on_error.enter_context(one))
            for other in opened[:-1]:
                if other.name == opened[-1].name and other.statistics != opened[-1].statistics:
                    raise ValueError(f"{other.folder} and {opened[-1].folder} are different data sets of one name, {other.name!r}, "
                                     "and statistics are kept by name; rename one of them")
        on_error.pop_all()
    return opened


def open_configured(settings, root, cache_dir, spec: Optional[SampleSpec] = None) -> List[DemoDataset]:
    """The data sets of the configuration section `data` (DataConfig), below `root`; see open_datasets."""
    told = Conventions(settings.camera, settings.gripper, settings.rotate, cameras=tuple(settings.cameras) or None,
                       state=tuple(settings.state) or None,
                       degenerate=None if settings.degenerate == "demonstrated" else settings.degenerate)
    return open_datasets(root, settings.datasets, settings.train_fraction, cache_dir, told, spec, settings.skip_bad, settings.cards)


@contextmanager
def closing_all(datasets: List[DemoDataset]) -> Iterator[List[DemoDataset]]:
    """The data sets of open_datasets, closed at the end of the block."""
    with ExitStack() as stack:
        for dataset in datasets:
            stack.enter_context(dataset)
        yield datasets
