"""Visual questions about LIBERO scenes with answers from the simulator's state.

Asked is what can be seen and what is clear: a thing that is hidden, held or not well apart from another is left out. Left and
right are those of the picture that the policy sees, a mirror image of the table; in front means nearer to the camera over the
table, nearest is measured in the room.
"""

from typing import Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple

import numpy as np

from vlakeep.libero.env import CAMERA, IDLE, RESOLUTION, LiberoEnv, blind, policy_image
from vlakeep.libero.expert import Expert, NotCovered, goals
from vlakeep.libero.view import Thing, View, observe
from vlakeep.libero.workers import Job

MARGIN = 20  # pixels by which two things must be apart for "left of"
DEPTH = 0.05  # metres for "in front of"
CLEARLY = (0.04, 0.03)  # metres by which the second nearest is further away, between middles and between surfaces
FACTOR = 1.3  # and how many times as far its middle is
OPEN, SHUT = 0.10, 0.01  # metres that a drawer is pulled out; between them nothing is asked
MOMENT = 100  # steps of an episode among which the moment of a picture is drawn
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
# Bowls and books get no color word: LIBERO's black bowl is silver in the picture, its yellow book gray.
GENERAL = {"black bowl": "bowl", "white bowl": "bowl", "black book": "book", "yellow book": "book"}
MUGS = ("red mug", "white mug", "yellow and white mug")
ALIKE = set(MUGS[1:])  # which of them is there does not say clearly that the other is not
# Asked for whether they are there or not. Cabinets, shelves and stoves are not: the walls of some rooms show such things.
SOUGHT = (
    "alphabet soup", "cream cheese", "salad dressing", "barbecue sauce", "ketchup", "tomato sauce", "butter", "milk", "basket",
    "chocolate pudding", "orange juice", "bowl", "plate", "ramekin", "cookie box", "wine bottle", "wine rack", "microwave", "moka pot",
    "book", "caddy", "frying pan", "tray", "mug", *MUGS,
)
Questions = Dict[str, List[Tuple[str, str]]]  # kind -> (question, answer)


class Pictured(NamedTuple):
    image: np.ndarray  # uint8 [224, 224, 3], as the policy gets it
    instruction: str
    view: View


def look(env: LiberoEnv, job: Job):
    """For simulator processes: a Pictured scene in the middle of the expert's episode or, every second time, at its end.

    job.number is the seed, from which the moment follows; job.limit is the most steps that an episode has. Where the expert has no
    skill the hand moves about.
    """
    rng = np.random.default_rng([job.number, job.task])
    steps = job.limit if rng.random() < 0.5 else int(rng.integers(0, min(MOMENT, job.limit)))
    env.fresh_start(job.number)
    with blind(env.control.sim):
        for action in _moves(env, steps, rng):  # on after success too, which comes while the hand still holds the thing
            env.step(action)
    raw_HWC = env.control.sim.render(camera_name=CAMERA, width=RESOLUTION, height=RESOLUTION)
    return Pictured(policy_image(raw_HWC, crop=False), env.language, observe(env, raw_HWC))
    yield  # a generator, as every play of a worker, that never asks


def _moves(env: LiberoEnv, steps: int, rng) -> Iterator:
    try:
        script = Expert(env).act(goals(env.suite, env.task))
    except NotCovered:
        script = (np.r_[rng.uniform(-0.5, 0.5, 6), IDLE[-1]] for _ in range(MOMENT))
    for _, action in zip(range(steps), script):
        yield action


def questions(view: View) -> Questions:
    """All unambiguous questions about a scene."""
    named = [thing._replace(noun=general(thing.noun)) for thing in view.things]
    nouns = [thing.noun for thing in named]
    unclear = {general(noun) for noun in view.hidden}
    single = [thing for thing in named if nouns.count(thing.noun) == 1 and thing.noun not in unclear]
    steady = [thing for thing in single if thing.name not in view.held]
    return {
        "exists": list(_exists(nouns, unclear)),
        "count": list(_count(nouns, unclear)),
        "left": [(f"is the {a.noun} left of the {b.noun}?", answer) for a, b, answer in _pairs(single, left_of)],
        "front": [(f"is the {a.noun} in front of the {b.noun}?", answer) for a, b, answer in _pairs(steady, in_front_of)],
        "on": [(f"what is the {a.noun} on?", general(view.supports[a.name])) for a in single if a.name in view.supports],
        "in": list(_inside(view)),
        "nearest": [(f"which thing is nearest to the {a.noun}?", b.noun) for a, b in _nearest(view, steady)],
        "color": list(_color(view, named, steady)),
        "kind": [(f"what is {place} on the {view.ground}?", thing.noun) for place, thing in _outermost(view, named)],
        "drawer": [(f"is the {which} drawer of the cabinet open?", "yes" if opening > OPEN else "no")
                   for which, opening in view.drawers.items() if opening < SHUT or opening > OPEN],
    }


def general(noun: str) -> str:
    return GENERAL.get(noun, noun)


def a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def plural(noun: str) -> str:
    return noun[:-1] + "ies" if noun.endswith("dy") else noun + ("es" if noun.endswith("x") else "s")


def left_of(one: Thing, other: Thing) -> bool:
    """The middle of each lies beyond the other's nearer side."""
    return other.x - one.x >= MARGIN and one.x < other.left and one.right < other.x


def in_front_of(one: Thing, other: Thing) -> bool:
    return other.depth - one.depth >= DEPTH and one.depth < other.near and one.far < other.depth


def _exists(nouns: List[str], unclear) -> Iterator[Tuple[str, str]]:
    there = set(nouns) | ({"mug"} if set(nouns) & set(MUGS) else set())
    for noun in SOUGHT:
        if noun in there:
            yield f"is there {a(noun)}?", "yes"
        elif noun not in unclear and not (noun in ALIKE and ALIKE & there) and not (noun == "mug" and unclear & set(MUGS)):
            yield f"is there {a(noun)}?", "no"


def _count(nouns: List[str], unclear) -> Iterator[Tuple[str, str]]:
    mugs = sum(noun in MUGS for noun in nouns)
    for noun in SOUGHT:
        if noun == "mug" and not unclear & set(MUGS):
            yield "how many mugs are there?", NUMBERS[mugs]
        elif noun not in unclear and noun not in MUGS and noun != "mug":
            yield f"how many {plural(noun)} are there?", NUMBERS[nouns.count(noun)]


def _pairs(things: List[Thing], before: Callable[[Thing, Thing], bool]) -> Iterator[Tuple[Thing, Thing, str]]:
    """Both orders of all pairs for which `before` decides."""
    for one in things:
        for other in things:
            if one is not other and (before(one, other) or before(other, one)):
                yield one, other, "yes" if before(one, other) else "no"


def _inside(view: View) -> Iterator[Tuple[str, str]]:
    nouns = {thing.name: general(thing.noun) for thing in view.things}
    for container, names in view.inside.items():
        if len(names) < 2:
            yield f"what is in the {container}?", nouns[names[0]] if names else "nothing"


def _nearest(view: View, asked: List[Thing]) -> Iterator[Tuple[Thing, Thing]]:
    """(thing, the thing nearest to it), where it is clearly the nearest, by its middle and by its surface."""
    if view.held or view.hidden:
        return
    named = [thing._replace(noun=general(thing.noun)) for thing in view.things]
    for one in asked:
        others = sorted((thing for thing in named if thing.name != one.name), key=lambda thing: view.apart[one.name, thing.name])
        if len(others) < 2:
            continue
        middle, surface = view.apart[one.name, others[0].name]
        rest = [view.apart[one.name, thing.name] for thing in others[1:]]
        if all(far >= max(middle + CLEARLY[0], FACTOR * middle) and gap >= surface + CLEARLY[1] for far, gap in rest):
            yield one, others[0]


def _outermost(view: View, named: List[Thing]) -> Iterator[Tuple[str, Thing]]:
    """(place in words, the thing that is there): each is unmistakable among all things."""
    orders = (("furthest to the left", left_of), ("furthest to the right", lambda one, other: left_of(other, one)),
              ("nearest to the camera", in_front_of), ("furthest from the camera", lambda one, other: in_front_of(other, one)))
    for place, before in orders:
        for one in named:
            if len(named) > 1 and not view.hidden and not view.held and all(before(one, other) for other in named if other is not one):
                yield place, one


def _color(view: View, named: List[Thing], steady: List[Thing]) -> Iterator[Tuple[str, str]]:
    """Of things that are named by their place: the color of a thing that is named by what it is could be known without looking."""
    for place, thing in _outermost(view, named):
        if word := color(thing):
            yield f"what color is the thing {place} on the {view.ground}?", word
    for one, thing in _nearest(view, steady):
        if word := color(thing):
            yield f"what color is the thing nearest to the {one.noun}?", word
    by_name = {thing.name: thing for thing in named}
    for container, names in view.inside.items():
        if len(names) == 1 and (word := color(by_name[names[0]])):
            yield f"what color is the thing in the {container}?", word
    for noun in ("mug", "book", "bowl"):
        own = [thing for thing in named if thing.noun == noun or (noun == "mug" and thing.noun in MUGS)]
        if len(own) == 1 and not view.hidden and (word := color(own[0])):
            yield f"what color is the {noun}?", word


def color(thing: Thing) -> Optional[str]:
    return None if " and " in thing.noun else thing.color
