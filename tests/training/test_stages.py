import pytest
import torch
from feature_networks import Shared, Wrapper, gated, hourglass, images, vgg
from torch import nn

from minegan_fast.metrics.inception import Inception
from minegan_fast.models import BigGANDiscriminator, StyleGAN2Discriminator
from minegan_fast.training.stages import OUTPUT, Stages

NETWORKS = {
    "shared": (Shared, 32, {"relu": (8, 16), "again#2": (12, 8), "relu#3": (16, 4)}),
    "gated": (gated, 32, {"0": (8, 16), "1": (12, 8), "2": (16, 4)}),
    "wrapped": (lambda: Wrapper(Wrapper(gated())), 32, {f"network.network.{i}": v for i, v in
                                                        enumerate(((8, 16), (12, 8), (16, 4)))}),
    "vgg": (vgg, 40, {"0.8": (12, 17), "0.13": (16, 6), "0.14": (16, 3)}),
    "hourglass": (hourglass, 32, {"0": (8, 16), "1": (12, 8), "2": (16, 4)}),
    "biggan": (
        lambda: BigGANDiscriminator(32, num_classes=2, channels=[8, 12, 12, 16], attention=()),
        32,
        {"blocks.0.0": (8, 16), "blocks.3.0": (16, 8)},
    ),
    # The layers behind the minibatch's standard deviation see other images.
    "stylegan2": (
        lambda: StyleGAN2Discriminator(32, channel_base=128, channel_max=16),
        32,
        {"convs.1": (8, 16), "convs.2": (16, 8), "convs.3": (16, 4)},
    ),
    "inception": (
        lambda: Inception("fid"),
        80,
        {"Conv2d_4a_3x3": (192, 16), "Mixed_5d": (288, 7), "Mixed_6e": (768, 3), "Mixed_7c": (2048, 1)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", NETWORKS)
def test_stages_of_networks_of_every_kind(kind):
    torch.manual_seed(0)
    build, resolution, expected = NETWORKS[kind]
    network, x = build().eval(), images(resolution)
    stages = Stages(network, x)
    maps = stages(x)
    assert dict(zip(stages.names, [(m.shape[1], m.shape[2]) for m in maps], strict=True)) == expected
    assert Stages(network, x, count=1).names == list(expected)[-1:]
    assert Stages(network, x, taps=stages.names).names == stages.names


def test_maps_are_those_of_the_layers_and_pass_gradients():
    torch.manual_seed(0)
    network, x = Shared().eval(), images().requires_grad_()
    first = network.norm(network.convs[0](x)).relu()
    second = network.again(network.again(network.convs[1](first).relu()))
    third = network.convs[2](second).relu()
    expected = [third, first, network(x)]
    maps = Stages(network, x, taps=["relu#3", "relu", OUTPUT])(x)
    for m, e in zip(maps, expected, strict=True):
        assert torch.equal(m, e)
        assert torch.equal(*(torch.autograd.grad(y.square().sum(), x, retain_graph=True)[0] for y in (m, e)))


def test_a_forward_ends_at_the_last_tap():
    network = gated()
    stages = Stages(network, images(), taps=["1", "0"])
    network[2].forward = None
    assert [m.shape[1] for m in stages(images())] == [12, 8]


def test_the_network_stays_as_it_was():
    network = Shared().train()
    network.fc.eval()
    network.convs[1].requires_grad_(False)
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    modes = [module.training for module in network.modules()]
    wanted = [p.requires_grad for p in network.parameters()]
    stages = Stages(network, images())
    network.eval()
    stages(images())
    for flags, module in zip(modes, network.modules(), strict=True):
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        module.training = flags
    Stages(network, images())
    assert [module.training for module in network.modules()] == modes
    assert [p.requires_grad for p in network.parameters()] == wanted
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())


def test_hooks_go_when_a_forward_fails():
    network = Shared().eval()
    stages = Stages(network, images())
    with pytest.raises(RuntimeError):
        stages(images(channels=5))
    with pytest.raises(RuntimeError):
        Stages(network, images(channels=5))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("freeze", [False, True])
def test_what_takes_no_hooks_has_one_stage_its_output(freeze):
    scripted = torch.jit.script(nn.Sequential(*list(vgg()[0])[:10]).eval())
    scripted = torch.jit.freeze(scripted) if freeze else scripted
    x = images()
    for network in (scripted, nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4))):
        stages = Stages(network, x)
        assert stages.names == [OUTPUT]
        assert torch.equal(stages(x)[0], network(x))


def test_maps_of_the_inputs_size_are_taken_where_there_is_nothing_else():
    assert Stages(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)), images()).names == ["1"]


class BatchMean(nn.Module):
    def forward(self, x):
        return x[:, :, ::2, ::2] - x.mean()


def test_wrong_taps_are_named():
    network, x = Shared().eval(), images()
    with pytest.raises(ValueError, match=r"tap 'layer4' of Shared is not there; some that are: .*again#2"):
        Stages(network, x, taps=["relu", "layer4"])
    with pytest.raises(ValueError, match="'relu#4' of Shared is not reached"):
        Stages(network, x, taps=["relu#4"])
    network.unused = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="'unused' of Shared is not reached"):
        Stages(network, x, taps=["unused"])
    for taps in ("relu", []):
        with pytest.raises(ValueError, match="taps must be a list of names or None"):
            Stages(network, x, taps=taps)
    with pytest.raises(ValueError, match="0 of Sequential gives no maps"):
        Stages(nn.Sequential(nn.Flatten(0), nn.Flatten(0)), x, taps=["0"])


def test_features_that_depend_on_the_batch_are_refused():
    network = nn.Sequential(nn.Conv2d(3, 4, 3, 2), BatchMean())
    assert Stages(network, images()).names == ["0"]
    with pytest.raises(ValueError, match=r"features '1' of an image depend on the other images of its batch"):
        Stages(network, images(), taps=["1"])
