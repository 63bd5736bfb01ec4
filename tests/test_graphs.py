"""Answers as a CUDA graph (models/graphs.py), on a CPU: what is recorded are the operations themselves, which are run again into the memory
that they wrote first. An operation whose value the host reads cannot be recorded, as on a GPU."""

import contextlib
import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vlakeep.data.sample import Sample
from vlakeep.models import graphs
from vlakeep.models.load import make_backbone

READ_BY_THE_HOST = ("_local_scalar_dense", "nonzero", "is_nonzero")
recorded_graphs = []


class Graph(TorchDispatchMode):
    """In place of torch.cuda.CUDAGraph: its operations, and the tensors that they read and wrote."""

    def __init__(self):
        super().__init__()
        self.operations, self.replays = [], 0
        recorded_graphs.append(self)

    def __torch_dispatch__(self, operation, types, given=(), named=None):
        if any(name in str(operation) for name in READ_BY_THE_HOST):
            raise RuntimeError(f"operation not permitted when stream is capturing: {operation}\nand more lines")
        found = operation(*given, **(named or {}))
        self.operations.append((operation, given, named or {}, found))
        return found

    def replay(self):
        self.replays += 1
        for operation, given, named, found in self.operations:
            for old, new in zip(tree_leaves(found), tree_leaves(operation(*given, **named))):
                if torch.is_tensor(old) and old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                    old.copy_(new)


@pytest.fixture(autouse=True)
def cuda(monkeypatch):
    """What graphs.py takes of torch.cuda."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    recorded_graphs.clear()
    for name, own in (("Stream", lambda device: stream), ("current_stream", lambda device: stream),
                      ("stream", lambda _: contextlib.nullcontext()), ("CUDAGraph", Graph), ("graph", lambda graph: graph)):
        monkeypatch.setattr(torch.cuda, name, own)


@pytest.fixture(scope="module")
def backbone():
    return make_backbone("tabletop-base").eval()


def prompts(backbone, rows=2, seed=0, texts=("push the red block", "lift it")):
    rng = np.random.default_rng(seed)
    height, width = backbone.processor.picture_size
    samples = [Sample(rng.integers(0, 256, (height, width, 3), dtype=np.uint8), texts[row % len(texts)]) for row in range(rows)]
    return backbone.processor.encode_prompts(samples, 40)


def answers(backbone):
    return graphs.GraphedAnswers(backbone.generate, "cpu")


@torch.no_grad()
def test_a_replay_answers_what_is_asked_now(backbone):
    asked = answers(backbone)
    batches = [prompts(backbone, seed=seed) for seed in range(6)]
    batches.append(prompts(backbone, texts=("where is the blue block", "push the green block to the left")))
    wanted = [backbone.generate(batch, 7) for batch in batches]
    assert len({tuple(ids.flatten().tolist()) for ids, _ in wanted}) > 2  # they do differ
    found = [asked(batch, 7) for batch in batches]  # kept: a later replay must not write into an earlier answer
    for (ids, ended), (wanted_ids, wanted_ended) in zip(found, wanted):
        assert torch.equal(ids, wanted_ids) and torch.equal(ended, wanted_ended)
    assert [graph.replays for graph in recorded_graphs] == [len(batches)] and len(recorded_graphs[0].operations) > 500


@torch.no_grad()
def test_what_is_asked_stays_as_it_was(backbone):
    asked, first, second = answers(backbone), prompts(backbone), prompts(backbone, seed=1)
    before = copy.deepcopy(first)
    asked(first, 7)
    asked(second, 7)
    assert all(torch.equal(getattr(first, name), getattr(before, name)) for name in ("input_ids", "attention_mask", "pixel_values"))


@torch.no_grad()
@pytest.mark.parametrize("other", [dict(rows=3), dict(tokens=5), dict(stop=False)])
def test_another_shape_is_answered_without_the_graph(backbone, other):
    asked = answers(backbone)
    asked(prompts(backbone), 7)
    batch = prompts(backbone, other.get("rows", 2), seed=2)
    tokens, stop = other.get("tokens", 7), other.get("stop", True)
    ids, ended = asked(batch, tokens, stop_at_eos=stop)
    wanted = backbone.generate(batch, tokens, stop_at_eos=stop)
    assert torch.equal(ids, wanted[0]) and torch.equal(ended, wanted[1])
    assert [graph.replays for graph in recorded_graphs] == [1]


@torch.no_grad()
def test_where_the_host_decides_there_is_no_graph_but_an_answer(backbone, caplog):
    def waiting(batch, tokens, stop_at_eos=True):
        ids, ended = backbone.generate(batch, tokens, stop_at_eos=stop_at_eos)
        return ids, ended & bool(ended.any())

    asked, batch = graphs.GraphedAnswers(waiting, "cpu"), prompts(backbone)
    for seed in range(2):
        batch = prompts(backbone, seed=seed)
        assert torch.equal(asked(batch, 7)[0], backbone.generate(batch, 7)[0])
    [warning] = [record.getMessage() for record in caplog.records]
    assert "no CUDA graph (operation not permitted" in warning and "more lines" not in warning
    assert len(recorded_graphs) == 1 and recorded_graphs[0].replays == 0


@torch.no_grad()
def test_actions_within_the_context_come_from_the_graph_and_behind_it_they_do_not(backbone, monkeypatch):
    batch, key, calls = prompts(backbone), backbone.action_key(), []
    wanted = backbone.attempt_chunks(batch, key)

    def graphed(generate, device):
        return lambda batch, *more, **named: calls.append(batch.size) or generate(batch, *more, **named)

    with graphs.recorded(backbone):  # a model on a CPU
        assert backbone.answering is None
    with monkeypatch.context() as patched:
        patched.setattr(graphs, "GraphedAnswers", graphed)
        patched.setattr(type(backbone), "device", SimpleNamespace(type="cuda"))
        patched.setattr(type(backbone), "waits_for_nothing", False)
        with graphs.recorded(backbone):
            assert backbone.answering is None
        patched.setattr(type(backbone), "waits_for_nothing", True)
        within = graphs.recorded(backbone)
        within.__enter__()
    found = backbone.attempt_chunks(batch, key)
    assert all(np.array_equal(a, b) for a, b in zip(found, wanted)) and calls == [2]
    assert not within.__exit__(ZeroDivisionError, ZeroDivisionError("an episode fails"), None) and backbone.answering is None
