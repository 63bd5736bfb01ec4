"""Graded gains on any PEFT model in anyone's training loop: `protect` puts them on, `step` runs the loop, `merge` takes them off.

    handle = protect(model, bases, target=0.01, probe=Probe(held_out))      # before DDP and after get_peft_model
    ...; optimizer.step(); optimizer.zero_grad(); handle.step()
    handle.merge()                                                          # what is left is a plain PEFT adapter

The formula is that of hsw/graded.py, the loop that of thermostat/loop.py; method `graded` of vlakeep train runs the very same code.
"""

import json
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Union

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from vlakeep.core.storage import atomic_path
from vlakeep.hsw.graded import make_site
from vlakeep.protection.bases import Bases
from vlakeep.protection.layers import Adapted, adapted_layers, outside, refuse_sharded, say_outside
from vlakeep.protection.probe import Probe
from vlakeep.thermostat.loop import Loop, set_point, starting_opening

UNPROTECTED = ("refuse", "freeze", "train")


def protect(model: nn.Module, bases: Bases, *, target: Optional[float] = None, probe: Union[Probe, Callable[[], float], None] = None,
            every: int = 50, opening: Optional[float] = None, start: float = 1e-4, scale: float = 10.0, steepness: float = 1.0,
            allocation: str = "linear", open_factor: float = 1.5, close_factor: float = 4.0, unprotected: str = "refuse",
            adapter: Optional[str] = None, state: Optional[dict] = None) -> "Handle":
    """Give every LoRA A of `model` a gain per direction of its inputs, and close the loop on what may be forgotten.

    - `bases`: of this model (`measure`).
    - `target`: how far the model may go from itself on the probe, in nats per answer token.
    - `probe`: a `Probe`, or a function without arguments that returns the divergence now, the same in all processes.
    - `every`: optimizer steps between two measurements.
    - `opening`: fixed gains instead of the loop, lambda in mean eigenvalues of the input.
    - `start`: share of plain LoRA's probe energy that passes at the beginning.
    - `scale`: of all updates, as lora_alpha.
    - `steepness`, `allocation` ("linear" or "model"), `open_factor`, `close_factor`: as in docs/graded.md.
    - `unprotected`: what to do with trained parameters that gains cannot bound (DoRA's magnitudes, modules_to_save, biases, convolutions):
      "refuse", "freeze" them, or "train" them all the same.
    - `adapter`: its name, None for the active one.
    - `state`: of an earlier handle, to go on with a loaded adapter.

    Before DistributedDataParallel or after it; an optimizer that was made before keeps working. The model is as it was when this raises.
    Costs per optimizer step O(rank D K) for each linear, whatever the batch; per measurement one forward pass of the probe.
    ValueError: bases of another model, a target without a probe or the other way round, an adapter that was trained already (give
    `state`), trained parameters outside (see `unprotected`), weights split over processes.
    """
    if unprotected not in UNPROTECTED:
        raise ValueError(f"unprotected={unprotected!r}: must be one of {', '.join(UNPROTECTED)}")
    if allocation not in ("linear", "model"):
        raise ValueError(f"allocation={allocation!r}: must be linear or model")
    if (target is None) != (probe is None):
        raise ValueError("target and probe belong together: the target is a divergence on the probe; for fixed gains give opening= alone")
    if probe is not None and opening is not None:
        raise ValueError("opening fixes the gains, and target lets the loop find them: give one of them")
    if every < 1 or not start > 0 or not scale > 0 or not steepness > 0 or (opening is not None and not opening > 0):
        raise ValueError("every must be 1 or more, and start, scale, steepness and opening above 0")
    adapted = adapted_layers(model, adapter)
    problems = bases.problems(model, adapted)
    if problems:
        raise ValueError("; ".join(problems))
    layers = {name: layer for name, layer in adapted.layers.items() if name in bases.inputs}
    for name, layer in layers.items():
        if hasattr(layer.lora_A[adapted.adapter], "parametrizations"):
            raise ValueError(f"LoRA A of {name} has a parametrisation already: a model is protected once; call merge() of its handle first")
        if state is None and bool(layer.lora_B[adapted.adapter].weight.detach().any()):
            raise ValueError(f"the adapter has been trained already (LoRA B of {name} is not zero), and gains put on now would change what "
                             "it does: start from a fresh adapter, or go on with state= of the handle that trained it. Initialisations "
                             "that change the base (PiSSA, OLoRA, LoftQ) are not supported: the teacher is the model without its adapter")
    # An adapter that was loaded must be that of the state.
    loaded = {name: layer.lora_A[adapted.adapter].weight.detach().clone() for name, layer in layers.items()
              if bool(layer.lora_B[adapted.adapter].weight.detach().any())}
    left = outside(model, layers, adapted.adapter)
    if left and unprotected == "refuse":
        raise ValueError(f"trained, but not to be bounded by gains: {say_outside(list(left))}. Take them out of the training, or say what "
                         "to do: unprotected=\"freeze\" trains the LoRA weights of linears alone, unprotected=\"train\" trains these too, "
                         "and the loop can only close what it holds")
    handle = Handle(model, bases, Adapted(adapted.adapter, layers), dict(
        steepness=steepness, scale=scale, allocation=allocation, target=target, every=every), probe)
    handle._begin(start if opening is None else None, opening, open_factor, close_factor, left if unprotected == "freeze" else {}, left)
    if state is not None:
        handle._loaded = loaded
        handle.load_state_dict(state)
    return handle


class Handle:
    """What `protect` returns. `history`: one row (a dictionary) for each measurement."""

    def __init__(self, model: nn.Module, bases: Bases, adapted: Adapted, settings: Dict[str, Any], probe):
        self._model, self._bases, self._adapted, self._settings, self._probe = model, bases, adapted, settings, probe
        self.steps, self.history = 0, []
        self._loop: Optional[Loop] = None
        self._hooks: List[Any] = []
        self._loaded: Dict[str, torch.Tensor] = {}  # effective weights that the model was loaded with, until the handle's state comes
        self._last: Dict[str, float] = {}  # of the last step: what it measured
        self._merged = False
        self._before: Optional[float] = None  # the loop's opening, while the gains are settled

    def _begin(self, start, opening, open_factor, close_factor, freeze: Dict[str, nn.Parameter], left: Dict[str, nn.Parameter]) -> None:
        settings, probe = self._settings, self._probe
        if isinstance(probe, Probe):
            probe.prepare(self._model)
        self._site = make_site(self._adapted.layers, self._bases.spectra, self._bases.inputs.__getitem__, settings["steepness"],
                               settings["scale"], settings["allocation"], adapter=self._adapted.adapter)
        self._site.set_opening(opening or starting_opening(self._site, start))
        for parameter in freeze.values():
            parameter.requires_grad_(False)
        self.unprotected = [name for name in left if name not in freeze]
        if probe is not None:
            def measure() -> float:
                return probe.measure(self._model) if isinstance(probe, Probe) else float(probe())
            law = set_point(settings["target"], self._site.opening, settings["steepness"], open_factor, close_factor)
            self._loop = Loop(measure, law, self._site.set_opening)
        for name, layer in self._adapted.layers.items():
            module = layer.lora_A[self._adapted.adapter]
            self._hooks += [module._register_state_dict_hook(_as_plain), module._register_load_state_dict_pre_hook(self._on_load(name))]

    def _on_load(self, name: str):
        """A plain weight that is loaded into the model is kept until the handle's state is: A_eff alone does not say what A was."""
        def hook(state_dict, prefix, *rest):
            if prefix + "weight" in state_dict:
                self._loaded[name] = state_dict.pop(prefix + "weight").detach().clone()
                state_dict[prefix + "parametrizations.weight.original"] = self._raw(name).detach()
        return hook

    def _raw(self, name: str) -> torch.Tensor:
        return self._adapted.layers[name].lora_A[self._adapted.adapter].parametrizations.weight.original

    def step(self) -> Dict[str, float]:
        """After every optimizer step (not every micro-batch). Measures and moves the gains in one step of `every`; returns the row then, {}
        in other steps: kl, opening (with which it was measured), next_opening, step. ValueError after merge, after the model's weights
        were loaded without the handle's state, and when the weights have been split over processes since protect (FSDP)."""
        self._check()
        if self.steps == 0:
            refuse_sharded(self._model)
        self.steps, self._last = self.steps + 1, {}
        if self._loop and self.steps % self._settings["every"] == 0:
            kl = self._loop.measure()
            self._last = {"kl": kl, **self._loop.move(kl)}
            self.history.append({"step": self.steps, **self._last})
        return dict(self.history[-1]) if self._last else {}

    def _check(self) -> None:
        if self._merged:
            raise ValueError("merge() has ended the protection: the gains are gone, and training on would be plain LoRA; protect a fresh "
                             "adapter")
        if self._before is not None:
            raise ValueError("the gains are settled for a checkpoint: call unsettle() before training goes on")
        if self._loaded:
            raise ValueError(f"the weights of {len(self._loaded)} protected linears were loaded, and the handle's state was not: call "
                             "load_state_dict (or load) of the handle with what was saved beside them")

    def settle(self) -> Dict[str, float]:
        """Set the gains to where the weights of now keep to the target, for a checkpoint that is to be used, until `unsettle`. Returns the
        row of the search, which measures up to eight times; {} without a loop. All processes have to call it."""
        self._check()
        self._before = self._site.opening
        return self._loop.settle(self._last) if self._loop else {}

    def unsettle(self) -> None:
        """The gains of the loop again, with which training goes on as if it had not been interrupted."""
        if self._before is not None and not self._merged:
            self._site.set_opening(self._before)
        self._before = None

    @contextmanager
    def settled(self) -> Iterator[Dict[str, float]]:
        """settle, and unsettle at the end of the block."""
        try:
            yield self.settle()
        finally:
            self.unsettle()

    def merge(self, settle: bool = True) -> Dict[str, float]:
        """End: settle the gains for the final weights (unless told not to) and leave A_eff behind as the plain LoRA weight, so that the
        model, its files and PEFT see nothing of the method. Returns the row of the search. Once; ValueError afterwards."""
        self._check()
        row = self._loop.settle(self._last) if self._loop and settle else {}
        if row:
            self.history.append({"step": self.steps, **row})
        self._report = self.report()
        for hook in self._hooks:
            hook.remove()
        self._site.detach()
        self._merged = True
        return row

    def report(self) -> Dict[str, Any]:
        """Where the protection stands; after merge() where it ended.

        - `opening`, and `passes`, the share of plain LoRA's probe energy that passes
        - `target`, `kl` (the last measurement), `measurements`, `steps`
        - `linears`, `inputs`: their numbers
        - `open_directions`: of each input, the sum of squared gains
        - `update_norms`: of each linear, ||B A_eff|| times its scaling
        - `unprotected`: names of what is trained beside
        """
        if self._merged:
            return self._report
        norms = self._site.update_norms()
        kls = [row.get("settled_kl", row.get("kl")) for row in self.history]
        return {"opening": self._site.opening, "passes": self._site.passed_energy(self._site.opening), "target": self._settings["target"],
                "kl": kls[-1] if kls else None, "measurements": self._loop.controller.measurements if self._loop else 0,
                "steps": self.steps, "linears": len(norms), "inputs": len(self._site.distinct()),
                "open_directions": {self._bases.inputs[name]: space.open_rank() for name, space in self._site.distinct().items()},
                "update_norms": dict(zip(norms, torch.stack(list(norms.values())).tolist())), "unprotected": list(self.unprotected)}

    # Checkpoints

    def state_dict(self) -> Dict[str, Any]:
        """Tensors and plain numbers: A and B of every protected linear, the loop, the step. The optimizer's state is the caller's.
        Accelerate saves and loads it after accelerator.register_for_checkpointing(handle)."""
        self._check()
        tensors = {}
        for name, layer in self._adapted.layers.items():
            tensors[f"{name}.A"] = self._raw(name).detach().clone()
            tensors[f"{name}.B"] = layer.lora_B[self._adapted.adapter].weight.detach().clone()
        return {"tensors": tensors, "fingerprint": self._bases.fingerprint, "steps": self.steps, "opening": self._site.opening,
                "loop": self._loop.state_dict() if self._loop else {}, "last": dict(self._last),
                "history": [dict(row) for row in self.history]}

    @torch.no_grad()
    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Go on to the bit where state_dict was taken. ValueError when it belongs to other weights, other linears, a handle with a loop
        where this one has none, or not to the adapter that was loaded into the model meanwhile."""
        wanted = {f"{name}.{part}" for name in self._adapted.layers for part in "AB"}
        if state["fingerprint"] != self._bases.fingerprint or set(state["tensors"]) != wanted or bool(state["loop"]) != bool(self._loop):
            raise ValueError("the state is of another handle (other base weights, other adapted linears, or with and without a target): "
                             "make this one with the same model, bases and options")
        for name, layer in self._adapted.layers.items():
            self._raw(name).copy_(state["tensors"][f"{name}.A"])
            layer.lora_B[self._adapted.adapter].weight.copy_(state["tensors"][f"{name}.B"])
        if self._loop:
            self._loop.load_state_dict(state["loop"])
        self._site.set_opening(state["opening"])
        self.steps, self._last, self.history = state["steps"], dict(state["last"]), [dict(row) for row in state["history"]]
        for name, loaded in self._loaded.items():
            effective = self._adapted.layers[name].lora_A[self._adapted.adapter].weight
            rounding = 1e-6 + 1e-2 * float(effective.abs().max())  # half precision, and gains on a device of another kind
            if not torch.allclose(loaded.to(effective).float(), effective.float(), rtol=0, atol=rounding):
                raise ValueError(f"the state is not of the checkpoint that was loaded into the model (LoRA A of {name} differs): load both "
                                 "from one checkpoint")
        self._loaded = {}

    def save(self, path) -> Path:
        """state_dict in one safetensors file, all or nothing."""
        state, path = self.state_dict(), Path(path)
        tensors = state.pop("tensors")
        with atomic_path(path) as partial:
            save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, str(partial),
                      metadata={"state": json.dumps(state)})
        return path

    def load(self, path) -> None:
        """load_state_dict of a file of `save`."""
        self.load_state_dict(read_state(path))


def read_state(path) -> Dict[str, Any]:
    """The state_dict in a file of Handle.save. FileNotFoundError; ValueError for a damaged file or another one."""
    try:
        with safe_open(str(path), "pt") as file:
            text = (file.metadata() or {}).get("state")
            if text is None:
                raise ValueError(f"{path} is no state of a handle: give the file that Handle.save has written")
            return {**json.loads(text), "tensors": {name: file.get_tensor(name) for name in file.keys()}}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): go on from another checkpoint") from error


def _as_plain(module, state_dict, prefix, metadata) -> None:
    """A_eff under PEFT's name, so that whatever saves the model in training saves an adapter that anyone can load."""
    raw = prefix + "parametrizations.weight.original"
    if raw in state_dict:
        del state_dict[raw]
        state_dict[prefix + "weight"] = module.weight.detach()
