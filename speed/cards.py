"""Several cards against one, and the narrow types against float32, on the tabletop; a step of 7B shapes on one card and on two.

    python speed/cards.py --tokenizer DIR --out FILE [--ranks 2,4,8] [--parts scaling,prepare,equal,killed,spread,types] [--scaled float16]
        [--tiny]
    python speed/cards.py --table FILE

    types      method graded in float32, bfloat16, float16 and NF4, some seeds each: new skill, old skills, divergence, skipped steps; and
               in each type the method with everything off is plain LoRA to the bit, and a run that is continued is the one that was not
    equal      DistributedDataParallel and FSDP2 on each number of cards against one card with as many micro-batches, plain and both sites
    killed     one of all ranks is killed; how the job ends, and the run continued on half of the cards and on one
    spread     the offline step and an evaluation over all cards against one card: are the files the same
    scaling    7B shapes, random weights: seconds of a step and memory, one card, several with DDP, with FSDP2, in float16 within 15 GiB and
               without flash kernels as on a V100; the rate of an all-reduce, and what a step sends by count

Runs go side by side, spread over the cards; every figure is a line of JSON in FILE as soon as it is there. On two cards a sum has one
order, so that runs are equal to the bit; on more NCCL adds in another. --tiny: on a CPU, a few steps.
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
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
        powers = [2**i for i in range(1, 9) if 2**i <= max(2, self.cards)]
        self.ranks = [int(one) for one in args.ranks.split(",")] if args.ranks else powers
        self.most = max(self.ranks)
        small = ["--probe.size", "40"]
        one = [*small, "--threads", "1"]
        self.few: dict = {} if self.gpu else {"tabletop-data": small, "offline": one, "evaluate": one,
                                              "train": [*one, "--train.batch_size", "4"]}
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
        ones = {arm: pool.submit(bench.train, f"one-{arm}", [*words, "--train.accumulation", bench.most], number)
                for number, (arm, words) in enumerate(arms.items())}
        for ranks in bench.ranks:
            for arm, words in arms.items():
                for word, extra in (("ddp", []), ("fsdp", ["--train.sharding", "fsdp"])):
                    def work(_, arm=arm, word=word, ranks=ranks, words=(*words, *extra, "--train.accumulation", bench.most // ranks)):
                        several = bench.train(f"{word}-{arm}-{ranks}", words, ranks=ranks)
                        bench.note("equal", arm=arm, on=word, ranks=ranks, **compared(ones[arm].result(), several))
                    pool.submit(guarded, bench, f"equal {arm} {word}", work, None)


def killed(bench) -> None:
    steps, each = (60, 10) if bench.gpu else (8, 2)
    words = [*ARMS["graded"], "--gains.name", "graded_float32", "--train.steps", steps, "--train.save_every", each, *bench.few_items]
    whole = bench.train("whole", [*words, "--train.accumulation", bench.most])
    process = bench.vlakeep(["train", *words, "--name", "killed", "--train.sharding", "fsdp"], ranks=bench.most, wait=False)
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
    half = bench.most // 2
    if half > 1:
        shutil.copytree(folder, bench.storage.run_folder("killed_half"))
        again = bench.train("killed_half", [*words, "--train.accumulation", 2, "--train.resume", "true"], ranks=half)
        bench.note("continued", cards=half, **compared(whole, again))
    again = bench.train("killed", [*words, "--train.accumulation", bench.most, "--train.resume", "true"])
    bench.note("continued", cards=1, **compared(whole, again))


def spread(bench) -> None:
    few = "10" if bench.gpu else "2"
    ask = ["evaluate", "--config", "baseline_lora", "--evaluate.target", "base", "--evaluate.episodes", few,
           "--evaluate.questions_per_kind", few, "--evaluate.retention_frames", few]
    for ranks in (0, bench.most):
        begin, name = time.perf_counter(), f"spread{ranks}"
        bench.vlakeep(["offline", "--config", "method_graded", "--gains.name", name], ranks=ranks)
        middle = time.perf_counter()
        said = bench.vlakeep([*ask, "--as", name], ranks=ranks)
        folder = Path(next(line for line in said.splitlines() if line.startswith("wrote ")).partition("wrote ")[2])
        made = {file.name: hashlib.sha256(file.read_bytes()).hexdigest()[:16]
                for file in sorted(bench.storage.artifact_folder(name).glob("*.safetensors"))}
        rows = hashlib.sha256("\n".join(sorted((folder / "records.jsonl").read_text().splitlines())).encode()).hexdigest()[:16]
        bench.note("spread", cards=max(1, ranks), artefact=made, records=rows, offline_seconds=middle - begin,
                   evaluate_seconds=time.perf_counter() - middle)


def scaling(bench) -> None:
    for ranks in bench.ranks:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), __file__, "--worker",
                   "--tokenizer", bench.args.tokenizer, "--out", bench.args.out, "--root", bench.args.root,
                   "--scaled", bench.args.scaled, *(["--tiny"] if bench.args.tiny else [])]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600)
        if done.returncode:
            said = [line for line in done.stdout.splitlines() if not line.startswith("RESULT")]
            bench.note("scaling", ranks=ranks, error="\n".join(said)[-3000:])


def reduced(job, size: int = 2**28, rounds: int = 5) -> float:
    """Bytes a second and card of an all-reduce: what each sends, 2 (N - 1) / N of it."""
    flat = torch.zeros(size // 4 if job.device.type == "cuda" else 2**16, device=job.device)
    for number in range(rounds + 2):
        if number == 2:
            begin = wait(job.device)
        dist.all_reduce(flat)
    return rounds * 2 * (job.world - 1) / job.world * flat.nbytes / (wait(job.device) - begin)


def wait(device) -> float:
    """The time when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def sent(backbone, mode: str, world: int) -> float:
    """Bytes that a card sends in a step: gradients of adapters; and of a shared base the layers, forward and, where adapted, backward."""
    adapters = sum(p.nbytes for p in backbone.parameters() if p.requires_grad)
    if mode != "fsdp":
        return 2 * (world - 1) / world * adapters if mode == "ddp" else 0.0
    layers = [sum(p.nbytes for p in layer.parameters() if not p.requires_grad) for layer in backbone.decoder_layers]
    return (world - 1) / world * (2 * adapters + sum(layers) + sum(layers[backbone.first_adapted_layer():]))


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
        rate = reduced(job)
        session.note("all-reduce", ranks=job.world, bytes_per_second=rate)
        for mode, dtype, size, gib in (("alone", "bfloat16", 16, 70.0), ("ddp", "bfloat16", 16, 22.5), ("fsdp", "bfloat16", 16, 22.5),
                                       ("fsdp", "float16", 8, 15.0), ("fsdp", "float16", 4, 15.0)):
            if dtype not in args.scaled.split(","):
                continue
            session.limit(gib)
            torch.backends.cuda.enable_flash_sdp(dtype != "float16")  # a V100 has no flash kernels
            try:
                scale(session, job, mode, dtype, size, rate)
            except torch.OutOfMemoryError as error:  # in all ranks alike
                session.note("scaling", mode=mode, dtype=dtype, ranks=job.world, samples=size * job.world, error=str(error)[:500])
    return 0


def scale(session, job, mode: str, dtype: str, size: int, rate: float) -> None:
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
    loaded, wire = time.perf_counter() - begin, sent(backbone, mode, job.world)
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
        session.note("scaling", mode=mode, arm=name, dtype=dtype, ranks=world, seconds=seconds, samples=size * world, loading=loaded,
                     sent_gib=wire / 2**30, sent_floor=wire / rate,
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
                                    for work in (equal, killed, spread, types)]]


def table(file: Path) -> str:
    """What the lines of a file say of `scaling`, efficiency against one card of the same run, and of `equal` and `killed`."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    scaled = [row for row in rows if row.get("stage") == "scaling" and "error" not in row]
    alone: dict = {}
    lines = [f"{'cards':>5} {'mode':6} {'type':9} {'arm':9} {'s a step':>9} {'samples/s':>10} {'efficiency':>10} {'reserved GiB':>12} "
             f"{'sent GiB':>9} {'its floor s':>11}"]
    for row in scaled:
        each = row["samples_per_second"] / row["ranks"]
        if row["mode"] == "alone":  # measured again beside each number of cards
            alone[row["arm"]] = each
        part = f"{each / alone[row['arm']]:.3f}" if row["dtype"] == "bfloat16" and row["arm"] in alone else ""
        lines.append(f"{row['ranks']:5d} {row['mode']:6} {row['dtype']:9} {row['arm']:9} {row['seconds']:9.4f} "
                     f"{row['samples_per_second']:10.1f} {part:>10} {row.get('reserved_gib', 0.0):12.2f} {row['sent_gib']:9.3f} "
                     f"{row['sent_floor']:11.4f}")
    told = [row for row in rows if row.get("part") in ("equal", "killed", "continued", "spread", "laws", "types") or "error" in row]
    return "\n".join([*lines, *map(json.dumps, told)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer")
    parser.add_argument("--out")
    parser.add_argument("--ranks", default="", help="numbers of processes; without it 2, 4, 8 as far as there are cards")
    parser.add_argument("--table", type=Path, help="print what a FILE of an earlier run says")
    parser.add_argument("--root", default=str(pick_root(quiet=True)))
    parser.add_argument("--parts", default="scaling,prepare,together")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--scaled", default="bfloat16,float16", help="types that `scaling` runs")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)  # a rank of `scaling`
    args = parser.parse_args()
    if args.table:
        print(table(args.table))
        return 0
    if not args.tokenizer or not args.out:
        parser.error("--tokenizer and --out are needed, or --table")
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
