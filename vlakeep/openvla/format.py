"""Checkpoint folders in the official OpenVLA Hugging Face format: read, write, initialise, fingerprint.

Files: config.json, model.safetensors (or model.safetensors.index.json with its shards), dataset_statistics.json,
generation_config.json, and the processor's files (processor.py).
Sources: openvla vla-scripts/extern/convert_openvla_weights_to_hf.py, experiments/robot/openvla_utils.py:36-68 (what get_vla
reads).
"""

import json
from pathlib import Path
from typing import Dict, Optional, Tuple

import torch

from vlakeep.core.errors import CheckpointError
from vlakeep.models.files import STATISTICS, read_tensors, tensor_table, weight_files, write_json, write_weights
from vlakeep.openvla.model import OpenVLA, parameters_on_meta

PAD_MULTIPLE = 64  # of the embedding table, official default
_NEEDED = ("use_fused_vision_backbone", "timm_model_ids", "image_sizes", "text_config")
_OPTIONAL_KEYS = ("rotary_emb.inv_freq",)  # buffers that old transformers versions stored


def read_config(folder) -> dict:
    """config.json, validated and with defaults filled in. Raises FileNotFoundError or CheckpointError with the remedy."""
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"no config.json in {folder}: --backbone.checkpoint must be a folder in the official OpenVLA format"
        )
    try:
        config = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} is not valid JSON ({error}): fetch it again") from error
    return complete_config(config, str(file))


def complete_config(config: dict, where: str = "config") -> dict:
    """A copy with defaults filled in. Raises CheckpointError listing everything that is missing or contradictory."""
    remedy = "fetch the checkpoint again, or give the folder of another one with --backbone.checkpoint"
    config = json.loads(json.dumps(config))
    if not isinstance(config, dict) or not isinstance(config.get("text_config", {}), dict):
        raise CheckpointError(f"{where} is no OpenVLA configuration: it must be an object with an object text_config; {remedy}")
    problems = []
    if config.get("model_type", "openvla") != "openvla":
        problems.append(f"model_type is {config['model_type']!r}, must be 'openvla'")
    problems += [f"{key} is missing" for key in _NEEDED if key not in config]
    if not problems:
        count = 2 if config["use_fused_vision_backbone"] else 1
        config.setdefault("timm_override_act_layers", [None] * count)
        for key in ("timm_model_ids", "image_sizes", "timm_override_act_layers"):
            if len(config[key]) != count:
                problems.append(f"{key} has {len(config[key])} entries, but use_fused_vision_backbone needs {count}")
        text = config["text_config"]
        heads, hidden = text.get("num_attention_heads", 32), text.get("hidden_size", 4096)
        if text.get("model_type", "llama") != "llama":
            problems.append(f"text_config.model_type is {text['model_type']!r}; only llama is supported")
        if hidden % heads:
            problems.append(f"text_config.hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
        config.setdefault("pad_to_multiple_of", PAD_MULTIPLE)
        vocabulary = text.setdefault("vocab_size", 32000 + config["pad_to_multiple_of"])
        pad = config.setdefault("pad_token_id", vocabulary - config["pad_to_multiple_of"])
        text.setdefault("pad_token_id", pad)
        if not 0 <= pad < vocabulary:
            problems.append(f"pad_token_id {pad} lies outside text_config.vocab_size {vocabulary}")
    if problems:
        raise CheckpointError(f"{where} is no OpenVLA configuration: " + "; ".join(problems) + f": {remedy}")
    return config


def _strict(expected: Dict[str, torch.Size], found: Dict[str, torch.Size], where) -> None:
    def some(names):
        return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")

    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected and not name.endswith(_OPTIONAL_KEYS)]
    shapes = [f"{name} is {list(found[name])}, must be {list(expected[name])}" for name in expected
              if name in found and found[name] != expected[name]]
    problems = [text for names, text in ((missing, f"missing: {some(missing)}"), (unexpected, f"unexpected: {some(unexpected)}"),
                                         (shapes, f"other shape: {some(shapes)}")) if names]
    if problems:
        raise CheckpointError(f"the weights in {where} do not fit its config.json; " + "; ".join(problems))


def check_weights(folder, config: dict) -> None:
    """Raise CheckpointError unless the weight files hold exactly the tensors of the architecture in `config`; reads headers only."""
    with parameters_on_meta():
        model = OpenVLA(config)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    found = {name: torch.Size(entry["shape"]) for file in weight_files(folder) for name, entry in tensor_table(file).items()}
    _strict(expected, found, folder)


def load_checkpoint(folder, dtype: torch.dtype = torch.float32, attn_implementation: str = "sdpa") -> Tuple[OpenVLA, dict]:
    """(model in evaluation mode on the CPU, config). Raises CheckpointError or FileNotFoundError; nothing is loaded half."""
    config = read_config(folder)
    with parameters_on_meta():
        model = OpenVLA(config, attn_implementation)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    files = weight_files(folder)
    _strict(expected, {name: torch.Size(entry["shape"]) for file in files for name, entry in tensor_table(file).items()}, folder)
    state = {name: tensor.to(dtype) for name, tensor in read_tensors(files) if name in expected}
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval(), config


def init_checkpoint(config: dict, folder, seed: int = 0) -> None:
    """Write a randomly initialised model. Matrices ~ N(0, 0.02) or less where the fan-in is large, norms 1, biases 0."""
    config = complete_config(config)
    with parameters_on_meta():
        model = OpenVLA(config)
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, tensor in model.state_dict().items():
        last = name.rsplit(".", 1)[-1]
        if last == "scale_factor" or (last == "weight" and tensor.ndim == 1):
            state[name] = torch.ones(tensor.shape)
        elif last == "bias":
            state[name] = torch.zeros(tensor.shape)
        else:
            fan_in = tensor[0].numel() if tensor.ndim > 1 else tensor.numel()
            std = (
                0.02
                if last in ("pos_embed", "cls_token", "reg_token", "latent") or "embed_tokens" in name
                else min(0.05, fan_in**-0.5)
            )
            state[name] = torch.randn(tensor.shape, generator=generator) * std
    write_checkpoint(folder, state, config, {})


def write_checkpoint(
    folder, state: Dict[str, torch.Tensor], config: dict, norm_stats: dict, dtype: Optional[torch.dtype] = None
) -> None:
    """config.json, weights (sharded above 5 GB), dataset_statistics.json and generation_config.json; each file appears whole."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: t.detach().to("cpu", dtype or t.dtype).contiguous() for name, t in state.items()}
    stored = next(iter(state.values())).dtype
    config = dict(config, torch_dtype=str(stored).replace("torch.", ""), norm_stats=norm_stats or config.get("norm_stats"))
    write_weights(folder, state)
    write_sidecars(folder, config, norm_stats)


def write_sidecars(folder: Path, config: dict, norm_stats: dict) -> None:
    """The small files beside the weights: generation_config.json, dataset_statistics.json if there are any, and last config.json."""
    text = config["text_config"]
    write_json(
        folder / "generation_config.json",
        {
            "_from_model_config": True,
            "bos_token_id": text.get("bos_token_id", 1),
            "eos_token_id": text.get("eos_token_id", 2),
            "pad_token_id": config["pad_token_id"],
        },
    )
    if norm_stats:
        write_json(folder / STATISTICS, norm_stats)
    write_json(folder / "config.json", dict(config, norm_stats=norm_stats or config.get("norm_stats")))
