"""Results from files: those of the original MineGAN code, and what is no result."""

import pytest
import torch

import minegan_fast as mf
from minegan_fast.models import BigGANGenerator, StyleGAN2Generator, StyleGANGenerator
from minegan_fast.training.images import save_folder
from minegan_fast.training.results import evaluate_result, open_result


def mlp(size, *names):
    """Layers of a miner, {name.weight, name.bias}."""
    layers = {f"{name}.weight": torch.randn(size, size) for name in names}
    return layers | {f"{name}.bias": torch.randn(size) for name in names}


@pytest.fixture
def stylegan2_run(tmp_path):
    """(file as the original training of StyleGAN2 writes it, the generator in it, the miner's layers)."""
    generator = StyleGAN2Generator(8, 6, channel_base=64, channel_max=8, mapping_layers=2).eval()
    layers = mlp(6, "transform.0", "transform.2")
    content = {"miner": layers, "g": generator.state_dict(), "g_ema": generator.state_dict(), "ada_aug_p": 0}
    torch.save(content, tmp_path / "100000.pt")
    return tmp_path / "100000.pt", generator, layers


def test_an_original_run_of_stylegan2_is_sampled(stylegan2_run):
    path, generator, layers = stylegan2_run
    mined = open_result(path)
    u = torch.randn(3, 6)
    z = (u @ layers["transform.0.weight"].T + layers["transform.0.bias"]).relu()
    z = z @ layers["transform.2.weight"].T + layers["transform.2.bias"]
    torch.testing.assert_close(mined(u, noise="constant"), generator(z, noise="constant"))


def test_an_original_run_of_stylegan2_is_evaluated(stylegan2_run, tmp_path):
    images = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8)
    save_folder(tmp_path / "images", images)
    report = evaluate_result(
        stylegan2_run[0], "best", None, None, None, tmp_path / "images", samples=6, features="pixels", seed=0
    )
    assert report["metrics"]["fid"] >= 0
    assert any("rank-deficient" in note for note in report["notes"])
    assert len(report["notes"]) == len({*report["notes"]}) == 3  # FID, KID and KMMD of six images


def test_an_original_run_of_stylegan_is_sampled_with_the_generators_own_noise(tmp_path):
    generator = StyleGANGenerator(8, 6, channel_base=64, channel_max=8, mapping_layers=2).eval()
    layers = mlp(6, "transform.0", "transform.2")
    content = {"generator": generator.state_dict(), "g_running": generator.state_dict(), "miner": layers}
    torch.save(content | {"miner_semantic": {"transform_4.0.weight": torch.zeros(16, 16)}}, tmp_path / "000200.model")
    with pytest.warns(UserWarning, match="never reached"):
        mined = open_result(tmp_path / "000200.model")
    u = torch.randn(2, 6)
    assert torch.equal(mined(u, noise="none"), generator(mined.miner(u), noise="none"))
    assert mined.constant is None


def test_an_original_run_of_biggan_is_sampled(tmp_path):
    generator = BigGANGenerator(32, 16, class_dim=16, num_classes=3, channel_width=2, attention=[16]).eval()
    torch.save(generator.state_dict(), tmp_path / "G.pth")
    layers = mlp(16, "linear", *(f"linear{i}" for i in range(2, 9)))
    layers |= {f"{name.removesuffix('.weight')}.u0": torch.randn(1, 16) for name in layers if name.endswith("weight")}
    torch.save(layers, tmp_path / "M.pth")
    mined = open_result(tmp_path)
    u = torch.randn(3, 16)
    assert torch.equal(mined(u), generator(mined.miner(u), mined.class_miner(u)))
    assert mined.class_miner.output_dim == 16
    for path in (tmp_path / "G.pth", tmp_path):
        assert torch.equal(open_result(path, miner=tmp_path / "M.pth")(u), mined(u))


def test_any_checkpoint_with_a_miner_of_its_own(tiny, tmp_path):
    miner = mf.Miner(8)
    torch.nn.init.normal_(miner.layers[-1].bias)
    mf.mining.save_miner(tmp_path / "miner.safetensors", miner)
    mined = open_result(tiny["source"], miner=tmp_path / "miner.safetensors")
    u = torch.randn(2, 8)
    assert torch.equal(mined(u, noise="none"), tiny["generator"](miner(u), noise="none"))


def evaluated(path, images, source=None, miner=None):
    return evaluate_result(path, "last", None, source, miner, images, samples=6, features=None, seed=0)


@pytest.mark.filterwarnings("ignore:.*were enlarged")
def test_an_evaluation_reads_every_file_once(run_settings, tiny, tmp_path, reads, stylegan2_run):
    """A run by the critic of its source's file, one by a critic of its own, their deltas, and an original run."""
    both, images = tmp_path / "both.safetensors", tiny["images"]
    mf.save_model(both, tiny["generator"], tiny["discriminator"])
    short = {"mining_steps": 0, "finetune_steps": 1}
    mf.transfer(**{**run_settings, **short, "source": both, "critic": None, "loss": "hinge", "out": tmp_path / "own"})
    mf.transfer(**{**run_settings, **short, "out": tmp_path / "given"})
    for run, source, judges in (("own", both, both), ("given", tiny["source"], tiny["critic"])):
        last = tmp_path / run / "last"
        reads.clear()
        assert evaluated(tmp_path / run, images)["features"] == "critic (which trained it)"
        assert reads == {last / "generator.safetensors": 1, last / "miner.safetensors": 1, judges: 1}
        reads.clear()
        evaluated(last / "delta.safetensors", images, source)
        assert reads == {last / "miner.safetensors": 1, source: 1}
    reads.clear()
    save_folder(tmp_path / "rgb", torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8))
    evaluated(stylegan2_run[0], tmp_path / "rgb")
    assert reads == {stylegan2_run[0]: 1}


def test_a_folder_of_a_biggan_without_a_miner_gives_its_own_images(tmp_path):
    generator = BigGANGenerator(32, 16, class_dim=16, num_classes=3, channel_width=2, attention=[16]).eval()
    torch.save(generator.state_dict(), tmp_path / "G_ema.pth")
    u = torch.randn(3, 16)
    for path in (tmp_path, tmp_path / "G_ema.pth"):
        assert torch.equal(open_result(path, labels=[2])(u), generator(u, torch.tensor([2, 2, 2])))


def test_a_miner_that_is_none_or_does_not_fit_says_so(tiny, tmp_path, stylegan2_run):
    with pytest.raises(ValueError, match=r"source.safetensors holds no miner.*--miner"):
        open_result(tiny["source"], miner=tiny["source"])
    torch.save(
        {"g_ema": tiny["generator"].state_dict(), "miner": {"transform.0.weight": torch.eye(8)}}, tmp_path / "cut.pt"
    )
    with pytest.raises(ValueError, match=r"cut\.pt holds a miner of the original MineGAN that"):
        open_result(tmp_path / "cut.pt")
    with pytest.raises(ValueError, match=r"does not fit the generator: the miner gives 6 .* z of 8.*--miner"):
        open_result(tiny["source"], miner=stylegan2_run[0])
