"""Runs as other programs' files: read back they are the same networks, and the miner is in them or beside them."""

import pickle
import pickletools

import pytest
import torch
from tiny_run import RUN, SIZES

import minegan_fast as mf
from minegan_fast.mining import Miner, save_miner
from minegan_fast.models import (
    BigGANDiscriminator,
    BigGANGenerator,
    StyleGAN2Discriminator,
    StyleGAN2Generator,
    export_nvidia,
    export_rosinality,
    save_model,
)
from minegan_fast.training.export import export_run
from minegan_fast.training.folder import RunFolder


def with_noise(network):
    """Biases and strengths that are zero would show nothing."""
    with torch.no_grad():
        for p in network.parameters():
            if p.ndim < 2:
                p.add_(0.3 * torch.randn_like(p))
    return network.eval()


def run_of(folder, generator, miner=None, critic=None, **keywords):
    """The folder of a run with that result."""
    run = RunFolder(folder)
    run.create()
    run.source.mkdir()
    save_model(run.best / "generator.safetensors", generator)
    mined = mf.Mined(generator, miner or mf.Miner(generator.latent_dim), **keywords)
    save_miner(run.best / "miner.safetensors", mined)
    save_model(run.source / "network.safetensors", generator, critic)
    return mined.eval()


def bent(miner):
    with torch.no_grad():
        for p in miner.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return miner


@pytest.fixture
def stylegan2():
    torch.manual_seed(0)
    g = with_noise(StyleGAN2Generator(16, 8, mapping_layers=2, channel_base=64, channel_max=8))
    return g, with_noise(StyleGAN2Discriminator(16, channel_base=64, channel_max=8))


@pytest.mark.parametrize(("to", "name"), [("rosinality", "network.pt"), ("nvidia", "network.pkl")])
@pytest.mark.parametrize("architecture", [("skip", "resnet"), ("resnet", "skip")])
def test_stylegan2_reads_back(tmp_path, to, name, architecture):
    torch.manual_seed(0)
    sizes = {"channel_base": 64, "channel_max": 8}
    g = with_noise(StyleGAN2Generator(16, 8, mapping_layers=2, architecture=architecture[0], **sizes))
    d = with_noise(StyleGAN2Discriminator(16, architecture=architecture[1], **sizes))
    mined = run_of(tmp_path / "run", g, bent(mf.Miner(8)), d)
    files, notes = export_run(tmp_path / "run", tmp_path / "out", to)
    assert [file.name for file in files] == [name, "miner.safetensors", "miner.pt"]
    assert len(notes) == 1
    assert "beside it" in notes[0]
    u = torch.randn(20, 8)
    z = torch.jit.load(str(tmp_path / "out" / "miner.pt"))(u)
    expected = mined(u, noise="constant")
    again = mf.load_generator(files[0])
    torch.testing.assert_close(again(z, noise="constant"), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mf.load_discriminator(files[0])(expected), d(expected), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(again.latent_avg, g.mean_latent()[0])


def test_what_nvidias_programs_read_holds_no_code(tmp_path, stylegan2):
    path = export_nvidia(tmp_path / "network.pkl", *stylegan2)
    named = {arg for op, arg, _ in pickletools.genops(path.read_bytes()) if op.name == "GLOBAL"}
    assert "dnnlib.tflib.network Network" in named
    assert {name.split(" ")[0].split(".")[0] for name in named} <= {"dnnlib", "numpy", "_codecs", "copyreg", "copy_reg"}
    with pytest.raises(ModuleNotFoundError, match="dnnlib"):
        pickle.loads(path.read_bytes())


@pytest.mark.parametrize(("depth", "activation"), [(1, "relu"), (3, "linear")])
def test_a_linear_miner_of_w_becomes_a_part_of_the_network(tmp_path, stylegan2, depth, activation):
    miner = bent(Miner(8, depth=depth, activation=activation))
    constant = torch.randn_like(stylegan2[0].learned_constant)
    mined = run_of(tmp_path / "run", stylegan2[0], miner, stylegan2[1], place="w", constant=constant)
    files, notes = export_run(tmp_path / "run", tmp_path / "out", "rosinality")
    assert [file.name for file in files] == ["network.pt"]
    assert "constant" in notes[0]
    assert "ordinary z" in notes[1]
    u = torch.randn(6, 8)
    images = mf.load_generator(files[0])(u, noise="constant")
    torch.testing.assert_close(images, mined(u, noise="constant"), rtol=1e-4, atol=1e-5)


def test_a_deeper_miner_of_w_lies_beside_it(tmp_path, stylegan2):
    mined = run_of(tmp_path / "run", stylegan2[0], bent(Miner(8)), place="w")
    files, notes = export_run(tmp_path / "run", tmp_path / "out", "rosinality")
    assert "new and untrained" in notes[0]
    u = torch.randn(6, 8)
    w = torch.jit.load(str(tmp_path / "out" / "miner.pt"))(mf.load_generator(files[0]).mapping(u))
    images = mf.load_generator(files[0])(w, latents=True, noise="constant")
    torch.testing.assert_close(images, mined(u, noise="constant"), rtol=1e-4, atol=1e-5)


def test_biggan_reads_back(tmp_path):
    torch.manual_seed(0)
    sizes = {"resolution": 32, "num_classes": 5, "channel_width": 2, "attention": [16]}
    g, d = with_noise(BigGANGenerator(**sizes)), with_noise(BigGANDiscriminator(**sizes))
    mined = run_of(tmp_path / "run", g, bent(mf.Miner(g.latent_dim)), d, class_miner=bent(Miner(
        g.latent_dim, output_dim=g.class_dim, affine=True)))  # fmt: skip
    files, notes = export_run(tmp_path / "run", tmp_path / "out", "biggan")
    assert [file.name for file in files[:4]] == ["G.pth", "G_ema.pth", "D.pth", "state_dict.pth"]
    assert "(z, class embedding)" in notes[0]
    u = torch.randn(3, g.latent_dim)
    z, classes = torch.jit.load(str(tmp_path / "out" / "miner.pt"))(u)
    torch.testing.assert_close(mf.load_generator(tmp_path / "out")(z, classes), mined(u), rtol=1e-4, atol=1e-5)
    images = torch.randn(2, 3, 32, 32)
    labels = torch.tensor([1, 2])
    torch.testing.assert_close(mf.load_discriminator(tmp_path / "out")(images, labels), d(images, labels))
    progress = torch.load(tmp_path / "out" / "state_dict.pth", weights_only=True)
    assert {"itr", "epoch", "save_num", "save_best_num", "best_IS", "best_FID", "config"} == progress.keys()


def test_of_several_sources_each_has_a_folder(tmp_path, tiny):
    for name in "ab":
        save_model(tmp_path / f"{name}.safetensors", tiny["generator"], tiny["discriminator"])
    mf.transfer(
        [tmp_path / "a.safetensors", tmp_path / "b.safetensors"], tiny["images"], tmp_path / "run",
        **RUN | {"finetune_steps": 0, "loss": "mmd", "loss_features": "critic", "features": "pixels"},
    )  # fmt: skip
    files, notes = export_run(tmp_path / "run", tmp_path / "out", "safetensors")
    assert {file.parent.name for file in files} == {"a", "b"}
    assert all(note.startswith(("a: ", "b: ")) for note in notes)
    assert mf.load_generator(tmp_path / "out" / "b" / "network.safetensors").config == tiny["generator"].config


def test_what_cannot_be_exported_is_named(tmp_path, tiny, stylegan2):
    run_of(tmp_path / "run", stylegan2[0])
    with pytest.raises(ValueError, match="biggan has no stylegan2: take rosinality or nvidia or safetensors"):
        export_run(tmp_path / "run", tmp_path / "out", "biggan")
    with pytest.raises(ValueError, match="to must be one of rosinality, nvidia, biggan, safetensors, got 'onnx'"):
        export_run(tmp_path / "run", tmp_path / "out", "onnx")
    odd = StyleGAN2Generator(16, 8, channels={4: 8, 8: 5, 16: 3})
    with pytest.raises(ValueError, match="follow no rule that NVIDIA's program has"):
        export_nvidia(tmp_path / "x.pkl", odd, StyleGAN2Discriminator(16, **{"channel_base": 64, "channel_max": 8}))
    with pytest.raises(TypeError, match="takes a StyleGAN2Generator, got a StyleGAN2Discriminator"):
        export_nvidia(tmp_path / "x.pkl", stylegan2[1], stylegan2[1])


class Module(torch.nn.Module):
    latent_dim, resolution, image_channels = 4, SIZES["resolution"], 1

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 64)

    def forward(self, z):
        return self.layer(z).tanh().reshape(-1, 1, 8, 8)


def test_a_run_of_a_module_says_how_it_is_opened(tmp_path, tiny):
    settings = {"loss": "mmd", "loss_features": torch.nn.Flatten(), "features": "pixels"}
    mf.transfer(Module(), tiny["images"], tmp_path / "run", **RUN | settings)
    with pytest.raises(ValueError, match=r"load_mined\(.*, module\)"):
        export_run(tmp_path / "run", tmp_path / "out", "safetensors")


def conditional(folder, **keywords):
    torch.manual_seed(0)
    sizes = {"channel_base": 64, "channel_max": 8, "num_classes": 4}
    g = with_noise(StyleGAN2Generator(16, 8, mapping_layers=2, class_dim=5, **sizes))
    class_miner = bent(Miner(8, output_dim=5, affine=True))
    return run_of(folder, g, bent(Miner(8)), StyleGAN2Discriminator(16, **sizes), class_miner=class_miner, **keywords)


def test_a_conditional_stylegan2_goes_with_both_miners(tmp_path):
    mined = conditional(tmp_path / "run")
    _, notes = export_run(tmp_path / "run", tmp_path / "out", "safetensors")
    assert "(z, class embedding)" in notes[-1]
    u, program = torch.randn(3, 8), torch.jit.load(str(tmp_path / "out" / "miner.pt"))
    generator = mf.load_generator(tmp_path / "out" / "network.safetensors")
    with torch.no_grad():
        images = generator(*program(u), noise="constant")
        torch.testing.assert_close(images, mined(u, noise="constant"), rtol=1e-5, atol=1e-5)
    assert mf.load_discriminator(tmp_path / "out" / "network.safetensors").num_classes == 4


@pytest.mark.parametrize(
    ("place", "to", "message"),
    [
        ("z", "nvidia", "no networks with classes are written in NVIDIA's layout"),
        ("z", "rosinality", "the rosinality layout has no networks with classes"),
        ("w", "safetensors", "w behind a mined class is of no other program"),
    ],
)
def test_where_a_mined_class_has_no_place_is_named(tmp_path, place, to, message):
    conditional(tmp_path / "run", place=place)
    with pytest.raises(ValueError, match=message):
        export_run(tmp_path / "run", tmp_path / "out", to)


def test_rosinality_has_no_plain_networks(tmp_path):
    g = StyleGAN2Generator(8, 8, channel_max=8, architecture="orig")
    with pytest.raises(ValueError, match='no networks of architecture "orig"'):
        export_rosinality(tmp_path / "x.pt", g)
