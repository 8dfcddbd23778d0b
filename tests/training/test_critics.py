"""A critic for any source, what of it trains, and R1 as it has it."""

import copy

import pytest
import torch
from torch import nn

from minegan_fast.layers import r1_penalty
from minegan_fast.training.critics import (
    begin_training,
    critic_r1,
    freeze_lower_blocks,
    new_critic,
    train_mode,
    trainable_parameters,
)


class Plain(nn.Module):
    """A user's generator."""

    latent_dim = 4

    def __init__(self, resolution, channels=3, width=64):
        super().__init__()
        self.resolution, self.layers = resolution, nn.Linear(4, width)
        if channels != 3:
            self.image_channels = channels


class Frozen(nn.Module):
    """A user's critic on a frozen network with batch norm and dropout."""

    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)).requires_grad_(False)
        self.head = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 1), nn.Flatten(0))

    def forward(self, x):
        return self.head(self.network(x))


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(("resolution", "channels"), [(4, 1), (8, 3), (12, 2), (28, 1), (64, 3), (33, 3)])
def test_a_source_of_no_known_family_gets_a_critic_of_its_images(resolution, channels):
    generator = Plain(resolution, channels)
    critic = new_critic(generator, seed=0)
    assert (critic.resolution, critic.image_channels) == (resolution, channels)
    x = torch.randn(3, channels, resolution, resolution)
    assert critic(x).shape == (3,)
    assert r1_penalty(critic, x) > 0
    again, other = new_critic(generator, seed=0), new_critic(generator, seed=1)
    for p, q, r in zip(critic.parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
        assert not p.any() or not torch.equal(p, r)


@pytest.mark.parametrize("width", [150_000, 700_000, 3_000_000])
def test_the_new_critic_is_about_as_large_as_the_generator(width):
    generator = Plain(32, width=width // 5)
    assert 0.45 < count(new_critic(generator, seed=0)) / count(generator) < 2.2


def test_a_small_generators_critic_has_a_least_width():
    critic = new_critic(Plain(64, width=1), seed=0)
    assert min(critic.config["channels"].values()) == 8


def test_freezed_reaches_into_an_enlarging_critic():
    critic = new_critic(Plain(12), seed=0)
    freeze_lower_blocks(critic, 1)
    assert not any(p.requires_grad for p in critic.critic.convs[0].parameters())
    assert all(p.requires_grad for p in critic.critic.convs[1].parameters())


def test_what_came_frozen_stays_so():
    critic = Frozen()
    before = copy.deepcopy(critic.network.state_dict())
    heads = {id(p) for p in critic.head.parameters()}
    critic.eval()
    begin_training(critic)
    assert {id(p) for p in trainable_parameters(critic)} == heads
    assert {id(p) for p in critic.parameters() if p.requires_grad} == heads
    critic(torch.randn(4, 3, 8, 8)).sum().backward()
    assert all(torch.equal(before[k], v) for k, v in critic.network.state_dict().items())
    assert critic.head[1].training
    assert critic.head[1].num_batches_tracked == 1


def test_a_critic_that_is_frozen_whole_trains_whole():
    critic = Frozen().requires_grad_(False).eval()
    begin_training(critic)
    assert all(p.requires_grad for p in critic.parameters())
    assert all(module.training for module in critic.modules())


def test_train_mode_leaves_blocks_that_are_frozen_later_in_eval_mode():
    critic = Frozen().requires_grad_(True)
    critic.network.requires_grad_(False)
    train_mode(critic)
    assert not any(module.training for module in critic.network.modules())
    assert all(module.training for module in critic.head.modules())


def test_a_critic_without_parameters_is_named():
    with pytest.raises(ValueError, match="the critic Flatten has no parameters to train"):
        begin_training(nn.Flatten())


def test_freezing_all_of_a_critic_is_refused():
    critic = nn.Sequential(nn.Flatten(), nn.Linear(4, 1))
    with pytest.raises(ValueError, match="freeze_blocks is 2, which leaves nothing of Sequential to train"):
        freeze_lower_blocks(critic, 2)


def test_r1_is_the_critics_own_where_it_has_one():
    critic, x = nn.Sequential(nn.Flatten(), nn.Linear(12, 1), nn.Flatten(0)), torch.randn(2, 3, 2, 2)
    assert torch.equal(critic_r1(critic, x), r1_penalty(critic, x))
    critic.r1_penalty = lambda real: 2 * real.sum()
    assert torch.equal(critic_r1(critic, x), 2 * x.sum())
