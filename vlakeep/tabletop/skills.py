"""Skills of the tabletop: names, limits, and the scenes, progress and success conditions of those that the shipped model has never seen.

Each new skill is of another kind, and none is done on the way of another. Whatever stage an episode has reached shows in the picture
(where objects lie, how the gripper is), because policies have no memory.

    corner    place      stash the A                              A is let go of in the tray
    path      path       take the top side to the A               closed above A, having come down its column from a lane at the top
    order     order      put two objects on the bottom side       both are let go of at the bottom edge, the left one first
                         left to right
    relation  relation   put the A left of the B                  A is let go of on the left of B
    repeat    repetition go left right left right                 there and back twice, sideways or up and down
    carry     transport  take the A to the left side              A is held up at that edge
    blue      following  move the A to the blue circle            A is let go of on the blue one of two targets of one shape
    red       known      put the A on the red circle              the other target on the same table, in words that the model knows

Axes: N tables, K object slots.
"""

import numpy as np

COLORS = {"red": (220, 50, 40), "green": (40, 160, 70), "blue": (45, 90, 220), "yellow": (245, 205, 40), "purple": (150, 60, 190)}
SHAPES = ["circle", "square", "triangle", "cross"]
COLOR_NAMES = list(COLORS)
SLOTS = 4
RADIUS = 0.085
TRAY = np.array([0.86, 0.14])
TRAY_RADIUS = 0.14
STEP_XY, STEP_Z = 0.12, 0.5
GRASP_DISTANCE = 0.07
LOW = 0.25

SKILLS = ["reach", "side", "pick", "tap", "drop", "place"]
NEW_SKILL = "corner"  # the one that is taught and evaluated unless another is named
NEW_SKILLS = [NEW_SKILL, "path", "order", "relation", "repeat", "carry", "blue"]
# New skill -> the known prompt that is asked on the same tables, to see whether the prompt decides.
CONTROLS = {"blue": "red"}
# A skill's place in this list seeds its tables: new ones go to the end.
ALL_SKILLS = SKILLS + NEW_SKILLS + list(CONTROLS.values())
SIDES = {"left": (0.12, None), "right": (0.88, None), "top": (None, 0.12), "bottom": (None, 0.88)}
EDGES = [x if y is None else y for x, y in SIDES.values()]
# Steps running for which the condition must hold: whoever merely passes through on the way to something else has moved on by then.
HOLD = {"reach": 3, "side": 2, "pick": 2, "tap": 1, "drop": 1, "place": 1, "corner": 1,
        "path": 1, "order": 1, "relation": 1, "repeat": 1, "carry": 3, "blue": 1, "red": 1}
STILL = 0.05  # an object that is nearer than this to where it started has not been moved
MAX_STEPS = {"reach": 16, "side": 14, "pick": 20, "tap": 20, "drop": 12, "place": 32, "corner": 32,
             "path": 32, "order": 56, "relation": 32, "repeat": 34, "carry": 26, "blue": 32, "red": 32}
ON = 0.09  # a thing whose centre is nearer than this to another's lies on it

# path: y of the lane along the top, below the strip of `side`; y down to which it counts; half width of the target's column
LANE, LANE_END, COLUMN = 0.25, 0.35, 0.14
# order: y at which things are let go of at the bottom edge, beyond where `drop` begins, and y from which they count as lying there
BOTTOM, BOTTOM_EDGE = 0.95, 0.85
# relation: from a thing to the place left of it, and the half sizes of the region around that place that counts
BESIDE, BESIDE_X, BESIDE_Y = np.array([-0.23, 0.0]), 0.12, 0.12
# repeat: turning points, outside the strips of `side`; ends beyond which a turn counts; turns
TURN_LOW, TURN_HIGH, LOW_END, HIGH_END, TURNS = 0.22, 0.78, 0.3, 0.7, 4


def object_name(color: int, shape: int) -> str:
    return f"{COLOR_NAMES[color]} {SHAPES[shape]}"


def draw_task(world, i: int, skill: str, rng) -> str:
    """Choose what a new skill is about among the objects of table i; its instruction, or "" where the scene has no room for it."""
    count = int(world.present_NK[i].sum())
    target, second = (int(k) for k in rng.choice(count, 2, replace=False))
    side = int(rng.integers(4))
    names = [object_name(c, s) for c, s in zip(world.color_NK[i, :count], world.shape_NK[i, :count])]
    xy_K2, grip_2 = world.xy_NK2[i, :count], world.grip_N2[i]
    world.target_N[i] = target
    if skill == "path":
        far = min(xy_K2[target, 1], grip_2[1]) > LANE_END + 0.15
        apart = abs(xy_K2[target, 0] - grip_2[0]) > 0.25  # else the straight way is the path asked for
        return f"take the top side to the {names[target]}" if far and apart else ""
    if skill == "carry":
        world.side_N[i] = side
        far = abs(xy_K2[target, side // 2] - EDGES[side]) > 0.4
        return f"take the {names[target]} to the {list(SIDES)[side]} side" if far else ""
    if skill == "repeat":
        world.side_N[i] = side = 2 * (side % 2)
        return "go top bottom top bottom" if side else "go left right left right"
    world.goal_N[i] = second
    if skill == "order":
        room = count == 2 and xy_K2[:, 1].max() < 0.62 and xy_K2[second, 0] - xy_K2[target, 0] > 0.2
        return "put two objects on the bottom side left to right" if room else ""
    if skill == "relation":
        spot_2, others_K2 = xy_K2[second] + BESIDE, np.delete(xy_K2, target, axis=0)
        free = np.linalg.norm(others_K2 - spot_2, axis=1).min() > 0.2 and np.linalg.norm(TRAY - spot_2) > 0.25
        room = free and spot_2[0] > 0.1 and np.linalg.norm(xy_K2[target] - spot_2) > 0.2
        return f"put the {names[target]} left of the {names[second]}" if room else ""
    return _draw_pair(world, i, skill, count)


def _draw_pair(world, i: int, skill: str, count: int) -> str:
    """A red and a blue target of one shape, and nothing else of these colours: one table, two prompts."""
    target, red = int(world.target_N[i]), int(world.goal_N[i])
    reserved = [COLOR_NAMES.index("red"), COLOR_NAMES.index("blue")]
    if count < 3 or np.isin(world.color_NK[i, :count], reserved).any():
        return ""
    blue = min(set(range(count)) - {target, red})
    world.color_NK[i, [red, blue]] = reserved
    world.shape_NK[i, blue] = world.shape_NK[i, red]
    world.goal_N[i], world.rival_N[i] = (blue, red) if skill == "blue" else (red, blue)
    name, shape = object_name(world.color_NK[i, target], world.shape_NK[i, target]), SHAPES[world.shape_NK[i, red]]
    return f"move the {name} to the blue {shape}" if skill == "blue" else f"put the {name} on the red {shape}"


def at_bottom(world, slot_N: np.ndarray) -> np.ndarray:
    """Whether the object in this slot lies at the bottom edge and is not held, [N]."""
    return (world.xy_NK2[np.arange(world.n), slot_N, 1] > BOTTOM_EDGE) & (world.held_N != slot_N)


def advance(world) -> np.ndarray:
    """The stage [N] that path, order and repeat have reached after a step; it follows from the stage before and the state now."""
    rows, stage_N = np.arange(world.n), world.stage_N
    (x_N, y_N), target_x_N = world.grip_N2.T, world.target_xy()[:, 0]
    # path: 1 once the column is entered from the lane, 0 again when it is left
    column_N = (np.abs(x_N - target_x_N) < COLUMN) & ((y_N < LANE_END) | (stage_N == 1))
    # order: 1 while the first thing lies at the edge and did so before the second; -1 for good when the second came first
    first_N, second_N = at_bottom(world, world.target_N), at_bottom(world, np.maximum(world.goal_N, 0))
    order_N = np.where((stage_N == -1) | (second_N & (stage_N == 0)), -1, np.where(first_N, 1, 0))
    # repeat: turns made; even ones are at the low end
    along_N = world.grip_N2[rows, np.maximum(world.side_N, 0) // 2]
    turn_N = np.where(stage_N % 2 == 0, along_N < LOW_END, along_N > HIGH_END)
    return np.select([world.skills == skill for skill in ("path", "order", "repeat")], [column_N, order_N, stage_N + turn_N], stage_N)


def conditions(world, untouched_N, let_go_N, goal_moved_N) -> dict:
    """New skill -> whether its condition is true now, [N]; see TabletopWorld._condition for the arguments."""
    rows, goal_N, side_N = np.arange(world.n), np.maximum(world.goal_N, 0), np.maximum(world.side_N, 0)
    target_N2, goal_N2 = world.target_xy(), world.xy_NK2[rows, goal_N]
    x_N, y_N = world.grip_N2.T
    at_edge_N = np.choose(side_N, [x_N < 0.16, x_N > 0.84, y_N < 0.16, y_N > 0.84])
    off_N2 = np.abs(target_N2 - goal_N2 - BESIDE)
    on_goal_N = let_go_N & (np.linalg.norm(target_N2 - goal_N2, axis=1) < ON) & (goal_moved_N < STILL)
    return {
        "corner": let_go_N & (np.linalg.norm(target_N2 - TRAY, axis=1) < TRAY_RADIUS),
        "path": (world.stage_N == 1) & (np.linalg.norm(target_N2 - world.grip_N2, axis=1) < 0.09) & (world.z_N > 0.6)
        & world.closed_N & untouched_N,
        "order": (world.stage_N == 1) & at_bottom(world, world.target_N) & at_bottom(world, goal_N) & let_go_N,
        "relation": let_go_N & (off_N2[:, 0] < BESIDE_X) & (off_N2[:, 1] < BESIDE_Y) & (goal_moved_N < STILL),
        "repeat": (world.stage_N >= TURNS) & untouched_N,
        "carry": (world.held_N == world.target_N) & at_edge_N & (world.z_N > 0.6),
        "blue": on_goal_N,
        "red": on_goal_N,
    }
