"""What a loss asks of the weights of each linear: gradients, and Fisher information at the teacher's own answers, by backward passes.

    weight_gradients     G = dL/dW [O, D]                       of the new task's loss, mean over batches
    fisher_diagonal      F_ij = E[(d log p(y) / dW_ij)^2]       [O, D]; y the teacher's answer to a probe prompt, E over items
    output_fisher        F = E[sum_t d_t d_t^T]                 [O, O]; d_t the gradient of log p(y) at the linear's output, token t

With C = E[x x^T] of the inputs, F and C are the two factors of K-FAC (Martens and Grosse 2015): to second order the divergence of an
answer, in nats, is 1/2 tr(F dW C dW^T), summed over linears, if outputs' gradients and inputs are independent.

The adapters must be on and B zero, as add_lora leaves them: the function is the teacher's, and gradients reach every adapted linear.
Axes: B batch, S sequence, D input size, O output size.
"""

from contextlib import contextmanager
from typing import Callable, Dict, Iterable, Iterator, List, Optional

import torch
from tqdm import tqdm

from vlakeep.data.sample import Batch
from vlakeep.teacher.answers import Part, answer_log_probability


@contextmanager
def watched(backbone, linears: Dict[str, torch.nn.Module], on: Callable[[str, torch.Tensor, torch.Tensor], None]) -> Iterator[None]:
    """Within the context `on(name, x [B, S, D], d [B, S, O])` is called in backward passes: inputs of each linear, gradients at its
    output. No dropout; gradients of parameters are dropped at the end."""
    def watch(name):
        def forward(module, args, output):
            if output.requires_grad:  # not the first of two passes of gradient checkpointing
                output.register_hook(lambda grad: on(name, args[0].detach().float(), grad.float()))
        return forward

    training, handles = backbone.training, [linear.register_forward_hook(watch(name)) for name, linear in linears.items()]
    backbone.eval()
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        backbone.train(training)
        for parameter in backbone.parameters():
            parameter.grad = None


def weight_gradients(backbone, batches: List[Batch], linears: Dict[str, torch.nn.Module]) -> Dict[str, torch.Tensor]:
    """Linear -> G [O, D] float32 on the CPU."""
    sums: Dict[str, torch.Tensor] = {}

    def on(name, x_BSD, d_BSO):
        grad_OD = (d_BSO.flatten(0, -2).T @ x_BSD.flatten(0, -2)).cpu()
        sums[name] = sums[name] + grad_OD if name in sums else grad_OD

    with watched(backbone, linears, on):
        for batch in tqdm(batches, desc="gradients of the new task", leave=False):
            backbone(batch.to(backbone.device)).loss.backward()
    return {name: sums[name] / len(batches) for name in linears}


def _backward_of_answers(backbone, parts: Iterable[Part], first: int, rows: int, desc: str) -> Iterator[int]:
    """Backward passes of log p(answer), `rows` items at a time; yields how many items each had."""
    for piece in tqdm([few for part in parts for few in part.split(rows)], desc=desc, leave=False):
        part = piece.to(backbone.device)
        last_BSD = backbone.run_layers(part.prefix, start=first, stop=backbone.num_layers)
        answer_log_probability(backbone, last_BSD, part).backward()
        yield len(part.text_BL)


def fisher_diagonal(backbone, parts: Iterable[Part], first: int, linears, weights_N: Optional[torch.Tensor] = None
                    ) -> Dict[str, torch.Tensor]:
    """Linear -> F [O, D] float32 on the model's device. parts: items in front of layer `first`. weights_N: of the items, 1 in the mean."""
    sums: Dict[str, torch.Tensor] = {}
    number, weights = 0, None if weights_N is None else weights_N.tolist()

    def on(name, x_BSD, d_BSO):
        square_OD = (d_BSO[0].T @ x_BSD[0]).square() * (1.0 if weights is None else weights[number])
        sums[name] = sums[name].add_(square_OD) if name in sums else square_OD

    with watched(backbone, linears, on):
        for count in _backward_of_answers(backbone, parts, first, 1, "Fisher information"):  # the square belongs to one item
            number += count
    return {name: sums[name] / max(number, 1) for name in linears}


def output_fisher(backbone, parts: Iterable[Part], first: int, linears, weights_N: Optional[torch.Tensor] = None
                  ) -> Dict[str, torch.Tensor]:
    """Linear -> F [O, O] float32 on the model's device; arguments as fisher_diagonal."""
    sums: Dict[str, torch.Tensor] = {}
    number = 0

    def on(name, x_BSD, d_BSO):
        rows = len(d_BSO)
        weights_B = torch.ones(rows) if weights_N is None else weights_N[number:number + rows].float()
        d_TO = (d_BSO * weights_B.sqrt().to(d_BSO.device)[:, None, None]).flatten(0, 1)
        sums[name] = sums[name].addmm_(d_TO.T, d_TO) if name in sums else d_TO.T @ d_TO

    with watched(backbone, linears, on):
        for count in _backward_of_answers(backbone, parts, first, 4, "K-FAC"):
            number += count
    return {name: sums[name] / max(number, 1) for name in linears}


def kfac_energy(A_RD: torch.Tensor, B_OR: torch.Tensor, C_DD: torch.Tensor, F_OO: torch.Tensor) -> torch.Tensor:
    """tr(F dW C dW^T) of dW = B A, a differentiable scalar; dW [O, D] is never formed."""
    return ((B_OR.T @ F_OO @ B_OR) * (A_RD @ C_DD @ A_RD.T)).sum()
