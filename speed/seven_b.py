"""Memory and time at the shapes of OpenVLA-7B, with random weights, under a limit of GPU memory: each figure beside its floor.

    python speed/seven_b.py --tokenizer DIR [--stages floor,offline,arms] [--gib 22.5] [--out FILE] [--tiny]

DIR holds a Llama-2 tokenizer's files (scripts/fetch_llama2_tokenizer.py). A stage writes a line of JSON to FILE as soon as it has a figure,
and one that fails does not end the others. A time of a step is that of many without a wait between them. --tiny: small shapes, on a CPU.

    floor      time of a step's multiply-adds at the rate of a large product here       offline   the graded method's, after loading
    frozen     the offline step of configs/openvla_libero.yaml, after loading           loop      plain and graded of `arms`, 16 x 1
    arms       a step of each arm, 8 x 2 and 16 x 1; a measurement with its parts       compile   the same, compiled
    profile    where the time of a step goes                                            stream    the same step, fed by the data pipeline
    everywhere LoRA on all linears, PEFT's own layers beside ours, no limit             low       all decoder linears, checkpointing
    nf4        4-bit base                                                               fp16      200 steps
    generate   tokens a second                                                          plan      what `vlakeep plan` says of the same
"""

import argparse
import gc
import json
import statistics
import sys
import time
import traceback
from contextlib import closing
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from random_7b import in_memory
from sites import Placed, input_site, residual_site

from vlakeep.core.config import load_config
from vlakeep.core.hardware import CARDS, GIB
from vlakeep.core.loss_scale import LossScaler
from vlakeep.core.registry import method_class
from vlakeep.core.storage import Storage
from vlakeep.data.loader import make_stream
from vlakeep.data.sample import Episode
from vlakeep.data.writer import write_rlds
from vlakeep.methods.base import Method
from vlakeep.models import adapters
from vlakeep.models.adapters import add_lora
from vlakeep.models.graphs import GraphedAnswers
from vlakeep.models.load import make_backbone
from vlakeep.planning.predict import Planner, find_model
from vlakeep.probe.probe_set import write_probe
from vlakeep.tabletop import benchmark as tabletop
from vlakeep.train import make_optimizer, on_device, train_step

GRADED = "openvla_libero_graded"
DATA = "tabletop_corner"
PLAIN = ("--method", "baseline")
FEWER = (16, 32)  # items of a measurement, beside all
STAGES = ("floor", "offline", "frozen", "arms", "profile", "stream", "compile", "low", "nf4", "fp16", "generate", "everywhere", "plan")


class Session:
    """The machine, the folders, and the figures so far."""

    def __init__(self, args):
        self.args, self.device = args, torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.gpu = self.device.type == "cuda"
        self.base = Path(args.root) / "hf_cache" / "random-7b"
        self.started, self.rate, self.planned = time.perf_counter(), None, []
        self.limit(getattr(args, "gib", 70.0))

    def limit(self, gib: float) -> None:
        if self.gpu:
            torch.cuda.set_per_process_memory_fraction(min(1.0, gib * GIB / torch.cuda.get_device_properties(0).total_memory))

    def config(self, *options, file=GRADED):
        kind = [] if self.gpu else ["--backbone.dtype", "float32", "--train.autocast", "none", "--probe.size", "40",
                                    "--icsm.batch_size", "4", "--icsm.rank", "16"]
        return load_config(file, ["--root", self.args.root, "--backbone.checkpoint", str(self.base), "--data.datasets", f"[{DATA}]",
                                  "--probe.name", "tabletop", "--thermostat.batch_size", "64" if self.gpu else "4", *kind,
                                  *map(str, options)])

    def note(self, stage: str, **figures) -> None:
        figures = {key: round(value, 5) if isinstance(value, float) else value for key, value in figures.items()}
        line = json.dumps({"stage": stage, **figures, "at": round(time.perf_counter() - self.started, 1)})
        print(f"RESULT {line}", flush=True)
        if self.args.out:
            with open(self.args.out, "a") as file:
                file.write(line + "\n")

    def wait(self) -> None:
        if self.gpu:
            torch.cuda.synchronize()

    def fresh(self) -> None:
        """Give back what is cached, and count peaks from here."""
        gc.collect()
        if self.gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peaks(self) -> dict:
        if not self.gpu:
            return {}
        free, total = torch.cuda.mem_get_info()
        return {"allocated_gib": torch.cuda.max_memory_allocated() / GIB, "reserved_gib": torch.cuda.max_memory_reserved() / GIB,
                "driver_gib": (total - free) / GIB}

    def model(self, config, lora=True):
        backbone = make_backbone(config.backbone, self.device, Path(self.args.root) / "hf_cache")
        if lora:
            add_lora(backbone, config.lora, config.seed)
        return backbone.train() if lora else backbone

    def batches(self, config, backbone, size: int, count: int):
        storage = Storage.from_config(config)
        with closing(make_stream(config.data, storage.data, backbone.processor, size, 0, cache_dir=storage.cache)) as stream:
            return [on_device(next(stream), self.device) for _ in range(count)]

    def seconds(self, work, count: int = 5, warm: int = 2) -> float:
        found = []
        for _ in range(count + warm):
            self.wait()
            begin = time.perf_counter()
            work()
            self.wait()
            found.append(time.perf_counter() - begin)
        return statistics.median(found[warm:])


def steps(session, config, backbone, method, size: int, accumulation: int, count: int = 10, blocks: int = 3, feed=None) -> dict:
    """Median time of a step over blocks of `count`, and the peaks; `feed()` gives a micro-batch, or fixed ones are used again and again."""
    count, blocks = (count, blocks) if session.gpu else (2, 1)
    optimizer = make_optimizer([p for p in backbone.parameters() if p.requires_grad], config.train)
    scaler = LossScaler("float16" in (config.train.autocast, config.backbone.dtype))
    fixed = session.batches(config, backbone, size, accumulation) if feed is None else None

    def run(number: int) -> None:
        batches = fixed or [on_device(feed(), session.device) for _ in range(accumulation)]
        train_step(backbone, method, optimizer, scaler, batches, config.train, number * config.thermostat.every + 1, False)

    begun = time.perf_counter()
    for number in range(3):
        run(number)
    session.wait()
    warm = time.perf_counter() - begun
    session.fresh()
    found = []
    for _ in range(blocks):
        begin = time.perf_counter()
        for number in range(count):
            run(number)
        session.wait()
        found.append((time.perf_counter() - begin) / count)
    optimizer.zero_grad(set_to_none=True)
    return {"seconds": statistics.median(found), "spread": max(found) - min(found), "warm": warm, "micro": f"{size} x {accumulation}",
            **floors(session, config, backbone, size, accumulation), **session.peaks()}


def floors(session, config, backbone, size: int, accumulation: int) -> dict:
    """Least time of a step: multiply-adds of forward pass and of the gradient of activations at the measured rate."""
    if session.rate is None:
        return {}
    planner = Planner(config, find_model(config, Path(session.args.root) / "hf_cache"), CARDS["h100"])
    flops = planner.work.training_step(planner.adapters, planner.numbers, size).half * accumulation
    return {"floor": flops / session.rate, "samples": size * accumulation}


def graded_of(session, config, backbone):
    return method_class("graded").prepare(config, Storage.from_config(config), backbone)[0]


def measurement(session, config, method) -> dict:
    """Milliseconds of a measurement and its parts."""
    found = {name: 1e3 * session.seconds(sensor.measure, 5) for name, sensor in method._sensors.items() if sensor}
    sensor = method._sensors["kl"]
    whole, sensor._weights_N = (sensor._count, sensor._measured, sensor._weights_N), None
    for items in FEWER:
        sensor._count = sensor._measured = min(items, whole[0])  # at a time as well: a slice of more would measure more
        found[f"kl_{items}"] = 1e3 * session.seconds(sensor.measure, 5)
        found[f"measurement_{items}"] = 1e3 * session.seconds(method._measure, 5)
    sensor._count, sensor._measured, sensor._weights_N = whole
    found["norms"] = 1e3 * session.seconds(method._where_it_learns, 3)
    found["measurement"] = 1e3 * session.seconds(method._measure, 5)
    return {**{f"{name}_ms": value for name, value in found.items()}, "items": len(method._sensors["kl"])}


def floor(session):
    side = 8192 if session.gpu else 512
    dtype = torch.bfloat16 if session.gpu else torch.float32
    a, b = (torch.randn(side, side, device=session.device, dtype=dtype) for _ in "ab")
    session.rate = 2 * side ** 3 / session.seconds(lambda: a @ b, 9, 3)
    device = torch.cuda.get_device_name() if session.gpu else "cpu"
    session.note("floor", teraflops=session.rate / 1e12, device=device, torch=torch.__version__, **session.peaks())


def offline(session, method="graded", file=GRADED):
    config = session.config("--method", method, file=file)
    backbone = session.model(config, lora=False)
    session.fresh()
    begin = time.perf_counter()
    method_class(method).offline(config, Storage.from_config(config), backbone)
    session.note(f"offline {method}, after loading", seconds=time.perf_counter() - begin, limit_gib=session.args.gib, **session.peaks())


def frozen(session):
    offline(session, "icsm_hsw_thermostat", "openvla_libero")


def loop(session):
    arms(session, sizes=((16, 1),), sites=False)


def arms(session, compiled=False, sizes=((8, 2), (16, 1)), sites=True):
    config = session.config()
    backbone = session.model(config)
    word = "compiled " if compiled else ""
    if compiled:
        backbone.compile_layers()
    plain = {}
    order = [("plain", lambda: Method()), ("graded", lambda: graded_of(session, config, backbone))]
    order += [] if not sites else [("residual", lambda: Placed(residual_site)), ("lora_input", lambda: Placed(input_site)),
                                  ("plain again", lambda: Method())]
    for name, make in order:
        try:
            session.fresh()
            method = make()
            method.attach(backbone)
            extra = measurement(session, config, method) if name == "graded" else {}
            for size, accumulation in sizes[:1] if name == "plain again" else sizes:
                session.limit(session.args.gib if size <= 8 else 70.0)
                row = steps(session, config, backbone, method, size, accumulation)
                plain.setdefault((size, accumulation), row["seconds"])
                row["ratio"] = row["seconds"] / plain[size, accumulation]
                if extra:
                    for end in ("", *(f"_{items}" for items in FEWER)):
                        looped = row["seconds"] + extra[f"measurement{end}_ms"] / 1e3 / 50
                        row[f"ratio_with_loop{end}"] = looped / plain[size, accumulation]
                session.note(f"step {word}{name}", **row, **extra)
                session.planned.append((f"step {word}{name}", session.config(*([] if name == "graded" else PLAIN)), size, accumulation,
                                        row))
        except Exception as error:
            session.note(f"step {word}{name}", error=f"{type(error).__name__}: {error}"[:500])
            traceback.print_exc()
        finally:
            method.detach()


def compile_stage(session):
    arms(session, True, ((16, 1), (8, 2)), sites=False)
    profile(session, True)


def profile(session, compiled=False):
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as recorded

    config = session.config()
    backbone, method = session.model(config), Method()
    if compiled:
        backbone.compile_layers()
    optimizer, scaler = make_optimizer([p for p in backbone.parameters() if p.requires_grad], config.train), LossScaler(False)
    size, accumulation = (16, 1) if compiled else (8, 2)
    fixed = session.batches(config, backbone, size, accumulation)

    def run():
        train_step(backbone, method, optimizer, scaler, fixed, config.train, 1, False)

    session.seconds(run, 1, 2)
    with recorded(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * session.gpu) as seen:
        run()
        session.wait()
    kernels = [event for event in seen.events() if str(event.device_type).endswith("CUDA")]
    rows = {}
    for event in kernels:
        total, count = rows.get(event.name, (0.0, 0))
        rows[event.name] = (total + event.time_range.elapsed_us(), count + 1)
    top = sorted(rows.items(), key=lambda row: -row[1][0])[:30]
    session.note(f"profile {'compiled ' if compiled else ''}plain {size} x {accumulation}", kernels=len(kernels),
                 busy_ms=sum(total for total, _ in rows.values()) / 1e3,
                 top=[[name[:90], round(total / 1e3, 2), count] for name, (total, count) in top])


def stream(session):
    """The plain step fed by the pipeline with augmentation: pictures of 256 x 256 as JPEG, as LIBERO's are."""
    config = session.config("--method", "baseline")
    storage, backbone = Storage.from_config(config), session.model(config)
    demos = [Episode(np.kron(one.images, np.ones((1, 4, 4, 1), dtype=np.uint8)), one.actions, one.language, one.state)
             for one in tabletop.collect_demos("corner", 12, seed=1, noise=0.2)]
    write_rlds(storage.data, "tabletop_pictures", demos, image_format="jpeg", overwrite=True)
    config.data.datasets = ["tabletop_pictures"]
    for workers, processes in ((4, False), (4, True), (8, True), (1, True), (14, True)):
        config.data.workers, config.data.processes = workers, processes
        with closing(make_stream(config.data, storage.data, backbone.processor, 8, 0, cache_dir=storage.cache)) as feed:
            for _ in range(2 * workers + 1):  # what was made ahead
                next(feed)
            begin, count = time.perf_counter(), 4 * workers if session.gpu else 3
            for _ in range(count):
                next(feed)
            alone = 8 * count / (time.perf_counter() - begin)
            row = {} if workers in (1, 14) else steps(session, config, backbone, Method(), 8, 2, 12 if session.gpu else 2, 2, feed.__next__)
        session.note("stream", workers=workers, processes=processes, samples_per_second_alone=alone, **row)


def recipe(session, name, config, size, accumulation, count=6, method=None):
    """One recipe from loading to peaks."""
    session.fresh()
    backbone = session.model(config)
    method = method or Method()
    row = steps(session, config, backbone, method, size, accumulation, count, 2)
    session.note(name, **row)
    session.planned.append((name, config, size, accumulation, row))
    return backbone


def low(session):
    """22.5 GiB: LoRA of rank 32 on all linears of the decoder, and on all linears, with checkpointing."""
    session.limit(22.5)
    for name, modules in (("decoder", "[attention, mlp]"), ("all linears", "[all-linear]")):
        for size in (2, 8) if session.gpu else (2,):
            config = session.config("--method", "baseline", "--lora.layers", "all", "--lora.modules", modules,
                                    "--backbone.gradient_checkpointing", "true", "--train.batch_size", size, "--train.accumulation", 1)
            said = f"{name}, checkpointing, batch {size}"
            attempt(session, said, recipe, session, said, config, size, 1)


def nf4(session):
    session.limit(15.0)
    config = session.config("--method", "baseline", "--backbone.quantisation", "nf4")
    attempt(session, "nf4", recipe, session, "nf4, last eight layers", config, 8, 2)
    config = session.config("--method", "baseline", "--backbone.quantisation", "nf4", "--lora.layers", "all",
                            "--backbone.gradient_checkpointing", "true")
    attempt(session, "nf4", recipe, session, "nf4, decoder, checkpointing, batch 8", config, 8, 1)
    session.limit(session.args.gib)


def fp16(session):
    """A run of 200 steps in float16 with the graded method."""
    options = ["--backbone.dtype", "float16", "--train.autocast", "float16"] if session.gpu else []
    config = session.config("--method", "graded", *options, "--thermostat.enabled", "false", "--gains.opening", "0.01")
    backbone = session.model(config)
    plain = session.config("--method", "graded")
    plain.thermostat.enabled, plain.gains.opening = False, 0.01
    method = graded_of(session, plain, backbone) if session.gpu else graded_of(session, config, backbone)  # the artefact is of bfloat16
    method.attach(backbone)
    optimizer = make_optimizer([p for p in backbone.parameters() if p.requires_grad], config.train)
    scaler, losses = LossScaler(session.gpu), []
    pool = session.batches(config, backbone, 4, 8)
    for group in optimizer.param_groups:
        group["lr"] = 1e-4
    session.fresh()
    begin = time.perf_counter()
    for step in range(1, (200 if session.gpu else 4) + 1):
        losses.append(train_step(backbone, method, optimizer, scaler, [pool[step % len(pool)]], config.train, step, False)["loss"])
    session.wait()
    values = torch.stack(losses).tolist()
    session.note("fp16, 200 steps of 4, graded", seconds=(time.perf_counter() - begin) / len(values), skipped=scaler.skipped,
                 loss_scale=scaler.get_scale(), first_loss=values[0], last_loss=statistics.mean(values[-8:]),
                 finite=all(np.isfinite(values)), **session.peaks())
    method.detach()


def generate(session):
    config = session.config("--method", "baseline")
    backbone = session.model(config).eval()
    weights = 2 * sum(p.numel() for p in backbone.decoder_layers.parameters())
    for rows in (1, 2, 4, 8, 16, 32) if session.gpu else (1, 2):
        batch = session.batches(config, backbone, rows, 1)[0]
        prompts = batch.with_text(batch.input_ids[:, :batch.first_label], batch.attention_mask[:, :batch.first_label])
        for graph in (False, True) if session.gpu else (False,):
            # A graph has one length.
            one, seven = (GraphedAnswers(backbone.generate, session.device) if graph else backbone.generate for _ in range(2))
            first = session.seconds(partial(one, prompts, 1, stop_at_eos=False), 3, 1)
            seconds = session.seconds(partial(seven, prompts, 7, stop_at_eos=False), 3, 1)
            said, wanted = (ask(prompts, 7, stop_at_eos=False)[0] for ask in (seven, backbone.generate))
            session.note("generate", graph=graph, rows=rows, seconds_an_action=seconds, tokens_per_second=7 * rows / seconds,
                         first_token=first, each_further=(seconds - first) / 6, floor_each_further=weights / CARDS["h100"].stream,
                         same_ids=bool(torch.equal(said, wanted)))


def everywhere(session):
    """LoRA of rank 32 on every linear, batch 16, as the official script: PEFT's layers and ours, without a limit of memory."""
    session.limit(1000)
    options = ["--method", "baseline", "--lora.layers", "all", "--lora.modules", "[all-linear]"]
    make = adapters.make_lean
    for name, lean, compiled, extra in (("PEFT's layers, adapters in bfloat16", False, False, ["--lora.dtype", "model"]),
                                        ("ours", True, False, [])):
        adapters.make_lean = make if lean else lambda layers: None
        attempt(session, name, one_everywhere, session, name, session.config(*options, *extra), compiled)
    adapters.make_lean = make
    session.limit(session.args.gib)


def one_everywhere(session, name, config, compiled):
    session.fresh()
    backbone = session.model(config)
    if compiled:
        backbone.compile_layers()
    weights = torch.cuda.memory_allocated() / GIB if session.gpu else 0.0
    row = steps(session, config, backbone, Method(), 16, 1, 6, 2)
    session.note(f"everywhere, batch 16, {name}", weights_gib=weights, **row)
    session.planned.append((f"everywhere, {name}", config, 16, 1, row))


def plan(session):
    model = find_model(session.config(), Path(session.args.root) / "hf_cache")
    for name, config, size, accumulation, row in session.planned:
        config.train.batch_size, config.train.accumulation = size, accumulation
        found = Planner(config, model, CARDS["h100"]).plan("train")
        session.note("plan", recipe=name, planned_gib=found.reserved / GIB, gib=row.get("reserved_gib"), planned=found.each,
                     seconds=row["seconds"])


def attempt(session, name, work, *given) -> None:
    try:
        work(*given)
    except Exception as error:  # the other stages are still worth measuring
        session.note(name, error=f"{type(error).__name__}: {error}"[:500])
        traceback.print_exc()
    session.fresh()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--gib", type=float, default=22.5)
    parser.add_argument("--root", default="/dev/shm/seven_b")
    parser.add_argument("--out", default=None)
    parser.add_argument("--stages", default=",".join(STAGES))
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    session = Session(args)
    in_memory(session.base, args.tokenizer, session.device, args.layers, args.tiny)
    storage = Storage.from_config(session.config())
    write_rlds(storage.data, DATA, tabletop.collect_demos("corner", 12, seed=1, noise=0.2), overwrite=True)
    probe = SimpleNamespace(size=500 if session.gpu else 40)
    write_probe(storage.probe_folder("tabletop"), *tabletop.make_probe(probe.size, seed=1))
    session.note("made the weights and the data")
    for name in args.stages.split(","):
        attempt(session, name, {"compile": compile_stage}.get(name) or globals()[name], session)
    return 0


if __name__ == "__main__":
    sys.exit(main())
