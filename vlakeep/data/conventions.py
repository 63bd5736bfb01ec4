"""The data card: what a data set means by its numbers and names, declared once per data set and checked against the values.

    data_root_dir/<name>/data_card.yaml, or the configuration's data.cards: {<name>: {...} or a file}

    actions: [action/world_vector, action/rotation_delta, action/gripper_closedness_action]    keys, joined in this order
    width: 7                  values of one action
    arms: 1
    chunk: 1                  actions that a frame holds; the first is the frame's own, the rest come again in the frames after it
    grippers:                 which values are grippers, what is open and what is closed; [] where there is none
      - {dimension: 6, open: 0, closed: 1}
      - {dimension: 13, open: -1, closed: 1, relative: true}      -1 opens, +1 closes, 0 leaves it as it is
    names: [x, y, z, roll, pitch, yaw, gripper]
    units: rad                one for all, or a list: m, mm, rad, deg, percent, normalised, other
    quaternion: [3, 4, 5, 6]  values that are one rotation of length 1
    camera: image             rotate: false      the picture's key, and whether it has to be turned by 180 degrees
    colours: rgb              or bgr: the first of the three colours is blue, as OpenCV keeps it
    text: observation/natural_language_instruction      instruction: words of every frame that has none of its own
    blank_texts: keep         or episode: a frame without a text takes its episode's
    spare_frames: end         LeRobot: where a video is longer than its table, the frames that are too many come last
    clean_texts: false        true strips blanks and b'...' from the texts
    frame_rate: 10            robot: words

Nothing is guessed: what is not declared is refused, or read as LIBERO's and the tabletop's seven values are (statistics.py), and what is
declared is an error where the values contradict it.
Axes: E episodes, N frames, A action dimensions.
"""

import difflib
import hashlib
import json
import re
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import numpy as np
import yaml

from vlakeep.core.strict_yaml import load_yaml

FILE = "data_card.yaml"
USUAL_WIDTH = 7  # one arm: six values of a pose change and a gripper, as LIBERO and OpenVLA have it
UNITS = ("m", "mm", "rad", "deg", "percent", "normalised", "other")
_SLACK = 0.05  # of the way from closed to open, that a gripper may go past its ends
_NEAR = 0.05  # of the way: values this near an end count as that end


@dataclass(frozen=True)
class Gripper:
    """One gripper among the values of an action; open and closed are its stored values. relative: they are commands, and else it stays."""

    dimension: int
    open: float
    closed: float
    relative: bool = False


@dataclass(frozen=True)
class DataCard:
    """What is declared of one data set; None and () are what is not. `place` is where it was declared, for messages."""

    place: str
    actions: Tuple[str, ...] = ()
    width: Optional[int] = None
    arms: int = 1
    chunk: int = 1
    grippers: Optional[Tuple[Gripper, ...]] = None
    names: Tuple[str, ...] = ()
    units: Tuple[str, ...] = ()
    quaternion: Tuple[int, ...] = ()
    camera: Optional[str] = None
    rotate: Optional[bool] = None
    colours: Optional[str] = None
    text: Optional[str] = None
    instruction: Optional[str] = None
    blank_texts: str = "keep"
    clean_texts: bool = False
    spare_frames: Optional[str] = None
    frame_rate: Optional[float] = None
    robot: Optional[str] = None

    def identity(self) -> Dict[str, Any]:
        """What of it the samples depend on, as far as it is declared."""
        said = {**asdict(self), "place": "", "names": (), "units": (), "quaternion": (), "frame_rate": None, "robot": None}
        usual = asdict(DataCard(""))
        return {key: value for key, value in said.items() if value != usual[key]}

    def reads(self) -> List[Any]:
        """What of it decides where the files are read: part of the key of a kept index."""
        found = [list(self.actions), self.text, self.instruction] if self.actions or self.text or self.instruction else []
        return found + ([{"spare_frames": self.spare_frames}] if self.spare_frames else [])


class CardError(ValueError):
    """A data card that cannot be used, or that the values contradict; the message names card, key and what to write."""


_LISTS = ("actions", "names", "units", "quaternion")
_KINDS = {"width": int, "arms": int, "chunk": int, "camera": str, "rotate": bool, "colours": str, "text": str, "instruction": str,
          "blank_texts": str, "clean_texts": bool, "spare_frames": str, "frame_rate": float, "robot": str}
_IN_WORDS = {int: "a whole number", float: "a number", str: "a word", bool: "true or false"}


def _number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e15 < value < 1e15  # no nan, and no int beyond floats


def _grippers(value, problems: List[str]) -> Tuple[Gripper, ...]:
    shape = "a list such as [{dimension: 6, open: 1, closed: 0}], or [] where there is none"
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        problems.append(f"grippers: must be {shape}, not {value!r}")
        return ()
    found = []
    for one in value:
        ok = set(one) <= {"dimension", "open", "closed", "relative"} and type(one.get("dimension")) is int and one["dimension"] >= 0
        if not ok or not all(_number(one.get(end)) for end in ("open", "closed")) or not isinstance(one.get("relative", False), bool):
            problems.append(f"grippers: {one!r} must have dimension (from 0 on), open and closed (numbers), and may have relative: true")
        elif one["open"] == one["closed"]:
            problems.append(f"grippers: of dimension {one['dimension']}, open and closed are both {one['open']:g}")
        else:
            found.append(Gripper(one["dimension"], float(one["open"]), float(one["closed"]), one.get("relative", False)))
    if len({one.dimension for one in found}) < len(found):
        problems.append("grippers: a dimension comes twice")
    return tuple(found)


def make_card(tree: Any, place: str) -> DataCard:
    """A card from the tree of its YAML. CardError lists everything that is wrong with it."""
    if not isinstance(tree, dict):
        raise CardError(f"{place}: a data card must hold `key: value` lines such as `width: 7`, not {tree!r}")
    made: Dict[str, Any] = {}
    known: List[str] = [f.name for f in fields(DataCard)][1:]
    problems: List[str] = []
    for key, value in tree.items():
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            problems.append(f"unknown key {key!r}; " + (f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"))
        elif key == "grippers":
            made[key] = _grippers(value, problems)
        elif key in _LISTS:
            kind: type = int if key == "quaternion" else str
            items = value if isinstance(value, list) else [value]
            if not items or not all(isinstance(one, kind) and not isinstance(one, bool) for one in items):
                problems.append(f"{key}: must be a list of {'whole numbers' if kind is int else 'words'}, not {value!r}")
            made[key] = tuple(items)
        elif value is not None:
            kind = _KINDS[key]
            if not (_number(value) if kind is float else isinstance(value, kind) and (kind is bool or not isinstance(value, bool))):
                problems.append(f"{key}: must be {_IN_WORDS[kind]}, not {value!r}")
            made[key] = value
    if not problems:
        problems += _contradictions(DataCard(place, **made))
    if problems:
        raise CardError(f"the data card {place} cannot be used; correct there:\n  " + "\n  ".join(problems))
    return DataCard(place, **made)


def _contradictions(card: DataCard) -> List[str]:
    counts = {key: getattr(card, key) for key in ("width", "arms", "chunk", "frame_rate")}
    found = [f"{key}: must be at least 1" for key, count in counts.items() if count is not None and count < 1]
    if card.blank_texts not in ("keep", "episode"):
        found.append("blank_texts: must be keep or episode")
    if card.colours not in (None, "rgb", "bgr"):
        found.append("colours: must be rgb or bgr")
    if card.spare_frames not in (None, "end"):
        found.append("spare_frames: must be end, or left out")
    found += [f"units: {unit!r} is none of {', '.join(UNITS)}" for unit in dict.fromkeys(card.units) if unit not in UNITS]
    width, past = card.width or 0, [one.dimension for one in card.grippers or ()] + list(card.quaternion)
    if width and past and max(past) >= width:
        found.append(f"width: {width}, but dimension {max(past)} is named; dimensions count from 0")
    if card.grippers and len(card.grippers) != card.arms:
        found.append(f"arms: {card.arms}, but there are {len(card.grippers)} grippers; give each arm its own, or [] where there is none")
    for key in ("names", "units"):
        if width and len(getattr(card, key)) not in (0, 1 if key == "units" else width, width):
            found.append(f"{key}: {len(getattr(card, key))} for a width of {width}")
    if card.quaternion and len(card.quaternion) != 4:
        found.append("quaternion: must be four dimensions")
    return found


def read_card(path: Path, place: Optional[str] = None) -> DataCard:
    """A card's file. CardError for what is no YAML or no card."""
    try:
        tree = load_yaml(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise CardError(f"the data card {place or path} cannot be read as YAML ({error}); docs/bring-your-own-data.md shows one") from error
    return make_card(tree, place or str(path))


def find_card(folder: Path, name: str, given: Optional[Dict[str, Any]] = None) -> Optional[DataCard]:
    """The card of the data set `name`: of data.cards, else the file beside the data, in the set's folder or above its version."""
    one = (given or {}).get(name)
    if isinstance(one, str):
        return read_card(Path(one).expanduser(), f"{one} (data.cards.{name})")
    if one is not None:
        return make_card(one, f"data.cards.{name}")
    versions = [path.parent for path in Path(folder).glob("*/dataset_info.json")]
    places = [*(versions if len(versions) == 1 else []), Path(folder), card_place(folder).parent]
    return next((read_card(place / FILE) for place in places if (place / FILE).is_file()), None)


def card_place(folder) -> Path:
    """Where the card of the data set in a folder is to be written: of RLDS, above the version's folder."""
    folder = Path(folder)
    return (folder.parent if (folder / "dataset_info.json").is_file() and re.fullmatch(r"[\d.]+", folder.name) else folder) / FILE


def usual_gripper(words: str, width: int) -> Gripper:
    """`libero`, `standard` or OPEN/CLOSED of --data.gripper, as the gripper of the last value. ValueError for anything else."""
    numbers = {"libero": "-1/1", "standard": "1/0"}.get(words, words)
    found = re.fullmatch(r"(-?[\d.]+)/(-?[\d.]+)", numbers)
    if not found or float(found[1]) == float(found[2]):
        raise ValueError(f"--data.gripper {words}: libero (-1 open to 1 closed), standard (1 open, 0 closed), or OPEN/CLOSED such as 100/0")
    return Gripper(width - 1, float(found[1]), float(found[2]))


def choices(values_N: np.ndarray) -> str:
    """Every --data.gripper that these values would fit, as a sentence."""
    low, high = float(values_N.min()), float(values_N.max())
    ends = next(((a, b) for a, b in ((0.0, 1.0), (-1.0, 1.0), (0.0, 100.0), (0.0, 255.0))
                 if a - _SLACK * (b - a) <= low < a + (b - a) / 2 < high <= b + _SLACK * (b - a)), (low, high))
    first, second = (f"{end:g}" for end in ends)
    if first == second:
        return f"it never moves: --data.gripper {first}/CLOSED_VALUE if {first} is open, --data.gripper OPEN_VALUE/{first} if it is closed"
    words = {"1/0": "standard", "-1/1": "libero"}
    pairs = [(f"{second}/{first}", second), (f"{first}/{second}", first)]
    return " or ".join(f"--data.gripper {words.get(pair, pair)} if {opened} is open" for pair, opened in pairs)


def gripper_problem(values_N: np.ndarray, one: Gripper) -> Optional[str]:
    """Why these stored values cannot be those of this gripper; None when they can be."""
    low, high, span = float(values_N.min()), float(values_N.max()), abs(one.open - one.closed)
    least, most = min(one.open, one.closed), max(one.open, one.closed)
    said = f"the values lie in [{low:g}, {high:g}]"
    ends = f"open {one.open:g} and closed {one.closed:g}"
    outside = (values_N < least - _SLACK * span) | (values_N > most + _SLACK * span)
    if outside.mean() > 0.001 or (outside.any() and len(values_N) < 1000):
        return f"{said} and not in [{least:g}, {most:g}], as {ends} say"
    if low < high and (high - low) < 0.1 * span and _two_valued(values_N):
        return f"{said}, of which {ends} make a gripper that never moves, though it goes to and fro between two values"
    if not one.relative and least < 0 < most and low > least + 0.4 * span and high - low > 0.25 * span:
        return f"{said} and never come near {least:g}, as {ends} say"
    return None


def _two_valued(values_N: np.ndarray) -> bool:
    low, high = float(values_N.min()), float(values_N.max())
    near = np.abs(values_N[:, None] - np.array([low, high])) <= _NEAR * (high - low)
    return high > low and bool(near.any(1).mean() > 0.8 and near.mean(0).min() > 0.02)


def to_open(values_N: np.ndarray, one: Gripper, start_E: np.ndarray) -> np.ndarray:
    """float32 [N] from 0 (closed) to 1 (open)."""
    if not one.relative:
        scaled = (values_N.astype(np.float64) - one.closed) / (one.open - one.closed)
        return (np.clip(scaled, 0.0, 1.0) + 0.0).astype(np.float32)  # + 0.0: no -0.0, so that data of two conventions are equal to the bit
    # As the official rel2abs_gripper_actions (openvla prismatic/vla/datasets/rlds/utils/data_utils.py): a command holds until the next;
    # before the first one the gripper is where that does not send it, and open without any.
    middle, half = (one.open + one.closed) / 2, (one.open - one.closed) / 2
    towards = (values_N.astype(np.float64) - middle) / half
    command_N = np.where(towards > 0.1, 1, np.where(towards < -0.1, -1, 0))
    out = np.empty(len(values_N), dtype=np.float32)
    for a, b in zip(start_E[:-1], start_E[1:]):
        part = command_N[a:b]
        given = np.flatnonzero(part)
        last = np.maximum.accumulate(np.where(part != 0, np.arange(len(part)), -1))
        before = -part[given[0]] if len(given) else 1
        out[a:b] = (np.where(last >= 0, part[np.maximum(last, 0)], before) + 1) / 2
    return out


def take_chunk(actions_NA: np.ndarray, start_E: np.ndarray, chunk: int, place: str) -> np.ndarray:
    """The frame's own action [N, A / chunk] of stored chunks. CardError where what is ahead does not come again."""
    if actions_NA.shape[1] % chunk:
        raise CardError(f"{place}: chunk: {chunk}, but a frame holds {actions_NA.shape[1]} values, which is no multiple; correct it there")
    share = chunk_share(actions_NA, start_E, chunk)
    if share < 0.95:
        raise CardError(f"{place}: chunk: {chunk}, but only {100 * share:.0f} % of the actions that the frames hold ahead are those of the "
                        "frames after them; they may be stored in another order: correct it there, or store one action a frame")
    return np.ascontiguousarray(actions_NA[:, :actions_NA.shape[1] // chunk])


def chunk_share(actions_NA: np.ndarray, start_E: np.ndarray, chunk: int) -> float:
    """Share of frames whose second stored action is the first one of the next frame; 1 for a chunk of one or frames without a next."""
    if chunk < 2:
        return 1.0
    width = actions_NA.shape[1] // chunk
    inner = np.ones(len(actions_NA), dtype=bool)
    inner[start_E[1:] - 1] = False
    here = np.flatnonzero(inner)
    if not len(here):
        return 1.0
    return float((np.abs(actions_NA[here, width:2 * width] - actions_NA[here + 1, :width]) < 1e-5).all(1).mean())


def as_declared(index, card: Optional[DataCard]):
    """The index with one action a frame and the texts as the card says; itself without a card."""
    if card is None:
        return index
    if card.chunk > 1:
        index = replace(index, actions_NA=take_chunk(index.actions_NA, index.start_E, card.chunk, card.place))
    if card.clean_texts or card.instruction or card.blank_texts == "episode":
        index = _with_texts(index, card)
    return index


def cleaned(text: str) -> str:
    """Without blanks around it, and without the b'...' of bytes that were turned into a text."""
    text = text.strip()
    quoted = re.fullmatch(r"b(['\"])(.*)\1", text, flags=re.S)
    return (quoted[2] if quoted else text).strip()


def _with_texts(index, card: DataCard):
    texts = [cleaned(text) for text in index.texts] if card.clean_texts else list(index.texts)
    if card.instruction:
        texts = [text if text.strip() else card.instruction for text in texts]
    text_N = index.text_N.copy()
    if card.blank_texts == "episode":
        blank = np.array([not text.strip() for text in texts])
        texts = ["" if empty else text for empty, text in zip(blank, texts)]
        for a, b in zip(index.start_E[:-1], index.start_E[1:]):
            own = text_N[a:b][~blank[text_N[a:b]]]
            if len(own):
                text_N[a:b] = np.where(blank[text_N[a:b]], own[0], text_N[a:b])
    number = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    renamed = np.array([number[text] for text in texts], dtype=np.int32)
    return replace(index, texts=list(number), text_N=renamed[text_N])


def check_values(actions_NA: np.ndarray, card: DataCard) -> None:
    """CardError, naming dimension and card, where stored values contradict what is declared; everything that does at once."""
    width, found = actions_NA.shape[1], []
    if card.width is not None and card.width != width:
        raise CardError(f"{card.place}: width: {card.width}, but an action has {width} values; correct it there")
    past = [one.dimension for one in card.grippers or () if one.dimension >= width] + [d for d in card.quaternion if d >= width]
    if past:
        raise CardError(f"{card.place}: dimension {past[0]} is named, but an action has {width} values, counted from 0; correct it there")
    names = card.names if len(card.names) == width else [""] * width
    for one in card.grippers or ():
        problem = gripper_problem(actions_NA[:, one.dimension], one)
        if problem:
            found.append(f"dimension {one.dimension} {names[one.dimension]}".rstrip() + f", a gripper: {problem}")
    units = card.units * width if len(card.units) == 1 else card.units
    skip = {one.dimension for one in card.grippers or ()}
    for dimension, unit in enumerate(units):
        problem = _unit_problem(actions_NA[:, dimension], unit) if dimension not in skip else None
        if problem:
            found.append(f"dimension {dimension} {names[dimension]}".rstrip() + f", in {unit}: {problem}")
    if card.quaternion:
        length = np.linalg.norm(actions_NA[:, list(card.quaternion)], axis=1)
        if np.abs(length - 1).max() > 0.05:
            found.append(f"quaternion {list(card.quaternion)}: its length goes from {length.min():.3g} to {length.max():.3g} and not 1")
    if found:
        raise CardError(f"the values contradict the data card {card.place}; correct there:\n  " + "\n  ".join(found))


def _unit_problem(values_N: np.ndarray, unit: str) -> Optional[str]:
    most = float(np.abs(values_N).max())
    limits = {"m": (20.0, "millimetres?"), "rad": (7.0, "degrees?"), "deg": (2000.0, "motor steps?"),
              "normalised": (1.05, "another unit?"), "percent": (110.0, "another unit?")}
    if unit in limits and most > limits[unit][0]:
        return f"values up to {most:g} ({limits[unit][1]})"
    return None


def card_hash(card: Optional[DataCard]) -> str:
    """Of what the samples depend on; empty without a card."""
    return hashlib.sha256(json.dumps(card.identity(), sort_keys=True).encode()).hexdigest()[:16] if card else ""
