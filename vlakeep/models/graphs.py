"""Answers of one shape as a CUDA graph: the host starts one thing in place of the thousands of kernels of an answer.

A graph holds the addresses of weights and of its own inputs and outputs. So it is for a model whose weights stay where they are for as long
as it is asked, and for a `generate` that never waits for the device (Backbone.waits_for_nothing).
"""

import contextlib
from dataclasses import fields
from typing import Any, Callable, Dict, Iterator, NamedTuple, Tuple

import torch

from vlakeep.core.log import log
from vlakeep.data.sample import Batch

WARM = 2  # calls before the recording: libraries make their handles and workspaces in the first


class Recording(NamedTuple):
    """A graph with the tensors that it reads and writes."""

    graph: Any  # torch.cuda.CUDAGraph
    given: Batch
    ids_BT: torch.Tensor
    ended_B: torch.Tensor


class GraphedAnswers:
    """`generate` of a backbone, recorded once for the shape that is asked first and replayed for it; other shapes are answered as ever.

    Called as Backbone.generate: (batch, tokens, stop_at_eos) -> (ids [B, T], ended [B]) on the device, with the same values to the bit.
    What can't be recorded is answered as ever too, with one warning.
    """

    def __init__(self, generate: Callable, device: torch.device):
        self._generate, self._device = generate, torch.device(device)
        self._shape: Any = None
        self._recording: Any = None  # None: not tried yet, False: it can't be recorded

    def __call__(self, batch: Batch, max_new_tokens: int, stop_at_eos: bool = True) -> Tuple[torch.Tensor, torch.Tensor]:
        asked = (_shapes(batch), max_new_tokens, stop_at_eos)
        if self._shape is None:
            self._shape = asked
            self._recording = self._record(batch, max_new_tokens, stop_at_eos)
        if asked != self._shape or not self._recording:
            return self._generate(batch, max_new_tokens, stop_at_eos=stop_at_eos)
        graph, given, ids_BT, ended_B = self._recording
        for name, tensor in _tensors(given).items():
            tensor.copy_(getattr(batch, name), non_blocking=True)
        graph.replay()
        return ids_BT.clone(), ended_B.clone()

    def _record(self, batch: Batch, max_new_tokens: int, stop_at_eos: bool):
        """The Recording, or False where something in it cannot be part of a graph."""
        given = batch.to(self._device)._map(torch.clone)
        side = torch.cuda.Stream(self._device)
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            for _ in range(WARM):
                self._generate(given, max_new_tokens, stop_at_eos=stop_at_eos)
        torch.cuda.current_stream(self._device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                ids_BT, ended_B = self._generate(given, max_new_tokens, stop_at_eos=stop_at_eos)
        except RuntimeError as error:
            log.warning(f"the policy's answers are no CUDA graph ({str(error).splitlines()[0]}): they are made operation by operation, "
                        "which is slower and changes nothing else")
            return False
        return Recording(graph, given, ids_BT, ended_B)


@contextlib.contextmanager
def recorded(backbone) -> Iterator[None]:
    """Within the context `attempt_chunks` of a backbone answers by a graph where it lies on a GPU and its `generate` waits for nothing. Its
    weights must stay as they are, and whoever asks keeps to one shape."""
    if backbone.device.type == "cuda" and backbone.waits_for_nothing:
        backbone.answering = GraphedAnswers(backbone.generate, backbone.device)
    try:
        yield
    finally:
        backbone.answering = None


def _tensors(batch: Batch) -> Dict[str, torch.Tensor]:
    return {f.name: getattr(batch, f.name) for f in fields(batch) if torch.is_tensor(getattr(batch, f.name))}


def _shapes(batch: Batch) -> Dict[str, Tuple]:
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in _tensors(batch).items()}
