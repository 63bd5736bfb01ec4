"""State of which every process may hold a piece: whole tensors for a checkpoint, and the pieces of a whole one that is loaded.

FSDP2 keeps parameters, gradients and Adam's moments as DTensors. What is saved are whole tensors under the names of always, so that a
checkpoint does not depend on how many processes wrote it, and one of a single process can be continued by many. Every process has to take
part in making a tensor whole, in one order; of a tensor that is not sharded nothing is asked, and it stays what it is.
"""

from typing import Any, Dict, List

import torch


def is_sharded(tensor: Any) -> bool:
    """Whether this is a DTensor, told without importing torch.distributed.tensor, which lies elsewhere before torch 2.5."""
    return isinstance(tensor, torch.Tensor) and hasattr(tensor, "full_tensor")


def whole(tensor: Any) -> Any:
    """A sharded tensor put together, in every process; anything else as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def whole_tree(tree: Any) -> Any:
    """Nested dictionaries, lists and tuples, such as an optimizer's state_dict, with all tensors whole."""
    if isinstance(tree, dict):
        return {key: whole_tree(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(whole_tree(value) for value in tree)
    return whole(tree)


def like(tensor: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """A whole tensor spread as `model` is, which has its shape; itself where `model` is not sharded."""
    if not is_sharded(model):
        return tensor
    try:
        from torch.distributed.tensor import distribute_tensor
    except ImportError:  # before torch 2.5
        from torch.distributed._tensor import distribute_tensor
    return distribute_tensor(tensor.to(model.device), model.device_mesh, model.placements)


def optimizer_like(state: Dict[str, Any], groups: List[Dict[str, Any]]) -> Dict[str, Any]:
    """An optimizer's state_dict of whole tensors, spread as the parameters of its groups are: moments have the shape of theirs."""
    params = [param for group in groups for param in group["params"]]
    if not any(is_sharded(param) for param in params):
        return state

    def spread(value: Any, param: torch.Tensor) -> Any:
        return like(value, param) if isinstance(value, torch.Tensor) and value.shape == param.shape else value

    numbers = [number for group in state["param_groups"] for number in group["params"]]
    found = {number: {key: spread(value, param) for key, value in state["state"][number].items()}
             for number, param in zip(numbers, params) if number in state["state"]}
    return {**state, "state": found}
