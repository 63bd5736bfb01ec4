"""RLDS data sets (TFDS folders of TFRecord shards) without TensorFlow.

    data_root_dir/<name>/<version>/dataset_info.json, features.json, <name>-train.tfrecord-00000-of-00016, ...

Opening reads every shard once, checks its checksums and keeps an index: lengths, languages, actions and the byte range of each
picture. The index is cached; after that a frame costs one `pread`. Memory is the index, about 50 bytes a frame.
As officially, statistics are taken over all splits.
Axes: E episodes, N frames.
"""

import hashlib
import json
import os
import re
import threading
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
from tqdm import tqdm

from vlakeep.data.bad import OPTION, SHOWN, refuse
from vlakeep.data.conventions import FILE, DataCard
from vlakeep.data.dataset import USUAL, Conventions, DemoDataset
from vlakeep.data.images import decode_image, is_picture, may_be_of_one_colour, of_one_colour
from vlakeep.data.index import CONTENT, EpisodeIndex, IndexBuilder, cached_index
from vlakeep.data.suggest import missing_keys
from vlakeep.data.tfrecord import RecordError, masked_crc32c, parse_example, scan_records

_BAR_FROM_BYTES = 64 << 20  # a smaller data set is indexed within a second
MOST_EPISODES = 10_000_000  # of a shard; a damaged number must not become a list of that length
_ACTION, _LANGUAGE, _IMAGES = "steps/action", "steps/language_instruction", "steps/observation/"
_OTHER = (f"write it as one of these, choose another camera with --data.camera or `camera:` in the set's {FILE}, or leave this episode out "
          "when the set is made")
_SEEN = f"choose another camera with --data.camera or `camera:` in the set's {FILE}, or leave this episode out when the set is made"
_ORIGIN = "episode_metadata/file_path"
_STATES = ("state", "proprio")  # what converters call the robot's state


def find_version(folder) -> Path:
    """The TFDS version folder for `<name>/<version>` or `<name>` (the highest). FileNotFoundError says how to get the data."""
    folder = Path(folder)
    if (folder / "dataset_info.json").is_file():
        return folder
    versions = [p.parent for p in folder.glob("*/dataset_info.json") if all(n.isdigit() for n in p.parent.name.split("."))]
    if not versions:
        raise FileNotFoundError(
            f"no RLDS data set at {folder}: a folder with dataset_info.json, or with a version folder such as 1.0.0, is needed. "
            "`vlakeep tabletop-data` makes the tabletop sets; others go below --data_root_dir, named as in --data.datasets")
    return max(versions, key=lambda path: [int(n) for n in path.name.split(".")])


def read_info(version: Path, skip_bad: bool = False) -> Tuple[str, Dict[str, Tuple[List[Path], List[int]]]]:
    """(data set name, split -> (shard paths, episodes per shard)). ValueError or FileNotFoundError for an incomplete folder."""
    path = version / "dataset_info.json"
    try:
        info = json.loads(path.read_text(encoding="utf-8-sig"))
        name, splits = info["name"], {}
        if not isinstance(name, str):
            raise TypeError(f"the name is {name!r}")
        for split in info["splits"]:
            lengths = [int(n) for n in split["shardLengths"]]
            if not 0 <= min(lengths, default=0) <= max(lengths, default=0) <= MOST_EPISODES:
                raise ValueError(f"shardLengths are {lengths}")
            template = split.get("filepathTemplate", "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}")
            shards = [version / template.format(
                DATASET=name, SPLIT=split["name"], FILEFORMAT=info.get("fileFormat", "tfrecord"),
                SHARD_X_OF_Y=f"{i:05d}-of-{len(lengths):05d}", SHARD_INDEX=f"{i:05d}", NUM_SHARDS=f"{len(lengths):05d}",
            ) for i in range(len(lengths))]
            splits[split["name"]] = (shards, lengths)
        missing = [shard.name for shards, _ in splits.values() for shard in shards if not shard.is_file()]
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OSError, OverflowError) as error:
        what = f"it has no {error}" if isinstance(error, KeyError) else repr(error)
        raise ValueError(f"{path} cannot be read ({what}); mend it there, or download or make the data set again") from error
    if info.get("fileFormat", "tfrecord") != "tfrecord":
        raise ValueError(f"{path} says fileFormat {info['fileFormat']!r}, which is not read; only tfrecord is. Write the set again with "
                         f"`tfds build --file_format=tfrecord`, or tfds.core.DatasetBuilder with file_format='tfrecord', into {version}")
    if missing and not skip_bad:
        some = ", ".join(missing[:SHOWN]) + (", ..." if missing[SHOWN:] else "")
        raise FileNotFoundError(f"{version} lacks {len(missing)} of its shards ({some}): the download or copy is incomplete; "
                                "copy it again, or make a tabletop set again with `vlakeep tabletop-data`. To train without: "
                                f"{OPTION}")
    return name, splits


def _read_state(features, names: Sequence[str], steps: int) -> np.ndarray:
    """float32 [steps, Q] of these features below steps/observation, or of the one with a usual name."""
    names = names or [name for name in _STATES if _IMAGES + name in features][:1]
    missing = [name for name in names if _IMAGES + name not in features]
    if missing or not names:
        raise ValueError(f"no state {', '.join(missing or _STATES)} below {_IMAGES}; the episode has {', '.join(sorted(features))}: choose "
                         "with --data.state")
    parts = [features[_IMAGES + name].floats() for name in names]
    wrong = [name for name, part in zip(names, parts) if not len(part) or len(part) % steps]
    if wrong:
        raise ValueError(f"the state {wrong[0]} does not make {steps} equal steps")
    return np.concatenate([part.reshape(steps, -1) for part in parts], axis=1)


def _show_nothing(encoded: List[bytes]) -> bool:
    """Whether each of these pictures is of one colour; they are decoded only if all are suspiciously small."""
    try:
        return all(map(may_be_of_one_colour, encoded)) and of_one_colour(map(decode_image, encoded))
    except ValueError:  # a damaged one is found when it is decoded for a sample
        return False


def _one_a_frame(texts: List[str], steps: int, keys: "Keys") -> List[str]:
    """The text that is meant of several of each frame. ValueError where that is not said."""
    each, rest = divmod(len(texts), steps or 1)
    if each < 2 or rest:
        return texts
    if keys.text_number is None or keys.text_number >= each:
        short = keys.text.replace("steps/", "", 1)
        raise ValueError(f"{keys.text!r} holds {each} texts a frame, {texts[:each]}: say which one in the set's {FILE}, such as "
                         f"`text: {short}[0]`")
    return texts[keys.text_number::each]


class Keys(NamedTuple):
    """What the features of an episode are called."""

    image: str
    actions: Tuple[str, ...] = (_ACTION,)
    text: str = _LANGUAGE
    text_number: Optional[int] = None  # which one, where a frame has several
    text_needed: bool = True  # False: the data card has words for episodes without

    @classmethod
    def of(cls, camera: Optional[str], card: Optional[DataCard]) -> "Keys":
        """By the camera and the data card; keys without `steps/` or `episode_metadata/` lie below steps."""
        def whole(key: str) -> str:
            return key if key.startswith(("steps/", "episode_metadata/")) else "steps/" + key

        image = camera or "image"
        image = whole(image) if image.startswith(("steps/", "observation/")) else _IMAGES + image
        if card is None:
            return cls(image)
        named = re.fullmatch(r"(.+?)(?:\[(\d+)\])?", card.text or _LANGUAGE)
        assert named  # of any word
        number = None if named[2] is None else int(named[2])
        return cls(image, tuple(map(whole, card.actions)) or (_ACTION,), whole(named[1]), number, not card.instruction)


def _kind(feature) -> str:
    if feature.kind != "bytes" or not feature.ranges:
        return "number" if feature.kind in ("float", "int64") else "text"
    a, b = feature.ranges[0]
    return "picture" if feature.payload[a:a + 2] == b"\xff\xd8" or feature.payload[a:a + 4] == b"\x89PNG" else "text"


def _read_episode(payload: bytes, keys: Keys, folder="", state: Optional[Sequence[str]] = None):
    """(actions [T, A], instructions, byte ranges of the pictures, state [T, Q] or None) of an episode."""
    features = parse_example(payload)
    if keys.text not in features and keys.text.removeprefix("steps/") in features:  # beside the steps, as TFDS's own RLDS base writes it
        keys = keys._replace(text=keys.text.removeprefix("steps/"))
    has_text = keys.text_needed or (keys.text in features and features[keys.text].kind not in ("float", "int64"))
    missing = [name for name in (*keys.actions, *([keys.text] if has_text else []), keys.image) if name not in features]
    if missing:
        raise ValueError(missing_keys("the episode", missing, {name: _kind(one) for name, one in features.items()}, folder))
    pictures = features[keys.image].ranges
    steps, parts = len(pictures), [features[key] for key in keys.actions]
    strange = next((t for t, (a, b) in enumerate(pictures) if not is_picture(payload[a:min(b, a + 4)])), -1)
    if strange >= 0:
        a, b = pictures[strange]
        raise ValueError(f"{keys.image!r} of step {strange}: {b - a} bytes that are neither JPEG nor PNG (they start with "
                         f"{payload[a:min(b, a + 4)]!r}); {_OTHER}")
    for key, one in [(key, one) for key, one in zip(keys.actions, parts) if one.kind == "bytes"]:
        raise ValueError(f"{key!r} holds {_kind(one)}s and no numbers; name the keys of numbers with `actions:` in the set's {FILE}, or "
                         "store the action as a tensor of float32 that is not encoded")
    if has_text and features[keys.text].kind in ("float", "int64"):
        raise ValueError(f"{keys.text!r} holds numbers and no text; name the key of the words with `text:` in the set's {FILE}, or give "
                         "`instruction: WORDS`")
    values = [one.ints().astype(np.float32) if one.kind == "int64" else one.floats() for one in parts]
    texts = [text.decode("utf-8", errors="surrogateescape") for text in features[keys.text].bytes()] if has_text else [""] * steps
    texts = texts * steps if not keys.text.startswith("steps/") and len(texts) == 1 else texts
    texts = _one_a_frame(texts, steps, keys)
    sizes = [len(one) for one in values]
    if steps == 0 or len(texts) != steps or any(size % steps or not size for size in sizes):
        told = sizes[0] if len(sizes) == 1 else sizes
        several = steps // len(texts) if texts and steps % len(texts) == 0 else 1
        why = f" ({several} pictures a step, where one is read: write each as a feature of its own)" if several > 1 else ""
        raise ValueError(f"{steps} pictures, {len(texts)} instructions and {told} action values do not make equal steps{why}; mend or "
                         "leave out this episode when the set is made, or name other keys in its data card (docs/bring-your-own-data.md)")
    if _show_nothing([payload[a:b] for a, b in (pictures[0], pictures[steps // 2], pictures[-1])]):
        raise ValueError(f"{keys.image!r}: the first, the middle and the last picture are of one colour; {_SEEN}")
    states = None if state is None else _read_state(features, state, steps)
    return np.concatenate([one.reshape(steps, -1) for one in values], axis=1), texts, pictures, states


def build_index(shards: List[Path], episodes: List[int], keys: Keys, name: str, state: Optional[Sequence[str]] = None) -> EpisodeIndex:
    """Read and check every shard. state: None reads none, () the usual one. RecordError and ValueError name file, record and byte."""
    builder, shard_E = IndexBuilder(name), []
    content = hashlib.sha256()
    offsets: List[np.ndarray] = []
    sizes: List[np.ndarray] = []
    total = sum(shard.stat().st_size for shard in shards if shard.is_file())
    with tqdm(total=total, unit="B", unit_scale=True, desc=f"index {name}", disable=total < _BAR_FROM_BYTES) as bar:
        for number, (shard, expected) in enumerate(zip(shards, episodes)):
            record = -1
            shard_E += [number] * expected
            if not shard.is_file():
                builder.leave_out(f"{shard} is missing", expected)
                continue
            for record, (start, payload, problem) in enumerate(scan_records(shard)):
                try:
                    if problem:
                        raise RecordError(problem)
                    try:
                        actions, texts, pictures, states = _read_episode(payload, keys, shard.parent, state)
                    except ValueError as error:
                        raise ValueError(f"{shard}: record {record} at byte {start}: {error}") from error
                    builder.add(actions, texts, f"{shard}: record {record}", states)
                except ValueError as error:
                    builder.leave_out(str(error))
                    continue
                content.update(masked_crc32c(payload).to_bytes(4, "little"))
                offsets.append(np.array([start + a for a, _ in pictures], dtype=np.int64))
                sizes.append(np.array([b - a for a, b in pictures], dtype=np.int32))
                bar.update(len(payload))
            told = f"{shard} holds {record + 1} episodes and dataset_info.json says {expected}; copy or make the data set again"
            if record + 1 > expected:  # nobody knows which of them are the ones that count
                raise ValueError(told)
            if record + 1 < expected:
                builder.leave_out(told, expected - record - 1)
    # shard of each episode, byte offset of each frame's encoded picture in it, and its bytes
    return builder.index({CONTENT: np.array(content.hexdigest()),
                          "shard_E": np.array(shard_E, dtype=np.int32), "offset_N": np.concatenate(offsets or [np.empty(0)]),
                          "length_N": np.concatenate(sizes or [np.empty(0)])})


def _origin(payload: bytes) -> str:
    try:
        known = parse_example(payload).get(_ORIGIN)
    except ValueError:  # an episode that is left out
        return ""
    return b"".join(known.bytes()[:1]).decode("utf-8", errors="replace") if known is not None and known.kind == "bytes" else ""


class RldsDataset(DemoDataset):
    """The labelled episodes of one split of a TFDS folder.

    folder: <name> or <name>/<version>. fraction: share of the split's episodes, from its start. cache_dir: where the index is
    kept; None keeps none. conventions.camera: the image feature below steps/observation, `image` by default.
    Raises FileNotFoundError, ValueError or RecordError, each naming the file and the remedy.
    """

    kind = "rlds"
    files = ("*.tfrecord*",)

    def __init__(self, folder, split: str = "train", fraction: float = 1.0, cache_dir=None, conventions: Conventions = USUAL,
                 with_state: bool = False, skip_bad: bool = False):
        version = find_version(folder)
        name, splits = read_info(version, skip_bad)
        if split not in splits:
            raise ValueError(f"{version} has no split {split!r}, only {', '.join(splits)}; make the set again with one, or call one so "
                             "in its dataset_info.json and in the names of its files")
        self._files: Dict[int, int] = {}
        self._lock = threading.Lock()
        self._shards = [shard for shards, _ in splits.values() for shard in shards]
        self._episodes = [count for _, lengths in splits.values() for count in lengths]
        episodes = self._episodes
        camera, card, state = conventions.camera or "image", conventions.card, conventions.state_names(with_state)
        self.camera = camera
        identity = [str(version.resolve()), camera, episodes, *([] if state is None else [state]), *(card.reads() if card else [])]
        index = cached_index("rlds", name, identity, [s for s in self._shards if s.is_file()], cache_dir,
                             lambda: build_index(self._shards, episodes, Keys.of(camera, card), name, state))
        refuse(version, index.bad, skip_bad)
        before = sum(sum(lengths) for _, lengths in list(splits.values())[:list(splits).index(split)])
        super().__init__(version, name, index, (before, sum(splits[split][1])), fraction, conventions)

    def origins(self) -> List[str]:
        """episode_metadata/file_path of each usable episode; reads the shards."""
        found: List[str] = []
        for shard, count in zip(self._shards, self._episodes):
            own = [_origin(payload) for _, payload, _ in scan_records(shard)] if shard.is_file() else []
            found += own + [""] * (count - len(own))
        return [found[number] for number in self._numbers]

    def _bytes(self, number: int, row: int, where: str) -> bytes:
        places = self.index.places
        shard, wanted, offset = int(places["shard_E"][number]), int(places["length_N"][row]), int(places["offset_N"][row])
        with self._lock:
            if shard not in self._files:
                self._files[shard] = os.open(self._shards[shard], os.O_RDONLY)
        data = os.pread(self._files[shard], wanted, offset)
        if len(data) != wanted:
            raise ValueError(f"{self._shards[shard]}: {len(data)} of {wanted} bytes at byte {offset} ({where}); the file has "
                             "changed since it was indexed; start again, and it is indexed anew")
        return data

    def _picture(self, number: int, row: int, frame: int, where: str) -> np.ndarray:
        return decode_image(self._bytes(number, row, where), where)  # as officially

    def close(self) -> None:
        for descriptor in getattr(self, "_files", {}).values():
            os.close(descriptor)
        self._files = {}
