"""Folders of safetensors weights, whatever model they are of: find, check, read, write and fingerprint them.

Files: model.safetensors, or model.safetensors.index.json with its shards; dataset_statistics.json.
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

from vlakeep.core.errors import CheckpointError, human_bytes, quoted
from vlakeep.core.storage import atomic_path, atomic_write

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
STATISTICS = "dataset_statistics.json"
MAX_SHARD = 5_000_000_000  # bytes, as the official shards


def weight_files(folder) -> List[Path]:
    """The safetensors files of a folder. Raises FileNotFoundError naming what is missing, CheckpointError for two sets of weights.

    Consolidating a model leaves its index behind. Where the shards are gone the single file is the model, as for transformers; where they
    are not, two programs may read two models.
    """
    folder = Path(folder)
    if (folder / WEIGHTS).is_file() and (folder / INDEX).is_file():
        named = _named(folder)
        whole = [name for name in named if (folder / name).is_file()]
        if len(whole) < len(named):
            return [folder / WEIGHTS]
        if named != [WEIGHTS]:
            raise CheckpointError(f"{folder} holds two sets of weights, {WEIGHTS} and {INDEX} with {', '.join(named)}: keep one, "
                                  f"`mv {quoted(folder / INDEX)} {quoted(folder / (INDEX + '.old'))}` for the single file, "
                                  f"`mv {quoted(folder / WEIGHTS)} {quoted(folder / (WEIGHTS + '.old'))}` for the other")
    if (folder / INDEX).is_file():
        names = _named(folder)
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


def _named(folder: Path) -> List[str]:
    """The files that an index names."""
    try:
        return sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / INDEX} is damaged ({error}): fetch the checkpoint again") from error


def tensor_table(file: Path) -> dict:
    """Tensor table of a safetensors file, after checking that the file is as long as it says."""
    size = file.stat().st_size
    try:
        with open(file, "rb") as f:
            start = f.read(8)
            if start == b"version ":
                raise CheckpointError(f"{file} is a git-lfs pointer, not the weights: run `git -C {quoted(file.parent)} lfs pull`")
            if len(start) < 8:
                raise ValueError("it is truncated")
            length = struct.unpack("<Q", start)[0]
            if length > size:
                raise ValueError(f"its header would be {human_bytes(length)} long")
            table = json.loads(f.read(length))
        end = 8 + length + max([entry["data_offsets"][1] for name, entry in table.items() if name != "__metadata__"], default=0)
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
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


def read_statistics(folder, config: dict) -> dict:
    """norm_stats as the official get_vla finds them: dataset_statistics.json if it is there, else config.json's."""
    file = Path(folder) / STATISTICS
    return statistics_in(file) if file.is_file() else config.get("norm_stats") or {}


def statistics_in(file: Path) -> dict:
    """Entries of a dataset_statistics.json by the data sets' names. CheckpointError for one that has none of actions."""
    try:
        statistics = json.loads(file.read_text())
        for entry in statistics.values():
            if not len(entry["action"]["q01"]) == len(entry["action"]["q99"]):
                raise ValueError("q01 and q99 differ in length")
        return statistics
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} holds no action statistics ({error!r}): fetch it again or remove it") from error


def shards(sizes: Dict[str, int]) -> Dict[str, List[str]]:
    """File name -> names of the tensors that go into it, in the order given; `sizes` in bytes."""
    parts: List[List[str]] = [[]]
    room = MAX_SHARD
    for name, size in sizes.items():
        if size > room and parts[-1]:
            parts.append([])
            room = MAX_SHARD
        parts[-1].append(name)
        room -= size
    if len(parts) == 1:
        return {WEIGHTS: parts[0]}
    return {f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors": part for i, part in enumerate(parts)}


def write_shard(folder: Path, name: str, tensors: Dict[str, torch.Tensor]) -> None:
    """One weight file, which appears whole."""
    with atomic_path(folder / name) as partial:
        save_file(tensors, str(partial), metadata={"format": "pt"})


def write_index(folder: Path, plan: Dict[str, List[str]], total: int) -> None:
    """The index of several shards, and none for one; `total` in bytes."""
    if len(plan) > 1:
        weight_map = {name: file for file, members in plan.items() for name in members}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_weights(folder: Path, state: Dict[str, torch.Tensor]) -> None:
    """The weight files of a folder, sharded above MAX_SHARD; each appears whole, and those of an earlier write go."""
    plan = shards({name: tensor.nbytes for name, tensor in state.items()})
    for file, members in tqdm(plan.items(), desc="writing weights", disable=len(plan) == 1, leave=False):
        write_shard(folder, file, {name: state[name] for name in members})
    write_index(folder, plan, sum(t.nbytes for t in state.values()))
    for old in [folder / INDEX] * (len(plan) == 1) + list(folder.glob("model*.safetensors")):  # of a write with other shards
        if old.name not in plan and old.is_file():
            old.unlink()


def write_json(path: Path, value) -> None:
    with atomic_write(path, "w") as file:
        file.write(json.dumps(value, indent=2) + "\n")


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
