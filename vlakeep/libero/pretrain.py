"""Stage `vlakeep pretrain-libero`: a small model of the OpenVLA architecture, trained from nothing on LIBERO demonstrations.

    vlakeep libero-demos --suite libero_object --demos 60 --workers 16 --noise 0.3 --approach side
    vlakeep libero-vqa --suite libero_object --items 2000 --questions_per_scene 4 --workers 16 --probe.name questions
    vlakeep pretrain-libero --data libero_object_expert_side_noise0_3 --questions questions --key libero_object \\
                            --out $VLAKEEP_ROOT/hf_cache/libero_object-base --patch 16 --compile --minutes 8        (one GPU)

scripts/build_libero_base.sh runs these, with two sets of demonstrations. All parameters are trained on the demonstrations'
actions and, with --questions, on the questions of probes. Pictures are those of the evaluation (official size, then the
model's); a random window of nine tenths of the area is cut from them, and brightness, contrast and saturation vary: evaluate
with --evaluate.center_crop true. The un-normalisation key is --key. Not a stage of an experiment: its options are its own.

writes: OUT/ in the official checkpoint format, in bfloat16, with PROVENANCE.json (command, seed, data, versions, hashes, time)
"""

import json
import multiprocessing
import os
import shlex
import sys
from typing import Iterator, List, Optional, Sequence, Tuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from vlakeep.core.config import ConfigError
from vlakeep.core.options import read
from vlakeep.core.storage import Storage
from vlakeep.data.dataset import DemoDataset
from vlakeep.data.formats import open_datasets
from vlakeep.data.images import resize_uint8
from vlakeep.data.sample import Sample
from vlakeep.data.statistics import action_statistics, normalise, standardise
from vlakeep.libero.benchmark import SUITES, instructions, load_suite
from vlakeep.libero.setup import rendered_with, require_libero
from vlakeep.libero.stages import PRETRAIN
from vlakeep.openvla.pretraining import fit, new_model, save
from vlakeep.probe.probe_set import ProbeSet

OFFICIAL = (224, 224)  # what the evaluation hands to the model's own preprocessing
AREA = 0.9  # of the official centre crop
LIGHT = 0.2  # brightness is shifted by up to this share of white; contrast and saturation are scaled by 1 - LIGHT to 1 + LIGHT


def main(argv: List[str]) -> int:
    args, config = read(PRETRAIN, argv)
    if args.image % args.patch:
        raise ConfigError(f"--image {args.image} must be a multiple of --patch {args.patch}")
    storage = Storage.from_config(config)
    storage.guard_write(args.out, what="base model")
    require_libero()

    frames, samples, statistics = demonstrations(args, storage)
    for name in filter(None, args.questions.split(",")):
        more = questions(storage.probe_folder(name))
        frames.append(np.stack([shrink(sample.image, stored_side(args.image)) for sample in more]))
        samples += more
    images = torch.from_numpy(np.concatenate(frames)).to(args.device)
    print(f"{len(samples):,} samples, {sum(sample.question for sample in samples):,} of them questions")
    # The instructions of every suite, so that fine-tuning on another one finds its words in the vocabulary.
    spoken = {text for suite in SUITES for text in instructions(suite, range(load_suite(suite).n_tasks))}
    corpus = sorted({text for sample in samples for text in (sample.instruction, sample.answer or "")} | spoken)
    words = sorted({word for text in corpus for word in text.replace("?", "").replace(",", "").split()})
    backbone, processor = new_model(args, corpus, words, args.image, "small")
    backbone.norm_stats = {args.key: statistics}
    trained = fit(backbone, processor, samples, Windows(images, args.image), args, args.share)
    said = [arg.replace(str(args.out), "OUT").replace(str(storage.root), "ROOT") for arg in argv]
    command = shlex.join(["vlakeep", "pretrain-libero", *said])
    names = args.data.split(",")
    save(backbone, args, command, trained, samples=len(samples), data=names,
         renderers={name: rendered_with(storage.data / name) for name in names})
    return 0


def stored_side(image: int) -> int:
    """Pixels of a stored picture's side, of which a window of `image` pixels is AREA of the whole."""
    return round(image / AREA ** 0.5)


def shrink(image_HWC: np.ndarray, side: int, near: bool = False) -> np.ndarray:
    """To the evaluation's size and from there to `side`, the way the image processor does it. near: the first step by Pillow, in less than
    half the time; the result is off by a grey level here and there."""
    if near:
        official = Image.fromarray(image_HWC).resize(OFFICIAL, Image.LANCZOS)
    else:
        official = Image.fromarray(resize_uint8(image_HWC, OFFICIAL))
    return np.asarray(official.resize((side, side), Image.BICUBIC))


def demonstrations(args, storage: Storage) -> Tuple[List[np.ndarray], List[Sample], dict]:
    """(pictures per episode, samples without them, joint action statistics of all data sets)."""
    datasets = open_datasets(storage.data, args.data.split(","), 1.0, storage.cache)
    samples, statistics = labelled(datasets)
    return list(shown(datasets, storage, stored_side(args.image), args.processes)), samples, statistics


def labelled(datasets: Sequence[DemoDataset]) -> Tuple[List[Sample], dict]:
    """(a sample a frame, without its picture; joint action statistics, by which their actions are scaled)."""
    actions = [standardise(d.index.actions_NA, d.name) for d in datasets]
    statistics = action_statistics(np.concatenate(actions), sum(map(len, datasets)))
    samples: List[Sample] = []
    for dataset, raw_NA in zip(datasets, actions):
        scaled_NA, _ = normalise(raw_NA, statistics)
        start = 0
        for episode, length in enumerate(dataset.lengths):
            samples += [Sample(None, dataset.instruction(episode, t), scaled_NA[start + t]) for t in range(length)]
            start += int(length)
        assert start == len(raw_NA), f"{dataset.name} has episodes without an instruction"
    return samples, statistics


def shown(datasets: Sequence[DemoDataset], storage: Storage, side: int, processes: Optional[int],
          near: bool = False) -> Iterator[np.ndarray]:
    """Pictures of every episode, uint8 [T, side, side, 3], in the order of `labelled`."""
    jobs = [(str(storage.data), str(storage.cache), d.name, e, side, near) for d in datasets for e in range(len(d))]
    with multiprocessing.get_context("spawn").Pool(processes or os.cpu_count()) as pool:
        yield from tqdm(pool.imap(_episode, jobs, chunksize=8), total=len(jobs), desc="pictures", mininterval=2.0)


_open: dict = {}  # data sets that a process of the pool has open


def _episode(job) -> np.ndarray:
    root, cache, name, episode, side, near = job
    if name not in _open:
        _open[name], = open_datasets(root, [name], 1.0, cache)
    return np.stack([shrink(_open[name].image(episode, t), side, near) for t in range(_open[name].lengths[episode])])


def questions(folder) -> List[Sample]:
    """The probe's items that have an answer."""
    probe, path = ProbeSet(folder), folder / "answers.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"no answers.jsonl in {folder}: --questions takes probes made by `vlakeep libero-vqa`")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    found = probe.samples([row["item"] for row in rows])
    return [Sample(sample.image, row["question"], question=True, answer=row["answer"]) for sample, row in zip(found, rows)]


class Windows:
    """Random windows of stored pictures under random light; rows [B] in, [B, side, side, 3] from 0 to 255 out, on the device."""

    def __init__(self, images_NHWC: torch.Tensor, side: int):
        self._images, self._side = images_NHWC, side
        self._room = images_NHWC.shape[1] - side + 1
        self._steps = torch.arange(side, device=images_NHWC.device)

    def __call__(self, pick_B: torch.Tensor) -> torch.Tensor:
        size = len(pick_B)

        def draw(count=1):
            return torch.rand(size, count, 1, 1, device=pick_B.device)

        def around_one():
            return 1 + LIGHT * (2 * draw() - 1)

        row_B, column_B = ((draw()[:, 0, 0, 0] * self._room).long() for _ in range(2))
        rows_BH, columns_BW = row_B[:, None] + self._steps, column_B[:, None] + self._steps
        x = self._images[pick_B[:, None, None], rows_BH[:, :, None], columns_BW[:, None, :]].float()
        x = x + 255 * LIGHT * (2 * draw() - 1)
        mean = x.mean(dim=(1, 2, 3), keepdim=True)
        x = mean + around_one() * (x - mean)
        grey = x.mean(dim=3, keepdim=True)
        return (grey + around_one() * (x - grey)).clamp(0, 255)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
