"""Fixtures for whole runs: networks so small that one takes a second."""

import pytest
import torch

from minegan_fast.models import StyleGAN2Discriminator, StyleGAN2Generator, save_model
from minegan_fast.training import transfer
from minegan_fast.training.images import save_folder
from minegan_fast.training.trainer import Trainer

SIZES = {"resolution": 8, "channel_base": 64, "channel_max": 8, "image_channels": 1}
RUN = {
    "mining_steps": 4,
    "finetune_steps": 4,
    "batch": 4,
    "snapshot_every": 2,
    "eval_samples": 16,
    "grid": 4,
    "log_every": 1,
    "score_samples": 4,
    "augment": "translation",
    "held_out": 0.25,
    "progress": False,
    "report": False,
}


def cut_off(monkeypatch, settings: dict):
    """The result of a run that was interrupted in its step 6, then resumed."""
    step = Trainer.step

    def failing(self, number):
        if number == 6:
            raise KeyboardInterrupt
        return step(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", failing)
        with pytest.raises(KeyboardInterrupt):
            transfer(**settings)
    return transfer(**settings | {"resume": True})


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """{"source": path, "critic": path, "images": folder of 24, "generator", "discriminator"}."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    generator = StyleGAN2Generator(latent_dim=8, mapping_layers=2, **SIZES).eval()
    discriminator = StyleGAN2Discriminator(**SIZES).eval()
    save_model(folder / "source.safetensors", generator)
    save_model(folder / "critic.safetensors", discriminator)
    images = torch.randint(0, 256, (24, 1, 8, 8), dtype=torch.uint8)
    save_folder(folder / "images", images)
    return {
        "source": folder / "source.safetensors",
        "critic": folder / "critic.safetensors",
        "images": folder / "images",
        "generator": generator,
        "discriminator": discriminator,
    }


@pytest.fixture
def run_settings(tiny, tmp_path):
    """Arguments of a tiny `transfer`."""
    paths = {name: str(tiny[name]) for name in ("source", "critic", "images")}
    return {**RUN, **paths, "out": tmp_path / "run"}
