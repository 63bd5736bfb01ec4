"""The official side of official_step.py, in a process of its own: the checkout's own fine-tuning script, timed as it runs.

    python speed/official_side.py --openvla-dir DIR --given FILE --out FILE [--layers 32] [--warm 4] [--count 10] [--blocks 3] [--tiny]
    python speed/official_side.py --openvla-dir DIR            says what is missing, exit status 3, and does no more

official_step.py starts both, with the official libraries. The script's text is neither changed nor copied. It finds other things under
names that it imports: a model with random weights in place of a download, one batch that lies on the device again and again in place of a
data set, a clock in place of the progress bar. All else is its own, metrics and DistributedDataParallel of one process included.

reads:  --given, safetensors: a batch, and the adapters to start from
writes: --out, JSON: seconds of a step, losses of the first steps, memory
"""

import argparse
import contextlib
import gc
import importlib.metadata
import importlib.util
import json
import statistics
import sys
import tempfile
import time
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Dict, List

import torch
from random_7b import random_tensors, shapes_config
from safetensors.torch import load_file

from vlakeep.core.official_code import TIMM, load_official, versions

GIB = 2 ** 30
SCRIPT = Path("vla-scripts") / "finetune.py"
ADAPTER = "adapter:"  # before a name in --given
# What its pyproject.toml pins; any accelerate will do, of which peft takes a part.
NEEDED = {"transformers": ("4.40.1",), "tokenizers": ("0.19.1",), "timm": TIMM, "peft": ("0.11.1",), "accelerate": ()}
MISSING = 3  # exit status
REMEDY = ("name a folder with the official libraries by --official-path, or another Python by --official-python; the head of "
          "speed/official_step.py has the commands")


def missing() -> List[str]:
    """What of the official libraries is not here or of another version, one text each."""
    found = []
    for name, wanted in NEEDED.items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} is missing")
            continue
        if wanted and version not in wanted:
            found.append(f"{name} is {version} and must be {' or '.join(wanted)}")
    return found


def fingerprint(state: Dict[str, torch.Tensor]) -> float:
    """One number of the first weights of every tensor: the same in two programs that hold the same random weights under the same names."""
    return sum((place % 97 + 1) * state[name].flatten()[:16].double().cpu().sum().item() for place, name in enumerate(sorted(state)))


class Clock:
    """In place of the progress bar: after `warm` steps the time of `blocks` blocks of `count`, with a wait at their ends alone."""

    def __init__(self, warm: int, count: int, blocks: int, gpu: bool):
        self.warm, self.count, self.blocks, self.gpu = warm, count, blocks, gpu
        self.steps, self.found, self._begin = 0, [], 0.0

    def __call__(self, **kwargs):
        return contextlib.nullcontext(self)

    def update(self) -> None:
        self.steps += 1
        done = self.steps - self.warm
        if done < 0 or done % self.count:
            return
        if self.gpu:
            torch.cuda.synchronize()
        if done:
            self.found.append((time.perf_counter() - self._begin) / self.count)
        elif self.gpu:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        self._begin = time.perf_counter()


class _OnCpu:
    """torch for a script that insists on a GPU: float32, no autocast."""

    bfloat16, autocast = torch.float32, staticmethod(lambda *args, **kwargs: contextlib.nullcontext())
    cuda = SimpleNamespace(is_available=lambda: True, set_device=lambda device: None, empty_cache=lambda: None)

    def __getattr__(self, name):
        return getattr(torch, name)


def import_script(path: Path) -> types.ModuleType:
    """The fine-tuning script as a module, without the packages that it needs for its data, its records and its command line."""
    datasets, utils = "prismatic.vla.datasets", "prismatic.vla.datasets.rlds.utils.data_utils"
    for name in (datasets, f"{datasets}.rlds", f"{datasets}.rlds.utils", utils, "wandb", "draccus"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules[datasets].RLDSBatchTransform = lambda *args, **kwargs: None
    sys.modules[datasets].RLDSDataset = lambda *args, **kwargs: SimpleNamespace(dataset_statistics={})
    sys.modules[utils].save_dataset_statistics = lambda *args: None
    sys.modules["wandb"].init = sys.modules["wandb"].log = lambda *args, **kwargs: None
    sys.modules["draccus"].wrap = lambda: lambda function: function
    spec = importlib.util.spec_from_file_location("official_finetune", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def run_script(script, model, batch: Dict[str, torch.Tensor], start: Dict[str, torch.Tensor], clock: Clock, vocabulary: int) -> dict:
    """Figures of the script's finetune() on this model, batch and start of the adapters. ValueError when it adapts other modules."""
    losses, weights = [], {}
    model.register_forward_hook(lambda module, args, output: losses.append(output.loss.detach()) if len(losses) < clock.warm else None)
    get_peft_model, ddp = script.get_peft_model, script.DDP

    def with_start(model, config):
        adapted = get_peft_model(model, config)
        trainable = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
        if set(trainable) != set(start):
            raise ValueError(f"the official adapters are not ours: {sorted(set(trainable) ^ set(start))[:4]}")
        with torch.no_grad():
            for name, p in trainable.items():
                p.copy_(start[name])
        return adapted

    def wrapped(model, device_ids=None, **kwargs):
        weights["gib"] = torch.cuda.memory_allocated() / GIB if clock.gpu else 0.0
        return ddp(model, device_ids=device_ids if clock.gpu else None, **kwargs)

    tokenizer = SimpleNamespace(vocab_size=vocabulary, model_max_length=2048, pad_token_id=vocabulary)
    processor = SimpleNamespace(tokenizer=tokenizer, image_processor=SimpleNamespace(apply_transform=None))
    vars(script).update(
        AutoModelForVision2Seq=SimpleNamespace(register=lambda *args: None, from_pretrained=lambda *args, **kwargs: model),
        AutoProcessor=SimpleNamespace(register=lambda *args: None, from_pretrained=lambda *args, **kwargs: processor),
        PartialState=lambda: SimpleNamespace(local_process_index=0 if clock.gpu else "cpu", is_main_process=True),
        DataLoader=lambda *args, **kwargs: [batch] * (clock.warm + clock.count * clock.blocks),
        tqdm=SimpleNamespace(tqdm=clock), get_peft_model=with_start, DDP=wrapped, torch=torch if clock.gpu else _OnCpu())
    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.init_process_group("nccl" if clock.gpu else "gloo", init_method=f"file://{folder}/meet", rank=0, world_size=1)
        try:
            script.finetune(script.FinetuneConfig(run_root_dir=Path(folder), adapter_tmp_dir=Path(folder), max_steps=10 ** 9,
                                                  save_steps=10 ** 9))
        finally:
            torch.distributed.destroy_process_group()
    peaks = {"allocated_gib": torch.cuda.max_memory_allocated() / GIB, "reserved_gib": torch.cuda.max_memory_reserved() / GIB,
             "weights_gib": weights["gib"]} if clock.gpu else {}
    return {"seconds": statistics.median(clock.found), "spread": max(clock.found) - min(clock.found),
            "losses": [loss.item() for loss in losses], **peaks}


def load(openvla_dir: str):
    """(the checkout's classes, its fine-tuning script). ImportError or FileNotFoundError says what is missing."""
    if not (Path(openvla_dir) / SCRIPT).is_file():
        raise FileNotFoundError(f"no {SCRIPT} in {openvla_dir}: --openvla-dir must be a checkout of the official repository")
    if found := missing():
        raise ImportError(", ".join(found))
    code = load_official(openvla_dir)
    return code, import_script(code.folder / SCRIPT)


def official(args, code, script) -> dict:
    from vlakeep.openvla.official import official_model  # with it come transformers and timm, which `missing` looks for first

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    given = load_file(args.given)
    start = {name[len(ADAPTER):]: given.pop(name) for name in list(given) if name.startswith(ADAPTER)}
    config = shapes_config(args.layers, args.tiny)
    state = {name: tensor.to(device, dtype) for name, tensor in random_tensors(config, device)}
    mark = fingerprint(state)
    model = official_model(code, config, dtype, "sdpa", state)
    del state
    batch = {name: tensor.to(device) for name, tensor in given.items()}
    vocabulary = config["text_config"]["vocab_size"] - config["pad_to_multiple_of"]
    clock = Clock(args.warm, args.count, args.blocks, device.type == "cuda")
    return {**run_script(script, model, batch, start, clock, vocabulary), "fingerprint": mark, "versions": versions(),
            "attention": type(model.language_model.model.layers[0].self_attn).__name__}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--openvla-dir", required=True)
    parser.add_argument("--given", type=Path, default=None)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--warm", type=int, default=4)
    parser.add_argument("--count", type=int, default=10)
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    try:
        loaded = load(args.openvla_dir)
    except (ImportError, FileNotFoundError) as error:
        print(f"error: the official script cannot run here: {error}; {REMEDY}", file=sys.stderr)
        return MISSING
    if args.given:
        args.out.write_text(json.dumps(official(args, *loaded)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
