"""Where mining takes place: z, w, the class embedding, the learned constant; and the file that keeps all of it."""

import copy
import json

import pytest
import torch
from torch import nn

from minegan_fast.files.atomic import save_tensors
from minegan_fast.mining import Mined, Miner, MinerBank, load_bank, load_mined, load_miner, save_miner
from minegan_fast.models import StyleGAN2Generator


class Conditional(nn.Module):
    """(z [B, 5], class embedding [B, 3]) -> [B, 8]."""

    latent_dim, class_dim, num_classes = 5, 3, 4

    def forward(self, z, y, *, scale=1.0):
        return torch.cat((z, y), 1) * scale


def stylegan2(**settings):
    settings = {"latent_dim": 6, "style_dim": 7, "channel_base": 64, "channel_max": 4, "mapping_layers": 2, **settings}
    return StyleGAN2Generator(8, **settings).eval()


def changed(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


def test_w_is_mined_behind_the_mapping_network():
    generator = stylegan2()
    mined = Mined(generator, Miner(7), place="w")
    u = torch.randn(3, 6)
    assert mined.input_dim == 6
    assert torch.equal(mined(u, noise="none"), generator(u, noise="none")), "a residual miner of w starts as identity"
    changed(mined.miner)
    expected = generator(mined.miner(generator.mapping(u)), latents=True, noise="none")
    assert torch.equal(mined(u, noise="none"), expected)
    images, w = mined(u, noise="none", return_latents=True)
    assert torch.equal(images, expected)
    assert torch.equal(w[:, 0], mined.miner(generator.mapping(u)))
    assert mined.sample(2, torch.Generator().manual_seed(0)).shape == (2, 3, 8, 8)


@pytest.mark.parametrize("place", ["z", "w"])
def test_a_mined_constant_takes_the_place_of_the_learned_one(place):
    generator, u = stylegan2(), torch.randn(3, 6)
    constant = generator.learned_constant
    mined = Mined(generator, Miner(6 if place == "z" else 7), place=place, constant=constant)
    assert torch.equal(mined(u, noise="none"), generator(u, noise="none"))
    mined(u, noise="none").square().sum().backward()
    assert mined.constant.grad.abs().sum() > 0
    assert constant.grad is None
    with torch.no_grad():
        mined.constant += 1
    other = copy.deepcopy(generator)
    with torch.no_grad():
        other.input.input += 1
    assert torch.equal(mined(u, noise="none"), other(u, noise="none"))
    assert not torch.equal(mined(u, noise="none"), generator(u, noise="none"))


def test_before_another_generator_the_miners_are_copies():
    one = Mined(Conditional(), Miner(5), Miner(5, output_dim=3, affine=True))
    other = one.before(Conditional())
    u = torch.randn(2, 5)
    expected = one(u)
    changed(one)
    assert torch.equal(other(u), expected)
    assert not torch.equal(one(u), expected)


def test_mining_state_leaves_the_generator_out():
    one, other = (Mined(stylegan2(), changed(Miner(6)), constant=torch.randn(1, 4, 4, 4)) for _ in range(2))
    before = copy.deepcopy(other.generator.state_dict())
    assert {name.split(".")[0] for name in one.mining_state()} == {"miner", "constant"}
    other.load_mining_state(one.mining_state())
    for a, b in zip(one.mining_parameters(), other.mining_parameters(), strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(before[name], tensor) for name, tensor in other.generator.state_dict().items())
    with pytest.raises(RuntimeError, match="constant"):
        other.load_mining_state({"miner.layers.0.weight": torch.zeros(6, 6)})


def test_the_affine_start_has_the_mean_and_covariance_of_the_samples():
    samples = torch.randn(40, 4).double() @ torch.randn(4, 4).double() + 3
    miner = Miner(6, output_dim=4, affine=True).double()
    miner.match(samples)
    weight, bias = miner.skip.weight, miner.skip.bias
    torch.testing.assert_close(bias, samples.mean(0))
    torch.testing.assert_close(weight @ weight.T, torch.cov(samples.T, correction=0))
    u = torch.randn(9, 6).double()
    torch.testing.assert_close(miner(u), u @ weight.T + bias)
    again = Miner(6, output_dim=4, affine=True).double()
    again.match(samples)
    assert torch.equal(again.skip.weight, weight)


def test_fewer_inputs_than_outputs_take_the_largest_components():
    samples = torch.randn(50, 4).double() * torch.tensor([5.0, 3.0, 1.0, 0.1])
    miner = Miner(2, output_dim=4, affine=True).double()
    miner.match(samples)
    values, vectors = torch.linalg.eigh(torch.cov(samples.T, correction=0))
    expected = vectors[:, -2:] @ torch.diag(values[-2:]) @ vectors[:, -2:].T
    torch.testing.assert_close(miner.skip.weight @ miner.skip.weight.T, expected)


def test_one_sample_is_the_start():
    miner = Miner(5, output_dim=3, affine=True)
    sample = torch.randn(1, 3)
    miner.match(sample)
    assert torch.equal(miner(torch.randn(4, 5)), sample.expand(4, 3))


def miners():
    z, w = changed(Miner(6, 3, 5)), changed(Miner(7, activation="tanh"))
    return {
        "z": lambda: Mined(stylegan2(), z),
        "w and constant": lambda: Mined(stylegan2(), w, place="w", constant=torch.randn(1, 4, 4, 4)),
        "z and class": lambda: Mined(Conditional(), Miner(5), changed(Miner(5, 2, output_dim=3, affine=True))),
    }


@pytest.mark.parametrize("what", ["z", "w and constant", "z and class"])
def test_a_file_holds_all_of_it(tmp_path, what):
    mined = miners()[what]()
    save_miner(tmp_path / "miner.safetensors", mined)
    again = load_mined(tmp_path / "miner.safetensors", mined.generator)
    u = torch.randn(3, mined.input_dim)
    keywords = {} if "class" in what else {"noise": "none"}
    assert torch.equal(again(u, **keywords), mined(u, **keywords))
    alone = load_miner(tmp_path / "miner.safetensors")
    assert torch.equal(alone(torch.ones(1, alone.input_dim)), mined.miner(torch.ones(1, alone.input_dim)))


def test_a_miner_alone_has_a_file_too(tmp_path):
    miner = changed(Miner(6))
    save_miner(tmp_path / "m.safetensors", miner)
    u = torch.randn(2, 6)
    assert torch.equal(load_miner(tmp_path / "m.safetensors")(u), miner(u))
    with pytest.raises(ValueError, match=r"m.safetensors does not fit the generator: the miner gives 6 .* z of 5"):
        load_mined(tmp_path / "m.safetensors", Conditional())


def test_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"last/miner.safetensors"):
        load_miner(tmp_path / "nothing")
    torch.save({"conv.weight": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other.pt holds no miner"):
        load_miner(tmp_path / "other.pt")
    save_miner(tmp_path / "m.safetensors", Miner(4))
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        metadata = file.metadata()
    save_file({"layers.0.weight": torch.zeros(4, 4)}, tmp_path / "m.safetensors", metadata)
    with pytest.raises(ValueError, match="the miner in it is damaged"):
        load_miner(tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mined(Conditional(), Miner(5), place="y"), "place must be one of z, w, got 'y'"),
        (lambda: Mined(Conditional(), Miner(5), place="w"), "Conditional has no mapping network.*: take z"),
        (lambda: Mined(Conditional(), Miner(5), constant=torch.zeros(1)), "Conditional has no learned constant"),
        (
            lambda: Mined(stylegan2(), Miner(6), Miner(6)),
            "StyleGAN2Generator has no classes, so it takes no class miner",
        ),
        (lambda: Mined(stylegan2(), Miner(6), place="w"), "the miner gives 6 numbers, but the generator takes w of 7"),
        (
            lambda: Mined(stylegan2(), Miner(6, output_dim=7, residual=False), place="w"),
            "the miner takes 6 numbers, but the generator takes w of 7",
        ),
        (
            lambda: Mined(Conditional(), Miner(5), Miner(5)),
            "the class miner gives 5 numbers, but the generator takes class embeddings of 3",
        ),
        (
            lambda: Mined(stylegan2(), Miner(6), constant=torch.zeros(1, 3, 4, 4)),
            r"the constant must have shape \[1, 4, 4, 4\], got \[1, 3, 4, 4\]",
        ),
        (lambda: Miner(5, residual=False, affine=True), "leave residual=True"),
        (lambda: Miner(5).match(torch.zeros(2, 5)), r"affine=True, got \[2, 5\] and affine=False"),
        (lambda: Miner(5, affine=True).match(torch.zeros(5)), r"takes samples \[N, 5\]"),
    ],
)
def test_what_does_not_fit_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_file_that_announces_a_larger_miner_than_it_holds_is_refused(tmp_path):
    path = tmp_path / "miner.safetensors"
    miner, bank = Miner(4, depth=3, width=5), MinerBank(2, 4)
    save_miner(path, miner)
    assert load_miner(path).config == miner.config
    for change in ({"depth": 10**9}, {"width": 10**6}, {"input_dim": 10**9}):
        metadata = {"format": "minegan_fast.miner", "config": json.dumps(miner.config | change)}
        save_tensors(path, miner.state_dict(), metadata)
        with pytest.raises(ValueError, match="announces more weights than the file holds"):
            load_miner(path)
    metadata = {"format": "minegan_fast.miner", "config": json.dumps(bank.config), "miners": "1000000000"}
    save_tensors(path, bank.state_dict(), metadata)
    with pytest.raises(ValueError, match="announces more weights than the file holds"):
        load_bank(path)
