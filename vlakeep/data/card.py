"""What a data set is like, looked at when it is opened and before a model is loaded: the same for `vlakeep preflight` and `vlakeep train`.

    look_at_all(config.data, root, cache)    a report per data set: its lines, what is wrong (problems), what to know (notes)

A report has episodes, frames, robot, camera, picture statistics and thumbnails, texts, frame rate, and per action dimension range,
quantiles, share clipped, whether it moves at all, and the round trip: demonstrated action -> label -> token -> action. It is kept in the
cache under a key of the index, the conventions and the model's prompt, and in the run's folder as data/<name>.json and .png.
Axes: E episodes, N frames, A action dimensions.
"""

import base64
import hashlib
import io
import json
import re
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

import numpy as np
from PIL import Image

from vlakeep.core.storage import atomic_write
from vlakeep.data.conventions import card_place
from vlakeep.data.dataset import DemoDataset
from vlakeep.data.degenerate import CONSTANT, NOISE, RARE
from vlakeep.data.formats import closing_all, open_configured
from vlakeep.data.statistics import unnormalise
from vlakeep.data.suggest import _GRIPPER_NAME, at_ends_only

_FORMAT = 5
BINS = 255  # of an action value, as the official tokenizer has them
_EPISODES, _FILES = 8, 64  # episodes whose pictures are looked at, and video files whose end is
_CLIPPED, _MOST_CLIPPED = 0.025, 0.2  # own quantiles clip at most 0.02; statistics that clip a fifth are not of this robot
_TAIL = 10.0  # times q01 to q99 that the whole range may be before it is told
_FRAMES = 300_000  # of the round trip
_THUMB = 96  # pixels high
_WAY = 0.6  # of the way from closed to open, below which a gripper may have been declared by another scale
_STAND_IN = re.compile(r"n/?an?|none|null|todo|tbd|undefined|unknown|dummy.*|placeholder.*|no (language )?instruction|"
                       r"(task|language|natural)[_ ](description|instruction)|string|test", re.I)
_JOINT_NAME = re.compile(r"joint|wrist|elbow|shoulder|roll|pitch|yaw", re.I)


class Prompt(NamedTuple):
    """How the model that is going to be trained counts a text: tokens(text), and how many it takes; `name` for the cache."""

    tokens: Callable[[str], int]
    limit: int
    name: str


def bins_and_back(label: np.ndarray) -> np.ndarray:
    """Labels in [-1, 1] -> centres of their bins, as the action tokens of 256 edges have it (float64, same shape)."""
    edges = np.linspace(-1, 1, BINS + 1)
    return ((edges[:-1] + edges[1:]) / 2)[np.clip(np.digitize(np.clip(label, -1.0, 1.0), edges) - 1, 0, BINS - 1)]


def round_trip(dataset: DemoDataset, back: Callable[[np.ndarray], np.ndarray] = bins_and_back) -> List[Dict[str, Any]]:
    """Per dimension: `error`, the largest distance of what comes back from what was demonstrated, as far as it lies in the range that can
    be said; `allowed`, half a bin; `clipped`, the share of values outside that range; `lost`, the share inside that does not come back."""
    one, want_NA, label_NA = dataset.statistics["action"], dataset.standard_NA, dataset.actions_NA
    step = max(1, len(want_NA) // _FRAMES)
    rows = np.unique(np.concatenate([np.arange(0, len(want_NA), step), want_NA.argmin(0), want_NA.argmax(0)]))
    want_NA, done_NA = want_NA[rows].astype(np.float64), unnormalise(back(label_NA[rows]), dataset.statistics)
    found = []
    for d, masked in enumerate(one.get("mask", [True] * want_NA.shape[1])):
        low, high = (one["q01"][d], one["q99"][d]) if masked else (-1.0, 1.0)
        span = max(high - low, 0.0)
        # float32 of the labels, and the 1e-8 by which the official formula widens the range
        allowed = 0.5 * span / BINS + 1e-5 * span + 4e-7 * max(abs(low), abs(high)) + 2e-8
        outside_N = (want_NA[:, d] < low - allowed) | (want_NA[:, d] > high + allowed)
        off_N = np.abs(done_NA[:, d] - np.clip(want_NA[:, d], low, high))
        found.append({"error": float(off_N.max()), "allowed": float(allowed), "bin": float(span / BINS),
                      "clipped": float(outside_N.mean()), "lost": float((off_N > allowed).mean())})
    return found


def _dimensions(dataset: DemoDataset) -> List[Dict[str, Any]]:
    one, card = dataset.statistics["action"], dataset.conventions.card
    width, grippers = len(one["q01"]), {g.dimension: g for g in dataset.grippers}
    names = list(card.names) if card and card.names else list(dataset.action_names)
    units = card.units * width if card and len(card.units) == 1 else card.units if card else ()
    trips, stored_NA = round_trip(dataset), dataset.index.actions_NA
    quantiles = np.quantile(stored_NA, [0.01, 0.99], axis=0)
    return [{"dimension": d, "name": names[d] if len(names) == width else "", "unit": units[d] if len(units) == width else "",
             "gripper": d in grippers, "min": float(stored_NA[:, d].min()), "q01": float(quantiles[0, d]), "q99": float(quantiles[1, d]),
             "max": float(stored_NA[:, d].max()), "kind": dataset.degenerate.get(d, ""), **trips[d]} for d in range(width)]


def _grippers(dataset: DemoDataset) -> List[Dict[str, Any]]:
    card, told, found = dataset.conventions.card, dataset.conventions.gripper, []
    how = (f"declared in {card.place}" if card and card.grippers is not None else f"--data.gripper {told}" if told
           else f"by the set's name, {dataset.name}")
    start_E, stored_NA = dataset.index.start_E, dataset.index.actions_NA
    held = np.diff(start_E) > 0  # episodes that are left out are there with no frame
    for one in dataset.grippers:
        open_N = dataset.standard_NA[:, one.dimension]
        begin, end = open_N[start_E[:-1][held]] > 0.5, open_N[start_E[1:][held] - 1] > 0.5
        found.append({"dimension": one.dimension, "open": one.open, "closed": one.closed, "relative": one.relative, "how": how,
                      "share_open": float((open_N > 0.95).mean()), "share_closed": float((open_N < 0.05).mean()),
                      "begin_open": float(begin.mean()), "end_open": float(end.mean()), "moves": bool(open_N.max() > open_N.min()),
                      "at_ends_only": one.dimension in at_ends_only(stored_NA, start_E),
                      "way": float(open_N.max() - open_N.min())})
    return found


def _texts(dataset: DemoDataset, prompt: Optional[Prompt]) -> Dict[str, Any]:
    texts, text_N = dataset.index.texts, dataset.index.text_N
    used = np.bincount(np.concatenate([text_N[a:a + n] for a, n in zip(dataset.starts, dataset.lengths)]), minlength=len(texts))
    blank = [i for i, text in enumerate(texts) if not text.strip()]
    odd = [texts[i] for i in range(len(texts)) if i not in blank and (texts[i] != texts[i].strip() or texts[i].startswith(("b'", 'b"')))]
    stand_ins = [i for i, text in enumerate(texts) if used[i] and _STAND_IN.fullmatch(text.strip())]
    replaced = [text for i, text in enumerate(texts) if used[i] and "\ufffd" in text]
    structured = [i for i, text in enumerate(texts) if used[i] and _structured(text)]
    found: Dict[str, Any] = {"structured_frames": int(used[structured].sum()), "structured_example": [texts[i] for i in structured[:1]],
                             "replaced": len(replaced), "replaced_example": (replaced or [""])[0][:40],
                             "stand_ins": [texts[i] for i in stand_ins], "stand_in_frames": int(used[stand_ins].sum()),
                             "count": len(texts) - len(blank), "blank_frames": int(used[blank].sum()), "odd": len(odd),
                             "odd_example": (odd or [""])[0][-40:], "examples": [text[:200] for text in texts if text.strip()][:3],
                             "longest_tokens": None, "too_long": []}
    if prompt is not None:
        # A text has at most as many tokens as bytes, so that only the longest need be counted.
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i].encode()))
        limit = prompt.limit - dataset.standard_NA.shape[1] - 1  # the answer: a token a value, and the end
        counted = {i: prompt.tokens(texts[i]) for i in order if used[i] and len(texts[i].encode()) > limit // 4}
        counted.update({i: prompt.tokens(texts[i]) for i in order[:16] if i not in counted})
        found.update(longest_tokens=max(counted.values()), limit=limit)
        for i in (i for i, count in counted.items() if count > limit and used[i]):
            frame = int(np.flatnonzero(text_N == i)[0])
            episode = int(np.searchsorted(dataset.index.start_E, frame, side="right")) - 1
            found["too_long"].append({"tokens": counted[i], "frames": int(used[i]), "episode": episode, "text": texts[i][:60]})
    return found


def _structured(text: str) -> bool:
    """Whether a text is JSON that holds texts, and no instruction."""
    if text.strip()[:1] not in ("{", "["):
        return False
    try:
        return isinstance(json.loads(text), (dict, list))
    except (ValueError, RecursionError):
        return False


def _pictures(dataset: DemoDataset) -> Tuple[Dict[str, Any], bytes]:
    """(sizes, mean and spread per colour, how many are of one colour, ...), and a PNG of thumbnails: first and middle frames."""
    count = min(_EPISODES, len(dataset))
    episodes = np.unique(np.linspace(0, len(dataset) - 1, count).round().astype(int)).tolist()
    looked = [(e, t) for e in episodes for t in dict.fromkeys((0, int(dataset.lengths[e]) // 2, int(dataset.lengths[e]) - 1))]
    pictures = {key: dataset.image(*key) for key in looked}
    for episode in dataset.last_of_files()[:_FILES]:
        key = (episode, int(dataset.lengths[episode]) - 1)
        if key not in pictures:
            dataset.image(*key)  # the end of a file is what a broken copy lacks
    flat = [picture.reshape(-1, 3).astype(np.float64) for picture in pictures.values()]
    sizes: Dict[str, int] = {}
    for picture in pictures.values():
        sizes[f"{picture.shape[0]} x {picture.shape[1]}"] = sizes.get(f"{picture.shape[0]} x {picture.shape[1]}", 0) + 1
    thumbs = [pictures[key] for key in looked if key[1] != int(dataset.lengths[key[0]]) - 1 or dataset.lengths[key[0]] == 1][:2 * _EPISODES]
    return ({"looked_at": len(pictures), "sizes": sizes, "mean": np.mean([p.mean(0) for p in flat], 0).round(1).tolist(),
             "spread": np.mean([p.std(0) for p in flat], 0).round(1).tolist(),
             "one_colour": sum(float(p.std(0).max()) == 0 for p in flat),
             "all_alike": len(pictures) > 1 and len({p.tobytes() for p in pictures.values()}) == 1}, _sheet(thumbs))


def _sheet(pictures: List[np.ndarray]) -> bytes:
    """PNG: two rows of thumbnails."""
    small = [Image.fromarray(p).resize((max(1, round(_THUMB * p.shape[1] / p.shape[0])), _THUMB), Image.BILINEAR) for p in pictures]
    columns = (len(small) + 1) // 2
    width = max(one.width for one in small)
    sheet = Image.new("RGB", (columns * (width + 2) - 2, (2 if len(small) > 1 else 1) * (_THUMB + 2) - 2), (255, 255, 255))
    for i, one in enumerate(small):
        sheet.paste(one, ((i // 2) * (width + 2), (i % 2) * (_THUMB + 2)))
    out = io.BytesIO()
    sheet.save(out, "PNG", optimize=True)
    return out.getvalue()


def _turned_by(dataset: DemoDataset) -> str:
    """Why pictures are turned by 180 degrees: said, the format's way, or the format's way although the camera is not called as there."""
    if dataset.conventions.rotate is not None:
        return "said"
    return "format" if (dataset.conventions.camera or "_rgb").endswith("_rgb") else "guess"


def look_at(dataset: DemoDataset, prompt: Optional[Prompt] = None, known: Optional[Dict[str, int]] = None) -> Dict[str, Any]:
    """The report of an open data set. known: widths of the base's action statistics by key. Raises what reading a picture raises."""
    card, usual = dataset.conventions.card, dataset.index
    pictures, sheet = _pictures(dataset)
    report: Dict[str, Any] = {
        "format": _FORMAT, "name": dataset.name, "kind": dataset.kind, "folder": str(dataset.folder),
        "card": card.place if card else None, "robot": (card.robot if card else None) or dataset.robot or None,
        "episodes": len(dataset), "episodes_in_files": len(usual.start_E) - 1, "unlabelled": dataset.unlabelled,
        "of_validation": dataset.of_validation,
        "frames": dataset.num_frames, "frame_rate": (card.frame_rate if card else None) or dataset.fps,
        "shortest": int(dataset.lengths.min()), "longest": int(dataset.lengths.max()),
        "camera": dataset.camera or dataset.conventions.camera, "turned": dataset.turned, "turned_by": _turned_by(dataset),
        "pictures": pictures, "texts": _texts(dataset, prompt),
        "arms": card.arms if card else 1, "chunk": card.chunk if card else 1, "grippers": _grippers(dataset),
        "dimensions": _dimensions(dataset), "degenerate": dataset.conventions.degenerate or "demonstrated",
        "own_statistics": dataset.own_statistics, "widths_of_base": sorted(set((known or {}).values())),
        "thumbnails": base64.b64encode(sheet).decode()}
    report["problems"], report["notes"] = _problems(report, dataset), _notes(report)
    return report


def _called(one: Dict[str, Any]) -> str:
    return f"dimension {one['dimension']}" + (f" ({one['name']})" if one["name"] else " (gripper)" if one["gripper"] else "")


def _problems(report: Dict[str, Any], dataset: DemoDataset) -> List[str]:
    found, where, frames = [], report["card"] or str(card_place(report["folder"])), len(dataset.standard_NA)
    for one in report["dimensions"]:
        if one["lost"] and not (report["degenerate"] == "official" and one["kind"]):
            found.append(f"{_called(one)}: {100 * one['lost']:.1f} % of the demonstrated values do not come back from their tokens (off by "
                         f"up to {one['error']:.4g}, a bin is {one['bin']:.4g} wide); declare what this dimension is in {where}")
        if one["clipped"] > _MOST_CLIPPED and not (report["degenerate"] == "official" and one["kind"]):
            remedy = ("leave --data.statistics out" if not report["own_statistics"] else
                      f"{frames} frames are too few for quantiles: add episodes" if not one["gripper"] else
                      f"an unscaled value must lie in [-1, 1]: declare this dimension's gripper in {where}")
            found.append(f"{_called(one)}: {100 * one['clipped']:.0f} % of the values lie outside what the statistics can say; {remedy}")
    for one in _quaternions(dataset):
        found.append(f"dimensions {one[0]} to {one[-1]} have length 1 in every frame, which is what a quaternion has, and "
                     f"{', '.join(str(g.dimension) for g in dataset.grippers if g.dimension in one)} is read as a gripper: declare "
                     f"`quaternion: {one}` and the right `grippers:` in {where}")
    for one in report["texts"]["too_long"]:
        found.append(f"episode {one['episode']}: its text, {one['text']!r}..., makes a prompt of {one['tokens']} tokens in {one['frames']} "
                     f"frames, and the model takes {report['texts']['limit']}; shorten it in the data, or leave the episode out")
    pictures = report["pictures"]
    if pictures["one_colour"] == pictures["looked_at"]:
        found.append(f"each of {pictures['looked_at']} pictures looked at is of one colour: choose another camera with --data.camera or "
                     f"`camera:` in {where}")
    elif pictures["all_alike"]:
        found.append(f"all of {pictures['looked_at']} pictures looked at are the same: the camera stood still or one frame was copied; "
                     f"choose another with --data.camera or `camera:` in {where}")
    names = [one["name"] for one in report["dimensions"]]
    by_name = [d for d, name in enumerate(names) if _GRIPPER_NAME.search(name)]
    declared = dataset.conventions.card is not None and dataset.conventions.card.grippers is not None
    if all(names) and not declared and by_name != [len(names) - 1] and (by_name or _JOINT_NAME.search(names[-1])):
        told = f"those called like one are {', '.join(names[d] for d in by_name)}" if by_name else "none is called like one"
        found.append(f"the last of the values {', '.join(names)} is read as the gripper, and {told}: declare `grippers:` in {where}")
    return found


def _quaternions(dataset: DemoDataset) -> List[List[int]]:
    """Four dimensions each that are one rotation although one of them is read as a gripper; of such as stand still nothing can be said."""
    stored_NA, found = dataset.index.actions_NA, []
    grippers = {one.dimension for one in dataset.grippers}
    for first in range(stored_NA.shape[1] - 3):
        four = list(range(first, first + 4))
        moving = np.ptp(stored_NA[:, four], axis=0) > 1e-3
        if grippers & {d for d, moves in zip(four, moving) if moves} and moving.sum() > 1:
            if np.abs(np.linalg.norm(stored_NA[:, four], axis=1) - 1).max() < 1e-3:
                found.append(four)
    return found


def _notes(report: Dict[str, Any]) -> List[str]:
    found, official = [], report["degenerate"] == "official"
    pictures = report["pictures"]
    if 0 < pictures["one_colour"] < pictures["looked_at"]:
        found.append(f"{pictures['one_colour']} of {pictures['looked_at']} pictures looked at are of one colour")
    for one in report["dimensions"]:
        span = one["q99"] - one["q01"]
        if one["kind"] == CONSTANT and one["gripper"]:
            done = "0 is taught, closed, as officially" if official else "taught as demonstrated (officially 0, closed, would be)"
            found.append(f"{_called(one)} never moves from {one['min']:.4g}: {done}")
        elif one["kind"] == RARE:
            done = (f"they are lost, as officially: {one['q01']:.4g} is what a policy can say" if official else
                    f"the range is wide enough for them, a bin is {one['bin']:.3g}; officially they would be lost")
            found.append(f"{_called(one)} moves in few frames only, q01 = q99 = {one['q01']:.4g}, up to [{one['min']:.4g}, "
                         f"{one['max']:.4g}]: {done}")
        elif one["kind"] == NOISE:
            done = "scaled to the whole range, as officially" if official else "taught as one value"
            found.append(f"{_called(one)} has a range of {one['max'] - one['min']:.1e}, the noise of its numbers: {done}")
        elif not one["gripper"] and span > 0 and one["max"] - one["min"] > _TAIL * span:
            found.append(f"{_called(one)}: rare values up to [{one['min']:.4g}, {one['max']:.4g}] are cut to [{one['q01']:.4g}, "
                         f"{one['q99']:.4g}]")
        if one["clipped"] > _CLIPPED and not one["kind"] and not report["own_statistics"]:  # own quantiles cut a hundredth at each end
            found.append(f"{_called(one)}: {100 * one['clipped']:.1f} % of the values lie outside the statistics and are clipped")
        if one["gripper"] and 0 < one["clipped"] <= _MOST_CLIPPED:
            found.append(f"{_called(one)}: {100 * one['clipped']:.2g} % of the values go past its ends and are cut there")
    if report["turned"] and report["turned_by"] == "guess":
        found.append(f"pictures of {report['camera']} are turned by 180 degrees, as LIBERO's have to be; robomimic's stand upright: look "
                     "at the thumbnails, and say `rotate: false` in the data card (--data.rotate false), or true")
    for one in report["grippers"]:
        name, ends = f"the gripper, dimension {one['dimension']},", f"{one['open']:g} open and {one['closed']:g} closed"
        if one["moves"] and one["begin_open"] < 0.1 and one["end_open"] > 0.9:
            change = ("exchange open and closed there" if one["how"].startswith("declared") else
                      f"give --data.gripper {one['closed']:g}/{one['open']:g}, or declare it in a data card")
            found.append(f"{name} begins closed and ends open in nearly every episode, {ends} ({one['how']}): if it is the other way "
                         f"round, {change}")
        if one["at_ends_only"]:
            found.append(f"{name} changes in the last frame of its episodes only: if it says that an episode ends, it is no gripper")
        if one["moves"] and one["way"] < _WAY:
            found.append(f"{name} moves over {100 * one['way']:.1f} % of its way only, {ends}: check both values")
        if one["moves"] and one["share_open"] + one["share_closed"] < 0.5:
            between = 100 * (1 - one["share_open"] - one["share_closed"])
            found.append(f"{name} lies between its ends in {between:.0f} % of the frames: a gripper of many positions, or another joint")
    texts = report["texts"]
    if texts["blank_frames"]:
        found.append(f"{texts['blank_frames']} of {report['frames']} frames have a blank text; `blank_texts: episode` in the data card "
                     "gives them their episode's")
    if texts["odd"]:
        found.append(f"{texts['odd']} texts have blanks or line ends around them, or are written as b'...', such as "
                     f"{texts['odd_example']!r}; `clean_texts: true` in the data card strips them")
    if texts["replaced"]:
        found.append(f"{texts['replaced']} texts hold U+FFFD, which stands for letters that were lost when the set was made, such as "
                     f"{texts['replaced_example']!r}: make it again from texts in UTF-8")
    if texts["structured_frames"]:
        found.append(f"{texts['structured_frames']} frames have a text that is JSON and no instruction, such as "
                     f"{texts['structured_example'][0][:60]!r}: the model would be asked for all of it; write the instruction alone into "
                     "the data" + (", or name its field, `text: NAME.FIELD`, in the data card" if report["kind"] == "hdf5" else ""))
    if texts["stand_ins"]:
        such = ", ".join(map(repr, texts["stand_ins"][:3]))
        found.append(f"{texts['stand_in_frames']} frames have a text that stands in for one, {such}: correct them in the data, or leave "
                     "these episodes out")
    if report["of_validation"]:
        found.append(f"{report['of_validation']} of the {report['episodes']} episodes are of those that the files keep for validation "
                     "(mask/valid), and count as others do: to hold them out, move them into a set of their own, or behind the others and "
                     "give --data.train_fraction")
    if report["unlabelled"]:
        found.append(f"{report['unlabelled']} episodes without a text are left out; `instruction: WORDS` in the data card gives them one")
    width = len(report["dimensions"])
    if report["widths_of_base"] and width not in report["widths_of_base"]:
        known = ", ".join(map(str, report["widths_of_base"]))
        found.append(f"an action has {width} values, those of the base's statistics have {known}: the model learns to say {width} tokens")
    if len(report["pictures"]["sizes"]) > 1:
        found.append("pictures are of several sizes: " + ", ".join(report["pictures"]["sizes"]))
    return found


def lines(report: Dict[str, Any]) -> List[str]:
    """For the eye: what it is, its actions, and what to know."""
    pictures, texts, rate = report["pictures"], report["texts"], report["frame_rate"]
    tokens = f", at most {texts['longest_tokens']} tokens with the prompt" if texts["longest_tokens"] else ""
    said = [f"data {report['name']} ({report['kind']}{', ' + report['robot'] if report['robot'] else ''}): {report['episodes']} of "
            f"{report['episodes_in_files']} episodes, {report['frames']} frames ({report['shortest']} to {report['longest']} each), "
            + (f"{rate:g} frames a second" if rate else "frame rate not said"),
            f"  camera {report['camera'] or '(usual)'}: {', '.join(pictures['sizes'])}, mean {_numbers(pictures['mean'])}, spread "
            f"{_numbers(pictures['spread'])} of {pictures['looked_at']} pictures{', turned by 180 degrees' if report['turned'] else ''}",
            f"  texts: {texts['count']}{tokens}, {texts['blank_frames']} frames without",
            f"  action: {len(report['dimensions'])} values, {report['arms']} arm(s)"
            + (f", the first of {report['chunk']} a frame" if report["chunk"] > 1 else "")
            + f", {'declared in ' + report['card'] if report['card'] else 'no data card'}"]
    names = [one["name"] or ("gripper" if one["gripper"] else "") for one in report["dimensions"]]
    wide = max(map(len, names))
    for one, name in zip(report["dimensions"], names):
        said.append(f"    {one['dimension']:2d} {name:{wide}s} [{one['min']:9.4g}, {one['max']:9.4g}]  q01 {one['q01']:9.4g}  q99 "
                    f"{one['q99']:9.4g}  clipped {100 * one['clipped']:.1f} %  back within {one['error']:.2g}  {one['kind']}".rstrip())
    for one in report["grippers"]:
        commands = ", as commands" if one["relative"] else ""
        said.append(f"  gripper {one['dimension']}: {one['open']:g} open, {one['closed']:g} closed{commands} ({one['how']}); open in "
                    f"{100 * one['share_open']:.0f} % of the frames, closed in {100 * one['share_closed']:.0f} %, "
                    f"{100 * one['begin_open']:.0f} % of the episodes begin open")
    return said + [f"  note: {note}" for note in report["notes"]]


def _numbers(values: List[float]) -> str:
    return " ".join(f"{value:.0f}" for value in values)


def cached_look(dataset: DemoDataset, cache_dir, prompt: Optional[Prompt], known: Optional[Dict[str, int]]) -> Dict[str, Any]:
    """As look_at, kept in cache_dir for this very index, its conventions, prompt and statistics."""
    if cache_dir is None or not dataset.index.key:
        return look_at(dataset, prompt, known)
    card = dataset.conventions.card
    parts = [_FORMAT, dataset.index.key, dataset.fingerprint(), str(card), str(dataset.folder), prompt.name if prompt else None, known]
    path = Path(cache_dir) / f"data_card_{dataset.name}_{hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]}.json"
    try:
        kept = path.read_text(encoding="utf-8")
        told, _, text = kept.partition("\n")
        if told == hashlib.sha256(text.encode()).hexdigest():
            return dict(json.loads(text))
    except (OSError, ValueError, TypeError):
        pass  # none yet, or a damaged one
    report = look_at(dataset, prompt, known)
    text = json.dumps(report)
    with atomic_write(path, "w") as file:
        file.write(f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}")
    return report


def look_at_all(settings, root, cache_dir=None, prompt: Optional[Prompt] = None,
                known: Optional[Dict[str, Dict]] = None) -> List[Dict[str, Any]]:
    """The reports of the data sets of the configuration section `data` (DataConfig), below `root`; [] with the official pipeline.

    known: the base's action statistics by key, for data.statistics. Raises what opening a data set raises; problems are for the caller.
    """
    if settings.source == "official":
        return []
    widths, reports = {key: len(one["action"]["q01"]) for key, one in (known or {}).items() if "action" in one}, []
    start = time.perf_counter()
    with closing_all(open_configured(settings, root, cache_dir)) as datasets:
        for dataset in datasets:
            if settings.statistics is not None and settings.statistics in (known or {}):
                dataset.scale(known[settings.statistics])
            report = cached_look(dataset, cache_dir, prompt, widths)
            seconds = time.perf_counter() - start
            reports.append({**report, "seconds": seconds, "per_thousand": 1000 * seconds / max(1, report["episodes_in_files"])})
            start = time.perf_counter()
    return reports


def refuse(reports: List[Dict[str, Any]]) -> None:
    """ValueError with every problem of every data set."""
    found = [f"data set {report['name']} ({report['folder']}): {problem}" for report in reports for problem in report["problems"]]
    if found:
        raise ValueError("\n".join(found))


def keep(reports: List[Dict[str, Any]], folder: Path) -> None:
    """Write data/<name>.json and .png into a run's folder."""
    for report in reports:
        place = Path(folder) / "data" / report["name"]
        place.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(place.with_name(place.name + ".json"), "w") as file:
            file.write(json.dumps(report, indent=1))
        with atomic_write(place.with_name(place.name + ".png")) as file:
            file.write(base64.b64decode(report["thumbnails"]))


def read_kept(folder: Path) -> List[Dict[str, Any]]:
    """The reports that a run keeps; those that cannot be read are left out."""
    found = []
    for path in sorted((Path(folder) / "data").glob("*.json")):
        try:
            found.append(dict(json.loads(path.read_text(encoding="utf-8"))))
        except (OSError, ValueError, TypeError):
            continue
    return found
