"""Cameras, state and chunks of actions, from the files of every format through training, probe and evaluation, with toy_model.py.

It looks through the cameras left and right, takes two numbers of state, and answers with chunks of two actions of three values.
"""

import json
import shutil
from importlib.metadata import EntryPoint

import numpy as np
import pytest
import torch
from conftest import BASELINE, GRADED, read_evaluation
from toy_model import SIDE, make_folder

from vlakeep.benchmarks import specs
from vlakeep.benchmarks.open_loop import chunk_errors, token_accuracy
from vlakeep.benchmarks.policy import ActionPolicy, ChunkQueue, FixedBatch
from vlakeep.benchmarks.specs import ObservationSpec
from vlakeep.core.config import DataConfig, load_config
from vlakeep.core.storage import Storage
from vlakeep.data import images, writer
from vlakeep.data.formats import open_configured, open_dataset
from vlakeep.data.loader import make_stream
from vlakeep.data.sample import ONE_PICTURE, Episode, Sample, SampleSpec
from vlakeep.data.statistics import normalise_state, state_statistics
from vlakeep.data.writer import write_rlds
from vlakeep.evaluate import run_evaluation
from vlakeep.models import load
from vlakeep.models.load import make_backbone
from vlakeep.offline import run_offline
from vlakeep.probe.probe_set import ProbeError, ProbeSet, write_probe
from vlakeep.tabletop.rollout import run_skill_episodes
from vlakeep.train import run_training

NAME, STEPS = "tabletop_pairs", (4, 3, 5, 4)
CAMERAS = {"rlds": ["image", "wrist_image"], "hdf5": ["agentview_rgb", "eye_in_hand_rgb"], "lerobot": ["front", "wrist"]}
SPEC = SampleSpec(cameras=("left", "right"), state=2, chunk=2)


@pytest.fixture(scope="module", autouse=True)
def toy_kind():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load, "entry_points", lambda group: [EntryPoint("toy", "toy_model:Toy", group)] if group == load.GROUP else [])
        load._outside.cache_clear()
        yield
    load._outside.cache_clear()


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return make_backbone(make_folder(tmp_path_factory.mktemp("models") / "toy"))


@pytest.fixture(scope="module")
def episodes():
    """(episodes, the pictures of their second camera)."""
    rng = np.random.default_rng(0)
    texts = ["open the red door", "close the blue box", "open the box", "close the red box"]
    made, wrists = [], []
    for text, steps in zip(texts, STEPS):
        actions = np.concatenate([rng.uniform(-1, 1, (steps, 2)), rng.integers(0, 2, (steps, 1))], axis=1).astype(np.float32)
        pictures = rng.integers(0, 256, (2, steps, SIDE, SIDE, 3), dtype=np.uint8)
        made.append(Episode(pictures[0], actions, text, rng.normal(size=(steps, 2)).astype(np.float32)))
        wrists.append(pictures[1])
    return made, wrists


def write_hdf5(folder, made, wrists):
    h5py = pytest.importorskip("h5py")
    folder.mkdir(parents=True, exist_ok=True)
    for episode, wrist in zip(made, wrists):
        with h5py.File(folder / f"{episode.language.replace(' ', '_')}_demo.hdf5", "w") as file:
            demo = file.create_group("data/demo_0")
            demo["actions"] = episode.actions
            for camera, frames in zip(CAMERAS["hdf5"], (episode.images, wrist)):
                demo[f"obs/{camera}"] = frames[:, ::-1, ::-1]
            demo["obs/ee_states"], demo["obs/gripper_states"] = episode.state[:, :1], episode.state[:, 1]


def write_lerobot(folder, made, wrists):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pytest.importorskip("av")
    (folder / "meta").mkdir(parents=True, exist_ok=True)
    (folder / "data/chunk-000").mkdir(parents=True)
    keys = [f"observation.images.{camera}" for camera in CAMERAS["lerobot"]]
    for number, (episode, wrist) in enumerate(zip(made, wrists)):
        steps = len(wrist)
        pictures = {key: pa.array([{"bytes": images.encode_png(one), "path": ""} for one in frames])
                    for key, frames in zip(keys, (episode.images, wrist))}
        lists = {"action": pa.array(episode.actions.tolist(), pa.list_(pa.float32())),
                 "observation.state": pa.array(episode.state.tolist(), pa.list_(pa.float32()))}
        pq.write_table(pa.table({
            **lists, **pictures, "timestamp": np.arange(steps) / 10, "frame_index": range(steps), "episode_index": [number] * steps,
            "task_index": [number] * steps}), folder / f"data/chunk-000/episode_{number:06d}.parquet")
    rows = [{"episode_index": i, "tasks": [one.language], "length": len(one.images)} for i, one in enumerate(made)]
    (folder / "meta/episodes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "meta/tasks.jsonl").write_text("".join(json.dumps({"task_index": i, "task": e.language}) + "\n" for i, e in enumerate(made)))
    features = {**{key: {"dtype": "image", "shape": [SIDE, SIDE, 3]} for key in keys},
                "action": {"dtype": "float32", "shape": [3]}, "observation.state": {"dtype": "float32", "shape": [2]}}
    (folder / "meta/info.json").write_text(json.dumps({
        "codebase_version": "v2.1", "fps": 10, "features": features, "splits": {"train": f"0:{len(made)}"},
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"}))


@pytest.fixture(scope="module")
def written(tmp_path_factory, episodes):
    """root / format / NAME."""
    made, wrists = episodes
    root, example, left = tmp_path_factory.mktemp("pairs"), writer.write_example, iter(wrists)

    def with_wrist(features):
        wrist = [images.encode_png(one) for one in next(left)]
        return example({**features, "steps/observation/wrist_image": wrist})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "write_example", with_wrist)
        write_rlds(root / "rlds", NAME, made)
    for kind in ("rlds", "hdf5", "lerobot"):
        declare(root / kind / NAME)
    return root


def declare(folder):
    """A data card: actions of three values, the last of which is the gripper."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "data_card.yaml").write_text("width: 3\ngrippers: [{dimension: 2, open: 1, closed: 0}]\n")


def configured(kind, **more):
    return DataConfig(datasets=[NAME], gripper="standard", cameras=CAMERAS[kind], **more)


@pytest.mark.parametrize("kind", ["rlds", "hdf5", "lerobot"])
def test_a_model_gets_its_cameras_its_state_and_its_chunk_from_every_format(written, episodes, toy, kind, tmp_path):
    made, wrists = episodes
    if kind == "hdf5":
        write_hdf5(written / kind / NAME, made, wrists)
    elif kind == "lerobot":
        write_lerobot(written / kind / NAME, made, wrists)
    states = np.concatenate([one.state for one in made])
    for _ in range(2):  # the second time from the kept index
        data, = open_configured(configured(kind), written / kind, tmp_path, SPEC)
        found = {data.instruction(i, 0): i for i in range(len(data))}
        known = data.statistics["proprio"]
        assert known["q01"] == pytest.approx(np.quantile(states, 0.01, axis=0), abs=1e-6) and known["max"] == states.max(0).tolist()
        assert known["q99"] == pytest.approx(np.quantile(states, 0.99, axis=0), abs=1e-6) and known["mean"] == pytest.approx(states.mean(0))
        for episode, wrist in zip(made, wrists):
            own, last = found[episode.language], len(wrist) - 1
            for t in range(last + 1):
                sample, chunk = data.frame(own, t), data.actions(own)[[t, min(t + 1, last)]]
                SPEC.check([sample], "toy")
                for name, wanted in (("left", episode.images[t]), ("right", wrist[t])):
                    wanted = images.decode_image(images.encode_jpeg(wanted)) if kind == "hdf5" else wanted  # as officially
                    assert np.array_equal(sample.cameras[name], wanted), (kind, name)
                assert sample.image is None and np.array_equal(sample.action, chunk)
                assert sample.state == pytest.approx(normalise_state(episode.state[t], data.statistics), abs=1e-6)
        data.close_all()
    stream = make_stream(configured(kind, shuffle_buffer=4), written / kind, toy.processor, 3, 0, cache_dir=tmp_path)
    batch = next(stream)
    assert batch.state.shape == (3, 2) and batch.pixel_values.shape[:2] == (3, 2) and torch.isfinite(toy(batch).loss)
    stream.close()


def test_states_are_scaled_by_their_quantiles_and_not_cut():
    rows = np.stack([np.linspace(0, 10, 101), np.full(101, 3.0)], axis=1).astype(np.float32)
    statistics = {"proprio": state_statistics(rows)}
    assert normalise_state(np.array([[0.1, 3], [9.9, 9], [20, 3]]), statistics) == pytest.approx(
        np.array([[-1, 0], [1, 0], [3.0612, 0]]), abs=1e-3)
    for wrong in ({"q01": [0.0] * 3, "q99": [1.0] * 3}, {"q01": [0.0] * 2, "q99": [0.0] * 2}):
        with pytest.raises(ValueError, match="a state of 2 numbers, and the statistics are of .*--data.statistics"):
            normalise_state(rows, {"proprio": wrong})


def test_what_the_data_lack_is_said(written, tmp_path):
    folder = written / "rlds"

    def opened(spec=SPEC, **more):
        return open_configured(DataConfig(datasets=[NAME], gripper="standard", **more), folder, tmp_path, spec)

    with pytest.raises(ValueError, match="no 'steps/observation/left'"):
        opened()
    with pytest.raises(ValueError, match=r"--data.cameras \['image'\]: the model has left, right; name one for each, in its order"):
        opened(cameras=["image"])
    with pytest.raises(ValueError, match="--data.camera image: the model looks through left, right; .*--data.cameras"):
        opened(camera="image")
    with pytest.raises(ValueError, match="takes a state of 3 numbers, and there is one of 2 numbers: .*--data.state"):
        opened(SampleSpec(cameras=("left", "right"), state=3), cameras=CAMERAS["rlds"])
    with pytest.raises(ValueError, match="no state joints below steps/observation/.*--data.state"):
        opened(cameras=CAMERAS["rlds"], state=["joints"])
    twice, = opened(SampleSpec(state=4), state=["state", "state"])
    assert twice.frame(0, 0).state.shape == (4,) and twice.frame(0, 0).image is not None
    twice.close_all()
    blind, = open_configured(configured("rlds"), folder, tmp_path)
    assert np.array_equal(blind.image(0, 1), twice.image(0, 1)), "without a model, through the first"
    plain, named = opened(ONE_PICTURE)[0], opened(SampleSpec(cameras=("front",)))[0]
    assert np.array_equal(plain.frame(0, 1).image, named.frame(0, 1).image) and plain.frame(0, 1).action.shape == (3,)
    prints = [one.fingerprint() for one in (plain, named, *opened(cameras=CAMERAS["rlds"]), *opened(cameras=CAMERAS["rlds"][::-1]))]
    assert len(set(prints)) == 4 and open_dataset(folder / NAME).fingerprint() != prints[0], "the gripper is said, not the name's"


def test_held_out_episodes_are_held_out_for_every_camera(written, episodes, tmp_path):
    data, = open_configured(configured("rlds"), written / "rlds", tmp_path, SPEC)
    data.leave_out(0.5)
    made, wrists = episodes
    sample = data.frame(1, 2)
    assert sample.instruction == made[3].language
    assert np.array_equal(sample.cameras["left"], made[3].images[2]) and np.array_equal(sample.cameras["right"], wrists[3][2])


# ---- the probe ----


def probe_samples(written, tmp_path):
    data, = open_configured(configured("rlds"), written / "rlds", tmp_path, SPEC)
    return [data.frame(e, t) for e in range(len(data)) for t in range(int(data.lengths[e]))]


def test_a_probe_keeps_cameras_and_states(written, tmp_path):
    samples = probe_samples(written, tmp_path)
    sha256 = write_probe(tmp_path / "p", samples, ["skill"] * len(samples))
    probe = ProbeSet(tmp_path / "p")
    for index in (0, 7):
        found, = probe.samples([index])
        assert found.image is None and found.action is None and np.array_equal(found.state, samples[index].state)
        assert all(np.array_equal(found.cameras[name], samples[index].cameras[name]) for name in ("left", "right"))
    for name in ("images_1.npy", "states.npy"):
        whole = (tmp_path / "p" / name).read_bytes()
        (tmp_path / "p" / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(ProbeError, match="changed after it was written"):
            ProbeSet(tmp_path / "p")
        (tmp_path / "p" / name).write_bytes(whole)
    stateless = [Sample(None, one.instruction, cameras=one.cameras) for one in samples]
    assert write_probe(tmp_path / "q", stateless, ["skill"] * len(samples)) != sha256
    with pytest.raises(ValueError, match="probe pictures of the camera 'right' must all be"):
        half = Sample(None, "open", cameras={"left": samples[0].cameras["left"]}, state=samples[0].state)
        write_probe(tmp_path / "r", [samples[0], half], ["skill"] * 2)
    with pytest.raises(ValueError, match="must all have a state of one size, or none"):
        write_probe(tmp_path / "r", [samples[0], stateless[0]], ["skill"] * 2)


# ---- the policy ----


def test_a_chunk_is_played_before_the_model_is_asked_again():
    queue, asked = ChunkQueue(), []

    def ask(rows, episodes):
        asked.append([episodes[row] for row in rows])
        return [[(episodes[row], len(asked), k) for k in range(2)] if episodes[row] != "bad" else "no answer" for row in rows]

    def step(episodes):
        return queue(episodes, lambda rows: ask(rows, episodes))

    assert step(["a", "b"]) == [("a", 1, 0), ("b", 1, 0)]
    assert step(["c", "a"]) == [("c", 2, 0), ("a", 1, 1)]  # b has ended, c is new
    assert step(["a", "c", "bad"]) == [("a", 3, 0), ("c", 2, 1), "no answer"]
    queue.forget("a")
    assert step(["a", "b"]) == [("a", 4, 0), ("b", 1, 1)]
    assert asked == [["a", "b"], ["c"], ["a", "bad"], ["a"]]


def looks(count, seed=0):
    rng = np.random.default_rng(seed)
    return ({name: rng.integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8) for name in ("left", "right")},
            ["open the red door", "close the blue box"][:count], rng.normal(size=(count, 2)))


def test_a_policy_plays_the_models_chunks_in_the_units_of_the_data(toy, monkeypatch):
    proprio = {"q01": [-1.0, -2.0], "q99": [1.0, 2.0]}
    monkeypatch.setattr(toy, "norm_stats", {"toy_data": {**toy.norm_stats["toy_data"], "proprio": proprio}})
    seen, texts, states = looks(2)
    samples = [Sample(None, text, cameras={name: own[i] for name, own in seen.items()},
                      state=np.array([states[i, 0], states[i, 1] / 2], dtype=np.float32)) for i, text in enumerate(texts)]
    wanted_NCA, _ = toy.attempt_chunks(toy.processor.encode_prompts(samples))
    assert not np.array_equal(wanted_NCA[:, 0], wanted_NCA[:, 1])
    policy, other = ActionPolicy(toy, None), looks(2, 1)
    assert policy.chunk == 2
    assert np.array_equal(policy(seen, texts, episodes=["a", "b"], states=states), wanted_NCA[:, 0])
    backwards = ({name: own[::-1] for name, own in other[0].items()}, other[1][::-1])
    assert np.array_equal(policy(*backwards, episodes=["b", "a"], states=other[2]), wanted_NCA[::-1, 1]), "not looked at"
    again = policy(other[0], other[1], episodes=["a", "b"], states=other[2])
    assert np.array_equal(again, policy(other[0], other[1], states=other[2])), "and now it is"
    assert np.array_equal(ActionPolicy(toy, None, most=1)(seen, texts, episodes=["a", "b"], states=states), wanted_NCA[:, 0])
    one_by_one = ActionPolicy(toy, None, most=1)
    one_by_one(seen, texts, episodes=["a", "b"], states=states)
    assert np.array_equal(one_by_one(*other[:2], episodes=["a", "b"], states=other[2]), again)
    assert policy.watch._count == 2 * 2 + 2 * 2 + 2, "two answers of two actions each, and one that was asked for its first"


def test_a_batch_of_fixed_size_gives_chunks_too(toy):
    class Seen:
        def __init__(self, value):
            self.image, self.instruction = np.full((SIDE, SIDE, 3), value, dtype=np.uint8), "open"

    def chunks(pictures, texts, count):
        assert len(pictures) == 2
        return np.array([[[p[0, 0, 0]], [np.nan if p[0, 0, 0] == 9 else 1]] for p in pictures], dtype=float)

    found = FixedBatch(chunks, 2)(None, [Seen(1), Seen(9), Seen(3)])
    assert found[0].tolist() == [[1], [1]] and "not finite" in found[1] and found[2].tolist() == [[3], [1]]


class Memory(list):
    """Stands for Records."""

    def has(self, *key):
        return False

    def add(self, **row):
        self.append(row)

    def flush(self):
        pass

    def share(self, items):
        return list(items)


def test_the_tabletop_tells_a_policy_of_chunks_which_episodes_it_sees():
    told = []

    class Chunks:
        chunk = 2

        def __call__(self, pictures, texts, episodes):
            assert len(pictures) == len(texts) == len(episodes)
            told.append(episodes)
            return np.zeros((len(pictures), 7))

    records = Memory()
    run_skill_episodes(Chunks(), ["reach", "tap"], 2, 5 * 10**13, 3, records)
    assert {(row["ability"], row["trial"]) for row in records} == {(skill, k) for skill in ("reach", "tap") for k in (0, 1)}
    assert told[0] == [("reach", 0), ("tap", 0), ("reach", 1)] and told[-1] == [("tap", 1)]
    assert all(row["crash"] is None for row in records)


def test_what_a_benchmark_shows_is_compared_with_what_the_model_looks_at():
    both = ObservationSpec(("left", "right", "top"), state=True)
    top, front = ObservationSpec(("top",)), SampleSpec(cameras=("front",))
    for shown, taken in ((both, SPEC), (top, ONE_PICTURE), (top, None), (top, front)):
        assert specs.observation_problems("mine", shown, taken) == []
    for shown, taken, said in (
            (ObservationSpec(("left",), state=True), SPEC, "mine shows left, the robot's state; the model looks at right:"),
            (ObservationSpec(("left", "right")), SPEC, "the model looks at the robot's state:"),
            (both, ONE_PICTURE, "looks at one picture alone:"), (both, front, "looks at front:")):
        found, = specs.observation_problems("mine", shown, taken)
        assert said in found


# ---- the whole way ----


def test_errors_of_chunks_are_those_of_every_action_at_its_own_step():
    wanted_TA = np.arange(4.0)[:, None]
    said_TCA = np.array([[[0.0], [2.0]], [[1.0], [2.0]], [[3.0], [3.0]], [[3.0], [9.0]]])  # the last one's second action is past the end
    assert chunk_errors(said_TCA, wanted_TA).tolist() == [pytest.approx((0 + 1 + 0 + 0 + 1 + 0 + 0) / 7)]
    assert chunk_errors(said_TCA[:, :1], wanted_TA).tolist() == [0.25]
    assert token_accuracy(lambda actions: actions[..., 0], said_TCA, wanted_TA) == pytest.approx(5 / 8)
    assert token_accuracy(lambda actions: actions[..., 0], said_TCA[:, :1], wanted_TA) == 0.75
    words = {0.0: [1, 2, 3], 1.0: [1, 2]}  # answers of different lengths
    assert token_accuracy(lambda one: np.concatenate([words[x] for x in one[0, :, 0]]), np.zeros((1, 2, 1)), np.ones((1, 1))) == \
        pytest.approx(2 / 6)


def test_a_model_of_two_cameras_a_state_and_chunks_goes_the_whole_way(written, toy, tmp_path):
    """Probe, spectra, plain and graded training, and open-loop evaluation of held-out episodes, by the stages themselves."""
    samples = probe_samples(written, tmp_path) * 2
    shutil.copytree(written / "rlds", tmp_path / "datasets")
    write_probe(tmp_path / "probe" / "pairs", samples, ["skill"] * len(samples))

    def make(file, *overrides):
        return load_config(file, [
            "--root", str(tmp_path), "--threads", "1", "--device", "cpu", "--backbone.checkpoint", str(toy.checkpoint),
            "--probe.name", "pairs", "--probe.size", "24", "--lora.rank", "4", "--lora.alpha", "8", "--lora.layers", "last:2",
            "--train.steps", "3",
            "--train.batch_size", "4", "--train.warmup", "0", "--thermostat.every", "1", "--thermostat.batch_size", "4", "--data.datasets",
            f"[{NAME}]", "--data.gripper", "standard", "--data.cameras", "[image, wrist_image]",
            "--data.train_fraction", "0.5", *map(str, overrides)])

    storage = Storage.from_config(make(BASELINE))
    run_offline(make(GRADED), storage)
    for name, file in (("plain", BASELINE), ("graded", GRADED)):
        run_training(make(file, "--name", name), storage)
    config = make(BASELINE, "--evaluate.benchmark", "dataset", "--evaluate.target", "plain", "--evaluate.episodes", 2,
                  "--evaluate.retention_frames", 4)
    folder = run_evaluation(config, storage)
    rows, summary = read_evaluation(folder)
    assert summary["open_loop"][NAME]["error"]["n"] == 2 and [row["steps"] for row in rows] == list(STEPS[2:])
    assert all(0 <= row["accuracy"] <= 1 and row["kl"] >= 0 for row in rows)
    assert json.loads((folder / "records.jsonl").read_text().splitlines()[0])["header"]["model"]["chunk"] == 2
    with pytest.raises(ValueError, match="other settings"):
        run_evaluation(make(BASELINE, "--evaluate.benchmark", "dataset", "--evaluate.target", "plain", "--evaluate.episodes", 2,
                            "--evaluate.retention_frames", 4, "--evaluate.chunk", 1), storage)
