"""The whole recipe on the smallest network of every family, and on a conditional module of the user's own."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from tiny_conditional import Conditional, Critic
from tiny_run import RUN
from torch import nn

import minegan_fast as mf
from minegan_fast.finetune.neurons import compact
from minegan_fast.models import (
    BigGANDeepGenerator,
    BigGANDiscriminator,
    BigGANGenerator,
    PGANDiscriminator,
    PGANGenerator,
    StyleGAN2Discriminator,
    StyleGAN2Generator,
    StyleGANDiscriminator,
    StyleGANGenerator,
)
from minegan_fast.training.critics import freeze_lower_blocks, new_critic
from minegan_fast.training.folder import RunFolder
from minegan_fast.training.results import open_result

SETTINGS = {
    **RUN, "mining_steps": 2, "finetune_steps": 2, "density": 0.3, "snapshot_every": 100, "held_out": 0.0,
    "score_samples": 2, "r1_every": 1, "eval_samples": 4, "gradient_penalty_weight": 1.0, "path_length_every": 1,
}  # fmt: skip


def stylegan2():
    sizes = {"resolution": 8, "channel_base": 64, "channel_max": 8, "image_channels": 1}
    return StyleGAN2Generator(latent_dim=6, style_dim=7, mapping_layers=2, **sizes), StyleGAN2Discriminator(**sizes)


def stylegan2_conditional():
    sizes = {"resolution": 8, "channel_base": 64, "channel_max": 8, "image_channels": 1, "num_classes": 4}
    generator = StyleGAN2Generator(latent_dim=6, style_dim=7, class_dim=5, mapping_layers=2, **sizes)
    return generator, StyleGAN2Discriminator(mapping_layers=2, **sizes)


def stylegan2_residual():
    generator, critic = stylegan2()
    return StyleGAN2Generator(**{**generator.config, "architecture": "resnet"}), critic


def pgan():
    sizes = {"resolution": 8, "channel_base": 32, "channel_max": 4, "image_channels": 1}
    return PGANGenerator(latent_dim=6, **sizes), PGANDiscriminator(**sizes)


def biggan():
    sizes = {"resolution": 32, "num_classes": 4, "channel_width": 2, "attention": [16], "image_channels": 1}
    return BigGANGenerator(latent_dim=16, class_dim=5, **sizes), BigGANDiscriminator(**sizes)


def biggan_deep():
    generator = BigGANDeepGenerator(32, 4, 5, 4, channel_width=4, attention=[16], image_channels=1, steps=2)
    return generator, BigGANDiscriminator(32, 1, channel_width=4, attention=[16], image_channels=1)


def stylegan():
    sizes = {"resolution": 8, "channel_base": 64, "channel_max": 8, "image_channels": 1}
    return StyleGANGenerator(latent_dim=6, style_dim=7, mapping_layers=2, **sizes), StyleGANDiscriminator(**sizes)


# {name: (make networks, settings of the run)}
FAMILIES = {
    "biggan": (biggan, {"train_critic": "sparse"}),
    "biggan_deep": (biggan_deep, {"mined_class": "1,2", "loss": "hinge"}),
    "pgan": (pgan, {"train_critic": "freezed", "freeze_blocks": 1}),
    "stylegan": (stylegan, {"mine": "w", "mine_constant": True}),
    "a user's": (lambda: (Conditional(), Critic()), {}),
    "stylegan2 in z": (stylegan2, {}),
    "stylegan2 residual": (stylegan2_residual, {"mine_constant": True, "loss": "wgan"}),
    "stylegan2 conditional": (stylegan2_conditional, {"train_critic": "sparse"}),
    "stylegan2 conditional in w": (stylegan2_conditional, {"mine": "w", "mined_class": "2"}),
    "stylegan2 in w": (stylegan2, {"mine": "w", "mine_constant": True}),
}


@pytest.fixture(scope="module", autouse=True)
def no_pictures():
    """They take longer than the networks, and are looked at elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("loss_curves", "save_grid"):
            patch.setattr(f"minegan_fast.training.run.{name}", lambda *_: None)
        yield


@pytest.fixture(scope="module", params=FAMILIES)
def run(request, tmp_path_factory):
    """{"folder", "result", "source", "settings"} of a run of four steps in one go."""
    make, settings = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp("family")
    torch.manual_seed(0)
    generator, critic = make()
    if hasattr(generator, "family"):
        mf.save_model(folder / "source.safetensors", generator, critic)
        source = {"source": folder / "source.safetensors"}
    else:
        source = {"source": generator, "critic": critic}
    channels, size = generator.image_channels, generator.resolution
    images = torch.randint(0, 256, (8, channels, size, size), dtype=torch.uint8)
    settings = {**SETTINGS, **settings, **source, "images": images}
    result = mf.transfer(**settings, out=folder / "run")
    return {
        "folder": folder, "result": result, "source": generator.eval(), "critic": critic, "settings": settings
    }  # fmt: skip


def states(path) -> dict[str, torch.Tensor]:

    return {
        f"{name}.{k}": v for name in ("generator", "miner") for k, v in load_file(path / f"{name}.safetensors").items()
    }


def test_stage_one_moves_every_miner_and_leaves_the_generator_alone(run):
    state = states(RunFolder(run["folder"] / "run").mined)
    for name, tensor in run["source"].state_dict().items():
        stored = state.get(f"generator.generator.{name}", state.get(f"generator.{name}"))
        assert torch.equal(stored, tensor), name
    last = [v for k, v in state.items() if k.startswith("miner.") and k.endswith("layers.2.weight")]
    classes = getattr(run["source"], "num_classes", 0)
    assert len(last) == (2 if classes else 1)
    assert all(weight.abs().sum() > 0 for weight in last)
    if classes:
        assert run["result"].mined.class_miner.output_dim == run["source"].class_dim
    if run["settings"].get("mine_constant"):
        assert not torch.equal(state["miner.constant"], run["source"].learned_constant)


def test_stage_two_moves_parameters_but_no_buffers(run):
    before, after = run["source"], run["result"].generator
    moved = [
        n for (n, a), b in zip(before.named_parameters(), after.parameters(), strict=True) if not torch.equal(a, b)
    ]
    assert moved
    for (name, a), b in zip(before.named_buffers(), after.buffers(), strict=True):
        assert torch.equal(a, b), f"{name}: batch-norm statistics and spectral-norm vectors stay the source's"


def test_resumed_it_ends_on_the_same_bits(run):
    out = run["folder"] / "resumed"
    for steps in (1, 2):
        mf.transfer(**{**run["settings"], "finetune_steps": steps}, out=out, resume=True)
    whole, resumed = (states(folder / "last") for folder in (run["folder"] / "run", out))
    assert whole.keys() == resumed.keys()
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []


def test_sampled_from_its_files_and_as_a_delta(run):
    images = run["result"].sample(3, seed=1)
    assert images.shape == (3, run["source"].image_channels, run["source"].resolution, run["source"].resolution)
    assert images.isfinite().all()
    if not hasattr(run["source"], "family"):
        return
    whole = open_result(run["folder"] / "run", "last")
    delta = open_result(run["folder"] / "run" / "last" / "delta.safetensors", source=run["settings"]["source"])
    a, b = (mined.sample(2, torch.Generator().manual_seed(0)) for mined in (whole, delta))
    assert torch.equal(a, b)
    assert torch.equal(images, mf.training.results.generate(whole, 3, 1))


def test_sparse_gradients_are_rows_of_the_dense_ones(run):
    """Of the loss through critic, generator and miners, as in a step of stage 2."""
    mined = run["result"].mined.before(copy.deepcopy(run["source"])).double()
    critic = run["critic"].double().eval().requires_grad_(False)
    generator, u = mined.generator.requires_grad_(True), torch.randn(2, mined.input_dim, dtype=torch.float64)

    def gradients():
        torch.manual_seed(0)  # of the noise
        generator.zero_grad()
        nn.functional.softplus(-critic(mined(u))).mean().backward()

    gradients()
    dense = {name: p.grad.clone() for name, p in generator.named_parameters() if p.grad is not None}
    ft = mf.SparseFinetuner(generator, criterion="random", density=0.3)
    ft.select()
    gradients()
    checked = 0
    for layer in ft.layers:
        for member in layer.members:
            link = getattr(member.parameter, "link", None)
            if member.name in dense and link is not None and link.leaf is not None:
                expected = compact(dense[member.name], link.axis, link.rows)
                torch.testing.assert_close(link.leaf.grad, expected, rtol=1e-9, atol=1e-12, msg=member.name)
                checked += bool(expected.any())
    assert checked > 3
    rows = ft.summary().splitlines()
    assert all(any(layer in row for row in rows) for layer in ft.selection.rows)


@pytest.mark.parametrize("make", [biggan, biggan_deep, pgan, stylegan, stylegan2])
def test_a_source_without_a_critic_gets_one_of_its_sizes(make):
    generator, pretrained = make()
    critic = new_critic(generator, seed=0)
    assert type(critic) is type(pretrained)
    assert {p.shape for n, p in critic.named_parameters() if "embed" not in n} == {
        p.shape for n, p in pretrained.named_parameters() if "embed" not in n
    }
    again = new_critic(generator, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(critic.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("make", [biggan, pgan, stylegan, stylegan2])
def test_freezed_freezes_what_sees_the_image(make):
    """One block: no gradient of the first layer that reads the image, but of what stands behind it."""
    critic = make()[1]
    freeze_lower_blocks(critic, 1)
    x = torch.randn(2, critic.image_channels, critic.resolution, critic.resolution)
    critic(x).sum().backward()
    reading = [p for p in critic.parameters() if p.ndim == 4 and p.shape[1] == 1]
    assert reading
    assert not any(p.requires_grad for p in reading if p.shape[2] == reading[0].shape[2])
    assert any(p.grad is not None for p in critic.parameters())
    frozen = [p for p in critic.parameters() if not p.requires_grad]
    freeze_lower_blocks(critic, 2)
    assert sum(not p.requires_grad for p in critic.parameters()) > len(frozen)
