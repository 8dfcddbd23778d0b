"""BigGAN against its equations and its public key lists."""

import biggan_equations as plain
import pytest
import torch
from torch.nn import functional as F

from minegan_fast.models import BigGANDiscriminator, BigGANGenerator
from minegan_fast.models.layouts.biggan import LAYOUTS

GENERATOR, CRITIC = LAYOUTS
TINY = {"resolution": 32, "num_classes": 5, "channel_width": 2, "attention": [16]}


def built(layout, state):
    """What a reader of files does."""
    assert set(layout.signature) <= state.keys()
    state = layout.convert(state)
    config = layout.config(state)
    with torch.device("meta"):
        model = layout.model(**config)
    model = model.double().to_empty(device="cpu")
    model.load_state_dict(state)
    with torch.device("meta"):
        assert layout.model(**model.config).config == model.config
    return model.eval()


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def tiny(**changes):
    torch.manual_seed(0)
    return BigGANGenerator(**TINY | {"latent_dim": 12, "class_dim": 6} | changes)


def tiny_critic(**changes):
    torch.manual_seed(0)
    return BigGANDiscriminator(**TINY | changes)


@pytest.mark.parametrize(("resolution", "count"), [(128, 166), (256, 194)])
def test_published_generators_have_the_published_keys(resolution, count):
    keys = plain.generator_keys(resolution, 96, 20, 128, 1000, 64)
    assert len(keys) == count
    with torch.device("meta"):
        model = BigGANGenerator(resolution)
        assert GENERATOR.model(**GENERATOR.config({k: torch.empty(s) for k, s in keys.items()})).config == model.config
    assert {name: tuple(t.shape) for name, t in model.state_dict().items()} == keys


def test_published_critic_has_the_published_keys():
    keys = plain.critic_keys(128, 96, 1000, 64)
    assert len(keys) == 88
    with torch.device("meta"):
        model = BigGANDiscriminator(128)
        assert CRITIC.config({k: torch.empty(s) for k, s in keys.items()}).items() <= model.config.items()
    assert {name: tuple(t.shape) for name, t in model.state_dict().items()} == keys


@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize(
    ("resolution", "ch", "attend", "image_channels"),
    [(32, 2, 16, 3), (64, 4, 32, 1), (128, 1, 8, 3), (256, 1, 16, 3), (512, 1, 8, 3)],
)
def test_generator_is_its_equations(resolution, ch, attend, image_channels, batch):
    torch.manual_seed(0)
    state = plain.random_state(plain.generator_keys(resolution, ch, 3, 6, 5, attend, image_channels))
    model = built(GENERATOR, state).train(batch)
    assert (model.resolution, model.image_channels, model.num_classes, model.class_dim) == (
        *(resolution, image_channels),
        *(5, 6),
    )
    z, labels = torch.randn(3, model.latent_dim).double(), torch.tensor([4, 0, 2])
    expected = plain.generator(state, z, state["shared.weight"][labels], batch=batch)
    with torch.no_grad():
        images = model(z, labels)
    assert images.shape == (3, image_channels, resolution, resolution)
    assert images.std() > 0.01
    assert relative(images, expected) < 1e-10


@pytest.mark.parametrize(("shared", "chunk"), [(6, 12), (0, 12)])
def test_z_of_one_piece_and_classes_without_an_embedding(shared, chunk):
    torch.manual_seed(0)
    state = plain.random_state(plain.generator_keys(32, 2, chunk, shared, 5, 16, hierarchical=False))
    model = built(GENERATOR, state)
    z, labels = torch.randn(3, 12).double(), torch.tensor([4, 0, 2])
    c = state["shared.weight"][labels] if shared else labels
    expected = plain.generator(state, z, c, hierarchical=False)
    assert relative(model(z, labels), expected) < 1e-10
    c = c if shared else F.one_hot(labels, 5).double()
    assert c.shape[1] == model.class_dim
    assert relative(model(z, c), expected) < 1e-10


@pytest.mark.parametrize(
    ("resolution", "ch", "attend", "image_channels"), [(32, 2, None, 3), (64, 4, 8, 1), (128, 4, 32, 3), (512, 2, 8, 3)]
)
def test_critic_is_its_equations(resolution, ch, attend, image_channels):
    torch.manual_seed(0)
    state = plain.random_state(plain.critic_keys(resolution, ch, 5, attend, image_channels))
    model = built(CRITIC, state)
    x, labels = torch.randn(2, image_channels, resolution, resolution).double(), torch.tensor([4, 1])
    with torch.no_grad():
        for y in (labels, None):
            assert relative(model(x, y), plain.critic(state, x, y)) < 1e-10


def test_narrow_blocks_are_told_by_their_shapes():
    state = tiny_critic(wide=False).double().state_dict()
    model = built(CRITIC, state)
    assert not model.config["wide"]
    x = torch.randn(2, 3, 32, 32).double()
    assert relative(model(x), plain.critic(state, x)) < 1e-10


def test_networks_without_spectral_norm():
    model = tiny(sn_eps=None).double().eval()
    critic = tiny_critic(sn_eps=None).double()
    state = model.state_dict()
    assert not any(name.endswith(("u0", "sv0")) for name in (*state, *critic.state_dict()))
    assert built(GENERATOR, state).config["sn_eps"] is None
    assert built(CRITIC, critic.state_dict()).config["sn_eps"] is None
    z, c = torch.randn(2, 12).double(), torch.randn(2, 6).double()
    assert relative(model(z, c), plain.generator(state, z, c)) < 1e-10


def test_other_batch_norms_and_further_singular_values_of_the_layout():
    model = tiny().double().eval()
    state = {k.replace(".stored_", ".bn.stored_"): v for k, v in model.state_dict().items()}
    state |= {"blocks.0.0.bn1.bn.accumulation_counter": torch.zeros(1)}
    state |= {"linear.u1": torch.randn(1, 8), "linear.sv1": torch.ones(1)}
    z, y = torch.randn(2, 12).double(), torch.tensor([1, 2])
    assert torch.equal(built(GENERATOR, state)(z, y), model(z, y))


def test_power_iteration_follows_the_weights_in_train_mode_only():
    critic = tiny_critic().double()
    x = torch.randn(2, 3, 32, 32).double()
    before = {k: v.clone() for k, v in critic.state_dict().items()}
    critic.eval()(x)
    assert all(torch.equal(v, before[k]) for k, v in critic.state_dict().items())
    critic.train()(x)
    for name in ("blocks.0.0.conv1", "linear"):
        layer = critic.get_submodule(name)
        assert not torch.equal(layer.sv0, before[f"{name}.sv0"])
        for _ in range(200):
            layer.normalised()
        torch.testing.assert_close(layer.sv0[0], torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2))
    assert torch.equal(critic.embed.u0, before["embed.u0"])


def test_initial_weights_are_orthogonal():
    model = tiny()
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear | torch.nn.Embedding):
            m = module.weight.detach().flatten(1)
            m = m if m.shape[0] <= m.shape[1] else m.T
            torch.testing.assert_close(m @ m.T, torch.eye(len(m)), atol=1e-5, rtol=0)


def test_three_steps_of_hinge_loss():
    torch.manual_seed(0)
    generator, critic = tiny(), tiny_critic()
    optimizers = [torch.optim.Adam(net.parameters(), 2e-4, (0.0, 0.999)) for net in (generator, critic)]
    before = [{k: v.clone() for k, v in net.state_dict().items()} for net in (generator, critic)]
    for _ in range(3):
        x, y = torch.rand(4, 3, 32, 32) * 2 - 1, torch.randint(5, (4,))
        fake = generator(torch.randn(4, 12), y)
        loss = F.relu(1 - critic(x, y)).mean() + F.relu(1 + critic(fake.detach(), y)).mean()
        optimizers[1].zero_grad()
        loss.backward()
        optimizers[1].step()
        optimizers[0].zero_grad()
        loss = -critic(fake, y).mean()
        loss.backward()
        optimizers[0].step()
        assert loss.isfinite()
    for net, old in zip((generator, critic), before, strict=True):
        for name, tensor in net.state_dict().items():
            assert not torch.equal(tensor, old[name]), name


def test_standing_statistics_are_those_of_the_batches():
    model = tiny().double().train()
    model.blocks[1][1].eval()
    batches = [(torch.randn(8, 12).double(), torch.randint(5, (8,))) for _ in range(3)]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    firsts = [model.linear.eval()(z[:, :3]).unflatten(1, (-1, 4, 4)) for z, _ in batches]
    model.linear.train()
    model.standing_statistics(batches)
    assert torch.allclose(model.blocks[0][0].bn1.stored_mean, torch.stack([x.mean((0, 2, 3)) for x in firsts]).mean(0))
    assert torch.allclose(model.blocks[0][0].bn1.stored_var, torch.stack([x.var((0, 2, 3)) for x in firsts]).mean(0))
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {k for k in before if "stored" in k}
    assert model.training
    assert model.blocks[0][0].training
    assert not model.blocks[1][1].training
    assert model.output_layer[0].momentum == 0.1


@pytest.mark.parametrize("channels_last", [False, True])
def test_autocast_and_memory_format(channels_last):
    generator, critic = tiny().eval(), tiny_critic().eval()
    if channels_last:
        generator, critic = (net.to(memory_format=torch.channels_last) for net in (generator, critic))
    z, y = torch.randn(2, 12), torch.tensor([0, 3])
    with torch.no_grad():
        exact = critic(generator(z, y), y)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = critic(generator(z, y), y)
    # bfloat16 has 8 bits; some thirty layers
    assert 1e-5 < relative(rounded.float(), exact) < 0.1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: BigGANGenerator(100), "resolution must be one of"),
        (lambda: BigGANGenerator(128, latent_dim=100), "multiple of 6"),
        (lambda: BigGANGenerator(32, shared=False), "hierarchical=False"),
        (lambda: BigGANGenerator(32, channels=[1, 2]), "4 widths"),
        (lambda: BigGANDiscriminator(32, num_classes=0), "num_classes must be at least 1"),
        (lambda: tiny_critic(channel_width=1), "attention divides the channels by 8"),
        (lambda: tiny()(torch.randn(2, 9), torch.tensor([1, 2])), r"\[B, 12\]"),
        (lambda: tiny()(torch.randn(2, 12), None), "conditional"),
        (lambda: tiny()(torch.randn(2, 12), torch.randn(2, 5)), r"\[B, 6\], got \[2, 5\]"),
        (lambda: tiny()(torch.randn(2, 12), torch.tensor([1, 5])), r"0\.\.4, got 1\.\.5"),
        (lambda: tiny()(torch.randn(2, 12), torch.tensor([[1], [2]])), r"integers of shape \[B\]"),
        (lambda: tiny()(torch.randn(2, 12), torch.tensor([1])), "one batch, got 2 and 1"),
        (lambda: tiny_critic()(torch.randn(2, 1, 32, 32)), r"\[B, 3, 32, 32\], got \[2, 1, 32, 32\]"),
        (lambda: tiny_critic()(torch.randn(2, 3, 32, 32), torch.randn(2, 5)), "integers"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
