"""What a model is: everything that stages, teacher, methods and benchmarks ask of one. A kind of model is a subclass of Backbone.

    before the weights   read_config, sizes, linear_shapes, read_statistics, read_spec, leaf_names, published, workload: what preflight and
                         plan ask of a folder
    identity             name, weights_sha256, merged, network, decoder_layers, num_layers, hidden_size, device, dtype
    adapters             adapted_linears, linear_names, input_key
    layout               embed -> Prefix, text_columns, sequence_mask
    forward              run_layers, norm, logits, loss
    answers              read_text (Entrance), generate, log_probabilities_of_continuation, attempt_chunks, attempt_batch, predict_actions
    actions              action_key, action_statistics, action_tokens, unnormalise
    folders              load, write, complete_merged

Prompts, pictures and action tokens are its processor's (data/processor.py). What has an answer here is right for every model with text
tokens; openvla/backbone.py overrides what it does faster, or as the official code does it.

Axes: B batch, L text tokens, S sequence, D hidden, V vocabulary, T generated tokens, C actions of a chunk, A action dimensions.
"""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from vlakeep.core.base_models import model_name
from vlakeep.core.errors import CheckpointError
from vlakeep.data.processor import BaseProcessor
from vlakeep.data.sample import Batch, Sample, SampleSpec
from vlakeep.data.statistics import unnormalise
from vlakeep.models import files
from vlakeep.models.entrance import Entrance
from vlakeep.models.lean import compile_layers, compile_problem
from vlakeep.models.outputs import LossOutput, loss_output
from vlakeep.models.prefix import Prefix
from vlakeep.models.quantised import identity
from vlakeep.models.sharded_base import Averaged, shard
from vlakeep.models.workload import Workload


class EarlyStop(ValueError):
    """The model ended its answer before all action dimensions were out; the official code returns garbage here."""


class Backbone(Entrance, ABC):
    """A model with its processor, action statistics and identity. `model` is its network, or PEFT's wrapping of it.

    What computes with the weights is asked from anywhere and runs inside a call of the module (entrance.py).
    """

    # Of the decoder's linears, which are what methods adapt and measure.
    decoder_prefix = ""  # of their names inside the network, up to "layers."
    linears: Dict[str, str] = {}  # last part of a linear's name -> where it lies in a decoder layer, in the model's order
    groups: Dict[str, List[str]] = {}  # what --lora.modules may name besides single linears
    shared_inputs: Dict[str, str] = {}  # linear -> an earlier one that reads the same tensor
    answer_tokens = 8  # longest answer of the teacher to a prompt of the probe
    stand_in = "what was missing has no meaning"  # of an action's answer that ended early, for the alarm
    sharded = False  # whether the processes of a job share the base's weights
    quantisation = "none"  # of the decoder's linears (models/quantised.py)
    processor_files: Tuple[Tuple[str, ...], ...] = ()  # names of files beside the weights, one of each group must be there
    # Whether a prompt's columns see later ones of the prompt: what they would say next means nothing then, and is not read.
    prompt_sees_itself = False
    waits_for_nothing = False  # whether `generate` leaves every decision to the device, so that it can be a CUDA graph (graphs.py)
    answering: Optional[Callable] = None  # `generate` of action prompts within graphs.recorded

    def __init__(self, model: nn.Module, processor: BaseProcessor, norm_stats: dict, checkpoint: Optional[Path] = None,
                 unnorm_key: Optional[str] = None):
        """model: the network. norm_stats: statistics by the data sets' names, as dataset_statistics.json holds them."""
        super().__init__()
        self.model = model
        self.processor: Any = processor
        self.norm_stats, self.checkpoint, self.unnorm_key = norm_stats, checkpoint, unnorm_key
        self.lora: Any = None  # what add_lora added: a LoraInfo
        self._weights_sha256: Optional[str] = None
        self._first_sha256: Optional[str] = None
        self._merged: List[str] = []  # runs whose adapters were merged into the weights

    # Before the weights

    @classmethod
    @abstractmethod
    def read_config(cls, folder: Path) -> dict:
        """config.json, validated. FileNotFoundError or CheckpointError with the remedy."""

    @classmethod
    @abstractmethod
    def sizes(cls, config: dict) -> Tuple[int, int]:
        """(decoder layers, hidden size) after a config.json, which may lack what has a default."""

    @classmethod
    @abstractmethod
    def linear_shapes(cls, config: dict) -> Dict[str, Tuple[int, int]]:
        """(inputs, outputs) of every one of `linears`, after a config.json."""

    @classmethod
    def published(cls, name: str, settings) -> Optional[dict]:
        """config.json of a well-known checkpoint that may not be there yet, with what the backbone section changes in it; None when this
        kind has none of that name."""
        return None

    @classmethod
    def workload(cls, config: dict, shapes: Optional[Dict[str, Tuple[int, ...]]] = None) -> Workload:
        """What `vlakeep plan` reckons with, from config.json and the tensors' shapes (None: of a checkpoint that is not there)."""
        raise ValueError(f"`vlakeep plan` does not know the shapes of {cls.__name__}: the model's class has no `workload`")

    @classmethod
    def read_statistics(cls, folder: Path, config: dict) -> dict:
        """norm_stats of a folder."""
        return files.read_statistics(folder, config)

    @classmethod
    def tensor_name(cls, stored: str) -> str:
        """The network's name of a tensor of a checkpoint file."""
        return stored

    @classmethod
    def whole_config(cls, folder: Path, config: dict, settings) -> dict:
        """A config.json with what else decides sizes and samples: other files of the folder, the backbone section. CheckpointError or
        ValueError when these do not fit."""
        return config

    @classmethod
    def read_spec(cls, config: dict) -> Optional[SampleSpec]:
        """The spec of the processor, after a config.json; None where that does not tell."""
        return None

    @classmethod
    def leaf_names(cls, modules: List[str]) -> List[str]:
        """The linears that --lora.modules names, such as q_proj, in the model's order, each once. ValueError for unknown ones, or none."""
        leaves = [leaf for module in modules for leaf in cls.groups.get(module, [module])]
        unknown = [leaf for leaf in leaves if leaf not in cls.linears]
        if unknown or not leaves:
            raise ValueError(f"--lora.modules {unknown or modules}: must be among {', '.join([*cls.groups, *cls.linears])}")
        return [leaf for leaf in cls.linears if leaf in leaves]

    # Folders

    @classmethod
    def read_processor(cls, settings, folder: Path) -> BaseProcessor:
        """The processor of a checkpoint folder, without its weights; `settings` as for `load`. `vlakeep audit-probe` asks for it."""
        raise CheckpointError(f"{folder}: {cls.__name__} reads no processor without its weights; give it a read_processor")

    @classmethod
    @abstractmethod
    def load(cls, settings, folder: Path, device) -> "Backbone":
        """The model of a checkpoint folder, in evaluation mode on `device`; `settings` is the backbone section of a configuration.
        CheckpointError for what is not whole."""

    @abstractmethod
    def write(self, folder: Path, state: Dict[str, torch.Tensor], dtype: Optional[torch.dtype] = None) -> None:
        """A folder that `load` reads, with these weights in this type (None: as they are)."""

    @classmethod
    @abstractmethod
    def complete_merged(cls, base: Path, out: Path, statistics: dict, dtype: torch.dtype) -> None:
        """Beside merged weights of type `dtype` in `out`: what else `load` reads, after the folder `base` and with these statistics."""

    @classmethod
    def record_settings(cls, folder: Path, settings) -> None:
        """Write into a merged folder what the backbone section of a configuration said and its files can hold, so that it loads alike."""

    def recorded(self) -> Dict[str, Any]:
        """What decides the model's numbers besides weights and types; artefacts record it, and are refused where it differs."""
        return {}

    # Identity

    @property
    def network(self) -> nn.Module:
        """The network inside, with or without adapters; its state dict has the names of the checkpoint's tensors."""
        return self.model if self.lora is None else self.model.get_base_model()

    @property
    def name(self) -> str:
        return "+".join([model_name(self.checkpoint) if self.checkpoint else "unnamed", *self._merged])

    def merged(self, runs: List[str], weights_sha256: str, first_sha256: str) -> None:
        """Note that the weights are no longer those of the folder, which have first_sha256: adapters of these runs were merged in
        (models/chain.py)."""
        self._merged, self._weights_sha256, self._first_sha256 = [*self._merged, *runs], weights_sha256, first_sha256

    @property
    def first_weights_sha256(self) -> str:
        """weights_sha256 before any run was merged in."""
        return self._first_sha256 or self.weights_sha256

    @property
    def weights_sha256(self) -> str:
        """Fingerprint of the base weights, as the folder has them (files.weights_hash) and as they are quantised, computed once."""
        if self._weights_sha256 is None:
            self._weights_sha256 = identity(files.weights_hash(self.checkpoint), self.quantisation)
        return self._weights_sha256

    @property
    @abstractmethod
    def decoder_layers(self) -> nn.ModuleList:
        """The layers that run_layers counts; each gives [B, S, D], or a tuple that begins with it."""

    @property
    def num_layers(self) -> int:
        return len(self.decoder_layers)

    @property
    @abstractmethod
    def hidden_size(self) -> int:
        """D."""

    @property
    def device(self) -> torch.device:
        return next(self.decoder_layers.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the base weights."""
        return next(self.decoder_layers.parameters()).dtype

    def vision_blocks(self) -> List[nn.Module]:
        """Alike blocks of the vision towers, which --train.compile compiles beside the decoder layers."""
        return []

    @classmethod
    def compile_problem(cls) -> str:
        """Why --train.compile is refused for this kind of model with these libraries; "" where it is not."""
        return compile_problem()

    @classmethod
    def refuse_compiling(cls) -> None:
        """ValueError with compile_problem."""
        if problem := cls.compile_problem():
            raise ValueError(f"--train.compile: {problem}; use --train.compile false, which trains alike at the usual speed")

    def compile_layers(self, **options) -> None:
        """Compile decoder layers and vision blocks in place (models/lean.py). ValueError as refuse_compiling."""
        self.refuse_compiling()
        compile_layers(self.decoder_layers, self.vision_blocks(), **options)

    def parallelised(self, distributed) -> Any:
        """What the training loop calls in place of this: in DistributedDataParallel, or itself in a single process.

        Of sharded weights the gradients of adapters are averaged; all others come through its call (entrance.py), and core/sharded.py
        makes its state whole.
        """
        return Averaged(self, distributed) if self.sharded else distributed.wrap(self)

    def shard(self, distributed) -> None:
        """Spread the base, which lies on the CPU, over the processes of a job; adapters stay whole (models/sharded_base.py)."""
        shard(self, distributed)
        self.sharded = True

    # Adapters

    def linear_names(self, layers: Sequence[int], modules: List[str]) -> List[str]:
        """Full names inside the network of these linears of these layers."""
        leaves = self.leaf_names(modules)
        return [f"{self.decoder_prefix}layers.{number}.{self.linears[leaf]}" for number in layers for leaf in leaves]

    def adapted_linears(self) -> Dict[str, nn.Module]:
        """PEFT's layer of every adapted linear of the decoder, named like `layers.3.self_attn.q_proj`; empty without adapters."""
        names = self.lora.targets if self.lora else []
        prefix = self.decoder_prefix
        return {name[len(prefix):]: self.network.get_submodule(name) for name in names if name.startswith(prefix + "layers.")}

    def first_adapted_layer(self) -> int:
        """Number of the lowest decoder layer with an adapter; num_layers when there is none."""
        return min((int(name.split(".")[1]) for name in self.adapted_linears()), default=self.num_layers)

    @classmethod
    def input_key(cls, linear_name: str) -> str:
        """The first linear that reads the same input, e.g. layers.3.self_attn.v_proj -> layers.3.self_attn.q_proj."""
        parent, _, leaf = linear_name.rpartition(".")
        return f"{parent}.{cls.shared_inputs.get(leaf, leaf)}"

    @classmethod
    def is_decoder_linear(cls, name: str) -> bool:
        """Whether a module of the network, such as language_model.model.layers.3.self_attn.q_proj, is one of the decoder's `linears`."""
        parts = name[len(cls.decoder_prefix):].split(".", 2) if name.startswith(cls.decoder_prefix + "layers.") else []
        return len(parts) == 3 and parts[2] in cls.linears.values()

    # Layout

    @abstractmethod
    def embed(self, batch: Batch) -> Prefix:
        """Input of layer 0, from a batch on any device."""

    @abstractmethod
    def text_columns(self, prefix: Prefix, length: int) -> torch.Tensor:
        """Columns of the sequence where the text tokens 0 to length - 1 of a batch stand, [L], or [B, L] where rows differ. Token j >= 1 is
        predicted one column before its own."""

    def sequence_mask(self, prefix: Prefix, mask_BL: torch.Tensor) -> torch.Tensor:
        """A mask over text positions, moved to the sequence [B, S]; pictures and state are False."""
        columns_BL = self.text_columns(prefix, mask_BL.shape[1]).expand(mask_BL.shape)
        mask_BS = torch.zeros(prefix.attention_mask_BS.shape, dtype=torch.bool, device=columns_BL.device)
        return mask_BS.scatter_(1, columns_BL, mask_BL.to(columns_BL.device))

    # Forward

    @abstractmethod
    def run_layers(self, prefix: Prefix, start: int = 0, stop: Optional[int] = None) -> torch.Tensor:
        """Decoder layers start .. stop-1 on a prefix, [B, S, D]; the final norm is applied iff stop is None.

        Values at padding positions mean nothing. Raises ValueError for a range outside the model.
        """

    @abstractmethod
    def norm(self, hidden: torch.Tensor) -> torch.Tensor:
        """The final norm of the last layer's output [..., D]."""

    @abstractmethod
    def logits(self, hidden_normed: torch.Tensor) -> torch.Tensor:
        """Of normed hidden states [..., D], float32 [..., V]."""

    def loss(self, batch: Batch) -> LossOutput:
        """Next-token loss of a batch with labels, the mean over labelled tokens."""
        batch = batch.to(self.device)
        prefix = self.embed(batch)
        last_BSD = self.run_layers(prefix, stop=self.num_layers)
        labels_BL = batch.labels[:, batch.first_label:]
        columns_BL = self.text_columns(prefix, batch.input_ids.shape[1])[..., batch.first_label:].expand(labels_BL.shape) - 1
        row_B1 = torch.arange(len(labels_BL), device=self.device)[:, None]
        logits_BLV = self.logits(self.norm(last_BSD[row_B1, columns_BL]))
        return loss_output(logits_BLV, labels_BL, last_BSD, prefix.attention_mask_BS)

    # Answers

    def continued(self, batch: Batch, tokens_BT: torch.Tensor) -> Batch:
        """The prompts of a batch with tokens behind each of them, without labels."""
        length_B1 = batch.attention_mask.sum(1, keepdim=True)
        count = tokens_BT.shape[1]
        columns_BT = length_B1 + torch.arange(count, device=tokens_BT.device)
        ids_BL = F.pad(batch.input_ids, (0, count), value=self.processor.pad_token_id).scatter(1, columns_BT, tokens_BT)
        return batch.with_text(ids_BL, torch.arange(ids_BL.shape[1], device=ids_BL.device) < length_B1 + count)

    @torch.no_grad()
    def log_probabilities_of_continuation(self, batch: Batch, tokens_BT: torch.Tensor) -> torch.Tensor:
        """Log-probabilities [B, T, V] at the positions that predict `tokens_BT` after the prompts, these tokens being fed."""
        batch, tokens_BT = batch.to(self.device), tokens_BT.to(self.device)
        prefix = self.embed(self.continued(batch, tokens_BT))
        hidden_BSD = self.run_layers(prefix)
        first_B1 = batch.attention_mask.sum(1, keepdim=True)
        columns_BT = first_B1 + torch.arange(tokens_BT.shape[1], device=self.device)
        length = batch.input_ids.shape[1] + tokens_BT.shape[1]
        all_BL = self.text_columns(prefix, length).expand(len(tokens_BT), length)
        row_B1 = torch.arange(len(tokens_BT), device=self.device)[:, None]
        return torch.log_softmax(self.logits(hidden_BSD[row_B1, all_BL.gather(1, columns_BT) - 1]), dim=-1)

    @torch.no_grad()
    def next_logits(self, batch: Batch) -> torch.Tensor:
        """What follows each prompt, [B, V]."""
        batch = batch.to(self.device)
        prefix = self.embed(batch)
        length_B1 = batch.attention_mask.sum(1, keepdim=True)
        all_BL = self.text_columns(prefix, batch.input_ids.shape[1]).expand(batch.input_ids.shape)
        row_B = torch.arange(batch.size, device=self.device)
        return self.logits(self.run_layers(prefix)[row_B, all_BL.gather(1, length_B1 - 1)[:, 0]])

    @torch.no_grad()
    def generate(self, batch: Batch, max_new_tokens: int, stop_at_eos: bool = True) -> Tuple[torch.Tensor, torch.Tensor]:
        """Greedy continuation of right-padded prompts of any lengths: ids [B, T] int64, and [B] bool, whether an end came (processor.ends).

        The same ids as one prompt at a time. With stop_at_eos a row holds the pad id after its end; without it rows go on.
        Here every token is a whole pass; a model with a cache overrides it.
        """
        batch, pad = batch.to(self.device), self.processor.pad_token_id
        ends = torch.tensor(self.processor.ends, device=self.device)
        ended_B = torch.zeros(batch.size, dtype=torch.bool, device=self.device)
        chosen_BT = torch.zeros(batch.size, 0, dtype=torch.int64, device=self.device)
        for _ in range(max_new_tokens):
            next_B = self.next_logits(self.continued(batch, chosen_BT)).argmax(-1)
            if stop_at_eos:
                next_B = torch.where(ended_B, torch.full_like(next_B, pad), next_B)
            chosen_BT = torch.cat([chosen_BT, next_B[:, None]], dim=1)
            ended_B = ended_B | torch.isin(next_B, ends)
        return chosen_BT, ended_B

    # Actions

    def action_dim(self, unnorm_key: Optional[str] = None) -> int:
        return len(self.action_statistics(unnorm_key)["q01"])

    def action_tokens(self, unnorm_key: Optional[str] = None) -> int:
        """How many tokens an answer to an action prompt takes, its end not counted."""
        return self.processor.spec.chunk * self.action_dim(unnorm_key)

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

    def unnormalise(self, actions: np.ndarray, unnorm_key: Optional[str] = None) -> np.ndarray:
        """[-1, 1] to the data set's units, float64 [..., A]: 0.5 (x + 1) (q99 - q01) + q01 where the mask is true, else unchanged."""
        return unnormalise(actions, self.norm_stats[self.action_key(unnorm_key)])

    def predict_actions(self, images, instructions: List[str], unnorm_key: Optional[str] = None) -> np.ndarray:
        """Actions [B, A] float64 for uint8 images [B, H, W, 3] (or a list) and instructions. EarlyStop when a row ends early."""
        samples = [Sample(image, text) for image, text in zip(images, instructions)]
        return self.predict_batch(self.processor.encode_prompts(samples), unnorm_key)

    def predict_batch(self, batch: Batch, unnorm_key: Optional[str] = None) -> np.ndarray:
        """predict_actions on encoded action prompts."""
        actions_BA, early_B = self.attempt_batch(batch, unnorm_key)
        if early_B.any():
            raise EarlyStop(f"row {int(np.flatnonzero(early_B)[0])} ended before all {actions_BA.shape[1]} action tokens were out: the "
                            "model does not speak actions for this prompt; fine-tune it on action data first")
        return actions_BA

    def attempt_batch(self, batch: Batch, unnorm_key: Optional[str] = None) -> Tuple[np.ndarray, np.ndarray]:
        """(actions [B, A] float64, bool [B]: which rows ended early): attempt_chunks, the first action of each."""
        chunks_BCA, early_B = self.attempt_chunks(batch, unnorm_key)
        return chunks_BCA[:, 0], early_B

    def attempt_chunks(self, batch: Batch, unnorm_key: Optional[str] = None) -> Tuple[np.ndarray, np.ndarray]:
        """(chunks of actions [B, C, A] float64, bool [B]: which rows ended early) for encoded action prompts."""
        ids_BT, ended_B = (self.answering or self.generate)(batch, self.action_tokens(unnorm_key), stop_at_eos=True)
        return self.unnormalise(self.processor.decode_actions(ids_BT.cpu().numpy()), unnorm_key), ended_B.cpu().numpy()
