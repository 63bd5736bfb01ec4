"""An OpenVLA checkpoint folder as a Backbone, in our own code or, with backbone.source official, in that of an OpenVLA checkout."""

from pathlib import Path

from vlakeep.core.errors import CheckpointError
from vlakeep.models.load import DTYPES, model_name
from vlakeep.openvla import format as checkpoint_format
from vlakeep.openvla.backbone import Backbone
from vlakeep.openvla.processor import Processor


def load_backbone(settings, folder: Path, device) -> Backbone:
    """In evaluation mode on `device`; `settings` is the backbone section of a configuration. CheckpointError for what is not whole."""
    if "v01" in model_name(folder):
        raise ValueError(f"{folder}: v01 models were trained with the Vicuna prompt, which vlakeep does not build; take openvla-7b")
    if settings.source == "official":
        from vlakeep.openvla.official import make_official_backbone

        return make_official_backbone(settings, folder, device)
    model, config = checkpoint_format.load_checkpoint(folder, DTYPES[settings.dtype], settings.attn_implementation)
    model.gradient_checkpointing = settings.gradient_checkpointing
    processor = Processor.from_folder(folder)
    if processor.action_tokenizer.vocab_size != config["text_config"]["vocab_size"] - config["pad_to_multiple_of"]:
        raise CheckpointError(
            f"the tokenizer in {folder} has {processor.action_tokenizer.vocab_size} tokens, its model "
            f"{config['text_config']['vocab_size']} - {config['pad_to_multiple_of']}: they are not of one checkpoint")
    backbone = Backbone(model, processor, checkpoint_format.read_statistics(folder, config), folder, settings.unnorm_key)
    return backbone.to(device).eval()
