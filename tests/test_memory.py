"""What a training step keeps in memory for its backward pass, seen by what autograd saves."""

from collections import Counter
from contextlib import closing
from dataclasses import replace

import pytest
import torch
from conftest import BASELINE
from torch.utils.flop_counter import FlopCounterMode

from vlakeep.data.loader import make_stream
from vlakeep.models.adapters import add_lora
from vlakeep.models.load import make_backbone
from vlakeep.models.workload import Numbers
from vlakeep.planning.predict import find_adapters, find_model


def kept(storage, config):
    """(bytes that the forward pass of a batch saves, by the outermost part of the network that runs; the batch; columns of lm_head)."""
    backbone = make_backbone(config.backbone, "cpu", storage.cache)
    add_lora(backbone, config.lora, config.seed)
    parts = {f"layer {i}": layer for i, layer in enumerate(backbone.decoder_layers)}
    parts.update({name: backbone.network.get_submodule(name) for name in ("vision_backbone", "projector", "language_model.lm_head")})
    where, saved, columns = ["elsewhere"], Counter(), []
    own, alive = {p.data_ptr() for p in backbone.parameters()}, []  # weights are there anyhow
    for name, part in parts.items():
        part.register_forward_pre_hook(lambda module, args, name=name: where.append(name))
        part.register_forward_hook(lambda module, args, output: where.pop() and None)
    parts["language_model.lm_head"].register_forward_pre_hook(lambda module, args: columns.append(args[0].shape[-2]))

    def pack(tensor):
        if tensor.data_ptr() not in own:
            own.add(tensor.data_ptr())  # one tensor may be saved by several operations
            saved[where[-1]] += tensor.nbytes
            alive.append(tensor)
        return tensor

    with closing(make_stream(config.data, storage.data, backbone.processor, 4, config.seed, 0, 1)) as stream:
        batch = next(stream)
    backbone.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = backbone(batch).loss
    loss.backward()
    return saved, batch, columns


@pytest.mark.parametrize("layers, first", [("last:2", 4), ("0,5", 0), ("5", 5)])
def test_what_lies_below_the_first_adapted_layer_keeps_nothing(world, layers, first):
    storage, make_config = world
    saved, _, _ = kept(storage, make_config(BASELINE, "--lora.layers", layers))
    numbered = {int(name.split()[1]) for name in saved if name.startswith("layer")}
    assert numbered == set(range(first, 6)), "and every layer from there on passes the gradient"
    assert not {"vision_backbone", "projector"} & saved.keys()


def test_checkpointing_keeps_the_input_of_a_layer_alone(world):
    storage, make_config = world
    saved, batch, _ = kept(storage, make_config(BASELINE, "--lora.layers", "last:2"))
    checkpointed, _, _ = kept(storage, make_config(BASELINE, "--lora.layers", "last:2", "--backbone.gradient_checkpointing", True))
    assert sum(checkpointed[name] for name in ("layer 4", "layer 5")) == 0 < saved["layer 4"]
    assert sum(checkpointed.values()) < sum(saved.values()) / 3


def test_only_columns_from_the_first_label_on_go_through_the_head(world):
    storage, make_config = world
    saved, batch, columns = kept(storage, make_config(BASELINE, "--lora.layers", "last:1"))
    labelled = int((batch.labels != -100).any(0).sum())
    assert columns == [batch.input_ids.shape[1] - batch.first_label] and labelled <= columns[0] < batch.input_ids.shape[1] / 2


def test_the_plan_counts_what_autograd_saves_layer_by_layer(world):
    storage, make_config = world
    config = make_config(BASELINE, "--lora.layers", "3,5")
    saved, batch, _ = kept(storage, config)
    model = find_model(config, storage.cache)
    tokens = len(batch.input_ids) * (batch.input_ids.shape[1] + model.work.patches)
    adapters, numbers = find_adapters(config, model), Numbers.of(config)
    for number in (4, 5):  # without adapters and with them; the norm of layer 3 keeps nothing yet
        leaves = adapters.leaves if number in adapters.layers else []
        counted = model.work.layer_keeps(leaves, adapters.rank, numbers) * tokens
        assert saved[f"layer {number}"] == pytest.approx(counted, rel=0.1), number


def test_the_plan_counts_the_products_of_a_step(world):
    storage, make_config = world
    config = make_config(BASELINE, "--lora.layers", "3,5")
    backbone = make_backbone(config.backbone, "cpu", storage.cache)
    add_lora(backbone, config.lora, config.seed)
    with closing(make_stream(config.data, storage.data, backbone.processor, 4, config.seed, 0, 1)) as stream:
        batch = next(stream)
    with FlopCounterMode(display=False) as counter:
        backbone(batch).loss.backward()
    model = find_model(config, storage.cache)
    text, labelled = batch.input_ids.shape[1], batch.input_ids.shape[1] - batch.first_label
    work = replace(model.work, text=text, labelled=labelled)
    planned = work.training_step(find_adapters(config, model), Numbers.of(config), len(batch.input_ids))
    assert planned.half + planned.single == pytest.approx(counter.get_total_flops(), rel=0.1)
