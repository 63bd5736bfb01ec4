"""Several cards against one, and the narrow types against float32, on the tabletop; a step of 7B shapes on one card and on two.

    python speed/two_cards.py --tokenizer DIR --out FILE [--parts scaling,prepare,equal,killed,types] [--tiny]

    types      method graded in float32, bfloat16, float16 and NF4, some seeds each: new skill, old skills, divergence, skipped steps; and
               in each type the method with everything off is plain LoRA to the bit, and a run that is continued is the one that was not
    equal      DistributedDataParallel and FSDP2 on two cards against one card with twice the micro-batches, plain and both sites of surgery
    killed     one of two ranks is killed; how the job ends, and the run continued on one card
    scaling    7B shapes, random weights: seconds of a step and memory, one card, two with DDP, two with FSDP2 (in float16 too)

Runs go side by side, half on each card; every figure is a line of JSON in FILE as soon as it is there. --tiny: on a CPU, a few steps.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file

from vlakeep.core.checkpoint import latest_intact
from vlakeep.core.storage import Storage, pick_root

TYPES = {"float32": [], "bfloat16": ["--backbone.dtype", "bfloat16"], "float16": ["--backbone.dtype", "float16"],
         "nf4": ["--backbone.dtype", "bfloat16", "--backbone.quantisation", "nf4"]}
AUTOCAST = {kind: ["--train.autocast", options[1]] if options else [] for kind, options in TYPES.items()}  # read by training alone
ARMS = {"plain": ["--config", "baseline_lora"], "graded": ["--config", "method_graded", "--thermostat.batch_size", "32"],
        "residual": ["--config", "method_icsm_hsw_thermostat", "--hsw.site", "residual", "--thermostat.gamma_max", "0.8",
                     "--thermostat.every", "5"]}


class Bench:
    def __init__(self, args):
        self.args, self.gpu, self.started = args, torch.cuda.is_available(), time.perf_counter()
        self.cards = torch.cuda.device_count() if self.gpu else 1
        small = ["--probe.size", "40"]
        one = [*small, "--threads", "1"]
        self.few = {} if self.gpu else {"tabletop-data": small, "offline": one, "evaluate": one, "train": [*one, "--train.batch_size", "4"]}
        self.storage = Storage(Path(args.root))

    def note(self, part: str, **figures) -> None:
        line = json.dumps({"part": part, **figures, "at": round(time.perf_counter() - self.started, 1)})
        print(f"RESULT {line}", flush=True)
        with open(self.args.out, "a") as file:
            file.write(line + "\n")

    def vlakeep(self, words, card=0, ranks=0, wait=True):
        """Run the command line on one card, or on several with torchrun."""
        start = [sys.executable, "-m", "vlakeep.cli"] if not ranks else [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m", "vlakeep.cli"]
        environ = {**os.environ, "OMP_NUM_THREADS": "2"}
        if self.gpu and not ranks:
            environ["CUDA_VISIBLE_DEVICES"] = str(card % self.cards)
        words = [*words, "--root", self.args.root, *self.few.get(words[0], [])]
        process = subprocess.Popen([*start, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                   env=environ)
        if not wait:
            return process
        said = process.communicate()[0]
        if process.returncode:
            raise RuntimeError(f"{' '.join(map(str, words))}: exit status {process.returncode}\n{said[-1500:]}")
        return said

    def train(self, name, words, card=0, ranks=0):
        self.vlakeep(["train", *words, "--name", name], card, ranks)
        return self.storage.run_folder(name)


def adapter(folder):
    return load_file(str(latest_intact(folder) / "adapter" / "adapter_model.safetensors"))


def compared(one, other) -> dict:
    """How far two runs' adapters are apart, relative to their size, and the losses of the last step."""
    a, b = adapter(one), adapter(other)
    size = sum(float(value.double().square().sum()) for value in a.values()) ** 0.5
    gap = sum(float((a[key].double() - b[key].double()).square().sum()) for key in a) ** 0.5
    rows = [json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1]) for folder in (one, other)]
    return {"relative_gap": gap / size, "bitwise": all(torch.equal(a[key], b[key]) for key in a), "loss": [row["loss"] for row in rows],
            **{key: [row[key] for row in rows] for key in ("g_norm", "kl", "d", "opening", "gamma") if all(key in row for row in rows)}}


def prepare(bench) -> None:
    bench.vlakeep(["tabletop-data", "--config", "method_graded"])
    jobs = [["offline", "--config", "method_graded", *options, "--gains.name", f"graded_{name}"] for name, options in bench.types.items()]
    jobs.append(["offline", "--config", "method_icsm_hsw_thermostat", *bench.icsm])
    with ThreadPoolExecutor(len(jobs) if bench.gpu else 1) as pool:
        list(pool.map(lambda pair: bench.vlakeep(pair[1], pair[0]), enumerate(jobs)))
    bench.note("prepared")


def types(bench) -> None:
    seeds, steps = (range(7, 7 + bench.args.seeds), 300) if bench.gpu else ([7], 4)
    few = "25" if bench.gpu else "2"

    def one(job):
        number, (kind, seed) = job
        name, options = f"{kind}-{seed}", bench.types[kind]
        begin = time.perf_counter()
        run = bench.train(name, ["--config", "method_graded", *options, *AUTOCAST[kind], "--seed", seed, "--gains.name", f"graded_{kind}",
                                 "--train.steps", steps, *bench.few_items], number)
        seconds = time.perf_counter() - begin
        said = bench.vlakeep(["evaluate", "--config", "method_graded", *options, "--evaluate.target", name, "--evaluate.episodes", few,
                              "--evaluate.questions_per_kind", few, "--evaluate.retention_frames", few], number)
        folder = Path(said.strip().splitlines()[-1].partition("wrote ")[2])
        found, last = json.loads((folder / "summary.json").read_text()), json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
        old = [value["mean"] for value in found["abilities"].values()]
        bench.note("types", kind=kind, seed=seed, new=found["new_skill"]["mean"], old=sum(old) / len(old), worst=min(old),
                   retention_kl=found["retention_kl"]["mean"], kl=last.get("settled_kl"), opening=last.get("settled_opening"),
                   skipped=last.get("skipped_steps"), loss=last["loss"], seconds=seconds)

    def law(job):
        number, kind = job
        options = [*bench.types[kind], *AUTOCAST[kind], "--train.warmup", 2, "--train.save_every", 3, "--train.schedule", "constant",
                   *bench.few_items]
        plain = bench.train(f"law-plain-{kind}", ["--config", "baseline_lora", *options, "--train.steps", 6], number)
        off = bench.train(f"law-off-{kind}", ["--config", "method_graded", "--gains.enabled", "false", "--thermostat.enabled", "false",
                                              *options, "--train.steps", 6], number)
        graded = ["--config", "method_graded", "--gains.name", f"graded_{kind}", *options]
        whole = bench.train(f"law-whole-{kind}", [*graded, "--train.steps", 6], number)
        again = bench.train(f"law-again-{kind}", [*graded, "--train.steps", 3], number)
        bench.train(f"law-again-{kind}", [*graded, "--train.steps", 6, "--train.resume", "true"], number)
        # The run of three steps settled its gains at its end, as a run of six does at its own; what goes on has the loop's own again.
        bench.note("laws", kind=kind, off_is_plain_bitwise=compared(plain, off)["bitwise"], resumed=compared(whole, again))

    jobs = [(kind, seed) for seed in seeds for kind in bench.types]
    with ThreadPoolExecutor(16 if bench.gpu else 1) as pool:
        waiting = [pool.submit(guarded, bench, "types", one, job) for job in enumerate(jobs)]
        waiting += [pool.submit(guarded, bench, "laws", law, job) for job in enumerate(bench.types)]
        [each.result() for each in waiting]


def guarded(bench, part, work, job):
    try:
        work(job)
    except Exception as error:
        bench.note(part, job=str(job), error=f"{type(error).__name__}: {error}"[-900:])


def equal(bench) -> None:
    steps = ["--train.steps", 20 if bench.gpu else 3, "--train.warmup", 5, *bench.few_items]
    arms = {arm: [*words, *steps, *(["--gains.name", "graded_float32"] if arm == "graded" else bench.icsm if arm == "residual" else [])]
            for arm, words in ARMS.items()}
    with ThreadPoolExecutor(9 if bench.gpu else 1) as pool:
        ones = {arm: pool.submit(bench.train, f"one-{arm}", [*words, "--train.accumulation", 2], number)
                for number, (arm, words) in enumerate(arms.items())}
        for arm, words in arms.items():
            for word, extra in (("ddp", []), ("fsdp", ["--train.sharding", "fsdp"])):
                def work(_, arm=arm, word=word, words=(*words, *extra)):
                    two = bench.train(f"{word}-{arm}", words, ranks=2)
                    bench.note("equal", arm=arm, on=word, **compared(ones[arm].result(), two))
                pool.submit(guarded, bench, f"equal {arm} {word}", work, None)


def killed(bench) -> None:
    steps, each = (60, 10) if bench.gpu else (8, 2)
    words = [*ARMS["graded"], "--gains.name", "graded_float32", "--train.steps", steps, "--train.save_every", each, *bench.few_items]
    whole = bench.train("whole", [*words, "--train.accumulation", 2])
    process = bench.vlakeep(["train", *words, "--name", "killed", "--train.sharding", "fsdp"], ranks=2, wait=False)
    folder, deadline = bench.storage.run_folder("killed"), time.monotonic() + 120
    while process.poll() is None and not (folder.is_dir() and latest_intact(folder)) and time.monotonic() < deadline:
        time.sleep(0.05)
    ranks = [int(pid) for pid in subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()]
    os.kill(ranks[-1], signal.SIGKILL)
    begin = time.perf_counter()
    said = process.communicate(timeout=150)[0]
    lines = [line[-300:] for line in said.splitlines() if "xitcode" in line or "ignal" in line]
    bench.note("killed", ranks=len(ranks), exit_status=process.returncode, seconds_to_end=time.perf_counter() - begin,
               kept=latest_intact(folder).name, said=lines[-4:])
    again = bench.train("killed", [*words, "--train.accumulation", 2, "--train.resume", "true"])
    bench.note("continued on one card", **compared(whole, again))


def scaling(bench) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__, "--worker",
               "--tokenizer", bench.args.tokenizer, "--out", bench.args.out, "--root", bench.args.root,
               *(["--tiny"] if bench.args.tiny else [])]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=230)
    if done.returncode:
        said = [line for line in done.stdout.splitlines() if not line.startswith("RESULT")]
        bench.note("scaling", error="\n".join(said)[-3000:])


def worker(args) -> int:
    """One rank of `scaling`: plain LoRA and the residual site at 7B shapes, each rank by itself, with DDP, and with a shared base."""
    from random_7b import in_memory
    from seven_b import Session

    from vlakeep.core.parallel import Distributed
    from vlakeep.data.writer import write_rlds
    from vlakeep.tabletop import benchmark as tabletop

    with Distributed() as job:
        args.root, args.out = f"{args.root}/rank{job.rank}", args.out if job.is_main else None
        session = Session(args)
        session.device = job.device
        in_memory(session.base, Path(args.tokenizer), job.device, 32, args.tiny)
        write_rlds(Storage(Path(args.root)).data, "tabletop_corner",
                   tabletop.collect_demos("corner", 12, seed=1 + job.rank, noise=0.2), overwrite=True)
        for mode, dtype, size, gib in (("alone", "bfloat16", 16, 70.0), ("ddp", "bfloat16", 16, 70.0), ("fsdp", "bfloat16", 16, 70.0),
                                       ("fsdp", "float16", 8, 15.0), ("fsdp", "float16", 4, 15.0)):
            session.limit(gib)
            try:
                scale(session, job, mode, dtype, size)
            except torch.OutOfMemoryError as error:  # in both ranks alike
                session.note("scaling", mode=mode, dtype=dtype, samples=size * job.world, error=str(error)[:500])
    return 0


def scale(session, job, mode: str, dtype: str, size: int) -> None:
    from sites import Placed, residual_site

    from vlakeep.core.loss_scale import LossScaler
    from vlakeep.methods.base import Method
    from vlakeep.models.adapters import add_lora
    from vlakeep.models.load import make_backbone
    from vlakeep.train import make_optimizer, train_step

    config = session.config("--method", "baseline", *(["--backbone.dtype", dtype, "--train.autocast", dtype] if session.gpu else []))
    session.fresh()
    begin, counted, losses = time.perf_counter(), [], []
    backbone = make_backbone(config.backbone, "cpu" if mode == "fsdp" else job.device, session.base.parent, runs_on=job.device)
    add_lora(backbone, config.lora, config.seed)
    if mode == "fsdp":
        backbone.shard(job)
    backbone.train()
    loaded = time.perf_counter() - begin
    model = backbone if mode == "alone" else backbone.parallelised(job)
    batch = session.batches(config, backbone, size, 1)
    for name, method in (("plain", Method()), ("residual", Placed(residual_site))):
        method.attach(backbone)
        counted.clear()
        if name == "residual":
            count_calls(method._site.meter, counted)
        optimizer = make_optimizer([p for p in backbone.parameters() if p.requires_grad], config.train)
        scaler, count = LossScaler(dtype == "float16" and session.gpu), 10 if session.gpu else 2
        run = partial(train_step, model, method, optimizer, scaler, batch, config.train, observe=False)
        for step in range(3):
            run(step)
        session.wait()
        session.fresh()
        begin = time.perf_counter()
        for step in range(count):
            losses.append(run(step)["loss"])
        session.wait()
        seconds, world = (time.perf_counter() - begin) / count, 1 if mode == "alone" else job.world
        session.note("scaling", mode=mode, arm=name, dtype=dtype, seconds=seconds, samples=size * world, loading=loaded,
                     samples_per_second=size * world / seconds, hooks_a_step=len(counted) / (count + 3), skipped=scaler.skipped,
                     last_loss=float(losses[-1]), **session.peaks())
        method.detach()


def count_calls(meter, calls: list) -> None:
    """Note every call of the hooks, which hand their gradients to this meter."""
    add = meter.add

    def counting(*given, **named):
        calls.append(1)
        add(*given, **named)

    meter.add = counting


def together(bench) -> None:
    """Everything whose time does not matter, side by side."""
    with ThreadPoolExecutor(3 if bench.gpu else 1) as pool:
        [each.result() for each in [pool.submit(guarded, bench, work.__name__, lambda _, work=work: work(bench), None)
                                    for work in (equal, killed, types)]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--root", default=str(pick_root(quiet=True)))
    parser.add_argument("--parts", default="scaling,prepare,together")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)  # a rank of `scaling`
    args = parser.parse_args()
    if args.worker:
        return worker(args)
    bench = Bench(args)
    bench.types = TYPES if bench.gpu else {"float32": []}
    bench.icsm = [] if bench.gpu else ["--icsm.rank", "24", "--icsm.sensitivity_items", "4"]
    bench.few_items = [] if bench.gpu else ["--thermostat.batch_size", "6", "--thermostat.calibration", "2"]
    for part in args.parts.split(","):
        guarded(bench, part, lambda _, part=part: globals()[part](bench), None)
    bench.note("done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
