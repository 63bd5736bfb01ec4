"""Backbone: the one object that stages hold of a vision-language-action model, and the only thing rooms import from here.

Sequence layout (openvla prismatic/extern/hf/modeling_prismatic.py:383): [BOS][P image patches][rest of the text]; text token 0
sits at position 0, token j >= 1 at position P + j, and S = P + L.

Axes: B batch, L text tokens, P patches, S sequence, D hidden, V vocabulary, T generated tokens, A action dimensions.
"""

from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from vlakeep.data.sample import IGNORE_INDEX, Batch, Sample
from vlakeep.models.load import model_name
from vlakeep.openvla import format as checkpoint_format
from vlakeep.openvla.model import OpenVLA
from vlakeep.openvla.processor import Processor

LORA_PREFIX = "language_model.model."


class LossOutput(NamedTuple):
    """All tensors stay on the device; nothing is read by the host."""

    loss: torch.Tensor  # float32, mean cross entropy over labelled tokens
    num_labelled: torch.Tensor  # how many tokens that are
    correct: torch.Tensor  # how many of them the model would have chosen
    last_hidden_norm: torch.Tensor  # mean norm of the last layer's output before the final norm, over valid positions


class Prefix(NamedTuple):
    """Input of a decoder layer: hidden_BSD [B, S, D] and which positions are not padding, attention_mask_BS [B, S] bool."""

    hidden_BSD: torch.Tensor
    attention_mask_BS: torch.Tensor


class EarlyStop(ValueError):
    """The model ended its answer before all action dimensions were out; the official code returns garbage here."""


@contextmanager
def captured_outputs(decoder_layers, numbers):
    """Within the context, a dictionary fills with the raw output [B, S, D] of each numbered decoder layer."""
    outputs, handles = {}, []

    def keep(number):
        def hook(module, args, output):
            outputs[number] = (output[0] if isinstance(output, tuple) else output).detach()
        return hook

    try:
        for number in numbers:
            handles.append(decoder_layers[number].register_forward_hook(keep(number)))
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def sequence_mask(mask_BL: torch.Tensor, patches: int) -> torch.Tensor:
    """A mask over text positions, moved to the multimodal sequence [B, P + L]; patch positions are False."""
    inserted_BP = torch.zeros(len(mask_BL), patches, dtype=torch.bool, device=mask_BL.device)
    return torch.cat([mask_BL[:, :1], inserted_BP, mask_BL[:, 1:]], dim=1)


class Backbone(nn.Module):
    """An OpenVLA model with its processor, statistics and identity. `model` is an OpenVLA, or PEFT's wrapping of one."""

    def __init__(self, model: OpenVLA, processor: Processor, norm_stats: dict, checkpoint: Optional[Path] = None,
                 unnorm_key: Optional[str] = None):
        super().__init__()
        self.model = model
        self.processor, self.norm_stats, self.checkpoint, self.unnorm_key = processor, norm_stats, checkpoint, unnorm_key
        self.lora: Any = None  # what add_lora added: a LoraInfo
        self._weights_sha256: Optional[str] = None
        self._merged: List[str] = []

    # What it is

    @property
    def openvla(self) -> OpenVLA:
        """The OpenVLA inside, with or without adapters."""
        return self.model if isinstance(self.model, OpenVLA) else self.model.get_base_model()

    @property
    def config(self) -> dict:
        return self.openvla.config

    @property
    def name(self) -> str:
        return "+".join([model_name(self.checkpoint) if self.checkpoint else "unnamed", *self._merged])

    def merged(self, runs: List[str], weights_sha256: str) -> None:
        """Note that the weights are no longer those of the folder: adapters of these runs were merged in (models/chain.py)."""
        self._merged, self._weights_sha256 = [*self._merged, *runs], weights_sha256

    @property
    def weights_sha256(self) -> str:
        """Fingerprint of the base weights, as the checkpoint folder has them (format.weights_hash), computed once."""
        if self._weights_sha256 is None:
            self._weights_sha256 = checkpoint_format.weights_hash(self.checkpoint)
        return self._weights_sha256

    @property
    def language_model(self):
        return self.openvla.language_model

    @property
    def decoder_layers(self) -> nn.ModuleList:
        return self.language_model.model.layers

    @property
    def num_layers(self) -> int:
        return len(self.decoder_layers)

    @property
    def hidden_size(self) -> int:
        return self.language_model.config.hidden_size

    @property
    def num_patches(self) -> int:
        return self.openvla.num_patches

    @property
    def device(self) -> torch.device:
        return self.language_model.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.language_model.model.embed_tokens.weight.dtype

    def adapted_linears(self) -> Dict[str, nn.Module]:
        """PEFT's layer of every adapted linear of the LLM, named like `layers.3.self_attn.q_proj`; empty without adapters."""
        names = self.lora.targets if self.lora else []
        return {name[len(LORA_PREFIX):]: self.openvla.get_submodule(name) for name in names if name.startswith(LORA_PREFIX)}

    def first_adapted_layer(self) -> int:
        """Number of the lowest decoder layer with an adapter; num_layers when there is none."""
        numbers = [int(name.split(".")[1]) for name in self.adapted_linears() if name.startswith("layers.")]
        return min(numbers, default=self.num_layers)

    # Positions

    def text_index(self, length: int) -> torch.Tensor:
        """Sequence positions [L] of the text tokens."""
        index_L = torch.arange(length, device=self.device)
        return index_L + self.num_patches * (index_L > 0)

    def to_text_positions(self, x_BSD: torch.Tensor, batch: Batch) -> torch.Tensor:
        """[B, S, ...] -> [B, L, ...]: what stands at the text tokens."""
        return x_BSD[:, self.text_index(batch.input_ids.shape[1])]

    # Forward

    def embed(self, batch: Batch) -> Prefix:
        """Input of layer 0, from a batch on any device."""
        batch = batch.to(self.device)
        hidden_BSD = self.openvla.embed(batch.input_ids, batch.pixel_values)
        mask_BL = batch.attention_mask.bool()
        patches = hidden_BSD.shape[1] - mask_BL.shape[1]
        mask_BS = torch.cat([mask_BL[:, :1], mask_BL.new_ones(len(mask_BL), patches), mask_BL[:, 1:]], dim=1)
        return Prefix(hidden_BSD, mask_BS)

    def run_layers(self, prefix: Prefix, start: int = 0, stop: Optional[int] = None) -> torch.Tensor:
        """Decoder layers start .. stop-1 on a prefix, [B, S, D]; the final RMSNorm is applied iff stop is None.

        Values at padding positions mean nothing. Raises ValueError for a range outside the model.
        """
        end = self.num_layers if stop is None else stop
        if not 0 <= start <= end <= self.num_layers:
            raise ValueError(f"layers {start} to {end} were asked for; the model has layers 0 to {self.num_layers - 1}")
        hidden_BSD, mask_BS = prefix
        mask = self.openvla.causal_mask(mask_BS, hidden_BSD.dtype)
        hidden_BSD = self.openvla.run_layers(hidden_BSD, mask, self._positions(hidden_BSD), start, end)
        return self.openvla.norm(hidden_BSD) if stop is None else hidden_BSD

    def _positions(self, hidden_BSD: torch.Tensor) -> torch.Tensor:
        return torch.arange(hidden_BSD.shape[1], device=hidden_BSD.device)[None]

    def hidden_states(self, batch: Batch) -> List[torch.Tensor]:
        """num_layers + 1 tensors [B, S, D] with the official meaning: [0] the embeddings, [i + 1] the output of layer i, and the
        last one after the final RMSNorm. Padding is masked as the official model does it, so that its positions agree too."""
        prefix = self.embed(batch)
        states: List[torch.Tensor] = []
        mask = self.openvla.attention_bias(prefix.attention_mask_BS, prefix.hidden_BSD.shape[1], prefix.hidden_BSD.dtype)
        last_BSD = self.openvla.run_layers(prefix.hidden_BSD, mask, self._positions(prefix.hidden_BSD), each=states.append)
        return states + [self.openvla.norm(last_BSD)]

    def logits(self, hidden_normed: torch.Tensor) -> torch.Tensor:
        """lm_head on normed hidden states [..., D] -> float32 [..., V]."""
        return self.openvla.logits(hidden_normed)

    def forward(self, batch: Batch) -> LossOutput:
        """Next-token loss of a batch with labels, as LlamaForCausalLM takes it (shifted, mean over labelled tokens).

        Logits are made from the first labelled column of the batch on, which the host knows since collation; choosing exactly the
        labelled positions would have the host wait for the device.
        """
        batch = batch.to(self.device)
        prefix = self.embed(batch)
        last_BSD = self.run_layers(prefix, stop=self.num_layers)
        length, first = batch.input_ids.shape[1], batch.first_label
        patches = last_BSD.shape[1] - length
        # Text token j >= 1 is predicted one position before its own, at P + j - 1.
        logits_BLV = self.logits(self.openvla.norm(last_BSD[:, patches + first - 1:patches + length - 1]))
        labels_BL = batch.labels[:, first:]
        loss = F.cross_entropy(logits_BLV.flatten(0, 1), labels_BL.flatten(), ignore_index=IGNORE_INDEX)
        with torch.no_grad():
            labelled_BL = labels_BL != IGNORE_INDEX
            correct = ((logits_BLV.argmax(-1) == labels_BL) & labelled_BL).sum()
            norm_BS = last_BSD.detach().float().norm(dim=-1)
            weight_BS = prefix.attention_mask_BS.float()
            mean_norm = (norm_BS * weight_BS).sum() / weight_BS.sum()
        return LossOutput(loss, labelled_BL.sum(), correct, mean_norm)

    # Generation

    @torch.no_grad()
    def generate(self, batch: Batch, max_new_tokens: int, stop_at_eos: bool = True) -> Tuple[torch.Tensor, torch.Tensor]:
        """Greedy continuation of right-padded prompts of any lengths: ids [B, T] int64, and [B] bool, whether EOS came.

        The same ids as one prompt at a time. With stop_at_eos a row holds the pad id after its EOS; without it rows go on.
        """
        from transformers import DynamicCache

        prefix = self.embed(batch)
        eos, pad = self.processor.tokenizer.eos_token_id, self.processor.pad_token_id
        rows = len(prefix.hidden_BSD)
        length_B = prefix.attention_mask_BS.sum(1)
        openvla, cache = self.openvla, DynamicCache()
        hidden_BSD = openvla.run_layers(prefix.hidden_BSD, openvla.causal_mask(prefix.attention_mask_BS, prefix.hidden_BSD.dtype),
                                        self._positions(prefix.hidden_BSD), cache=cache)
        last_B1D = hidden_BSD[torch.arange(rows, device=self.device), length_B - 1][:, None]
        valid_BK = prefix.attention_mask_BS
        ended_B = torch.zeros(rows, dtype=torch.bool, device=self.device)
        chosen = []
        for step in range(max_new_tokens):
            next_B = self.logits(openvla.norm(last_B1D[:, 0])).argmax(-1)
            if stop_at_eos:
                next_B = torch.where(ended_B, torch.full_like(next_B, pad), next_B)
            chosen.append(next_B)
            ended_B = ended_B | (next_B == eos)
            if step + 1 == max_new_tokens:
                break
            # New tokens stand behind the padding in the cache, but carry the position that follows their own prompt.
            valid_BK = torch.cat([valid_BK, valid_BK.new_ones(rows, 1)], dim=1)
            hidden_B1D = openvla.language_model.model.embed_tokens(next_B[:, None])
            mask = openvla.attention_bias(valid_BK, 1, hidden_B1D.dtype)
            last_B1D = openvla.run_layers(hidden_B1D, mask, (length_B + step)[:, None], cache=cache)
        return torch.stack(chosen, dim=1), ended_B

    @torch.no_grad()
    def log_probabilities_of_continuation(self, batch: Batch, tokens_BT: torch.Tensor) -> torch.Tensor:
        """Log-probabilities [B, T, V] at the positions that predict `tokens_BT` after the prompts, these tokens being fed."""
        batch, tokens_BT = batch.to(self.device), tokens_BT.to(self.device)
        rows, count = tokens_BT.shape
        length_B1 = batch.attention_mask.sum(1, keepdim=True)
        columns_BT = length_B1 + torch.arange(count, device=self.device)
        ids_BL = F.pad(batch.input_ids, (0, count), value=self.processor.pad_token_id).scatter(1, columns_BT, tokens_BT)
        mask_BL = torch.arange(ids_BL.shape[1], device=self.device) < length_B1 + count
        whole = Batch(
            ids_BL, mask_BL, torch.full_like(ids_BL, IGNORE_INDEX), batch.pixel_values, batch.dataset_names, first_label=1
        )
        hidden_BSD = self.run_layers(self.embed(whole))
        patches = hidden_BSD.shape[1] - ids_BL.shape[1]
        row_B1 = torch.arange(rows, device=self.device)[:, None]
        return torch.log_softmax(self.logits(hidden_BSD[row_B1, patches + columns_BT - 1]), dim=-1)

    def action_dim(self, unnorm_key: Optional[str] = None) -> int:
        return len(self.action_statistics(unnorm_key)["q01"])

    def action_key(self, unnorm_key: Optional[str] = None) -> str:
        """Name of the data set whose actions the model speaks: the given one, its own, or the only one. Raises ValueError listing the
        keys there are."""
        key = unnorm_key or self.unnorm_key
        known = ", ".join(self.norm_stats) or "none"
        if key is None:
            if len(self.norm_stats) != 1:
                raise ValueError(f"{self.name} has action statistics of {known}: choose one with --backbone.unnorm_key")
            key = next(iter(self.norm_stats))
        if key not in self.norm_stats:
            raise ValueError(
                f"{self.name} has no action statistics of {key!r} (it has {known}): give one of these with --backbone.unnorm_key"
            )
        return key

    def action_statistics(self, unnorm_key: Optional[str] = None) -> dict:
        """q01, q99 and mask of the data set whose actions the model speaks. Raises ValueError listing the keys there are."""
        return self.norm_stats[self.action_key(unnorm_key)]["action"]

    def unnormalise(self, actions_BA: np.ndarray, unnorm_key: Optional[str] = None) -> np.ndarray:
        """[-1, 1] to the data set's units, float64: 0.5 (x + 1) (q99 - q01) + q01 where the mask is true, else unchanged."""
        statistics = self.action_statistics(unnorm_key)
        low, high = np.array(statistics["q01"]), np.array(statistics["q99"])
        mask = np.array(statistics.get("mask", np.ones_like(low, dtype=bool)))
        return np.where(mask, 0.5 * (actions_BA + 1) * (high - low) + low, actions_BA)

    def predict_actions(self, images, instructions: List[str], unnorm_key: Optional[str] = None) -> np.ndarray:
        """Actions [B, A] float64 for uint8 images [B, H, W, 3] (or a list) and instructions. EarlyStop when a row ends early."""
        from vlakeep.data.prompts import encode_prompts

        samples = [Sample(image, text) for image, text in zip(images, instructions)]
        return self.predict_batch(encode_prompts(samples, self.processor), unnorm_key)

    def predict_batch(self, batch: Batch, unnorm_key: Optional[str] = None) -> np.ndarray:
        """predict_actions on encoded action prompts."""
        actions_BA, early_B = self.attempt_batch(batch, unnorm_key)
        if early_B.any():
            raise EarlyStop(f"row {int(np.flatnonzero(early_B)[0])} ended before all {actions_BA.shape[1]} action tokens were out: the "
                            "model does not speak actions for this prompt; fine-tune it on action data first")
        return actions_BA

    def attempt_batch(self, batch: Batch, unnorm_key: Optional[str] = None) -> Tuple[np.ndarray, np.ndarray]:
        """(actions [B, A] float64, bool [B]: which rows ended early) for encoded action prompts, as the official predict_action.

        That takes the last A tokens of prompt and answer together, whatever they are: the action of a row that ends early is made
        of the prompt's tail, what was said, and the end token.
        """
        size = self.action_dim(unnorm_key)
        ids_BA, _ = self.generate(batch, size, stop_at_eos=True)
        ids_BA, prompts_BL = ids_BA.cpu().numpy(), batch.input_ids.cpu().numpy()
        end_BA = ids_BA == self.processor.tokenizer.eos_token_id
        for row in np.flatnonzero(end_BA.any(1)):
            prompt = prompts_BL[row, :int(batch.attention_mask[row].sum())]
            ids_BA[row] = np.r_[prompt, ids_BA[row, :end_BA[row].argmax() + 1]][-size:]
        actions_BA = self.processor.action_tokenizer.decode(ids_BA)
        return self.unnormalise(actions_BA, unnorm_key), end_BA.any(1)
