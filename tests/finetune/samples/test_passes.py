"""Fisher of a batch where not every use of a parameter is followed, and around the passes: right, or said to be the
batch's."""

import copy

import pytest
import torch
from one_by_one import assert_equal, loss_of, one_by_one, scored
from sample_networks import Attention, Fails, Tied, build, data
from scored_networks import NETWORKS, make
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from minegan_fast.finetune import SparseFinetuner
from minegan_fast.models import StyleGAN2Generator


class Mixed(nn.Module):
    """One layer that is followed, and a product that is not."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(108, 6), nn.Parameter(torch.randn(6, 4))

    def forward(self, x):
        return torch.tanh(self.first(x.flatten(1))) @ self.second


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_what_is_not_followed_takes_the_batch_and_is_named(reduction):
    net, x = Mixed().double(), data(4)
    scores, named = scored(net, [x], lambda net, x: loss_of(net, x, reduction), reduction=reduction)
    assert named == {"second"}
    assert_equal(scores, one_by_one(net, [x]), but=named)
    loss_of(net, x, "sum").backward()
    # Σ_b |g_b|² is taken to be |Σ_b g_b|², and divided by the samples
    torch.testing.assert_close(scores["second"], (net.second.grad.square().sum(1) / 4).float(), rtol=1e-6, atol=0)


def test_apenalty_on_the_weights_falls_back():
    net, x = make("linear"), data(4)
    scores, named = scored(net, [x], lambda net, x: loss_of(net, x) + net[3].weight.square().sum())
    assert named == {"3.weight"}
    assert_equal(scores, one_by_one(net, [x]), but={"3.weight"})


def test_one_use_that_is_not_followed_is_enough():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 6, bias=False)

        def forward(self, x):
            return torch.tanh(self.layer(x[:, 0, 0])) @ self.layer.weight

    net, x = Both().double(), data(4)
    scores, named = scored(net, [x])
    assert named == {"layer.weight"}
    loss_of(net, x, "sum").backward()
    torch.testing.assert_close(scores["layer.weight"], (net.layer.weight.grad.square().sum(1) / 4).float())


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Tied(), {"embed.weight"}),
        (
            lambda: Attention(),
            {f"layer.self_attn.{n}" for n in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")},
        ),
        (lambda: build("modulated"), None),
        (lambda: build("lstm"), None),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), {"1.weight", "1.bias"}),
    ],
)
def test_other_layers_are_right_or_named(make, named):
    torch.manual_seed(0)
    net, x = make().double(), data(4)
    scores, found = scored(net, [x])
    assert found if named is None else found == named
    if not isinstance(net[-1] if isinstance(net, nn.Sequential) else net, nn.BatchNorm2d):
        layers = SparseFinetuner(copy.deepcopy(net)).layers
        touched = {layer.name for layer in layers if found & {m.name for m in layer.members}}
        assert_equal(scores, one_by_one(net, [x]), but=touched)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_a_batch_of_one_is_the_gradient_of_the_pass():
    for name in NETWORKS:
        net, pieces = make(name), data(3).split(1)
        scores, named = scored(net, pieces)
        again, _ = scored(net, pieces, samples=1)
        assert named == set()
        assert all(torch.equal(score, again[layer]) for layer, score in scores.items())


def test_one_piece_a_pass_on_request():
    net, x = make("linear"), data(4)
    scores, named = scored(net, [x], samples=1)
    assert named == set()
    loss_of(net, x).backward()
    torch.testing.assert_close(scores["3.weight"], (net[3].weight.grad.square().sum(1) + net[3].bias.grad ** 2).float())


def test_axis_0_that_is_not_the_samples():
    """Time first: the number of samples, once said, shows that the layer's input has another axis in front."""

    class TimeFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(3, 2)

        def forward(self, x):
            return self.head(x.flatten(2).permute(2, 0, 1)).sum(0)

    net, x = TimeFirst().double(), data(4)
    scores, named = scored(net, [x], samples=4)
    assert named == {"head.weight", "head.bias"}
    loss_of(net, x, "sum").backward()
    total = net.head.weight.grad.square().sum(1) + net.head.bias.grad.square()
    torch.testing.assert_close(scores["head.weight"], (total / 4).float(), rtol=1e-6, atol=0)


def test_a_gradient_of_a_gradient_falls_back():
    """R1 in the loss: what its backward brings is no sum over the layers' inputs any more."""

    def loss(net, x):
        x = x.clone().requires_grad_()
        y = net(x)
        (gradient,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return y.square().sum(1).mean() + gradient.square().flatten(1).sum(1).mean()

    net, x = make("linear"), data(4)
    scores, named = scored(net, [x], loss)
    assert {"1.weight", "3.weight"} <= named
    for p in net.parameters():
        p.grad = None
    loss(net, x).backward()
    squares = (4 * net[3].weight.grad).square().sum(1) + (4 * net[3].bias.grad).square()
    torch.testing.assert_close(scores["3.weight"], (squares / 4).float(), rtol=1e-6, atol=0)
    single, _ = scored(net, x.split(1), loss)
    assert_equal(single, one_by_one(net, [x], loss))


def test_gradients_inside_the_block_are_no_evidence():
    net, x = make("conv2d"), data(4)
    plain = copy.deepcopy(net)
    ft = SparseFinetuner(net)
    with ft.scoring():
        found = torch.autograd.grad(loss_of(net, x), list(net.parameters()))
        (dx,) = torch.autograd.grad(loss_of(net, y := x.clone().requires_grad_()), y)
        assert ft.evidence.count == 0
        loss_of(net, x).backward()
    expected = torch.autograd.grad(loss_of(plain, x), list(plain.parameters()))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(dx, torch.autograd.grad(loss_of(plain, z := x.clone().requires_grad_()), z)[0])
    assert ft.evidence.count == 4
    assert_equal(ft.scores(), one_by_one(plain, [x]))


def test_graphs_that_live_on_do_not_count():
    """Losses that are kept, that never see a backward, and a graph that sees two."""
    net, x, kept = make("linear"), data(4), []
    ft = SparseFinetuner(net)
    with ft.scoring():
        kept.append(loss_of(net, data(7)))
        for part in (x[:3], x[3:]):
            kept.append(loss_of(net, part))
            kept[-1].backward()
        first = loss_of(net, x)
        first.backward(retain_graph=True)
        first.backward()
    assert ft.evidence.count == 12
    assert_equal(ft.scores(), one_by_one(net, [x, x, x]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    net, x = make("conv2d").float(), data(4, dtype=torch.float32)

    def loss(net, x):
        with torch.autocast("cpu", dtype):
            return loss_of(net, x).float()

    scores, named = scored(net, [x], loss)
    assert named == set()
    assert_equal(scores, one_by_one(net, [x], loss), rtol=64 * torch.finfo(dtype).eps)


def test_layers_turned_off_and_passes_of_some_parameters():
    net, x = make("linear"), data(4)
    ft = SparseFinetuner(net)
    with ft.scoring():
        loss_of(net, x).backward(inputs=[net[1].weight])
    scores = ft.scores()
    assert not scores["3.weight"].any()
    for p in net.parameters():
        p.grad = None
    expected = 0
    for sample in x.split(1):
        (g,) = torch.autograd.grad(loss_of(net, sample), net[1].weight)
        expected = expected + g.square().sum(1) / 4
    torch.testing.assert_close(scores["1.weight"], expected.float())


def test_a_pass_that_fails_adds_nothing():
    net = make("linear")
    ft = SparseFinetuner(net)
    with ft.scoring():
        loss_of(net, data(4)).backward()
    before = ft.scores()
    net[2].register_forward_hook(lambda module, args, output: Fails.apply(output))
    with pytest.raises(KeyError, match="stop"), ft.scoring():
        loss_of(net, data(4)).backward()
    assert ft.evidence.count == 4
    assert all(torch.equal(score, before[name]) for name, score in ft.scores().items())
    assert all(type(p) is nn.Parameter and not hasattr(p, "trail") for p in net.parameters())


def test_a_sparse_gradient_is_named():
    net = nn.Sequential(nn.Embedding(7, 4, sparse=True), nn.Linear(4, 2))
    ft = SparseFinetuner(net)
    with pytest.raises(TypeError, match=r"'0.weight' is sparse.*sparse=False"), ft.scoring():
        net(torch.tensor([1, 2])).sum().backward()
    assert ft.evidence.count == 0
    net(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(TypeError, match=r"'0.weight' is sparse"):
        ft.step()


def test_copies_made_inside_are_plain():
    net = make("linear")
    ft = SparseFinetuner(net)
    with ft.scoring():
        twin = copy.deepcopy(net)
        assert all(type(p) is nn.Parameter for p in twin.parameters())
        assert twin(data(2)).shape == net(data(2)).shape


@pytest.mark.parametrize(
    ("options", "message"),
    [({"reduction": "max"}, "reduction must be"), ({"samples": 0}, "samples must be"), ({"samples": 1.5}, "samples")],
)
def test_wrong_arguments(options, message):
    net = make("linear")
    ft = SparseFinetuner(net)
    with pytest.raises(ValueError, match=message), ft.scoring(**options):
        pass
    with ft.scoring():
        pass


@pytest.mark.parametrize("name", ["conv2d", "twice"])
def test_checkpointed_layers(name):
    """What a checkpoint computes again in the backward is no second use."""

    def loss(net, x):
        return checkpoint(net, x, use_reentrant=False).flatten(1).square().sum(1).mean()

    scores, named = scored(make(name), [data(4)], loss)
    assert named == set()
    assert_equal(scores, one_by_one(make(name), [data(4)]))


def test_under_ddp(group_of_one):
    """DDP waits for a gradient of every parameter, also of those whose samples' shares are taken instead."""
    net, batches = make("conv2d"), [data(4), data(3, seed=2)]
    model = nn.parallel.DistributedDataParallel(net)
    ft = SparseFinetuner(model)
    with ft.scoring():
        for x in batches:
            loss_of(model, x).backward()
    assert_equal(ft.scores(), one_by_one(make("conv2d"), batches))
    loss_of(model, data(4)).backward()
    (g,) = torch.autograd.grad(loss_of(net, data(4)), net[0].weight)
    torch.testing.assert_close(net[0].weight.grad, g)


def test_compiled_models_fall_back():
    net, x = make("conv2d"), data(4)
    torch.compiler.reset()
    compiled = torch.compile(net, backend="eager")
    scores, named = scored(net, [x], lambda net, x: loss_of(compiled, x), samples=4)
    assert named == {name for name, _ in net.named_parameters()}
    loss_of(net, x, "sum").backward()
    total = net[0].weight.grad.square().sum((1, 2, 3)) + net[0].bias.grad.square()
    torch.testing.assert_close(scores["0.weight"], (total / 4).float(), rtol=1e-6, atol=0)


class InPlace(nn.Linear):
    def forward(self, x):
        weight = self.weight * 2
        weight.mul_(1.5)
        return F.linear(x, weight, self.bias)


class ByConstant(nn.Linear):
    """The constant that made the weight is written to after the layer has run."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("sigma", torch.ones(()))

    def forward(self, x):
        y = F.linear(x, (self.weight + self.sigma).square(), self.bias)
        self.sigma.add_(1)
        return y


class Dropped(nn.Linear):
    def forward(self, x):
        return F.linear(x, F.dropout(self.weight, 0.5), self.bias)


@pytest.mark.parametrize(
    ("kind", "names"),
    [(InPlace, {"2.weight", "2.bias"}), (Dropped, {"2.weight", "2.bias"}), (ByConstant, {"2.weight"})],
)
def test_weights_that_cannot_be_made_again(kind, names):
    """Written to in place, or made at random: their gradient is the batch's."""
    net, x = nn.Sequential(nn.Flatten(), nn.Linear(108, 4), kind(4, 3)).double(), data(4)
    torch.manual_seed(3)
    scores, named = scored(net, [x])
    assert named == names
    if kind is not ByConstant:  # whose constant is another one now
        torch.manual_seed(3)
        loss_of(net, x, "sum").backward()
        total = net[2].weight.grad.square().sum(1) + net[2].bias.grad.square()
        torch.testing.assert_close(scores["2.weight"], (total / 4).float(), rtol=1e-6, atol=0)


def test_peak_memory():
    """Scoring a batch holds, beside its backward pass, whose gradients stay, what the samples' shares of one weight and
    the copies that they are made of take: those of its two uses (convolution, norm) and their sum, and its layer's
    input and output gradient with the samples as groups. Of the other layers it holds nothing more."""
    torch.manual_seed(0)
    net = StyleGAN2Generator(32, latent_dim=32, channel_base=1024, channel_max=64, mapping_layers=2)
    z = torch.randn(8, 32)
    ft = SparseFinetuner(net)

    def peak(call):
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            call()
        held = highest = 0
        for event in profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                held += event.nbytes()
                highest = max(highest, held)
        return highest

    def score():
        with ft.scoring():
            net(z, noise="constant").square().mean().backward()

    def plain():
        net(z, noise="constant").square().mean().backward()
        net.zero_grad()

    plain()
    score()
    shares = len(z) * net.conv1.conv.weight.numel() * 4
    assert peak(score) - peak(plain) <= 5 * shares
