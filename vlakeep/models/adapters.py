"""LoRA adapters through PEFT: where they go, their seed, their files, and switching them off (the teacher).

The effective A is always read as module.lora_A["default"].weight, so that a parametrisation put on it (HSW at the LoRA input) is
merged into whatever is saved.
"""

import json
import re
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from vlakeep.core.compat import import_timm
from vlakeep.core.errors import CheckpointError
from vlakeep.core.sharded import is_sharded, like, whole
from vlakeep.core.storage import atomic_path
from vlakeep.models.base import Backbone
from vlakeep.models.lean import make_lean
from vlakeep.models.quantised import plain_state

ADAPTER = "default"
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
# Of adapter_config.json: with one of these an adapter is more than scale B A with one rank and one scale for all linears.
NOT_PLAIN = ("use_dora", "use_rslora", "use_qalora", "alpha_pattern", "rank_pattern", "modules_to_save", "layer_replication", "bias",
             "lora_bias")


@dataclass(frozen=True)
class LoraInfo:
    """What add_lora added: full module names inside the network, rank, alpha, dropout, init."""

    targets: List[str]
    rank: int
    alpha: float
    dropout: float
    init: str


def layer_numbers(spec: str, depth: int, key: str = "--lora.layers") -> List[int]:
    """Decoder layers named by `all`, `last:N`, `24-31` or `0,2,4` (parts may be mixed). ValueError with the key and the valid range."""
    last = depth - 1
    valid = f"the model has layers 0 to {last}; write all, last:N (N <= {depth}), a range like 0-{last}, or a list like 0,{last}"
    text = str(spec).replace(" ", "")
    if text == "all":
        return list(range(depth))
    found = re.fullmatch(r"last:(\d+)", text)
    if found:
        count = int(found.group(1))
        if not 1 <= count <= depth:
            raise ValueError(f"{key} {spec!r}: {valid}")
        return list(range(depth - count, depth))
    numbers = set()
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if not found:
            raise ValueError(f"{key} {spec!r}: {valid}")
        begin, end = int(found.group(1)), int(found.group(2) or found.group(1))
        if begin > end or end >= depth:
            raise ValueError(f"{key} {spec!r}: {valid}")
        numbers.update(range(begin, end + 1))
    return sorted(numbers)


def target_modules(backbone: Backbone, layers: str, modules: List[str]) -> List[str]:
    """Full names inside the network of the linears to adapt, e.g. language_model.model.layers.3.self_attn.q_proj.

    Raises ValueError for layers outside the model, unknown modules, or none.
    """
    if list(modules) == ["all-linear"]:
        return all_linear(backbone)
    return backbone.linear_names(layer_numbers(layers, backbone.num_layers), modules)


def all_linear(backbone: Backbone) -> List[str]:
    """What target_modules="all-linear" means in peft 0.11.1: every module whose last name part is that of some linear.

    So the convolutions named `proj` come along, and lm_head is not left out. Source: peft 0.11.1 tuners/tuners_utils.py:719-730.
    """
    modules = dict(backbone.network.named_modules())
    leaves = {name.rpartition(".")[2] for name, module in modules.items() if isinstance(module, torch.nn.Linear)}
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    return [name for name, module in modules.items() if isinstance(module, kinds) and name.rpartition(".")[2] in leaves]


def select_linears(backbone: Backbone, layers: str, modules: List[str]) -> Dict[str, torch.nn.Module]:
    """The linears that add_lora would adapt, named like `layers.3.self_attn.q_proj`."""
    prefix = backbone.decoder_prefix
    names = [name for name in target_modules(backbone, layers, modules) if name.startswith(prefix + "layers.")]
    return {name[len(prefix):]: backbone.network.get_submodule(name) for name in names}


def attach_lora(
    backbone: Backbone, targets: List[str], rank: int, alpha: float, dropout: float = 0.0, init: str = "gaussian", seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Freeze the model and put adapters of this type on the named modules. A is drawn from `seed` alone, B is zero.

    gaussian: A ~ N(0, (1/rank)^2), as peft draws it for the official fine-tuning script; kaiming: uniform in +-1/sqrt(fan_in).
    """
    import_timm()  # peft imports transformers, which imports torchvision: the shim must come first
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model

    if backbone.lora is not None:
        raise ValueError("this backbone already has adapters; make_backbone gives one without")
    base = backbone.network
    training = base.training
    peft_config = PeftLoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(targets), bias="none")
    backbone.model = get_peft_model(base, peft_config)
    backbone.lora = LoraInfo(list(targets), rank, alpha, dropout, init)
    generator = torch.Generator().manual_seed(seed)
    for layer in _lora_layers(backbone).values():
        a, b = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
        a.to(dtype), b.to(dtype)
        with torch.no_grad():
            if init == "gaussian":
                value = torch.randn(a.weight.shape, generator=generator) / rank
            else:
                value = (torch.rand(a.weight.shape, generator=generator) * 2 - 1) * a.weight[0].numel() ** -0.5
            a.weight.copy_(value)
            b.weight.zero_()
    make_lean(_lora_layers(backbone))
    backbone.train(training)


def add_lora(backbone: Backbone, config, seed: int) -> None:
    """Adapters as the lora section of the configuration says (config.LoraConfig). Raises ValueError as target_modules."""
    attach_lora(
        backbone,
        target_modules(backbone, config.layers, config.modules),
        config.rank,
        config.alpha,
        config.dropout,
        config.init,
        seed,
        backbone.dtype if config.dtype == "model" else torch.float32,
    )


def _lora_layers(backbone: Backbone) -> Dict[str, torch.nn.Module]:
    """Full name inside the network -> PEFT's layer."""
    return {name: backbone.network.get_submodule(name) for name in (backbone.lora.targets if backbone.lora else [])}


@contextmanager
def switched_off(layers: Sequence[nn.Module]):
    """Within the context these layers of PEFT do without their adapters. PEFT's context would also switch requires_grad off and on."""
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, value in zip(layers, before):
            layer._disable_adapters = value


def adapters_disabled(backbone: Backbone):
    """Within the context the backbone is its own frozen teacher."""
    return switched_off(list(_lora_layers(backbone).values()))


def adapter_state(backbone: Backbone) -> Dict[str, torch.Tensor]:
    """Effective adapter weights under the names PEFT saves (base_model.model....lora_A.weight), whole, on the model's device. Of sharded
    ones every process has to ask."""
    state = {}
    for name, layer in _lora_layers(backbone).items():
        state[f"base_model.model.{name}.lora_A.weight"] = _effective(layer.lora_A[ADAPTER])
        state[f"base_model.model.{name}.lora_B.weight"] = _effective(layer.lora_B[ADAPTER])
    return state


def _effective(linear: torch.nn.Module) -> torch.Tensor:
    parametrised = getattr(linear, "parametrizations", None)
    if parametrised is None or not is_sharded(parametrised.weight.original):
        return whole(linear.weight.detach())
    weight = whole(parametrised.weight.original.detach())  # a parametrisation takes whole weights, as it gets them inside the model's call
    for one in parametrised.weight:
        weight = one(weight)
    return weight.detach()


def load_adapter_state(backbone: Backbone, state: Dict[str, torch.Tensor], where: str = "the adapter") -> None:
    """Put effective weights into the adapters. Raises CheckpointError listing every name or shape that does not fit.

    With a parametrisation on A this would not be invertible; a run is resumed from trainable_state instead.
    """
    current = adapter_state(backbone)
    problems = [f"missing {name}" for name in current if name not in state] + [
        f"unexpected {name}" for name in state if name not in current
    ]
    problems += [f"{name} is {list(state[name].shape)}, must be {list(current[name].shape)}" for name in current
                 if name in state and state[name].shape != current[name].shape]
    if problems:
        raise CheckpointError(f"{where} does not fit the model and its lora section: " + "; ".join(problems[:6])
                              + (f" and {len(problems) - 6} more" if len(problems) > 6 else ""))
    with torch.no_grad():
        for name, layer in _lora_layers(backbone).items():
            for part, module in (("lora_A", layer.lora_A[ADAPTER]), ("lora_B", layer.lora_B[ADAPTER])):
                if hasattr(module, "parametrizations"):
                    raise ValueError(f"{name}.{part} carries a parametrisation; load the adapter before the method is attached")
                module.weight.copy_(state[f"base_model.model.{name}.{part}.weight"])


def trainable_state(backbone: Backbone) -> Dict[str, torch.Tensor]:
    """The raw trainable parameters by name (below a parametrisation: its original), whole, for checkpoints that a run resumes from. Of
    sharded ones every process has to ask."""
    return {name: whole(p.detach()) for name, p in backbone.named_parameters() if p.requires_grad}


def load_trainable(backbone: Backbone, state: Dict[str, torch.Tensor]) -> None:
    """Restore trainable_state to the bit. Raises CheckpointError when the parameters are not the same ones."""
    current = {name: p for name, p in backbone.named_parameters() if p.requires_grad}
    if current.keys() != state.keys():
        odd = sorted(current.keys() ^ state.keys())
        raise CheckpointError(
            f"the checkpoint holds other trainable parameters than this run has ({len(odd)} differ, first {odd[0]}): resume with "
            "the lora, method and hsw sections that it was started with"
        )
    with torch.no_grad():
        for name, p in current.items():
            if p.shape != state[name].shape:
                raise CheckpointError(
                    f"{name} is {list(state[name].shape)} in the checkpoint, {list(p.shape)} here: resume with the same lora.rank"
                )
            p.copy_(like(state[name].to(p.dtype), p))


def save_adapter(backbone: Backbone, folder, state: Optional[Dict[str, torch.Tensor]] = None) -> None:
    """adapter_config.json and adapter_model.safetensors, as PeftModel.from_pretrained of peft 0.11 and later reads them. state: what
    adapter_state has given."""
    info, folder = backbone.lora, Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {  # only keys that peft 0.11.1 knows: it refuses others
        "peft_type": "LORA",
        "auto_mapping": None,
        # Of merged weights no folder is named: loaded on those of the base alone, the adapter would mean something else.
        "base_model_name_or_path": backbone.name if "+" in backbone.name else str(backbone.checkpoint or ""),
        "revision": None,
        "task_type": None,
        "inference_mode": True,
        "r": info.rank,
        "target_modules": sorted(info.targets),
        "lora_alpha": info.alpha,
        "lora_dropout": info.dropout,
        "fan_in_fan_out": False,
        "bias": "none",
        "use_rslora": False,
        "modules_to_save": None,
        "init_lora_weights": "gaussian" if info.init == "gaussian" else True,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "loftq_config": {},
        "use_dora": False,
        "layer_replication": None,
    }
    with atomic_path(folder / WEIGHTS_FILE) as partial:
        save_file(
            {name: t.cpu().contiguous() for name, t in (state or adapter_state(backbone)).items()}, str(partial), metadata={"format": "pt"}
        )
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")


def load_adapter(backbone: Backbone, folder) -> None:
    """Add the adapters of a folder (save_adapter's or PEFT's) to a backbone without any.

    Raises FileNotFoundError, or CheckpointError for adapters that are damaged or of another model.
    """
    folder = Path(folder)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"no {name} in {folder}: give the adapter folder of a checkpoint, such as runs/NAME/checkpoints/step_N/adapter"
            )
    try:
        config = json.loads((folder / CONFIG_FILE).read_text())
        state = load_file(str(folder / WEIGHTS_FILE))
    except (json.JSONDecodeError, SafetensorError) as error:
        raise CheckpointError(f"the adapter in {folder} cannot be read ({error}): use another checkpoint of the run") from error
    odd = [name for name in NOT_PLAIN if config.get(name) not in (None, False, "none", {}, [])]
    if config.get("peft_type") != "LORA" or odd:
        raise CheckpointError(f"{folder / CONFIG_FILE} is not a plain LoRA adapter ({', '.join(odd) or config.get('peft_type')}); only "
                              "those are supported")
    stored = {
        name: tensor for name, tensor in state.items() if ".base_layer." not in name
    }  # peft stores lm_head's base weight too
    targets = list(dict.fromkeys(re.sub(r"^base_model\.model\.|\.lora_[AB]\.weight$", "", name) for name in sorted(stored)))
    known = dict(backbone.network.named_modules())
    strange = [name for name in targets if name not in known]
    if strange:
        raise CheckpointError(
            f"the adapter in {folder} is for modules that {backbone.name} does not have, such as {strange[0]}: wrong base model"
        )
    targets = [name for name in known if name in set(targets)]
    attach_lora(backbone, targets, config["r"], config["lora_alpha"], config.get("lora_dropout", 0.0),
                "gaussian" if config.get("init_lora_weights") == "gaussian" else "kaiming")
    load_adapter_state(backbone, stored, f"the adapter in {folder}")


def merged(weight: torch.Tensor, pair: Tuple[torch.Tensor, torch.Tensor], scale: float) -> torch.Tensor:
    """W + scale B A in float32, in the shape of W; `pair` is (A [r, ...], B [out, r, ...]), a convolution's B being 1 x 1."""
    a, b = pair
    return weight.float() + scale * (b.flatten(1) @ a.flatten(1)).view(weight.shape)


@torch.no_grad()
def merged_state(backbone: Backbone, dtype: Optional[torch.dtype] = None) -> Dict[str, torch.Tensor]:
    """State dict under the checkpoint's names with the adapters merged in: W + alpha/rank B A, added in float32 and rounded once."""
    layers = _lora_layers(backbone)
    state = {}
    for key, tensor in plain_state(backbone.network).items():
        if ".lora_" in key:
            continue
        key = key.replace(".base_layer.", ".")
        name, _, kind = key.rpartition(".")
        if name in layers and kind == "weight":
            layer = layers[name]
            pair = layer.lora_A[ADAPTER].weight.float(), layer.lora_B[ADAPTER].weight.float()
            tensor = merged(tensor, pair, layer.scaling[ADAPTER]).to(dtype or tensor.dtype)
        state[key] = tensor
    return state
