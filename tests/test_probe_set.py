"""Probe folders: what is written is what is read, and whatever changed is noticed."""

import json

import numpy as np
import pytest

from vlakeep.core.config import Config
from vlakeep.core.storage import Storage
from vlakeep.data.sample import Sample
from vlakeep.probe.extend import extend
from vlakeep.probe.probe_set import ProbeError, ProbeSet, write_probe

SAMPLES = [Sample(np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8), f"what is {i}?\u2028 ü",
                  question=i % 2 == 0) for i in range(10)]
KINDS = [f"kind{i % 3}" for i in range(10)]


@pytest.fixture
def folder(tmp_path):
    write_probe(tmp_path / "probe", SAMPLES, KINDS, [str(i) for i in range(10)])
    return tmp_path / "probe"


def test_round_trip(folder):
    probe = ProbeSet(folder)
    assert len(probe) == 10 and probe.kinds([4, 2]) == ["kind1", "kind2"] and probe.items[3]["state"] == "3"
    for index, sample in zip([9, 0, 3], probe.samples([9, 0, 3])):
        assert np.array_equal(sample.image, SAMPLES[index].image) and sample.image.flags.writeable
        assert (sample.instruction, sample.question, sample.action) == (SAMPLES[index].instruction, SAMPLES[index].question, None)
    assert isinstance(probe._images, np.memmap)


def test_spread_is_even_and_never_short(folder):
    probe = ProbeSet(folder)
    assert probe.spread(10) == list(range(10)) and probe.spread(4) == [0, 2, 5, 7]
    with pytest.raises(ProbeError, match="--probe.size asks for 11.*vlakeep tabletop-data"):
        probe.spread(11)


def test_hash_is_of_the_content(folder, tmp_path):
    first = ProbeSet(folder).sha256
    items = folder / "items.jsonl"  # another spelling of the same items
    lines = [json.loads(line) for line in items.read_text().split("\n")[:-1]]
    items.write_text("".join(json.dumps(dict(reversed(line.items()))) + "\n" for line in lines))
    assert ProbeSet(folder).sha256 == first
    assert write_probe(tmp_path / "again", SAMPLES, KINDS, [str(i) for i in range(10)]) == first
    assert write_probe(tmp_path / "order", SAMPLES[::-1], KINDS, [str(i) for i in range(10)]) != first
    assert write_probe(tmp_path / "kinds", SAMPLES, KINDS[::-1], [str(i) for i in range(10)]) != first


def test_changed_content_is_noticed(folder):
    images = folder / "images.npy"
    data = bytearray(images.read_bytes())
    data[-1] ^= 1
    images.write_bytes(data)
    with pytest.raises(ProbeError, match="changed after it was written.*vlakeep tabletop-data"):
        ProbeSet(folder)


@pytest.mark.parametrize("name", ["probe.json", "items.jsonl", "images.npy"])
def test_missing_and_truncated_files(folder, name):
    path = folder / name
    whole = path.read_bytes()
    for keep in (0, len(whole) // 2, len(whole) - 3):
        path.write_bytes(whole[:keep])
        with pytest.raises(ProbeError, match="vlakeep tabletop-data"):
            ProbeSet(folder)
    path.unlink()
    with pytest.raises(ProbeError, match=f"{name}.*missing"):
        ProbeSet(folder)


def test_what_is_not_hashed_is_not_read(folder):
    before = ProbeSet(folder).items
    path = folder / "items.jsonl"
    path.write_text(path.read_text().replace('{"', '{"kin": false, "', 1))
    assert ProbeSet(folder).items == before


def test_a_header_that_is_no_python_is_a_damaged_file(folder):
    path = folder / "images.npy"
    path.write_bytes(path.read_bytes().replace(b"}", b"[", 1))
    with pytest.raises(ProbeError, match="images.npy"):
        ProbeSet(folder)


def test_pickled_images_are_not_loaded(folder):
    np.save(folder / "images.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ProbeError, match="images.npy"):
        ProbeSet(folder)


def test_writing_replaces_a_probe_but_nothing_else(folder, tmp_path):
    write_probe(folder, SAMPLES[:2], KINDS[:2])
    assert len(ProbeSet(folder)) == 2 and [p.name for p in tmp_path.iterdir()] == ["probe"]
    other = tmp_path / "other"
    other.mkdir()
    (other / "precious.txt").write_text("keep")
    with pytest.raises(ValueError, match="no probe folder"):
        write_probe(other, SAMPLES, KINDS)
    assert (other / "precious.txt").read_text() == "keep"


def test_malformed_input_is_refused(tmp_path):
    for samples, kinds in (([], []), (SAMPLES, KINDS[:3])):
        with pytest.raises(ValueError, match="as many kinds"):
            write_probe(tmp_path / "p", samples, kinds)
    with pytest.raises(ValueError, match="of one size"):
        write_probe(tmp_path / "p", [SAMPLES[0], Sample(np.zeros((4, 4, 3), np.uint8), "x")], ["a", "b"])


def test_a_probe_that_gets_frames_is_not_written_over(tmp_path):
    config = Config(root=str(tmp_path))
    config.probe.name = "mine"
    write_probe(tmp_path / "probe" / "mine", SAMPLES, KINDS)
    before = ProbeSet(tmp_path / "probe" / "mine").sha256
    with pytest.raises(ValueError, match="--to mine: is the probe that frames are added to"):
        extend(config, Storage.from_config(config), "mine", 4)
    assert ProbeSet(tmp_path / "probe" / "mine").sha256 == before
