"""RLDS data sets (TFDS folders of TFRecord shards) without TensorFlow.

    data_root_dir/<name>/<version>/dataset_info.json, features.json, <name>-train.tfrecord-00000-of-00016, ...

Opening reads every shard once, checks its checksums and keeps an index: lengths, languages, actions and the byte range of each
picture. The index is cached; after that a frame costs one `pread`. Memory is the index, about 50 bytes a frame.
As officially: statistics over all splits and all episodes, training on the first part of `train`, episodes without language left
out.
Axes: E episodes, N frames, A action dimensions.
"""

import hashlib
import json
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Optional, Tuple

import numpy as np
from tqdm import tqdm

from vlakeep.data.images import decode_image
from vlakeep.data.sample import Episode, Sample
from vlakeep.data.statistics import action_statistics, normalise, transform_for
from vlakeep.data.tfrecord import parse_example, read_records
from vlakeep.storage import atomic_write

_INDEX_FORMAT = 1
_BAR_FROM_BYTES = 64 << 20  # a smaller data set is indexed within a second
_ACTION, _LANGUAGE, _IMAGES = "steps/action", "steps/language_instruction", "steps/observation/"


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


def read_info(version: Path) -> Tuple[str, Dict[str, Tuple[List[Path], List[int]]]]:
    """(data set name, split -> (shard paths, episodes per shard)). ValueError or FileNotFoundError for an incomplete folder."""
    path = version / "dataset_info.json"
    try:
        info = json.loads(path.read_text())
        name, splits = info["name"], {}
        for split in info["splits"]:
            lengths = [int(n) for n in split["shardLengths"]]
            template = split.get("filepathTemplate", "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}")
            shards = [version / template.format(
                DATASET=name, SPLIT=split["name"], FILEFORMAT=info.get("fileFormat", "tfrecord"),
                SHARD_X_OF_Y=f"{i:05d}-of-{len(lengths):05d}", SHARD_INDEX=f"{i:05d}", NUM_SHARDS=f"{len(lengths):05d}",
            ) for i in range(len(lengths))]
            splits[split["name"]] = (shards, lengths)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error!r}); download or make the data set again") from error
    missing = [shard.name for shards, _ in splits.values() for shard in shards if not shard.is_file()]
    if missing:
        some = ", ".join(missing[:3]) + (", ..." if missing[3:] else "")
        raise FileNotFoundError(f"{version} lacks {len(missing)} of its shards ({some}): the download or copy is incomplete; "
                                "copy it again, or make a tabletop set again with `vlakeep tabletop-data`")
    return name, splits


@dataclass
class EpisodeIndex:
    """Everything about the episodes of all splits except the pictures, in file order."""

    shard_E: np.ndarray  # int32: number of the episode's shard in `shards`
    start_E: np.ndarray  # int64 [E + 1]: first frame of each episode
    offset_N: np.ndarray  # int64: byte offset of the frame's encoded picture in its shard
    length_N: np.ndarray  # int32: its bytes
    text_N: np.ndarray  # int32: number of the frame's instruction in `texts`
    actions_NA: np.ndarray  # float32, as stored
    texts: List[str]

    def save(self, path: Path) -> None:
        with atomic_write(path) as file:  # a text list goes in as JSON: arrays of objects would need pickle
            np.savez(file, **{**vars(self), "texts": np.array(json.dumps(self.texts))})

    @classmethod
    def load(cls, path: Path) -> "EpisodeIndex":
        with np.load(path, allow_pickle=False) as data:
            arrays = {key: data[key] for key in data.files}
        return cls(**{**arrays, "texts": json.loads(str(arrays["texts"]))})


def _read_episode(payload: bytes, image_key: str) -> Tuple[np.ndarray, List[str], List[Tuple[int, int]]]:
    features = parse_example(payload)
    for name in (_ACTION, _LANGUAGE, _IMAGES + image_key):
        if name not in features:
            raise ValueError(f"no feature {name!r}; the episode has {', '.join(sorted(features))}")
    pictures, actions = features[_IMAGES + image_key].ranges, features[_ACTION].floats()
    texts = [text.decode("utf-8", errors="replace") for text in features[_LANGUAGE].bytes()]
    steps = len(pictures)
    if steps == 0 or len(texts) != steps or len(actions) % steps or not len(actions):
        raise ValueError(f"{steps} pictures, {len(texts)} instructions and {len(actions)} action values do not make equal steps")
    return actions.reshape(steps, -1), texts, pictures


def build_index(shards: List[Path], episodes: List[int], image_key: str, name: str) -> EpisodeIndex:
    """Read and check every shard. Errors name file, record and byte offset (RecordError, ValueError)."""
    shard_E, lengths, offsets, sizes, text_numbers, actions, texts = [], [], [], [], [], [], {}
    total = sum(shard.stat().st_size for shard in shards)
    with tqdm(total=total, unit="B", unit_scale=True, desc=f"index {name}", disable=total < _BAR_FROM_BYTES) as bar:
        for number, (shard, expected) in enumerate(zip(shards, episodes)):
            record = -1
            for record, (start, payload) in enumerate(read_records(shard)):
                try:
                    episode_actions, episode_texts, pictures = _read_episode(payload, image_key)
                    if actions and episode_actions.shape[1] != actions[0].shape[1]:
                        raise ValueError(f"{episode_actions.shape[1]} action dimensions, the first episode has "
                                         f"{actions[0].shape[1]}")
                except ValueError as error:
                    raise ValueError(f"{shard}: record {record} at byte {start}: {error}") from error
                bad = np.flatnonzero(~np.isfinite(episode_actions).all(axis=1))
                if len(bad):
                    raise ValueError(f"{shard}: record {record} (episode {len(lengths)} of {name}), frame {bad[0]}: action "
                                     f"{episode_actions[bad[0]].tolist()} is not finite ({len(bad)} of {len(pictures)} frames); "
                                     "mend or leave out this episode and make the data set again")
                shard_E.append(number)
                lengths.append(len(pictures))
                offsets.append(np.array([start + a for a, _ in pictures], dtype=np.int64))
                sizes.append(np.array([b - a for a, b in pictures], dtype=np.int32))
                text_numbers.append(np.array([texts.setdefault(text, len(texts)) for text in episode_texts], dtype=np.int32))
                actions.append(episode_actions)
                bar.update(len(payload))
            if record + 1 != expected:
                raise ValueError(f"{shard} holds {record + 1} episodes and dataset_info.json says {expected}; copy or make the "
                                 "data set again")
    if not lengths:
        raise ValueError(f"data set {name} has no episodes; `vlakeep tabletop-data` makes the tabletop sets")
    return EpisodeIndex(
        np.array(shard_E, dtype=np.int32), np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), np.concatenate(offsets),
        np.concatenate(sizes), np.concatenate(text_numbers), np.concatenate(actions).astype(np.float32), list(texts))


def _cached_index(version: Path, shards, episodes, image_key: str, name: str, cache_dir) -> EpisodeIndex:
    if cache_dir is None:
        return build_index(shards, episodes, image_key, name)
    files = [(s.name, s.stat().st_size, s.stat().st_mtime_ns) for s in shards]
    identity = json.dumps([_INDEX_FORMAT, str(version.resolve()), image_key, episodes, files])
    key = hashlib.sha256(identity.encode()).hexdigest()[:16]
    path = Path(cache_dir) / f"rlds_index_{name}_{key}.npz"
    if path.is_file():
        try:
            return EpisodeIndex.load(path)
        except Exception:  # a damaged cache is a cache miss, whatever way NumPy finds to say so
            pass
    index = build_index(shards, episodes, image_key, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    index.save(path)
    return index


class RldsDataset:
    """The labelled episodes of one split, addressed as (episode, frame).

    folder: <name> or <name>/<version>. fraction: share of the split's episodes, from its start, rounded as TFDS rounds
    `train[:95%]`. cache_dir: where the index is kept; None keeps none.
    Raises FileNotFoundError, ValueError or RecordError, each naming the file and the remedy.
    """

    def __init__(self, folder, split: str = "train", fraction: float = 1.0, cache_dir=None, image_key: str = "image"):
        version = find_version(folder)
        self.folder = version
        self.name, splits = read_info(version)
        if split not in splits:
            raise ValueError(f"{version} has no split {split!r}, only {', '.join(splits)}")
        self._shards = [shard for shards, _ in splits.values() for shard in shards]
        episodes = [count for _, lengths in splits.values() for count in lengths]
        self.index = _cached_index(version, self._shards, episodes, image_key, self.name, cache_dir)
        self._files: Dict[int, int] = {}
        self._lock = threading.Lock()

        before = 0
        for other, (_, lengths) in splits.items():
            if other == split:
                break
            before += sum(lengths)
        count = sum(splits[split][1])
        self.split_episodes = int(round(round(fraction * 100, 9) * count / 100))
        first = np.array([self.index.start_E[before + e] for e in range(self.split_episodes)], dtype=np.int64)
        last = np.array([self.index.start_E[before + e + 1] for e in range(self.split_episodes)], dtype=np.int64)
        empty = self.index.texts.index("") if "" in self.index.texts else -1
        labelled = np.array([(self.index.text_N[a:b] != empty).any() for a, b in zip(first, last)], dtype=bool)
        if not labelled.any():
            raise ValueError(f"{version}: none of the {count} episodes of split {split!r} is left with fraction {fraction} and a "
                             "language instruction; raise --data.train_fraction, or make a tabletop set again with "
                             "`vlakeep tabletop-data`")
        self._first = first[labelled]
        self._numbers = before + np.flatnonzero(labelled)
        self.lengths = (last - first)[labelled]  # int64: frames of each usable episode
        self.unlabelled = int((~labelled).sum())

        standard_NA = transform_for(self.name)(self.index.actions_NA)
        self.statistics = action_statistics(standard_NA, len(self.index.shard_E))
        self.actions_NA, _ = normalise(standard_NA, self.statistics)
        used = np.concatenate([np.arange(a, a + n) for a, n in zip(self._first, self.lengths)])
        self.clipped = normalise(standard_NA[used], self.statistics)[1]  # action values of usable frames outside the statistics

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def num_frames(self) -> int:
        return int(self.lengths.sum())

    @property
    def languages(self) -> List[str]:
        """Instruction of each usable episode (of its first frame; frames keep their own)."""
        return [self.index.texts[self.index.text_N[start]] for start in self._first]

    def _row(self, episode: int, frame: int) -> int:
        if not 0 <= episode < len(self.lengths) or not 0 <= frame < self.lengths[episode]:
            raise IndexError(f"{self.name}: no frame {frame} of episode {episode} (it has {len(self.lengths)} episodes)")
        return int(self._first[episode] + frame)

    def actions(self, episode: int) -> np.ndarray:
        """float32 [T, A], normalised."""
        start = self._row(episode, 0)
        return self.actions_NA[start:start + self.lengths[episode]]

    def instruction(self, episode: int, frame: int) -> str:
        return self.index.texts[self.index.text_N[self._row(episode, frame)]]

    def image_bytes(self, episode: int, frame: int) -> bytes:
        """The encoded picture of one frame, by one positioned read; safe from several threads."""
        row = self._row(episode, frame)
        shard = int(self.index.shard_E[self._numbers[episode]])
        with self._lock:
            if shard not in self._files:
                self._files[shard] = os.open(self._shards[shard], os.O_RDONLY)
        wanted, offset = int(self.index.length_N[row]), int(self.index.offset_N[row])
        data = os.pread(self._files[shard], wanted, offset)
        if len(data) != wanted:
            raise ValueError(f"{self._shards[shard]}: {len(data)} of {wanted} bytes at byte {offset} (episode {episode}, frame "
                             f"{frame}); the file has changed since it was indexed")
        return data

    def image(self, episode: int, frame: int) -> np.ndarray:
        """uint8 [H, W, 3], decoded as officially, not resized."""
        return decode_image(self.image_bytes(episode, frame), f"{self.name} episode {episode} frame {frame}")

    def frame(self, episode: int, frame: int) -> Sample:
        """The frame's picture at stored size, its instruction and its normalised action."""
        row = self._row(episode, frame)
        text = self.index.texts[self.index.text_N[row]]
        return Sample(self.image(episode, frame), text, self.actions_NA[row], dataset=self.name)

    def episode(self, episode: int) -> Episode:
        """A whole episode with its actions as stored."""
        start, length = self._row(episode, 0), int(self.lengths[episode])
        return Episode(np.stack([self.image(episode, t) for t in range(length)]), self.index.actions_NA[start:start + length],
                       self.instruction(episode, 0))

    def fingerprint(self) -> str:
        """sha256 of what the order and content of the samples depend on, pictures excepted."""
        digest = hashlib.sha256(json.dumps([self.name, self.lengths.tolist(), self.languages]).encode())
        digest.update(np.ascontiguousarray(self.index.actions_NA).tobytes())
        return digest.hexdigest()

    def close(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def __del__(self):
        if hasattr(self, "_files"):
            self.close()


def open_datasets(root, names: List[str], fraction: float = 1.0, cache_dir: Optional[str] = None) -> List[RldsDataset]:
    """The data sets `names` below `root`, in that order."""
    if not names:
        raise ValueError("no data set is named; give --data.datasets, e.g. '[tabletop_corner]' after `vlakeep tabletop-data`")
    return [RldsDataset(Path(root) / name, "train", fraction, cache_dir) for name in names]
