"""HDF5 and LeRobot beside RLDS: the same episodes give the same samples, the content picks the reader, damage is named."""

import importlib
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from test_data_prompts import processor  # noqa: F401  (a fixture)

from vlakeep.checks import _check_data_set
from vlakeep.core.config import Config, DataConfig
from vlakeep.core.storage import Storage
from vlakeep.data import images, index, parquet_pictures
from vlakeep.data.dataset import Conventions
from vlakeep.data.formats import find_format, open_dataset, open_datasets
from vlakeep.data.hdf5 import Hdf5Dataset, language_of
from vlakeep.data.hdf5_writer import Demonstration, append_demo
from vlakeep.data.lerobot import LeRobotDataset
from vlakeep.data.loader import BatchStream, make_stream
from vlakeep.data.rlds import RldsDataset
from vlakeep.data.sample import Episode
from vlakeep.data.statistics import unnormalise
from vlakeep.data.writer import write_rlds
from vlakeep.tabletop import benchmark as tabletop

h5py, pa, av = pytest.importorskip("h5py"), pytest.importorskip("pyarrow"), pytest.importorskip("av")
pq = pytest.importorskip("pyarrow.parquet")

REFERENCE = Path(__file__).parent / "golden" / "lerobot"
NAME, FPS = "libero_pushes", 10
LEROBOT = [("v2.1", "png"), ("v2.1", "jpeg"), ("v2.1", "rgb"), ("v2.1", "av1"),
           ("v3.0", "png"), ("v3.0", "jpeg"), ("v3.0", "rgb"), ("v3.0", "av1")]
LOSSY = {"av1"}
NO_AV1 = "libsvtav1" not in av.codecs_available  # older wheels of PyAV read AV1 and cannot write it


@pytest.fixture(scope="module")
def episodes():
    """Real tabletop episodes by instruction, with LIBERO's gripper (-1 open, +1 close), so that every format has work to do."""
    made = sorted(tabletop.collect_demos("corner", 3, seed=3), key=lambda e: e.language)
    assert len({e.language for e in made}) == 3
    return [Episode(e.images, np.concatenate([e.actions[:, :-1], 1 - 2 * e.actions[:, -1:]], axis=1), e.language) for e in made]


def write_hdf5(folder, episodes, convention=None):
    """One file per episode, named by its instruction, as LIBERO and regenerate_libero_dataset.py (without attributes) do."""
    folder.mkdir(parents=True)
    for episode in episodes:
        with h5py.File(folder / f"{episode.language.replace(' ', '_')}_demo.hdf5", "w") as file:
            demo = file.create_group("data/demo_0")
            demo["actions"] = episode.actions.astype(np.float64)
            demo["obs/agentview_rgb"] = episode.images[:, ::-1, ::-1]
            if convention:  # robosuite's: opengl is upside down, opencv is not; the picture is mirrored in both
                file["data"].attrs["macros_image_convention"] = convention
            if convention == "opencv":
                demo["obs/agentview_rgb"][...] = episode.images[:, :, ::-1]
            demo["obs/eye_in_hand_rgb"] = 255 - episode.images
    return folder


def _encode_video(path, frames, codec):
    """rgb: lossless RGB, so that what is compared is which frame is read; av1: what lerobot writes by default."""
    path.parent.mkdir(parents=True, exist_ok=True)
    name, pixels, options = {"rgb": ("libx264rgb", "rgb24", {"qp": "0", "g": "5"}),
                             "av1": ("libsvtav1", "yuv420p", {"crf": "30", "g": "2"})}[codec]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(name, rate=FPS, options=options)
        stream.width, stream.height, stream.pix_fmt = frames[0].shape[1], frames[0].shape[0], pixels
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())


def write_lerobot(folder, episodes, version, pictures):
    """By hand and small; what lerobot itself writes is in REFERENCE."""
    video, v3 = pictures in ("rgb", "av1"), version == "v3.0"
    (folder / "meta").mkdir(parents=True)
    camera = "observation.images.image"
    texts = list(dict.fromkeys(e.language for e in episodes))
    tables, rows, start = [], [], 0
    for number, episode in enumerate(episodes):
        steps = len(episode.images)
        columns = {"action": pa.array(episode.actions.tolist(), pa.list_(pa.float32())),
                   "timestamp": pa.array(np.arange(steps, dtype=np.float32) / FPS), "frame_index": pa.array(range(steps)),
                   "episode_index": pa.array([number] * steps), "index": pa.array(range(start, start + steps)),
                   "task_index": pa.array([texts.index(episode.language)] * steps)}
        if not video:
            encode = images.encode_png if pictures == "png" else images.encode_jpeg
            columns[camera] = pa.array([{"bytes": encode(image), "path": f"{t}"} for t, image in enumerate(episode.images)])
        tables.append(pa.table(columns))
        rows.append({"episode_index": number, "length": steps, "tasks": [episode.language], "data/chunk_index": 0,
                     "data/file_index": 0, f"videos/{camera}/chunk_index": 0, f"videos/{camera}/file_index": 0,
                     f"videos/{camera}/from_timestamp": start / FPS})
        start += steps
    shape = list(episodes[0].images.shape[1:])
    features = {camera: {"dtype": "video" if video else "image", "shape": shape}, "action": {"dtype": "float32", "shape": [7]}}
    if v3:
        paths = {kind: kind + "/%schunk-{chunk_index:03d}/file-{file_index:03d}" for kind in ("data", "videos")}
    else:
        paths = {kind: kind + "/chunk-{episode_chunk:03d}/%sepisode_{episode_index:06d}" for kind in ("data", "videos")}
    info = {"codebase_version": version, "fps": FPS, "features": features, "chunks_size": 1000,
            "splits": {"train": f"0:{len(rows)}"}, "data_path": paths["data"] % "" + ".parquet",
            "video_path": paths["videos"] % "{video_key}/" + ".mp4" if video else None}
    (folder / "meta/info.json").write_text(json.dumps(info))
    frames = [e.images for e in episodes]
    if v3:
        (folder / "data/chunk-000").mkdir(parents=True)
        pq.write_table(pa.concat_tables(tables), folder / "data/chunk-000/file-000.parquet", row_group_size=7)
        (folder / "meta/episodes/chunk-000").mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(rows), folder / "meta/episodes/chunk-000/file-000.parquet")
        pq.write_table(pa.table({"task_index": range(len(texts)), "task": texts}), folder / "meta/tasks.parquet")
        if video:
            _encode_video(folder / f"videos/{camera}/chunk-000/file-000.mp4", np.concatenate(frames), pictures)
        return folder
    lines = [json.dumps({key: row[key] for key in ("episode_index", "tasks", "length")}) for row in rows]
    (folder / "meta/episodes.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "meta/tasks.jsonl").write_text("\n".join(json.dumps({"task_index": i, "task": t}) for i, t in enumerate(texts)))
    (folder / "data/chunk-000").mkdir(parents=True)
    for number, table in enumerate(tables):
        pq.write_table(table, folder / f"data/chunk-000/episode_{number:06d}.parquet")
        if video:
            _encode_video(folder / f"videos/chunk-000/{camera}/episode_{number:06d}.mp4", frames[number], pictures)
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory, episodes):
    """root / what / NAME for every format; RLDS once lossless and once as JPEG, as the official sets are."""
    root = tmp_path_factory.mktemp("formats")
    write_rlds(root / "rlds-png", NAME, episodes, "png")
    write_rlds(root / "rlds-jpeg", NAME, episodes, "jpeg")
    write_hdf5(root / "hdf5" / NAME, episodes)
    for version, pictures in LEROBOT:
        if pictures == "av1" and NO_AV1:
            continue
        write_lerobot(root / f"{version}-{pictures}" / NAME, episodes, version, pictures)
    return root


def copy(written, what, tmp_path):
    return Path(shutil.copytree(written / what / NAME, tmp_path / NAME))


ALL = ["hdf5"] + [f"{version}-{pictures}" for version, pictures in LEROBOT]


@pytest.mark.parametrize("what", ALL)
def test_same_episodes_give_the_same_samples(written, episodes, what):
    if what.endswith("av1") and NO_AV1:
        pytest.skip("this PyAV cannot write AV1")
    jpeg = what == "hdf5" or what.endswith("jpeg")  # HDF5 holds raw pictures, which the official conversion stores as JPEG
    wanted, got = (open_dataset(written / name / NAME) for name in ("rlds-jpeg" if jpeg else "rlds-png", what))
    assert isinstance(got, Hdf5Dataset if what == "hdf5" else LeRobotDataset) and got.name == wanted.name == NAME
    assert got.languages == wanted.languages == [e.language for e in episodes]
    assert got.lengths.tolist() == wanted.lengths.tolist() and got.statistics == wanted.statistics
    assert got.clipped == wanted.clipped and got.unlabelled == wanted.unlabelled == 0
    assert np.array_equal(got.actions_NA, wanted.actions_NA) and np.array_equal(got.index.actions_NA, wanted.index.actions_NA)
    worst, total = 0, 0.0
    for episode, raw in enumerate(episodes):
        assert np.array_equal(got.episode(episode).actions, raw.actions)
        for frame in np.random.default_rng(0).permutation(len(raw.images)):
            a, b = got.frame(episode, frame), wanted.frame(episode, frame)
            assert a.instruction == b.instruction and np.array_equal(a.action, b.action) and a.dataset == b.dataset
            off = np.abs(a.image.astype(int) - b.image)
            worst, total = max(worst, off.max()), total + off.mean()
    print(f"{what}: largest difference of pictures {worst}, mean {total / got.num_frames:.3f}")
    if what.split("-")[-1] in LOSSY:  # 4:2:0 and quantisation, worst at the edges of the tabletop's plain shapes
        assert total / got.num_frames < 5
    else:
        assert worst == 0
    got.close(), wanted.close()


def test_the_gripper_becomes_standard_once(written, episodes):
    data = open_dataset(written / "hdf5" / NAME)
    raw, sample = episodes[0].actions[0], data.frame(0, 0)
    assert raw[-1] == -1 and sample.action[-1] == 1  # open
    assert {float(a) for a in data.actions_NA[:, -1]} == {0.0, 1.0}
    assert np.allclose(unnormalise(sample.action, data.statistics)[:6], raw[:6], atol=0.05)


def test_liberos_hdf5_is_written_and_gives_what_the_rlds_set_gives(episodes, tmp_path):
    """Two demonstrations of one task and one of another, from the same pictures, actions and robot states."""
    played, folder = [(episodes[0], "b"), (episodes[1], "KITCHEN_SCENE1_a"), (episodes[2], "b")], tmp_path / "hdf5" / NAME
    folder.mkdir(parents=True)
    for episode, task in played:
        steps, rng = len(episode.actions), np.random.default_rng(0)
        pictures = {"agentview_rgb": episode.images[:, ::-1, ::-1], "eye_in_hand_rgb": 255 - episode.images}
        append_demo(folder, task, {"bddl_file_name": "x.bddl", "problem_info": {"language_instruction": "do b"}}, Demonstration(
            episode.actions, rng.random((steps, 9)), pictures, rng.random((steps, 6)), rng.random((steps, 4)), rng.random((steps, 2)),
            rng.random((steps, 7)), {}))
    write_rlds(tmp_path / "rlds", NAME, [Episode(episodes[1].images, episodes[1].actions, "a")], image_format="jpeg")
    data, other = Hdf5Dataset(folder), open_dataset(tmp_path / "rlds" / NAME)
    assert data.languages == ["a", "b", "b"] and list(data.lengths) == [len(episodes[i].actions) for i in (1, 0, 2)]
    for frame in range(data.lengths[0]):
        assert np.array_equal(data.frame(0, frame).image, other.frame(0, frame).image)
    assert np.array_equal(data.index.actions_NA[:data.lengths[0]], other.index.actions_NA)
    with h5py.File(folder / "b_demo.hdf5") as file:
        steps = [file[f"data/demo_{i}"].attrs["num_samples"] for i in (0, 1)]
        assert file["data"].attrs["total"] == sum(steps) and file["data"].attrs["num_demos"] == 2
        demo = file["data/demo_1"]
        assert demo["robot_states"].shape == (steps[1], 9) and np.array_equal(demo.attrs["init_state"], demo["states"][0])
        assert demo["rewards"][:].tolist() == [0] * (steps[1] - 1) + [1] and demo["actions"].dtype == np.float64
    short = Demonstration(episodes[0].actions, np.zeros((1, 9)), {}, *(np.zeros((len(episodes[0].actions), 7)) for _ in range(4)), {})
    with pytest.raises(ValueError, match="demonstration of b .* other lengths are {'states': .1, 9.}"):
        append_demo(folder, "b", {}, short)


def test_an_hdf5_picture_is_what_the_evaluation_shows(written):
    """The camera's picture goes through the official get_libero_image at evaluation; training must see the same."""
    data = open_dataset(written / "hdf5" / NAME)
    with h5py.File(data._paths[1]) as file:
        camera_picture = file["data/demo_0/obs/agentview_rgb"][2]
    assert np.array_equal(images.resize_uint8(data.image(1, 2), (224, 224)), images.libero_image(camera_picture))


@pytest.mark.parametrize("what", ["hdf5", "v2.1-jpeg", "v3.0-png", "v2.1-rgb", "v3.0-rgb"])
def test_batches_order_threads_and_resume_are_those_of_rlds(written, processor, tmp_path, what):  # noqa: F811
    """Also with augmentation: every reader goes through the same decode, resize and augment."""
    options = dict(batch_size=4, seed=5, shuffle_buffer=20, image_aug=True)
    base = "rlds-jpeg" if what in ("hdf5", "v2.1-jpeg") else "rlds-png"

    def stream(name, **more):
        return BatchStream(open_datasets(written / name, [NAME], cache_dir=tmp_path), processor, **options, **more)

    wanted, got = stream(base), stream(what, workers=2)
    plain = list(itertools.islice(wanted, 20))  # more than an epoch
    state = None
    for k, batch in enumerate(plain):
        state = json.loads(json.dumps(got.state_dict())) if k == 7 else state
        mine = next(got)
        assert all(torch.equal(getattr(batch, f), getattr(mine, f)) for f in ("input_ids", "labels", "pixel_values"))
    again = stream(what)
    again.load_state_dict(state)
    assert torch.equal(next(again).pixel_values, plain[7].pixel_values)
    with pytest.raises(ValueError, match="their format"):
        stream(base).load_state_dict(state)
    assert got.datasets[0].kind == what.split("-")[0].replace("v2.1", "lerobot").replace("v3.0", "lerobot")
    assert got.describe() == [] or "are resized to the model's" in got.describe()[0]
    for item in (wanted, got, again):
        item.close()


@pytest.mark.parametrize("version,pictures", [("v21", "image"), ("v30", "image"), ("v21", "video"), ("v30", "video")])
def test_sets_that_lerobot_wrote(version, pictures, tmp_path):
    folder = tmp_path / "tabletop_lerobot"
    shutil.copytree(REFERENCE / f"{version}-{pictures}", folder)
    data = open_dataset(folder)  # two cameras; the one with the usual name is taken
    wrist = open_dataset(folder, conventions=Conventions(camera="wrist_image"))
    with np.load(REFERENCE / "episodes.npz") as given:
        assert len(data) == int(given["count"])
        for i in range(len(data)):
            episode = data.episode(i)
            assert episode.language == str(given[f"language_{i}"]) and np.array_equal(episode.actions, given[f"actions_{i}"])
            off = np.abs(episode.images.astype(int) - given[f"images_{i}"])
            negative = np.abs(wrist.episode(i).images.astype(int) - (255 - given[f"images_{i}"].astype(int)))
            assert (off.max() == negative.max() == 0) if pictures == "image" else max(off.mean(), negative.mean()) < 5


def test_loading_by_the_configuration(written, processor, tmp_path):  # noqa: F811
    for what in ("rlds-png", "hdf5", "v2.1-png", "v3.0-rgb"):
        config = DataConfig(datasets=[NAME], train_fraction=0.7, shuffle_buffer=5)
        for _ in range(2):  # the second time from the cached index
            made = make_stream(config, written / what, processor, 2, 7, cache_dir=tmp_path / what)
            assert len(made.datasets[0]) == 2 and next(made).size == 2 and len(list((tmp_path / what).iterdir())) == 1
            made.close()
    assert "data.gripper" in Config(data=DataConfig(gripper="other")).problems()[0]


def test_hdf5_order_takes_from_every_task(tmp_path):
    folder = tmp_path / "tabletop_many"
    folder.mkdir()
    for task in "ab":
        with h5py.File(folder / f"{task}_demo.hdf5", "w") as file:
            for number in (0, 2, 10, 1):  # 3 is missing, as after regeneration, where failed demonstrations are left out
                demo = file.create_group(f"data/demo_{number}")
                demo["actions"] = np.full((2, 7), number / 10)
                demo["obs/agentview_rgb"] = np.arange(384, dtype=np.uint8).reshape(2, 8, 8, 3)
    data = Hdf5Dataset(folder)
    assert data.languages == ["a", "b"] * 4
    assert [round(float(data.episode(i).actions[0, 0]) * 10) for i in range(8)] == [0, 0, 1, 1, 2, 2, 10, 10]
    assert Hdf5Dataset(folder, fraction=0.5).languages == ["a", "b"] * 2


@pytest.mark.parametrize("name,text", [
    ("pick_up_the_black_bowl_and_place_it_on_the_plate_demo", "pick up the black bowl and place it on the plate"),
    ("KITCHEN_SCENE10_close_the_top_drawer_of_the_cabinet_demo", "close the top drawer of the cabinet"),
    ("LIVING_ROOM_SCENE2_pick_up_the_soup_demo", "pick up the soup"),
    ("demo", "Put the [soup] down"), ("other", "Put the [soup] down")])
def test_languages(name, text):
    """Names as in rlds_dataset_builder and LIBERO's grab_language_from_filename; problem_info for other names."""
    for told in ("Put the [soup] down", list("Put the [soup] down"), '"Put the [soup] down"'):
        assert language_of(Path(f"{name}.hdf5"), json.dumps({"language_instruction": told})) == text
    assert language_of(Path("other.hdf5")) == ""
    with pytest.raises(ValueError, match="other.hdf5.*problem_info"):
        language_of(Path("other.hdf5"), "{}")


def test_orientation_and_camera(written, episodes, tmp_path):
    normal = open_dataset(written / "hdf5" / NAME)
    for convention in ("opengl", "opencv"):
        other = open_dataset(write_hdf5(tmp_path / convention / NAME, episodes, convention))
        assert np.array_equal(normal.image(0, 0), other.image(0, 0))
    wrist = open_dataset(written / "hdf5" / NAME, conventions=Conventions(camera="eye_in_hand_rgb", rotate=False))
    assert np.abs(wrist.image(0, 0).astype(int) - (255 - episodes[0].images[0].astype(int))).mean() < 5  # JPEG
    turned = open_dataset(written / "v2.1-png" / NAME, conventions=Conventions(rotate=True))
    assert np.array_equal(turned.image(1, 1), episodes[1].images[1][::-1, ::-1])
    plain = open_dataset(written / "v2.1-png" / NAME)
    assert turned.fingerprint() != plain.fingerprint()
    with pytest.raises(ValueError, match="no 'front'.*--data.camera"):
        open_dataset(written / "hdf5" / NAME, conventions=Conventions(camera="front"))
    with pytest.raises(ValueError, match="front.*--data.camera"):
        open_dataset(written / "v2.1-png" / NAME, conventions=Conventions(camera="front"))
    with pytest.raises(ValueError, match="steps/observation/front"):
        open_dataset(written / "rlds-png" / NAME, conventions=Conventions(camera="front"))


def test_a_gripper_that_is_standard_already_is_not_turned_round(tmp_path, episodes):
    """Converters to LeRobot differ: some keep LIBERO's -1 and +1, some write 0 and 1."""
    standard = [Episode(e.images, np.concatenate([e.actions[:, :-1], (1 - e.actions[:, -1:]) / 2], axis=1), e.language)
                for e in episodes]
    folder = write_lerobot(tmp_path / NAME, standard, "v2.1", "png")
    with pytest.raises(ValueError, match="--data.gripper standard"):
        open_dataset(folder)
    told = open_dataset(folder, conventions=Conventions(gripper="standard"))
    assert np.array_equal(told.actions_NA[:, -1], np.concatenate([e.actions[:, -1] for e in standard]))
    assert open_dataset(folder, conventions=Conventions(gripper="0/1")).actions_NA[0, -1] == 0
    with pytest.raises(ValueError, match="never come near -1.*--data.gripper standard if 1 is open or --data.gripper 0/1 if 0 is open"):
        open_dataset(folder, conventions=Conventions(gripper="libero"))
    other = Path(shutil.copytree(folder, tmp_path / "mine"))
    with pytest.raises(ValueError, match="no standardisation.*--data.gripper"):
        open_dataset(other)
    assert open_dataset(other, conventions=Conventions(gripper="standard")).name == "mine"
    raw = write_lerobot(tmp_path / "raw", episodes, "v2.1", "png")
    with pytest.raises(ValueError, match=r"\[-1, 1\] and not in \[0, 1\]"):
        open_dataset(raw, conventions=Conventions(gripper="standard"))


def test_the_content_picks_the_format(written, tmp_path):
    assert [find_format(written / what / NAME) for what in ("rlds-png", "hdf5", "v3.0-png")] == ["rlds", "hdf5", "lerobot"]
    (tmp_path / "x/videos").mkdir(parents=True)
    for folder, there in ((tmp_path / "none", "does not exist"), (tmp_path / "x", "holds videos")):
        with pytest.raises(FileNotFoundError, match=rf"{there}.*dataset_info.json.*\*.hdf5.*meta/info.json.*--data.datasets"):
            open_datasets(folder.parent, [folder.name])
    both = copy(written, "hdf5", tmp_path)
    shutil.copytree(written / "v2.1-png" / NAME / "meta", both / "meta")
    with pytest.raises(ValueError, match="several formats .hdf5, lerobot"):
        find_format(both)
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    shutil.copytree(written / "hdf5" / NAME, tmp_path / "a" / NAME)
    one = shutil.copytree(written / "v2.1-png" / NAME, tmp_path / "b" / NAME)
    assert len(open_datasets(tmp_path, [f"a/{NAME}", f"b/{NAME}"])) == 2  # equal data under one name have equal statistics
    shutil.rmtree(one)
    pictures = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    write_lerobot(one, [Episode(pictures, -np.ones((2, 7), np.float32), "x")], "v2.1", "png")
    with pytest.raises(ValueError, match="different data sets of one name"):
        open_datasets(tmp_path, [f"a/{NAME}", f"b/{NAME}"])


@pytest.mark.parametrize("what,module", [("hdf5", "h5py"), ("v2.1-png", "pyarrow"), ("v3.0-rgb", "av")])
def test_a_missing_extra_names_the_pip_command(written, monkeypatch, what, module):
    real = importlib.import_module

    def without(name, *rest):
        if name.split(".")[0] == module:
            raise ImportError(f"No module named {name!r}")
        return real(name, *rest)

    monkeypatch.setattr(index.importlib, "import_module", without)
    extra = "hdf5" if what == "hdf5" else "lerobot"
    with pytest.raises(ModuleNotFoundError, match=rf"pip install {module}, .*pip install -e .*\[{extra}\]"):
        open_dataset(written / what / NAME)
    assert isinstance(open_dataset(written / "rlds-png" / NAME), RldsDataset)  # RLDS needs none of them
    line = _check_data_set(written / what / NAME, NAME, Storage.from_config(Config()))
    assert line.status == "FAIL" and line.remedy == f"pip install {module}"


@pytest.mark.parametrize("what", ["rlds-png", "hdf5", "v2.1-rgb", "v3.0-png"])
def test_preflight_knows_the_formats(written, tmp_path, what):
    folder, storage = copy(written, what, tmp_path), Storage.from_config(Config())
    line = _check_data_set(folder, NAME, storage)
    assert line.status == "ok" and {"r": "rlds", "h": "hdf5", "v": "lerobot"}[what[0]] in line.where
    victim = next(path for path in sorted(folder.rglob("*")) if path.suffix in (".hdf5", ".parquet") or ".tfrecord" in path.name)
    victim.write_bytes(b"")
    assert "is empty" in _check_data_set(folder, NAME, storage).where
    shutil.rmtree(folder), folder.mkdir()
    assert "Looked for" in _check_data_set(folder, NAME, storage).where


def edit_hdf5(change):
    def damage(folder):
        with h5py.File(sorted(folder.glob("*.hdf5"))[1], "r+") as file:
            change(file["data/demo_0"])
    return damage


def replace(group, key, value):
    del group[key]
    group[key] = value


def cut(pattern, share=0.5):
    def damage(folder):
        path = sorted(folder.rglob(pattern))[-1]
        data = path.read_bytes()
        path.write_bytes(data[:int(len(data) * share)])
    return damage


def remove(pattern):
    return lambda folder: sorted(folder.rglob(pattern))[-1].unlink()


def edit_rows(change, pattern="data/*/*.parquet"):
    def damage(folder):
        path = sorted(folder.glob(pattern))[-1]
        pq.write_table(change(pq.read_table(path)), path)
    return damage


def edit_json(name, change):
    def damage(folder):
        path = folder / name
        info = json.loads(path.read_text())
        change(info)
        path.write_text(json.dumps(info))
    return damage


def column(name, change):
    def edited(table):
        return table.set_column(table.column_names.index(name), name, pa.array(change(table[name].to_pylist())))
    return edited


def put(at, value):
    return lambda rows: rows[:at] + [value] + rows[at + 1:]


NAN, SHORT = [0.0] * 6 + [float("nan")], [0.0] * 6
BAD = [
    ("hdf5", cut("*.hdf5"), "demo.hdf5 cannot be opened as HDF5.*copy, download or make"),
    ("hdf5", cut("*.hdf5", 0.001), "demo.hdf5 cannot be opened as HDF5"),
    ("hdf5", edit_hdf5(lambda d: d.__delitem__("actions")), r"demo.hdf5: demo_0: no 'actions' among obs"),
    ("hdf5", edit_hdf5(lambda d: d.__delitem__("obs")), r"demo_0: no 'obs' among actions"),
    ("hdf5", edit_hdf5(lambda d: d["obs"].__delitem__("agentview_rgb")), "no 'agentview_rgb' among eye_in_hand_rgb"),
    ("hdf5", edit_hdf5(lambda d: d.parent.move("demo_0", "episode_0")), "holds no demo_0, demo_1.*it holds episode_0"),
    ("hdf5", edit_hdf5(lambda d: replace(d, "actions", d["actions"][:, :6])), "demo_0: 6 action dimensions, the first .* has 7"),
    ("hdf5", edit_hdf5(lambda d: replace(d, "actions", d["actions"][:, 0])), r"demo_0: actions float64 \[\d+\]"),
    ("hdf5", edit_hdf5(lambda d: replace(d, "actions", d["actions"][:-1])), r"\d+ actions, \d+ pictures.* not make one episode"),
    ("hdf5", edit_hdf5(lambda d: d.attrs.update(num_samples=99)), "num_samples 99 do not make one episode"),
    ("hdf5", edit_hdf5(lambda d: d["actions"].__setitem__((2, 3), np.nan)), r"demo_0 \(episode 1 of .*frame 2: action .*nan"),
    ("hdf5", edit_hdf5(lambda d: replace(d, "obs/agentview_rgb", np.zeros((3, 4)))), "are no pictures"),
    ("v2.1-png", cut("*.parquet"), "parquet cannot be read as parquet"),
    ("v3.0-png", cut("file-000.parquet", 0.9), "parquet cannot be read as parquet"),
    ("v2.1-png", remove("data/*/*.parquet"), "episode_000002.parquet is missing"),
    ("v2.1-png", remove("tasks.jsonl"), "tasks.jsonl is missing"),
    ("v3.0-png", remove("tasks.parquet"), "tasks.parquet is missing"),
    ("v3.0-png", remove("meta/episodes/*/*.parquet"), "meta/episodes holds no"),
    ("v2.1-png", edit_rows(lambda t: t.drop_columns(["action"])), "no column action among"),
    ("v3.0-png", edit_rows(lambda t: t.drop_columns(["observation.images.image"])), "no column observation.images.image among"),
    ("v2.1-png", edit_rows(lambda t: t.slice(0, 5)), "episode 2 has 5 rows and meta says"),
    ("v3.0-png", edit_rows(lambda t: t.slice(0, len(t) - 1)), r"episode 2 has \d+ rows and meta says"),
    ("v2.1-png", edit_rows(column("action", put(3, NAN))), r"episode 2 \(episode 2 of .*frame 3: action .*nan.* is not finite"),
    ("v3.0-png", edit_rows(column("action", put(3, NAN))), r"episode 0 \(episode 0 of .*frame 3: action .*nan.* is not finite"),
    ("v2.1-png", edit_rows(column("action", put(4, SHORT))), r"row 4: 6 action values, and info.json says shape \[7\]"),
    ("v2.1-png", edit_rows(column("action", put(4, None))), "row 4: 0 action values"),
    ("v2.1-png", edit_rows(column("frame_index", put(1, 7))), "frame_index does not count from 0"),
    ("v3.0-png", edit_rows(column("task_index", put(1, 77))), "task_index 77 is not among the 3 tasks"),
    ("v2.1-png", edit_json("meta/info.json", lambda i: i.update(codebase_version="v1.6")), "'v1.6'; known are v2.0, v2.1, v3.0"),
    ("v2.1-png", edit_json("meta/info.json", lambda i: i.pop("features")), "info.json cannot be read .it has no 'features': write"),
    ("v2.1-png", edit_json("meta/info.json", lambda i: i["features"].pop("action")), "no feature action or actions"),
    ("v2.1-png", edit_json("meta/info.json", lambda i: i["splits"].update(train="0:9")), "split 'train' is 0:9 of 3 episodes"),
    ("v2.1-png", cut("info.json"), "info.json cannot be read"),
    ("v2.1-png", cut("episodes.jsonl"), "episodes.jsonl, line"),
    ("v2.1-rgb", remove("*.mp4"), r"lacks 1 of its 3 video files .*episode_000002.mp4"),
    ("v3.0-rgb", remove("*.mp4"), r"lacks 1 of its 1 video files .*file-000.mp4"),
    ("v2.1-rgb", cut("*.mp4"), "mp4 cannot be opened as a video"),
    ("v3.0-rgb", cut("*.mp4"), "mp4 cannot be opened as a video"),
]


@pytest.mark.parametrize("what,damage,message", BAD, ids=[f"{what}-{i}" for i, (what, _, _) in enumerate(BAD)])
def test_bad_files_are_named_when_the_set_is_opened(written, tmp_path, what, damage, message):
    folder = copy(written, what, tmp_path)
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_dataset(folder)


def test_a_video_that_is_too_short_is_found(written, tmp_path, episodes):
    folder = copy(written, "v2.1-rgb", tmp_path)
    _encode_video(sorted(folder.rglob("*.mp4"))[0], episodes[0].images[:-3], "rgb")
    with pytest.raises(ValueError, match=r"mp4 holds \d+ frames and its episodes need \d+"):
        open_dataset(folder)


@pytest.mark.parametrize("what,pattern", [
    ("hdf5", "*.hdf5"), ("v2.1-png", "data/*/*.parquet"), ("v3.0-rgb", "*.mp4"), ("v2.1-rgb", "*.mp4")])
def test_a_file_damaged_or_removed_after_indexing_is_named(written, tmp_path, what, pattern):
    folder = copy(written, what, tmp_path)
    for damage in (cut(pattern, 0.3), remove(pattern)):
        data = open_dataset(folder)
        damage(folder)
        with pytest.raises((ValueError, FileNotFoundError), match=sorted((written / what / NAME).rglob(pattern))[-1].name):
            data.image(len(data) - 1, int(data.lengths[-1]) - 1)
        data.close()
        shutil.rmtree(folder)
        copy(written, what, tmp_path)


def test_pictures_of_parquet_are_kept_within_bounds(written, episodes, monkeypatch):
    monkeypatch.setattr(parquet_pictures, "_PICTURE_BYTES", 20_000)
    data = open_dataset(written / "v3.0-png" / NAME)
    for episode in (0, 2, 1):
        assert np.array_equal(data.episode(episode).images, episodes[episode].images)
    assert len(data._pictures._groups) < 4 and data._pictures._bytes <= 20_000


def test_unlabelled_episodes_and_splits(tmp_path, episodes):
    unlabelled = [episodes[0], Episode(episodes[1].images, episodes[1].actions, ""), episodes[2]]
    folder = write_lerobot(tmp_path / NAME, unlabelled, "v3.0", "png")
    data = open_dataset(folder)
    assert (len(data), data.unlabelled, data.statistics["num_trajectories"]) == (2, 1, 3)
    edit_json("meta/info.json", lambda i: i.update(splits={"train": "1:3", "val": "0:1"}))(folder)
    train, val = LeRobotDataset(folder), LeRobotDataset(folder, "val")
    assert train.languages == [episodes[2].language] and val.languages == [episodes[0].language]
    assert np.array_equal(train.image(0, 1), episodes[2].images[1]) and train.statistics == val.statistics
    with pytest.raises(ValueError, match="no split 'test'"):
        LeRobotDataset(folder, "test")
