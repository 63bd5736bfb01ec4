"""What runs without an error and costs weeks: each alarm is heard when its cause is there, and silent when it is not."""

import numpy as np
import pytest
import torch

from vlakeep.models.alarms import ActionWatch, check_vision, orientation_alarm, vision_effect
from vlakeep.models.load import make_backbone

STATISTICS = {"q01": [-1.0] * 7, "q99": [1.0] * 7, "mask": [True] * 6 + [False]}


def test_a_model_that_does_not_look_is_refused():
    backbone = make_backbone("tabletop-base")
    assert vision_effect(backbone) > 0.01
    check_vision(backbone)
    with torch.no_grad():
        for p in backbone.openvla.projector.parameters():
            p.zero_()
    with pytest.raises(ValueError, match="black and a white picture.*fetch the checkpoint again"):
        check_vision(backbone)


def test_a_policy_that_always_does_the_same_raises_an_alarm():
    rng = np.random.default_rng(0)
    good, collapsed, stuck, few = (ActionWatch(STATISTICS, "zeros stood in") for _ in range(4))
    good.add(rng.uniform(-0.9, 0.9, (200, 7)))
    collapsed.add(np.tile(rng.uniform(-0.9, 0.9, 7), (200, 1)))
    stuck.add(np.concatenate([rng.uniform(-0.9, 0.9, (200, 2)), np.ones((200, 5))], axis=1) * (1, 1, 1, 1, 1, 1, 1))
    few.add(np.zeros((20, 7)))
    mute = ActionWatch(STATISTICS, "zeros stood in")
    mute.add(rng.uniform(-0.9, 0.9, (200, 7)), [True] * 3 + [False] * 197)
    assert mute.alarms()[0].startswith("3 of 200 answers ended before all action tokens") and len(mute.alarms()) == 1
    assert mute.alarms()[0].endswith("; zeros stood in"), "each model says what it makes of them"
    assert "no longer speaks actions" in mute.alarms()[0]
    mute.add(rng.uniform(-0.9, 0.9, (200, 7)))
    assert "3 of 400 answers" in mute.alarms()[0] and "no longer speaks" not in mute.alarms()[0]
    assert good.alarms() == [] and few.alarms() == []
    assert "collapsed: 1 different actions in 200 steps" in collapsed.alarms()[0]
    assert "action dimensions [2, 3, 4, 5] are at an end" in stuck.alarms()[-1], "the gripper may stay at its end"


def test_an_action_that_is_not_a_number_does_not_count():
    watch = ActionWatch(STATISTICS, "zeros stood in")
    watch.add(np.full((500, 7), np.nan))
    assert watch.alarms() == []


@pytest.mark.parametrize("turn, word", [(lambda x: x, None), (lambda x: x[::-1, ::-1], "180 degrees"), (lambda x: x[::-1], "upside down"),
                                        (lambda x: x[:, ::-1], "mirrored")])
def test_pictures_that_stand_otherwise_than_in_training_raise_an_alarm(turn, word):
    y, x = np.mgrid[0:64, 0:96]
    scene = np.stack([np.exp(-((x - 20) ** 2 + (y - 10) ** 2) / 400) * 255] * 3, -1)
    noisy = scene + np.random.default_rng(0).normal(0, 5, scene.shape)
    found = orientation_alarm(scene, turn(noisy))
    assert found == [] if word is None else word in found[0]


def test_a_vicuna_checkpoint_is_refused(tmp_path):
    import shutil
    from pathlib import Path

    from vlakeep import cli
    folder = tmp_path / "openvla-7b-v01"
    shutil.copytree(Path(cli.__file__).parent / "assets" / "tabletop-base", folder)
    with pytest.raises(ValueError, match="Vicuna prompt.*openvla-7b"):
        make_backbone(str(folder))
