"""Stage `vlakeep tabletop-data`: demonstrations of the new skill (RLDS) and the probe, from the tabletop simulator.

    vlakeep tabletop-data --config configs/method_icsm_hsw_thermostat.yaml

writes: data_root_dir/tabletop_<skill>/ for the data sets named in data.datasets, probe_root_dir/<probe.name>/
"""

import sys
from typing import List

from vlakeep.config import Config, config_from_argv
from vlakeep.data.writer import write_rlds
from vlakeep.probe.probe_set import write_probe
from vlakeep.storage import Storage

EPISODES = 200
NOISE = 0.2


def write_tabletop_data(config: Config, storage: Storage) -> None:
    """Write the data sets and the probe, replacing what is there; the same seed gives the same bytes."""
    from vlakeep.benchmarks import tabletop

    for name in config.data.datasets:
        prefix, _, skill = name.partition("_")
        if prefix != "tabletop" or skill not in tabletop.ALL_SKILLS:
            raise ValueError(f"--data.datasets: {name} is no tabletop data set; known are "
                             f"{', '.join('tabletop_' + s for s in tabletop.ALL_SKILLS)}")
    probe_folder = storage.guard_write(storage.probe_folder(config.probe.name), what="probe")
    for name in config.data.datasets:
        folder = storage.guard_write(storage.data / name, what="data set")
        skill = name.partition("_")[2]
        episodes = tabletop.collect_demos(skill, EPISODES, seed=config.seed, noise=NOISE)
        write_rlds(storage.data, name, episodes, image_format="png", overwrite=True)
        print(f"wrote {folder}: {len(episodes)} episodes, {sum(len(e.actions) for e in episodes)} frames")
    samples, kinds = tabletop.make_probe(config.probe.size, seed=config.seed)
    write_probe(probe_folder, samples, kinds)
    print(f"wrote {probe_folder}: {len(samples)} items of {len(set(kinds))} kinds")


def main(argv: List[str]) -> int:
    config = config_from_argv(argv)
    write_tabletop_data(config, Storage.from_config(config))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
