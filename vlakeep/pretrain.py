"""Stage `vlakeep pretrain-tabletop`: train the small base model that ships with vlakeep, from nothing.

    vlakeep pretrain-tabletop --out vlakeep/assets/tabletop-base --minutes 8          (one GPU)
    vlakeep pretrain-tabletop --out /tmp/try --minutes 0.2 --frames 4000 --device cpu   (to see that it runs)

It is the OpenVLA architecture (fused DINOv2-type and SigLIP-type ViT, projector, Llama) in a tiny configuration, trained with all
parameters on visual questions and the known skills of the tabletop benchmark; the held-out skill never occurs.
Not a stage of an experiment: its options are its own, and `--out` may lie outside the storage root because it is made to ship.

writes: OUT/ in the official checkpoint format, in bfloat16, with PROVENANCE.json (command, seed, data, versions, hashes, time)
"""

import argparse
import hashlib
import json
import math
import sys
import time
from pathlib import Path
from typing import List

import numpy as np
import torch
from tqdm import tqdm

from vlakeep.backbones.base import make_backbone
from vlakeep.backbones.format import init_checkpoint, save_checkpoint
from vlakeep.backbones.processor import Processor
from vlakeep.backbones.tiny import build_tiny_tokenizer
from vlakeep.benchmarks import tabletop
from vlakeep.config import BackboneConfig
from vlakeep.data.prompts import encode_text
from vlakeep.data.sample import IGNORE_INDEX, Batch
from vlakeep.data.statistics import action_statistics
from vlakeep.rundir import library_versions, source_commit


def model_config(patch: int, hidden: int, layers: int, heads: int, mlp: int, vocab: int) -> dict:
    """config.json of the tiny model, keys as the official one."""
    return {
        "architectures": ["OpenVLAForActionPrediction"], "model_type": "openvla", "arch_specifier": "no-align+fused-gelu-mlp",
        "vision_backbone_id": "dinosiglip-vit-so-224px", "use_fused_vision_backbone": True, "image_resize_strategy": "resize-naive",
        "timm_model_ids": [f"vlakeep_vit_tiny_patch{patch}_dinov2", f"vlakeep_vit_tiny_patch{patch}_siglip"],
        "timm_override_act_layers": [None, None], "image_sizes": [64, 64],
        "llm_backbone_id": "llama2-7b-pure", "hf_llm_id": "meta-llama/Llama-2-7b-hf", "llm_max_length": 128,
        "text_config": {"model_type": "llama", "hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers,
                        "num_attention_heads": heads, "num_key_value_heads": heads, "vocab_size": vocab,
                        "max_position_embeddings": 256, "torch_dtype": "float32"},
        "n_action_bins": 256, "output_projector_states": False, "pad_to_multiple_of": 64,
    }


def token_matrix(samples, processor):
    """Encode each distinct target once: (ids [N, L], labels [N, L]) padded to one length."""
    encoded, cache = [], {}
    for sample in tqdm(samples, desc="tokens", mininterval=2.0):
        key = (sample.instruction, sample.answer, None if sample.action is None else sample.action.tobytes())
        if key not in cache:
            item = encode_text(sample, processor)
            cache[key] = item
        encoded.append(cache[key])
    width = max(len(ids) for ids, _ in encoded)
    ids_NL = torch.full((len(encoded), width), processor.pad_token_id)
    labels_NL = torch.full((len(encoded), width), IGNORE_INDEX)
    for row, (ids, labels) in enumerate(encoded):
        ids_NL[row, :len(ids)] = torch.as_tensor(ids)
        labels_NL[row, :len(labels)] = torch.as_tensor(labels)
    return ids_NL, labels_NL


class Normalise:
    """uint8 frames on a device to pixel values as the image processor makes them (no resizing at 64 px)."""

    def __init__(self, processor, device):
        self._views = [(torch.tensor(mean, device=device).view(1, 3, 1, 1), torch.tensor(std, device=device).view(1, 3, 1, 1))
                       for mean, std in zip(processor.image_processor.means, processor.image_processor.stds)]

    def __call__(self, images_NHWC: torch.Tensor) -> torch.Tensor:
        x = images_NHWC.permute(0, 3, 1, 2).float() / 255
        return torch.cat([(x - mean) / std for mean, std in self._views], dim=1)


class Step:
    """One optimizer step on rows of the data that lie on the device; on a GPU replayed as one CUDA graph.

    The model is so small that launching its kernels one by one takes several times as long as running them.
    """

    def __init__(self, backbone, optimizer, make_batch, size: int, device: torch.device):
        self._backbone, self._optimizer, self._make_batch = backbone, optimizer, make_batch
        self._params = [p for group in optimizer.param_groups for p in group["params"]]
        self.pick_B = torch.zeros(size, dtype=torch.int64, device=device)
        self._graph, self.out = None, None
        if device.type == "cuda":
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    self._run()
            torch.cuda.current_stream().wait_stream(side)
            try:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    self._run()
                self._graph = graph
            except RuntimeError as error:
                print(f"no CUDA graph ({error}); kernels are launched one by one")

    def _run(self) -> None:
        self._optimizer.zero_grad(set_to_none=False)
        # Without autocast's weight cache: a captured graph must cast the weights of its own replay.
        with torch.autocast("cuda", torch.bfloat16, enabled=self.pick_B.is_cuda, cache_enabled=False):
            self.out = self._backbone(self._make_batch(self.pick_B))
        self.out.loss.backward()
        torch.nn.utils.clip_grad_norm_(self._params, 1.0)
        self._optimizer.step()

    def __call__(self, pick_B: torch.Tensor, lr: float) -> None:
        self.pick_B.copy_(pick_B)
        for group in self._optimizer.param_groups:
            group["lr"].fill_(lr) if torch.is_tensor(group["lr"]) else group.update(lr=lr)
        self._graph.replay() if self._graph else self._run()


def main(argv: List[str]) -> int:
    parser = argparse.ArgumentParser("vlakeep pretrain-tabletop", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=8.0, help="time for optimisation; data generation comes on top")
    parser.add_argument("--frames", type=int, default=800_000)
    parser.add_argument("--questions", type=float, default=0.4, help="share of frames that carry a question")
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--patch", type=int, default=16, choices=[8, 16])
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--mlp", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=768)
    parser.add_argument("--processes", type=int, default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    if args.device == "cuda":
        torch.cuda.set_device(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True

    args.out.mkdir(parents=True, exist_ok=True)
    build_tiny_tokenizer(tabletop.corpus(), tabletop.words(), args.out, args.vocab)
    init_checkpoint(model_config(args.patch, args.hidden, args.layers, args.heads, args.mlp, args.vocab + 64), args.out, seed=args.seed)
    backbone = make_backbone(BackboneConfig(checkpoint=str(args.out)), torch.device(args.device))
    processor = Processor.from_folder(args.out)
    params = list(backbone.parameters())
    print(f"{sum(p.numel() for p in params):,} parameters")

    started = time.perf_counter()
    images, samples = tabletop.training_frames(args.frames, args.seed, args.processes, args.questions)
    print(f"{len(samples):,} frames in {time.perf_counter() - started:.0f} s")
    backbone.norm_stats = {"tabletop": action_statistics(np.stack([s.action for s in samples if s.action is not None]), 0)}
    images = torch.from_numpy(np.ascontiguousarray(images)).to(args.device)
    ids_NL, labels_NL = (t.to(args.device) for t in token_matrix(samples, processor))
    first_label = int((labels_NL != IGNORE_INDEX).any(0).int().argmax())
    print(f"data ready after {time.perf_counter() - started:.0f} s; {ids_NL.shape[1]} text tokens")

    decay = [p for p in params if p.ndim >= 2]
    rest = [p for p in params if p.ndim < 2]
    cuda = args.device == "cuda"
    rate = torch.tensor(args.lr, device=args.device) if cuda else args.lr
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    for group in groups:
        group["lr"] = rate.clone() if cuda else rate
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), capturable=cuda)

    normalise = Normalise(processor, args.device)

    def make_batch(pick_B):
        return Batch(input_ids=ids_NL[pick_B], attention_mask=ids_NL[pick_B] != processor.pad_token_id, labels=labels_NL[pick_B],
                     pixel_values=normalise(images[pick_B]), dataset_names=["tabletop"] * args.batch, first_label=first_label)

    generator = torch.Generator(device=args.device).manual_seed(args.seed)
    backbone.train()
    train = Step(backbone, optimizer, make_batch, args.batch, torch.device(args.device))
    begin, step, seconds, curve = time.perf_counter(), 0, args.minutes * 60, []
    bar = tqdm(total=round(seconds), desc="pretraining", unit="s", mininterval=5.0)
    while True:
        # The schedule follows the clock, so that one number says how long the job takes on any GPU.
        progress = (time.perf_counter() - begin) / seconds
        if progress >= 1:
            break
        lr = args.lr * min(1.0, (step + 1) / 500) * 0.5 * (1 + math.cos(math.pi * progress)) + 1e-6
        train(torch.randint(len(samples), (args.batch,), generator=generator, device=args.device), lr)
        out = train.out
        if step % 50 == 0 and cuda:
            torch.cuda.synchronize()  # the clock decides, so the queue must not run far ahead of it
        step += 1
        if step % 100 == 0:
            curve.append([step, round(out.loss.item(), 4), round((out.correct / out.num_labelled).item(), 4)])
            bar.n = round(time.perf_counter() - begin)
            bar.set_postfix(step=step, loss=curve[-1][1], accuracy=curve[-1][2])
        if step % 2000 == 0:
            print(f"step {step}: loss {curve[-1][1]} token accuracy {curve[-1][2]}", flush=True)
    bar.close()
    backbone.eval()
    save_checkpoint(backbone, args.out, dtype=torch.bfloat16)
    provenance = {
        "command": "vlakeep pretrain-tabletop " + " ".join(argv).replace(str(args.out), "vlakeep/assets/" + args.out.name),
        "steps": step, "batch": args.batch, "seed": args.seed,
        "frames": len(samples), "minutes": args.minutes, "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "final": curve[-1] if curve else None, "curve": curve[::10], "versions": library_versions(), "commit": source_commit(),
        "sha256": {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(args.out.glob("*")) if f.name != "PROVENANCE.json"},
    }
    (args.out / "PROVENANCE.json").write_text(json.dumps(provenance, indent=1) + "\n")
    print(f"wrote {args.out}: {step} steps")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
