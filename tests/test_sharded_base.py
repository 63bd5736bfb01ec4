"""A base in pieces over two processes (models/sharded_base.py): the training of one process, killed, continued, on any number of them."""

import gc
import inspect
import os
import signal
import socket
import subprocess
import sys
import time
import weakref
from types import SimpleNamespace

import forked
import pytest
import torch
from conftest import BASELINE, GRADED, METHOD, SMALL, final_adapter

from vlakeep.core.checkpoint import latest_intact
from vlakeep.models.sharded_base import Averaged, refuse_sharding
from vlakeep.train import load_base, run_training

fsdp = pytest.importorskip("torch.distributed.fsdp")
new = pytest.mark.skipif("ignored_params" not in inspect.signature(getattr(fsdp, "fully_shard", len)).parameters,
                         reason="this torch has no FSDP2 that leaves parameters alone")
SHARDED = ["--train.sharding", "fsdp"]


def ranks(storage, tmp_path, name, *options, world=2):
    """The processes of a job as torchrun starts them, and their logs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    logs = [tmp_path / f"{name}-{rank}" for rank in range(world)]
    return [forked.start(["train", *SMALL, "--root", storage.root, "--name", name, *options], log, RANK=str(rank), LOCAL_RANK=str(rank),
                         WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=port) for rank, log in enumerate(logs)], logs


def done(processes, logs):
    for child, log in zip(processes, logs):
        child.join(400)
        assert child.exitcode == 0, log.read_text()[-3000:]


@new
@pytest.mark.parametrize("file, options", [(BASELINE, ()), (GRADED, ()),
                                           (METHOD, ("--hsw.site", "residual", "--thermostat.gamma_max", 0.9))],
                         ids=["plain", "graded", "residual"])
def test_two_processes_that_share_the_base_are_one_with_two_micro_batches_bitwise(world, graded_folder, tmp_path, file, options):
    """(g0 + g1) / 2 either way; sensor, loop and hooks included. The checkpoint goes on in one process that holds all."""
    storage, make_config = world
    name = f"sharded-{options[0] if options else file[8:14]}".replace("--hsw.", "")
    one = run_training(make_config(file, "--name", f"{name}-one", "--train.accumulation", 2, *options), storage)
    done(*ranks(storage, tmp_path, f"{name}-two", "--config", file, *options, *SHARDED))
    two = storage.run_folder(f"{name}-two")
    assert final_adapter(two) == final_adapter(one)
    longer = ["--train.accumulation", 2, "--train.steps", 8, "--train.resume", True, *options]
    again = [run_training(make_config(file, "--name", f"{name}-{which}", *longer, *(SHARDED if which == "two" else [])), storage)
             for which in ("one", "two")]
    assert final_adapter(again[0]) == final_adapter(again[1])


def test_a_base_that_was_shared_is_given_back():
    linear = torch.nn.Linear(2, 2)
    kept, averaged = weakref.ref(linear), Averaged(linear, SimpleNamespace(world=1))
    del linear, averaged
    gc.collect()
    assert kept() is None


def test_a_base_to_be_shared_is_loaded_in_the_type_of_the_devices_it_goes_to(world):
    storage, make_config = world
    config = make_config(BASELINE, *SHARDED, "--backbone.dtype", "float16")
    loaded = load_base(config, storage, SimpleNamespace(device=torch.device("cuda"), world=2))
    assert loaded.dtype == torch.float16 and {p.device.type for p in loaded.parameters()} == {"cpu"}
    with pytest.raises(ValueError, match="float16: not on a CPU"):
        load_base(config, storage, SimpleNamespace(device=torch.device("cpu"), world=2))


@new
def test_no_process_holds_the_whole_base():
    code = ("import sys, torch; from vlakeep.core.parallel import Distributed; from vlakeep.core.config import LoraConfig; "
            "from vlakeep.models.load import make_backbone; from vlakeep.models.adapters import add_lora\n"
            "with Distributed('cpu') as job:\n"
            "    b = make_backbone('tabletop-base'); add_lora(b, LoraConfig(rank=4, layers='last:2'), 0)\n"
            "    whole = sum(p.numel() for p in b.parameters() if not p.requires_grad); b.shard(job)\n"
            "    own = sum(p.to_local().numel() for p in b.parameters() if not p.requires_grad)\n"
            "    assert all(type(p.data) is torch.Tensor for p in b.parameters() if p.requires_grad)\n"
            "    print('HOLDS', own, whole)\n")
    run = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python",
                          sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    rows = [tuple(map(int, line.split()[1:])) for line in run.stdout.splitlines() if line.startswith("HOLDS")]
    assert len(rows) == 2 and sum(own for own, _ in rows) == rows[0][1] and max(own for own, _ in rows) < 0.6 * rows[0][1]


@new
def test_a_killed_rank_ends_the_job_and_one_process_goes_on_bitwise(world, graded_folder, tmp_path):
    storage, make_config = world
    common = ["--train.steps", 12]
    whole = run_training(make_config(GRADED, "--name", "sharded-whole", "--train.accumulation", 2, *common), storage)
    folder = storage.run_folder("sharded-killed")
    processes, logs = ranks(storage, tmp_path, "sharded-killed", "--config", GRADED, *map(str, common), *SHARDED)
    deadline = time.monotonic() + 300
    while all(p.is_alive() for p in processes) and not (folder.is_dir() and latest_intact(folder)) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(processes[1].pid, signal.SIGKILL)
    processes[0].join(120)
    assert processes[0].exitcode not in (0, None), logs[0].read_text()[-2000:]
    again = run_training(make_config(GRADED, "--name", "sharded-killed", "--train.accumulation", 2, "--train.resume", True, *common),
                         storage)
    assert final_adapter(again) == final_adapter(whole)


def test_an_old_torch_is_told_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr(fsdp, "fully_shard", lambda module, *, mesh=None: module, raising=False)
    with pytest.raises(ValueError, match="--train.sharding fsdp: .*2.7 or newer; use --train.sharding none"):
        refuse_sharding("fsdp", 2)
    refuse_sharding("fsdp", 1)
    refuse_sharding("none", 2)
