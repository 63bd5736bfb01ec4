"""Action statistics, normalisation and the per-data-set standardisation of the official RLDS pipeline.

Sources: openvla prismatic/vla/datasets/rlds/utils/data_utils.py:61-101 (BOUNDS_Q99), 185-293 (statistics and
their file), rlds/oxe/transforms.py:827 (LIBERO), modeling_prismatic.py:506-536 (un-normalisation).
Axes: N frames of a data set, A action dimensions (the last is the gripper).
"""

import json
from typing import Any, Callable, Dict, Optional, Sequence, Tuple

import numpy as np

from vlakeep.core.storage import atomic_write
from vlakeep.data.conventions import choices, gripper_problem, to_open, usual_gripper

LEAST_SPAN = 1e-6  # between the quantiles of a number of the state: below, it does not move


def libero_transform(actions_NA: np.ndarray) -> np.ndarray:
    """LIBERO stores the gripper as -1 open .. +1 close; the model's convention is 1 = open, 0 = close."""
    gripper = 1.0 - np.clip(actions_NA[:, -1:], 0.0, 1.0)
    return np.concatenate([actions_NA[:, :-1], gripper], axis=1).astype(np.float32)


def identity_transform(actions_NA: np.ndarray) -> np.ndarray:
    return np.asarray(actions_NA, dtype=np.float32)


# Prefix of a data set's name -> what makes its actions standard.
TRANSFORMS = {"libero": libero_transform, "tabletop": identity_transform}
# What `data.gripper` may say instead of the name.
GRIPPERS = {"libero": libero_transform, "standard": identity_transform}


def transform_for(name: str) -> Callable[[np.ndarray], np.ndarray]:
    """The standardisation of the data set called `name`; ValueError for a name that nothing is known about."""
    for prefix, transform in TRANSFORMS.items():
        if name.startswith(prefix):
            return transform
    raise ValueError(f"no standardisation is known for data set {name!r}: what its gripper values mean must be said, not "
                     f"guessed. Known are names that start with {', '.join(sorted(TRANSFORMS))}; say it in a data card "
                     "(docs/bring-your-own-data.md), or with --data.gripper (libero: -1 open to +1 close; standard: 1 open, 0 close; "
                     "or OPEN/CLOSED such as 100/0)")


def standardise(actions_NA: np.ndarray, name: str, gripper: Optional[str] = None) -> np.ndarray:
    """float32 [N, A] with the gripper at 1 = open, 0 = close. gripper: what the values mean; None follows the name.

    LIBERO data that someone has converted may have a standard gripper already (converters to LeRobot differ in that); a second
    conversion would turn every grasp into a release, so values that contradict the convention are a ValueError.
    """
    values_N, width = actions_NA[:, -1], actions_NA.shape[1]
    if gripper is None:
        try:
            transform = transform_for(name)
        except ValueError as error:
            raise ValueError(f"{error}. Its values lie in [{values_N.min():g}, {values_N.max():g}]: {choices(values_N)}") from error
        if transform is libero_transform and values_N.min() > -0.5:  # also 0 and 1 with rounding noise
            raise ValueError(f"data set {name!r}: the gripper values lie in [{values_N.min():g}, {values_N.max():g}], while LIBERO's go "
                             f"from -1 (open) to +1 (close); say what they mean: {choices(values_N)}")
        one = usual_gripper("libero" if transform is libero_transform else "standard", width)
        problem = gripper_problem(values_N, one)
        if problem:
            raise ValueError(f"data set {name!r}: of the gripper {problem} (by the set's name); say what they mean: {choices(values_N)}")
        return transform(actions_NA)
    one = usual_gripper(gripper, width)
    problem = gripper_problem(values_N, one)
    if problem:
        raise ValueError(f"data set {name!r}: of the gripper {problem} (--data.gripper {gripper}); say what they mean: {choices(values_N)}")
    if gripper in GRIPPERS:
        return GRIPPERS[gripper](actions_NA)
    opened_N1 = to_open(values_N, one, np.array([0, len(values_N)]))[:, None]
    return np.concatenate([actions_NA[:, :-1], opened_N1], axis=1).astype(np.float32)


def action_statistics(actions_NA: np.ndarray, num_trajectories: int, grippers: Optional[Sequence[int]] = None) -> Dict:
    """The entry that dataset_statistics.json holds for one data set, from its standardised float32 actions.

    grippers: the dimensions that are not scaled; None is the last one.
    """
    if not len(actions_NA):
        raise ValueError("statistics of a data set without frames")
    width = actions_NA.shape[1]
    zeros = [0.0] * width  # the LIBERO configuration reads no proprioception; the official code then writes zeros of action width
    quantile = np.array([0.01, 0.99])  # an array, so that NumPy 2 keeps the interpolation in float64 as NumPy 1 did
    q01, q99 = np.quantile(actions_NA, quantile, axis=0)
    found: Dict[str, Any] = {
        "action": {
            "mean": actions_NA.mean(0).tolist(), "std": actions_NA.std(0).tolist(),
            "max": actions_NA.max(0).tolist(), "min": actions_NA.min(0).tolist(),
            "q01": q01.tolist(), "q99": q99.tolist(), "mask": [True] * (width - 1) + [False],
        },
        "proprio": {key: list(zeros) for key in ("mean", "std", "max", "min", "q01", "q99")},
        "num_transitions": int(len(actions_NA)),
        "num_trajectories": int(num_trajectories),
    }
    if grippers is not None:
        found["action"]["mask"] = [dimension not in grippers for dimension in range(width)]
    return found


def state_statistics(state_NQ: np.ndarray) -> Dict:
    """The `proprio` of an entry of dataset_statistics.json, from the float32 states of all frames."""
    q01, q99 = np.quantile(state_NQ, np.array([0.01, 0.99]), axis=0)
    return {"mean": state_NQ.mean(0).tolist(), "std": state_NQ.std(0).tolist(), "max": state_NQ.max(0).tolist(),
            "min": state_NQ.min(0).tolist(), "q01": q01.tolist(), "q99": q99.tolist()}


def normalise_state(state: np.ndarray, statistics: Dict) -> np.ndarray:
    """float32 [..., Q]: q01 to q99 of `proprio` become -1 to 1, what does not move becomes 0. Not clipped: a model may tell by it that a
    robot stands where no demonstration did. ValueError when the statistics are of no such state."""
    proprio = statistics["proprio"]
    low, high = np.array(proprio["q01"], dtype=np.float64), np.array(proprio["q99"], dtype=np.float64)
    moving = high - low > LEAST_SPAN
    if low.shape != np.shape(state)[-1:] or not moving.any():
        still = "" if moving.any() else ", none of which moves"
        raise ValueError(f"a state of {np.shape(state)[-1]} numbers, and the statistics are of {len(low)}{still}: take those of data that "
                         "were read with this state (--backbone.unnorm_key, --data.statistics)")
    scaled = 2 * (np.asarray(state, dtype=np.float64) - low) / np.where(moving, high - low, 1) - 1
    return np.where(moving, scaled, 0).astype(np.float32)


def normalise(actions_NA: np.ndarray, statistics: Dict, official: bool = False) -> Tuple[np.ndarray, int]:
    """(float32 [N, A], number of values clipped): masked dimensions map [q01, q99] to [-1, 1], constant ones become 0.

    official: an unmasked one that is constant becomes 0 too, which un-normalises to 0: a gripper that is open all the time is closed.
    """
    stats = statistics["action"]
    low, high = np.array(stats["q01"]), np.array(stats["q99"])
    mask = np.array(stats.get("mask", [True] * len(low)), dtype=bool)
    scaled = np.float32(2) * (actions_NA - low.astype(np.float32)) / (high - low + 1e-8).astype(np.float32) - np.float32(1)
    constant = np.array(stats["min"]) == np.array(stats["max"])
    clipped = int((np.abs(scaled)[..., mask & ~constant] > 1).sum())
    result = np.where(mask, np.clip(scaled, -1, 1), actions_NA)
    return np.where(constant & (mask | official), np.float32(0), result).astype(np.float32), clipped


def unnormalise(actions: np.ndarray, statistics: Dict) -> np.ndarray:
    """float64 [..., A]: what predict_action does with decoded actions."""
    stats = statistics["action"]
    low, high = np.array(stats["q01"]), np.array(stats["q99"])
    mask = np.array(stats.get("mask", [True] * len(low)), dtype=bool)
    return np.where(mask, 0.5 * (np.asarray(actions, dtype=np.float64) + 1) * (high - low) + low, actions)


def save_statistics(path, statistics: Dict[str, Dict]) -> None:
    """Write dataset_statistics.json, keyed by data set name, byte for byte as the official save_dataset_statistics."""
    with atomic_write(path, "w") as file:
        file.write(json.dumps(statistics, indent=2))
