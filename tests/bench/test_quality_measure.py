"""What bench/quality.py measures: KID and its interval, distances in those of real images, the class that was found."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import quality_measure
import quality_networks as networks
import quality_pictures
import quality_settings

import minegan_fast as mf
from minegan_fast.mining import Mined, Miner


def test_kid_is_that_of_all_rows():
    x, y = torch.randn(40, 6), torch.randn(40, 6) + 0.5
    assert quality_measure.kid(x, y)[0] == pytest.approx(mf.metrics.kid(x, y, subset_size=40)[0], rel=1e-5)


def test_its_interval_is_the_jackknifes():
    x, y = torch.randn(12, 4).double(), torch.randn(15, 4).double() + 0.3

    def metric(a, b):
        return mf.mmd2(a, b, "polynomial")

    expected = mf.metrics.bootstrap(metric, x, y, method="jackknife")
    assert quality_measure.kid(x, y)[1:] == pytest.approx(expected, rel=1e-6)


def test_real_images_measure_as_real():
    real, other, train = torch.randn(3, 120, 8).unbind()
    values = quality_measure.measure(other, train, train[:10], real)
    assert values["diversity"] == pytest.approx(1, abs=0.1)
    assert values["nearest"] == pytest.approx(1, abs=0.1)
    assert values["precision"] > 0.5
    copies = quality_measure.measure(train, train, train[:10], real)
    assert copies["nearest"] == 0
    assert copies["kid_train"] < copies["kid"]


@pytest.mark.parametrize("label", [0, 2])
def test_a_class_miner_finds_its_class_or_not(label):
    class Conditional(torch.nn.Module):
        latent_dim, num_classes, class_dim = 4, 3, 3

    miner = Miner(4, output_dim=3, affine=True)
    miner.match(torch.eye(3)[2:])
    found = quality_measure.found_class(Mined(Conditional(), Miner(4), miner), label)
    assert found == {"label": label, "found": label == 2, "share": float(label == 2)}


def test_a_turned_hue_keeps_grey_and_brightness():
    images = torch.randint(60, 190, (2, 3, 4, 4), dtype=torch.uint8)
    turned = quality_settings.turned(images)
    assert (turned.float().mean(1) - images.float().mean(1)).abs().max() < 1
    grey = torch.full((1, 3, 2, 2), 77, dtype=torch.uint8)
    assert torch.equal(quality_settings.turned(grey), grey)
    red = torch.tensor([200, 20, 20], dtype=torch.uint8).view(1, 3, 1, 1)
    assert torch.equal(quality_settings.turned(red), red.roll(1, 1))


def test_a_strip_comes_back(tmp_path):
    for channels in (1, 3):
        images = torch.randint(0, 256, (5, channels, 8, 8), dtype=torch.uint8)
        quality_pictures.write_strip(tmp_path / "strip.png", images / 127.5 - 1)
        assert torch.equal(quality_pictures.read_strip(tmp_path / "strip.png"), images)
    assert quality_pictures.small(torch.zeros(1, 3, 128, 128, dtype=torch.uint8)).shape == (1, 3, 64, 64)


def test_a_digit_judge_is_trained_once(monkeypatch, tmp_path):
    monkeypatch.setattr(networks, "JUDGE_STEPS", 3)
    images, labels = torch.randint(0, 256, (64, 1, 32, 32), dtype=torch.uint8), torch.arange(64) % 10
    first = networks.digit_judge(tmp_path / "judge.safetensors", images, labels)
    again = networks.digit_judge(tmp_path / "judge.safetensors", images[:0], labels[:0])
    x = torch.randn(4, 1, 32, 32)
    assert torch.equal(first(x), again(x))
    assert first(images / 127.5 - 1).square().mean().sqrt() == pytest.approx(1, rel=1e-3)


def test_a_digit_judge_takes_negatives_for_the_same_or_tells_them(monkeypatch, tmp_path):
    monkeypatch.setattr(networks, "JUDGE_STEPS", 200)
    images = torch.zeros(64, 1, 32, 32, dtype=torch.uint8)
    for i in range(64):
        images[i, 0, 3 * (i % 10) : 3 * (i % 10) + 4] = 255
    x, apart = images / 127.5 - 1, []
    for negatives in (False, True):
        path = tmp_path / f"{negatives}.safetensors"
        networks.digit_judge(path, images, torch.arange(64) % 10, negatives)
        judge = networks.digit_judge(path, images[:0], torch.empty(0))
        apart.append((judge(x).mean(0) - judge(-x).mean(0)).norm() / judge(x).std(0).norm())
    assert apart[1] > 2 * apart[0]
