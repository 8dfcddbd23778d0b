"""Miners of the original MineGAN code: their files, built from the lists of keys, against their equations."""

import math

import pytest
import torch
from torch.nn import functional as F

from minegan_fast.mining import load_mined, load_miner
from minegan_fast.models import StyleGAN2Generator

SIZE = 8  # of z in the tests; 512 and 120 in the public files


def mlp(size=SIZE):
    """`miner` of StyleGAN and StyleGAN2."""
    return {
        "transform.0.weight": torch.randn(size, size),
        "transform.0.bias": torch.randn(size),
        "transform.2.weight": torch.randn(size, size),
        "transform.2.bias": torch.randn(size),
    }


def semantic(channels):
    """`miner_semantic` of StyleGAN2; the public one ends in 512 channels."""
    return {
        "input.input": torch.randn(1, 8, 4, 4),
        "conv1.weight": torch.randn(32, 8, 1, 1),
        "relu1.bias": torch.randn(32),
        "conv2.weight": torch.randn(128, 32, 1, 1),
        "relu2.bias": torch.randn(128),
        "conv3.weight": torch.randn(channels, 128, 1, 1),
    }


def minor(size=SIZE, class_dim=5):
    """M.pth of BigGAN, where a class embedding of the generator's is stored without use."""
    state = {"shared.weight": torch.randn(10, class_dim)}
    for i in range(1, 9):
        name, out = "linear" if i == 1 else f"linear{i}", class_dim if i == 8 else size
        state |= {f"{name}.weight": torch.randn(out, size), f"{name}.bias": torch.randn(out)}
        state |= {f"{name}.u0": torch.randn(1, out), f"{name}.sv0": torch.ones(1)}
    return state


def prefixed(state):
    return {f"module.{name}": tensor for name, tensor in state.items()}


@pytest.mark.parametrize("wrap", [dict, prefixed], ids=["", "DataParallel"])
@pytest.mark.parametrize("container", [True, False], ids=["training file", "state dict"])
def test_the_miner_before_the_mapping_network(tmp_path, wrap, container):
    state = mlp()
    torch.save({"g_ema": {}, "miner": wrap(state)} if container else wrap(state), tmp_path / "run.pt")
    miner = load_miner(tmp_path / "run.pt")
    u = torch.randn(16, SIZE)
    hidden = F.relu(u @ state["transform.0.weight"].T + state["transform.0.bias"])
    expected = hidden @ state["transform.2.weight"].T + state["transform.2.bias"]
    torch.testing.assert_close(miner(u), expected, rtol=1e-5, atol=1e-5)
    assert miner.config["residual"] is False


@pytest.mark.parametrize("wrap", [dict, prefixed], ids=["", "DataParallel"])
def test_the_semantic_miner_is_a_constant(tmp_path, wrap):
    channels = 4
    state = {name: tensor.double() for name, tensor in semantic(channels).items()}
    torch.save({"miner": wrap(mlp()), "miner_semantic": wrap(state)}, tmp_path / "run.pt")
    generator = StyleGAN2Generator(8, SIZE, channel_base=64, channel_max=channels, mapping_layers=2)
    mined = load_mined(tmp_path / "run.pt", generator)
    x = state["input.input"][0].flatten(1)  # 1x1 convolutions are products of matrices
    for i, fan_in in ((1, 8), (2, 32), (3, 128)):
        x = state[f"conv{i}.weight"][:, :, 0, 0] @ x / math.sqrt(fan_in)
        if i < 3:
            x = x + state[f"relu{i}.bias"][:, None]
            x = torch.where(x > 0, x, 0.2 * x) * math.sqrt(2)
    torch.testing.assert_close(mined.constant, x.view(1, channels, 4, 4).float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("normalised", [True, False])
def test_the_two_branches_of_biggan(tmp_path, normalised):
    state = {name: tensor.double() for name, tensor in minor().items()}
    if not normalised:
        state = {name: tensor for name, tensor in state.items() if not name.endswith(("u0", "sv0"))}
    torch.save(state, tmp_path / "M.pth")

    class Conditional(torch.nn.Module):
        latent_dim, class_dim, num_classes = SIZE, 5, 10

        def forward(self, z, y):
            return torch.cat((z, y), 1)

    u = torch.randn(16, SIZE, dtype=torch.float64)
    ends = []
    for names in (["linear", "linear2", "linear3", "linear4"], ["linear5", "linear6", "linear7", "linear8"]):
        x = u
        for name in names:
            weight = state[f"{name}.weight"]
            if normalised:  # one step of the power iteration, u is left where it was
                v = state[f"{name}.u0"] @ weight
                v = v / v.norm()
                left = v @ weight.T
                weight = weight / (v @ weight.T @ (left / left.norm()).T)
            x = x @ weight.T + state[f"{name}.bias"]
        ends.append(x)
    mined = load_mined(tmp_path / "M.pth", Conditional())
    torch.testing.assert_close(mined(u), torch.cat(ends, 1), rtol=1e-12, atol=1e-12)


def test_noise_maps_that_were_never_trained_are_left_out(tmp_path):
    noise = {"transform_4.0.weight": torch.zeros(16, 16), "transform_8.1.weight": torch.zeros(64, 16)}
    torch.save({"miner": mlp(), "miner_semantic": noise, "g_running": {}}, tmp_path / "000100.model")
    with pytest.warns(UserWarning, match="noise maps that its training never reached"):
        miner = load_miner(tmp_path / "000100.model")
    assert miner.input_dim == SIZE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("transform.2.bias"), "lacks 'transform.2.bias'"),
        (
            lambda s: s.update({"transform.2.weight": torch.zeros(3, 4)}),
            r"do not follow each other: \[\[8, 8\]",
        ),
    ],
)
def test_a_damaged_one_is_named(tmp_path, change, message):
    state = mlp()
    change(state)
    torch.save({"miner": state}, tmp_path / "run.pt")
    with pytest.raises(ValueError, match=message):
        load_miner(tmp_path / "run.pt")
