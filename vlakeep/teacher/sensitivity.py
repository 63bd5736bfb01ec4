"""ICSM step 3, sensitivity: order the candidates by what breaks (O6).

Direction u_k times epsilon is added to the hidden states of all instruction tokens at layer l; only the layers above l are
re-run, from cached activations. The measure is the KL divergence between the clean and the perturbed next-token distributions,
averaged over all text positions from the first injected one on: at the last layer nothing flows to later positions, so the
answer positions alone would give zero for every direction.

In a model whose prompt sees itself (Backbone.prompt_sees_itself) the prompt's columns were never trained to predict anything, so that
their distributions mean nothing: there the measure is taken where the teacher's own answer is predicted. Nothing reads the prompt after
the last layer, so that its directions are injected at the layer's input. `measured` says which way was taken, and meta.json keeps it.

Axes: B items, S sequence, D hidden, V vocabulary, T selected positions.
"""

from typing import Dict, Iterable, List, Tuple

import torch
from torch.nn import functional as F
from tqdm import tqdm

from vlakeep.models.outputs import captured_outputs
from vlakeep.teacher.collect import with_own_answers


def measured(backbone, layer: int) -> Dict[str, str]:
    """Where directions of a layer are injected and where their effect is measured."""
    if not backbone.prompt_sees_itself:
        return {"injected_at": "output", "measured_on": "text"}
    return {"injected_at": "input" if layer == backbone.num_layers - 1 else "output", "measured_on": "answers"}


def answer_positions(backbone, prompts, whole, prefix) -> torch.Tensor:
    """[B, S] bool: the columns that predict the answers in `whole`, which holds these prompts with answers behind them."""
    index_L = torch.arange(whole.input_ids.shape[1])
    start_B1 = prompts.attention_mask.sum(1, keepdim=True).cpu()
    predicts_BL = (index_L >= start_B1 - 1) & (index_L < whole.attention_mask.sum(1, keepdim=True).cpu() - 1)
    return backbone.sequence_mask(prefix, predicts_BL)


def measured_positions(mask_BS: torch.Tensor, valid_BS: torch.Tensor) -> torch.Tensor:
    """Valid positions from each row's first instruction token on, [B, S] bool."""
    return (mask_BS.long().cumsum(1) > 0) & valid_BS.bool()


def sensitivities(backbone, batches: List[Tuple], layer: int, candidates_DK: torch.Tensor, step: float) -> torch.Tensor:
    """KL [K] per candidate direction. `batches` holds (prompt Batch, instruction mask [B, L]); `step` is epsilon in hidden units."""
    return mean_sensitivity(batch_sensitivities(backbone, batches, layer, candidates_DK, step), candidates_DK.shape[1])


def mean_sensitivity(batches: Iterable[Tuple[torch.Tensor, int]], count: int) -> torch.Tensor:
    """`sensitivities` of `count` directions, of what its batches add, in their order."""
    total_K, positions = torch.zeros(count, dtype=torch.float64), 0
    for sum_K, number in batches:
        total_K, positions = total_K + sum_K, positions + number
    return total_K / max(positions, 1)


@torch.no_grad()
def batch_sensitivities(backbone, batches: List[Tuple], layer: int, candidates_DK: torch.Tensor, step: float
                        ) -> List[Tuple[torch.Tensor, int]]:
    """(sum of the KL over the batch's positions [K] float64 on the CPU, how many these are) of each batch."""
    device, answers = backbone.device, backbone.prompt_sees_itself
    layer -= measured(backbone, layer)["injected_at"] == "input"  # whose output is that layer's input
    found = []

    def log_probabilities(prefix, hidden_BSD, where_BS):
        upper_BSD = backbone.run_layers(prefix.with_hidden(hidden_BSD), start=layer + 1)
        return torch.log_softmax(backbone.logits(upper_BSD[where_BS]).float(), dim=-1)

    with tqdm(total=len(batches) * candidates_DK.shape[1], desc=f"sensitivity of layer {layer}", leave=False) as bar:
        for batch, mask_BL in batches:
            whole = with_own_answers(backbone, batch, backbone.answer_tokens) if answers else batch
            prefix = backbone.embed(whole)
            longer = whole.input_ids.shape[1] - mask_BL.shape[1]  # less than nothing where padding of the prompts went
            mask_BS = backbone.sequence_mask(prefix, F.pad(mask_BL, (0, longer)))
            with captured_outputs(backbone.decoder_layers, [layer]) as outputs:
                backbone.run_layers(prefix, stop=layer + 1)
            hidden_BSD = outputs[layer]
            where_BS = answer_positions(backbone, batch, whole, prefix) & mask_BS.any(1, keepdim=True) if answers else measured_positions(
                mask_BS, prefix.attention_mask_BS)
            # Nothing is pushed in a batch of empty masks.
            if not where_BS.any():
                bar.update(candidates_DK.shape[1])
                found.append((torch.zeros(candidates_DK.shape[1], dtype=torch.float64), 0))
                continue
            clean_TV = log_probabilities(prefix, hidden_BSD, where_BS)
            probabilities_TV = clean_TV.exp()
            total_K = torch.zeros(candidates_DK.shape[1], dtype=torch.float64)
            for k in range(candidates_DK.shape[1]):
                push_BSD = mask_BS[..., None] * (step * candidates_DK[:, k].to(device, hidden_BSD.dtype))
                kl_T = (probabilities_TV * (clean_TV - log_probabilities(prefix, hidden_BSD + push_BSD, where_BS))).sum(-1)
                total_K[k] = kl_T.double().sum().cpu()
                bar.update()
            found.append((total_K, int(where_BS.sum())))
    return found


def order_by_fragility(candidates_DK: torch.Tensor, kl_K: torch.Tensor, fragile_fraction: float):
    """(Uf [D, r_f], Up [D, r - r_f], order): the most fragile first; ties keep the SVD order."""
    order = torch.argsort(kl_K, descending=True, stable=True)
    # At least one direction on either side, so that each gain acts on something.
    fragile = max(1, min(len(order) - 1, round(len(order) * fragile_fraction)))
    ranked_DK = candidates_DK[:, order]
    return ranked_DK[:, :fragile].contiguous(), ranked_DK[:, fragile:].contiguous(), order


if __name__ == "__main__":  # sanity check: python -m vlakeep.teacher.sensitivity
    generator = torch.Generator().manual_seed(0)
    head_VD = torch.randn(50, 6, generator=generator) * torch.tensor([0.1, 3.0, 0.5, 2.0, 0.2, 1.0])  # direction 1 breaks most
    hidden_TD = torch.randn(200, 6, generator=generator)
    clean_TV = torch.log_softmax(hidden_TD @ head_VD.T, -1)
    pushed = [torch.log_softmax((hidden_TD + 0.3 * push_D) @ head_VD.T, -1) for push_D in torch.eye(6)]
    kl_K = torch.stack([(clean_TV.exp() * (clean_TV - other_TV)).sum(-1).mean() for other_TV in pushed])
    found, planted = order_by_fragility(torch.eye(6), kl_K, 0.5)[2].tolist(), [1, 3, 5, 2, 4, 0]
    print(f"fragility order {found}, planted {planted}")
    assert found == planted
