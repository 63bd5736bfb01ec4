"""Stage `vlakeep pretrain-tabletop-pi0`: a small pi0-FAST that speaks the tabletop, made and trained from nothing.

    vlakeep pretrain-tabletop-pi0 --out /tmp/pi0-tabletop --minutes 30                                 (one GPU)
    vlakeep pretrain-tabletop-pi0 --out /tmp/try --minutes 0.1 --episodes 4 --questions 40 --device cpu   (to see that it runs)

It is pi0-FAST (SigLIP, projector, Gemma with a prefix that sees itself,
                FAST chunks) in a tiny configuration: the tokenizer has the words of
the tabletop, the codec is fitted on the chunks of the demonstrations. The known skills and the visual questions are learnt with all
parameters; the new skills never occur. The tabletop shows no state, so that of the prompt is empty.
Not a stage of an experiment: its options are its own, and `--out` may lie outside the storage root.

writes: OUT/ in lerobot's checkpoint format, and PROVENANCE.json (command, seed, data, versions, hashes, time)
"""

import hashlib
import json
import math
import shlex
import sys
import time
from typing import Any, Dict, List, Tuple

import numpy as np
import torch
from tqdm import tqdm

from vlakeep.core.options import split
from vlakeep.core.provenance import library_versions, source_commit
from vlakeep.data.images import resize_uint8
from vlakeep.data.sample import Episode, Sample
from vlakeep.data.statistics import action_statistics, normalise
from vlakeep.models.load import make_backbone
from vlakeep.models.merge import save_checkpoint
from vlakeep.pi0_fast.model import Sizes, VisionSizes
from vlakeep.pi0_fast.tiny import make_folder
from vlakeep.tabletop import benchmark as tabletop
from vlakeep.tabletop.stages import PRETRAIN_PI0

IMAGE = 64  # pixels, as the tabletop draws


def sizes_of(args) -> Sizes:
    vision = VisionSizes(hidden_size=args.hidden, intermediate_size=2 * args.hidden, num_hidden_layers=4, num_attention_heads=4,
                         image_size=IMAGE, patch_size=8)
    return Sizes(0, args.hidden, args.layers, args.mlp, args.heads, 1, max(2, args.hidden // args.heads // 2 * 2), vision=vision)


def chunks_of(episode: Episode, statistics: Dict, chunk: int) -> List[np.ndarray]:
    """The normalised chunk [C, A] that begins with each frame; after the last action it is repeated, as the readers do."""
    actions_TA, _ = normalise(episode.actions, statistics)
    last = len(actions_TA) - 1
    return [actions_TA[np.minimum(np.arange(t, t + chunk), last)] for t in range(len(actions_TA))]


def training_samples(args) -> Tuple[List[Sample], List[np.ndarray], Dict]:
    """(samples, chunks, statistics): every frame of expert episodes of the known skills with its chunk, and frames with questions."""
    demos = [demo for skill in tabletop.SKILLS for demo in tabletop.collect_demos(skill, args.episodes, args.seed)]
    statistics = action_statistics(np.concatenate([demo.actions for demo in demos]), len(demos))
    samples, chunks = [], []
    for demo in demos:
        own = chunks_of(demo, statistics, args.chunk)
        chunks += own
        samples += [Sample(image, demo.language, chunk) for image, chunk in zip(demo.images, own)]
    asked = tabletop.mixed_frames(max(1, args.questions), tabletop.PRETRAINING + args.seed,
                                  questions=1.0).samples() if args.questions else []
    return samples + [one for one in asked if one.question], chunks, statistics


def fit(backbone: Any, samples: List[Sample], args) -> Dict:
    """AdamW over all parameters for args.minutes, the rate falling as a cosine of the clock; steps and the last loss."""
    rng, params = np.random.default_rng(args.seed), list(backbone.parameters())
    for p in params:
        p.requires_grad_(True)
    optimizer = torch.optim.AdamW(params, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.05)
    backbone.train()
    begin, seconds, count, losses = time.perf_counter(), args.minutes * 60, 0, []
    with tqdm(total=round(seconds), desc="pretraining", unit="s", mininterval=5.0) as bar:
        while (progress := (time.perf_counter() - begin) / seconds) < 1 or not count:
            batch = backbone.processor.encode_batch([samples[i] for i in rng.integers(0, len(samples), args.batch)])
            for group in optimizer.param_groups:
                group["lr"] = args.lr * min(1.0, (count + 1) / 100) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))) + 1e-6
            with torch.autocast(backbone.device.type, torch.bfloat16, enabled=backbone.device.type == "cuda"):
                loss = backbone(batch).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
            count += 1
            losses.append(loss.detach())
            bar.n = round(time.perf_counter() - begin)
    return {"steps": count, "first_loss": round(float(losses[0]), 4), "final_loss": round(float(torch.stack(losses[-20:]).mean()), 4)}


def main(argv: List[str]) -> int:
    args, _, _ = split(PRETRAIN_PI0, argv)
    torch.manual_seed(args.seed)
    samples, chunks, statistics = training_samples(args)
    texts = [*tabletop.corpus(), *tabletop.words()]
    make_folder(args.out, texts, chunks, {tabletop.PRETRAINED_KEY: statistics}, ("top",), sizes=sizes_of(args), seed=args.seed,
                codes=args.codes)
    backbone: Any = make_backbone(args.out, args.device)
    samples = [one.with_pictures(lambda picture: resize_uint8(picture, (IMAGE, IMAGE))) for one in samples]
    said = np.mean([len(backbone.processor.codec.encode(chunk)) for chunk in chunks[:1000]])
    size = sum(p.numel() for p in backbone.parameters())
    print(f"{size:,} parameters; {len(samples):,} samples, {said:.1f} codes for {chunks[0].size} values")
    trained = fit(backbone, samples, args)
    save_checkpoint(backbone.eval(), args.out)
    provenance = {"command": shlex.join(["vlakeep", "pretrain-tabletop-pi0", *argv]), "seed": args.seed, "samples": len(samples), **trained,
                  "device": args.device, "versions": library_versions(), "commit": source_commit(), "sha256": {
                      str(f.relative_to(args.out)): hashlib.sha256(f.read_bytes()).hexdigest()
                      for f in sorted(args.out.rglob("*")) if f.is_file() and f.name != "PROVENANCE.json"}}
    (args.out / "PROVENANCE.json").write_text(json.dumps(provenance, indent=1) + "\n")
    print(f"wrote {args.out}: {trained['steps']} steps, loss {trained['first_loss']} to {trained['final_loss']}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
