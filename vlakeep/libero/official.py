"""The simulator of the official data on a newer mujoco: contacts and colours as mujoco 2.3.7 has them.

LIBERO's demonstrations, initial states and the published checkpoints belong to mujoco 2.3.7. Two things have changed since:

    contacts   Where a face of a box meets another box, 2.3.7 reports half of the depth by which they overlap. Initial states put things a
               centimetre or two into the table; with the whole depth they are thrown up (libero_10 task 0: a bottle by .6 m, in the air
               when the policy begins). Edges that cross have the whole depth in both; which of two contacts that are nearly as deep is
               taken, and how many points it has, differs still.
    colours    A texture whose PNG file says that it is sRGB is decoded before it is lit. libero_object's floor and with it the mean grey
               of its pictures becomes darker (102 for 139).

Both are put back here, so that an environment with a current Python and NumPy evaluates what was trained on the official data.
tests/test_libero_official.py compares with states and pictures that 2.3.7 has made.
"""

import contextlib
import functools
import re
from typing import Iterator

import numpy as np

ALIGNED = 1 - 1e-6  # cosine from which on a contact's normal is that of a face
# Two boxes that overlap by .02.
OVERLAP = """<mujoco><worldbody><geom type="box" size="1 1 .1"/>
<body pos="0 0 .18"><freejoint/><geom type="box" size=".1 .1 .1"/></body></worldbody></mujoco>"""


@functools.lru_cache(maxsize=None)
def halves_depth() -> bool:
    """Whether the installed mujoco reports half of the depth between boxes, as 2.3.7 does: it is tried out."""
    import mujoco

    model = mujoco.MjModel.from_xml_string(OVERLAP)
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    return bool(data.contact[0].dist > -0.015)


def boxes(model) -> np.ndarray:
    """bool [geoms]: which are boxes."""
    import mujoco

    return np.asarray(model.geom_type) == mujoco.mjtGeom.mjGEOM_BOX


def on_faces(geom_C2: np.ndarray, normal_C3: np.ndarray, rotation_G33: np.ndarray, boxes_G: np.ndarray) -> np.ndarray:
    """bool [C]: contacts between two boxes whose normal stands on a face of one of them, and not on an edge of each."""
    found_C = boxes_G[geom_C2].all(axis=1)
    rows = np.flatnonzero(found_C)
    along = np.einsum("ci,cgij->cgj", normal_C3[rows], rotation_G33[geom_C2[rows]])
    found_C[rows] = np.abs(along).max(axis=(1, 2)) > ALIGNED
    return found_C


def step1(model, data, boxes_G: np.ndarray, share: float = 0.5) -> None:
    """mujoco.mj_step1 with `share` of the depth between the faces of two boxes. With share 1 it is mj_step1 to the bit.

    For mujoco from 3.3.7 on, whose functions these are (src/engine/engine_forward.c, mj_step1 and mj_fwdPosition); checks of the state for
    infinities, energy and callbacks, which robosuite does not use, are left out.
    """
    import mujoco

    mujoco.mj_kinematics(model, data)
    mujoco.mj_comPos(model, data)
    mujoco.mj_camlight(model, data)
    mujoco.mj_flex(model, data)
    mujoco.mj_tendon(model, data)
    mujoco.mj_makeM(model, data)
    mujoco.mj_factorM(model, data)
    mujoco.mj_collision(model, data)
    if data.ncon:
        contact = data.contact
        contact.dist[on_faces(contact.geom, contact.frame[:, :3], data.geom_xmat.reshape(-1, 3, 3), boxes_G)] *= share
    mujoco.mj_makeConstraint(model, data)
    mujoco.mj_island(model, data)
    mujoco.mj_transmission(model, data)
    mujoco.mj_projectConstraint(model, data)
    mujoco.mj_sensorPos(model, data)
    mujoco.mj_fwdVelocity(model, data)
    mujoco.mj_sensorVel(model, data)


@contextlib.contextmanager
def colours() -> Iterator[None]:
    """Within the context models are made with the textures' values as they stand in their files, where their XML does not say otherwise."""
    import mujoco

    if not hasattr(mujoco.MjModel, "tex_colorspace"):
        yield  # a version that does not know of it
        return
    made = mujoco.MjModel.from_xml_string

    def as_they_stand(xml, *args, **options):
        return made(re.sub("<texture (?![^>]*colorspace=)", '<texture colorspace="linear" ', xml), *args, **options)

    mujoco.MjModel.from_xml_string = as_they_stand
    try:
        yield
    finally:
        mujoco.MjModel.from_xml_string = made
