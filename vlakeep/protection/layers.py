"""LoRA layers of any PEFT model: which linears they adapt, what of the training is outside them, and the model as its own teacher."""

from contextlib import contextmanager
from typing import ContextManager, Dict, Iterator, List, NamedTuple, Optional

import torch
from torch import nn

from vlakeep.models.adapters import switched_off

_WRAPPERS = ("module.", "_orig_mod.", "base_model.model.")
# What can be trained beside the LoRA weights of linears, by what its name holds, and why gains per direction cannot bound it.
KINDS = {
    "lora_magnitude_vector": "magnitudes of DoRA, which scale the outputs of all inputs alike",
    "modules_to_save": "copies of whole modules (modules_to_save)",
    "lora_embedding_": "LoRA of an embedding, whose input is a token number",
    "trainable_tokens": "single rows of an embedding",
    "lora_A": "LoRA of something that is no linear (a convolution, experts in one tensor), or of a linear without bases",
    "lora_B": "LoRA of something that is no linear (a convolution, experts in one tensor), or of a linear without bases",
    "bias": "biases, which act on all inputs alike",
}


class Adapted(NamedTuple):
    """adapter: its name in PEFT; layers: name of the linear in the base model -> PEFT's layer."""

    adapter: str
    layers: Dict[str, nn.Module]


def canonical(name: str) -> str:
    """A name of a module or parameter as it is in the base model, without what PEFT, DDP and torch.compile put before and into it."""
    found = True
    while found:
        found = False
        for wrapper in _WRAPPERS:
            if name.startswith(wrapper):
                name, found = name[len(wrapper):], True
    return name.replace("._orig_mod.", ".").replace(".base_layer.", ".").replace(".original_module.", ".")


def adapted_layers(model: nn.Module, adapter: Optional[str] = None) -> Adapted:
    """The linears with LoRA; `adapter` None takes the active one.

    ValueError: no LoRA, several active adapters, merged ones, or weights that are split over processes (FSDP, DeepSpeed ZeRO-3).
    """
    refuse_sharded(model)
    layers = {name: module for name, module in model.named_modules() if isinstance(getattr(module, "lora_A", None), nn.ModuleDict)}
    if adapter is None:
        active = sorted({one for layer in layers.values() for one in _active(layer)})
        if len(active) != 1:
            types = (getattr(one.peft_type, "value", one.peft_type) for one in getattr(model, "peft_config", {}).values())
            others = sorted({str(one) for one in types} - {"LORA"})
            raise ValueError(
                f"the model has adapters of the type {', '.join(others)}, and only LoRA (LoraConfig) can be protected" if others else
                "the model has no LoRA layers: make them first, with peft.get_peft_model" if not layers else
                f"{len(active)} adapters are active ({', '.join(active)}), and one can be protected: name it with adapter=")
        adapter = active[0]
    found = {}
    for name, layer in layers.items():
        if adapter in layer.lora_A and isinstance(layer.lora_A[adapter], nn.Linear) and type(layer).__name__ != "ParamWrapper":
            if getattr(layer, "merged", False):
                raise ValueError(f"the adapter of {canonical(name)} is merged into its base weight: unmerge it (model.unmerge_adapter())")
            found[canonical(name)] = layer
    if not found:
        raise ValueError(f"no linear of the model has LoRA weights of an adapter {adapter!r}: look at target_modules of its LoraConfig")
    return Adapted(adapter, found)


def _active(layer: nn.Module) -> List[str]:
    active = getattr(layer, "active_adapters", None) or getattr(layer, "active_adapter", [])
    return [active] if isinstance(active, str) else list(active)


def refuse_sharded(model: nn.Module) -> None:
    """ValueError when the weights are split over processes: A_eff of all linears is made at once, from whole weights."""
    for module in model.modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise ValueError("FSDP is not supported: train with DistributedDataParallel, or on one device")
        for parameter in module.parameters(recurse=False):
            if type(parameter.data).__name__ == "DTensor" or type(parameter).__name__ == "DTensor":
                raise ValueError("FSDP2 (fully_shard) and tensor parallelism are not supported: train with DistributedDataParallel")
            if hasattr(parameter, "ds_id"):
                raise ValueError("DeepSpeed ZeRO-3 is not supported: use ZeRO stage 1 or 2, or DistributedDataParallel")


def outside(model: nn.Module, layers: Dict[str, nn.Module], adapter: str) -> Dict[str, nn.Parameter]:
    """Trainable parameters that are no LoRA weight of these layers, by their names in the base model."""
    inside = {id(p) for layer in layers.values() for module in (layer.lora_A[adapter], layer.lora_B[adapter])
              for name, p in module.named_parameters() if name.endswith("weight") or name.endswith("original")}
    return {canonical(name): p for name, p in model.named_parameters() if p.requires_grad and id(p) not in inside}


def say_outside(names: List[str]) -> str:
    """One line for each kind of trainable parameters that the gains do not reach."""
    kinds: Dict[str, List[str]] = {}
    for name in names:
        said = next((said for part, said in KINDS.items() if part in name), "other parameters that are trained")
        if "lora_B" in name and name.endswith(".bias"):
            said = "biases of LoRA B (lora_bias), which act on all inputs alike"
        kinds.setdefault(said, []).append(name)
    return "; ".join(f"{len(own)} of {said}, such as {own[0]}" for said, own in kinds.items())


def adapters_off(model: nn.Module) -> ContextManager[None]:
    """Within the context the model is its own frozen teacher: adapters and copies of whole modules are not used."""
    return switched_off([module for module in model.modules() if isinstance(getattr(module, "_disable_adapters", None), bool)])


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """Within the context nothing is trained and no dropout draws; each module then is in the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
