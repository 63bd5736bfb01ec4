"""Stage `vlakeep probe-add`: a probe with frames of data sets beside its items, so that what was learned lately is kept as well.

    vlakeep probe-add --config configs/method_graded.yaml --data.datasets '[tabletop_corner]' --to tabletop.corner

The frames' pictures and instructions become probe items, spread evenly over each set, of the kind `task:NAME`; their actions are not
looked at. Of the probe itself the probe.size items are taken that the offline stage would take.

reads:  probe_root_dir/<probe.name>; data_root_dir/<set>
writes: probe_root_dir/<--to>, which has probe.size + --frames per set items
"""

import sys
from typing import List

from vlakeep.core.config import Config
from vlakeep.core.errors import quoted
from vlakeep.core.log import log
from vlakeep.core.options import read
from vlakeep.core.stages import PROBE_ADD
from vlakeep.core.storage import Storage
from vlakeep.data.formats import closing_all, open_configured
from vlakeep.data.images import resize_uint8
from vlakeep.data.sample import Sample
from vlakeep.probe.probe_set import TASK, evenly, open_probe, write_probe


def extend(config: Config, storage: Storage, to: str, frames: int) -> int:
    """Write the probe `to`; returns its number of items. ValueError for the probe itself, and where a set has too few frames."""
    if to == config.probe.name:
        raise ValueError(f"--to {quoted(to)}: is the probe that frames are added to, --probe.name, and it would be lost; give another one")
    probe = open_probe(config, storage)
    items = probe.spread(config.probe.size)
    samples, kinds = probe.samples(items), probe.kinds(items)
    states = [probe.items[i]["state"] for i in items]
    if samples[0].cameras or samples[0].state is not None:
        raise ValueError(f"{probe.folder} holds several cameras or states: frames can be added to probes of one picture only")
    with closing_all(open_configured(config.data, storage.data, storage.cache)) as datasets:
        for dataset in datasets:
            keys = [(episode, t) for episode, length in enumerate(dataset.lengths) for t in range(int(length))]
            if len(keys) < frames:
                raise ValueError(f"{dataset.name} has {len(keys)} frames, --frames asks for {frames}")
            for number in evenly(len(keys), frames):
                frame = dataset.frame(*keys[number]).with_pictures(lambda picture: resize_uint8(picture, samples[0].image.shape[:2]))
                samples.append(Sample(frame.image, frame.instruction))
                kinds.append(f"{TASK}{dataset.name}")
                states.append("")
    folder = storage.guard_write(storage.probe_folder(to), what="probe")
    write_probe(folder, samples, kinds, states)
    log.info(f"wrote {folder}: {len(samples)} items of {len(set(kinds))} kinds")
    return len(samples)


def main(argv: List[str]) -> int:
    args, config = read(PROBE_ADD, argv)
    extend(config, Storage.from_config(config), args.to, args.frames)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
