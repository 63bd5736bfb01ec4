"""Bases of the inputs of a PEFT model's adapted linears, measured on the frozen model and kept in one file.

    bases = measure(model, batches)          # any model with LoRA layers, any batches that `forward` takes
    bases.save("bases.safetensors")

Linears that read the very same tensor, as q, k and v do, are found by watching one batch, and measured once.

Axes: D input size, K stored directions.
"""

import hashlib
import itertools
import json
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, Optional, Sequence, Tuple, Union

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from vlakeep.core.storage import atomic_path
from vlakeep.protection.layers import Adapted, adapted_layers, adapters_off, canonical, measuring
from vlakeep.teacher.moments import Moments
from vlakeep.teacher.spectrum import Spectrum, from_tensors, spectrum, to_tensors

FORMAT = "1"
SAMPLED = 1024  # values of each weight that go into the fingerprint

Masks = Union[torch.Tensor, Sequence[torch.Tensor], None]


def run(model: nn.Module, batch) -> Any:
    """The usual forward pass: a mapping as keywords, a tuple or list as arguments, tensors moved to the model's device."""
    device = next(model.parameters()).device

    def move(value):
        return value.to(device) if isinstance(value, torch.Tensor) else value
    if isinstance(batch, Mapping):
        return model(**{name: move(value) for name, value in batch.items()})
    return model(*[move(value) for value in batch]) if isinstance(batch, (tuple, list)) else model(move(batch))


def attention_mask(batch) -> Masks:
    """The tokens of a batch that are no padding, where it says so."""
    return batch.get("attention_mask") if isinstance(batch, Mapping) else None


@dataclass(frozen=True)
class Bases:
    """What `measure` returns.

    - `spectra`: input -> its Spectrum: vectors float32 [D, K], values float32 [K], rest
    - `inputs`: adapted linear -> its input
    - `fingerprint`: of the frozen weights that they were measured on
    - `meta`: what was counted: tokens of the input that had most, batches, and `unmasked`, the inputs whose shape no mask fitted
    """

    spectra: Dict[str, Spectrum]
    inputs: Dict[str, str]
    fingerprint: str
    meta: Dict[str, Any] = field(default_factory=dict)

    def save(self, path) -> Path:
        """Write one safetensors file, all or nothing, and return its path."""
        path = Path(path)
        text = {"format": FORMAT, "fingerprint": self.fingerprint, "inputs": json.dumps(self.inputs), "meta": json.dumps(self.meta)}
        with atomic_path(path) as unfinished:
            save_file({name: tensor.contiguous() for name, tensor in to_tensors(self.spectra).items()}, str(unfinished), metadata=text)
        return path

    @classmethod
    def load(cls, path) -> "Bases":
        """FileNotFoundError; ValueError for a file that is damaged or no file of bases."""
        try:
            with safe_open(str(path), "pt") as file:
                text = file.metadata() or {}
                if text.get("format") != FORMAT or "fingerprint" not in text:
                    raise ValueError(f"{path} holds no bases of this version: make them with vlakeep.protect.measure(...).save(...)")
                flat = {name: file.get_tensor(name) for name in file.keys()}
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}): measure again, vlakeep.protect.measure(...).save(...)") from error
        return cls(from_tensors(flat), json.loads(text["inputs"]), text["fingerprint"], json.loads(text["meta"]))

    def problems(self, model: nn.Module, adapted: Adapted) -> List[str]:
        """Why these bases are not those of this model, one line each."""
        found = []
        if fingerprint(model) != self.fingerprint:
            found.append("the bases were measured on other weights (another base model, type or quantisation): measure them on this model")
        wrong = [name for name, layer in adapted.layers.items()
                 if name in self.inputs and len(self.spectra[self.inputs[name]].vectors) != layer.lora_A[adapted.adapter].weight.shape[1]]
        if wrong:
            found.append(f"the inputs of {len(wrong)} linears have another size, such as {wrong[0]}")
        if not any(name in self.inputs for name in adapted.layers):
            found.append(f"the bases hold none of the {len(adapted.layers)} adapted linears, such as {next(iter(adapted.layers))}")
        return found


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over names, shapes, types and up to 1,024 evenly spaced values of every weight that is not an adapter's. Another model,
    another fine-tuning of it, another type or quantisation has another one; a single changed value may not. Costs O(weights) names only."""
    digest = hashlib.sha256()
    named = {canonical(name): p.detach() for name, p in model.named_parameters()
             if ".lora_" not in name and ".modules_to_save." not in name and ".trainable_tokens" not in name}
    for name in sorted(named):
        weight = named[name]
        if weight.is_meta:
            raise ValueError(f"{name} is on the device meta and has no values: load the weights first")
        flat = weight.flatten()[::max(1, -(-weight.numel() // SAMPLED))].contiguous().cpu()
        digest.update(f"{name} {list(weight.shape)} {weight.dtype}".encode() + flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class _Watch:
    """Hooks on the base linears; `on(name, x)` for each of their inputs while `active`."""

    def __init__(self, layers: Dict[str, nn.Module], on: Callable[[str, torch.Tensor], None]):
        self._layers, self._on, self._handles, self.active = layers, on, [], False

    def __enter__(self) -> "_Watch":
        for name, layer in self._layers.items():
            self._handles.append(layer.get_base_layer().register_forward_pre_hook(self._hook(name), with_kwargs=True))
        return self

    def _hook(self, name):
        def hook(module, args, kwargs):
            if self.active:
                self._on(name, args[0] if args else next(iter(kwargs.values())))
        return hook

    def __exit__(self, *error) -> None:
        for handle in self._handles:
            handle.remove()


def _shared(layers: Dict[str, nn.Module], forward: Callable[[], Any]) -> Dict[str, str]:
    """Linear -> the first linear that read the same tensors in this forward pass; those that did not run are left out."""
    seen: Dict[str, List[int]] = {}
    live: Dict[int, Tuple[int, Any]] = {}  # id -> (number, weak reference): an id is given again when its tensor is gone
    numbers = itertools.count()

    def on(name, x):
        number, reference = live.get(id(x), (0, None))
        if reference is None or reference() is not x:
            number = next(numbers)
            live[id(x)] = number, weakref.ref(x)
        seen.setdefault(name, []).append(number)

    with _Watch(layers, on) as watch:
        watch.active = True
        forward()
    first: Dict[tuple, str] = {}
    return {name: first.setdefault(tuple(order), name) for name, order in seen.items()}


def measure(model: nn.Module, batches: Iterable, forward: Callable[[nn.Module, Any], Any] = run, *,
            mask: Callable[[Any], Masks] = attention_mask, columns: int = 1024, budget_gib: float = 2.0,
            adapter: Optional[str] = None) -> Bases:
    """Bases of the adapted linears' inputs, of the model without its adapters.

    - `model`: with PEFT's LoRA layers, on its device.
    - `batches`: anything that can be gone through; more than once (a list, a DataLoader), where the moments exceed the budget.
    - `forward(model, batch)` runs the model; what it returns is not read.
    - `mask(batch)`: bool [B, S] of the tokens that count, or several for inputs of several shapes; inputs of other shapes count whole.
    - `columns`: directions stored of wider inputs, float32 [D, K].
    - `budget_gib`: for the moments, float32 [D, D] of each distinct input, on the model's device.

    Costs, beside the forward passes, O(tokens D^2) for each distinct input and one eigendecomposition of it, O(D^3); the file holds
    4 D K bytes of each. ValueError: no LoRA layers, no batches, padding that no input has the shape of, values that are not finite,
    a model whose linears share inputs in some batches and not in others.
    """
    adapted = adapted_layers(model, adapter)
    once = iter(batches) is batches
    source = iter(batches)
    first = next(source, None)
    if first is None:
        raise ValueError("there are no batches to measure on: give some tens of items of everything that shall be kept")
    with measuring(model), adapters_off(model):
        shared = _shared(adapted.layers, lambda: forward(model, first))
        groups = _groups({key: adapted.layers[key] for key in dict.fromkeys(shared.values())}, adapted.adapter, budget_gib * 2**30)
        if once and len(groups) > 1:
            raise ValueError(f"the moments of {len(set(shared.values()))} inputs need {len(groups)} passes with budget_gib={budget_gib:g}, "
                             "and these batches can be gone through once: give a list or a DataLoader, or a larger budget_gib")
        spectra: Dict[str, Spectrum] = {}
        counted: Dict[str, int] = {}
        unmasked: set = set()
        for keys in groups:
            one_pass = _Pass(adapted.layers, {name: key for name, key in shared.items() if key in keys})
            with one_pass.watch:
                for batch in itertools.chain([first], source) if once else batches:
                    one_pass.run(partial(forward, model, batch), mask(batch))
            for key, moment_DD in one_pass.moments.each(one_pass.tokens):
                spectra[key] = spectrum(moment_DD, columns)
            counted.update(one_pass.tokens)
            unmasked |= one_pass.unmasked
    meta = {"batches": one_pass.batches, "tokens": max(counted.values()), "unmasked": sorted(unmasked), "columns": columns}
    return Bases({key: spectra[key] for key in sorted(spectra)}, shared, fingerprint(model), meta)


def _groups(leaders: Dict[str, nn.Module], adapter: str, limit_bytes: float) -> List[List[str]]:
    """Inputs in groups whose second moments fit the limit, in the model's order."""
    groups: List[List[str]] = []
    used = 0.0
    for key, layer in leaders.items():
        size = 4.0 * layer.lora_A[adapter].weight.shape[1] ** 2
        if not groups or used + size > limit_bytes:
            groups, used = [*groups, []], 0.0
        groups[-1].append(key)
        used += size
    return groups


class _Pass:
    """Moments of some inputs. The others that share one are watched, so that a model whose wiring changes with the batch is found out."""

    def __init__(self, layers: Dict[str, nn.Module], shared: Dict[str, str]):
        self.moments, self.tokens, self.unmasked = Moments(), dict.fromkeys(shared.values(), 0), set()
        self._shared, self._last = shared, {}
        self._masks: Dict[tuple, Tuple[torch.Tensor, int]] = {}
        self._fitted, self.batches = False, 0
        self.watch = _Watch({name: layers[name] for name in shared}, self._on)

    def run(self, forward: Callable[[], Any], masks: Masks) -> None:
        found = [] if masks is None else [masks] if isinstance(masks, torch.Tensor) else list(masks)
        # Asking for a sum waits for the device: once a batch, not once a linear.
        self._masks = {tuple(one.shape): (one.bool(), int(one.bool().sum())) for one in found}
        self._fitted, self._last, self.batches = False, {}, self.batches + 1
        self.watch.active = True
        forward()
        self.watch.active = False
        if not self._fitted and any(count < one.numel() for one, count in self._masks.values()):
            raise ValueError(f"there is padding in a batch, and no adapted linear has inputs of the mask's shape {list(self._masks)[0]}: "
                             "the model puts other tokens (pictures) beside the text; give mask=, which returns a bool tensor of the whole "
                             "sequence, or batches without padding")

    def _on(self, name: str, x: torch.Tensor) -> None:
        key = self._shared[name]
        if name != key:
            leader = self._last.get(key)
            if leader is None or leader() is not x:
                raise ValueError(f"{name} and {key} read the same input in the first batch and not in a later one: batches of one kind are "
                                 "needed, one call of measure for each kind of model path")
            return
        self._last[key] = weakref.ref(x)
        keep, count = self._masks.get(tuple(x.shape[:-1]), (None, x[..., 0].numel()))
        if keep is None and self._masks:
            self.unmasked.add(key)
        self._fitted |= keep is not None
        self.moments.add(key, x, None if keep is None else keep.to(x.device))
        self.tokens[key] += count
