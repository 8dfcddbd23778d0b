"""bench/small_sources.py: every family trains, goes on where it was stopped, and leaves files that load."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import minegan_fast as mf

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import small_sources

pytestmark = pytest.mark.filterwarnings("ignore:.*covariance is rank-deficient:UserWarning")
HOURS = 60.0  # no limit: what ends a training here is `steps`


@pytest.fixture(autouse=True)
def small(monkeypatch):
    widths = dict.fromkeys((4, 8, 16, 32), 8)
    channels = {"biggan": ([8] * 4, [8] * 4), "pgan": widths, "stylegan": widths}
    small = {"BATCH": 4, "SAMPLES": 20, "STATISTICS_BATCHES": 1, "CHANNELS": channels}
    for name, value in small.items():
        monkeypatch.setattr(small_sources, name, value)


@pytest.fixture
def archive(tmp_path):
    def write(shape=(160, 28, 28), **others):
        random = np.random.default_rng(0)
        arrays = {"train_images": random.integers(0, 256, shape, np.uint8), "train_labels": np.arange(shape[0]) % 4}
        np.savez(tmp_path / "data.npz", **arrays | others)
        return str(tmp_path / "data.npz")

    return write


@pytest.mark.parametrize("family", small_sources.RECIPES)
def test_trains_and_loads_back(family, archive, tmp_path):
    out = tmp_path / "made" / f"{family}.safetensors"
    record = small_sources.train(family, archive(), out, HOURS, leave_out=3, steps=3)
    assert json.loads(out.with_suffix(".json").read_text()) == record
    assert record["steps"] == 3
    assert sum(record["classified"]) == 20
    assert np.isfinite([record["fid"], record["kid"]]).all()
    assert sorted(p.suffix for p in out.parent.iterdir()) == [".json", ".png", ".safetensors"]

    generator, critic = mf.load_generator(out), mf.load_discriminator(out)
    assert (generator.family, generator.resolution, generator.image_channels) == (family, 32, 1)
    assert generator.num_classes == (3 if family == "biggan" else 0)
    images, _ = small_sources.sample(generator, 8, seed=0)
    assert images.std() > 0
    assert critic(images).shape == (8,)
    with pytest.raises(FileExistsError, match="finished"):
        small_sources.train(family, archive(), out, HOURS, leave_out=3, steps=3)


@pytest.mark.parametrize("family", small_sources.RECIPES)
def test_a_killed_training_goes_on_bit_for_bit(family, archive, tmp_path, monkeypatch):
    monkeypatch.setattr(small_sources, "STATE_EVERY", 0.0)
    data = archive((160, 32, 32, 3))
    whole = small_sources.train(family, data, tmp_path / "whole.safetensors", HOURS, steps=4, leave_out=3)

    step = small_sources.Training.step

    def killed(self, progress):
        if self.steps == 3:
            raise KeyboardInterrupt
        return step(self, progress)

    cut = tmp_path / "cut.safetensors"
    monkeypatch.setattr(small_sources.Training, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        small_sources.train(family, data, cut, HOURS, steps=4, leave_out=3)
    assert mf.load_generator(cut).image_channels == 3
    monkeypatch.setattr(small_sources.Training, "step", step)
    with pytest.raises(ValueError, match="give these"):
        small_sources.train(family, data, cut, HOURS, steps=5, leave_out=3)
    record = small_sources.train(family, data, cut, HOURS, steps=4, leave_out=3)
    assert [losses["step"] for losses in record["curve"]] == [1, 2, 3, 4]
    assert record["curve"] == whole["curve"]
    assert cut.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_warmup_then_competition_and_falling_rates(archive):
    training = small_sources.Training("stylegan", *small_sources.read(archive(), 3)[0]["train"], seed=0)
    critic = {name: p.clone() for name, p in training.critic.named_parameters()}
    recipe = training.recipe
    assert training.step(recipe.warmup / 2).keys() == {"reconstruction"}
    assert all(torch.equal(p, critic[name]) for name, p in training.critic.named_parameters())
    rest, _, mapping = training.optimizers["warmup"].param_groups
    assert rest["lr"] == pytest.approx(recipe.warmup_lr * (1 + small_sources.LEAST_RATE) / 2)
    assert mapping["lr"] == pytest.approx(rest["lr"] * recipe.mapping_lr)
    assert {"generator", "critic"} < training.step(1.0).keys()
    reached = {name: p for name, p in training.critic.named_parameters() if p.grad is not None}
    assert len(reached) > len(critic) / 2  # what reads images of a lower resolution has no part
    assert not any(torch.equal(p, critic[name]) for name, p in reached.items())
    (group,) = training.optimizers["judging"].param_groups
    assert group["lr"] == pytest.approx(recipe.critic_lr * small_sources.LEAST_RATE)
    training.step(recipe.warmup)
    assert group["lr"] == pytest.approx(recipe.critic_lr)


def test_images_are_padded_and_one_class_is_left_out(archive):
    images = np.arange(160, dtype=np.uint8)[:, None, None] * np.ones((28, 27), np.uint8) + 1
    splits, labels = small_sources.read(archive(train_images=images), leave_out=1)
    assert labels.tolist() == [0, 2, 3]
    (train, classes), (test, _) = splits["train"], splits["test"]
    assert (len(train), len(test)) == (108, 12)
    assert train[:, 0, 16, 16].tolist()[:3] == [1, 3, 4]
    assert classes.tolist()[:3] == [0, 1, 2]
    inside = torch.zeros(32, 32, dtype=torch.bool)
    inside[2:30, 2:29] = True
    assert torch.equal(train[0, 0] > 0, inside)

    own = {"test_images": images[:8], "test_labels": np.arange(8) % 4}
    splits, _ = small_sources.read(archive(**own), leave_out=1)
    assert [len(images) for images, _ in splits.values()] == [120, 6]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"leave_out": 5}, "no image .* has the label 5"),
        ({"out": Path("source.pt")}, "out"),
        ({"minutes": 0.0}, "minutes"),
        ({"family": "vae"}, "biggan"),
        ({"data": {"shape": (60, 33, 32)}}, "at most 32 px"),
        ({"data": {"train_images": np.zeros((60, 28, 28))}}, "uint8"),
        ({"data": {"shape": (60, 28, 28, 4)}}, "N, H, W, 3"),
    ],
)
def test_bad_input(arguments, message, archive, tmp_path):
    settings = {"family": "pgan", "out": tmp_path / "out.safetensors", "minutes": HOURS, "leave_out": 3, "steps": 1}
    settings |= {"data": archive(**arguments.pop("data", {}))} | arguments
    with pytest.raises(ValueError, match=message):
        small_sources.train(**settings)
    assert [path.name for path in tmp_path.iterdir()] == ["data.npz"]


def test_command(archive, tmp_path, monkeypatch, capsys):
    data = archive()
    command = ["small_sources.py", "pgan", "--data", data, "--out", str(tmp_path / "g.safetensors"), "--steps", "1"]
    monkeypatch.setattr(sys, "argv", [*command, "--leave-out", "3"])
    small_sources.main()
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["steps"] == 1
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit):
        small_sources.main()
    assert "choose another --out" in capsys.readouterr().err
