"""A frozen base in pieces over the processes of a job (FSDP2), adapters whole in each: --train.sharding fsdp.

A layer's weights are gathered before it runs and dropped after it, so that a process holds its share of the base, the layer at work, and
what lies outside the layers. Adapters are small, and the site of method graded works on all of them at once (hsw/graded.py): they stay
whole, and their gradients are averaged at the end of a step's last backward pass, as DistributedDataParallel does with all it is given.
A checkpoint holds adapters alone, so it does not depend on who wrote it, nor on how the base lay.
"""

import inspect
import weakref
from contextlib import contextmanager
from typing import Iterator, List

import torch
import torch.distributed as dist
from torch import nn


def refuse_sharding(sharding: str, world: int) -> None:
    """ValueError where torch cannot do it; a single process has nothing to share with."""
    if sharding == "none" or world == 1:
        return
    try:
        from torch.distributed.fsdp import fully_shard
    except ImportError:
        fully_shard = None
    if fully_shard is None or "ignored_params" not in inspect.signature(fully_shard).parameters:
        raise ValueError(f"--train.sharding fsdp: torch {torch.__version__} has no FSDP2 that leaves parameters alone: it needs 2.7 or "
                         "newer; use --train.sharding none")


def shard(backbone, job) -> None:
    """Move a model with adapters, loaded to the CPU, to the devices of a job: the base in pieces, layer by layer, and adapters whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(job.device.type, (job.world,))
    adapters = [p for p in backbone.parameters() if p.requires_grad]
    for p in adapters:
        p.data = p.data.to(job.device)
    for module in (*backbone.decoder_layers, backbone):
        own = {p for p in module.parameters() if p.requires_grad}
        fully_shard(module, mesh=mesh, ignored_params=own)
    for module in backbone.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(job.device)


class Averaged:
    """What the training loop calls in place of a sharded model: itself, and gradients of adapters that are averaged over the processes at
    the end of each backward pass outside `no_sync`."""

    def __init__(self, backbone, job):
        self._backbone, self._world = backbone, job.world
        self._params: List[nn.Parameter] = [p for p in backbone.parameters() if p.requires_grad]
        self._averages, self._queued = True, False
        own = weakref.ref(self)  # hooks that held this held the whole model, where the collector does not look

        def accumulated(param: nn.Parameter) -> None:
            own()._accumulated()

        for p in self._params:
            p.register_post_accumulate_grad_hook(accumulated)

    def __call__(self, batch):
        return self._backbone(batch)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Within the context gradients add up in each process by itself."""
        self._averages = False
        try:
            yield
        finally:
            self._averages = True

    def _accumulated(self) -> None:
        if self._averages and not self._queued:
            self._queued = True
            torch.autograd.Variable._execution_engine.queue_callback(self._average)

    def _average(self) -> None:
        self._queued = False
        grads = [p.grad for p in self._params if p.grad is not None]  # the same ones in all processes
        for kind in dict.fromkeys(grad.dtype for grad in grads):
            own = [grad for grad in grads if grad.dtype == kind]
            flat = torch._utils._flatten_dense_tensors(own)
            dist.all_reduce(flat)
            flat /= self._world
            for grad, mean in zip(own, torch._utils._unflatten_dense_tensors(flat, own)):
                grad.copy_(mean)
