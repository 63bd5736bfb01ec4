"""Stage `vlakeep audit-probe`: token by token, what of the probe's prompts counts as instruction, and why (ICSM step 1).

    vlakeep audit-probe --config configs/method_icsm_hsw_thermostat.yaml

The items are the ones that `vlakeep offline` pools: probe.size of them, evenly spread. The first three of each kind are printed
in full; the last line counts all of them.

reads:  probe_root_dir/<probe.name>, config.json and the processor files of the base checkpoint; no weights
writes: nothing
Exit status: 1 when every mask is empty, since nothing could be pooled then; 0 otherwise.
"""

import sys
from collections import Counter
from typing import List

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vlakeep.core.options import read
from vlakeep.core.stages import AUDIT
from vlakeep.core.storage import Storage, find_checkpoint
from vlakeep.models.load import model_class
from vlakeep.probe.masks import AuditRow, audit
from vlakeep.probe.probe_set import open_probe

SHOWN = 3  # items of each kind


def item_table(rows: List[AuditRow]) -> Table:
    """One item's prompt as a table, a line per text token."""
    table = Table()
    for column in ("text position", "id", "piece", "covers", "kept", "why"):
        table.add_column(column, overflow="fold")
    for row in rows:
        cells = (str(row.position), str(row.id), row.piece, repr(row.text), "kept" if row.kept else "", row.reason)
        table.add_row(*map(Text, cells), style="bold" if row.kept else "dim")
    return table


def main(argv: List[str]) -> int:
    _, config = read(AUDIT, argv)
    storage = Storage.from_config(config)
    folder = find_checkpoint(config.backbone.checkpoint, storage.cache)
    processor = model_class(folder).read_processor(config.backbone, folder)
    probe = open_probe(config, storage)
    items = probe.spread(config.probe.size)
    terminal = Console(highlight=False)
    console = terminal if terminal.is_terminal else Console(highlight=False, width=140)  # a log file has room
    console.print(
        f"probe {probe.folder}, sha256 {probe.sha256[:16]}, tokenizer of {folder}. "
        "Image patches are no text and never kept; text positions are counted without them.",
        markup=False,
    )
    shown, counts = Counter(), []
    for number, kind, sample in zip(items, probe.kinds(items), probe.samples(items)):
        rows = audit(sample, processor)
        counts.append(sum(row.kept for row in rows))
        shown[kind] += 1
        if shown[kind] <= SHOWN:
            head = f"\nitem {number}, {kind}: {counts[-1]} of {len(rows)} tokens kept in {processor.prompt_text(sample)!r}"
            console.print(head, item_table(rows), sep="\n", markup=False)
    empty, mean = counts.count(0), sum(counts) / len(counts)
    print(
        f"{len(items)} items of {len(shown)} kinds; kept tokens per item: min {min(counts)}, mean {mean:.1f}, max {max(counts)}; "
        f"empty masks: {empty}"
    )
    return 1 if empty == len(items) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
