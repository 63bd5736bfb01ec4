"""Cells that were run again beside the records of the first time (vlakeep study FILE --rerun 3)."""

import random
from typing import Any, Dict, List, Optional, Sequence

import numpy as np

from vlakeep.core.study import Cell
from vlakeep.studies.data import outcomes
from vlakeep.studies.tables import Table

COMPARED = ("weights", "trials", "action_kl", "probe_kl", "drift", "curves")


def drawn(cells: Sequence[Cell], count: int, seed: Optional[int] = None) -> List[Cell]:
    """`count` of the cells at random, in their order, each with those of its stream before it; the run that one is made of is trained
    with it. seed: None draws others every time."""
    chosen = random.Random(seed).sample(list(cells), min(count, len(cells)))
    return [cell for cell in cells if any(cell == one or (cell.stream and cell.chain == one.chain and cell.position <= one.position)
                                          for one in chosen)]


def compared(first: Dict[str, Any], again: Dict[str, Any]) -> Dict[str, Any]:
    """What is another number the second time: names of what differs, trials with another outcome and their number, the largest change of
    the action-token KL of a frame (nats)."""
    pairs = [(outcomes(own), outcomes(again["trials"][name])) for name, own in first["trials"].items() if name in again["trials"]]
    moved = sum(int((~((a == b) | (np.isnan(a) & np.isnan(b)))).sum()) if len(a) == len(b) else max(len(a), len(b)) for a, b in pairs)
    kl = [(a, b) for a, b in zip(first["action_kl"] or [], again["action_kl"] or []) if a is not None and b is not None]
    return {"differs": [key for key in COMPARED if first.get(key) != again.get(key)], "moved": moved,
            "trials": sum(len(a) for a, _ in pairs), "kl": max((abs(a - b) for a, b in kl), default=0.0)}


def table(found: Dict[str, Dict[str, Any]]) -> Table:
    """A row a cell."""
    rows = [[cell, "the same to the bit" if not one["differs"] else ", ".join(one["differs"]), f"{one['moved']} of {one['trials']}",
             f"{one['kl']:.2g}"] for cell, one in found.items()]
    head = ["cell", "what differs", "other outcomes", "largest change of KL"]
    return Table("again", "Cells run again, against their records", head, rows)
