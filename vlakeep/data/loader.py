"""The training stream: endless micro-batches whose order depends on the seed alone, exactly resumable.

Micro-batch m of the global stream holds the samples from m * batch_size on of the order in data/order.py and goes to process
m % world. So one process with twice the accumulation sees what two processes see, and a run may resume with another number of
processes.
Threads or processes (data.workers, data.processes) decode ahead; they never change the order, nor the content. Threads share Python's lock
with the training step, which has to take it for every kernel that it starts.
"""

import hashlib
import itertools
import json
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Callable, Dict, Iterator, List, Optional, Tuple, Union

import numpy as np
import torch
from torch.utils.data import DataLoader

from vlakeep.data.augment import augment, draw
from vlakeep.data.bad import FILE
from vlakeep.data.dataset import DemoDataset
from vlakeep.data.formats import open_configured
from vlakeep.data.images import resize_uint8
from vlakeep.data.order import SampleOrder
from vlakeep.data.sample import ONE_PICTURE, Batch, Sample

if TYPE_CHECKING:  # make_stream imports it where it is used
    from vlakeep.data.official import OfficialStream

_STATE_FORMAT = 1
_AHEAD = 2  # batches in flight per thread


class _Made:
    """Batches by (keys, start) as a data set of torch: made in the process that asks."""

    def __init__(self, make: Callable[[np.ndarray, int], Batch]):
        self._make = make

    def __getitem__(self, job: Tuple[np.ndarray, int]) -> Batch:
        return self._make(*job)


class _Endless:
    """An iterator as a sampler of torch, which is asked for its iterator once."""

    def __init__(self, jobs: Iterator):
        self._jobs = jobs

    def __iter__(self) -> Iterator:
        return self._jobs


class BatchStream:
    """Iterator over Batch. `statistics` maps a data set's name to its entry of dataset_statistics.json.

    `clipped` counts, per data set, the action values of its usable frames that lie outside [q01, q99] and are clipped.
    """

    def __init__(self, datasets: List[DemoDataset], processor, batch_size: int, seed: int, rank: int = 0, world: int = 1,
                 shuffle_buffer: int = 100_000, workers: int = 0, image_aug: bool = False, processes: bool = False):
        if batch_size < 1 or workers < 0 or not 0 <= rank < world:
            raise ValueError(f"batch_size {batch_size} must be >= 1, workers {workers} >= 0, rank {rank} < world {world}")
        self.datasets, self.processor = datasets, processor
        self.statistics: Dict[str, Dict] = {d.name: d.statistics for d in datasets}
        self.clipped: Dict[str, int] = {d.name: d.clipped for d in datasets}
        self._size = tuple(processor.picture_size)  # (height, width) in pixels
        self._batch_size, self._seed, self._rank, self._world = batch_size, seed, rank, world
        self._image_aug = image_aug
        self._first_episode = np.concatenate([[0], np.cumsum([len(d) for d in datasets])])
        self.order = SampleOrder(np.concatenate([d.lengths for d in datasets]), shuffle_buffer, seed)
        self.fingerprints: Dict[str, str] = {d.name: d.fingerprint() for d in datasets}
        identity = [[self.fingerprints[d.name] for d in datasets], shuffle_buffer, image_aug]
        self._fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
        self._content: Dict[str, str] = {d.name: d.content for d in datasets if d.content}
        self._round = 0  # global micro-batches handed out before the current round, by all processes together
        self._processes = processes and workers > 0
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="decode") if workers and not self._processes else None
        self._workers, self._ahead = workers, deque()
        self._decoded: Any = None  # what the processes have ready

    @property
    def num_frames(self) -> int:
        return self.order.frames

    def sample(self, episode: int, frame: int, position: Optional[int] = None) -> Sample:
        """A frame at the model's picture size; with image_aug, augmented by a draw that belongs to its position in the stream."""
        which = int(np.searchsorted(self._first_episode, episode, side="right")) - 1
        raw = self.datasets[which].frame(int(episode - self._first_episode[which]), int(frame))
        sample = raw.with_pictures(lambda picture: resize_uint8(picture, self._size))
        if self._image_aug and position is not None:
            drawn = draw(np.random.default_rng([self._seed, 1, position]))
            sample = sample.with_pictures(lambda picture: augment(picture, drawn))
        return sample

    def describe(self) -> List[str]:
        """A line per data set of which something is left out or resized; what it holds, card.py says."""
        lines = []
        for d in self.datasets:
            told = [f"{len(d.left_out)} bad parts are left out ({FILE})"] if d.left_out else []
            size = d.image(0, 0).shape[:2]
            if size != self._size:
                shape = ", which changes their shape" if size[0] * self._size[1] != size[1] * self._size[0] else ""
                told.append(f"pictures of {size[0]} x {size[1]} are resized to the model's {self._size[0]} x {self._size[1]}{shape}")
            lines += [f"data {d.name}: {'; '.join(told)}"] if told else []
        return lines

    def _make(self, keys: np.ndarray, start: int) -> Batch:
        return self.processor.encode_batch([self.sample(e, t, start + i) for i, (e, t) in enumerate(keys)])

    def _keys(self, micro_batch: int) -> Tuple[np.ndarray, int]:
        start = micro_batch * self._batch_size
        return self.order.keys(start, self._batch_size), start  # in the calling thread: the order keeps a cache

    def _job(self, micro_batch: int) -> Callable[[], Batch]:
        keys, start = self._keys(micro_batch)
        return lambda: self._make(keys, start)

    def _start_processes(self, mine: int) -> Iterator[Batch]:
        for dataset in self.datasets:
            dataset.close_all()  # each process opens files of its own
        jobs = (self._keys(mine + k * self._world) for k in itertools.count())
        # A generator of its own: without one the seed of the workers is drawn from the training's random numbers, such as dropout's.
        return iter(DataLoader(_Made(self._make), batch_size=None, sampler=_Endless(jobs), num_workers=self._workers,
                               prefetch_factor=_AHEAD, multiprocessing_context="fork", generator=torch.Generator()))

    def __iter__(self) -> "BatchStream":
        return self

    def __next__(self) -> Batch:
        mine = self._round + self._rank
        if self._processes:
            if self._decoded is None:
                self._decoded = self._start_processes(mine)
            batch = next(self._decoded)
        elif self._pool is None:
            batch = self._job(mine)()
        else:
            for k in range(len(self._ahead), _AHEAD * self._workers):
                self._ahead.append(self._pool.submit(self._job(mine + k * self._world)))
            try:
                batch = self._ahead.popleft().result()
            except BaseException:
                self._drop()
                raise
        self._round += self._world
        return batch

    def _drop(self) -> None:
        for future in self._ahead:
            future.cancel()
        self._ahead.clear()
        self._decoded = None  # ends its processes

    def state_dict(self) -> Dict:
        """JSON-serialisable position; the same in every process that has taken the same number of batches."""
        return {"format": _STATE_FORMAT, "micro_batches": self._round, "batch_size": self._batch_size, "seed": self._seed,
                "data": self._fingerprint, "pictures": self._content}

    def load_state_dict(self, state: Dict) -> None:
        """Continue after the batches of `state`. ValueError when data, seed or batch size are not those of the saved run."""
        mine = self.state_dict()
        names = {"format": "the format of the saved position", "batch_size": "--train.batch_size", "seed": "--seed",
                 "data": "the data sets or their format, --data.train_fraction, --data.camera, --data.cameras, --data.state, "
                         "--data.gripper, --data.rotate, --data.statistics, --data.shuffle_buffer or --data.image_aug"}
        others = [name for name, content in self._content.items() if (state.get("pictures") or {}).get(name, content) != content]
        if others and state.get("data") == mine["data"]:
            raise ValueError(f"the pictures of {', '.join(others)} are not those that the saved run was trained on, though actions and "
                             "texts are: put the files back as they were, or train under another --name")
        changed = [f"{text} ({state.get(key)!r} saved, {mine[key]!r} now)"
                   for key, text in names.items() if state.get(key) != mine[key]]
        if changed:
            raise ValueError("the data position of the saved run does not fit this one, so it cannot be resumed exactly; "
                             "changed: " + "; ".join(changed))
        self._drop()
        self._round = int(state["micro_batches"])

    def close(self) -> None:
        """Stop the decoding threads and close the files."""
        self._drop()
        if self._pool is not None:
            self._pool.shutdown(wait=True)
            self._pool = None
        for dataset in self.datasets:
            dataset.close_all()


def make_stream(data, data_root_dir, processor, batch_size: int, seed: int, rank: int = 0, world: int = 1,
                cache_dir=None, openvla_dir=None, known: Optional[Dict[str, Dict]] = None) -> "Union[BatchStream, OfficialStream]":
    """The stream of the configuration section `data` (DataConfig): data sets below data_root_dir, indexes kept in cache_dir.

    known: the base's action statistics by key, for data.statistics. ValueError when it names none of them.
    """
    if data.statistics is not None and data.statistics not in (known or {}):
        raise ValueError(f"--data.statistics {data.statistics}: the base has action statistics of {', '.join(known or {}) or 'nothing'}")
    if data.source == "official":
        from vlakeep.data.official import OfficialStream

        if processor.spec != ONE_PICTURE:
            raise ValueError("--data.source official: that pipeline gives one picture and one action; take --data.source native")
        if data.skip_bad:
            raise ValueError("--data.skip_bad: the official pipeline reads all or nothing; use --data.source native")
        return OfficialStream(data, data_root_dir, processor, batch_size, openvla_dir)
    datasets = open_configured(data, data_root_dir, cache_dir, processor.spec)
    try:
        for dataset in datasets if data.statistics is not None else ():
            dataset.scale(known[data.statistics])
        return BatchStream(datasets, processor, batch_size, seed, rank, world, data.shuffle_buffer, data.workers, data.image_aug,
                           data.processes)
    except BaseException:
        for dataset in datasets:
            dataset.close_all()
        raise
