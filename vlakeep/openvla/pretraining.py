"""Training a small model from nothing, with all parameters, on samples that lie on the device.

The stages that build the models of this project use it: pretrain-tabletop and pretrain-libero for the OpenVLA architecture,
pretrain-tabletop-pi0 for the part that knows none (optimise, save), train-base for batches and steps (pieces.py counts them). Fine-tuning
does not; it goes through the training loop of vlakeep/train.py.
"""

import hashlib
import json
import math
import time
from typing import Any, Callable, Dict, List, Optional, Tuple

import torch
from tqdm import tqdm

from vlakeep.core.config import BackboneConfig
from vlakeep.core.provenance import library_versions, source_commit
from vlakeep.core.storage import atomic_write
from vlakeep.data.sample import IGNORE_INDEX, Batch
from vlakeep.models.load import make_backbone
from vlakeep.models.merge import save_checkpoint
from vlakeep.openvla.format import init_checkpoint
from vlakeep.openvla.processor import Processor
from vlakeep.openvla.prompts import encode_text
from vlakeep.openvla.tiny import build_tiny_tokenizer

WARM_UP = 500  # steps


def model_config(args, image_size: int, vit: str) -> dict:
    """config.json of the small model, keys as the official one. vit: size of the vision models, as in openvla/tiny.py."""
    return {
        "architectures": ["OpenVLAForActionPrediction"], "model_type": "openvla", "arch_specifier": "no-align+fused-gelu-mlp",
        "vision_backbone_id": "dinosiglip-vit-so-224px", "use_fused_vision_backbone": True, "image_resize_strategy": "resize-naive",
        "timm_model_ids": [f"vlakeep_vit_{vit}_patch{args.patch}_dinov2", f"vlakeep_vit_{vit}_patch{args.patch}_siglip"],
        "timm_override_act_layers": [None, None], "image_sizes": [image_size, image_size],
        "llm_backbone_id": "llama2-7b-pure", "hf_llm_id": "meta-llama/Llama-2-7b-hf", "llm_max_length": 128,
        "text_config": {"model_type": "llama", "hidden_size": args.hidden, "intermediate_size": args.mlp,
                        "num_hidden_layers": args.layers, "num_attention_heads": args.heads, "num_key_value_heads": args.heads,
                        "vocab_size": args.vocab + 64, "max_position_embeddings": 256 if image_size <= 64 else 512,
                        "torch_dtype": "float32"},
        "n_action_bins": 256, "output_projector_states": False, "pad_to_multiple_of": 64,
    }


def new_model(args, corpus: List[str], words: List[str], image_size: int, vit: str):
    """(backbone on the device, processor) of a model with random weights, whose files are written to args.out."""
    ready(args)
    build_tiny_tokenizer(corpus, words, args.out, args.vocab, image_size)
    init_checkpoint(model_config(args, image_size, vit), args.out, seed=args.seed)
    backbone = make_backbone(BackboneConfig(checkpoint=str(args.out)), torch.device(args.device))
    print(f"{sum(p.numel() for p in backbone.parameters()):,} parameters")
    return backbone, Processor.from_folder(args.out)


def token_matrix(samples, processor) -> Tuple[torch.Tensor, torch.Tensor]:
    """Encode each distinct target once: (ids [N, L], labels [N, L]) padded to one length."""
    encoded, cache = [], {}
    for sample in tqdm(samples, desc="tokens", mininterval=2.0):
        key = (sample.instruction, sample.answer, None if sample.action is None else sample.action.tobytes())
        if key not in cache:
            cache[key] = encode_text(sample, processor)
        encoded.append(cache[key])
    width = max(len(ids) for ids, _ in encoded)
    ids_NL = torch.full((len(encoded), width), processor.pad_token_id)
    labels_NL = torch.full((len(encoded), width), IGNORE_INDEX)
    for row, (ids, labels) in enumerate(encoded):
        ids_NL[row, :len(ids)] = torch.as_tensor(ids)
        labels_NL[row, :len(labels)] = torch.as_tensor(labels)
    return ids_NL, labels_NL


class Normalise:
    """Pictures [B, H, W, 3] from 0 to 255 on a device to pixel values as the image processor makes them, without resizing."""

    def __init__(self, processor, device):
        self._views = [(torch.tensor(mean, device=device).view(1, 3, 1, 1), torch.tensor(std, device=device).view(1, 3, 1, 1))
                       for mean, std in zip(processor.image_processor.means, processor.image_processor.stds)]

    def __call__(self, images_BHWC: torch.Tensor) -> torch.Tensor:
        x = images_BHWC.permute(0, 3, 1, 2).float() / 255
        return torch.cat([(x - mean) / std for mean, std in self._views], dim=1)


def ready(args) -> None:
    """Seed, card and arithmetic of a training from nothing, and its folder."""
    torch.manual_seed(args.seed)
    if args.device == "cuda":
        torch.cuda.set_device(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "PROVENANCE.json").unlink(missing_ok=True)  # of an older model, whose files are replaced from here on


def compile_layers(openvla) -> None:
    """Fuse the kernels of the blocks that the model repeats. Layers of this width spend their time between matrix products."""
    blocks = (block for vit in openvla.vision_backbone.children() for block in vit.blocks[:-1])  # the last one is not run
    for module in (*blocks, openvla.projector, *openvla.language_model.model.layers):
        module.compile()


class Step:
    """One optimizer step on rows of the data that lie on the device; on a GPU replayed as one CUDA graph.

    The model is so small that launching its kernels one by one takes several times as long as running them.
    """

    def __init__(self, backbone: Callable, optimizer, make_batch: Callable, size: int, device: torch.device):
        self._backbone, self._optimizer, self._make_batch = backbone, optimizer, make_batch
        self._params = [p for group in optimizer.param_groups for p in group["params"]]
        self.pick_B = torch.zeros(size, dtype=torch.int64, device=device)
        self._graph = None
        self.out: Any = None  # of the newest forward pass
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


def make_optimizer(backbone, lr: float, cuda: bool) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices. On a GPU the rate is a tensor, so that a captured graph reads it anew."""
    params = [p for p in backbone.parameters() if p.requires_grad]
    groups = [{"params": [p for p in params if p.ndim >= 2], "weight_decay": 0.05},
              {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0}]
    for group in groups:
        group["lr"] = torch.tensor(lr, device="cuda") if cuda else lr
    return torch.optim.AdamW(groups, lr=groups[0]["lr"], betas=(0.9, 0.98), capturable=cuda)


def fit(backbone, processor, samples, pictures: Callable, args, share: Optional[float] = None) -> Dict:
    """Train for args.minutes; returns steps, final values and curve for the provenance.

    pictures(pick_B): [B, H, W, 3] from 0 to 255 of those samples, on the device. share: part of each batch that is drawn from the
    samples with an answer, whatever their number; None draws from all alike.
    """
    make_batch = Batches(samples, processor, pictures, args.batch, torch.device(args.device))
    if args.compile:
        compile_layers(backbone.openvla)
    return optimise(backbone, samples, make_batch, args, share)


class Batches:
    """pick_B -> the batch of those samples, of `size` rows and always as long as the longest text; all of it lies on the device."""

    def __init__(self, samples, processor, pictures: Callable, size: int, device: torch.device):
        self._ids_NL, self._labels_NL = (t.to(device) for t in token_matrix(samples, processor))
        labelled_NL = self._labels_NL != IGNORE_INDEX
        self._first_label = int(labelled_NL.any(0).int().argmax())
        self.labels = int(labelled_NL.sum(1).max())  # of a sample, at most
        self._pad, self._pictures, self._size, self._normalise = processor.pad_token_id, pictures, size, Normalise(processor, device)

    def __call__(self, pick_B: torch.Tensor) -> Batch:
        ids_BL = self._ids_NL[pick_B]
        return Batch(input_ids=ids_BL, attention_mask=ids_BL != self._pad, labels=self._labels_NL[pick_B],
                     pixel_values=self._normalise(self._pictures(pick_B)), dataset_names=[""] * self._size, first_label=self._first_label)


def optimise(backbone, samples, make_batch: Callable, args, share: Optional[float] = None) -> Dict:
    """The optimisation of `fit`, on the batches [B] that make_batch(pick_B) gives: whatever model reads them."""
    device, cuda = torch.device(args.device), args.device == "cuda"
    backbone.train()
    step = Step(backbone, make_optimizer(backbone, args.lr, cuda), make_batch, args.batch, device)
    pick = picker(samples, args.batch, share, torch.Generator(device=device).manual_seed(args.seed), device)
    begin, count, seconds, curve = time.perf_counter(), 0, args.minutes * 60, []
    bar = tqdm(total=round(seconds), desc="pretraining", unit="s", mininterval=5.0)
    # The schedule follows the clock, so that one number says how long the job takes on any GPU.
    while (progress := (time.perf_counter() - begin) / seconds) < 1:
        step(pick(), args.lr * min(1.0, (count + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * progress)) + 1e-6)
        if count % 50 == 0 and cuda:
            torch.cuda.synchronize()  # the clock decides, so the queue must not run far ahead of it
        count += 1
        if count % 100 == 0:
            curve.append([count, round(step.out.loss.item(), 4), round((step.out.correct / step.out.num_labelled).item(), 4)])
            bar.n = round(time.perf_counter() - begin)
            bar.set_postfix(step=count, loss=curve[-1][1], accuracy=curve[-1][2])
        if count % 2000 == 0:
            print(f"step {count}: loss {curve[-1][1]} token accuracy {curve[-1][2]}", flush=True)
    bar.close()
    backbone.eval()
    return {"steps": count, "final": curve[-1] if curve else None, "curve": curve[::10]}


def picker(samples, size: int, share: Optional[float], generator, device) -> Callable[[], torch.Tensor]:
    """A function that draws the rows [size] of a batch."""
    def draw(rows):
        return rows[torch.randint(len(rows), (size,), generator=generator, device=device)]

    if share is None:
        return lambda: draw(torch.arange(len(samples), device=device))
    asked = torch.tensor([sample.question for sample in samples], device=device)
    questions, actions = asked.nonzero()[:, 0], (~asked).nonzero()[:, 0]
    if not len(questions):
        return lambda: draw(actions)
    return lambda: torch.where(torch.rand(size, generator=generator, device=device) < share, draw(questions), draw(actions))


def save(backbone, args, command: str, trained: Dict, dtype: torch.dtype = torch.bfloat16, **facts) -> None:
    """The weights, and PROVENANCE.json with the command, seed, data, versions, hashes and time."""
    save_checkpoint(backbone, args.out, dtype=dtype)
    provenance = {
        "command": command, "seed": args.seed, "batch": args.batch, **({"minutes": args.minutes} if "minutes" in args else {}), **facts,
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu", **trained,
        "versions": library_versions(), "commit": source_commit(),
        "sha256": {f.relative_to(args.out).as_posix(): hashlib.sha256(f.read_bytes()).hexdigest()
                   for f in sorted(args.out.rglob("*")) if f.is_file() and f.name != "PROVENANCE.json"},
    }
    with atomic_write(args.out / "PROVENANCE.json", "w") as file:  # the mark of a whole model: at once, and last
        file.write(json.dumps(provenance, indent=1) + "\n")
    print(f"wrote {args.out}: {trained['steps']} steps")
