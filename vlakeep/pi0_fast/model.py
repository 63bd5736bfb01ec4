"""pi0-FAST as an nn.Module tree: SigLIP -> one linear -> Gemma, under the names of lerobot's state dict.

    model.paligemma_with_expert.paligemma.
        model.vision_tower.vision_model          SigLIP: every patch, after the last LayerNorm, without the pooling head
        model.multi_modal_projector.linear
        model.language_model                     Gemma decoder; its prefix sees all of itself, what follows is causal
        lm_head                                  a parameter of its own in lerobot's files; tied here where both hold the same numbers

Sources: lerobot 7427f318 src/lerobot/policies/pi0_fast/modeling_pi0_fast.py (sizes 118-135, what stays float32 148-169, embedding 274),
policies/pi_gemma.py (85-206); openpi 15a9616a src/openpi/models/gemma_fast.py. The layers are written here and not taken from
transformers, whose Gemma scales embeddings and rounds rotary frequencies in another place in every other release.

Axes: B batch, C cameras, P patches of a picture, S sequence, K keys, D hidden, V vocabulary, N heads, H head size.
"""

from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

PALIGEMMA = "model.paligemma_with_expert.paligemma."
DECODER = PALIGEMMA + "model.language_model."
EMBEDDING, HEAD = DECODER + "embed_tokens.weight", PALIGEMMA + "lm_head.weight"


class VisionSizes(NamedTuple):
    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    image_size: int = 224
    patch_size: int = 14
    layer_norm_eps: float = 1e-6


class Sizes(NamedTuple):
    """Of a whole model; the defaults are those of lerobot's gemma_2b."""

    vocab_size: int = 257152
    width: int = 2048
    depth: int = 18
    mlp_dim: int = 16384
    num_heads: int = 8
    num_kv_heads: int = 1
    head_dim: int = 256
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    vision: VisionSizes = VisionSizes()

    @property
    def patches(self) -> int:
        """Tokens of one picture."""
        return (self.vision.image_size // self.vision.patch_size) ** 2


def attention(q_BNSH, k_BGKH, v_BGKH, allowed, implementation: str) -> torch.Tensor:
    """Softmax attention [B, S, N * H] in float32 softmax; G key heads serve N / G query heads each. allowed: bool, or None for all."""
    group = q_BNSH.shape[1] // k_BGKH.shape[1]
    if group > 1:
        k_BGKH, v_BGKH = (x.repeat_interleave(group, dim=1) for x in (k_BGKH, v_BGKH))
    if implementation == "eager":
        scores = (q_BNSH @ k_BGKH.transpose(-1, -2)) * q_BNSH.shape[-1] ** -0.5
        if allowed is not None:
            # A finite number: in half precision a large one would become -inf, and a row of these NaN.
            scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
        out = scores.softmax(-1, dtype=torch.float32).to(v_BGKH.dtype) @ v_BGKH
    else:
        out = F.scaled_dot_product_attention(q_BNSH, k_BGKH, v_BGKH, attn_mask=allowed)
    return out.transpose(1, 2).flatten(2)


class VisionAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x_BPD: torch.Tensor) -> torch.Tensor:
        q, k, v = (p(x_BPD).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(attention(q, k, v, None, "sdpa"))


class VisionMlp(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x_BPD: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x_BPD), approximate="tanh"))


class VisionLayer(nn.Module):
    def __init__(self, sizes: VisionSizes):
        super().__init__()
        width, eps = sizes.hidden_size, sizes.layer_norm_eps
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width, eps=eps), nn.LayerNorm(width, eps=eps)
        self.self_attn, self.mlp = VisionAttention(width, sizes.num_attention_heads), VisionMlp(width, sizes.intermediate_size)

    def forward(self, x_BPD: torch.Tensor) -> torch.Tensor:
        x_BPD = x_BPD + self.self_attn(self.layer_norm1(x_BPD))
        return x_BPD + self.mlp(self.layer_norm2(x_BPD))


class VisionEmbeddings(nn.Module):
    def __init__(self, sizes: VisionSizes):
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, sizes.hidden_size, sizes.patch_size, sizes.patch_size)
        self.position_embedding = nn.Embedding((sizes.image_size // sizes.patch_size) ** 2, sizes.hidden_size)

    def forward(self, pixels_B3HW: torch.Tensor) -> torch.Tensor:
        return self.patch_embedding(pixels_B3HW).flatten(2).transpose(1, 2) + self.position_embedding.weight


class Siglip(nn.Module):
    """Pictures in [-1, 1] to the features of their patches [B, P, Dv]."""

    def __init__(self, sizes: VisionSizes):
        super().__init__()
        self.embeddings = VisionEmbeddings(sizes)
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(VisionLayer(sizes) for _ in range(sizes.num_hidden_layers))})
        self.post_layernorm = nn.LayerNorm(sizes.hidden_size, eps=sizes.layer_norm_eps)

    def forward(self, pixels_B3HW: torch.Tensor) -> torch.Tensor:
        x_BPD = self.embeddings(pixels_B3HW)
        for layer in self.encoder["layers"]:
            x_BPD = layer(x_BPD)
        return self.post_layernorm(x_BPD)


class RmsNorm(nn.Module):
    """x / rms(x) * (1 + weight), in float32 whatever comes in."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.zeros(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return (y * (1.0 + self.weight.float())).to(x.dtype)


def rotate(x_BNSH: torch.Tensor, cos_B1SH: torch.Tensor, sin_B1SH: torch.Tensor) -> torch.Tensor:
    """The two halves of H are real and imaginary parts."""
    first, second = x_BNSH.chunk(2, dim=-1)
    return x_BNSH * cos_B1SH + torch.cat([-second, first], dim=-1) * sin_B1SH


Cache = List[Optional[Tuple[torch.Tensor, torch.Tensor]]]  # keys and values [B, G, K, H] of each layer


class Attention(nn.Module):
    def __init__(self, sizes: Sizes, implementation: str):
        super().__init__()
        self.head_dim, self.implementation = sizes.head_dim, implementation
        queries, keys = sizes.num_heads * sizes.head_dim, sizes.num_kv_heads * sizes.head_dim
        self.q_proj = nn.Linear(sizes.width, queries, bias=False)
        self.k_proj, self.v_proj = (nn.Linear(sizes.width, keys, bias=False) for _ in range(2))
        self.o_proj = nn.Linear(queries, sizes.width, bias=False)

    def forward(self, x_BSD, allowed_B1SK, rope, cache: Optional[Cache] = None, number: int = 0) -> torch.Tensor:
        q, k, v = (p(x_BSD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            before = cache[number]
            if before is not None:
                k, v = torch.cat([before[0], k], dim=2), torch.cat([before[1], v], dim=2)
            cache[number] = (k, v)
        return self.o_proj(attention(q, k, v, allowed_B1SK, self.implementation))


class Mlp(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x_BSD), approximate="tanh") * self.up_proj(x_BSD))


class DecoderLayer(nn.Module):
    def __init__(self, sizes: Sizes, implementation: str):
        super().__init__()
        self.self_attn, self.mlp = Attention(sizes, implementation), Mlp(sizes.width, sizes.mlp_dim)
        self.input_layernorm, self.post_attention_layernorm = (RmsNorm(sizes.width, sizes.rms_norm_eps) for _ in range(2))

    def forward(self, hidden_BSD, allowed_B1SK, rope, cache: Optional[Cache] = None, number: int = 0) -> torch.Tensor:
        hidden_BSD = hidden_BSD + self.self_attn(self.input_layernorm(hidden_BSD), allowed_B1SK, rope, cache, number)
        return hidden_BSD + self.mlp(self.post_attention_layernorm(hidden_BSD))


class Gemma(nn.Module):
    def __init__(self, sizes: Sizes, implementation: str):
        super().__init__()
        self.embed_tokens = nn.Embedding(sizes.vocab_size, sizes.width)
        self.layers = nn.ModuleList(DecoderLayer(sizes, implementation) for _ in range(sizes.depth))
        self.norm = RmsNorm(sizes.width, sizes.rms_norm_eps)


class _Room(nn.Module):
    """Children under these names; levels of lerobot's state dict that compute nothing."""

    def __init__(self, **children: nn.Module):
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


def _run_layer(layer: nn.Module, hidden_BSD: torch.Tensor, *arguments) -> torch.Tensor:
    """One decoder layer. PEFT reads each LoRA weight twice a forward; `cached` computes a parametrised one once all the same."""
    with parametrize.cached():
        return layer(hidden_BSD, *arguments)


class Pi0Fast(nn.Module):
    """The whole network. `config` is config.json as a dictionary, `sizes` what format.py found for it."""

    def __init__(self, config: dict, sizes: Sizes, attn_implementation: str = "sdpa"):
        super().__init__()
        if attn_implementation not in ("sdpa", "eager"):
            raise ValueError(f"--backbone.attn_implementation {attn_implementation}: pi0-FAST's prefix sees all of itself, which "
                             "that kernel cannot; use --backbone.attn_implementation sdpa")
        self.config, self.sizes = config, sizes
        self.gradient_checkpointing = False
        vision = _Room(vision_model=Siglip(sizes.vision))
        projector = _Room(linear=nn.Linear(sizes.vision.hidden_size, sizes.width))
        inner = _Room(vision_tower=vision, multi_modal_projector=projector, language_model=Gemma(sizes, attn_implementation))
        paligemma = _Room(model=inner, lm_head=nn.Linear(sizes.width, sizes.vocab_size, bias=False))
        self.model = _Room(paligemma_with_expert=_Room(paligemma=paligemma))

    @property
    def paligemma(self) -> Any:
        found: Any = self.model
        return found.paligemma_with_expert.paligemma

    @property
    def gemma(self) -> Any:
        return self.paligemma.model.language_model

    @property
    def tied(self) -> bool:
        return self.paligemma.lm_head.weight is self.gemma.embed_tokens.weight

    def embed_text(self, ids_BL: torch.Tensor) -> torch.Tensor:
        """[B, L, D], scaled by sqrt(D) in the type of the table."""
        table = self.gemma.embed_tokens
        # The root is rounded to that type too, on the host: a tensor of it on the device would be a copy that waits.
        return table(ids_BL) * torch.tensor(self.sizes.width ** 0.5, dtype=table.weight.dtype).item()

    def embed_pictures(self, pixels_BC3HW: torch.Tensor) -> torch.Tensor:
        """[B, C * P, D] in the type of the text's, not scaled."""
        inner = self.paligemma.model
        weight = inner.multi_modal_projector.linear.weight
        features = inner.vision_tower.vision_model(pixels_BC3HW.flatten(0, 1).to(weight.dtype))
        found_XPD = inner.multi_modal_projector.linear(features)
        return found_XPD.unflatten(0, pixels_BC3HW.shape[:2]).flatten(1, 2).to(self.gemma.embed_tokens.weight.dtype)

    def rope(self, positions_BS: torch.Tensor, dtype: torch.dtype) -> Tuple[torch.Tensor, torch.Tensor]:
        """(cos, sin) [B, 1, S, H]. The frequencies are float32 whatever the type of the weights: rounded to bfloat16, as lerobot's cast
        does to its buffer, the cosine is off by 1 at position 1000."""
        half = torch.arange(0, self.sizes.head_dim, 2, dtype=torch.float32, device=positions_BS.device) / self.sizes.head_dim
        angle = positions_BS[..., None].float() * (1.0 / self.sizes.rope_theta ** half)
        angle_B1SH = torch.cat([angle, angle], dim=-1)[:, None]
        return angle_B1SH.cos().to(dtype), angle_B1SH.sin().to(dtype)

    def run_layers(self, hidden_BSD, allowed_B1SK, positions_BS, start: int = 0, stop: Optional[int] = None, cache: Optional[Cache] = None,
                   each: Optional[Callable[[torch.Tensor], None]] = None) -> torch.Tensor:
        """Decoder layers start .. stop-1 without the final norm. cache: one entry a layer, filled in place. each: called with every
        layer's output."""
        rope = self.rope(positions_BS, hidden_BSD.dtype)
        recompute = self.gradient_checkpointing and self.training and torch.is_grad_enabled() and cache is None
        layers = self.gemma.layers
        for number in range(start, len(layers) if stop is None else stop):
            if recompute:
                hidden_BSD = checkpoint(_run_layer, layers[number], hidden_BSD, allowed_B1SK, rope, use_reentrant=False)
            else:
                hidden_BSD = _run_layer(layers[number], hidden_BSD, allowed_B1SK, rope, cache, number)
            if each is not None:
                each(hidden_BSD)
        return hidden_BSD

    def norm(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.gemma.norm(hidden)

    def logits(self, normed: torch.Tensor) -> torch.Tensor:
        """float32 [..., V]."""
        return self.paligemma.lm_head(normed).float()


def precise(name: str) -> bool:
    """Whether a tensor stays float32 in a model of half precision, as in lerobot: vision, projector and norms
    (modeling_pi0_fast.py:148-169)."""
    return ".vision_tower." in name or ".multi_modal_projector." in name or name.endswith("norm.weight")


def expected_shapes(sizes: Sizes) -> Dict[str, torch.Size]:
    """Name -> shape of every tensor of a checkpoint, without memory."""
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in Pi0Fast({}, sizes).state_dict().items()}
