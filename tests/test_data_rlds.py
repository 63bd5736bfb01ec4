"""TFRecord framing, Example messages, the RLDS reader and writer, statistics: round trips, damage, and the official numbers."""

import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest

from vlakeep.data import images, statistics, tfrecord
from vlakeep.data.formats import open_datasets
from vlakeep.data.rlds import RldsDataset
from vlakeep.data.sample import Episode
from vlakeep.data.writer import write_rlds
from vlakeep.parity.golden_data import verify_augment_golden, verify_images_golden, verify_rlds_golden

GOLDEN = os.environ.get("VLAKEEP_GOLDEN")
needs_golden = pytest.mark.skipif(GOLDEN is None, reason="VLAKEEP_GOLDEN names no folder with the golden data")


def make_episodes(count=5, size=16, seed=0, width=7):
    rng = np.random.default_rng(seed)
    episodes = [Episode(rng.integers(0, 256, (steps, size, size, 3), dtype=np.uint8),
                        rng.uniform(-1, 1, (steps, width)).astype(np.float32), f"push block {i}")
                for i, steps in enumerate(rng.integers(2, 7, count))]
    for episode in episodes:
        episode.actions[:, -1] = episode.actions[:, -1] > 0  # a gripper of the tabletop
    return episodes


@pytest.fixture
def folder(tmp_path):
    write_rlds(tmp_path, "tabletop_test", make_episodes(), shard_bytes=6000)
    return tmp_path / "tabletop_test"


def shards(folder):
    return sorted(folder.glob("*/*tfrecord*"))


def test_crc32c_known_answers():
    """RFC 3720 B.4 (32 zero bytes: 8a9136aa), masked as TensorFlow does."""
    crc = 0x8A9136AA
    assert tfrecord.masked_crc32c(bytes(32)) == ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def test_example_round_trip_with_negative_and_large_integers():
    values = np.array([0, 1, -1, 127, 128, -(1 << 63), (1 << 63) - 1])
    message = tfrecord.write_example({"i": values, "f": np.array([1.5, -np.inf], np.float32), "b": [b"", b"\x00" * 300], "e": []})
    read = tfrecord.parse_example(message)
    assert read["i"].ints().tolist() == values.tolist() and read["f"].floats().tolist() == [1.5, -np.inf]
    assert read["b"].bytes() == [b"", b"\x00" * 300] and read["e"].bytes() == []
    with pytest.raises(ValueError, match="holds float"):
        read["f"].bytes()


def test_example_reads_unpacked_numbers():
    """Both encodings of repeated numbers are legal protobuf."""
    floats = b"".join(b"\x0d" + struct.pack("<f", x) for x in (1.0, 2.0))  # field 1, fixed32
    feature = b"\x12" + bytes([len(floats)]) + floats
    entry = b"\x0a\x01x\x12" + bytes([len(feature)]) + feature
    inner = b"\x0a" + bytes([len(entry)]) + entry
    assert tfrecord.parse_example(b"\x0a" + bytes([len(inner)]) + inner)["x"].floats().tolist() == [1.0, 2.0]


def test_broken_message_is_a_value_error_at_any_cut():
    message = tfrecord.write_example({"i": np.arange(5), "b": [b"abc"]})
    for cut in range(1, len(message)):
        with pytest.raises(ValueError):
            tfrecord.parse_example(message[:cut])


def test_every_flipped_or_missing_byte_is_found(folder):
    path = shards(folder)[0]
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for at in {0, 7, 8, 12, len(whole) - 1, *rng.integers(0, len(whole), 20).tolist()}:
        damaged = bytearray(whole)
        damaged[at] ^= 0x40
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{path.name}: record \d+ at byte \d+"):
            RldsDataset(folder)
    for keep in (5, 12, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:keep])
        with pytest.raises(ValueError, match="truncated"):
            RldsDataset(folder)


def test_a_shard_cut_between_records_or_missing_is_found(folder):
    path = shards(folder)[0]
    starts = [start for start, _ in tfrecord.read_records(path)]
    path.write_bytes(path.read_bytes()[:starts[-1] - tfrecord.HEADER_BYTES])
    with pytest.raises(ValueError, match="dataset_info.json says"):
        RldsDataset(folder)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="lacks 1 of its shards"):
        RldsDataset(folder)


@pytest.mark.parametrize("image_format", ["png", "jpeg"])
def test_written_episodes_are_read_back(tmp_path, image_format):
    episodes = make_episodes()
    version = write_rlds(tmp_path, "tabletop_test", episodes, image_format, shard_bytes=4000)
    assert len(shards(version.parent)) > 1
    for place in (version, version.parent):
        dataset = RldsDataset(place)
        assert dataset.languages == [e.language for e in episodes]
        assert dataset.lengths.tolist() == [len(e.images) for e in episodes]
        for i in reversed(range(len(episodes))):
            episode = dataset.episode(i)
            assert np.array_equal(episode.actions, episodes[i].actions)
            assert episode.images.shape == episodes[i].images.shape
            if image_format == "png":
                assert np.array_equal(episode.images, episodes[i].images)
        sample = dataset.frame(2, 1)
        assert sample.instruction == "push block 2" and sample.dataset == "tabletop_test"
        assert np.array_equal(sample.action, dataset.actions(2)[1]) and np.abs(sample.action).max() <= 1
        with pytest.raises(IndexError):
            dataset.frame(0, int(dataset.lengths[0]))


def test_writer_leaves_nothing_behind_when_it_fails(tmp_path):
    bad = make_episodes(2) + [Episode(np.zeros((2, 8, 8, 3), np.uint8), np.zeros((2, 7), np.float32), "another size")]
    with pytest.raises(ValueError, match="episode 2"):
        write_rlds(tmp_path, "tabletop_test", bad)
    assert not list((tmp_path / "tabletop_test").iterdir())
    with pytest.raises(ValueError, match="no episodes"):
        write_rlds(tmp_path, "tabletop_test", [])
    write_rlds(tmp_path, "tabletop_test", make_episodes(1))
    with pytest.raises(FileExistsError):
        write_rlds(tmp_path, "tabletop_test", make_episodes(2))
    write_rlds(tmp_path, "tabletop_test", make_episodes(3), overwrite=True)
    assert len(RldsDataset(tmp_path / "tabletop_test")) == 3


def test_non_finite_actions_are_refused_when_written_and_when_read(tmp_path, monkeypatch):
    episodes = make_episodes(3)
    episodes[1].actions[1, 3] = np.nan
    with pytest.raises(ValueError, match="episode 1 of tabletop_test, frame 1"):
        write_rlds(tmp_path, "tabletop_test", episodes)
    monkeypatch.setattr("vlakeep.data.writer._check", lambda *args: None)
    write_rlds(tmp_path, "tabletop_test", episodes)
    with pytest.raises(ValueError, match=r"episode 1 of tabletop_test\), frame 1: action .*nan"):
        RldsDataset(tmp_path / "tabletop_test")


def test_index_is_cached_and_follows_the_files(folder, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    first = RldsDataset(folder, cache_dir=cache)
    monkeypatch.setattr("vlakeep.data.rlds.build_index", lambda *args: pytest.fail("the cached index was not used"))
    again = RldsDataset(folder, cache_dir=cache)
    assert again.languages == first.languages and again.statistics == first.statistics
    assert again.fingerprint() == first.fingerprint()
    assert np.array_equal(again.image(3, 0), first.image(3, 0))
    monkeypatch.undo()
    entry, = cache.iterdir()
    entry.write_bytes(entry.read_bytes()[:100])  # a damaged cache is built again
    assert RldsDataset(folder, cache_dir=cache).fingerprint() == first.fingerprint()
    write_rlds(folder.parent, "tabletop_test", make_episodes(4, seed=1), overwrite=True)
    assert len(RldsDataset(folder, cache_dir=cache)) == 4


def test_a_file_cut_after_indexing_is_found(folder, tmp_path):
    dataset = RldsDataset(folder)
    path = shards(folder)[-1]
    os.truncate(path, path.stat().st_size // 3)
    with pytest.raises(ValueError, match="changed since it was indexed"):
        dataset.image(len(dataset) - 1, int(dataset.lengths[-1]) - 1)


def test_fraction_and_unlabelled_episodes(tmp_path):
    episodes = make_episodes(10)
    episodes[2] = Episode(episodes[2].images, episodes[2].actions, "")
    write_rlds(tmp_path, "tabletop_test", episodes)
    full, part = RldsDataset(tmp_path / "tabletop_test"), RldsDataset(tmp_path / "tabletop_test", fraction=0.5)
    assert (len(full), full.unlabelled, len(part), part.split_episodes) == (9, 1, 4, 5)
    assert full.statistics == part.statistics and full.statistics["num_trajectories"] == 10
    assert full.languages == [e.language for e in episodes if e.language]
    with pytest.raises(ValueError, match="train_fraction"):
        RldsDataset(tmp_path / "tabletop_test", fraction=0.01)
    with pytest.raises(ValueError, match="no split 'val'"):
        RldsDataset(tmp_path / "tabletop_test", split="val")


def test_missing_or_unknown_data_sets_name_the_remedy(tmp_path):
    with pytest.raises(FileNotFoundError, match="vlakeep tabletop-data"):
        open_datasets(tmp_path, ["tabletop_corner"])
    with pytest.raises(ValueError, match="--data.datasets"):
        open_datasets(tmp_path, [])
    write_rlds(tmp_path, "bridge", make_episodes(1))
    with pytest.raises(ValueError, match="no standardisation"):
        RldsDataset(tmp_path / "bridge")
    (tmp_path / "tabletop_x/1.0.0").mkdir(parents=True)
    (tmp_path / "tabletop_x/1.0.0/dataset_info.json").write_text("{}")
    with pytest.raises(ValueError, match="dataset_info.json cannot be read"):
        RldsDataset(tmp_path / "tabletop_x")


def test_normalisation_by_hand():
    actions = np.array([[0.0, 3.0, -1.0], [1.0, 3.0, 0.0], [10.0, 3.0, 1.0]], dtype=np.float32)
    stats = statistics.action_statistics(actions, 1)
    stats["action"]["q01"][0], stats["action"]["q99"][0] = 0.0, 2.0
    got, clipped = statistics.normalise(actions, stats)
    assert np.allclose(got, [[-1, 0, -1], [0, 0, 0], [1, 0, 1]], atol=1e-6) and got.dtype == np.float32
    assert clipped == 1  # 10 lies outside; the constant dimension and the gripper do not count
    back = statistics.unnormalise(got, stats)
    assert np.allclose(back[:, 0], [0, 1, 2]) and np.allclose(back[:, 2], actions[:, 2])


def test_statistics_are_those_of_each_dimension():
    """From 0 to 100 in steps of 1, times another number in each dimension."""
    actions = np.arange(101, dtype=np.float32)[:, None] * np.array([1.0, -2.0, 0.5], dtype=np.float32)
    found = statistics.action_statistics(actions, 4)
    wanted = {"mean": [50, -100, 25], "min": [0, -200, 0], "max": [100, 0, 50], "q01": [1, -198, 0.5], "q99": [99, -2, 49.5]}
    assert all(np.allclose(found["action"][key], values) for key, values in wanted.items())
    assert np.allclose(found["action"]["std"], np.sqrt((101 ** 2 - 1) / 12) * np.array([1, 2, 0.5]))
    assert found["action"]["mask"] == [True, True, False] and (found["num_transitions"], found["num_trajectories"]) == (101, 4)


def test_libero_gripper_convention():
    assert statistics.libero_transform(np.array([[9.0, -1.0], [9.0, 1.0], [9.0, 0.25]]))[:, 1].tolist() == [1.0, 0.0, 0.75]


def test_statistics_file_is_json_the_official_loader_reads(tmp_path):
    stats = {"tabletop_test": statistics.action_statistics(make_episodes(1)[0].actions, 1)}
    statistics.save_statistics(tmp_path / "dataset_statistics.json", stats)
    assert json.loads((tmp_path / "dataset_statistics.json").read_text()) == stats
    assert [p.name for p in tmp_path.iterdir()] == ["dataset_statistics.json"]


def test_damaged_pictures_name_themselves():
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert np.array_equal(images.decode_image(images.encode_png(noise)), noise)
    for data in (images.encode_png(noise)[:60], images.encode_jpeg(noise)[:40], b"GIF89a", b""):
        with pytest.raises(ValueError, match="frame 7"):
            images.decode_image(data, "frame 7")


def test_lanczos_keeps_constants_and_is_identity_at_equal_size():
    image = np.random.default_rng(0).integers(0, 256, (20, 13, 3), dtype=np.uint8)
    assert np.array_equal(images.resize_uint8(image, (20, 13)), image)
    assert np.abs(images.lanczos3(image, (20, 13)) - image).max() < 1e-3
    for size in ((1, 1), (7, 40), (64, 5)):
        assert np.array_equal(images.resize_uint8(np.full((20, 13, 3), 77, np.uint8), size), np.full((*size, 3), 77))


@needs_golden
@pytest.mark.parametrize("verify,name", [
    (verify_rlds_golden, "rlds"), (verify_images_golden, "eval"), (verify_augment_golden, "augment")])
def test_golden(verify, name):
    rows = verify(Path(GOLDEN) / name)
    assert rows and not [row for row in rows if not row.ok]
