"""Parametrizations, pruning, replaced modules, scripts and exports around a held model: each trains as a dense model
does under the same change, or raises an error that names release(); nothing trains on in silence."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils import weight_norm as old_weight_norm

from minegan_fast.finetune import SparseFinetuner

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
STEPS, LR = 6, 0.05
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torch.nn.utils.(weight_norm|parametrizations.weight_norm):FutureWarning",
    "ignore:.*torch.jit:DeprecationWarning",
)


class Half(nn.Module):
    def forward(self, w):
        return w * 0.5

    def right_inverse(self, w):
        return w * 2


class Around(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def loss(net):
    return (net(X) - 1).square().mean()


def half(net):
    parametrize.register_parametrization(net[0], "weight", Half())


def pruned(net):
    prune.l1_unstructured(net[0], "weight", 0.5)


def unparametrized(net):
    parametrize.remove_parametrizations(net[0], "weight")


def in_place_of(net, name, make):
    def change(net=net):
        weight = net[0].weight
        del net[0].weight
        getattr(net[0], name)("weight", make(weight))

    change()


CHANGES = {
    "register_parametrization": half,
    "of a bias": lambda net: parametrize.register_parametrization(net[0], "bias", Half()),
    "weight_norm": lambda net: parametrizations.weight_norm(net[0]),
    "spectral_norm": lambda net: parametrizations.spectral_norm(net[0]),
    "orthogonal": lambda net: parametrizations.orthogonal(net[0]),
    "old weight_norm": lambda net: old_weight_norm(net[0]),
    "old spectral_norm": lambda net: old_spectral_norm(net[0]),
    "prune": pruned,
    "prune a bias": lambda net: prune.l1_unstructured(net[0], "bias", 0.5),
    "prune structured": lambda net: prune.ln_structured(net[0], "weight", 0.5, 2, 0),
    "prune globally": lambda net: prune.global_unstructured(
        [(net[0], "weight"), (net[2], "weight")], pruning_method=prune.L1Unstructured, amount=0.3
    ),
    "prune and remove": lambda net: (pruned(net), prune.remove(net[0], "weight")),
    "register and remove": lambda net: (half(net), unparametrized(net)),
    "old weight_norm and remove": lambda net: (old_weight_norm(net[0]), remove_weight_norm(net[0])),
    "old spectral_norm and remove": lambda net: (old_spectral_norm(net[0]), remove_spectral_norm(net[0])),
    "a buffer": lambda net: in_place_of(net, "register_buffer", lambda w: w.detach().clone()),
    "a new layer": lambda net: net.__setitem__(0, nn.Linear(6, 5)),
    "a copy of the layer": lambda net: net.__setitem__(0, copy.deepcopy(net[0])),
    "a wrapper": lambda net: net.__setitem__(0, Around(net[0])),
    "a layer more": lambda net: net.append(nn.Softplus()),
    "torch.compile in place": lambda net: net[0].compile(backend="eager"),
}
MADE_BEFORE = {
    "register_parametrization": (half, unparametrized),
    "not left": (half, lambda net: parametrize.remove_parametrizations(net[0], "weight", leave_parametrized=False)),
    "weight_norm": (CHANGES["weight_norm"], unparametrized),
    "spectral_norm": (CHANGES["spectral_norm"], unparametrized),
    "orthogonal": (CHANGES["orthogonal"], unparametrized),
    "old weight_norm": (CHANGES["old weight_norm"], lambda net: remove_weight_norm(net[0])),
    "old spectral_norm": (CHANGES["old spectral_norm"], lambda net: remove_spectral_norm(net[0])),
    "prune": (pruned, lambda net: prune.remove(net[0], "weight")),
    "one more": (half, half),
    "pruned again": (pruned, pruned),
}
SCRIPTS = {
    "torch.jit.script": torch.jit.script,
    "torch.jit.trace": lambda net: torch.jit.trace(net, X),
    "torch.export": lambda net: torch.export.export(net, (X,)).module(),
    "torch.fx": torch.fx.symbolic_trace,
    "functional_call": lambda net: lambda x: torch.func.functional_call(net, dict(net.named_parameters()), (x,)),
}


def sparse_losses(net, rows, change=None, run=None):
    """Losses of STEPS steps of a SparseFinetuner, with the change in their middle."""
    ft = SparseFinetuner(net, lr=LR, optimizer="sgd")
    ft.select(rows)
    losses = []
    for step in range(STEPS):
        if step == STEPS // 2 and change is not None:
            torch.manual_seed(1)
            change(net)
        value = loss(run or net)
        ft.zero_grad()
        value.backward()
        ft.step()
        losses.append(value.item())
    return losses


def dense_losses(net, rows, change=None):
    """The same of a dense model whose other rows have no gradient."""
    trained = {}
    for name, selected in rows.items():
        mask = torch.zeros(len(net.get_parameter(name)), dtype=torch.bool)
        mask[selected] = True
        names = {name, name.split(".")[0] + ".bias"}  # a bias follows the neurons of its weight
        trained |= {name: (net.get_parameter(name), mask) for name in names}
    losses = []
    for step in range(STEPS):
        if step == STEPS // 2 and change is not None:
            torch.manual_seed(1)
            change(net)
        value = loss(net)
        net.zero_grad()
        value.backward()
        with torch.no_grad():
            now = dict(net.named_parameters())
            for name, (before, mask) in trained.items():
                parameter = now.get(name, before)
                parameter[mask] -= LR * parameter.grad[mask]
        losses.append(value.item())
    return losses


def assert_same_or_refused(sparse, dense):
    try:
        found = sparse()
    except RuntimeError as error:
        assert "release()" in str(error), error  # noqa: PT017
        return False
    assert found == pytest.approx(dense(), rel=1e-5)
    return True


@pytest.mark.parametrize("selected", ["0.weight", "2.weight"])
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_a_held_model(name, selected):
    rows, change = {selected: [0, 2]}, CHANGES[name]
    went_on = assert_same_or_refused(
        lambda: sparse_losses(network(), rows, change), lambda: dense_losses(network(), rows, change)
    )
    if name in ("a wrapper", "a layer more", "torch.compile in place", "register and remove"):
        assert went_on
    if selected == "0.weight" and name in ("register_parametrization", "prune", "a buffer", "a new layer"):
        assert not went_on


@pytest.mark.parametrize("name", MADE_BEFORE)
def test_a_change_of_a_parametrization_that_was_there(name):
    before, change = MADE_BEFORE[name]
    before(plain := network())
    layers = [layer.name for layer in SparseFinetuner(plain).layers]

    def made():
        before(net := network())
        return net

    for layer in layers:
        if layer.startswith("0."):
            rows = {layer: [0, 2]}
            went_on = assert_same_or_refused(
                lambda rows=rows: sparse_losses(made(), rows, change),
                lambda rows=rows: dense_losses(made(), rows, change),
            )
            assert went_on == (name in ("one more", "pruned again"))


def test_a_model_that_was_changed_is_plain_after_release():
    net = network()
    ft = SparseFinetuner(net, lr=LR)
    ft.select({"0.weight": [1]})
    loss(net).backward()
    ft.step()
    half(net)
    with pytest.raises(RuntimeError, match=r"release\(\)"):
        ft.step()
    with pytest.raises(RuntimeError, match=r"'0.weight' is not in the model any more.*release\(\)"):
        ft.save_delta("/nowhere/d.safetensors")
    ft.release()
    assert {type(p) for p in net.parameters()} == {nn.Parameter}
    ft = SparseFinetuner(net, lr=LR, density=1.0, criterion="random")
    ft.select()
    before = loss(net).item()
    loss(net).backward()
    ft.step()
    assert loss(net).item() < before


def test_a_change_before_the_selection():
    """While nothing is held a parameter may move; one that left is named by the selection."""
    for change, names in ((half, "0.parametrizations.weight.original"), (CHANGES["spectral_norm"], None)):
        net, twin = network(), network()
        ft = SparseFinetuner(net, lr=LR, optimizer="sgd")
        change(net)
        change(twin)
        ft.select({"0.weight": [1, 3]})
        loss(net).backward()
        loss(twin).backward()
        original = twin.get_parameter(names or "0.parametrizations.weight.original")
        torch.testing.assert_close(ft.parameters()[0].grad, original.grad[[1, 3]])
    net = network()
    ft = SparseFinetuner(net)
    parametrizations.weight_norm(net[0])
    with pytest.raises(RuntimeError, match=r"0.weight left the model.*build a new SparseFinetuner"):
        ft.select({"0.weight": [1]})


@pytest.mark.parametrize(
    "rows", [{"0.weight": [1, 3]}, {"0.weight": range(5), "2.weight": range(3)}], ids=["few", "all"]
)
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_model_trains_through_what_torch_makes_of_it(name, rows):
    """Made before the selection or after it."""
    rows = {layer: list(selected) for layer, selected in rows.items()}
    expected = dense_losses(network(), rows)
    assert expected[-1] < expected[0]
    net = network()
    assert sparse_losses(net, rows, run=SCRIPTS[name](net)) == pytest.approx(expected, rel=1e-5)
    net = network()
    made = []

    def run(x):
        if not made:  # the rows are selected by now
            made.append(SCRIPTS[name](net))
        return made[0](x)

    assert sparse_losses(net, rows, run=run) == pytest.approx(expected, rel=1e-5)


def test_a_parameter_of_a_held_weight_is_named():
    net = network()
    ft = SparseFinetuner(net)
    ft.select({"0.weight": [1]})
    with pytest.raises(RuntimeError, match=r"weight.detach\(\).*release\(\)"):
        nn.Parameter(net[0].weight)
    assert torch.equal(nn.Parameter(net[0].weight.detach()), net[0].weight)
    ft.release()
    assert torch.equal(nn.Parameter(net[0].weight), net[0].weight)


@pytest.mark.skipif(torch.__version__ < (2, 9), reason="torch 2.8's compiler follows the weight's properties for ever")
@pytest.mark.filterwarnings("ignore:Dynamo does not know:UserWarning", "ignore:The .grad attribute:UserWarning")
@pytest.mark.parametrize("norm", [parametrizations.weight_norm, old_weight_norm])
def test_weight_norm_under_the_compiler(norm):
    def made():
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the older one is deprecated
            return nn.Sequential(norm(nn.Linear(6, 5)), nn.Tanh(), nn.Linear(5, 4))

    net, eager = made(), made()
    ours = [SparseFinetuner(n, lr=1e-2) for n in (net, eager)]
    names = [layer.name for layer in ours[0].layers]
    for ft in ours:
        ft.select({name: [1] for name in names})
    compiled = torch.compile(net, backend="aot_eager")
    x = torch.randn(3, 6)
    for ft, n in zip(ours, (compiled, eager), strict=True):
        n(x).square().mean().backward()
        ft.step()
    for a, b in zip(net.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(a, b)
