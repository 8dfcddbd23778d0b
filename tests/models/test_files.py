"""Files and folders as users have them: what is read of them, and what is said of that."""

import argparse
import collections
import warnings

import pytest
import torch
from crafted_pickles import asks_for
from held_networks import assert_holds, times
from nvidia_files import ada_of, critic_of, module_tree, network_tree, tf_of, write_tf_pickle, write_torch_pickle

from minegan_fast.models import (
    BigGANDeepGenerator,
    PGANDiscriminator,
    PGANGenerator,
    has_discriminator,
    inspect,
    load_discriminator,
    load_generator,
)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "network"


# Averaged weights and raw ones


@pytest.mark.parametrize(
    ("names", "taken", "averaged"),
    [
        (("g", "g_ema"), "g_ema", True),
        (("generator", "g_ema"), "g_ema", True),
        (("g",), "g", False),
        (("my_net", "my_net_EMA"), "my_net_EMA", True),
        (("weights", "average"), "average", True),
        (("weights",), "weights", False),
    ],
)
def test_averaged_weights_are_taken_and_it_is_said(file, stylegan2, names, taken, averaged, caplog):
    g, _ = stylegan2
    torch.save({name: times(g, 1.0 if name == taken else 2.0) for name in names}, file)
    with warnings.catch_warnings(), caplog.at_level("INFO", "minegan_fast"):
        warnings.simplefilter("error")
        loaded = load_generator(file)
    assert_holds(loaded, g)
    assert (loaded.origin.container, loaded.origin.averaged) == (taken, averaged)
    assert loaded.origin.passed_over == tuple(name for name in names if name != taken)
    said = str(loaded.origin)
    assert f"from '{taken}' in network, the layout of rosinality/stylegan2-pytorch" in said
    assert ("averaged weights (EMA)" in said) == averaged
    assert ("the raw weights in" in said) == (len(names) > 1)
    assert (said in caplog.text) == (len(names) > 1)
    (report,) = inspect(file).networks
    assert (report.container, report.averaged, report.passed_over) == (taken, averaged, loaded.origin.passed_over)


# Folders


def test_a_folder_of_biggan_pytorch(biggan_folder, biggan):
    folder, _ = biggan_folder
    g, d = load_generator(folder), load_discriminator(folder)
    assert_holds(g, biggan[0])
    assert_holds(d, biggan[1])
    assert (g.origin.container, g.origin.averaged, g.origin.passed_over) == ("G_ema", True, ("G",))
    assert has_discriminator(folder)
    assert load_generator(folder, family="biggan").family == "biggan"
    assert inspect(folder).others == {
        "M": "miner of the original MineGAN for BigGAN",
        "state_dict": "2 entries",
        "G_optim": "optimizer",
    }


@pytest.mark.parametrize(
    ("name", "read", "factor", "averaged"),
    [
        ("", "G_ema", 1, True),
        ("G_ema.pth", "G_ema", 1, True),
        ("G.pth", "G", 3, False),
        ("M.pth", "G_ema", 1, True),
        ("state_dict.pth", "G_ema", 1, True),
    ],
)
def test_a_file_of_that_folder(biggan_folder, biggan, name, read, factor, averaged):
    """It stands for itself, and for the networks of another role beside it; what was read is named."""
    folder, _ = biggan_folder
    g, d = load_generator(folder / name), load_discriminator(folder / name)
    assert_holds(g, biggan[0], factor)
    assert_holds(d, biggan[1])
    assert (g.origin.averaged, g.origin.path) == (averaged, str(folder / f"{read}.pth"))
    assert f"weights{' (EMA)' * averaged} from {read}.pth, the layout of BigGAN-PyTorch" in str(g.origin)
    assert str(d.origin) == "weights from D.pth, the layout of BigGAN-PyTorch"


def test_a_critic_of_that_folder_is_no_generator(biggan_folder, biggan):
    folder, _ = biggan_folder
    assert_holds(load_discriminator(folder / "D.pth"), biggan[1])
    with pytest.raises(ValueError, match=r"D.pth holds no generator .* It looks like a biggan discriminator"):
        load_generator(folder / "D.pth")
    assert [network.role for network in inspect(folder / "D.pth").networks] == ["discriminator"]


def test_what_is_wrong_in_that_folder_is_named_with_its_file(biggan_folder, biggan):
    folder, _ = biggan_folder
    torch.save({k: t for k, t in biggan[1].state_dict().items() if k != "linear.bias"}, folder / "D.pth")
    for path in (folder, folder / "G.pth"):
        with pytest.raises(ValueError, match=r"D.pth does not fit a BigGANDiscriminator .*missing: linear.bias"):
            load_discriminator(path)


def test_suffixes(biggan_folder, biggan):
    folder, write = biggan_folder
    write("_best0", 2.0)
    write("_copy1", 4.0)
    assert_holds(load_generator(folder), biggan[0])
    assert_holds(load_generator(folder / "G_ema_copy1.pth"), biggan[0], 4.0)
    assert_holds(load_discriminator(folder / "G_ema_copy1.pth"), biggan[1], 4.0)
    for stem in ("G_ema", "G", "D"):
        (folder / f"{stem}.pth").unlink()
    assert_holds(load_generator(folder), biggan[0], 2.0)
    assert_holds(load_discriminator(folder), biggan[1], 2.0)


def test_a_file_without_its_folder(biggan_folder, biggan, tmp_path_factory):
    folder, _ = biggan_folder
    alone = tmp_path_factory.mktemp("alone") / "G_ema.pth"
    (folder / "G_ema.pth").rename(alone)
    assert_holds(load_generator(alone), biggan[0])
    assert not has_discriminator(alone)
    assert_holds(load_generator(folder), biggan[0], 3.0)


def test_a_folder_of_pytorch_pretrained_biggan(tmp_path):
    torch.manual_seed(2)
    g = BigGANDeepGenerator(32, channel_width=4, attention=(16,), class_dim=5, num_classes=4, latent_dim=6)
    torch.save(g.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text('{"output_dim": 128}')
    for path in (tmp_path, tmp_path / "pytorch_model.bin"):
        loaded = load_generator(path, family="biggan")
        assert loaded.family == "biggan_deep"
        assert_holds(loaded, g)
        assert not has_discriminator(path)
    with pytest.raises(ValueError, match="holds a biggan_deep generator, not pgan"):
        load_generator(tmp_path, family="pgan")


def test_a_folder_of_other_things(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ValueError, match=r"is a folder; give the checkpoint file in it .*G_ema.pth.*pytorch_model.bin"):
        load_generator(tmp_path)


# Training files with objects of classes that are not here


class BaseConfig:
    """In place of pytorch_GAN_zoo's class of that name."""

    def __init__(self):
        self.depthScales = [8, 4]


@pytest.mark.parametrize("zipped", [True, False])
def test_a_training_file_with_a_pickled_config(file, zipped, monkeypatch):
    torch.manual_seed(3)
    g, d = PGANGenerator(8, latent_dim=6, channel_max=5), PGANDiscriminator(8, channel_max=5)
    old = collections.OrderedDict((k.replace(".module", ""), t) for k, t in times(g, 1.0).items())
    content = {"config": BaseConfig(), "netG": times(g, 2.0), "avgG": old, "netD": d.state_dict()}
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    monkeypatch.setattr(BaseConfig, "__new__", None)  # it could not be made
    assert_holds(load_generator(file), g)
    assert_holds(load_discriminator(file), d)
    assert inspect(file).others == {"config": f"object of {BaseConfig.__module__}.BaseConfig, not read"}


@pytest.mark.parametrize("kind", ["torch", "tf"])
def test_nvidias_pickles_that_ask_for_code(file, stylegan2, kind):
    g, d = stylegan2
    evil = asks_for(print, "run")
    if kind == "torch":
        write_torch_pickle(file, G_ema={**ada_of(g.state_dict())}, D=critic_of(d.state_dict(), 16, False))
        network = module_tree(ada_of(g.state_dict()), ())
        network.meta["state"]["_modules"]["mapping"].meta["state"]["hook"] = evil
        write = write_torch_pickle
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("nvidia_files.module_tree", lambda *_: network)
            write(file, G_ema={})
    else:
        write_tf_pickle(file, *[network_tree(tf_of(g.state_dict()), resample_kernel=evil)] * 3)
    with pytest.raises(ValueError, match=r"refused: its pickle asks for 'builtins.print', which is code"):
        load_generator(file)


def test_files_of_the_original_minegan(file, stylegan2):
    g, d = stylegan2
    miner = {f"module.transform.{i}.{p}": torch.ones(9) for i in (0, 2) for p in ("weight", "bias")}
    semantic = {
        "input.input": torch.ones(1, 8, 4, 4),
        "relu2.bias": torch.ones(8),
        "conv3.weight": torch.ones(6, 8, 1, 1),
    }
    content = {"g": times(g, 2), "g_ema": g.state_dict(), "d": d.state_dict(), "miner": miner, "step": 3}
    content |= {"miner_semantic": semantic, "g_optim": torch.optim.SGD(g.parameters()).state_dict()}
    torch.save(content | {"args": argparse.Namespace(size=16)}, file)
    assert_holds(load_generator(file), g)
    assert inspect(file).others == {
        "miner": "miner of the original MineGAN for StyleGAN or StyleGAN2",
        "miner_semantic": "miner of the learned constant, of the original MineGAN for StyleGAN2",
        "g_optim": "optimizer",
        "args": "object of argparse.Namespace, not read",
        "step": "3",
    }


# strict=False


def test_what_fits_is_loaded_and_the_rest_is_named(file, stylegan2):
    g, _ = stylegan2
    state = g.state_dict()
    del state["convs.1.noise.weight"], state["convs.1.conv.modulation.bias"]
    state |= {"extra": torch.zeros(1), "conv1.activate.bias": torch.zeros(4)}
    torch.save({"g_ema": state}, file)
    with pytest.raises(
        ValueError, match=r"missing: convs.1.conv.modulation.bias, convs.1.noise.weight; unexpected: ext"
    ):
        load_generator(file)
    before = torch.get_rng_state()
    with pytest.warns(
        UserWarning, match=r"missing: .*noise.weight; unexpected: extra; wrong: conv1.activate.bias is \[4\]"
    ):
        loaded = load_generator(file, strict=False)
    assert torch.equal(torch.get_rng_state(), before)
    assert loaded.origin.missing == ("convs.1.conv.modulation.bias", "convs.1.noise.weight", "conv1.activate.bias")
    assert loaded.origin.unexpected == ("extra", "conv1.activate.bias")
    assert torch.equal(loaded.convs[1].conv.modulation.bias, torch.ones(5)), "the value a new network has"
    assert torch.equal(loaded.convs[0].conv.weight, g.convs[0].conv.weight)
    assert all(p.isfinite().all() for p in loaded.parameters())


@pytest.mark.parametrize("lost", ["convs.3.conv.weight", "to_rgbs.1.bias", "style.2.bias"])
def test_a_network_that_lacks_a_tensor_keeps_its_size(file, stylegan2, lost):
    state = stylegan2[0].state_dict()
    del state[lost]
    torch.save({"g_ema": state}, file)
    with pytest.warns(UserWarning, match=f"missing: {lost}; the rest"):
        loaded = load_generator(file, strict=False)
    assert (loaded.resolution, loaded.origin.missing, loaded.origin.unexpected) == (16, (lost,), ())


@pytest.mark.parametrize(
    ("kind", "lost", "missing"),
    [
        ("torch", "mapping.fc0.bias", "style.1.bias"),
        ("torch", "mapping.fc1.weight", "style.2.weight"),
        ("torch", "synthesis.b16.conv0.weight", "convs.2.conv.weight"),
        ("tf", "mapping/Dense0/bias", "style.1.bias"),
        ("tf", "mapping/Dense1/weight", "style.2.weight"),
        ("tf", "synthesis/16x16/Conv0_up/weight", "convs.2.conv.weight"),
        ("tf", "synthesis/4x4/Const/const", "input.input"),
    ],
)
def test_networks_of_nvidia_keep_their_size(file, stylegan2, kind, lost, missing):
    state = (ada_of if kind == "torch" else tf_of)(stylegan2[0].state_dict())
    del state[lost]
    if kind == "torch":
        write_torch_pickle(file, G_ema=state)
    else:
        write_tf_pickle(file, *[network_tree(state)] * 3)
    with pytest.warns(UserWarning, match=f"missing: {missing}; the rest"):
        loaded = load_generator(file, strict=False)
    assert (loaded.config["mapping_layers"], loaded.origin.missing, loaded.origin.unexpected) == (2, (missing,), ())


@pytest.mark.parametrize("lost", ["blocks.2.0.conv1.weight", "blocks.1.0.conv1.weight"])
def test_a_biggan_that_lacks_a_block_is_told_which(file, biggan, lost):
    for network, load in zip(biggan, (load_generator, load_discriminator), strict=True):
        torch.save({name: tensor for name, tensor in network.state_dict().items() if name != lost}, file)
        with pytest.raises(ValueError, match=f"but lacks '{lost}'; is the file complete"):
            load(file)


@pytest.mark.parametrize("number", ["9999", "99999999999999", "9" * 5000])
def test_absurd_numbers_in_names_cost_nothing(file, stylegan2, biggan, number):
    for network, name in ((stylegan2[1], "convs.{}.odd"), (biggan[1], "blocks.{}.odd"), (biggan[0], "blocks.{}.odd")):
        torch.save(network.state_dict() | {name.format(number): torch.zeros(1)}, file)
        load = load_discriminator if "Discriminator" in type(network).__name__ else load_generator
        with pytest.raises(ValueError, match=r"but lacks '|unexpected: (convs|blocks)\.9+\.odd"):
            load(file)


def test_a_network_whose_width_is_lost_is_refused(file, stylegan2):
    state = stylegan2[0].state_dict()
    del state["convs.2.conv.weight"]
    torch.save({"g_ema": state}, file)
    with pytest.raises(ValueError, match=r"lacks 'convs\.2\.conv\.weight'"):
        load_generator(file, strict=False)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
@pytest.mark.parametrize("container", ["netD", "critic"])
def test_labels_of_a_progressive_gan_are_told_by_its_critic(file, container, prefix):
    sizes = {"channel_base": 64, "channel_max": 8, "num_classes": 3}
    g, d = PGANGenerator(8, latent_dim=5, **sizes), PGANDiscriminator(8, **sizes)
    critic = {f"{prefix}{name}": tensor for name, tensor in d.state_dict().items()}
    torch.save({"config": {}, "netG": g.state_dict(), container: critic}, file)
    loaded, z, y = load_generator(file), torch.randn(2, 5), torch.tensor([0, 2])
    assert (loaded.latent_dim, loaded.num_classes) == (5, 3)
    assert torch.equal(loaded(z, y), g(z, y))
    assert [network.num_classes for network in inspect(file).networks] == [3, 3]


def test_a_bare_file_does_not_say_whether_it_is_averaged(file, stylegan2):
    torch.save(stylegan2[0].state_dict(), file)
    assert load_generator(file).origin.averaged is None
    assert inspect(file).networks[0].averaged is None


def test_unknown_families_are_named(file, stylegan2):
    torch.save(stylegan2[0].state_dict(), file)
    with pytest.raises(ValueError, match=r"family must be one of biggan, .*stylegan2, or None .*; got 'gan'"):
        load_generator(file, family="gan")


# Sizes that no network here has


def test_resolutions_that_are_no_power_of_two(file, stylegan2):
    state = {k.replace("b16.", "b12."): t for k, t in ada_of(stylegan2[0].state_dict()).items()}
    write_torch_pickle(file, G_ema=state)
    with pytest.raises(ValueError, match="but its resolution must be a power of two >= 8, got 12"):
        load_generator(file)
    assert "power of two" in inspect(file).networks[0].problem
    state = {k.replace("16x16", "24x24"): t for k, t in tf_of(stylegan2[0].state_dict()).items()}
    write_tf_pickle(file, *[network_tree(state)] * 3)
    with pytest.raises(ValueError, match="but its resolution must be a power of two >= 8, got 24"):
        load_generator(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mapping.embed.weight": (9, 3)}, "cannot be built: latent_dim must be at least 1, got"),
        ({"mapping.embed.weight": (2, 3)}, r"missing: embed\.bias"),
        ({"mapping.embed.weight": (2,)}, r"its class embeddings are \[2\], and no matrix"),
        ({"synthesis.b4.torgb.weight": None}, r"missing: to_rgb1\.conv\.weight"),
        ({"mapping.fc0.weight": None}, "but lacks 'mapping.fc0.weight'; is the file complete"),
        ({"synthesis.b16.torgb.weight": ()}, "its weights have too few dimensions"),
        ({"synthesis.b8.conv0.strange": (3,)}, "unexpected: synthesis.b8.conv0.strange"),
        ({"synthesis.b8.conv0.affine.bias": None}, "missing: convs.0.conv.modulation.bias"),
    ],
)
def test_stylegan2_of_nvidia_that_cannot_be_expressed(file, stylegan2, change, message):
    state = ada_of(stylegan2[0].state_dict()) | {k: torch.zeros(s) for k, s in change.items() if s is not None}
    write_torch_pickle(file, G_ema={k: t for k, t in state.items() if change.get(k, ...) is not None})
    with pytest.raises(ValueError, match=message) as caught:
        load_generator(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["synthesis/16x16/ToRGB/weight", "synthesis/noise3", "mapping/Dense0/weight"])
def test_scalars_in_the_place_of_weights_of_nvidia(file, stylegan2, name):
    state = tf_of(stylegan2[0].state_dict()) | {name: torch.zeros(())}
    write_tf_pickle(file, *[network_tree(state)] * 3)
    with pytest.raises(ValueError, match="its weights have too few dimensions"):
        load_generator(file)


@pytest.mark.parametrize("tf", [True, False])
@pytest.mark.parametrize(
    ("names", "shape", "message"),
    [
        (("Output/weight", "mapping.embed.weight"), (6, 3), "StyleGAN2 from before ADA|no conditional discriminator"),
        (("8x8/FromRGB/weight", "b8.fromrgb.weight"), (1, 1, 3, 5), "unexpected: from_rgbs.0.0.weight"),
        (("16x16/Skip/weight", "b16.skip.weight"), None, "missing: convs.1.skip.1.weight$"),
    ],
)
def test_discriminators_of_nvidia_that_cannot_be_expressed(file, stylegan2, tf, names, shape, message):
    state = critic_of(stylegan2[1].state_dict(), 16, tf)
    name = names[not tf]
    if shape is None:
        state = {k: t for k, t in state.items() if name not in k}
    else:
        state[name] = torch.zeros(shape)
    if tf:
        write_tf_pickle(file, *[network_tree(state, ())] * 3)
    else:
        write_torch_pickle(file, D=state)
    with pytest.raises(ValueError, match=message):
        load_discriminator(file)


def test_a_lower_resolution_of_a_grown_network(file, stylegan2):
    torch.manual_seed(4)
    g = PGANGenerator(16, latent_dim=6, channel_max=5)
    torch.save({"avgG": g.state_dict()}, file)
    assert load_generator(file).resolution == 16
    assert load_generator(file, resolution=8).resolution == 8
    torch.save({"g_ema": stylegan2[0].state_dict()}, file)
    assert load_generator(file, resolution=16).resolution == 16
    with pytest.raises(ValueError, match="of 16 px, which has no other resolution; got 8"):
        load_generator(file, resolution=8)
