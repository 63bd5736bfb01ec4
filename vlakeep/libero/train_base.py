"""Stage `vlakeep train-base`: a mid-size base, which is an assembled model that has learnt LIBERO and keeps its language.

    vlakeep train-base --base midsize-parts --out $VLAKEEP_ROOT/midsize-trained --texts $VLAKEEP_ROOT/midsize-texts.safetensors \\
        --data libero_90=libero_90_expert_side_noise0_3,libero_object=libero_object_expert_side_noise0_3 \\
        --questions libero_90_pretraining --compile --stop_after 540                                                (one GPU)

scripts/build_midsize_base.sh runs it with all that comes before and after. Trained are adapters of one rank on every linear, the projector
and the rows of the action tokens (openvla/change.py); a batch has samples of demonstrations and questions, and beside them texts, on which
the model is held to what it said before. Pictures as in `pretrain-libero`: evaluate with --evaluate.center_crop true. Each KEY of --data
has action statistics of its own. Training is counted in steps; with --stop_after it ends before the last one with exit status 0, and the
same call goes on (openvla/pieces.py). With --done_after it makes as many steps as fit, and is done by then. --begin_with goes on from a
base of which only the small file is left (openvla/delta.py): that is how trainings on machines that are there for a time add up.

reads:  the base, data sets, probes, texts
writes: OUT-training/ (state, pictures as the model takes them), and with the last step OUT/ in float32, with PROVENANCE.json
"""

import json
import shlex
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

import numpy as np
import torch

from vlakeep.core.checkpoint import file_sha256
from vlakeep.core.config import BackboneConfig, ConfigError
from vlakeep.core.options import read
from vlakeep.core.storage import Storage, atomic_path, atomic_write, need_free
from vlakeep.data.formats import open_datasets
from vlakeep.data.sample import Sample
from vlakeep.libero.pretrain import Windows, labelled, questions, shown, shrink, stored_side
from vlakeep.libero.setup import rendered_with
from vlakeep.libero.stages import TRAIN_BASE
from vlakeep.models.load import make_backbone
from vlakeep.openvla.change import BesideTexts, begin_with, make_trainable, make_whole
from vlakeep.openvla.delta import read_difference
from vlakeep.openvla.pieces import Plan, train_in_pieces
from vlakeep.openvla.pretraining import Batches, picker, save
from vlakeep.openvla.texts import read_texts

BLOCK = 4096  # pictures that go to the device at a time


def main(argv: List[str]) -> int:
    started = time.perf_counter()
    args, config = read(TRAIN_BASE, argv)
    if args.done_after:
        args.steps = None
    storage, device = Storage.from_config(config), torch.device(args.device)
    storage.guard_write(args.out, what="base model")
    work = storage.guard_write(args.out.with_name(args.out.name + "-training"), what="state of the training")
    if (args.out / "PROVENANCE.json").is_file():
        print(f"{args.out} is trained")
        return 0
    if args.stop_after and args.done_after:
        raise ConfigError("--stop_after ends a piece of --steps, --done_after the whole training: give one of them")
    keyed = sets_by_key(args.data)
    if args.begin_with:
        read_difference(args.begin_with)  # before anything is computed
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    backbone: Any = make_backbone(BackboneConfig(checkpoint=args.base), device, storage.cache)
    side = backbone.processor.picture_size[0]
    work.mkdir(parents=True, exist_ok=True)

    with ExitStack() as stack:
        opened = {key: [stack.enter_context(d) for d in open_datasets(storage.data, names, 1.0, storage.cache)]
                  for key, names in keyed.items()}
        samples, statistics = [], {}
        for key, datasets in opened.items():
            more, statistics[key] = labelled(datasets)
            samples += more
        sets = [dataset for datasets in opened.values() for dataset in datasets]
        asked = [sample for name in args.questions for sample in questions(storage.probe_folder(name))]
        facts = {"data": {d.name: [d.fingerprint(), d.content] for d in sets}, "side": stored_side(side), "near": args.near,
                 "questions": {name: (storage.probe_folder(name) / "probe.json").read_text() for name in args.questions}}
        images = pictures(work / "pictures.npy", facts, len(samples) + len(asked), device,
                          lambda: seen(shown(sets, storage, stored_side(side), args.processes, args.near), asked, stored_side(side)))
    samples += asked
    print(f"{len(samples):,} samples, {len(asked):,} of them questions; {time.perf_counter() - started:.0f} s")

    backbone.norm_stats = statistics
    whole = sum(p.numel() for p in backbone.parameters())
    make_trainable(backbone, args.rank, args.seed)
    begun = {"sha256": file_sha256(args.begin_with), "made": begin_with(backbone, args.begin_with)["made"]} if args.begin_with else None
    trained = sum(p.numel() for p in backbone.parameters() if p.requires_grad)
    print(f"{trained:,} parameters are trained beside {whole:,}")
    make_batch = Batches(samples, backbone.processor, Windows(images, side), args.batch, device)
    positions = backbone.num_patches + make_batch(torch.zeros(args.batch, dtype=torch.int64, device=device)).input_ids.shape[1]
    texts_NS, said = read_texts(args.texts, positions, backbone.weights_sha256) if args.texts else (None, None)
    if args.compile:
        backbone.compile_layers()
    generator = torch.Generator(device=device).manual_seed(args.seed)
    drawn = Rows(picker(samples, args.batch, args.share, generator, device), make_batch, texts_NS, args.text_rows, generator, device)
    loss = BesideTexts(backbone, args.text_weight, make_batch.labels)
    settings = {**{name: getattr(args, name) for name in ("steps", "batch", "lr", "seed", "rank", "share", "text_rows", "text_weight")},
                **({"near": True} if args.near else {}),  # a state that does not say so is of exact pictures
                **({"begun": begun["sha256"]} if begun else {}),
                "base": backbone.weights_sha256, "data": facts["data"], "questions": facts["questions"], "texts": said}
    plan = Plan(work, args.steps, drawn.size, args.lr, args.seed, settings, args.stop_after and started + args.stop_after,
                args.done_after and started + args.done_after)
    done = train_in_pieces(backbone, loss, drawn.batch, drawn.pick, generator, plan, lambda: {"kl": loss.kl.item()})
    if done is None:
        print("not done: the same command goes on")
        return 0
    make_whole(backbone)
    words = [arg.replace(str(args.out), "OUT").replace(str(storage.root), "ROOT") for arg in argv]
    save(backbone, args, shlex.join(["vlakeep", "train-base", *words]), done, torch.float32, samples=len(samples), data=keyed,
         parameters=trained, base=backbone.weights_sha256, texts=said, **({"begun": begun} if begun else {}),
         renderers={d.name: rendered_with(storage.data / d.name) for d in sets})
    return 0


def sets_by_key(pairs: List[str]) -> Dict[str, List[str]]:
    """KEY=NAME words as key -> names of data sets. ConfigError for another word."""
    found: Dict[str, List[str]] = {}
    for pair in pairs:
        key, _, name = pair.partition("=")
        if not key or not name:
            raise ConfigError(f"--data {pair}: must be KEY=NAME, such as libero_object=libero_object_expert")
        found.setdefault(key, []).append(name)
    return found


def seen(episodes: Iterator[np.ndarray], asked: List[Sample], side: int) -> Iterator[np.ndarray]:
    """Pictures of demonstrations and then of questions, some at a time, uint8 [n, side, side, 3]."""
    yield from episodes
    for sample in asked:
        yield shrink(sample.image, side)[None]


def pictures(file: Path, facts: Dict, count: int, device: torch.device, make) -> torch.Tensor:
    """uint8 [N, side, side, 3] on the device. They are made once: a piece that goes on finds them in `file`, whose facts lie beside it."""
    note = file.with_suffix(".json")
    known: Optional[Dict] = json.loads(note.read_text()) if note.is_file() and file.is_file() else None
    if known != json.loads(json.dumps(facts)):
        note.unlink(missing_ok=True)
        shape = (count, facts["side"], facts["side"], 3)
        need_free(file, int(np.prod(shape)), "the pictures of the training")
        with atomic_path(file) as partial:
            array = np.lib.format.open_memmap(partial, "w+", np.uint8, shape)
            row = 0
            for some in make():
                array[row:row + len(some)] = some
                row += len(some)
            assert row == count, f"{row} pictures of {count} samples"
            array.flush()
            del array
        with atomic_write(note, "w") as opened:
            json.dump(facts, opened)
    array = np.load(file, mmap_mode="r")
    images = torch.empty(array.shape, dtype=torch.uint8, device=device)
    for row in range(0, len(array), BLOCK):
        images[row:row + BLOCK] = torch.from_numpy(array[row:row + BLOCK].copy())
    return images


class Rows:
    """What a step reads: rows of the samples and, behind them in one tensor, rows of the texts."""

    def __init__(self, pick, make_batch, texts_NS: Optional[torch.Tensor], rows: int, generator, device):
        self._pick, self._make_batch, self._generator = pick, make_batch, generator
        self._texts_NS, self._rows = (None, 0) if texts_NS is None else (texts_NS.to(device), rows)
        self.size = len(pick()) + self._rows

    def pick(self) -> torch.Tensor:
        picked_B = self._pick()
        if self._texts_NS is None:
            return picked_B
        more_T = torch.randint(len(self._texts_NS), (self._rows,), generator=self._generator, device=picked_B.device)
        return torch.cat([picked_B, more_T])

    def batch(self, picked: torch.Tensor):
        """(batch, ids [T, S] of the texts or None)."""
        if self._texts_NS is None:
            return self._make_batch(picked), None
        return self._make_batch(picked[:-self._rows]), self._texts_NS[picked[-self._rows:]]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
