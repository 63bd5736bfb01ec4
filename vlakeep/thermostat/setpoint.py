"""Thermostat with a set-point: how far the LoRA inputs are opened, so that the measured divergence meets what the user allows.

The divergence d is measured in nats on held-out probe items (thermostat/kl_sensor.py). The actuator is the opening r (hsw/graded.py).
Along the directions of old inputs the update is proportional to r^p, and the divergence of a single linear, quadratic in the update, to
r^(2 p); of a whole network it was measured to rise with r^(2 p) to r^(7 p). So the law begins by reckoning with a response e = 4 and
learns a steeper one from what earlier moves of r did; reckoning with too flat a one makes a loop swing (docs/log.md).

    r <- r * clip((target / d')^(1 / (e p)), 1 / close, open)        within [r_min, r_max]
    d' = d * clip(growth, 1, limit)      growth = (d / d_before) / (r / r_before)^(e p), with 2 for e until the target is first neared

d' is the divergence to be expected at the next measurement: what training adds in an interval beyond the change of the gains, taken from
the last interval; on the first approach with the flattest response, so that the loop rather arrives from below. Larger d gives a smaller
r at every moment. The opening is clipped and nothing else accumulates, so nothing winds up. Opening is limited to a factor per
measurement, closing to a larger one. The trajectory is a function of the measured values alone: `replay`. Plain Python, no torch.

After the last step `settle` measures a few times more, with the weights as they are, until the divergence lies just below the target:
where one probe item is about to flip, a few per cent of r decide, and the loop swings around that point (docs/log.md).
"""

import math
from dataclasses import dataclass
from typing import Callable, Dict, Iterable, List, Optional, Tuple

from vlakeep.thermostat.law_state import LawState

# Exponents of the divergence over the size of the update: of one linear layer, what the law begins with, and the steepest that it learns.
LINEAR_RESPONSE, RESPONSE, STEEPEST = 2.0, 4.0, 12.0
LEAST_MOVE = 0.05  # change of log r below which a measurement says nothing about the response
SMALL = 1e-3  # share of the target below which a divergence is rounding
FORGET = 0.97  # what is left of a learnt steepness after each further measurement
SETTLED = 0.9  # share of the target from which on a final divergence is left as it is
LAST_OPENING = 1.1  # factor by which r may still grow after the last step: nothing is learnt at it any more
LEAST_CHANGE = 1e-3  # of log r, below which another measurement would tell nothing
SETTLE_MOST = 8  # further measurements


@dataclass(frozen=True)
class SetPoint:
    """Parameters of the law; ranges are checked on construction (ValueError)."""

    target: float  # nats per answer token
    start: float  # opening at which training begins
    lowest: float
    highest: float
    steepness: float  # p of the gains
    open_factor: float  # largest factor by which r grows in one measurement
    close_factor: float  # largest factor by which it shrinks
    growth_limit: float = 4.0

    def __post_init__(self):
        if not self.target > 0:
            raise ValueError(f"the target must be above 0 nats, got {self.target}")
        if not 0 < self.lowest <= self.start <= self.highest:
            raise ValueError(f"need 0 < lowest <= start <= highest, got {self.lowest}, {self.start} and {self.highest}")
        if not (self.open_factor > 1 and self.close_factor > 1 and self.steepness > 0 and self.growth_limit >= 1):
            raise ValueError("need open_factor > 1, close_factor > 1, steepness > 0 and growth_limit >= 1")


@dataclass
class SetPointController(LawState):
    """Closed loop state; `update(d)` after each measurement, `state_dict` for checkpoints."""

    law: SetPoint
    opening: Optional[float] = None
    before: Optional[float] = None  # divergence of the last measurement
    moved: float = 1.0  # factor by which the opening changed after it
    response: float = RESPONSE  # e: the exponent that the law reckons with
    neared: bool = False  # whether the divergence has come near the target before
    measurements: int = 0
    rejected: int = 0  # measurements that were NaN, infinite or negative: the opening is held, the value ignored

    def __post_init__(self):
        self.opening = self.law.start if self.opening is None else self.opening

    def expected(self, divergence: float) -> float:
        """d': the divergence to be expected at the next measurement with the present opening."""
        if self.before is None or self.before <= 0:
            return divergence
        response = self.response if self.neared else LINEAR_RESPONSE
        growth = (divergence / self.before) / self.moved ** (response * self.law.steepness)
        return divergence * min(max(growth, 1.0), self.law.growth_limit)

    def _learn(self, divergence: float) -> None:
        """The response that this measurement shows, for the following ones: the law itself must not flatten as d grows."""
        move = math.log(self.moved) * self.law.steepness
        self.response = RESPONSE + FORGET * (self.response - RESPONSE)
        if abs(move) >= LEAST_MOVE and self.before and self.before > SMALL * self.law.target and divergence > 0:
            shown = math.log(divergence / self.before) / move
            # Steeper ones only: with too flat a response the loop swings, with too steep a one it is slow.
            self.response = max(self.response, min(shown, STEEPEST))
        self.neared = self.neared or divergence >= 0.8 * self.law.target

    def update(self, divergence: float) -> Dict[str, float]:
        """Take one measurement; returns the log fields kl, opening (that acted) and next_opening."""
        self.measurements += 1
        acted = self.opening
        if not math.isfinite(divergence) or divergence < 0:
            self.rejected += 1
            return {"kl": divergence, "opening": acted, "next_opening": acted}
        law = self.law
        expected = self.expected(divergence)
        factor = (law.target / expected) ** (1 / (self.response * law.steepness)) if expected > 0 else law.open_factor
        factor = min(max(factor, 1 / law.close_factor), law.open_factor)
        self.opening = min(max(acted * factor, law.lowest), law.highest)
        self._learn(divergence)
        self.before, self.moved = divergence, self.opening / acted
        return {"kl": divergence, "opening": acted, "next_opening": self.opening}


def settle(law: SetPoint, opening: float, divergence: float, measure: Callable[[float], float]) -> List[Tuple[float, float]]:
    """(opening, divergence) of the measurements with the final weights, the one that is kept at the end.

    opening, divergence: the first of them. measure: opening -> divergence of the weights as they are. Closing is reckoned with the
    flattest response, which closes too far rather than too little; then the interval between below and above is halved. Kept is the
    largest opening whose divergence is at most the target, or the smallest one tried where none is.
    """
    tried, aim = [(opening, divergence)], math.sqrt(SETTLED) * law.target
    widest = min(opening * LAST_OPENING, law.highest)
    for _ in range(SETTLE_MOST):
        r, d = tried[-1]
        if not math.isfinite(d) or SETTLED * law.target <= d <= law.target:
            break
        below = [one for one, value in tried if value <= law.target]
        above = [one for one, value in tried if not value <= law.target]
        if below and above:
            following = math.sqrt(max(below) * min(above))
        elif above:
            following = max(r * max((aim / d) ** (1 / (LINEAR_RESPONSE * law.steepness)), 1 / law.close_factor), law.lowest)
        else:
            following = min(r * (aim / d) ** (1 / (RESPONSE * law.steepness)), widest) if d > 0 else widest
        if abs(math.log(following / r)) < LEAST_CHANGE:
            break
        tried.append((following, measure(following)))
    kept = max((one for one in tried if one[1] <= law.target), default=min(tried))
    return [*(one for one in tried if one != kept), kept]


def replay(law: SetPoint, divergences: Iterable[float]) -> List[Dict[str, float]]:
    """The rows that a run with this law logs for these measurements."""
    controller = SetPointController(law)
    return [controller.update(d) for d in divergences]


if __name__ == "__main__":  # sanity check: python -m vlakeep.thermostat.setpoint
    law = SetPoint(target=0.005, start=1e-5, lowest=1e-9, highest=1.0, steepness=1.0, open_factor=2.0, close_factor=4.0)
    controller, length, worst = SetPointController(law), 0.0, 0.0
    for _ in range(60):  # a plant: the update grows with training, the divergence is its square times r^2
        length += 1.0
        d = (200.0 * length * controller.opening) ** 2
        controller.update(d)
        worst = max(worst, d / law.target)
    print(f"divergence {d:.5f} for a target of {law.target}; largest overshoot {worst:.2f} times the target")
    assert abs(d / law.target - 1) < 0.1 and worst < 1.5
