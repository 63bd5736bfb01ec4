"""What `vlakeep preflight` looks at among a stage's inputs: base model, layer numbers, data, probe, artefact, run folder.

Each check returns lines and raises nothing for what a user can cause, so that all findings can be shown at once.
"""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import List, Optional, Tuple

from vlakeep.benchmarks.base import NEVER, REPLAY, REQUIRED, Benchmark
from vlakeep.core.checkpoint import broken, check_base
from vlakeep.core.config import Config, EvaluateConfig
from vlakeep.core.errors import CheckpointError, RunDirError, human_bytes, quoted
from vlakeep.core.findings import GREEN, RED, YELLOW, Line
from vlakeep.core.registry import method_class
from vlakeep.core.rundir import RunDir
from vlakeep.core.storage import Storage, find_checkpoint, free_bytes
from vlakeep.core.target import read_action_statistics, run_config, target_checkpoint
from vlakeep.data.conventions import FILE

_MANY = 500  # episodes, from which on the time for each says something
SPARE_BYTES = 50_000_000  # logs, boards and states beside the tensors of a run's checkpoints
HASHED_AT_MOST = 1_000_000_000  # bytes of base weights; preflight hashes no more, which takes seconds


def safetensors_problem(path: Path) -> Optional[str]:
    """Why a safetensors file cannot be whole, from its header and size alone; None when they agree."""
    from vlakeep.models.files import tensor_table

    try:
        tensor_table(path)
    except CheckpointError as error:
        return str(error).removeprefix(f"{path} ").partition("; fetch")[0]
    return None


def check_checkpoint(config: Config, cache: Path, stage: str = "train") -> Tuple[List[Line], dict]:
    """Lines about the base model's folder, and its config.json ({} when it cannot be read)."""
    from vlakeep.models.files import weight_files
    from vlakeep.models.load import model_kinds

    what = "base model"
    try:
        folder = find_checkpoint(config.backbone.checkpoint, cache)
    except FileNotFoundError as error:
        found, _, remedy = str(error).rpartition("): ")
        return [Line(RED, what, found + ")", remedy)], {}
    again = "fetch or copy the checkpoint again"
    try:
        model = json.loads((folder / "config.json").read_text())
    except ValueError as error:
        return [Line(RED, what, f"{folder / 'config.json'} is damaged: {error}", again)], {}
    lines, shards = [], []
    said = model.get("model_type", model.get("type"))
    if said not in model_kinds():
        named = " or ".join(repr(kind) for kind in model_kinds())
        lines.append(Line(RED, what, f"{folder / 'config.json'} has model_type {said!r}, not {named}",
                          "--backbone.checkpoint FOLDER of an OpenVLA model in Hugging Face format"))
    try:
        model = kind_of_model(model).whole_config(folder, model, config.backbone)
    except ValueError as error:
        return [Line(RED, what, str(error), again)], {}
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():  # alone, or beside the index of an earlier write
        try:
            shards = [path.name for path in weight_files(folder)]
        except (CheckpointError, OSError) as error:
            found, _, remedy = str(error).partition(": ")
            lines.append(Line(RED, what, found, remedy))
    elif index.is_file():
        try:
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError):
            lines.append(Line(RED, what, f"{index} is damaged", again))
    else:
        shards = ["model.safetensors"]
    for name in shards:
        problem = safetensors_problem(folder / name) if (folder / name).is_file() else "missing"
        if problem:
            lines.append(Line(RED, what, f"{folder / name}: {problem}", again))
    for group in kind_of_model(model).processor_files:
        if not any((folder / name).is_file() for name in group):
            lines.append(Line(RED, what, f"{folder} has no {' or '.join(group)}", again))
    lines += check_unnorm_key(config, folder, model, stage)
    if not any(line.status == RED for line in lines):
        depth, width = depth_and_width(model)
        lines.append(Line(GREEN, what, f"{folder}: {len(shards)} weight file(s) whole, {depth} decoder layers, D = {width}"))
    return lines, model


def check_unnorm_key(config: Config, folder: Path, model: dict, stage: str) -> List[Line]:
    """The base's action statistics, and whether the chosen key is among them; of an evaluation check_target looks at the key."""
    path = folder / "dataset_statistics.json"
    try:
        statistics = json.loads(path.read_text()) if path.is_file() else model.get("norm_stats")
    except ValueError as error:
        return [Line(RED, "action statistics", f"{path} is damaged: {error}", "fetch or copy the checkpoint again")]
    key = config.backbone.unnorm_key
    if stage != "evaluate" and key is not None and key not in (statistics or {}) and key not in config.data.datasets:
        known = ", ".join(sorted(statistics)) if statistics else "none"
        return [
            Line(
                RED,
                "--backbone.unnorm_key",
                f"{key!r} is not among the statistics of {folder} ({known})",
                f"--backbone.unnorm_key one of: {known}",
            )
        ]
    if config.data.statistics is not None and config.data.statistics not in (statistics or {}):
        known = ", ".join(sorted(statistics)) if statistics else "none"
        return [Line(RED, "--data.statistics", f"{config.data.statistics!r} is not among the statistics of {folder} ({known})",
                     f"--data.statistics one of: {known}; or null for those of the data set itself")]
    if not statistics:
        return [Line(YELLOW, "action statistics", f"{folder} has none; those of the training data are used", "")]
    return []


def kind_of_model(model: dict):
    """The class of the model that a config.json is of, OpenVLA's for a kind that is not known (check_checkpoint has a line about it)."""
    from vlakeep.models.load import class_of, kind_of, model_kinds

    kind = kind_of(model)
    return class_of(kind if kind in model_kinds() else "openvla")


def depth_and_width(model: dict) -> Tuple[int, int]:
    """(decoder layers, D) of a config.json."""
    return kind_of_model(model).sizes(model)


def check_layers(config: Config, model: dict) -> List[Line]:
    """Layer numbers against the depth, and what the method asks of a model."""
    from vlakeep.models.adapters import layer_numbers

    depth, width = depth_and_width(model)
    lines = []
    try:
        layer_numbers(config.lora.layers, depth)
    except ValueError as error:
        lines.append(Line(RED, "--lora.layers", str(error), f"--lora.layers all, or last:{min(4, depth)}"))
    method = method_class(config.method)
    lines += [Line(RED if one.severe else YELLOW, one.what, one.where, one.remedy) for one in method.check_model(config, depth, width)]
    if not any(line.status == RED for line in lines):
        lines.append(Line(GREEN, "layers and sizes", f"lora.layers and what {config.method} names within 0 to {depth - 1}, D = {width}"))
    return lines


def check_compiling(config: Config, model: dict) -> List[Line]:
    """Whether --train.compile can do anything with this kind of model and these libraries."""
    problem = kind_of_model(model).compile_problem() if config.train.compile else ""
    return [Line(RED, "--train.compile", problem, "--train.compile false")] if problem else []


def check_data(config: Config, storage: Storage, names: Optional[List[str]] = None) -> List[Line]:
    """The files of every data set, of those of the configuration or of `names`; and where these are whole, what `train` finds when it opens
    them (data/card.py)."""
    from vlakeep.models.look import look

    lines = []
    for name in config.data.datasets if names is None else names:
        lines.append(_check_data_set(storage.data / name, name, storage))
        if lines[-1].status == RED:
            continue
        one = replace(config, data=replace(config.data, datasets=[name]))
        try:
            lines += [line for report in look(one, storage) for line in _data_card(report)]
        except (ValueError, OSError) as error:
            remedy = f"mend the data set, or say what it holds in {storage.data / name}/{FILE}"
            lines.append(Line(RED, f"content of {name}", str(error), remedy))
    return lines


def _data_card(report: dict) -> List[Line]:
    from vlakeep.data.card import lines

    what, said = f"content of {report['name']}", "\n".join(lines({**report, "notes": []}))
    found = [Line(RED, what, problem, f"mend the data set, or correct {report['card'] or FILE}") for problem in report["problems"]]
    found += [Line(YELLOW, what, note) for note in report["notes"]]
    looked = f"{said}\nlooked at in {report['seconds']:.1f} s"
    if report["episodes_in_files"] >= _MANY:
        looked += f", {report['per_thousand']:.2f} s per thousand episodes"
    return [Line(GREEN, what, looked), *found]


def _check_data_set(folder: Path, name: str, storage: Storage) -> Line:
    """Format, files and the packages that reading them takes; the content is checked when the data set is opened."""
    from vlakeep.data.formats import FORMATS, find_format

    what = f"data set {name}"
    make = (
        f"vlakeep tabletop-data --data.datasets {quoted(f'[{name}]')}"
        if name.startswith("tabletop_")
        else f"vlakeep fetch --dataset openvla/modified_libero_rlds --only {quoted(name)}"
        if re.fullmatch(r"libero_\w+_no_noops", name)
        else f"put the data set there, or choose with --data.datasets and --data_root_dir (now {storage.data})"
    )
    if not folder.is_dir():
        return Line(RED, what, f"{folder} does not exist", make)
    try:
        format_ = FORMATS[find_format(folder)]
        format_.check_extra(folder)
    except FileNotFoundError as error:
        shards = any(folder.rglob("*.tfrecord*"))
        return Line(RED, what, f"{folder} has no dataset_info.json" if shards else str(error), make)
    except ValueError as error:
        return Line(RED, what, str(error), "keep one format to a folder")
    except ModuleNotFoundError as error:
        return Line(RED, what, str(error), f"pip install {error.name}")
    files = [path for pattern in format_.files for path in folder.rglob(pattern) if path.is_file()]
    if not files:
        return Line(RED, what, f"{folder} has no {' or '.join(format_.files)} files", make)
    sizes = {path: path.stat().st_size for path in files}
    if min(sizes.values()) == 0:
        return Line(RED, what, f"{min(sizes, key=sizes.get)} is empty", make)
    return Line(GREEN, what, f"{folder}: {format_.kind}, {len(files)} file(s), {human_bytes(sum(sizes.values()))}")


def check_probe(config: Config, storage: Storage) -> Tuple[List[Line], Optional[str]]:
    """The probe: there, undamaged, large enough; and its content hash."""
    from vlakeep.probe.probe_set import open_probe, remedy

    try:
        probe = open_probe(config, storage)
        probe.spread(config.probe.size)
    except (ValueError, OSError) as error:
        benchmark = config.evaluate.benchmark
        told = [*config.data.datasets, *([benchmark] if benchmark != EvaluateConfig.benchmark else [])]  # the default tells nothing
        how = remedy(config.probe.name, config.probe.size, *told)
        return [Line(RED, "probe", str(error), f"{how}, or choose with --probe.name and --probe_root_dir (now {storage.probe})")], None
    return [Line(GREEN, "probe", f"{probe.folder}: {len(probe)} items, {config.probe.size} used")], probe.sha256


def check_heldout(config: Config, storage: Storage) -> List[Line]:
    """The probe of evaluate.probe: there, with answers, and not the protected one."""
    from vlakeep.probe.heldout import open_heldout

    settings = config.evaluate
    try:
        probe = open_heldout(storage.probe_folder(settings.probe), storage.probe_folder(config.probe.name))
    except (ValueError, OSError) as error:
        suite = next(iter(settings.other_suites), settings.benchmark)
        return [Line(RED, "--evaluate.probe", str(error), f"vlakeep libero-vqa --suite {quoted(suite)} --split heldout --probe.name "
                     f"{quoted(settings.probe)}")]
    return [Line(GREEN, "--evaluate.probe", f"{probe.folder}: {len(probe.answers)} questions with answers")]


def check_artifact(config: Config, storage: Storage, model: dict, probe_sha256: Optional[str], config_path: str) -> List[Line]:
    """What the method's offline step leaves: there, whole, made for this probe, depth and options; `train` compares the weights too."""
    from vlakeep.core.base_models import model_name
    from vlakeep.models.chain import chain_to
    from vlakeep.teacher.folder import attention_note

    method, remedy = method_class(config.method), "vlakeep offline" + (f" --config {quoted(config_path)}" if config_path else "")
    remedy += f" --train.from_run {quoted(config.train.from_run)}" if config.train.from_run else ""
    try:
        backbone = model_name(find_checkpoint(config.backbone.checkpoint, storage.cache))
    except FileNotFoundError as error:
        where = f"cannot be looked for without its base model: {error}"
        return [Line(RED, method.artifact_name, where, "mend the line `base model` first")]
    try:
        chain = chain_to(config.train.from_run, storage)
        backbone = "+".join([backbone, *(chain.names if chain else [])])
    except (ValueError, OSError) as error:
        where = f"cannot be looked for without the run before: {error}"
        return [Line(RED, method.artifact_name, where, "mend the line `--train.from_run` first")]
    folder = method.artifact_folder(config, storage, backbone)
    try:
        problems = method.artifact_problems(config, folder, None, probe_sha256, depth_and_width(model)[0] if model else None)
    except (ValueError, KeyError, OSError) as error:
        problems = [str(error)]
    if problems:
        return [Line(RED, method.artifact_name, problem, remedy) for problem in problems]
    note = attention_note(folder, json.loads((folder / "meta.json").read_text()), config.backbone)
    return [Line(YELLOW, method.artifact_name, note, remedy)] if note else [Line(GREEN, method.artifact_name, str(folder))]


def check_from_run(config: Config, storage: Storage) -> List[Line]:
    """The run whose adapter is merged before training; its base weights are compared when it is."""
    from vlakeep.models.chain import chain_to

    try:
        chain = chain_to(config.train.from_run, storage)
    except (ValueError, OSError) as error:
        return [Line(RED, "--train.from_run", str(error), "--train.from_run of another run or checkpoint, or make it with `vlakeep train`")]
    return [Line(GREEN, "--train.from_run", ", then ".join(f"{link.run} ({link.checkpoint})" for link in chain.links))] if chain else []


def check_run(config: Config, storage: Storage, model: dict) -> List[Line]:
    """The run folder is free or can be resumed, and its checkpoints will fit on the disk."""
    run = RunDir(storage.runs / config.name, is_main=True)
    lines = []
    try:
        run.refuse_as_cell_of_a_run(storage)
        if run.folder.is_dir():
            run.look(config)
    except RunDirError as error:
        lines.append(Line(RED, "run folder", str(error), "--name OTHER, or --train.resume true"))
    if model:
        try:
            one = checkpoint_bytes(config, model, storage.cache)
        except (ValueError, OSError):  # lora.layers, lora.modules or the weights: they have their own lines
            one = 0
        need, free = one * (config.train.keep_last + 1) + SPARE_BYTES, free_bytes(storage.runs)
        if free is not None and free < need:
            lines.append(
                Line(
                    RED,
                    "free space for checkpoints",
                    f"{storage.runs}: about {human_bytes(need)} needed, {human_bytes(free)} free",
                    "delete old runs, lower --train.keep_last, or move the root with --root",
                )
            )
    return lines or [Line(GREEN, "run folder", str(run.folder))]


def adapter_parameters(config: Config, model: dict, cache: Optional[Path] = None) -> int:
    """Trainable parameters of the lora section: rank * (inputs + outputs) for each adapted linear. Raises as lora.layer_numbers.

    For all-linear the shapes come from the headers of the weights, which are looked for in `cache`.
    """
    from vlakeep.models.adapters import layer_numbers
    from vlakeep.models.files import tensor_table, weight_files

    if list(config.lora.modules) == ["all-linear"]:
        folder = find_checkpoint(config.backbone.checkpoint, cache)
        tables = [item for file in weight_files(folder) for item in tensor_table(file).items()]
        shapes = [entry["shape"] for name, entry in tables if name.endswith(".weight") and not name.endswith("embed_tokens.weight")]
        return config.lora.rank * sum(shape[0] + math.prod(shape[1:]) for shape in shapes if len(shape) > 1)  # convolutions too
    kind = kind_of_model(model)
    sizes = kind.linear_shapes(model)
    layers = layer_numbers(config.lora.layers, kind.sizes(model)[0])
    return config.lora.rank * len(layers) * sum(sum(sizes[leaf]) for leaf in kind.leaf_names(config.lora.modules))


def checkpoint_bytes(config: Config, model: dict, cache: Optional[Path] = None) -> int:
    """Bytes of one checkpoint: the trainable weights, their copy in the adapter, and with Adam two moments."""
    width = 2 if config.lora.dtype == "model" and config.backbone.dtype != "float32" else 4
    return adapter_parameters(config, model, cache) * width * (4 if config.train.optimizer == "adamw" else 2)


def check_target(benchmark: Benchmark, model: dict) -> List[Line]:
    """What is to be evaluated: an intact checkpoint, of this base model, and action statistics of the chosen key."""
    config, storage = benchmark.config, benchmark.storage
    target, lines, own = config.evaluate.target, [], {}
    if target == REPLAY or not model:
        return []
    base = find_checkpoint(config.backbone.checkpoint, storage.cache)
    if target != "base":
        try:
            folder = target_checkpoint(target, storage)
            reason = broken(folder)
            if reason:
                raise CheckpointError(reason)
            own = read_action_statistics(folder)
        except (ValueError, OSError) as error:
            return [Line(RED, "target", str(error), "--evaluate.target of another run or checkpoint, or make it with `vlakeep train`")]
        lines += check_target_base(config, storage, base, folder)
    return lines + (check_action_key(benchmark, base, model, own) if benchmark.acts else [])


def check_target_base(config: Config, storage: Storage, base: Path, folder: Path) -> List[Line]:
    """Whether the checkpoint in `folder` was trained on this base model: by the hash of its weights where that is quick, else by name."""
    from vlakeep.models.chain import chain_hash, read_chain
    from vlakeep.models.files import weight_files, weights_hash
    from vlakeep.models.quantised import identity

    size = sum(file.stat().st_size for file in weight_files(base))
    if size > HASHED_AT_MOST:
        good = Line(GREEN, "target", f"{folder}: intact; base weights ({human_bytes(size)}) are not hashed here, evaluate compares them")
        named = ((run_config(str(folder), storage) or {}).get("backbone") or {}).get("checkpoint")
        if named in (None, config.backbone.checkpoint):
            return [good]
        return [good, Line(YELLOW, "target", f"{folder} was trained on {named}, this evaluation names {config.backbone.checkpoint}",
                           f"--backbone.checkpoint {quoted(named)}, unless both are one model")]
    try:
        chain = read_chain(folder.absolute().parents[1])
        check_base(folder, json.loads((folder / "state.json").read_text()), chain_hash(base, chain) if chain else
                   identity(weights_hash(base), config.backbone.quantisation))
    except ValueError as error:
        return [Line(RED, "target", str(error), "--backbone.checkpoint of the run, or another --evaluate.target")]
    return [Line(GREEN, "target", f"{folder}: intact, trained on these base weights")]


def check_action_key(benchmark: Benchmark, base: Path, model: dict, own: dict) -> List[Line]:
    """Whether the actions of base and run (`own`: the run's statistics) are un-normalised by a key that is there, as evaluate picks it,
    and are such as the benchmark takes."""
    given, only = benchmark.config.backbone.unnorm_key, next(iter(own)) if len(own) == 1 else None
    try:
        known = {**kind_of_model(model).read_statistics(base, model), **own}
        only = next(iter(known)) if only is None and len(known) == 1 else only
        key = benchmark.pick_key(given, known, only)
        if key not in known:
            said = f"no action statistics of {key!r}" if key else "no key is chosen"
            raise ValueError(f"{said} (there are {', '.join(known) or 'none'})")
        benchmark.compare(key, known, kind_of_model(model).read_spec(model))
    except CheckpointError:
        return []  # check_unnorm_key has a line about it
    except ValueError as error:
        names = ", ".join(known) or "none: train a run on your data first"
        return [Line(RED, "--backbone.unnorm_key", str(error), f"--backbone.unnorm_key one of: {names}")]
    return [Line(GREEN, "action statistics", f"un-normalised as {key}")]


def check_evaluation_probe(benchmark: Benchmark) -> List[Line]:
    """The probe on which the drift of a run is measured: some benchmarks must have it."""
    config, storage = benchmark.config, benchmark.storage
    if config.evaluate.target in ("base", REPLAY) or benchmark.drift == NEVER:
        return []
    folder = storage.probe_folder(config.probe.name)
    if benchmark.drift != REQUIRED and not folder.is_dir():
        return [Line(YELLOW, "probe", f"{folder} does not exist: the drift is not measured", "--probe.name of another probe")]
    return check_probe(config, storage)[0]
