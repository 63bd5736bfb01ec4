"""Thermostat: the control law from drift d to the gains (beta, gamma). Plain Python, no torch.

Calibration: the first n measurements, taken before training while student and teacher are the same, show nothing but sampling noise.
Their mean and standard deviation give the noise level of the moving average m and the threshold,
    noise = std * sqrt(ema / (2 - ema))         threshold = mean + sigmas * noise
Afterwards, in units of the noise,
    excess = max(0, (m - threshold) / noise)    s = excess / (excess + half_excess)      in [0, 1), monotone in d
    gamma  = gamma_max - (gamma_max - gamma_min) s      beta = beta_max - (beta_max - beta_min) s
within a dead band (hold) and a rate limit per measurement. The trajectory is a function of the measured d alone, so it can be
replayed from the log: `replay`.
"""

import math
from dataclasses import dataclass, field
from typing import Dict, Iterable, List, Optional, Tuple

from vlakeep.thermostat.law_state import LawState


@dataclass(frozen=True)
class Law:
    """Parameters of the control law; ranges are checked on construction (ValueError)."""

    gamma_min: float
    gamma_max: float
    beta_min: float
    beta_max: float
    calibration: int
    threshold_sigmas: float
    half_excess: float
    ema: float
    dead_band: float
    rate_limit: float
    # Least noise level: an estimator that is exact at zero drift has none of its own.
    noise_floor: float = 0.0

    def __post_init__(self):
        if not 0 <= self.gamma_min <= self.gamma_max <= 1:
            raise ValueError(f"need 0 <= gamma_min <= gamma_max <= 1, got {self.gamma_min} and {self.gamma_max}")
        if not 0 < self.beta_min <= self.beta_max <= 1:
            raise ValueError(f"need 0 < beta_min <= beta_max <= 1, got {self.beta_min} and {self.beta_max}: beta never reaches 0")
        if self.calibration < 2:
            raise ValueError(f"calibration needs at least 2 measurements, got {self.calibration}")
        if not (self.half_excess > 0 and 0 < self.ema <= 1 and self.rate_limit > 0 and self.dead_band >= 0):
            raise ValueError("need half_excess > 0, 0 < ema <= 1, rate_limit > 0, dead_band >= 0")

    def noise(self, calibration: List[float]) -> float:
        """Noise level of the moving average, from the calibration measurements."""
        mean = sum(calibration) / len(calibration)
        variance = sum((d - mean) ** 2 for d in calibration) / (len(calibration) - 1)
        # A thousandth of the mean keeps a lucky calibration of nearly equal values from making the loop infinitely sharp.
        return max(math.sqrt(variance * self.ema / (2 - self.ema)), 1e-3 * mean, self.noise_floor, 1e-12)

    def target(self, drift: float, threshold: float, noise: float) -> Tuple[float, float]:
        """(beta, gamma) that the law asks for at this averaged drift."""
        excess = max(0.0, (drift - threshold) / noise)
        s = excess / (excess + self.half_excess)
        return self.beta_max - (self.beta_max - self.beta_min) * s, self.gamma_max - (self.gamma_max - self.gamma_min) * s


@dataclass
class Controller(LawState):
    """Closed loop state; `update(d)` after each measurement, `state_dict` for checkpoints."""

    law: Law
    beta: Optional[float] = None
    gamma: Optional[float] = None
    threshold: Optional[float] = None
    noise: Optional[float] = None
    average: Optional[float] = None
    # Average at which the gains were last set; the dead band is measured from here.
    anchor: Optional[float] = None
    calibration: List[float] = field(default_factory=list)
    measurements: int = 0
    # Measurements that were NaN or infinite: gains held, value ignored, counted.
    rejected: int = 0

    def update(self, drift: float) -> Dict[str, float]:
        """Take one measurement and return the log fields d, d_ema, threshold, calibrating, beta, gamma."""
        self.measurements += 1
        if not math.isfinite(drift) or drift < 0:
            # It neither moves the gains nor enters the average, from which it would never go again.
            self.rejected += 1
            return self._row(drift)
        law = self.law
        if self.threshold is None:
            self.calibration.append(drift)
            row = self._row(drift)
            if len(self.calibration) == law.calibration:
                self.average = sum(self.calibration) / law.calibration
                self.noise = law.noise(self.calibration)
                self.threshold = self.average + law.threshold_sigmas * self.noise
            return row
        self.average = law.ema * drift + (1 - law.ema) * self.average
        # Relative, because d has units: squared hidden units, or a ratio.
        if self.anchor is None or abs(self.average - self.anchor) > law.dead_band * self.anchor:
            beta, gamma = law.target(self.average, self.threshold, self.noise)
            moved = (self._limit(self.beta, beta), self._limit(self.gamma, gamma))
            # A rate-limited step has not arrived yet: without an anchor the next measurement goes on.
            self.anchor = self.average if moved == (beta, gamma) else None
            self.beta, self.gamma = moved
        return self._row(drift)

    def __post_init__(self):
        self.beta = self.law.beta_max if self.beta is None else self.beta
        self.gamma = self.law.gamma_max if self.gamma is None else self.gamma

    @property
    def calibrated(self) -> bool:
        return self.threshold is not None

    def _limit(self, now: float, wanted: float) -> float:
        step = wanted - now
        return wanted if abs(step) <= self.law.rate_limit else now + math.copysign(self.law.rate_limit, step)

    def _row(self, drift: float) -> Dict[str, float]:
        return {"d": drift, "d_ema": self.average, "threshold": self.threshold, "calibrating": float(self.threshold is None),
                "beta": self.beta, "gamma": self.gamma}


def replay(law: Law, drifts: Iterable[float]) -> List[Dict[str, float]]:
    """The rows that a run with this law logs for these measurements."""
    controller = Controller(law)
    return [controller.update(d) for d in drifts]


if __name__ == "__main__":  # sanity check: python -m vlakeep.thermostat.controller
    law = Law(gamma_min=0.0, gamma_max=1.0, beta_min=0.5, beta_max=1.0, calibration=3, threshold_sigmas=2.0, half_excess=0.5,
              ema=0.5, dead_band=0.02, rate_limit=0.25)
    rows = replay(law, [1.0, 1.1, 0.9, 1.0, 1.5, 2.5, 4.0, 4.0, 4.0, 1.0, 1.0, 1.0, 1.0])
    for row in rows:
        print("  ".join(f"{key} {value:.3f}" for key, value in row.items() if value is not None))
    gammas, falling, rising = [row["gamma"] for row in rows], range(3, 8), range(8, 12)
    assert gammas[:4] == [1.0] * 4 and all(row["beta"] >= law.beta_min for row in rows)
    assert all(0 < gammas[k] - gammas[k + 1] <= law.rate_limit for k in falling) and all(gammas[k] < gammas[k + 1] for k in rising)
