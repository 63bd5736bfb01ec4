"""Method `replay`: an oracle. Old data are trained on beside the new task's. Experience replay, Chaudhry et al. 2019, On Tiny Episodic
Memories in Continual Learning (arXiv 1902.10486).

    loss = loss of the new task + weight * loss of `items` frames of old data

It uses what the other arms are forbidden: data of the base's own training. It is an upper reference, not a rival. The old frames come on
top of the new task's batch, so new frames are as many as in every arm; a step costs items / batch_size more.

reads: data_root_dir/<set> for every name in --options.datasets
"""

import zlib
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import torch

from vlakeep.core.config import Config
from vlakeep.core.parallel import Distributed
from vlakeep.core.storage import Storage
from vlakeep.data.loader import make_stream
from vlakeep.methods.measured import Measured
from vlakeep.models.lean import autocast


@dataclass
class Options:
    datasets: str = ""  # old data sets below data_root_dir, with commas between them
    items: int = 8  # old frames per micro-batch
    memory: int = 0  # old frames that there are; 0 takes all of the data sets
    weight: float = 1.0


def old_sets(options: Options):
    return [name for name in options.datasets.replace(" ", "").split(",") if name]


class Replay(Measured):
    label, label_zh, Options = "Replay of old data (oracle)", "旧数据回放（上界）", Options
    _open: Any = None  # makes the stream of old data
    _size = 0  # frames of the memory

    @classmethod
    def limits(cls, options):
        return [("datasets", options.datasets, bool(options.datasets.strip(", ")) or options.weight == 0,
                 "old data sets with commas between them, such as tabletop_pick,tabletop_place"),
                ("items", options.items, options.items > 0, "above 0"), ("memory", options.memory, options.memory >= 0, "0 or above"),
                ("weight", options.weight, options.weight >= 0, "0 or above")]

    @classmethod
    def data_sets(cls, config: Config):
        options = cls.options(config)
        return [*super().data_sets(config), *(old_sets(options) if options.weight else [])]

    @classmethod
    def prepare(cls, config: Config, storage: Storage, backbone):
        method, hashes = super().prepare(config, storage, backbone)
        options = method._options
        if options.weight:
            data = replace(config.data, source="native", datasets=old_sets(options))
            opened: Any = make_stream(data, storage.data, backbone.processor, options.items, config.seed, cache_dir=storage.cache,
                                      known=backbone.norm_stats)
            with closing(opened) as stream:
                method._size = min(options.memory or stream.num_frames, stream.num_frames)
                hashes = {**hashes, "old_data": stream.fingerprints}
            method._open = lambda: make_stream(data, storage.data, backbone.processor, options.items, config.seed,
                                               cache_dir=storage.cache, known=backbone.norm_stats)
        return method, hashes

    def attach(self, backbone) -> None:
        super().attach(backbone)
        self._backbone, self._step, self._micro_batch, self._old = backbone, 0, 0, None
        if self._options.weight:
            self._old = self._open()

    def before_step(self, step: int, observe: bool) -> None:
        super().before_step(step, observe)
        self._step, self._micro_batch = step, 0

    def _batch(self):
        """Frames drawn by seed, step and micro-batch alone, so that a resumed run draws the same."""
        job = Distributed.current()
        number = self._micro_batch * (job.world if job else 1) + (job.rank if job else 0)
        self._micro_batch += 1
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self._config.seed}/{self._step}/{number}".encode()))
        positions = torch.randint(self._size, (self._options.items,), generator=generator).tolist()
        # The first `memory` frames of the stream's own order, which is shuffled, are the memory.
        keys = [self._old.order.keys(position, 1)[0] for position in positions]
        return self._backbone.processor.encode_batch([self._old.sample(e, t) for e, t in keys])

    def penalty(self):
        if not self._options.weight:
            return None
        device = self._backbone.device
        with autocast(self._config.train.autocast, device):
            return self._options.weight * self._backbone(self._batch().to(device)).loss

    def detach(self) -> None:
        super().detach()
        if self._old is not None:
            self._old.close()
            self._old = None


METHOD = Replay
