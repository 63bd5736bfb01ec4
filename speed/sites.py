"""The sites of surgery with random bases, for timing: what surgery costs does not depend on its numbers."""

import torch

from vlakeep.hsw.lora_input import LoraInputSite
from vlakeep.hsw.residual import ResidualSite
from vlakeep.hsw.transform import Gains
from vlakeep.methods.base import Method


class Placed(Method):
    """A site with random bases and gains other than 1: what surgery costs does not depend on its numbers."""

    def __init__(self, make):
        self._make, self._site = make, None

    def attach(self, backbone):
        self._site = self._make(backbone)
        self._site.set_gains(Gains(beta=0.8, gamma=0.5))

    def before_step(self, step, observe):
        self._site.meter.start(observe)

    def detach(self):
        self._site.detach()


def orthonormal(dim: int, columns: int, device) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(dim, columns, device=device))[0]


def residual_site(backbone):
    half = max(2, min(64, backbone.hidden_size // 8))
    pairs = {n: orthonormal(backbone.hidden_size, 2 * half, backbone.device).split(half, 1)
             for n in range(backbone.num_layers - 4, backbone.num_layers)}
    return ResidualSite(backbone.decoder_layers, pairs, 1e-12, torch.float32)


def input_site(backbone):
    made = {}
    for name, linear in backbone.adapted_linears().items():
        key, dim = backbone.input_key(name), linear.in_features
        if key not in made:
            made[key] = dict(zip("np", orthonormal(dim, dim // 20, backbone.device).split([dim // 50, dim // 20 - dim // 50], 1)))
    return LoraInputSite(backbone.adapted_linears(), {name: made[backbone.input_key(name)] for name in backbone.adapted_linears()})
