"""Stage `vlakeep verify-golden`: compare this implementation with numbers that the official OpenVLA code produced.

    vlakeep verify-golden DIR [DIR ...] [--tokenizer DIR]

DIR is a folder of golden data or one that holds several: a model (config.json, golden.npz, state_dict.json), shapes alone
(config.json, state_dict.json), the 7B vision tower (golden.npz), text, rlds, eval or augment, or pi0-FAST (golden_pi0_fast.py).
Exit status 1 when any deviation is past its tolerance, 2 for a folder that is not golden. --tokenizer names a folder with
tokenizer.json or tokenizer.model; what cannot be checked without one is said.
"""

import json
import sys
from pathlib import Path
from typing import Callable, Dict, List, Optional

import numpy as np

from vlakeep.core.options import read
from vlakeep.core.storage import Storage
from vlakeep.data import images
from vlakeep.data.sample import Row
from vlakeep.openvla.processor import ImageProcessor, Processor, load_tokenizer
from vlakeep.parity import golden as model_golden
from vlakeep.parity import golden_data as data_golden
from vlakeep.parity.golden import UNCHECKED, difference, unchecked
from vlakeep.parity.golden_pi0_fast import verify_pi0_fast
from vlakeep.parity.golden_text import verify_text
from vlakeep.parity.golden_weights import EMPTY_TOKEN
from vlakeep.parity.stages import GOLDEN


def kind_of(folder: Path) -> Optional[str]:
    """Which golden data a folder holds, or None."""
    def has(*names):
        return all((folder / name).is_file() for name in names)

    for kind, names in (
        ("text", ["text_golden.json"]),
        ("rlds", ["rlds_golden.json"]),
        ("augment", ["augment_golden.json"]),
        ("eval", ["eval_golden.json", "image_golden.npz"]),
        ("model", ["config.json", "golden.npz", "state_dict.json"]),
        ("pi0_fast", ["config.json", "golden.npz", "sizes.json", "text.json"]),
    ):
        if has(*names):
            return kind
    if (
        has("config.json")
        and not has("golden.npz")
        and not list(folder.glob("*.safetensors"))
        and len(list(folder.glob("*.json"))) > 1
    ):
        return "shapes"
    return "vision7b" if has("golden.npz") and not has("config.json") else None


def golden_folders(paths: List[Path]) -> List[Path]:
    """The golden folders among `paths` and their children. Raises FileNotFoundError or ValueError for a path with none."""
    found = []
    for path in map(Path, paths):
        if not path.is_dir():
            raise FileNotFoundError(f"no folder {path}: give a folder of golden data, or one that holds such folders")
        inside = [path] if kind_of(path) else [child for child in sorted(path.iterdir()) if child.is_dir() and kind_of(child)]
        if not inside:
            raise ValueError(
                f"{path} is no golden folder and holds none: one has golden.npz with config.json and state_dict.json, or one of "
                "text_golden.json, rlds_golden.json, eval_golden.json, augment_golden.json"
            )
        found += inside
    return list(dict.fromkeys(found))


def verify_eval(folder: Path) -> List[Row]:
    """The picture pipeline of the official evaluation, up to the pixel values that the processor gave the model."""
    with np.load(folder / "eval_inputs.npz", allow_pickle=False) as data:
        official = data["pixel_values"]
    with np.load(folder / "image_golden.npz", allow_pickle=False) as data:
        picture = data["get_libero_image_224"]
    size = official.shape[-1]
    # The means and deviations that OpenVLA's fused backbone uses; the golden model's processor had only its size changed.
    processor = ImageProcessor([[3, size, size]] * 2, [[0.485, 0.456, 0.406], [0.5] * 3], [[0.229, 0.224, 0.225], [0.5] * 3])
    ours = processor([images.center_crop(picture)]).bfloat16().float()
    return data_golden.verify_images_golden(folder) + [
        Row(
            "pixels of the cropped picture",
            difference(ours, official),
            0.04,
            "bfloat16, as the official script; one grey level is 1/57",
        ),
        # Fed with the recorded ids and pixels, the formula weights give other action tokens than the recorded ones, with a gap of
        # 1.0 between the first two logits: the recording was made with other weights.
        unchecked("actions", "they were recorded with weights that are not among the golden data"),
        unchecked("gripper post-processing", "part of the LIBERO benchmark"),
    ]


def _checks(tokenizer_folder: Optional[Path]) -> Dict[str, Callable]:
    tokenizer = load_tokenizer(tokenizer_folder) if tokenizer_folder else None

    def rlds(folder):
        beside = folder.parent / "text" / "preprocessor_config.json"
        processor = None
        if tokenizer is not None and tokenizer.convert_tokens_to_ids("▁") == EMPTY_TOKEN and beside.is_file():
            processor = Processor(tokenizer, ImageProcessor.from_config(json.loads(beside.read_text())))
        return data_golden.verify_rlds_golden(folder, processor=processor)

    return {"model": model_golden.verify_model, "shapes": model_golden.verify_shapes, "vision7b": model_golden.verify_vision7b,
            "text": lambda folder: verify_text(folder, tokenizer), "rlds": rlds, "augment": data_golden.verify_augment_golden,
            "eval": verify_eval, "pi0_fast": verify_pi0_fast}


def print_rows(folder: Path, rows: List[Row]) -> None:
    print(f"\n{folder}")
    width = max(len(row.name) for row in rows)
    for row in rows:
        note = f"  {row.note}" if row.note else ""
        if row.tolerance == UNCHECKED:
            print(f"  -     {row.name:<{width}}  {'':>9}    {'':<7}  not checked: {row.note}")
        else:
            verdict = "ok  " if row.ok else "FAIL"
            print(f"  {verdict}  {row.name:<{width}}  {row.deviation:>9.2e} <= {row.tolerance:<7g}{note}".rstrip())


def verify_golden(folders: List[Path], tokenizer: Optional[Path] = None) -> int:
    """Check every folder and print a table; 0 when all is within tolerance, else 1.

    Raises FileNotFoundError or ValueError for folders that are not golden.
    """
    checks, failed, counted = _checks(tokenizer), [], 0
    for folder in golden_folders(folders):
        rows = checks[kind_of(folder)](folder)
        print_rows(folder, rows)
        failed += [f"{folder.name}: {row.name}" for row in rows if not row.ok]
        counted += sum(row.tolerance != UNCHECKED for row in rows)
    print(f"\n{counted - len(failed)} of {counted} quantities within tolerance" + "".join(f"\n  FAIL {name}" for name in failed))
    return 1 if failed else 0


def main(argv: List[str]) -> int:
    args, config = read(GOLDEN, argv)
    Storage.from_config(config, create=False)  # refuses folders outside the root; nothing is written
    try:
        return verify_golden(args.folders, args.tokenizer)
    except (FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
