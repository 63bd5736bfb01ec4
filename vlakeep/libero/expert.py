"""A scripted expert for LIBERO's tasks, from ground truth, through the same 7-D actions that a policy gives.

An action is a world-frame displacement of the hand / 0.05 m [3], a rotation vector / 0.5 rad [3], and the gripper, -1 open or
+1 closed. Every skill is a generator of actions that reads the simulator's present state; the caller steps the simulator
between two.
"""

from typing import Callable, Dict, Generator, Iterator, List, Optional, Tuple

import numpy as np

from vlakeep.libero.enclosed import open_side, put_inside, shut_door
from vlakeep.libero.env import bddl_file, load_suite
from vlakeep.libero.fixtures import close_drawer, drawer_opening, free_spot, is_drawer, make_room, open_drawer, push, turn_knob
from vlakeep.libero.grasp import RIMMED, Grasp, Release, plan_grasp
from vlakeep.libero.scene import (
    Scene,
    clearance,
    direction,
    hand_boxes,
    hand_points,
    narrow_side,
    rotation_vector,
    separation,
)

OPEN, CLOSED = -1.0, 1.0
GAIN, GAIN_TURN = 3.0, 2.0  # proportional control; the simulator's own controller is slower than a step
AJAR = 0.13  # a drawer that is less open takes nothing in
BETWEEN = 0.035  # what a finger needs between two things
INSIDE = 0.015  # by which the middle of a thing stays inside a region
BESIDE = 0.006  # room around a hand that comes down beside a thing
UNDER_PALM = 0.019  # from the grip to the palm, less what the hand sinks below its aim
CLOSE_AT = 0.25  # of a thing's length from its middle a hand that slides over it begins to close
CLOSING, SLOWLY = 0.05, 0.2  # the way up on which the fingers still close, and the speed on it
APPROACHES = ("above", "side")
SAFE = 0.06  # above a thing, where an open hand meets nothing of it
SLANT = 0.05  # how far along the rim of a bowl or mug a hand comes from
RIM_CLOSING, RIM_SLOWLY = 0.012, 0.08  # a hand that closes at a rim goes up so far, at so much of its speed
ATTEMPTS = 4
PATIENCE = 10
ROUNDS = 2
STALL = 8  # steps without motion after which the hand has met something
Actions = Iterator[np.ndarray]


class NotCovered(ValueError):
    """The task has a goal that the expert has no skill for."""


Goal = Tuple[str, ...]  # ("on" or "in", thing, target), ("open", drawer), ("close", drawer or door), ("turnon", stove)


def goals(suite: str, task: int) -> List[Goal]:
    """The task's goals in the order in which they are pursued. Raises NotCovered for one without a skill."""
    info = load_suite(suite).get_task(task)
    from libero.libero.envs.bddl_utils import robosuite_parse_problem  # after load_suite, which imports the package quietly

    found = [tuple(goal) for goal in robosuite_parse_problem(bddl_file(info))["goal_state"]]
    for goal in found:
        moved = goal[0] in ("open", "close") and "cabinet" in goal[1] or goal[0] == "close" and "microwave" in goal[1]
        if not (goal[0] in ("in", "on") or moved or (goal[0] == "turnon" and "stove" in goal[1])):
            raise NotCovered(f"{suite} task {task}, {info.language!r}: the expert has no skill for `{' '.join(goal)}`")
    return sorted(found, key=lambda goal: goal[0] == "close")  # what goes into a drawer goes there first


def side_by_side(scene: Scene, goals: List[Goal]) -> Dict[Goal, np.ndarray]:
    """For things that shall stand on the same region: their offsets [2] from its middle, in a row along their narrow sides."""
    spots = {}
    for region in {goal[2] for goal in goals if goal[0] == "on" and scene.is_site(goal[2])}:
        shared = [goal for goal in goals if goal[2:] == (region,)]
        angle, width, _ = narrow_side(scene.corners(shared[0][1])[:, :2])
        room = 2 * (np.abs(direction(angle)) @ np.array(scene.env.object_sites_dict[region].size)[:2] - INSIDE)
        step = min(width + BETWEEN, room / max(len(shared) - 1, 1))
        if len(shared) > 1:
            spots.update({goal: (k - (len(shared) - 1) / 2) * step * direction(angle) for k, goal in enumerate(shared)})
    return spots


class Expert:
    """The hand's script; `rotation` is what the hand is kept at."""

    def __init__(self, env, approach: str = "above"):
        self.scene, self.approach = Scene(env), approach
        self.rotation = self.scene.hand_rotation()
        self.attempt = 0
        self.spots: Dict[Goal, np.ndarray] = {}  # offsets [2] from the middle of the target

    def act(self, goals: List[Goal]) -> Actions:
        """One goal after the other, then a moment in which the last one may still come true; once more what did not or was undone."""
        self.spots = side_by_side(self.scene, goals)
        for _ in range(ROUNDS):
            for goal in sorted(goals, key=self._nearness):
                if not self.scene.holds(goal):
                    yield from self.pursue(goal)
            yield from self.hold(self.scene.hand(), OPEN, PATIENCE)

    def _nearness(self, goal: Goal) -> float:
        """Of things that go to the same place, the one that gets the furthest spot is brought first; no other order changes."""
        return -self.scene.distance(self.scene.position(goal[2])[:2] + self.spots[goal]) if goal in self.spots else 0.0

    # Motion

    def towards(self, target_3: np.ndarray, gripper: float, slow: float = 1.0) -> np.ndarray:
        """The action [7] of one step."""
        shift = np.clip(GAIN * (target_3 - self.scene.hand()) / 0.05, -slow, slow)
        twist = np.clip(GAIN_TURN * rotation_vector(self.rotation @ self.scene.hand_rotation().T) / 0.5, -0.5, 0.5)
        return np.clip(np.r_[shift, twist, gripper], -1, 1)

    def go(self, target, gripper: float, within: float = 0.006, steps: int = 60, slow: float = 1.0) -> Actions:
        """To a place [3] or to what a function gives at each step, until it is that near and turned, or nothing moves any more, or
        the steps are used up."""
        at: Callable = target if callable(target) else lambda: target
        past = []
        for _ in range(steps):
            place, hand = at(), self.scene.hand()
            twisted = np.linalg.norm(rotation_vector(self.rotation @ self.scene.hand_rotation().T))
            if np.linalg.norm(place - hand) < within and twisted < 0.06:
                return
            past.append(np.r_[hand, 0.1 * twisted])
            if len(past) > STALL and np.abs(past[-1] - past[-1 - STALL]).max() < 1e-3:
                return
            yield self.towards(place, gripper, slow)

    def rise(self, height: float, gripper: float, within: float, steps: int) -> Actions:
        yield from self.go(self.scene.hand() + [0, 0, height], gripper, within, steps)

    def hold(self, place_3: np.ndarray, gripper: float, steps: int) -> Actions:
        for _ in range(steps):
            yield self.towards(place_3, gripper)

    # Skills

    def _plan(self, name: str, release: Optional[Release]) -> Grasp:
        grasp = plan_grasp(self.scene, name, self.attempt, release)
        self.rotation = grasp.rotation
        return grasp

    def _above(self, name: str, release: Optional[Release], grasp: Grasp, aside: Callable) -> Generator[np.ndarray, None, Grasp]:
        """With open fingers to a place above the grasp and aside(grasp) [2] beside it. Returns the Grasp as it is planned from there: at
        first things may still have been settling."""
        hand, safe = self.scene.hand(), grasp.top + SAFE
        height = max(safe, min(hand[2], safe + 0.15))
        if hand[2] < height - 0.02:
            yield from self.go(np.r_[hand[:2], height], OPEN, within=0.03)
        yield from self.go(np.r_[grasp.xy + aside(grasp), height], OPEN, within=0.02)
        return self._plan(name, release)

    def grasp(self, name: str, release: Optional[Release]) -> Generator[np.ndarray, None, Grasp]:
        """Approach from above and close. Returns the Grasp."""
        grasp = yield from self._above(name, release, self._plan(name, release), lambda grasp: np.zeros(2))
        yield from self.go(np.r_[grasp.xy, grasp.top + 0.03], OPEN, within=grasp.within)
        yield from self.go(np.r_[grasp.xy, grasp.z], OPEN, within=0.004, steps=40, slow=0.6)
        for step in range(14):
            before = self.scene.finger_gap()
            yield self.towards(np.r_[grasp.xy, grasp.z], CLOSED)
            if step > 4 and abs(self.scene.finger_gap() - before) < 2e-4:
                break
        return grasp

    def grasp_from_the_side(self, name: str, release: Optional[Release]) -> Generator[np.ndarray, None, Grasp]:
        """Come down beside the thing, slide over it, close on the way, and go up. Returns the Grasp.

        Fingers that close are next to invisible in a small picture. Where the hand comes down and goes up the same way, with a
        pause in between, a policy that sees one picture at a time cannot tell these apart. Here each place has one action.
        """
        if any(word in name for word in RIMMED):
            return (yield from self.grasp_on_a_slant(name, release))
        grasp = self._plan(name, release)
        beside_2 = self._beside(name, grasp)
        if beside_2 is None:
            return (yield from self.grasp(name, release))
        grasp = yield from self._above(name, release, grasp, lambda grasp: beside_2)
        grasp = grasp._replace(z=max(grasp.z, grasp.top - UNDER_PALM))
        yield from self.go(np.r_[grasp.xy + beside_2, grasp.z], OPEN, within=0.008)
        aside_2 = beside_2 / np.linalg.norm(beside_2)
        nearly_2 = grasp.xy + CLOSE_AT * np.ptp(self.scene.corners(name)[:, :2] @ aside_2) * aside_2
        yield from self.go(np.r_[nearly_2, grasp.z], OPEN, within=0.006, steps=40, slow=0.6)
        yield from self.go(np.r_[grasp.xy, grasp.z], CLOSED, within=0.005, steps=20, slow=0.3)
        yield from self.go(np.r_[grasp.xy, grasp.z + CLOSING], CLOSED, within=0.008, steps=40, slow=SLOWLY)
        return grasp

    def grasp_on_a_slant(self, name: str, release: Optional[Release]) -> Generator[np.ndarray, None, Grasp]:
        """For a rim, which a hand beside it would push away: come down to it on a slant, along the rim, and close on the way up."""
        first = self._plan(name, release)
        grasp = yield from self._above(name, release, first, self._slant)
        yield from self.go(np.r_[grasp.xy + self._slant(grasp), first.top + SAFE], OPEN, within=0.01)
        yield from self.go(np.r_[grasp.xy, grasp.z], OPEN, within=0.005, steps=40, slow=0.6)
        yield from self.go(np.r_[grasp.xy, grasp.z + RIM_CLOSING], CLOSED, within=0.003, steps=30, slow=RIM_SLOWLY)
        return grasp

    def _slant(self, grasp: Grasp) -> np.ndarray:
        """From the grasp to the place [2] above which the hand comes down: along the rim, on the nearer side."""
        along_2 = direction(self._opening(grasp) + np.pi / 2)
        return min((SLANT * along_2, -SLANT * along_2), key=lambda way_2: np.linalg.norm(grasp.xy + way_2 - self.scene.hand()[:2]))

    def _opening(self, grasp: Grasp) -> float:
        """Angle of the line on which the fingers open once the hand is turned as the grasp has it."""
        opening_3 = grasp.rotation @ self.scene.hand_rotation().T @ np.r_[direction(self.scene.finger_angle()), 0]
        return np.arctan2(opening_3[1], opening_3[0])

    def _beside(self, name: str, grasp: Grasp) -> Optional[np.ndarray]:
        """From the grasp to a place [2] beside the thing where the open hand touches nothing, the nearer one; None if there is none."""
        scene = self.scene
        angle = self._opening(grasp)
        across_2, obstacles = direction(angle + np.pi / 2), scene.obstacles()
        sides = sorted((1, -1), key=lambda side: np.linalg.norm(grasp.xy + 0.07 * side * across_2 - scene.hand()[:2]))
        for side in sides:
            for distance in np.arange(0.03, 0.11, 0.01):
                place = np.r_[grasp.xy + distance * side * across_2, grasp.z]
                if separation(hand_boxes(place, angle), obstacles) > BESIDE and not scene.overreach(place[:2]):
                    return distance * side * across_2
        return None

    def carry(self, name: str, xy: Callable, let_go: float, height: float) -> Actions:
        """Bring the thing above xy() and set it down: travel at `height` or higher, let go with the hand at `let_go`."""
        scene = self.scene

        def above(z):
            return lambda: np.r_[xy() + scene.hand()[:2] - scene.position(name)[:2], z]

        height = self._clear_height(name, above(height)()[:2], height)
        yield from self.go(np.r_[scene.hand()[:2], height], CLOSED, within=0.03)
        yield from self.go(above(height), CLOSED, within=0.015, steps=70)
        if height - let_go > 0.07:
            yield from self.go(above(let_go + 0.04), CLOSED, within=0.02, steps=40)
        yield from self.go(above(let_go), CLOSED, within=0.008, steps=40, slow=0.6)
        place = scene.hand()
        yield from self.hold(place, OPEN, 8)
        yield from self.go(place + [0, 0, 0.10], OPEN, within=0.03, steps=12)
        yield from self.hold(scene.hand(), OPEN, 10)

    def _clear_height(self, name: str, end_2: np.ndarray, height: float) -> float:
        """The lowest height, in steps of 4 cm, at which hand and thing pass everything on the straight way to `end_2`."""
        hand, angle, obstacles = self.scene.hand(), self.scene.finger_angle(), self.scene.obstacles(name)
        carried = (self.scene.corners(name) - hand)[::4]
        for _ in range(6):
            way = [np.r_[hand[:2] + u * (end_2 - hand[:2]), height] for u in np.linspace(0, 1, 9)]
            if min(clearance(np.concatenate([hand_points(p, angle), carried + p]), obstacles) for p in way) > 0.012:
                break
            height += 0.04
        return height

    def pursue(self, goal: Goal) -> Actions:
        """One goal, with what has to be done before."""
        if goal[0] == "open":
            yield from open_drawer(self, goal[1])
        elif goal[0] == "close":
            yield from (close_drawer if is_drawer(self.scene, goal[1]) else shut_door)(self, goal[1])
        elif goal[0] == "turnon":
            yield from turn_knob(self, goal[1])
        elif goal[1].startswith("plate"):
            yield from push(self, goal)
        else:
            if is_drawer(self.scene, goal[2]) and drawer_opening(self.scene, goal[2]) < AJAR:
                yield from make_room(self, goal[1], goal[2])
                yield from open_drawer(self, goal[2])
            side = open_side(self.scene, goal[1], goal[2])
            yield from self.bring(goal) if side is None else put_inside(self, goal, side)

    def bring(self, goal: Goal) -> Actions:
        """Put a thing on or in something; up to four grasps, each another one."""
        _, name, target = goal
        scene, self.attempt = self.scene, 0
        owner = scene.owner(target)
        top = scene.corners(owner)[:, 2].max() if owner in scene.env.obj_body_id else 0.0
        surface = scene.position(target)[2] if scene.is_site(target) else top
        aside = free_spot(scene, name, target) if is_drawer(scene, target) else self.spots.get(goal, np.zeros(2))
        release = None if "basket" in target else Release(scene.position(target)[:2] + aside, surface, owner)
        for _ in range(ATTEMPTS):
            before = scene.position(name)[2]
            aside_first = self.approach == "side"
            grasp = yield from (self.grasp_from_the_side if aside_first else self.grasp)(name, release)
            yield from self.rise(0.05, CLOSED, within=0.012, steps=12)
            if scene.position(name)[2] < before + 0.02:  # nothing lifted
                self.attempt += 1
                yield from self.rise(0.07, OPEN, within=0.02, steps=15)
                continue
            above = scene.hand()[2] - scene.corners(name)[:, 2].min() if aside_first else grasp.above
            let_go, height = self._release_heights(target, owner, top, surface, above)
            distance, lost = np.linalg.norm(scene.position(name) - scene.hand()), False
            for action in self.carry(name, lambda: scene.position(target)[:2] + aside, let_go, height):
                yield action
                if action[6] == CLOSED and np.linalg.norm(scene.position(name) - scene.hand()) > distance + 0.05:
                    lost = True  # it slipped out
                    break
            if scene.holds(goal):
                return
            self.attempt += 1
            if lost:
                yield from self.rise(0.05, OPEN, within=0.02, steps=12)

    def _release_heights(self, target: str, owner: str, top: float, surface: float, above: float) -> Tuple[float, float]:
        """(height of the hand when it lets go, height for the way) for a thing whose lower end is `above` below the hand."""
        if "basket" in target:
            return max(top - 0.015, self.scene.position(owner)[2] + 0.02 + above), top + above + 0.05
        base = surface
        if not self.scene.is_site(target) or ("stove" in target and "cook_region" not in target) or "top_side" in target:
            base = top
        if "bowl" in target:
            base = top - 0.02
        if "cook_region" in target:
            base = self.scene.surface(owner, self.scene.position(target)[:2])
        let_go = base + above + 0.008
        return let_go, max(let_go + 0.08, self.scene.hand()[2] + 0.06)
