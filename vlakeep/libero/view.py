"""What can be said about a LIBERO scene: every visible thing, where it is in the picture and in the room, and what holds it.

Everything is read from the simulator's state and from its segmentation of the picture that the policy is given. That picture is
turned by 180 degrees as in the official protocol; the camera's rows come bottom up, so what the policy sees is a mirror image, and
left and right are those of the mirror image.
Axes: H W pixels of the policy's picture before it is shrunk, C colours, N points.
"""

from typing import Dict, FrozenSet, List, NamedTuple, Optional, Set, Tuple

import numpy as np

from vlakeep.libero.colors import color_of, edge_contrast
from vlakeep.libero.env import CAMERA, RESOLUTION, LiberoEnv
from vlakeep.libero.fixtures import drawer_opening, is_drawer
from vlakeep.libero.scene import CORNERS_83, Boxes, Scene, clearance

VISIBLE = 60  # pixels of 256 x 256 below which nothing is asked about a thing
UNCOVERED = 0.45  # pixels of a thing, as a share of those that it has in a picture of it alone
OUT_OF_SIGHT = 5  # a group of geometries that the simulator does not draw
STANDS_OUT = 0.3  # share of its edge at which a thing must differ from what is behind it: a black book in a dark corner does not
NOUNS = {
    "akita_black_bowl": "black bowl", "glazed_rim_porcelain_ramekin": "ramekin", "cookies": "cookie box", "flat_stove": "stove",
    "wooden_cabinet": "cabinet", "white_cabinet": "cabinet", "wooden_two_layer_shelf": "shelf", "new_salad_dressing": "salad dressing",
    "macaroni_and_cheese": "macaroni box", "desk_caddy": "caddy", "bbq_sauce": "barbecue sauce", "wooden_tray": "tray",
    "red_coffee_mug": "red mug", "porcelain_mug": "white mug", "white_yellow_mug": "yellow and white mug",
    "chefmate_8_frypan": "frying pan",
}
AROUND = 0.04  # metres around a container within which a thing that is not in it leaves doubt
CONTAINERS = ("basket", "tray", "caddy")  # open from above: what lies inside can be seen
HAND = ("robot0", "gripper0")


class Thing(NamedTuple):
    name: str
    noun: str
    pixels: int
    x: float  # middle of its pixels, from the left and from the top of the picture
    y: float
    left: float  # columns between which nine tenths of its pixels lie
    right: float
    depth: float  # metres from the camera, along its view direction over the ground
    near: float
    far: float
    color: Optional[str]  # None when no colour dominates


class View(NamedTuple):
    things: List[Thing]  # those that can be seen well
    hidden: FrozenSet[str]  # nouns of the others
    held: FrozenSet[str]  # names of what the hand touches
    ground: str  # "table" or "floor"
    supports: Dict[str, str]  # name -> noun of what it stands on, where that is beyond doubt
    inside: Dict[str, List[str]]  # "basket", "top drawer of the cabinet" -> names of what is in it, for containers that can be seen into
    drawers: Dict[str, float]  # "top" -> metres that it is pulled out
    apart: Dict[Tuple[str, str], Tuple[float, float]]  # two names -> metres between their middles, and between their surfaces


def noun_of(name: str) -> str:
    """`akita_black_bowl_1` -> `black bowl`."""
    stem = name.rsplit("_", 1)[0]
    return NOUNS.get(stem, stem.replace("_", " "))


def observe(env: LiberoEnv, raw_HWC: np.ndarray) -> View:
    """The scene as it is; `raw_HWC` is the camera's own picture of it."""
    scene = Scene(env)
    owner_G = owners(scene)
    labels_HW = segment(env, owner_G)
    things = [thing for number, name in enumerate(scene.env.obj_body_id)
              if (thing := _thing(scene, name, labels_HW == number, raw_HWC[::-1, ::-1])) is not None
              and thing.pixels >= UNCOVERED * pixels_alone(env, name, owner_G)]
    seen = {thing.name for thing in things}
    touching = contacts(scene, owner_G)
    return View(things, frozenset(noun_of(name) for name in scene.env.obj_body_id if name not in seen),
                frozenset(name for name, others in touching.items() if "hand" in others), _ground(scene),
                _supports(scene, seen, touching), _inside(scene, seen, touching), dict(_drawers(scene)), _distances(scene, sorted(seen)))


def owners(scene: Scene) -> List[Optional[str]]:
    """Per geometry of the model the thing that it belongs to, "hand" for the robot's, None for the room's."""
    bodies = {body: name for name, body in scene.env.obj_body_id.items()}
    found = []
    for geom in range(scene.model.ngeom):
        own = scene.model.body(int(scene.model.geom_bodyid[geom])).name
        found.append("hand" if own.startswith(HAND) else bodies.get(scene.top_body(geom, bodies)))
    return found


def segment(env: LiberoEnv, owner_G: List[Optional[str]]) -> np.ndarray:
    """int [H, W]: which thing each pixel of the turned picture shows, as its number among obj_body_id; -1 for none."""
    import mujoco

    seen_HW2 = env.control.sim.render(camera_name=CAMERA, width=RESOLUTION, height=RESOLUTION, segmentation=True)[::-1, ::-1]
    numbers = {name: number for number, name in enumerate(env.env.obj_body_id)}
    label_G = np.array([numbers.get(owner, -1) for owner in owner_G])
    is_geom_HW = (seen_HW2[..., 0] == int(mujoco.mjtObj.mjOBJ_GEOM)) & (seen_HW2[..., 1] >= 0)
    return np.where(is_geom_HW, label_G[np.where(is_geom_HW, seen_HW2[..., 1], 0)], -1)


def pixels_alone(env: LiberoEnv, name: str, owner_G: List[Optional[str]]) -> int:
    """How many pixels the thing has when nothing else is drawn."""
    group_G = env.control.sim.model.geom_group
    kept = group_G.copy()
    group_G[np.array([owner != name for owner in owner_G])] = OUT_OF_SIGHT
    try:
        return int((segment(env, owner_G) >= 0).sum())
    finally:
        group_G[:] = kept


def _thing(scene: Scene, name: str, mask_HW: np.ndarray, picture_HWC: np.ndarray) -> Optional[Thing]:
    rows, columns = np.nonzero(mask_HW)
    if len(rows) < VISIBLE or edge_contrast(picture_HWC, mask_HW) < STANDS_OUT:
        return None
    corners_N3 = _corners(scene.boxes(name))
    depth_N = _depth(scene, corners_N3)
    left, right = np.percentile(columns, (5, 95))
    return Thing(name, noun_of(name), len(rows), float(np.median(columns)), float(np.median(rows)), float(left), float(right),
                 float(depth_N.min() + depth_N.max()) / 2, float(depth_N.min()), float(depth_N.max()), color_of(picture_HWC, mask_HW))


def _corners(boxes: Boxes) -> np.ndarray:
    return np.concatenate([CORNERS_83 * half @ rotation.T + centre for centre, rotation, half in zip(*boxes)])


def _depth(scene: Scene, points_N3: np.ndarray) -> np.ndarray:
    """Metres [N] from the camera along its view direction, with the height left out: a tall thing is not further in front."""
    camera = scene.model.camera(CAMERA).id
    ahead_2 = -scene.data.cam_xmat[camera].reshape(3, 3)[:2, 2]
    return (points_N3[:, :2] - scene.data.cam_xpos[camera][:2]) @ (ahead_2 / np.linalg.norm(ahead_2))


def contacts(scene: Scene, owner_G: List[Optional[str]]) -> Dict[str, Set[Optional[str]]]:
    """Name -> what the thing touches: names, "hand", None for the room."""
    found: Dict[str, Set[Optional[str]]] = {name: set() for name in scene.env.obj_body_id}
    for contact in scene.data.contact[:scene.data.ncon]:
        one, other = owner_G[contact.geom1], owner_G[contact.geom2]
        for a, b in ((one, other), (other, one)):
            if a in found and a != b:
                found[a].add(b)
    return found


def _ground(scene: Scene) -> str:
    return "floor" if "Floor" in type(scene.env).__name__ else "table"


def _supports(scene: Scene, seen: Set[str], touching) -> Dict[str, str]:
    """A thing stands on another by the simulator's own predicate, and on the ground when it touches nothing else."""
    found = {}
    for name in sorted(seen & set(scene.env.objects_dict)):
        below = {other for other in touching[name] if other in (None, "hand") or scene.position(other)[2] <= scene.position(name)[2]}
        if below == {None}:
            found[name] = _ground(scene)
        elif len(below) == 1 and "hand" not in below and _stands_on(scene, name, *below):
            found[name] = noun_of(*below)
    return found


def _stands_on(scene: Scene, name: str, other: str) -> bool:
    tops = [site for site in scene.env.object_sites_dict if scene.owner(site) == other and
            (site.endswith(("_side", "cook_region")) or site.startswith("wine_rack"))]
    return noun_of(other) not in CONTAINERS and any(scene.holds(("on", name, place)) for place in [other, *tops])


def _inside(scene: Scene, seen: Set[str], touching) -> Dict[str, List[str]]:
    """What is in containers and open drawers by the simulator's own predicate. Left out are those whose content is not in sight or
    that something is above or half in; all of them while the hand holds something."""
    held = any("hand" in others for others in touching.values())
    found: Dict[str, List[str]] = {}
    above: Dict[str, Set[str]] = {}
    for region in scene.env.object_sites_dict:
        owner = scene.owner(region)
        if owner not in seen or held or "region" not in region:
            continue
        if is_drawer(scene, region) and drawer_opening(scene, region) > 0.10:
            label = f"{_which(region)} drawer of the cabinet"
        elif noun_of(owner) in CONTAINERS and "contain" in region:
            label = noun_of(owner)
        else:
            continue
        others = [name for name in scene.env.objects_dict if name != owner]
        found.setdefault(label, []).extend(name for name in others if scene.holds(("in", name, region)))
        above.setdefault(label, set()).update(name for name in others if _above(scene, name, region))
    return {label: names for label, names in found.items() if above[label] | set(names) <= seen & set(names)}


def _above(scene: Scene, name: str, region: str) -> bool:
    """Whether a thing's middle lies over a region, which is taken a little larger than it is."""
    site = scene.data.site(region)
    reach_2 = (np.abs(site.xmat.reshape(3, 3)) @ np.array(scene.env.object_sites_dict[region].size))[:2] + AROUND
    return bool((np.abs(scene.position(name)[:2] - site.xpos[:2]) < reach_2).all())


def _which(region: str) -> str:
    return region.rsplit("_", 2)[-2]  # wooden_cabinet_1_top_region


def _drawers(scene: Scene):
    for region in scene.env.object_sites_dict:
        if "region" in region and is_drawer(scene, region):
            yield _which(region), drawer_opening(scene, region)


def _distances(scene: Scene, names: List[str]) -> Dict[Tuple[str, str], Tuple[float, float]]:
    boxes = {name: scene.boxes(name) for name in names}
    corners = {name: _corners(boxes[name]) for name in names}
    middle = {name: (points.min(0) + points.max(0)) / 2 for name, points in corners.items()}
    found = {}
    for i, one in enumerate(names):
        for other in names[i + 1:]:
            gap = min(clearance(corners[one], boxes[other]), clearance(corners[other], boxes[one]))
            found[one, other] = found[other, one] = float(np.linalg.norm(middle[one] - middle[other])), gap
    return found
