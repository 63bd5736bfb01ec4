"""Action dimensions whose quantiles say nothing, taught as they were demonstrated (data.degenerate demonstrated, the default).

    official                                                  demonstrated
    a gripper that never moves: label 0, which closes it      its own value
    q01 = q99, but some frames move: those become q01         a range around the value at rest, wide enough for the frames that move
    a range of numerical noise: labels over the whole range   the value at rest

What a policy says is un-normalised by the statistics alone, as officially, so that an exported model needs nothing more. Dimensions
that are none of these are left as they are, to the bit.
Axes: N frames, A action dimensions.
"""

from typing import Dict, Tuple

import numpy as np

STILL = 1e-6  # in any unit: 1 um or 6e-5 degrees a step, far below what a robot does and above what float32 makes of a constant
CONSTANT, NOISE, RARE, PLAIN = "constant", "noise", "rare", ""


def rest_range(values_N: np.ndarray) -> float:
    """Below this range, values of this size are one value and the noise of its numbers."""
    return max(STILL, 16 * float(np.finfo(np.float32).eps) * float(np.abs(values_N).max()))


def kind_of(values_N: np.ndarray, q01: float, q99: float) -> str:
    """CONSTANT, NOISE, RARE or PLAIN, of the values of a scaled dimension."""
    span, least = float(values_N.max()) - float(values_N.min()), rest_range(values_N)
    if span == 0:
        return CONSTANT
    return NOISE if span <= least else RARE if q99 - q01 <= least else PLAIN


def kinds(actions_NA: np.ndarray, statistics: Dict) -> Dict[int, str]:
    """Dimension -> CONSTANT, NOISE or RARE; plain ones and grippers that move are left out."""
    one, found = statistics["action"], {}
    for dimension, masked in enumerate(one["mask"]):
        values_N = actions_NA[:, dimension]
        kind = kind_of(values_N, one["q01"][dimension], one["q99"][dimension])
        if kind == CONSTANT or (masked and kind):
            found[dimension] = kind
    return found


def demonstrated(actions_NA: np.ndarray, statistics: Dict) -> Tuple[np.ndarray, Dict, Dict[int, str]]:
    """(actions, statistics, kinds): noise set to rest, and the range of rare motions around it; untouched objects where nothing is."""
    found = kinds(actions_NA, statistics)
    if not {NOISE, RARE} & set(found.values()):
        return actions_NA, statistics, found
    actions_NA, one = actions_NA.copy(), {key: list(value) for key, value in statistics["action"].items()}
    for dimension, kind in found.items():
        values_N = actions_NA[:, dimension].astype(np.float64)
        rest = float(np.float32(np.median(values_N)))
        if kind == NOISE:
            actions_NA[:, dimension] = rest
            for key in ("mean", "max", "min", "q01", "q99"):
                one[key][dimension] = rest
            one["std"][dimension] = 0.0
        elif kind == RARE:
            away_N = np.abs(values_N - rest)
            # Symmetric: rest is then the centre of a token's bin, so that standing still is standing still exactly.
            reach = float(np.quantile(away_N[away_N > rest_range(values_N)], 0.99))
            one["q01"][dimension], one["q99"][dimension] = rest - reach, rest + reach
    return actions_NA, {**statistics, "action": one}, found
