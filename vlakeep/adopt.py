"""Stage `vlakeep adopt`: an adapter that was trained elsewhere, as a run that can be evaluated, weakened, closed and exported.

    vlakeep adopt --config configs/openvla_libero_baseline.yaml --name theirs --adapter adapter-tmp/EXPERIMENT \\
                  --statistics runs/EXPERIMENT/dataset_statistics.json --step 50000
    vlakeep evaluate --config configs/openvla_libero_baseline.yaml --evaluate.target theirs

A LoRA adapter as PEFT saves it, such as the official finetune.py leaves one beside its merged model. It must fit the base model of the
configuration, and have been trained on it, which no file of PEFT's tells. How it was trained is not known here, so that the run has no
configuration: `--evaluate.center_crop true` belongs to every evaluation of an adapter that was trained on crops.

reads:  the base model, the adapter's folder, the statistics of its actions
writes: run_root_dir/<name>/: the adapter as a checkpoint, and adopted.json
"""

import json
import sys
from pathlib import Path
from typing import List, Optional

from vlakeep.core.checkpoint import file_sha256, latest_intact, save_checkpoint
from vlakeep.core.config import Config, ConfigError
from vlakeep.core.errors import quoted
from vlakeep.core.log import log
from vlakeep.core.names import run_name
from vlakeep.core.options import read
from vlakeep.core.parallel import pick_device
from vlakeep.core.provenance import library_versions, source_commit
from vlakeep.core.stages import ADOPT
from vlakeep.core.storage import Storage, atomic_write
from vlakeep.models.adapters import CONFIG_FILE, WEIGHTS_FILE, load_adapter, save_adapter
from vlakeep.models.files import STATISTICS, statistics_in
from vlakeep.models.load import make_backbone

RECORD = "adopted.json"
PICKLE = "adapter_model.bin"


def run_adoption(config: Config, storage: Storage, adapter: Path, statistics: Optional[Path] = None, step: int = 0) -> Path:
    """Write the run and return its folder.

    adapter: folder with adapter_config.json and adapter_model.safetensors. statistics: a dataset_statistics.json, none: the one beside the
    adapter. FileNotFoundError for what is not there, FileExistsError where the run is, ConfigError for a pickle, CheckpointError for
    an adapter of another model or kind.
    """
    folder = storage.run_folder(config.name)
    begun = (folder / RECORD).is_file() and latest_intact(folder) is None  # what a kill or a full disk left of an earlier call
    if folder.exists() and not begun:
        raise FileExistsError(f"{folder} exists already: take another --name, or move it away")
    if not (adapter / WEIGHTS_FILE).is_file() and (adapter / PICKLE).is_file():
        raise ConfigError(f"{adapter / PICKLE} is a pickle, which is not opened here: save the adapter anew with "
                          f"model.save_pretrained(..., safe_serialization=True), as {WEIGHTS_FILE}")
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (adapter / name).is_file():
            raise FileNotFoundError(f"no {name} in {adapter}: --adapter takes the folder of a PEFT adapter; of the official finetune.py "
                                    "the one below --adapter_tmp_dir")
    source = statistics or adapter / STATISTICS
    if not source.is_file():
        raise FileNotFoundError(f"no {source}, without which the adapter's actions mean nothing: give --statistics FILE, the "
                                f"{STATISTICS} of its data; the official finetune.py writes it to its run folder")
    known = statistics_in(source)
    backbone = make_backbone(config.backbone, pick_device(config.device), storage.cache)
    load_adapter(backbone, adapter)

    def write(temporary: Path) -> None:
        save_adapter(backbone, temporary / "adapter")  # effective weights alone, whatever PEFT stored beside them
        (temporary / "adapter" / STATISTICS).write_text(json.dumps(known, indent=2))

    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / RECORD, "w") as file:
        file.write(json.dumps({"adapter": str(adapter), "adapter_sha256": file_sha256(adapter / WEIGHTS_FILE),
                               "statistics": str(source), "statistics_sha256": file_sha256(source),
                               "base_weights": backbone.weights_sha256, "step": step, "versions": library_versions(),
                               "commit": source_commit()}, indent=1) + "\n")
    save_checkpoint(folder, step, {}, {"step": step, "base_weights": backbone.weights_sha256}, write)
    keys = ", ".join(known)
    log.info(f"{len(backbone.lora.targets)} linears of rank {backbone.lora.rank}; actions of {keys}")
    log.info(f"wrote {folder} (evaluate it with --evaluate.target {quoted(run_name(folder, storage))}; of a training on crops with "
             "--evaluate.center_crop true)")
    return folder


def main(argv: List[str]) -> int:
    args, config = read(ADOPT, argv)
    run_adoption(config, Storage.from_config(config), args.adapter, args.statistics, args.step)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
