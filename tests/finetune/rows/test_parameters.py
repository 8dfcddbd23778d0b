"""A linked weight behaves as the parameter that it was, wherever it is touched."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from sample_networks import CUDA, NETWORKS, build, data, loss
from torch import nn

from minegan_fast.finetune import SparseFinetuner
from minegan_fast.finetune.neurons import compact


def finetuned(rows=(1, 3), name="mlp", layer="1.weight", **arguments):
    net = build(name)
    ft = SparseFinetuner(net, **arguments)
    ft.select({layer: list(rows)})
    return net, ft


def assert_in_step(ft):
    """Every leaf equals its rows of the dense weight."""
    for layer in ft.layers:
        for m in layer.members:
            if m.parameter.link.leaf is not None:
                link = m.parameter.link
                assert torch.equal(link.leaf.detach(), compact(m.parameter.detach(), link.axis, link.rows)), m.name


def test_attributes_are_those_of_the_dense_weight():
    net, ft = finetuned()
    w = net[1].weight
    assert isinstance(w, nn.Parameter)
    assert (w.shape, w.dtype, w.device, w.ndim, len(w), w.numel()) == (
        (7, 108),
        torch.float64,
        torch.device("cpu"),
        2,
        7,
        756,
    )
    assert w.is_leaf
    assert w.grad is None
    assert w.requires_grad
    assert not net[3].weight.requires_grad
    assert w.grad_fn is None
    assert "1.weight" in dict(net.named_parameters())
    assert type(w.detach()) is torch.Tensor
    assert not w.detach().requires_grad
    assert type(w.data) is torch.Tensor
    assert w.data.data_ptr() == w.data_ptr() == w.detach().data_ptr()
    assert [p.shape for p in ft.parameters()] == [(2, 108), (2,)]
    assert "Parameter" in repr(w)


@pytest.mark.parametrize(
    "use",
    [
        lambda w: w.clone(),
        lambda w: w.T,
        lambda w: w.mT,
        lambda w: w.view(-1),
        lambda w: w[1:3],
        lambda w: 2 * w + 1,
        lambda w: torch.stack([w, w]),
        lambda w: torch.cat(tensors=[w, w]),
        lambda w: w.to(torch.float32),
        lambda w: F.linear(torch.ones(2, 108).double(), weight=w),
        lambda w: torch.einsum("ij,kj->ik", w, w),
        lambda w: torch.utils.checkpoint.checkpoint(torch.tanh, w, use_reentrant=False),
    ],
)
def test_every_use_is_differentiable_to_the_rows(use):
    net, ft = finetuned()
    plain = net[1].weight.detach().clone().requires_grad_()
    value = use(net[1].weight)
    assert torch.equal(value, use(plain))
    value.square().sum().backward()
    use(plain).square().sum().backward()
    assert torch.equal(ft.parameters()[0].grad, plain.grad[[1, 3]])
    whole = torch.zeros_like(plain)
    whole[[1, 3]] = plain.grad[[1, 3]]
    assert torch.equal(net[1].weight.grad, whole)


def test_no_grad_and_in_place():
    net, ft = finetuned()
    w = net[1].weight
    with torch.no_grad():
        assert not (w * 2).requires_grad
        assert w.mul_(2) is w
        w[0] = 5.0
        nn.init.constant_(w[3], 7.0)
    assert (w.detach()[0] == 5).all()
    with pytest.raises(RuntimeError, match=r"in-place|inplace"):
        w.add_(1)  # as on a plain parameter
    net(data()).sum().backward()
    ft.step()  # the leaf is read anew: 7 is where it starts
    assert ((w.detach()[3] - 7).abs() < 0.1).all()
    assert_in_step(ft)


def test_writes_to_the_dense_weight_are_kept():
    """load_state_dict, EMA copies, .data: the step starts from what was written."""
    for write in (
        lambda net, new: net.load_state_dict(new),
        lambda net, new: net.load_state_dict(new, assign=True),
        lambda net, new: net[1].weight.data.copy_(new["1.weight"]),
        lambda net, new: setattr(net[1].weight, "data", new["1.weight"].clone()),
        lambda net, new: net[1].weight.detach().copy_(new["1.weight"]),
    ):
        net, ft = finetuned(lr=1e-2, optimizer="sgd")
        new = {n: v + 1 for n, v in net.state_dict().items()}
        write(net, {n: v.clone() for n, v in new.items()})
        assert torch.equal(net[1].weight.detach(), new["1.weight"])
        net(data()).square().mean().backward()
        grad = ft.parameters()[0].grad
        ft.step()
        want = new["1.weight"].clone()
        want[[1, 3]] -= 1e-2 * grad
        torch.testing.assert_close(net[1].weight.detach(), want, rtol=0, atol=1e-15)
        assert_in_step(ft)


@pytest.mark.parametrize("detach", [torch.Tensor.detach, torch.detach])
def test_a_detached_parameter_of_any_shape_is_its_memory(detach):
    """Libraries that average weights copy them back by `parameter.detach().copy_(mean)`, with gradients on."""
    net = nn.Sequential(nn.Linear(3, 4), nn.PReLU(1), nn.Linear(4, 2))
    net.scale = nn.Parameter(torch.ones(()))
    ft = SparseFinetuner(net)
    ft.select({"0.weight": [1, 3], "1.weight": [0], "scale": [0]})
    for p in net.parameters():
        detach(p).copy_(torch.full(p.shape, 3.0))
        assert torch.equal(p, torch.full(p.shape, 3.0))
        assert not detach(p).requires_grad
    for p in ft.parameters():
        p.link.sync()
        assert torch.equal(p, torch.full(p.shape, 3.0))


def test_writes_to_a_leaf_reach_the_dense_weight_before_it_is_used():
    for clip in (
        lambda p: p.data.clamp_(-0.01, 0.01),
        lambda p: p.clamp_(-0.01, 0.01),
        lambda p: p.copy_(p.clamp(-0.01, 0.01)),
    ):
        net, ft = finetuned()
        with torch.no_grad():
            for p in ft.parameters():
                clip(p)
        with torch.no_grad():
            want = build("mlp")
            want[1].weight[[1, 3]] = want[1].weight[[1, 3]].clamp(-0.01, 0.01)
            want[1].bias[[1, 3]] = want[1].bias[[1, 3]].clamp(-0.01, 0.01)
            assert torch.equal(net(data()), want(data()))
        assert torch.equal(net.state_dict()["1.weight"], want[1].weight)
        ft.verify()


def test_data_is_watched_while_someone_has_it():
    net, ft = finetuned(lr=1.0, optimizer="sgd")
    data_of = [p.data for p in [*net.parameters(), *ft.parameters()]]
    link = net[1].weight.link
    for kept in (data_of[0], data_of[4]):
        net(data()).square().mean().backward()
        ft.step()
        net(data())
        kept.mul_(0.5)
        ft.step()
        assert_in_step(ft)
        assert len(link.lent) == 2
    for p in [*net.parameters(), *ft.parameters()]:
        p.data.mul_(1)
    del data_of, kept
    net(data())
    assert not link.lent
    assert not net[3].weight.link.lent


def test_clipping_survives_scripts_that_read_data():
    """Weight clipping of the leaves and an EMA that reads `.data` of every parameter, in either order."""
    net, ft = finetuned(lr=1.0, optimizer="sgd")
    average = copy.deepcopy(net)
    for order in (0, 1):
        for _ in range(2):
            ft.zero_grad()
            net(data()).square().mean().backward()
            ft.step()
            for phase in (0, 1):
                if phase == order:
                    live = dict(net.named_parameters())
                    for name, p in average.named_parameters():
                        p.data.mul_(0.9).add_(live[name].data, alpha=0.1)
                else:
                    for p in ft.parameters():
                        p.data.clamp_(-0.02, 0.02)
            assert net[1].weight.detach()[[1, 3]].abs().max() <= 0.02 if order == 0 else True
            net(data())
            assert net[1].weight.detach()[[1, 3]].abs().max() <= 0.02


@pytest.mark.parametrize(
    "turn", [lambda p, on: setattr(p, "requires_grad", on), lambda p, on: p.requires_grad_(on)], ids=["set", "call"]
)
@pytest.mark.parametrize("name", ["mlp", "transformer", "lstm"])
def test_turning_the_optimizers_parameters_off_turns_the_weights_off(name, turn):
    """As training loops of two networks do with the parameters of the other optimizer."""
    net = build(name)
    ft = SparseFinetuner(net, density=0.3, criterion="random", scope="layer")
    ft.select()
    for p in ft.parameters():
        turn(p, False)
    x = data().requires_grad_()
    net(x).square().sum().backward()
    assert x.grad is not None
    assert not any(p.requires_grad for p in [*net.parameters(), *ft.parameters()])
    assert all(p.grad is None for p in [*net.parameters(), *ft.parameters()])
    for p in ft.parameters():
        turn(p, True)
    net(x).square().sum().backward()
    assert all(p.requires_grad and p.grad is not None for p in ft.parameters())
    assert all(p.requires_grad for p in net.parameters())


def test_requires_grad_drives_the_leaf_only():
    net, ft = finetuned()
    leaves = ft.parameters()
    for off, on in (
        (lambda: net.requires_grad_(False), lambda: net.requires_grad_(True)),
        (
            lambda: [setattr(p, "requires_grad", False) for p in net.parameters()],
            lambda: [setattr(p, "requires_grad", True) for p in net.parameters()],
        ),
        (
            lambda: (net[1].weight.requires_grad_(False), net[1].bias.requires_grad_(False)),
            lambda: net[1].requires_grad_(),
        ),
    ):
        off()
        assert not any(p.requires_grad for p in leaves)
        x = data().requires_grad_()
        net(x).sum().backward()
        assert x.grad is not None
        assert all(p.grad is None for p in net.parameters())
        on()
        assert [n for n, p in net.named_parameters() if p.requires_grad] == ["1.weight", "1.bias"]
        net(data()).sum().backward()
        assert [n for n, p in net.named_parameters() if p.grad is not None] == ["1.weight", "1.bias"]
        assert all(p.grad is not None for p in leaves)
        ft.zero_grad()


def test_zero_grad_of_the_model_reaches_the_leaves():
    net, ft = finetuned()
    for zero in (
        net.zero_grad,
        net[1].zero_grad,
        lambda: net.zero_grad(set_to_none=False),
        lambda: setattr(net[1].weight, "grad", None),
    ):
        net(data()).sum().backward()
        zero()
        assert ft.parameters()[0].grad is None or not ft.parameters()[0].grad.any()


def test_backward_takes_weights_as_inputs_and_grad_names_the_leaves():
    net, ft = finetuned()
    (ours,) = torch.autograd.grad(net(data()).sum(), ft.parameters()[:1])
    net(data()).sum().backward(inputs=[net[1].weight])
    assert torch.equal(ft.parameters()[0].grad, ours)
    assert ft.parameters()[1].grad is None
    for weight in (net[1].weight, net[3].weight):
        with pytest.raises(RuntimeError, match=r"ft.parameters\(\)"):
            torch.autograd.grad(net(data()).sum(), weight)
    with pytest.raises(RuntimeError, match="frozen"):
        net(data()).sum().backward(inputs=[net[3].weight])


def test_checkpointed_forward_runs_again_inside_the_gradient():
    net, ft = finetuned()
    plain = build("mlp")

    def value(model):
        return torch.utils.checkpoint.checkpoint(model, data(), use_reentrant=False).square().sum()

    (ours,) = torch.autograd.grad(value(net), ft.parameters()[:1])
    (theirs,) = torch.autograd.grad(value(plain), plain[1].weight)
    torch.testing.assert_close(ours, theirs[[1, 3]], rtol=1e-13, atol=1e-13)


def test_functional_call():
    net, ft = finetuned()
    x = data()
    values = {n: p.detach() * 2 for n, p in build("mlp").named_parameters()}
    got = torch.func.functional_call(net, values, x)
    assert torch.equal(got, torch.func.functional_call(build("mlp"), values, x))
    torch.func.functional_call(net, dict(net.named_parameters()), x).sum().backward()
    assert ft.parameters()[0].grad is not None
    ft.verify()
    assert_in_step(ft)


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_to_moves_and_casts_both(device):
    net, ft = finetuned(lr=0.1, optimizer="sgd")
    assert net.to(device, torch.float32) is net
    assert {p.dtype for p in [*net.parameters(), *ft.parameters()]} == {torch.float32}
    assert {p.device.type for p in [*net.parameters(), *ft.parameters()]} == {device}
    x = data(dtype=torch.float32).to(device)
    before = net[1].weight.detach().clone()
    net(x).square().mean().backward()
    ft.step()
    assert not torch.equal(net[1].weight[1], before[1])
    assert torch.equal(net[1].weight[0], before[0])
    assert_in_step(ft)
    net.to(memory_format=torch.channels_last)
    net.double().train().eval()
    assert_in_step(ft)


@pytest.mark.parametrize("name", sorted(set(NETWORKS) - {"old_spectral"}))
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
def test_copies_are_plain(name, how):
    net, plain = build(name), build(name)
    ft = SparseFinetuner(net, density=0.5, criterion="random", scope="layer")
    ft.select()
    loss(net, data(), penalties=False).backward()
    ft.step()
    if how != "deepcopy" and name in ("spectral", "weight_norm"):
        with pytest.raises(RuntimeError, match="parametrized"):  # torch has it so for every parametrized module
            pickle.dumps(net)
        return
    if how == "deepcopy":
        twin = copy.deepcopy(net)
    elif how == "pickle":
        blob = pickle.dumps(net)
        assert b"minegan" not in blob
        twin = pickle.loads(blob)
    else:
        buffer = io.BytesIO()
        torch.save(net, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    names = [(n, p.requires_grad) for n, p in plain.named_parameters()]
    assert [(n, p.requires_grad) for n, p in twin.named_parameters()] == names
    assert all(type(p) is nn.Parameter for p in twin.parameters())
    assert [type(m).__mro__[1:] for m in twin.modules()] == [type(m).__mro__[1:] for m in plain.modules()]
    assert all(torch.equal(a, b) for a, b in zip(twin.state_dict().values(), net.state_dict().values(), strict=True))
    (loss(twin, data(), penalties=False)).backward()
    assert all(p.grad is not None for p in twin.parameters())
    assert all(p.grad.shape == p.shape for p in twin.parameters())
    ft.verify()


@pytest.mark.parametrize("name", ["mlp", "modulated", "resnet"])
def test_compiled_model(name):
    net, eager = build(name), build(name)
    ft = SparseFinetuner(net, lr=1e-2, density=0.5, criterion="random", scope="layer", score_steps=1)
    twin = SparseFinetuner(eager, lr=1e-2, density=0.5, criterion="random", scope="layer", score_steps=1)
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    for i in range(5):  # the first step selects: the graph of the dense model must not be used after it
        for model, optimizer in ((compiled, ft), (eager, twin)):
            if i == 3:  # as many rows as before, others
                optimizer.evidence.seed = 1
                optimizer.select()
            optimizer.zero_grad()
            model(data()).square().mean().backward()
            optimizer.step()
    for a, b in zip(net.state_dict().values(), eager.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(compiled(data()), eager(data()), rtol=1e-12, atol=1e-12)
    ft.verify()
