"""A held model stays itself: what it lists, and what others write into its weights."""

import copy
import itertools

import pytest
import torch
from held_model import backward, held
from sample_networks import NETWORKS, build, data
from torch import nn
from torch.nn.utils import prune

from minegan_fast.finetune import SparseFinetuner
from minegan_fast.finetune.neurons import compact


@pytest.mark.parametrize("name", NETWORKS)
def test_what_a_model_lists_is_what_it_listed(name):
    net, plain = build(name), build(name, seed=3)
    around = nn.ModuleDict({"net": net, "other": nn.Linear(2, 2)})

    def seen():
        lists = [list(m.parameters()) for m in around.modules()], list(around.modules())
        names = [n for n, _ in around.named_parameters()], [n for n, _ in around.named_modules()]
        return [[id(x) for x in part] for part in (*lists[0], lists[1])], names, [type(m) for m in around.modules()]

    before = seen()
    ft = SparseFinetuner(net, density=0.5, criterion="random", scope="layer")
    ft.select()
    assert seen() == before
    assert repr(net) == repr(build(name))
    assert {n: v.shape for n, v in net.state_dict().items()} == {n: v.shape for n, v in plain.state_dict().items()}
    assert net.state_dict()._metadata == plain.state_dict()._metadata
    assert all(type(v) is torch.Tensor for v in net.state_dict().values())
    for assign in (False, True):
        plain = build(name, seed=4 + assign)
        assert str(net.load_state_dict(plain.state_dict(), assign=assign)) == "<All keys matched successfully>"
        assert all(torch.equal(v, plain.state_dict()[n]) for n, v in net.state_dict().items())
    plain.load_state_dict(net.state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        net.load_state_dict({})


def test_averages_pair_the_right_parameters():
    """By zip over the model and over a module around it, by name, and torch's own, on copies from before."""
    net = build("resnet")
    around = nn.ModuleDict({"net": net})
    zipped, outer, named, chained = (copy.deepcopy(net) for _ in range(4))
    swa = torch.optim.swa_utils.AveragedModel(net, use_buffers=True, avg_fn=lambda mean, value, n: (mean + value) / 2)
    reference = copy.deepcopy(net)
    ft = SparseFinetuner(net, lr=0.1, density=0.5, criterion="random")
    ft.select()
    swa.update_parameters(net)
    for _ in range(2):
        backward(net, ft)
        ft.step()
        with torch.no_grad():
            live = dict(net.named_parameters())
            pairs = [zip(zipped.parameters(), net.parameters()), zip(outer.parameters(), around.parameters())]  # noqa: B905
            pairs += [((mean, live[name]) for name, mean in named.named_parameters())]
            pairs += [
                zip(itertools.chain(a.parameters(), a.buffers()), itertools.chain(b.parameters(), b.buffers()))  # noqa: B905
                for a, b in ((chained, net),)
            ]
            for mean, value in itertools.chain(*pairs):
                mean.copy_((mean + value) / 2)
            for name, mean in reference.named_parameters():
                mean.copy_((mean + net.state_dict()[name]) / 2)
        swa.update_parameters(net)
    for average in (zipped, outer, named, chained, swa.module):
        assert all(torch.equal(p, average.get_parameter(name)) for name, p in reference.named_parameters())


def test_an_average_that_asks_requires_grad_moves_the_trained_weights():
    net, ft = held()
    shadow = {n: p.detach().clone() for n, p in net.named_parameters()}
    for _ in range(3):
        backward(net, ft)
        ft.step()
        with torch.no_grad():
            for name, p in net.named_parameters():
                (shadow[name].lerp_(p, 0.1) if p.requires_grad else shadow[name].copy_(p))
    assert not torch.equal(shadow["1.weight"], net[1].weight)
    assert torch.equal(shadow["3.weight"], net[3].weight)


VALUES = {
    "data": lambda p: p.data.mul_(0.5),
    "no_grad": lambda p: torch.no_grad()(p.mul_)(0.5),
    "copy_": lambda p: torch.no_grad()(p.copy_)(p.detach() * 0.5),
    "set_": lambda p: torch.no_grad()(lambda: p.set_(p.detach() * 0.5))(),
    "data assigned": lambda p: setattr(p, "data", p.data * 0.5),
    "foreach": lambda p: torch.no_grad()(lambda: torch._foreach_mul_([p], 0.5))(),
}


@pytest.mark.parametrize("name", VALUES)
def test_a_write_over_parameters_acts_once(name):
    net, ft = held()
    backward(net, ft)
    ft.step()
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    for p in net.parameters():
        VALUES[name](p)
    net(data())
    for n, p in net.named_parameters():
        assert torch.equal(p.detach(), before[n] * 0.5), n
    assert torch.equal(ft.parameters()[0].detach(), before["1.weight"][[1, 3]] * 0.5)
    backward(net, ft)
    ft.step()
    assert torch.equal(net[1].weight[0], before["1.weight"][0] * 0.5)
    assert not torch.equal(net[1].weight[1], before["1.weight"][1] * 0.5)
    assert torch.equal(net[1].weight[[1, 3]], ft.parameters()[0])  # also where it lies elsewhere than it did


def test_a_gradient_of_a_parameter_in_a_weights_place_is_not_lost():
    """Whether gradients are cleared before the forward or after it."""
    losses = []
    for late in (False, True):
        net, ft = held(lr=0.1)
        net.load_state_dict({n: v.clone() for n, v in build("mlp", seed=5).state_dict().items()}, assign=True)
        for _ in range(2):
            if late:
                loss = net(data()).square().mean()
                ft.zero_grad()
            else:
                ft.zero_grad()
                loss = net(data()).square().mean()
            loss.backward()
            assert all(p.grad is not None for p in ft.parameters())
            ft.step()
        losses.append(net(data()).square().mean().item())
    assert losses[0] == losses[1]
    assert hasattr(net[1].weight, "link")


def test_a_regulariser_over_parameters_counts_each_row_once():
    net, ft = held()
    sum(p.square().sum() for p in net.parameters()).backward()
    torch.testing.assert_close(ft.parameters()[0].grad, 2 * net[1].weight.detach()[[1, 3]])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_leaves_and_gradients_follow_the_model(dtype):
    net = build("mlp").float()
    ft = SparseFinetuner(net, lr=1e-2, optimizer="sgd")
    ft.select({"1.weight": [1, 3]})
    net(data(dtype=torch.float32)).square().mean().backward()
    grad = ft.parameters()[0].grad.clone()
    net.to(dtype)
    leaf = ft.parameters()[0]
    assert leaf.dtype == torch.promote_types(dtype, torch.float32)
    assert leaf.grad.dtype == leaf.dtype
    torch.testing.assert_close(leaf.grad, grad.to(leaf.dtype), rtol=0.02, atol=1e-3)
    assert net[1].weight.grad.dtype == dtype
    ft.step()
    ft.zero_grad()
    net(data(dtype=dtype)).square().mean().backward()
    ft.step()
    assert torch.equal(net[1].weight[1], leaf.detach()[0].to(dtype))


def test_a_weight_that_was_replaced_is_taken_over_or_named():
    net, ft = held()
    new = build("mlp", seed=5)
    net[1].weight = new[1].weight
    backward(net, ft)
    assert ft.parameters()[0].grad is not None
    ft.step()
    assert hasattr(net[1].weight, "link")
    assert torch.equal(net[1].weight[0], build("mlp", seed=5)[1].weight[0])
    for other in (torch.zeros(3, 108), torch.zeros(7, 108, dtype=torch.int64)):
        net, ft = held()
        backward(net, ft)
        net[1].weight = nn.Parameter(other, requires_grad=False)
        with pytest.raises(RuntimeError, match=r"'weight' of shape \[7, 108\] was replaced.*release\(\)"):
            ft.step()


def test_a_held_weight_is_not_resized():
    net, ft = held()
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    for target in (net[1].weight, net[3].weight):
        with pytest.raises(ValueError, match=r"given data of shape \[2, 2\]"):
            target.data = torch.zeros(2, 2).double()
    with pytest.raises(ValueError, match=r"rows \[2, 108\] of a weight"):
        ft.parameters()[0].data = torch.zeros(3, 108).double()
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())
    ft.verify()


def test_parameters_keep_their_class_and_what_never_trained_is_left_alone():
    class Named(nn.Parameter):
        def shout(self):
            return "here"

    class Packed(Named):
        pass

    net = build("mlp")
    net[1].weight = Named(net[1].weight.detach())
    net.register_parameter("packed", Packed(torch.ones(3, dtype=torch.int8), requires_grad=False))
    ft = SparseFinetuner(net)
    ft.select({"1.weight": [1]})
    assert isinstance(net[1].weight, Named)
    assert net[1].weight.shout() == "here"
    assert type(net.packed) is Packed
    ft.verify()
    ft.release()
    assert type(net[1].weight) is Named


def test_a_script_that_turns_gradients_off_at_the_selecting_step():
    net = build("mlp")
    ft = SparseFinetuner(net, lr=1e-2, density=0.3, score_steps=2, exclude="3")
    for _ in range(4):
        net.requires_grad_(True)
        backward(net, ft)
        net.requires_grad_(False)
        ft.step()
        assert not any(p.requires_grad for p in net.parameters())
        copy.deepcopy(net)(data()).numpy()
    ft.verify()
    net.requires_grad_(True)
    assert any(p.requires_grad for p in net.parameters())
    assert not net[3].weight.requires_grad
    ft.release()
    assert all(p.requires_grad for p in net.parameters())


def test_what_torch_makes_of_a_held_model():
    net, ft = held()
    x = data()
    want = net(x)
    assert torch.equal(torch.jit.trace(net, x)(x), want)
    assert torch.equal(torch.jit.script(net)(x), want)
    assert torch.equal(torch.export.export(net, (x,)).module()(x), want)
    vector = nn.utils.parameters_to_vector(net.parameters())
    nn.utils.vector_to_parameters(2 * vector, net.parameters())
    assert torch.equal(nn.utils.parameters_to_vector(net.parameters()), 2 * vector)
    prune.l1_unstructured(net[1], "weight", 0.5)
    net(x).sum().backward()
    with pytest.raises(RuntimeError, match=r"was replaced.*release\(\)"):
        ft.step()


def test_the_loop_of_stylegan2_ada():
    """Flatten the gradients, mend them, and assign the pieces, as its training loop does between backward and step."""
    net, ft = held(rows={"1.weight": [1], "3.weight": [0]})
    backward(net, ft)
    want = [p.grad.clone() for p in ft.parameters()]
    params = [p for p in net.parameters() if p.grad is not None]
    flat = torch.cat([p.grad.flatten() for p in params])
    torch.nan_to_num(flat, nan=0, posinf=1e5, neginf=-1e5, out=flat)
    for p, grad in zip(params, (2 * flat).split([p.numel() for p in params]), strict=True):
        p.grad = grad.reshape(p.shape)
    ft.step()
    assert all(torch.equal(p.grad, 2 * g) for p, g in zip(ft.parameters(), want, strict=True))


def test_every_rows_gradient_is_that_of_the_dense_model():
    """Through every way that a network uses its weights."""
    for name in sorted(set(NETWORKS)):
        net, plain = build(name), build(name)
        ft = SparseFinetuner(net, density=0.5, criterion="random", scope="layer")
        ft.select()
        backward(net)
        backward(plain)
        for (n, p), q in zip(net.named_parameters(), plain.parameters(), strict=True):
            if p.requires_grad:
                rows, axis = p.link.rows, p.link.axis
                torch.testing.assert_close(
                    compact(p.grad, axis, rows), compact(q.grad, axis, rows), rtol=1e-9, atol=1e-12, msg=f"{name} {n}"
                )
