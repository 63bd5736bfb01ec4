"""A data card to confirm: what names and values of a data set suggest, with the evidence. Nothing of it is used until it is declared.

Axes: E episodes, N frames, A action dimensions.
"""

import re
from typing import Dict, Iterable, List, Sequence, Tuple

import numpy as np

from vlakeep.data.conventions import USUAL_WIDTH, card_place, chunk_share

_GRIPPER_NAME = re.compile(r"grip|grasp|claw|jaw|finger", re.I)
_TEXT_NAME = re.compile(r"instruction|language|task|annotation|prompt|goal", re.I)
_NO_ACTION = re.compile(r"terminate|reward|discount|mode|is_first|is_last", re.I)
_TWO_VALUED = 0.9  # share of the values near the ends of their range, from which they look like those of a gripper
_SOME = 2000  # frames looked at for the shape of values


def _chunk(actions_NA: np.ndarray, start_E: np.ndarray) -> int:
    """Actions that a frame holds: the largest number whose second action is the next frame's first; 1 where there is none."""
    width = actions_NA.shape[1]
    sizes = [one for one in range(2, width // 2 + 1) if width % one == 0 and np.ptp(actions_NA[:, :one], axis=0).max() > 0]
    return next((width // one for one in sizes if chunk_share(actions_NA, start_E, width // one) > 0.95), 1)


def _ends(values_N: np.ndarray) -> float:
    """Share of the values within 5 % of an end of their range; 0 for a constant."""
    low, high = float(values_N.min()), float(values_N.max())
    if high <= low:
        return 0.0
    return float(((values_N <= low + 0.05 * (high - low)) | (values_N >= high - 0.05 * (high - low))).mean())


def at_ends_only(actions_NA: np.ndarray, start_E: np.ndarray) -> List[int]:
    """Dimensions that keep one value but in the last frame of episodes: flags that one ends, such as Open X's terminate_episode."""
    held = np.diff(start_E) > 0
    inner = np.ones(len(actions_NA), dtype=bool)
    inner[start_E[1:][held] - 1] = False
    if not inner.any():
        return []
    still = np.ptp(actions_NA[inner], axis=0) == 0
    return np.flatnonzero(still & (np.ptp(actions_NA, axis=0) > 0)).tolist()


def guess_grippers(actions_NA: np.ndarray, start_E: np.ndarray, names: Sequence[str] = ()) -> List[Tuple[int, float, float, str]]:
    """(dimension, open, closed, evidence) of each value that looks like a gripper: by its name, else by values at two ends."""
    width, found = actions_NA.shape[1], []
    begin_E = start_E[:-1][np.diff(start_E) > 0]  # an episode that is left out has no frame
    named = [d for d, name in enumerate(names) if len(names) == width and _GRIPPER_NAME.search(name)]
    flags = at_ends_only(actions_NA, start_E)
    for dimension in named or [one for one in range(width) if one not in flags]:
        values_N = actions_NA[:, dimension]
        share = _ends(values_N)
        if not named and share < _TWO_VALUED:
            continue
        first = float(np.median(values_N[begin_E]))
        low, high = (float(end) for end in np.quantile(values_N, [0.0, 1.0]))
        usual = [(a, b) for a, b in ((0, 1), (-1, 1), (0, 100), (0, 255)) if abs(low - a) < 0.1 * (b - a) > abs(high - b)]
        low, high = usual[0] if usual else (low, high)
        opened, closed = (low, high) if abs(first - low) < abs(first - high) else (high, low)
        why = f"called {names[dimension]}" if named else f"{100 * share:.0f} % of its values are near {low:g} or {high:g}"
        found.append((dimension, opened, closed, f"{why}; open is where most episodes begin ({first:g}): check it"))
    if not found and not names:
        values_N, first = actions_NA[:, -1], float(np.median(actions_NA[begin_E, -1]))
        low, high = float(values_N.min()), float(values_N.max())
        for b in (1, 100, 255):
            if -0.1 * b < low < 0.3 * b and 0.7 * b < high < 1.1 * b:
                opened, closed = (b, 0) if first > b / 2 else (0, b)
                why = f"a guess: it is the last, from {low:g} to {high:g}; most episodes begin at {first:g}"
                found = [(width - 1, opened, closed, why)]
    return found


def ready_card(actions_NA: np.ndarray, start_E: np.ndarray, names: Sequence[str] = (), extra: Iterable[str] = ()) -> str:
    """The YAML of a card to confirm. `extra`: further lines, such as keys."""
    some = actions_NA[:_SOME * 10]
    ends = start_E[start_E <= len(some)]
    chunk = _chunk(some, ends) if len(ends) > 1 else 1
    width = actions_NA.shape[1] // chunk
    grippers = guess_grippers(actions_NA[:, :width], start_E, names)
    lines = [*extra, f"width: {width}"]
    if chunk > 1:
        lines.append(f"chunk: {chunk}                 # a frame's second action of {width} values is the next frame's first")
    if len(grippers) > 1:
        lines.append(f"arms: {len(grippers)}")
    lines.append("grippers:" if grippers else "grippers: []              # no value is called a gripper or has two ends; say which it is")
    flags = at_ends_only(actions_NA[:, :width], start_E)
    lines += [f"# dimension {d} changes in the last frame of episodes only: a flag that one ends, no gripper" for d in flags]
    lines += [f"  - {{dimension: {d}, open: {a:g}, closed: {b:g}}}   # {why}" for d, a, b, why in grippers]
    if len(names) == width:
        lines.append(f"names: [{', '.join(str(name) for name in names)}]")
    return "\n".join(lines)


def offer(dataset, index, begin: str = "Or declare it") -> str:
    """What may be written where instead, for the end of a message."""
    card = ready_card(index.actions_NA, index.start_E, dataset.action_names)
    return f"{begin} in {card_place(dataset.folder)}, after you have checked every line (--data.cards takes a card elsewhere):\n{card}"


def refusal(dataset, index) -> str:
    """Why actions of this width are not read without a card, and the card to confirm."""
    width = index.actions_NA.shape[1]
    shape = "; seven joints or a pose, two arms and chunks cannot be told from another by their width"
    return (f"{dataset.folder}: an action has {width} values, and without a data card only {USUAL_WIDTH} are read, one arm with the "
            f"gripper last{shape}. {offer(dataset, index, 'Declare what they are')}")


def missing_keys(where: str, lacking: List[str], there: Dict[str, str], folder) -> str:
    """One message for all keys that are not there, with a card by the names that are. there: key -> its kind in one word."""
    short = {key.removeprefix("steps/"): what for key, what in there.items()}
    actions = [key for key, what in short.items() if what == "number" and re.search(r"action", key, re.I) and not _NO_ACTION.search(key)]
    texts = [key for key, what in short.items() if what == "text" and _TEXT_NAME.search(key)]
    pictures = [key.removeprefix("observation/").removeprefix("obs/") for key, what in short.items() if what == "picture"]
    order = {"world_vector": 0, "rotation_delta": 1}
    actions.sort(key=lambda key: (order.get(key.split("/")[-1], 3 if _GRIPPER_NAME.search(key) else 2), key))
    lines = [f"actions: [{', '.join(actions)}]" if actions else "actions: [KEY, ...]        # none is called action",
             f"text: {texts[0]}" if texts else "instruction: WORDS         # no text is stored; one for all frames, or text: KEY",
             *([f"camera: {pictures[0]}" + (f"   # or {', '.join(pictures[1:])}" if pictures[1:] else "")] if pictures else [])]
    grip = next((key for key in actions if _GRIPPER_NAME.search(key)), None)
    lines.append("width: 7                   # of all keys of actions together")
    lines.append("grippers:" + (f"                  # from {grip}" if grip else ""))
    lines.append("  - {dimension: 6, open: OPEN_VALUE, closed: CLOSED_VALUE}"
                 + ("   # relative: true if they are commands, as in RT-1" if grip and "closedness" in grip else ""))
    card = "\n".join(lines)
    return (f"{where}: no {' and no '.join(repr(key) for key in lacking)} among {', '.join(sorted(there)) or 'nothing'}; say in "
            f"{card_place(folder)} what the set calls them, after you have checked every line:\n{card}")

