"""Golden checks of text, actions, labels, collation and pixels against what the official processor and data pipeline produced.

The golden data leave tokenizer files out. Without one, the recorded ids of each prompt stand in for the tokenizer, which checks
all that is built on them; with one, its own ids and texts are checked too.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Dict, List

import numpy as np

from vlakeep.data.sample import IGNORE_INDEX, Row, Sample
from vlakeep.openvla.action_tokenizer import ActionTokenizer
from vlakeep.openvla.processor import STRATEGIES, ImageProcessor
from vlakeep.openvla.prompts import action_prompt, collate, encode, training_text
from vlakeep.parity.golden import difference, unchecked


class RecordedTokenizer:
    """Gives the recorded ids of the recorded texts, and refuses any other text."""

    def __init__(self, official: dict):
        self.eos_token_id = official["eos"]
        self._ids = {p["eval_prompt"]: p["eval_input_ids"] for p in official["prompts"]}
        # A training prompt is recorded with the empty token that follows it.
        self._ids.update({p["get_prompt_human_only"]: p["train_prefix_ids"][:-1] for p in official["prompts"]})

    def __call__(self, text: str, add_special_tokens: bool = True) -> Dict[str, List[int]]:
        if text not in self._ids:
            raise ValueError(f"no ids were recorded for {text!r}")
        return {"input_ids": self._ids[text]}


def _mismatches(pairs) -> int:
    return sum(np.asarray(a).shape != np.asarray(b).shape or not np.array_equal(a, b) for a, b in pairs)


def verify_text(folder, tokenizer=None) -> List[Row]:
    """Rows of a golden text folder. `tokenizer` is checked against the recording whose empty token it shares."""
    folder = Path(folder)
    rows, used = [], False
    for name, official in json.loads((folder / "text_golden.json").read_text()).items():
        if not (isinstance(official, dict) and "prompts" in official):
            continue
        mine = tokenizer if tokenizer is not None and tokenizer.convert_tokens_to_ids("▁") == official["space_token_id"] else None
        used = used or mine is not None
        rows += [Row(f"{name}: {row.name}", row.deviation, row.tolerance, row.note)
                 for row in _actions(official) + _prompts(official) + _transform(official, mine)]
        if mine is not None:
            rows += [Row(f"{name}: {row.name}", row.deviation, row.tolerance, row.note) for row in _tokenizer(official, mine)]
        else:
            rows.append(unchecked(f"{name}: ids of prompts and texts of actions", "give its tokenizer with --tokenizer"))
    if tokenizer is not None and not used:
        rows.append(
            Row("the tokenizer given is one of those recorded", float("inf"), 0, "its '▁' id is in none of the recordings")
        )
    return rows + verify_pixels(folder)


def _actions(official: dict) -> List[Row]:
    """Digitisation of float32 and float64 actions, ids, and decoding of any id."""
    tokenizer = ActionTokenizer(official["vocab_size"])
    ids, digits, decoded = [], [], []
    for name, case in official["actions"].items():  # e.g. "gripper_mix/float32"
        got = tokenizer.encode(np.array([float(x) for x in case["action"]], dtype=name.rsplit("/", 1)[-1]))
        ids.append((got, case["token_ids"]))
        digits.append((official["vocab_size"] - got, case["digitized"]))
        decoded.append(difference(tokenizer.decode(case["token_ids"]), [float(x) for x in case["decoded"]]))
    every = official["decode_any"]
    return [
        Row("action bins", _mismatches(digits), 0, f"{len(digits)} action vectors that differ"),
        Row("action token ids", _mismatches(ids), 0),
        Row("decoded actions", max(decoded), 0),
        Row(
            "decoding of ids outside the range",
            difference(tokenizer.decode(every["ids"]), [float(x) for x in every["actions"]]),
            0,
        ),
        Row("first action id", abs(tokenizer.action_token_begin_idx - official["action_token_begin_idx"]), 0),
    ]


def _prompts(official: dict) -> List[Row]:
    """Prompt texts of evaluation and training."""
    evaluation = [(action_prompt(p["instruction"]), p["eval_prompt"]) for p in official["prompts"]]
    training = [
        (training_text(Sample(np.zeros((1, 1, 3), np.uint8), p["instruction"])), p["get_prompt_human_only"])
        for p in official["prompts"]
    ]
    return [Row("evaluation prompts", sum(a != b for a, b in evaluation), 0, f"{len(evaluation)} texts"),
            Row("training prompts", sum(a != b for a, b in training), 0)]


def _transform(official: dict, tokenizer) -> List[Row]:
    """RLDSBatchTransform and the collator."""
    ids, labels, encoded = [], [], []
    processor = SimpleNamespace(
        tokenizer=tokenizer if tokenizer is not None else RecordedTokenizer(official),
        empty_token_id=official["space_token_id"],
        action_tokenizer=ActionTokenizer(official["vocab_size"]),
        image_processor=lambda images: np.zeros((len(images), 6, 2, 2), np.float32),
    )
    for case in official["batch_transform"]:
        action = np.array([float(x) for x in official["actions"][case["action"] + "/float32"]["action"]], dtype=np.float32)
        encoded.append(encode(Sample(np.zeros((2, 2, 3), np.uint8), case["instruction"], action, dataset="golden"), processor))
        ids.append((encoded[-1]["input_ids"].tolist(), case["input_ids"]))
        labels.append((encoded[-1]["labels"].tolist(), case["labels"]))
    batch, collated = collate(encoded, official["pad_id"]), official["collated"]
    wrong = sum(
        not np.array_equal(getattr(batch, key).numpy(), np.array(collated[key]))
        for key in ("input_ids", "attention_mask", "labels")
    )
    dtypes = sum(str(getattr(batch, key).dtype) != value for key, value in official["collated_dtypes"].items())
    how = "" if tokenizer is not None else "prompt ids as recorded"
    return [
        Row("ids of training samples", _mismatches(ids), 0, how),
        Row("labels of training samples", _mismatches(labels), 0),
        Row("collated batch, tensors that differ", wrong, 0),
        Row("collated batch, types that differ", dtypes, 0),
        Row(
            "labels that carry loss",
            abs(int((batch.labels != IGNORE_INDEX).sum()) - 8 * len(encoded)),
            0,
            "7 action tokens and the end per sample",
        ),
    ]


def _tokenizer(official: dict, tokenizer) -> List[Row]:
    """The tokenizer itself: ids of prompts, texts of actions, and whether every pair of action ids survives a round trip."""

    def ids(text, special=True):
        return tokenizer(text, add_special_tokens=special)["input_ids"]

    prompts = [(ids(p["eval_prompt"]), p["eval_input_ids"]) for p in official["prompts"]]
    prefixes = [(ids(p["train_prefix_with_space"]), p["train_prefix_ids"]) for p in official["prompts"]]
    cases = list(official["actions"].values())
    texts = [(tokenizer.decode(case["token_ids"]), case["text"]) for case in cases]
    again = [(ids("Out: " + case["text"], special=False)[-len(case["token_ids"]):], case["token_ids"]) for case in cases]
    whole = [(tokenizer.decode(case["input_ids"]), case["decoded_text"]) for case in official["batch_transform"]]
    low, high = official["action_token_begin_idx"] + 1, official["vocab_size"]
    pairs = [[a, b] for a in range(low, high) for b in range(low, high)]
    encoded = tokenizer(["Out: " + text for text in tokenizer.batch_decode(pairs)], add_special_tokens=False)["input_ids"]
    return [
        Row("tokenizer, ids of evaluation prompts", _mismatches(prompts), 0),
        Row("tokenizer, ids of training prompts", _mismatches(prefixes), 0),
        Row("tokenizer, texts of actions", sum(a != b for a, b in texts), 0),
        Row("tokenizer, ids of the texts of actions", _mismatches(again), 0),
        # transformers 4 writes "<s> In", transformers 5 "<s>In".
        Row("tokenizer, decoded samples", sum(a.replace("<s> ", "<s>") != b.replace("<s> ", "<s>") for a, b in whole), 0),
        Row(
            "tokenizer, pairs of action ids that do not survive",
            sum(e[-2:] != p for e, p in zip(encoded, pairs)),
            official["roundtrip_pairs_bad"],
        ),
        Row("tokenizer, vocabulary", abs(tokenizer.vocab_size - official["vocab_size"]), 0),
    ]


def verify_pixels(folder) -> List[Row]:
    """The image processor, with each way of resizing."""
    folder = Path(folder)
    if not (folder / "image_processor_golden.npz").is_file() or not (folder / "preprocessor_config.json").is_file():
        return [unchecked("pixels", "image_processor_golden.npz or preprocessor_config.json is not there")]
    config = json.loads((folder / "preprocessor_config.json").read_text())
    with np.load(folder / "image_processor_golden.npz", allow_pickle=False) as data:
        official = {key: data[key] for key in data.files}
    rows, seen = [], set()
    for key in [k for k in official if k.endswith("_uint8")]:
        name = key[:-len("_uint8")]
        seen.add(key)
        for strategy in STRATEGIES:
            processor = ImageProcessor.from_config(dict(config, image_resize_strategy=strategy))
            pixels = processor([official[key]])[0].numpy()
            middle = "" if strategy == config["image_resize_strategy"] else f"_{strategy}"
            for suffix, value in (
                (f"{middle}_pixel_values_stride8", pixels[:, ::8, ::8]),
                (f"{middle}_stride16", pixels[:, ::16, ::16]),
                (f"{middle}_pixel_values_sum", pixels.astype(np.float64).sum((1, 2))),
            ):
                if name + suffix in official:
                    seen.add(name + suffix)
                    wanted = official[name + suffix]
                    # The sums run over 50,176 values; their error is given per value.
                    deviation = difference(value, wanted) / (pixels[0].size if suffix.endswith("sum") else 1)
                    rows.append(Row(f"pixels, {name}, {strategy}, {suffix.rsplit('_', 1)[-1]}", deviation, 1e-6))
    left = sorted(set(official) - seen)
    return rows + ([unchecked("pixels: " + ", ".join(left), "no check knows these entries")] if left else [])
