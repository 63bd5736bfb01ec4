"""Checkpoints: exact round trips, nothing half-written, broken ones named and skipped, kill -9 at any moment survived."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from test_storage import file_size_limit, names

from vlakeep.core import checkpoint as ckpt
from vlakeep.core.errors import CheckpointError, DiskFull
from vlakeep.core.parallel import process_settings


def trees_equal(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(trees_equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(trees_equal(x, y) for x, y in zip(a, b))
    return type(a) is type(b) and (a == b or (a != a and b != b))


def save(run, step, keep_last=0, value=None):
    value = float(step) if value is None else value
    return ckpt.save_checkpoint(run, step, {"trainable": {"w": torch.full((50, 50), value)}}, {"step": step}, keep_last=keep_last)


def test_pack_is_exact():
    tree = {
        "float": [0.1, float("nan"), float("inf"), -0.0],
        "int": 2**127,
        "none": None,
        "bool": True,
        "text": "x",
        "tuple": (1, ("a",)),
        3: {"nested": torch.arange(6).reshape(2, 3).T},
        "__tensor__": "a name that pack itself uses",
        "bf16": torch.tensor([1.5], dtype=torch.bfloat16),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(2.0),
        "array": np.array([[1, 2]], dtype=np.uint32),
        "array0": np.array(3.0),
        "number": np.float32(0.1),
        "flags": np.array([True, False]),
    }
    for back in (ckpt.from_bytes(ckpt.to_bytes(tree)), ckpt.unpack(*ckpt.pack(tree))):
        assert trees_equal(tree, back)
    packed, _ = ckpt.pack(tree)
    json.dumps(packed, allow_nan=False)
    with pytest.raises(TypeError, match=r"state\.a\[1\]"):
        ckpt.pack({"a": [1, object()]})
    with pytest.raises(TypeError, match="state.a"):
        ckpt.pack({"a": np.array([None])})


def test_pack_takes_a_snapshot():
    live = torch.zeros(3)
    packed, tensors = ckpt.pack({"x": live})
    live += 1
    assert torch.equal(ckpt.unpack(packed, tensors)["x"], torch.zeros(3))


@pytest.mark.parametrize("make", [lambda p: torch.optim.AdamW(p, lr=1e-2), lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9)])
def test_training_from_a_checkpoint_is_bitwise_the_uninterrupted_one(tmp_path, make):
    def start():
        torch.manual_seed(3)
        model = torch.nn.Linear(5, 3)
        return model, make(model.parameters())

    def steps(model, optimizer, count):
        for _ in range(count):
            optimizer.zero_grad()
            x = torch.randn(4, 5) + random.random() + np.random.rand()
            model(x).square().sum().backward()
            optimizer.step()

    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    model, optimizer = start()
    rng = ckpt.rng_state()
    steps(model, optimizer, 6)
    wanted = model.weight.detach().clone()

    ckpt.set_rng_state(rng)
    model, optimizer = start()
    ckpt.set_rng_state(rng)
    steps(model, optimizer, 3)
    tensors, state = ckpt.split_optimizer(optimizer.state_dict())
    folder = ckpt.save_checkpoint(
        tmp_path,
        3,
        {"model": model.state_dict(), "optimizer": tensors},
        {"optimizer": state, "ranks": [{"rng": ckpt.rng_state()}]},
    )
    random.random(), torch.randn(9), np.random.rand()
    model, optimizer = start()
    loaded, state = ckpt.load_checkpoint(folder)
    model.load_state_dict(loaded["model"])
    ckpt.join_optimizer(optimizer, loaded["optimizer"], state["optimizer"])
    ckpt.set_rng_state(state["ranks"][0]["rng"])
    assert trees_equal(ckpt.unpack(*reversed((tensors, state["optimizer"]))), optimizer.state_dict())
    steps(model, optimizer, 3)
    assert torch.equal(model.weight, wanted)


def test_optimizer_of_another_model_is_refused():
    one, two = torch.optim.SGD([torch.zeros(1)], 0.1), torch.optim.SGD([torch.zeros(1), torch.zeros(1)], 0.1)
    with pytest.raises(CheckpointError, match="does not fit"):
        ckpt.join_optimizer(two, *ckpt.split_optimizer(one.state_dict()))


def test_save_load_keep_last_and_adapter(tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step, keep_last=2)
    assert names(tmp_path / "checkpoints") == ["step_000003", "step_000004"]
    tied = torch.ones(2, 2)
    folder = ckpt.save_checkpoint(
        tmp_path,
        5,
        {"g": {"a": tied, "b": tied, "view": tied[:, 0]}},
        {"nan": float("nan")},
        lambda f: (f / "adapter").mkdir() or (f / "adapter" / "x.json").write_text("{}"),
    )
    assert names(folder) == ["adapter", "g.safetensors", "manifest.json", "state.json", "state.safetensors"]
    tensors, state = ckpt.load_checkpoint(folder)
    assert torch.equal(tensors["g"]["view"], torch.ones(2)) and state["nan"] != state["nan"]
    save(tmp_path, 5, value=9.0)  # the same step again, after a resume
    assert ckpt.load_checkpoint(folder)[0]["trainable"]["w"][0, 0] == 9.0


def replace(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    "damage, words",
    [
        (
            lambda f: (f / "trainable.safetensors").write_bytes((f / "trainable.safetensors").read_bytes()[:-5]),
            "trainable.safetensors is truncated",
        ),
        (lambda f: (f / "state.json").write_text('{"step": 9}'), "state.json is corrupt"),
        (lambda f: (f / "state.json").unlink(), "state.json is missing"),
        (lambda f: (f / "manifest.json").write_text("{"), "manifest.json is damaged"),
        (lambda f: replace(f / "manifest.json", '"sha256"', '"sha25v"'), "manifest.json is damaged"),  # a bit
        (lambda f: replace(f / "manifest.json", '"groups"', '"groupr"'), "manifest.json is damaged"),
        (lambda f: replace(f / "manifest.json", '"trainable"', '"trainaale"'), "manifest.json is damaged"),
        (lambda f: (f / "manifest.json").unlink(), "manifest.json is missing"),
    ],
)
def test_broken_checkpoints_are_named_and_skipped(tmp_path, damage, words):
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    damage(bad)
    with pytest.raises(CheckpointError, match=f"{words}.*newest intact checkpoint is {good}"):
        ckpt.load_checkpoint(bad)
    said = []
    assert ckpt.latest_intact(tmp_path, said.append) == good
    assert len(said) == 1 and "step_000002" in said[0] and words in said[0]
    damage(good)
    assert ckpt.latest_intact(tmp_path, said.append) is None


def test_full_disk_keeps_the_last_checkpoint(tmp_path):
    good = save(tmp_path, 1)
    big = {"g": {"w": torch.zeros(100_000)}}
    for writer in (None, lambda folder: (folder / "adapter.bin").write_bytes(b"x" * 100_000)):
        with file_size_limit(50_000), pytest.raises(DiskFull, match="step_000002"):
            ckpt.save_checkpoint(tmp_path, 2, big if writer is None else {}, {}, writer, keep_last=1)
        assert names(tmp_path / "checkpoints") == ["step_000001"]
    assert ckpt.load_checkpoint(good)[1]["step"] == 1


def test_foreseen_full_disk_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("vlakeep.core.storage.free_bytes", lambda path: 1000)
    with pytest.raises(DiskFull, match="1000 bytes"):
        save(tmp_path, 1)
    assert names(tmp_path / "checkpoints") == []


# A saver for each line that it is given, one after the other; they are forked, so that torch is imported once.
SAVERS = """
import os, sys, torch
from vlakeep.core.checkpoint import save_checkpoint
for line in sys.stdin:
    saver = os.fork()
    if saver == 0:
        break
    os.waitpid(saver, 0)
    print("ended", flush=True)
else:
    sys.exit()
print(os.getpid(), flush=True)
for step in range(1, 100000):
    print(step, flush=True)
    tensors = {"w": torch.full((500, 500), float(step)), "v": torch.full((300, 500), -float(step))}
    save_checkpoint(sys.argv[1], step, {"trainable": tensors}, {"step": step},
                    lambda f: (f / "adapter.txt").write_text(str(step)), keep_last=2)
"""


def test_kill_9_while_saving_leaves_the_last_good_one(tmp_path):
    savers = subprocess.Popen([sys.executable, "-c", SAVERS, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    for attempt in range(6):
        print("one more", file=savers.stdin, flush=True)
        pid, *started = (int(savers.stdout.readline()) for _ in range(4))
        time.sleep(0.003 * attempt)
        os.kill(pid, signal.SIGKILL)
        started += [int(line) for line in iter(savers.stdout.readline, "ended\n")]
        said = []
        folder = ckpt.latest_intact(tmp_path, said.append)
        assert said == [], "a half-written checkpoint was visible"
        tensors, state = ckpt.load_checkpoint(folder)
        assert state["step"] in (started[-1], started[-1] - 1)
        assert torch.equal(tensors["trainable"]["w"], torch.full((500, 500), float(state["step"])))
        assert (folder / "adapter.txt").read_text() == str(state["step"])
        for _, old in ckpt.list_checkpoints(tmp_path):
            assert ckpt.broken(old) is None
        for _, old in ckpt.list_checkpoints(tmp_path):
            ckpt.shutil.rmtree(old)
    savers.communicate()
    assert savers.returncode == 0
    save(tmp_path, 1)  # the next save clears what the killed ones left
    assert [name for name in names(tmp_path / "checkpoints") if ".tmp-" in name] == []


def test_equal_runs_begin_with_equal_random_states():
    """Whatever was drawn in the process before, of all three generators; and what was there before is there again."""
    found = {}
    for before in (1, 2):
        for seed in (7, 8):
            random.seed(before), np.random.seed(before), torch.manual_seed(before)
            outside = ckpt.to_bytes(ckpt.rng_state())
            with process_settings(None, seed):
                found[before, seed] = [ckpt.to_bytes(value) for value in ckpt.rng_state().values()]
            assert ckpt.to_bytes(ckpt.rng_state()) == outside
    assert found[1, 7] == found[2, 7] and not any(a == b for a, b in zip(found[1, 7], found[1, 8]))
