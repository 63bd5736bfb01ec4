"""What a probe protects: how much of the energy of other inputs lies where the gains are open.

For every input of an adapted linear and every group of prompts (a kind of held-out probe items, another probe, the new task's data) the
energy along each stored direction is measured, e_k = mean over tokens of (v_k . x)^2. With gains g the share that passes is
    passed = sum_k g_k^2 e_k / sum_k e_k
A group that shall be kept is covered when little more of it passes than of the probe itself. The new task can be learnt beside the old
when more of it passes. Axes: T tokens, D input size, K directions.
"""

from typing import Dict, Iterable, List

import torch
from tqdm import tqdm

from vlakeep.teacher.spectrum import Spectrum, gains

NOT_COVERED = 10.0  # a group of which this many times more passes than of the probe is said not to be covered
REFERENCE = 0.01  # passed energy of the probe at which groups are compared


@torch.no_grad()
def directional_energy(backbone, batches: Iterable, linears: Dict[str, torch.nn.Module], spectra: Dict[str, Spectrum], key_of,
                       total: int = None, desc: str = "coverage") -> Dict[str, torch.Tensor]:
    """Input -> mean energy of its tokens along each stored direction and, last, in all others [K + 1], float64 on the CPU."""
    sums: Dict[str, torch.Tensor] = {}
    handles, tokens, current = [], 0, {"mask": None}
    device = backbone.device

    def accumulate(key):
        vectors_DK = spectra[key].vectors.to(device)

        def hook(module, args):
            if current["mask"] is None:  # the model also runs to make the next batch
                return
            x_TD = args[0][current["mask"]].float()
            along_K = (x_TD @ vectors_DK).square().sum(0).double()
            rest = (x_TD.square().sum().double() - along_K.sum()).clamp(min=0)
            row = torch.cat([along_K, rest[None]])
            sums[key] = sums[key] + row if key in sums else row
        return hook

    try:
        for key, linear in {key_of(name): linear for name, linear in reversed(list(linears.items()))}.items():
            handles.append(linear.register_forward_pre_hook(accumulate(key)))
        for batch in tqdm(batches, desc=desc, total=total, leave=False):
            prefix = backbone.embed(batch)
            current["mask"] = prefix.attention_mask_BS
            tokens += int(prefix.attention_mask_BS.sum())
            backbone.run_layers(prefix)
            current["mask"] = None
    finally:
        for handle in handles:
            handle.remove()
    return {key: value.cpu() / max(tokens, 1) for key, value in sums.items()}


def passed(energy: torch.Tensor, one: Spectrum, opening: float, unit: float, steepness: float) -> float:
    """Share of a group's energy that passes the gains of one input; `energy` [K + 1] as directional_energy gives it."""
    lam = opening * unit
    g_K = gains(torch.cat([one.values.double(), torch.tensor([one.rest]).double()]), lam, steepness)
    return float((g_K.square() * energy).sum() / energy.sum().clamp(min=1e-30))


def report(groups: Dict[str, Dict[str, torch.Tensor]], spectra: Dict[str, Spectrum], steepness: float) -> Dict[str, Dict]:
    """Group -> {"passed": mean over the inputs, "ratio": to the group "probe", "layers": {layer: passed}}, at the opening where
    REFERENCE of the probe's energy passes."""
    opening = _opening(groups["probe"], spectra, steepness)

    def shares(energies):
        return {key: passed(energies[key], one, opening, one.mean, steepness) for key, one in spectra.items()}

    own = shares(groups["probe"])
    mean = sum(own.values()) / len(own)
    found = {}
    for name, energies in groups.items():
        each = shares(energies)
        layers: Dict[str, List[float]] = {}
        for key, value in each.items():
            layers.setdefault(key.split(".")[1], []).append(value)
        average = sum(each.values()) / len(each)
        found[name] = {"passed": average, "ratio": average / max(mean, 1e-30),
                       "layers": {layer: sum(values) / len(values) for layer, values in layers.items()}}
    return found


def _opening(energies: Dict[str, torch.Tensor], spectra: Dict[str, Spectrum], steepness: float) -> float:
    low, high = -9.0, 3.0
    for _ in range(50):
        middle = (low + high) / 2
        mean = sum(passed(energies[key], one, 10 ** middle, one.mean, steepness) for key, one in spectra.items()) / len(spectra)
        low, high = (middle, high) if mean < REFERENCE else (low, middle)
    return 10 ** low


def warnings(found: Dict[str, Dict]) -> List[str]:
    """One line for each group to be kept that the probe does not cover, and one for new data that leave no room."""
    lines = []
    for name, one in found.items():
        if name.startswith("new:"):
            if one["ratio"] < 1.5:
                lines.append(f"{name}: its inputs pass only {one['ratio']:.1f} times as much as those of the probe, so what it teaches "
                             "cannot be told from what is protected; expect slow learning, or a higher --thermostat.target")
        elif name != "probe" and one["ratio"] > NOT_COVERED:
            lines.append(f"{name}: {one['ratio']:.0f} times as much of its inputs passes as of the probe's: the probe does not cover it, "
                         "and it will be forgotten; add items of this form to the probe")
    return lines
