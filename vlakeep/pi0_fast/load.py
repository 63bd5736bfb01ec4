"""The kind of model `pi0_fast`: lerobot's and openpi's pi0-FAST, in our own code."""

from vlakeep.pi0_fast.backbone import Pi0FastBackbone

MODEL = Pi0FastBackbone
