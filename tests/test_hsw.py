"""HSW: the transform against its literal formula, the contraction, and both sites against autograd."""

import pytest
import torch
from torch import nn

from vlakeep.hsw.lora_input import LoraInputSite
from vlakeep.hsw.residual import ResidualSite
from vlakeep.hsw.transform import Gains, gain_weights, join_bases, random_basis, scale_in_subspace, split, surgery


@pytest.fixture
def bases():
    basis_DK = random_basis(32, 12, seed=3)
    return basis_DK[:, :5].contiguous(), basis_DK[:, 5:].contiguous()


@pytest.mark.parametrize("beta,gamma", [(1.0, 1.0), (0.5, 0.0), (0.3, 0.9), (1.0, 0.5)])
def test_surgery_equals_the_literal_formula_in_float64(bases, beta, gamma):
    torch.manual_seed(0)
    grad = torch.randn(3, 7, 32, dtype=torch.float64)
    fragile, plastic = (b.double() for b in bases)
    gf, gp, gn = split(grad, fragile, plastic)
    literal = gn + beta * gp + gamma * gf
    literal = literal * min(1.0, (grad.norm() / (literal.norm() + 1e-12)).item())
    basis, count = torch.cat([fragile, plastic], 1), 5
    edited = surgery(grad, basis, gain_weights(Gains(beta, gamma), count, 12).double(), 1e-12)
    # The columns are orthonormal to float32 only.
    assert torch.allclose(edited, literal, atol=1e-6)
    assert edited.norm() <= grad.norm()


def test_gains_of_one_change_no_bit(bases):
    grad = torch.randn(4, 9, 32)
    basis, count = join_bases(*bases)
    weights = gain_weights(Gains(), count, basis.shape[1])
    assert torch.equal(scale_in_subspace(grad, basis, weights), grad)


def test_gamma_zero_empties_the_fragile_subspace_and_leaves_the_rest(bases):
    grad = torch.randn(2, 5, 32)
    basis, count = join_bases(*bases)
    edited = surgery(grad, basis, gain_weights(Gains(beta=1.0, gamma=0.0), count, 12), 1e-12)
    assert (edited @ bases[0]).abs().max() < 1e-5
    assert torch.allclose(edited @ bases[1], grad @ bases[1], atol=1e-5)


def test_a_basis_that_is_not_orthonormal_is_refused(bases):
    with pytest.raises(ValueError, match="not orthonormal"):
        join_bases(bases[0] * 1.1, bases[1])
    with pytest.raises(ValueError, match="NaN"):
        join_bases(bases[0] * float("nan"), bases[1])


@pytest.mark.parametrize("beta,gamma", [(0.0, 0.5), (1.2, 0.5), (0.5, -0.1), (0.5, 1.1)])
def test_gains_out_of_range_are_refused(beta, gamma):
    with pytest.raises(ValueError):
        Gains(beta, gamma)


class TupleLayer(nn.Module):
    """A layer in the older convention: returns a tuple."""

    def __init__(self, dim):
        super().__init__()
        self.linear = nn.Linear(dim, dim)

    def forward(self, x):
        return (x + self.linear(x),)


def stack_gradient(layers, x, site_layer=None, edit=None):
    """Gradients of sum(out * fixed) with the gradient at one layer's output edited by hand."""
    for layer in layers:
        layer.zero_grad()
    hidden = x
    for number, layer in enumerate(layers):
        hidden = layer(hidden)[0]
        if number == site_layer:
            hidden.register_hook(edit)
    (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum().backward()
    return [layer.linear.weight.grad.clone() for layer in layers]


def test_residual_site_edits_the_gradient_of_the_layer_output(bases):
    torch.manual_seed(1)
    layers, x = nn.ModuleList(TupleLayer(32) for _ in range(3)), torch.randn(2, 6, 32)
    basis, count = join_bases(*bases)
    weights = gain_weights(Gains(beta=0.6, gamma=0.1), count, 12)
    plain = stack_gradient(layers, x)
    wanted = stack_gradient(layers, x, 1, lambda g: surgery(g, basis, weights, 1e-12))
    site = ResidualSite(layers, {1: bases}, 1e-12, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(stack_gradient(layers, x), plain)), "gains of 1 must change nothing"
    site.set_gains(Gains(beta=0.6, gamma=0.1))
    site.meter.start(True)
    got = stack_gradient(layers, x)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted))
    assert torch.equal(got[2], plain[2]) and not torch.equal(got[1], plain[1]) and not torch.equal(got[0], plain[0])
    row = site.meter.read()
    assert 0 < row["g_prime_norm"] < row["g_norm"] and 0 < row["share_f"] < 1
    site.detach()
    assert all(torch.equal(a, b) for a, b in zip(stack_gradient(layers, x), plain))


def test_residual_site_refuses_a_layer_that_does_not_exist(bases):
    with pytest.raises(ValueError, match="layers 0 to 2"):
        ResidualSite(nn.ModuleList(TupleLayer(32) for _ in range(3)), {3: bases}, 1e-12, torch.float32)


class LoraLinear(nn.Module):
    def __init__(self, dim=32, rank=4):
        super().__init__()
        self.lora_A = nn.ModuleDict({"default": nn.Linear(dim, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, 16, bias=False)})

    def forward(self, x):
        return self.lora_B["default"](self.lora_A["default"](x))


def lora_gradient(linear, x):
    linear.zero_grad()
    linear(x).square().sum().backward()
    holder = linear.lora_A["default"]
    return (holder.parametrizations.weight.original if hasattr(holder, "parametrizations") else holder.weight).grad.clone()


def test_lora_input_site_gives_the_formula_on_the_rows_of_the_gradient(bases):
    torch.manual_seed(2)
    linear, x = LoraLinear(), torch.randn(8, 32)
    plain = lora_gradient(linear, x)
    weight = linear.lora_A["default"].weight.detach().clone()
    site = LoraInputSite({"lin": linear}, {"lin": {"f": bases[0], "p": bases[1]}})
    assert torch.equal(lora_gradient(linear, x), plain), "gains of 1 must change nothing"
    site.set_gains(Gains(beta=0.5, gamma=0.2))
    # With A_eff held at the old A the incoming gradient is `plain`, so that A's own gradient must be the formula.
    basis, count = join_bases(*bases)
    inverse = torch.linalg.inv(torch.eye(32) + basis @ torch.diag(gain_weights(Gains(0.5, 0.2), count, 12)) @ basis.T)
    with torch.no_grad():
        linear.lora_A["default"].parametrizations.weight.original.copy_(weight @ inverse)
    gf, gp, gn = split(plain, *bases)
    assert torch.allclose(lora_gradient(linear, x), gn + 0.5 * gp + 0.2 * gf, atol=1e-3, rtol=1e-4)
    site.meter.start(True)
    lora_gradient(linear, x)
    row = site.meter.read()
    assert row["g_prime_norm"] < row["g_norm"]


def test_leak_is_the_share_of_the_update_in_the_fragile_inputs(bases):
    linear = LoraLinear()
    site = LoraInputSite({"lin": linear}, {"lin": {"f": bases[0], "p": bases[1]}})
    update = linear.lora_B["default"].weight @ linear.lora_A["default"].weight
    wanted = (update @ bases[0]).square().sum() / update.square().sum()
    assert site.leak() == pytest.approx(wanted.item(), rel=1e-4)
    site.set_gains(Gains(beta=1.0, gamma=0.0))
    assert site.leak() < 1e-10, "gamma = 0 removes what A holds in Uf at once"


@pytest.mark.parametrize("dense", [True, False])
def test_the_complement_says_the_same_as_the_fragile_basis(dense, monkeypatch):
    monkeypatch.setattr("vlakeep.hsw.lora_input.DENSE", 1024 if dense else 0)
    whole = random_basis(32, 32, seed=4)
    forms = {"f": whole[:, :24], "p": whole[:, 24:28]}, {"n": whole[:, 28:], "p": whole[:, 24:28]}
    torch.manual_seed(5)
    start, x, found = LoraLinear().state_dict(), torch.randn(8, 32), []
    for bases in forms:
        linear = LoraLinear()
        linear.load_state_dict(start)
        site = LoraInputSite({"lin": linear}, {"lin": bases})
        before = site.leak()
        site.set_gains(Gains(beta=0.6, gamma=0.3))
        site.meter.start(True)
        gradient = lora_gradient(linear, x)
        found.append((gradient, linear.lora_A["default"].weight.detach(), before, site.leak(), site.meter.read()))
    (g0, a0, *leaks0, row0), (g1, a1, *leaks1, row1) = found
    assert torch.allclose(g0, g1, rtol=1e-4, atol=1e-4) and torch.allclose(a0, a1, atol=1e-5)
    assert leaks0 == pytest.approx(leaks1, rel=1e-3)
    assert row0 == pytest.approx(row1, rel=1e-3)


def test_detach_leaves_the_effective_weight(bases):
    linear = LoraLinear()
    site = LoraInputSite({"lin": linear}, {"lin": {"f": bases[0], "p": bases[1]}})
    site.set_gains(Gains(beta=0.5, gamma=0.0))
    effective = linear.lora_A["default"].weight.detach().clone()
    site.detach()
    assert not hasattr(linear.lora_A["default"], "parametrizations")
    assert torch.equal(linear.lora_A["default"].weight, effective)


def test_missing_or_foreign_input_subspace_is_refused(bases):
    with pytest.raises(ValueError, match="no input subspace"):
        LoraInputSite({"lin": LoraLinear()}, {})
    with pytest.raises(ValueError, match="another model"):
        LoraInputSite({"lin": LoraLinear(dim=24)}, {"lin": {"f": bases[0], "p": bases[1]}})
