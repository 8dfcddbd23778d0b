"""Files for other programs: their names by rules of the tests' own, the same bits when they are read back, refusals."""

import io
import pickle
import pickletools

import pytest
import torch
from nvidia_files import critic_of, tf_of

from minegan_fast.models import (
    BigGANDiscriminator,
    BigGANGenerator,
    StyleGAN2Discriminator,
    StyleGAN2Generator,
    StyleGANDiscriminator,
    StyleGANGenerator,
    export_biggan,
    export_nvidia,
    export_rosinality,
    export_stylegan,
    exporting,
    load_discriminator,
    load_generator,
)
from minegan_fast.models.layouts import biggan_writing

RULED = {"channel_base": 96, "channel_max": 8}  # 8, 8, 6


class Stub(dict):
    """What NVIDIA's converter makes of a network: the entries of its state."""

    def __setstate__(self, state):
        self.update(state)


class Converter(pickle.Unpickler):
    def find_class(self, module, name):
        known = {("dnnlib.tflib.network", "Network"): Stub}
        return known.get((module, name)) or super().find_class(module, name)


def stylegan2(architecture="skip", critic="resnet", latent_dim=9, latent_avg=False, **sizes):
    torch.manual_seed(0)
    sizes = RULED | sizes
    own = {"mapping_layers": 2, "style_dim": 11, "architecture": architecture, "latent_avg": latent_avg}
    g = StyleGAN2Generator(16, latent_dim, **own, **sizes)
    d = StyleGAN2Discriminator(16, architecture=critic, **sizes)
    with torch.no_grad():
        for p in (*g.parameters(), *d.parameters()):
            p.add_(torch.randn_like(p) * 0.3)  # what is zero or one would show nothing
    return g.eval(), d.eval()


def opened(path):
    return Converter(io.BytesIO(path.read_bytes())).load()


def variables(network, prefix=""):
    found = {prefix + name: torch.from_numpy(array.copy()) for name, array in network["variables"]}
    for name, part in network["components"].items():
        found |= variables(part, f"{prefix}{name}/")
    return found


def assert_same_bits(read, model):
    """But for the mean of w, which files hold whether the network had kept one or not."""
    theirs, ours = ({n: t for n, t in m.state_dict().items() if n != "latent_avg"} for m in (read, model))
    assert theirs.keys() == ours.keys()
    assert not [name for name in ours if theirs[name].dtype != ours[name].dtype]
    assert not [name for name in ours if not torch.equal(theirs[name], ours[name])]


@pytest.mark.filterwarnings("ignore:numpy.core is deprecated")
@pytest.mark.parametrize(("architecture", "critic"), [("skip", "resnet"), ("resnet", "skip")])
def test_nvidia_has_the_variables_of_the_program(tmp_path, architecture, critic):
    g, d = stylegan2(architecture, critic)
    export_nvidia(tmp_path / "network.pkl", g, d)
    raw, judge, averaged = opened(tmp_path / "network.pkl")
    expected = tf_of({name: t.double() for name, t in g.state_dict().items()}) | {"dlatent_avg": g.mean_latent()[0]}
    for network, wanted in ((raw, expected), (averaged, expected), (judge, critic_of(d.state_dict(), 16, True))):
        assert network["version"] >= 4
        found = variables(network)
        assert found.keys() == wanted.keys()
        for name, t in wanted.items():
            assert found[name].shape == t.shape, name
            assert torch.equal(found[name].double(), t.double()), name
    arguments = {"resolution": 16, "num_channels": 3, "label_size": 0, "fmap_base": 48, "fmap_max": 8}
    assert arguments.items() <= averaged["static_kwargs"].items()
    assert arguments.items() <= judge["static_kwargs"].items()
    sizes = {"latent_size": 9, "dlatent_size": 11, "mapping_fmaps": 11, "mapping_layers": 2}
    assert sizes.items() <= averaged["static_kwargs"].items()
    assert (averaged["static_kwargs"]["architecture"], judge["static_kwargs"]["architecture"]) == (architecture, critic)


@pytest.mark.parametrize(("architecture", "critic"), [("skip", "resnet"), ("resnet", "skip")])
def test_nvidia_reads_back_the_same_bits(tmp_path, architecture, critic):
    g, d = stylegan2(architecture, critic)
    file = export_nvidia(tmp_path / "network.pkl", g, d)
    assert_same_bits(load_generator(file), g)
    assert_same_bits(load_discriminator(file), d)
    assert load_generator(file).origin.averaged


def test_nvidia_names_no_code_and_nothing_that_an_older_numpy_lacks(tmp_path):
    operations = [*pickletools.genops(export_nvidia(tmp_path / "network.pkl", *stylegan2()).read_bytes())]
    named = {argument for operation, argument, _ in operations if operation.name == "GLOBAL"}
    assert named == {
        "dnnlib.tflib.network Network", "numpy.core.multiarray _reconstruct", "numpy ndarray", "numpy dtype",
    }  # fmt: skip
    assert not [operation.name for operation, _, _ in operations if operation.name in ("STACK_GLOBAL", "INST", "OBJ")]
    assert max(operation.proto for operation, _, _ in operations) <= 3, "Python 3.6 cannot read it"


def test_a_mean_of_w_that_was_kept_is_the_centre_of_truncation(tmp_path):
    g, d = stylegan2(latent_avg=True)
    torch.nn.init.normal_(g.latent_avg)
    mean = variables(opened(export_nvidia(tmp_path / "network.pkl", g, d))[2])["dlatent_avg"]
    assert torch.equal(mean, g.latent_avg)
    assert_same_bits(load_generator(tmp_path / "network.pkl"), g)
    g, d = stylegan2(latent_avg=True, latent_dim=11)
    torch.nn.init.normal_(g.latent_avg)
    content = torch.load(export_rosinality(tmp_path / "g.pt", g, d), weights_only=True)
    assert torch.equal(content["latent_avg"], g.latent_avg)
    assert "latent_avg" not in content["g_ema"]


@pytest.mark.parametrize(
    ("which", "name"), [(0, "convs.2.conv.blur"), (0, "to_rgbs.1.upsample"), (1, "convs.1.skip.0")]
)
def test_nvidia_refuses_another_filter(tmp_path, which, name):
    networks = stylegan2()
    networks[which].get_submodule(name).kernel[0] *= 1.01
    with pytest.raises(ValueError, match=f"the filter {name}.kernel is not that of StyleGAN2"):
        export_nvidia(tmp_path / "network.pkl", *networks)
    assert not [*tmp_path.iterdir()]


def test_nvidia_builds_no_other_channels(tmp_path):
    with pytest.raises(
        ValueError, match=r"min\(base / resolution, max\) channels, and this one has \{4: 8, 8: 9, 16: 8"
    ):
        export_nvidia(tmp_path / "network.pkl", *stylegan2(channels={4: 8, 8: 9, 16: 8}))
    assert not (tmp_path / "network.pkl").exists()


def test_rosinality_goes_on_training(tmp_path):
    g, d = stylegan2(latent_dim=11)
    content = torch.load(export_rosinality(tmp_path / "g.pt", g, d), weights_only=True)
    assert content.keys() == {"g", "d", "g_ema", "g_optim", "d_optim", "latent_avg"}
    for name, network in (("g", g), ("d", d)):
        optimizer = torch.optim.Adam(network.parameters(), lr=1)
        optimizer.load_state_dict(content[f"{name}_optim"])
        assert 0.0015 < optimizer.param_groups[0]["lr"] < 0.002
    assert content["g"].keys() == content["g_ema"].keys()
    assert all(torch.equal(t, content["g_ema"][name]) for name, t in content["g"].items())
    assert_same_bits(load_generator(tmp_path / "g.pt"), g)
    assert_same_bits(load_discriminator(tmp_path / "g.pt"), d)


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"image_channels": 1}, "images of 1 channels, and it has RGB; take nvidia"),
        ({"architecture": "resnet"}, "a generator of architecture .resnet., and it has the one with skips"),
        ({"critic": "skip"}, "a discriminator of architecture .skip., and it has the residual one"),
        ({"latent_dim": 9}, "z of 9 and w of 11 numbers, and it has one size"),
    ],
)
def test_rosinality_refuses_what_the_program_does_not_build(tmp_path, sizes, said):
    with pytest.raises(ValueError, match=f"stylegan2-pytorch cannot hold this network: {said}"):
        export_rosinality(tmp_path / "g.pt", *stylegan2(**{"latent_dim": 11} | sizes))
    assert not [*tmp_path.iterdir()]


def test_stylegan_has_all_resolutions_of_the_program_and_reads_back_the_same_bits(tmp_path):
    torch.manual_seed(0)
    channels = {4: 5, 8: 5, 16: 4, 32: 4, 64: 4, 128: 3, 256: 3}
    g = StyleGANGenerator(256, 6, mapping_layers=2, channels=channels)
    d = StyleGANDiscriminator(256, channels=channels)
    with torch.no_grad():
        for p in (*g.parameters(), *d.parameters()):
            p.add_(torch.randn_like(p) * 0.1)
    file, before = tmp_path / "stylegan.model", torch.get_rng_state()
    export_stylegan(file, g, d)
    assert torch.equal(torch.get_rng_state(), before)
    content = torch.load(file, weights_only=True)
    state, critic = content["g_running"], content["discriminator"]
    widths = [5, 5, 4, 4, 4, 3, 3, 32, 16]
    for i, (below, width) in enumerate(zip([5, *widths], widths, strict=False)):
        assert state[f"generator.to_rgb.{i}.conv.weight_orig"].shape == (3, width, 1, 1)
        assert critic[f"from_rgb.{8 - i}.0.conv.weight_orig"].shape == (width, 3, 1, 1)
        assert critic[f"progression.{8 - i}.conv1.0.conv.weight_orig"].shape[:2] == (below, width + (i == 0))
        fused = state.get(f"generator.progression.{i}.conv1.0.weight")
        assert (fused is not None) == (i >= 5)
        assert fused is None or fused.shape == (below, width, 3, 3)
    assert f"generator.to_rgb.{len(widths)}.conv.weight_orig" not in state
    for read, model in ((load_generator(file), g), (load_discriminator(file), d)):
        assert read.resolution == 256
        assert_same_bits(read, model)
    with torch.device("meta"):
        whole = StyleGANGenerator(1024, 6, mapping_layers=2)
    optimizer = torch.optim.Adam(whole.generator.parameters(), lr=1)
    optimizer.add_param_group({"params": whole.style.parameters()})
    optimizer.load_state_dict(content["g_optimizer"])
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-3, 1e-5])


def test_stylegan_refuses_what_the_program_does_not_build(tmp_path):
    for network, said in (
        (StyleGANGenerator(8, 6, channel_max=4, image_channels=1), "RGB"),
        (StyleGANGenerator(8, 6, channel_max=4, style_dim=5), "z and w of different sizes"),
        (StyleGANGenerator(8, 6, channel_max=4, fused_from=8), "in one from 128 px on, and this network from 8"),
    ):
        with pytest.raises(ValueError, match=said):
            export_stylegan(tmp_path / "g.model", network)
    assert not [*tmp_path.iterdir()]


SIZES = {"class_dim": 6, "num_classes": 5, "channel_width": 2, "attention": (16,)}


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ({"latent_dim": 12}, {"hier": True, "G_shared": True, "dim_z": 12, "shared_dim": 6, "G_attn": "16"}),
        ({"latent_dim": 7, "hierarchical": False}, {"hier": False, "G_shared": True, "dim_z": 7}),
        ({"latent_dim": 7, "hierarchical": False, "shared": False, "class_dim": 1}, {"G_shared": False}),
        ({"latent_dim": 12, "sn_eps": None, "attention": ()}, {"G_param": "none", "G_attn": "0"}),
    ],
)
def test_biggan_reads_back_the_same_bits(tmp_path, sizes, options):
    torch.manual_seed(0)
    g, d = BigGANGenerator(32, **SIZES | sizes), BigGANDiscriminator(32, 5, 2, attention=(16,))
    files = export_biggan(tmp_path, g, d)
    names = {"G_ema.pth", "G.pth", "D.pth", "state_dict.pth", "G_optim.pth", "D_optim.pth"}
    assert {file.name for file in files} == {file.name for file in tmp_path.iterdir()} == names
    for name, network, rate in (("G", g, 5e-5), ("D", d, 2e-4)):
        optimizer = torch.optim.Adam(network.parameters(), lr=1)
        optimizer.load_state_dict(torch.load(tmp_path / f"{name}_optim.pth", weights_only=True))
        assert optimizer.param_groups[0]["lr"] == rate
    assert_same_bits(load_generator(tmp_path), g)
    assert_same_bits(load_generator(tmp_path / "G_ema.pth"), g)
    assert_same_bits(load_discriminator(tmp_path), d)
    content = torch.load(tmp_path / "state_dict.pth", weights_only=True)
    assert content["itr"] == content["epoch"] == content["save_num"] == 0
    wanted = {"resolution": 32, "n_classes": 5, "G_ch": 2, "D_ch": 2, "D_wide": True, "D_attn": "16", "SN_eps": 1e-6}
    assert (wanted | options).items() <= content["config"].items()


def test_biggan_refuses_what_the_program_does_not_build(tmp_path):
    for sizes, said in (
        ({"image_channels": 1}, "RGB"),
        ({"channels": (4, 6, 8, 8)}, "4, 6, 8, 8"),
        ({"bn_eps": 1e-4}, "batch norm"),
    ):
        with pytest.raises(ValueError, match=said):
            export_biggan(tmp_path, BigGANGenerator(32, 12, **SIZES | sizes))
    assert not [*tmp_path.iterdir()]


def test_biggan_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    g, d = BigGANGenerator(32, 12, **SIZES), BigGANDiscriminator(32, 1, 2, attention=(16,))
    with pytest.raises(ValueError, match="it knows 1 classes, and the generator 5"):
        export_biggan(tmp_path / "new" / "folder", g, d)
    assert not [*tmp_path.iterdir()]
    monkeypatch.setattr(exporting, "save_torch", full_after(3, exporting.save_torch))
    for folder in (tmp_path / "new" / "folder", tmp_path):
        with pytest.raises(OSError, match="the disk is full"):
            export_biggan(folder, g)
        assert not [*tmp_path.iterdir()]
    (tmp_path / "G.pth").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="is not empty, and nothing was written: name a new folder"):
        export_biggan(tmp_path, g)
    with pytest.raises(FileExistsError, match=r"G.pth is a file"):
        export_biggan(tmp_path / "G.pth", g)
    assert (tmp_path / "G.pth").read_bytes() == b"mine"
    assert len([*tmp_path.iterdir()]) == 1


def full_after(count, write):
    """A writer for which the disk is full after so many files, each time anew."""
    written = []

    def limited(path, content):
        if len(written) == count - 1:
            written.clear()
            raise OSError("the disk is full")
        written.append(path)
        write(path, content)

    return limited


def test_critics_that_biggan_has_beside_a_generator():
    g = BigGANGenerator(32, 12, **SIZES)
    fresh = biggan_writing.critic_like(g)
    assert fresh.num_classes == 5
    biggan_writing.check_critic(fresh, g)
    for critic, said in (
        (BigGANDiscriminator(32, 1, 2), "it knows 1 classes, and the generator 5"),
        (BigGANDiscriminator(32, 5, 2, sn_eps=None), "no spectral normalisation"),
        (BigGANDiscriminator(32, 5, channels=(2, 4, 8, 8)), r"none of \[2, 4, 8, 8\] channels"),
    ):
        with pytest.raises(ValueError, match=said):
            biggan_writing.check_critic(critic, g)
    with torch.device("meta"):
        large = BigGANGenerator(512, channel_width=1, attention=())
        assert biggan_writing.critic_like(large) is None
        with pytest.raises(ValueError, match="none of 512 px"):
            biggan_writing.check_critic(BigGANDiscriminator(512, channel_width=1, attention=()), large)


def test_the_wrong_class_is_named(tmp_path):
    g, _ = stylegan2()
    with pytest.raises(TypeError, match="takes a StyleGAN2Discriminator, got a StyleGAN2Generator"):
        export_nvidia(tmp_path / "n.pkl", g, g)
    with pytest.raises(TypeError, match="takes a BigGANGenerator, got a StyleGAN2Generator"):
        export_biggan(tmp_path, g)
