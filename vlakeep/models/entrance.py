"""The one entrance to a network: whatever touches a model's weights runs inside a call of the model itself, as nn.Module's __call__.

What spreads a model over devices acts around that call. FSDP2 (torch.distributed.fsdp.fully_shard) gathers the pieces of the weights before
it and drops them after it, and takes the module that is called first for the root: a sensor that ran decoder layers beside the call would
compute with pieces, or make a layer the root. DistributedDataParallel and hooks for profiling stand there too.

So `model.run_layers(prefix)`, from outside, is `model(Request(run_layers, prefix))`; `forward` runs it, and what it calls in turn runs
directly. Nobody has to know: the methods of ENTRANCES are wrapped where a class defines them.
"""

import functools
from typing import Any, Callable, Dict, NamedTuple, Tuple

import torch
from torch import nn

# Of Backbone: each computes with weights.
ENTRANCES = ("loss", "embed", "run_layers", "norm", "logits", "hidden_states", "next_logits", "generate", "read_text",
             "log_probabilities_of_continuation", "attempt_chunks")


class Request(NamedTuple):
    """A computation that is asked of a model from outside."""

    function: Callable
    given: Tuple[Any, ...]
    named: Dict[str, Any]


def entrance(function: Callable) -> Callable:
    """A method that goes through the model's call when it is not inside one."""
    @functools.wraps(function)
    def enter(model, *given, **named):
        return function(model, *given, **named) if model.inside else model(Request(function, given, named))
    return enter


class Entrance(nn.Module):
    """A module whose `forward` is the one entrance. A batch is asked for its loss (`loss`), which is what training calls."""

    inside = 0  # calls that are being run

    def __init_subclass__(cls, **named) -> None:
        super().__init_subclass__(**named)
        if "forward" in vars(cls):
            raise TypeError(f"{cls.__name__} defines forward, which is the one entrance to the network (models/entrance.py): define `loss`")
        for name in ENTRANCES:
            if name in vars(cls):
                setattr(cls, name, entrance(vars(cls)[name]))

    def loss(self, batch):
        """What a batch with labels is asked for."""
        raise NotImplementedError

    def read_text(self, ids_BL: torch.Tensor, places_BL: torch.Tensor, sees_BLL: torch.Tensor) -> torch.Tensor:
        """What `norm` gives for text without a picture and a state, [B, L, D]: the language model inside, asked as one.

        No prompt of the model looks like that, so a kind of model says here whether it makes sense, and how. places_BL: where each token
        stands; sees_BLL: bool, which tokens (second) each token (first) sees, so that several continuations may share a beginning.
        """
        raise ValueError(f"{type(self).__name__} reads no text without a picture (it has no read_text): ask the model questions about "
                         "pictures, with another --evaluate.benchmark")

    def forward(self, request):
        """A Request, or a batch with labels: its loss."""
        self.inside += 1
        try:
            if isinstance(request, Request):
                return request.function(self, *request.given, **request.named)
            return self.loss(request)
        finally:
            self.inside -= 1
