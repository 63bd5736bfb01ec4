"""The loop of graded gains: a measurement, the law, what it moves, and the end; for methods/graded.py and protection/handle.py.

    start     where a small share of plain LoRA's probe energy passes (hsw/graded.py:opening_for)
    every K   r <- law(r, measured divergence)          thermostat/setpoint.py
    end       r where the divergence of the final weights lies just below the target
"""

from typing import Callable, Dict, Optional

from vlakeep.hsw.graded import GradedSite
from vlakeep.thermostat.setpoint import SetPoint, SetPointController, settle

LOWEST, HIGHEST = 1e-9, 1e3  # of the opening: below, nothing passes that a run would notice; above, nothing is closed


def starting_opening(site: GradedSite, energy: float) -> float:
    """The opening at which this share of plain LoRA's probe energy passes. Before anything is measured only the spectrum is known."""
    return min(max(site.opening_for(energy), LOWEST), HIGHEST)


def set_point(target: float, start: float, steepness: float, open_factor: float, close_factor: float) -> SetPoint:
    """The law of an opening. ValueError for a parameter out of its range."""
    return SetPoint(target=target, start=start, lowest=LOWEST, highest=HIGHEST, steepness=steepness, open_factor=open_factor,
                    close_factor=close_factor)


class Loop:
    """Closes the loop on `act`, which is given the opening of the moment; without a law it measures and moves nothing."""

    def __init__(self, measure: Callable[[], float], law: Optional[SetPoint], act: Callable[[float], None]):
        """measure: () -> divergence in nats, the same in all processes."""
        self.measure, self._act = measure, act
        self.controller = SetPointController(law) if law else None

    def move(self, divergence: float) -> Dict[str, float]:
        """Take a measurement; the fields of SetPointController.update, {} without a law."""
        if not self.controller:
            return {}
        row = self.controller.update(divergence)
        self._act(self.controller.opening)
        return row

    def settle(self, measured: Dict[str, float]) -> Dict[str, float]:
        """Leave the opening where the final weights keep to the target. The controller stays as it is, so that a run that is made
        longer goes on as if it had not ended here. measured: what `move` gave for these weights, or nothing."""
        def at(opening: float) -> float:
            self._act(opening)
            return self.measure()

        first = measured["opening"] if "kl" in measured else self.controller.opening
        trail = settle(self.controller.law, first, measured["kl"] if "kl" in measured else at(first), at)
        self._act(trail[-1][0])
        tried = {f"settle/{i}/{name}": value for i, pair in enumerate(trail[:-1]) for name, value in zip(("opening", "kl"), pair)}
        return {**tried, "settled_opening": trail[-1][0], "settled_kl": trail[-1][1]}

    def state_dict(self) -> dict:
        return {"controller": self.controller.state_dict()} if self.controller else {}

    def load_state_dict(self, state: dict) -> None:
        if self.controller:
            self.controller.load_state_dict(state["controller"])
            self._act(self.controller.opening)
