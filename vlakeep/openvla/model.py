"""OpenVLA as an nn.Module tree: ViT(s) -> projector -> Llama, with the names of the official state dict.

Source: openvla prismatic/extern/hf/modeling_prismatic.py (vision 60-125, projector 127-160, multimodal sequence 372-401).
    vision_backbone.featurizer[.fused_featurizer]   timm ViTs; features of the second-to-last block, prefix tokens dropped
    projector.fc1 fc2 [fc3]
    language_model                                  transformers' LlamaForCausalLM

Axes: B batch, V vision backbones (3V channels), H W pixels, P patches, D hidden size, S = P + L multimodal sequence.
"""

import inspect
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from vlakeep.core.compat import import_timm
from vlakeep.openvla.tiny import register_tiny_vits


class LayerScale(nn.Module):
    """timm's LayerScale under the official name: transformers would rename a parameter called gamma when it loads it."""

    def __init__(self, scale_D: torch.Tensor):
        super().__init__()
        self.scale_factor = nn.Parameter(scale_D)

    def forward(self, x_BPD: torch.Tensor) -> torch.Tensor:
        return x_BPD * self.scale_factor


def make_vit(timm_id: str, image_size: int, act_layer=None) -> nn.Module:
    """A timm ViT without its head, as the official PrismaticVisionBackbone makes it. Raises ValueError for an unknown id."""
    timm = import_timm()
    register_tiny_vits()
    if not timm.is_model(timm_id):
        raise ValueError(
            f"config.json names the vision model {timm_id!r} in timm_model_ids, which timm {timm.__version__} does not know; "
            "check the spelling, or register it with timm.models.register_model before loading"
        )
    vit = timm.create_model(timm_id, pretrained=False, num_classes=0, img_size=image_size, act_layer=act_layer)
    for parent in list(vit.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ == "LayerScale" and hasattr(child, "gamma"):
                setattr(parent, name, LayerScale(child.gamma.data))
    return vit


def vit_patch_features(vit: nn.Module, pixels_B3HW: torch.Tensor) -> torch.Tensor:
    """Output of the second-to-last block without prefix tokens, [B, P, Dv]; the last block is not run at all."""
    x = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(pixels_B3HW))))
    for block in vit.blocks[:-1]:
        x = block(x)
    return x[:, vit.num_prefix_tokens:]


class VisionBackbone(nn.Module):
    """One ViT, or two whose patch features are concatenated (DINOv2 first, SigLIP second)."""

    def __init__(self, timm_ids, image_sizes, act_layers, fused: bool):
        super().__init__()
        self.featurizer = make_vit(timm_ids[0], image_sizes[0], act_layers[0])
        self.embed_dim = self.featurizer.embed_dim
        if fused:
            self.fused_featurizer = make_vit(timm_ids[1], image_sizes[1], act_layers[1])
            self.embed_dim += self.fused_featurizer.embed_dim

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[B, 3V, H, W] -> [B, P, Dv]."""
        pixel_values = pixel_values.to(self.featurizer.patch_embed.proj.weight.dtype)
        if not hasattr(self, "fused_featurizer"):
            return vit_patch_features(self.featurizer, pixel_values)
        first, second = torch.split(pixel_values, [3, 3], dim=1)
        return torch.cat([vit_patch_features(self.featurizer, first), vit_patch_features(self.fused_featurizer, second)], dim=2)


class Projector(nn.Module):
    """Patch features to the LLM's input space: three linears after a fused backbone, two after a single one."""

    def __init__(self, vision_dim: int, llm_dim: int, fused: bool):
        super().__init__()
        inner = 4 * vision_dim if fused else llm_dim
        self.fc1 = nn.Linear(vision_dim, inner)
        self.fc2 = nn.Linear(inner, llm_dim)
        if fused:
            self.fc3 = nn.Linear(llm_dim, llm_dim)

    def forward(self, features_BPV: torch.Tensor) -> torch.Tensor:
        x = self.fc2(F.gelu(self.fc1(features_BPV)))
        return self.fc3(F.gelu(x)) if hasattr(self, "fc3") else x


class TiedHead(nn.Module):
    """The head of a model whose embeddings are its head too: it has no weights of its own, in no state dict either."""

    def __init__(self, embeddings: nn.Module):
        super().__init__()
        self.__dict__["embeddings"] = embeddings  # no child, or the weights would have a second name

    def forward(self, normed: torch.Tensor) -> torch.Tensor:
        return F.linear(normed, self.embeddings.weight)


def layer_interface(language_model) -> tuple:
    """(name of the cache argument, whether rotary embeddings are made outside the layers): both changed within transformers 4."""
    parameters = inspect.signature(type(language_model.model.layers[0]).forward).parameters
    cache = "past_key_values" if "past_key_values" in parameters else "past_key_value"
    return cache, "position_embeddings" in parameters and hasattr(language_model.model, "rotary_emb")


def _run_layer(layer: nn.Module, hidden_BSD: torch.Tensor, arguments: dict):
    """One decoder layer. PEFT reads each LoRA weight twice a forward; `cached` computes a parametrised one once all the same."""
    with parametrize.cached():
        return layer(hidden_BSD, **arguments)


class OpenVLA(nn.Module):
    """The whole model. `config` is config.json as a dictionary (format.py validates and fills it)."""

    def __init__(self, config: dict, attn_implementation: str = "sdpa"):
        super().__init__()
        import_timm()  # transformers 5 imports torchvision too, so the shim must come first
        from transformers import LlamaConfig, LlamaForCausalLM

        self.config = config
        fused = bool(config["use_fused_vision_backbone"])
        self.vision_backbone = VisionBackbone(
            config["timm_model_ids"], config["image_sizes"], config["timm_override_act_layers"], fused
        )
        text = {k: v for k, v in config["text_config"].items() if k not in ("model_type", "torch_dtype", "dtype", "architectures",
                                                                            "_name_or_path", "transformers_version")}
        llama = LlamaConfig(**text, attn_implementation=attn_implementation)
        self.projector = Projector(self.vision_backbone.embed_dim, llama.hidden_size, fused)
        self.language_model = LlamaForCausalLM(llama)
        if llama.tie_word_embeddings:  # transformers would share one parameter, which comes apart where parameters are replaced
            self.language_model.lm_head = TiedHead(self.language_model.model.embed_tokens)
        self.attn_implementation = attn_implementation
        self.gradient_checkpointing = False
        self._cache_name, self._rotary_outside = layer_interface(self.language_model)

    @property
    def num_patches(self) -> int:
        return self.vision_backbone.featurizer.patch_embed.num_patches

    def embed(self, input_ids_BL: torch.Tensor, pixel_values) -> torch.Tensor:
        """Multimodal embeddings [B, P + L, D]: BOS, patches, rest. pixel_values None gives text alone (P = 0)."""
        text_BLD = self.language_model.model.embed_tokens(input_ids_BL)
        if pixel_values is None:
            return text_BLD
        patches_BPD = self.projector(self.vision_backbone(pixel_values)).to(text_BLD.dtype)
        return torch.cat([text_BLD[:, :1], patches_BPD, text_BLD[:, 1:]], dim=1)

    def attention_bias(self, valid_BK: torch.Tensor, queries: int, dtype: torch.dtype):
        """The mask that decoder layers take for the last `queries` of K positions: causal, and no key where valid_BK is False."""
        if self.attn_implementation == "flash_attention_2":
            return valid_BK
        keys = valid_BK.shape[1]
        row_Q1 = torch.arange(keys - queries, keys, device=valid_BK.device)[:, None]
        return self.given_mask((torch.arange(keys, device=valid_BK.device)[None] <= row_Q1) & valid_BK[:, None, None, :], dtype)

    def given_mask(self, allowed_B1QK: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The mask that decoder layers take, after a bool one. ValueError for attention that takes none of its own."""
        if self.attn_implementation == "flash_attention_2":
            raise ValueError("--backbone.attn_implementation flash_attention_2 knows no mask but the causal one; use sdpa, which gives the "
                             "same result")
        if self.attn_implementation == "sdpa":
            return allowed_B1QK
        return torch.zeros(allowed_B1QK.shape, dtype=dtype, device=allowed_B1QK.device).masked_fill_(
            ~allowed_B1QK, torch.finfo(dtype).min
        )

    def causal_mask(self, valid_BS: torch.Tensor, dtype: torch.dtype):
        """What decoder layers take for right-padded rows, without reading a value on the host.

        Padding on the right never reaches a valid position through causal attention, so the fused kernels need no mask; asking
        whether a mask is all ones, as transformers does, would wait for the device in every step.
        """
        return self.attention_bias(torch.ones_like(valid_BS[:1], dtype=torch.bool), valid_BS.shape[1], dtype) \
            if self.attn_implementation == "eager" else None

    def run_layers(self, hidden_BSD, mask, position_ids_BS, start: int = 0, stop=None, cache=None, each=None) -> torch.Tensor:
        """Decoder layers start .. stop-1 without the final norm.

        mask: from attention_bias or causal_mask. cache: a transformers Cache, filled in place. each: called with the input of
        every layer. Layers are called one by one because the interface of a layer is far more stable over transformers versions
        than that of LlamaModel, and because a range of layers is what probes and the Thermostat need.
        """
        llama = self.language_model.model
        arguments = {"attention_mask": mask, "position_ids": position_ids_BS, "use_cache": cache is not None}
        if cache is not None:
            arguments[self._cache_name] = cache
        if self._rotary_outside:
            arguments["position_embeddings"] = llama.rotary_emb(hidden_BSD, position_ids=position_ids_BS)
        recompute = self.gradient_checkpointing and self.training and torch.is_grad_enabled() and cache is None
        for layer in llama.layers[start:stop]:
            if each is not None:
                each(hidden_BSD)
            if recompute:
                output = checkpoint(_run_layer, layer, hidden_BSD, arguments, use_reentrant=False)
            else:
                output = _run_layer(layer, hidden_BSD, arguments)
            hidden_BSD = output[0] if isinstance(output, tuple) else output  # a tuple before transformers 4.55
        return hidden_BSD

    def norm(self, hidden_BSD: torch.Tensor) -> torch.Tensor:
        return self.language_model.model.norm(hidden_BSD)

    def logits(self, normed: torch.Tensor) -> torch.Tensor:
        """float32 [..., vocabulary]."""
        return self.language_model.lm_head(normed).float()


class _InPlaceOnMeta(TorchFunctionMode):
    """Nothing is done in place to tensors without memory. Drawing initial weights into them takes longer than reading the real ones."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = function.__name__
        in_place = name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
        first = args[0] if args else (kwargs or {}).get("tensor")  # torch.nn.init hands itself on by keyword
        if in_place and isinstance(first, torch.Tensor) and first.is_meta:
            return first
        return function(*args, **(kwargs or {}))


@contextmanager
def parameters_on_meta():
    """Modules built inside hold parameters without memory, and real buffers: a 7B model costs nothing until it is loaded."""
    register = nn.Module.register_parameter

    def on_meta(module, name, param):
        register(module, name, param)
        if param is not None:
            module._parameters[name] = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)

    nn.Module.register_parameter = on_meta
    try:
        with _InPlaceOnMeta():
            yield
    finally:
        nn.Module.register_parameter = register
