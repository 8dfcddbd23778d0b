"""Files as other programs nest and name them, and files that are none of ours."""

import pytest
import torch
from safetensors.torch import save_file

from minegan_fast.models import StyleGAN2Discriminator, StyleGAN2Generator, load_discriminator, load_generator
from minegan_fast.models import has_discriminator as holds_critic

SIZES = {"channel_base": 64, "channel_max": 8}


@pytest.fixture(scope="module")
def generator():
    torch.manual_seed(0)
    return StyleGAN2Generator(8, 8, mapping_layers=1, **SIZES).eval()


@pytest.fixture(scope="module")
def critic():
    torch.manual_seed(1)
    return StyleGAN2Discriminator(8, **SIZES).eval()


def prefixed(prefix, network):
    return {f"{prefix}{name}": tensor.clone() for name, tensor in network.state_dict().items()}


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in b)


@pytest.mark.parametrize("prefix", ["g_ema.", "G_ema.", "generator.", "module.g_ema.", "model.networks.G."])
def test_flat_names_with_a_prefix(tmp_path, generator, critic, prefix):
    save_file(prefixed(prefix, generator) | prefixed("d.", critic), tmp_path / "flat.safetensors")
    loaded = load_generator(tmp_path / "flat.safetensors")
    assert same(loaded, generator)
    assert loaded.origin.averaged is (True if "ema" in prefix else None)
    assert same(load_discriminator(tmp_path / "flat.safetensors"), critic)


def test_of_several_prefixes_the_averaged_one_is_taken(tmp_path, generator):
    raw = {name: tensor + 1 for name, tensor in prefixed("G.", generator).items()}
    save_file(raw | prefixed("G_ema.", generator), tmp_path / "flat.safetensors")
    loaded = load_generator(tmp_path / "flat.safetensors")
    assert same(loaded, generator)
    assert loaded.origin.container == "G_ema.*"
    assert loaded.origin.passed_over == ("G.*",)


def test_lightnings_checkpoints(tmp_path, generator, critic):
    state = prefixed("G_ema.", generator) | prefixed("D.", critic)
    torch.save({"state_dict": state, "epoch": 3, "hyper_parameters": {"lr": 0.1}}, tmp_path / "last.ckpt")
    assert same(load_generator(tmp_path / "last.ckpt"), generator)
    assert holds_critic(tmp_path / "last.ckpt")


@pytest.mark.parametrize("layers", [None, 6])
def test_encoders_of_psp_and_e4e_and_their_average(tmp_path, generator, layers):
    average = torch.randn(8) if layers is None else torch.randn(8).repeat(layers, 1)
    state = prefixed("decoder.", generator) | {"encoder.input_layer.0.weight": torch.randn(4, 3, 3, 3)}
    torch.save({"state_dict": state, "latent_avg": average, "opts": {"output_size": 8}}, tmp_path / "psp.pt")
    loaded = load_generator(tmp_path / "psp.pt")
    assert torch.equal(loaded.latent_avg, average.reshape(-1, 8)[0])
    z = torch.randn(2, 8)
    w = loaded.latent_avg + 0.5 * (generator.mapping(z) - loaded.latent_avg)
    expected = generator(w, latents=True, noise="constant")
    torch.testing.assert_close(loaded(z, truncation=0.5, noise="constant"), expected)


@pytest.mark.parametrize("name", ["model.safetensors", "weights.safetensors"])
def test_folders_of_the_hub(tmp_path, generator, name):
    save_file(prefixed("", generator), tmp_path / name)
    (tmp_path / "config.json").write_text("{}")
    assert same(load_generator(tmp_path), generator)


def test_a_folder_of_several_files_names_them(tmp_path, generator):
    for name in "ab":
        save_file(prefixed("", generator), tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match=r"a\.safetensors, b\.safetensors"):
        load_generator(tmp_path)


@pytest.mark.parametrize(
    ("state", "kind"),
    [
        ({"synthesis.input.freqs": 2, "b4.fc.weight": 2}, "StyleGAN3 generator"),
        ({"synthesis.init.init.0.weight_orig": 2, "synthesis.feat_8.1.weight_orig": 2}, "Projected GAN's generator"),
        (
            {"synthesis.init.init.0.weight_orig": 2, "synthesis.feat_8.conv1.weight_orig": 2},
            "Projected GAN's generator",
        ),
        ({"feat_8.1.weight_orig": 2}, "FastGAN generator"),
        ({"G.blocks.0.to_style1.weight": 2}, "StyleGAN2 generator of lucidrains"),
    ],
)
def test_other_gans_are_named(tmp_path, state, kind):
    content = {name: torch.zeros(size) for name, size in state.items()}
    torch.save(
        {"G_ema": content, "D": {"b4.fc.weight": torch.zeros(2), "b8.skip.weight": torch.zeros(2)}}, tmp_path / "x"
    )
    with pytest.raises(ValueError, match=kind) as caught:
        load_generator(tmp_path / "x")
    assert "latent_dim, resolution and forward(z)" in str(caught.value)


def test_a_swagan_is_not_taken_for_a_stylegan2(tmp_path, generator):
    torch.save({"g_ema": prefixed("", generator) | {"to_rgbs.0.iwt.ll": torch.zeros(2, 2)}}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="holds a SWAGAN generator, which is not read here"):
        load_generator(tmp_path / "x.pt")


def test_a_swagan_critic_is_named(tmp_path, critic):
    torch.save({"d": prefixed("", critic) | {"from_rgbs.1.dwt.ll": torch.zeros(2, 2)}}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="holds a SWAGAN discriminator, which is not read here"):
        load_discriminator(tmp_path / "x.pt")


@pytest.mark.parametrize("shape", [(0,), (0, 8), (6, 0)])
def test_an_average_of_no_size_is_passed_over(tmp_path, generator, shape):
    torch.save({"g_ema": prefixed("", generator), "latent_avg": torch.zeros(shape)}, tmp_path / "x.pt")
    assert same(load_generator(tmp_path / "x.pt"), generator)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "a pointer of Git LFS"),
        (b"<!DOCTYPE html><title>Quota exceeded</title>", "is a web page"),
    ],
)
def test_what_a_download_gave_instead(tmp_path, content, message):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_generator(tmp_path / "x.pt")


def test_networks_that_are_not_square_are_named(tmp_path, generator):
    state = prefixed("", generator) | {"input.input": torch.zeros(1, 8, 4, 7)}
    torch.save({"g_ema": state}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="begins with 4 x 7 pixels: networks of images that are not square"):
        load_generator(tmp_path / "x.pt")
