"""The training stream: every frame once per epoch, the same order for any number of processes and threads, exact resume."""

import itertools
import json
import os
from collections import Counter

import numpy as np
import pytest
import torch
from test_data_prompts import processor  # noqa: F401  (a fixture)
from test_data_rlds import make_episodes

from vlakeep.core.config import DataConfig
from vlakeep.data.formats import open_datasets
from vlakeep.data.loader import BatchStream, make_stream
from vlakeep.data.order import SampleOrder
from vlakeep.data.writer import write_rlds

NAMES = ["tabletop_a", "tabletop_b"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("datasets")
    for i, name in enumerate(NAMES):
        write_rlds(root, name, make_episodes(6, size=20, seed=i))
    return root


@pytest.fixture
def stream(root, processor):  # noqa: F811
    opened = []

    def make(**options):
        options = {"batch_size": 3, "seed": 1, "shuffle_buffer": 10, **options}
        opened.append(BatchStream(open_datasets(root, NAMES), processor, **options))
        return opened[-1]

    yield make
    for item in opened:
        item.close()


def same(a, b):
    return all(torch.equal(getattr(a, f), getattr(b, f)) for f in ("input_ids", "attention_mask", "labels", "pixel_values")) \
        and a.dataset_names == b.dataset_names


@pytest.mark.parametrize("block", [1, 7, 10, 10**6])
def test_order_covers_every_frame_once_per_epoch(block):
    lengths = [3, 1, 5, 2, 8]
    order = SampleOrder(lengths, block, seed=3)
    frames = {(e, t) for e, n in enumerate(lengths) for t in range(n)}
    epochs = [list(map(tuple, order.keys(k * 19, 19).tolist())) for k in range(3)]
    for epoch in epochs:
        assert Counter(epoch) == Counter(frames)
    assert epochs[0] != epochs[1] != epochs[2]
    assert not np.array_equal(order.keys(0, 19), SampleOrder(lengths, block, seed=4).keys(0, 19))


def test_epochs_differ_in_their_episodes_and_within_them():
    """One long episode can only be shuffled within, many short ones with a block of one only among each other."""
    for lengths, block in (([60], 60), ([1] * 60, 1)):
        order = SampleOrder(lengths, block, seed=3)
        one, two = order.keys(0, 60), order.keys(60, 60)
        assert not np.array_equal(one, two) and np.array_equal(np.unique(one, axis=0), np.unique(two, axis=0))


def test_blocks_of_an_epoch_are_shuffled_each_in_its_own_way():
    order = SampleOrder([48], 8, seed=3)
    blocks = [tuple(order.keys(8 * k, 8)[:, 1] - 8 * k) for k in range(6)]
    assert all(sorted(block) == list(range(8)) for block in blocks) and len(set(blocks)) == 6


def test_order_is_the_same_from_any_position():
    whole = SampleOrder([3, 1, 5, 2, 8], 7, 0).keys(0, 100)
    order = SampleOrder([3, 1, 5, 2, 8], 7, 0)
    for start in np.random.default_rng(0).integers(0, 90, 30):  # jumping about, so that the caches are wrong as often as possible
        count = int(min(100 - start, 9))
        assert np.array_equal(order.keys(int(start), count), whole[start:start + count])


def test_samples_are_the_data(stream):
    made = stream()
    for (episode, frame), position in zip(made.order.keys(0, 20), range(20)):
        which, local = divmod(int(episode), 6)
        raw, sample = made.datasets[which].frame(local, int(frame)), made.sample(episode, frame, position)
        assert sample.image.shape == (64, 64, 3) and sample.image.dtype == np.uint8  # the stored pictures are 20 x 20
        assert sample.instruction == raw.instruction and sample.dataset == NAMES[which]
        assert np.array_equal(sample.action, raw.action)
    batch = next(made)
    assert batch.size == 3 and set(batch.dataset_names) <= set(NAMES)
    assert set(made.statistics) == set(made.clipped) == set(NAMES)


def test_resume_continues_exactly_from_random_points(stream):
    plain = list(itertools.islice(stream(), 30))
    for taken in np.random.default_rng(0).integers(0, 25, 6):
        first = stream()
        for _ in range(taken):
            next(first)
        state = json.loads(json.dumps(first.state_dict()))
        second = stream(workers=int(taken) % 3)
        next(second)  # a stream that is already under way must not keep what it read ahead
        second.load_state_dict(state)
        for k in range(int(taken), int(taken) + 4):
            assert same(next(second), plain[k])
        assert second.state_dict() == {**state, "micro_batches": int(taken) + 4}


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_the_stream_of_one(stream, world):
    plain = list(itertools.islice(stream(), 12))
    ranks = [stream(rank=rank, world=world) for rank in range(world)]
    for m, batch in enumerate(plain):
        assert same(next(ranks[m % world]), batch)
    states = [rank.state_dict() for rank in ranks]
    assert all(state == states[0] for state in states)
    alone = stream()  # and a run may go on with another number of processes
    alone.load_state_dict(states[0])
    wanted = stream()
    for _ in range(12):
        next(wanted)
    assert same(next(alone), next(wanted))


def test_threads_change_nothing(stream):
    for image_aug in (False, True):
        plain, threaded = stream(image_aug=image_aug), stream(image_aug=image_aug, workers=3)
        for _ in range(20):
            assert same(next(plain), next(threaded))


def test_augmentation_depends_on_the_position_only(stream):
    plain, changed = next(stream()), next(stream(image_aug=True))
    assert torch.equal(plain.input_ids, changed.input_ids) and not torch.equal(plain.pixel_values, changed.pixel_values)


@pytest.mark.parametrize("options,flag", [
    ({"batch_size": 4}, "--train.batch_size"), ({"seed": 2}, "--seed"), ({"shuffle_buffer": 11}, "--data.shuffle_buffer"),
    ({"image_aug": True}, "--data.image_aug")])
def test_resume_with_other_settings_is_refused(stream, options, flag):
    with pytest.raises(ValueError, match=flag):
        stream(**options).load_state_dict(stream().state_dict())


def test_resume_with_other_pictures_is_refused(stream, tmp_path, processor):  # noqa: F811
    """Rendered again under the same names: actions and texts, which the data's fingerprint is of, are the same."""
    for i, name in enumerate(NAMES):
        episodes = make_episodes(6, size=20, seed=i)
        episodes[-1].images[-1, 0, 0, 0] ^= 1
        write_rlds(tmp_path, name, episodes if name == NAMES[-1] else make_episodes(6, size=20, seed=i))
    others = BatchStream(open_datasets(tmp_path, NAMES, cache_dir=tmp_path / "cache"), processor, 3, 1, shuffle_buffer=10)
    again = BatchStream(open_datasets(tmp_path, NAMES, cache_dir=tmp_path / "cache"), processor, 3, 1, shuffle_buffer=10)
    whole = stream()
    assert others.fingerprints == whole.fingerprints
    with pytest.raises(ValueError, match=f"the pictures of {NAMES[-1]} are not those"):
        others.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    again.load_state_dict(json.loads(json.dumps(others.state_dict())))  # from the kept index
    earlier = {key: value for key, value in whole.state_dict().items() if key != "pictures"}  # of a run that did not know of it
    others.load_state_dict(earlier)
    for one in (others, again):
        one.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_picture_stops_the_stream_at_its_batch(stream, workers, monkeypatch):
    made = stream(workers=workers)
    episode, frame = made.order.keys(7, 1)[0]  # in the third batch
    image = made.datasets[0].__class__.image

    def broken(self, e, t):
        if self is made.datasets[episode // 6] and (e, t) == (episode % 6, frame):
            raise ValueError("damaged picture")
        return image(self, e, t)

    monkeypatch.setattr(made.datasets[0].__class__, "image", broken)
    next(made), next(made)
    for _ in range(2):  # asking again neither skips the batch nor hangs
        with pytest.raises(ValueError, match="damaged picture"):
            next(made)
    monkeypatch.undo()
    assert next(made).size == 3


def test_make_stream_reads_the_configuration(root, processor, tmp_path):  # noqa: F811
    config = DataConfig(datasets=NAMES, train_fraction=0.5, shuffle_buffer=5)
    made = make_stream(config, root, processor, 2, 7, cache_dir=tmp_path / "cache")
    assert [len(d) for d in made.datasets] == [3, 3] and len(list((tmp_path / "cache").iterdir())) == 2
    assert made.num_frames == sum(d.num_frames for d in made.datasets) and next(made).size == 2
    made.close()


def test_the_actions_are_scaled_by_the_statistics_that_the_configuration_names(root, processor, tmp_path):  # noqa: F811
    """An action then has the tokens that it has for the base, and the run's own entry says so."""
    own = make_stream(DataConfig(datasets=NAMES), root, processor, 2, 7)
    low, high = [-2.0] * 6 + [0.0], [2.0] * 6 + [1.0]
    entry = {"action": {"q01": low, "q99": high, "min": low, "max": high, "mask": [True] * 6 + [False]}}
    known = {"base": entry, "other": own.statistics[NAMES[0]], "short": {"action": {"q01": [0.0], "q99": [1.0]}}}
    made = make_stream(DataConfig(datasets=NAMES, statistics="base"), root, processor, 2, 7, known=known)
    assert made.statistics == dict.fromkeys(NAMES, entry) != own.statistics
    for before, after in zip(own.datasets, made.datasets):
        raw_TA = before.episode(0).actions
        assert after.actions(0)[:, :6] == pytest.approx(np.clip(raw_TA[:, :6] / 2, -1, 1), abs=1e-6)
        assert np.array_equal(after.actions(0)[:, 6], before.actions(0)[:, 6])
    with pytest.raises(ValueError, match="changed: .*--data.statistics"):
        own.load_state_dict(made.state_dict())
    with pytest.raises(ValueError, match="--data.statistics bridge: the base has action statistics of base, other, short"):
        make_stream(DataConfig(datasets=NAMES, statistics="bridge"), root, processor, 2, 7, known=known)
    with pytest.raises(ValueError, match="actions of 7 values, the statistics are of 1"):
        make_stream(DataConfig(datasets=NAMES, statistics="short"), root, processor, 2, 7, known=known)
    for stream in (own, made):
        stream.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
def test_decoding_in_processes_leaves_random_numbers_to_the_training(stream):
    """Dropout draws from them: a resumed run starts its processes behind the state that it has restored."""
    made = stream(workers=1, processes=True)
    torch.manual_seed(3)
    wanted = torch.get_rng_state()
    next(made)
    assert torch.equal(torch.get_rng_state(), wanted)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
def test_decoding_in_processes_changes_nothing_and_goes_on_from_any_point(stream):
    plain = stream(image_aug=True)
    wanted = [next(plain) for _ in range(9)]
    made = stream(image_aug=True, workers=2, processes=True)
    assert all(same(next(made), one) for one in wanted[:5])
    state = made.state_dict()
    assert same(next(made), wanted[5])
    made.load_state_dict(state)
    assert all(same(next(made), one) for one in wanted[5:8])
    second = stream(image_aug=True, workers=2, processes=True, rank=1, world=2)
    assert [same(next(second), one) for one in wanted[1::2]] == [True] * 4
