"""What a benchmark takes, shows and asks. Its actions are compared with a model's action statistics before the first episode.

An action that is wrong in kind (another width, a gripper that means something else) runs without an error and fails every episode; so
it is refused. What is only suspicious (crops, the renderer, the way that pictures hang) is an alarm of the benchmark.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Callable, List, NamedTuple, Optional, Sequence, Tuple

if TYPE_CHECKING:
    from vlakeep.data.sample import Sample, SampleSpec

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
    by_order: bool = False  # whether the model's first camera is the first of these, and so on, whatever it calls them


class Questions(NamedTuple):
    """The questions of one kind; trial i is row i. `samples(trials)` makes those of the given trials."""

    kind: str
    samples: "Callable[[Sequence[int]], List[Sample]]"
    seeds: List[int]
    answers: List[str]  # lower case


class Retention(NamedTuple):
    """Frames of what the base can do, on which it is compared with the run; trial i is row i."""

    samples: "Callable[[Sequence[int]], List[Sample]]"
    seeds: List[int]


def from_list(made: "Sequence[Sample]") -> "Callable[[Sequence[int]], List[Sample]]":
    """`samples` of Questions and Retention whose samples are all made already."""
    return lambda trials: [made[trial] for trial in trials]


def action_problems(benchmark: str, spec: ActionSpec, key: str, statistics: dict) -> List[str]:
    """Why actions that are un-normalised by the `statistics` (q01, q99, ...) of `key` are none of this benchmark's: both sides, and
    the remedy. Empty when they fit."""
    low, high = statistics["q01"], statistics["q99"]
    which = f" ({spec.statistics})" if spec.statistics else ""
    remedy = f"choose others with --backbone.unnorm_key{which}, or evaluate a model that was trained on such actions"
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


def observation_problems(benchmark: str, spec: ObservationSpec, taken: "Optional[SampleSpec]" = None) -> List[str]:
    """Why a model that takes `taken` (None: that is not known yet) cannot look at what is shown; what it does not take is no problem. One
    camera on either side is the other's, whatever it is called."""
    if taken is None:
        return []
    cameras, state = taken.cameras, taken.state
    if spec.by_order:
        lacking = list(cameras[len(spec.cameras):])
    else:
        lacking = [] if len(cameras) <= 1 and len(spec.cameras) == 1 else [name for name in cameras if name not in spec.cameras]
    if not cameras and len(spec.cameras) != 1 and not spec.by_order:
        lacking = ["one picture alone"]
    lacking += ["the robot's state"] if state and not spec.state else []
    shown = ", ".join([*spec.cameras, *(["the robot's state"] if spec.state else [])])
    return [f"{benchmark} shows {shown}; the model looks at {', '.join(lacking)}: add it to `observations` and to what is handed to the "
            "policy, or evaluate another model"] if lacking else []


def observation_alarms(benchmark: str, spec: ObservationSpec, input_size: Tuple[int, int]) -> List[str]:
    """One line when pictures are squeezed on their way into the model, whose input is input_size (H, W)."""
    if spec.size is None or spec.size[0] * input_size[1] == spec.size[1] * input_size[0]:
        return []
    sizes = " and ".join(f"{height} x {width}" for height, width in (spec.size, input_size))
    return [f"pictures of {benchmark} and the model's input are of different shapes ({sizes}): they are squeezed, as those of the "
            "training must have been"]


def compare(benchmark: str, actions: ActionSpec, observations: ObservationSpec, known: dict, keys: Sequence[str],
            taken: "Optional[SampleSpec]" = None) -> None:
    """ValueError for the first thing that does not fit. known: key -> {"action": statistics}; keys: those that are used; taken: what the
    model takes of an observation."""
    found = observation_problems(benchmark, observations, taken)
    for key in dict.fromkeys(keys):
        found += action_problems(benchmark, actions, key, known[key]["action"])
    if found:
        raise ValueError(found[0])
