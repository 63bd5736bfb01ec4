"""Data sets as others have them: kinds of trouble after public reports, which the tests name. Each is refused with a remedy, or done."""

import gzip
import json
import shlex
import struct

import numpy as np
import pytest
from test_data_formats import FPS, NAME, _encode_video, copy, edit_json, episodes, write_lerobot, written  # noqa: F401  (fixtures)

from vlakeep.data import card, hdf5, lerobot
from vlakeep.data.conventions import FILE
from vlakeep.data.dataset import Conventions
from vlakeep.data.formats import find_format, open_dataset
from vlakeep.data.images import encode_jpeg, encode_png, may_be_of_one_colour, of_one_colour
from vlakeep.data.sample import Episode
from vlakeep.data.suggest import at_ends_only, ready_card
from vlakeep.data.tfrecord import RecordWriter, parse_example, read_records, write_example
from vlakeep.data.writer import write_rlds

h5py, av = pytest.importorskip("h5py"), pytest.importorskip("av")
pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")


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


def test_texts_that_are_no_utf8_are_refused(tmp_path):
    """Replaced letter by letter, two instructions in GBK may become one, and the model learns signs that nobody types."""
    def gbk(number, features):
        features["steps/language_instruction"] = ["打开它".encode("gbk") if number == 1 else "\ufffdffne es".encode()] * 8

    version, shard = rlds(tmp_path, change=gbk)
    with pytest.raises(ValueError, match=f"{shard.name}: record 1: the text .* is no UTF-8; write the set's texts as UTF-8"):
        open_dataset(version)
    with open_dataset(version, skip_bad=True) as data:
        assert [data.number(e) for e in range(len(data))] == [0, 2]
        note, = (note for note in card.look_at(data)["notes"] if "U+FFFD" in note)
        assert note.startswith("1 texts hold U+FFFD")
    folder = write_demos(tmp_path / "libero_x" / "x.hdf5", ["data/demo_0"])
    (folder / FILE).write_text("text: words\n")
    with h5py.File(folder / "x.hdf5", "r+") as file:
        file["data/demo_0"].attrs["words"] = np.bytes_("打开它".encode("gbk"))
    with pytest.raises(ValueError, match="demo_0: the text .* is no UTF-8"):
        open_dataset(folder)


def test_a_quaternion_is_no_gripper(tmp_path):
    """openvla issue 102; flower_vla_calvin issue 18 (position, quaternion, gripper, end): seven values of a pose without a gripper."""
    def pose(number, features):
        angle = np.linspace(0.1, 1.2, 8)
        actions = features["steps/action"].reshape(8, 7).copy()
        actions[:, 3:] = np.stack([0 * angle, 0 * angle, np.sin(angle), np.cos(angle)], axis=1)
        features["steps/action"] = actions.reshape(-1)

    def still(number, features):  # no rotation, and a gripper of -1 and 1: length 1 all the time, too
        actions = features["steps/action"].reshape(8, 7).copy()
        actions[:, 3:6] = 0
        features["steps/action"] = actions.reshape(-1)

    def problems(name, change, gripper):
        with open_dataset(rlds(tmp_path / name, change=change)[0], conventions=Conventions(gripper=gripper)) as data:
            return [one for one in card.look_at(data)["problems"] if "quaternion" in one]

    problem, = problems("pose", pose, "standard")
    assert problem.startswith("dimensions 3 to 6 have length 1") and "and 6 is read as a gripper" in problem
    assert "declare `quaternion: [3, 4, 5, 6]`" in problem
    assert problems("still", still, "libero") == [] and problems("plain", None, "libero") == []


def test_a_flag_that_an_episode_ends_is_no_gripper():
    """open_x_embodiment issue 17: terminate_episode."""
    actions_NA = np.random.default_rng(0).uniform(-1, 1, (20, 8)).astype(np.float32)
    actions_NA[:, 6], actions_NA[:, 7] = np.arange(20) % 10 < 5, np.arange(20) % 10 == 9
    start_E = np.array([0, 10, 10, 20])
    assert at_ends_only(actions_NA, start_E) == [7] and at_ends_only(actions_NA[:1], np.array([0, 1])) == []
    offered = ready_card(actions_NA, start_E)
    assert "{dimension: 6, open: 1, closed: 0}" in offered and "arms" not in offered
    assert "# dimension 7 changes in the last frame of episodes only" in offered


def test_files_that_a_file_leads_to_are_part_of_it(tmp_path):
    """Sets that were put together by links: of a changed target the old labels stayed, and of a missing one HDF5 reads zeros."""
    store = write_demos(tmp_path / "store" / "all.hdf5", ["data/demo_0", "data/demo_1"])
    folder, cache = tmp_path / "libero_x", tmp_path / "cache"
    folder.mkdir()
    with h5py.File(folder / "x_demo.hdf5", "w") as file:
        file["data/demo_0"] = h5py.ExternalLink("../store/all.hdf5", "/data/demo_0")
        layout = h5py.VirtualLayout((6, 7), "f8")
        layout[:] = h5py.VirtualSource("../store/all.hdf5", "data/demo_1/actions", (6, 7))
        file.create_virtual_dataset("data/demo_1/actions", layout, fillvalue=0)
        file["data/demo_1/obs"] = h5py.ExternalLink("../store/all.hdf5", "/data/demo_1/obs")
    before = open_dataset(folder, cache_dir=cache)
    before.close()
    with h5py.File(store / "all.hdf5", "r+") as file:
        for demo in file["data"].values():
            demo["actions"][:, 0] *= 0.5
    after = open_dataset(folder, cache_dir=cache)
    after.close()
    assert np.array_equal(after.index.actions_NA[:, 0], before.index.actions_NA[:, 0] * 0.5) and after.index.key != before.index.key
    (store / "all.hdf5").rename(store / "moved.hdf5")
    with pytest.raises(ValueError, match="demo_0' is a link to filename ../store/all.hdf5, path /data/demo_0, which is not there"):
        open_dataset(folder, cache_dir=cache)
    for key in ("actions", "obs/agentview_rgb"):  # pictures and actions of a virtual array
        with h5py.File(folder / "x_demo.hdf5", "w") as file, h5py.File(store / "moved.hdf5") as real:
            for name, demo in real["data"].items():
                real.copy(demo, file.require_group("data"), name)
            shape, kind = file[f"data/demo_1/{key}"].shape, file[f"data/demo_1/{key}"].dtype
            del file[f"data/demo_1/{key}"]
            layout = h5py.VirtualLayout(shape, kind)
            layout[:] = h5py.VirtualSource("../store/all.hdf5", f"data/demo_1/{key}", shape)
            file.create_virtual_dataset(f"data/demo_1/{key}", layout, fillvalue=0)
        with pytest.raises(ValueError, match=r"demo_1: the values of \w+ lie in .*all.hdf5, which is not there"):
            open_dataset(folder, cache_dir=cache)
    assert len(open_dataset(folder, cache_dir=cache, skip_bad=True)) == 1
    (store / "moved.hdf5").rename(store / "all.hdf5")
    assert len(open_dataset(folder, cache_dir=cache)) == 2  # what was not there is not remembered as missing


def test_what_hdf5_cannot_read_here_is_told_apart_from_damage(tmp_path, monkeypatch):
    """h5py issues 2294 (filters), 1066 and 1101 (locks)."""
    folder = write_demos(tmp_path / "libero_x" / "x_demo.hdf5", ["data/demo_0", "data/demo_1"])
    with h5py.File(folder / "x_demo.hdf5", "r+") as file:
        made = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        made.set_chunk((6, 7))
        made.set_filter(300, h5py.h5z.FLAG_OPTIONAL, ())  # of those that are nobody's
        del file["data/demo_1/actions"]
        h5py.h5d.create(file["data/demo_1"].id, b"actions", h5py.h5t.NATIVE_DOUBLE, h5py.h5s.create_simple((6, 7)), dcpl=made)
    with pytest.raises(ValueError, match="demo_1: actions is compressed by the filter .*300.*pip install hdf5plugin, or .*h5repack"):
        open_dataset(folder)
    assert len(open_dataset(folder, skip_bad=True)) == 1

    def locked(*args):
        raise OSError("[Errno 11] Unable to synchronously open file (unable to lock file, errno = 11)")

    monkeypatch.setattr(h5py, "File", locked)
    with pytest.raises(ValueError, match="unable to lock file.*wait for what writes to it.*export HDF5_USE_FILE_LOCKING=FALSE") as error:
        hdf5._open(folder / "x_demo.hdf5")
    assert "copy, download" not in str(error.value)


CAMERA = "observation.images.image"


def with_cells(folder, change):
    """Pictures of the second episode through change(list of cells)."""
    path = sorted(folder.rglob("*.parquet"))[1]
    table = pq.read_table(path)
    cells = change(table[CAMERA].to_pylist())
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(table.set_column(table.schema.get_field_index(CAMERA), CAMERA, pa.array(cells, kind)), path)


@pytest.mark.parametrize("what, words", [
    ("null", "row 5: the row of .* holds no picture"), ("empty", "row 5: 0 bytes of .* neither JPEG nor PNG"),
    ("webp", "row 5: .* neither JPEG nor PNG .*RIFF.*write them as one of these"), ("path", "row 5: .*frame_5.png is missing"),
    ("black", "episode 1: the first, the middle and the last picture of .* are of one colour")])
def test_pictures_of_lerobot_are_looked_at_when_the_set_is_opened(written, tmp_path, what, words):  # noqa: F811
    """As those of RLDS and HDF5 are; a training ended at the step that drew them, with --data.skip_bad too."""
    folder, cache = copy(written, "v2.1-png", tmp_path), tmp_path / "cache"

    def change(cells):
        cell = {"null": None, "empty": {"bytes": b"", "path": None}, "webp": {"bytes": b"RIFF\0\0\0\0WEBP", "path": None},
                "path": {"bytes": None, "path": "images/frame_5.png"}}.get(what)
        black = {"bytes": encode_png(np.zeros((64, 64, 3), np.uint8)), "path": None}
        return [black] * len(cells) if what == "black" else [cell if row == 5 else one for row, one in enumerate(cells)]

    with_cells(folder, change)
    with pytest.raises(ValueError, match=words):
        open_dataset(folder, cache_dir=cache)
    with open_dataset(folder, cache_dir=cache, skip_bad=True) as data:
        assert [data.number(e) for e in range(len(data))] == [0, 2] and len(data.left_out) == 1
    if what == "path":
        (folder / "images").mkdir()
        (folder / "images/frame_5.png").write_bytes(encode_png(np.eye(64, dtype=np.uint8)[..., None] * np.uint8([9, 9, 9])))
        with open_dataset(folder, cache_dir=cache) as data:
            assert len(data) == 3 and data.image(1, 5).max() == 9


def test_what_lies_behind_a_linked_folder_is_seen(written, tmp_path):  # noqa: F811
    """Chunks on another disk: of files that had changed there, the old labels stayed."""
    folder, cache = copy(written, "v2.1-png", tmp_path), tmp_path / "cache"
    (folder / "data/chunk-000").rename(tmp_path / "disk")
    (folder / "data/chunk-000").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "again").symlink_to(folder / "data")  # a loop
    before = open_dataset(folder, cache_dir=cache).index.actions_NA
    for path in sorted((tmp_path / "disk").glob("*.parquet")):
        table = pq.read_table(path)
        halved = (np.array(table["action"].to_pylist(), np.float32) * np.float32([.5, 1, 1, 1, 1, 1, 1])).tolist()
        column = pa.array(halved, pa.list_(pa.float32()))
        pq.write_table(table.set_column(table.schema.get_field_index("action"), "action", column), path)
    after = open_dataset(folder, cache_dir=cache).index.actions_NA
    assert np.array_equal(after[:, 0], before[:, 0] * np.float32(0.5)) and np.array_equal(after[:, 1:], before[:, 1:])


def test_chunks_that_lerobot_holds_as_lists_of_lists(written, tmp_path):  # noqa: F811
    """huggingface/lerobot issue 2445: features of two dimensions."""
    plain, folder = open_dataset(written / "v2.1-png" / NAME), copy(written, "v2.1-png", tmp_path)

    def set_shape(shape):
        edit_json("meta/info.json", lambda info: info["features"]["action"].update(shape=shape))(folder)

    for path in sorted(folder.rglob("*.parquet")):
        table = pq.read_table(path)
        rows = table["action"].to_pylist()
        ahead = [[rows[min(t + j, len(rows) - 1)] for j in range(4)] for t in range(len(rows))]
        column = pa.array(ahead, pa.list_(pa.list_(pa.float32())))
        pq.write_table(table.set_column(table.schema.get_field_index("action"), "action", column), path)
    set_shape([4, 7])
    with pytest.raises(ValueError, match="an action has 28 values(.|\n)*width: 7\nchunk: 4"):
        open_dataset(folder)
    (folder / FILE).write_text("width: 7\nchunk: 4\ngrippers: [{dimension: 6, open: -1, closed: 1}]\n")
    with open_dataset(folder) as data:
        assert np.array_equal(data.index.actions_NA, plain.index.actions_NA) and np.array_equal(data.actions_NA, plain.actions_NA)
    set_shape([7, 4])
    with pytest.raises(ValueError, match=r"actions have the shape \[4, 7\], and info.json says \[7, 4\]; correct it there"):
        open_dataset(folder)


def test_marks_of_the_byte_order_are_read_over_and_missing_keys_named(written, tmp_path):  # noqa: F811
    folder, (version, _) = copy(written, "v2.1-png", tmp_path), rlds(tmp_path / "rlds")
    for path in (folder / "meta/info.json", folder / "meta/tasks.jsonl", version / "dataset_info.json"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert len(open_dataset(folder)) == len(open_dataset(version)) == 3
    info = json.loads((folder / "meta/info.json").read_text(encoding="utf-8-sig"))
    del info["fps"]
    (folder / "meta/info.json").write_text(json.dumps(info))
    with pytest.raises(ValueError, match="info.json cannot be read .it has no 'fps': write it there"):
        open_dataset(folder)


def test_features_of_another_kind_are_named(tmp_path):
    """Encoded tensors as the action, and an embedding as the text."""
    def encoded(number, features):
        features["steps/action"] = [b"\0" * 28] * 8

    def embedded(number, features):
        features["steps/language_instruction"] = np.zeros(8 * 512, np.float32)

    with pytest.raises(ValueError, match="'steps/action' holds texts and no numbers; name the keys of numbers with `actions:`"):
        open_dataset(rlds(tmp_path / "a", change=encoded)[0])
    version, _ = rlds(tmp_path / "b", change=embedded)
    with pytest.raises(ValueError, match="'steps/language_instruction' holds numbers and no text; .*`text:`.*`instruction: WORDS`"):
        open_dataset(version)
    (version.parent / FILE).write_text("instruction: open it\n")
    with open_dataset(version) as data:
        assert data.languages == ["open it"] * 3


def test_a_value_that_no_robot_says_is_damage(tmp_path):
    """Its square is no float32: the spread became infinite, which JSON does not know."""
    def huge(number, features):
        actions = features["steps/action"].copy()
        actions[9] = 1e30 if number == 1 else actions[9]
        features["steps/action"] = actions

    version, _ = rlds(tmp_path, change=huge)
    with pytest.raises(ValueError, match="record 1 .*frame 1: action .* is beyond 1e.15"):
        open_dataset(version)
    assert np.isfinite(open_dataset(version, skip_bad=True).statistics["action"]["std"]).all()


@pytest.mark.parametrize("times, words", [
    (np.arange(8) / FPS + 0.2, "the video begins at 0.200 s and not at 0: write it again from 0 s .ffmpeg"),
    (np.arange(8) / FPS + 0.3 * (np.arange(8) > 3), "lacks frames there or pauses: leave the episode out"),
    (np.arange(8) / 13, "`fps` of meta/info.json is 10, the video has 13: make both the same")])
def test_why_a_video_does_not_fit_its_table(written, times, words):  # noqa: F811
    """huggingface/lerobot issues 933, 2364 and 2814; containers such as MPEG-TS, which do not begin at 0."""
    info = lerobot.read_info(written / "v2.1-rgb" / NAME)
    with pytest.raises(ValueError, match=words):
        lerobot._check_video(info, lerobot._Place(0, 8, (0, 0), (0, 0), 0.0), times, np.arange(8) / FPS)


def test_the_camera_that_is_looked_through_is_said(written, tmp_path):  # noqa: F811
    """Chosen by its name where nobody says which."""
    for folder, camera in ((written / "v2.1-png" / NAME, CAMERA), (written / "hdf5" / NAME, "agentview_rgb"),
                           (written / "rlds-png" / NAME, "image")):
        with open_dataset(folder) as data:
            assert card.lines(card.look_at(data))[1].strip().startswith(f"camera {camera}: 64 x 64")


def test_too_few_frames_are_not_blamed_on_a_gripper(tmp_path):
    def one_step(number, features):
        for name in [name for name in features if name.startswith("steps/")]:
            features[name] = features[name][:len(features[name]) // 8]
        features["steps/action"] = features["steps/action"] * np.float32([number + 1] * 6 + [1])

    with open_dataset(rlds(tmp_path, change=one_step)[0]) as data:
        problems = card.look_at(data)["problems"]
    assert problems and all("3 frames are too few for quantiles: add episodes" in problem for problem in problems)


@pytest.mark.parametrize("what", ["v2.1-png", "v3.0-png"])
def test_two_texts_of_one_task_are_refused(written, tmp_path, what):  # noqa: F811
    """ROBOTIS physical_ai_tools pull 78: a merge that numbered the tasks of both sets from 0. The last text was taken for all."""
    folder = copy(written, what, tmp_path)
    data = open_dataset(folder)
    text, number = data.index.texts[0], len(data.index.texts)
    if what.startswith("v2"):
        path = folder / "meta/tasks.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    else:
        path = folder / "meta/tasks.parquet"
        rows = pq.read_table(path).to_pylist()

    def write(more):
        if what.startswith("v2"):
            path.write_text("\n".join(json.dumps(row) for row in [*rows, *more]))
        else:
            pq.write_table(pa.Table.from_pylist([*rows, *more]), path)

    write([dict(row) for row in rows])  # the same once more changes nothing
    assert open_dataset(folder).index.texts[:number] == data.index.texts
    for more in ([{"task_index": 0, "task": "another"}], [{"task_index": 0, "task": ""}]):
        write(more)
        with pytest.raises(ValueError, match=f"{path.name}: task 0 has two texts, {text!r} and .*a number of its own"):
            open_dataset(folder, skip_bad=True)


def numbered(count, first=0, size=64):
    """uint8 [count, size, size, 3]: pictures whose left half tells their number, with a light corner on the upper left."""
    frames = np.full((count, size, size, 3), 30, np.uint8)
    frames[:, :, :size // 2] = (10 + 12 * (first + np.arange(count)))[:, None, None, None]
    frames[:, :8, :8] = 255
    return frames


def number_of(picture):
    return round((float(picture[40:, 4:20].mean()) - 10) / 12)


def video_set(folder, version, count=3, steps=6):
    made = [Episode(numbered(steps, 2 * i), np.random.default_rng(i).uniform(-1, 1, (steps, 7)).astype(np.float32), "do it")
            for i in range(count)]
    for one in made:
        one.actions[:, 6] = np.arange(steps) > 2
    return made, write_lerobot(folder / f"tabletop_{version}", made, version, "rgb")


def test_a_video_with_the_frames_of_a_discarded_take_is_refused(tmp_path):
    """huggingface/lerobot issue 4109: they come before those of the episode, so that each picture had the action of another."""
    made, folder = video_set(tmp_path, "v2.1")
    video = sorted(folder.rglob("*.mp4"))[1]
    _encode_video(video, np.concatenate([numbered(5, 9), made[1].images]), "rgb")
    with pytest.raises(ValueError, match="episode 1 has 11 frames there and 6 rows.*discarded take.*spare_frames: end"):
        open_dataset(folder)
    with open_dataset(folder, skip_bad=True) as data:
        assert [data.number(e) for e in range(len(data))] == [0, 2] and number_of(data.image(1, 3)) == 7
    _encode_video(video, np.concatenate([made[1].images, numbered(5, 9)]), "rgb")
    (folder / FILE).write_text("spare_frames: end\n")
    with open_dataset(folder) as data:
        assert [number_of(data.image(1, t)) for t in range(6)] == [2, 3, 4, 5, 6, 7]
    (folder / FILE).write_text("spare_frames: begin\n")
    with pytest.raises(ValueError, match="spare_frames: must be end"):
        open_dataset(folder)


@pytest.mark.parametrize("frames, fits", [(6, True), (7, True), (8, False), (4, False)])
def test_an_episode_is_as_long_in_its_video_as_in_its_table(tmp_path, frames, fits):
    """v3.0 says in meta when each episode ends in the file."""
    made, folder = video_set(tmp_path, "v3.0")
    path, = folder.glob("meta/episodes/*/*.parquet")
    rows = pq.read_table(path).to_pylist()
    camera = "videos/observation.images.image/"
    for i, row in enumerate(rows):
        row[camera + "to_timestamp"] = row[camera + "from_timestamp"] + (frames if i == 1 else 6) / FPS
    pq.write_table(pa.Table.from_pylist(rows), path)
    if fits:
        assert len(open_dataset(folder)) == 3
    else:
        with pytest.raises(ValueError, match=f"episode 1 has {frames} frames there and 6 rows"):
            open_dataset(folder)


def test_a_video_that_was_cut_without_encoding_is_read_from_its_beginning(tmp_path):
    """huggingface/lerobot issue 4025: frames before the cut stay in the file and are not shown."""
    made, folder = video_set(tmp_path, "v2.1")
    video, whole = sorted(folder.rglob("*.mp4"))[1], tmp_path / "whole.mp4"
    _encode_video(whole, np.concatenate([numbered(8, 9), made[1].images]), "rgb")  # the fifth is a key frame
    with av.open(str(whole)) as source, av.open(str(video), "w") as out:
        stream = source.streams.video[0]
        target = getattr(out, "add_stream_from_template", lambda template: out.add_stream(template=template))(stream)
        late = int(8 / FPS / stream.time_base)
        for packet in source.demux(stream):
            if packet.dts is not None:
                packet.dts, packet.pts, packet.stream = packet.dts - late, packet.pts - late, target
                out.mux(packet)
    with open_dataset(folder) as data:
        assert [number_of(data.image(1, t)) for t in range(6)] == [2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("matrix, corner", [((0, 65536, -65536, 0), (0, -1)), ((-65536, 0, 0, -65536), (-1, -1)),
                                            ((0, -65536, 65536, 0), (-1, 0)), ((65536, 0, 0, -65536), None)])
def test_a_video_is_turned_as_its_container_says(tmp_path, matrix, corner):
    """meta-pytorch/torchcodec pull 1173: what a telephone films upright lies on its side in the file."""
    _, folder = video_set(tmp_path, "v2.1")
    for video in folder.rglob("*.mp4"):
        data = bytearray(video.read_bytes())
        at = data.find(b"tkhd")
        at += 8 + (32 if data[at + 4] else 20) + 16
        a, b, c, d = matrix
        data[at:at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 64 << 16, 64 << 16, 1 << 30)
        video.write_bytes(bytes(data))
    with open_dataset(folder) as data:
        if corner is None:
            with pytest.raises(ValueError, match="its container mirrors it.*ffmpeg -i IN OUT.mp4"):
                data.image(0, 0)
            return
        picture = data.image(0, 3)
        lights = {(y, x): float(picture[slice(0, 6) if y == 0 else slice(-6, None), slice(0, 6) if x == 0 else slice(-6, None)].mean())
                  for y in (0, -1) for x in (0, -1)}
        assert max(lights, key=lambda key: lights[key]) == corner


def test_a_file_of_two_videos_is_refused_and_a_cover_read_over(tmp_path):
    made, folder = video_set(tmp_path, "v2.1")
    video = sorted(folder.rglob("*.mp4"))[0]
    with av.open(str(video), "w") as out:
        streams = [out.add_stream("libx264", rate=FPS) for _ in range(2)]
        for one, side in zip(streams, (32, 64)):
            one.width = one.height = side
            one.pix_fmt = "yuv420p"
        for picture in made[0].images:
            for one, image in zip(streams, (np.zeros((32, 32, 3), np.uint8), picture)):
                out.mux(one.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")))
        for one in streams:
            out.mux(one.encode())
    with pytest.raises(ValueError, match=f"{video.name} holds 2 video streams .32 x 32, 64 x 64.*-map 0:v:0"):
        open_dataset(folder)
    with av.open(str(video), "w") as out:
        cover, one = out.add_stream("mjpeg", rate=FPS), out.add_stream("libx264", rate=FPS)
        for stream, side, kind in ((cover, 32, "yuvj420p"), (one, 64, "yuv420p")):
            stream.width, stream.height, stream.pix_fmt = side, side, kind
        out.mux(cover.encode(av.VideoFrame.from_ndarray(np.full((32, 32, 3), 200, np.uint8), format="rgb24")))
        for image in made[0].images:
            out.mux(one.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")))
        out.mux(cover.encode())
        out.mux(one.encode())
    with open_dataset(folder) as data:
        assert [number_of(data.image(0, t)) for t in range(6)] == [0, 1, 2, 3, 4, 5]


def test_a_text_beside_the_steps_is_read(tmp_path):
    """tensorflow/datasets pull 11096: TFDS's RLDS base writes episode metadata there. The card that was offered changed nothing."""
    def beside(name):
        def change(number, features):
            features[name] = [features.pop("steps/language_instruction")[0] + b" %d" % number]
        return change

    for name in ("language_instruction", "task_text"):
        version, _ = rlds(tmp_path / name, change=beside(name))
        if name == "task_text":
            with pytest.raises(ValueError, match="no 'steps/language_instruction'(.|\n)*\ntext: task_text\n"):
                open_dataset(version)
            (version.parent / FILE).write_text("text: task_text\n")
        with open_dataset(version) as data:
            assert data.languages == [f"open it {i}" for i in range(3)]


def test_several_pictures_a_step_are_called_so(tmp_path):
    """google-deepmind/envlogger issue 14."""
    def several(number, features):
        features["steps/observation/image"] = [one for one in features["steps/observation/image"] for _ in range(3)]

    with pytest.raises(ValueError, match="24 pictures, 8 instructions and 56 action values do not make equal steps .3 pictures a step"):
        open_dataset(rlds(tmp_path, change=several)[0])


def test_pictures_kept_as_numbers_are_called_so(written, tmp_path):  # noqa: F811
    """huggingface/lerobot issue 1449."""
    folder, camera = copy(written, "v2.1-png", tmp_path), "observation.images.image"
    edit_json("meta/info.json", lambda info: info["features"][camera].update(dtype="uint8", shape=[64, 64, 3]))(folder)
    with pytest.raises(ValueError, match=f"{camera}: pictures kept as numbers, dtype uint8.*dtype as image or video"):
        open_dataset(folder)


def test_what_a_file_keeps_for_validation_is_told(tmp_path):
    """SimarKareer/EgoMimic issue 7, isaac-sim/IsaacLab issue 163: robomimic's own split."""
    path = tmp_path / "robomimic_set" / "image.hdf5"
    path.parent.mkdir()
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        for number in range(4):
            demo = file.create_group(f"data/demo_{number}")
            demo["actions"] = np.where(np.arange(7) == 6, np.where(np.arange(6) < 3, -1, 1)[:, None], rng.uniform(-1, 1, (6, 7)))
            demo["obs/agentview_rgb"] = rng.integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
        file["mask/train"], file["mask/valid"] = np.array([b"demo_0", b"demo_1"]), np.array([b"demo_2", b"demo_3", b"demo_9"])
        file["mask/test_few"] = np.array([b"demo_3"])
    (path.parent / FILE).write_text("instruction: do it\nrotate: false\ngrippers: [{dimension: 6, open: -1, closed: 1}]\n")

    def told(fraction):
        with open_dataset(path.parent, fraction) as data:
            return [note for note in card.look_at(data)["notes"] if "for validation" in note]

    assert told(0.5) == [] and told(0.75)[0].startswith("1 of the 3 episodes") and told(1.0)[0].startswith("2 of the 4 episodes")


def test_texts_that_are_json_are_told(tmp_path):
    """InternRobotics/InternNav issue 44."""
    texts = (json.dumps({"sub_instruction": "walk ahead", "sub_indexes": [0, 8]}), "put the {red} cup down", "[red] cup")
    with open_dataset(rlds(tmp_path, texts)[0]) as data:
        note, = (note for note in card.look_at(data)["notes"] if "JSON" in note)
    assert note.startswith("8 frames have a text that is JSON")


@pytest.mark.parametrize("words, told", [
    ("grippers: [{dimension: 6, open: 1, closed: 0}]\nwidth: 7\ngrippers: [{dimension: 6, open: 0, closed: 1}]", "`grippers` comes twice"),
    ("grippers: [{dimension: 6, open: 1, closed: 0, open: 0}]", "`open` comes twice"),
    ("grippers: [{dimension: true, open: 1, closed: 0}]", "must have dimension"), ("chunk: 0", "chunk: must be at least 1"),
    ("width: 0", "width: must be at least 1"), ("frame_rate: 0", "frame_rate: must be at least 1"),
    (f"frame_rate: {10 ** 30}", "frame_rate: must be a number"),
    ("grippers: [{dimension: 6, open: .nan, closed: 0}]", "must have dimension"),
    ("robot: 2001-99-99", "cannot be read as YAML"), ("width: 0x", "width"), ("[a]: b", "a key must be a word"), ("&a [*a]", "must hold"),
    ("robot: " + "[" * 5000, "cannot be read as YAML"), ("width: " + "9" * 5000, "cannot be read as YAML")])
def test_a_card_is_read_strictly(tmp_path, words, told):
    version, _ = rlds(tmp_path)
    (version.parent / FILE).write_text(words)
    with pytest.raises(ValueError, match=told) as error:
        open_dataset(version)
    assert FILE in str(error.value)


def test_colours_in_another_order_are_declared(written, tmp_path):  # noqa: F811
    """Tavish9/any4lerobot pull 38: some robots' pictures are BGR; nothing in the files says which."""
    for what in ("rlds-png", "hdf5", "v2.1-png"):
        folder = copy(written, what, tmp_path / what)
        with open_dataset(folder) as data:
            before = data.image(1, 2)
            plain, words = data.fingerprint(), "" if data.conventions.card is None else (folder / FILE).read_text()
        (folder / FILE).write_text(words + "colours: bgr\n")
        with open_dataset(folder) as data:
            after = data.image(1, 2)
            assert after.flags.c_contiguous and data.fingerprint() != plain
            assert not np.array_equal(after, before)  # HDF5's go through JPEG
            assert np.abs(after.astype(int) - before[..., ::-1]).max() <= (80 if what == "hdf5" else 0)
        (folder / FILE).write_text(words + "colours: brg\n")
        with pytest.raises(ValueError, match="colours: must be rgb or bgr"):
            open_dataset(folder)


def test_damaged_caches_are_made_anew(tmp_path):
    """A list of entries that lost one ended in a KeyError in training, and a card that lost a bit told other numbers."""
    version, _ = rlds(tmp_path)
    cache = tmp_path / "cache"

    def looked():
        with open_dataset(version, cache_dir=cache) as data:
            return card.cached_look(data, cache, None, None), data.image(1, 1).tobytes()

    before = looked()
    index, = cache.glob("rlds_index_*")
    whole = index.read_bytes()
    with np.load(index) as entries:
        less = {name: entries[name] for name in entries.files if name != "length_N"}
    np.savez(index, **less)
    assert looked() == before and index.read_bytes() == whole
    for at in range(len(whole) - 200, len(whole), 7):
        index.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:])
        assert looked() == before
    report, = cache.glob("data_card_*")
    told = report.read_text()
    report.write_text(told.replace('"episodes": 3', '"episodes": 8'))
    assert report.read_text() != told and looked() == before and report.read_text() == told
    report.write_text(json.dumps(before[0]))  # as older versions wrote it
    assert looked() == before


def test_an_empty_list_of_episodes_is_called_so(written, tmp_path):  # noqa: F811
    folder = copy(written, "v2.1-png", tmp_path)
    (folder / "meta/episodes.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="meta: the list of episodes is empty; copy"):
        open_dataset(folder, skip_bad=True)


def test_episodes_that_were_lost_leave_the_numbers_of_the_others(tmp_path):
    """almond-bot/axol pull 158: a gap in meta/episodes, after which other readers show each episode another's video."""
    made, folder = video_set(tmp_path, "v3.0", count=4)
    path, = folder.glob("meta/episodes/*/*.parquet")
    pq.write_table(pq.read_table(path).take([0, 1, 3]), path)
    with pytest.raises(ValueError, match="split 'train' is 0:4 of 3 episodes, and 1 of them not there"):
        open_dataset(folder)
    with open_dataset(folder, skip_bad=True) as data:
        assert [data.number(e) for e in range(3)] == [0, 1, 3]
        for e, own in enumerate((0, 1, 3)):
            assert number_of(data.image(e, 4)) == 2 * own + 4
            assert np.array_equal(data.index.actions_NA[data.starts[e]:][:6], made[own].actions)


def test_video_files_are_divided_otherwise_than_tables(tmp_path):
    """starVLA issues 279 and 90."""
    made, folder = video_set(tmp_path, "v3.0", count=4)
    video, = folder.rglob("*.mp4")
    for number in (0, 1):
        path = video.with_name(f"file-00{number}.mp4")
        path.unlink(missing_ok=True)
        _encode_video(path, np.concatenate([one.images for one in made[2 * number:2 * number + 2]]), "rgb")
    path, = folder.glob("meta/episodes/*/*.parquet")
    rows = pq.read_table(path).to_pylist()
    for number, row in enumerate(rows[2:]):
        row["videos/observation.images.image/file_index"], row["videos/observation.images.image/from_timestamp"] = 1, number * 6 / FPS
    pq.write_table(pa.Table.from_pylist(rows), path)
    with open_dataset(folder) as data:
        assert [[number_of(data.image(e, t)) for t in (0, 5)] for e in range(4)] == [[2 * e, 2 * e + 5] for e in range(4)]


def test_rows_of_two_episodes_that_were_exchanged_are_refused(tmp_path):
    """Frame numbers still count from 0, so that only the column of the episode tells."""
    rng = np.random.default_rng(0)
    made = [Episode(rng.integers(0, 256, (4, 16, 16, 3), dtype=np.uint8), rng.uniform(0, 1, (4, 7)).astype(np.float32), "do it")
            for _ in range(2)]
    folder = write_lerobot(tmp_path / "tabletop_rows", made, "v3.0", "png")
    path, = folder.glob("data/*/*.parquet")
    pq.write_table(pq.read_table(path).take([0, 1, 2, 7, 4, 5, 6, 3]), path)
    with pytest.raises(ValueError, match="episode 0 has 4 rows and meta says 4, one after the other"):
        open_dataset(folder)
