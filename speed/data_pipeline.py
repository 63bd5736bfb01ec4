"""Samples a second of the data pipeline, by format and part, on one core and on several, beside what a training step eats.

    python speed/data_pipeline.py [--out FILE] [--frames 120] [--processes 1,2,4,8] [--formats rlds,hdf5,lerobot] [--tiny]

Pictures of 256 x 256 as LIBERO's are: RLDS with JPEG, HDF5 with raw pixels that go through JPEG when they are read, LeRobot v2.1 with a
video (H.264, a key frame every second). The model takes 224 x 224. One thread; a part is timed by itself, in microseconds of processor
time a sample, so that other work on the machine lengthens nothing; `whole` is the stream as training asks it. What a step eats: 16 samples
in .211 s, and in .153 s compiled, at 7B shapes on one H100 (docs/plan.md); cores: how many it takes.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from vlakeep.core.config import load_config
from vlakeep.core.storage import PACKAGE
from vlakeep.data.augment import augment, draw
from vlakeep.data.formats import open_configured
from vlakeep.data.images import encode_jpeg, resize_uint8
from vlakeep.data.loader import make_stream
from vlakeep.data.sample import Episode
from vlakeep.data.writer import write_rlds
from vlakeep.openvla.processor import Processor

STEPS = {"plain": 16 / 0.211, "compiled": 16 / 0.153}  # samples a second
TEXT = "pick up the black bowl next to the plate and place it on the plate"
FPS, STEPS_AN_EPISODE, BATCH = 10, 40, 8
SETS = {"rlds": "libero_spatial_speed", "hdf5": "libero_spatial_speed_hdf5", "lerobot": "speed_lerobot"}


def episodes(count: int, side: int):
    """Pictures with edges and some noise, whose JPEG is as long as a rendered scene's, that move a little from frame to frame."""
    rng = np.random.default_rng(0)
    scene = np.kron(rng.integers(40, 216, (side // 16 + 2, side // 16 + 2, 3)), np.ones((16, 16, 1))).astype(np.int16)
    for _ in range(count):
        frames = []
        for t in range(STEPS_AN_EPISODE):
            noise = rng.integers(-6, 7, (side, side, 3))
            frames.append(np.clip(scene[t // 2:t // 2 + side, t // 3:t // 3 + side] + noise, 0, 255).astype(np.uint8))
        actions = rng.uniform(-0.5, 0.5, (STEPS_AN_EPISODE, 7)).astype(np.float32)
        actions[:, -1] = np.where(np.arange(STEPS_AN_EPISODE) % 20 < 10, -1, 1)
        yield Episode(np.stack(frames), actions, TEXT, rng.normal(size=(STEPS_AN_EPISODE, 8)).astype(np.float32))


def write_hdf5(folder: Path, made) -> None:
    from vlakeep.data.hdf5_writer import Demonstration, append_demo

    folder.mkdir(parents=True)
    for one in made:
        count = len(one.actions)
        append_demo(folder, TEXT.replace(" ", "_"), {}, Demonstration(
            one.actions, np.zeros((count, 9)), {"agentview_rgb": one.images[:, ::-1]}, one.state[:, :6], np.zeros((count, 4)),
            one.state[:, 6:], np.zeros((count, 7)), {}))


def write_lerobot(folder: Path, made) -> None:
    """v2.1 with one camera as videos, by hand."""
    import av
    import pyarrow as pa
    import pyarrow.parquet as pq

    camera, lines, start = "observation.images.image", [], 0
    (folder / "data/chunk-000").mkdir(parents=True)
    (folder / f"videos/chunk-000/{camera}").mkdir(parents=True)
    (folder / "meta").mkdir()
    for number, one in enumerate(made):
        count = len(one.actions)
        pq.write_table(pa.table({
            "action": pa.array(one.actions.tolist(), pa.list_(pa.float32())),
            "timestamp": pa.array(np.arange(count, dtype=np.float32) / FPS), "frame_index": pa.array(range(count)),
            "episode_index": pa.array([number] * count),
            "index": pa.array(range(start, start + count)), "task_index": pa.array([0] * count),
        }), folder / f"data/chunk-000/episode_{number:06d}.parquet")
        with av.open(str(folder / f"videos/chunk-000/{camera}/episode_{number:06d}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=FPS, options={"g": str(FPS), "crf": "20"})
            stream.width, stream.height, stream.pix_fmt = one.images.shape[2], one.images.shape[1], "yuv420p"
            for image in one.images:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")))
            container.mux(stream.encode())
        lines.append({"episode_index": number, "tasks": [TEXT], "length": count})
        start += count
    side = list(made[0].images.shape[1:])
    info = {"codebase_version": "v2.1", "fps": FPS, "chunks_size": 1000, "splits": {"train": f"0:{len(lines)}"},
            "features": {camera: {"dtype": "video", "shape": side}, "action": {"dtype": "float32", "shape": [7]}},
            "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
            "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"}
    (folder / "meta/info.json").write_text(json.dumps(info))
    (folder / "meta/episodes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "meta/tasks.jsonl").write_text(json.dumps({"task_index": 0, "task": TEXT}) + "\n")


def processor_of(folder: Path, side: int) -> Processor:
    """The tabletop base's tokenizer with OpenVLA's two towers at this size."""
    from random_7b import PREPROCESSOR

    shutil.copytree(PACKAGE / "assets" / "tabletop-base", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "preprocessor_config.json").write_text(json.dumps({**PREPROCESSOR, "input_sizes": [[3, side, side]] * 2}))
    return Processor.from_folder(folder)


def cpu_us(work, items) -> float:
    """Median microseconds of processor time of this thread of work(item)."""
    found = []
    for item in items:
        begin = time.thread_time()
        work(item)
        found.append(time.thread_time() - begin)
    return 1e6 * statistics.median(found)


def parts_of(config, storage, processor, frames: int) -> dict:
    """Microseconds a sample by part."""
    dataset, = open_configured(config.data, storage, None, processor.spec)
    size = tuple(processor.picture_size)
    rng = np.random.default_rng(1)
    keys = [(int(rng.integers(len(dataset))), int(rng.integers(STEPS_AN_EPISODE))) for _ in range(frames)]  # as the shuffled stream asks
    found = {"read and decode": cpu_us(lambda key: dataset.frame(*key), keys)}
    raw = [dataset.frame(*key) for key in keys[:32]]
    found["resize"] = cpu_us(lambda sample: sample.with_pictures(lambda picture: resize_uint8(picture, size)), raw)
    small = [sample.with_pictures(lambda picture: resize_uint8(picture, size)) for sample in raw]
    drawn = draw(rng)
    found["augment"] = cpu_us(lambda sample: sample.with_pictures(lambda picture: augment(picture, drawn)), small)
    groups = [small[start:start + BATCH] for start in range(0, len(small), BATCH)]
    found["tokens and tensors"] = cpu_us(processor.encode_batch, groups) / BATCH
    dataset.close_all()
    return found


def whole(config, storage, processor, batches: int, processes: int) -> float:
    """Samples a second: of processor time with one process, which is this one, of the clock with several."""
    config.data.workers, config.data.processes = (0 if processes == 1 else processes), processes > 1
    stream = make_stream(config.data, storage, processor, BATCH, 0)
    try:
        for _ in range(2 * processes + 1):  # what is made ahead
            next(stream)
        clock = time.thread_time if processes == 1 else time.perf_counter
        begin = clock()
        for _ in range(batches * processes):
            next(stream)
        return BATCH * batches * processes / (clock() - begin)
    finally:
        stream.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=None)
    parser.add_argument("--frames", type=int, default=120)
    parser.add_argument("--processes", default="1")
    parser.add_argument("--formats", default=",".join(SETS))
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    frames, side, small = (8, 64, 32) if args.tiny else (args.frames, 256, 224)
    with tempfile.TemporaryDirectory() as place:
        root, made = Path(place), list(episodes(2 if args.tiny else 12, side))
        processor = processor_of(root / "processor", small)
        write_rlds(root, SETS["rlds"], made, image_format="jpeg")
        print(f"a JPEG of these pictures takes {len(encode_jpeg(made[0].images[0])) / 1000:.1f} kB")
        print(f"{'format':10s} {'part':20s} {'us a sample':>12s} {'share':>7s}")
        for name in args.formats.split(","):
            if name != "rlds":
                {"hdf5": write_hdf5, "lerobot": write_lerobot}[name](root / SETS[name], made)
            config = load_config("openvla_libero", [
                "--root", str(root), "--data.datasets", f"[{SETS[name]}]", "--data.image_aug", "true", "--data.shuffle_buffer", "1000",
                *(["--data.gripper", "libero"] if name == "lerobot" else [])])  # its name does not tell
            parts = parts_of(config, root, processor, frames)
            total = sum(parts.values())
            rows = {"format": name, "parts_us": parts, "by_parts": 1e6 / total}
            for part, value in parts.items():
                print(f"{name:10s} {part:20s} {value:12.0f} {value / total:7.0%}")
            for processes in map(int, args.processes.split(",")):
                rate = whole(config, root, processor, 2 if args.tiny else 6, processes)
                rows[f"whole_{processes}"] = rate
                cores = ", ".join(f"{kind} step {eaten * processes / rate:.1f}" for kind, eaten in STEPS.items())
                print(f"{name:10s} {'whole, ' + str(processes):20s} {rate:9.1f} samples/s; cores for one H100: {cores}")
            if args.out:
                with open(args.out, "a") as file:
                    file.write(json.dumps(rows) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
