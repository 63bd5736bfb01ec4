"""What a probe protects: how much of other inputs lies where the gains are open.

For every input of an adapted linear and every group of prompts (a kind of held-out probe items, another probe, the new task's data) the
energy along each stored direction is measured, e_k = mean over tokens of (v_k . x)^2. With gains g the energy that passes is
sum_k g_k^2 e_k, and `ratio` is that of the group over that of the probe, averaged over the inputs. A group that shall be kept is covered
when its ratio is near 1. The new task can be learnt beside the old where its ratio is above 1.

Axes: T tokens, D input size, K directions.
"""

from typing import Any, Dict, Iterable, List, Optional, Sequence

import torch
from tqdm import tqdm

from vlakeep.teacher.answers import Part
from vlakeep.teacher.moments import Moments
from vlakeep.teacher.spectrum import Spectrum, gains

NOT_COVERED = 3.0  # a group of which this many times more passes than of the probe is said not to be covered
REFERENCE = 0.01  # passed energy of the probe at which groups are compared


class InputWatch:
    """Within the context, `on(key, x)` is called with the inputs x [B, S, D] of every distinct input whenever the model runs."""

    def __init__(self, linears: Dict[str, torch.nn.Module], key_of, on):
        self._handles, self._on = [], on
        self._measured = {key_of(name): linear for name, linear in reversed(list(linears.items()))}  # the first of those that share

    def __enter__(self) -> "InputWatch":
        for key, linear in self._measured.items():
            self._handles.append(linear.register_forward_pre_hook(self._hook(key)))
        return self

    def _hook(self, key):
        def hook(module, args):
            self._on(key, args[0])
        return hook

    def __exit__(self, *error) -> None:
        for handle in self._handles:
            handle.remove()


@torch.no_grad()
def input_moments(backbone, parts: Iterable[Part], weights_N: Optional[torch.Tensor], first: int, linears: Dict[str, torch.nn.Module],
                  key_of, stop: Optional[int] = None, answers: bool = True) -> Dict[str, torch.Tensor]:
    """Input -> uncentred second moment X^T W X / sum W [D, D] over all valid tokens, float32 on the model's device.

    answers: whether the teacher's own answers are among these tokens, or the prompts alone.
    The layers from `first`, in front of which the parts stand, to before `stop` are run, None for all.
    weights_N: of the rows of the parts, in order; a token has its row's. None weighs all alike.
    """
    moments = Moments()
    mask_BS: Any = None
    root_BS: Any = None
    tokens, position = 0.0, 0

    with InputWatch(linears, key_of, lambda key, x_BSD: moments.add(key, x_BSD, mask_BS, root_BS)):
        for part in parts:
            part = part.to(backbone.device)
            mask_BS = part.prefix.attention_mask_BS
            if not answers:
                mask_BS = mask_BS & ~backbone.sequence_mask(part.prefix, part.answer_mask_BL())
            rows = len(mask_BS)
            weights_B = torch.ones(rows).double() if weights_N is None else weights_N[position:position + rows]
            weights_B, position = weights_B.to(mask_BS.device), position + rows
            root_BS = weights_B.sqrt().float()[:, None].expand(mask_BS.shape)
            tokens += float((weights_B * mask_BS.sum(1)).sum())
            backbone.run_layers(part.prefix, start=first, stop=backbone.num_layers if stop is None else stop)
    return moments.divided(tokens)


def directional_energy(backbone, parts: Sequence[Part], first: int, labels: Sequence[str], linears: Dict[str, torch.nn.Module],
                       spectra: Dict[str, Spectrum], key_of) -> Dict[str, Dict[str, torch.Tensor]]:
    """Label -> input -> mean energy of its tokens along each stored direction and, last, in all others [K + 1], float64 on the CPU.

    `labels` names the group of every row of the parts, in order.
    """
    return mean_energies(part_energies(backbone, parts, first, labels, linears, spectra, key_of), labels)


Energies = Dict[str, Dict[str, Any]]  # label -> {"tokens": how many, "sums": input -> energy of all of them [K + 1]}


@torch.no_grad()
def part_energies(backbone, parts: Sequence[Part], first: int, labels: Sequence[str], linears: Dict[str, torch.nn.Module],
                  spectra: Dict[str, Spectrum], key_of) -> List[Energies]:
    """What each part adds to directional_energy, on the CPU."""
    found: List[Energies] = []
    vectors = {key: one.vectors.to(backbone.device) for key, one in spectra.items()}
    mask_BS: Any = None
    rows: List[str] = []

    def add(key, x_BSD):
        squares_BSK = (x_BSD.float() @ vectors[key]).square() * mask_BS[..., None]
        along_BK = squares_BSK.sum(1).double()
        total_B = (x_BSD.float().square().sum(-1) * mask_BS).sum(1).double()
        energy_BK = torch.cat([along_BK, (total_B - along_BK.sum(1)).clamp(min=0)[:, None]], 1)
        for label, one in found[-1].items():
            chosen = torch.tensor([own == label for own in rows], device=energy_BK.device)
            one["sums"][key] = energy_BK[chosen].sum(0)

    position = 0
    with InputWatch(linears, key_of, add):
        for part in tqdm(parts, desc="coverage", leave=False):
            rows = list(labels[position:position + len(part.text_BL)])
            position += len(rows)
            part = part.to(backbone.device)
            mask_BS = part.prefix.attention_mask_BS
            found.append({label: {"tokens": 0, "sums": {}} for label in rows})
            for label, count in zip(rows, mask_BS.sum(1).tolist()):
                found[-1][label]["tokens"] += count
            backbone.run_layers(part.prefix, start=first, stop=backbone.num_layers)
            for one in found[-1].values():
                one["sums"] = {key: row.cpu() for key, row in one["sums"].items()}
    return found


def mean_energies(parts: Iterable[Energies], labels: Iterable[str]) -> Dict[str, Dict[str, torch.Tensor]]:
    """directional_energy of what its parts add, in their order; labels: all there are."""
    sums: Dict[str, Dict[str, torch.Tensor]] = {label: {} for label in labels}
    tokens = dict.fromkeys(sums, 0)
    for part in parts:
        for label, one in part.items():
            tokens[label] += one["tokens"]
            for key, row in one["sums"].items():
                sums[label][key] = sums[label][key] + row if key in sums[label] else row
    return {label: {key: value / max(tokens[label], 1) for key, value in found.items()} for label, found in sums.items()}


def own_energy(one: Spectrum) -> torch.Tensor:
    """What directional_energy gives for the items that the spectrum was made of [K + 1]."""
    return torch.cat([one.values.double(), torch.tensor([one.rest * (one.vectors.shape[0] - one.vectors.shape[1])]).double()])


def passed(energy: torch.Tensor, one: Spectrum, opening: float, steepness: float) -> float:
    """Energy of a group that passes the gains of one input; `energy` [K + 1] as directional_energy gives it."""
    g_K = gains(torch.cat([one.values.double(), torch.tensor([one.rest]).double()]), opening * one.mean, steepness)
    return float((g_K.square() * energy).sum())


def report(groups: Dict[str, Dict[str, torch.Tensor]], spectra: Dict[str, Spectrum], steepness: float) -> Dict[str, Dict]:
    """Group -> {"ratio", "largest": of any input, "layers": {layer: ratio}}, at the opening where REFERENCE of the probe's energy
    passes, averaged over the inputs."""
    own = {key: own_energy(one) for key, one in spectra.items()}
    low, high = -9.0, 3.0
    for _ in range(50):
        middle = (low + high) / 2
        share = sum(passed(own[key], one, 10 ** middle, steepness) / max(float(own[key].sum()), 1e-30) for key, one in spectra.items())
        low, high = (middle, high) if share / len(spectra) < REFERENCE else (low, middle)
    found = {}
    for name, energies in groups.items():
        each = {key: passed(energies[key], one, 10 ** low, steepness) / max(passed(own[key], one, 10 ** low, steepness), 1e-30)
                for key, one in spectra.items()}
        layers: Dict[str, List[float]] = {}
        for key, value in each.items():
            layers.setdefault(key.split(".")[1], []).append(value)
        found[name] = {"ratio": sum(each.values()) / len(each), "largest": max(each.values()),
                       "layers": {layer: sum(values) / len(values) for layer, values in layers.items()}}
    return found


def warnings(found: Dict[str, Dict]) -> List[str]:
    """One line for each group to be kept that the probe does not cover, and one for new data that leave no room."""
    lines = []
    for name, one in found.items():
        if name.startswith("new:"):
            if one["largest"] < 1.5:
                lines.append(f"{name}: nowhere do its inputs pass more than {one['largest']:.1f} times as much as those of the probe, so "
                             "what it teaches cannot be told from what is protected; expect slow learning, or a higher "
                             "--thermostat.target")
        elif one["ratio"] > NOT_COVERED:
            lines.append(f"{name}: {one['ratio']:.0f} times as much of its inputs passes as of the probe's: the probe does not cover it, "
                         "and it will be forgotten; add items of this form to the probe")
    return lines
