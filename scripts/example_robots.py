"""Write three small data sets in the formats in which robots' data come, as docs/bring-your-own-data.md works them through.

    python scripts/example_robots.py FOLDER      (FOLDER is data_root_dir, such as $VLAKEEP_ROOT/datasets)

    kitchen_rt1     RLDS with the keys of RT-1: the action in three features, gripper commands (-1 open, 1 close, 0 stay), the text below
                    observation under another name
    towel_two_arms  LeRobot v3.0 with two arms: 14 joint values in degrees, both grippers in percent, one video
    can_robomimic   robomimic's HDF5: pictures upright, no instruction anywhere

The pictures are of a coloured square that goes where the hand goes. Needs the extras hdf5 and lerobot.
"""

import json
import sys
from pathlib import Path

import numpy as np

from vlakeep.data.images import encode_jpeg
from vlakeep.data.tfrecord import RecordWriter, write_example

EPISODES, STEPS, SIZE, RATE = 4, 12, 64, 10


def motion(seed: int, width: int, scale: float = 0.05) -> np.ndarray:
    """float32 [T, width]: smooth random steps."""
    return np.cumsum(np.random.default_rng(seed).normal(0, scale, (STEPS, width)), axis=0).astype(np.float32)


def pictures(path_T2: np.ndarray, colour=(220, 60, 40)) -> np.ndarray:
    """uint8 [T, H, W, 3]: a table with a square that follows the path."""
    y, x = np.mgrid[0:SIZE, 0:SIZE]
    frames = np.repeat(np.stack([x + 90, y + 80, 0 * x + 110], axis=-1)[None].astype(np.uint8), STEPS, axis=0)
    for frame, (a, b) in zip(frames, np.clip(28 + 60 * path_T2, 2, SIZE - 12).astype(int)):
        frame[a:a + 10, b:b + 10] = colour
    return frames


def closing(open_value: float, closed_value: float) -> np.ndarray:
    """float32 [T]: open, and closed from the middle on."""
    return np.where(np.arange(STEPS) < STEPS // 2, open_value, closed_value).astype(np.float32)


def write_kitchen(root: Path, name: str = "kitchen_rt1") -> None:
    folder = root / name / "0.1.0"
    folder.mkdir(parents=True)
    with RecordWriter(folder / f"{name}-train.tfrecord-00000-of-00001") as writer:
        for episode in range(EPISODES):
            poses = motion(episode, 6)
            command = np.zeros(STEPS, dtype=np.float32)
            command[STEPS // 2] = 1.0
            writer.write(write_example({
                "steps/action/world_vector": poses[:, :3].reshape(-1), "steps/action/rotation_delta": poses[:, 3:].reshape(-1),
                "steps/action/gripper_closedness_action": command, "steps/action/terminate_episode": np.tile([0, 1, 0], STEPS),
                "steps/observation/natural_language_instruction": [b"pick up the can"] * STEPS,
                "steps/observation/image": [encode_jpeg(picture) for picture in pictures(poses[:, :2])],
                "steps/is_first": np.arange(STEPS) == 0}))
        count = writer.payload_bytes
    split = {"name": "train", "shardLengths": [str(EPISODES)], "numBytes": str(count)}
    (folder / "dataset_info.json").write_text(json.dumps({"name": name, "version": "0.1.0", "fileFormat": "tfrecord", "splits": [split]}))
    (folder / "features.json").write_text("{}")


def write_towel(root: Path, name: str = "towel_two_arms") -> None:
    import av
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder, camera, task = root / name, "observation.images.front", "fold the towel"
    for part in ("meta/episodes/chunk-000", "data/chunk-000", f"videos/{camera}/chunk-000"):
        (folder / part).mkdir(parents=True)
    arms = [[40 * motion(2 * episode + side, 6) for side in (0, 1)] for episode in range(EPISODES)]
    grips = [closing(96, 3)[:, None], closing(4, 97)[:, None]]
    actions = np.concatenate([np.concatenate([left, grips[0], right, grips[1]], axis=1) for left, right in arms])
    rows, step_T = EPISODES * STEPS, np.arange(STEPS)
    pq.write_table(pa.table({
        "action": pa.array(actions.tolist(), pa.list_(pa.float32())), "index": np.arange(rows),
        "timestamp": np.tile((step_T / RATE).astype(np.float32), EPISODES), "frame_index": np.tile(step_T, EPISODES),
        "episode_index": np.repeat(np.arange(EPISODES), STEPS), "task_index": np.zeros(rows, dtype=np.int64)}),
        folder / "data/chunk-000/file-000.parquet")
    pq.write_table(pa.table({"task_index": [0], "task": [task]}), folder / "meta/tasks.parquet")
    pq.write_table(pa.Table.from_pylist([{
        "episode_index": episode, "length": STEPS, "tasks": [task], "data/chunk_index": 0, "data/file_index": 0,
        f"videos/{camera}/chunk_index": 0, f"videos/{camera}/file_index": 0, f"videos/{camera}/from_timestamp": episode * STEPS / RATE,
        f"videos/{camera}/to_timestamp": (episode + 1) * STEPS / RATE} for episode in range(EPISODES)]),
        folder / "meta/episodes/chunk-000/file-000.parquet")
    joints = ["pan", "lift", "elbow", "wrist_flex", "wrist_roll", "wrist_yaw", "gripper"]
    (folder / "meta/info.json").write_text(json.dumps({
        "codebase_version": "v3.0", "robot_type": "bi_so_arm", "fps": RATE, "splits": {"train": f"0:{EPISODES}"}, "chunks_size": 1000,
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4", "features": {
            camera: {"dtype": "video", "shape": [SIZE, SIZE, 3], "names": ["height", "width", "channels"]},
            "action": {"dtype": "float32", "shape": [14],
                       "names": [f"{side}_{joint}.pos" for side in ("left", "right") for joint in joints]}}}))
    with av.open(str(folder / f"videos/{camera}/chunk-000/file-000.mp4"), "w") as out:
        stream = out.add_stream("libx264", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = SIZE, SIZE, "yuv420p"
        for left, _ in arms:
            for picture in pictures(left[:, :2] / 40, (60, 90, 220)):
                out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(stream.encode())


def write_can(root: Path, name: str = "can_robomimic") -> None:
    import h5py

    (root / name).mkdir(parents=True)
    with h5py.File(root / name / "image_v141.hdf5", "w") as file:
        for episode in range(EPISODES):
            poses = motion(episode + 50, 6)
            demo = file.create_group(f"data/demo_{episode}")
            demo.attrs["num_samples"] = STEPS
            demo["actions"] = np.concatenate([poses, closing(-1, 1)[:, None]], axis=1).astype(np.float64)
            demo["obs/agentview_image"] = pictures(poses[:, :2], (60, 190, 80))
        file["mask/train"] = np.array([b"demo_0", b"demo_1", b"demo_2"])
        file["mask/valid"] = np.array([b"demo_3"])


if __name__ == "__main__":
    for write in (write_kitchen, write_towel, write_can):
        write(Path(sys.argv[1]))
