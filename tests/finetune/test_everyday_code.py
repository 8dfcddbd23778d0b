"""What scripts do around an optimizer: schedulers, groups, lists of modules, layers written by hand."""

import copy
import gc

import numpy as np
import pytest
import torch
from sample_networks import build, data
from torch import nn
from torch.nn import functional as F

import minegan_fast as mf
from minegan_fast.finetune import SparseFinetuner


def backward(net, ft):
    ft.zero_grad()
    net(data()).square().mean().backward()


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_schedulers_that_move_momentum_too(optimizer):
    net, plain = build("mlp"), build("mlp")
    ours = {"momentum": 0.9} if optimizer == "sgd" else {"betas": (0.9, 0.99)}
    ft = SparseFinetuner(net, lr=0.1, optimizer=optimizer, density=1.0, **ours)
    ft.select({layer.name: range(layer.neurons) for layer in ft.layers})
    theirs = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[optimizer](plain.parameters(), lr=0.1, **ours)
    schedules = [torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=12) for o in (ft, theirs)]
    for _ in range(10):
        for model, o, schedule in zip((net, plain), (ft, theirs), schedules, strict=True):
            backward(model, o)
            o.step()
            schedule.step()
    for p, q in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_options_that_are_not_there_are_refused(optimizer):
    ft = SparseFinetuner(build("mlp"), optimizer=optimizer)
    for option in ("maximize", "nesterov", "amsgrad", {"sgd": "betas", "adam": "momentum"}[optimizer]):
        with pytest.raises(ValueError, match=f"options that optimizer='{optimizer}' does not have: {option}"):
            ft.add_param_group({"params": [nn.Parameter(torch.zeros(1))], option: True})
    with pytest.raises(ValueError, match="does not have: maximize"):
        SparseFinetuner(build("mlp"), groups=[{"include": "1", "maximize": True}])


def test_groups_have_learning_rates_of_their_own():
    net, plain = build("mlp"), build("mlp")
    ft = SparseFinetuner(
        net, lr=1e-2, optimizer="sgd", density=1.0, groups=[{"include": "3", "lr": 0.0, "momentum": 0.5}]
    )
    assert [len(g["params"]) for g in ft.param_groups] == [2, 2]
    ft.add_param_group({"params": [extra := nn.Parameter(torch.ones(2))], "lr": 1.0})
    ft.select({layer.name: range(layer.neurons) for layer in ft.layers})
    assert [g["lr"] for g in ft.param_groups] == [1e-2, 0.0, 1.0]
    assert [len(g["params"]) for g in ft.param_groups] == [2, 2, 1]
    theirs = torch.optim.SGD(plain[1].parameters(), lr=1e-2)
    for i in range(3):
        if i == 2:
            ft.param_groups[1]["lr"] = 1e-3
            theirs.add_param_group({"params": list(plain[3].parameters()), "lr": 1e-3})
        backward(net, ft)
        extra.sum().backward()
        ft.step()
        theirs.zero_grad()
        plain.zero_grad()
        plain(data()).square().mean().backward()
        theirs.step()
    assert torch.equal(extra.detach(), torch.full((2,), -2.0))
    torch.testing.assert_close(net[1].weight.detach(), plain[1].weight.detach(), rtol=0, atol=1e-12)
    assert not torch.equal(net[3].weight, build("mlp")[3].weight)
    other = build("mlp")
    resumed = SparseFinetuner(other, lr=5.0, optimizer="sgd", density=1.0, groups=[{"include": "3", "momentum": 0.5}])
    resumed.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    resumed.load_state_dict(ft.state_dict())
    assert [g["lr"] for g in resumed.param_groups] == [1e-2, 1e-3, 1.0]
    assert "added group 1" in ft.summary()
    assert ft.memory()["sparse"]["gradients"] == sum(p.nbytes for p in ft.parameters())


def test_movement_is_measured_with_each_groups_learning_rate():
    net = build("mlp")
    ft = SparseFinetuner(net, lr=1e-2, optimizer="sgd", criterion="movement", groups=[{"include": "3", "lr": 0.0}])
    with ft.scoring():
        net(data()).square().mean().backward()
    scores = ft.scores()
    assert scores["1.weight"].any()
    assert not scores["3.weight"].any()


def test_groups_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"'3.weight' is in groups\[0\] and in groups\[1\]"):
        SparseFinetuner(build("mlp"), groups=[{"include": "3"}, {"include": ["3"]}])
    with pytest.raises(TypeError, match=r"groups\[0\] must be a dict of include"):
        SparseFinetuner(build("mlp"), groups=[{"lr": 1.0}])
    with pytest.raises(ValueError, match="include pattern 'nowhere' matches no module"):
        SparseFinetuner(build("mlp"), groups=[{"include": "nowhere"}])


def test_a_second_optimizer_of_one_model_is_refused():
    net = build("mlp")
    first = SparseFinetuner(net, include="1")
    with pytest.raises(ValueError, match=r"another SparseFinetuner trains this model.*groups="):
        SparseFinetuner(net, include="3")
    with pytest.raises(ValueError, match="another SparseFinetuner"):
        SparseFinetuner(nn.Sequential(net, nn.Linear(2, 2)))
    SparseFinetuner(copy.deepcopy(net))
    first.release()
    second = SparseFinetuner(net)
    second.cycle = second  # which only the garbage collector frees
    del second
    SparseFinetuner(net)
    gc.collect()


def test_an_optimizer_that_could_not_be_built_is_nobodys_rival():
    net = build("mlp")
    with pytest.raises(TypeError) as caught:  # whose traceback keeps it alive, as a notebook's does
        SparseFinetuner(net, groups=[{"lr": 1.0}])
    SparseFinetuner(net)
    assert caught.tb is not None


def test_several_networks_in_one_optimizer():
    a, b = build("mlp"), build("mlp", seed=2)
    ft = SparseFinetuner([a, b], lr=1e-2, optimizer="sgd")
    ft.select({"0.1.weight": [1], "1.3.weight": [0]})
    (a(data()).square().mean() + b(data()).square().mean()).backward()
    ft.step()
    ft.verify()
    assert not torch.equal(a[1].weight, build("mlp")[1].weight)
    with pytest.raises(
        TypeError,
        match=r"list of them \(or an nn.ModuleList\), got list; pass the models, not their parameters",
    ):
        SparseFinetuner(list(build("mlp").parameters()))


def test_numbers_of_numpy_are_numbers():
    ft = SparseFinetuner(
        build("mlp"), lr=np.float32(0.01), density=np.float64(0.5), score_steps=np.int64(2), betas=(np.float32(0), 0.9)
    )
    ft.select({"1.weight": [1]})
    with pytest.raises(TypeError, match="density must be a number"):
        SparseFinetuner(build("mlp"), density="0.5")


class Conv1D(nn.Module):
    """As GPT-2 has it: weight [in, out]."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        y = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight)
        return y.view(*x.shape[:-1], -1)


class Transposed(Conv1D):
    def forward(self, x):
        return x @ self.weight + self.bias


@pytest.mark.parametrize(("kind", "sizes"), [(Conv1D, (4, 8)), (Conv1D, (6, 6)), (Transposed, (4, 8))])
def test_the_neurons_of_a_transposed_matrix_are_its_outputs(kind, sizes):
    torch.manual_seed(0)
    net = kind(*sizes)
    plain = copy.deepcopy(net)
    ft = SparseFinetuner(net, lr=1e-2, optimizer="sgd")
    assert {m.name: m.axis for m in ft.layers[0].members} == {"weight": 1, "bias": 0}
    ft.select({"weight": [3]})
    x = torch.randn(2, 5, sizes[0], requires_grad=True)
    net(x).square().mean().backward()
    plain(x.detach()).square().mean().backward()
    torch.testing.assert_close(ft.parameters()[0].grad[0], plain.weight.grad[:, 3])
    torch.testing.assert_close(ft.parameters()[1].grad, plain.bias.grad[[3]])
    ft.step()
    moved = (net.weight.detach() != plain.weight).any(0).nonzero().flatten().tolist()
    assert moved == [3]
    assert "dense" not in ft.summary().replace("dense, then rows: add", "")


def test_a_square_weight_that_is_used_the_other_way_round_is_named():
    net = Transposed(6, 6)
    ft = SparseFinetuner(net)
    net(torch.randn(2, 6)).sum().backward()
    ft.select({"weight": [3]})
    with pytest.raises(RuntimeError, match=r"square weight \[6, 6\] is used as x @ W.*neuron_parameters\(\)"):
        net(torch.randn(2, 6))
    with torch.no_grad():
        net(torch.randn(2, 6))
    x = torch.randn(2, 6)
    for use in (
        lambda w: torch.einsum("bi,io->bo", x, w),
        lambda w: F.linear(x, w.t()),
        lambda w: w.t() @ x.t(),
        lambda w: torch.addmm(net.bias, x, w),
    ):
        with pytest.raises(RuntimeError, match="square weight"):
            use(net.weight)
    torch.einsum("bi,oi->bo", x, net.weight)
    (net.weight @ x.t()).sum().backward()
    ft.release()

    class Told(Transposed):
        def neuron_parameters(self):
            return [[("weight", 1), ("bias", 0)]]

    net = Told(6, 6)
    ft = SparseFinetuner(net)
    ft.select({"weight": [3]})
    net(torch.randn(2, 6)).sum().backward()
    assert net.weight.grad[:, 3].all()
    assert not net.weight.grad[:, :3].any()


def test_a_square_weight_whose_module_tells_its_neurons_is_used_in_any_way():
    lin, table = nn.Linear(6, 6), nn.Embedding(6, 6)
    net = nn.Sequential(lin, table)
    twin = copy.deepcopy(net)
    ft = SparseFinetuner(net)
    ft.select({"0.weight": [3], "1.weight": [2]})
    u, one_hot = torch.randn(2, 6), torch.eye(6)[[1, 2]]

    def loss(lin, table):
        w = lin.weight
        orthogonal = (w.t() @ w - torch.eye(6)).square().sum() + torch.mm(w.t(), w).sum() + (w @ w).sum()
        return orthogonal + (lin(u) @ w).square().sum() + (one_hot @ table.weight).square().sum() + (u @ w).sum()

    loss(lin, table).backward()
    loss(*twin).backward()
    torch.testing.assert_close(lin.weight.grad[3], twin[0].weight.grad[3])
    torch.testing.assert_close(table.weight.grad[2], twin[1].weight.grad[2])


MULTIPLICATIONS = {
    "matmul": lambda x, w: x.matmul((w * 0.5).t()),
    "mm": lambda x, w: torch.mm(x, w.t()),
    "addmm": lambda x, w: torch.addmm(torch.zeros(8), x, w.t()),
    "einsum": lambda x, w: torch.einsum("bi,oi->bo", x, w),
    "linear": lambda x, w: nn.functional.linear(x, w),
}


@pytest.mark.parametrize("name", MULTIPLICATIONS)
def test_a_frozen_layer_leaves_its_output_differentiable(name):
    """NVIDIA's loops differentiate by the output of the mapping network, which as a rule has no selected rows."""

    class Mapping(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8))

        def forward(self, x):
            return MULTIPLICATIONS[name](x, self.weight)

    mapping, synthesis = Mapping(), nn.Linear(8, 12)
    ft = SparseFinetuner(nn.Sequential(mapping, synthesis))
    ft.select({"1.weight": [0, 1]})
    w = mapping(torch.randn(4, 8))
    (slope,) = torch.autograd.grad(synthesis(w).sum(), w, create_graph=True)
    slope.square().sum().backward()
    assert ft.parameters()[0].grad is not None


def test_keepdims_and_axis_are_other_words():
    class Demodulated(nn.ConvTranspose2d):
        def forward(self, x):
            scale = torch.rsqrt(self.weight.square().sum(axis=(0, 2, 3), keepdims=True) + 1e-8)
            return nn.functional.conv_transpose2d(x, self.weight * scale)

    net = Demodulated(3, 2, 3, bias=False).double()
    x, target = torch.randn(2, 3, 5, 5).double(), torch.randn(2, 2, 7, 7).double()
    (net(x) * target).sum().backward()
    want = net.weight.grad.clone()
    ft = SparseFinetuner(net)
    ft.select({"weight": [0]})
    (net(x) * target).sum().backward()
    torch.testing.assert_close(ft.parameters()[0].grad.movedim(0, 1), want[:, [0]])


@pytest.mark.parametrize("shape", [(4, 7), (4, 5, 7), (7,), (2, 3, 5, 7)])
def test_what_is_behind_a_linear_layer_may_write_into_its_output(shape):
    """Held, while samples are scored, and in a penalty."""
    x = torch.randn(shape)

    def make():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(7, 6), nn.ReLU(inplace=True), nn.Linear(6, 4))

    net, plain = make(), make()
    ft = SparseFinetuner(net)
    ft.select({"0.weight": [1]})
    net(x).square().mean().backward()
    plain(x).square().mean().backward()
    torch.testing.assert_close(ft.parameters()[0].grad, plain[0].weight.grad[[1]])
    net = make()
    ft = SparseFinetuner(net)
    if len(shape) > 1:
        with ft.scoring():
            net(x).square().mean().backward()
        critic = make()
        mf.r1_penalty(lambda x: critic(x).flatten(1).mean(1), x).backward()


def test_what_is_behind_a_leaky_relu_in_a_penalty_may_write_into_its_output():
    a, b = nn.Conv2d(3, 6, 3, padding=1).double(), nn.Conv2d(6, 1, 3).double()
    x, got = torch.randn(4, 3, 8, 8).double(), []
    for change in (lambda y: y.add_(1), lambda y: y + 1):
        a.zero_grad()

        def critic(x, change=change):
            return b(change(nn.functional.leaky_relu(a(x), 0.2))).flatten(1).square().sum(1)

        mf.r1_penalty(critic, x).backward()
        got.append(a.weight.grad.clone())
    torch.testing.assert_close(*got)


class Conditional(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 1, 8)

    def forward(self, x, y):
        return self.layer(x).flatten(1)[:, 0] + y


def test_half_precision_critics_behind_functions():
    from functools import partial

    D, y = Conditional().bfloat16(), torch.zeros(2).bfloat16()
    x = torch.randn(2, 3, 8, 8).bfloat16()

    class Method:
        def __init__(self):
            self.D = D

        def __call__(self, x):
            return self.D(x, y)

    want = mf.r1_penalty(lambda x: D(x, y), x)
    assert torch.equal(want, mf.r1_penalty(partial(D, y=y), x))
    assert torch.equal(want, mf.r1_penalty(partial(lambda d, x: d(x, y), D), x))
    plain = Conditional()
    assert mf.r1_penalty(lambda x: plain(x, y.float()), x).dtype == torch.float32
    mf.gradient_penalty(lambda x: D(x, y), x, -x).backward()


def delta_of(net):
    ft = SparseFinetuner(net, lr=0.1)
    ft.select({"1.weight": [1, 3]})
    net(data()).square().mean().backward()
    ft.step()
    return ft


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_deltas_are_known_to_copies_of_a_model(tmp_path):
    base = build("mlp")
    delta_of(trained := copy.deepcopy(base)).save_delta(tmp_path / "d.safetensors")
    net = copy.deepcopy(base)
    mf.load_delta(net, tmp_path / "d.safetensors")
    assert same(net, trained)
    twin = copy.deepcopy(net)
    mf.load_delta(twin, tmp_path / "d.safetensors", scale=0.5)  # adds
    mf.unload_delta(twin)
    assert same(twin, base)
    assert same(net, trained)
    with pytest.raises(RuntimeError, match="no delta is loaded"):
        mf.unload_delta(twin)
    mf.unload_delta(net)
    assert same(net, base)


def test_other_weights_in_a_model_that_had_a_delta_are_refused(tmp_path):
    base, other = build("mlp"), build("mlp", seed=7)
    delta_of(copy.deepcopy(base)).save_delta(tmp_path / "d.safetensors")
    net = copy.deepcopy(base)
    mf.load_delta(net, tmp_path / "d.safetensors")
    net.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="trained on another base"):
        mf.load_delta(net, tmp_path / "d.safetensors")


@pytest.mark.parametrize("change", ["half", "bfloat16", "float"])
def test_a_delta_comes_off_in_another_precision(tmp_path, change):
    base = build("mlp")
    delta_of(copy.deepcopy(base)).save_delta(tmp_path / "d.safetensors")
    net = copy.deepcopy(base)
    mf.load_delta(net, tmp_path / "d.safetensors")
    getattr(net, change)()
    mf.unload_delta(net)
    assert same(net, getattr(copy.deepcopy(base), change)())


def test_numpy_numbers_select_and_score():
    net = build("mlp")
    ft = SparseFinetuner(net, criterion="random", density=0.3, seed=np.int64(4))
    selection = ft.select()
    assert selection == SparseFinetuner(build("mlp"), criterion="random", density=0.3, seed=4).select()
    assert selection.shuffled(np.int64(1)) == selection.shuffled(1)
    scored = SparseFinetuner(build("mlp"))
    with scored.scoring(samples=np.int64(3)):
        scored.model(data()).square().mean().backward()
    assert mf.LazyPenalty(mf.r1_penalty, every=np.int64(2)).every == 2


def test_a_copy_of_a_held_model_keeps_the_classes_of_its_parameters():
    class Named(nn.Parameter):
        def doubled(self):
            return self * 2

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = Named(torch.randn(4, 3))

        def forward(self, x):
            return x @ self.weight.doubled().t()

    net = Layer()
    ft = SparseFinetuner(net, ema_decay=0.9)
    ft.select({"weight": [1]})
    x = torch.randn(2, 3)
    net(x).sum().backward()
    ft.step()
    for again in (copy.deepcopy(net), ft.ema_model()):
        assert type(again.weight) is Named
        again(x)


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 5, 3)])
@pytest.mark.parametrize(
    "use", [lambda x, lin: lin(x), lambda x, lin: x @ lin.weight.t(), lambda x, lin: F.linear(x, lin.weight)]
)
def test_a_frozen_layer_of_any_input_stays_differentiable(shape, use):
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    ft = SparseFinetuner(net)
    ft.select({"1.weight": [0]})
    y = use(torch.randn(shape), net[0])
    (gradient,) = torch.autograd.grad(y.square().sum(), y)
    torch.testing.assert_close(gradient, 2 * y)
