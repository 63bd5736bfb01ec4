"""ICSM step 1, collect: what the frozen teacher does on the probe.

pooled_instruction: s_i [D] per representative layer, the mean of the layer's raw output over instruction tokens (O3, O4).
tokens: the uncentred second moment of the inputs of every adapted linear over all valid tokens, image patches included. The
    teacher continues each prompt by itself first, so that the positions at which answers are decided are part of it.

Axes: N items, B batch, S sequence (pictures and text), L text, D hidden or input size.
"""

from dataclasses import dataclass
from typing import Any, Callable, Dict, Iterable, List

import torch
from tqdm import tqdm

from vlakeep.data.sample import Batch
from vlakeep.models.outputs import captured_outputs
from vlakeep.probe.pooling import masked_mean


@dataclass
class Pooled:
    """states[l] [N, D] float32 on the CPU; `empty` counts items whose instruction mask kept nothing (left out of the statistics)."""

    states: Dict[int, torch.Tensor]
    empty: int
    # Mean norm of the instruction hidden states per layer: the unit of the injected perturbation.
    scale: Dict[int, float]
    kept: List[int]


def pooled_states(backbone, batches: Iterable, layers: List[int], total: int = None, quiet: bool = False,
                  where: str = "the probe") -> Pooled:
    """Pool instruction tokens of each item. `batches` yields (prompt Batch, instruction mask [B, L]); `where` is for messages."""
    return pooled(pooled_batches(backbone, batches, layers, total, quiet), layers, where)


@torch.no_grad()
def pooled_batches(backbone, batches: Iterable, layers: List[int], total: int = None, quiet: bool = False) -> List[Dict[str, Any]]:
    """What each batch adds to pooled_states, on the CPU: states [B, D] and the sum of norms by layer, empty [B], tokens that count."""
    found = []
    for batch, mask_BL in tqdm(batches, desc="pooling instructions", total=total, leave=False, **({"disable": True} if quiet else {})):
        prefix = backbone.embed(batch)
        mask_BS = backbone.sequence_mask(prefix, mask_BL)
        with captured_outputs(backbone.decoder_layers, layers) as outputs:
            backbone.run_layers(prefix, stop=max(layers) + 1)
        one: Dict[str, Any] = {"states": {}, "norms": {}, "tokens": int(mask_BL.sum())}
        for layer in layers:
            pooled_BD, empty_B = masked_mean(outputs[layer].float(), mask_BS)
            one["states"][layer] = pooled_BD.cpu()
            one["norms"][layer] = outputs[layer].float().norm(dim=-1)[mask_BS].sum().item()
        one["empty"] = empty_B.cpu()
        found.append(one)
    return found


def pooled(batches: Iterable[Dict[str, Any]], layers: List[int], where: str = "the probe") -> Pooled:
    """pooled_states of what its batches add, in their order."""
    states, flags, norms, count = {layer: [] for layer in layers}, [], {layer: 0.0 for layer in layers}, 0
    for one in batches:
        for layer in layers:
            states[layer].append(one["states"][layer])
            norms[layer] += one["norms"][layer]
        flags.append(one["empty"])
        count += one["tokens"]
    empty_N = torch.cat(flags)
    if empty_N.all():
        raise ValueError(f"{where}: every probe item has an empty instruction mask, so there is nothing to pool; look at the "
                         "masks with `vlakeep audit-probe` and at the prompt template of the probe")
    # Left out: as a row of zeros it would pull the mean and turn the first directions towards itself.
    keep_N = ~empty_N
    kept = {layer: torch.cat(parts)[keep_N] for layer, parts in states.items()}
    for layer, x_ND in kept.items():
        if not torch.isfinite(x_ND).all():
            raise ValueError(f"hidden states of layer {layer} are not finite on {where}: the weights are damaged (fetch the "
                             "base model again, or take another run), or --backbone.dtype is too narrow (use float32)")
    return Pooled(
        kept, int(empty_N.sum()),
        {layer: norms[layer] / max(count, 1) for layer in layers}, keep_N.nonzero()[:, 0].tolist(),
    )


@torch.no_grad()
def with_own_answers(backbone, batch: Batch, tokens: int) -> Batch:
    """The prompts, each followed by the teacher's own greedy answer (up to `tokens` ids, up to and with EOS)."""
    answers_BT, _ = backbone.generate(batch, max_new_tokens=tokens, stop_at_eos=True)
    pad, eos = backbone.processor.pad_token_id, backbone.processor.tokenizer.eos_token_id
    lengths = batch.attention_mask.sum(1).tolist()
    rows = []
    for ids, length, answer in zip(batch.input_ids, lengths, answers_BT.cpu()):
        answer = answer[answer != pad]
        # An answer that was cut gets its end, so that all answers end alike.
        if len(answer) and answer[-1] != eos:
            answer = torch.cat([answer, torch.tensor([eos])])
        rows.append(torch.cat([ids[:length].cpu(), answer]))
    input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(r), dtype=torch.bool) for r in rows], batch_first=True)
    return batch.with_text(input_ids, mask)


def passes(linears, limit_bytes: float, key_of: Callable[[str], str]) -> List[dict]:
    """`linears` in groups whose second moments fit the limit; those that share an input, by the model's `input_key`, stay together."""
    by_input: Dict[str, dict] = {}
    for name, linear in linears.items():
        by_input.setdefault(key_of(name), {})[name] = linear
    groups: List[dict] = []
    used = 0.0
    for members in by_input.values():
        # Moments are float32 whatever the type of the model.
        size = 4 * next(iter(members.values())).in_features ** 2
        if not groups or used + size > limit_bytes:
            groups.append({})
            used = 0.0
        groups[-1].update(members)
        used += size
    return groups


def dealt(linears, key_of: Callable[[str], str], hands: int) -> List[dict]:
    """`linears` in so many groups whose second moments are alike work; those that share an input stay together."""
    if hands == 1:
        return [dict(linears)]
    by_input: Dict[str, dict] = {}
    for name, linear in linears.items():
        by_input.setdefault(key_of(name), {})[name] = linear
    groups, loads = [set() for _ in range(hands)], [0] * hands
    for key, members in sorted(by_input.items(), key=lambda pair: -next(iter(pair[1].values())).in_features):
        least = loads.index(min(loads))
        groups[least].add(key)
        loads[least] += next(iter(members.values())).in_features ** 2
    return [{name: linear for name, linear in linears.items() if key_of(name) in own} for own in groups]


@torch.no_grad()
def token_moments(backbone, batches: Iterable, linears: Dict[str, torch.nn.Module], total: int = None) -> Dict[str, torch.Tensor]:
    """Second moment X^T X / n [D_in, D_in] of the inputs of each linear, float32 on the model's device, streaming over batches.

    `linears` maps a name to the plain linear; those that share an input are measured once. `batches` yields Batches.
    """
    moments, handles, tokens = {}, [], 0
    counting = {"mask": None}  # only while a batch is measured: making the next one may run the model too

    def accumulate(key):
        def hook(module, args):
            if counting["mask"] is None:
                return
            x_TD = args[0][counting["mask"]].float()
            moment_DD = moments.get(key)
            if moment_DD is None:
                moments[key] = x_TD.T @ x_TD
            else:
                moment_DD.addmm_(x_TD.T, x_TD)
        return hook

    try:
        measured = {backbone.input_key(name): linear for name, linear in reversed(list(linears.items()))}  # the first of those that share
        for key, linear in measured.items():
            handles.append(linear.register_forward_pre_hook(accumulate(key)))
        for batch in tqdm(batches, desc="token statistics", total=total, leave=False):
            prefix = backbone.embed(batch)
            counting["mask"] = prefix.attention_mask_BS
            tokens += int(prefix.attention_mask_BS.sum())
            backbone.run_layers(prefix)
            counting["mask"] = None
    finally:
        for handle in handles:
            handle.remove()
    return {key: moment_DD / max(tokens, 1) for key, moment_DD in moments.items()}
