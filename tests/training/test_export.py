"""Runs as other programs' files: read back they are the same networks, and the miner is in them or beside them."""

import re

import pytest
import torch
from tiny_run import RUN, SIZES

import minegan_fast as mf
from minegan_fast.mining import Miner, save_miner
from minegan_fast.models import (
    BigGANDeepGenerator,
    BigGANDiscriminator,
    BigGANGenerator,
    DCGANGenerator,
    PGANGenerator,
    StyleGAN2Discriminator,
    StyleGAN2Generator,
    StyleGANDiscriminator,
    StyleGANGenerator,
    save_model,
)
from minegan_fast.training import export
from minegan_fast.training.export import export_run
from minegan_fast.training.folder import RunFolder
from minegan_fast.training.results import open_result

STYLEGAN = {"mapping_layers": 2, "channel_base": 64, "channel_max": 8}
BIGGAN = {"resolution": 32, "num_classes": 5, "channel_width": 2, "attention": [16]}


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
    mined = mf.Mined(generator, miner or bent(Miner(generator.latent_dim)), **keywords)
    save_miner(run.best / "miner.safetensors", mined)
    save_model(run.source / "network.safetensors", generator, critic)
    return mined.eval()


def bent(miner):
    with torch.no_grad():
        for p in miner.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return miner


def beside(folder, u):
    """What the TorchScript program gives."""
    return torch.jit.load(str(folder / "miner.pt"))(u)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """They take longer than the networks, and are looked at elsewhere."""
    for name in ("loss_curves", "save_grid"):
        monkeypatch.setattr(f"minegan_fast.training.run.{name}", lambda *_: None)


@pytest.fixture
def stylegan2():
    torch.manual_seed(0)
    critic = StyleGAN2Discriminator(16, channel_base=64, channel_max=8)
    return with_noise(StyleGAN2Generator(16, 8, **STYLEGAN)), with_noise(critic)


@pytest.mark.parametrize("architecture", [("skip", "resnet"), ("resnet", "skip")])
def test_stylegan2_for_nvidia_reads_back(tmp_path, architecture):
    torch.manual_seed(0)
    sizes = {"channel_base": 64, "channel_max": 8, "image_channels": 1}
    g = with_noise(StyleGAN2Generator(16, 8, mapping_layers=2, architecture=architecture[0], **sizes))
    d = with_noise(StyleGAN2Discriminator(16, architecture=architecture[1], **sizes))
    mined = run_of(tmp_path / "run", g, None, d)
    files, notes = export_run(tmp_path / "run", tmp_path / "out", "nvidia")
    assert [file.name for file in files] == ["network.pkl", "miner.safetensors", "miner.pt"]
    assert sorted(files) == sorted((tmp_path / "out").iterdir())
    assert "its programs take network.pkl" in notes[0]
    assert "that of network.safetensors, which the run did not train" in notes[1]
    assert "beside it" in notes[2]
    assert len(notes) == 3
    u = torch.randn(20, 8)
    expected = mined(u, noise="constant")
    again = mf.load_generator(files[0])
    torch.testing.assert_close(again(beside(tmp_path / "out", u), noise="constant"), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mf.load_discriminator(files[0])(expected), d(expected), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(again.latent_avg, g.mean_latent()[0])


def test_stylegan2_for_rosinality_goes_on_training(tmp_path):
    torch.manual_seed(0)
    g = with_noise(StyleGAN2Generator(8, 8, mapping_layers=2))
    mined = run_of(tmp_path / "run", g, bent(Miner(8)))
    files, notes = export_run(tmp_path / "run", tmp_path / "out", "rosinality")
    assert "Generator(8, 8, 2, 2)" in notes[0]
    assert "args.latent and args.n_mlp" in notes[0]
    assert "new and untrained" in notes[1]
    content = torch.load(files[0], weights_only=True)
    assert {"g", "d", "g_ema", "g_optim", "d_optim"} <= content.keys()
    again, critic = StyleGAN2Generator(8, 8, mapping_layers=2), StyleGAN2Discriminator(8)
    for network, name in ((again, "g"), (critic, "d"), (again, "g_ema")):
        network.load_state_dict(content[name])
    u = torch.randn(2, 8)
    images = again.eval()(beside(tmp_path / "out", u), noise="constant")
    torch.testing.assert_close(images, mined(u, noise="constant"), rtol=1e-4, atol=1e-5)


def test_stylegan_for_rosinality(tmp_path):
    torch.manual_seed(0)
    g, d = with_noise(StyleGANGenerator(8, mapping_layers=2)), with_noise(StyleGANDiscriminator(8))
    mined = run_of(tmp_path / "run", g, bent(Miner(512, depth=1)), d, place="w")
    files, notes = export_run(tmp_path / "run", tmp_path / "out", "rosinality")
    assert [file.name for file in files] == ["network.model"]
    assert "StyledGenerator(512, 2), and shows it with step=1" in notes[0]
    content = torch.load(files[0], weights_only=True)
    assert content.keys() == {"g_running", "generator", "discriminator", "g_optimizer", "d_optimizer"}
    u = torch.randn(2, 512)
    images = mf.load_generator(files[0], resolution=8)(u, noise="none")
    torch.testing.assert_close(images, mined(u, noise="none"), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("depth", "activation"), [(1, "relu"), (3, "linear")])
def test_a_linear_miner_of_w_becomes_a_part_of_the_network(tmp_path, stylegan2, depth, activation):
    miner = bent(Miner(8, depth=depth, activation=activation))
    constant = torch.randn_like(stylegan2[0].learned_constant)
    mined = run_of(tmp_path / "run", stylegan2[0], miner, stylegan2[1], place="w", constant=constant)
    files, notes = export_run(tmp_path / "run", tmp_path / "out", "nvidia")
    assert [file.name for file in files] == ["network.pkl"]
    assert "constant" in notes[-2]
    assert "ordinary z" in notes[-1]
    u = torch.randn(6, 8)
    images = mf.load_generator(files[0])(u, noise="constant")
    torch.testing.assert_close(images, mined(u, noise="constant"), rtol=1e-4, atol=1e-5)


def with_labels(generator):
    """The miners of a conditional generator."""
    return {"class_miner": bent(Miner(generator.latent_dim, output_dim=generator.class_dim, affine=True))}


FAMILIES = {
    "stylegan2 in z": (lambda: StyleGAN2Generator(8, 6, **STYLEGAN), lambda g: {"prior": "sphere+moments"}),
    "stylegan2 in w": (lambda: StyleGAN2Generator(8, 6, style_dim=7, **STYLEGAN), lambda g: {"place": "w"}),
    "stylegan in z": (lambda: StyleGANGenerator(8, 6, **STYLEGAN), lambda g: {}),
    "stylegan in w": (lambda: StyleGANGenerator(8, 6, style_dim=7, **STYLEGAN), lambda g: {"place": "w"}),
    "pgan": (lambda: PGANGenerator(8, 6, 32, 4), lambda g: {"prior": "sphere"}),
    "pgan with labels": (lambda: PGANGenerator(8, 6, 32, 4, num_classes=3), with_labels),
    "biggan": (lambda: BigGANGenerator(**BIGGAN), lambda g: with_labels(g) | {"prior": "sphere+moments"}),
    "biggan_deep": (lambda: BigGANDeepGenerator(32, 4, 5, 4, channel_width=8, attention=[16], steps=2), with_labels),
    "dcgan": (lambda: DCGANGenerator(6, (8, 4)), lambda g: {"prior": "sphere+moments"}),
    "dcgan with labels": (lambda: DCGANGenerator(6, (8, 4), num_classes=3, class_dim=2), with_labels),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_miner_of_every_family_lies_beside_it(tmp_path, family):
    torch.manual_seed(0)
    make, miners = FAMILIES[family]
    generator = with_noise(make())
    keywords = miners(generator)
    size = generator.style_dim if keywords.get("place") == "w" else generator.latent_dim
    mined = run_of(tmp_path / "run", generator, bent(Miner(size)), **keywords)
    files, notes = export_run(tmp_path / "run", tmp_path / "out", "safetensors")
    assert [file.name for file in files] == ["network.safetensors", "miner.safetensors", "miner.pt"]
    assert "lies beside it" in notes[-1]
    read, u = mf.load_generator(files[0]), torch.randn(3, generator.latent_dim)
    fixed = {"noise": "none"} if hasattr(generator, "mapping") else {}
    expected = mined(u, **fixed)
    if keywords.get("place") == "w":
        images = read(beside(tmp_path / "out", read.mapping(u)), latents=True, **fixed)
    else:
        made = beside(tmp_path / "out", u)
        assert isinstance(made, tuple) == ("class_miner" in keywords)
        images = read(*(made if isinstance(made, tuple) else (made,)), **fixed)
    torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mf.load_mined(files[1], read)(u, **fixed), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["stylegan2 in z", "stylegan in z", "pgan", "dcgan"])
def test_a_miner_that_does_nothing_is_left_out(tmp_path, family):
    torch.manual_seed(0)
    generator = with_noise(FAMILIES[family][0]())
    run_of(tmp_path / "run", generator, Miner(6))
    files, notes = export_run(tmp_path / "run", tmp_path / "out", "safetensors")
    assert [file.name for file in files] == ["network.safetensors"]
    assert "ordinary z" in notes[-1]
    for name, tensor in mf.load_generator(files[0]).state_dict().items():
        assert torch.equal(tensor, generator.state_dict()[name])


def test_biggan_reads_back(tmp_path):
    torch.manual_seed(0)
    g, d = with_noise(BigGANGenerator(**BIGGAN)), with_noise(BigGANDiscriminator(**BIGGAN))
    mined = run_of(tmp_path / "run", g, None, d, **with_labels(g))
    files, notes = export_run(tmp_path / "run", tmp_path / "out", "biggan")
    written = ["G.pth", "G_ema.pth", "D.pth", "state_dict.pth", "G_optim.pth", "D_optim.pth"]
    assert [file.name for file in files[:6]] == written
    assert "Generator(resolution=32, n_classes=5" in notes[0]
    assert "(z, class embedding)" in notes[-1]
    u = torch.randn(3, g.latent_dim)
    z, classes = beside(tmp_path / "out", u)
    torch.testing.assert_close(mf.load_generator(tmp_path / "out")(z, classes), mined(u), rtol=1e-4, atol=1e-5)
    images = torch.randn(2, 3, 32, 32)
    labels = torch.tensor([1, 2])
    torch.testing.assert_close(mf.load_discriminator(tmp_path / "out")(images, labels), d(images, labels))
    progress = torch.load(tmp_path / "out" / "state_dict.pth", weights_only=True)
    assert {"itr", "epoch", "save_num", "save_best_num", "best_IS", "best_FID", "config"} == progress.keys()
    assert progress["config"]["n_classes"] == 5


@pytest.mark.parametrize("known", [None, 1])
def test_a_new_critic_of_biggan_has_the_generators_classes(tmp_path, known):
    torch.manual_seed(0)
    g = BigGANGenerator(**BIGGAN | {"channel_width": 4}).eval()
    critic = BigGANDiscriminator(**BIGGAN | {"channel_width": 4, "num_classes": 1}).eval() if known else None
    run_of(tmp_path / "run", g, critic=critic, **with_labels(g))
    _, notes = export_run(tmp_path / "run", tmp_path / "out", "biggan")
    assert "the discriminator is new and untrained" in notes
    assert any("it knows 1 classes, and the generator 5" in note for note in notes) == bool(known)
    assert mf.load_discriminator(tmp_path / "out").num_classes == 5


def test_the_discriminator_is_the_runs_own_where_there_is_one(run_settings, tmp_path):
    mf.transfer(**run_settings | {"loss": "nonsaturating", "features": "pixels"})
    _, notes = export_run(run_settings["out"], tmp_path / "out", "nvidia", "last")
    assert "the discriminator is the run's own of step 8" in notes
    snapshot = torch.load(run_settings["out"] / "snapshots" / "000008.pt", weights_only=True)
    trained = snapshot["trainer"]["adversary"]["critic"]
    critic = mf.load_discriminator(tmp_path / "out" / "network.pkl").state_dict()
    assert all(torch.equal(tensor, trained[name]) for name, tensor in critic.items())


def test_files_of_other_programs_go_to_another(tmp_path, stylegan2):
    """A file of the original MineGAN with its miner, and a checkpoint without one."""
    g, d = stylegan2
    layers = {f"transform.{i}.weight": torch.randn(8, 8) for i in (0, 2)}
    layers |= {f"transform.{i}.bias": torch.randn(8) for i in (0, 2)}
    torch.save({"g_ema": g.state_dict(), "d": d.state_dict(), "miner": layers}, tmp_path / "100000.pt")
    files, notes = export_run(tmp_path / "100000.pt", tmp_path / "mined", "nvidia")
    assert "that of 100000.pt, which the run did not train" in notes[1]
    u, read = torch.randn(3, 8), mf.load_generator(files[0])
    expected = open_result(tmp_path / "100000.pt", device="cpu")(u, noise="constant")
    images = read(beside(tmp_path / "mined", u), noise="constant")
    torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-5)

    save_model(tmp_path / "g.safetensors", g, d)
    files, notes = export_run(tmp_path / "g.safetensors", tmp_path / "bare", "nvidia")
    assert [file.name for file in files] == ["network.pkl"]
    assert not [note for note in notes if "miner" in note]
    assert torch.equal(mf.load_generator(files[0])(u, noise="constant"), g(u, noise="constant"))


def test_of_several_sources_each_has_a_folder(tmp_path, tiny):
    for name in "ab":
        save_model(tmp_path / f"{name}.safetensors", tiny["generator"], tiny["discriminator"])
    mf.transfer(
        [tmp_path / "a.safetensors", tmp_path / "b.safetensors"], tiny["images"], tmp_path / "run",
        **RUN | {"finetune_steps": 0, "loss": "mmd", "loss_features": "critic", "features": "pixels"},
    )  # fmt: skip
    files, notes = export_run(tmp_path / "run", tmp_path / "out", "nvidia")
    several, u = open_result(tmp_path / "run", device="cpu"), torch.randn(3, 8)
    for i, name in enumerate("ab"):
        folder = tmp_path / "out" / name
        assert {file for file in files if file.parent == folder} == {*folder.iterdir()}
        read = mf.load_mined(folder / "miner.safetensors", mf.load_generator(folder / "network.pkl"))
        expected = several.branches[i](u, noise="constant")
        torch.testing.assert_close(read(u, noise="constant"), expected, rtol=1e-4, atol=1e-5)
        assert f"{name}: it makes {several.probabilities[i]:.1%} of the images" in notes
    with pytest.raises(ValueError, match="a: rosinality/stylegan2-pytorch cannot hold this network: images of 1 chan"):
        export_run(tmp_path / "run", tmp_path / "refused", "rosinality")
    assert not (tmp_path / "refused").exists()


REFUSED = [
    (lambda: StyleGAN2Generator(8, 6, **STYLEGAN), "biggan", "biggan has no stylegan2: take rosinality or nvidia or"),
    (lambda: StyleGAN2Generator(8, 6, **STYLEGAN), "onnx", "to must be one of rosinality, nvidia, biggan, safetensors"),
    (lambda: StyleGAN2Generator(8, 6, **STYLEGAN), "rosinality", "this one has {4: 8, 8: 8}: take nvidia or safetens"),
    (lambda: StyleGAN2Generator(8, 6, image_channels=1), "rosinality", "images of 1 channels, and it has RGB"),
    (lambda: StyleGAN2Generator(8, 6, style_dim=7), "rosinality", "z of 6 and w of 7 numbers, and it has one size"),
    (lambda: StyleGAN2Generator(8, 6, architecture="resnet"), "rosinality", "of architecture 'resnet', and it has"),
    (lambda: StyleGAN2Generator(8, 6, channels={4: 8, 8: 9}), "nvidia", "this one has {4: 8, 8: 9}: take rosinality's"),
    (lambda: StyleGANGenerator(8, 6, **STYLEGAN), "rosinality", "this one has 6 and {4: 8, 8: 8}: take safetensors"),
    (lambda: StyleGANGenerator(8, mapping_layers=1, image_channels=1), "rosinality", "builds RGB networks, and this"),
    (lambda: StyleGANGenerator(8, 6, **STYLEGAN), "nvidia", "nvidia has no stylegan: take rosinality or safetensors"),
    (lambda: PGANGenerator(8, 6, 32, 4), "rosinality", "rosinality has no pgan: take safetensors"),
    (lambda: DCGANGenerator(6, (8, 4)), "nvidia", "nvidia has no dcgan: take safetensors"),
    (lambda: BigGANGenerator(**BIGGAN, image_channels=1), "biggan", "builds RGB networks, and this one has 1 channels"),
    (lambda: BigGANGenerator(**BIGGAN, channels=[4, 6, 8, 8]), "biggan", "does not build a generator of"),
    (lambda: BigGANGenerator(**BIGGAN, bn_eps=1e-4), "biggan", "the last batch norm of BigGAN-PyTorch has eps 1e-05"),
    (lambda: BigGANDeepGenerator(32, 4, 5, 4, channel_width=8, attention=[16], steps=2), "biggan", "biggan has no"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "to", "said"), REFUSED)
def test_what_a_program_cannot_hold_is_refused_and_leaves_nothing(tmp_path, make, to, said):
    generator = make()
    run_of(tmp_path / "run", generator, **(with_labels(generator) if generator.num_classes else {}))
    with pytest.raises(ValueError, match=re.escape(said)):
        export_run(tmp_path / "run", tmp_path / "new" / "out", to)
    assert [file.name for file in tmp_path.iterdir()] == ["run"]


def test_a_mined_class_needs_a_shared_embedding(tmp_path):
    g = BigGANGenerator(**BIGGAN, latent_dim=7, hierarchical=False, shared=False).eval()
    run_of(tmp_path / "run", g, class_miner=Miner(7, output_dim=5, affine=True))
    with pytest.raises(ValueError, match="takes labels alone, and the class of this run was mined: take safetensors"):
        export_run(tmp_path / "run", tmp_path / "out", "biggan")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("out", ["new/out", "empty"])
def test_a_failed_export_leaves_nothing(tmp_path, stylegan2, monkeypatch, out):
    run_of(tmp_path / "run", *stylegan2[:1])
    (tmp_path / "empty").mkdir()

    def full(path, mined):
        assert (path.parent / "network.pkl").is_file(), "the network is written first"
        path.write_bytes(b"half")
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(export, "save_miner", full)
        with pytest.raises(OSError, match="the disk is full"):
            export_run(tmp_path / "run", tmp_path / out, "nvidia")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["empty", "run"]
    assert not [*(tmp_path / "empty").iterdir()]
    files, _ = export_run(tmp_path / "run", tmp_path / out, "nvidia")
    before = {file: file.read_bytes() for file in files}
    with pytest.raises(FileExistsError, match="is not empty, and nothing was written: name a new folder"):
        export_run(tmp_path / "run", tmp_path / out, "safetensors")
    assert {file: file.read_bytes() for file in (tmp_path / out).iterdir()} == before


class Module(torch.nn.Module):
    latent_dim, resolution, image_channels = 4, SIZES["resolution"], 1

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 64)

    def forward(self, z):
        return self.layer(z).tanh().reshape(-1, 1, 8, 8)


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
        ("z", "rosinality", "cannot hold this network: .*classes, and it has none"),
        ("w", "safetensors", "w behind a mined class is of no other program"),
    ],
)
def test_where_a_mined_class_has_no_place_is_named(tmp_path, place, to, message):
    conditional(tmp_path / "run", place=place)
    with pytest.raises(ValueError, match=message):
        export_run(tmp_path / "run", tmp_path / "out", to)


@pytest.mark.parametrize("several", [False, True])
def test_a_run_of_a_module_is_refused_and_says_how_it_is_opened(tmp_path, tiny, several):
    torch.manual_seed(0)
    settings = RUN | {"loss": "mmd", "loss_features": torch.nn.Flatten(), "features": "pixels"}
    settings |= {"finetune_steps": 0} if several else {}
    module = Module()
    source = [module, tiny["source"]] if several else module
    result = mf.transfer(source, tiny["images"], tmp_path / "run", **settings)
    for given in (None, module):
        with pytest.raises(ValueError, match="a module of yours, which no other program has, and nothing was writ"):
            export_run(tmp_path / "run", tmp_path / "out", "safetensors", source=given)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="module of yours: name the function") as error:
        open_result(tmp_path / "run")
    if several:
        assert "transfer(..., resume=True) samples from it" in str(error.value)
        again = mf.transfer(source, tiny["images"], tmp_path / "run", **settings, resume=True)
        assert torch.equal(again.sample(3, seed=0), result.sample(3, seed=0))
        return
    said = str(error.value).split("in Python ")[1].removesuffix(" shows what the run made of it")
    images = eval(said, {"minegan_fast": mf, "module": module})
    assert images.shape == (16, 1, 8, 8)
    u = torch.randn(2, 4)
    made = mf.load_mined(tmp_path / "run", module)(u)
    assert torch.equal(made, open_result(tmp_path / "run", device="cpu", source=module)(u))
    assert not torch.equal(made, module(u)), "the run changed nothing"
