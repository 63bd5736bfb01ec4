"""Stage `vlakeep train`: fine-tune LoRA adapters on new skills with the Method that the configuration names.

    vlakeep train --config configs/baseline_lora.yaml
    torchrun --nproc-per-node 8 -m vlakeep.cli train --config configs/method_icsm_hsw_thermostat.yaml

reads:  base checkpoint, data_root_dir/<data.datasets>, for the method also probe_root_dir/<probe.name> and its artefact
        with train.from_run the adapter of an earlier run's newest intact checkpoint (models/chain.py)
writes: run_root_dir/<name>/ (rundir.py lists the files)
"""

import math
import signal
import sys
import threading
import time
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

import torch
import yaml
from torch.nn.utils import parametrize
from tqdm import tqdm

from vlakeep.core import checkpoint as ckpt
from vlakeep.core.base_models import model_name
from vlakeep.core.compat import EIGHT_BIT, import_bitsandbytes
from vlakeep.core.config import Config, to_dict
from vlakeep.core.errors import CheckpointError, Interrupted, TrainingStopped, explain
from vlakeep.core.log import log
from vlakeep.core.loss_scale import LossScaler
from vlakeep.core.options import read
from vlakeep.core.parallel import Distributed, process_settings
from vlakeep.core.registry import method_class
from vlakeep.core.rundir import RunDir, RunLock
from vlakeep.core.sharded import whole_tree
from vlakeep.core.signals import NUMBERS, StopVote
from vlakeep.core.stages import TRAIN
from vlakeep.core.storage import Storage, find_checkpoint, need_free
from vlakeep.data import bad
from vlakeep.data.card import keep, lines, refuse
from vlakeep.data.loader import make_stream
from vlakeep.data.statistics import save_statistics
from vlakeep.models.adapters import adapter_state, add_lora, load_trainable, save_adapter, trainable_state
from vlakeep.models.alarms import check_vision
from vlakeep.models.chain import chain_of_run, keep_chain, merge_chain
from vlakeep.models.lean import autocast
from vlakeep.models.load import make_backbone, model_class
from vlakeep.models.look import look
from vlakeep.models.sharded_base import refuse_sharding
from vlakeep.probe.probe_set import open_probe


def train_step(model, method, optimizer, scaler, batches, config, step: int, observe: bool) -> Dict[str, object]:
    """One optimizer step over `batches` micro-batches; the same for every arm. Returns metrics, tensors left on the device."""
    method.before_step(step, observe)
    optimizer.zero_grad(set_to_none=True)
    losses, penalties, correct, hidden_norm = [], [], 0, 0
    labelled: Any = 0
    for index, batch in enumerate(batches):
        last = index == len(batches) - 1
        # DDP averages in the last backward pass; before it gradients add up in each process by itself.
        with model.no_sync() if hasattr(model, "no_sync") and not last else nullcontext():
            # PEFT reads each LoRA weight several times in a forward pass; a parametrised one is looked up once.
            with autocast(config.autocast, batch.input_ids.device), parametrize.cached():
                out = model(batch)
            penalty = method.penalty()
            loss = out.loss if penalty is None else out.loss + penalty
            scaler.scale(loss / len(batches)).backward()
        losses.append(out.loss.detach())
        penalties += [] if penalty is None else [penalty.detach()]
        correct, labelled, hidden_norm = correct + out.correct, labelled + out.num_labelled, hidden_norm + out.last_hidden_norm
    # First, so that norm and clip are those of the gradient and not of the scaled one.
    scaler.unscale_(optimizer)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    # A clip of 0 clips nothing, and the norm is wanted all the same.
    norm = torch.nn.utils.clip_grad_norm_(params, config.clip if config.clip > 0 else math.inf)
    loss_scale = scaler.get_scale()  # that of this step's gradients; update may change it
    scaler.step(optimizer)
    scaler.update()
    metrics = method.after_step(step, loss_scale)
    if penalties:
        metrics["penalty"] = torch.stack(penalties).mean()
    return {"loss": torch.stack(losses).mean(), "accuracy": correct / labelled.clamp(min=1), "grad_norm": norm,
            "hidden_norm": hidden_norm / len(batches), **metrics}


def on_device(batch, device: torch.device):
    """A batch on the device. From memory that is not pinned the host would wait until the GPU has done all that it was given before."""
    return batch.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else batch.to(device)


def learning_rate(step: int, config) -> float:
    """Learning rate of optimizer step 1, 2, ...: linear warm-up, then constant or cosine to a tenth."""
    if step <= config.warmup:
        return config.lr * step / config.warmup
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, progress))))


def schedule_note(old: dict, new: dict) -> str:
    """A line for a run that goes on towards another end of its cosine; empty for all others. Both are configurations as dictionaries."""
    was, now = old.get("train", {}).get("steps"), new["train"]["steps"]
    if new["train"]["schedule"] != "cosine" or was in (None, now):
        return ""
    return (f"note: --train.steps was {was} and is {now} now: with --train.schedule cosine the learning rates from here on are those of "
            f"{now} steps, so the result is neither a run of {was} steps that went on nor one of {now} from the start")


def make_optimizer(params, config):
    if config.optimizer == "sgd":
        return torch.optim.SGD(params, lr=config.lr, weight_decay=config.weight_decay)
    if config.optimizer in EIGHT_BIT:
        bitsandbytes = import_bitsandbytes(f"--train.optimizer {config.optimizer}", "--train.optimizer adamw")
        return getattr(bitsandbytes.optim, EIGHT_BIT[config.optimizer])(params, lr=config.lr, weight_decay=config.weight_decay)
    # On a GPU one kernel in place of a dozen. It writes weights without raising their version (hsw/graded.py counts steps for that).
    fused = bool(params) and all(p.device.type == "cuda" for p in params)
    return torch.optim.AdamW(params, lr=config.lr, weight_decay=config.weight_decay, **({"fused": True} if fused else {}))


class Guard:
    """Stops a run that has gone wrong: non-finite loss, penalty or gradient, or hidden states that blow up. Reads only logged values."""

    def __init__(self, factor: float, config: Config):
        """`factor`: how much the hidden norm of the first logged step may grow; `config` decides which remedies are named."""
        self._factor = factor
        self._first: Optional[float] = None
        self._calmer = method_class(config.method).calmer(config)

    def check(self, step: int, row: Dict[str, float], scaler, kept: str) -> None:
        for key in ("loss", "penalty", "grad_norm"):
            # With loss scaling an overflowing gradient is part of the procedure: that update is skipped and the scale is halved.
            skipped = key == "grad_norm" and scaler.is_enabled() and scaler.get_scale() >= 1.0
            if not math.isfinite(row.get(key, 0.0)) and not skipped:
                remedy = "Lower --train.lr, keep --train.clip 1.0, or use --backbone.dtype float32"
                if step == 1:
                    remedy = ("No update has been made yet, so the base weights are damaged (fetch them again) or too narrow "
                              "(use --backbone.dtype float32)")
                raise TrainingStopped(f"{key} is {row[key]} at step {step}; {kept}. {remedy}")
        if self._first is None:
            self._first = row["hidden_norm"]
        if not row["hidden_norm"] <= self._factor * self._first:
            raise TrainingStopped(
                f"hidden states blew up: mean norm {row['hidden_norm']:.3g} at step {step}, {row['hidden_norm'] / self._first:.1f} times "
                f"its value at the first step; {kept}. {self._calmer}")

    def state_dict(self) -> dict:
        return {"first": self._first}

    def load_state_dict(self, state: dict) -> None:
        self._first = state["first"]


def run_training(config: Config, storage: Storage) -> Path:
    """Train, and return the run folder. Raises TrainingStopped after saving nothing but keeping the last good checkpoint, and
    Interrupted after a signal, with the step's checkpoint saved.

    May be called again and again in one process, and outside its main thread, where signals are not its business; not twice at a time
    (ValueError). What is the process's is put back at the end: signal handlers, CPU threads, random states, process group, CUDA device.
    """
    with Distributed(config.device) as dist, process_settings(config.threads, config.seed, dist.device):
        refuse_early(config, storage, dist)
        reports = look_early(config, storage, dist)
        resumes = config.train.resume and bool(ckpt.list_checkpoints(storage.run_folder(config.name)))
        chain = chain_of_run(config, storage, resumes)
        backbone = load_base(config, storage, dist)
        merge_chain(backbone, chain)
        add_lora(backbone, config.lora, config.seed)
        if shares_base(config, dist):
            backbone.shard(dist)
        check_vision(backbone)  # the new adapters do nothing yet
        backbone.train()
        method, hashes = method_class(config.method).prepare(config, storage, backbone)
        if config.train.compile:
            backbone.compile_layers()
        # Before DDP and the optimizer, which take the list of parameters as it is then.
        method.attach(backbone)
        with closing(make_stream(config.data, storage.data, backbone.processor, config.train.batch_size, config.seed, dist.rank,
                                 dist.world, storage.cache, config.backbone.openvla_dir, backbone.norm_stats)) as stream:
            for line in stream.describe():
                say(dist, line)
            backbone.norm_stats = {**backbone.norm_stats, **stream.statistics}
            hashes.update(base_weights=backbone.weights_sha256, data=stream.fingerprints)
            if chain:
                hashes.update(original_base_weights=chain.base_weights, from_run={link.run: link.adapter_sha256 for link in chain.links})
            with RunDir.open(storage, config, dist, hashes) as run:
                if dist.is_main:
                    keep_chain(chain, run.folder)
                    bad.record({one.name: one.left_out for one in getattr(stream, "datasets", ())}, run.folder)
                    keep(reports, run.folder)
                _loop(config, dist, run, backbone, method, stream)
                method.detach()
        return run.folder


def shares_base(config: Config, dist: Distributed) -> bool:
    return config.train.sharding == "fsdp" and dist.world > 1


def load_base(config: Config, storage: Storage, dist: Distributed):
    """The base on this process's device, or in host memory where the processes will share it."""
    place = torch.device("cpu") if shares_base(config, dist) else dist.device
    return make_backbone(config.backbone, place, storage.cache, runs_on=dist.device)


def refuse_early(config: Config, storage: Storage, dist: Distributed) -> None:
    """Raise for what can be seen to be wrong without the model, before time goes into loading it."""
    if config.train.autocast == "float16" and dist.device.type == "cpu":
        raise ValueError("--train.autocast float16: not on a CPU; use --train.autocast none, or a GPU with --device cuda")
    if config.train.optimizer in EIGHT_BIT:
        if dist.device.type == "cpu":
            raise ValueError(f"--train.optimizer {config.train.optimizer}: not on a CPU; use --train.optimizer adamw")
        import_bitsandbytes(f"--train.optimizer {config.train.optimizer}", "--train.optimizer adamw")
    refuse_sharding(config.train.sharding, dist.world)
    run = RunDir(storage.run_folder(config.name), dist.is_main)
    run.refuse_as_cell_of_a_run(storage)
    if dist.is_main and run.folder.is_dir():
        lock = RunLock(run.folder)
        try:
            run.look(config)
            if config.train.resume and ckpt.list_checkpoints(run.folder):
                if note := schedule_note(yaml.safe_load((run.folder / "config.yaml").read_text()), to_dict(config)):
                    log.warning(f"{config.name}: {note}")
        finally:
            lock.release()


def look_early(config: Config, storage: Storage, dist: Distributed) -> List[Dict[str, Any]]:
    """The reports of the data, printed. Raises once for all that is wrong with them, and with what else this run needs when they are."""
    wrong: List[Exception] = []
    reports: List[Dict[str, Any]] = []
    base, method = None, method_class(config.method)
    try:
        base = find_checkpoint(config.backbone.checkpoint, storage.cache)
        if config.train.compile:
            model_class(base).refuse_compiling()
    except (FileNotFoundError, ValueError) as error:
        wrong.append(error)
    try:
        reports = look(config, storage)
        for line in [line for report in reports for line in lines(report)]:
            say(dist, line)
        refuse(reports)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        wrong.append(error)
    if wrong and method.needs_offline(config):  # else its `prepare` looks
        try:
            open_probe(config, storage)
            if base is not None and not config.train.from_run:
                found = method.artifact_problems(config, method.artifact_folder(config, storage, model_name(base)), None, None, None)
                wrong += [ValueError(problem) for problem in found]
        except (OSError, ValueError, KeyError) as error:
            wrong.append(error)
    if len(wrong) > 1:
        raise ValueError("\n".join(map(explain, wrong)))
    for one in wrong:
        raise one
    return reports


def _loop(config: Config, dist: Distributed, run: RunDir, backbone, method, stream) -> None:
    model = backbone.parallelised(dist)
    settings = config.train
    params = [p for p in backbone.parameters() if p.requires_grad]
    optimizer = make_optimizer(params, settings)
    # Also without autocast: gradients through float16 weights are float16.
    scaler = LossScaler(enabled="float16" in (settings.autocast, config.backbone.dtype))
    guard = Guard(settings.blowup_factor, config)
    first = 1
    parts = {"scaler": scaler, "method": method, "guard": guard, "stream": stream}
    if dist.is_main:  # weights, their copy in the adapter, two moments of Adam; an old checkpoint goes only after the new one
        copies = max(1, settings.keep_last + 1 - len(ckpt.list_checkpoints(run.folder)))
        need_free(run.folder, copies * 16 * sum(p.numel() for p in params), "the checkpoints of this run")
    # A resumed run has its calibration in its state, and its rows in the log.
    if run.resume_from is None:
        for row in method.before_training():
            run.log(0, row)
    else:
        first = _restore(run.resume_from, backbone, optimizer, parts) + 1
        run.truncate_metrics(first - 1)
    if first > settings.steps:
        say(dist, f"{config.name}: already at step {first - 1} of {settings.steps}; to go on, raise --train.steps")
        return
    say(dist, f"{config.name}: {config.method}, {sum(p.numel() for p in params):,} trainable parameters, global batch "
              f"{settings.batch_size * settings.accumulation * dist.world}, steps {first} to {settings.steps}")
    saved = first - 1 if first > 1 else None
    seconds = time.perf_counter()
    vote = StopVote(dist.world)
    bar = tqdm(total=settings.steps, initial=first - 1, desc=config.name, disable=not dist.is_main, mininterval=1.0)
    with signals_noted() as noted, bar as progress:
        for step in range(first, settings.steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, settings)
            observe = step % settings.log_every == 0 or step == settings.steps
            batches = [on_device(next(stream), dist.device) for _ in range(settings.accumulation)]
            metrics = train_step(model, method, optimizer, scaler, batches, settings, step, observe)
            if observe or method.logs(step):
                row = dist.mean_metrics(metrics)
                row["grad_norm_clipped"] = min(row["grad_norm"], settings.clip) if settings.clip > 0 else row["grad_norm"]
                row.update(lr=optimizer.param_groups[0]["lr"], seconds=(time.perf_counter() - seconds), **scaler.log())
                run.log(step, row)
                kept = f"the checkpoint of step {saved} is kept" if saved else "no checkpoint had been saved yet"
                guard.check(step, row, scaler, kept)
                progress.set_postfix(loss=f"{row['loss']:.3f}", refresh=False)
            progress.update()
            stopping = vote.ask(noted["signal"])
            if step % settings.save_every == 0 or step == settings.steps or stopping:
                _save(run, step, settings.keep_last, dist, backbone, optimizer, parts)
                saved = step
            if stopping:
                vote.last()
                run.interrupted()
                progress.close()  # the line below must not end up beside the bar
                said = f"stopped by a signal after step {step}; go on with --train.resume true"
                say(dist, said)
                raise Interrupted(said, 128 + stopping)
        vote.last()


def _save(run: RunDir, step: int, keep_last: int, dist: Distributed, backbone, optimizer, parts) -> None:
    # Every process has to come here, also those that write nothing: of sharded weights each has a piece (core/sharded.py).
    ranks = dist.gather({"rng": ckpt.rng_state(dist.device), "stream": parts["stream"].state_dict()})
    trainable, adapter, moments = trainable_state(backbone), adapter_state(backbone), whole_tree(optimizer.state_dict())
    state = {name: part.state_dict() for name, part in parts.items() if name != "stream"}
    if dist.is_main:
        tensors, optimizer_state = ckpt.split_optimizer(moments)
        state.update(step=step, optimizer=optimizer_state, ranks=ranks, base_weights=backbone.weights_sha256)
        ckpt.save_checkpoint(run.folder, step, {"trainable": trainable, "optimizer": tensors}, state,
                             lambda folder: _write_adapter(backbone, folder / "adapter", adapter, parts["stream"].statistics), keep_last)
    dist.barrier()


def _write_adapter(backbone, folder: Path, adapter: dict, statistics: dict) -> None:
    """The adapter in PEFT format, and the action statistics without which its actions mean nothing."""
    save_adapter(backbone, folder, adapter)
    save_statistics(folder / "dataset_statistics.json", statistics)


def _restore(folder: Path, backbone, optimizer, parts) -> int:
    """Load a checkpoint into everything that has state; returns its step."""
    tensors, state = ckpt.load_checkpoint(folder)
    ckpt.check_base(folder, state, backbone.weights_sha256)
    if "trainable" not in tensors:
        raise CheckpointError(f"{folder} holds a closed adapter and nothing to train it further with: go on with the run that was closed")
    load_trainable(backbone, tensors["trainable"])
    ckpt.join_optimizer(optimizer, tensors["optimizer"], state["optimizer"])
    ranks = state["ranks"]
    mine = ranks[Distributed.current().rank % len(ranks)]  # the data position is the same for all; a run may go on with more processes
    for name, part in parts.items():
        part.load_state_dict(mine["stream"] if name == "stream" else state[name])
    ckpt.set_rng_state(mine["rng"])
    return state["step"]


@contextmanager
def signals_noted() -> Iterator[dict]:
    """Within the block SIGTERM and SIGUSR1 (what schedulers send) are only noted, the first of them, under "signal": the loop looks at the
    end of a step.

    After it the handlers of before are back, and get a signal that came after the loop's last look. Outside the main thread Python
    has no handlers to give, so nothing is noted there.
    """
    noted = {"signal": None}

    def note(number, frame):
        noted["signal"] = noted["signal"] or number  # torchrun may add one of its own

    mine = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, note) for number in NUMBERS} if mine else {}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not made by Python, which cannot put it back
    if noted["signal"] is not None:
        signal.raise_signal(noted["signal"])


def say(dist: Distributed, text: str) -> None:
    if dist.is_main:
        log.info(text)


def main(argv: List[str]) -> int:
    _, config = read(TRAIN, argv)
    run_training(config, Storage.from_config(config))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
