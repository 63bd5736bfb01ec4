"""Graded gains as a library: fine-tune any PEFT LoRA model in your own loop and keep what it knows (docs/protect.md).

    from vlakeep.protect import Probe, measure, protect

    bases = measure(model, old_batches)                               # once; bases.save(file), Bases.load(file)
    handle = protect(model, bases, target=0.01, probe=Probe(held_out))
    for batch in loader:
        model(**batch).loss.backward()
        optimizer.step(), optimizer.zero_grad(), handle.step()
    handle.merge()                                                    # a plain PEFT adapter is left
"""

from typing import TYPE_CHECKING

from vlakeep.protection.bases import Bases, fingerprint, measure
from vlakeep.protection.handle import Handle, protect, read_state
from vlakeep.protection.probe import Probe

if TYPE_CHECKING:
    from vlakeep.protection.callback import ProtectCallback

__all__ = ["Bases", "Handle", "Probe", "ProtectCallback", "fingerprint", "measure", "protect", "read_state"]


def __getattr__(name: str):
    # transformers' Trainer is loaded when it is asked for.
    if name == "ProtectCallback":
        from vlakeep.protection.callback import ProtectCallback

        return ProtectCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
