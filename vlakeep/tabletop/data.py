"""Stage `vlakeep tabletop-data`: demonstrations of new skills (RLDS) and the probe, from the tabletop simulator.

    vlakeep tabletop-data --config configs/method_icsm_hsw_thermostat.yaml [--skills path,order] [--episodes 200]

--skills: corner, path, order, relation, repeat, carry, blue, or known ones. Without it the data sets are those of data.datasets.
--episodes: demonstrations of each.

writes: data_root_dir/tabletop_<skill>/ for every skill, probe_root_dir/<probe.name>/
"""

import sys
from typing import List, Optional, Sequence

from vlakeep.core.config import Config, ConfigError
from vlakeep.core.options import read
from vlakeep.core.storage import Storage
from vlakeep.data.writer import write_rlds
from vlakeep.probe.probe_set import write_probe
from vlakeep.tabletop.stages import DATA

EPISODES = 200
NOISE = 0.2


def write_tabletop_data(config: Config, storage: Storage, skills: Sequence[str] = (), episodes: Optional[int] = None) -> None:
    """Write the data sets and the probe, replacing what is there; the same seed gives the same bytes.

    skills: the sets tabletop_<skill>; none takes data.datasets. episodes: in each set, EPISODES if not given; the first ones are the
    same however many there are. Raises ValueError for a set that is none of the tabletop's, before anything is written.
    """
    from vlakeep.tabletop import benchmark as tabletop

    names = [f"tabletop_{skill}" for skill in skills] or config.data.datasets
    for name in names:
        prefix, _, skill = name.partition("_")
        if prefix != "tabletop" or skill not in tabletop.ALL_SKILLS:
            raise ValueError(f"--{'skills' if skills else 'data.datasets'}: {name} is no tabletop data set; known are "
                             f"{', '.join('tabletop_' + s for s in tabletop.ALL_SKILLS)}")
    probe_folder = storage.guard_write(storage.probe_folder(config.probe.name), what="probe")
    for name in names:
        folder = storage.guard_write(storage.data / name, what="data set")
        skill = name.partition("_")[2]
        demos = tabletop.collect_demos(skill, episodes or EPISODES, seed=config.seed, noise=NOISE)
        write_rlds(storage.data, name, demos, image_format="png", overwrite=True)
        print(f"wrote {folder}: {len(demos)} episodes, {sum(len(e.actions) for e in demos)} frames")
    samples, kinds = tabletop.make_probe(config.probe.size, seed=config.seed)
    write_probe(probe_folder, samples, kinds)
    print(f"wrote {probe_folder}: {len(samples)} items of {len(set(kinds))} kinds")


def main(argv: List[str]) -> int:
    args, config = read(DATA, argv)
    if args.skills == []:
        raise ConfigError("--skills needs names, such as --skills path,order")
    write_tabletop_data(config, Storage.from_config(config), args.skills or (), args.episodes)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
