"""One process or many, as torchrun's environment says (RANK WORLD_SIZE LOCAL_RANK): gloo on CPU, NCCL on GPU.

    torchrun --standalone --nproc-per-node 8 -m vlakeep.cli train --config configs/baseline_lora.yaml

Objects travel between processes as JSON and safetensors bytes (checkpoint.to_bytes), never as pickle. What stages divide is dealt out by
`share`, and put together by `merged` in the order that a single process has it in, so that sums over it are the same to the bit.
"""

import os
import random
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Dict, Iterator, List, Optional, Sequence, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from vlakeep.core.checkpoint import from_bytes, rng_state, set_rng_state, to_bytes
from vlakeep.core.errors import Interrupted, ProcessLost
from vlakeep.core.sharded import whole

One = TypeVar("One")
HOST, DAY = "gloo", 86_400.0  # for stages that exchange what lies on the host, and whose processes may wait long for one another


def pick_device(name: str = "auto", local_rank: int = 0) -> torch.device:
    """cpu, cuda (of this local rank) or auto. Raises ValueError when the GPU asked for is not there."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and count == 0):
        return torch.device("cpu")
    if count == 0:
        raise ValueError(
            f"--device {name}: no GPU in sight (CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES')}); use --device cpu"
        )
    if local_rank >= count:
        raise ValueError(f"process {local_rank} has no GPU of its own: this machine shows {count}; use --nproc-per-node {count}")
    return torch.device("cuda", local_rank)


def set_threads(threads: Optional[int]) -> None:
    """Fix torch's CPU threads; None leaves torch's choice."""
    if threads is not None:
        torch.set_num_threads(threads)


@contextmanager
def process_settings(threads: Optional[int], seed: int, device=None) -> Iterator[None]:
    """Within the block torch has this many CPU threads (None: as many as before), and torch, NumPy and Python draw from `seed`: the states
    of all three are in checkpoints, which are equal for equal runs.

    After it the number of threads and the random states of Python, NumPy and torch (also of a CUDA `device`) are those of before. Both
    belong to the process, which is why only one training at a time may run in it (Distributed).
    """
    before, state = torch.get_num_threads(), rng_state(device)
    set_threads(threads)
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
    try:
        yield
    finally:
        set_rng_state(state, device)
        set_threads(None if threads is None else before)


def alone() -> bool:
    """Whether this process is no part of a larger job."""
    return int(os.environ.get("WORLD_SIZE", 1)) == 1


class Distributed:
    """The processes of one job, as a context manager. Attributes: rank world local_rank device is_main."""

    _current: Optional["Distributed"] = None

    def __init__(self, device: str = "auto", timeout_s: float = 1800.0, backend: Optional[str] = None):
        """backend: of torch.distributed; None takes NCCL on a GPU and gloo on a CPU. Raises ValueError for a half-set torchrun environment
        or a missing GPU."""
        present = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name in os.environ]
        if present and len(present) < 3:
            raise ValueError(
                f"the environment has {', '.join(present)} but not all of RANK, WORLD_SIZE, LOCAL_RANK: start through torchrun, "
                "or unset them"
            )
        self.rank = int(os.environ.get("RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))
        self.device = pick_device(device, self.local_rank)
        self._timeout = timedelta(seconds=timeout_s)
        self._backend = backend or ("nccl" if self.device.type == "cuda" else HOST)
        self._wire = self.device if self._backend == "nccl" else torch.device("cpu")  # where what is exchanged lies

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def __enter__(self) -> "Distributed":
        """Raises ValueError while another job of this process is in its block."""
        if Distributed._current is not None:
            raise ValueError("this process is training already, and random states and process groups are a process's: train one after the "
                             "other, or in a process of its own")
        if self.device.type == "cuda":
            self._device_before = torch.cuda.current_device()
            torch.cuda.set_device(self.device)
        if self.world > 1:
            dist.init_process_group(self._backend, timeout=self._timeout)
        Distributed._current = self
        return self

    def __exit__(self, kind, error, trace) -> None:
        """Where a process fails, others do too, alike or because it is gone: the first says why, and the rest end with Interrupted."""
        Distributed._current = None
        speaks = self._speaks() if self.world > 1 and isinstance(error, Exception) else True
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()
        if self.device.type == "cuda":
            torch.cuda.set_device(self._device_before)
        if not speaks:
            raise Interrupted("another process of this job has said why", 2) from error
        if self.world > 1 and _lost(error):
            raise ProcessLost(f"process {self.rank} of {self.world} has lost another one, which ended without a word: it was killed, or "
                              f"its memory ran out ({str(error).splitlines()[0][:200]}); run the command again") from error

    @staticmethod
    def _speaks() -> bool:
        """Whether this process is the first of the job that fails."""
        try:
            return dist.distributed_c10d._get_default_store().add("vlakeep/failed", 1) == 1
        except Exception:  # the store is process 0's, which is gone, and whoever ended it knows
            return False

    @classmethod
    def current(cls) -> Optional["Distributed"]:
        """The job of the `with Distributed(...)` that this process is in."""
        return cls._current

    @classmethod
    def here(cls) -> "Distributed":
        """The current job; outside of one, this process alone."""
        if cls._current is not None:
            return cls._current
        one = cls.__new__(cls)
        one.rank, one.world, one.local_rank, one.device = 0, 1, 0, torch.device("cpu")
        return one

    def wrap(self, module):
        """`module` in DistributedDataParallel; itself in a single process."""
        if self.world == 1:
            return module
        ids = [self.device.index] if self.device.type == "cuda" else None
        # Buffers are the frozen base's, alike everywhere; bucket views save a second copy of the gradients.
        return torch.nn.parallel.DistributedDataParallel(
            module, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True
        )

    def barrier(self) -> None:
        if self.world > 1:
            self.sum(0.0)  # a reduction works alike on gloo and NCCL, and needs no device_ids

    def sum(self, value: float) -> float:
        """Sum of a number over all processes (float64)."""
        if self.world == 1:
            return float(value)
        total = torch.tensor([float(value)], dtype=torch.float64, device=self._wire)
        dist.all_reduce(total)
        return float(total.item())

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        return self.sum(1.0 if flag else 0.0) > 0

    def mean_metrics(self, metrics: Dict[str, Any]) -> Dict[str, float]:
        """Each number (float or 0-d tensor) as a float, averaged over the processes; one device synchronisation.

        All processes must give the same keys.
        """
        # One order in all processes, whatever order their dictionaries were made in. The norm of sharded gradients is sharded too.
        keys = sorted(metrics)
        metrics = {key: whole(metrics[key]) for key in metrics}
        values = torch.stack(
            [
                metrics[k].detach().double().reshape(()).to(self._wire)
                if isinstance(metrics[k], torch.Tensor)
                else torch.tensor(float(metrics[k]), dtype=torch.float64, device=self._wire)
                for k in keys
            ]
        )
        if self.world > 1:
            dist.all_reduce(values)
            values /= self.world
        means = dict(zip(keys, values.tolist()))
        return {key: means[key] for key in metrics}

    def broadcast(self, value: Any) -> Any:
        """Process 0's value in every process."""
        return value if self.world == 1 else self._exchange(value if self.is_main else None)[0]

    def gather(self, value: Any) -> List[Any]:
        """Every process's value, by rank, in every process."""
        return [value] if self.world == 1 else self._exchange(value)

    def share(self, items: Sequence[One]) -> List[One]:
        """This process's part of a list that all processes have: every world-th item from the one of its rank on."""
        return list(items[self.rank::self.world])

    def merged(self, mine: Sequence[One], at_once: int = 0, everywhere: bool = True) -> List[One]:
        """What each process has made of its `share`, in the order of the whole list, in every process, or (everywhere False) in process 0
        and nothing in the others. at_once: of how many items a process sends the results together, 0 for all; what is large goes in pieces.
        Tuples, numbers and tensors keep type and bits."""
        if self.world == 1:
            return list(mine)
        most = max(self.gather(len(mine)))
        found: List[One] = []
        for start in range(0, most, at_once or max(most, 1)):
            parts = self.gather(list(mine[start:start + (at_once or most)]))
            if everywhere or self.is_main:
                found += [part[i] for i in range(max(map(len, parts))) for part in parts if i < len(part)]
        return found

    def _exchange(self, value: Any) -> List[Any]:
        data = torch.frombuffer(bytearray(to_bytes({"value": value})), dtype=torch.uint8).to(self._wire)
        # Pieces that are gathered must have one size: the lengths go first, and what is short is padded.
        sizes = [torch.zeros(1, dtype=torch.int64, device=self._wire) for _ in range(self.world)]
        dist.all_gather(sizes, torch.tensor([data.numel()], device=self._wire))
        longest = max(int(size) for size in sizes)
        padded = torch.zeros(longest, dtype=torch.uint8, device=self._wire)
        padded[: data.numel()] = data
        parts = [torch.empty_like(padded) for _ in range(self.world)]
        dist.all_gather(parts, padded)
        return [from_bytes(part[: int(size)].cpu().numpy().tobytes())["value"] for part, size in zip(parts, sizes)]


def _lost(error: Optional[BaseException]) -> bool:
    """Whether an error of a collective says that another process is not there any more."""
    words = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL", "Connection refused")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def broadcast_float(value: float) -> float:
    """Process 0's number in every process of the current job; the value itself without one."""
    job = Distributed.current()
    if job is None or job.world == 1:
        return float(value)
    holder = torch.tensor([float(value)], dtype=torch.float64, device=job._wire)
    dist.broadcast(holder, src=0)
    return float(holder.item())


if __name__ == "__main__":  # sanity check: torchrun --nproc-per-node 2 -m vlakeep.core.parallel
    with Distributed("cpu") as job:
        gathered, mean = job.gather({"rank": job.rank}), job.mean_metrics({"x": job.rank})
        told, any_second = job.broadcast([job.rank, "from 0"]), job.any(job.rank == 1)
        print(job.rank, gathered, mean, told, any_second)
        assert mean == {"x": (job.world - 1) / 2} and told == [0, "from 0"] and any_second == (job.world > 1)
        assert job.merged([10 * i for i in job.share(range(5))], 1) == [0, 10, 20, 30, 40]
        assert gathered == [{"rank": rank} for rank in range(job.world)]
