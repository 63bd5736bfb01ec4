"""The records of a study as arrays: one number a trial, by setting, measure, training seed and start state.

Axes: S training seeds, I start states. A *block* is what is drawn together: start states of one kind. Old skills and questions are asked at
the same states after every task, so that tasks are averaged trial by trial first; each new skill has states of its own.
"""

import warnings
import zlib
from functools import lru_cache
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from vlakeep.core.study import BASE
from vlakeep.studies.records import states_of

EVALUATED_ALIKE = "evaluate all with the same --evaluate settings"
Blocks = Dict[str, np.ndarray]  # name -> [S, I], NaN where a trial crashed


class Setting(NamedTuple):
    """One way to train: an arm at a learning rate."""

    arm: str
    rate: float

    def __str__(self) -> str:
        return f"{self.arm} at {self.rate:g}" if self.rate else self.arm


class Data:
    """The records of a study. Tasks and seeds are in order of appearance and of size."""

    def __init__(self, records: Sequence[Dict[str, Any]]):
        self._records = {(Setting(one["arm"], one["rate"]), one["task"], one["seed"]): one for one in records}
        self.tasks = list(dict.fromkeys(one["task"] for one in records))
        self.seeds = sorted({one["seed"] for one in records if one["arm"] != BASE})
        # Names of the trials after each task, of any record.
        self._names: Dict[str, set] = {task: set() for task in self.tasks}
        for one in records:
            self._names[one["task"]].update(one["trials"])

    def all(self) -> List[Dict[str, Any]]:
        return list(self._records.values())

    def keys(self) -> List[Tuple[Setting, str, int]]:
        return list(self._records)

    @property
    def count(self) -> int:
        return len(self._records)

    def records(self, setting: Setting) -> List[Dict[str, Any]]:
        return [record for (own, _, _), record in self._records.items() if own == setting]

    def stops(self, setting: Setting) -> List[Tuple[int, Setting]]:
        """(step, setting) of the checkpoints on the way of a setting's runs, and of their end; of one that is a checkpoint, those of its
        run. [] without any."""
        own = next((record for record in self.records(setting)), {})
        arm = own["of"]["arm"] if "at" in own.get("of", {}) else setting.arm
        found = {one["of"]["at"]: key for (key, _, _), one in self._records.items()
                 if "at" in one.get("of", {}) and (one["of"]["arm"], key.rate) == (arm, setting.rate)}
        last = [max(step) for one in self.records(Setting(arm, setting.rate)) if (step := one["curves"].get("step"))]
        return sorted([*found.items(), *([(max(last), Setting(arm, setting.rate))] if last else [])]) if found else []

    def abilities(self, measure: str) -> List[str]:
        """Names of the trials that make a measure, such as `skill:reach`; a name stands for itself."""
        names = set().union(*self._names.values())
        starts = {"new": ("new:",), "old": ("skill:",), "questions": ("question:",), "all": ("skill:", "question:")}.get(measure)
        return sorted(name for name in names if name.startswith(starts)) if starts else [measure]

    def complete(self, setting: Setting, seeds: Sequence[int], tasks: Optional[Sequence[str]] = None) -> Tuple[List[str], List[int]]:
        """(tasks, those of the seeds) of which every combination is there; tasks that no seed has are left out."""
        if setting.arm == BASE:
            return [task for task in tasks or self.tasks if (setting, task, 0) in self._records], list(seeds)
        tasks = [task for task in tasks or self.tasks if any((setting, task, seed) in self._records for seed in seeds)]
        return tasks, [seed for seed in seeds if tasks and all((setting, task, seed) in self._records for task in tasks)]

    def common(self, settings: Sequence[Setting], seeds: Sequence[int]) -> Tuple[List[str], List[int]]:
        """(tasks, seeds) of which every combination is there in all the settings: of the tasks those that all of them have."""
        tasks = self.tasks
        for setting in settings:
            tasks = self.complete(setting, seeds, tasks)[0]
        for setting in settings:
            seeds = self.complete(setting, seeds, tasks)[1] if tasks else []
        return tasks, list(seeds)

    def blocks(self, setting: Setting, measure: str, tasks: Sequence[str], seeds: Sequence[int], minus: Optional[Setting] = None) -> Blocks:
        """Block -> [S, I]; with `minus` the differences, trial by trial at the same start state. ValueError where states differ."""
        found: Blocks = {}
        if measure == "action_kl":
            known = [task for task in tasks if all(one is None or self._measured(one, task, seed) for one in (setting, minus)
                                                   for seed in seeds)]
            stacks = {"action_kl": [self._alike([self._kl(setting, minus, task, seed) for seed in seeds], setting, task, measure, seeds)
                                    for task in known]}
        elif measure == "new":
            stacks = {name: [self._stack(setting, minus, task, name, seeds)] for task in tasks for name in self._new(task)}
        else:
            stacks = {name: [self._stack(setting, minus, task, name, seeds) for task in tasks if self._asked(task, name)]
                      for name in self.abilities(measure)}
        for name, own in stacks.items():
            if not own:
                continue
            if len({one.shape for one in own}) > 1:
                raise ValueError(f"{setting} has {' and '.join(str(one.shape[1]) for one in own)} trials of {name} after its tasks "
                                 f"{', '.join(tasks)}: {EVALUATED_ALIKE}")
            with warnings.catch_warnings():  # a trial that crashed after every task
                warnings.simplefilter("ignore", RuntimeWarning)
                found[name] = np.nanmean(np.stack(own), axis=0)
        return found

    def mean(self, setting: Setting, measure: str, seeds: Sequence[int]) -> Optional[float]:
        """Over what the setting has of these seeds, blocks alike; None without any, and where one has no trial that did not crash."""
        blocks = self._own(setting, measure, seeds)
        return block_mean(blocks)

    def crashed(self, setting: Setting, measures: Sequence[str], seeds: Sequence[int]) -> List[str]:
        """Names of the blocks of which every trial crashed."""
        found = {name: block for measure in measures for name, block in self._own(setting, measure, seeds).items()}
        return sorted(name for name, block in found.items() if np.isnan(block).all())

    def _own(self, setting: Setting, measure: str, seeds: Sequence[int]) -> Blocks:
        tasks, own = self.complete(setting, seeds)
        return self.blocks(setting, measure, tasks, own[:1] if setting.arm == BASE else own) if tasks and own else {}

    def _new(self, task: str) -> List[str]:
        return sorted(name for name in self._names.get(task, ()) if name.startswith("new:"))

    def _asked(self, task: str, name: str) -> bool:
        return name in self._names.get(task, ())

    def _record(self, setting: Setting, task: str, seed: int) -> Dict[str, Any]:
        return self._records[setting, task, 0 if setting.arm == BASE else seed]

    def _stack(self, setting, minus, task: str, name: str, seeds) -> np.ndarray:
        rows = []
        for seed in seeds:
            own = self._trials(setting, task, name, seed)
            row = outcomes(own)
            if minus is not None:
                other = self._trials(minus, task, name, seed)
                if states_of(own) != states_of(other):
                    raise ValueError(f"{setting} and {minus} were evaluated on other start states of {name} after {task}: "
                                     "evaluate both with the same --evaluate.seed and --evaluate.episodes")
                row = row - outcomes(other)
            rows.append(row)
        return self._alike(rows, setting, task, name, seeds)

    def _trials(self, setting: Setting, task: str, name: str, seed: int) -> Dict[str, Any]:
        record = self._record(setting, task, seed)
        if name not in record["trials"]:
            raise ValueError(f"{record['cell']} has no trials of {name}, which other cells of {task} have: {EVALUATED_ALIKE}")
        return record["trials"][name]

    def _alike(self, rows: List[np.ndarray], setting: Setting, task: str, name: str, seeds: Sequence[int]) -> np.ndarray:
        """[S, I]. ValueError naming two cells of which one has more trials."""
        for row, seed in zip(rows, seeds):
            if len(row) != len(rows[0]):
                one, two = (self._record(setting, task, of)["cell"] for of in (seed, seeds[0]))
                raise ValueError(f"{one} has {len(row)} trials of {name}, and {two} {len(rows[0])}: {EVALUATED_ALIKE}")
        return np.stack(rows)

    def _measured(self, setting: Setting, task: str, seed: int) -> bool:
        return setting.arm == BASE or bool(self._record(setting, task, seed)["action_kl"])

    def _kl(self, setting, minus, task: str, seed: int) -> np.ndarray:
        def values(one: Setting) -> np.ndarray:
            return np.array(self._record(one, task, seed)["action_kl"] or [0.0], dtype=float)  # the base is the teacher

        row = values(setting)
        other = row[:0] if minus is None else values(minus)
        if minus is not None and len(other) != len(row) and 1 not in (len(row), len(other)):
            cells = [self._record(one, task, seed)["cell"] for one in (setting, minus)]
            raise ValueError(f"{cells[0]} has the divergence of {len(row)} frames, and {cells[1]} of {len(other)}: {EVALUATED_ALIKE}")
        return row if minus is None else row - other


def block_mean(blocks: Blocks) -> Optional[float]:
    """Blocks alike; None without any, and where all trials of one crashed: a mean over the others would be of something else."""
    known = [block for block in blocks.values() if not np.isnan(block).all()]
    return float(np.mean([np.nanmean(block) for block in known])) if known and len(known) == len(blocks) else None


def outcomes(trials: Dict[str, Any]) -> np.ndarray:
    """[I]: 1 success, 0 failure, NaN a crash."""
    return np.array([np.nan if one == "x" else float(one) for one in trials["outcomes"]])


@lru_cache(maxsize=64)
def weights(key: str, count: int, draws: int) -> np.ndarray:
    """[draws, count]: how often each of `count` things is in a bootstrap sample; the same for the same key, whatever is compared."""
    generator = np.random.default_rng([zlib.crc32(key.encode()), count])
    return generator.multinomial(count, np.full(count, 1 / count), size=draws).astype(float)
