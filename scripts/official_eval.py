"""A trained adapter, exported and evaluated by the unchanged get_vla / get_processor / get_vla_action of the official checkout.

    python scripts/official_eval.py --openvla_dir DIR --golden DIR --tokenizer DIR [--steps 30]

Trains LoRA for some steps on the golden LIBERO-like set with the golden tiny model, exports it, and asks both sides for actions on the
golden evaluation frame and on frames of the data, with and without the centre crop: the official code with the merged folder, ours with the
adapter on the base. On a CPU the official loader's flash-attention request becomes sdpa and its bfloat16 float32; nothing else is changed.
Needs the official environment with TensorFlow.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from official_trace import write_golden_checkpoint

from vlakeep.benchmarks.policy import attempt
from vlakeep.core.compat import import_timm
from vlakeep.core.config import load_config
from vlakeep.core.storage import Storage
from vlakeep.core.target import read_action_statistics, target_checkpoint
from vlakeep.data.formats import open_datasets
from vlakeep.data.images import center_crop
from vlakeep.data.sample import Sample
from vlakeep.export import run_export
from vlakeep.models.adapters import load_adapter
from vlakeep.models.load import make_backbone
from vlakeep.train import run_training

DATASET = "libero_spatial_no_noops"


def load_official_evaluation(openvla: Path, folder: Path):
    """act(frames, tasks, crop) -> actions [N, 7] of the official evaluation code, one frame at a time."""
    from transformers import AutoModelForVision2Seq

    sys.path.insert(0, str(openvla))
    from experiments.robot import openvla_utils

    load = AutoModelForVision2Seq.from_pretrained
    openvla_utils.torch = SimpleNamespace(**{**vars(torch), "bfloat16": torch.float32})
    openvla_utils.AutoModelForVision2Seq = SimpleNamespace(
        register=lambda *args: AutoModelForVision2Seq.register(*args, exist_ok=True),
        from_pretrained=lambda *args, **kwargs: load(*args, **{**kwargs, "attn_implementation": "sdpa"}))
    openvla_utils.DEVICE = torch.device("cpu")
    for name in ("AutoConfig", "AutoImageProcessor", "AutoProcessor"):
        auto = getattr(openvla_utils, name)
        setattr(openvla_utils, name, SimpleNamespace(register=lambda *args, auto=auto: auto.register(*args, exist_ok=True),
                                                     from_pretrained=auto.from_pretrained))
    config = SimpleNamespace(pretrained_checkpoint=str(folder), load_in_8bit=False, load_in_4bit=False)
    vla, processor = openvla_utils.get_vla(config), openvla_utils.get_processor(config)

    def act(frames, tasks, crop: bool):
        return np.stack([openvla_utils.get_vla_action(vla, processor, str(folder), {"full_image": frame}, task, DATASET, center_crop=crop)
                         for frame, task in zip(frames, tasks)])

    return act


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--openvla_dir", type=Path, required=True)
    parser.add_argument("--golden", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=30)
    args = parser.parse_args()
    import_timm()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        checkpoint = root / "hf_cache" / "golden-tiny"
        checkpoint.mkdir(parents=True)
        write_golden_checkpoint(args.golden, args.tokenizer, checkpoint)
        shutil.copytree(args.golden / "rlds" / "tfds", root / "datasets")
        config = load_config(None, [
            "--root", str(root), "--name", "golden", "--backbone.checkpoint", str(checkpoint),
            "--data.datasets", f"[{DATASET}]",
            "--lora.modules", "[all-linear]", "--lora.rank", "8", "--lora.alpha", "8", "--train.steps", str(args.steps),
            "--train.batch_size", "8", "--train.lr", "2e-3", "--train.warmup", "0", "--train.tensorboard", "false",
            "--export.target", "golden", "--device", "cpu"])
        storage = Storage.from_config(config)
        run_training(config, storage)
        merged = run_export(config, storage)
        dataset = open_datasets(storage.data, [DATASET])[0]
        raw = [dataset.frame(episode, 0) for episode in range(len(dataset))]
        golden = np.load(args.golden / "eval" / "image_golden.npz")["get_libero_image_224"]
        frames = [golden] * 3 + [np.asarray(frame.image) for frame in raw]
        tasks = ["pick up the black bowl and place it on the plate", "turn on the stove", "open the middle drawer"]
        tasks += [frame.instruction for frame in raw]
        backbone = make_backbone(config.backbone, "cpu", storage.cache)
        folder = target_checkpoint("golden", storage)
        load_adapter(backbone, folder / "adapter")
        backbone.norm_stats = read_action_statistics(folder)
        act, failed = load_official_evaluation(args.openvla_dir.absolute(), merged), 0
        for crop in (False, True):
            theirs = act(frames, tasks, crop)
            samples = [Sample(center_crop(f) if crop else f, task) for f, task in zip(frames, tasks)]
            ours = attempt(backbone, samples, DATASET)[0][:, 0]
            same = (theirs == ours).all(1)
            failed += int((~same).sum())
            print(f"centre crop {crop}: {int(same.sum())} of {len(frames)} frames with identical actions, {len(np.unique(theirs, axis=0))} "
                  f"different ones, largest difference {np.abs(theirs - ours).max():.2e}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
