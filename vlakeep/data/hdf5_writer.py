"""Write demonstrations as LIBERO's HDF5: what its create_dataset.py and OpenVLA's regenerate_libero_dataset.py write, read by hdf5.py.

    <folder>/<task name>_demo.hdf5, data/demo_<n>:
        actions [T, 7], states [T, S], robot_states [T, 9] (fingers, hand position, quaternion), rewards and dones uint8 [T]
        obs/<camera>_rgb uint8 [T, H, W, 3], as the simulator gives them: on their heads
        obs/ee_states [T, 6], ee_pos, ee_ori (rotation vector), gripper_states [T, 2], joint_states [T, 7]

Of LIBERO's attributes model_file is missing, the XML of the scene with the paths of one machine. Pictures are not compressed, as
LIBERO's are not. Needs h5py (extra `hdf5`).
"""

import json
from pathlib import Path
from typing import Dict, NamedTuple

import numpy as np

from vlakeep.data.index import optional


class Demonstration(NamedTuple):
    """T steps in LIBERO's units."""

    actions: np.ndarray  # [T, 7]: gripper -1 open, +1 closed
    states: np.ndarray  # [T, S]: the simulator's, before each action
    pictures: Dict[str, np.ndarray]  # key below obs -> uint8 [T, H, W, 3], on their heads
    hand: np.ndarray  # [T, 6]: position and rotation vector
    quaternion: np.ndarray  # [T, 4]: of the hand, x y z w
    fingers: np.ndarray  # [T, 2]
    joints: np.ndarray  # [T, 7]
    extra: Dict[str, np.ndarray]  # further arrays [T, ...] beside the actions


def need_h5py(what: str):
    """h5py, or ModuleNotFoundError with the pip command."""
    return optional("h5py", "hdf5", what)


def append_demo(folder: Path, task: str, about: dict, demo: Demonstration) -> None:
    """Append to the file of the task, which is made with the attributes `about` (texts, numbers, or what becomes JSON).

    A reader would take a file for complete that later demonstrations still go into: give a folder that nobody reads before the
    last one, such as storage.atomic_dir's.
    """
    steps = len(demo.actions)
    at_end = (np.arange(steps) == steps - 1).astype(np.uint8)
    arrays = {"actions": demo.actions, "states": demo.states, "rewards": at_end, "dones": at_end,
              "robot_states": np.concatenate([demo.fingers, demo.hand[:, :3], demo.quaternion], axis=1),
              "obs/ee_states": demo.hand, "obs/ee_pos": demo.hand[:, :3], "obs/ee_ori": demo.hand[:, 3:],
              "obs/gripper_states": demo.fingers, "obs/joint_states": demo.joints,
              **{f"obs/{key}": frames for key, frames in demo.pictures.items()}, **demo.extra}
    wrong = {key: list(array.shape) for key, array in arrays.items() if len(array) != steps}
    if wrong or not steps:
        raise ValueError(f"a demonstration of {task} with {steps} actions cannot be written; of other lengths are {wrong}")
    with need_h5py("writing LIBERO's HDF5").File(Path(folder) / f"{task}_demo.hdf5", "a") as file:
        data = file.require_group("data")
        if not len(data):
            data.attrs.update({"macros_image_convention": "opengl", "tag": "libero-v1", "num_demos": 0, "total": 0})
            data.attrs.update({key: json.dumps(value) if isinstance(value, dict) else value for key, value in about.items()})
        group = data.create_group(f"demo_{data.attrs['num_demos']}")
        for key, array in arrays.items():  # LIBERO's numbers are float64
            group[key] = array if array.dtype == np.uint8 else array.astype(np.float64)
        group.attrs.update({"num_samples": steps, "init_state": demo.states[0]})
        data.attrs["num_demos"] += 1
        data.attrs["total"] += steps
