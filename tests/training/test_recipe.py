import json
import warnings

import pytest
import torch
from safetensors.torch import load_file

import minegan_fast as mf
from minegan_fast.finetune import Selection
from minegan_fast.models import StyleGAN2Generator
from minegan_fast.training import TransferConfig, dry_run
from minegan_fast.training.folder import RunFolder
from minegan_fast.training.results import evaluate_result, open_result

pytestmark = pytest.mark.filterwarnings("ignore:.*were enlarged")


def test_two_stages_and_what_they_leave(run_settings, tiny):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    result = mf.transfer(**run_settings)
    assert torch.equal(torch.random.get_rng_state(), before), "the caller's random state was used up"

    folder = RunFolder(run_settings["out"])
    source = tiny["generator"].state_dict()
    mined = open_result(folder.path, "mined")
    mined_state = mined.generator.state_dict()
    assert all(torch.equal(source[k], v) for k, v in mined_state.items()), "stage 1 moved the generator"
    assert mined.miner.layers[-1].weight.abs().sum() > 0, "stage 1 did not move the miner"

    selection = Selection.load(folder.selection)
    last = open_result(folder.path, "last").generator.state_dict()
    changed = {name for name in source if not torch.equal(source[name], last[name])}
    assert changed, "stage 2 moved nothing"
    for name in changed & selection.rows.keys():
        axis = 1 if source[name].ndim == 5 or name == "input.input" else 0
        frozen = torch.ones(source[name].shape[axis], dtype=torch.bool)
        frozen[selection.rows[name]] = False
        kept = frozen.nonzero().flatten()
        assert torch.equal(*(state[name].index_select(axis, kept) for state in (source, last)))

    steps = [row["step"] for row in result.history if "kid" in row]
    assert steps == [0, 2, 4, 6, 8]
    stages = [row["stage"] for row in result.history if "kid" in row]
    assert stages == ["source", "mining", "mining", "finetuning", "finetuning"]
    best = min((row for row in result.history if "kid" in row), key=lambda row: row["kid"])
    assert result.step == best["step"]
    assert result.metrics["kid"] == best["kid"]
    assert torch.equal(result.sample(3, seed=1), result.sample(3, seed=1))
    assert result.sample(3).shape == (3, 1, 8, 8)
    for name in ("losses.png", "samples/000000.png", "samples/000008.png", "config.json", "best/miner.safetensors"):
        assert (folder.path / name).stat().st_size > 0
    assert [p.name for p in sorted(folder.snapshots.iterdir())] == ["000006.pt", "000008.pt"]


def test_delta_over_the_source_gives_the_last_generator(run_settings):
    mf.transfer(**run_settings)
    folder = RunFolder(run_settings["out"])
    whole = open_result(folder.path, "last")
    delta = open_result(folder.last / "delta.safetensors", source=run_settings["source"])
    u = torch.randn(3, 8)
    assert torch.equal(*(m(u, noise="constant") for m in (whole, delta)))
    with pytest.raises(ValueError, match="--source"):
        open_result(folder.last / "delta.safetensors")
    with pytest.raises(ValueError, match="best, last, mined"):
        open_result(folder.path, "first")


@pytest.mark.parametrize(
    "settings",
    [
        {"loss": "wgan"},
        {"loss": "hinge", "r1_every": 1},
        {"train_critic": "sparse"},
        {"criterion": "movement", "scope": "layer"},
        {"criterion": "random", "budget": "parameters", "density": 0.3},
        {"mining_steps": 0},
        {"finetune_steps": 0},
        {"precision": "bf16"},
        {"precision": "fp16"},
        {"path_length_weight": 0.0, "augment": ""},
    ],
    ids=lambda s: next(iter(s.values())),
)
def test_every_variant_runs(run_settings, settings):
    result = mf.transfer(**{**run_settings, "snapshot_every": 8, **settings})
    losses = [row["loss_G"] for row in result.history if "loss_G" in row]
    assert len(losses) == result.history[-1]["step"]
    assert all(loss == loss for loss in losses)


def test_modules_tensors_and_sources_without_a_critic(run_settings, tiny):
    """A module source is copied, a tensor is a data set, and a file without discriminator gets a new critic."""
    before = {k: v.clone() for k, v in tiny["generator"].state_dict().items()}
    run_settings |= {"source": tiny["generator"], "critic": None, "images": torch.rand(6, 1, 8, 8) * 2 - 1}
    result = mf.transfer(**run_settings)
    assert all(torch.equal(before[k], v) for k, v in tiny["generator"].state_dict().items())
    assert result.step == 8, "with nothing held out the last snapshot is taken"


def test_any_generator_module(run_settings):
    class Plain(torch.nn.Module):
        latent_dim, resolution, image_channels = 4, 8, 1

        def __init__(self):
            super().__init__()
            self.layers = torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.Tanh())

        def forward(self, z):
            return self.layers(z).view(-1, 1, 8, 8)

    class Critic(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.score = torch.nn.Linear(64, 1)

        def forward(self, x):
            return self.score(x.flatten(1))[:, 0]

    result = mf.transfer(**{**run_settings, "source": Plain(), "critic": Critic(), "density": 0.5})
    assert isinstance(result.generator, Plain)
    fresh = {**run_settings, "source": Plain(), "critic": None, "out": run_settings["out"].with_name("b")}
    assert isinstance(mf.transfer(**fresh).generator, Plain), "a new critic was to judge it"
    with pytest.raises(ValueError, match="return_latents"):
        mf.transfer(**{**run_settings, "source": Plain(), "critic": Critic(), "path_length_weight": 1.0,
                       "out": run_settings["out"].with_name("c")})  # fmt: skip


def test_few_images_are_all_trained_on(run_settings):
    """A KID against two images would choose the best snapshot by chance."""
    assert mf.transfer(**{**run_settings, "held_out": 0.1}).step == 8


def test_config_is_given_back(run_settings):
    mf.transfer(**run_settings)
    written = json.loads((run_settings["out"] / "config.json").read_text())
    assert TransferConfig(**written).to_dict() == TransferConfig(**written, **{}).to_dict()
    again = mf.transfer(**{**written, "out": run_settings["out"].with_name("again"), "progress": False})
    one, two = (load_file(p / "last" / "generator.safetensors") for p in (run_settings["out"], again.folder))
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_dry_run_estimates_and_writes_nothing(run_settings, tmp_path):
    settings = {k: v for k, v in run_settings.items() if k not in ("out", "progress")}
    memory, mining, finetuning = dry_run(TransferConfig(**settings))
    assert mining > 0
    assert finetuning > 0
    assert 0 < memory.needed(4) < memory.available
    assert not run_settings["out"].exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "transfergan", "mining_steps": None},
        {"mining_steps": 0, "mining_loss": "mmd", "finetune_loss": "hinge"},
        {"method": "mined", "finetune_steps": None},
    ],
    ids=str,
)
def test_dry_run_of_one_stage(run_settings, settings):
    settings = {k: v for k, v in run_settings.items() if k not in ("out", "progress")} | settings
    _, mining, finetuning = dry_run(TransferConfig(**settings))
    assert (mining > 0, finetuning > 0) == ((True, False) if settings.get("method") == "mined" else (False, True))


def test_evaluate(run_settings, tiny):
    mf.transfer(**run_settings)
    report = evaluate_result(
        run_settings["out"], "last", None, None, None, tiny["images"], samples=20, features=None, seed=0
    )
    assert report["features"] == "critic (which trained it)"
    assert (report["generated"], report["real"]) == (20, 24)
    assert set(report["metrics"]) == {"fid", "kid", "kmmd", "mv", "diversity"}
    assert all(value == value for value in report["metrics"].values())


def test_tensorboard_is_optional(run_settings, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mf.transfer(**{**run_settings, "finetune_steps": 0})
    assert any("pip install tensorboard" in str(w.message) for w in caught)


def test_larger_step_counts_go_on_from_a_finished_run(run_settings):
    mf.transfer(**run_settings)
    result = mf.transfer(**{**run_settings, "finetune_steps": 6, "resume": True})
    assert result.history[-1]["step"] == 10


def test_generator_classes_are_kept(run_settings):
    assert isinstance(mf.transfer(**{**run_settings, "finetune_steps": 0}).generator, StyleGAN2Generator)
