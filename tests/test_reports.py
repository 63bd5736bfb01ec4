"""Trouble that others have reported of their tools, as small inputs for this one. Each names the report."""

import json
import shutil

import numpy as np
import pytest
from test_data_formats import FPS, NAME, column, copy, edit_json, edit_rows, episodes, pq, written  # noqa: F401  (fixtures)
from test_same_content import model
from test_skip_bad import samples

from vlakeep.core import fetch
from vlakeep.core.base_models import AmbiguousModel, find_checkpoint
from vlakeep.data.formats import open_dataset

pa = pytest.importorskip("pyarrow")


def refused_and_left_out(folder, words, lost):
    """The set is refused with these words, and without the episodes `lost` the others are what they were."""
    with pytest.raises(ValueError, match=words):
        open_dataset(folder)
    data = open_dataset(folder, skip_bad=True)
    assert data.left_out and not set(samples(data)) & set(lost)
    return samples(data)


def test_one_of_many_files_was_cut_by_the_download(written, tmp_path):  # noqa: F811
    """LIBERO issue 76: one file of LIBERO-90 is 590 of 806 MB."""
    folder = copy(written, "hdf5", tmp_path)
    whole = samples(open_dataset(folder))
    path = sorted(folder.glob("*.hdf5"))[-1]
    path.write_bytes(path.read_bytes()[:int(path.stat().st_size * 0.73)])
    left = refused_and_left_out(folder, f"{path.name} cannot be opened as HDF5 .*truncated", {2})
    assert left == {number: whole[number] for number in (0, 1)}


def test_a_page_was_saved_in_the_place_of_a_file(written, tmp_path):  # noqa: F811
    """robomimic issue 161, robocasa issue 20: file signature not found."""
    folder = copy(written, "hdf5", tmp_path)
    path = sorted(folder.glob("*.hdf5"))[-1]
    path.write_text("<!doctype html><title>Too many requests</title>")
    assert set(refused_and_left_out(folder, f"{path.name} cannot be opened as HDF5", {2})) == {0, 1}


def test_hidden_files_came_with_the_archive(written, tmp_path):  # noqa: F811
    """act-plus-plus issue 45: .episode_0.hdf5 beside episode_0.hdf5."""
    folder = copy(written, "hdf5", tmp_path)
    whole = samples(open_dataset(folder))
    for path in list(folder.glob("*.hdf5")):
        path.with_name("." + path.name).write_bytes(b"")
    assert samples(open_dataset(folder)) == whole


@pytest.mark.parametrize("restart", [True, False])
def test_timestamps_that_do_not_count_up(written, tmp_path, restart):  # noqa: F811
    """lerobot issues 933 and 1875, unitree_lerobot issue 41: the clock starts anew within an episode, or stands still. Rows would show
    frames of other moments."""
    folder = copy(written, "v2.1-rgb", tmp_path)
    change = (lambda t: t[:4] + t[:len(t) - 4]) if restart else (lambda t: [t[0], *t[:-1]])
    edit_rows(column("timestamp", change))(folder)
    refused_and_left_out(folder, "episode 2: frame .* by its timestamp", {2})


def test_videos_of_a_merged_set_that_begin_elsewhere(written, tmp_path):  # noqa: F811
    """lerobot issue 2627: from_timestamp is the place in another file; asked for 1058.9 s of 598.5 s."""
    folder = copy(written, "v3.0-rgb", tmp_path)
    path, = folder.glob("meta/episodes/*/*.parquet")
    rows = pq.read_table(path).to_pylist()
    key, = (name for name in rows[2] if name.endswith("from_timestamp"))
    rows[2][key] += 460.4
    pq.write_table(pa.Table.from_pylist(rows), path)
    assert set(refused_and_left_out(folder, "frames and its episodes need", {2})) == {0, 1}


@pytest.mark.parametrize("length", [0, 3])
def test_lengths_of_the_list_that_are_not_those_of_the_table(written, tmp_path, length):  # noqa: F811
    """lerobot issue 4143: a length of 0, or too small, moves the frames of later episodes."""
    folder = copy(written, "v3.0-png", tmp_path)
    whole = samples(open_dataset(folder))
    path, = folder.glob("meta/episodes/*/*.parquet")
    rows = pq.read_table(path).to_pylist()
    rows[1]["length"] = length
    pq.write_table(pa.Table.from_pylist(rows), path)
    left = refused_and_left_out(folder, "episode 1 has", {1})
    assert left == {number: whole[number] for number in (0, 2)}


def test_a_rate_of_the_container_that_is_not_the_one_of_the_list(written, tmp_path):  # noqa: F811
    """lerobot issue 2814, AgiBot-World issue 149: frames and video out of step, here by a little in every frame."""
    folder = copy(written, "v2.1-rgb", tmp_path)
    edit_json("meta/info.json", lambda info: info.update(fps=FPS * 1.03))(folder)
    for path in sorted(folder.glob("data/*/*.parquet")):
        table = pq.read_table(path)
        times = pa.array(np.arange(len(table), dtype=np.float32) / np.float32(FPS * 1.03))
        pq.write_table(table.set_column(table.column_names.index("timestamp"), "timestamp", times), path)
    with pytest.raises(ValueError, match="the video has 10: make both the same"):
        open_dataset(folder)


def test_two_owners_of_one_name_do_not_share_a_folder(tmp_path, monkeypatch):
    """huggingface_hub issue 2903: a folder for another model of the same last name; the old files stay and are loaded."""
    folders = []

    def download(wanted, commit):
        folders.append(wanted.folder)
        model(wanted.folder)

    monkeypatch.setattr(fetch, "_listing", lambda kind, name: ("c0ffee", {"config.json": None}))
    monkeypatch.setattr(fetch, "_download", download)
    for owner in ("wan-ai", "intervitens"):
        assert fetch.main([f"{owner}/video", "--root", str(tmp_path)]) == 0
    assert len(set(folders)) == 2
    for owner, folder in zip(("wan-ai", "intervitens"), folders):
        assert find_checkpoint(f"{owner}/video", tmp_path / "hf_cache") == folder
    with pytest.raises(AmbiguousModel):
        find_checkpoint("video", tmp_path / "hf_cache")


def test_refs_that_were_overwritten(tmp_path):
    """transformers issue 29401: a library that asks the hub writes a commit into refs/main that was never fetched."""
    hub = tmp_path / "hub" / "models--lab--vla"
    here = model(hub / "snapshots" / ("a" * 40))
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("f" * 40 + "\n")
    with pytest.raises(AmbiguousModel, match="which is not among its snapshots") as error:
        find_checkpoint("lab/vla", tmp_path)
    assert find_checkpoint(str(error.value).split("--backbone.checkpoint ")[1], tmp_path) == here


def test_a_cache_folder_of_another_case_is_another_model(tmp_path):
    """unsloth pull request 7218: models--BAAI--bge and models--baai--bge."""
    upper = model(tmp_path / "hub" / "models--BAAI--bge" / "snapshots" / "1")
    lower = model(tmp_path / "hub" / "models--baai--bge" / "snapshots" / "2")
    assert (find_checkpoint("BAAI/bge", tmp_path), find_checkpoint("baai/bge", tmp_path)) == (upper, lower)


def test_an_index_whose_shards_were_never_fetched(tmp_path):
    """diffusers issues 14719 and 14769 the other way round: only the index came, and no file at all."""
    from vlakeep.models.files import INDEX, weight_files

    model(tmp_path / "m")
    (tmp_path / "m" / INDEX).write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(FileNotFoundError, match="names model-00001-of-00002.safetensors, which is not there"):
        weight_files(tmp_path / "m")
    shutil.rmtree(tmp_path / "m")
    assert NAME
