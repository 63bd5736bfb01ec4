"""How many training seeds and episodes a difference needs: variance components of paired differences, and the power of their t test.

A difference of two arms at seed s and start state i is mu + a_s + b_i + e_si. The mean squares of the two-way table of each block (data.py)
give the variance of a (trainings), b (states) and e (the rest, the luck of one episode) by their expected values (Searle, Casella and
McCulloch 1992), negative ones being 0. With S seeds and E episodes per skill the variance of the mean is

    seeds / S + states / E + rest / (S E)

where `seeds` is that of the mean over blocks, and `states` and `rest` are summed over blocks and divided by the square of their number.
Power is that of the two-sided t test with S - 1 degrees of freedom: the noncentral t, integrated over the chi-square of its denominator.
The test of inference.py divides by a larger standard error where single episodes matter: its bootstrap counts their luck up to three times.
So what it divides by has the expected square

    (seeds / S (1 - 1 / S) + states / E (1 - 1 / E) + rest / (S E) ((2 - 1 / S) (2 - 1 / E) - 1)) S / (S - 1)
"""

import math
from statistics import NormalDist
from typing import List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from vlakeep.reporting.intervals import t_quantile
from vlakeep.studies.data import Blocks

SEEDS, EPISODES = (3, 5, 8, 10, 15, 20), (20, 50, 100, 200, 500)


class Parts(NamedTuple):
    """Variances of one mean over blocks, per training seed, per state, and per episode."""

    seeds: float
    states: float
    rest: float

    def error(self, seeds: int, episodes: int) -> float:
        """Standard error of a difference."""
        return math.sqrt(self.seeds / seeds + self.states / episodes + self.rest / (seeds * episodes))

    def taken(self, seeds: int, episodes: int) -> Tuple[float, float]:
        """(what the bootstrap of inference.py takes for it, degrees of freedom of that by Satterthwaite 1946); 2 seeds and episodes at
        least."""
        few, luck = seeds / (seeds - 1), self.rest / seeds / episodes
        by_seed = self.seeds / seeds + luck
        by_state = few * (1 - 1 / episodes) * (self.states / episodes + luck)
        left = few * luck * ((2 - 1 / seeds) * (2 - 1 / episodes) - 1) - luck - few * (1 - 1 / episodes) * luck
        total = by_seed + by_state + left
        spread = by_seed ** 2 / (seeds - 1) + by_state ** 2 / (episodes - 1) + left ** 2 / ((seeds - 1) * (episodes - 1))
        return math.sqrt(total), total ** 2 / spread if spread else seeds - 1.0

    def power(self, effect: float, seeds: int, episodes: int) -> float:
        """Of the test of inference.py."""
        error, (taken, freedom) = self.error(seeds, episodes), self.taken(seeds, episodes)
        return power(effect, error, seeds, wider=max(1.0, taken / error) if error else 1.0, freedom=freedom)


def parts_of(blocks: Blocks) -> Optional[Parts]:
    """None with fewer than two seeds or states. Crashed trials take the mean of their seed and state."""
    states = rest = 0.0
    means, count = [], len(blocks)
    noise = 0.0
    for block_SI in blocks.values():
        seeds, episodes = block_SI.shape
        if seeds < 2 or episodes < 2 or np.isnan(block_SI).all():
            return None
        own = _filled(block_SI)
        left = own - own.mean(0) - own.mean(1, keepdims=True) + own.mean()
        square = float((left ** 2).sum() / ((seeds - 1) * (episodes - 1)))
        rest += square
        noise += square / episodes
        states += max(0.0, float(own.mean(0).var(ddof=1)) - square / seeds)
        means.append(own.mean(1))
    total = float(np.mean(means, axis=0).var(ddof=1))
    return Parts(max(0.0, total - noise / count ** 2), states / count ** 2, rest / count ** 2)


def _filled(block_SI: np.ndarray) -> np.ndarray:
    by_state = np.where(np.isnan(block_SI).all(0), np.nanmean(block_SI), 0.0)
    known = ~np.isnan(block_SI)
    by_state = by_state + np.where(known, block_SI, 0.0).sum(0) / np.maximum(known.sum(0), 1)
    by_seed = np.where(known, block_SI, 0.0).sum(1, keepdims=True) / np.maximum(known.sum(1, keepdims=True), 1)
    return np.where(known, block_SI, by_state[None] + by_seed - np.nanmean(block_SI))


def power(effect: float, error: float, seeds: int, level: float = 0.95, wider: float = 1.0, freedom: Optional[float] = None) -> float:
    """Probability that the t test of S seeds finds a true difference of `effect` with standard error `error`. wider, freedom: how many
    times that is the expected one that the test divides by, and the degrees of freedom of this one (S - 1)."""
    if error == 0:
        return 1.0 if effect else 0.0
    freedom = freedom or seeds - 1
    critical, shift = wider * t_quantile(seeds - 1, level), abs(effect) / error
    # z = sqrt(chi-square / freedom) by its density, on a grid that holds all but 1e-9 of it.
    z = np.linspace(1e-6, 1 + 8 / math.sqrt(2 * freedom) + 3 / freedom, 4001)
    log_density = (freedom - 1) * np.log(z) - freedom * (z ** 2 - 1) / 2  # but for a constant
    density = np.exp(log_density - log_density.max())
    normal = NormalDist()
    found = np.array([normal.cdf(shift - critical * one) + normal.cdf(-shift - critical * one) for one in z])
    return float((found * density).sum() / density.sum())


def seeds_needed(effect: float, parts: Parts, episodes: int, wanted: float = 0.8, most: int = 1000) -> Optional[int]:
    """The fewest training seeds with this power; None where even `most` are too few, since the states alone leave too much."""
    def enough(seeds: int) -> bool:
        return parts.power(effect, seeds, episodes) >= wanted

    if not enough(most):
        return None
    low, high = 1, 2
    while not enough(high):
        low, high = high, min(2 * high, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def table(effect: float, parts: Parts, seeds: Sequence[int] = SEEDS, episodes: Sequence[int] = EPISODES) -> List[List[float]]:
    """Power by seeds (rows) and episodes (columns)."""
    return [[parts.power(effect, s, e) for e in episodes] for s in seeds]
