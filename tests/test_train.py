"""The training loop beside its laws: signals, files and threads that it opens, what its guard sees and says."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch
from conftest import BASELINE, METHOD, SMALL

from vlakeep import train
from vlakeep.core.errors import Interrupted, TrainingStopped
from vlakeep.core.loss_scale import LossScaler
from vlakeep.core.rundir import read_metrics
from vlakeep.data.sample import Sample
from vlakeep.methods.baseline import Baseline
from vlakeep.models.adapters import add_lora
from vlakeep.models.load import make_backbone
from vlakeep.openvla.prompts import encode_prompts
from vlakeep.train import run_training, train_step

REPOSITORY = Path(__file__).parent.parent
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
SHORT = ("--train.steps", 2, "--train.tensorboard", False)


def handlers():
    return [signal.getsignal(number) for number in SIGNALS]


class Penalised(Baseline):
    """A baseline whose penalty is `values[step]`, else 0.25."""

    def __init__(self, values):
        self._values, self._step = values, 0

    def before_step(self, step, observe):
        self._step = step

    def penalty(self):
        return torch.tensor(self._values.get(self._step, 0.25))


def plant(monkeypatch, method):
    """What plain LoRA prepares is this."""
    monkeypatch.setattr(Baseline, "prepare", lambda config, storage, backbone: (method, {}))


# ---- signals ----


def test_the_handlers_of_before_come_back_after_training_and_after_an_error(world, monkeypatch):
    storage, make_config = world
    before = handlers()
    run_training(make_config(BASELINE, "--name", "train-handlers", *SHORT), storage)
    assert handlers() == before
    plant(monkeypatch, Penalised({1: float("nan")}))
    with pytest.raises(TrainingStopped):
        run_training(make_config(BASELINE, "--name", "train-handlers-error", *SHORT), storage)
    assert handlers() == before


def test_training_runs_in_a_thread(world):
    """Python gives signal handlers to the main thread only."""
    storage, make_config = world
    ended = []
    config = make_config(BASELINE, "--name", "train-thread", *SHORT)
    thread = threading.Thread(target=lambda: ended.append(run_training(config, storage)))
    thread.start()
    thread.join()
    assert ended == [storage.run_folder("train-thread")]


def test_a_signal_while_training_is_an_exception_with_the_exit_status(world, monkeypatch):
    storage, make_config = world

    class Signalled(Baseline):
        def after_step(self, step, loss_scale):
            if step == 2:
                os.kill(os.getpid(), signal.SIGUSR1)
            return {}

    plant(monkeypatch, Signalled())
    before = handlers()
    with pytest.raises(Interrupted) as caught:
        run_training(make_config(BASELINE, "--name", "train-signalled"), storage)
    assert caught.value.status == 128 + signal.SIGUSR1 and not isinstance(caught.value, SystemExit) and handlers() == before
    folder = storage.run_folder("train-signalled")
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_000002"]
    assert json.loads((folder / "provenance.json").read_text())["status"] == "interrupted"


def test_a_stage_after_training_ends_on_sigterm(world, tmp_path):
    """As `vlakeep demo` does: training and what follows it in one process."""
    storage, _ = world
    (tmp_path / "two_stages.py").write_text(
        "import time\nfrom vlakeep.core.config import load_config\nfrom vlakeep.core.storage import Storage\n"
        "from vlakeep.train import run_training\n\n\ndef main(argv):\n"
        "    config = load_config('configs/baseline_lora.yaml', argv)\n    run_training(config, Storage.from_config(config))\n"
        "    print('trained', flush=True)\n    time.sleep(60)\n    return 0\n")
    code = ("import sys; from vlakeep import cli; cli.STAGES['two'] = cli.Stage('two', 'two_stages', ''); "
            "sys.argv[0] = 'vlakeep'; sys.exit(cli.main())")
    arguments = [*SMALL, *map(str, SHORT), "--root", str(storage.root), "--name", "train-two-stages"]
    child = subprocess.Popen([sys.executable, "-c", code, "two", *arguments], cwd=REPOSITORY, stdout=subprocess.PIPE,
                             stderr=subprocess.DEVNULL, text=True,
                             env=dict(os.environ, PYTHONPATH=os.pathsep.join([str(REPOSITORY), str(tmp_path)])))
    try:
        assert any(line == "trained\n" for line in child.stdout)
        child.send_signal(signal.SIGTERM)
        assert child.wait(20) == 143
    finally:
        child.kill()
        child.stdout.close()
        child.wait()


def test_a_signal_to_the_run_script_reaches_the_trainer(world):
    storage, _ = world
    folder = storage.run_folder("train-script")
    arguments = [*SMALL, "--root", str(storage.root), "--name", "train-script", "--train.steps", "400", "--train.save_every", "1000"]
    environ = dict(os.environ, PATH=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    child = subprocess.Popen(["bash", "scripts/run_baseline_lora.sh", "--gpus", "1", *arguments], cwd=REPOSITORY, env=environ,
                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        while child.poll() is None and not ((folder / "metrics.jsonl").is_file() and len(read_metrics(folder)) >= 2):
            time.sleep(0.02)
        child.send_signal(signal.SIGTERM)
        assert child.wait(60) == 143
        assert len(list((folder / "checkpoints").iterdir())) == 1
        assert json.loads((folder / "provenance.json").read_text())["status"] == "interrupted"
    finally:
        try:
            os.killpg(child.pid, signal.SIGKILL)  # the trainer too, if the script has left it behind
        except ProcessLookupError:
            pass


# ---- what is opened is closed ----


def opened():
    """(paths of the data that this process has open, names of its decoding threads)."""
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found.append(os.readlink(entry))
        except OSError:
            continue
    return sorted(path for path in found if "datasets" in path), [t.name for t in threading.enumerate() if "decode" in t.name]


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts open files through /proc")
def test_threads_and_files_of_the_data_are_closed_also_after_an_error(world, monkeypatch):
    storage, make_config = world
    before = opened()
    kept = []  # what holds a stream alive must not keep its files open
    make_stream = train.make_stream
    monkeypatch.setattr(train, "make_stream", lambda *args: kept.append(make_stream(*args)) or kept[-1])
    run_training(make_config(BASELINE, "--name", "train-closed", "--data.workers", 2, *SHORT), storage)
    assert opened() == before
    plant(monkeypatch, Penalised({1: float("nan")}))
    with pytest.raises(TrainingStopped):
        run_training(make_config(BASELINE, "--name", "train-closed-error", "--data.workers", 2, *SHORT), storage)
    assert opened() == before and len(kept) == 2


def test_a_data_set_is_closed_by_its_block_and_by_nothing_else(world, monkeypatch):
    """No __del__: at the end of the interpreter it would call into modules that are gone."""
    from vlakeep.data.dataset import DemoDataset
    from vlakeep.data.formats import closing_all, open_datasets
    from vlakeep.data.rlds import RldsDataset
    storage, _ = world
    assert not hasattr(DemoDataset, "__del__")
    before = opened()
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        with closing_all(open_datasets(storage.data, ["tabletop_corner"])) as (data,):
            data.image(0, 0)
            assert opened() != before
        assert opened() == before
        with open_datasets(storage.data, ["tabletop_corner"])[0] as data:
            data.image(0, 0)
        assert opened() == before
    closed = []
    monkeypatch.setattr(RldsDataset, "close", lambda self: closed.append(self.name))
    with pytest.raises(FileNotFoundError):  # the first set is closed when the second cannot be opened
        open_datasets(storage.data, ["tabletop_corner", "none"])
    assert closed == ["tabletop_corner"]


# ---- what the guard sees ----


def test_a_penalty_is_logged_and_one_that_is_not_a_number_is_named(world, monkeypatch):
    storage, make_config = world
    plain = run_training(make_config(BASELINE, "--name", "train-no-penalty"), storage)
    assert all("penalty" not in row for row in read_metrics(plain))
    plant(monkeypatch, Penalised({5: float("nan")}))
    with pytest.raises(TrainingStopped, match="penalty is nan at step 5; the checkpoint of step 3 is kept"):
        run_training(make_config(BASELINE, "--name", "train-penalty"), storage)
    rows = read_metrics(storage.run_folder("train-penalty"))
    assert [row["penalty"] for row in rows] == [0.25] * 4 + [None] and rows[0]["loss"] == read_metrics(plain)[0]["loss"]


def test_a_batch_without_labels_has_no_accuracy_of_nan(world):
    storage, make_config = world
    config = make_config(BASELINE)
    backbone = make_backbone(config.backbone, "cpu", storage.cache)
    add_lora(backbone, config.lora, 0)
    optimizer = torch.optim.SGD([p for p in backbone.parameters() if p.requires_grad], lr=0.0)
    prompt = encode_prompts([Sample(torch.zeros(64, 64, 3, dtype=torch.uint8).numpy(), "reach the corner")], backbone.processor)
    metrics = train_step(backbone, Baseline(), optimizer, LossScaler(False), [prompt], config.train, 1, True)
    assert float(metrics["accuracy"]) == 0.0 and not torch.isfinite(metrics["loss"])


@pytest.mark.parametrize("arm, words, other", [
    ([BASELINE], "--train.lr", "gamma_min"),
    ([METHOD, "--hsw.site", "lora_input"], "--train.lr", "gamma_min"),
    ([METHOD, "--hsw.enabled", False], "--train.lr", "gamma_min"),
    ([METHOD, "--hsw.site", "both"], "--thermostat.gamma_min", "--train.lr"),
    ([METHOD], "--thermostat.gamma_min", "--train.lr"),
])
def test_the_remedy_for_a_blow_up_is_that_of_the_arm(world, arm, words, other):
    storage, make_config = world
    guard = train.Guard(20.0, make_config(*arm))
    row = {"loss": 1.0, "grad_norm": 1.0, "hidden_norm": 10.0}
    scaler = LossScaler(False)
    guard.check(1, row, scaler, "nothing is kept")
    with pytest.raises(TrainingStopped, match="hidden states blew up") as error:
        guard.check(2, dict(row, hidden_norm=300.0), scaler, "nothing is kept")
    assert words in str(error.value) and other not in str(error.value)


# ---- what a checkpoint takes ----


@pytest.mark.parametrize("changes", [(), ("--lora.layers", "last:2", "--lora.rank", 16, "--lora.modules", "[attention]"),
                                     ("--lora.modules", "[all-linear]"), ("--train.optimizer", "sgd", "--lora.rank", 8)])
def test_preflight_counts_the_bytes_of_a_checkpoint(world, changes):
    from vlakeep.checks import checkpoint_bytes
    from vlakeep.core.storage import find_checkpoint
    storage, make_config = world
    config = make_config(BASELINE, "--name", "train-size-" + "-".join(c.strip("[]") for c in map(str, changes[1::2])), *SHORT, *changes)
    model = json.loads((find_checkpoint("tabletop-base", storage.cache) / "config.json").read_text())
    step = run_training(config, storage) / "checkpoints" / "step_000002"
    size = sum(path.stat().st_size for path in step.rglob("*") if path.is_file())
    assert abs(checkpoint_bytes(config, model, storage.cache) - size) < 0.2 * size


@pytest.mark.parametrize("site, prefixes", [("residual", {""}), ("lora_input", {""}), ("both", {"", "lora_input/"})])
def test_each_site_logs_under_its_name_and_a_single_one_under_none(world, site, prefixes):
    storage, make_config = world
    config = make_config(METHOD, "--name", f"train-site-{site}", "--hsw.site", site, *SHORT)
    rows = [row for row in read_metrics(run_training(config, storage)) if row["step"]]
    for row in rows:
        assert {key.rpartition("g_norm")[0] for key in row if key.endswith("g_norm")} == prefixes
        assert ("leak" in row) == (site != "residual")
    if site == "both":  # each as it is alone
        same = make_config(METHOD, "--name", "train-site-alone", "--hsw.site", "lora_input", *SHORT)
        alone = [row for row in read_metrics(run_training(same, storage)) if row["step"]][0]
        assert rows[0]["lora_input/g_norm"] == pytest.approx(alone["g_norm"], rel=1e-5)
