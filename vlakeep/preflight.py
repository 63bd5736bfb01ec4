"""Stages `vlakeep preflight` and `vlakeep storage-check`: everything that would stop a run, shown at once, each with its remedy.

    vlakeep preflight --config configs/method_icsm_hsw_thermostat.yaml [--stage offline|train|evaluate] [--gpus 8]
    vlakeep storage-check [--config X] [--large_file_gb 1]

reads:  the headers of what the named stage (train unless said) is going to read; loads no weights
writes: the folders of the storage root, when they do not exist
Exit status: 0 when nothing is red, 1 otherwise.
"""

import functools
import importlib.metadata
import importlib.util
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import List, Optional, Tuple

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vlakeep import checks
from vlakeep.checks import GREEN, RED, YELLOW, Line
from vlakeep.core import schema
from vlakeep.core.base_models import SHIPPED
from vlakeep.core.compat import EIGHT_BIT, NUMPY_1, built_for, import_bitsandbytes, kernel_trouble, numpy_trouble
from vlakeep.core.config import BackboneConfig, Config, ConfigError, ProbeConfig, load_config
from vlakeep.core.errors import human_bytes, quoted
from vlakeep.core.next_step import completed_remedy
from vlakeep.core.options import read, split
from vlakeep.core.registry import benchmark_class, benchmark_names, method_class, method_names
from vlakeep.core.stages import PREFLIGHT, STORAGE_CHECK
from vlakeep.core.storage import Storage, code_trees, find_checkpoint, peek, scan_large_files
from vlakeep.models.sharded_base import refuse_sharding

STAGES = ("offline", "train", "evaluate")
# As pyproject.toml; the official OpenVLA environment meets them all.
LOWER_BOUNDS = {
    "torch": "2.2",
    "transformers": "4.40.1",
    "timm": "0.9.10",
    "peft": "0.11.1",
    "draccus": "0.8.0",
    "numpy": "1.24",
    "safetensors": "0.4",
    "simplejpeg": "1.7",
    "google-crc32c": "1.5",
    "pillow": "9",
    "pyyaml": "6",
    "rich": "13",
    "tqdm": "4.60",
    "matplotlib": "3.7",
}


def version_tuple(text: str) -> Tuple[int, ...]:
    """'2.13.0+cpu' -> (2, 13, 0)."""
    return tuple(int(part) for part in re.match(r"\d+(\.\d+)*", text)[0].split("."))


def check_storage(make_storage, large_file_gb: float = 1.0, create: bool = True, openvla_dir: Optional[str] = None
                  ) -> Tuple[List[Line], Optional[Storage]]:
    """Lines about the root, its folders, the cache variables and the code trees; and the Storage, if it can be used.

    `make_storage()` gives the Storage, or raises StorageError or OSError. openvla_dir: a checkout that is a code tree too.
    """
    lines, storage = [], None
    try:
        storage = make_storage()
        if create:
            storage.create()
    except (ValueError, OSError) as error:
        lines.append(Line(RED, "storage root", str(error), "choose another root: --root DIR or export VLAKEEP_ROOT=DIR"))
    if storage is not None:
        lines += check_folders(storage)
    for tree in code_trees(more=openvla_dir):
        found = scan_large_files(tree, int(large_file_gb * 1e9))
        for path, size in found:
            target = quoted(f"{storage.root}/") if storage else "DIR_BELOW_THE_STORAGE_ROOT/"
            remedy = f"mv {quoted(path)} {target}   (or delete it; if git knows it: git rm --cached {quoted(path)})"
            lines.append(Line(RED, "large file in source tree", f"{path}, {human_bytes(size)}", remedy))
        if not found:
            lines.append(Line(GREEN, "source tree", f"{tree}: no file of {large_file_gb:g} GB or more"))
    return lines, storage


def check_folders(storage: Storage) -> List[Line]:
    lines = []
    for name, folder, good, free in storage.overview():
        space = f"{human_bytes(free)} free" if free is not None else "free space unknown"
        parent = next((p for p in (folder, *folder.parents) if p.exists()), folder)
        if good:
            lines.append(Line(GREEN, f"storage {name}", f"{folder}, {space}"))
        elif parent == folder or not os.access(parent, os.W_OK | os.X_OK):
            problem = (
                f"{folder} is not a writable folder" if parent == folder else f"{folder} cannot be made: {parent} is not writable"
            )
            lines.append(
                Line(RED, f"storage {name}", problem, f"chmod u+rwx {quoted(parent)}, or --root DIR, or export VLAKEEP_ROOT=DIR")
            )
        else:
            lines.append(Line(YELLOW, f"storage {name}", f"{folder} does not exist yet (the first stage makes it), {space}"))
    outside = storage.outside()
    for name, value in outside:
        status = YELLOW if name in ("TMPDIR", "WANDB_DIR") else RED
        remedy = f"unset {name}   (vlakeep then sets it to {storage.environment()[name]})"
        lines.append(Line(status, f"variable {name}", f"{value} is outside the storage root {storage.root}", remedy))
    return lines if outside else [*lines, Line(GREEN, "cache variables", "none points outside the storage root")]


def check_places(config: Config, storage: Storage) -> List[Line]:
    """Where each input of the experiment lies, links followed: a note for what lies outside the root, which is only read. What is not
    there has a line when the configuration names it."""
    named, lines = config.backbone.checkpoint, []
    try:
        base: Optional[Path] = find_checkpoint(named, storage.cache)
    except OSError:
        base = None
    places = [("base model", named, base, named == BackboneConfig.checkpoint)]
    places += [("data set", name, storage.data / Path(name).expanduser(), False) for name in config.data.datasets]
    places += [("probe", config.probe.name, storage.probe_folder(config.probe.name), config.probe.name == ProbeConfig.name)]
    for what, name, folder, default in places:
        if folder is None or not folder.exists():
            lines += [] if default else [Line(YELLOW, f"{what} {name}", f"not there yet ({folder or storage.cache})",
                                              "`vlakeep preflight` says how it is made")]
        elif what == "base model" and name in SHIPPED:
            lines.append(Line(GREEN, f"{what} {name}", f"{folder.resolve()}: part of the package"))
        elif folder.resolve().is_relative_to(storage.root.resolve()):
            lines.append(Line(GREEN, f"{what} {name}", str(folder.resolve())))
        else:
            lines.append(Line(YELLOW, f"{what} {name}", f"{folder.resolve()} is outside the storage root {storage.root}",
                              f"it is only read; to have it below the root: mv {quoted(folder.resolve())} {quoted(f'{storage.root}/')}"))
    return lines


def check_environment(config: Config, gpus: int = 1) -> List[Line]:
    """Lines about the conda environment, library versions, and what the GPUs can do against what the configuration asks."""
    lines = []
    active = os.environ.get("CONDA_DEFAULT_ENV")
    lines.append(
        Line(GREEN, "conda environment", "openvla is active")
        if active == "openvla"
        else Line(
            YELLOW,
            "conda environment",
            f"{active or 'none'} is active, not openvla",
            "conda activate openvla   (if this machine has it)",
        )
    )
    if not (3, 10) <= sys.version_info[:2]:
        lines.append(Line(RED, "python", sys.version.split()[0], "use Python 3.10 or newer"))
    good = []
    for name, bound in LOWER_BOUNDS.items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            lines.append(Line(RED, f"package {name}", "not installed", f"pip install '{name}>={bound}'"))
            continue
        if version_tuple(version) < version_tuple(bound):
            lines.append(Line(RED, f"package {name}", f"{version}, needs {bound} or newer", f"pip install '{name}>={bound}'"))
        else:
            good.append(f"{name} {version}")
    lines.append(Line(GREEN, "packages", ", ".join(good)))
    if trouble := numpy_trouble():
        lines.append(Line(RED, "torch and NumPy", trouble, NUMPY_1))
    if config.train.use_wandb and importlib.util.find_spec("wandb") is None:
        lines.append(Line(RED, "--train.use_wandb", "wandb is not installed", "pip install wandb, or --train.use_wandb false"))
    return lines + check_gpus(config, gpus)


def visible_gpus(config: Config) -> Tuple[int, bool]:
    """(GPUs that torch sees, whether the configuration computes on one)."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return count, config.device == "cuda" or (config.device == "auto" and count > 0)


def check_gpus(config: Config, gpus: int = 1) -> List[Line]:
    count, on_gpu = visible_gpus(config)
    lines = check_kernels(min(count, gpus)) if on_gpu else []
    if config.device == "cuda" and count == 0:
        lines.append(
            Line(RED, "--device cuda", "torch sees no GPU", "--device cpu, or check nvidia-smi and CUDA_VISIBLE_DEVICES")
        )
    elif on_gpu and gpus > count:
        lines.append(Line(RED, f"--gpus {gpus}", f"this machine shows {count} GPU(s)", f"--gpus {count}"))
    else:
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(count)) or "none; the CPU does the work"
        lines.append(Line(GREEN, "GPUs", names if on_gpu or not count else f"not used (--device cpu): {names}"))
    # is_bf16_supported() also counts emulation, which a V100 passes; compute capability 8.0 (Ampere) has it in hardware.
    old = [torch.cuda.get_device_name(i) for i in range(count) if torch.cuda.get_device_capability(i) < (8, 0)] if on_gpu else []
    for key, value, instead in (
        ("backbone.dtype", config.backbone.dtype, "float16"),
        ("train.autocast", config.train.autocast, "float16"),
    ):
        if value == "bfloat16" and old:
            lines.append(Line(RED, f"--{key} bfloat16", f"{old[0]} has no bfloat16", f"--{key} {instead}"))
    if config.backbone.attn_implementation == "flash_attention_2":
        if not on_gpu or old:
            lines.append(
                Line(
                    RED,
                    "flash attention 2",
                    f"{old[0] if old else 'the CPU'} cannot run it",
                    "--backbone.attn_implementation sdpa",
                )
            )
        elif importlib.util.find_spec("flash_attn") is None:
            lines.append(
                Line(RED, "flash attention 2", "the package flash_attn is not installed", "--backbone.attn_implementation sdpa")
            )
    if config.backbone.dtype == "float16" and not on_gpu:
        lines.append(Line(RED, "--backbone.dtype float16", "the CPU does not work in float16", "--backbone.dtype float32"))
    if config.train.autocast == "float16" and not on_gpu:
        lines.append(Line(RED, "--train.autocast float16", "the CPU does not train in float16", "--train.autocast none"))
    return lines


def check_kernels(count: int) -> List[Line]:
    """Whether the installed torch was built for the first GPUs, which are those that a run takes; no line where it does not say."""
    what = "kernels for the GPU"
    found = dict.fromkeys(kernel_trouble(i) for i in range(count))
    red = [Line(RED, what, where, f"{remedy}, or --device cpu") for where, remedy in found if where]
    return red if red or not found or not built_for() else [Line(GREEN, what, f"torch {torch.__version__} has them")]


def check_bitsandbytes(config: Config, stage: str) -> List[Line]:
    """The package that 4-bit weights and 8-bit optimizers are of: there, and on a GPU with its own kernels."""
    asked = [("--backbone.quantisation nf4", "--backbone.quantisation none")] if config.backbone.quantisation != "none" else []
    count, on_gpu = visible_gpus(config)
    lines = []
    if stage == "train" and config.train.optimizer in EIGHT_BIT:
        key, instead = f"--train.optimizer {config.train.optimizer}", "--train.optimizer adamw"
        if on_gpu:
            asked.append((key, instead))
        else:
            lines.append(Line(RED, key, "it does not work on a CPU", f"{instead}, or --device cuda"))
    for key, instead in asked:
        try:
            library = import_bitsandbytes(key, instead)
        except ValueError as error:
            where, _, remedy = str(error).removeprefix(f"{key}: ").rpartition("): ")
            lines.append(Line(RED, key, where + ")", remedy))
            continue
        said = f"bitsandbytes {library.__version__}"
        if on_gpu and count and not getattr(library.cextension.lib, "compiled_with_cuda", False):
            lines.append(Line(RED, key, f"{said} finds no GPU, or has no kernels for the CUDA of torch {torch.__version__}",
                              f"pip install --upgrade bitsandbytes, or {instead}   (python -m bitsandbytes says what it looked for)"))
        else:
            lines.append(Line(GREEN, key, said))
    return lines


def check_sharding(config: Config, gpus: int) -> List[Line]:
    """Whether torch can share a base; a note where the processes are one, which shares nothing."""
    if config.train.sharding == "none":
        return []
    key, instead = f"--train.sharding {config.train.sharding}", "--train.sharding none"
    try:
        refuse_sharding(config.train.sharding, max(gpus, 2))
    except ValueError as error:
        where = str(error).removeprefix(f"{key}: ").partition("; use ")[0]
        return [Line(RED if gpus > 1 else YELLOW, key, where, f"pip install --upgrade 'torch>=2.7' torchvision, or {instead}")]
    return [Line(GREEN, key, f"torch {torch.__version__} can share the base" + (f" among {gpus} GPUs" if gpus > 1 else ""))]


def run_checks(
    config: Config, stage: str = "train", config_path: str = "", large_file_gb: float = 1.0, gpus: int = 1
) -> List[Line]:
    """Every check that concerns `stage` (offline, train or evaluate), in reading order."""
    if stage not in STAGES:
        raise ConfigError(f"--stage {stage!r}: must be one of {', '.join(STAGES)}")
    lines = [
        Line(RED, "configuration", problem, f"correct it in {config_path} or on the command line")
        for problem in config.problems()
    ]
    lines = lines or [Line(GREEN, "configuration", f"{config_path or 'defaults'}: every value within its range")]
    checkout = config.backbone.openvla_dir
    found, storage = check_storage(lambda: Storage.from_config(config, create=False), large_file_gb, openvla_dir=checkout)
    lines += found + check_environment(config, gpus) + check_bitsandbytes(config, stage)
    lines += check_sharding(config, gpus) if stage == "train" else []
    if storage is None:
        return lines + [Line(YELLOW, "inputs", "not checked: they lie below the storage root")]
    found, model = checks.check_checkpoint(config, storage.cache, stage)
    known = config.method in method_names()
    lines += found + (checks.check_layers(config, model) if model and known else [])
    lines += checks.check_from_run(config, storage) if stage != "evaluate" else []
    needs_artifact = known and method_class(config.method).needs_offline(config)
    probe_sha256 = None
    if stage == "offline" or (stage == "train" and needs_artifact):
        found, probe_sha256 = checks.check_probe(config, storage)
        lines += found
    if stage == "evaluate" and config.evaluate.benchmark in benchmark_names():
        benchmark = benchmark_class(config.evaluate.benchmark)(config, storage)
        lines += benchmark.lines() + checks.check_target(benchmark, model) + checks.check_evaluation_probe(benchmark)
        lines += checks.check_data(config, storage) if benchmark.reads_data else []
    if stage == "train":
        lines += checks.check_compiling(config, model) if model else []
        lines += checks.check_data(config, storage, method_class(config.method).data_sets(config) if known else None)
        lines += checks.check_artifact(config, storage, model, probe_sha256, config_path) if needs_artifact else []
        lines += checks.check_run(config, storage, model)
    return lines


def show(lines: List[Line], title: str) -> int:
    """Print the table and, below it in full width for copying, the remedies. Returns the exit status."""
    terminal = Console(highlight=False)
    console = terminal if terminal.is_terminal else Console(highlight=False, width=140)  # a log file has room
    table = Table(title=title, title_justify="left")
    for column in ("", "check", "found"):
        table.add_column(column, overflow="fold")
    colours = {GREEN: "green", YELLOW: "yellow", RED: "bold red"}
    for line in lines:
        table.add_row(f"[{colours[line.status]}]{line.status}[/]", escape(line.what), escape(line.where))
    console.print(table)
    for remedy in dict.fromkeys(f"{x.status} {x.what}: {x.remedy}" for x in lines if x.status != GREEN and x.remedy):
        print(remedy)
    red = sum(line.status == RED for line in lines)
    print(f"{title}: {red} of {len(lines)} checks failed" if red else f"{title}: passed, {len(lines)} checks")
    return 1 if red else 0


def main(argv: List[str]) -> int:
    try:
        args, file, pairs = split(PREFLIGHT, argv)
    except ConfigError as error:
        return _show_mistakes(error, "correct it on the command line", argv)
    where = f"correct it in {file} or on the command line" if file else "correct it on the command line"
    checked = functools.partial(run_checks, stage=args.stage, config_path=file or "", large_file_gb=args.large_file_gb, gpus=args.gpus)
    try:
        return show(_whole(checked(load_config(file, pairs)), argv), "preflight")
    except ConfigError as error:
        try:
            config = schema.parse(Config, file, pairs)
        except ConfigError:  # a type is wrong, or the file is
            return _show_mistakes(error, where, argv)
        # Values out of range: they do not hide a missing data set.
        return show(_red(error, where) + _whole(checked(config)[len(config.problems()):], argv), "preflight")


def _whole(lines: List[Line], argv: List[str]) -> List[Line]:
    """With commands that run as they stand."""
    return [replace(line, remedy=completed_remedy(line.remedy, ["preflight", *argv])) for line in lines]


def _red(error: ConfigError, where: str) -> List[Line]:
    return [Line(RED, "configuration", problem, where) for problem in str(error).splitlines()]


def _show_mistakes(error: ConfigError, where: str, argv: List[str]) -> int:
    found, _ = check_storage(lambda: peek(argv), create=False)
    found += check_environment(Config())
    return show([*_red(error, where), *found, Line(YELLOW, "inputs", "not checked: correct the configuration first")], "preflight")


def storage_check(argv: List[str]) -> int:
    """`vlakeep storage-check`: folders below the root, cache variables, large files in source trees, free space, places of the inputs."""
    args, config = read(STORAGE_CHECK, argv)
    lines, storage = check_storage(lambda: Storage.from_config(config, create=False), args.large_file_gb, create=False,
                                   openvla_dir=config.backbone.openvla_dir)
    return show(lines + (check_places(config, storage) if storage else []), "storage-check")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
