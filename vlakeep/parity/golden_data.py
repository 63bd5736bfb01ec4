"""Golden checks of the data room: what the official TensorFlow pipeline produced against what this one produces.

The folders are `rlds`, `eval` and `augment` of the golden data; each function returns rows of (deviation, tolerance).
"""

import json
import re
from pathlib import Path
from typing import Callable, Dict, List, Optional

import numpy as np

from vlakeep.data import images
from vlakeep.data.augment import Draw, augment, stages
from vlakeep.data.rlds import RldsDataset
from vlakeep.data.sample import IGNORE_INDEX, Row, Sample
from vlakeep.openvla.prompts import encode

_FRACTION = 0.95  # the official train[:95%]
_FRAMES = (0, 5)  # the frames whose pictures the golden data hold


def _difference(a, b) -> float:
    """Largest absolute difference; inf when the shapes differ."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape:
        return float("inf")
    return float(np.abs(a - b).max()) if a.size else 0.0


def _same(a, b) -> float:
    return 0.0 if a == b else float("inf")


def _layout(text: str) -> str:
    return re.sub(r"-?\d+(\.\d+)?(e[-+]?\d+)?", "0", text)


def _grey_levels(name: str, ours: np.ndarray, official: np.ndarray, share: float) -> List[Row]:
    """A picture may differ by one grey level, and only in a small share of its values."""
    off = np.abs(ours.astype(np.int64) - official) if ours.shape == official.shape else np.array([np.inf])
    return [Row(f"{name}, largest grey-level difference", float(off.max()), 1.0),
            Row(f"{name}, share of values that differ", float((off > 0).mean()), share)]


def official_action_ids(action: np.ndarray, vocabulary: int = 32000) -> List[int]:
    """The action tokens of a float32 action, straight from the formula of the official action_tokenizer.py:31-45."""
    bins = np.linspace(-1, 1, 256)
    return [int(vocabulary - i) for i in np.digitize(np.clip(action, -1.0, 1.0), bins)]


def verify_rlds_golden(folder, encode_action: Optional[Callable] = None, processor=None) -> List[Row]:
    """Rows for every data set of golden/rlds.

    encode_action: ActionTokenizer.encode for a vocabulary of 32000; None checks against the formula alone.
    processor: one with the Llama-2 tokenizer and the 224 px image processor; without it only the first sample's labels are
    checked, against its ids. FileNotFoundError when the folder is not golden/rlds.
    """
    folder = Path(folder)
    _require(folder, "rlds_golden.json", "rlds")
    rows = []
    for name, wanted in json.loads((folder / "rlds_golden.json").read_text()).items():
        official = _arrays(folder / f"{name}.npz")
        rows += [Row(f"{name}: {row.name}", row.deviation, row.tolerance, row.note)
                 for row in _verify_one(folder, name, wanted, official, encode_action or official_action_ids, processor)]
    return rows


def _require(folder: Path, file: str, called: str) -> None:
    if not (folder / file).is_file():
        raise FileNotFoundError(f"{folder} holds no {file}; give the folder `{called}` of the golden data")


def _arrays(path: Path) -> Dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as data:
        return {key: data[key] for key in data.files}


def _verify_one(folder: Path, name: str, wanted: dict, official: dict, encode_action, processor) -> List[Row]:
    dataset = RldsDataset(folder / "tfds" / name, "train", _FRACTION)
    statistics_path = folder / name / "dataset_statistics.json"
    statistics = json.loads(statistics_path.read_text())
    labelled = [(length, text) for length, text in zip(wanted["traj_lens"], wanted["languages"]) if text]
    usable_actions = np.concatenate([dataset.actions(i) for i in range(len(dataset))])
    rows = [
        Row("trajectories", abs(len(dataset) - wanted["traj_after_skip_unlabeled"]), 0),
        Row("trajectories before unlabelled ones are left out", abs(dataset.split_episodes - len(official["traj_len"])), 0),
        Row("trajectory lengths", _difference(dataset.lengths, [length for length, _ in labelled]), 0),
        Row("languages", _same(dataset.languages, [text for _, text in labelled]), 0),
        Row("normalised actions", _difference(dataset.actions_NA[:len(official["norm_actions"])], official["norm_actions"]),
            1e-6),
        Row("actions of usable frames", _difference(usable_actions, official["frame_actions"]), 1e-6),
    ]
    for key in ("num_transitions", "num_trajectories"):
        rows.append(Row(f"statistics: {key}", abs(dataset.statistics[key] - statistics[name][key]), 0))
    for part in ("action", "proprio"):
        for key, values in statistics[name][part].items():
            rows.append(Row(f"statistics: {part} {key}", _difference(dataset.statistics[part][key], values), 1e-6))
    ours = json.dumps({name: dataset.statistics}, indent=2)
    rows.append(Row("dataset_statistics.json, layout", _same(_layout(ours), _layout(statistics_path.read_text())), 0,
                    "the text with its numbers blanked"))
    places = [(e, t) for e, length in enumerate(dataset.lengths) for t in range(length)]
    means = []
    for number, (episode, frame) in enumerate(places):
        picture = images.resize_uint8(dataset.image(episode, frame), (224, 224))
        means.append(picture.reshape(-1, 3).astype(np.float64).mean(0))
        if number in _FRAMES:
            rows += _grey_levels(f"frame {number} at 224 px", picture, official[f"frame{number}_image_224"], 2e-4)
        if number == 0:
            rows += _verify_first(dataset, picture, official, processor)
    rows.append(Row("mean colour of every frame, grey levels", _difference(means, official["frame_image_mean"]), 1e-3))
    eos = int(official["all_input_ids_last8"][0, -1])
    last = [[int(i) for i in encode_action(dataset.actions_NA[dataset._row(e, t)])] + [eos] for e, t in places]
    rows.append(Row("last 8 ids of every frame", _difference(last, official["all_input_ids_last8"]), 0))
    dataset.close()
    return rows


def _verify_first(dataset: RldsDataset, picture: np.ndarray, official: dict, processor) -> List[Row]:
    """Ids, labels and pixels of the first sample."""
    ids, labels = official["frame0_input_ids"], official["frame0_labels"]
    if processor is None:
        consistent = np.where(np.arange(len(ids)) < len(ids) - 8, IGNORE_INDEX, ids)
        return [Row("first sample, labels against ids", _difference(consistent, labels), 0, "no tokenizer given")]
    first = encode(Sample(picture, dataset.instruction(0, 0), dataset.actions(0)[0]), processor)
    rows = [Row("first sample, ids", _difference(first["input_ids"], ids), 0),
            Row("first sample, labels", _difference(first["labels"], labels), 0)]
    if tuple(first["pixel_values"].shape) == (6, 224, 224):
        pixels = first["pixel_values"].numpy()[:, ::8, ::8]
        rows.append(Row("first sample, pixels", _difference(pixels, official["frame0_pixel_values_stride8"]), 0.02,
                        "a grey level is 1/57 after normalisation"))
    return rows


def verify_images_golden(folder) -> List[Row]:
    """Rows for golden/eval: turn, JPEG, decode, lanczos3, centre crop."""
    folder = Path(folder)
    _require(folder, "image_golden.npz", "eval")
    official = _arrays(folder / "image_golden.npz")
    raw = official["agentview_raw_256"]
    decoded = images.decode_image(official["jpeg_bytes"].tobytes(), "jpeg_bytes")
    again = images.decode_image(images.encode_jpeg(np.ascontiguousarray(raw[::-1, ::-1])))
    side = float(np.sqrt(0.9))
    small = official["get_libero_image_224"]
    crop = images.crop_and_resize(images.to_float(small), (1 - side) / 2, (1 - side) / 2, side, (224, 224))
    resized = images.lanczos3(decoded, (224, 224))
    return [
        Row("JPEG decoded", _difference(decoded, official["rot_jpeg_decoded"]), 0),
        Row("turned, JPEG encoded and decoded", _difference(again, official["rot_jpeg_decoded"]), 0),
        Row("lanczos3, not rounded, grey levels", _difference(resized[::8, ::8], official["lanczos_float_stride8"]), 1e-3),
        *_grey_levels("picture for the model", images.libero_image(raw), small, 2e-4),
        Row("centre crop, not rounded", _difference(np.clip(crop, 0, 1)[::8, ::8], official["center_crop_float_stride8"]), 1e-5),
        *_grey_levels("centre crop", images.center_crop(small), official["center_crop_224_uint8"], 2e-4),
    ]


def verify_augment_golden(folder) -> List[Row]:
    """Rows for golden/augment: every stage of the augmentation, given the official draws."""
    folder = Path(folder)
    _require(folder, "augment_golden.json", "augment")
    official = _arrays(folder / "augment_golden.npz")
    rows = []
    for i, case in enumerate(json.loads((folder / "augment_golden.json").read_text())["cases"]):
        drawn = Draw(case["crop_scale_side"], case["crop_y0"], case["random_brightness"], case["random_contrast"],
                     case["random_saturation"], case["random_hue"])
        for stage, image in stages(official["input_uint8"], drawn):
            rows.append(Row(f"case {i}: {stage}", _difference(image[::8, ::8], official[f"case{i}_{stage}_stride8"]), 5e-6))
        rows += _grey_levels(f"case {i}: final", augment(official["input_uint8"], drawn), official[f"case{i}_final_uint8"], 2e-4)
    return rows


if __name__ == "__main__":  # sanity check: python -m vlakeep.parity.golden_data GOLDEN_FOLDER
    import sys

    root = Path(sys.argv[1])
    found = verify_rlds_golden(root / "rlds") + verify_images_golden(root / "eval") + verify_augment_golden(root / "augment")
    for row in found:
        print(f"{'ok  ' if row.ok else 'FAIL'} {row.deviation:.3g} <= {row.tolerance:g}  {row.name}  {row.note}".rstrip())
    sys.exit(not all(row.ok for row in found))
