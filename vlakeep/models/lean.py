"""A forward pass without what it does for nothing: LoRA linears that do not convert their input, and layers compiled into few kernels.

LeanLinear      PEFT's LoRA linear converts its input to the adapter's type, float32, and autocast converts it back at once: the same bits
                at three times the traffic, and a copy that each linear keeps for its backward pass.
compile_layers  torch.compile of decoder layers and vision blocks. What a layer's adapters are (a parametrised A is computed outside, for
                all linears at once: hsw/graded.py) is handed in as tensors; hooks on a layer's output run outside. So no layer breaks the
                graph, and alike layers share what was compiled.
"""

import functools
import math
import re
from contextlib import nullcontext
from typing import Any, Dict, List

import torch
from torch import nn
from torch.nn import functional as F

from vlakeep.core.provenance import library_versions

ADAPTER = "default"
AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def autocast(name: str, device: torch.device):
    """The context of --train.autocast: none, bfloat16 or float16."""
    return nullcontext() if name == "none" else torch.autocast(device.type, AUTOCAST[name])


def converting(x: torch.Tensor) -> bool:
    """Whether autocast gives the operands of a product their type here."""
    if x.device.type == "cpu":
        return torch.is_autocast_cpu_enabled()
    return torch.is_autocast_enabled()


@functools.lru_cache(maxsize=None)
def lean_class():
    """LeanLinear, whose parent is PEFT's; imported only now."""
    from peft.tuners.lora.layer import Linear

    class LeanLinear(Linear):
        """PEFT's LoRA linear with one adapter named `default`; the same result to the bit."""

        lean_a = None  # inside a compiled layer: A as it acts

        def forward(self, x, *given, **named):
            if self._disable_adapters or self.merged:
                return self.base_layer(x)
            out, scaling, drop = self.base_layer(x), self.scaling[ADAPTER], self.lora_dropout[ADAPTER]
            a = self.lora_A[ADAPTER].weight if self.lean_a is None else self.lean_a
            b = self.lora_B[ADAPTER].weight
            # Dropout draws other numbers in another type.
            if not converting(x) or not isinstance(drop, nn.Identity):
                x = drop(x.to(a.dtype))
            z = F.linear(x, a)
            half = out.dtype != torch.float32 and not torch.is_grad_enabled()
            if z.dtype == out.dtype and (half or self.lean_a is not None):
                # Compiled, or a measurement: added where the product is made, and rounded once.
                return torch.addmm(out.flatten(0, -2), (z * scaling).flatten(0, -2), b.T).view(out.shape)
            if math.frexp(scaling)[0] == 0.5:  # a power of two: the same bits, at the size of the rank
                return (out + F.linear(z if scaling == 1 else z * scaling, b)).to(out.dtype)
            return (out + F.linear(z, b) * scaling).to(out.dtype)

    return LeanLinear


def make_lean(layers: Dict[str, nn.Module]) -> None:
    """Give PEFT's plain LoRA linears among these layers the class above; convolutions and other kinds stay."""
    from peft.tuners.lora.layer import Linear

    for layer in layers.values():
        if type(layer) is Linear and not any(getattr(layer, "use_dora", {}).values()):
            layer.__class__ = lean_class()


def too_old(library: str, *needed: int) -> str:
    """The installed version of a library when it is below major.minor `needed`, else ""."""
    version = library_versions()[library] or "0"
    found = tuple(int(part) for part in re.findall(r"\d+", version)[:len(needed)])
    return version if found < needed else ""


def compile_problem() -> str:
    """Why no layer can be compiled here; "" where they can."""
    version = too_old("torch", 2, 5)
    return f"torch {version} compiles each of the alike layers anew: it needs 2.5 or newer" if version else ""


def compile_layers(decoder_layers, blocks, backend: Any = "inductor", fullgraph: bool = False) -> None:
    """Compile these layers in place. blocks: those of vision towers."""
    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, 32)  # kinds of passes, of one layer's code
    made: Dict[type, Any] = {}
    for layer in [*decoder_layers, *blocks]:
        kind = type(layer)
        if kind not in made:
            made[kind] = torch.compile(kind.forward, backend=backend, fullgraph=fullgraph)
        layer.forward = functools.partial(_forward, layer, made[kind], kind.forward, _adapted(layer))


def _adapted(layer: nn.Module) -> List[Any]:
    """The LoRA linears of a layer, in a list: it must not become their parent."""
    return [module for module in layer.modules() if hasattr(module, "lean_a")]


def _plain(value) -> bool:
    return value is None or isinstance(value, (bool, int, torch.Tensor)) or isinstance(value, tuple) and all(map(_plain, value))


def _mark(value) -> None:
    """Batch and sequence are of any length, so that other lengths compile nothing anew."""
    for one in value if isinstance(value, tuple) else (value,):
        if isinstance(one, torch.Tensor) and one.ndim > 1:
            torch._dynamo.maybe_mark_dynamic(one, [axis for axis in (0, 1) if one.shape[axis] > 1])


def _forward(layer, compiled, eager, linears, *given, **named):
    if not all(map(_plain, (*given, *named.values()))):  # a cache of keys and values grows by a token at a time
        return eager(layer, *given, **named)
    for value in (*given, *named.values()):
        _mark(value)
    try:
        for linear in linears:  # past nn.Module, which would make it a parameter of the layer
            linear.__dict__["lean_a"] = linear.lora_A[ADAPTER].weight
        return compiled(layer, *given, **named)
    finally:
        for linear in linears:  # not to hold the graph of A
            linear.__dict__["lean_a"] = None
