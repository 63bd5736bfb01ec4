"""What a benchmark takes and shows, declared, and compared with a model's action statistics before the first episode.

An action that is wrong in kind (another width, a gripper that means something else) runs without an error and fails every episode; so
it is refused. What is only suspicious (crops, the renderer, the way that pictures hang) is an alarm of the benchmark.
"""

from dataclasses import dataclass
from typing import List, Optional, Tuple

OPEN_CLOSE = (0.0, 1.0)  # this project's gripper: 0 = close, 1 = open
SLACK = 0.01  # of a quantile that lies a little outside


@dataclass(frozen=True)
class ActionSpec:
    """What one step takes, in the units of the action statistics."""

    dimensions: Optional[int] = 7  # None: those of the data sets, which are not open yet
    gripper: Optional[int] = -1  # which of them is the gripper; None where there is none
    gripper_range: Tuple[float, float] = OPEN_CLOSE  # closed and open
    units: str = "pose change per step, un-normalised"
    statistics: str = ""  # the key of the action statistics, in words


@dataclass(frozen=True)
class ObservationSpec:
    """What the policy sees at one step."""

    cameras: Tuple[str, ...] = ("image",)
    size: Optional[Tuple[int, int]] = None  # H, W of what is handed over; None: as the model's input
    cropped: bool = False  # whether the central 90 % are cut out, as for models trained with random crops
    turned: bool = False  # whether the camera's own picture is turned by 180 degrees, so that it stands upright
    state: bool = False  # whether the robot's state comes with it


def action_problems(benchmark: str, spec: ActionSpec, key: str, statistics: dict) -> List[str]:
    """Why actions that are un-normalised by `statistics` (q01, q99, ...; of the key `key`) are none of this benchmark's, with the remedy.

    Both sides are named. Empty when they fit.
    """
    low, high = statistics["q01"], statistics["q99"]
    remedy = f"choose others with --backbone.unnorm_key{f' ({spec.statistics})' if spec.statistics else ''}, or evaluate a model that was " \
             "trained on such actions"
    if spec.dimensions is not None and len(low) != spec.dimensions:
        return [f"{benchmark} takes actions of {spec.dimensions} values, the model's action statistics {key!r} are of {len(low)}: "
                f"{remedy}"]
    if spec.gripper is None:
        return []
    closed, opened = spec.gripper_range
    least, most = (statistics.get(name, usual)[spec.gripper] for name, usual in (("min", low), ("max", high)))
    if least < closed - SLACK or most > opened + SLACK:
        return [f"{benchmark} takes a gripper from {closed:g} (close) to {opened:g} (open), that of the model's action statistics {key!r} "
                f"goes from {least:g} to {most:g}: {remedy}; data with another gripper are read with --data.gripper"]
    return []


def compare(benchmark: str, spec: ActionSpec, known: dict, keys) -> None:
    """ValueError for the first of `keys` whose statistics in `known` (key -> {"action": ...}) do not fit the benchmark's actions."""
    for key in dict.fromkeys(keys):
        for problem in action_problems(benchmark, spec, key, known[key]["action"]):
            raise ValueError(problem)
