"""Data sets are looked at when they are opened: data cards, grippers, degenerate dimensions, the round trip, texts, pictures; and the page
"bring your own data", run as it stands. The inputs follow public reports, which the cases name."""

import importlib.util
import json
import os
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import yaml
from test_layout import REPO

from vlakeep.core.config import Config, ConfigError, DataConfig, load_config
from vlakeep.data import card as look
from vlakeep.data import conventions as con
from vlakeep.data.dataset import Conventions, DemoDataset
from vlakeep.data.degenerate import CONSTANT, NOISE, RARE
from vlakeep.data.formats import open_dataset, open_datasets
from vlakeep.data.images import decode_image
from vlakeep.data.index import IndexBuilder
from vlakeep.data.sample import Episode
from vlakeep.data.statistics import action_statistics, normalise, unnormalise
from vlakeep.data.tfrecord import RecordWriter, write_example
from vlakeep.data.writer import write_rlds

STEPS, EPISODES = 24, 4


def reach(seed, width=7, gripper=(1.0, 0.0), steps=STEPS):
    """float32 [T, width]: smooth deltas, the last value goes from one end to the other in the middle."""
    actions = np.cumsum(np.random.default_rng(seed).normal(0, 0.05, (steps, width)), 0).clip(-0.8, 0.8)
    actions[:, -1] = np.where(np.arange(steps) < steps // 2, *gripper)
    return actions.astype(np.float32)


class Made(DemoDataset):
    """A real data set without files: actions and texts as given, a picture whose square moves."""

    kind = "rlds"

    def __init__(self, episodes, name="mine", texts=None, tmp="/nowhere", names=(), pictures=None, **told):
        builder = IndexBuilder(name)
        for number, actions in enumerate(episodes):
            builder.add(actions, texts[number] if texts else ["push"] * len(actions), f"episode {number}")
        self.action_names, self.pictures = names, pictures
        tree = told.pop("card", None)
        conventions = Conventions(**told).with_card(None if tree is None else con.make_card(tree, "card.yaml"))
        super().__init__(Path(tmp) / name, name, builder.index({}), (0, len(episodes)), 1.0, conventions)

    def _picture(self, number, row, frame, where):
        if self.pictures is not None:
            return self.pictures
        picture = np.full((16, 16, 3), 90, np.uint8)
        picture[number:number + 4, frame % 12:frame % 12 + 4] = 200
        return picture


def made(episodes=None, **told):
    return Made([reach(seed) for seed in range(EPISODES)] if episodes is None else episodes, **told)


def done(dataset):
    """What a policy does that has learnt every label [N, A]."""
    return unnormalise(look.bins_and_back(dataset.actions_NA), dataset.statistics)


def close(dataset, dimension, wanted_N, within=0.005):
    assert np.abs(done(dataset)[:, dimension] - wanted_N).max() <= within


def test_every_mistake_of_a_card_is_told_at_once():
    with pytest.raises(con.CardError) as caught:
        con.make_card({"gripers": [], "width": "7", "arms": True, "grippers": [{"dimension": 6, "open": 1}], "units": ["inch"]}, "c.yaml")
    for words in ("c.yaml", "'gripers'; did you mean grippers?", "width: must be a whole number", "arms: must be a whole number",
                  "must have dimension (from 0 on), open and closed"):
        assert words in str(caught.value)
    two = [{"dimension": 6, "open": 1, "closed": 0}, {"dimension": 20, "open": 1, "closed": 0}]
    for tree, words in (({"width": 14, "arms": 2, "grippers": two}, "dimension 20 is named"), ({"arms": 1, "grippers": two}, "2 grippers"),
                        ({"grippers": [{"dimension": 6, "open": 1, "closed": 1}]}, "both 1"), ({"units": "inch"}, "'inch'"), ([], "lines"),
                        ({"names": ["a", "b"], "width": 3}, "names: 2 for a width of 3"), ({"blank_texts": "no"}, "keep or episode")):
        with pytest.raises(con.CardError, match=re.escape(words)):
            con.make_card(tree, "c.yaml")


def both(left=(-1.0, 1.0), right=(-1.0, 1.0)):
    return [np.concatenate([reach(s, 7, left), reach(s + 50, 7, right)], 1) for s in range(EPISODES)]


def test_two_arms_are_refused_without_a_card_and_alike_with_the_one_that_is_offered():
    with pytest.raises(ValueError, match="an action has 14 values.*without a data card only 7.*data_card.yaml") as caught:
        made(both(), name="libero_two", gripper="libero")
    card = yaml.safe_load(str(caught.value).partition("elsewhere):\n")[2])
    assert [one["dimension"] for one in card["grippers"]] == [6, 13] and card["arms"] == 2 and card["width"] == 14
    data = made(both(), card=card)
    assert data.statistics["action"]["mask"] == [True] * 6 + [False] + [True] * 6 + [False]
    assert np.array_equal(data.actions_NA[:, 6], data.actions_NA[:, 13]) and data.actions_NA[0, 6] == 1 and data.actions_NA[-1, 13] == 0
    with pytest.raises(con.CardError, match="card.yaml.*\n.*dimension 13, a gripper: the values lie in .-1, 1. and not in .0, 1."):
        made(both(), card={**card, "grippers": [card["grippers"][0], {"dimension": 13, "open": 1, "closed": 0}]})


def test_a_gripper_means_what_is_declared_and_never_what_its_values_contradict():
    percent, signs = [reach(s, 7, (95.0, 4.0)) for s in range(2)], [reach(s, 7, (1.0, -1.0)) for s in range(2)]
    close(made(percent, gripper="100/0"), 6, np.concatenate(percent)[:, 6] / 100)
    close(made(signs, gripper="1/-1"), 6, np.concatenate(signs)[:, 6] > 0)
    zeros = [reach(s, 7, (0.0, 1.0)) for s in range(2)]
    close(made(zeros, gripper="0/1"), 6, np.concatenate(zeros)[:, 6] == 0)
    for episodes, told, words in (
            (percent, "standard", "100/0 if 100 is open or --data.gripper 0/100 if 0 is open"), (percent, "libero", "not in [-1, 1]"),
            (signs, "standard", "--data.gripper 1/-1 if 1 is open or --data.gripper libero if -1 is open"),
            (zeros, "libero", "never come near -1"),
            ([reach(s, 7, (1.0, 0.0)) for s in range(2)], "100/0", "never moves")):
        with pytest.raises(ValueError, match=re.escape(words)):
            made(episodes, gripper=told)
    noisy = [reach(s, 7, (1.0, -1e-7)) for s in range(2)]  # 0 and 1 with rounding noise in a set that is called as LIBERO's
    with pytest.raises(ValueError, match="LIBERO's go from"):
        made(noisy, name="libero_mine")
    for wrong in ("open", "1/1", "1:0"):
        assert "data.gripper" in Config(data=DataConfig(gripper=wrong)).problems()[0]


def test_commands_hold_until_the_next_as_in_the_official_code():
    """rel2abs_gripper_actions: -1 opens and +1 closes; before the first command the gripper is the other way, without any it is open."""
    command = np.array([0, 0, 1, 0, 0, -1, 0, 1, 0, 0, 0, 0], dtype=np.float32)
    gripper = con.Gripper(6, -1.0, 1.0, True)
    got = con.to_open(np.concatenate([command, -command, 0 * command]), gripper, np.array([0, 12, 24, 36]))
    assert got.tolist() == [1, 1, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0] + [0, 0, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1] + [1] * 12


def test_chunks_are_taken_apart_and_checked_against_the_frames_after():
    single = [reach(seed) for seed in range(EPISODES)]
    ahead = np.minimum(np.arange(STEPS)[:, None] + np.arange(8), STEPS - 1)
    stored = [actions[ahead].reshape(STEPS, 56) for actions in single]
    with pytest.raises(ValueError, match="an action has 56 values") as caught:
        made(stored, gripper="standard")
    card = yaml.safe_load(str(caught.value).partition("elsewhere):\n")[2])
    assert card["chunk"] == 8 and card["width"] == 7
    whole, plain = made(stored, card=card), made(single, gripper="standard")
    assert np.array_equal(whole.actions_NA, plain.actions_NA) and whole.statistics == plain.statistics
    with pytest.raises(con.CardError, match="chunk: 8, but only"):
        made([actions[:, np.random.default_rng(0).permutation(56)] for actions in stored], card=card)


def test_what_was_demonstrated_is_taught_and_the_official_way_stays():
    episodes = [reach(seed, 7, (1.0, 1.0), 120) for seed in range(EPISODES)]  # never moves: lerobot issue 211
    for number, actions in enumerate(episodes):
        actions[:, 3], actions[:, 4], actions[:, 5] = 0.25, 1e-9 * np.arange(120), 0
        if number == 0:
            actions[12, 5] = 0.7  # rare: VLA-Arena pull 29
    data, official = made(episodes, gripper="standard"), made(episodes, gripper="standard", degenerate="official")
    assert data.degenerate == {3: CONSTANT, 4: NOISE, 5: RARE, 6: CONSTANT}
    want = np.concatenate(episodes)
    close(data, 6, 1), close(data, 4, 0, 1e-6), close(data, 5, want[:, 5]), close(data, 3, 0.25, 1e-6)
    assert done(data)[0, 5] == 0  # at rest is at rest exactly
    assert abs(done(official)[0, 6]) < 0.005 and done(official)[12, 5] == 0
    report = look.look_at(data)
    told = "\n".join(look.lines(report))
    assert report["problems"] == [] and look.look_at(official)["problems"] == []
    for words in ("dimension 6 (gripper) never moves from 1: taught as demonstrated", "dimension 5 moves in few frames only",
                  "dimension 4 has a range of"):
        assert words in told
    assert "0 is taught, closed" in "\n".join(look.lines(look.look_at(official)))
    assert data.fingerprint() != official.fingerprint()


def test_plain_data_are_what_they_were_to_the_bit():
    episodes = [reach(seed, 7, (-1.0, 1.0)) for seed in range(EPISODES)]
    data = made(episodes, name="libero_mine")
    standard = np.concatenate(episodes)
    standard[:, 6] = 1 - standard[:, 6].clip(0, 1)
    statistics = action_statistics(standard, EPISODES)
    assert data.statistics == statistics and np.array_equal(data.actions_NA, normalise(standard, statistics, official=True)[0])
    assert data.conventions.told() == {"camera": None, "gripper": None, "rotate": None}


def test_what_does_not_come_back_is_an_error_with_its_dimension():
    data = made(gripper="standard", names=("x", "y", "z", "roll", "pitch", "yaw", "grip"))
    assert look.look_at(data)["problems"] == []
    other = action_statistics(np.concatenate([0.05 * reach(seed) for seed in range(2)]), 2)
    other["action"]["min"][1] = other["action"]["max"][1] = 0.0  # labels of 0 for a dimension that moves here
    data.scale(other)
    problems = look.look_at(data)["problems"]
    assert any(re.search(r"dimension 0 \(x\): \d+ % of the values lie outside.*leave --data.statistics out", one) for one in problems)
    assert any(re.search(r"dimension 1 \(y\): .*do not come back from their tokens", one) for one in problems)
    with pytest.raises(ValueError, match="data set mine .*dimension 0"):
        look.refuse([look.look_at(data)])
    with pytest.raises(ValueError, match="none is called like one: declare `grippers:`"):  # seven joints, openvla issue 144
        look.refuse([look.look_at(made(gripper="standard", names=tuple(f"joint_{i}" for i in range(7))))])


def test_texts_are_looked_at():
    long = "wipe " * 3000
    texts = [["b'open the lid'"] * 3 + [""] * (STEPS - 3), ["  "] * STEPS, ["close it\n"] * STEPS, [long] * STEPS]
    prompt = look.Prompt(lambda text: len(text.split()) + 10, 2048, "words")
    report = look.look_at(made(gripper="standard", texts=texts), prompt)
    assert report["texts"]["blank_frames"] == 2 * STEPS - 3 and report["texts"]["odd"] == 3 and report["texts"]["longest_tokens"] == 3010
    assert any("episode 3" in one and "3010 tokens in 24 frames" in one for one in report["problems"])
    assert any("45 of 96 frames have a blank text; `blank_texts: episode`" in note for note in report["notes"])
    card = {"grippers": [{"dimension": 6, "open": 1, "closed": 0}], "blank_texts": "episode", "clean_texts": True}
    data = made(texts=texts, card=card)
    assert data.languages == ["open the lid", "close it", long.strip()] and data.unlabelled == 1
    assert data.instruction(0, STEPS - 1) == "open the lid"
    data = made(texts=[[""] * STEPS] * EPISODES, card={**card, "instruction": "put it there"})
    assert data.languages == ["put it there"] * EPISODES


def test_units_and_rotations_are_checked_against_the_values():
    degrees = [np.concatenate([30 * reach(s, 6), reach(s, 1)], 1) for s in range(2)]
    card = {"grippers": [{"dimension": 6, "open": 1, "closed": 0}], "units": "rad"}
    with pytest.raises(con.CardError, match=r"dimension \d, in rad: values up to .*degrees"):
        made(degrees, card=card)
    made(degrees, card={**card, "units": "deg"})
    with pytest.raises(con.CardError, match="its length goes from"):
        made(degrees, card={**card, "units": "deg", "quaternion": [0, 1, 2, 3]})


# Inputs of the kinds of public reports, with a card that says what the report's owner means: values of dimension 0 on, the gripper's value
# when it is open in the first half and closed in the second, its dimension, and the card.
REPORTS = {
    "openpi issue 360: a gripper in radians": (14, (2.487, 1.5), (6, 13), {}),
    "lingbot-vla issues 37, 48: arm arm gripper gripper, 0 to 4.5": (14, (4.5, 0.0), (12, 13), {}),
    "openvla issue 144: seven joints and a gripper": (8, (1.0, 0.0), (7,), {}),
    "any4lerobot issue 4: three deltas and a gripper": (4, (0.0, 1.0), (3,), {}),
    "positronic pull 466: 0 open, 1 closed": (7, (0.0, 1.0), (6,), {}),
    "prpl-mono pull 186: 0 to 255, 255 closed": (7, (0.0, 255.0), (6,), {}),
    "RoboticsAcademy pull 3715: percent closed": (7, (0.0, 100.0), (6,), {}),
    "lerobot pull 3568: the gripper is not number 6": (7, (1.0, -1.0), (0,), {}),
    "VLABench, lerobot issue 4406: absolute poses, a gripper of widths": (7, (0.08, 0.0), (6,), {"units": "m"}),
}


@pytest.mark.parametrize("report", REPORTS)
def test_further_reports_are_refused_or_done_as_demonstrated(report):
    width, (opened, closed), dimensions, extra = REPORTS[report]
    episodes = [reach(seed, width) for seed in range(EPISODES)]
    for actions in episodes:
        actions[:, -1] = 0.3 * np.sin(np.arange(STEPS) / 3)
        for dimension in dimensions:
            actions[:, dimension] = np.where(np.arange(STEPS) < STEPS // 2, opened, closed)
    with pytest.raises(ValueError, match="data_card.yaml"):  # nothing is guessed
        made(episodes)
    grippers = [{"dimension": d, "open": opened, "closed": closed} for d in dimensions]
    card = {**extra, "width": width, "arms": len(dimensions), "grippers": grippers}
    data = made(episodes, card=card)
    assert look.look_at(data)["problems"] == []
    for dimension in range(width):
        column = np.concatenate(episodes)[:, dimension]
        low, high = (data.statistics["action"][key][dimension] for key in ("q01", "q99"))
        close(data, dimension, column == opened if dimension in dimensions else column.clip(low, high))


def test_what_begins_closed_everywhere_is_told():
    """Signs that are exchanged cannot be told from the values (ManiSkill issues 252, 1042); robots begin open, so it is said."""
    report = look.look_at(made([reach(s, 7, (1.0, -1.0)) for s in range(4)], gripper="libero"))
    assert any("begins closed and ends open in nearly every episode" in note and "--data.gripper 1/-1" in note for note in report["notes"])
    assert not look.look_at(made([reach(s, 7, (-1.0, 1.0)) for s in range(4)], gripper="libero"))["notes"]


def test_the_gripper_of_a_known_name_is_compared_with_its_values_too():
    for name, ends in (("libero_mine", (-40.0, 90.0)), ("tabletop_mine", (1.0, -1.0)), ("tabletop_mine", (0.0, 100.0))):
        with pytest.raises(ValueError, match=f"{name}.*of the gripper the values lie in .*by the set's name.*--data.gripper"):
            made([reach(s, 7, ends) for s in range(4)], name=name)
    plain = made([reach(s, 7, (-1.0, 1.0)) for s in range(4)], name="libero_mine")
    assert set(np.unique(plain.standard_NA[:, 6])) == {0, 1}


def test_a_scale_that_is_too_wide_is_told():
    data = made([reach(s, 7, (100.0, 0.0)) for s in range(4)], gripper="255/0")
    assert any("moves over 39.2 % of its way only, 255 open and 0 closed: check both" in note for note in look.look_at(data)["notes"])


def test_pictures_that_show_nothing_are_refused():
    black, still = np.zeros((8, 8, 3), np.uint8), np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    for pictures, words in ((black, "of one colour"), (still, "are the same")):
        with pytest.raises(ValueError, match=words + ".*camera"):
            look.refuse([look.look_at(made(gripper="standard", pictures=pictures))])
    import io

    from PIL import Image
    out = io.BytesIO()
    Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 20).save(out, "PNG")
    with pytest.raises(ValueError, match="frame 0: a PNG of more than 8 bits.*--data.camera"):
        decode_image(out.getvalue(), "frame 0")


def rt1(folder, name="mine"):
    """RLDS with the keys of RT-1 (open_x_embodiment issues 16, 39)."""
    (folder / name / "0.1.0").mkdir(parents=True)
    with RecordWriter(folder / name / "0.1.0" / f"{name}-train.tfrecord-00000-of-00001") as writer:
        a = reach(0)
        writer.write(write_example({
            "steps/action/world_vector": a[:, :3].reshape(-1), "steps/action/rotation_delta": a[:, 3:6].reshape(-1),
            "steps/action/gripper_closedness_action": a[:, 6].astype(np.int64),
            "steps/observation/natural_language_instruction": [b"go"] * STEPS,
            "steps/observation/image": [b"\xff\xd8 a picture"] * STEPS}))
    info = {"name": name, "fileFormat": "tfrecord", "splits": [{"name": "train", "shardLengths": ["1"]}]}
    (folder / name / "0.1.0" / "dataset_info.json").write_text(json.dumps(info))
    return a


def test_all_missing_keys_come_in_one_message_with_the_card_that_names_them(tmp_path):
    a = rt1(tmp_path)
    with pytest.raises(ValueError, match="no 'steps/action' and no 'steps/language_instruction' among.*data_card.yaml") as caught:
        open_dataset(tmp_path / "mine")
    said = str(caught.value).partition("every line:\n")[2].replace("OPEN_VALUE", "0").replace("CLOSED_VALUE", "1")
    place = Path(re.search(r"say in (\S+data_card.yaml) what", str(caught.value))[1])
    assert place == tmp_path / "mine" / con.FILE
    place.write_text(said)
    with open_dataset(tmp_path / "mine") as data:
        assert np.array_equal(data.index.actions_NA, a) and data.languages == ["go"]
        close(data, 6, a[:, 6] == 0)
    info = tmp_path / "mine" / "0.1.0" / "dataset_info.json"
    info.write_text(info.read_text().replace("tfrecord", "array_record"))
    with pytest.raises(ValueError, match="array_record.*--file_format=tfrecord"):
        open_dataset(tmp_path / "mine")


def test_texts_of_robocasa_and_pictures_of_several_cameras_in_one(tmp_path):
    """robocasa issue 41: the text is a field of the attribute ep_meta. MIKASA-Robo issue 3: two pictures in six channels."""
    h5py = pytest.importorskip("h5py")
    (tmp_path / "kitchen").mkdir()
    with h5py.File(tmp_path / "kitchen" / "demo_im128.hdf5", "w") as file:
        demo = file.create_group("data/demo_1")
        demo.attrs["ep_meta"] = json.dumps({"lang": "open the drawer"})
        demo["action_dict/pos"], demo["action_dict/grip"] = reach(0)[:, :6], reach(0, 7, (-1.0, 1.0))[:, 6]
        demo["obs/left_image"] = np.random.default_rng(0).integers(0, 255, (STEPS, 8, 8, 3), dtype=np.uint8)
        demo["obs/both"] = np.zeros((STEPS, 8, 8, 6), np.uint8)
    with pytest.raises(ValueError, match="no 'actions' among .*kitchen/data_card.yaml.*\n?actions:"):
        open_dataset(tmp_path / "kitchen")
    card = {"actions": ["action_dict/pos", "action_dict/grip"], "text": "ep_meta.lang", "camera": "left_image", "rotate": False,
            "grippers": [{"dimension": 6, "open": -1, "closed": 1}]}
    with open_dataset(tmp_path / "kitchen", cards={"kitchen": card}) as data:
        assert data.languages == ["open the drawer"] and data.actions_NA.shape == (STEPS, 7)
        close(data, 6, np.arange(STEPS) < STEPS // 2)
    for change, words in (({"camera": "both"}, "several cameras are several keys"), ({"text": "ep_meta.words"}, "holds no 'words'"),
                          ({"text": "lang"}, "names no attribute")):
        with pytest.raises(ValueError, match=words):
            open_dataset(tmp_path / "kitchen", cards={"kitchen": {**card, **change}})


def test_a_mixture_has_a_card_for_each_and_is_seen_alike(tmp_path):
    pictures = np.random.default_rng(0).integers(0, 255, (STEPS, 8, 8, 3), dtype=np.uint8)
    for name, ends in (("first", (1.0, -1.0)), ("second", (0.0, 100.0)), ("libero_third", (-1.0, 1.0))):
        write_rlds(tmp_path, name, [Episode(pictures, reach(0, 7, ends), "push")])
    first = {"grippers": [{"dimension": 6, "open": 1, "closed": -1}], "instruction": "of frames without a text only"}
    cards = {"first": first, "second": str(tmp_path / "second.yaml")}
    (tmp_path / "second.yaml").write_text("grippers: [{dimension: 6, open: 0, closed: 100}]")
    opened = open_datasets(tmp_path, ["first", "second", "libero_third"], cards=cards)
    assert [data.languages for data in opened] == [["push"]] * 3
    assert len({data.actions_NA.tobytes() for data in opened}) == 1 and len({data.fingerprint() for data in opened}) == 3
    for data in opened:
        data.close()
    with pytest.raises(ValueError, match="card of frist, .*did you mean first"):
        open_datasets(tmp_path, ["first"], cards={"frist": {}})
    open_datasets(tmp_path, ["first"], cards=cards)[0].close()  # those of other sets may stand in the same configuration
    config = load_config(None, ["--data.cards.first", "card.yaml"])
    assert config.data.cards == {"first": "card.yaml"}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"data": {"cards": cards}}))
    assert load_config(str(tmp_path / "c.yaml"), []).data.cards == cards
    with pytest.raises(ConfigError, match="unknown key `data.card`"):
        load_config(None, ["--data.card", "x"])


def test_the_second_look_is_kept_and_a_file_mended_in_place_is_seen(tmp_path, monkeypatch):
    pictures = np.random.default_rng(0).integers(0, 255, (STEPS, 8, 8, 3), dtype=np.uint8)
    settings, cache = DataConfig(datasets=["tabletop_x"]), tmp_path / "cache"
    folder = write_rlds(tmp_path, "tabletop_x", [Episode(pictures, reach(s), "push") for s in range(3)])
    first, = look.look_at_all(settings, tmp_path, cache)
    monkeypatch.setattr(look, "look_at", None)
    again, = look.look_at_all(settings, tmp_path, cache)
    assert {**first, "seconds": 0, "per_thousand": 0} == {**again, "seconds": 0, "per_thousand": 0} and again["seconds"] > 0
    monkeypatch.undo()
    file = next(folder.glob("*.tfrecord*"))
    times, old = file.stat(), file.read_bytes()
    write_rlds(tmp_path, "tabletop_x", [Episode(pictures, reach(s + 9), "push") for s in range(3)], overwrite=True)
    assert len(old) == file.stat().st_size  # as rsync --times --inplace leaves it: the same size and the same old time
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    changed, = look.look_at_all(settings, tmp_path, cache)
    assert changed["dimensions"][0]["max"] != first["dimensions"][0]["max"]
    look.keep([changed], tmp_path / "run")
    kept, = look.read_kept(tmp_path / "run")
    assert kept == json.loads(json.dumps(changed)) and (tmp_path / "run/data/tabletop_x.png").read_bytes()[:4] == b"\x89PNG"


def page():
    """(name of a data card's file below the root, its text), and the commands of the section on three robots, in order."""
    text = (REPO / "docs/bring-your-own-data.md").read_text(encoding="utf-8").partition("## Three robots")[2].partition("\n## ")[0]
    cards = re.findall(r"^```yaml\n# (\S+)\n(.*?)^```$", text, flags=re.M | re.S)
    blocks = re.findall(r"^```bash\n(.*?)^```$", text, flags=re.M | re.S)
    return cards, [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.startswith("vlakeep")]


def test_the_page_is_run_as_it_stands(tmp_path, monkeypatch, capsys):
    """Three robots, from raw files to an adapter and its open-loop evaluation."""
    for module in ("h5py", "pyarrow", "av"):
        pytest.importorskip(module)
    from vlakeep import cli

    spec = importlib.util.spec_from_file_location("example_robots", REPO / "scripts" / "example_robots.py")
    robots = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(robots)
    monkeypatch.setenv("VLAKEEP_ROOT", str(tmp_path))
    monkeypatch.setattr("vlakeep.core.storage.prepare_environment", lambda *args, **kwargs: None)
    for write in (robots.write_kitchen, robots.write_towel, robots.write_can):
        write(tmp_path / "datasets")
    cards, commands = page()
    assert len(cards) == 3 and len(commands) == 9
    for place, text in cards:
        (tmp_path / place).write_text(text)
    small = {"train": ["--train.batch_size", "2", "--lora.layers", "last:1", "--lora.rank", "2"],
             "evaluate": ["--evaluate.episodes", "1", "--evaluate.retention_frames", "1"], "preflight": []}
    for command in commands:
        words = shlex.split(command)[1:]
        device = ["--device", "cpu", "--threads", "1"]
        assert cli.run([*words, *device, *small[words[0]]]) == 0, capsys.readouterr()
    for run, width in (("kitchen", 7), ("towel", 14), ("can", 7)):
        report, = look.read_kept(tmp_path / "runs" / run)
        assert len(report["dimensions"]) == width and report["problems"] == []
        summary = json.loads(next(tmp_path.glob(f"eval/*/dataset/{run}/summary.json")).read_text())
        loop, = summary["open_loop"].values()
        assert len(loop["per_dimension"]) == width and loop["frames"] == robots.STEPS


def test_the_report_shows_what_a_run_saw(tmp_path):
    from types import SimpleNamespace

    from vlakeep.reporting.arms import Arm
    from vlakeep.reporting.data_cards import data_html

    report = look.look_at(made(gripper="standard"))
    for run in ("one", "two"):
        look.keep([report], tmp_path / run)
    arms = {name: Arm(name, None, folders={"run": place}) for name, place in
            (("base", None), ("one", tmp_path / "one"), ("two", tmp_path / "two"))}
    html = data_html(SimpleNamespace(arms=arms))
    assert html.count("<img") == 1 and report["thumbnails"] in html and "data mine (rlds): 4 of 4 episodes" in html
    assert all(arms[name].label in html.partition("Seen by")[2] for name in ("one", "two"))
