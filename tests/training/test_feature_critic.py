"""Heads on a frozen network: what they see, that only they train and are saved, and their R1."""

import copy

import pytest
import torch
from torch import nn

from minegan_fast.training.critics import begin_training, critic_r1, freeze_lower_blocks, trainable_parameters
from minegan_fast.training.feature_critic import FeatureCritic
from minegan_fast.training.loss_features import LossFeatures


def network():
    """Three stages, with batch norm whose statistics a train mode would move."""
    sizes = ((3, 6), (6, 10), (10, 12))
    blocks = [nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.Tanh()) for a, b in sizes]
    return nn.Sequential(*blocks).eval()


def features(**settings):
    return LossFeatures(network(), torch.rand(2, 3, 16, 16) * 2 - 1, count=3, **settings)


def images(n=3):
    return torch.rand(n, 3, 16, 16) * 2 - 1


def critic(**settings):
    return FeatureCritic(features().maps, 16, 3, width=8, **settings)


def test_logits_are_the_mean_over_stages_and_places_of_heads_on_normalised_maps():
    loss_features, x = features(), images()
    judge = FeatureCritic(loss_features.maps, 16, width=8).eval()
    maps = loss_features.maps(x)
    assert len(maps) == 3
    expected = torch.zeros(3)
    for head, m in zip(judge.heads, maps, strict=True):
        unit = m / m.square().mean(1, keepdim=True).sqrt()
        expected += head(unit).mean((1, 2, 3)) / 3
    torch.testing.assert_close(judge(x), expected)
    assert judge(x).shape == (3,)
    assert judge.training is False


def test_the_scale_of_a_map_does_not_count():
    maps = [torch.randn(2, 5, 4, 4), torch.randn(2, 7)]
    one = FeatureCritic(lambda x: [maps[0][: len(x)], maps[1][: len(x)]], 8).eval()
    before = one(torch.zeros(2, 3, 8, 8))
    maps[0], maps[1] = 1000 * maps[0], 1000 * maps[1]
    torch.testing.assert_close(one(torch.zeros(2, 3, 8, 8)), before)


def test_every_layer_of_a_head_has_a_bounded_spectral_norm():
    judge = critic()
    for p in judge.parameters():
        p.data.mul_(50)
    begin_training(judge)
    for _ in range(30):
        judge(images())
    weights = [m.weight for m in judge.heads.modules() if isinstance(m, nn.Conv2d)]
    assert len(weights) == 9
    for weight in weights:
        assert torch.linalg.matrix_norm(weight.detach().flatten(1), 2).item() == pytest.approx(1, abs=0.05)


def test_the_network_stays_frozen_whatever_is_called():
    loss_features = features()
    judge = FeatureCritic(loss_features.maps, 16, width=8)
    module = loss_features._stages.network
    before, modes = copy.deepcopy(module.state_dict()), [m.training for m in module.modules()]
    judge.train().requires_grad_(True)
    begin_training(judge)
    optimizer = torch.optim.Adam(trainable_parameters(judge), 0.1)
    x = images().requires_grad_()
    heads = copy.deepcopy(judge.heads.state_dict())
    (judge(x).sum() + critic_r1(judge, x)).backward()
    optimizer.step()
    assert not any(p.requires_grad for p in module.parameters())
    assert modes == [m.training for m in module.modules()]
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())
    assert any(not torch.equal(heads[k], v) for k, v in judge.heads.state_dict().items())
    assert x.grad.abs().sum() > 0, "the generator learns through the network"


def test_it_learns_to_tell_two_kinds_of_images():
    judge = critic()
    begin_training(judge)
    optimizer = torch.optim.Adam(trainable_parameters(judge), 0.02)
    grid = torch.linspace(-1, 1, 16)
    real, fake = grid.expand(4, 3, 16, 16), grid[:, None].expand(4, 3, 16, 16)
    for _ in range(40):
        optimizer.zero_grad()
        (judge(fake).mean() - judge(real).mean()).backward()
        optimizer.step()
    judge.eval()
    assert judge(real).min() > judge(fake).max() + 0.5


def test_the_state_is_that_of_the_heads():
    loss_features = features()
    one, two = (FeatureCritic(loss_features.maps, 16, width=8) for _ in range(2))
    state = one.state_dict()
    assert {name.partition(".")[0] for name in state} == {"heads"}
    assert sum(t.numel() for t in state.values()) < 5000
    x = images()
    assert not torch.equal(one.eval()(x), two.eval()(x))
    two.load_state_dict(state)
    assert torch.equal(one(x), two(x))


def test_copies_share_the_network():
    one = critic()
    two = copy.deepcopy(one)
    assert two._network is one._network
    with torch.no_grad():
        for p in one.heads.parameters():
            p.add_(1)
    assert not torch.equal(one.eval()(images()), two.eval()(images()))


def test_r1_is_that_of_the_maps_and_trains_the_heads():
    torch.manual_seed(2)
    maps = [torch.randn(2, 5, 4, 4), torch.randn(2, 7)]
    judge = FeatureCritic(lambda x: [m[: len(x)] for m in maps], 8).double().eval()
    judge._network = lambda x: maps  # in float32, as a network's

    def score(i, unit):
        return judge.heads[i](unit).mean() / 2

    expected = 0.0
    for i, m in enumerate(maps):
        for sample in m:
            sample = sample.reshape(1, m.shape[1], *(m.shape[2:] or (1, 1)))
            unit = (sample * torch.rsqrt(sample.square().mean(1, keepdim=True) + 1e-6)).double()
            jacobian = torch.autograd.functional.jacobian(lambda u, i=i: score(i, u), unit)
            expected += float(unit.shape[2:].numel() * jacobian.square().sum()) / 2
    judge.float()
    penalty = judge.r1_penalty(torch.zeros(2, 3, 8, 8))
    assert penalty.item() == pytest.approx(expected, rel=1e-4)
    penalty.backward()
    assert all(head[0].parametrizations.weight.original.grad.abs().sum() > 0 for head in judge.heads)
    with torch.no_grad():
        assert not judge.r1_penalty(torch.zeros(2, 3, 8, 8)).requires_grad


def test_dropout_acts_in_training_alone():
    judge, x = critic(dropout=0.5), images()
    assert not torch.equal(judge.train()(x), judge(x))
    assert torch.equal(judge.eval()(x), judge(x))


def test_under_autocast_heads_see_float32_maps_of_unit_size():
    judge, x = critic().eval(), images()
    with torch.autocast("cpu", torch.bfloat16):
        low = judge(x)
        assert judge.r1_penalty(x).dtype == torch.float32
    torch.testing.assert_close(low.float(), judge(x), rtol=0.05, atol=0.02)


def test_grey_images_of_a_network_for_colours():
    loss_features = LossFeatures(network()[:2], torch.rand(2, 1, 8, 8) * 2 - 1, count=2)
    judge = FeatureCritic(loss_features.maps, 8, image_channels=1)
    assert (judge.resolution, judge.image_channels) == (8, 1)
    assert judge(torch.randn(2, 1, 8, 8)).shape == (2,)
    with pytest.raises(ValueError, match=r"expected floating point images \[B, 1, 8, 8\]"):
        judge(torch.randn(2, 1, 16, 16))


def test_there_is_nothing_in_it_that_freezed_could_freeze():
    with pytest.raises(ValueError, match="freeze_blocks is 1, but FeatureCritic has 0 blocks"):
        freeze_lower_blocks(critic(), 1)
