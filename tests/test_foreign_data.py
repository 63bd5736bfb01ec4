"""Data sets as others have them: kinds of trouble after public reports, which the tests name. Each is refused with a remedy, or done."""

import gzip
import json
import shlex

import numpy as np
import pytest
from test_data_formats import FPS, NAME, copy, edit_json, episodes, written  # noqa: F401  (fixtures)

from vlakeep.data import card
from vlakeep.data.conventions import FILE
from vlakeep.data.dataset import Conventions
from vlakeep.data.formats import find_format, open_dataset
from vlakeep.data.images import encode_jpeg, encode_png, may_be_of_one_colour, of_one_colour
from vlakeep.data.sample import Episode
from vlakeep.data.tfrecord import RecordWriter, parse_example, read_records, write_example
from vlakeep.data.writer import write_rlds

h5py, av = pytest.importorskip("h5py"), pytest.importorskip("av")


def rlds(folder, texts=("open it",) * 3, change=None, size=64):
    """A set of three episodes, the features of each through `change(number, features)`."""
    rng = np.random.default_rng(0)
    actions = np.where(np.arange(7) == 6, np.where(np.arange(8) < 4, -1, 1)[:, None], rng.uniform(-1, 1, (8, 7))).astype(np.float32)
    made = [Episode(rng.integers(0, 256, (8, size, size, 3), dtype=np.uint8), actions, text) for text in texts]
    version = write_rlds(folder, NAME, made)
    shard, = version.glob("*.tfrecord*")
    if change:
        whole = [parse_example(payload) for _, payload in read_records(shard)]
        shard.unlink()
        with RecordWriter(shard) as writer:
            for number, one in enumerate(whole):
                features = {name: f.bytes() if f.kind == "bytes" else f.floats() if f.kind == "float" else f.ints()
                            for name, f in one.items()}
                change(number, features)
                writer.write(write_example(features))
    return version, shard


def test_what_git_leaves_without_lfs_is_no_data(tmp_path):
    """moojink/openvla-oft issues 3 and 87."""
    version, shard = rlds(tmp_path / "a root")
    shard.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(ValueError, match=f"1 of the 1 files of {NAME} are git-lfs pointers") as error:
        open_dataset(version, skip_bad=True)
    assert shlex.split(str(error.value).split("`")[1]) == ["git", "-C", str(version), "lfs", "pull"]


def test_compressed_records_are_told(tmp_path):
    """tensorflow issue 13463: only such a file is corrupt at its beginning."""
    version, shard = rlds(tmp_path)
    shard.write_bytes(gzip.compress(shard.read_bytes()))
    with pytest.raises(ValueError, match="it is compressed, which is not read"):
        open_dataset(version)


def test_a_video_of_depth_is_no_picture(written, tmp_path):  # noqa: F811
    """huggingface/lerobot pull 3644: depth in 12 bits of grey, and is_depth_map in info.json."""
    folder = copy(written, "v2.1-rgb", tmp_path)
    for path in folder.rglob("*.mp4"):
        frames = round(len(open_dataset(written / "v2.1-rgb" / NAME).index.actions_NA))
        with av.open(str(path), "w", format="matroska") as out:
            stream = out.add_stream("ffv1", rate=FPS)
            stream.width, stream.height, stream.pix_fmt = 64, 64, "gray16le"
            for t in range(frames):
                picture = (np.arange(64 * 64) * 15 + t).reshape(64, 64).astype(np.uint16)
                out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="gray16le")))
            out.mux(stream.encode())
    with pytest.raises(ValueError, match=r"more than 8 bits of grey \(gray16le\).*--data.camera"):
        open_dataset(folder)
    camera = "observation.images.image"
    folder = copy(written, "v2.1-png", tmp_path / "flag")
    edit_json("meta/info.json", lambda info: info["features"].update(
        {"observation.images.front": {**info["features"][camera], "info": {"is_depth_map": True}}}))(folder)
    assert open_dataset(folder).index.places  # the colour camera is the only one
    with pytest.raises(ValueError, match="front names none or several .observation.images.front: depth, is_depth_map"):
        open_dataset(folder, conventions=Conventions(camera="front"))


@pytest.mark.parametrize("encode", [encode_png, encode_jpeg])
@pytest.mark.parametrize("grey", [0, 255])
def test_episodes_that_show_nothing_are_found(tmp_path, encode, grey):
    """robocasa issue 49 (some episodes are black), open_x_embodiment issue 85 (all are)."""
    def black(number, features, which=(1,)):
        if number in which:
            features["steps/observation/image"] = [encode(np.full((64, 64, 3), grey, np.uint8))] * 8
        elif number == 2:  # the first picture alone, which happens
            features["steps/observation/image"][0] = encode(np.full((64, 64, 3), grey, np.uint8))

    version, shard = rlds(tmp_path / "some", change=black)
    with pytest.raises(ValueError, match=f"{shard.name}: record 1 .*the first, the middle and the last picture are of one colour.*camera:"):
        open_dataset(version)
    with open_dataset(version, skip_bad=True) as data:
        assert [data.number(e) for e in range(len(data))] == [0, 2]
        assert any("1 of 6 pictures looked at are of one colour" in note for note in card.look_at(data)["notes"])
    with pytest.raises(ValueError, match="of one colour(.|\n)*The other 2 entries"):
        open_dataset(rlds(tmp_path / "all", change=lambda n, f: black(n, f, (0, 1, 2)))[0], skip_bad=True)


def test_a_plain_picture_is_told_by_its_bytes_without_decoding_others():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    flat = np.full((480, 640, 3), 7, np.uint8)
    flat[:, :, 1] = 90
    dot = flat.copy()
    dot[5, 5] = 0
    for encode in (encode_png, encode_jpeg):
        assert may_be_of_one_colour(encode(flat)) and not may_be_of_one_colour(encode(noise))
    assert of_one_colour([flat, flat + 1]) and not of_one_colour([flat, dot])
    assert not may_be_of_one_colour(b"\xff\xd8 none") and not may_be_of_one_colour(b"\x89PNG")


def test_several_texts_a_frame_are_never_guessed(tmp_path):
    """OpenFly-Platform issue 39: nine instructions a step."""
    def several(number, features):
        features["steps/language_instruction"] = [b"open it", b"please open it", "打开它".encode()] * 8

    version, _ = rlds(tmp_path, change=several)
    with pytest.raises(ValueError, match=f"holds 3 texts a frame, .*please open it.*{FILE}, such as `text: language_instruction.0.`"):
        open_dataset(version)
    for number, text in enumerate(("open it", "please open it", "打开它")):
        (version.parent / FILE).write_text(f"text: language_instruction[{number}]\n")
        with open_dataset(version) as data:
            assert data.languages == [text] * 3 and data.index.texts == [text]
    (version.parent / FILE).write_text("text: language_instruction[3]\n")
    with pytest.raises(ValueError, match="holds 3 texts a frame"):
        open_dataset(version)


def test_texts_that_stand_in_for_one_are_told(tmp_path):
    """open_x_embodiment issue 16."""
    with open_dataset(rlds(tmp_path, ("None", "open the none", "dummy instruction"))[0]) as data:
        note, = (note for note in card.look_at(data)["notes"] if "stands in" in note)
    assert note.startswith("16 frames have a text that stands in for one, 'None', 'dummy instruction'")


def write_demos(path, names, pictures=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        for number, name in enumerate(names):
            actions = rng.uniform(-1, 1, (6, 7))
            actions[:, -1] = np.where(np.arange(6) < 3, -1, 1)
            actions[0, 0] = number / 10
            file[f"{name}/actions"] = actions
            file[f"{name}/obs/agentview_rgb"] = rng.integers(0, 256, (6, 16, 16, 3), dtype=np.uint8) if pictures is None else pictures
    return path.parent


def test_other_layouts_of_hdf5_are_told_what_is_read(tmp_path):
    """ManiSkill (traj_0 at the top), ALOHA (one file an episode; human-policy issue 11: JPEG in padded rows)."""
    for name, keys in (("maniskill", ["traj_0", "traj_1"]), ("aloha", ["observations"])):
        with pytest.raises(ValueError, match="no 'data' among .*data/demo_0/actions, data/demo_0/obs/CAMERA.*convert them to RLDS"):
            open_dataset(write_demos(tmp_path / name / "libero_x" / "x_demo.hdf5", keys))
    folder = write_demos(tmp_path / "jpeg" / "libero_x" / "x_demo.hdf5", ["data/demo_0"], np.zeros((6, 500), np.uint8))
    with pytest.raises(ValueError, match="are no pictures.*three channels of 8 bits, decoded"):
        open_dataset(folder)


def test_demonstrations_are_read_by_their_own_names(tmp_path):
    """Numbers with zeros in front; order, actions and pictures are those of plain ones."""
    plain = open_dataset(write_demos(tmp_path / "a" / "libero_x" / "x_demo.hdf5", ["data/demo_2", "data/demo_0", "data/demo_10"]))
    zeros = open_dataset(write_demos(tmp_path / "b" / "libero_x" / "x_demo.hdf5", ["data/demo_0002", "data/demo_0000", "data/demo_0010"]),
                         cache_dir=tmp_path)
    again = open_dataset(zeros.folder, cache_dir=tmp_path)  # from the kept index
    for data in (zeros, again):
        assert np.array_equal(plain.index.actions_NA, data.index.actions_NA)
        assert all(np.array_equal(plain.image(e, 3), data.image(e, 3)) for e in range(3))
        data.close()
    assert np.allclose(plain.index.actions_NA[::6, 0], [0.1, 0, 0.2])
    with pytest.raises(ValueError, match="two groups of one number among demo_01, demo_1"):
        open_dataset(write_demos(tmp_path / "c" / "libero_x" / "x_demo.hdf5", ["data/demo_1", "data/demo_01"]))


def test_pictures_that_are_turned_without_being_asked_for_are_told(tmp_path):
    """robomimic's stand upright and are called agentview_image, LIBERO's on their heads and agentview_rgb."""
    folder = write_demos(tmp_path / "libero_x" / "x_demo.hdf5", ["data/demo_0", "data/demo_1"])
    with h5py.File(folder / "x_demo.hdf5", "r+") as file:
        for demo in file["data"].values():
            demo.copy("obs/agentview_rgb", "obs/agentview_image")

    def told(**conventions):
        report = card.look_at(open_dataset(folder, conventions=Conventions(**conventions)))
        return [note for note in report["notes"] if "turned" in note], any("turned by 180" in line for line in card.lines(report)[:2])

    (note,), line = told(camera="agentview_image")
    assert line and "agentview_image are turned by 180 degrees" in note and "rotate: false" in note
    assert told() == ([], True) and told(camera="agentview_image", rotate=True) == ([], True)
    assert told(camera="agentview_image", rotate=False) == ([], False)


def test_demonstrations_that_show_nothing_are_found(tmp_path):
    folder = write_demos(tmp_path / "libero_x" / "x_demo.hdf5", ["data/demo_0", "data/demo_1"])
    with h5py.File(folder / "x_demo.hdf5", "r+") as file:
        file["data/demo_1/obs/agentview_rgb"][:] = 0
    with pytest.raises(ValueError, match="demo_1/obs/agentview_rgb: the first, the middle and the last picture are of one colour"):
        open_dataset(folder)
    assert len(open_dataset(folder, skip_bad=True)) == 1


def test_a_set_one_folder_too_deep_is_named(tmp_path):
    rlds(tmp_path / "my sets")
    with pytest.raises(FileNotFoundError, match="no data set at .*, but one in") as error:
        find_format(tmp_path / "my sets")
    assert f"'[my sets/{NAME}]'" in str(error.value) and find_format(tmp_path / "my sets" / NAME) == "rlds"


def test_a_missing_split_is_told_what_to_write(written, tmp_path):  # noqa: F811
    folder = copy(written, "v3.0-png", tmp_path)
    edit_json("meta/info.json", lambda info: info.update(splits={"val": "0:3"}))(folder)
    with pytest.raises(ValueError, match="has no split 'train', only val; write it to `splits`") as error:
        open_dataset(folder)
    said = "{" + str(error.value).partition("such as ")[2] + "}"
    edit_json("meta/info.json", lambda info: info.update(splits=json.loads(said)))(folder)
    assert len(open_dataset(folder)) == 3


@pytest.mark.parametrize("lengths", [[float("inf")], [4294967295], [9.2e18], [-1]])
def test_a_damaged_number_of_episodes_becomes_no_list_of_that_length(tmp_path, lengths):
    version, _ = rlds(tmp_path)
    info = json.loads((version / "dataset_info.json").read_text())
    info["splits"][0]["shardLengths"] = lengths
    (version / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(ValueError, match="dataset_info.json cannot be read"):
        open_dataset(version, skip_bad=True)


def test_names_that_are_no_text_and_videos_of_no_codec_are_damaged_files(written, tmp_path):  # noqa: F811
    folder = copy(written, "v3.0-png", tmp_path)
    path, = (folder / "meta/episodes").rglob("*.parquet")
    path.write_bytes(path.read_bytes().replace(b"length", b"len\xe5th"))
    with pytest.raises(ValueError, match=f"{path.name} cannot be read as parquet .*utf-8"):
        open_dataset(folder)
    folder = copy(written, "v2.1-rgb", tmp_path / "video")
    for video in folder.rglob("*.mp4"):
        video.write_bytes(video.read_bytes().replace(b"avc1", b"\0\0\0\1"))
    with pytest.raises(ValueError, match="cannot be opened as a video .no decoder for it, or no time base"):
        open_dataset(folder)
