"""Probe folders: what is written is what is read, and whatever changed is noticed."""

import json

import numpy as np
import pytest

from vlakeep.checks import check_probe
from vlakeep.core.config import Config, ConfigError, load_config
from vlakeep.core.errors import StorageError
from vlakeep.core.storage import Storage
from vlakeep.data.sample import Sample
from vlakeep.probe.extend import extend
from vlakeep.probe.heldout import open_heldout
from vlakeep.probe.probe_set import ProbeError, ProbeSet, open_probe, remedy, write_probe
from vlakeep.probe.selection import main as probe_select
from vlakeep.probe.selection import select

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


def test_what_makes_a_probe_fits_the_benchmark_and_the_size(tmp_path):
    libero, own = "vlakeep libero-vqa --probe.name {} --items 700", "docs/"
    tabletop = "vlakeep tabletop-data --probe.name {} --probe.size 700"
    for name, told, wanted, strange in (
            ("tabletop-2000", ["libero_spatial"], [tabletop], [libero, own]), ("libero_90", ["tabletop_corner"], [libero, own], [tabletop]),
            ("keep", ["mine", "libero_spatial"], [libero, own], [tabletop]), ("keep", ["mine"], [own, libero, tabletop], [])):
        said = remedy(name, 700, *told)
        assert all(words.format(name) in said for words in wanted) and not any(words.format(name) in said for words in strange), said
    config = load_config("openvla_libero_graded", ["--root", str(tmp_path), "--probe.size", "700"])
    with pytest.raises(ProbeError, match=r"no probe set at .*/libero .*libero-vqa --probe.name libero --items 700`, or of a data set"):
        open_probe(config, Storage.from_config(config))
    config.probe.name = "keep"  # whose it is to be the data sets say
    line, = check_probe(config, Storage.from_config(config))[0]
    assert "libero-vqa --probe.name keep --items 700" in line.remedy and "tabletop" not in line.remedy
    config.data.datasets, config.evaluate.benchmark = ["mine"], "libero_10"
    assert "tabletop" not in check_probe(config, Storage.from_config(config))[0][0].remedy
    write_probe(tmp_path / "probe" / "keep", SAMPLES, KINDS)
    with pytest.raises(ProbeError, match="--probe.size asks for 700.*libero-vqa --probe.name keep --items 700"):
        open_probe(config, Storage.from_config(config)).spread(700)


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


ASKED = ["color", "tap", "task:tabletop_corner", "color", "count", "tap", "reach", "color", "task:tabletop_path", "count"]


@pytest.fixture
def mixed(tmp_path):
    """(configuration, its storage): a probe `mixed` with questions (color, count), skills, and frames of two new tasks."""
    config = Config(root=str(tmp_path))
    config.probe.name = "mixed"
    samples = [Sample(sample.image, sample.instruction, question=kind in ("color", "count")) for sample, kind in zip(SAMPLES, ASKED)]
    answers = "".join(json.dumps({"item": i, "answer": f"answer {i}"}) + "\n" for i, kind in enumerate(ASKED) if samples[i].question)
    write_probe(tmp_path / "probe" / "mixed", samples, ASKED, [str(i) for i in range(10)], answers)
    return config, Storage.from_config(config)


@pytest.mark.parametrize("kinds, size, chosen", [
    (["questions"], None, [0, 3, 4, 7, 9]), (["skills"], None, [1, 5, 6]), (["task:*"], None, [2, 8]), (["task:*_path"], None, [8]),
    (["count", "tap"], None, [1, 4, 5, 9]), (["skills", "tap"], None, [1, 5, 6]), (["questions"], 2, [0, 4]), (["*"], 10, list(range(10)))])
def test_chosen_kinds_make_a_probe(mixed, kinds, size, chosen):
    config, storage = mixed
    assert select(config, storage, "few", kinds, size) == len(chosen)
    source, found = ProbeSet(storage.probe / "mixed"), ProbeSet(storage.probe / "few")
    assert found.items == [source.items[i] for i in chosen] and [item["state"] for item in found.items] == [str(i) for i in chosen]
    for one, other in zip(found.samples(range(len(chosen))), source.samples(chosen)):
        assert np.array_equal(one.image, other.image)
    answers = {number: f"answer {i}" for number, i in enumerate(chosen) if source.items[i]["question"]}
    assert (found.folder / "answers.jsonl").is_file() == bool(answers)
    assert not answers or open_heldout(found.folder, source.folder).answers == answers


def test_a_probe_is_selected_again_and_not_over_another(mixed):
    config, storage = mixed
    for _ in range(2):
        select(config, storage, "few", ["tap"])
    before = ProbeSet(storage.probe / "few").sha256
    with pytest.raises(ValueError, match="few holds another probe.*`rm -r .*few`"):
        select(config, storage, "few", ["color"])
    assert ProbeSet(storage.probe / "few").sha256 == before


@pytest.mark.parametrize("to, kinds, size, error", [
    ("mixed", ["tap"], None, "--to mixed: is the probe that items are taken from"),
    ("a/../mixed", ["tap"], None, "is the probe that items are taken from"),
    ("few", ["tap", "left"], None, r"--kinds left: .*no such items, but color \(3\), count \(2\), .*questions and skills"),
    ("few", ["skill*"], None, r"--kinds 'skill\*': .*no such items"),
    ("a few", ["questions"], 6, "--size 6: .* 5 such items; .*`vlakeep probe-select --kinds questions --to 'a few'`"),
    ("/elsewhere/few", ["tap"], None, "outside the storage root")])
def test_a_selection_that_cannot_be_made_leaves_nothing(mixed, to, kinds, size, error):
    config, storage = mixed
    before = ProbeSet(storage.probe / "mixed").sha256
    with pytest.raises((ValueError, StorageError), match=error):
        select(config, storage, to, kinds, size)
    assert [path.name for path in storage.probe.iterdir()] == ["mixed"] and ProbeSet(storage.probe / "mixed").sha256 == before


def test_damaged_answers_are_no_selection(mixed):
    config, storage = mixed
    (storage.probe / "mixed" / "answers.jsonl").write_text('{"answer": "red"}\n')
    with pytest.raises(ProbeError, match="answers.jsonl is damaged"):
        select(config, storage, "few", ["color"])
    assert not (storage.probe / "few").exists()


def test_the_command_line_of_a_selection(mixed):
    config, storage = mixed
    words = ["--root", config.root, "--probe.name", "mixed", "--to", "few"]
    assert probe_select([*words, "--kinds", "task:*,color", "--size", "4"]) == 0 and len(ProbeSet(storage.probe / "few")) == 4
    with pytest.raises(ConfigError, match="--kinds needs names"):
        probe_select([*words, "--kinds", ","])
