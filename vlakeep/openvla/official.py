"""--backbone.source official: the model classes of the user's OpenVLA checkout behind the Backbone interface.

The official model's submodules carry the names that OpenVLA here has, so they are held in an OpenVLA shell: adapters, hooks, cached
prefixes and the batched generation act on the very modules that the official forward runs. Only training goes through that forward.
"""

from pathlib import Path
from typing import Optional

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from vlakeep.core.official_code import load_official
from vlakeep.data.sample import IGNORE_INDEX, Batch
from vlakeep.models.base import Backbone
from vlakeep.models.files import read_statistics
from vlakeep.models.load import DTYPES
from vlakeep.models.outputs import LossOutput, captured_outputs
from vlakeep.openvla import format as checkpoint_format
from vlakeep.openvla.backbone import OpenVLABackbone
from vlakeep.openvla.model import OpenVLA, layer_interface, parameters_on_meta
from vlakeep.openvla.processor import Processor
from vlakeep.openvla.tiny import register_tiny_vits


class OfficialOpenVLA(OpenVLA):
    """An OpenVLA whose parts are those of an official OpenVLAForActionPrediction (`official`, which is kept out of the state dict)."""

    def __init__(self, official: nn.Module, config: dict, attn_implementation: str):
        nn.Module.__init__(self)
        self.config, self.attn_implementation = config, attn_implementation
        self.vision_backbone, self.projector, self.language_model = official.vision_backbone, official.projector, official.language_model
        self.__dict__["official"] = official
        self.gradient_checkpointing = False
        self._cache_name, self._rotary_outside = layer_interface(self.language_model)

    def embed(self, input_ids_BL: torch.Tensor, pixel_values) -> torch.Tensor:
        if pixel_values is not None:  # the official vision backbone takes pixels in its own type only
            pixel_values = pixel_values.to(self.vision_backbone.featurizer.patch_embed.proj.weight.dtype)
        return super().embed(input_ids_BL, pixel_values)

    def train(self, mode: bool = True):
        super().train(mode)
        self.official.training = mode  # its own flag decides about the cache
        return self


class OfficialBackbone(OpenVLABackbone):
    """A Backbone that trains through the official forward."""

    def loss(self, batch: Batch) -> LossOutput:
        """As Backbone.loss; logits of all positions are made, and in training a cache is built, as the official code does."""
        batch = batch.to(self.device)
        last = self.num_layers - 1
        pixels = batch.pixel_values.to(self.openvla.vision_backbone.featurizer.patch_embed.proj.weight.dtype)
        with captured_outputs(self.decoder_layers, [last]) as outputs, parametrize.cached():
            out = self.openvla.official(input_ids=batch.input_ids, attention_mask=batch.attention_mask, pixel_values=pixels,
                                        labels=batch.labels)
        with torch.no_grad():
            predicted_BL = out.logits[:, self.num_patches:-1].argmax(-1)
            labels_BL = batch.labels[:, 1:]
            labelled_BL = labels_BL != IGNORE_INDEX
            correct = ((predicted_BL == labels_BL) & labelled_BL).sum()
            mask_BS = F.pad(batch.attention_mask.bool(), (self.num_patches, 0), value=True).float()
            mean_norm = (outputs[last].float().norm(dim=-1) * mask_BS).sum() / mask_BS.sum()
        return LossOutput(out.loss, labelled_BL.sum(), correct, mean_norm)


def official_model(code, config: dict, dtype: torch.dtype, attn_implementation: str, state: Optional[dict] = None) -> nn.Module:
    """The official class with these weights (name -> tensor, taken over, strictly); None leaves it without weights (meta tensors)."""
    register_tiny_vits()
    settings = {key: value for key, value in config.items() if key not in ("model_type", "torch_dtype", "architectures")}
    official_config = code.OpenVLAConfig(**settings)
    official_config._attn_implementation = attn_implementation
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with parameters_on_meta():  # initialising billions of weights that are replaced at once would take minutes
            model = code.OpenVLAForActionPrediction(official_config)
    finally:
        torch.set_default_dtype(before)
    if state is not None:
        model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


def make_official_backbone(settings, folder: Path, device) -> Backbone:
    """As OpenVLABackbone.load, from the checkout named by settings.openvla_dir. Code that lies in the checkpoint folder is never run."""
    code = load_official(settings.openvla_dir)
    register_tiny_vits()
    config = checkpoint_format.read_config(folder)
    checkpoint_format.check_weights(folder, config)
    model = code.OpenVLAForActionPrediction.from_pretrained(
        str(folder), torch_dtype=DTYPES[settings.dtype], low_cpu_mem_usage=True, attn_implementation=settings.attn_implementation,
        local_files_only=True, trust_remote_code=False)
    if settings.gradient_checkpointing:
        model.language_model.gradient_checkpointing_enable({"use_reentrant": False})
    shell = OfficialOpenVLA(model, config, settings.attn_implementation)
    backbone = OfficialBackbone(shell, Processor.from_folder(folder), read_statistics(folder, config), folder,
                                settings.unnorm_key)
    return backbone.to(device).eval()
