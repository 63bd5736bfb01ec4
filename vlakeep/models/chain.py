"""Training from an earlier run: its adapter is merged into the base weights in memory, as `vlakeep export` would have merged it on disk.

    vlakeep train --config configs/baseline_lora.yaml --name second --train.from_run first --data.datasets '[tabletop_path]'

The run keeps what was merged, so that neither more training of the earlier run nor its end changes what this one is:

    run_root_dir/<name>/from/chain.json       `base_weights` of the first run, and per run, in order, `run`, `checkpoint`, `adapter_sha256`
    run_root_dir/<name>/from/00/ 01/ ...      the adapter of each, and its dataset_statistics.json
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Dict, Iterator, List, NamedTuple, Optional, Tuple

import torch
from safetensors import safe_open

from vlakeep.core.checkpoint import check_base, file_sha256, latest_intact, load_checkpoint
from vlakeep.core.errors import CheckpointError
from vlakeep.core.names import run_name
from vlakeep.core.storage import Storage, atomic_dir
from vlakeep.core.target import read_action_statistics, target_checkpoint
from vlakeep.models.adapters import WEIGHTS_FILE
from vlakeep.models.files import hash_of, tensor_hashes, tensor_table, weight_files
from vlakeep.models.load import model_class
from vlakeep.models.merge import merged, read_deltas

FOLDER, FILE = "from", "chain.json"


class Link(NamedTuple):
    """A run whose adapter is merged. `folder` holds adapter/."""

    run: str
    checkpoint: str
    adapter_sha256: str
    folder: Path


class Chain(NamedTuple):
    """Runs in the order in which they were trained, the first on the weights `base_weights`."""

    base_weights: str
    links: List[Link]

    @property
    def adapters(self) -> List[Path]:
        return [link.folder / "adapter" for link in self.links]

    @property
    def names(self) -> List[str]:
        """Of the runs, without a slash."""
        return [link.run.replace("/", ".") for link in self.links]


def read_chain(run: Path) -> Optional[Chain]:
    """What the run in a folder was trained from; None for one that was trained on a base model as it is. CheckpointError when damaged."""
    file = Path(run) / FOLDER / FILE
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        links = [Link(one["run"], one["checkpoint"], one["adapter_sha256"], file.parent / f"{number:02d}")
                 for number, one in enumerate(found["links"])]
        for link in links:
            if file_sha256(link.folder / "adapter" / WEIGHTS_FILE) != link.adapter_sha256:
                raise ValueError(f"the adapter in {link.folder} is not that of {link.run}")
        return Chain(found["base_weights"], links)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} does not tell what the run was trained from ({error}): restore {file.parent}, or train it again "
                              "with --train.from_run") from error


def chain_to(target: Optional[str], storage: Storage) -> Optional[Chain]:
    """The chain that ends with a run (a name, or a checkpoint folder); None for none. Raises as target_checkpoint, and CheckpointError."""
    if target is None:
        return None
    folder = target_checkpoint(target, storage)
    _, state = load_checkpoint(folder)  # raises when a file is damaged
    run = folder.absolute().parents[1]
    before = read_chain(run)
    sha256 = json.loads((folder / "manifest.json").read_text())["files"][f"adapter/{WEIGHTS_FILE}"]["sha256"]
    link = Link(run_name(run, storage), folder.name, sha256, folder)
    return Chain(before.base_weights if before else state["base_weights"], [*(before.links if before else []), link])


def spoken(chain: Chain, storage: Storage) -> str:
    """The value of --train.from_run that leads to this chain: the last run's name, or its checkpoint's folder if there is a newer one."""
    last = chain.links[-1]
    folder = storage.run_folder(last.run)
    newest = latest_intact(folder) if folder.is_dir() else None
    return last.run if newest is None or newest.name == last.checkpoint else str(folder / "checkpoints" / last.checkpoint)


def chain_of_run(config, storage: Storage, resumes: bool) -> Optional[Chain]:
    """What a training starts from: what it kept when it began, if it goes on, else what train.from_run is now."""
    kept = read_chain(storage.run_folder(config.name)) if resumes and config.train.from_run else None
    return kept or chain_to(config.train.from_run, storage)


def keep_chain(chain: Optional[Chain], run: Path) -> None:
    """Copy the adapters of a chain into the folder of the run that is trained from it; without one nothing is left there."""
    if chain is None:
        shutil.rmtree(run / FOLDER, ignore_errors=True)  # of an attempt that logged nothing
        return
    if run / FOLDER in chain.links[-1].folder.parents:
        return
    with atomic_dir(run / FOLDER) as temporary:
        for number, link in enumerate(chain.links):
            shutil.copytree(link.folder / "adapter", Path(temporary) / f"{number:02d}" / "adapter")
        links = [{"run": link.run, "checkpoint": link.checkpoint, "adapter_sha256": link.adapter_sha256} for link in chain.links]
        (Path(temporary) / FILE).write_text(json.dumps({"base_weights": chain.base_weights, "links": links}, indent=1) + "\n")


def merged_tensors(base: Path, chain: Chain) -> Iterator[Tuple[str, torch.Tensor]]:
    """(name in the files, tensor in its stored type) of every tensor that the chain changes: summed in float32 and rounded once per
    run, as exports."""
    where, kind = {name: file for file in weight_files(base) for name in tensor_table(file)}, model_class(base)
    stored = {kind.tensor_name(name): name for name in where}
    deltas = [read_deltas(adapter) for adapter in chain.adapters]
    for module in sorted(set().union(*(pairs for pairs, _ in deltas))):
        name = stored.get(f"{module}.weight")
        if name is None:
            raise CheckpointError(f"{module} of the adapter of {chain.links[-1].run} is not in {base}: give the base model that the run "
                                  "was trained on with --backbone.checkpoint")
        with safe_open(str(where[name]), framework="pt") as file:
            tensor = file.get_tensor(name)
        for pairs, scale in deltas:
            if module in pairs:
                tensor = merged(tensor, pairs[module], scale).to(tensor.dtype)
        yield name, tensor.contiguous()


def _line(line: str, tensor: torch.Tensor) -> str:
    """A line of files.tensor_hashes for the same tensor with other content."""
    return f"{line.rpartition(' ')[0]} {hashlib.sha256(tensor.flatten().view(torch.uint8).numpy().tobytes()).hexdigest()}\n"


def _hashes(base: Path, chain: Chain) -> Dict[str, str]:
    """tensor_hashes of the base, which must be the chain's."""
    lines = tensor_hashes(base)
    last = chain.links[0]
    check_base(f"{last.run}, {last.checkpoint},", {"base_weights": chain.base_weights}, hash_of(lines))
    return lines


def chain_hash(base: Path, chain: Chain) -> str:
    """files.weights_hash of the export that the chain would be. CheckpointError for another base."""
    lines = _hashes(base, chain)
    for name, tensor in merged_tensors(base, chain):
        lines[name] = _line(lines[name], tensor)
    return hash_of(lines)


@torch.no_grad()
def merge_chain(backbone, chain: Optional[Chain]) -> None:
    """Put a chain into a backbone without adapters: weights, their hash, action statistics, name. CheckpointError for another base."""
    if chain is None:
        return
    lines = _hashes(backbone.checkpoint, chain)
    for name, tensor in merged_tensors(backbone.checkpoint, chain):
        backbone.network.get_parameter(backbone.tensor_name(name)).copy_(tensor)
        lines[name] = _line(lines[name], tensor)
    backbone.merged(chain.names, hash_of(lines), chain.base_weights)
    for link in chain.links:
        backbone.norm_stats = {**backbone.norm_stats, **read_action_statistics(link.folder)}
