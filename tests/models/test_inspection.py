"""`inspect` and `convert`."""

import json

import pytest
import torch
from held_networks import assert_holds, times
from safetensors.torch import save_file

from minegan_fast.models import convert, has_discriminator, inspect, load_discriminator, load_generator, save_model


@pytest.fixture
def file(tmp_path):
    return tmp_path / "network"


def test_convert_writes_what_was_read(file, tmp_path, stylegan2, biggan_folder, biggan):
    out = tmp_path / "out.safetensors"
    g, d = stylegan2
    torch.save({"g": times(g, 2), "g_ema": g.state_dict(), "d": d.state_dict()}, file)
    assert convert(file, out) == out
    assert_holds(load_generator(out), g)
    assert_holds(load_discriminator(out), d)
    generator, critic = inspect(out).networks
    assert generator.source.startswith("averaged weights (EMA) from 'g_ema' in network")
    assert f"converted from {generator.source}" in str(load_generator(out).origin)
    assert critic.source.startswith("weights from 'd' in network")
    with pytest.raises(FileExistsError, match=r"exists already; .*--force"):
        convert(file, out)
    convert(biggan_folder[0], out, family="biggan", only="generator", force=True)
    assert_holds(load_generator(out), biggan[0])
    assert not has_discriminator(out)


def test_convert_refuses_and_leaves_the_old_file(file, tmp_path, stylegan2):
    out = tmp_path / "out.safetensors"
    save_model(out, stylegan2[0])
    old = out.read_bytes()
    torch.save({"a": torch.zeros(1)}, file)
    with pytest.raises(
        ValueError, match=r"holds no generator of a layout known here\. Its keys: a\. Keys that would have"
    ):
        convert(file, out, force=True)
    with pytest.raises(ValueError, match='only must be "generator" or "discriminator", got \'critic\''):
        convert(file, out, only="critic", force=True)
    with pytest.raises(ValueError, match=r"let its name end in \.safetensors"):
        convert(file, tmp_path / "out.pt")
    with pytest.raises(IsADirectoryError, match="it is a folder; name a file in it"):
        convert(file, tmp_path)
    torch.save({"g_ema": stylegan2[0].state_dict()}, file)
    with pytest.raises(ValueError, match="holds a stylegan2 generator, not pgan"):
        convert(file, out, family="pgan", force=True)
    assert out.read_bytes() == old


def test_inspect_says_what_is_in_a_file(file, stylegan2):
    g, d = stylegan2
    state = g.state_dict()
    del state["conv1.activate.bias"]
    state["more"] = torch.zeros(2)
    state["to_rgb1.bias"] = torch.zeros(2)
    torch.save({"g_ema": state, "d": times(d.double(), 1), "latent_avg": torch.zeros(9), "args": [1]}, file)
    d.float()
    report = inspect(file)
    generator, critic = report.networks
    assert (generator.role, generator.family, generator.layout) == (
        "generator",
        "stylegan2",
        "rosinality/stylegan2-pytorch",
    )
    assert (generator.resolution, generator.image_channels, generator.latent_dim) == (16, 3, 9)
    assert (generator.num_classes, generator.config["channels"]) == (0, {"4": 6, "8": 5, "16": 3})
    assert generator.parameters == sum(p.numel() for p in g.parameters())
    assert (generator.missing, generator.unexpected) == (("conv1.activate.bias",), ("more",))
    assert generator.wrong == ("to_rgb1.bias is [2], expected [1, 3, 1, 1]",)
    assert (critic.role, critic.dtypes, critic.averaged, critic.missing) == ("discriminator", ("float64",), False, ())
    assert report.others == {"latent_avg": "tensor [9]", "args": "list"}
    assert report.unknown is None
    assert json.loads(json.dumps(report.as_dict()))["networks"][0]["missing"] == ["conv1.activate.bias"]


def test_inspect_of_a_file_with_no_known_network(file):
    torch.save({"net": {f"layer{i}.weight": torch.zeros(1) for i in range(20)}, "epoch": 3}, file)
    report = inspect(file)
    assert report.networks == ()
    assert report.others == {"net": "20 tensors", "epoch": "3"}
    assert "net.layer0.weight" in report.unknown
    assert "Keys that would have told" in report.unknown
    save_file({"net.0.weight": torch.zeros(1)}, file, {"format": "minegan_fast.miner"})
    assert inspect(file).others == {"": "a miner of this project"}


# The keys of the original MineGAN's miners: linear layers, or 1x1 convolutions of a constant.
LINEAR = ("weight", "bias")
MINERS = {
    "for StyleGAN or StyleGAN2": [f"transform.{i}.{p}" for i in (0, 2) for p in LINEAR],
    "for BigGAN": [f"linear{i}.{p}" for i in ("", *range(2, 9)) for p in (*LINEAR, "u0", "sv0")] + ["shared.weight"],
    "of the noise maps": [f"transform_{4 << i}.{int(i > 0)}.{p}" for i in range(6) for p in LINEAR],
    "of the learned constant": ["input.input", *(f"conv{i}.weight" for i in (1, 2, 3)), "relu1.bias", "relu2.bias"],
}


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("kind", MINERS)
def test_a_miner_alone_is_told_as_what_it_is(file, kind, prefix):
    torch.save({prefix + key: torch.zeros(2, 2) for key in MINERS[kind]}, file)
    report = inspect(file)
    assert (report.networks, [*report.others]) == ((), [""])
    assert report.others[""].startswith("miner ")
    assert kind in report.others[""]
    assert report.unknown.startswith(f"It looks like a {report.others['']} (it has ")
    with pytest.raises(ValueError, match=f"It looks like a miner .*{kind}"):
        load_generator(file)
