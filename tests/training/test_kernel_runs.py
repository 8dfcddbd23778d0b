"""Whole runs under the kernel distance: no critic, the same guarantees."""

import copy
import json

import pytest
import torch
from feature_networks import GreyFeatures
from tiny_run import cut_off
from torch import nn

import minegan_fast as mf
from minegan_fast.models import load_discriminator, save_model
from minegan_fast.training import TransferConfig, dry_run
from minegan_fast.training.folder import RunFolder
from minegan_fast.training.recipe import configure
from minegan_fast.training.results import evaluate_result

pytestmark = pytest.mark.filterwarnings("ignore:.*were enlarged")


@pytest.fixture
def kernel_run(run_settings):
    return {**run_settings, "critic": None, "loss_features": GreyFeatures(), "features": "pixels"}


def files(path):
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*.safetensors")}


def test_no_critic_is_built_kept_or_saved(kernel_run, monkeypatch):
    from minegan_fast.training import sources

    for name in ("new_critic", "load_discriminator"):
        monkeypatch.setattr(sources, name, lambda *_: pytest.fail("a critic was made"))
    result = mf.transfer(**kernel_run)
    assert {row["stage"] for row in result.history} == {"source", "mining", "finetuning"}
    assert all("loss_D" not in row for row in result.history)
    state = torch.load(RunFolder(kernel_run["out"]).newest(), weights_only=True)["trainer"]
    assert state["adversary"] is None
    assert result.mined.prior == "sphere+moments"
    rows = [row for row in result.history if "kid" in row]
    assert all(abs(row["latent_norm"] - 1) < 1e-3 for row in rows)
    assert all(row["judge"] == "pixels" for row in rows)


def test_the_loss_falls(kernel_run):
    """Towards images that are smooth, as the generator's are, and darker."""
    smooth = torch.rand(24, 1, 2, 2, generator=torch.Generator().manual_seed(0)) - 1
    kernel_run |= {"images": nn.functional.interpolate(smooth, 8, mode="bilinear"), "density": 1.0}
    history = mf.transfer(**{**kernel_run, "mining_steps": 30, "finetune_steps": 90, "lr": 1e-2}).history
    losses = [row["loss_G"] for row in history if "loss_G" in row]
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


@pytest.mark.parametrize("settings", [
    {"mining_loss": "mmd", "finetune_loss": "hinge"}, {"mining_loss": "nonsaturating", "finetune_loss": "mmd"},
    {"loss": "nonsaturating", "mmd_weight": 0.5}, {"precision": "bf16"}, {"precision": "fp16"}, {"part": 3},
    {"criterion": "agreement", "scope": "normalised"}, {"criterion": "contrast"}, {"criterion": "movement"},
    {"reselect_every": 2}, {"critic": "features", "loss": "hinge"}, {"prior": "moments"}, {"mine": "w"},
], ids=lambda s: "-".join(map(str, s.values())))  # fmt: skip
def test_every_variant_runs(kernel_run, settings):
    result = mf.transfer(**{**kernel_run, "snapshot_every": 8, "density": 0.3, **settings})
    losses = [row["loss_G"] for row in result.history if "loss_G" in row]
    assert losses
    assert all(loss == loss for loss in losses)
    assert result.history[-1]["step"] == 8


def test_a_batch_in_parts_is_the_whole_batch(kernel_run):
    runs = []
    for part in (None, 3):
        out = kernel_run["out"].with_name(f"part-{part}")
        # Views are drawn part by part, as a generator's noise is.
        small = {"part": part, "out": out, "batch": 8, "mining_steps": 3, "view_augment": "", "views": 1}
        # Of all parameters some have next to no gradient, whose rounding Adam's first steps make large.
        small["method"] = "minegan++"
        runs.append(mf.transfer(**{**kernel_run, **small}))
    whole, parts = ([row["loss_G"] for row in run.history if "loss_G" in row] for run in runs)
    assert whole == pytest.approx(parts, rel=1e-3)


def test_a_run_that_was_cut_off_ends_as_if_not(kernel_run, monkeypatch):
    whole = mf.transfer(**kernel_run)
    out = kernel_run["out"].with_name("cut")
    cut_off(monkeypatch, kernel_run | {"out": out})
    assert files(out) == files(whole.folder)


def test_a_source_with_a_critic_is_adapted_by_its_features(run_settings, tiny, tmp_path):
    both = tmp_path / "both.safetensors"
    save_model(both, tiny["generator"], tiny["discriminator"])
    settings = {k: v for k, v in run_settings.items() if k not in ("critic", "out", "progress")}
    config = configure(**{**settings, "source": str(both)})
    assert (config.loss, config.loss_features) == ("mmd", "critic")
    assert configure(**settings).loss == "nonsaturating", "the file holds no critic"
    assert configure(**{**settings, "source": str(both), "loss": "hinge"}).loss_features is None
    result = mf.transfer(**{**run_settings, "source": str(both), "critic": None})
    assert result.judge == "critic (which trained it)"
    report = evaluate_result(result.folder, "last", None, None, None, tiny["images"], 16, None, 0)
    assert report["features"] == "critic (which trained it)"
    assert any("flatter" in note for note in report["notes"])
    assert (
        evaluate_result(result.folder, "last", None, None, None, tiny["images"], 16, "pixels", 0)["features"]
        == "pixels"
    )


def test_the_judge_is_told_from_the_network_that_trained(kernel_run):
    network = kernel_run["loss_features"]
    short = {"mining_steps": 1, "finetune_steps": 0}
    judges = []
    for k, judge in enumerate((network, mf.metrics.FeatureExtractor(network), copy.deepcopy(network))):
        out = kernel_run["out"].with_name(str(k))
        judges.append(mf.transfer(**{**kernel_run, **short, "features": judge, "out": out}).judge)
    assert [judge.endswith("(which trained it)") for judge in judges] == [True, True, False]


def test_frozen_parameters_of_a_critic_stay_frozen(run_settings, tiny):
    critic = copy.deepcopy(tiny["discriminator"])
    critic.convs[0].requires_grad_(False)
    mf.transfer(**{**run_settings, "critic": critic})
    state = torch.load(RunFolder(run_settings["out"]).newest(), weights_only=True)["trainer"]["adversary"]["critic"]
    own = critic.state_dict()
    frozen = {name for name in own if name.startswith("convs.0.")}
    assert all(torch.equal(own[name], state[name]) for name in frozen)
    assert any(not torch.equal(own[name], state[name]) for name in own.keys() - frozen)


def test_collapse_and_leaving_the_prior_are_said(kernel_run, capsys):
    class Dead(nn.Module):
        latent_dim, resolution, image_channels = 8, 8, 1

        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 64)
            nn.init.normal_(self.layer.weight, std=1e-3)

        def forward(self, z):
            return self.layer(z).tanh().view(-1, 1, 8, 8)

    mf.transfer(**{**kernel_run, "source": Dead(), "prior": "none", "miner_lr": 0.3, "progress": True, "mine": "z"})
    said = capsys.readouterr().err
    assert "they collapse" in said
    assert "leave the prior" in said


def test_the_estimate_knows_the_kernel(run_settings, tiny, tmp_path):
    both = tmp_path / "both.safetensors"
    save_model(both, tiny["generator"], tiny["discriminator"])
    settings = {k: v for k, v in run_settings.items() if k not in ("critic", "out", "progress")}
    memory, mining, finetuning = dry_run(configure(**{**settings, "source": str(both), "batch": 64, "part": 8}))
    assert min(mining, finetuning) > 0
    whole = dry_run(configure(**{**settings, "source": str(both), "batch": 64}))[0]
    taken, whole_taken = (max(work.bytes(64) - work.fixed for work in found.work) for found in (memory, whole))
    assert taken < 0.3 * whole_taken


class Detached(GreyFeatures):
    def forward(self, x):
        return super().forward(x).detach()


@pytest.mark.parametrize(("settings", "message"), [
    ({"loss_features": None, "loss": "mmd"}, "needs pretrained features"),
    ({"loss_features": "critic"}, "needs pretrained features"),
    ({"loss_features": "nowhere.pt"}, "nowhere.pt"),
    ({"batch": 1}, "2 generated images"),
    ({"train_critic": "sparse"}, "no critic"),
    ({"images": -torch.ones(8, 1, 8, 8)}, "equal"),
    ({"images": torch.rand(1, 1, 8, 8) - 0.5}, "at least 2"),
], ids=lambda v: None if isinstance(v, str) else next(iter(v)))  # fmt: skip
def test_bad_input_is_named_and_leaves_nothing(kernel_run, settings, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        mf.transfer(**{**kernel_run, **settings})
    assert "\n" not in str(caught.value)
    assert not kernel_run["out"].exists()


def test_the_learning_rate_is_that_of_the_family(kernel_run, tmp_path):
    """Where none is given; the run's file has it, so that a resumed run compares equal."""
    from minegan_fast.models import StyleGAN2Generator
    from minegan_fast.training.config import load_config

    plain, given = TransferConfig(loss="mmd"), TransferConfig(loss="mmd", lr=3e-3)
    assert plain.lr is None
    assert (given.lr, given.miner_lr, given.generator_lr) == (3e-3, 3e-3, 1.5e-3)
    plain.fit(StyleGAN2Generator(8, latent_dim=4, mapping_layers=1, channel_base=32, channel_max=4))
    assert (plain.lr, plain.miner_lr, plain.generator_lr) == (1.6e-2, 4e-3, 8e-3)
    mf.transfer(**kernel_run)
    assert load_config(RunFolder(kernel_run["out"]).config)["lr"] > 0
    mf.transfer(**kernel_run, resume=True)
    assert TransferConfig(loss="mmd", finetune_loss="nonsaturating").lr == 2e-3


def test_settings_survive_their_file(kernel_run):
    mf.transfer(**kernel_run)
    written = json.loads((kernel_run["out"] / "config.json").read_text())
    assert written["loss"] == "mmd"
    assert TransferConfig(**written).to_dict() == written | {"metrics": tuple(written["metrics"])}


def test_a_critic_of_the_file_that_only_judges_is_not_trained(run_settings, tiny):
    settings = {**run_settings, "loss_features": GreyFeatures(), "mining_steps": 1, "finetune_steps": 1}
    result = mf.transfer(**settings)
    assert result.judge == "critic"
    load_discriminator(tiny["critic"])
