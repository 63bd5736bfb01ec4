"""What two sessions of one run have in common, and two runs of one id: every key that decides a number, and the content of what they read.

A key that names a place (a model, a probe, an artefact) is not compared where the hash of what lies there is: a disk that was mounted
elsewhere ends no run. Nor is a key that the run's method does not read.
"""

import hashlib
import json
import re
from functools import lru_cache
from pathlib import PurePath
from typing import Iterable, List, Tuple

from vlakeep.core.config import Config, to_dict
from vlakeep.core.registry import method_class

# What may differ when a run goes on: it changes no number of the steps that follow, but for train.steps with a cosine
# (train.py: schedule_note).
FREE_KEYS = set(
    "name root cache_dir data_root_dir probe_root_dir artifact_dir run_root_dir tmp_dir data.workers data.processes data.skip_bad "
    "train.sharding train.steps train.log_every train.save_every train.keep_last train.tensorboard train.use_wandb train.resume "
    "backbone.unnorm_key".split()
)
# A place -> the entry of a session's `hashes` that tells what lies there.
PLACES = {"backbone.checkpoint": "base_weights", "backbone.openvla_dir": "base_weights", "probe.name": "probe", "icsm.name": "artifact",
          "gains.name": "artifact", "train.from_run": "from_run"}
SECTIONS = ("probe", "icsm", "hsw", "gains", "thermostat", "options")  # what only methods read (methods/base.py: reads)


def config_differences(old: dict, new: dict, hashed: Iterable[str] = ()) -> List[str]:
    """`key: old -> new` of every key that differs and decides a number. hashed: entries of `hashes` that are compared by themselves."""
    flat_old, flat_new, defaults = dict(flat(old)), dict(flat(new)), usual()
    lines, matters = [], _matters(new)
    for key in sorted({**flat_old, **flat_new}):
        unknown_then = key not in flat_old and flat_new[key] == defaults.get(key)  # the run's version did not have the key yet
        if unknown_then or not matters(key) or (PLACES.get(key) in hashed and _same_run(key, flat_old.get(key), flat_new.get(key))):
            continue
        was, now = flat_old.get(key, "(not set)"), flat_new.get(key, "(not set)")
        if was != now:
            lines.append(f"{key}: {was} -> {now}")
    return lines


def same_samples(lines: List[str], old: dict, new: dict, worlds: Tuple[int, int]) -> List[str]:
    """config_differences without train.accumulation where a step keeps its micro-batches, since the number of processes changed too: two
    processes are one with two micro-batches."""
    def count(tree: dict, world: int) -> int:
        return int(tree.get("train", {}).get("accumulation", 1)) * world

    same = count(old, worlds[0]) == count(new, worlds[1])
    return [line for line in lines if not (same and line.startswith("train.accumulation: "))]


def _same_run(key: str, was, now) -> bool:
    """Whether two values of train.from_run are of one run, or checkpoint, on a disk that was moved. What it was is kept in the run itself
    (models/chain.py). Other places are compared by the hash of what lies there."""
    if key != "train.from_run":
        return True
    return bool(was and now) and any(PurePath(one).is_absolute() for one in (was, now)) and _tail(was) == _tail(now)


def _tail(path) -> Tuple[str, ...]:
    """RUN, or RUN/checkpoints/step_N."""
    parts = PurePath(path).parts
    return parts[-3:] if re.fullmatch(r"step_\d+", parts[-1]) else parts[-1:]


def _matters(config: dict):
    """Whether a key decides a number of a run of this configuration."""
    read = _read_by(config.get("method"))

    def matters(key: str) -> bool:
        if key in FREE_KEYS or key.startswith(("evaluate.", "export.")):
            return False
        return key.split(".")[0] not in SECTIONS or any(key == one or key.startswith(one + ".") for one in read)

    return matters


def _read_by(method) -> Iterable[str]:
    try:
        return method_class(method).reads
    except (ValueError, AttributeError, ImportError):  # of a package that is not here, or not a method of ours
        return SECTIONS


def run_id(config: dict, hashes: dict) -> str:
    """16 hex digits that two runs share when neither a key that matters to their bits nor what they were made from differs.

    `hashes`: of base weights, data, probe and artefact, nested as it pleases. A run that goes on keeps the id of its first session.
    """
    matters = _matters(config)
    own = {key: value for key, value in flat(config) if matters(key) and PLACES.get(key) not in hashes}
    return hashlib.sha256(json.dumps([own, dict(flat(hashes))], sort_keys=True, default=str).encode()).hexdigest()[:16]


def hash_differences(old: dict, new: dict) -> List[str]:
    """`key: old -> new` of what two sessions were made from, as far as both know it; checkpoint.check_base names other base weights."""
    was, now = dict(flat(old)), dict(flat(new))
    return [f"{key}: {str(was[key])[:12]} -> {str(now[key])[:12]}" for key in sorted(was)
            if key in now and was[key] != now[key] and not key.endswith("base_weights")]


@lru_cache(maxsize=None)
def _usual() -> dict:
    return dict(flat(to_dict(Config())))


def usual() -> dict:
    """Dotted key -> default of every key."""
    return dict(_usual())


def flat(tree: dict, prefix: str = ""):
    """(`section.key`, value) of nested dictionaries."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
