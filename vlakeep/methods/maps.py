"""Method `maps`: as `l2_sp`, less from module to module. MAPS: Module-wise Proximity Scheduling, 2025 (arXiv 2511.19878, CVPR 2026).

    lambda_k = strength * (1 - (k - 1) / (L - 1)) for the k-th of L modules from the input to the output

A module is a decoder layer here; what stands before them (vision, projector, with --lora.modules '[all-linear]') is the first one, where
the paper orders DINOv2 before SigLIP, and lm_head the last. The paper constrains full fine-tuning; this is its penalty on dW = scale B A.
"""

import re

from vlakeep.methods.l2_sp import L2SP


class MAPS(L2SP):
    label, label_zh = "MAPS", "MAPS"

    def weights_of(self, names):
        places, last = {}, 0
        for name in names:
            found = re.search(r"layers\.(\d+)\.", name) if name.startswith(self._prefix) else None
            # lm_head, behind the layers, is the last module.
            last = max(last, 1 + int(found[1])) if found else last
            places[name] = 1 + int(found[1]) if found else last + 1 if last else 0
        order = sorted(set(places.values()))
        return {name: 1.0 - order.index(place) / max(1, len(order) - 1) for name, place in places.items()}

    def attach(self, backbone) -> None:
        self._prefix = backbone.decoder_prefix + "layers."
        super().attach(backbone)


METHOD = MAPS
