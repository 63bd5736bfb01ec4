"""Checkpoints that are whole or not there: run/checkpoints/step_NNNNNN/.

    <group>.safetensors   one file per group of tensors ("trainable", "optimizer", ...)
    state.json            everything else: schedules, data position, random state; arrays inside it lie in state.safetensors
    adapter/              what the adapter writer puts there (PEFT format)
    manifest.json         step, size and SHA-256 of every file; written last

A checkpoint becomes visible by one rename, and is only loaded when every file matches the manifest. No pickle anywhere.
"""

import hashlib
import json
import math
import random
import re
import shutil
import struct
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save, save_file

from vlakeep.core.errors import CheckpointError
from vlakeep.core.log import log
from vlakeep.core.sharded import optimizer_like
from vlakeep.core.storage import atomic_dir, need_free, remove_leftovers

FORMAT = 1
Tensors = Dict[str, torch.Tensor]


# ---- trees: nested dict / list / tuple / scalar / array values <-> JSON + named tensors ----


def pack(tree: Any) -> Tuple[Any, Tensors]:
    """(JSON-able tree, tensors by name): exact for dicts with scalar keys, lists, tuples, floats (NaN and inf too), ints of any
    size, numpy arrays and scalars, and tensors. Raises TypeError naming the place of anything else."""
    tensors: Tensors = {}

    def walk(value, where):
        if isinstance(value, torch.Tensor):
            name = f"t{len(tensors)}"
            tensors[name] = (
                value.detach().cpu().clone(memory_format=torch.contiguous_format)
            )  # a snapshot, not a view of live state
            return {"__tensor__": name}
        if isinstance(value, (np.ndarray, np.generic)):
            array = np.ascontiguousarray(value)
            if array.dtype.kind not in "biufcUS":
                raise TypeError(f"{where}: arrays of {array.dtype} cannot be stored")
            name = f"t{len(tensors)}"
            tensors[name] = torch.from_numpy(np.frombuffer(array.tobytes(), dtype=np.uint8).copy())
            shape = [-1] if isinstance(value, np.generic) else list(value.shape)
            return {"__array__": name, "dtype": array.dtype.str, "shape": shape}
        if value is None or isinstance(value, (bool, int, str)):
            return value
        if isinstance(value, float):
            return value if math.isfinite(value) else {"__float__": repr(value)}
        if isinstance(value, (list, tuple)):
            items = [walk(item, f"{where}[{i}]") for i, item in enumerate(value)]
            return {"__tuple__": items} if isinstance(value, tuple) else items
        if isinstance(value, dict):
            # Keys with two underscores are ours: a dictionary that has some of its own is stored as pairs.
            if all(isinstance(key, str) and not key.startswith("__") for key in value):
                return {key: walk(item, f"{where}.{key}") for key, item in value.items()}
            return {"__items__": [[walk(key, where), walk(item, f"{where}[{key!r}]")] for key, item in value.items()]}
        raise TypeError(f"{where}: a {type(value).__name__} cannot be stored")

    return walk(tree, "state"), tensors


def unpack(tree: Any, tensors: Tensors) -> Any:
    """The value that `pack` was given."""
    if isinstance(tree, list):
        return [unpack(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if "__float__" in tree:
        return float(tree["__float__"])
    if "__tensor__" in tree:
        return tensors[tree["__tensor__"]]
    if "__array__" in tree:
        array = np.frombuffer(tensors[tree["__array__"]].numpy().tobytes(), dtype=np.dtype(tree["dtype"])).copy()
        return array[0] if tree["shape"] == [-1] else array.reshape(tree["shape"])
    if "__tuple__" in tree:
        return tuple(unpack(item, tensors) for item in tree["__tuple__"])
    if "__items__" in tree:
        return {unpack(key, tensors): unpack(item, tensors) for key, item in tree["__items__"]}
    return {key: unpack(item, tensors) for key, item in tree.items()}


def to_bytes(tree: Any) -> bytes:
    """`pack` as one byte string, for sending between processes."""
    packed, tensors = pack(tree)
    head = json.dumps(packed).encode()
    return struct.pack("<Q", len(head)) + head + save(tensors)


def from_bytes(data: bytes) -> Any:
    size = struct.unpack("<Q", data[:8])[0]
    return unpack(json.loads(data[8 : 8 + size]), load(data[8 + size :]))


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous CPU tensor that shares no memory with another: safetensors refuses shared storage."""
    tensor = tensor.detach()
    if tensor.device.type == "cpu" and (not tensor.is_contiguous() or tensor.untyped_storage().nbytes() != tensor.nbytes):
        return tensor.clone(memory_format=torch.contiguous_format)
    return tensor.cpu().contiguous()


# ---- optimizer and random state ----


def split_optimizer(state: dict) -> Tuple[Tensors, dict]:
    """(tensors, JSON-able rest) of an optimizer's state_dict, exact: moments and step counts keep type and bits."""
    packed, tensors = pack(state)
    return tensors, packed


def join_optimizer(optimizer, tensors: Tensors, state: dict) -> None:
    """Put a split state back. Raises CheckpointError when it belongs to other parameters."""
    try:
        optimizer.load_state_dict(optimizer_like(unpack(state, tensors), optimizer.param_groups))
    except (ValueError, KeyError) as error:
        raise CheckpointError(
            f"the saved optimizer state does not fit this model ({error}); use the configuration of the saved run"
        ) from error


def rng_state(device=None) -> dict:
    """Random state of python, numpy, torch on the CPU, and (with a CUDA device) of that device."""
    state = {"python": random.getstate(), "numpy": np.random.get_state(legacy=False), "torch": torch.get_rng_state()}
    if device is not None and torch.device(device).type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict, device=None) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():  # a run that moved to a CPU goes on without it
        torch.cuda.set_rng_state(state["cuda"], device if device is not None else torch.cuda.current_device())


# ---- checkpoints ----


def checkpoint_folder(run_folder, step: int) -> Path:
    return Path(run_folder) / "checkpoints" / f"step_{step:06d}"


def list_checkpoints(run_folder) -> List[Tuple[int, Path]]:
    """(step, folder) of every visible checkpoint, oldest first; broken ones too."""
    found = []
    for folder in (Path(run_folder) / "checkpoints").glob("step_*"):
        match = re.fullmatch(r"step_(\d+)", folder.name)
        if match and folder.is_dir():
            found.append((int(match[1]), folder))
    return sorted(found)


def save_checkpoint(
    run_folder,
    step: int,
    tensors: Dict[str, Tensors],
    state: dict,
    adapter_writer: Optional[Callable[[Path], Any]] = None,
    keep_last: int = 0,
) -> Path:
    """Write checkpoints/step_NNNNNN at once and return it; then remove all but the newest `keep_last` (0 keeps all).

    `tensors`: group -> name -> tensor; `state`: what `pack` takes; `adapter_writer(folder)` may write more files.
    Raises DiskFull before or while writing; the checkpoints that were there stay.
    """
    folder = checkpoint_folder(run_folder, step)
    packed, arrays = pack(state)
    groups = {**{name: {key: _own(t) for key, t in group.items()} for name, group in tensors.items()}, "state": arrays}
    if "state" in tensors or "manifest" in tensors:
        raise ValueError("a tensor group may not be called state or manifest")
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder.parent)
    for hidden in folder.parent.glob(".step_*.removed"):
        shutil.rmtree(hidden, ignore_errors=True)
    need_free(folder, sum(t.nbytes for group in groups.values() for t in group.values()) + (1 << 20), "a checkpoint")
    with atomic_dir(folder) as temporary:
        for name, group in groups.items():
            _save_tensors(group, temporary / f"{name}.safetensors")
        (temporary / "state.json").write_text(json.dumps(packed))
        if adapter_writer is not None:
            adapter_writer(temporary)
        files = {
            str(path.relative_to(temporary)): {"size": path.stat().st_size, "sha256": file_sha256(path)}
            for path in sorted(temporary.rglob("*"))
            if path.is_file()
        }
        manifest = {"format": FORMAT, "step": step, "groups": sorted(tensors), "files": files}
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1))
    if keep_last > 0:
        for _, old in [item for item in list_checkpoints(run_folder) if item[0] <= step][:-keep_last]:
            hidden = old.with_name(f".{old.name}.removed")  # a kill in the middle leaves no half checkpoint in sight
            old.rename(hidden)
            shutil.rmtree(hidden, ignore_errors=True)
    return folder


def _save_tensors(tensors: Tensors, path: Path) -> None:
    seen, distinct = set(), {}
    for name, tensor in tensors.items():  # tied tensors become copies: safetensors refuses shared storage
        pointer = tensor.untyped_storage().data_ptr()
        distinct[name] = tensor.clone() if pointer in seen else tensor
        seen.add(pointer)
    try:
        save_file(distinct, path)
    except SafetensorError as error:
        raise OSError(f"could not write {path}: {error}") from error


def file_sha256(path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def broken(folder) -> Optional[str]:
    """Why a checkpoint is not intact, naming the file; None when every file matches the manifest."""
    folder = Path(folder)
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        files = {str(name): (int(wanted["size"]), str(wanted["sha256"])) for name, wanted in manifest["files"].items()}
        whole = {f"{name}.safetensors" for name in manifest["groups"]} <= files.keys()
    except FileNotFoundError:
        return f"{folder / 'manifest.json'} is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{folder / 'manifest.json'} is damaged"
    if manifest.get("format") != FORMAT:
        return f"{folder / 'manifest.json'} has format {manifest.get('format')}; this version reads {FORMAT}"
    if not whole:
        return f"{folder / 'manifest.json'} is damaged"
    for name, (size, sha256) in files.items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != size:
            return f"{path} is truncated: {path.stat().st_size} of {size} bytes"
        if file_sha256(path) != sha256:
            return f"{path} is corrupt: its SHA-256 differs from the manifest"
    return None


def latest_intact(run_folder, say: Callable[[str], Any] = log.warning) -> Optional[Path]:
    """The newest checkpoint whose files all match its manifest, or None. Skipped ones are reported through `say`."""
    for _, folder in reversed(list_checkpoints(run_folder)):
        reason = broken(folder)
        if reason is None:
            return folder
        say(f"skipping checkpoint {folder.name}: {reason}")
    return None


def load_checkpoint(folder) -> Tuple[Dict[str, Tensors], dict]:
    """(tensors by group on the CPU, state) of an intact checkpoint.

    Raises CheckpointError naming the bad file and the newest intact checkpoint of the run, FileNotFoundError without a folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no checkpoint folder {folder}; a run's checkpoints are in RUN/checkpoints/step_NNNNNN")
    reason = broken(folder)
    if reason is not None:
        intact = latest_intact(folder.parent.parent, say=lambda text: None)
        raise CheckpointError(
            f"{reason}. "
            + (f"The newest intact checkpoint is {intact}" if intact else "No other checkpoint of this run is intact")
        )
    manifest = json.loads((folder / "manifest.json").read_text())
    tensors = {name: load_file(folder / f"{name}.safetensors") for name in manifest["groups"]}
    state = unpack(json.loads((folder / "state.json").read_text()), load_file(folder / "state.safetensors"))
    return tensors, state


def check_base(folder, state: dict, weights_sha256: str) -> None:
    """Raise CheckpointError when the run was trained on other base weights than these."""
    made = state.get("base_weights", weights_sha256)
    if made != weights_sha256:
        raise CheckpointError(
            f"{folder} was trained on other base weights ({made[:12]}, not {weights_sha256[:12]}): the base model was changed or "
            "is another one; give the one of the run with --backbone.checkpoint, and its --backbone.quantisation"
        )


if __name__ == "__main__":  # sanity check: python -m vlakeep.core.checkpoint runs/NAME
    for number, found in list_checkpoints(sys.argv[1]):
        print(f"step {number}: {broken(found) or 'intact'}")
