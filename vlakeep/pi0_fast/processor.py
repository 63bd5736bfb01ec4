"""Samples to batches of pi0-FAST and answers back to chunks: tokenizer, codec, pictures and layout of one checkpoint folder.

Files: text_tokenizer/tokenizer.json and action_tokenizer/{tokenizer.json, processor_config.json} beside the weights, or below the names
in config.json, as folders there or in the hub's cache.
Axes: B samples, C cameras, L text tokens, T answer tokens, N rows, A action dimensions, Q numbers of the state.
"""

import json
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, List, Optional, Sequence, Tuple

import numpy as np
import torch
from tokenizers import Tokenizer, processors
from torch.nn.utils.rnn import pad_sequence

from vlakeep.core.compat import import_timm
from vlakeep.core.errors import CheckpointError
from vlakeep.core.storage import pick_root
from vlakeep.data.processor import BaseProcessor
from vlakeep.data.sample import IGNORE_INDEX, Batch, Sample, SampleSpec
from vlakeep.pi0_fast import format as checkpoint_format
from vlakeep.pi0_fast import prompts
from vlakeep.pi0_fast.codec import FastCodec
from vlakeep.pi0_fast.pictures import model_picture

TEXT, CODEC = "text_tokenizer", "action_tokenizer"
TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


@dataclass
class Pi0FastBatch(Batch):
    """pixel_values [B, C, 3, h, w]: only cameras that some row has."""

    prefix: Optional[torch.Tensor] = None  # int64 [B]: text tokens of the prefix, which see one another
    cameras: Optional[torch.Tensor] = None  # bool [B, C]: which pictures are attended to
    longest: int = 0  # labels of the row that has most, at least 1; found here, on the host, so that the loss needs no synchronisation

    def __post_init__(self):
        super().__post_init__()
        self.longest = self.longest or max(1, int((self.labels != IGNORE_INDEX).sum(1).max()))


def beside(folder: Path, name: str, default: str, what: str) -> Path:
    """The folder of a tokenizer: in the checkpoint's, or below the hub's cache. FileNotFoundError with the remedy."""
    cache = Path(os.environ.get("HF_HOME") or Path(pick_root()) / "hf_cache")
    hub = sorted((cache / "hub" / ("models--" + name.replace("/", "--")) / "snapshots").glob("*"), key=lambda path: path.stat().st_mtime)
    looked = [folder / default, folder / name, cache / name, cache / Path(name).name, *reversed(hub)]
    for found in looked:
        if (found / "tokenizer.json").is_file():
            return found
    raise FileNotFoundError(f"no {what} for {folder} (looked in {', '.join(map(str, looked))}): put the files of {name} into "
                            f"{folder / default}, for example with `huggingface-cli download {name} --include '*token*' '*processor*' "
                            f"--local-dir {folder / default}`")


def load_tokenizer(folder: Path):
    """A fast tokenizer of transformers over tokenizer.json, which puts BOS in front, whatever class and version wrote the file."""
    import_timm()  # transformers 5 imports torchvision too, so the shim must come first
    from transformers import PreTrainedTokenizerFast

    file = folder / "tokenizer_config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        names = {key: value["content"] if isinstance(value, dict) else value for key, value in config.items() if key.endswith("_token")}
        file = folder / "tokenizer.json"
        plain = Tokenizer.from_file(str(file))
        bos = names.get("bos_token") or "<bos>"
        plain.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, plain.token_to_id(bos))])
        plain.no_truncation()
        plain.no_padding()
        return PreTrainedTokenizerFast(
            tokenizer_object=plain, padding_side="right", clean_up_tokenization_spaces=False, bos_token=bos,
            eos_token=names.get("eos_token") or "<eos>", unk_token=names.get("unk_token") or "<unk>",
            pad_token=names.get("pad_token") or "<pad>")
    except Exception as error:  # the tokenizers library raises a bare Exception for a damaged file
        raise CheckpointError(f"{file} is damaged ({error}): copy it from the base model") from error


def spec_of(config: dict) -> SampleSpec:
    """What the model takes of a sample, after config.json; cameras that lerobot calls empty are none."""
    there = tuple(name for name in checkpoint_format.cameras(config) if not name.startswith("empty_camera_"))
    return SampleSpec(there if len(there) > 1 else (), checkpoint_format.state_size(config), int(config["chunk_size"]))


class Processor(BaseProcessor):
    """folder: where it was read from."""

    variable_answers = True
    own_resize = True

    def __init__(self, tokenizer, codec: FastCodec, config: dict, layout: str, folder: Path, text_folder: Optional[Path] = None):
        self.tokenizer, self.codec, self.config, self.folder = tokenizer, codec, config, folder
        self.layout = prompts.layout_named(layout)
        self._text_folder = text_folder or folder / TEXT
        self.words = prompts.Words(tokenizer, int(config["fast_skip_tokens"]))
        self.pad_token_id: int = self.words.pad
        self.named = tuple(checkpoint_format.cameras(config))  # in the model's order
        self.spec = spec_of(config)
        if self.words.first_code - codec.vocab_size + 1 < 0:
            raise CheckpointError(f"a codec of {codec.vocab_size} codes has no room in a vocabulary of {self.words.vocab_size} "
                                  "tokens, of which "
                                  f"the last {config['fast_skip_tokens']} are left out (fast_skip_tokens): they are not of one checkpoint")

    @classmethod
    def from_folder(cls, path, config: Optional[dict] = None) -> "Processor":
        """config: None reads the folder's. FileNotFoundError or CheckpointError."""
        folder = Path(path)
        config = config or checkpoint_format.read_config(folder)
        text = beside(folder, config["text_tokenizer_name"], TEXT, "text tokenizer")
        codec = FastCodec.from_folder(beside(folder, config["action_tokenizer_name"], CODEC, "FAST codec"))
        return cls(load_tokenizer(text), codec, config, config.get("layout") or prompts.DEFAULT, folder, text)

    @property
    def picture_size(self) -> Tuple[int, int]:
        height, width = self.config["image_resolution"]
        return int(height), int(width)

    @property
    def ends(self) -> Tuple[int, ...]:
        return self.words.eos, self.words.bar

    @property
    def action_limit(self) -> float:  # type: ignore[override]
        return max(1.0, self.codec.limit(self.spec.chunk))

    # Samples to batches

    def _pictures(self, sample: Sample) -> List[Optional[np.ndarray]]:
        """Per camera of the config its picture, or None; of a sample with one picture without a name it is the first."""
        found = [sample.cameras.get(name) for name in self.named]
        if found[0] is None:
            found[0] = self.spec.only(sample) if not self.spec.cameras else sample.image
        return found

    def _check(self, samples: Sequence[Sample]) -> None:
        """As spec.check, but a camera may lack where another is there."""
        for sample in samples:
            cameras = tuple(name for name, one in zip(self.named, self._pictures(sample)) if one is not None)
            spec = self.spec if not cameras else replace(self.spec, cameras=tuple(name for name in cameras if name in sample.cameras))
            # Of questions the state is no part.
            (replace(spec, state=0) if sample.question else spec).check([sample], f"pi0-FAST ({self.folder.name})")

    def _batch(self, samples: List[Sample], prefixes: List[List[int]], seconds: List[List[int]], targets: List[List[int]],
               width: int = 0) -> Pi0FastBatch:
        rows = [torch.tensor([*a, *b, *c]) for a, b, c in zip(prefixes, seconds, targets)]
        labels = [torch.tensor([IGNORE_INDEX] * (len(a) + len(b)) + c) for a, b, c in zip(prefixes, seconds, targets)]
        length_B = torch.tensor([len(row) for row in rows])
        rows[0], labels[0] = (torch.nn.functional.pad(x[0], (0, max(0, width - len(x[0]))), value=v)
                              for x, v in ((rows, self.pad_token_id), (labels, IGNORE_INDEX)))
        ids_BL, labels_BL = pad_sequence(rows, True, self.pad_token_id), pad_sequence(labels, True, IGNORE_INDEX)
        seen = [self._pictures(sample) for sample in samples]
        attended_BC = torch.tensor([[self.layout.black or one is not None for one in row] for row in seen])
        kept = [c for c in range(len(self.named)) if attended_BC[:, c].any()]  # a camera that no row has would be 256 masked columns
        pixels = torch.stack([torch.stack([model_picture(row[c], self.picture_size) for c in kept]) for row in seen])
        return Pi0FastBatch(ids_BL, torch.arange(ids_BL.shape[1]) < length_B[:, None], labels_BL, pixels, [s.dataset for s in samples],
                            prefix=torch.tensor([len(a) for a in prefixes]), cameras=attended_BC[:, kept])

    def prefix_ids(self, sample: Sample) -> List[int]:
        """The part of the prompt that sees all of itself."""
        return self.words.ids(prompts.prompt_text(sample, self.layout))

    def _second(self, sample: Sample) -> List[int]:
        return [self.words.bos] if self.layout.second_bos and not sample.question else []

    def target_ids(self, sample: Sample) -> List[int]:
        """What is learnt. ValueError where there is nothing."""
        if sample.question:
            if not sample.answer or not sample.answer.strip():
                raise ValueError(f"question {sample.instruction!r} of data set {sample.dataset!r} has no answer to learn")
            return [*self.words.plain(sample.answer.strip()), self.words.eos]
        if sample.action is None:
            raise ValueError(f"instruction {sample.instruction!r} of data set {sample.dataset!r} has no action to learn; "
                             "encode_prompts makes a batch without targets")
        chunk = np.asarray(sample.action)
        if not np.isfinite(chunk).all():
            raise ValueError(f"the actions of {sample.instruction!r} in data set {sample.dataset!r} are not finite")
        return self.words.answer(self.codec.encode(chunk if chunk.ndim == 2 else chunk[None]))

    def encode_batch(self, samples: List[Sample]) -> Pi0FastBatch:
        self._check(samples)
        return self._batch(samples, [self.prefix_ids(s) for s in samples], [self._second(s) for s in samples],
                           [self.target_ids(s) for s in samples])

    def encode_prompts(self, samples: List[Sample], width: int = 0) -> Pi0FastBatch:
        self._check(samples)
        return self._batch(samples, [self.prefix_ids(s) for s in samples], [self._second(s) for s in samples], [[] for _ in samples], width)

    def whole_prompt(self, sample: Sample) -> List[int]:
        return [*self.prefix_ids(sample), *self._second(sample)]

    def prompt_text(self, sample: Sample) -> str:
        return prompts.prompt_text(sample, self.layout)

    def instruction_span(self, text: str) -> Tuple[int, int]:
        return prompts.instruction_span(text)

    def state_spans(self, text: str) -> List[Tuple[int, int]]:
        return prompts.state_spans(text)

    # Actions

    def encode_actions(self, actions: np.ndarray) -> np.ndarray:
        """Chunks [N, C, A] or one [C, A] to ids of their answers without the end, padded: [N, T] or [T]."""
        chunks = np.asarray(actions)
        rows = [self.words.answer(self.codec.encode(c))[:-1] for c in chunks.reshape(-1, *chunks.shape[-2:])]
        padded = np.full((len(rows), max(map(len, rows))), self.pad_token_id, dtype=np.int64)
        for row, ids in zip(padded, rows):
            row[:len(ids)] = ids
        return padded if chunks.ndim == 3 else padded[0]

    def read(self, ids_NT: np.ndarray, dims: Optional[int] = None) -> Tuple[np.ndarray, List[str]]:
        """(chunks [N, C, A] float64, per row what was wrong with it, or ""). dims: A; None takes that of config.json."""
        chunks, problems, dims = [], [], dims or checkpoint_format.action_size(self.config)
        for row in np.asarray(ids_NT):
            codes, ended = self.words.codes(row.tolist())
            chunk, problem = self.codec.decode(codes, self.spec.chunk, dims)
            chunks.append(chunk)
            problems.append(problem or ("" if ended else "no end"))
        return np.stack(chunks), problems

    def decode_actions(self, ids_NT: np.ndarray) -> np.ndarray:
        return self.read(ids_NT)[0]

    def action_bins(self, ids: np.ndarray) -> np.ndarray:
        """Numbers of the codes; other tokens fall on the first or the last. Codes of a BPE have no order."""
        return np.clip(self.words.first_code - np.asarray(ids), 0, self.codec.vocab_size - 1)

    def save(self, path) -> List[Path]:
        """Tokenizer, codec and their names, so that lerobot finds them beside the weights of the folder."""
        folder, written = Path(path), self.codec.save(Path(path) / CODEC)
        (folder / TEXT).mkdir(parents=True, exist_ok=True)
        for name in TEXT_FILES:
            source: Any = self._text_folder / name
            if source.is_file():
                if source.resolve() != (folder / TEXT / name).resolve():
                    shutil.copyfile(source, folder / TEXT / name)
                written.append(folder / TEXT / name)
        return written
