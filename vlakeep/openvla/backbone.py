"""OpenVLA as a Backbone.

Sequence layout (openvla prismatic/extern/hf/modeling_prismatic.py:383): [BOS][P image patches][rest of the text]; text token 0
sits at position 0, token j >= 1 at position P + j, and S = P + L.

Axes: B batch, L text tokens, P patches, S sequence, D hidden, V vocabulary, T generated tokens, A action dimensions.
"""

from pathlib import Path
from typing import Dict, List, Optional, Tuple

import numpy as np
import torch
from torch import nn

from vlakeep.core.errors import CheckpointError
from vlakeep.data.sample import Batch, SampleSpec
from vlakeep.models.base import Backbone, Prefix
from vlakeep.models.lean import too_old
from vlakeep.models.load import DTYPES
from vlakeep.models.outputs import LossOutput, loss_output
from vlakeep.models.workload import Workload
from vlakeep.openvla import format as checkpoint_format
from vlakeep.openvla.model import OpenVLA
from vlakeep.openvla.processor import Processor
from vlakeep.openvla.workload import PUBLISHED, workload


class OpenVLABackbone(Backbone):
    """An OpenVLA model with its processor, statistics and identity. `model` is an OpenVLA, or PEFT's wrapping of one."""

    decoder_prefix = "language_model.model."
    linears = {"q_proj": "self_attn.q_proj", "k_proj": "self_attn.k_proj", "v_proj": "self_attn.v_proj", "o_proj": "self_attn.o_proj",
               "gate_proj": "mlp.gate_proj", "up_proj": "mlp.up_proj", "down_proj": "mlp.down_proj"}
    groups = {"attention": ["q_proj", "k_proj", "v_proj", "o_proj"], "mlp": ["gate_proj", "up_proj", "down_proj"]}
    shared_inputs = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
    stand_in = "as in the official code, the end of the prompt stood in for what was missing"
    answer_tokens = 8  # seven action tokens and the end of sequence
    waits_for_nothing = True
    processor_files = (("tokenizer.json", "tokenizer.model"), ("tokenizer_config.json",), ("preprocessor_config.json",))

    # Before the weights

    @classmethod
    def read_config(cls, folder: Path) -> dict:
        return checkpoint_format.read_config(folder)

    @classmethod
    def sizes(cls, config: dict) -> Tuple[int, int]:
        """text_config holds only what differs from Llama's defaults (32 and 4096)."""
        text = config.get("text_config") or {}
        return int(text.get("num_hidden_layers", 32)), int(text.get("hidden_size", 4096))

    @classmethod
    def read_spec(cls, config: dict) -> SampleSpec:
        return Processor.spec

    @classmethod
    def linear_shapes(cls, config: dict) -> Dict[str, Tuple[int, int]]:
        text = config.get("text_config") or {}
        _, width = cls.sizes(config)
        mlp, heads = int(text.get("intermediate_size", 11008)), int(text.get("num_attention_heads", 32))
        head = int(text.get("head_dim") or width // heads)
        queries, keys = heads * head, int(text.get("num_key_value_heads") or heads) * head
        return {"q_proj": (width, queries), "k_proj": (width, keys), "v_proj": (width, keys), "o_proj": (queries, width),
                "gate_proj": (width, mlp), "up_proj": (width, mlp), "down_proj": (mlp, width)}

    @classmethod
    def published(cls, name: str, settings) -> Optional[dict]:
        return PUBLISHED.get(name)

    @classmethod
    def workload(cls, config: dict, shapes=None) -> Workload:
        return workload(cls, config, shapes)

    # Folders

    @classmethod
    def read_processor(cls, settings, folder: Path) -> Processor:
        return Processor.from_folder(folder)

    @classmethod
    def load(cls, settings, folder: Path, device) -> Backbone:
        """In our own code; load.py has the other way."""
        model, config = checkpoint_format.load_checkpoint(folder, DTYPES[settings.dtype], settings.attn_implementation)
        model.gradient_checkpointing = settings.gradient_checkpointing
        processor = Processor.from_folder(folder)
        if processor.action_tokenizer.vocab_size != config["text_config"]["vocab_size"] - config["pad_to_multiple_of"]:
            raise CheckpointError(
                f"the tokenizer in {folder} has {processor.action_tokenizer.vocab_size} tokens, its model "
                f"{config['text_config']['vocab_size']} - {config['pad_to_multiple_of']}: they are not of one checkpoint")
        return cls(model, processor, cls.read_statistics(folder, config), folder, settings.unnorm_key).to(device).eval()

    def write(self, folder: Path, state: Dict[str, torch.Tensor], dtype: Optional[torch.dtype] = None) -> None:
        checkpoint_format.write_checkpoint(folder, state, self.config, self.norm_stats, dtype)
        self.processor.save(folder)

    @classmethod
    def complete_merged(cls, base: Path, out: Path, statistics: dict, dtype: torch.dtype) -> None:
        config = checkpoint_format.read_config(base)
        config.pop("auto_map", None)  # it would make the official code look for Python files that are not there; classes are registered
        checkpoint_format.write_sidecars(out, dict(config, torch_dtype=str(dtype).replace("torch.", "")), statistics)
        Processor.from_folder(base).save(out)

    # Identity

    @property
    def openvla(self) -> OpenVLA:
        """The OpenVLA inside, with or without adapters."""
        return self.model if isinstance(self.model, OpenVLA) else self.model.get_base_model()

    @property
    def network(self) -> OpenVLA:
        return self.openvla

    @property
    def config(self) -> dict:
        return self.openvla.config

    @property
    def language_model(self):
        return self.openvla.language_model

    @property
    def decoder_layers(self) -> nn.ModuleList:
        return self.language_model.model.layers

    def vision_blocks(self) -> List[nn.Module]:
        return [block for vit in self.openvla.vision_backbone.children() for block in vit.blocks[:-1]]  # the last one is not run

    @classmethod
    def compile_problem(cls) -> str:
        """Its decoder layers are those of transformers."""
        version = too_old("transformers", 5)
        return super().compile_problem() or (
            f"decoder layers of transformers {version} are not compiled without breaks of the graph, which costs the time that is to be "
            "gained: they need 5 or newer" if version else "")

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

    # Layout

    def text_columns(self, prefix: Prefix, length: int) -> torch.Tensor:
        index_L = torch.arange(length, device=prefix.hidden_BSD.device)
        return index_L + self.num_patches * (index_L > 0)

    # Forward

    def embed(self, batch: Batch) -> Prefix:
        batch = batch.to(self.device)
        hidden_BSD = self.openvla.embed(batch.input_ids, batch.pixel_values)
        mask_BL = batch.attention_mask.bool()
        patches = hidden_BSD.shape[1] - mask_BL.shape[1]
        mask_BS = torch.cat([mask_BL[:, :1], mask_BL.new_ones(len(mask_BL), patches), mask_BL[:, 1:]], dim=1)
        return Prefix(hidden_BSD, mask_BS)

    def run_layers(self, prefix: Prefix, start: int = 0, stop: Optional[int] = None) -> torch.Tensor:
        end = self.num_layers if stop is None else stop
        if not 0 <= start <= end <= self.num_layers:
            raise ValueError(f"layers {start} to {end} were asked for; the model has layers 0 to {self.num_layers - 1}")
        hidden_BSD, mask_BS = prefix.hidden_BSD, prefix.attention_mask_BS
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

    def norm(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.openvla.norm(hidden)

    def logits(self, hidden_normed: torch.Tensor) -> torch.Tensor:
        return self.openvla.logits(hidden_normed)

    def loss(self, batch: Batch) -> LossOutput:
        """Next-token loss of a batch with labels, as LlamaForCausalLM takes it (shifted, mean over labelled tokens).

        Logits are made from the first labelled column of the batch on, which the host knows since collation; choosing exactly the
        labelled positions would have the host wait for the device.
        """
        batch = batch.to(self.device)
        prefix = self.embed(batch)
        return self.loss_of(batch, prefix, self.run_layers(prefix, stop=self.num_layers))

    def loss_of(self, batch: Batch, prefix: Prefix, last_BSD: torch.Tensor) -> LossOutput:
        """`loss` from what the last layer gave, before the final norm."""
        length, first = batch.input_ids.shape[1], batch.first_label
        patches = last_BSD.shape[1] - length
        # Text token j >= 1 is predicted one position before its own, at P + j - 1.
        logits_BLV = self.logits(self.openvla.norm(last_BSD[:, patches + first - 1:patches + length - 1]))
        return loss_output(logits_BLV, batch.labels[:, first:], last_BSD, prefix.attention_mask_BS)

    # Text alone

    def read_text(self, ids_BL: torch.Tensor, places_BL: torch.Tensor, sees_BLL: torch.Tensor) -> torch.Tensor:
        """As Entrance.read_text. The patches are left out, not made blank: what remains is a prompt of Llama, the official forward without
        pixel_values. The official tokenizer puts BOS before it."""
        openvla = self.openvla
        hidden_BLD = openvla.embed(ids_BL, None)
        return openvla.norm(openvla.run_layers(hidden_BLD, openvla.given_mask(sees_BLL[:, None], hidden_BLD.dtype), places_BL))

    # Generation

    @torch.no_grad()
    def generate(self, batch: Batch, max_new_tokens: int, stop_at_eos: bool = True) -> Tuple[torch.Tensor, torch.Tensor]:
        """As Backbone.generate, with a cache of keys and values."""
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

    def attempt_chunks(self, batch: Batch, unnorm_key: Optional[str] = None) -> Tuple[np.ndarray, np.ndarray]:
        """(actions [B, 1, A] float64, bool [B]: which rows ended early) for encoded action prompts, as the official predict_action.

        That takes the last A tokens of prompt and answer together, whatever they are: the action of a row that ends early is made
        of the prompt's tail, what was said, and the end token.
        """
        size = self.action_tokens(unnorm_key)
        ids_BA, _ = (self.answering or self.generate)(batch, size, stop_at_eos=True)
        ids_BA, prompts_BL = ids_BA.cpu().numpy(), batch.input_ids.cpu().numpy()
        end_BA = ids_BA == self.processor.tokenizer.eos_token_id
        for row in np.flatnonzero(end_BA.any(1)):
            prompt = prompts_BL[row, :int(batch.attention_mask[row].sum())]
            ids_BA[row] = np.r_[prompt, ids_BA[row, :end_BA[row].argmax() + 1]][-size:]
        return self.unnormalise(self.processor.decode_actions(ids_BA), unnorm_key), end_BA.any(1)
