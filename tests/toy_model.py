"""A model of another kind, in one file: two cameras, a state token, a decoder with other names, and chunks of two actions.

A package would name `Toy` in the entry point group vlakeep.models; tests/test_models.py does so for the length of a test.

Sequence: [left camera][right camera][state][text]; what stands before the text sees all of itself, text sees that and earlier text.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from vlakeep.core.errors import CheckpointError
from vlakeep.data.processor import BaseProcessor
from vlakeep.data.sample import IGNORE_INDEX, Batch, SampleSpec
from vlakeep.models import files
from vlakeep.models.base import Backbone, Prefix

BINS, SIDE, PATCH = 16, 8, 4
SEEN = 2 * (SIDE // PATCH) ** 2 + 1  # columns before the text
WORDS = ["<pad>", "<bos>", "<eos>", "<unk>", "do", "ask", ":", ".", *"open close the red blue door box what is it".split()]


class ToyProcessor(BaseProcessor):
    spec = SampleSpec(cameras=("left", "right"), state=2, chunk=2)
    picture_size = (SIDE, SIDE)

    def __init__(self, file):
        from transformers import PreTrainedTokenizerFast

        self.file = Path(file)
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file), pad_token="<pad>", bos_token="<bos>", eos_token="<eos>",
                                                 unk_token="<unk>")
        self.pad_token_id = self.tokenizer.pad_token_id

    def prompt_text(self, sample):
        return f"{'ask' if sample.question else 'do'} : {sample.instruction} ."

    def instruction_span(self, text):
        return text.index(":") + 2, len(text) - 2

    def whole_prompt(self, sample):
        return self.tokenizer(self.prompt_text(sample))["input_ids"]

    def encode_actions(self, actions):
        return len(WORDS) + np.clip((np.asarray(actions) + 1) * BINS / 2, 0, BINS - 1).astype(np.int64)

    def decode_actions(self, ids_NT):
        return ((self.action_bins(ids_NT) + 0.5) * 2 / BINS - 1).reshape(len(ids_NT), self.spec.chunk, -1)

    def action_bins(self, ids):
        return np.clip(np.asarray(ids) - len(WORDS), 0, BINS - 1)

    def _batch(self, samples, prompts, targets, width=0):
        self.spec.check(samples, "toy")
        rows = [torch.tensor(prompt + target) for prompt, target in zip(prompts, targets)]
        labels = [torch.tensor([IGNORE_INDEX] * len(prompt) + target) for prompt, target in zip(prompts, targets)]
        ids_BL, labels_BL = pad_sequence(rows, True, self.pad_token_id), pad_sequence(labels, True, IGNORE_INDEX)
        more = max(0, width - ids_BL.shape[1])
        ids_BL, labels_BL = F.pad(ids_BL, (0, more), value=self.pad_token_id), F.pad(labels_BL, (0, more), value=IGNORE_INDEX)
        seen = torch.from_numpy(np.stack([np.stack(self.spec.pictures(sample)) for sample in samples])).float() / 255
        return Batch(ids_BL, torch.arange(ids_BL.shape[1]) < torch.tensor([len(row) for row in rows])[:, None], labels_BL, seen,
                     [sample.dataset for sample in samples], state=torch.from_numpy(np.stack([sample.state for sample in samples])))

    def encode_prompts(self, samples, width=0):
        return self._batch(samples, [self.whole_prompt(sample) for sample in samples], [[] for _ in samples], width)

    def encode_batch(self, samples):
        answers = [self.tokenizer(one.answer, add_special_tokens=False)["input_ids"] if one.question
                   else self.encode_actions(one.action).flatten().tolist() for one in samples]
        ends = [answer + [self.tokenizer.eos_token_id] for answer in answers]
        return self._batch(samples, [self.whole_prompt(sample) for sample in samples], ends)

    def save(self, path):
        (Path(path) / "tokenizer.json").write_bytes(self.file.read_bytes())
        return [Path(path) / "tokenizer.json"]


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.look = nn.ModuleDict({name: nn.Linear(width, width, bias=False) for name in ("ask", "key", "value", "out")})
        self.think = nn.ModuleDict({"wide": nn.Linear(width, 2 * width), "narrow": nn.Linear(2 * width, width)})

    def forward(self, x_BSD, allowed_B1SS):
        normed = F.layer_norm(x_BSD, x_BSD.shape[-1:])
        q, k, v = (self.look[name](normed)[:, None] for name in ("ask", "key", "value"))
        x_BSD = x_BSD + self.look["out"](F.scaled_dot_product_attention(q, k, v, attn_mask=allowed_B1SS)[:, 0])
        return x_BSD + self.think["narrow"](F.gelu(self.think["wide"](F.layer_norm(x_BSD, x_BSD.shape[-1:]))))


class Network(nn.Module):
    def __init__(self, depth, width):
        super().__init__()
        self.words, self.places = nn.Embedding(len(WORDS) + BINS, width), nn.Embedding(64, width)
        self.sight, self.touch = nn.Linear(3 * PATCH * PATCH, width), nn.Linear(2, width)
        self.trunk = nn.ModuleDict({"layers": nn.ModuleList([Block(width) for _ in range(depth)])})
        self.head = nn.Linear(width, len(WORDS) + BINS, bias=False)


@dataclass(frozen=True, eq=False)
class ToyPrefix(Prefix):
    text_BS: torch.Tensor  # bool, which columns are text


class Toy(Backbone):
    decoder_prefix = "trunk."
    linears = {"ask": "look.ask", "key": "look.key", "value": "look.value", "out": "look.out", "wide": "think.wide",
               "narrow": "think.narrow"}
    groups = {"attention": ["ask", "key", "value", "out"], "mlp": ["wide", "narrow"]}
    shared_inputs = {"key": "ask", "value": "ask"}
    processor_files = (("tokenizer.json",),)

    @classmethod
    def read_config(cls, folder):
        config = json.loads((Path(folder) / "config.json").read_text())
        if not {"depth", "width"} <= set(config):
            raise CheckpointError(f"{folder}/config.json has no depth or no width: make the folder again")
        return config

    @classmethod
    def sizes(cls, config):
        return config["depth"], config["width"]

    @classmethod
    def linear_shapes(cls, config):
        width = config["width"]
        return {**{leaf: (width, width) for leaf in cls.groups["attention"]}, "wide": (width, 2 * width), "narrow": (2 * width, width)}

    @classmethod
    def load(cls, settings, folder, device):
        config = cls.read_config(folder)
        network = Network(*cls.sizes(config))
        network.load_state_dict(dict(files.read_tensors(files.weight_files(folder))), strict=True)
        return cls(network, ToyProcessor(folder / "tokenizer.json"), cls.read_statistics(folder, config), folder).to(device).eval()

    def write(self, folder, state, dtype=None):
        folder.mkdir(parents=True, exist_ok=True)
        files.write_weights(folder, {name: tensor.to(dtype or tensor.dtype).cpu().contiguous() for name, tensor in state.items()})
        config = {"model_type": "toy", "depth": self.num_layers, "width": self.hidden_size}
        self._small_files(folder, config, self.norm_stats, self.processor)

    @staticmethod
    def _small_files(folder, config, statistics, processor):
        files.write_json(folder / "config.json", config)
        files.write_json(folder / files.STATISTICS, statistics)
        processor.save(folder)

    @classmethod
    def complete_merged(cls, base, out, statistics, dtype):
        cls._small_files(out, cls.read_config(base), statistics, ToyProcessor(base / "tokenizer.json"))

    @property
    def decoder_layers(self):
        return self.network.trunk["layers"]

    @property
    def hidden_size(self):
        return self.network.words.embedding_dim

    def embed(self, batch):
        batch = batch.to(self.device)
        rows, network = batch.size, self.network
        patches = batch.pixel_values.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).permute(0, 1, 2, 3, 5, 6, 4)
        seen_BSD = torch.cat([network.sight(patches.reshape(rows, SEEN - 1, -1)), network.touch(batch.state)[:, None]], dim=1)
        hidden_BSD = torch.cat([seen_BSD, network.words(batch.input_ids)], dim=1)
        hidden_BSD = hidden_BSD + network.places(torch.arange(hidden_BSD.shape[1], device=self.device))
        valid_BS = F.pad(batch.attention_mask.bool(), (SEEN, 0), value=True)
        return ToyPrefix(hidden_BSD, valid_BS, F.pad(batch.attention_mask.bool(), (SEEN, 0), value=False))

    def text_columns(self, prefix, length):
        return SEEN + torch.arange(length, device=prefix.hidden_BSD.device)

    def run_layers(self, prefix, start=0, stop=None):
        end = self.num_layers if stop is None else stop
        if not 0 <= start <= end <= self.num_layers:
            raise ValueError(f"layers {start} to {end} were asked for; the model has layers 0 to {self.num_layers - 1}")
        hidden_BSD, valid_BS = prefix.hidden_BSD, prefix.attention_mask_BS
        column_S = torch.arange(hidden_BSD.shape[1], device=hidden_BSD.device)
        earlier_SS = column_S[None] <= column_S[:, None]
        allowed_BSS = (earlier_SS | ~prefix.text_BS[:, None]) & valid_BS[:, None] | torch.eye(len(column_S), dtype=torch.bool,
                                                                                             device=hidden_BSD.device)
        for layer in self.decoder_layers[start:end]:
            hidden_BSD = layer(hidden_BSD, allowed_BSS[:, None])
        return self.norm(hidden_BSD) if stop is None else hidden_BSD

    def norm(self, hidden):
        return F.layer_norm(hidden, hidden.shape[-1:])

    def logits(self, hidden_normed):
        return self.network.head(hidden_normed).float()


def make_folder(folder, depth=4, width=32, seed=0):
    """A checkpoint folder with random weights."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", WORDS.index("<bos>"))])
    tokenizer.save(str(folder / "source.json"))
    torch.manual_seed(seed)
    network = Network(depth, width)
    ends = {"q01": [-2.0, 0.0, 0.0], "q99": [2.0, 1.0, 1.0], "mask": [True, True, False]}
    toy = Toy(network, ToyProcessor(folder / "source.json"), {"toy_data": {"action": ends}})
    toy.write(folder, network.state_dict())
    (folder / "source.json").unlink()
    return folder
