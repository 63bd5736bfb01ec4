"""Text and images to model input: the tokenizer, the image processor and the action tokenizer of one checkpoint folder.

Sources: openvla prismatic/extern/hf/processing_prismatic.py (images), transformers' Llama tokenizer files (text).
Files: tokenizer.json (or tokenizer.model), tokenizer_config.json, special_tokens_map.json, added_tokens.json,
preprocessor_config.json.
Axes: B images, V vision backbones, H W pixels (h w after resizing).
"""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Dict, List, Optional, Tuple

import numpy as np
import torch
from PIL import Image

from vlakeep.core.compat import import_timm
from vlakeep.data.processor import BaseProcessor
from vlakeep.data.sample import Batch, Sample
from vlakeep.openvla import prompts
from vlakeep.openvla.action_tokenizer import ActionTokenizer

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
SPACES = ("▁", "Ġ")  # how Llama's vocabularies spell a space, and byte-level ones
PREPROCESSOR_FILE = "preprocessor_config.json"
STRATEGIES = ("resize-naive", "letterbox", "resize-crop")
_RESAMPLE = {"nearest": Image.NEAREST, "bilinear": Image.BILINEAR, "bicubic": Image.BICUBIC, "lanczos": Image.LANCZOS}


class ImageProcessor:
    """uint8 images to normalised pixel values, one 3-channel view per vision backbone, stacked over channels."""

    def __init__(self, input_sizes, means, stds, interpolations=("bicubic",), strategy: str = "resize-naive"):
        """input_sizes: (3, h, w) per view. Raises ValueError for an unknown strategy or interpolation."""
        if strategy not in STRATEGIES:
            raise ValueError(f"image_resize_strategy {strategy!r} in {PREPROCESSOR_FILE}: must be one of {', '.join(STRATEGIES)}")
        self.input_sizes = [tuple(size) for size in input_sizes]
        self.means, self.stds = [list(m) for m in means], [list(s) for s in stds]
        self.interpolations = list(interpolations) * (len(self.input_sizes) if len(interpolations) == 1 else 1)
        self.strategy = strategy
        unknown = [i for i in self.interpolations if i not in _RESAMPLE]
        if unknown:
            raise ValueError(f"interpolation {unknown[0]!r} in {PREPROCESSOR_FILE}: must be one of {', '.join(_RESAMPLE)}")
        # A byte has 256 values, so scaling and normalising are a table per channel, equal to the bit to doing it per pixel.
        byte_256 = np.arange(256, dtype=np.float32) / np.float32(255)
        self._tables = [
            [(byte_256 - np.float32(mean)) / np.float32(std) for mean, std in zip(*pair)] for pair in zip(self.means, self.stds)
        ]

    @classmethod
    def from_config(cls, config: dict) -> "ImageProcessor":
        return cls(config["input_sizes"], config["means"], config["stds"], config.get("interpolations", ["bicubic"]),
                   config.get("image_resize_strategy", "resize-naive"))

    def _letterbox(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        side = max(width, height)
        pad_x, pad_y = (side - width) // 2, (side - height) // 2
        fill = tuple(int(value * 255) for value in self.means[-1])  # the last view wins, as officially
        canvas = Image.new("RGB", (width + 2 * pad_x, height + 2 * pad_y), fill)
        canvas.paste(image, (pad_x, pad_y))
        return canvas

    def _resize(self, image_HWC: np.ndarray, height: int, width: int, resample) -> np.ndarray:
        if image_HWC.shape[:2] == (height, width):
            return image_HWC
        image = Image.fromarray(image_HWC)
        if self.strategy == "letterbox":
            image = self._letterbox(image)
        if self.strategy == "resize-crop":  # the shorter side to the input size, then the centre
            w, h = image.size
            long = int(height * max(w, h) / min(w, h))
            image = image.resize((height, long) if w <= h else (long, height), resample)
            top, left = int(round((image.size[1] - height) / 2.0)), int(round((image.size[0] - width) / 2.0))
            image = image.crop((left, top, left + width, top + height))
        else:
            image = image.resize((width, height), resample)
        return np.asarray(image)

    def __call__(self, images) -> torch.Tensor:
        """uint8 [H, W, 3] arrays or PIL images (a list, or one array [B, H, W, 3]) -> float32 [B, 3V, h, w].

        Raises ValueError for anything that is not 8-bit RGB.
        """
        arrays = []
        for image in images:
            array = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)
            if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
                raise ValueError(f"an image must be uint8 [H, W, 3], not {array.dtype} {list(array.shape)}")
            arrays.append(array)
        sizes = {size[1:] for size in self.input_sizes}
        if len(sizes) > 1:
            raise ValueError(f"vision backbones with different input sizes {sorted(sizes)} cannot be stacked")
        _, height, width = self.input_sizes[0]
        pixels = np.empty((len(arrays), 3 * len(self.input_sizes), height, width), dtype=np.float32)
        done: Dict[str, np.ndarray] = {}
        for view, tables in enumerate(self._tables):
            name = self.interpolations[view]
            if name not in done:
                done[name] = np.stack([self._resize(a, height, width, _RESAMPLE[name]) for a in arrays])
            for channel in range(3):
                np.take(tables[channel], done[name][..., channel], out=pixels[:, 3 * view + channel])
        return torch.from_numpy(pixels)


def load_tokenizer(folder):
    """The fast tokenizer of a folder. tokenizer.json is read as it is, so that every transformers version gives the same ids.

    With tokenizer.model alone transformers converts it; 5.23 then gives other ids than 4.40 for two spaces before punctuation.
    Raises FileNotFoundError when the folder has no tokenizer.
    """
    import_timm()  # transformers 5 imports torchvision too, so the shim must come first
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder = Path(folder)
    if not (folder / "tokenizer.json").is_file():
        if not (folder / "tokenizer.model").is_file():
            raise FileNotFoundError(
                f"no tokenizer.json or tokenizer.model in {folder}: copy the tokenizer files of the base model there"
            )
        if find_spec("sentencepiece") is None:
            raise FileNotFoundError(
                f"{folder} has tokenizer.model but no tokenizer.json, and sentencepiece is not installed: copy the base model's "
                "tokenizer.json there, or pip install sentencepiece protobuf"
            )
        return AutoTokenizer.from_pretrained(str(folder), padding_side="right")
    file = folder / "tokenizer_config.json"
    try:
        config = json.loads(file.read_text()) if file.is_file() else {}
        names = {key: _content(config.get(key)) for key in ("bos_token", "eos_token", "unk_token", "pad_token")}
        file = folder / "tokenizer.json"
        return PreTrainedTokenizerFast(
            tokenizer_file=str(file), padding_side="right", clean_up_tokenization_spaces=False,
            model_max_length=config.get("model_max_length", 2048),
            bos_token=names["bos_token"] or "<s>", eos_token=names["eos_token"] or "</s>",
            unk_token=names["unk_token"] or "<unk>", pad_token=names["pad_token"] or "<PAD>",
        )
    except Exception as error:  # the tokenizers library raises a bare Exception for a damaged file
        raise ValueError(f"{file} is damaged ({error}): copy it from the base model") from error


def _content(token) -> Optional[str]:
    return token["content"] if isinstance(token, dict) else token


class Processor(BaseProcessor):
    """tokenizer, image_processor and action_tokenizer; `folder` is where they were read from, or None."""

    max_tokens = prompts.MAX_LENGTH

    def __init__(self, tokenizer, image_processor: ImageProcessor, folder: Optional[Path] = None):
        self.tokenizer, self.image_processor, self.folder = tokenizer, image_processor, folder
        self.action_tokenizer = ActionTokenizer(tokenizer.vocab_size)
        self.pad_token_id: int = tokenizer.pad_token_id
        # What the official predict_action appends to a prompt: a space, 29871 in Llama-2 and another id in other vocabularies.
        spaces = [tokenizer.convert_tokens_to_ids(space) for space in SPACES]
        spaces = [number for number in spaces if number not in (None, tokenizer.unk_token_id)]
        if not spaces:
            raise ValueError(f"the tokenizer{f' in {folder}' if folder else ''} has no token {' or '.join(map(repr, SPACES))} for a space: "
                             "it is neither of the Llama type that OpenVLA has nor a byte-level one")
        self.empty_token_id: int = spaces[0]

    @classmethod
    def from_folder(cls, path) -> "Processor":
        """Raises FileNotFoundError or ValueError naming the file that is missing or wrong."""
        folder = Path(path)
        file = folder / PREPROCESSOR_FILE
        if not file.is_file():
            raise FileNotFoundError(f"no {PREPROCESSOR_FILE} in {folder}: copy the processor files of the base model there")
        try:
            image_processor = ImageProcessor.from_config(json.loads(file.read_text()))
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{file} is not an OpenVLA image processor configuration: {error}; copy it from the base model"
            ) from error
        return cls(load_tokenizer(folder), image_processor, folder)

    @property
    def picture_size(self) -> Tuple[int, int]:
        return self.image_processor.input_sizes[0][-2:]

    def encode_batch(self, samples: List[Sample]) -> Batch:
        self.spec.check(samples, "OpenVLA")
        return prompts.encode_batch(samples, self)

    def encode_prompts(self, samples: List[Sample], width: int = 0) -> Batch:
        self.spec.check(samples, "OpenVLA")
        return prompts.encode_prompts(samples, self, width)

    def whole_prompt(self, sample: Sample) -> List[int]:
        return prompts.whole_prompt(sample, self)

    def prompt_text(self, sample: Sample) -> str:
        return prompts.prompt_text(sample)

    def instruction_span(self, text: str) -> Tuple[int, int]:
        return prompts.instruction_span(text)

    def encode_actions(self, actions: np.ndarray) -> np.ndarray:
        return self.action_tokenizer.encode(actions)

    def decode_actions(self, ids_NT: np.ndarray) -> np.ndarray:
        return self.action_tokenizer.decode(ids_NT)[:, None]

    def action_bins(self, ids: np.ndarray) -> np.ndarray:
        return self.action_tokenizer.bin_of(ids)

    def save(self, path) -> List[Path]:
        """Copy the files this processor was read from, byte for byte. Raises ValueError when it was not read from a folder."""
        if self.folder is None:
            raise ValueError("this processor was not read from a folder; Processor.from_folder makes one that can be saved")
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        written = []
        for name in TOKENIZER_FILES + (PREPROCESSOR_FILE,):
            if (self.folder / name).is_file():
                if (folder / name).resolve() != (self.folder / name).resolve():
                    shutil.copyfile(self.folder / name, folder / name)
                written.append(folder / name)
        return written
