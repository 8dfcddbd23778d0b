"""Which networks a run gets from what the user names, and what is said of the choice."""

import copy
import re

import pytest
import torch
from nvidia_files import ada_of, critic_of, network_tree, tf_of, write_tf_pickle, write_torch_pickle
from tiny_conditional import Conditional, Critic
from tiny_run import RUN
from torch import nn

import minegan_fast as mf
from minegan_fast.models import StyleGAN2Discriminator, StyleGAN2Generator, convert
from minegan_fast.training import recipe, sources
from minegan_fast.training.config import TransferConfig
from minegan_fast.training.images import save_folder
from minegan_fast.training.results import evaluate_result
from minegan_fast.training.sources import open_networks, source_critic

SIZES = {"channel_base": 64, "channel_max": 8, "image_channels": 1}


def generator(**settings):
    return StyleGAN2Generator(8, 6, mapping_layers=2, **{**SIZES, **settings})


def test_the_sources_own_critic_is_taken(tmp_path):
    critic = StyleGAN2Discriminator(8, **SIZES)
    mf.save_model(tmp_path / "both.safetensors", generator(), critic)
    networks = open_networks(tmp_path / "both.safetensors", None, TransferConfig())
    assert all(torch.equal(*pair) for pair in zip(networks.critic.parameters(), critic.parameters(), strict=True))
    assert (networks.pretrained, networks.notes) == (True, ())
    assert not networks.critic.training


def test_a_given_module_is_copied_with_what_is_frozen_in_it():
    critic = Critic()
    critic[0].requires_grad_(False)
    networks = open_networks(Conditional(), critic, TransferConfig())
    assert networks.critic is not critic
    assert [p.requires_grad for p in networks.critic.parameters()] == [p.requires_grad for p in critic.parameters()]
    assert critic.training
    assert not networks.critic.training


@pytest.mark.parametrize("given", [None, "missing.pt", "module"])
def test_no_critic_is_read_or_built_where_none_is_needed(tmp_path, monkeypatch, given):
    mf.save_model(tmp_path / "both.safetensors", generator(), StyleGAN2Discriminator(8, **SIZES))
    for name in ("load_discriminator", "has_discriminator", "new_critic"):
        monkeypatch.setattr(sources, name, lambda *_: pytest.fail("a critic was looked for"))
    critic = Critic() if given == "module" else given
    networks = open_networks(tmp_path / "both.safetensors", critic, TransferConfig(), needed=False)
    assert (networks.critic, networks.pretrained, networks.notes) == (None, False, ())
    assert not networks.generator.training


def test_a_module_of_no_family_gets_a_new_critic():
    class Plain(nn.Module):
        latent_dim, resolution = 4, 12

    networks = open_networks(Plain(), None, TransferConfig(seed=3))
    assert (networks.critic.resolution, networks.critic.image_channels) == (12, 3)
    assert networks.pretrained is False
    assert networks.notes == ("the source is a module, without a discriminator",)


def unreadable(tmp_path):
    """NVIDIA's names for the critic's tensors, without what makes it a residual one."""
    shapes = {"b8.fromrgb.weight": (16, 3, 1, 1), "b8.conv0.weight": (16, 16, 3, 3), "b4.fc.weight": (16, 256)}
    critic = {name: torch.randn(shape) for name, shape in shapes.items()}
    return {"g_ema": generator().state_dict(), "D": critic}, "looks like a stylegan2 discriminator"


def of_no_layout(tmp_path):
    return {
        "g_ema": generator().state_dict(),
        "D": {"main.0.weight": torch.randn(4, 1, 4, 4)},
    }, "of a layout known here"


def of_another_size(tmp_path):
    critic = StyleGAN2Discriminator(16, **SIZES).state_dict()
    return {"g_ema": generator().state_dict(), "d": critic}, "generator and critic do not fit: resolution is 8 and 16"


def with_nan(tmp_path):
    critic = StyleGAN2Discriminator(8, **SIZES).state_dict()
    critic["final_linear.1.bias"].fill_(float("nan"))
    return {"g_ema": generator().state_dict(), "d": critic}, r"hold NaN or inf, in final_linear\.1\.bias"


@pytest.mark.parametrize("make", [unreadable, of_no_layout, of_another_size, with_nan])
def test_a_file_whose_critic_cannot_be_used_gets_a_new_one_and_a_note(tmp_path, make):
    content, reason = make(tmp_path)
    torch.save(content, tmp_path / "source.pt")
    networks = open_networks(tmp_path / "source.pt", None, TransferConfig())
    assert networks.pretrained is False
    assert isinstance(networks.critic, StyleGAN2Discriminator)
    assert networks.critic.resolution == 8
    (note,) = networks.notes
    assert re.search(reason, note)
    assert "\n" not in note
    critic, again = source_critic(tmp_path / "source.pt", networks.generator)
    assert (critic, again) == (None, note)


@pytest.mark.parametrize(
    ("make", "message"),
    [(unreadable, "looks like"), (of_another_size, "do not fit"), (with_nan, "the critic's weights hold NaN")],
)
def test_a_critic_that_was_asked_for_is_an_error_where_it_cannot_be_used(tmp_path, make, message):
    torch.save(make(tmp_path)[0], tmp_path / "critic.pt")
    with pytest.raises(ValueError, match=message):
        open_networks(generator(), tmp_path / "critic.pt", TransferConfig())


@pytest.fixture
def both(tmp_path):
    """A training file of generator and critic, and a critic's file beside it."""
    critic = StyleGAN2Discriminator(8, **SIZES)
    torch.save({"g_ema": generator().state_dict(), "d": critic.state_dict()}, tmp_path / "both.pt")
    mf.save_model(tmp_path / "critic.safetensors", critic)
    return tmp_path / "both.pt"


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"loss": "hinge"},
        {"loss": "hinge", "critic": "both.pt"},
        {"loss": "hinge", "critic": "critic.safetensors"},
        {"loss": "mmd", "loss_features": "critic"},
        {"loss": "mmd", "loss_features": "critic", "critic": "critic.safetensors"},
        {"critic": "features", "loss_features": "critic", "loss": "hinge"},
        {"critic": "critic.safetensors", "loss_features": "critic", "features": "pixels", "mining_loss": "mmd"},
    ],
    ids=str,
)
def test_a_run_reads_every_checkpoint_once_and_forgets_it(both, reads, monkeypatch, settings):
    files = {"both.pt"} | {name for name in ("critic.safetensors",) if name in settings.values()}
    monkeypatch.chdir(both.parent)  # the critic is named in another way than the source

    def execute(prepared, *_):
        assert not reads.in_memory
        return prepared

    monkeypatch.setattr(recipe, "execute", execute)
    images = torch.randint(0, 256, (8, 1, 8, 8), dtype=torch.uint8)
    prepared = mf.transfer(both, images, both.parent / "run", **settings)
    assert reads == {both.parent / name: 1 for name in files}
    assert (prepared.critic is not None) == prepared.config.adversarial


def test_an_estimate_reads_the_source_once(both, reads):
    checkpoints = sources.Checkpoints()
    images = both.parent / "images"
    save_folder(images, torch.randint(0, 256, (8, 1, 8, 8), dtype=torch.uint8))
    config = recipe.configure(checkpoints, source=both, images=images, batch=2, score_samples=2)
    assert config.loss == "mmd"
    recipe.dry_run(config, checkpoints)
    assert reads == {both: 1}


@pytest.mark.parametrize("channels", [2, 4])
def test_images_that_no_picture_holds_are_refused_before_anything_is_computed(tmp_path, channels):
    source = generator(image_channels=channels)
    images = torch.randint(0, 256, (8, channels, 8, 8), dtype=torch.uint8)
    with pytest.raises(ValueError, match=f"the source makes images of {channels} channels.*1 .grey. and 3 .RGB."):
        mf.transfer(source, images, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_the_callers_generator_keeps_its_mode():
    source = generator().train()
    before = copy.deepcopy(source.state_dict())
    networks = open_networks(source, None, TransferConfig())
    assert source.training
    assert not networks.generator.training
    assert all(torch.equal(before[k], v) for k, v in networks.generator.state_dict().items())


def unreadable(kind, path):
    """A file whose generator is read and whose critic is not."""
    torch.manual_seed(0)
    g, d = generator(), StyleGAN2Discriminator(8, **SIZES)
    if kind == "its labels are mapped":
        d = StyleGAN2Discriminator(8, num_classes=3, mapping_layers=1, **SIZES)
        tree = network_tree(tf_of(g.state_dict()))
        write_tf_pickle(path, tree, network_tree(critic_of(d.state_dict(), 8, True), ()), tree)
    elif kind == "a tensor is missing":
        tensors = critic_of(d.state_dict(), 8, False)
        del tensors["b4.conv.bias"]
        write_torch_pickle(path, G_ema=ada_of(g.state_dict()), D=tensors)
    else:
        torch.save({"g_ema": g.state_dict(), "D": {"b4.fc.weight": torch.zeros(2), "b8.skip.weight": 1.0}}, path)


WHY = {
    "its labels are mapped": "mapping_lrmul",
    "a tensor is missing": r"missing: final_conv\.1\.bias",
    "of another kind": "looks like a stylegan2 discriminator",
}


@pytest.mark.parametrize("kind", WHY)
def test_a_file_whose_critic_cannot_be_read_adapts_with_a_new_one_and_says_so(tmp_path, capfd, kind):
    file, images = tmp_path / "x.pkl", torch.randint(0, 256, (8, 1, 8, 8), dtype=torch.uint8)
    unreadable(kind, file)
    settings = {**RUN, "mining_steps": 1, "finetune_steps": 1, "held_out": 0.0, "loss": "nonsaturating"}
    result = mf.transfer(file, images, out=tmp_path / "run", **settings | {"progress": True})
    assert result.sample(2).shape == (2, 1, 8, 8)
    said = capfd.readouterr()
    assert re.search(f"the source's discriminator cannot be used: .*{WHY[kind]}", said.out + said.err)
    assert "a new critic is trained" in said.out + said.err
    save_folder(tmp_path / "images", images)
    found = evaluate_result(tmp_path / "run", "last", "cpu", None, None, tmp_path / "images", 4, None, 0)
    assert found["features"] == "pixels"
    with pytest.raises(ValueError, match=f"{WHY[kind]}.*--only generator"):
        convert(file, tmp_path / "x.safetensors")
    convert(file, tmp_path / "x.safetensors", only="generator")
