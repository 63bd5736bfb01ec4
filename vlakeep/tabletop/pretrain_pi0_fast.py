"""Stage `vlakeep pretrain-tabletop-pi0`: train the small pi0-FAST that speaks the tabletop, from nothing.

    vlakeep pretrain-tabletop-pi0 --out vlakeep/assets/tabletop-pi0 --minutes 4 --compile                        (one GPU)
    vlakeep pretrain-tabletop-pi0 --out $VLAKEEP_ROOT/tmp/try --minutes 0.2 --frames 4000 --batch 64 --device cpu   (to see that it runs)

It is pi0-FAST (SigLIP, projector, Gemma with a prefix that sees itself, FAST chunks) in a tiny configuration: the tokenizer has the words
of the tabletop, the codec is fitted on the chunks of its expert. The known skills and the visual questions are learnt with all parameters;
the new skills never occur. A label is what the expert would do next if nothing disturbed it, at frames of disturbed episodes.
The tabletop shows no state, so that of the prompt is empty.
`--out` may lie in vlakeep/assets too, outside the storage root, because it is made to ship.

writes: OUT/ in lerobot's checkpoint format, in bfloat16, with PROVENANCE.json (command, seed, data, versions, hashes, time)

Axes: N samples, U different rows, L text tokens, C actions of a chunk.
"""

import shlex
import sys
import time
from dataclasses import replace
from typing import Any, Callable, Dict, List, Tuple

import numpy as np
import torch
from tqdm import tqdm

from vlakeep.core.options import read
from vlakeep.core.storage import SHIPS, Storage
from vlakeep.data.sample import IGNORE_INDEX, Sample
from vlakeep.data.statistics import action_statistics, normalise
from vlakeep.models.load import make_backbone
from vlakeep.openvla.pretraining import optimise, ready, save
from vlakeep.pi0_fast.model import Sizes, VisionSizes
from vlakeep.pi0_fast.processor import Pi0FastBatch, Processor
from vlakeep.pi0_fast.tiny import make_folder
from vlakeep.tabletop import benchmark as tabletop
from vlakeep.tabletop.render import SIZE
from vlakeep.tabletop.stages import PRETRAIN_PI0

FITTED_ON = 100_000  # chunks of the codec
ROUND = 8  # columns of text and of labels are a multiple of it: kernels that were fused for a few frames serve for many


def sizes_of(args) -> Sizes:
    vision = VisionSizes(hidden_size=args.hidden, intermediate_size=2 * args.hidden, num_hidden_layers=4, num_attention_heads=args.heads,
                         image_size=SIZE, patch_size=args.patch)
    return Sizes(0, args.hidden, args.layers, args.mlp, args.heads, 1, max(2, args.hidden // args.heads // 2 * 2), vision=vision)


def normalised(samples: List[Sample]) -> Tuple[List[Sample], Dict]:
    """(the samples with their chunks [C, A] made normal, statistics of the next actions)."""
    actions_NCA = np.stack([sample.action for sample in samples if sample.action is not None])
    statistics = action_statistics(actions_NCA[:, 0], 0)
    chunks = iter(normalise(actions_NCA, statistics)[0])
    return [sample if sample.action is None else replace(sample, action=next(chunks)) for sample in samples], statistics


def rows_of(samples: List[Sample], processor: Processor) -> Tuple[np.ndarray, ...]:
    """(row of each sample [N], ids [U, L], labels [U, L], lengths of the prefix [U], of the row [U]); each different text is encoded
    once."""
    place_N, known, answers = np.zeros(len(samples), dtype=np.int64), {}, {}
    rows: List[Tuple[List[int], int, int]] = []  # ids, length of the prefix, where the labels begin
    for i, sample in enumerate(tqdm(samples, desc="tokens", mininterval=2.0)):
        answer = sample.answer if sample.action is None else sample.action.tobytes()
        if answer not in answers:
            answers[answer] = processor.target_ids(sample)
        key = (sample.instruction, answer)
        if key not in known:
            prompt, whole = processor.prefix_ids(sample), processor.whole_prompt(sample)
            known[key] = len(rows)
            rows.append(([*whole, *answers[answer]], len(prompt), len(whole)))
        place_N[i] = known[key]
    length_U = np.array([len(ids) for ids, _, _ in rows])
    ids_UL = np.full((len(rows), -(-length_U.max() // ROUND) * ROUND), processor.pad_token_id)
    labels_UL = np.full_like(ids_UL, IGNORE_INDEX)
    for row, (ids, _, first) in enumerate(rows):
        ids_UL[row, :len(ids)] = ids
        labels_UL[row, first:len(ids)] = ids[first:]
    return place_N, ids_UL, labels_UL, np.array([prefix for _, prefix, _ in rows]), length_U


def batches(frames: np.ndarray, samples: List[Sample], processor: Processor, args) -> Callable[[torch.Tensor], Pi0FastBatch]:
    """pick_B -> those samples as the processor makes them, put together on the device, where all of them lie."""
    found = rows_of(samples, processor)
    place_N, ids_UL, labels_UL, prefix_U, length_U = (torch.from_numpy(one).to(args.device) for one in found)
    images = torch.from_numpy(np.ascontiguousarray(frames)).to(args.device)
    columns_L = torch.arange(ids_UL.shape[1], device=args.device)
    longest = -(-int((found[2] != IGNORE_INDEX).sum(1).max()) // ROUND) * ROUND
    seen_B1 = torch.ones(args.batch, 1, dtype=torch.bool, device=args.device)

    def make_batch(pick_B: torch.Tensor) -> Pi0FastBatch:
        row_B = place_N[pick_B]
        pixels_B13HW = images[pick_B].permute(0, 3, 1, 2)[:, None].float() / 255 * 2 - 1
        return Pi0FastBatch(ids_UL[row_B], columns_L < length_U[row_B][:, None], labels_UL[row_B], pixels_B13HW, [""] * args.batch,
                            first_label=1, prefix=prefix_U[row_B], cameras=seen_B1, longest=longest)
    return make_batch


def compile_layers(backbone: Any) -> None:
    """Fuse the kernels of the blocks that the model repeats."""
    for layer in (*backbone.pi0.paligemma.model.vision_tower.vision_model.encoder.layers, *backbone.decoder_layers):
        layer.compile()


def main(argv: List[str]) -> int:
    args, config = read(PRETRAIN_PI0, argv)
    storage = Storage.from_config(config, create=False)
    storage.guard_write(args.out, what="base model", also=SHIPS)
    ready(args)
    started = time.perf_counter()
    frames, samples = tabletop.training_frames(args.frames, args.seed, args.processes, args.questions, args.chunk)
    samples, statistics = normalised(samples)
    chunks = [sample.action for sample in samples if sample.action is not None]
    make_folder(args.out, [*tabletop.corpus(), *tabletop.words()], chunks[:FITTED_ON], {tabletop.PRETRAINED_KEY: statistics}, ("top",),
                sizes=sizes_of(args), seed=args.seed, codes=args.codes, pieces=args.vocab)
    backbone: Any = make_backbone(args.out, args.device)
    make_batch = batches(frames, samples, backbone.processor, args)
    said = np.mean([len(backbone.processor.codec.encode(chunk)) for chunk in chunks[:1000]])
    print(f"{sum(p.numel() for p in backbone.parameters()):,} parameters; {len(samples):,} frames in {time.perf_counter() - started:.0f} "
          f"s, {said:.1f} codes for {chunks[0].size} values", flush=True)
    for parameter in backbone.parameters():
        parameter.requires_grad_(True)
    if args.compile:
        compile_layers(backbone)
    trained = optimise(backbone, samples, make_batch, args)
    words = [arg.replace(str(args.out), f"vlakeep/assets/{args.out.name}").replace(str(storage.root), "ROOT") for arg in argv]
    save(backbone, args, shlex.join(["vlakeep", "pretrain-tabletop-pi0", *words]), trained, frames=len(samples))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
