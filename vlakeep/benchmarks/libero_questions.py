"""Visual questions about LIBERO scenes with answers from the simulator's state.

Places are those of the picture that the policy is given. It is turned by 180 degrees as in the official protocol; the
camera's rows come bottom up, so what the policy sees is a mirror image, and left and right are asked as seen there.
"""

from typing import Dict, List, NamedTuple, Tuple

import numpy as np

from vlakeep.benchmarks.libero_env import CAMERA, RESOLUTION, LiberoEnv, blind, policy_image
from vlakeep.benchmarks.libero_expert import Expert, NotCovered, goals
from vlakeep.benchmarks.libero_fixtures import drawer_opening, is_drawer
from vlakeep.benchmarks.libero_scene import Scene
from vlakeep.benchmarks.libero_workers import Job

KINDS = ("exists", "count", "left", "lower", "on", "drawer")
VISIBLE = 25  # pixels of 256 x 256 below which nothing is asked about a thing
MARGIN = 20  # pixels by which two things must be apart for "left of" and "lower than"
FEW = 3  # absent things asked for per scene
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
NOUNS = {
    "akita_black_bowl": "black bowl", "glazed_rim_porcelain_ramekin": "ramekin", "cookies": "cookie box", "flat_stove": "stove",
    "wooden_cabinet": "cabinet", "white_cabinet": "cabinet", "wooden_two_layer_shelf": "shelf", "black_book": "book",
    "yellow_book": "book", "new_salad_dressing": "salad dressing", "macaroni_and_cheese": "box of macaroni",
    "desk_caddy": "caddy", "bbq_sauce": "barbecue sauce",
}
ALL_NOUNS = (
    "alphabet soup", "cream cheese", "salad dressing", "barbecue sauce", "ketchup", "tomato sauce", "butter", "milk", "basket",
    "chocolate pudding", "orange juice", "black bowl", "plate", "ramekin", "cookie box", "stove", "cabinet", "wine bottle",
    "wine rack", "microwave", "moka pot", "book", "caddy", "shelf", "frypan",
)
Questions = Dict[str, List[Tuple[str, str]]]  # kind -> (question, answer)


class Thing(NamedTuple):
    name: str
    noun: str
    x: float  # pixels from the left and from the top of the picture that the policy sees
    y: float
    pixels: int


def noun_of(name: str) -> str:
    """`akita_black_bowl_1` -> `black bowl`."""
    stem = name.rsplit("_", 1)[0]
    return NOUNS.get(stem, stem.replace("_", " "))


def things(env: LiberoEnv) -> List[Thing]:
    """Every object and fixture that the camera sees, with the middle of its pixels."""
    import mujoco

    scene, sim = Scene(env), env.control.sim
    seen_HW2 = sim.render(camera_name=CAMERA, width=RESOLUTION, height=RESOLUTION, segmentation=True)[::-1, ::-1]
    geoms_HW = np.where(seen_HW2[..., 0] == int(mujoco.mjtObj.mjOBJ_GEOM), seen_HW2[..., 1], -1)
    found = []
    for name, body in scene.env.obj_body_id.items():
        own = [geom for geom in range(scene.model.ngeom) if scene.top_body(geom, (body,)) == body]
        rows, columns = np.nonzero(np.isin(geoms_HW, own))
        if len(rows) >= VISIBLE:
            found.append(Thing(name, noun_of(name), float(np.median(columns)), float(np.median(rows)), len(rows)))
    return found


def questions(env: LiberoEnv, rng) -> Questions:
    """All unambiguous questions about the scene as it is."""
    scene, seen = Scene(env), things(env)
    nouns = [thing.noun for thing in seen]
    hidden = {noun_of(name) for name in scene.env.obj_body_id} - set(nouns)  # there, but not in sight: nothing is asked
    absent = [noun for noun in ALL_NOUNS if noun not in nouns and noun not in hidden]
    single = [thing for thing in seen if nouns.count(thing.noun) == 1]
    asked: Questions = {kind: [] for kind in KINDS}
    asked["exists"] = [(f"is there a {noun}?", "yes") for noun in sorted(set(nouns))]
    asked["exists"] += [(f"is there a {noun}?", "no") for noun in rng.permutation(absent)[:FEW].tolist()]
    asked["count"] = [(f"how many {noun}s are there?", NUMBERS[nouns.count(noun)]) for noun in sorted(set(nouns))]
    for one in single:
        for other in single:
            if abs(one.x - other.x) >= MARGIN:
                asked["left"].append((f"is the {one.noun} left of the {other.noun}?", "yes" if one.x < other.x else "no"))
            if abs(one.y - other.y) >= MARGIN:
                asked["lower"].append((f"is the {one.noun} lower in the picture than the {other.noun}?",
                                       "yes" if one.y > other.y else "no"))
    asked["on"] = list(_supports(scene, single))
    for region in scene.env.object_sites_dict:
        if is_drawer(scene, region) and "region" in region:
            which = region.rsplit("_", 2)[-2]  # wooden_cabinet_1_top_region
            opening = drawer_opening(scene, region)
            if opening < 0.01 or opening > 0.10:
                asked["drawer"].append((f"is the {which} drawer open?", "yes" if opening > 0.10 else "no"))
    return asked


def _supports(scene: Scene, single: List[Thing]):
    """What stands on what, by the simulator's own predicate; a thing that stands on nothing known is not asked about."""
    for one in single:
        for other in single:
            if one.name in scene.env.objects_dict and one is not other and scene.holds(("on", one.name, other.name)):
                yield f"what is the {one.noun} on?", other.noun


def look(env: LiberoEnv, job: Job):
    """For simulator processes: (picture, instruction, questions) of a scene in the middle of the expert's episode.

    job.number is the seed; the expert plays a number of steps that follows from it, or the hand moves about where it has no
    skill.
    """
    rng = np.random.default_rng([job.number, job.task])
    env.fresh_start(job.number)
    with blind(env.control.sim):
        for action in _moves(env, int(rng.integers(0, job.limit)), rng):
            env.step(action)
    asked = questions(env, rng)
    raw_HWC = env.control.sim.render(camera_name=CAMERA, width=RESOLUTION, height=RESOLUTION)
    return policy_image(raw_HWC, crop=False), env.language, asked
    yield  # a generator, as every play of a worker, that never asks


def _moves(env: LiberoEnv, steps: int, rng):
    try:
        script = Expert(env).act(goals(env.suite, env.task))
    except NotCovered:
        script = (np.r_[rng.uniform(-0.5, 0.5, 6), -1.0] for _ in range(steps))
    for _, action in zip(range(steps), script):
        yield action
