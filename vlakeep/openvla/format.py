"""Checkpoint folders in the official OpenVLA Hugging Face format: read, write, initialise, fingerprint.

Files: config.json, model.safetensors (or model.safetensors.index.json with its shards), dataset_statistics.json,
generation_config.json, and the processor's files (processor.py).
Sources: openvla vla-scripts/extern/convert_openvla_weights_to_hf.py, experiments/robot/openvla_utils.py:36-68 (what get_vla
reads).
"""

import hashlib
import json
import os
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Tuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from vlakeep.core.errors import CheckpointError, human_bytes
from vlakeep.openvla.model import OpenVLA, parameters_on_meta

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
STATISTICS = "dataset_statistics.json"
MAX_SHARD = 5_000_000_000  # bytes, as the official shards
PAD_MULTIPLE = 64  # of the embedding table, official default
_NEEDED = ("use_fused_vision_backbone", "timm_model_ids", "image_sizes", "text_config")
_OPTIONAL_KEYS = ("rotary_emb.inv_freq",)  # buffers that old transformers versions stored


def read_config(folder) -> dict:
    """config.json, validated and with defaults filled in. Raises FileNotFoundError or CheckpointError with the remedy."""
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"no config.json in {folder}: --backbone.checkpoint must be a folder in the official OpenVLA format"
        )
    try:
        config = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} is not valid JSON ({error}): fetch it again") from error
    return complete_config(config, str(file))


def complete_config(config: dict, where: str = "config") -> dict:
    """A copy with defaults filled in. Raises CheckpointError listing everything that is missing or contradictory."""
    remedy = "fetch the checkpoint again, or give the folder of another one with --backbone.checkpoint"
    config = json.loads(json.dumps(config))
    if not isinstance(config, dict) or not isinstance(config.get("text_config", {}), dict):
        raise CheckpointError(f"{where} is no OpenVLA configuration: it must be an object with an object text_config; {remedy}")
    problems = []
    if config.get("model_type", "openvla") != "openvla":
        problems.append(f"model_type is {config['model_type']!r}, must be 'openvla'")
    problems += [f"{key} is missing" for key in _NEEDED if key not in config]
    if not problems:
        count = 2 if config["use_fused_vision_backbone"] else 1
        config.setdefault("timm_override_act_layers", [None] * count)
        for key in ("timm_model_ids", "image_sizes", "timm_override_act_layers"):
            if len(config[key]) != count:
                problems.append(f"{key} has {len(config[key])} entries, but use_fused_vision_backbone needs {count}")
        text = config["text_config"]
        heads, hidden = text.get("num_attention_heads", 32), text.get("hidden_size", 4096)
        if text.get("model_type", "llama") != "llama":
            problems.append(f"text_config.model_type is {text['model_type']!r}; only llama is supported")
        if hidden % heads:
            problems.append(f"text_config.hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
        config.setdefault("pad_to_multiple_of", PAD_MULTIPLE)
        vocabulary = text.setdefault("vocab_size", 32000 + config["pad_to_multiple_of"])
        pad = config.setdefault("pad_token_id", vocabulary - config["pad_to_multiple_of"])
        text.setdefault("pad_token_id", pad)
        if not 0 <= pad < vocabulary:
            problems.append(f"pad_token_id {pad} lies outside text_config.vocab_size {vocabulary}")
    if problems:
        raise CheckpointError(f"{where} is no OpenVLA configuration: " + "; ".join(problems) + f": {remedy}")
    return config


def weight_files(folder) -> List[Path]:
    """The safetensors files of a folder. Raises FileNotFoundError naming what is missing."""
    folder = Path(folder)
    if (folder / INDEX).is_file():
        try:
            names = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{folder / INDEX} is damaged ({error}): fetch the checkpoint again") from error
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{folder / INDEX} names {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not there: "
                "fetch the checkpoint again, the download is incomplete"
            )
        return [folder / name for name in names]
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if list(folder.glob("*.bin")):
        raise FileNotFoundError(
            f"{folder} holds .bin (pickle) weights, which can run code and are not read: fetch the safetensors files"
        )
    raise FileNotFoundError(
        f"no {WEIGHTS} or {INDEX} in {folder}: fetch the checkpoint again, or give another --backbone.checkpoint"
    )


def tensor_table(file: Path) -> dict:
    """Tensor table of a safetensors file, after checking that the file is as long as it says."""
    size = file.stat().st_size
    try:
        with open(file, "rb") as f:
            start = f.read(8)
            if start == b"version ":
                raise CheckpointError(f"{file} is a git-lfs pointer, not the weights: run `git lfs pull` in {file.parent}")
            if len(start) < 8:
                raise ValueError("it is truncated")
            length = struct.unpack("<Q", start)[0]
            if length > size:
                raise ValueError(f"its header would be {human_bytes(length)} long")
            table = json.loads(f.read(length))
        end = 8 + length + max([entry["data_offsets"][1] for name, entry in table.items() if name != "__metadata__"], default=0)
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{file} ({human_bytes(size)}) is not a readable safetensors file: {error}; fetch or write it again"
        ) from error
    if end != size:
        raise CheckpointError(f"{file} is {size} bytes long, its header says {end}: it is "
                              f"{'truncated' if size < end else 'corrupt'}; fetch or write it again")
    return {
        name: dict(entry, offset=8 + length + entry["data_offsets"][0]) for name, entry in table.items() if name != "__metadata__"
    }


def read_tensors(files: List[Path], quiet: Optional[bool] = None) -> Iterator[Tuple[str, torch.Tensor]]:
    """(name, tensor) of all files. Raises CheckpointError for a truncated or corrupt file before the first tensor is given."""
    total = sum(len(tensor_table(file)) for file in files)
    with tqdm(
        total=total, desc="loading weights", unit="tensor", disable=quiet if quiet is not None else total < 300, leave=False
    ) as bar:
        for file in files:
            try:
                with safe_open(str(file), framework="pt") as f:
                    for name in f.keys():
                        yield name, f.get_tensor(name)
                        bar.update()
            except SafetensorError as error:
                raise CheckpointError(f"{file} cannot be read: {error}; fetch or write it again") from error


def _strict(expected: Dict[str, torch.Size], found: Dict[str, torch.Size], where) -> None:
    def some(names):
        return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")

    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected and not name.endswith(_OPTIONAL_KEYS)]
    shapes = [f"{name} is {list(found[name])}, must be {list(expected[name])}" for name in expected
              if name in found and found[name] != expected[name]]
    problems = [text for names, text in ((missing, f"missing: {some(missing)}"), (unexpected, f"unexpected: {some(unexpected)}"),
                                         (shapes, f"other shape: {some(shapes)}")) if names]
    if problems:
        raise CheckpointError(f"the weights in {where} do not fit its config.json; " + "; ".join(problems))


def check_weights(folder, config: dict) -> None:
    """Raise CheckpointError unless the weight files hold exactly the tensors of the architecture in `config`; reads headers only."""
    with parameters_on_meta():
        model = OpenVLA(config)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    found = {name: torch.Size(entry["shape"]) for file in weight_files(folder) for name, entry in tensor_table(file).items()}
    _strict(expected, found, folder)


def load_checkpoint(folder, dtype: torch.dtype = torch.float32, attn_implementation: str = "sdpa") -> Tuple[OpenVLA, dict]:
    """(model in evaluation mode on the CPU, config). Raises CheckpointError or FileNotFoundError; nothing is loaded half."""
    config = read_config(folder)
    with parameters_on_meta():
        model = OpenVLA(config, attn_implementation)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    files = weight_files(folder)
    _strict(expected, {name: torch.Size(entry["shape"]) for file in files for name, entry in tensor_table(file).items()}, folder)
    state = {name: tensor.to(dtype) for name, tensor in read_tensors(files) if name in expected}
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval(), config


def read_statistics(folder, config: dict) -> dict:
    """norm_stats as the official get_vla finds them: dataset_statistics.json if it is there, else config.json's."""
    file = Path(folder) / STATISTICS
    if file.is_file():
        try:
            statistics = json.loads(file.read_text())
            for entry in statistics.values():
                if not len(entry["action"]["q01"]) == len(entry["action"]["q99"]):
                    raise ValueError("q01 and q99 differ in length")
            return statistics
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{file} holds no action statistics ({error!r}): fetch it again or remove it") from error
    return config.get("norm_stats") or {}


def init_checkpoint(config: dict, folder, seed: int = 0) -> None:
    """Write a randomly initialised model. Matrices ~ N(0, 0.02) or less where the fan-in is large, norms 1, biases 0."""
    config = complete_config(config)
    with parameters_on_meta():
        model = OpenVLA(config)
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, tensor in model.state_dict().items():
        last = name.rsplit(".", 1)[-1]
        if last == "scale_factor" or (last == "weight" and tensor.ndim == 1):
            state[name] = torch.ones(tensor.shape)
        elif last == "bias":
            state[name] = torch.zeros(tensor.shape)
        else:
            fan_in = tensor[0].numel() if tensor.ndim > 1 else tensor.numel()
            std = (
                0.02
                if last in ("pos_embed", "cls_token", "reg_token", "latent") or "embed_tokens" in name
                else min(0.05, fan_in**-0.5)
            )
            state[name] = torch.randn(tensor.shape, generator=generator) * std
    write_checkpoint(folder, state, config, {})


def write_checkpoint(
    folder, state: Dict[str, torch.Tensor], config: dict, norm_stats: dict, dtype: Optional[torch.dtype] = None
) -> None:
    """config.json, weights (sharded above 5 GB), dataset_statistics.json and generation_config.json; each file appears whole."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: t.detach().to("cpu", dtype or t.dtype).contiguous() for name, t in state.items()}
    stored = next(iter(state.values())).dtype
    config = dict(config, torch_dtype=str(stored).replace("torch.", ""), norm_stats=norm_stats or config.get("norm_stats"))
    shards: List[Dict[str, torch.Tensor]] = [{}]
    room = MAX_SHARD
    for name, tensor in state.items():
        if tensor.nbytes > room and shards[-1]:
            shards.append({})
            room = MAX_SHARD
        shards[-1][name] = tensor
        room -= tensor.nbytes
    names = [WEIGHTS] if len(shards) == 1 else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, tqdm(shards, desc="writing weights", disable=len(shards) == 1, leave=False)):
        partial = folder / (name + ".partial")
        save_file(shard, str(partial), metadata={"format": "pt"})
        os.replace(partial, folder / name)
    if len(shards) > 1:
        weight_map = {name: file for file, shard in zip(names, shards) for name in shard}
        write_json(folder / INDEX, {"metadata": {"total_size": sum(t.nbytes for t in state.values())}, "weight_map": weight_map})
    for old in [folder / INDEX] * (len(shards) == 1) + list(
        folder.glob("model*.safetensors")
    ):  # of an earlier, differently sharded write
        if old.name not in names and old.is_file():
            old.unlink()
    write_sidecars(folder, config, norm_stats)


def write_sidecars(folder: Path, config: dict, norm_stats: dict) -> None:
    """The small files beside the weights: generation_config.json, dataset_statistics.json if there are any, and last config.json."""
    text = config["text_config"]
    write_json(
        folder / "generation_config.json",
        {
            "_from_model_config": True,
            "bos_token_id": text.get("bos_token_id", 1),
            "eos_token_id": text.get("eos_token_id", 2),
            "pad_token_id": config["pad_token_id"],
        },
    )
    if norm_stats:
        write_json(folder / STATISTICS, norm_stats)
    write_json(folder / "config.json", dict(config, norm_stats=norm_stats or config.get("norm_stats")))


def write_json(path: Path, value) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(partial, path)


def weights_hash(folder) -> str:
    """sha256 over names, types, shapes and bytes of all tensors as stored; the same however they are split into files."""
    return hash_of(tensor_hashes(folder))


def hash_of(lines: Dict[str, str]) -> str:
    """weights_hash from tensor_hashes."""
    return hashlib.sha256("".join(lines[name] for name in sorted(lines)).encode()).hexdigest()


def tensor_hashes(folder) -> Dict[str, str]:
    """Tensor -> a line with its name, type, shape and the sha256 of its bytes."""
    tensors = sorted((name, file, entry) for file in weight_files(folder) for name, entry in tensor_table(file).items())

    def line(item):
        name, file, entry = item
        digest, (begin, end) = hashlib.sha256(), entry["data_offsets"]
        with open(file, "rb") as f:
            f.seek(entry["offset"])
            left = end - begin
            while left:
                block = f.read(min(left, 1 << 24))
                digest.update(block)
                left -= len(block)
        return f"{name} {entry['dtype']} {entry['shape']} {digest.hexdigest()}\n"

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing releases the interpreter lock
        size = sum(file.stat().st_size for file in weight_files(folder))
        lines = list(tqdm(pool.map(line, tensors), total=len(tensors), desc="hashing weights", disable=size < 1e9, leave=False))
    return {name: text for (name, _, _), text in zip(tensors, lines)}
