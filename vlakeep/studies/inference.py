"""Estimates, intervals and tests of a study: paired over start states, clustered by training seed.

**Bootstrap.** Seeds and start states are crossed: every training is evaluated at the same states. A draw takes training seeds with
replacement and, apart from them, the states of each block (the pigeonhole bootstrap, Owen 2007, which is never too narrow in the mean). The
same draw serves all settings, so that joint statements are of one draw. The standard error is that of the draws times
sqrt(S / (S - 1)), and intervals and tests are Student's t with S - 1 degrees of freedom, S the number of seeds: percentiles of five
clusters are too narrow (Cameron, Gelbach and Miller 2008).

**Where all trials of each block agree** no bootstrap has a spread. The standard error is then that of a difference in one more pair of N
than was seen (the rule of succession).

**Tests.** Non-inferiority: one-sided, of a loss of at least the margin. Superiority: two-sided, and none on the wrong side. A claim that
needs both has the larger p (intersection-union, Berger 1982), and over the rivals p is adjusted by Holm (1979).
"""

import math
from typing import Dict, List, NamedTuple, Optional, Sequence

import numpy as np

from vlakeep.core.study import BASE
from vlakeep.reporting.intervals import t_quantile, t_within
from vlakeep.studies.data import Blocks, Data, Setting, block_mean, weights

LEVEL = 0.95


class Estimate(NamedTuple):
    """A mean or a difference; low, high and se are None with fewer than two seeds."""

    mean: float
    low: Optional[float]
    high: Optional[float]
    se: Optional[float]
    seeds: int
    tasks: int
    trials: int

    def superior(self, higher: bool = True) -> Optional[float]:
        """Two-sided p of no difference; 1 where the difference is on the wrong side."""
        if self.se is None:
            return None
        return two_sided(self.mean / self.se, self.seeds - 1) if (self.mean > 0) == higher and self.mean else 1.0

    def not_inferior(self, margin: float) -> Optional[float]:
        """One-sided p of a loss of at least `margin`."""
        return None if self.se is None else above((self.mean + margin) / self.se, self.seeds - 1)


def two_sided(t: float, freedom: int) -> float:
    return min(1.0, max(0.0, 1 - t_within(abs(t), freedom)))


def above(t: float, freedom: int) -> float:
    """P(T >= t)."""
    half = two_sided(t, freedom) / 2
    return half if t >= 0 else 1 - half


def sample(blocks: Blocks, draws: int) -> np.ndarray:
    """[draws]: means of bootstrap samples of seeds and states, blocks weighing alike. All blocks have the same seeds."""
    seeds_RS = weights("seeds", next(iter(blocks.values())).shape[0], draws)
    total = np.zeros(draws)
    for name, block_SI in blocks.items():
        known_SI = ~np.isnan(block_SI)
        states_RI = weights(name, block_SI.shape[1], draws)
        summed = ((seeds_RS @ np.where(known_SI, block_SI, 0.0)) * states_RI).sum(1)
        # Whole numbers, so that both ways have the same bits.
        counted = seeds_RS.sum(1) * states_RI.sum(1) if known_SI.all() else ((seeds_RS @ known_SI) * states_RI).sum(1)
        total += np.where(counted > 0, summed / np.maximum(counted, 1), np.nanmean(block_SI))
    return total / len(blocks)


def estimate(blocks: Blocks, draws: int, tasks: int, binary: bool = True) -> Optional[Estimate]:
    """The mean over blocks with its interval; None where one has no trial. binary: outcomes or their differences, which have a floor."""
    mean = block_mean(blocks)
    if mean is None:
        return None
    seeds = next(iter(blocks.values())).shape[0]
    trials = sum(int((~np.isnan(block)).sum()) for block in blocks.values())
    if seeds < 2:
        return Estimate(mean, None, None, None, seeds, tasks, trials)
    se = float(np.std(sample(blocks, draws), ddof=1)) * math.sqrt(seeds / (seeds - 1))
    if binary:
        moved = sum(float(np.nansum(np.abs(block - np.nanmedian(block)))) for block in blocks.values())
        share = (moved + 1) / (trials + 2)
        se = max(se, math.sqrt(share * (1 - share) / trials)) if moved < 1 else se
    half = t_quantile(seeds - 1, LEVEL) * se
    return Estimate(mean, mean - half, mean + half, se, seeds, tasks, trials)


def value(data: Data, setting: Setting, measure: str, seeds: Sequence[int], draws: int) -> Optional[Estimate]:
    """A setting's mean over these seeds, as far as they are there."""
    tasks, own = data.complete(setting, seeds)
    own = own[:1] if setting.arm == BASE else own
    if not tasks or not own:
        return None
    return estimate(data.blocks(setting, measure, tasks, own), draws, len(tasks), measure != "action_kl")


def difference(data: Data, one: Setting, two: Setting, measure: str, seeds: Sequence[int], draws: int) -> Optional[Estimate]:
    """One minus two over the tasks and seeds that both have; None without any."""
    tasks, own = data.common([one, two], seeds)
    if not tasks or not own:
        return None
    return estimate(data.blocks(one, measure, tasks, own, minus=two), draws, len(tasks), measure != "action_kl")


def holm(values: Dict[str, Optional[float]]) -> Dict[str, Optional[float]]:
    """p values adjusted for their number (Holm 1979); what is None is not counted."""
    known = sorted((p, name) for name, p in values.items() if p is not None)
    found: Dict[str, Optional[float]] = {name: None for name in values}
    highest = 0.0
    for rank, (p, name) in enumerate(known):
        highest = max(highest, min(1.0, (len(known) - rank) * p))
        found[name] = highest
    return found


def both(*values: Optional[float]) -> Optional[float]:
    """p of a claim that needs all of these."""
    known: List[float] = [p for p in values if p is not None]
    return max(known) if len(known) == len(values) and known else None
