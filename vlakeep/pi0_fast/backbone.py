"""pi0-FAST as a Backbone.

Sequence: [camera 1]..[camera C][prompt][actions][padding]. Cameras and prompt are the prefix, which sees all of itself; what follows sees
the prefix and, causally, itself. Positions count the columns that are attended to. The prompt never sees the actions, so that a prompt's
hidden states are the same with an answer behind it and without.

Axes: B batch, L text tokens, S sequence, K keys, D hidden, V vocabulary, T generated tokens, C actions of a chunk, A action dimensions.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple, cast

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from vlakeep.data.sample import IGNORE_INDEX, Batch, SampleSpec
from vlakeep.models.base import Backbone, Prefix
from vlakeep.models.load import DTYPES
from vlakeep.models.outputs import LossOutput, loss_output
from vlakeep.models.workload import Workload
from vlakeep.pi0_fast import format as checkpoint_format
from vlakeep.pi0_fast.model import DECODER, Cache, Pi0Fast
from vlakeep.pi0_fast.processor import CODEC, TEXT, Pi0FastBatch, Processor, spec_of
from vlakeep.pi0_fast.workload import PUBLISHED, workload

LOOK = 4  # tokens between two questions whether every row has ended, each of which waits for the device


@dataclass(frozen=True, eq=False)
class Pi0FastPrefix(Prefix):
    both_ways_BS: torch.Tensor  # bool: columns of the prefix
    picture_BS: torch.Tensor  # bool: columns of cameras, attended to or not


def allowed(prefix: Pi0FastPrefix) -> torch.Tensor:
    """bool [B, 1, S, K]: a key that is no padding, and in the prefix or not later than the query. No row is empty, so that none is NaN in
    half precision."""
    column_S = torch.arange(prefix.hidden_BSD.shape[1], device=prefix.hidden_BSD.device)
    earlier_SK = column_S[None] <= column_S[:, None]
    return ((prefix.both_ways_BS[:, None] | earlier_SK) & prefix.attention_mask_BS[:, None])[:, None]


def positions(prefix: Prefix) -> torch.Tensor:
    """[B, S]: padding and cameras that are not there take no position."""
    return (prefix.attention_mask_BS.long().cumsum(1) - 1).clamp(min=0)


class Pi0FastBackbone(Backbone):
    """A pi0-FAST with its processor, statistics and identity. `model` is a Pi0Fast, or PEFT's wrapping of one."""

    decoder_prefix = DECODER
    linears = {"q_proj": "self_attn.q_proj", "k_proj": "self_attn.k_proj", "v_proj": "self_attn.v_proj", "o_proj": "self_attn.o_proj",
               "gate_proj": "mlp.gate_proj", "up_proj": "mlp.up_proj", "down_proj": "mlp.down_proj"}
    groups = {"attention": ["q_proj", "k_proj", "v_proj", "o_proj"], "mlp": ["gate_proj", "up_proj", "down_proj"]}
    shared_inputs = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
    prompt_sees_itself = True
    stand_in = "as in lerobot's relaxed decoding, coefficients that were missing or none of the codec's are zero"

    # Before the weights

    @classmethod
    def read_config(cls, folder: Path) -> dict:
        return checkpoint_format.read_config(folder)

    @classmethod
    def sizes(cls, config: dict) -> Tuple[int, int]:
        sizes = checkpoint_format.sizes_of(checkpoint_format.complete_config(config))
        return sizes.depth, sizes.width

    @classmethod
    def linear_shapes(cls, config: dict) -> Dict[str, Tuple[int, int]]:
        sizes = checkpoint_format.sizes_of(checkpoint_format.complete_config(config))
        width, mlp = sizes.width, sizes.mlp_dim
        queries, keys = sizes.num_heads * sizes.head_dim, sizes.num_kv_heads * sizes.head_dim
        return {"q_proj": (width, queries), "k_proj": (width, keys), "v_proj": (width, keys), "o_proj": (queries, width),
                "gate_proj": (width, mlp), "up_proj": (width, mlp), "down_proj": (mlp, width)}

    @classmethod
    def published(cls, name: str, settings) -> Optional[dict]:
        config = PUBLISHED.get(name)
        return config and checkpoint_format.adapted(checkpoint_format.complete_config(config), settings.layout, settings.cameras,
                                                    settings.state)

    @classmethod
    def workload(cls, config: dict, shapes=None) -> Workload:
        return workload(cls, config)

    @classmethod
    def whole_config(cls, folder: Path, config: dict, settings) -> dict:
        return cls._read(settings, folder)

    @classmethod
    def read_spec(cls, config: dict) -> SampleSpec:
        return spec_of(config)

    @classmethod
    def read_statistics(cls, folder: Path, config: dict) -> dict:
        return checkpoint_format.read_statistics(folder, config)

    @classmethod
    def tensor_name(cls, stored: str) -> str:
        return checkpoint_format.tensor_name(stored)

    @classmethod
    def read_processor(cls, settings, folder: Path) -> Processor:
        return Processor.from_folder(folder, cls._read(settings, folder))

    # Folders

    @classmethod
    def load(cls, settings, folder: Path, device) -> Backbone:
        if settings.source != "native":
            raise ValueError(f"--backbone.source {settings.source} is for OpenVLA; {folder} holds a pi0-FAST, which vlakeep runs "
                             "in its own code: "
                             "use --backbone.source native, and compare with lerobot's classes by `vlakeep verify-pi0-fast`")
        network, config = checkpoint_format.load_checkpoint(folder, DTYPES[settings.dtype], settings.attn_implementation,
                                                            cls._read(settings, folder))
        network.gradient_checkpointing = settings.gradient_checkpointing
        processor = Processor.from_folder(folder, config)
        if processor.words.vocab_size > network.sizes.vocab_size:
            raise checkpoint_format.CheckpointError(
                f"the text tokenizer of {folder} has {processor.words.vocab_size} tokens, its model {network.sizes.vocab_size}: "
                "they are not of one checkpoint")
        return cls(network, processor, cls.read_statistics(folder, config), folder, settings.unnorm_key).to(device).eval()

    def write(self, folder: Path, state: Dict[str, torch.Tensor], dtype: Optional[torch.dtype] = None) -> None:
        checkpoint_format.write_checkpoint(folder, state, self._config(self.config, self.processor), self.norm_stats, dtype)
        self.processor.save(folder)

    @classmethod
    def complete_merged(cls, base: Path, out: Path, statistics: dict, dtype: torch.dtype) -> None:
        processor = Processor.from_folder(base)
        checkpoint_format.write_sidecars(out, cls._config(processor.config, processor), statistics)
        processor.save(out)

    @classmethod
    def record_settings(cls, folder: Path, settings) -> None:
        config = checkpoint_format.adapted(cls.read_config(folder), settings.layout, settings.cameras, settings.state)
        checkpoint_format.write_sidecars(folder, config, cls.read_statistics(folder, config))

    def recorded(self) -> Dict[str, Any]:
        return {"layout": self.processor.layout.name, "cameras": list(self.processor.named), "state": self.processor.spec.state}

    @staticmethod
    def _read(settings, folder: Path) -> dict:
        return checkpoint_format.adapted(checkpoint_format.read_config(folder), settings.layout, settings.cameras, settings.state)

    @staticmethod
    def _config(config: dict, processor: Processor) -> dict:
        """With the record of the layout, and the names of tokenizers that are folders; names of the hub stay, for lerobot takes them from
        there."""
        names = {key: where if (processor.folder / config[key]).is_dir() else config[key]
                 for key, where in (("text_tokenizer_name", TEXT), ("action_tokenizer_name", CODEC))}
        return dict(config, layout=processor.layout.name, **names)

    # Identity

    @property
    def pi0(self) -> Any:
        """The Pi0Fast inside, with or without adapters."""
        return self.network

    @property
    def config(self) -> dict:
        return self.pi0.config

    @property
    def decoder_layers(self) -> nn.ModuleList:
        return self.pi0.gemma.layers

    @property
    def hidden_size(self) -> int:
        return self.pi0.sizes.width

    @property
    def device(self) -> torch.device:
        return self.pi0.gemma.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.pi0.gemma.embed_tokens.weight.dtype

    @property
    def answer_tokens(self) -> int:  # type: ignore[override]
        """Longest answer of the teacher: lerobot's limit of a row of action tokens."""
        return int(self.config["max_action_tokens"])

    # Layout

    def text_columns(self, prefix: Prefix, length: int) -> torch.Tensor:
        assert isinstance(prefix, Pi0FastPrefix)
        return prefix.picture_BS.sum(1)[:, None] + torch.arange(length, device=prefix.hidden_BSD.device)

    # Forward

    def embed(self, batch: Batch) -> Pi0FastPrefix:
        batch = self._here(batch)
        text_BLD = self.pi0.embed_text(batch.input_ids)
        pictures_BPD = self.pi0.embed_pictures(batch.pixel_values)
        seen_BP = batch.cameras.repeat_interleave(pictures_BPD.shape[1] // batch.cameras.shape[1], dim=1)
        text_BL = batch.attention_mask.bool()
        index_L = torch.arange(text_BL.shape[1], device=self.device)
        return Pi0FastPrefix(
            torch.cat([pictures_BPD, text_BLD], dim=1), torch.cat([seen_BP, text_BL], dim=1),
            F.pad(index_L < batch.prefix[:, None], (seen_BP.shape[1], 0), value=True),
            F.pad(torch.zeros_like(text_BL), (seen_BP.shape[1], 0), value=True))

    def _here(self, batch: Batch) -> Pi0FastBatch:
        moved = batch.to(self.device)
        assert isinstance(moved, Pi0FastBatch)
        return moved

    def run_layers(self, prefix: Prefix, start: int = 0, stop: Optional[int] = None) -> torch.Tensor:
        return self._run(prefix, start, stop)

    def _run(self, prefix, start: int = 0, stop: Optional[int] = None, cache: Optional[Cache] = None, each=None) -> torch.Tensor:
        end = self.num_layers if stop is None else stop
        if not 0 <= start <= end <= self.num_layers:
            raise ValueError(f"layers {start} to {end} were asked for; the model has layers 0 to {self.num_layers - 1}")
        hidden_BSD = self.pi0.run_layers(prefix.hidden_BSD, allowed(prefix), positions(prefix), start, end, cache, each)
        return self.pi0.norm(hidden_BSD) if stop is None else hidden_BSD

    def hidden_states(self, batch: Batch) -> List[torch.Tensor]:
        """num_layers + 1 tensors [B, S, D]: the embeddings, then the raw output of every layer, as lerobot's hooks see them."""
        prefix = self.embed(batch)
        states = [prefix.hidden_BSD]
        self._run(prefix, stop=self.num_layers, each=states.append)
        return states

    def norm(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.pi0.norm(hidden)

    def logits(self, hidden_normed: torch.Tensor) -> torch.Tensor:
        return self.pi0.logits(hidden_normed)

    def loss(self, batch: Batch) -> LossOutput:
        """The layout's loss: of lerobot the mean over all labelled tokens, of openpi the mean over rows of each row's mean.

        lm_head runs on as many columns of each row as the longest answer has, which the host knows since collation.
        """
        batch = self._here(batch)
        prefix = self.embed(batch)
        last_BSD = self.run_layers(prefix, stop=self.num_layers)
        length = batch.input_ids.shape[1]
        # The answer of each row begins where its labels do; rows with longer prompts have them further right.
        first_B1 = (batch.labels != IGNORE_INDEX).int().argmax(1, keepdim=True).clamp(min=1)
        place_BT = first_B1 + torch.arange(batch.longest, device=self.device)
        inside_BT = place_BT < length
        place_BT = place_BT.clamp(max=length - 1)
        labels_BT = torch.where(inside_BT, batch.labels.gather(1, place_BT), IGNORE_INDEX)
        columns_BT = self.text_columns(prefix, length).expand(batch.size, length).gather(1, place_BT) - 1
        row_B1 = torch.arange(batch.size, device=self.device)[:, None]
        logits_BTV = self.logits(self.norm(last_BSD[row_B1, columns_BT]))
        out = loss_output(logits_BTV, labels_BT, last_BSD, prefix.attention_mask_BS)
        return out._replace(loss=row_means(logits_BTV, labels_BT)) if self.processor.layout.row_means else out

    # Generation

    @torch.no_grad()
    def generate(self, batch: Batch, max_new_tokens: int, stop_at_eos: bool = True,
                 bos_in_prefix: bool = False) -> Tuple[torch.Tensor, torch.Tensor]:
        """As Backbone.generate, with a cache of keys and values. A row ends with the bar or with EOS.

        bos_in_prefix: as lerobot generates (modeling_pi0_fast.py:595-737), whose action BOS is then part of the prefix, although it is
        causal in its training. For comparisons; the default is what was trained.
        """
        batch = self._here(batch)
        if bos_in_prefix:
            batch = replace(batch, prefix=batch.attention_mask.sum(1))
        prefix = self.embed(batch)
        pad, ends = self.processor.pad_token_id, torch.tensor(self.processor.ends, device=self.device)
        rows, cache = batch.size, cast(Cache, [None] * self.num_layers)
        hidden_BSD = self._run(prefix, stop=self.num_layers, cache=cache)
        valid_BK = prefix.attention_mask_BS
        length_B = valid_BK.sum(1)
        last_B = prefix.picture_BS.sum(1) + batch.attention_mask.sum(1) - 1
        last_BD = hidden_BSD[torch.arange(rows, device=self.device), last_B]
        ended_B = torch.zeros(rows, dtype=torch.bool, device=self.device)
        chosen: List[torch.Tensor] = []
        for step in range(max_new_tokens):
            next_B = self.logits(self.pi0.norm(last_BD)).argmax(-1)
            if stop_at_eos:
                next_B = torch.where(ended_B, torch.full_like(next_B, pad), next_B)
            chosen.append(next_B)
            ended_B = ended_B | torch.isin(next_B, ends)
            if step + 1 == max_new_tokens or (stop_at_eos and step % LOOK == LOOK - 1 and bool(ended_B.all())):
                break
            # New tokens stand behind the padding in the cache, but carry the position that follows their own prompt.
            valid_BK = F.pad(valid_BK, (0, 1), value=True)
            last_BD = self.pi0.run_layers(self.pi0.embed_text(next_B[:, None]), valid_BK[:, None, None], (length_B + step)[:, None],
                                          cache=cache)[:, 0]
        found_BT = torch.stack(chosen, dim=1)
        return F.pad(found_BT, (0, max_new_tokens - found_BT.shape[1]), value=pad), ended_B

    # Actions

    def action_tokens(self, unnorm_key: Optional[str] = None) -> int:
        """The most tokens that an answer takes."""
        return int(self.config["max_decoding_steps"])

    def unnormalise(self, actions: np.ndarray, unnorm_key: Optional[str] = None) -> np.ndarray:
        """As the statistics say that they were made normal: quantiles, where nothing else stands there."""
        one = self.action_statistics(unnorm_key)
        mode = one.get("normalisation", "QUANTILES")
        if mode == "MEAN_STD":
            return np.asarray(actions, dtype=np.float64) * np.array(one["std"]) + np.array(one["mean"])
        if mode == "MIN_MAX":
            return (np.asarray(actions, dtype=np.float64) + 1) / 2 * (np.array(one["max"]) - np.array(one["min"])) + np.array(one["min"])
        return np.asarray(actions, dtype=np.float64) if mode == "IDENTITY" else super().unnormalise(actions, unnorm_key)

    def attempt_chunks(self, batch: Batch, unnorm_key: Optional[str] = None, bos_in_prefix: bool = False) -> Tuple[np.ndarray, np.ndarray]:
        """(chunks [B, C, A] float64, bool [B]: which rows are malformed). A chunk is always chunk_size long; lerobot inverts the transform
        over n_action_steps, which is wrong where the two differ (modeling_pi0_fast.py:1244)."""
        ids_BT, _ = self.generate(batch, self.action_tokens(unnorm_key), bos_in_prefix=bos_in_prefix)
        chunks, problems = self.processor.read(ids_BT.cpu().numpy(), self.action_dim(unnorm_key))
        return self.unnormalise(chunks, unnorm_key), np.array([bool(problem) for problem in problems])


def row_means(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """Mean over rows of the mean cross entropy of each row's labelled tokens."""
    each_BT = F.cross_entropy(logits_BTV.flatten(0, 1), labels_BT.flatten(), ignore_index=IGNORE_INDEX,
                              reduction="none").view(labels_BT.shape)
    labelled_BT = labels_BT != IGNORE_INDEX
    return (each_BT.sum(1) / labelled_BT.sum(1).clamp(min=1)).mean()


__all__ = ["Pi0Fast", "Pi0FastBackbone", "Pi0FastPrefix", "allowed", "positions"]
