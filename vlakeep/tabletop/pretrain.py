"""Stage `vlakeep pretrain-tabletop`: train the small base model that ships with vlakeep, from nothing.

    vlakeep pretrain-tabletop --out vlakeep/assets/tabletop-base --minutes 8          (one GPU)
    vlakeep pretrain-tabletop --out $VLAKEEP_ROOT/tmp/try --minutes 0.2 --frames 4000 --device cpu   (to see that it runs)

It is the OpenVLA architecture (fused DINOv2-type and SigLIP-type ViT, projector, Llama) in a tiny configuration, trained with all
parameters on visual questions and the known skills of the tabletop benchmark; the held-out skill never occurs.
`--out` may lie in vlakeep/assets too, outside the storage root, because it is made to ship.

writes: OUT/ in the official checkpoint format, in bfloat16, with PROVENANCE.json (command, seed, data, versions, hashes, time)
"""

import shlex
import sys
import time
from typing import List

import numpy as np
import torch

from vlakeep.core.options import read
from vlakeep.core.storage import SHIPS, Storage
from vlakeep.data.statistics import action_statistics
from vlakeep.openvla.pretraining import fit, new_model, save
from vlakeep.openvla.tiny import TINY_IMAGE_SIZE
from vlakeep.tabletop import benchmark as tabletop
from vlakeep.tabletop.stages import PRETRAIN


def main(argv: List[str]) -> int:
    args, config = read(PRETRAIN, argv)
    storage = Storage.from_config(config, create=False)
    storage.guard_write(args.out, what="base model", also=SHIPS)
    backbone, processor = new_model(args, tabletop.corpus(), tabletop.words(), TINY_IMAGE_SIZE, "tiny")
    started = time.perf_counter()
    frames, samples = tabletop.training_frames(args.frames, args.seed, args.processes, args.questions)
    print(f"{len(samples):,} frames in {time.perf_counter() - started:.0f} s")
    backbone.norm_stats = {tabletop.PRETRAINED_KEY: action_statistics(np.stack([s.action for s in samples if s.action is not None]), 0)}
    images = torch.from_numpy(np.ascontiguousarray(frames)).to(args.device)
    trained = fit(backbone, processor, samples, lambda pick_B: images[pick_B], args)
    command = shlex.join(["vlakeep", "pretrain-tabletop", *(arg.replace(str(args.out), "vlakeep/assets/" + args.out.name) for arg in argv)])
    save(backbone, args, command, trained, frames=len(samples))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
