"""Episodes that cannot be used: all of them are found when a data set is opened, and refused, or with data.skip_bad left out and recorded.

A reader goes on after a bad episode (IndexBuilder.leave_out), so that one look finds all. In the index it has no frame and keeps its
number, so that what the split, the training and the held-out part hold does not depend on how many others are bad.
"""

import json
from pathlib import Path
from typing import Dict, List, Tuple

from vlakeep.core.storage import atomic_write

OPTION = "--data.skip_bad true"
SHOWN = 50  # lines of an error
FILE = "left_out.json"  # in the folder of a run: data set -> what was left out


def in_words(entry: Tuple[str, int]) -> str:
    """A reason, and how many episodes it takes; 0 for a file that does not even tell how many it has."""
    reason, episodes = entry
    return reason if episodes == 1 else f"{reason} ({episodes or 'unknown number of'} episodes)"


def nothing_left(bad: Dict[str, int]) -> str:
    """When no episode is usable the first reason is most likely that of all, and leaving them out helps nobody."""
    first, *others = bad.items()
    return in_words(first) + (f"\nThe other {len(others)} entries of the data set cannot be used either" if others else "")


def refuse(folder, bad: Dict[str, int], skip_bad: bool) -> None:
    """ValueError with the list of all, unless they are to be left out."""
    if not bad or skip_bad:
        return
    lines = list(map(in_words, bad.items()))
    if len(lines) == 1:
        raise ValueError(f"{lines[0]}. To train without: {OPTION}")
    shown = lines[:SHOWN] + ([f"... and {len(lines) - SHOWN} more"] if lines[SHOWN:] else [])
    listed = "\n  ".join(shown)
    raise ValueError(f"{folder}: {len(lines)} parts cannot be used:\n  {listed}\nMend them, or train without them: {OPTION}")


def record(left_out: Dict[str, List[str]], run: Path) -> None:
    """Write which parts of which data set a run was made without; with none there is no file."""
    path = Path(run) / FILE
    if not any(left_out.values()):
        path.unlink(missing_ok=True)
        return
    with atomic_write(path, "w") as file:
        file.write(json.dumps({name: lines for name, lines in left_out.items() if lines}, indent=1, ensure_ascii=False) + "\n")
