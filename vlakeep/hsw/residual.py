"""HSW at the residual stream: surgery on the gradient of decoder-layer outputs (the user's frozen form).

A forward hook puts a tensor hook on the layer's output. That form survives gradient checkpointing (the forward hook may run
twice, so it counts nothing), DDP and FSDP2, where parameter hooks do not fire.
"""

from typing import Dict, List

import torch
from torch import nn

from vlakeep.hsw.meter import NormMeter
from vlakeep.hsw.transform import Gains, gain_weights, join_bases, surgery


class ResidualSite:
    """Hooks on `layers`; `bases` maps a layer number to its (Uf [D, Kf], Up [D, Kp])."""

    def __init__(self, decoder_layers: nn.ModuleList, bases: Dict[int, tuple], eps: float, dtype: torch.dtype):
        self.meter = NormMeter()
        self.gains = Gains()
        self._eps = eps
        self._sites = {}
        self._handles = []
        for number, (fragile_DK, plastic_DK) in bases.items():
            if not 0 <= number < len(decoder_layers):
                raise ValueError(f"hsw.layers names layer {number}; the model has layers 0 to {len(decoder_layers) - 1}")
            layer = decoder_layers[number]
            device = next(layer.parameters()).device
            basis_DK, fragile = join_bases(fragile_DK, plastic_DK)
            # 0 is a gain of 1, until set_gains.
            weights_K = torch.zeros(basis_DK.shape[1], dtype=dtype, device=device)
            self._sites[number] = (basis_DK.to(device, dtype), weights_K, fragile)
            self._handles.append(layer.register_forward_hook(self._make_hook(number)))

    @property
    def layers(self) -> List[int]:
        return list(self._sites)

    def basis(self, number: int):
        """(basis [D, K], number of fragile columns) of one hooked layer."""
        basis_DK, _, fragile = self._sites[number]
        return basis_DK, fragile

    def _make_hook(self, number: int):
        def edit(grad_BTD):
            basis_DK, weights_K, fragile = self._sites[number]
            edited_BTD = grad_BTD if self.gains.identity else surgery(grad_BTD, basis_DK, weights_K, self._eps)
            # Also with gains of 1: the shares then say what surgery would take.
            self.meter.add(grad_BTD, edited_BTD, basis_DK, fragile)
            return edited_BTD

        def on_forward(module, args, output):
            hidden_BTD = output[0] if isinstance(output, tuple) else output  # a tuple before transformers 4.55
            # Measurements run without a graph, and there is nothing to edit.
            if hidden_BTD.requires_grad:
                hidden_BTD.register_hook(edit)

        return on_forward

    def set_gains(self, gains: Gains) -> None:
        if gains != self.gains:
            for basis_DK, weights_K, fragile in self._sites.values():
                weights_K.copy_(gain_weights(gains, fragile, basis_DK.shape[1]))
            self.gains = gains

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


if __name__ == "__main__":  # sanity check: python -m vlakeep.hsw.residual
    basis_DK = torch.linalg.qr(torch.randn(32, 8, generator=torch.Generator().manual_seed(0)))[0]
    layers = nn.ModuleList([nn.Linear(32, 32), nn.Linear(32, 32)])
    site = ResidualSite(layers, {0: (basis_DK[:, :4], basis_DK[:, 4:])}, 1e-12, torch.float32)
    for gains in (Gains(), Gains(beta=0.5, gamma=0.0)):
        site.set_gains(gains)
        site.meter.start(True)
        layers[1](layers[0](torch.ones(2, 5, 32))).square().sum().backward()
        row = site.meter.read()
        print(f"beta {gains.beta} gamma {gains.gamma}:", {key: round(value, 4) for key, value in row.items()})
        shed = (1 - gains.gamma ** 2) * row["share_f"] + (1 - gains.beta ** 2) * row["share_p"]
        assert abs(row["shed"] - shed) < 1e-5 and row["share_f"] > 0.01
