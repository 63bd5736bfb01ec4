"""Stage `vlakeep interpolate`: weights between the base and a finished run, a range of them from one training.

    vlakeep interpolate --config configs/baseline_lora.yaml --export.target baseline --alphas 0.2,0.4,0.6,0.8
    vlakeep interpolate --config configs/baseline_lora.yaml --export.target baseline --alphas 0.5 --modules q_proj,k_proj,v_proj,o_proj

    W = W_base + alpha dW        dW = scale B A, so that B becomes alpha B

WiSE-FT (Wortsman et al. 2022, Robust fine-tuning of zero-shot models, arXiv 2109.01903); RETAIN has it for VLA models, by modules too
(arXiv 2512.08333). No model is loaded. The closing pass, `vlakeep export --export.close_to`, weakens by input direction instead.

reads:  the adapter of the run's newest intact checkpoint
writes: run_root_dir/<run>-alpha-<alpha>/, with --modules their names behind it: the adapter as a checkpoint, which is evaluated and
        exported as that of any run, and interpolation.json
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Dict, List, Sequence

import torch
from safetensors.torch import load_file, save_file

from vlakeep.core.checkpoint import load_checkpoint, save_checkpoint
from vlakeep.core.config import Config, ConfigError
from vlakeep.core.derived import adapter_of
from vlakeep.core.errors import quoted
from vlakeep.core.log import log
from vlakeep.core.names import interpolated_name, run_name
from vlakeep.core.options import read
from vlakeep.core.stages import INTERPOLATE
from vlakeep.core.storage import Storage, atomic_write
from vlakeep.core.target import target_checkpoint
from vlakeep.models.chain import keep_chain, read_chain

RECORD = "interpolation.json"
WEIGHTS = "adapter_model.safetensors"
OF_THE_RUN = ("config.yaml", "provenance.json", "metrics.jsonl")  # how the adapter was trained is told by the run's own files


def weakened(state: Dict[str, torch.Tensor], alpha: float, modules: Sequence[str] = ()) -> Dict[str, torch.Tensor]:
    """An adapter's tensors with B times alpha in the linears named (none: all). ValueError for a name that no linear has."""
    leaves = {name: name.split(".lora_B.")[0].rpartition(".")[2] for name in state if ".lora_B." in name}
    strange = sorted(set(modules) - set(leaves.values()))
    if strange:
        raise ValueError(f"--modules {','.join(strange)}: the adapter is on {', '.join(sorted(set(leaves.values())))}")
    return {name: one * alpha if name in leaves and (not modules or leaves[name] in modules) else one for name, one in state.items()}


def run_interpolation(config: Config, storage: Storage, alphas: Sequence[float], modules: Sequence[str] = ()) -> List[Path]:
    """Write a run for every alpha and return their folders. FileExistsError when something else is there, or without export.overwrite an
    earlier result."""
    if not alphas:
        raise ConfigError("--alphas needs strengths, such as --alphas 0.2,0.4,0.6,0.8")
    checkpoint = target_checkpoint(config.export.target or config.name, storage)
    _, saved = load_checkpoint(checkpoint)
    source, run = checkpoint.absolute().parents[1], run_name(checkpoint.absolute().parents[1], storage)
    state, sha256 = load_file(str(checkpoint / "adapter" / WEIGHTS)), adapter_of(checkpoint)
    folders = {alpha: storage.run_folder(interpolated_name(run, alpha, modules)) for alpha in alphas}
    for folder in folders.values():  # before anything is written
        if folder.exists() and not (folder / RECORD).is_file():
            raise FileExistsError(f"{folder} is there and is no interpolation: move it away")
        if folder.exists() and not config.export.overwrite:
            raise FileExistsError(f"{folder} exists already: evaluate it with --evaluate.target {quoted(run_name(folder, storage))}, or "
                                  "make it anew with --export.overwrite true")
    for alpha, folder in folders.items():
        scaled = weakened(state, alpha, modules)

        def adapter(temporary: Path, scaled=scaled) -> None:
            shutil.copytree(checkpoint / "adapter", temporary / "adapter", ignore=shutil.ignore_patterns(WEIGHTS))
            save_file(scaled, str(temporary / "adapter" / WEIGHTS), metadata={"format": "pt"})

        if folder.exists():
            shutil.rmtree(folder)
        storage.guard_write(folder, what="run").mkdir(parents=True)
        with atomic_write(folder / RECORD, "w") as file:  # first, so that what a kill leaves is known for ours
            file.write(json.dumps({"run": run, "checkpoint": checkpoint.name, "adapter_sha256": sha256, "alpha": alpha,
                                   "modules": list(modules)}, indent=1) + "\n")
        save_checkpoint(folder, saved["step"], {}, {"step": saved["step"], "base_weights": saved["base_weights"]}, adapter, keep_last=1)
        for name in OF_THE_RUN:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
        keep_chain(read_chain(source), folder)
        log.info(f"wrote {folder} (evaluate it with --evaluate.target {quoted(run_name(folder, storage))})")
    return list(folders.values())


def main(argv: List[str]) -> int:
    args, config = read(INTERPOLATE, argv)
    run_interpolation(config, Storage.from_config(config), args.alphas, args.modules)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
