"""A training that is counted in steps and done in pieces: it stops after a time, and the same call goes on where it stood.

Where a machine is there for a time only, the clock says how far the training is, and not the number of steps (Plan.end).

What a step draws follows from the seed and the step's number alone, so that no state of a random generator is kept: weights that are
trained, moments of AdamW and the number of steps are all of it (core/checkpoint.py: whole or not there). On a CPU pieces leave the weights
of one piece to the bit (a test).
"""

import math
import time
from typing import Any, Callable, Dict, List, NamedTuple, Optional

import torch
from tqdm import tqdm

from vlakeep.core.checkpoint import Tensors, latest_intact, load_checkpoint, save_checkpoint
from vlakeep.core.config import ConfigError
from vlakeep.openvla.pretraining import WARM_UP, Step, make_optimizer

SAVE_EVERY_S = 240.0  # what a kill may cost
_SEEDS = 10_000_000  # steps that have seeds of their own, below 2^32 in all: the CPU's generator looks at no more bits


class Plan(NamedTuple):
    """steps: of the whole training. settings: what must be the same in every piece, by the names of options. until: the time
    (time.perf_counter) at which this piece ends; None runs to the end. end: the time at which the training is done, however many steps
    that makes: the schedule follows the clock, and `steps` is not asked."""

    folder: Any  # where the state lies
    steps: Optional[int]
    batch: int
    lr: float
    seed: int
    settings: Dict[str, Any]
    until: Optional[float] = None
    end: Optional[float] = None


def rate(plan: Plan, step: int, at: float = 0.0) -> float:
    """Learning rate of step 0, 1, ...: linear warm-up, over 500 steps or a tenth of the training, times a cosine to nothing. at: the share
    of the training that is done, for a plan with an end."""
    if plan.steps is None:
        warm = max((step + 1) / WARM_UP, 10 * at)
    else:
        at, warm = step / plan.steps, (step + 1) / min(WARM_UP, max(1, plan.steps // 10))
    return plan.lr * min(1.0, warm) * 0.5 * (1 + math.cos(math.pi * at)) + 1e-6


def draw_by(seed: int, step: int, generator: torch.Generator) -> None:
    """From here on everything random follows from seed and step."""
    number = (seed * _SEEDS + step) % 2**32
    torch.manual_seed(number)
    generator.manual_seed(number)


def train_in_pieces(backbone, loss: Callable, make_batch: Callable, pick: Callable, generator: torch.Generator, plan: Plan,
                    notes: Callable[[], Dict[str, float]] = dict) -> Optional[Dict]:
    """Train what of `backbone` requires a gradient; facts for the provenance when the last step is done, None before.

    loss(make_batch(pick_B)): a LossOutput. pick(): the rows [B] of a step, drawn from `generator`. notes: what else goes into the curve.
    ConfigError when the state in plan.folder is of other settings, or when plan.end comes before a step is made.
    """
    device = backbone.device
    cuda = device.type == "cuda"
    weights = {name: p for name, p in backbone.named_parameters() if p.requires_grad}
    optimizer = make_optimizer(backbone, plan.lr, cuda)
    found = latest_intact(plan.folder)
    done, curve, seconds, before = 0, [], 0.0, 0.0
    if found is not None:
        tensors, state = load_checkpoint(found)
        _refuse_others(state["settings"], plan.settings, found)
        done, curve, seconds, before = state["step"], state["curve"], state["seconds"], state.get("progress", 0.0)
        put_back(weights, optimizer, tensors)
        print(f"goes on behind step {done} of {plan.steps or 'as many as the time allows'}")
    backbone.train()
    kept = state_of(weights, optimizer, copy=True)
    step = Step(loss, optimizer, make_batch, plan.batch, device)
    if cuda:  # it made steps to warm up
        put_back(weights, optimizer, kept)
    del kept
    begin, begun = time.perf_counter(), done
    saved = begin
    bar = tqdm(total=plan.steps, initial=done, desc="training", unit="step", mininterval=5.0)

    def keep() -> None:
        save_checkpoint(plan.folder, done, state_of(weights, optimizer), {
            "step": done, "settings": plan.settings, "curve": curve, "seconds": seconds + time.perf_counter() - begin,
            "progress": progress()}, keep_last=1)

    def progress() -> float:
        """Share of the training that is done."""
        if plan.steps is not None:
            return done / plan.steps
        left = plan.end - begin
        return min(1.0, before + (1 - before) * (time.perf_counter() - begin) / left) if left > 0 else 1.0

    def note() -> None:
        row = {"loss": step.out.loss.item(), "accuracy": (step.out.correct / step.out.num_labelled).item(), **notes()}
        curve.append([done, *(round(value, 4) for value in row.values())])
        bar.set_postfix({name: round(value, 4) for name, value in row.items()})

    while (at := progress()) < 1:
        draw_by(plan.seed, done, generator)
        step(pick(), rate(plan, done, at))
        done += 1
        if done % 20 == 0 and cuda:
            torch.cuda.synchronize()  # the clock decides, so the queue must not run far ahead of it
        if done % 100 == 0:
            note()
        bar.update()
        now = time.perf_counter()
        ends = plan.until is not None and now >= plan.until
        if (ends or now - saved > SAVE_EVERY_S) and progress() < 1:
            keep()
            saved = now
            if ends:
                break
    else:
        if done == begun and plan.steps is None:  # what is there was left by a piece that meant to go on, at whatever rate
            raise ConfigError(f"the time was over before the first step{f' behind {done}' if done else ''}: give --done_after more")
        if not curve or curve[-1][0] < done:
            note()
    bar.close()
    backbone.eval()
    if progress() < 1:
        return None
    return {"steps": done, "seconds": round(seconds + time.perf_counter() - begin), "final": curve[-1], "curve": curve[::10]}


def state_of(weights: Dict[str, torch.Tensor], optimizer, copy: bool = False) -> Dict[str, Tensors]:
    """The trained weights and AdamW's state of each, by the weights' names."""
    def taken(tensor):
        return tensor.detach().clone() if copy else tensor.detach()

    moments = {f"{name}:{key}": taken(value) for name, p in weights.items() for key, value in optimizer.state.get(p, {}).items()}
    return {"weights": {name: taken(p) for name, p in weights.items()}, "moments": moments}


@torch.no_grad()
def put_back(weights: Dict[str, torch.Tensor], optimizer, tensors: Dict[str, Tensors]) -> None:
    """state_of into the same tensors, whose places a captured graph knows; moments that are not in it are zero. ConfigError when it is of
    other weights."""
    odd = sorted(weights.keys() ^ tensors["weights"].keys())
    if odd:
        raise ConfigError(f"the state of the training is of another model ({len(odd)} weights differ, first {odd[0]}): train anew with "
                          "another --out")
    for name, p in weights.items():
        p.copy_(tensors["weights"][name])
        for value in optimizer.state.get(p, {}).values():
            value.zero_()
    for where, value in tensors["moments"].items():
        name, _, key = where.rpartition(":")
        there = optimizer.state[weights[name]]
        if key in there:
            there[key].copy_(value)
        else:
            # A step is counted on the CPU where nothing is captured.
            there[key] = value.clone() if value.ndim == 0 and not weights[name].is_cuda else value.to(weights[name].device, copy=True)


def _refuse_others(was: Dict[str, Any], now: Dict[str, Any], folder) -> None:
    other: List[str] = [f"{name} {now.get(name)} (was {was.get(name)})" for name in sorted({*was, *now}) if was.get(name) != now.get(name)]
    if other:
        raise ConfigError(f"{folder} is the state of a training with other settings: {', '.join(other)}. Give those, or another --out")
