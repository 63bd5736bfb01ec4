"""Time of a step under vlakeep.protect over plain LoRA's: plain loop, DistributedDataParallel, Accelerate, transformers' Trainer.

    python speed/protect_loops.py [--steps 30] [--repeats 3] [--batch 8] [--tokens 64]

One small Llama with random weights, one set of batches, one start. Each loop trains both arms in turn, so that a noisy machine
disturbs them alike; seconds are those of this thread's processor time on a CPU. Beside each figure stands what it is measured
against: a step's arithmetic floor at the rate of a large product here, the plain arm, and for results the plain loop's adapter.
"""

import argparse
import itertools
import os
import statistics
import sys
import tempfile
import time

import torch
import torch.distributed as dist
from torch import nn

from vlakeep.core.compat import import_timm
from vlakeep.protect import Probe, ProtectCallback, measure, protect

import_timm()  # transformers imports torchvision, which must be mended first beside a CPU build of torch
from peft import LoraConfig, get_peft_model  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments  # noqa: E402

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, RATE, TARGET = 16, 1e-3, 1e-2


def texts(count: int, batch: int, tokens: int, seed: int, low: int, high: int):
    """Batches of token ids; ids from low to high, so that old and new texts have other words."""
    ids = torch.randint(low, high, (count, batch, tokens), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[..., 0] = -100  # nothing predicts it, and the Trainer divides by the number of labels
    return [{"input_ids": one, "attention_mask": torch.ones_like(one), "labels": own} for one, own in zip(ids, labels)]


def fresh(hidden: int, layers: int):
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(vocab_size=2048, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
                                        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64))
    torch.manual_seed(1)
    return get_peft_model(base, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=LINEARS))


def optimizer_of(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0, foreach=False)


class Clock:
    """Seconds of every step; `begin` and `end` stand around it."""

    def __init__(self):
        self.seconds = []

    def begin(self):
        self._at = time.thread_time()

    def end(self):
        self.seconds.append(time.thread_time() - self._at)


def by_hand(model, handle, batches, clock, wrap=lambda model: model):
    """The twenty-line loop; DistributedDataParallel is the same with another `wrap`."""
    optimizer, wrapped = optimizer_of(model), wrap(model.train())
    for batch in batches:
        clock.begin()
        wrapped(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if handle:
            handle.step()
        clock.end()


def distributed(model, handle, batches, clock):
    by_hand(model, handle, batches, clock, nn.parallel.DistributedDataParallel)


def accelerated(model, handle, batches, clock):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    wrapped, optimizer = accelerator.prepare(model.train(), optimizer_of(model))
    for batch in batches:
        clock.begin()
        accelerator.backward(wrapped(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()
        if handle:
            handle.step()
        clock.end()


class Around(TrainerCallback):
    def __init__(self, clock):
        self._clock = clock

    def on_step_begin(self, *args, **more):
        self._clock.begin()

    def on_step_end(self, *args, **more):
        self._clock.end()


class InOrder(Trainer):
    """transformers' Trainer with the batches of the other loops, in their order."""

    def get_train_dataloader(self):
        return torch.utils.data.DataLoader(self.train_dataset, batch_size=None)


def in_trainer(model, callback, batches, clock):
    """Here `callback` is the ProtectCallback or None: what it calls is what the other loops call by hand."""
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(folder, max_steps=len(batches), per_device_train_batch_size=len(batches[0]["input_ids"]), report_to=[],
                                 learning_rate=RATE, lr_scheduler_type="constant", max_grad_norm=0.0, weight_decay=0.0, save_strategy="no",
                                 optim="adamw_torch", use_cpu=True, disable_tqdm=True, logging_strategy="no")
        InOrder(model, args, train_dataset=batches, callbacks=[*filter(None, [callback]), Around(clock)]).train()


LOOPS = {"plain loop": by_hand, "DistributedDataParallel, one process": distributed, "Accelerate": accelerated,
         "transformers' Trainer": in_trainer}


def train(loop, protected: bool, args, bases, held, batches, clock) -> dict:
    """One arm of one loop; its LoRA weights."""
    model, options = fresh(args.hidden, args.layers), dict(target=TARGET, every=args.every)
    torch.manual_seed(2)
    if loop is in_trainer:
        loop(model, ProtectCallback(bases, probe=Probe(held), **options) if protected else None, batches, clock)
    else:
        handle = protect(model, bases, probe=Probe(held), **options) if protected else None
        loop(model, handle, batches, clock)
        if handle:
            handle.merge()
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


def floor_seconds(args, bases) -> tuple:
    """(of a plain step, of what protection adds to it): multiply-adds at the rate of a large product, forward and backward."""
    a, seconds = torch.randn(1024, 1024), []
    for _ in range(6):
        begin = time.thread_time()
        a @ a
        seconds.append(time.thread_time() - begin)
    rate = 2 * 1024 ** 3 / statistics.median(seconds[1:])
    base = fresh(args.hidden, args.layers)
    frozen = sum(p.numel() for name, p in base.named_parameters() if p.dim() == 2 and not p.requires_grad and "embed" not in name)
    lora = sum(p.numel() for p in base.parameters() if p.requires_grad)
    # Frozen weights: output and the gradient of the input. LoRA: its own gradient too. Gains: A M [R, D] x [D, D] and back.
    gains = sum(4 * RANK * len(bases.spectra[key].vectors) ** 2 for key in bases.inputs.values())
    return args.batch * args.tokens * (4 * frozen + 6 * lora) / rate, gains / rate


def main(argv) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=3, help="of each arm of each loop")
    parser.add_argument("--every", type=int, default=10, help="steps between two measurements")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # so that this thread's time is all of it
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    old, held = (texts(4, args.batch, args.tokens, seed, 0, 1024) for seed in (1, 2))
    batches = list(itertools.islice(itertools.cycle(texts(8, args.batch, args.tokens, 3, 1024, 2048)), args.steps))
    bases = measure(fresh(args.hidden, args.layers), old)
    floor, gains = floor_seconds(args, bases)
    print(f"{args.layers} layers, {args.hidden} wide, {args.batch} x {args.tokens} tokens, LoRA {RANK} on all linears, {args.steps} steps, "
          f"{args.repeats} repeats; a probe of {4 * args.batch} texts every {args.every} steps")
    print(f"arithmetic floor of a plain step {floor * 1e3:.1f} ms, of the gains {gains * 1e3:.2f} ms: {1 + gains / floor:.3f} times\n")
    print("| loop | plain, ms | over its floor | protected, ms | protected over plain | with measurements | largest difference from the "
          "plain loop's adapter |\n|---|---|---|---|---|---|---|")
    wanted: dict = {}
    for name, loop in LOOPS.items():
        clocks, off = {False: Clock(), True: Clock()}, 0.0
        for _, protected in itertools.product(range(args.repeats), (False, True)):
            found = train(loop, protected, args, bases, held, batches, clocks[protected])
            reference = wanted.setdefault(protected, found)
            off = max(off, max(float((found[key] - value).abs().max()) for key, value in reference.items()))
        plain, kept = (statistics.median(clocks[protected].seconds) for protected in (False, True))
        means = [statistics.mean(clocks[protected].seconds) for protected in (False, True)]
        print(f"| {name} | {plain * 1e3:.1f} | {plain / floor:.2f} | {kept * 1e3:.1f} | {kept / plain:.3f} | {means[1] / means[0]:.3f} | "
              f"{'none, to the bit' if off == 0 else f'{off:.1e}'} |", flush=True)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
