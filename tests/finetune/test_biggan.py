"""Selected neurons of BigGAN: exact through spectral norm's σ, without a dense weight gradient."""

import copy

import pytest
import torch
from torch.nn import functional as F

from minegan_fast import SparseFinetuner
from minegan_fast.models import BigGANDeepGenerator, BigGANDiscriminator, BigGANGenerator

TINY = {"resolution": 32, "num_classes": 5, "channel_width": 4, "attention": [16]}
NETWORKS = {
    "generator": lambda: BigGANGenerator(latent_dim=12, class_dim=6, **TINY),
    "deep": lambda: BigGANDeepGenerator(latent_dim=7, class_dim=6, steps=3, **TINY),
    "own embeddings": lambda: BigGANGenerator(latent_dim=12, hierarchical=False, shared=False, **TINY),
    "critic": lambda: BigGANDiscriminator(**TINY),
}


def network(name, train=False):
    """In float64, with every parameter away from its first value: gamma and biases are zero there."""
    torch.manual_seed(0)
    model = NETWORKS[name]().double().train(train)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def loss_of(model, labels=True):
    """A critic's holds a gradient penalty, which differentiates twice."""
    torch.manual_seed(1)
    y = torch.tensor([0, 3, 3, 1])
    if hasattr(model, "latent_dim"):
        y = y if labels else torch.randn(4, model.class_dim).double()
        return (model(torch.randn(4, model.latent_dim).double(), y) * torch.randn(32).double()).mean()
    x = torch.randn(4, 3, 32, 32).double().requires_grad_()
    logits = model(x, y if labels else None)
    (gradient,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
    return F.softplus(logits).mean() + gradient.square().sum()


def some(ft):
    return {layer.name: torch.arange(0, layer.neurons, 3) for layer in ft.layers}


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_are_the_rows_of_the_dense_ones(name, train):
    plain = network(name, train)
    model = copy.deepcopy(plain)
    ft = SparseFinetuner(model)
    ft.select(some(ft))
    losses = [loss_of(net) for net in (plain, model)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[1], losses[0])
    # Biases in front of a batch norm have gradients of rounding errors alone.
    noise = 1e-12 * max(float(p.grad.abs().max()) for p in plain.parameters())
    for layer in ft.layers:
        for member in layer.members:
            dense = plain.get_parameter(member.name).grad
            expected = dense.movedim(member.axis, 0)[::3] if dense.ndim else dense.reshape(1)
            torch.testing.assert_close(member.parameter.link.leaf.grad, expected, rtol=1e-9, atol=noise)
    for (key, ours), theirs in zip(model.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=key)


@pytest.mark.parametrize("name", NETWORKS)
def test_convolutions_and_linear_layers_make_no_dense_gradient(name):
    model = network(name, train=True)
    ft = SparseFinetuner(model)
    ft.select(some(ft))
    loss_of(model).backward()
    dense = {
        m.name for layer in ft.layers for m in layer.members if m.parameter.ndim > 1 and m.parameter.link.dense_uses
    }
    # Its one row is all of it.
    assert dense <= ({"linear.weight"} if name == "critic" else set())
    assert "conv2d" in ft.summary()


def test_neurons_take_their_gain_and_shift_along():
    model = network("generator")
    layers = {layer.name: [(m.name, m.axis) for m in layer.members] for layer in SparseFinetuner(model).layers}
    block = "blocks.1.0"
    parts = ("conv1.weight", "conv1.bias", "bn2.gain.weight", "bn2.bias.weight")
    assert layers[f"{block}.conv1.weight"] == [(f"{block}.{part}", 0) for part in parts]
    assert layers[f"{block}.bn1.gain.weight"] == [(f"{block}.bn1.{part}.weight", 0) for part in ("gain", "bias")]
    assert layers[f"{block}.conv2.weight"] == [(f"{block}.conv2.{part}", 0) for part in ("weight", "bias")]
    assert layers["output_layer.0.gain"] == [("output_layer.0.gain", 0), ("output_layer.0.bias", 0)]
    own = {layer.name: layer for layer in SparseFinetuner(network("own embeddings")).layers}
    assert [m.axis for m in own[f"{block}.conv1.weight"].members] == [0, 0, 1, 1]
    deep = {layer.name: layer for layer in SparseFinetuner(network("deep")).layers}
    names = ("conv_1.weight_orig", "conv_1.bias", "bn_2.scale.weight_orig", "bn_2.offset.weight_orig")
    members = deep["generator.layers.2.conv_1.weight_orig"].members
    assert [m.name for m in members] == [f"generator.layers.2.{name}" for name in names]


@pytest.mark.parametrize("name", ["generator", "deep", "critic"])
def test_a_step_moves_the_selected_neurons_alone(name):
    model = network(name, train=True)
    before = {k: v.clone() for k, v in model.named_parameters()}
    ft = SparseFinetuner(model, lr=1e-3)
    rows = some(ft)
    ft.select(rows)
    for _ in range(2):
        ft.zero_grad()
        loss_of(model, labels=name != "critic").backward()
        ft.step()
    ft.verify()
    moved = 0
    for layer in ft.layers:
        for m in layer.members:
            change = (m.parameter.detach() != before[m.name]).reshape(m.parameter.shape or (1,))
            changed = change.movedim(m.axis, 0).flatten(1).any(1) if change.ndim > 1 else change
            frozen = torch.ones(layer.neurons, dtype=torch.bool)
            frozen[rows[layer.name]] = False
            assert not changed[frozen].any()
            moved += int(changed.sum())
    assert moved > 50


@pytest.mark.parametrize("name", NETWORKS)
def test_fisher_scores_are_exact_sample_by_sample(name):
    model = network(name)
    alone = copy.deepcopy(model)
    ft = SparseFinetuner(model)
    labels = torch.tensor([4, 0, 4])
    x = torch.randn(3, 3, 32, 32) if name == "critic" else torch.randn(3, model.latent_dim)
    inputs = x.double(), labels if name in ("critic", "generator") else torch.randn(3, model.class_dim).double()
    with ft.scoring():
        model(*inputs).square().reshape(3, -1).sum(1).mean().backward()
    expected = {layer.name: 0.0 for layer in ft.layers}
    for i in range(3):
        alone.zero_grad()
        alone(*(t[i : i + 1] for t in inputs)).square().sum().backward()
        for layer in ft.layers:
            for m in layer.members:
                gradient = alone.get_parameter(m.name).grad
                if gradient is not None:
                    g = gradient.movedim(m.axis, 0).flatten(1) if gradient.ndim > 1 else gradient.reshape(-1, 1)
                    expected[layer.name] = expected[layer.name] + g.square().sum(1) / 3
    for layer, scores in ft.scores().items():
        wanted = torch.as_tensor(expected[layer]).float().expand(scores.shape)
        torch.testing.assert_close(scores.float(), wanted, rtol=1e-4, atol=1e-6 * float(wanted.max()))


@pytest.mark.parametrize("name", ["generator", "critic"])
def test_sigma_keeps_no_activations(name):
    """What the graph of a forward holds beside the parameters, in bytes: no more than in dense training."""
    plain = network(name, train=True)
    sparse = copy.deepcopy(plain)
    ft = SparseFinetuner(sparse)
    ft.select(some(ft))
    held = []
    for model in (plain, sparse):
        kept = {}

        def keep(tensor, kept=kept):
            kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            if name == "critic":
                model(torch.randn(8, 3, 32, 32).double().requires_grad_(), torch.arange(8) % 5)
            else:
                model(torch.randn(8, 12).double(), torch.arange(8) % 5)
        own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
        held.append(sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in own))
    assert held[1] <= held[0]
