"""Method `baseline`: plain LoRA, to which every other arm is compared. It adds nothing to training."""

from vlakeep.methods.base import Method


class Baseline(Method):
    label, label_zh = "Plain LoRA", "普通 LoRA"
    reads = ()


METHOD = Baseline
