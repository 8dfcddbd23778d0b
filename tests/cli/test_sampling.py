"""`sample` and `interpolate`: a checkpoint's own images, seeds, truncation, noise, classes, frames."""

import json

import numpy as np
import pytest
import torch
from PIL import Image, features
from tiny_run import SIZES

from minegan_fast.cli.arguments import numbers
from minegan_fast.mining import Miner, save_miner
from minegan_fast.models import BigGANGenerator, StyleGAN2Generator, save_model


def pixels(path):
    with Image.open(path) as image:
        return np.array(image).astype(int)


def expected(images):
    return ((images.clamp(-1, 1) * 127.5) + 127.5).round().int().numpy()


def drawn(size, seed):
    return torch.randn(1, size, generator=torch.Generator().manual_seed(seed))


def test_a_checkpoint_shows_its_own_images(call, tiny, tmp_path):
    out = tmp_path / "s"
    code, said, err = call("sample", tiny["source"], "--out", out, "--seeds", "7,3-4", "--noise", "constant")
    assert code == 0, err
    assert "3 images" in said
    assert "holds no miner: these are the checkpoint's own images" in said
    names = ["00000-seed7.png", "00001-seed3.png", "00002-seed4.png", "grid.png"]
    assert sorted(path.name for path in out.iterdir()) == names
    with torch.no_grad():
        for name, seed in zip(names, (7, 3, 4), strict=False):
            image = tiny["generator"](drawn(8, seed), noise="constant")
            assert abs(pixels(out / name) - expected(image)[0, 0]).max() <= 1
    # A seed's image does not depend on the others, and --noise const is another word for it.
    assert call("sample", tiny["source"], "--out", tmp_path / "t", "--seeds", "4", "--noise", "const")[0] == 0
    assert (tmp_path / "t" / "00000-seed4.png").read_bytes() == (out / names[2]).read_bytes()


def test_a_miner_beside_a_checkpoint_is_still_taken(call, tiny, tmp_path):
    save_miner(tmp_path / "m.safetensors", Miner(8))
    arguments = ("--miner", tmp_path / "m.safetensors", "--out", tmp_path / "s", "-n", 2)
    code, said, err = call("sample", tiny["source"], *arguments)
    assert code == 0, err
    assert "holds no miner" not in said


def test_truncation_to_nothing_gives_one_image(call, tiny, tmp_path):
    code, said, err = call("sample", tiny["source"], "--out", tmp_path, "-n", 3, "--truncation", 0, "--noise", "none")
    assert code == 0, err
    assert "truncated towards the mean of its own w, over 10,000 draws" in said
    first, *others = (pixels(tmp_path / f"0000{i}.png") for i in range(3))
    assert all((first == other).all() for other in others)
    assert call("sample", tiny["source"], "--out", tmp_path / "u", "-n", 2, "--noise", "none")[0] == 0
    assert (pixels(tmp_path / "u" / "00000.png") != pixels(tmp_path / "u" / "00001.png")).any()


@pytest.fixture
def biggan(tmp_path):
    torch.manual_seed(0)
    generator = BigGANGenerator(32, class_dim=6, num_classes=5, channel_width=4, attention=()).eval()
    with torch.no_grad():
        generator.class_embeddings().mul_(9)
    save_model(tmp_path / "b.safetensors", generator)
    return generator, tmp_path / "b.safetensors"


def test_classes_of_a_biggan(call, biggan, tmp_path):
    generator, file = biggan
    code, _, err = call("sample", file, "--out", tmp_path / "s", "--seeds", "1", "--class", "3")
    assert code == 0, err
    with torch.no_grad():
        image = generator(drawn(generator.latent_dim, 1), torch.tensor([3]))
        other = generator(drawn(generator.latent_dim, 1), torch.tensor([2]))
    found = pixels(tmp_path / "s" / "00000-seed1.png").transpose(2, 0, 1)
    assert abs(found - expected(image)[0]).max() <= 1
    assert abs(found - expected(other)[0]).max() > 1
    options = ("--class", "3", "--seeds", "1-2", "--truncation")
    code, said, err = call("sample", file, "--out", tmp_path / "t", *options, "0")
    assert code == 0, err
    assert "z is drawn from a normal distribution cut off at 2, times 0" in said
    assert (pixels(tmp_path / "t" / "00000-seed1.png") == pixels(tmp_path / "t" / "00001-seed2.png")).all()
    for options, message in (
        (("--class", "5"), "labels are 0 to 4"),
        (("--truncation", "1.5"), "a BigGAN's z is truncated by 0 to 1, got 1.5"),
        (("--noise", "none"), "biggan has none: leave it out"),
    ):
        code, _, err = call("sample", file, "--out", tmp_path / "no", *options)
        assert (code, message in err) == (1, True), err
    assert not (tmp_path / "no").exists()


def test_classes_of_a_stylegan2(call, tmp_path):
    torch.manual_seed(0)
    generator = StyleGAN2Generator(latent_dim=8, num_classes=5, latent_avg=True, **SIZES).eval()
    save_model(tmp_path / "c.safetensors", generator)
    options = ("--class", "3", "--seeds", "1", "--truncation", "0.5", "--noise", "constant")
    code, said, err = call("sample", tmp_path / "c.safetensors", "--out", tmp_path / "s", *options)
    assert code == 0, err
    assert "towards the mean of w that the file holds" in said
    with torch.no_grad():
        image, other = (
            generator(drawn(8, 1), torch.tensor([label]), truncation=0.5, noise="constant") for label in (3, 2)
        )
    found = pixels(tmp_path / "s" / "00000-seed1.png")
    assert abs(found - expected(image)[0, 0]).max() <= 1
    assert abs(found - expected(other)[0, 0]).max() > 1


@pytest.mark.parametrize(("channels", "mode"), [(2, "LA"), (4, "RGBA"), (5, None)])
def test_images_of_other_channels_are_shown_or_refused_before_anything_is_written(call, tmp_path, channels, mode):
    save_model(
        tmp_path / "g.safetensors", StyleGAN2Generator(latent_dim=8, **SIZES | {"image_channels": channels}).eval()
    )
    code, _, err = call("sample", tmp_path / "g.safetensors", "--out", tmp_path / "s", "-n", 2)
    if mode is None:
        assert code == 1
        assert "5 channels, which no PNG shows" in err
        assert not (tmp_path / "s").exists()
        return
    assert code == 0, err
    with Image.open(tmp_path / "s" / "00000.png") as image, Image.open(tmp_path / "s" / "grid.png") as grid:
        assert (image.mode, grid.mode) == (mode, "RGB")


@pytest.mark.parametrize("kind", ["gif", "webp"])
def test_interpolate_writes_frames_and_an_animation(call, tiny, tmp_path, kind):
    if kind == "webp" and not features.check("webp"):
        pytest.skip("this Pillow has no WebP")
    out = tmp_path / "walk"
    options = ("--seeds", "1,4", "--frames", 3, "--format", kind, "--fps", 10, "--loop")
    code, said, err = call("interpolate", tiny["source"], "--out", out, *options)
    assert code == 0, err
    assert f"6 frames and animation.{kind}" in said
    with Image.open(out / f"animation.{kind}") as moving:
        assert (moving.n_frames, moving.size) == (6, (64, 64))  # small images are enlarged, as in a grid
        moving.seek(1)
        moving.load()
        assert moving.info["duration"] == 100
    assert len(list(out.glob("*.png"))) == 6
    assert call("sample", tiny["source"], "--out", tmp_path, "--seeds", "1,4", "--noise", "constant")[0] == 0
    for frame, image in (("00000", "00000-seed1"), ("00003", "00001-seed4")):
        assert abs(pixels(out / f"{frame}.png") - pixels(tmp_path / f"{image}.png")).max() <= 1


def test_interpolate_in_w_without_an_animation(call, tiny, tmp_path):
    options = ("--seeds", "1,4", "--frames", 2, "--space", "w", "--format", "none", "--truncation", 0.5)
    code, said, err = call("interpolate", tiny["source"], "--out", tmp_path / "w", *options)
    assert code == 0, err
    assert "3 frames in" in said
    assert sorted(path.name for path in (tmp_path / "w").iterdir()) == ["00000.png", "00001.png", "00002.png"]


def test_a_run_is_sampled_by_seeds_and_moved_through(call, transfer, run_settings, tmp_path):
    assert call(*transfer)[0] == 0
    run = run_settings["out"]
    code, said, err = call("sample", run, "--out", tmp_path / "s", "--seeds", "5,6", "--truncation", 0.8)
    assert code == 0, err
    assert "mean of the mined w" in said
    assert "holds no miner" not in said
    assert call("interpolate", run, "--out", tmp_path / "i", "--seeds", "5,6", "--frames", 2, "--space", "w")[0] == 0
    code, _, err = call("interpolate", run, "--out", tmp_path / "j", "--of", "faces")
    assert (code, "this one has one" in err) == (1, True)
    code, _, err = call("sample", run, "--out", tmp_path / "j", "--class", "1")
    assert (code, "for a checkpoint's own images" in err) == (1, True)


def test_a_checkpoint_of_its_own_is_evaluated_too(call, tiny, tmp_path):
    arguments = ("--images", tiny["images"], "--samples", 16, "--json", tmp_path / "m.json")
    code, _, err = call("evaluate", tiny["source"], *arguments)
    assert code == 0, err
    assert json.loads((tmp_path / "m.json").read_text())["features"] == "pixels"


@pytest.mark.parametrize(
    ("text", "found"),
    [("1", [1]), ("1,2,10-12", [1, 2, 10, 11, 12]), ("3-3, 0", [3, 0]), ("9223372036854775807", [2**63 - 1])],
)
def test_numbers_and_ranges(text, found):
    assert numbers(text, "--seeds") == found


@pytest.mark.parametrize("text", ["", "1,", "a", "-1", "5-3", "1-2-3", "1.5", "9223372036854775808", "1" * 4000, "²"])
def test_what_is_no_list_of_numbers(text):
    with pytest.raises(ValueError, match=r"^--seeds must be numbers and ranges such as 1,2,10-20"):
        numbers(text, "--seeds")


@pytest.mark.parametrize("text", ["0-100000", "0-9223372036854775806", ",".join(["0-60000"] * 2)])
def test_too_many_numbers(text):
    with pytest.raises(ValueError, match="more than 100,000 numbers"):
        numbers(text, "--seeds")
