"""Runs on a generator that a user wrote: what is checked of it before anything is written, and the way back to it."""

import pytest
import torch
from torch import nn

import minegan_fast as mf
from minegan_fast.training import recipe
from minegan_fast.training.results import open_result

RUN = {
    "mining_steps": 2, "finetune_steps": 2, "snapshot_every": 2, "batch": 4, "eval_samples": 8, "score_samples": 4,
    "loss": "nonsaturating", "features": "pixels", "progress": False, "critic_warmup": 0,
}  # fmt: skip


class Own(nn.Module):
    """z [B, 8] -> images [B, 3, 16, 16]."""

    latent_dim, resolution = 8, 16

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(8, 256), nn.Unflatten(1, (16, 4, 4)), nn.BatchNorm2d(16), nn.Upsample(scale_factor=4),
            nn.Conv2d(16, 3, 3, padding=1), nn.Tanh(),
        )  # fmt: skip

    def forward(self, z):
        return self.layers(z)


class OtherSize(Own):
    resolution = 32


class OtherLatents(Own):
    latent_dim = 12


class Tutorial(Own):
    def forward(self, z):
        return super().forward(z[:, :, 0, 0])


class Features(Own):
    def forward(self, z):
        return {"images": super().forward(z)}


class FromZero(Own):
    def forward(self, z):
        return super().forward(z) / 2 + 0.5


def target(count=40, size=16):
    return torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (OtherSize, r"source OtherSize makes \[2, 3, 16, 16\], not \[2, 3, 32, 32\]"),
        (OtherLatents, r"source OtherLatents does not run on z \[2, 12\] .*: latent_dim must be the size of its z"),
        (Tutorial, r"source Tutorial does not run on z \[2, 8\] .*wants \[B, latent_dim, 1, 1\], wrap it"),
        (Features, r"source Features makes dict, not \[2, 3, 16, 16\]"),
    ],
)
def test_what_is_no_generator_is_named_before_anything_is_written(kind, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        mf.transfer(kind(), target(size=kind.resolution), tmp_path / "run", **RUN)
    assert not (tmp_path / "run").exists()


def test_another_range_is_said(tmp_path, capsys):
    with pytest.warns(UserWarning, match="no pixel is below 0"):
        mf.transfer(FromZero(), target(), tmp_path / "run", **{**RUN, "progress": True})
    assert "the images of the source FromZero go from 0." in capsys.readouterr().err


def test_the_check_moves_no_random_state(tmp_path):
    generator, before = Own(), torch.get_rng_state()
    mf.transfer(generator, target(), tmp_path / "run", **RUN)
    assert torch.equal(before, torch.get_rng_state())


def test_a_run_leads_back_to_what_it_made(tmp_path):
    torch.manual_seed(0)
    result = mf.transfer(Own(), target(), tmp_path / "run", **RUN)
    mine = Own()
    weights = {name: tensor.clone() for name, tensor in mine.state_dict().items()}
    again = mf.load_mined(tmp_path / "run", mine)
    shown = [m.sample(4, generator=torch.Generator().manual_seed(1)) for m in (result.mined, again)]
    assert torch.equal(*shown)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in mine.state_dict().items())
    with pytest.raises(ValueError, match=r"was made with another generator: .*Missing key"):
        mf.load_mined(tmp_path / "run", nn.Linear(8, 8))
    with pytest.raises(ValueError, match=r"is a module of yours: name the function .*load_mined\("):
        open_result(tmp_path / "run")
    assert "history" not in repr(result)
    assert "Conv2d" not in repr(result)


def test_a_known_network_given_as_a_module_leads_back_too(tiny, run_settings, tmp_path):
    network = mf.load_generator(tiny["source"])
    result = mf.transfer(**{**run_settings, "source": network, "out": tmp_path / "run"})
    for again in (mf.load_mined(tmp_path / "run", network), open_result(tmp_path / "run")):
        shown = [m.sample(2, generator=torch.Generator().manual_seed(1)) for m in (result.mined, again)]
        assert torch.equal(*shown)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"densty": 0.1}, TypeError, "no settings of the name 'densty': did you mean density"),
        ({"xyz": 0.1}, TypeError, "no settings of the name 'xyz': there are source, images"),
        ({"patience": 2}, ValueError, "of 40 images none are"),
        (
            {"features": nn.Sequential(nn.Flatten(), nn.Linear(3072, 4))}, ValueError,
            r"features Sequential do not take images \[3, 16, 16\] .*FeatureExtractor\(network, resolution",
        ),
    ],
)  # fmt: skip
def test_other_mistakes_are_named(settings, error, message, tmp_path):
    with pytest.raises(error, match=message):
        mf.transfer(Own(), target(), tmp_path / "run", **{**RUN, **settings})
    assert not (tmp_path / "run").exists()


def test_a_state_dict_is_no_source(tmp_path):
    with pytest.raises(TypeError, match="the source is a dictionary, a state dict perhaps: build its network"):
        mf.transfer(Own().state_dict(), target(), tmp_path / "run", **RUN)
    with pytest.raises(TypeError, match="did you mean finetune_steps"):
        recipe.configure(source=None, finetune_step=3)
