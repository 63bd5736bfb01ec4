"""Stage `vlakeep probe-select`: a probe of some kinds of items of another, to see what a probe must hold.

    vlakeep probe-select --probe.name tabletop-2000 --kinds questions --to only-questions --size 500
    vlakeep probe-select --probe.name tabletop.corner --kinds 'task:*' --to only-corner

--kinds: names of kinds or patterns of them (`task:*`), and two groups: `questions`, all items that ask something, and `skills`, all others
that are no frames of a new task (`task:NAME`, from probe-add). An item is taken that any of these fits; --size of them, evenly spread.
Items keep their pictures, states and answers.

reads:  probe_root_dir/<probe.name>
writes: probe_root_dir/<--to>
"""

import json
import sys
from collections import Counter
from fnmatch import fnmatchcase
from typing import Any, Dict, List, Optional, Sequence

from vlakeep.core.config import Config, ConfigError
from vlakeep.core.errors import quoted
from vlakeep.core.log import log
from vlakeep.core.options import read
from vlakeep.core.stages import PROBE_SELECT
from vlakeep.core.storage import Storage
from vlakeep.probe.probe_set import TASK, ProbeError, ProbeSet, evenly, write_probe

GROUPS = {"questions": lambda item: item["question"], "skills": lambda item: not item["question"] and not item["kind"].startswith(TASK)}


def fits(item: Dict[str, Any], word: str) -> bool:
    """Whether a word of --kinds means this item."""
    return fnmatchcase(item["kind"], word) or (word in GROUPS and GROUPS[word](item))


def select(config: Config, storage: Storage, to: str, kinds: Sequence[str], size: Optional[int] = None) -> int:
    """Write the probe `to`; returns its number of items. ValueError for the probe itself, kinds that it does not have, too few items, and
    where another probe is in its place."""
    source, folder = storage.probe_folder(config.probe.name), storage.guard_write(storage.probe_folder(to), what="probe")
    if source.resolve() == folder.resolve():
        raise ValueError(f"--to {quoted(to)}: is the probe that items are taken from, --probe.name, and it would be lost; give another one")
    probe = ProbeSet(source)
    for word in kinds:
        if not any(fits(item, word) for item in probe.items):
            there = Counter(item["kind"] for item in probe.items)
            raise ValueError(f"--kinds {quoted(word)}: {source} has no such items, but " + ", ".join(
                f"{kind} ({there[kind]})" for kind in sorted(there)) + f"; {' and '.join(GROUPS)} stand for all of theirs")
    chosen = [number for number, item in enumerate(probe.items) if any(fits(item, word) for word in kinds)]
    if size and size > len(chosen):
        raise ValueError(f"--size {size}: {source} has {len(chosen)} such items; take a larger probe, or all: `vlakeep probe-select "
                         f"--kinds {quoted(','.join(kinds))} --to {quoted(to)}`")
    chosen = [chosen[i] for i in evenly(len(chosen), size or len(chosen))]
    write_probe(folder, probe.samples(chosen), probe.kinds(chosen), [probe.items[i]["state"] for i in chosen], _answers(probe, chosen),
                replace=False)
    log.info(f"wrote {folder}: {len(chosen)} items of {len(set(probe.kinds(chosen)))} kinds")
    return len(chosen)


def _answers(probe: ProbeSet, chosen: Sequence[int]) -> str:
    """The lines of answers.jsonl of these items, by their new numbers. ProbeError where it is damaged."""
    path, place = probe.folder / "answers.jsonl", {item: number for number, item in enumerate(chosen)}
    if not path.is_file():
        return ""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return "".join(json.dumps({**row, "item": place[row["item"]]}) + "\n" for row in rows if row["item"] in place)
    except (ValueError, TypeError, KeyError) as error:
        raise ProbeError(f"{path} is damaged ({error!r}); make it again with `vlakeep libero-vqa`, or remove it") from error


def main(argv: List[str]) -> int:
    args, config = read(PROBE_SELECT, argv)
    if not args.kinds:
        raise ConfigError("--kinds needs names, such as --kinds questions")
    select(config, Storage.from_config(config), args.to, args.kinds, args.size)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
