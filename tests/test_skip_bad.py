"""Bad episodes are all found when a set is opened; refused with a list, or left out while the others stay what they were."""

import json
import shutil

import numpy as np
import pytest
from conftest import BASELINE
from test_data_formats import FPS, NAME, _encode_video, copy, edit_json, episodes, pq, written  # noqa: F401  (fixtures)

from vlakeep.data import bad, card, suggest
from vlakeep.data.dataset import Conventions
from vlakeep.data.formats import open_dataset
from vlakeep.data.sample import Episode
from vlakeep.data.tfrecord import RecordWriter, parse_example, read_records, write_example
from vlakeep.data.video import VideoReader, missing_frame, video_times
from vlakeep.data.writer import write_rlds
from vlakeep.train import run_training

h5py, pa, av = pytest.importorskip("h5py"), pytest.importorskip("pyarrow"), pytest.importorskip("av")
APPLE = b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        " + bytes(200)


def samples(data):
    """What a data set gives, by the number of the episode in its files."""
    return {data.number(e): (data.instruction(e, 0), data.standard_actions(e).tobytes(), data.image(e, 2).tobytes())
            for e in range(len(data))}


def rlds(folder, change):
    """A set of four episodes whose records went through `change`."""
    rng = np.random.default_rng(0)
    made = [Episode(rng.integers(0, 256, (5 + i, 8, 8, 3), dtype=np.uint8), rng.uniform(-1, 1, (5 + i, 7)).astype(np.float32), f"do {i}")
            for i in range(4)]
    version = write_rlds(folder, NAME, [Episode(e.images, np.where(np.arange(7) == 6, 1.0, e.actions), e.language) for e in made])
    shard, = version.glob("*.tfrecord*")
    payloads = change([payload for _, payload in read_records(shard)])
    shard.unlink()
    with RecordWriter(shard) as writer:
        for payload in payloads:
            writer.write(payload)
    return version, shard


def flip(shard, at):
    data = bytearray(shard.read_bytes())
    data[at] ^= 1
    shard.write_bytes(data)


def opened(folder, **options):
    return open_dataset(folder, conventions=Conventions(gripper="standard"), **options)


@pytest.mark.parametrize("what", ["empty", "flipped", "cut", "foreign"])
def test_records_that_cannot_be_used(tmp_path, what):
    whole = samples(opened(rlds(tmp_path / "whole", list)[0]))
    empty = write_example({"steps/action": np.zeros(0, np.float32), "steps/language_instruction": [], "steps/observation/image": []})
    change = {"empty": lambda p: [p[0], empty, *p[2:]], "foreign": lambda p: [p[0], b"\xff\xff\xff", *p[2:]]}.get(what, list)
    version, shard = rlds(tmp_path / "bad", change)
    starts = [start for start, _ in read_records(shard)]
    if what == "flipped":
        flip(shard, starts[1] + 40)
    if what == "cut":
        shard.write_bytes(shard.read_bytes()[:starts[2] + 40])
    lost = {2, 3} if what == "cut" else {1}
    with pytest.raises(ValueError, match=f"{shard.name}: record {min(lost)} at byte") as error:
        opened(version)
    assert bad.OPTION in str(error.value)
    data = opened(version, skip_bad=True)
    assert samples(data) == {number: one for number, one in whole.items() if number not in lost}
    assert data.unlabelled == 0 and data.statistics["num_trajectories"] == 4 - len(lost)
    assert any(f"record {min(lost)} at byte" in line for line in data.left_out)


@pytest.mark.parametrize("lost", [0, 2, 3])
def test_the_card_of_what_is_left(tmp_path, lost):
    version, _ = rlds(tmp_path / "bad", lambda p: [b"\xff\xff\xff" if number == lost else one for number, one in enumerate(p)])
    data = opened(version, skip_bad=True)
    gripper, = card.look_at(data)["grippers"]
    assert (gripper["begin_open"], gripper["end_open"], gripper["share_open"]) == (1, 1, 1)
    actions = np.where(np.arange(7) == 6, np.where(np.arange(data.index.start_E[-1]) % 2, 1.0, 0.0)[:, None], data.index.actions_NA)
    assert suggest.guess_grippers(actions, data.index.start_E)


@pytest.mark.parametrize("head", [b"", b"RIFF....WEBP", b"\xff"])
def test_a_picture_that_is_none_is_found_at_opening(tmp_path, head):
    whole = samples(opened(rlds(tmp_path / "whole", list)[0]))

    def without(payloads):
        features = parse_example(payloads[1])
        made = {name: one.bytes() if one.kind == "bytes" else one.floats() if one.kind == "float" else one.ints()
                for name, one in features.items()}
        made["steps/observation/image"][3] = head
        return [payloads[0], write_example(made), *payloads[2:]]

    version, shard = rlds(tmp_path / "bad", without)
    with pytest.raises(ValueError, match=f"{shard.name}: record 1 .*'steps.*image' of step 3: {len(head)} bytes that are neither"):
        opened(version)
    assert samples(opened(version, skip_bad=True)) == {number: one for number, one in whole.items() if number != 1}


def test_an_episode_that_was_taken_out_moves_no_other_into_another_split(written, tmp_path):  # noqa: F811
    folder = copy(written, "v2.1-png", tmp_path)
    whole = samples(open_dataset(folder))
    edit_json("meta/info.json", lambda info: info.update(splits={"train": "0:2", "val": "2:3"}))(folder)
    path = folder / "meta/episodes.jsonl"
    lines = path.read_text().splitlines()
    assert samples(open_dataset(folder)) == {number: whole[number] for number in (0, 1)}
    path.write_text("".join(line + "\n" for line in lines if json.loads(line)["episode_index"] != 1))
    with pytest.raises(ValueError, match="split 'train' is 0:2 of 2 episodes, and 1 of them not there"):
        open_dataset(folder)
    data = open_dataset(folder, skip_bad=True)
    assert list(samples(data).values()) == [whole[0]] and len(data.left_out) == 1
    path.write_text("".join(line + "\n" for line in [*lines, lines[1]]))
    with pytest.raises(ValueError, match="the list of episodes holds episode 1 twice"):
        open_dataset(folder, skip_bad=True)


def test_a_missing_shard_takes_its_episodes_and_no_others(tmp_path):
    rng = np.random.default_rng(0)
    made = [Episode(rng.integers(0, 256, (6, 8, 8, 3), dtype=np.uint8), np.ones((6, 7), np.float32), f"do {i}") for i in range(8)]
    version = write_rlds(tmp_path, NAME, made, shard_bytes=2500)
    shards = sorted(version.glob("*.tfrecord*"))
    assert len(shards) > 2
    whole = samples(opened(version))
    shards[1].unlink()
    with pytest.raises(FileNotFoundError, match="lacks 1 of its shards.*--data.skip_bad true"):
        opened(version)
    data = opened(version, skip_bad=True)
    left = {n: (text, image) for n, (text, _, image) in samples(data).items()}
    assert left == {n: (text, image) for n, (text, _, image) in whole.items() if n in left} and 0 < len(whole) - len(left) < 6
    assert data.left_out == [f"{shards[1]} is missing ({len(whole) - len(left)} episodes)"]


def test_all_are_listed_and_hidden_files_are_no_data(written, tmp_path):  # noqa: F811
    folder = copy(written, "hdf5", tmp_path)
    whole = samples(open_dataset(folder))
    files = sorted(folder.glob("*.hdf5"))
    (folder / f"._{files[0].name}").write_bytes(APPLE)
    assert samples(open_dataset(folder)) == whole
    (folder / "foreign_demo.hdf5").write_bytes(APPLE)
    with h5py.File(files[1], "r+") as file:
        file["data/demo_0/actions"][2, 3] = np.nan
        file["data"].create_group("demo_1")
    with pytest.raises(ValueError, match="3 parts cannot be used") as error:
        open_dataset(folder)
    for words in ("foreign_demo.hdf5 cannot be opened as HDF5", f"{files[1].name}: demo_0 .*", f"{files[1].name}: demo_1: no 'actions'"):
        assert words.split(" .")[0] in str(error.value)
    data = open_dataset(folder, skip_bad=True)
    assert samples(data) == {number: one for number, one in whole.items() if number != 1} and len(data.left_out) == 3


def test_what_leaving_out_would_leave_nothing_of_is_refused_all_the_same(written, tmp_path):  # noqa: F811
    folder = copy(written, "hdf5", tmp_path)
    for path in folder.glob("*.hdf5"):
        path.write_bytes(APPLE)
    with pytest.raises(ValueError, match="cannot be opened as HDF5") as error:
        open_dataset(folder, skip_bad=True)
    assert "The other 2 entries" in str(error.value) and bad.OPTION not in str(error.value)


def test_a_long_list_is_cut(tmp_path):
    with pytest.raises(ValueError, match=f"60 parts cannot be used(.|\n)*and {60 - bad.SHOWN} more"):
        bad.refuse(tmp_path, {f"file {i}": 1 for i in range(60)}, False)


@pytest.mark.parametrize("what", ["v2.1-png", "v3.0-png", "v2.1-rgb", "v3.0-rgb"])
def test_episodes_of_lerobot_that_cannot_be_used(written, episodes, tmp_path, what):  # noqa: F811
    folder = copy(written, what, tmp_path)
    whole = samples(open_dataset(folder))
    for path in (*folder.rglob("*.parquet"), *folder.rglob("*.mp4")):
        (path.parent / f"._{path.name}").write_bytes(APPLE)
    assert samples(open_dataset(folder)) == whole
    if what == "v3.0-rgb":  # one video for all, cut within the second episode; its container does not say how many frames it has
        video, = folder.rglob("[!.]*.mp4")
        kept = np.concatenate([e.images for e in episodes])[:len(episodes[0].images) + 3]
        _encode_video(video.with_suffix(".mkv"), kept, "rgb")
        video.with_suffix(".mkv").replace(video)
        lost, words = {1, 2}, "mp4 holds .* frames and its episodes need"
    elif what == "v2.1-rgb":  # the frames of one come at another rate than the table says
        video = sorted(folder.rglob("[!.]*.mp4"))[1]
        with av.open(str(video), "w") as container:
            stream = container.add_stream("libx264rgb", rate=13, options={"qp": "0"})
            stream.width, stream.height, stream.pix_fmt = 64, 64, "rgb24"
            for frame in episodes[1].images:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
            container.mux(stream.encode())
        lost, words = {1}, "`fps` of meta/info.json is 10, the video has 13"
    elif what == "v3.0-png":  # an episode without frames at the end, by the list
        path, = (folder / "meta/episodes").rglob("[!.]*.parquet")
        rows = pq.read_table(path).to_pylist()
        pq.write_table(pa.Table.from_pylist([*rows, {**rows[-1], "episode_index": 3, "length": 0}]), path)
        edit_json("meta/info.json", lambda info: info.update(splits={"train": "0:4"}))(folder)
        lost, words = set(), "episode 3 has no frame"
    else:  # one was taken out by hand, and its table is damaged in another
        lines = (folder / "meta/episodes.jsonl").read_text().splitlines()
        (folder / "meta/episodes.jsonl").write_text("".join(line + "\n" for line in lines if json.loads(line)["episode_index"] != 1))
        with pytest.raises(ValueError, match='split .train. is 0:3 of 2 episodes, and 1 of them not there; write "0:2" there'):
            open_dataset(folder)
        data = open_dataset(folder, skip_bad=True)
        assert list(samples(data).values()) == [whole[0], whole[2]] and len(data.left_out) == 1
        return
    with pytest.raises(ValueError, match=words):
        open_dataset(folder)
    data = open_dataset(folder, skip_bad=True)
    assert samples(data) == {number: one for number, one in whole.items() if number not in lost}
    assert len(data.left_out) == max(1, len(lost))


def test_the_times_of_a_video_are_those_at_which_its_frames_are_found(written, episodes):  # noqa: F811
    path = sorted((written / "v2.1-rgb" / NAME).rglob("*.mp4"))[0]
    times = video_times(path)
    assert np.allclose(times, np.arange(len(episodes[0].images)) / FPS, atol=1e-3)
    reader = VideoReader(FPS)
    for seconds in (0.0, 0.02, 0.03, 0.1, 0.124, 0.126, times[-1] + 0.02, times[-1] + 0.03):
        try:
            reader.frame(path, seconds, "here")
            found = True
        except ValueError:
            found = False
        assert (missing_frame(times, np.array([seconds]), FPS) < 0) == found, seconds
    reader.close()
    assert missing_frame(np.array([]), np.array([0.0]), FPS) == 0 and missing_frame(times, np.array([]), FPS) < 0


def test_the_list_is_kept_with_the_index_and_asked_again(tmp_path, monkeypatch):
    version, shard = rlds(tmp_path / "bad", lambda p: [p[0], b"\xff", *p[2:]])
    cache = tmp_path / "cache"
    with pytest.raises(ValueError, match="record 1"):
        opened(version, cache_dir=cache)
    monkeypatch.setattr("vlakeep.data.rlds.build_index", lambda *args: pytest.fail("the index was not kept"))
    with pytest.raises(ValueError, match="record 1"):
        opened(version, cache_dir=cache)
    assert len(opened(version, cache_dir=cache, skip_bad=True)) == 3


def test_a_run_records_what_it_was_made_without(world):
    storage, make_config = world
    folder = shutil.copytree(storage.data / "tabletop_corner", storage.data / "tabletop_bad_part")
    try:
        shard, = folder.rglob("*.tfrecord*")
        starts = [start for start, _ in read_records(shard)]
        flip(shard, starts[3] + 40)
        more = ["--name", "skip-bad", "--data.datasets", "[tabletop_bad_part]", "--train.steps", 1, "--train.batch_size", 2,
                "--lora.layers", "last:1", "--train.tensorboard", "false"]
        with pytest.raises(ValueError, match="record 3 at byte .*To train without: --data.skip_bad true"):
            run_training(make_config(BASELINE, *more), storage)
        run = run_training(make_config(BASELINE, *more, "--data.skip_bad", "true"), storage)
        line, = json.loads((run / bad.FILE).read_text())["tabletop_corner"]
        assert "record 3 at byte" in line
    finally:
        shutil.rmtree(folder)
