"""Intervals for paired comparisons: the same initial states under two arms. Closed forms only, so a report never varies.

Differences of success rates: Newcombe (1998), "Improved confidence intervals for the difference between binomial proportions
based on paired data", method 10 (square-and-add over Wilson limits, with the correlation of the pairs). Means over abilities: the
same square-and-add rule (MOVER; Zou and Donner 2008). Unlike a bootstrap, both keep an honest width when every trial agrees. Means over
training seeds: Student's t (Abramowitz and Stegun 26.7.3-4).
"""

import math
from typing import Callable, Iterable, List, Optional, Tuple

Interval = Tuple[float, float, float]  # mean, low, high


def newcombe(both: int, first: int, second: int, neither: int, wilson: Callable[[int, int], Interval]) -> Interval:
    """(difference first arm minus second arm, low, high) from the four counts of paired trials: who succeeded.

    `wilson(successes, n) -> (mean, low, high)` sets the confidence level. Raises ValueError without a single pair.
    """
    n = both + first + second + neither
    if n == 0:
        raise ValueError("a paired interval needs at least one pair of trials")
    p1, low1, high1 = wilson(both + first, n)
    p2, low2, high2 = wilson(both + second, n)
    margins = (both + first) * (second + neither) * (both + second) * (first + neither)
    phi = 0.0
    if margins:
        numerator: float = both * neither - first * second
        if numerator > 0:  # method 10's continuity correction, only against a positive correlation
            numerator = max(numerator - n / 2, 0.0)
        phi = numerator / math.sqrt(margins)
    down = (p1 - low1) ** 2 - 2 * phi * (p1 - low1) * (high2 - p2) + (high2 - p2) ** 2
    up = (high1 - p1) ** 2 - 2 * phi * (high1 - p1) * (p2 - low2) + (p2 - low2) ** 2
    diff = (first - second) / n
    return diff, diff - math.sqrt(max(down, 0.0)), diff + math.sqrt(max(up, 0.0))


def mean_of(parts: Iterable[Interval]) -> Optional[Interval]:
    """Mean of independent estimates with its interval (MOVER); None for no parts."""
    parts = list(parts)
    if not parts:
        return None
    count = len(parts)
    mean = sum(part[0] for part in parts) / count
    down = math.sqrt(sum((m - low) ** 2 for m, low, _ in parts)) / count
    up = math.sqrt(sum((high - m) ** 2 for m, _, high in parts)) / count
    return mean, mean - down, mean + up


def t_within(t: float, freedom: int) -> float:
    """P(|T| <= t) for `freedom` >= 1 degrees of freedom, from the finite series of the distribution."""
    angle = math.atan(t / math.sqrt(freedom))
    square, term, total = math.cos(angle) ** 2, 1.0, 0.0
    odd = freedom % 2
    for k in range(freedom // 2):
        total += term
        term *= square * ((2 * k + 2) / (2 * k + 3) if odd else (2 * k + 1) / (2 * k + 2))
    if not odd:
        return math.sin(angle) * total
    return 2 / math.pi * (angle + math.sin(angle) * math.cos(angle) * total)


def t_quantile(freedom: int, level: float = 0.95) -> float:
    """t with P(|T| <= t) = level for `freedom` >= 1 degrees of freedom."""
    if freedom < 1:
        raise ValueError("a t interval needs at least two values")
    low, high = 0.0, 2.0
    while t_within(high, freedom) < level:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_within(middle, freedom) < level else (low, middle)
    return high


def t_interval(values: List[float]) -> Interval:
    """(mean, low, high) of at least two values, one per training seed; 95 %."""
    n, mean = len(values), sum(values) / len(values)
    half = t_quantile(n - 1) * math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n)
    return mean, mean - half, mean + half


def paired_mean(differences: List[float], z: float = 1.959964) -> Interval:
    """(mean, low, high) of paired differences of a continuous measure, normal approximation.

    One difference alone has no spread, so its interval is unbounded. Raises ValueError for an empty list.
    """
    n = len(differences)
    if n == 0:
        raise ValueError("a paired interval needs at least one pair of trials")
    mean = sum(differences) / n
    if n == 1:
        return mean, -math.inf, math.inf
    half = z * math.sqrt(sum((d - mean) ** 2 for d in differences) / (n - 1) / n)
    return mean, mean - half, mean + half
