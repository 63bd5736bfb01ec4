"""A probe that is asked and not protected: what `vlakeep libero-vqa --split heldout` makes, with its answers."""

import json
from pathlib import Path

from vlakeep.probe.probe_set import ProbeSet

_ANOTHER = "make another one with `vlakeep libero-vqa --split heldout --probe.name NAME`"


def open_heldout(folder: Path, protected: Path) -> ProbeSet:
    """The probe in `folder`, whose `answers` map item numbers to answers. `protected`: folder of the probe that a method protects.

    Raises ValueError for that one, for scenes that a method may protect, and for damaged answers; FileNotFoundError without answers.
    """
    path = folder / "answers.jsonl"
    if folder.resolve() == protected.resolve():
        raise ValueError(f"--evaluate.probe {folder.name}: that is also probe.name, which the method protects; {_ANOTHER}")
    if not path.is_file():
        raise FileNotFoundError(f"no answers.jsonl in {folder}: --evaluate.probe takes a probe made by `vlakeep libero-vqa`")
    probe, probe.answers = ProbeSet(folder), {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            probe.answers[row["item"]], split = row["answer"], row.get("split")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} line {number} is damaged ({error!r}); {_ANOTHER}") from error
        if split == "probe":
            raise ValueError(f"--evaluate.probe {folder.name}: its scenes are those that a method may protect; {_ANOTHER}")
    return probe
