"""`grad` of a held weight: its shape, what is written into it, hooks, and functions that look past the weight."""

import pytest
import torch
from held_model import backward, held, whole
from sample_networks import NETWORKS, build, data
from torch import nn

from minegan_fast.finetune import SparseFinetuner


@pytest.mark.parametrize("name", ["mlp", "resnet", "transposed"] if "transposed" in NETWORKS else ["mlp", "resnet"])
def test_a_weight_shows_a_gradient_of_its_own_shape(name):
    net = build(name)
    ft = SparseFinetuner(net, density=0.3, criterion="random", scope="layer")
    ft.select()
    backward(net, ft)
    for p in net.parameters():
        assert (p.grad is not None) == p.requires_grad
        if p.grad is not None:
            assert torch.equal(p.grad, whole(ft, p))
            assert p.grad is p.grad
    first = {p: p.grad for p in net.parameters() if p.grad is not None}
    backward(net, times=1)  # adds
    for p, grad in first.items():
        assert p.grad is grad
        assert torch.equal(grad, whole(ft, p))
    net.zero_grad(set_to_none=False)
    assert all(not p.grad.any() for p in first)
    assert all(not p.grad.any() for p in ft.parameters())
    net.zero_grad()
    assert all(p.grad is None for p in [*net.parameters(), *ft.parameters()])


def test_a_weight_that_is_off_or_frozen_shows_none():
    net, ft = held()
    net[1].weight.requires_grad_(False)
    backward(net)
    assert net[1].weight.grad is None
    assert net[1].bias.grad is not None
    assert net[3].weight.grad is None
    net.requires_grad_(True)
    assert not net[3].weight.requires_grad
    backward(net, ft)
    assert net[1].weight.grad is not None


WRITES = {
    "in place": lambda p: p.grad.mul_(2),
    "through data": lambda p: p.grad.data.mul_(2),
    "assigned": lambda p: setattr(p, "grad", 2 * p.grad),
    "assigned data": lambda p: setattr(p.grad, "data", 2 * p.grad.data),
    "foreach": lambda p: torch._foreach_mul_([p.grad], 2.0),
    "rows": lambda p: [p.grad[i].mul_(2) for i in range(len(p.grad))],
    "leaf": lambda p: p.link.leaf.grad.mul_(2),
    "leaf assigned": lambda p: setattr(p.link.leaf, "grad", 2 * p.link.leaf.grad),
    "leaf, after a look": lambda p: (p.grad, p.link.leaf.grad.mul_(2)),
    "both, the weight last": lambda p: (p.link.leaf.grad.mul_(7), p.grad.mul_(2 / 7)),
    "both, the leaf last": lambda p: (p.grad.mul_(7), p.link.leaf.grad.mul_(2 / 7)),
}


@pytest.mark.parametrize("name", WRITES)
def test_what_is_written_into_a_gradient_counts(name):
    net, ft = held()
    backward(net, ft)
    want = net[1].weight.detach().clone()
    want[[1, 3]] -= 2e-2 * ft.parameters()[0].grad
    with torch.no_grad():
        WRITES[name](net[1].weight)
    ft.step()
    torch.testing.assert_close(net[1].weight.detach(), want, rtol=0, atol=1e-15)
    ft.verify()


@pytest.mark.parametrize("read", [True, False])
def test_what_is_written_counts_before_more_is_added(read):
    net, ft = held()
    backward(net, ft)
    one = ft.parameters()[0].grad.clone()
    loss = net(data()).square().mean()
    if read:
        net[1].weight.grad.mul_(0.5)
    else:
        net[1].weight.grad = 0.5 * whole(ft, net[1].weight)
    loss.backward()
    torch.testing.assert_close(ft.parameters()[0].grad, 1.5 * one, rtol=1e-14, atol=0)
    torch.testing.assert_close(net[1].weight.grad[[1, 3]], 1.5 * one, rtol=1e-14, atol=0)


def test_a_gradient_of_another_shape_is_refused():
    net, _ = held()
    with pytest.raises(RuntimeError, match=r"shape \[7, 108\] cannot be one of \[2, 108\]"):
        net[1].weight.grad = torch.zeros(2, 108).double()


def test_none_is_the_gradient_after_none_was_assigned():
    net, ft = held()
    backward(net, ft)
    net[1].weight.grad = None
    assert ft.parameters()[0].grad is None
    before = net[1].weight.detach().clone()
    ft.step()
    assert torch.equal(before, net[1].weight)


@pytest.mark.parametrize("listed", ["before", "after", "named"])
def test_clipping_over_the_models_parameters(listed):
    net = build("mlp")
    parameters = list(net.parameters())
    ft = SparseFinetuner(net, lr=1e-2, optimizer="sgd")
    ft.select({"1.weight": [1, 3]})
    if listed == "after":
        parameters = list(net.parameters())
    if listed == "named":
        parameters = [p for _, p in net.named_parameters() if p.requires_grad]
    for _ in range(2):
        backward(net, ft)
        norm = torch.stack([p.grad.norm() for p in ft.parameters()]).norm()
        torch.testing.assert_close(nn.utils.clip_grad_norm_(parameters, 1e-3), norm, rtol=1e-12, atol=0)
        clipped = torch.stack([p.grad.norm() for p in ft.parameters()]).norm()
        torch.testing.assert_close(clipped, torch.tensor(1e-3).double(), rtol=2e-3, atol=0)
        ft.step()


def test_a_foreign_optimizer_over_the_models_parameters():
    net, ft = held()
    plain = build("mlp")
    other = torch.optim.Adam(net.parameters(), lr=1e-2)
    reference = torch.optim.Adam(plain.parameters(), lr=1e-2)
    for _ in range(3):
        other.zero_grad()
        backward(net)
        other.step()
        reference.zero_grad()
        backward(plain)
        for name, p in plain.named_parameters():
            if name in ("1.weight", "1.bias"):
                p.grad[[0, 2, 4, 5, 6]] = 0
            else:
                p.grad = None
        reference.step()
    for p, q in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=1e-12)
    ft.verify()


@pytest.mark.parametrize("kind", [{"foreach": True}, {"fused": True}, {"foreach": False}])
def test_a_foreign_optimizer_over_the_leaves(kind):
    net, ft = held()
    plain = build("mlp")
    other = torch.optim.Adam(ft.parameters(), lr=1e-2, **kind)
    reference = SparseFinetuner(plain, lr=1e-2, betas=(0.9, 0.999))
    reference.select({"1.weight": [1, 3]})
    for _ in range(3):
        other.zero_grad()
        backward(net)
        other.step()
        backward(plain, reference)
        reference.step()
        x = data()
        torch.testing.assert_close(net(x), plain(x), rtol=0, atol=1e-9)
    ft.verify()


class Product(torch.autograd.Function):
    """Of a library that looks past `__torch_function__`."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w.t()

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g @ w, g.t() @ x


@pytest.mark.parametrize("of", [lambda w: w, lambda w: 2 * w, lambda w: w.t().t(), lambda w: (w * 2).view(7, -1)])
def test_a_function_of_another_library_brings_the_rows_their_gradient(of):
    net, ft = held()
    x = torch.randn(5, 108).double()
    for _ in range(2):  # adds
        Product.apply(x, of(net[1].weight)).square().sum().backward()
    torch.nn.functional.linear(x, of(net[1].weight)).square().sum().backward()
    plain = build("mlp")[1].weight
    (3 * torch.nn.functional.linear(x, of(plain)).square().sum()).backward()
    torch.testing.assert_close(ft.parameters()[0].grad, plain.grad[[1, 3]], rtol=1e-12, atol=0)
    ft.step()
    ft.zero_grad()
    assert net[1].weight.grad is None


@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_see_the_whole_gradient(when):
    net, plain = build("mlp"), build("mlp")
    seen = {}

    def listen(model):
        w, log = model[1].weight, seen.setdefault(model, [])
        w.register_hook(lambda g: log.append(("hook", g.clone())) or 2 * g)
        w.register_post_accumulate_grad_hook(lambda p: log.append(("after", p.grad.clone())))
        torch.autograd.graph.register_multi_grad_hook(
            [w, model[1].bias], lambda grads: log.append(("multi", grads[0].clone()))
        )

    ft = SparseFinetuner(net, lr=1e-2, optimizer="sgd", score_steps=1)
    if when == "before":
        listen(net)
    ft.select({"1.weight": [1, 3]})
    if when == "after":
        listen(net)
    listen(plain)
    for _ in range(2):
        backward(net, ft)
        plain.zero_grad()
        backward(plain)
        assert sorted(k for k, _ in seen[net]) == sorted(k for k, _ in seen[plain]) == ["after", "hook", "multi"]
        theirs = dict(seen[plain])
        for kind, grad in seen[net]:
            want = torch.zeros_like(grad)
            want[[1, 3]] = theirs[kind][[1, 3]]
            torch.testing.assert_close(grad, want, rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(ft.parameters()[0].grad, plain[1].weight.grad[[1, 3]], rtol=1e-12, atol=1e-15)
        for log in seen.values():
            log.clear()
        ft.select({"1.weight": [3]})
        ft.select({"1.weight": [1, 3]})


def test_an_optimizer_step_inside_a_hook():
    net, ft = held()
    before = net[1].weight.detach().clone()

    def step(p):
        with torch.no_grad():
            p -= 0.1 * p.grad
        p.grad = None

    net[1].weight.register_post_accumulate_grad_hook(step)
    backward(net, ft)
    moved = (net[1].weight.detach() != before).any(1).nonzero().flatten().tolist()
    assert moved == [1, 3]
    assert net[1].weight.grad is None
    net(data())
    assert torch.equal(ft.parameters()[0].detach(), net[1].weight.detach()[[1, 3]])
