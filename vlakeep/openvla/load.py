"""The kind of model `openvla`: in our own code or, with backbone.source official, in that of an OpenVLA checkout."""

from pathlib import Path

from vlakeep.core.base_models import model_name
from vlakeep.models.base import Backbone
from vlakeep.openvla.backbone import OpenVLABackbone
from vlakeep.openvla.official import make_official_backbone


class OpenVLAKind(OpenVLABackbone):
    """What there is to know of a folder before it is loaded, and the choice of the code that runs it."""

    @classmethod
    def load(cls, settings, folder: Path, device) -> Backbone:
        if "v01" in model_name(folder):
            raise ValueError(f"{folder}: v01 models were trained with the Vicuna prompt, which vlakeep does not build; take openvla-7b")
        if settings.source == "official":
            return make_official_backbone(settings, folder, device)
        return OpenVLABackbone.load(settings, folder, device)


MODEL = OpenVLAKind
