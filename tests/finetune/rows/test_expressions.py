"""Row-wise expressions of held weights: followed where they can be, ordinary tensors where not."""

import copy

import pytest
import torch
import torch.nn.functional as F
from sample_networks import ROWS, assert_close, held, taken
from torch import nn
from torch.nn.utils import spectral_norm
from torch.nn.utils.parametrizations import spectral_norm as parametrized_spectral_norm
from torch.nn.utils.parametrizations import weight_norm

from minegan_fast.finetune import SparseFinetuner


class Equalised(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4, 3, 3))
        self.bias = nn.Parameter(torch.randn(6))

    def forward(self, x):
        return F.conv2d(x, self.weight * 0.3, self.bias * 0.5, padding=1)


class Rosinality(nn.Module):
    """[1, out, in, k, k], scaled, and turned round for a transposed convolution."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, 6, 4, 3, 3))

    def forward(self, x):
        return F.conv_transpose2d(x, (self.weight / 7)[0].transpose(0, 1).contiguous(), stride=2)


class Demodulated(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, 6, 4, 3, 3))

    def forward(self, x):
        weight = self.weight.squeeze(0) if x.shape[0] == 99 else self.weight[0] * 0.1
        norms = F.linear(x.mean((2, 3)).square(), weight.square().sum((2, 3)))
        return F.conv2d(x, weight, padding=1) * torch.rsqrt(norms + 1)[:, :, None, None]


class Standardised(nn.Conv2d):
    def forward(self, x):
        w = self.weight
        w = (w - w.mean(dim=(1, 2, 3), keepdim=True)) / (w.var((1, 2, 3), keepdim=True) + 1e-5).sqrt()
        return F.conv2d(x, w, self.bias, padding=1)


class BigGANSpectral(nn.Conv2d):
    """Spectral normalisation as BigGAN's public code writes it."""

    def __init__(self):
        super().__init__(4, 6, 3, padding=1)
        self.register_buffer("u", torch.randn(1, 6))

    def forward(self, x):
        matrix = self.weight.view(self.weight.size(0), -1)
        with torch.no_grad():
            v = F.normalize(torch.matmul(self.u, matrix))
            u = F.normalize(torch.matmul(v, matrix.t()))
        sigma = torch.squeeze(torch.matmul(torch.matmul(v, matrix.t()), u.t()))
        return F.conv2d(x, self.weight / sigma, self.bias, padding=1)


class Tiled(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4))

    def forward(self, x):
        x = x.mean((2, 3))
        return x @ self.weight.T + torch.mm(self.weight, x.t()).t() + (self.weight @ x[0]) + x.matmul(self.weight.mT)


EXPRESSIONS = {
    "equalised": Equalised,
    "rosinality": Rosinality,
    "demodulated": Demodulated,
    "standardised": lambda: Standardised(4, 6, 3),
    "BigGAN spectral": BigGANSpectral,
    "spectral hook": lambda: spectral_norm(nn.Conv2d(4, 6, 3)),
    "spectral parametrization": lambda: parametrized_spectral_norm(nn.Conv2d(4, 6, 3)),
    "matmul": Tiled,
}


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_expressions_of_a_weight_are_followed(name):
    """Rows only, at first and second order; spectral norm's factor, which depends on all rows, is exact too."""
    torch.manual_seed(0)
    plain = EXPRESSIONS[name]().double().train()
    module = copy.deepcopy(plain)
    ft = SparseFinetuner(module)
    layer = next(layer.name for layer in ft.layers if "weight" in layer.name)
    ft.select({layer: ROWS})
    losses = []
    for net in (plain, module):
        torch.manual_seed(1)
        x = torch.randn(3, 4, 5, 5, dtype=torch.float64, requires_grad=True)
        (gx,) = torch.autograd.grad(net(x).tanh().sum(), x, create_graph=True)
        losses.append(net(x).square().mean() + gx.square().sum())
        losses[-1].backward()
    assert_close(losses[1], losses[0])
    for member in next(each for each in ft.layers if each.name == layer).members:
        dense = plain.get_parameter(member.name).grad
        assert_close(member.parameter.link.leaf.grad, taken(dense, member.parameter))
    link = module.get_parameter(layer).link
    assert link.row_uses
    assert not link.dense_uses


def test_weight_norm_takes_the_dense_way_and_is_right():
    torch.manual_seed(0)
    plain = weight_norm(nn.Conv2d(4, 6, 3)).double()
    module = copy.deepcopy(plain)
    ft = SparseFinetuner(module)
    (layer,) = {layer.name for layer in ft.layers}
    ft.select({layer: ROWS})
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64)
    for net in (plain, module):
        net(x).square().mean().backward()
    for member in ft.layers[0].members:
        assert_close(member.parameter.link.leaf.grad, taken(plain.get_parameter(member.name).grad, member.parameter))
    assert "dense, then rows: _weight_norm" in ft.summary()


def test_an_expression_is_a_tensor_like_any_other():
    """What else can be done with w * c: each is right, whether or not it can be followed."""
    uses = {
        "in place": lambda w: w.add_(1),
        "in place, then used": lambda w: (w.mul_(2), w.t())[1],
        "item assignment": lambda w: (w.__setitem__(0, 3.0), w * 2)[1],
        "in place through a view": lambda w: (w.t().mul_(2), w)[1],
        "in place, with a view from before": lambda w: (w.t(), w.mul_(2))[0],
        "in place, with a view of a view from before": lambda w: (w.t().unsqueeze(0), w.mul_(2))[0][0],
        "item assignment through a view": lambda w: (w[None].__setitem__((0, 1), 3.0), w)[1],
        "in place, divided by its norm": lambda w: ((v := w / w.norm()).t().mul_(2), v)[1],
        "in place without gradients": lambda w: (torch.no_grad()(w.mul_)(2), w)[1],
        "indexing": lambda w: w[[1, 2]] + w[1:3] + w[1:3, 1:2],
        "cat": lambda w: torch.cat([w, w]),
        "two rows of it": lambda w: w @ w.t(),
        "in the other argument": lambda w: torch.ones(6, 4).double() * w,
        "of another shape": lambda w: w.view(3, 8),
        "all axes": lambda w: w.sum() + w.mean(0) + w.std(),
        "own rows": lambda w: w.sum(1) * w.norm(dim=1),
        "double transpose": lambda w: w.t().t() + w.permute(1, 0).t() + w.T.mT,
        "power": lambda w: w**3 + w.square() / 2 - (2 - w) + (1 / (w.abs() + 1)),
        "converted": lambda w: w.float().double() + w.to(torch.float32),
        "unsqueezed": lambda w: w.unsqueeze(0) + w[None] + w.unsqueeze(-1).squeeze(-1),
        "as an input": lambda w: F.linear(w, torch.eye(4).double()),
        "checkpoint": lambda w: torch.utils.checkpoint.checkpoint(torch.tanh, w, use_reentrant=False),
        "vmap": lambda w: torch.func.vmap(lambda x: F.linear(x, w))(torch.eye(4).double()),
        "out of another": lambda w: torch.where(w > 0, w, w * 0.1),
    }
    for name, use in uses.items():
        torch.manual_seed(0)
        plain = nn.Linear(4, 6).double()
        module = copy.deepcopy(plain)
        ft = SparseFinetuner(module)
        ft.select({"weight": ROWS})
        values = [use(net.weight * 0.5) for net in (plain, module)]
        assert type(values[1]).__name__ in ("Tensor", "RowWise")
        assert_close(values[1] + 0, values[0])
        for value in values:
            (value * torch.linspace(0, 1, value.numel()).view(value.shape)).square().sum().backward()
        assert_close(module.weight.link.leaf.grad, plain.weight.grad[ROWS]), name


def test_hooks_and_attributes_of_an_expression():
    _, module, _ = held(lambda: nn.Linear(4, 6))
    w = module.weight * 2
    assert isinstance(w, torch.Tensor)
    assert (w.shape, w.ndim, w.dtype, len(w), w.size(1)) == ((6, 4), 2, torch.float64, 6, 4)
    assert w.requires_grad
    assert w.plain is None  # still followed
    assert w.grad_fn is not None
    w = module.weight * 2
    seen = []
    w.register_hook(seen.append)
    F.linear(torch.ones(1, 4).double(), w).sum().backward()
    assert [g.shape for g in seen] == [(6, 4)]
    w = module.weight * 2
    assert not w.detach().requires_grad
    assert not w.data.requires_grad
    with torch.no_grad():
        assert not (module.weight * 2).requires_grad
        assert type(module.weight * 2) is torch.Tensor


def test_a_view_of_a_weight_is_written_where_it_may_be():
    _, module, ft = held(lambda: nn.Linear(4, 6))
    before = module.weight.detach().clone()
    view = module.weight.t()
    for write in (lambda: view.mul_(2), lambda: view.__setitem__(0, 1.0)):
        with pytest.raises(RuntimeError, match=r"do so in torch.no_grad\(\)"):
            write()
    assert torch.equal(module.weight, before)
    with torch.no_grad():
        assert view.mul_(2) is view
    assert torch.equal(module.weight, 2 * before)
    assert torch.equal(ft.parameters()[0], 2 * before[ROWS])
    F.linear(torch.eye(4).double(), view.t()).sum().backward()
    assert_close(ft.parameters()[0].grad, torch.ones(len(ROWS), 4).double())
