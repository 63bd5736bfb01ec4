"""The front of new-task success against retention: which settings nothing beats on both, how much the front of each family covers.

Hypervolume: the area below and left of a front, from success 0 and retention 0 on; both are in [0, 1]. P(on front): the share of bootstrap
draws (inference.py) in which a setting is beaten on both by none, all settings judged in the same draw.
"""

from typing import Dict, List, NamedTuple, Sequence, Tuple

import numpy as np

from vlakeep.studies.data import Data, Setting, block_mean
from vlakeep.studies.inference import sample


class Front(NamedTuple):
    """settings [K] with their means `new` [K], `kept` [K] and draws `new_RK`, `kept_RK`; `tasks` and `seeds` are common to all of them."""

    settings: List[Setting]
    families: List[str]
    new: np.ndarray
    kept: np.ndarray
    new_RK: np.ndarray
    kept_RK: np.ndarray
    tasks: List[str]
    seeds: List[int]


def beaten(new_RK: np.ndarray, kept_RK: np.ndarray) -> np.ndarray:
    """[R, K] bool: whether another setting is at least as good on both and better on one."""
    found = np.zeros(new_RK.shape, dtype=bool)
    for k in range(new_RK.shape[1]):
        n, r = new_RK[:, k:k + 1], kept_RK[:, k:k + 1]
        found |= (n >= new_RK) & (r >= kept_RK) & ((n > new_RK) | (r > kept_RK))
    return found


def hypervolume(new_RK: np.ndarray, kept_RK: np.ndarray) -> np.ndarray:
    """[R]: area of the union of the rectangles from (0, 0) to each point; points below 0 count as 0."""
    order = np.argsort(-new_RK, axis=1, kind="stable")
    new = np.maximum(np.take_along_axis(new_RK, order, 1), 0.0)
    kept = np.maximum.accumulate(np.maximum(np.take_along_axis(kept_RK, order, 1), 0.0), axis=1)
    width = new - np.concatenate([new[:, 1:], np.zeros((len(new), 1))], axis=1)
    return (width * kept).sum(1)


def shortfall(own: Tuple[np.ndarray, np.ndarray], other: Tuple[np.ndarray, np.ndarray], near: float = 0.0) -> np.ndarray:
    """[R]: the least, over the other's points, of what the own front keeps more at a success at most `near` lower; -1 where it learns
    that much nowhere.

    At 0 or above the own front is on or beyond the other's everywhere. Each is (new_RK, kept_RK).
    """
    least = np.full(len(other[0]), np.inf)
    for k in range(other[0].shape[1]):
        able = own[0] >= other[0][:, k:k + 1] - near
        gain = np.where(able, own[1] - other[1][:, k:k + 1], -1.0).max(1)
        least = np.minimum(least, gain)
    return least


def front_of(data: Data, families: Dict[str, List[Setting]], retention: str, seeds: Sequence[int], draws: int) -> Front:
    """All settings over the tasks and seeds that all of them have; those without any record on these seeds are left out, and those of which
    all trials of an ability crashed. ValueError where none are common."""
    pairs = [(family, setting) for family, settings in families.items() for setting in settings
             if any(record["seed"] in seeds for record in data.records(setting))]
    settings = [setting for _, setting in pairs]
    tasks, common = data.common(settings, seeds)
    if not tasks or not common:
        raise ValueError("no task and seed is done in all settings yet: a front compares settings on the same ones")
    kept, columns = [], []
    for family, setting in pairs:
        both = [data.blocks(setting, measure, tasks, common) for measure in ("new", retention)]
        means = [block_mean(blocks) for blocks in both]
        if None not in means:
            kept.append((family, setting))
            columns += [(mean, sample(blocks, draws)) for mean, blocks in zip(means, both)]
    if not kept:
        raise ValueError("in every setting all trials of an ability crashed")
    return Front([setting for _, setting in kept], [family for family, _ in kept], np.array([mean for mean, _ in columns[::2]]),
                 np.array([mean for mean, _ in columns[1::2]]), np.stack([drawn for _, drawn in columns[::2]], 1),
                 np.stack([drawn for _, drawn in columns[1::2]], 1), tasks, list(common))


def of_family(front: Front, family: str) -> Tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(new [1, K], kept [1, K], new [R, K], kept [R, K]) of a family's settings."""
    own = [k for k, name in enumerate(front.families) if name == family]
    return front.new[None, own], front.kept[None, own], front.new_RK[:, own], front.kept_RK[:, own]
