"""Stage `vlakeep offline`: what a method needs of the frozen teacher, made once per base model and probe.

    vlakeep offline --config configs/method_icsm_hsw_thermostat.yaml [--gpus 8]

reads:  the base checkpoint, with train.from_run (and no gains.of_first) the adapter of that run; probe_root_dir/<probe.name>
writes: a folder below artifact_dir, which the method names: icms_<backbone> or graded_<backbone>
"""

import sys
from pathlib import Path
from typing import List

from vlakeep.core.config import Config
from vlakeep.core.launch import launch
from vlakeep.core.options import read
from vlakeep.core.parallel import DAY, HOST, Distributed, process_settings
from vlakeep.core.registry import method_class
from vlakeep.core.stages import OFFLINE
from vlakeep.core.storage import Storage
from vlakeep.models.chain import chain_to, merge_chain
from vlakeep.models.load import make_backbone


def run_offline(config: Config, storage: Storage) -> Path:
    """The offline step of the method that the configuration names; returns the artefact's folder. ValueError for a method without one.

    The processes of a job divide the work, and the first of them writes; the artefact is that of a single process, to the bit.
    """
    method = method_class(config.method)
    with Distributed(config.device, DAY, HOST) as job, process_settings(config.threads, config.seed, job.device):
        folder = None
        if method.divides_offline or job.is_main:
            backbone = make_backbone(config.backbone, job.device, storage.cache).eval()
            merge_chain(backbone, None if config.gains.of_first else chain_to(config.train.from_run, storage))
            folder = method.offline(config, storage, backbone)
        return Path(job.broadcast(str(folder)))


def main(argv: List[str]) -> int:
    args, config = read(OFFLINE, argv)
    if args.gpus > 1:
        return launch(args.gpus, OFFLINE.name, argv)
    run_offline(config, Storage.from_config(config))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
