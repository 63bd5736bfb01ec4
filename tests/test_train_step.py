"""One optimizer step against its closed form on a model of two numbers, and the learning rate against its own."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from vlakeep.core.config import TrainConfig
from vlakeep.core.loss_scale import LossScaler
from vlakeep.methods.baseline import Baseline
from vlakeep.openvla.backbone import LossOutput
from vlakeep.train import learning_rate, train_step

LR = 0.1


class Line(nn.Module):
    """The loss of a batch is w . x, so that its gradient is x whatever w is."""

    def __init__(self):
        super().__init__()
        self.w_D = nn.Parameter(torch.zeros(2))

    def forward(self, batch):
        one = torch.tensor(1)
        return LossOutput(self.w_D @ batch.input_ids, one, one, self.w_D.detach().norm())


class Penalised(Baseline):
    def __init__(self, model):
        self._model = model

    def penalty(self):
        return 3.0 * self._model.w_D[1]


def moved(*batches, clip=0.0, method=None, steps=1):
    """(w after steps of SGD from zero, the last step's metrics)."""
    model = Line()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    batches = [SimpleNamespace(input_ids=torch.tensor(batch)) for batch in batches]
    for step in range(1, steps + 1):
        metrics = train_step(model, method(model) if method else Baseline(), optimizer, LossScaler(False), batches,
                             TrainConfig(clip=clip), step, True)
    return model.w_D.detach(), metrics


def test_a_step_follows_the_mean_gradient_of_its_micro_batches_alone():
    w_D, metrics = moved([3.0, 0.0], [0.0, 4.0])
    assert torch.allclose(w_D, -LR * torch.tensor([1.5, 2.0])) and metrics["grad_norm"].item() == pytest.approx(2.5)
    again_D, metrics = moved([3.0, 0.0], [0.0, 4.0], steps=3)
    assert torch.allclose(again_D, 3 * w_D), "the gradient of an earlier step is still there"
    assert metrics["grad_norm"].item() == pytest.approx(2.5) and float(metrics["accuracy"]) == 1.0


def test_the_gradient_is_cut_to_the_limit_and_told_uncut():
    w_D, metrics = moved([3.0, 4.0], clip=1.0)
    assert torch.allclose(w_D, -LR * torch.tensor([0.6, 0.8]), atol=1e-6) and metrics["grad_norm"].item() == pytest.approx(5.0)
    assert torch.allclose(moved([3.0, 4.0], clip=10.0)[0], -LR * torch.tensor([3.0, 4.0]))
    assert torch.allclose(moved([3.0, 4.0], clip=0.0)[0], -LR * torch.tensor([3.0, 4.0])), "0 means no limit"


def test_a_penalty_counts_once_per_step_and_is_no_part_of_the_loss_that_is_told():
    w_D, metrics = moved([1.0, 0.0], [1.0, 0.0], method=Penalised)
    assert torch.allclose(w_D, -LR * torch.tensor([1.0, 3.0])) and metrics["loss"].item() == 0.0
    assert moved([1.0, 0.0], method=Penalised, steps=2)[1]["loss"].item() == pytest.approx(-LR)


def test_the_learning_rate_rises_to_lr_and_falls_to_a_tenth():
    constant, cosine = (TrainConfig(lr=2.0, warmup=4, steps=12, schedule=name) for name in ("constant", "cosine"))
    for config in (constant, cosine):
        assert [learning_rate(step, config) for step in (1, 2, 3, 4)] == [0.5, 1.0, 1.5, 2.0]
    assert [learning_rate(step, constant) for step in (5, 12, 100)] == [2.0] * 3
    assert learning_rate(8, cosine) == pytest.approx(0.55 * 2.0) and learning_rate(12, cosine) == pytest.approx(0.2)
    assert learning_rate(6, cosine) == pytest.approx(2.0 * (0.1 + 0.45 * (1 + math.cos(math.pi / 4))))
    assert learning_rate(100, cosine) == pytest.approx(0.2), "it does not rise again behind the end"
    assert learning_rate(1, TrainConfig(lr=2.0, warmup=0, steps=12, schedule="constant")) == 2.0
