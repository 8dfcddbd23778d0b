"""Lines that scripts write, with a held model and with a dense twin whose other rows get no gradient."""

import pytest
import torch
import torch.nn.functional as F
from sample_networks import build, data
from torch import nn
from torch.autograd import forward_ad

from minegan_fast.finetune import SparseFinetuner


def held_and_dense():
    """[(model, optimizer)], the first one held."""
    net, dense = build("mlp"), build("mlp")
    ft = SparseFinetuner(net, lr=0.05, optimizer="sgd", momentum=0.9)
    ft.select({"1.weight": [1, 3], "3.weight": [0]})
    masks = {}
    for p, q in zip(dense.parameters(), net.parameters(), strict=True):
        masks[p] = torch.zeros_like(p).index_fill_(0, q.link.rows, 1)
        p.register_hook(masks[p].mul)
    sgd = torch.optim.SGD(dense.parameters(), lr=0.05, momentum=0.9)

    def mask(*_):
        for p in masks:
            if p.grad is not None:
                p.grad.detach().mul_(masks[p])

    sgd.register_step_pre_hook(mask)
    return [(net, ft), (dense, sgd)]


def loss(net, seed=1):
    return (net(data(seed=seed)) - 0.3).square().mean()


def train(net, optimizer, steps=1):
    for seed in range(steps):
        optimizer.zero_grad()
        loss(net, seed).backward()
        optimizer.step()


def written_after_steps(write, make=lambda net: net):
    def script(net, optimizer):
        made = make(net)
        for _ in range(3):
            train(net, optimizer)
            write(made)
        optimizer.step()

    return script


def no_grad(write):
    return lambda x: torch.no_grad()(write)(x)


def each(write):
    return lambda tensors: [write(x) for x in tensors]


def initialise(net):
    torch.manual_seed(3)
    net[3].reset_parameters()
    for module in net.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, 0.1)
            nn.init.constant_(module.bias, 0.1)


def buffer_of_weights(net):
    buffer = nn.utils.parameters_to_vector(net.parameters()).detach().clone()
    nn.utils.vector_to_parameters(buffer, net.parameters())
    return buffer


def buffer_of_gradients(net, optimizer):
    parameters, norms = list(net.parameters()), []
    buffer = torch.zeros(sum(p.numel() for p in parameters)).double()
    for p, part in zip(parameters, buffer.split([p.numel() for p in parameters]), strict=True):
        p.grad = part.view_as(p)
    for seed in range(4):
        buffer.zero_()
        loss(net, seed).backward()
        loss(net, seed + 10).backward()
        norms.append(buffer.norm())
        buffer.mul_(0.5)
        optimizer.step()
    return norms


def gradients_that_are_kept(net, optimizer):
    norms = []
    for seed in range(3):
        optimizer.zero_grad()
        loss(net, seed).backward()
        gradients = [p.grad for p in net.parameters()]
        loss(net, seed + 10).backward()
        norms.append(nn.utils.get_total_norm(gradients))
        torch._foreach_mul_(gradients, 0.5)
        optimizer.step()
    return norms


def gradients_in_a_loss(net, optimizer):
    penalties = []
    for seed in range(3):
        net.zero_grad()
        for _ in range(2):
            loss(net, seed).backward(create_graph=True)
            penalties.append(sum(p.grad.square().sum() for p in net.parameters()))
        net.zero_grad()
        (loss(net, seed) + sum(penalties[-2:])).backward()
        optimizer.step()
    net.zero_grad()
    return penalties


def clipped_with_a_graph(net, optimizer):
    for seed in range(3):
        net.zero_grad()
        loss(net, seed).backward(create_graph=True)
        nn.utils.clip_grad_norm_(net.parameters(), 0.01)
        optimizer.step()
    net.zero_grad()


def another_optimizer(make, **options):
    def script(net, optimizer):
        train(net, make(net.parameters(), lr=0.05, **options), 3)
        train(net, optimizer)

    return script


def compiled(function):
    """Before and after a step, without gradients as optimizers have it."""

    def script(net, optimizer):
        torch._dynamo.reset()
        run = torch.compile(function, backend="eager")
        results = []
        for seed in range(3):
            optimizer.zero_grad()
            loss(net, seed).backward()
            with torch.no_grad():
                results.append(run(net))
                optimizer.step()
                results.append(run(net))
        return results

    return script


def compiled_weights(net):
    for p in net.parameters():
        p.mul_(0.9)
        p[0] = 0.1
        p[1] -= 0.1
        p.data.add_(0.01)
    net[3].weight.data = net[3].weight.data + 0.1
    return 0


def compiled_gradients(net):
    for p in net.parameters():
        p.grad.mul_(0.5)
        p.grad = p.grad * 0.5
        p.sub_(p.grad)
    return nn.utils.clip_grad_norm_(net.parameters(), 0.01)


def jacobian(net, optimizer):
    for seed in range(3):
        optimizer.zero_grad()
        x = data(seed=seed).flatten(1)
        slopes = torch.autograd.functional.jacobian(net[1:], x, create_graph=True, vectorize=True)
        (slopes.square().sum() + net(x).square().mean()).backward()
        optimizer.step()


def forward_mode(net, optimizer):
    for seed in range(3):
        optimizer.zero_grad()
        with forward_ad.dual_level():
            x = data(seed=seed)
            y, slope = forward_ad.unpack_dual(net(forward_ad.make_dual(x, x.cos())))
            (y.square().mean() + slope.square().mean()).backward()
        optimizer.step()


def bias_added_in_place(net, optimizer):
    for seed in range(3):
        optimizer.zero_grad()
        F.linear(data(seed=seed).flatten(1), net[1].weight).add_(net[1].bias).square().mean().backward()
        optimizer.step()


SCRIPTS = {
    "initialisers": written_after_steps(initialise),
    "data kept": written_after_steps(each(lambda x: x.mul_(0.9)), lambda net: [p.data for p in net.parameters()]),
    "views of data kept": written_after_steps(
        each(lambda x: x.mul_(0.9)), lambda net: [p.data.view(-1)[1:] for p in net.parameters()]
    ),
    "buffer of all weights": written_after_steps(lambda buffer: buffer.mul_(0.9), buffer_of_weights),
    "views, without gradients": written_after_steps(lambda net: no_grad(lambda v: v.mul_(0.9))(net[1].weight.t())),
    "items of a view": written_after_steps(
        lambda net: no_grad(lambda v: v.__setitem__((0, 1), 0.5))(net[1].weight[None])
    ),
    "a view's data": written_after_steps(lambda net: net[1].weight.t().unsqueeze(0).data.mul_(0.9)),
    "buffer of all gradients": buffer_of_gradients,
    "gradients kept": gradients_that_are_kept,
    "gradients in a loss": gradients_in_a_loss,
    "clipping after create_graph": clipped_with_a_graph,
    "fused SGD": another_optimizer(torch.optim.SGD, fused=True),
    "fused Adam": another_optimizer(torch.optim.Adam, fused=True),
    "compiled writes to weights": compiled(compiled_weights),
    "compiled writes to gradients": compiled(compiled_gradients),
    "compiled zero_grad": compiled(lambda net: net.zero_grad()),
    "vectorised Jacobian": jacobian,
    "forward mode": forward_mode,
    "bias added in place": bias_added_in_place,
}


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_does_to_a_held_model_what_it_does_to_a_dense_one(name):
    results = []
    for net, optimizer in held_and_dense():
        torch.manual_seed(2)
        found = SCRIPTS[name](net, optimizer)
        results.append([*(found or []), *net.state_dict().values()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
