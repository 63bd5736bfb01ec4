"""Whatever bytes, schemas and texts come: an error that names its cause, or exactly what was meant; never another label in silence.

    make fuzz                      hours of it; EXAMPLES=20000 (for each property) says how much
    VLAKEEP_FUZZ=20000 pytest tests/test_fuzz.py

In the suite every property sees the same few examples. CRCs and hashes guard RLDS, probes, artefacts and checkpoints to the bit; HDF5 and
parquet files have none of their own, so there only the cause of an error is asked for.
"""

import json
import math
import os
import shutil
import tempfile
from dataclasses import fields, is_dataclass

import numpy as np
import pytest
import torch
import yaml
from test_data_prompts import processor  # noqa: F401  (a fixture)

from vlakeep.benchmarks.records import Records
from vlakeep.core.checkpoint import from_bytes, load_checkpoint, pack, save_checkpoint, to_bytes, unpack
from vlakeep.core.config import Config, ConfigError, load_config, to_dict
from vlakeep.core.errors import is_user_error
from vlakeep.core.next_step import completed
from vlakeep.core.rundir import read_metrics
from vlakeep.core.schema import known_keys, type_of
from vlakeep.core.strict_yaml import read_mapping
from vlakeep.data import tfrecord
from vlakeep.data.card import cached_look, look_at
from vlakeep.data.conventions import DataCard
from vlakeep.data.dataset import Conventions
from vlakeep.data.formats import open_dataset
from vlakeep.data.images import decode_image, encode_png
from vlakeep.data.order import SampleOrder
from vlakeep.data.sample import IGNORE_INDEX, Episode, Sample
from vlakeep.data.statistics import action_statistics, normalise, unnormalise
from vlakeep.data.writer import write_rlds
from vlakeep.models.files import read_tensors, tensor_table
from vlakeep.openvla import prompts
from vlakeep.openvla.action_tokenizer import ActionTokenizer
from vlakeep.probe.masks import audit, mask_from_prompt
from vlakeep.probe.probe_set import ProbeSet, write_probe
from vlakeep.teacher import icsm_artifact

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

EXAMPLES = int(os.environ.get("VLAKEEP_FUZZ", "0"))
settings.register_profile("suite", max_examples=12, derandomize=True, database=None, deadline=None,
                          suppress_health_check=list(HealthCheck))
settings.register_profile("hours", max_examples=EXAMPLES or 15, deadline=None, print_blob=True,
                          suppress_health_check=list(HealthCheck))
settings.load_profile("hours" if EXAMPLES else "suite")

TEXT = st.text(max_size=40)
IMAGE = np.zeros((64, 64, 3), np.uint8)
# A place in a file, as a fraction of its length, and what happens there.
DAMAGE = st.tuples(st.floats(0, 1, exclude_max=True), st.sampled_from(["flip", "cut", "insert", "zero", "double"]), st.integers(1, 255))


def damaged(data: bytes, damage) -> bytes:
    share, kind, number = damage
    at = int(share * len(data))
    if kind == "cut":
        return data[:at]
    if kind == "insert":
        return data[:at] + bytes([number]) + data[at:]
    if kind == "double":
        return data[:at] + data[max(0, at - number):at] + data[at:]
    if kind == "zero":
        return data[:at] + bytes(min(number, len(data) - at)) + data[at + number:]
    return data[:at] + bytes([data[at] ^ number]) + data[at + 1:] if data else data


def refused_by_name(call, *names):
    """The result of `call`, or None when it was refused with a message that names one of these."""
    try:
        return call()
    except Exception as error:
        assert is_user_error(error), f"{type(error).__name__} is not an error that a user understands: {error}"
        assert any(str(name) in str(error) for name in names), f"the cause is not named: {error}"
        return None


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder for the files of one example."""
    return tmp_path_factory.mktemp("fuzz")


def episodes(count=3, size=8):
    rng = np.random.default_rng(0)
    return [Episode(rng.integers(0, 256, (4 + i, size, size, 3), dtype=np.uint8),
                    np.concatenate([rng.uniform(-1, 1, (4 + i, 6)), rng.integers(0, 2, (4 + i, 1))], axis=1).astype(np.float32), f"do {i}")
            for i in range(count)]


def content(data):
    return [(data.instruction(e, t), data.standard_actions(e)[t].tobytes(), data.image(e, t).tobytes())
            for e in range(len(data)) for t in range(int(data.lengths[e]))]


# ---- readers ----


@given(st.binary(max_size=200))
def test_any_bytes_as_an_example_are_parsed_or_refused(data):
    try:
        features = tfrecord.parse_example(data)
        for feature in features.values():
            for read in (feature.bytes, feature.floats, feature.ints):
                try:
                    read()
                except ValueError:
                    pass
    except ValueError:
        pass


VALUES = st.one_of(st.lists(st.binary(max_size=20), max_size=5),
                   st.lists(st.floats(width=32, allow_nan=False), max_size=8).map(lambda v: np.array(v, np.float32)),
                   st.lists(st.integers(-2**63, 2**63 - 1), max_size=8).map(lambda v: np.array(v, np.int64)))


@given(st.dictionaries(TEXT, VALUES, max_size=6))
def test_an_example_of_any_schema_comes_back(features):
    found = tfrecord.parse_example(tfrecord.write_example(features))
    assert set(found) == set(features)
    for name, value in features.items():
        if isinstance(value, list):
            assert found[name].bytes() == value
        else:
            read = found[name].floats() if value.dtype.kind == "f" else found[name].ints()
            assert np.array_equal(read, value)


@pytest.fixture(scope="module")
def rlds(place):
    version = write_rlds(place / "whole", "tabletop_fuzz", episodes())
    shard, = version.glob("*.tfrecord*")
    return version, shard, shard.read_bytes(), content(open_dataset(version))


@given(DAMAGE)
def test_a_damaged_rlds_shard_is_refused_or_gives_the_same_labels(rlds, damage):
    version, shard, whole, before = rlds
    shard.write_bytes(damaged(whole, damage))
    data = refused_by_name(lambda: open_dataset(version), shard.name)
    assert data is None or content(data) == before
    less = refused_by_name(lambda: open_dataset(version, skip_bad=True), shard.name)
    if less is not None:  # episodes are missing whole, and none has changed
        frames = content(less)
        assert [one for one in before if one in frames] == frames and (data is not None or less.left_out)
        less.close()


@given(st.dictionaries(st.sampled_from(["steps/action", "steps/language_instruction", "steps/observation/image", "steps/x"]), VALUES))
def test_an_episode_of_any_schema_is_read_or_refused(place, features):
    version = place / "schema" / "tabletop_fuzz" / "1.0.0"
    shutil.rmtree(version, ignore_errors=True)
    version.mkdir(parents=True)
    shard = version / "tabletop_fuzz-train.tfrecord-00000-of-00001"
    with tfrecord.RecordWriter(shard) as writer:
        writer.write(tfrecord.write_example(features))
    (version / "dataset_info.json").write_text(json.dumps({"name": "tabletop_fuzz", "splits": [{"name": "train", "shardLengths": ["1"]}]}))
    data = refused_by_name(lambda: open_dataset(version), shard.name, version)
    if data is not None:
        assert np.isfinite(data.actions_NA).all() and np.abs(data.actions_NA[:, :-1]).max(initial=0) <= 1


JSON = st.recursive(st.none() | st.booleans() | st.integers(-10, 10) | st.floats(allow_nan=False) | TEXT,
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=6)


@given(st.one_of(st.binary(max_size=60), st.just(b"{}"), DAMAGE))
def test_features_json_changes_no_label(rlds, content):
    """Records say themselves what they hold; whatever else is beside them."""
    version, shard, whole, before = rlds
    shard.write_bytes(whole)
    path = version / "features.json"
    kept = path.read_bytes()
    path.write_bytes(damaged(kept, content) if isinstance(content, tuple) else content)
    try:
        assert content_of(version) == before
    finally:
        path.write_bytes(kept)


def content_of(folder, **options):
    with open_dataset(folder, **options) as data:
        return content(data)


ODD_TEXT = st.one_of(TEXT, st.text(alphabet=st.characters(), max_size=20), st.sampled_from([
    "open\x00it", "\u202eti nepo", "افتح الدرج", "e\u0301 and \xe9", "\u200bopen", "\ufeffopen", "🤖" * 9, "\ud83d", "a\ud800b", "\r\n",
    "\u2028",     "open\tit", "'; rm -r /", '"', "{}", "%s{0}", "\x1b[31m"]))


@given(st.lists(ODD_TEXT, min_size=2, max_size=2), st.sampled_from(["plain", "it's", "two\nlines", 'a "b" c', "ü 机器人", "$HOME `x`"]))
def test_texts_come_back_as_they_were_written_wherever_the_set_lies(place, texts, name):
    parent = place / "odd" / name
    shutil.rmtree(place / "odd", ignore_errors=True)
    version = write_rlds(parent, "tabletop_fuzz", episodes(2))
    shard, = version.glob("*.tfrecord*")
    payloads = [payload for _, payload in tfrecord.read_records(shard)]
    shard.unlink()
    encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
    with tfrecord.RecordWriter(shard) as writer:
        for payload, text in zip(payloads, encoded):
            found = {key: f.bytes() if f.kind == "bytes" else f.floats() if f.kind == "float" else f.ints()
                     for key, f in tfrecord.parse_example(payload).items()}
            found["steps/language_instruction"] = [text] * len(found["steps/language_instruction"])
            writer.write(tfrecord.write_example(found))
    data = refused_by_name(lambda: open_dataset(version, cache_dir=place / "odd cache"), shard.name, version)
    if data is not None:
        labelled = [text for text in texts if text]
        assert data.languages == labelled and [text.encode("utf-8") for text in data.languages] == [one for one in encoded if one]
        assert content_of(version, cache_dir=place / "odd cache") == content(data)
        assert json.dumps(look_at(data))
        data.close()


@given(DAMAGE)
def test_a_damaged_index_or_card_of_the_cache_is_made_anew(rlds, place, damage):
    version, shard, whole, before = rlds
    shard.write_bytes(whole)
    cache = place / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    with open_dataset(version, cache_dir=cache) as data:
        report = cached_look(data, cache, None, None)
    for path in sorted(cache.iterdir()):
        kept = path.read_bytes()
        path.write_bytes(damaged(kept, damage))
        with open_dataset(version, cache_dir=cache) as data:
            assert content(data) == before and cached_look(data, cache, None, None) == report
        path.write_bytes(kept)


CARD_VALUE = st.one_of(JSON, st.sampled_from([True, 0, -1, 1.5, float("nan"), float("inf"), 10**30, "6", [6], "end", "bgr",
                                                  [0, 1, 2, 3], "m", [[1]], {"a": 1}]),
                       st.lists(st.dictionaries(st.sampled_from(["dimension", "open", "closed", "relative", "x"]),
                                                st.one_of(st.integers(-2, 8), st.booleans(), st.floats(), TEXT)), max_size=2))
CARD = st.dictionaries(st.one_of(st.sampled_from([f.name for f in fields(DataCard)]), TEXT), CARD_VALUE, max_size=4)


@given(st.one_of(CARD, st.binary(max_size=60), st.tuples(DAMAGE), st.text(alphabet="{}[]&*:!<>|-?'\" \n01ae", max_size=30)))
def test_any_data_card_is_obeyed_or_refused_by_its_name(rlds, content):
    version, shard, whole, before = rlds
    shard.write_bytes(whole)
    path = version.parent / "data_card.yaml"
    if isinstance(content, dict):
        content = yaml.safe_dump(content, allow_unicode=True).encode("utf-8", "surrogatepass")
    elif isinstance(content, tuple):
        content = damaged(b"width: 7\ngrippers:\n  - {dimension: 6, open: 1, closed: 0}\nunits: other\nclean_texts: true\n", content[0])
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    try:
        data = refused_by_name(lambda: open_dataset(version), "data_card.yaml", shard.name, version)
        if data is not None:
            stored_NA, card = data.index.actions_NA, data.conventions.card
            scaled = [d for d in range(stored_NA.shape[1]) if d not in {one.dimension for one in data.grippers}]
            assert np.array_equal(data.standard_NA[:, scaled], stored_NA[:, scaled]) or data.degenerate
            assert card is None or card.width in (None, stored_NA.shape[1])
            data.close()
    finally:
        path.unlink()


@given(st.data())
def test_any_dataset_info_is_read_or_refused(rlds, data):
    version, shard, whole, before = rlds
    shard.write_bytes(whole)
    path = version / "dataset_info.json"
    kept = path.read_text()
    info = json.loads(kept)
    where = data.draw(st.sampled_from([("name",), ("splits",), ("splits", 0), ("splits", 0, "shardLengths"), ("splits", 0, "name"),
                                       ("splits", 0, "filepathTemplate"), ("fileFormat",)]))
    holder = info
    for key in where[:-1]:
        holder = holder[key]
    holder[where[-1]] = data.draw(JSON)
    path.write_text(json.dumps(info))
    try:
        opened = refused_by_name(lambda: open_dataset(version, conventions=Conventions(gripper="standard")), version, "tabletop")
        assert opened is None or content(opened) == before
    finally:
        path.write_text(kept)


@pytest.fixture(scope="module")
def others(place):
    """HDF5 and LeRobot sets: (folder, files that are damaged)."""
    pytest.importorskip("h5py"), pytest.importorskip("av"), pytest.importorskip("pyarrow")
    import h5py
    from test_data_formats import write_lerobot

    made = episodes()
    folder = place / "hdf5" / "libero_fuzz"
    folder.mkdir(parents=True)
    for number, episode in enumerate(made):
        with h5py.File(folder / f"do_{number}_demo.hdf5", "w") as file:
            demo = file.create_group("data/demo_0")
            demo["actions"] = np.concatenate([episode.actions[:, :-1], 1 - 2 * episode.actions[:, -1:]], axis=1).astype(np.float64)
            demo["obs/agentview_rgb"] = episode.images
    found = {"hdf5": (folder, sorted(folder.glob("*.hdf5"))[:1])}
    for version in ("v2.1", "v3.0"):
        folder = write_lerobot(place / version / "tabletop_fuzz", made, version, "png")
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        found[version] = folder, [path for path in files if "episode_00000" not in path.name or path.name.endswith("1.parquet")]
    video = write_lerobot(place / "video" / "tabletop_fuzz", episodes(2, 32), "v2.1", "rgb")
    found["video"] = video, sorted(video.rglob("*.mp4"))[:1]
    return found


@pytest.mark.parametrize("what", ["hdf5", "v2.1", "v3.0", "video"])
@given(data=st.data())
def test_a_damaged_file_of_another_format_is_refused_by_name_or_read(others, what, data):
    folder, files = others[what]
    path = data.draw(st.sampled_from(files))
    whole = path.read_bytes()
    path.write_bytes(damaged(whole, data.draw(DAMAGE)))
    skip = data.draw(st.booleans())
    try:
        opened = refused_by_name(lambda: open_dataset(folder, skip_bad=skip), folder, folder.name)
        if opened is not None:
            assert np.isfinite(opened.actions_NA).all()
            for e in range(len(opened)):
                for t in range(int(opened.lengths[e])):
                    refused_by_name(lambda e=e, t=t: opened.image(e, t), folder, folder.name)
            opened.close()
    finally:
        path.write_bytes(whole)


COLUMNS = ["action", "timestamp", "frame_index", "episode_index", "index", "task_index", "observation.images.image"]
CELL = st.one_of(st.none(), st.booleans(), st.integers(-2, 9), st.floats(width=32), st.sampled_from(["", "0", "x"]),
                 st.lists(st.floats(-1, 1, width=32), max_size=8), st.lists(st.lists(st.floats(-1, 1, width=32), max_size=8), max_size=3))
TYPES = ["float64", "float32", "float16", "int64", "int32", "int8", "uint8", "string", "bool", "list<double>", "list<int32>",
         "list<float16>", "large_list<float>"]


def edits_of(columns):
    """What is done to a table with these columns."""
    column, row = st.sampled_from(columns), st.integers(0, 14)
    return st.one_of(st.tuples(st.sampled_from(["drop", "twice", "first", "rename"]), column),
                     st.tuples(st.just("cast"), column, st.sampled_from(TYPES)), st.tuples(st.just("cell"), column, row, CELL),
                     st.tuples(st.sampled_from(["move", "copy", "exchange"]), row, row), st.tuples(st.just("remove"), row))


def edited(table, edit):
    """A table of pyarrow after one edit; None where pyarrow cannot make it."""
    import pyarrow as pa

    kind, *rest = edit
    try:
        if kind in ("drop", "twice", "first", "rename", "cast", "cell"):
            at = table.column_names.index(rest[0])
            column = table[rest[0]]
            if kind == "drop":
                return table.remove_column(at)
            if kind == "twice":
                return table.append_column(rest[0], column)
            if kind == "first":
                return table.remove_column(at).add_column(0, rest[0], column)
            if kind == "rename":
                return table.rename_columns([name + "s" if name == rest[0] else name for name in table.column_names])
            if kind == "cast":
                inner = {"list<double>": pa.list_(pa.float64()), "list<int32>": pa.list_(pa.int32()),
                         "list<float16>": pa.list_(pa.float16()), "large_list<float>": pa.large_list(pa.float32()), "bool": pa.bool_()}
                return table.set_column(at, rest[0], column.cast(inner.get(rest[1]) or getattr(pa, rest[1])(), safe=False))
            values = column.to_pylist()
            values[rest[1] % len(values)] = rest[2]
            for wanted in (column.type, None):
                try:
                    return table.set_column(at, rest[0], pa.array(values, wanted))
                except (pa.ArrowException, TypeError, ValueError, OverflowError):
                    continue
            return None
        rows = list(range(table.num_rows))
        a, b = (value % len(rows) for value in (rest * 2)[:2])
        if kind == "exchange":
            rows[a], rows[b] = rows[b], rows[a]
        else:
            row = rows[a] if kind == "copy" else rows.pop(a)
            rows[b:b] = [] if kind == "remove" else [row]
        return table.take(rows)
    except (pa.ArrowException, ValueError, TypeError, KeyError, IndexError):
        return None


def told_by(table, tasks):
    """(episode, frame) -> the actions and texts of all rows that say they are it."""
    found = {}
    for row in table.to_pylist():
        try:
            action = np.array([float(value) for value in row["action"]], np.float32)
            found.setdefault((row["episode_index"], row["frame_index"]), []).append((action.tobytes(), tasks.get(row["task_index"])))
        except (TypeError, ValueError, KeyError):
            continue
    return found


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
@given(edits=st.lists(edits_of(COLUMNS), min_size=1, max_size=3), skip=st.booleans())
def test_a_table_of_any_columns_and_rows_gives_its_own_labels_or_is_refused(others, version, edits, skip):
    import pyarrow.parquet as pq

    folder, _ = others[version]
    path = sorted((folder / "data").rglob("*.parquet"))[-1]
    whole, table = path.read_bytes(), pq.ParquetFile(path).read()
    tasks = {i: f"do {i}" for i in range(3)}
    for edit in edits:
        after = edited(table, edit) if table is not None and table.num_rows else None
        table = after if after is not None else table
    try:
        pq.write_table(table, path)
    except Exception:  # what parquet cannot hold
        path.write_bytes(whole)
        return
    try:
        data = refused_by_name(lambda: open_dataset(folder, skip_bad=skip), folder, folder.name)
        if data is None:
            return
        files = sorted((folder / "data").rglob("*.parquet"))
        told_of = [told_by(pq.ParquetFile(file).read(), tasks) for file in files]  # of v2.1 an episode each
        for e in range(len(data)):
            for t in range(int(data.lengths[e])):
                told = told_of[data.number(e) % len(files)][data.number(e), t]
                got = (data.index.actions_NA[int(data.starts[e]) + t].tobytes(), data.instruction(e, t))
                assert len(told) == 1 and got == told[0], f"episode {data.number(e)}, frame {t}: {got} and the table says {told}"
        data.close()
    finally:
        path.write_bytes(whole)


META = ["episode_index", "length", "tasks", "data/chunk_index", "data/file_index"]


@given(edits=st.lists(edits_of(META), min_size=1, max_size=3), skip=st.booleans())
def test_a_list_of_episodes_of_any_columns_and_rows_gives_no_episode_anothers_labels(others, edits, skip):
    import pyarrow.parquet as pq

    folder, _ = others["v3.0"]
    path, = (folder / "meta/episodes").rglob("*.parquet")
    whole, table = path.read_bytes(), pq.ParquetFile(path).read()
    told = told_by(pq.ParquetFile(next((folder / "data").rglob("*.parquet"))).read(), {i: f"do {i}" for i in range(3)})
    for edit in edits:
        after = edited(table, edit) if table.num_rows else None
        table = after if after is not None else table
    try:
        pq.write_table(table, path)
        data = refused_by_name(lambda: open_dataset(folder, skip_bad=skip), folder, folder.name)
        if data is not None:
            for e in range(len(data)):
                first, number = int(data.starts[e]), data.number(e)
                got = [(data.index.actions_NA[first + t].tobytes(), data.instruction(e, t)) for t in range(int(data.lengths[e]))]
                assert [[one] for one in got] == [told[number, t] for t in range(4 + number)]
            data.close()
    finally:
        path.write_bytes(whole)


@given(st.lists(st.dictionaries(st.sampled_from(["episode_index", "length", "tasks", "x"]),
                                st.one_of(st.integers(-1, 7), st.floats(), st.booleans(), TEXT, st.none()), max_size=3), max_size=4),
       st.lists(st.dictionaries(st.sampled_from(["task_index", "task"]), st.one_of(st.integers(-1, 3), st.booleans(), TEXT, st.none()),
                                max_size=2), max_size=4), st.booleans())
def test_any_lines_of_episodes_and_tasks_are_read_or_refused(others, lines, tasks, keep):
    folder, _ = others["v2.1"]
    paths = [folder / "meta/episodes.jsonl", folder / "meta/tasks.jsonl"]
    kept = [path.read_bytes() for path in paths]
    whole = content_of(folder)
    for path, data, made in zip(paths, kept, (lines, tasks)):
        path.write_bytes((data + b"\n" if keep else b"") + "\n".join(map(json.dumps, made)).encode())
    try:
        data = refused_by_name(lambda: open_dataset(folder), folder)
        if data is not None and keep:
            assert content(data) == whole
        if data is not None:
            data.close()
    finally:
        for path, data in zip(paths, kept):
            path.write_bytes(data)


@given(st.binary(max_size=60), DAMAGE, st.booleans())
def test_any_bytes_as_a_picture(data, damage, real):
    data = damaged(encode_png(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)), damage) if real else data
    picture = refused_by_name(lambda: decode_image(data, "frame 7"), "frame 7")
    assert picture is None or (picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3)


# ---- prompts, masks, actions, statistics ----

INSTRUCTION = st.one_of(st.text(max_size=60), st.text(alphabet="ab ,?\n:;<image>InOut 1", max_size=40),
                        st.sampled_from(["\nOut:", "In: x\nOut:", "Task: a, State: 1;\nAction:", "<s>", "</s>", "<PAD>", " ", "<image>",
                                         "把杯子放到左边"]))


@given(INSTRUCTION, st.lists(st.floats(-1.5, 1.5, width=32), min_size=7, max_size=7))
def test_training_continues_the_evaluated_prompt_and_labels_are_the_action(processor, text, action):  # noqa: F811
    sample = Sample(IMAGE, text, np.array(action, np.float32))
    ids, labels = prompts.encode_text(sample, processor)
    target = [i for i in labels if i != IGNORE_INDEX]
    assert ids[-len(target):] == target and labels.count(IGNORE_INDEX) == len(ids) - len(target) and len(target) == 8
    back = processor.action_tokenizer.decode(np.array(target[:-1]))
    assert np.abs(back - np.clip(action, -1, 1)).max() <= 1 / 255 + 1e-6
    if "<image>" not in prompts.prompt_text(sample):
        assert prompts.encode_prompts([sample], processor).input_ids[0].tolist() == ids[:labels.count(IGNORE_INDEX)]


@given(st.lists(st.tuples(INSTRUCTION, st.booleans()), min_size=1, max_size=3))
def test_masks_cover_the_instruction_and_nothing_of_the_template(processor, rows):  # noqa: F811
    samples = [Sample(IMAGE, text, question=question) for text, question in rows]
    batch = processor.encode_prompts(samples)
    mask_BL = mask_from_prompt(batch, samples, processor)
    assert mask_BL.shape == batch.input_ids.shape and not (mask_BL & ~batch.attention_mask).any()
    for sample, mask_L in zip(samples, mask_BL):
        rows = audit(sample, processor)
        assert [row.kept for row in rows] == mask_L[:len(rows)].tolist()
        covered = "".join(row.text for row in rows if row.kept)
        if not covered.strip():
            assert not any(mask_L)


@given(st.integers(2, 300), st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), min_size=1, max_size=20))
def test_the_action_codec(bins, values):
    codec = ActionTokenizer(1000, bins)
    ids = codec.encode(np.array(values, np.float32))
    assert ((ids > 1000 - bins - 1) & (ids <= 1000)).all()
    back = codec.decode(ids)
    finite = np.isfinite(values)
    clipped = np.clip(np.array(values)[finite], -1, 1)
    assert np.abs(back[finite] - clipped).max(initial=0) <= 1 / (bins - 1) + 1e-6  # half of a bin
    assert np.array_equal(codec.encode(back)[back < codec.bin_centers[-1]], ids[back < codec.bin_centers[-1]])


def arrays(low, high):
    number = st.one_of(st.floats(low, high, width=32), st.sampled_from([0.0, 1.0, -1.0]))
    return st.integers(1, 30).flatmap(lambda n: st.lists(st.lists(number, min_size=4, max_size=4), min_size=n, max_size=n)).map(
        lambda rows: np.array(rows, np.float32))


@given(arrays(-1e4, 1e4))
def test_what_is_normalised_comes_back_or_is_counted_as_clipped(actions_NA):
    statistics = json.loads(json.dumps(action_statistics(actions_NA, 1)))
    scaled_NA, clipped = normalise(actions_NA, {"action": statistics["action"]}, official=True)
    demonstrated_NA, again = normalise(actions_NA, {"action": statistics["action"]})
    assert again == clipped and np.array_equal(demonstrated_NA[:, :3], scaled_NA[:, :3])
    assert np.array_equal(demonstrated_NA[:, 3], actions_NA[:, 3]), "a gripper keeps its value, also one that never moves"
    assert np.isfinite(scaled_NA).all() and (np.abs(scaled_NA[:, :3]) <= 1).all()
    assert np.array_equal(scaled_NA[:, 3], np.where(statistics["action"]["min"][3] == statistics["action"]["max"][3], 0, actions_NA[:, 3]))
    back_NA = unnormalise(scaled_NA, statistics)
    low, high = np.array(statistics["action"]["q01"]), np.array(statistics["action"]["q99"])
    wide = high - low > 1e-3 * np.maximum(1, np.abs(actions_NA).max(0))  # narrower ones are those that the official code does not keep
    inside_NA = (actions_NA >= low) & (actions_NA <= high) & wide & (np.arange(4) < 3)
    assert np.abs(back_NA - actions_NA)[inside_NA].max(initial=0) <= 1e-3 * max(1.0, float(np.abs(actions_NA).max()))
    constant = np.array(statistics["action"]["min"]) == np.array(statistics["action"]["max"])
    beyond_NA = np.abs(np.float32(2) * (actions_NA - low.astype(np.float32)) / (high - low + 1e-8).astype(np.float32) - np.float32(1)) > 1
    assert clipped == int(beyond_NA[:, (np.arange(4) < 3) & ~constant].sum())


@given(st.lists(st.integers(1, 12), min_size=1, max_size=12), st.integers(1, 40), st.integers(0, 2**32 - 1), st.integers(0, 200))
def test_every_frame_comes_once_in_an_epoch_wherever_one_begins(lengths, block, seed, start):
    order = SampleOrder(lengths, block, seed)
    epoch = order.keys(0, order.frames)
    assert sorted(map(tuple, epoch.tolist())) == [(e, t) for e, n in enumerate(lengths) for t in range(n)]
    assert np.array_equal(SampleOrder(lengths, block, seed).keys(start, 7), order.keys(0, start + 7)[start:])


# ---- configurations ----

KEYS = ["options.x", *(key for key in known_keys(Config) if not is_dataclass(type_of(Config, key)) and key != "root")]
WORD = st.one_of(TEXT, st.sampled_from(["1", "-1", "0.5", "1e-3", "true", "null", "[a, b]", "[1, 2]", "nan", "inf", "{}", "[", "'",
                                        "机器人", "--x", "-inf", "1e400", "9" * 400, "0x10", "1_000",
                                        "2001-99-99", "0x", "!!int a", "yes", "'true'", "1e", ".5", "{a: 1, a: 2}", "{[a]: 1}", "&a [*a]",
                                        "[[[[", "\x00", "~", "190:20:30"]), st.integers().map(str), st.floats().map(str))


@settings(max_examples=EXAMPLES or 8)
@given(st.lists(st.tuples(st.sampled_from(KEYS), WORD), max_size=3))
def test_any_word_on_the_command_line_is_a_value_or_a_named_mistake(pairs):
    argv = [word for key, value in pairs for word in (f"--{key}={value}",)]
    try:
        config = load_config(None, argv)
    except ConfigError as error:
        assert any(key in str(error) for key, _ in pairs), str(error)
        return
    config.problems()
    assert load_config_again(config) == config


def load_config_again(config):
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
        yaml.safe_dump(to_dict(config), file, sort_keys=False)
        file.flush()
        return load_config(file.name, [])


TREE = st.dictionaries(st.sampled_from(["train", "seed", "data", "options", "x", "name"]), JSON, max_size=3)


@given(st.one_of(st.binary(max_size=80), TREE.map(lambda tree: yaml.safe_dump(tree).encode()), DAMAGE))
def test_any_file_is_a_configuration_or_a_named_mistake(place, content):
    path = place / "config.yaml"
    if isinstance(content, tuple):
        content = damaged(yaml.safe_dump(to_dict(Config()), sort_keys=False).encode(), content)
    path.write_bytes(content)
    config = refused_by_name(lambda: load_config(str(path), []), path, "--")
    assert config is None or isinstance(config, Config)


@given(TEXT, st.lists(TEXT, max_size=3))
def test_a_message_is_completed_whatever_is_in_it(message, words):
    for text in (message, f"`vlakeep offline {message}`", f"a `vlakeep {message}` b"):
        assert isinstance(completed(text, ["train", *words]), str)
    assert completed(message.replace("`", ""), ["train", *words]) == message.replace("`", "")


# ---- files that hold a run ----

LEAVES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXT,
                   st.lists(st.floats(width=32), max_size=4).map(lambda v: np.array(v, np.float32)),
                   st.lists(st.integers(-5, 5), max_size=4).map(torch.tensor))
TREES = st.recursive(LEAVES, lambda inner: st.one_of(
    st.lists(inner, max_size=3), st.lists(inner, max_size=3).map(tuple),
    st.dictionaries(st.one_of(TEXT, st.integers(), st.sampled_from(["__tensor__", "__items__"])), inner, max_size=3)), max_leaves=8)


def same(a, b):
    if isinstance(a, (np.ndarray, torch.Tensor)):
        like = type(a) is type(b) and a.dtype == b.dtype and a.shape == b.shape
        return like and np.asarray(a).tobytes() == np.asarray(b).tobytes()
    if isinstance(a, dict):
        return type(b) is dict and list(a) == list(b) and all(same(x, y) for x, y in zip(a.values(), b.values()))
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b)))


@given(TREES)
def test_any_state_comes_back(tree):
    packed, tensors = pack(tree)
    assert same(tree, unpack(json.loads(json.dumps(packed)), tensors)) and same(tree, from_bytes(to_bytes(tree)))


@pytest.fixture(scope="module")
def saved(place):
    """(folder of a checkpoint, what is in it)."""
    tensors = {"trainable": {"a": torch.arange(6.0), "b": torch.ones(2, 2)}}
    state = {"step": 3, "ranks": [{"stream": {"x": 1}}], "array": np.arange(4)}

    def adapter(to):
        (to / "adapter").mkdir()
        (to / "adapter" / "x.json").write_text("{}")

    return save_checkpoint(place / "run", 3, tensors, state, adapter), tensors, state


@given(st.data())
def test_a_damaged_checkpoint_is_refused_or_the_same(saved, data):
    folder, tensors, state = saved
    path = data.draw(st.sampled_from(sorted(p for p in folder.rglob("*") if p.is_file())))
    whole = path.read_bytes()
    path.write_bytes(damaged(whole, data.draw(DAMAGE)))
    try:
        found = refused_by_name(lambda: load_checkpoint(folder), path, folder)
        if found is not None:
            assert all(torch.equal(found[0]["trainable"][key], value) for key, value in tensors["trainable"].items())
            assert same({**state, "array": np.arange(4)}, found[1])
    finally:
        path.write_bytes(whole)


@given(st.one_of(st.binary(max_size=60), DAMAGE))
def test_any_bytes_as_weights(place, saved, content):
    path = place / "model.safetensors"
    whole = (saved[0] / "trainable.safetensors").read_bytes()
    path.write_bytes(damaged(whole, content) if isinstance(content, tuple) else content)
    if refused_by_name(lambda: tensor_table(path), path) is not None:
        refused_by_name(lambda: list(read_tensors([path], quiet=True)), path)


@given(st.data())
def test_a_damaged_artefact_is_refused_or_the_same(place, data):
    folder = place / "artefact"
    if not folder.exists():
        meta = dict(weights_sha256="w" * 64, dtype="float32", quantisation="none", probe_sha256="p" * 64, probe_items=4, depth=4,
                    layers=[1, 3], layer_map={"0": 1, "1": 1, "2": 3, "3": 3}, config={"rank": 2})
        layers = {layer: dict(U_f=torch.ones(4, 1), U_p=torch.eye(4)[:, :2], mu=torch.arange(4.0), C_T=torch.eye(4)) for layer in (1, 3)}
        icsm_artifact.write(folder, layers, {"a.p": torch.ones(4, 2)}, {"pooled.1": torch.ones(4, 4), "items": torch.arange(4)}, meta)

    def everything():
        found = icsm_artifact.load(folder)
        return {**found.meta, "map": found.layer_map, "bases": [[t.tolist() for t in found.residual_basis(layer)] for layer in
                                                                 found.layers],
                "statistics": [[t.tolist() for t in found.teacher_statistics(layer)] for layer in found.layers],
                "tokens": {name: {k: t.tolist() for k, t in one.items()} for name, one in found.token_bases().items()}}

    before = everything()
    path = data.draw(st.sampled_from(sorted(folder.iterdir())))
    whole = path.read_bytes()
    path.write_bytes(damaged(whole, data.draw(DAMAGE)))
    try:
        found = refused_by_name(everything, folder)
        assert found is None or found == before
    finally:
        path.write_bytes(whole)


@given(st.one_of(st.binary(max_size=60), DAMAGE))
def test_a_damaged_configuration_of_a_run_is_refused_by_name(place, content):
    path = place / "config.yaml"
    path.write_bytes(damaged(yaml.safe_dump(to_dict(Config())).encode(), content) if isinstance(content, tuple) else content)
    refused_by_name(lambda: read_mapping(path, "train again"), path)


@pytest.fixture(scope="module")
def probe(place):
    samples = [Sample(np.full((8, 8, 3), i, np.uint8), f"do {i}") for i in range(4)]
    write_probe(place / "probe", samples, ["a", "a", "b", "b"])
    return place / "probe"


@given(st.data())
def test_a_damaged_probe_is_refused_or_the_same(probe, data):
    path = data.draw(st.sampled_from(sorted(probe.iterdir())))
    whole, before = path.read_bytes(), ProbeSet(probe)
    items, pictures = before.items, np.array(before._images)
    path.write_bytes(damaged(whole, data.draw(DAMAGE)))
    try:
        found = refused_by_name(lambda: ProbeSet(probe), probe)
        if found is not None:
            assert found.items == items and np.array_equal(found._images, pictures)
    finally:
        path.write_bytes(whole)


ROWS = [dict(kind="skill", ability="reach", trial=i, seed=i, success=True, value=None, crash=None, steps=1) for i in range(4)]


@given(DAMAGE)
def test_damaged_records_are_refused_or_lose_their_end(place, damage):
    path = place / "records.jsonl"
    path.unlink(missing_ok=True)
    with Records(path, {"weights": "w"}) as records:
        for row in ROWS:
            records.add(**row)
    path.write_bytes(damaged(path.read_bytes(), damage))

    def opened():
        with Records(path, {"weights": "w"}) as records:
            return records.rows()

    refused_by_name(opened, path)


@given(DAMAGE)
def test_damaged_metrics_are_refused_or_lose_their_end(place, damage):
    path = place / "metrics.jsonl"
    path.write_bytes(damaged(b"".join(json.dumps({"step": i, "loss": 0.5}).encode() + b"\n" for i in range(4)), damage))
    refused_by_name(lambda: read_metrics(place), path)


def test_the_profile_of_the_suite_is_the_same_every_time():
    assert EXAMPLES or settings().derandomize
