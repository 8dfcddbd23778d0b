import copy

import pytest
import torch

from minegan_fast.training.config import TransferConfig
from minegan_fast.training.critics import freeze_lower_blocks
from minegan_fast.training.trainer import Trainer


def make(tiny, **settings):
    config = TransferConfig(**{"batch": 4, "score_samples": 4, "augment": "", "r1_every": 2, **settings})
    images = torch.randint(0, 256, (10, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Trainer(config, copy.deepcopy(tiny["generator"]), copy.deepcopy(tiny["discriminator"]), images, "cpu")


def test_gradients_do_not_accumulate_over_steps(tiny):
    """The published code never zeroed the miner's gradients."""
    trainer = make(tiny, lr=1e-30)
    gradients = []
    for _ in range(3):
        trainer.step(1)
        gradients.append([p.grad.clone() for p in trainer.mined.mining_parameters()])
    # The last layer starts at zero, so only it has a gradient; the learning rate is too small to move anything.
    assert gradients[0][-1].abs().sum() > 0
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-4, atol=1e-7)


def test_generator_step_leaves_the_critics_gradients_alone(tiny):
    trainer = make(tiny)
    trainer._train_generator(path_length=False)
    assert all(p.grad is None for p in trainer.adversary.critic.parameters())


def test_mining_trains_miner_and_critic_only(tiny):
    trainer = make(tiny)
    before = copy.deepcopy(trainer.generator.state_dict())
    critic = copy.deepcopy(trainer.adversary.critic.state_dict())
    trainer.step(0)
    assert all(torch.equal(before[k], v) for k, v in trainer.generator.state_dict().items())
    assert any(not torch.equal(critic[k], v) for k, v in trainer.adversary.critic.state_dict().items())


@pytest.mark.parametrize("mode", ["all", "freezed", "sparse"])
def test_what_of_the_critic_trains(tiny, mode):
    trainer = make(tiny, train_critic=mode, freeze_blocks=1, density=0.2)
    start = copy.deepcopy(trainer.adversary.critic.state_dict())
    trainer.begin_finetuning()
    trainer.select()
    for number in range(3):
        trainer.step(number)
    moved = {k for k, v in trainer.adversary.critic.state_dict().items() if not torch.equal(start[k], v)}
    first = {k for k in start if k.startswith("convs.0.")}
    if mode == "freezed":
        assert moved
        assert not moved & first
    elif mode == "all":
        assert moved & first
    else:
        trainer.adversary.optimizer.verify()
        assert moved
        rows = trainer.adversary.optimizer.selection.rows
        weight = next(name for name in rows if name in moved)
        changed = (start[weight] != trainer.adversary.critic.state_dict()[weight]).flatten(1).any(1).nonzero().flatten()
        assert set(changed.tolist()) <= set(rows[weight].tolist())


def test_rows_of_a_new_selection_train_beside_a_sparse_critic(tiny):
    """Scoring the critic keeps the generator still, but not for ever: a weight may get its first row later."""
    trainer = make(tiny, train_critic="sparse", density=0.05)
    trainer.select()
    weights = {m.name: m.parameter for layer in trainer.finetuner.layers for m in layer.members}
    other = next(name for name, p in weights.items() if name not in trainer.finetuner.selection.rows and p.ndim > 1)
    trainer.finetuner.select({other: [0]})
    before = weights[other].detach().clone()
    trainer.step(0)
    assert not torch.equal(weights[other], before)


def test_path_length_moves_its_mean_in_stage_two_only(tiny):
    trainer = make(tiny, path_length_every=1)
    trainer.step(0)
    assert trainer.path_length_mean == 0
    trainer.begin_finetuning()
    trainer.select()
    trainer.step(1)
    assert trainer.path_length_mean > 0


def test_r1_is_lazy_and_weighted(tiny):
    """On its step the critic's gradient is that of loss + gamma/2 * every * R1; on others R1 is absent."""
    gradients = {}
    for gamma in (0.0, 3.0):
        for number in (0, 1):
            trainer = make(tiny, r1_gamma=gamma, lr=1e-30)
            trainer.step(number)
            gradients[gamma, number] = torch.cat([p.grad.flatten() for p in trainer.adversary.critic.parameters()])
    assert torch.equal(gradients[0.0, 1], gradients[3.0, 1])
    assert not torch.allclose(gradients[0.0, 0], gradients[3.0, 0])


def test_average_of_the_miner(tiny):
    trainer = make(tiny, ema_decay=0.5)
    values = []
    for number in range(20, 23):
        trainer.step(number)
        values.append(trainer.mined.miner.layers[-1].weight.detach().clone())
    expected = torch.zeros_like(values[0])
    for value in values:
        expected = expected.lerp(value, 0.5)
    torch.testing.assert_close(trainer.average.miner.layers[-1].weight, expected)


def test_state_goes_on_exactly(tiny):
    one = make(tiny)
    one.step(0)
    one.begin_finetuning()
    one.select()
    one.step(1)
    state = copy.deepcopy(one.state_dict())
    two = make(tiny)
    two.load_state_dict(state)
    for trainer in (one, two):
        trainer.step(2)
        trainer.step(3)
    for a, b in zip(one.result().state_dict().values(), two.result().state_dict().values(), strict=True):
        assert torch.equal(a, b)
    two.finetuner.verify()


def test_nan_is_noticed(tiny):
    trainer = make(tiny)
    with torch.no_grad():
        next(trainer.adversary.critic.parameters()).fill_(float("nan"))
    trainer.step(0)
    assert not trainer.finite


def test_freezed_names_too_many_blocks(tiny):
    with pytest.raises(ValueError, match="has 2 blocks"):
        freeze_lower_blocks(copy.deepcopy(tiny["discriminator"]), 9)
