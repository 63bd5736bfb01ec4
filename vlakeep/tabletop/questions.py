"""Visual questions about a table with exact answers from its state, unambiguous and with balanced answers."""

from typing import List, Optional, Tuple

import numpy as np

from vlakeep.tabletop.world import COLOR_NAMES, COLORS, SHAPES, TabletopWorld, object_name

QUESTION_KINDS = ["color", "shape", "count", "exists", "left", "gripper"]
NUMBERS = ["zero", "one", "two", "three", "four"]
ANSWERS = {"color": COLOR_NAMES, "shape": SHAPES, "count": NUMBERS[2:], "exists": ["yes", "no"],
           "left": ["yes", "no"], "gripper": ["yes", "no"]}
MARGIN = 0.12  # least horizontal distance at which "left of" is asked


def ask(world: TabletopWorld, i: int, kind: str, rng) -> Optional[Tuple[str, str]]:
    """(question, answer) of this kind about table i, or None when the scene has no unambiguous one."""
    slots = np.flatnonzero(world.present_NK[i])
    colors, shapes = world.color_NK[i, slots], world.shape_NK[i, slots]
    if kind == "color":
        unique = [k for k in range(len(slots)) if (shapes == shapes[k]).sum() == 1]
        if not unique:
            return None
        k = rng.choice(unique)
        return f"what color is the {SHAPES[shapes[k]]}?", COLOR_NAMES[colors[k]]
    if kind == "shape":
        unique = [k for k in range(len(slots)) if (colors == colors[k]).sum() == 1]
        if not unique:
            return None
        k = rng.choice(unique)
        return f"what shape is the {COLOR_NAMES[colors[k]]} one?", SHAPES[shapes[k]]
    if kind == "count":
        return "how many objects are there?", NUMBERS[len(slots)]
    if kind == "exists":
        if rng.random() < 0.5:
            k = rng.integers(len(slots))
            return f"is there a {object_name(colors[k], shapes[k])}?", "yes"
        here = set(zip(colors.tolist(), shapes.tolist()))
        missing = [(c, s) for c in range(len(COLORS)) for s in range(len(SHAPES)) if (c, s) not in here]
        # Half of the absent ones share colour and shape with what is there, so that neither alone gives the answer away.
        confusing = [(c, s) for c, s in missing if c in colors and s in shapes]
        pool = confusing if confusing and rng.random() < 0.5 else missing
        return f"is there a {object_name(*pool[rng.integers(len(pool))])}?", "no"
    if kind == "left":
        x = world.xy_NK2[i, slots, 0]
        pairs = [(a, b) for a in range(len(slots)) for b in range(len(slots)) if a != b and abs(x[a] - x[b]) >= MARGIN]
        if not pairs:
            return None
        a, b = pairs[rng.integers(len(pairs))]  # both orders of every pair are in the list, so yes and no are balanced
        return (f"is the {object_name(colors[a], shapes[a])} left of the {object_name(colors[b], shapes[b])}?",
                "yes" if x[a] < x[b] else "no")
    if kind == "gripper":
        return "is the gripper open?", "no" if world.closed_N[i] else "yes"
    raise ValueError(f"unknown question kind {kind!r}; known are {', '.join(QUESTION_KINDS)}")


def corpus() -> List[str]:
    """Every text of the benchmark, for the tokenizer: templates with every word they can hold. No text is left out but one.

    The new skill's instruction is in it too: an unseen word still needs a token, whose embedding pretraining never touches.
    """
    objects = [object_name(c, s) for c in range(len(COLORS)) for s in range(len(SHAPES))]
    texts = ["In: What action should the robot take to ?\nOut:", "yes no", " ".join(NUMBERS), " ".join(COLOR_NAMES + SHAPES)]
    texts += [f"go to the {side} side" for side in ("left", "right", "top", "bottom")]
    for verb in ("move to the", "pick up the", "tap the", "let go of the", "put the red circle on the", "stash the"):
        texts += [f"{verb} {name}" for name in objects]
    texts += ["what color is the circle?", "what shape is the red one?", "how many objects are there?", "is there a red circle?",
              "is the red circle left of the blue square?", "is the gripper open?"]
    return texts


def words() -> List[str]:
    import re
    return sorted({word for text in corpus() for word in re.findall(r"[A-Za-z]+", text)})
