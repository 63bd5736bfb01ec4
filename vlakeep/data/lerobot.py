"""LeRobot data sets, v2.0 and v2.1 (a parquet and a video file per episode) and v3.0 (many episodes per file).

    data_root_dir/<name>/meta/info.json, data/chunk-*/..., videos/...
    v2: meta/tasks.jsonl, meta/episodes.jsonl;   v3: meta/tasks.parquet, meta/episodes/chunk-*/file-*.parquet

Read with pyarrow and PyAV (extra `lerobot`) and not with the lerobot package: no version of it reads both formats, and its pins
exclude the libraries that OpenVLA and this package are tested with (docs/formats.md has the versions). Layouts: lerobot 0.3.3 and
0.4.4, datasets/utils.py; frames are found by their time stamps as in datasets/video_utils.py (decode_video_frames).
Axes: E episodes, N frames, A action dimensions.
"""

import json
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
from tqdm import tqdm

from vlakeep.data.bad import OPTION, refuse
from vlakeep.data.conventions import FILE, DataCard
from vlakeep.data.dataset import USUAL, Conventions, DemoDataset
from vlakeep.data.images import decode_image
from vlakeep.data.index import EpisodeIndex, IndexBuilder, all_files, cached_index
from vlakeep.data.lerobot_tables import AGAIN, json_lines, number_rows, parquet_table, runs_of
from vlakeep.data.parquet_pictures import ParquetPictures, PictureLooks, bytes_of
from vlakeep.data.video import TOLERANCE, VideoReader, missing_frame, video_times

INFO = "meta/info.json"
VERSIONS = ("v2.0", "v2.1", "v3.0")
_ACTIONS = ("action", "actions")
_STATES = ("observation.state", "state")
# What converters of LIBERO and of robosuite call the camera that OpenVLA looks through.
_CAMERAS = ("image", "agentview_rgb", "agentview", "front", "top")
_BAR_FROM_FILES = 50


@dataclass(frozen=True)
class Info:
    """meta/info.json, as far as reading needs it."""

    folder: Path
    version: str
    fps: float
    actions: Dict[str, List[int]]  # the features that make an action, joined in this order, with their shapes
    camera: str
    video: bool
    data_path: str
    video_path: str
    chunk_size: int
    splits: Dict[str, str]
    names: Tuple[str, ...] = ()  # of the values of an action
    robot: str = ""
    text: Optional[str] = None  # a column that holds the text, instead of the task
    spare: Optional[str] = None  # `end`: where a video has more frames than its table these come last
    states: Tuple[Tuple[str, Tuple[int, ...]], ...] = ()  # (feature, shape) of the parts of the robot's state, where it is read

    @property
    def v3(self) -> bool:
        return self.version.startswith("v3")

    def data_file(self, chunk: int, file: int) -> Path:
        """v2: file is the number of the episode."""
        return self.folder / self.data_path.format(episode_chunk=chunk, episode_index=file, chunk_index=chunk, file_index=file)

    def video_file(self, chunk: int, file: int) -> Path:
        return self.folder / self.video_path.format(episode_chunk=chunk, episode_index=file, chunk_index=chunk, file_index=file,
                                                    video_key=self.camera)


def _is_depth(feature: dict) -> bool:
    told = feature.get("info") or feature.get("video_info") or {}
    return bool(told.get("is_depth_map") or told.get("video.is_depth_map"))


def _choose_camera(features: dict, wanted: Optional[str], where: str) -> str:
    cameras = [key for key, value in features.items() if value.get("dtype") in ("image", "video") and not _is_depth(value)]
    names = {key: key.split(".")[-1] for key in cameras}
    if wanted is not None:
        found = [key for key in cameras if key == wanted] or [key for key in cameras if names[key] == wanted]
    elif len(cameras) == 1:
        found = cameras
    else:
        found = next((hits for hits in ([key for key in cameras if names[key] == usual] for usual in _CAMERAS) if hits), [])
    if len(found) != 1:
        told = f"--data.camera {wanted} names none or several" if wanted else "which one to use is not clear"
        depth = [key for key, value in features.items() if _is_depth(value)]
        told += f" ({', '.join(depth)}: depth, is_depth_map, which is no colour picture)" if depth else ""
        numbers = [key for key, value in features.items() if key not in cameras and len(value.get("shape") or ()) == 3]
        if not cameras and numbers:
            told += (f" ({', '.join(numbers)}: pictures kept as numbers, dtype {features[numbers[0]].get('dtype')}, which are not read: "
                     "write the set again with their dtype as image or video)")
        raise ValueError(f"{where}: of the cameras {', '.join(cameras) or '(none)'}, {told}; choose with --data.camera, or "
                         f"`camera:` in the set's {FILE}")
    return found[0]


def _names(feature: dict) -> Tuple[str, ...]:
    """The names of a feature's values: a list, or a list in a dictionary such as {"motors": [...]}."""
    names = feature.get("names")
    names = next(iter(names.values()), None) if isinstance(names, dict) else names
    return tuple(map(str, names)) if isinstance(names, list) and all(isinstance(one, str) for one in names) else ()


def _choose_state(features: dict, names: Sequence[str], where: str) -> Tuple[Tuple[str, Tuple[int, ...]], ...]:
    names = names or [name for name in _STATES if name in features][:1]
    missing = [name for name in names if name not in features]
    if missing or not names:
        raise ValueError(f"{where}: no feature {', '.join(missing or _STATES)} among {', '.join(features)}; choose the state with "
                         "--data.state")
    return tuple((name, tuple(features[name]["shape"])) for name in names)


def read_info(folder, camera: Optional[str] = None, state: Optional[Sequence[str]] = None,
              card: Optional[DataCard] = None) -> Info:
    """state: None reads none, () the usual one. ValueError for another version, or when action, camera or state cannot be told from
    info.json."""
    folder = Path(folder)
    path = folder / INFO
    try:
        info = json.loads(path.read_text(encoding="utf-8-sig"))  # editors put a mark of the byte order before it
        version, features, fps = info["codebase_version"], info["features"], float(info["fps"])
        if version not in VERSIONS:
            raise ValueError(f"{path}: the format is {version!r}; known are {', '.join(VERSIONS)}. lerobot's own converters "
                             "(lerobot/datasets) bring older sets to v2.1 and newer")
        usual = [key for key in _ACTIONS if key in features][:1]
        action_keys = list(card.actions) if card and card.actions else usual
        lacking = [key for key in action_keys if key not in features]
        if lacking or not action_keys:
            like = [key for key in features if "action" in key.lower()] or ["KEY", "..."]
            raise ValueError(f"{path}: no feature {' or '.join(lacking or _ACTIONS)} among {', '.join(features)}; say which they are in "
                             f"{folder}/{FILE}, after you have checked their order:\nactions: [{', '.join(like)}]")
        key = _choose_camera(features, camera, str(path))
        names = tuple(name for one in action_keys for name in _names(features[one]))
        found = Info(folder, version, fps, {one: list(features[one]["shape"]) for one in action_keys}, key,
                     features[key]["dtype"] == "video", info["data_path"], info.get("video_path") or "",
                     int(info.get("chunks_size", 1000)), dict(info.get("splits") or {}), names, str(info.get("robot_type") or ""),
                     card.text if card else None, card.spare_frames if card else None,
                     () if state is None else _choose_state(features, state, str(path)))
        if not 0 < fps < 1e6 or found.chunk_size < 1:
            raise ValueError(f"fps is {fps} and chunks_size {found.chunk_size}")
        for file in (found.data_file, found.video_file) if found.video else (found.data_file,):
            file(0, 0)  # a path that cannot be filled in is no path
        return found
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, OverflowError) as error:
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        what = f"it has no {error}: write it there" if isinstance(error, KeyError) else f"{error!r}: mend it there"
        raise ValueError(f"{path} cannot be read ({what}), or {AGAIN}") from error


def read_tasks(info: Info) -> Dict[int, str]:
    """Instruction by task_index."""
    if not info.v3:
        path = info.folder / "meta/tasks.jsonl"
        try:
            return _texts([(row["task_index"], row["task"]) for row in json_lines(path)])
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: a line is no task_index and task ({error!r}); {AGAIN}") from error
        except ValueError as error:
            raise ValueError(str(error) if str(path) in str(error) else f"{path}: {error}, or {AGAIN}") from error
    table = parquet_table(info.folder / "meta/tasks.parquet", None)
    # lerobot writes the texts as the index of a pandas table, whose column is called task or has a made-up name
    texts = [name for name in table.column_names if name in ("task", "__index_level_0__")]
    if not texts or "task_index" not in table.column_names:
        raise ValueError(f"{info.folder}/meta/tasks.parquet: no texts and task_index among {', '.join(table.column_names)}; "
                         f"call the column of the texts `task`, or {AGAIN}")
    try:
        return _texts(list(zip(table["task_index"].to_pylist(), table[texts[0]].to_pylist())))
    except (TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"{info.folder}/meta/tasks.parquet: a row is no task_index and text ({error}); {AGAIN}") from error
    except ValueError as error:
        raise ValueError(f"{info.folder}/meta/tasks.parquet: {error}, or {AGAIN}") from error


def _texts(rows: List[Tuple[Any, Any]]) -> Dict[int, str]:
    """TypeError for a number or a text that is none."""
    for number, text in rows:
        if type(number) is not int or not isinstance(text, (str, type(None))):
            raise TypeError(f"{number!r} and {text!r}")
    found = {number: text or "" for number, text in rows}
    other = next(((number, text) for number, text in rows if found[number] != (text or "")), None)
    if other is not None:  # as sets that were merged have it; whichever is taken, frames of the other get a wrong text
        raise ValueError(f"task {other[0]} has two texts, {other[1]!r} and {found[other[0]]!r}, and which of its frames have which is not "
                         "said: give each text a number of its own there and in the column task_index")
    return found


@dataclass(frozen=True)
class _Place:
    """Where an episode is, by the meta files. v2: file is the number of the episode, start is 0 seconds."""

    episode: int
    length: int
    data: Tuple[int, int]  # chunk, file
    video: Tuple[int, int]
    start: float  # seconds in the video file at which the episode starts
    end: Optional[float] = None  # at which it ends, where meta says so


def read_places(info: Info) -> List[_Place]:
    """All episodes by number. ValueError for missing fields."""
    places = []
    try:
        if not info.v3:
            for row in json_lines(info.folder / "meta/episodes.jsonl"):
                at = (row["episode_index"] // info.chunk_size, row["episode_index"])
                places.append(_Place(row["episode_index"], row["length"], at, at, 0.0))
        else:
            files = sorted(path for path in (info.folder / "meta/episodes").glob("*/*.parquet") if not path.name.startswith("."))
            if not files:
                raise FileNotFoundError(f"{info.folder}/meta/episodes holds no */*.parquet; {AGAIN}")
            video = f"videos/{info.camera}/"
            columns = ["episode_index", "length", "data/chunk_index", "data/file_index"]
            columns += [video + "chunk_index", video + "file_index", video + "from_timestamp"] if info.video else []
            for path in files:
                for row in parquet_table(path, columns, maybe=[video + "to_timestamp"] if info.video else []).to_pylist():
                    at = (row["data/chunk_index"], row["data/file_index"])
                    there = (row[video + "chunk_index"], row[video + "file_index"]) if info.video else at
                    start = row[video + "from_timestamp"] if info.video else 0.0
                    places.append(_Place(row["episode_index"], row["length"], at, there, start, row.get(video + "to_timestamp")))
        wrong = [place for place in places if not all(isinstance(n, int) and n >= 0 for n in (place.episode, place.length, *place.data))]
        if wrong:
            raise TypeError(f"numbers such as those of {wrong[0]}")
    except (KeyError, TypeError) as error:
        raise ValueError(f"{info.folder}/meta: the list of episodes lacks {error}; {AGAIN}") from error
    if not places:
        raise ValueError(f"{info.folder}/meta: the list of episodes is empty; {AGAIN}")
    places.sort(key=lambda place: place.episode)
    twice = next((one.episode for one, after in zip(places, places[1:]) if one.episode == after.episode), None)
    if twice is not None:
        raise ValueError(f"{info.folder}/meta: the list of episodes holds episode {twice} twice; take one out, or {AGAIN}")
    return places


def _look_at_videos(info: Info, places: List[_Place]) -> Dict[Path, Any]:
    """Video file -> the times of its frames (video.py:video_times), or in words why there are none."""
    files = list(OrderedDict.fromkeys(info.video_file(*place.video) for place in places if place.length))
    missing = [path for path in files if not path.is_file()]
    some = f"{missing[0]}{', ...' if missing[1:] else ''}" if missing else ""
    lacks = f"{info.folder} lacks {len(missing)} of its {len(files)} video files ({some}): the download or copy is incomplete; {AGAIN}"
    found: Dict[Path, Any] = dict.fromkeys(missing, lacks)
    for path in tqdm(files, desc="check videos", unit="file", disable=len(files) < _BAR_FROM_FILES):
        try:
            found.setdefault(path, None if path in found else video_times(path))
        except ValueError as error:
            found[path] = str(error)
    return found


def _check_video(info: Info, place: _Place, times: Any, seconds: np.ndarray) -> None:
    """ValueError when the video does not show every frame of the episode, which are at `seconds` of it."""
    path = info.video_file(*place.video)
    if isinstance(times, str):
        raise ValueError(times)
    first = missing_frame(times, place.start + seconds, info.fps)
    if first < 0:
        _check_length(info, place, times, path)
        return
    wanted, needed = place.start + seconds[first], round(place.start * info.fps) + place.length
    if len(times) < needed:
        raise ValueError(f"{path} holds {len(times)} frames and its episodes need {needed} (episode {place.episode} ends there); {AGAIN}")
    nearest, rate = times[np.abs(times - wanted).argmin()], _rate(times)
    if abs(rate - info.fps) > 0.001 * info.fps:
        told = f"`fps` of {INFO} is {info.fps:g}, the video has {rate:.6g}: make both the same"
    elif times[0] > TOLERANCE / info.fps:
        told = f"the video begins at {times[0]:.3f} s and not at 0: write it again from 0 s (ffmpeg -i IN -c copy OUT.mp4)"
    else:
        told = "the video lacks frames there or pauses: leave the episode out of the table"
    raise ValueError(f"{path}: episode {place.episode}: frame {first} is at {wanted:.3f} s by the table and the nearest of the video at "
                     f"{nearest:.3f} s; {told}, or {AGAIN}")


def _check_length(info: Info, place: _Place, times: np.ndarray, path: Path) -> None:
    """ValueError when the video of the episode has other frames than the table: which of them belong together nobody knows."""
    if info.v3 and place.end is None:
        return
    # Where a video was cut without encoding it anew, frames before its beginning are there and not shown.
    shown = int((times > -TOLERANCE / info.fps).sum()) if place.end is None else round((place.end - place.start) * info.fps)
    spare = shown - place.length
    if abs(spare) < 2 or (spare > 0 and info.spare == "end"):  # one is what rounding and encoders make
        return
    raise ValueError(f"{path}: episode {place.episode} has {shown} frames there and {place.length} rows in its table. A recorder that "
                     "keeps the frames of a discarded take puts them first, so that each picture would have another's action: look at the "
                     "video, and leave the episode out; if the frames that are too many come last, say `spare_frames: end` in the set's "
                     f"{FILE}")


def _rate(times: np.ndarray) -> float:
    """Frames per second."""
    return float(1 / np.median(np.diff(times))) if len(times) > 1 and np.median(np.diff(times)) > 0 else 0.0


def build_index(info: Info, name: str) -> EpisodeIndex:
    """Read every parquet file without its pictures and check it against meta. Errors name file, episode and row."""
    places, tasks = read_places(info), read_tasks(info)
    broken = ""  # why the data file that was opened last cannot be read
    videos = _look_at_videos(info, places) if info.video else {}
    builder, rows = IndexBuilder(name), []
    times: List[np.ndarray] = []
    columns = [*info.actions, "episode_index", "frame_index", "timestamp", "task_index", *(name for name, _ in info.states),
               *([info.text] if info.text else [])]
    unread = [] if info.video else [info.camera]
    table, opened, looks = None, None, None
    runs: Dict[Any, Tuple[int, int, bool]] = {}
    for place in tqdm(places, desc=f"index {name}", unit="episode", disable=len(places) < _BAR_FROM_FILES):
        path = info.data_file(*place.data)
        where = f"{path}: episode {place.episode}"
        rows.append(0)
        try:
            if not place.length:
                raise ValueError(f"{where} has no frame, by its length in meta")
            if path != opened:
                table, episodes, opened, looks = None, None, path, None
                read = parquet_table(path, columns, unread)
                episodes = read["episode_index"].to_numpy()
                runs = runs_of(episodes)
                looks = PictureLooks(info.folder, path, info.camera, episodes) if not info.video else None
                table = read
            elif table is None:
                raise ValueError(broken)
            at, count, whole = runs.get(place.episode, (0, 0, False))
            if count != place.length or not whole:
                raise ValueError(f"{where} has {count} rows and meta says {place.length}, one after the other; {AGAIN}")
            part = table.slice(at, count)
            actions = np.concatenate([number_rows(part[key], shape, where) for key, shape in info.actions.items()], axis=1)
            states = [number_rows(part[name], shape, where, "state") for name, shape in info.states]
            if looks is not None:
                looks.check(at, count, where)
            if not np.array_equal(part["frame_index"].to_numpy(), np.arange(count)):
                raise ValueError(f"{where}: frame_index does not count from 0 to {count - 1}; {AGAIN}")
            numbers = part["task_index"].to_pylist()
            unknown = sorted({n for n in numbers if n not in tasks}, key=str)
            if unknown:
                raise ValueError(f"{where}: task_index {unknown[0]} is not among the {len(tasks)} tasks of meta; {AGAIN}")
            seconds = np.asarray(part["timestamp"].to_numpy(), dtype=np.float64)
            if not np.isfinite(seconds).all():
                raise ValueError(f"{where}: a timestamp is no number; {AGAIN}")
            slow = np.flatnonzero(np.diff(seconds) < 0.5 / info.fps)
            if info.video and len(slow):  # two rows would show one frame
                raise ValueError(f"{where}: frame {slow[0] + 1} is at {seconds[slow[0] + 1]:.3f} s by its timestamp and the one before at "
                                 f"{seconds[slow[0]]:.3f} s, with {info.fps:g} frames a second; {AGAIN}")
            if info.video:
                _check_video(info, place, videos[info.video_file(*place.video)], seconds)
            texts = [text or "" for text in part[info.text].to_pylist()] if info.text else [tasks[n] or "" for n in numbers]
            if not all(isinstance(text, str) for text in texts):
                raise ValueError(f"{where}: the column {info.text} holds no texts; correct `text:` in the data card")
            builder.add(actions, texts, where, np.concatenate(states, axis=1) if states else None)
        except (ValueError, OSError, TypeError, KeyError, NotImplementedError) as error:  # what pyarrow says of a damaged file too
            told: Any = error if str(info.folder) in str(error) else f"{where} cannot be read ({error!r}); {AGAIN}"
            broken = str(told) if table is None and place.length else broken
            builder.leave_out(told)
            continue
        rows[-1] = at
        times.append(seconds)
    return builder.index({
        "data_E2": np.array([place.data for place in places], dtype=np.int64), "row_E": np.array(rows, dtype=np.int64),
        "video_E2": np.array([place.video for place in places], dtype=np.int64),
        "number_E": np.array([place.episode for place in places], dtype=np.int64),
        "start_seconds_E": np.array([place.start for place in places], dtype=np.float64),
        "seconds_N": np.concatenate(times or [np.empty(0)])})


class LeRobotDataset(DemoDataset):
    """One split of a LeRobot data set; its name is the folder's.

    conventions.camera: the image or video feature, whole or its last part; without it the only one, or the one with a usual name.
    Pictures are taken as they are stored (upright, as in the official RLDS sets), unless conventions.rotate is set.
    Raises FileNotFoundError, ModuleNotFoundError or ValueError, each naming the file and the remedy.
    """

    kind = "lerobot"
    files = ("*.parquet",)
    needs = ("pyarrow", "av")

    def __init__(self, folder, split: str = "train", fraction: float = 1.0, cache_dir=None, conventions: Conventions = USUAL,
                 with_state: bool = False, skip_bad: bool = False):
        folder = Path(folder)
        if not (folder / INFO).is_file():
            raise FileNotFoundError(f"{folder} holds no {INFO}")
        self.check_extra(folder)
        card, state = conventions.card, conventions.state_names(with_state)
        self._info, name = read_info(folder, conventions.camera, state, card), folder.absolute().name
        self.action_names, self.fps, self.robot = self._info.names, self._info.fps, self._info.robot
        files = [path for top in ("meta", "data", "videos") for path in all_files(folder / top)]
        self.camera = self._info.camera
        identity = [str(folder.resolve()), self._info.camera, *([] if state is None else [self._info.states]),
                    *(card.reads() if card else [])]
        index = cached_index("lerobot", name, identity, files, cache_dir, lambda: build_index(self._info, name))
        self._videos, self._pictures = VideoReader(self._info.fps), ParquetPictures(self._info.camera)
        refuse(folder, index.bad, skip_bad)
        super().__init__(folder, name, index, self._split(split, index, skip_bad), fraction, conventions)

    def _split(self, split: str, index: EpisodeIndex, skip_bad: bool) -> Tuple[int, int]:
        number_E = index.places["number_E"]
        count = len(number_E)
        splits = self._info.splits or {"train": f"0:{count}"}
        if split not in splits:
            raise ValueError(f"{self._info.folder} has no split {split!r}, only {', '.join(splits)}; write it to `splits` of "
                             f'{self._info.folder}/{INFO}, such as "{split}": "0:{count}"')
        try:
            start, end = (int(n) for n in splits[split].split(":"))
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{self._info.folder}/{INFO}: split {split!r} is {splits[split]!r} and not 'first:end'; "
                             f"correct it there, such as '0:{count}'") from error
        told = f"{self._info.folder}/{INFO}: split {split!r} is {start}:{end} of {count} episodes"
        # By the numbers of the episodes, lest one that was taken out moves others into another split; a single split may be all there is.
        whole = len(splits) == 1 and (start, end) == (0, count)
        first, last = (start, end) if whole else (int(at) for at in np.searchsorted(number_E, [start, end]))
        if not 0 <= start < end or first == last:
            raise ValueError(f"{told}; {AGAIN}")
        lacking = end - start - (last - first)
        if lacking:  # some were taken out by hand
            if not skip_bad:
                write = f'write "0:{count}" there, or ' if len(splits) == 1 and start == 0 else ""
                raise ValueError(f"{told}, and {lacking} of them not there; {write}{AGAIN}. To train with those that are there: {OPTION}")
            index.bad[told] = lacking
        return first, last - first

    def number(self, episode: int) -> int:
        return int(self.index.places["number_E"][self._numbers[episode]])

    def last_of_files(self) -> List[int]:
        if not self._info.video:
            return []
        files = [tuple(place) for place in self.index.places["video_E2"][self._numbers]]
        return sorted({place: episode for episode, place in enumerate(files)}.values())

    def _picture(self, number: int, row: int, frame: int, where: str) -> np.ndarray:
        places = self.index.places
        if self._info.video:
            path = self._info.video_file(*places["video_E2"][number])
            return self._videos.frame(path, float(places["start_seconds_E"][number] + places["seconds_N"][row]), where)
        cell = self._pictures.read(self._info.data_file(*places["data_E2"][number]), int(places["row_E"][number]) + frame)
        return decode_image(bytes_of(cell, self._info.folder, self._info.camera, where), where)

    def close(self) -> None:
        if hasattr(self, "_videos"):
            self._videos.close()
