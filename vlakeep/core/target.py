"""What a trained run leaves for the stages after it: checkpoint, configuration, the hash of its adapter, its action statistics."""

import json
from pathlib import Path
from typing import NamedTuple, Optional

from vlakeep.core.checkpoint import check_base, latest_intact, load_checkpoint
from vlakeep.core.errors import quoted
from vlakeep.core.names import run_name, target_folder
from vlakeep.core.storage import Storage
from vlakeep.core.strict_yaml import read_mapping


def target_checkpoint(target: str, storage: Storage) -> Path:
    """The checkpoint folder that a run's name or a path stands for; of a run the newest intact one. Raises FileNotFoundError."""
    folder = target_folder(target, storage)
    if (folder / "manifest.json").is_file():
        return folder
    checkpoint = latest_intact(folder) if folder.is_dir() else None
    if checkpoint is None:
        folders = [path.parent for pattern in ("*/checkpoints", "*/*/checkpoints") for path in storage.runs.glob(pattern)]
        known = ", ".join(sorted(run_name(run, storage) for run in folders)) or "none"
        name = run_name(folder, storage)
        raise FileNotFoundError(f"no intact checkpoint of the run `{target}` under {folder} (runs with checkpoints: {known})"
                                f": make it with `vlakeep train --config ... --name {quoted(name)}`, or choose another target "
                                "with --evaluate.target")
    return checkpoint


def run_config(target: str, storage: Storage) -> Optional[dict]:
    """config.yaml of the run that a target is (a name, a run folder) or belongs to (a checkpoint folder); None for what has none."""
    folder = target_folder(target, storage)
    if (folder / "manifest.json").is_file():  # RUN/checkpoints/step_N
        folder = folder.parents[1]
    path = folder / "config.yaml"
    remedy = "copy it from a backup, or train the run again under another name"
    return read_mapping(path, remedy) if path.is_file() else None


class Base(NamedTuple):
    """Hashes of base weights: those that a run was trained on, and those of the model that was loaded for it from a folder."""

    trained: str
    original: str


def base_of(run: Path) -> Optional[Base]:
    """The base weights of a run's last session; None where its provenance does not tell."""
    try:
        hashes = json.loads((run / "provenance.json").read_text())["sessions"][-1]["hashes"]
        return Base(hashes["base_weights"], hashes.get("original_base_weights", hashes["base_weights"]))
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return None


def read_action_statistics(folder: Path) -> dict:
    """dataset_statistics.json beside the adapter of a checkpoint. Raises FileNotFoundError."""
    path = folder / "adapter" / "dataset_statistics.json"
    if not path.is_file():
        raise FileNotFoundError(f"no {path}, without which the actions of this adapter mean nothing: train the run again, or "
                                "copy the file of a run on the same data")
    return json.loads(path.read_text())


def load_manifest(folder: Path, base_weights: str) -> str:
    """Verify a checkpoint folder and return the hash of its adapter weights."""
    _, state = load_checkpoint(folder)  # raises when a file is damaged
    check_base(folder, state, base_weights)
    manifest = json.loads((folder / "manifest.json").read_text())
    return manifest["files"]["adapter/adapter_model.safetensors"]["sha256"]
