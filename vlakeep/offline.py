"""Stage `vlakeep offline`: what a method needs of the frozen teacher, made once per base model and probe.

    vlakeep offline --config configs/method_icsm_hsw_thermostat.yaml

reads:  the base checkpoint, with train.from_run the adapter of that run; probe_root_dir/<probe.name>
writes: a folder below artifact_dir, which the method names: icms_<backbone> or graded_<backbone>
"""

import sys
from pathlib import Path
from typing import List

from vlakeep.core.config import Config, config_from_argv
from vlakeep.core.parallel import pick_device, process_settings
from vlakeep.core.registry import method_class
from vlakeep.core.storage import Storage
from vlakeep.models.chain import chain_to, merge_chain
from vlakeep.models.load import make_backbone


def run_offline(config: Config, storage: Storage) -> Path:
    """The offline step of the method that the configuration names; returns the artefact's folder. ValueError for a method without one."""
    device = pick_device(config.device)
    with process_settings(config.threads, config.seed, device):
        backbone = make_backbone(config.backbone, device, storage.cache).eval()
        merge_chain(backbone, chain_to(config.train.from_run, storage))
        return method_class(config.method).offline(config, storage, backbone)


def main(argv: List[str]) -> int:
    config = config_from_argv(argv)
    run_offline(config, Storage.from_config(config))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
