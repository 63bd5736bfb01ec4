"""Run folders: one run each, resumed only with the same configuration; provenance and metrics survive whatever ends the run."""

import errno
import json
import math
import os
import signal
import subprocess
import sys

import forked
import pytest
import torch
import yaml
from test_storage import file_size_limit, names

from vlakeep.core import locks
from vlakeep.core.checkpoint import save_checkpoint
from vlakeep.core.config import Config
from vlakeep.core.errors import DiskFull, RunDirError
from vlakeep.core.parallel import Distributed
from vlakeep.core.rundir import RunDir, config_differences, read_metrics
from vlakeep.core.storage import Storage


@pytest.fixture
def storage(tmp_path):
    return Storage.from_config(Config(root=str(tmp_path / "root")))


def make(name="a", resume=False, **train):
    config = Config(name=name)
    config.train.tensorboard = False
    config.train.resume = resume
    for key, value in train.items():
        setattr(config.train, key, value)
    return config


def provenance(run):
    return json.loads((run.folder / "provenance.json").read_text())


def short_run(storage, config, steps, save_at=()):
    with RunDir.open(storage, config, hashes={"base": "abc"}) as run:
        for step in range(1, steps + 1):
            run.log(step, {"loss": 1.0 / step})
            if step in save_at:
                save_checkpoint(run.folder, step, {}, {"step": step})
    return run


def test_files_and_provenance(storage):
    run = short_run(storage, make(), 3)
    assert {"config.yaml", "provenance.json", "metrics.jsonl", "run.lock"} <= set(names(run.folder))
    assert yaml.safe_load((run.folder / "config.yaml").read_text())["train"]["steps"] == 1000
    record = provenance(run)
    session = record["sessions"][0]
    assert record["status"] == session["status"] == "finished"
    assert session["hashes"] == {"base": "abc"} and session["argv"] == sys.argv and session["world"] == 1
    assert session["versions"]["torch"] == torch.__version__ and session["versions"]["python"].startswith("3.")
    assert session["end"] >= session["start"] and session["hardware"]["cores"] == os.cpu_count()


def test_dirty_diff_is_kept(storage, monkeypatch, tmp_path):
    code = tmp_path / "code" / "vlakeep"
    code.mkdir(parents=True)
    (code / "x.py").write_text("one\n")
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@t", "-C", str(code.parent)]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "m"]):
        subprocess.run([*git, *arguments], check=True)
    (code / "x.py").write_text("two\n")
    (code / "new.py").write_text("")
    monkeypatch.setattr("vlakeep.core.provenance.PACKAGE", code)
    run = short_run(storage, make(), 1)
    source = provenance(run)["sessions"][0]["source"]
    assert (
        len(source["commit"]) == 40
        and source["dirty"]
        and source["untracked"] == ["vlakeep/new.py"]
        and len(source["diff_sha256"]) == 64
    )
    assert "-one\n+two\n" in (run.folder / "dirty.diff").read_text()


def test_a_folder_holds_one_run(storage):
    short_run(storage, make(), 2)
    with pytest.raises(RunDirError, match="already holds a run .status: finished.*--train.resume true.*--name"):
        RunDir.open(storage, make())
    (storage.runs / "b").mkdir()
    (storage.runs / "b" / "thesis.tex").write_text("")
    with pytest.raises(RunDirError, match="something else .thesis.tex"):
        RunDir.open(storage, make("b"))
    assert names(storage.runs / "b") == ["run.lock", "thesis.tex"]


def test_a_session_that_logged_nothing_does_not_block_the_name(storage):
    with pytest.raises(ZeroDivisionError):
        with RunDir.open(storage, make()):
            raise ZeroDivisionError
    assert [s["status"] for s in provenance(short_run(storage, make(), 1))["sessions"]] == ["failed", "finished"]


def test_two_processes_cannot_share_a_folder_and_a_stale_lock_is_recognised(storage):
    code = (
        "import sys; from vlakeep.core.config import Config; from vlakeep.core.storage import Storage\n"
        "from vlakeep.core.rundir import RunDir\n"
        "c = Config(name='a', root=sys.argv[1]); c.train.tensorboard = False; r = RunDir.open(Storage.from_config(c), c);"
        "r.log(1, {'loss': 1.0}); print('open', flush=True); sys.stdin.read()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(storage.root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "open\n"
    with pytest.raises(RunDirError, match=f"in use by another process .pid {child.pid} on "):
        RunDir.open(storage, make(resume=True))
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert "pid" in (storage.runs / "a" / "run.lock").read_text()  # stale, and no obstacle
    with pytest.raises(RunDirError, match="status: running"):
        RunDir.open(storage, make())
    run = short_run(storage, make(resume=True), 1)
    assert [s["status"] for s in provenance(run)["sessions"]] == ["interrupted", "finished"]


def test_a_refused_session_releases_the_lock(storage):
    short_run(storage, make(), 2, save_at=[1])
    with pytest.raises(RunDirError, match="lr"):
        RunDir.open(storage, make(resume=True, lr=1.0))
    short_run(storage, make(resume=True), 2)


def test_resume_refuses_a_changed_configuration_and_lists_the_keys(storage):
    short_run(storage, make(), 2, save_at=[1])
    changed = make(resume=True, lr=0.5, steps=2000, save_every=7, log_every=2)
    changed.lora.rank = 3
    with pytest.raises(RunDirError) as caught:
        RunDir.open(storage, changed)
    lines = [line.strip() for line in str(caught.value).splitlines()]
    assert "lora.rank: 16 -> 3" in lines and "train.lr: 0.0005 -> 0.5" in lines
    assert not any(key in str(caught.value) for key in ("train.steps", "save_every", "log_every", "resume:"))
    changed.lora.rank, changed.train.lr = 16, 0.0005
    assert RunDir.open(storage, changed).resume_from.name == "step_000001"


def test_config_differences_sees_new_and_lost_keys():
    assert config_differences({"a": 1, "b": {"c": 2}}, {"b": {"c": 2, "d": 3}}) == ["a: 1 -> (not set)", "b.d: (not set) -> 3"]


def test_resume_truncates_metrics_to_the_newest_intact_checkpoint(storage, capsys):
    run = short_run(storage, make(), 9, save_at=[3, 6])
    (run.folder / "checkpoints" / "step_000006" / "state.json").write_text("{}")
    with open(run.metrics_path, "a") as file:
        file.write('{"step": 10, "lo')  # what a killed process leaves
    again = RunDir.open(storage, make(resume=True))
    assert again.resume_from.name == "step_000003"
    assert "step_000006" in capsys.readouterr().err
    again.log(4, {"loss": 0.5})
    again.close("finished")
    assert [row["step"] for row in read_metrics(run.folder)] == [1, 2, 3, 4]
    assert read_metrics(run.folder)[2]["loss"] == 1.0 / 3


def test_resume_without_a_checkpoint_starts_over(storage, capsys):
    short_run(storage, make(), 2)
    run = RunDir.open(storage, make(resume=True))
    assert run.resume_from is None and read_metrics(run.folder) == [] and "nothing to resume" in capsys.readouterr().err
    run.close("finished")


def test_metrics_are_valid_json_and_mark_what_is_not_finite(storage):
    with RunDir.open(storage, make()) as run:
        run.log(1, {"loss": float("nan"), "d": torch.tensor(math.inf), "beta": 1.0, "calibrating": True, "note": "x"})
        rows = run.metrics_path.read_text().splitlines()  # flushed while the run goes on
    assert json.loads(rows[0], parse_constant=lambda name: pytest.fail(name)) == {
        "step": 1,
        "loss": None,
        "d": None,
        "beta": 1.0,
        "calibrating": True,
        "note": "x",
        "nonfinite": ["loss", "d"],
    }


def test_damaged_metrics_name_the_line(storage):
    run = short_run(storage, make(), 3)
    lines = run.metrics_path.read_text().splitlines()
    run.metrics_path.write_text("\n".join([lines[0], "{", lines[2]]) + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl line 2"):
        read_metrics(run.folder)


def test_full_disk_while_logging_names_the_file(storage):
    with pytest.raises(DiskFull, match="metrics.jsonl"):
        with RunDir.open(storage, make()) as run:
            run.log(1, {"loss": 1.0})
            with file_size_limit(run.metrics_path.stat().st_size + 5):
                run.log(2, {"loss": 1.0})
    assert provenance(run)["status"] == "failed"
    assert [row["step"] for row in read_metrics(run.folder)] == [1]


@pytest.mark.parametrize(
    "error, status",
    [
        (RuntimeError("boom"), "failed"),
        (KeyboardInterrupt(), "interrupted"),
        (SystemExit(143), "interrupted"),
        (SystemExit(2), "failed"),
    ],
)
def test_status_tells_how_the_session_ended(storage, error, status):
    with pytest.raises(type(error)):
        with RunDir.open(storage, make()) as run:
            raise error
    session = provenance(run)["sessions"][-1]
    assert session["status"] == status and type(error).__name__ in session["traceback"]


def test_interrupted_by_hand_stays_interrupted(storage):
    with pytest.raises(SystemExit):
        with RunDir.open(storage, make()) as run:
            run.interrupted()
            raise SystemExit(0)
    assert provenance(run)["status"] == "interrupted"


def test_tensorboard_gets_the_numbers(storage):
    config = make()
    config.train.tensorboard = True
    run = short_run(storage, config, 3)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.folder / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3]


def test_processes_other_than_the_main_one_write_nothing(storage):
    dist = Distributed("cpu")
    dist.rank = 1
    run = RunDir.open(storage, make(), dist)
    run.log(1, {"loss": 1.0})
    run.truncate_metrics(0)
    run.close("finished")
    assert not run.folder.exists()


@pytest.mark.parametrize("number, taken", [(errno.EAGAIN, True), (errno.EACCES, True), (errno.ENOLCK, False), (errno.ENOSYS, False)])
def test_a_lock_that_another_has_is_told_from_a_disk_without_locks(tmp_path, monkeypatch, number, taken):
    def refuse(file, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    with open(tmp_path / "lock", "w") as file:
        if taken:
            with pytest.raises(BlockingIOError):
                locks.lock(file)
        else:
            assert locks.lock(file).errno == number


def _pair(root):
    config = Config(name="a", root=root)
    config.train.resume, config.train.tensorboard = True, False
    with Distributed("cpu", timeout_s=60) as dist, RunDir.open(Storage.from_config(config), config, dist) as run:
        gathered = dist.gather({"rank": dist.rank, "x": float("nan")})
        assert [g["rank"] for g in gathered] == [0, 1]
        assert dist.mean_metrics({"b": dist.rank, "a": 3.0}) == {"b": 0.5, "a": 3.0}
        assert dist.any(dist.rank == 1) and not dist.any(False)
        assert dist.broadcast(["from", dist.rank]) == ["from", 0]
        dist.barrier()
        assert run.resume_from.name == "step_000002"
        run.log(3, {"loss": 0.0})


def test_two_processes_open_one_run(storage):
    run = short_run(storage, make(), 3, save_at=[2])
    forked.two_ranks(_pair, str(storage.root))
    assert [row["step"] for row in read_metrics(run.folder)] == [1, 2, 3]
    assert provenance(run)["sessions"][-1]["world"] == 2
