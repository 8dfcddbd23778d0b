"""Which tensors make a neuron, by every rule."""

import pytest
import torch
from sample_networks import Attention, Constant, Modulated, Recurrent, Tied, build
from torch import nn

from minegan_fast.finetune.neurons import filter_layers, find_layers, row_axis


def described(model):
    return {layer.name: [(m.name, m.axis) for m in layer.members] for layer in find_layers(model)}


def test_bias_and_affine_follow_the_weight():
    assert described(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Conv2d(4, 2, 1, bias=False))) == {
        "0.weight": [("0.weight", 0), ("0.bias", 0)],
        "1.weight": [("1.weight", 0), ("1.bias", 0)],
        "2.weight": [("2.weight", 0)],
    }


def test_transposed_convolutions_count_outputs():
    layers = {layer.name: layer for layer in find_layers(nn.ConvTranspose2d(3, 5, 4))}
    assert [(m.name, m.axis) for m in layers["weight"].members] == [("weight", 1), ("bias", 0)]
    assert (layers["weight"].neurons, layers["weight"].cost) == (5, 3 * 16 + 1)
    depthwise = find_layers(nn.ConvTranspose2d(5, 5, 3, groups=5))
    assert [(m.axis, layer.neurons, layer.cost) for layer in depthwise for m in layer.members] == [(0, 5, 10)] * 2


def test_a_module_says_itself_what_belongs_together():
    assert described(Modulated(3, 5)) == {
        "strength": [("strength", 0)],
        "conv.weight": [("conv.weight", 1), ("activate.bias", 0)],
        "conv.modulation.weight": [("conv.modulation.weight", 0), ("conv.modulation.bias", 0)],
    }


def test_a_declaration_is_found_through_parametrizations():
    net = Modulated(3, 5)
    nn.utils.parametrizations.spectral_norm(net.conv, "weight")
    assert described(net)["conv.parametrizations.weight.original"] == [
        ("conv.parametrizations.weight.original", 1),
        ("activate.bias", 0),
    ]
    old = Modulated(3, 5)
    nn.utils.spectral_norm(old.conv, "weight")
    assert described(old)["conv.weight_orig"] == [("conv.weight_orig", 1), ("activate.bias", 0)]


@pytest.mark.parametrize(
    ("declared", "message"),
    [([("weigth", 0)], "'weigth'"), ([("weight", 2)], "no axis 2"), ([("weight", 1), ("bias", 0)], "unequal length")],
)
def test_a_wrong_declaration_is_named(declared, message):
    class Wrong(nn.Linear):
        def neuron_parameters(self):
            return [declared]

    with pytest.raises(ValueError, match=message):
        find_layers(nn.Sequential(Wrong(3, 4)))


def test_leftovers_are_neurons_of_their_own():
    assert described(Constant()) == {
        "input": [("input", 1)],
        "gain": [("gain", 0)],
        "shifts.0": [("shifts.0", 0)],
        "shifts.1": [("shifts.1", 0)],
    }
    assert {layer.name: (layer.neurons, layer.cost) for layer in find_layers(Constant())} == {
        "input": (3, 36),
        "gain": (1, 1),
        "shifts.0": (3, 1),
        "shifts.1": (1, 1),
    }


def test_attention_and_recurrent_layers():
    layers = described(Attention())
    assert layers["layer.self_attn.in_proj_weight"] == [
        ("layer.self_attn.in_proj_weight", 0),
        ("layer.self_attn.in_proj_bias", 0),
    ]
    assert layers["layer.norm1.weight"] == [("layer.norm1.weight", 0), ("layer.norm1.bias", 0)]
    (lstm,) = find_layers(Recurrent())
    assert lstm.neurons == 20
    assert len(lstm.members) == 8


def test_parametrized_weights_belong_to_their_module():
    assert described(build("spectral")) == {
        "0.parametrizations.weight.original": [("0.parametrizations.weight.original", 0), ("0.bias", 0)],
        "3.parametrizations.weight.original": [("3.parametrizations.weight.original", 0), ("3.bias", 0)],
    }
    (layer,) = find_layers(build("weight_norm"))
    assert layer.name == "1.parametrizations.weight.original1"  # the direction; the length follows it
    assert (layer.neurons, layer.cost) == (5, 108 + 1 + 1)


def test_a_shared_tensor_counts_once_under_its_first_name():
    layers = described(Tied())
    assert layers["embed.weight"] == [("embed.weight", 0)]
    assert layers["head.bias"] == [("head.bias", 0)]
    assert not any(m == ("head.weight", 0) for members in layers.values() for m in members)


def test_a_shared_module_counts_once_under_its_first_name():
    block = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)), nn.Tanh())
    weight = "a.0.parametrizations.weight.original"
    assert described(nn.ModuleDict({"a": block, "b": block})) == {weight: [(weight, 0), ("a.0.bias", 0)]}


def test_what_was_not_trainable_is_no_candidate():
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    net[0].requires_grad_(False)
    net[1].weight.requires_grad_(False)
    assert described(net) == {"1.bias": [("1.bias", 0)]}


@pytest.mark.parametrize(
    ("module", "name", "shape", "axis"),
    [
        (nn.Conv2d(4, 1, 3), "weight", (1, 4, 3, 3), 0),
        (nn.Conv3d(4, 1, 3), "weight", (1, 4, 3, 3, 3), 0),
        (nn.Conv3d(1, 4, 3), "weight", (4, 1, 3, 3, 3), 0),
        (nn.ConvTranspose1d(4, 6, 3), "weight", (4, 6, 3), 1),
        (nn.ConvTranspose3d(4, 6, 3), "weight", (4, 6, 3, 3, 3), 1),
        (nn.Module(), "weight", (1, 8, 4, 3, 3), 1),
        (nn.Module(), "weight", (1, 1, 4, 3, 3), 1),
        (nn.Module(), "weight", (1, 512), 0),
        (nn.Module(), "weight_orig", (1, 16, 1, 1), 1),
        (nn.Module(), "weight", (1, 16, 3, 3), 0),
        (nn.Module(), "input", (1, 16, 4, 4), 1),
        (nn.Module(), "pos_embedding", (1, 50, 8), 1),
        (nn.Module(), "bias", (1, 16, 1, 1), 1),
        (nn.Module(), "gain", (), 0),
        (nn.Module(), "gain", (1, 1, 1), 0),
    ],
)
def test_row_axis(module, name, shape, axis):
    assert row_axis(module, name, torch.zeros(shape)) == axis


def test_patterns_match_modules_and_those_around_them():
    net = nn.ModuleDict({"low": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "high": nn.Linear(2, 3)})
    layers = find_layers(net)

    def names(include=None, exclude=None):
        return [layer.name for layer in filter_layers(layers, include, exclude)]

    assert names() == ["low.0.weight", "low.1.weight", "high.weight"]
    assert names("low") == names(["low.*"]) == ["low.0.weight", "low.1.weight"]
    assert names("low.1") == ["low.1.weight"]
    assert names(["*"], ["*.0", "high"]) == ["low.1.weight"]
    assert names(exclude="low") == ["high.weight"]
    with pytest.raises(ValueError, match=r"'middle\*' matches no module"):
        names(["low", "middle*"])
    with pytest.raises(ValueError, match="leave no neuron"):
        names(exclude="*")
    with pytest.raises(ValueError, match="requires_grad"):
        filter_layers(find_layers(net.requires_grad_(False)), None, None)


def test_a_tensor_shared_along_different_axes_is_an_error():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.down, self.up = nn.Conv1d(4, 6, 1), nn.ConvTranspose1d(6, 4, 1)
            self.up.weight = self.down.weight

    with pytest.raises(
        ValueError, match=r"'down\.weight' has its neurons along axis 0, and as 'up\.weight' along axis 1"
    ):
        filter_layers(find_layers(Tied()), None, None)
    kept = filter_layers(find_layers(Tied()), None, "down")
    assert [layer.name for layer in kept] == ["up.bias"]

    class Named(Tied):
        def neuron_parameters(self):
            return [[("down.weight", 0), ("down.bias", 0)]]

    assert filter_layers(find_layers(Named()), None, None)[0].name == "down.weight"


def test_an_embedding_that_rewrites_its_rows_is_an_error():
    net = nn.Sequential(nn.Embedding(5, 4, max_norm=1.0), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"'0\.weight' is rewritten by max_norm"):
        filter_layers(find_layers(net), None, None)
    assert [layer.name for layer in filter_layers(find_layers(net), None, "0")] == ["1.weight"]
