"""How long it takes to open a large data set, the first time and from then on, by format, beside the time that reading its bytes takes.

    python speed/open_data.py [--episodes 10000] [--frames 20] [--side 64] [--each 100] [--formats rlds,hdf5,lerobot,lerobot2]
                              [--folder DIR] [--profile] [--out FILE]

Makes the sets (JPEG in RLDS, raw pixels in HDF5, H.264 in LeRobot: v3.0, and `lerobot2`, v2.1 with two files to an episode; --each:
episodes to a file of RLDS and v3.0), and opens each as `vlakeep preflight` does, without a tokenizer: index and data card. Seconds are of
processor time, per thousand episodes; `reading` is the floor: every byte of the files once from the page cache, with RLDS's checksums.
--profile: where the first time goes.
"""

import argparse
import cProfile
import json
import pstats
import shutil
import sys
import tempfile
import time
from pathlib import Path

import google_crc32c
import numpy as np

from vlakeep.core.config import load_config
from vlakeep.data.card import look_at_all
from vlakeep.data.images import encode_jpeg
from vlakeep.data.tfrecord import RecordWriter, write_example

FPS, TEXTS = 10, 50
SETS = {"rlds": "libero_open_rlds", "hdf5": "libero_open_hdf5", "lerobot": "libero_open_lerobot", "lerobot2": "libero_open_lerobot2"}


def pictures(frames: int, side: int) -> np.ndarray:
    """uint8 [frames, side, side, 3]: a scene with some noise, whose JPEG is as long as a rendered one's."""
    rng = np.random.default_rng(0)
    scene = np.kron(rng.integers(40, 216, (side // 16 + 1, side // 16 + 1, 3)), np.ones((16, 16, 1)))[:side, :side]
    return np.clip(scene + rng.integers(-6, 7, (frames, side, side, 3)), 0, 255).astype(np.uint8)


def actions_of(episode: int, frames: int) -> np.ndarray:
    """float32 [frames, 7], the gripper last, -1 open and 1 closed."""
    made = np.random.default_rng(episode).uniform(-0.5, 0.5, (frames, 7)).astype(np.float32)
    made[:, -1] = np.where(np.arange(frames) < frames // 2, -1, 1)
    return made


def text_of(episode: int) -> str:
    return f"put object {episode % TEXTS} on the plate"


def write_rlds(folder: Path, episodes: int, images: np.ndarray, each: int) -> None:
    folder = folder / "1.0.0"
    folder.mkdir(parents=True)
    encoded, frames = [encode_jpeg(image) for image in images], len(images)
    shards = [range(a, min(a + each, episodes)) for a in range(0, episodes, each)]
    for number, shard in enumerate(shards):
        with RecordWriter(folder / f"{folder.parent.name}-train.tfrecord-{number:05d}-of-{len(shards):05d}") as writer:
            for episode in shard:
                writer.write(write_example({
                    "steps/observation/image": encoded, "steps/action": actions_of(episode, frames).reshape(-1),
                    "steps/observation/state": np.zeros(8 * frames, np.float32), "steps/reward": np.zeros(frames, np.float32),
                    "steps/is_first": np.arange(frames) == 0, "steps/language_instruction": [text_of(episode).encode()] * frames}))
    (folder / "dataset_info.json").write_text(json.dumps({"name": folder.parent.name, "fileFormat": "tfrecord", "splits": [
        {"name": "train", "shardLengths": [str(len(shard)) for shard in shards]}]}))


def write_hdf5(folder: Path, episodes: int, images: np.ndarray, each: int) -> None:
    import h5py

    folder.mkdir(parents=True)
    for text in range(min(TEXTS, episodes)):
        with h5py.File(folder / f"{text_of(text).replace(' ', '_')}_demo.hdf5", "w") as file:
            for number, episode in enumerate(range(text, episodes, TEXTS)):
                demo = file.create_group(f"data/demo_{number}")
                demo.attrs["num_samples"] = len(images)
                demo["actions"], demo["obs/agentview_rgb"] = actions_of(episode, len(images)).astype(np.float64), images


def encode_video(path: Path, images: np.ndarray, times: int) -> None:
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=FPS, options={"g": str(FPS), "preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = images[0].shape[1], images[0].shape[0], "yuv420p"
        for image in (image for _ in range(times) for image in images):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        out.mux(stream.encode())


def write_lerobot(folder: Path, episodes: int, images: np.ndarray, each: int, v3: bool = True) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    camera, frames, each = "observation.images.image", len(images), each if v3 else 1
    meta, first_video = [], None
    for number, start in enumerate(range(0, episodes, each)):
        members = range(start, min(start + each, episodes))
        at, count = np.arange(frames), len(members)
        place = "chunk-000/file-{0:03d}" if v3 else f"chunk-{start // 1000:03d}/episode_{{0:06d}}"
        data = folder / "data" / (place.format(number) + ".parquet")
        data.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({
            "action": pa.array(list(np.concatenate([actions_of(episode, frames) for episode in members])), pa.list_(pa.float32())),
            "timestamp": np.tile((at / FPS).astype(np.float32), count), "frame_index": np.tile(at, count),
            "episode_index": np.repeat(np.array(members), frames), "index": np.arange(count * frames) + start * frames,
            "task_index": np.repeat(np.array(members) % TEXTS, frames)}), data)
        video = (folder / "videos" / camera / (place.format(number) + ".mp4") if v3 else
                 folder / "videos" / place.format(number).replace("/", f"/{camera}/")).with_suffix(".mp4")
        if first_video is None or count != each:
            encode_video(video, images, count)
            first_video = video
        else:
            video.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(first_video, video)
        meta += [{"episode_index": episode, "length": frames, "tasks": [text_of(episode)], "data/chunk_index": 0, "data/file_index": number,
                  f"videos/{camera}/chunk_index": 0, f"videos/{camera}/file_index": number,
                  f"videos/{camera}/from_timestamp": i * frames / FPS, f"videos/{camera}/to_timestamp": (i + 1) * frames / FPS}
                 for i, episode in enumerate(members)]
    (folder / "meta").mkdir()
    tasks = [text_of(number) for number in range(TEXTS)]
    paths = {"data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
             "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"} if v3 else {
                 "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
                 "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"}
    (folder / "meta/info.json").write_text(json.dumps({
        "codebase_version": "v3.0" if v3 else "v2.1", "fps": FPS, "chunks_size": 1000, "splits": {"train": f"0:{episodes}"}, **paths,
        "features": {camera: {"dtype": "video", "shape": list(images.shape[1:])}, "action": {"dtype": "float32", "shape": [7]}}}))
    if v3:
        (folder / "meta/episodes/chunk-000").mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(meta), folder / "meta/episodes/chunk-000/file-000.parquet")
        pq.write_table(pa.table({"task_index": range(TEXTS), "task": tasks}), folder / "meta/tasks.parquet")
        return
    (folder / "meta/episodes.jsonl").write_text("".join(json.dumps({key: row[key] for key in ("episode_index", "tasks", "length")}) + "\n"
                                                        for row in meta))
    (folder / "meta/tasks.jsonl").write_text("".join(json.dumps({"task_index": i, "task": task}) + "\n" for i, task in enumerate(tasks)))


WRITERS = {"rlds": write_rlds, "hdf5": write_hdf5, "lerobot": write_lerobot,
           "lerobot2": lambda *args: write_lerobot(*args, v3=False)}


def floor(folder: Path, kind: str) -> dict:
    """Files, bytes, and processor seconds of reading them all once; of RLDS with its checksums, which have to be looked at."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    for path in files:
        path.read_bytes()  # into the page cache, as far as it goes
    begin = time.process_time()
    for path in files:
        data = path.read_bytes()
        if kind == "rlds":
            google_crc32c.value(data)
    return {"files": len(files), "bytes": sum(path.stat().st_size for path in files), "floor_s": time.process_time() - begin}


def opened(config, root: Path, cache: Path) -> dict:
    begin, wall = time.process_time(), time.perf_counter()
    look_at_all(config.data, root, cache)
    return {"cpu_s": time.process_time() - begin, "wall_s": time.perf_counter() - wall}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("episodes", 10_000), ("frames", 20), ("side", 64), ("each", 100)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--formats", default=",".join(SETS))
    parser.add_argument("--folder", default=None, help="where the sets are made, and stay; else a temporary folder")
    parser.add_argument("--out", default=None)
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    print(f"{args.episodes} episodes of {args.frames} frames, {args.side} x {args.side}; seconds of processor time per 1,000 episodes")
    print(f"{'format':10s} {'files':>7s} {'GB':>6s} {'reading':>8s} {'first':>8s} {'again':>8s}")
    with tempfile.TemporaryDirectory(dir=args.folder and str(Path(args.folder).parent)) as place:
        root = Path(args.folder or place)
        for kind in args.formats.split(","):
            folder, cache = root / SETS[kind], Path(place) / f"cache_{kind}"
            if not folder.exists():
                WRITERS[kind](folder, args.episodes, pictures(args.frames, args.side), args.each)
            found = floor(folder, kind)
            config = load_config(None, ["--data.datasets", f"[{SETS[kind]}]"])
            profile = cProfile.Profile()
            if args.profile:
                profile.enable()
            found["first"] = opened(config, root, cache)
            profile.disable()
            found["again"] = opened(config, root, cache)
            share = 1000 / args.episodes
            print(f"{kind:10s} {found['files']:7d} {found['bytes'] / 1e9:6.2f} {found['floor_s'] * share:8.3f} "
                  f"{found['first']['cpu_s'] * share:8.3f} {found['again']['cpu_s'] * share:8.3f}", flush=True)
            if args.profile:
                pstats.Stats(profile).sort_stats("tottime").print_stats(18)
            if args.out:
                with open(args.out, "a") as file:
                    sizes = {key: vars(args)[key] for key in ("episodes", "frames", "side", "each")}
                    file.write(json.dumps({"format": kind, **sizes, **found}) + "\n")
            if args.folder is None:
                shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
