"""Published methods as settings of one recipe: what trains under each of them, and what does not."""

import copy

import pytest
import torch
from torch import nn

import minegan_fast as mf
from minegan_fast.training import TransferConfig
from minegan_fast.training.elastic import ElasticWeights
from minegan_fast.training.methods import METHODS, fresh_weights
from minegan_fast.training.trainer import Trainer


def make(tiny, **settings):
    config = TransferConfig(
        **{"batch": 4, "score_samples": 4, "augment": "", "r1_gamma": 0.0, "freeze_blocks": 1, **settings}
    )
    images = torch.randint(0, 256, (10, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Trainer(config, copy.deepcopy(tiny["generator"]), copy.deepcopy(tiny["discriminator"]), images, "cpu")


def finetuned(tiny, **settings):
    """A trainer after three steps of stage 2, and the names of the generator's parameters that moved."""
    trainer = make(tiny, **settings)
    start = copy.deepcopy(trainer.generator.state_dict())
    trainer.begin_finetuning()
    trainer.select()
    for number in range(3):
        trainer.step(number)
    return trainer, {k for k, v in trainer.generator.state_dict().items() if not torch.equal(v, start[k])}


@pytest.mark.parametrize("method", [name for name in METHODS if name != "mined"])
def test_every_method_runs_whole(run_settings, method):
    miner = TransferConfig(method=method).train_miner
    run_settings |= {"method": method, "mining_steps": 4 if miner else None, "snapshot_every": 8, "freeze_blocks": 1}
    result = mf.transfer(**run_settings)
    assert result.history[-1]["step"] == (8 if miner else 4)


@pytest.mark.parametrize("method", ["transfergan", "ewc", "freezed", "scale_shift", "freeze_top", "scratch"])
def test_methods_without_a_miner_leave_it_the_identity(tiny, method):
    trainer, moved = finetuned(tiny, method=method)
    u = torch.randn(3, 8)
    assert torch.equal(trainer.mined.miner(u), u)
    assert moved


def test_without_a_miner_there_is_no_stage_1():
    assert TransferConfig(train_miner=False).mining_steps == 0
    with pytest.raises(ValueError, match=r"mining_steps is 5, but without a miner .* transfergan\) nothing trains"):
        TransferConfig(method="transfergan", mining_steps=5)


def test_scale_shift_trains_vectors_alone(tiny):
    trainer, moved = finetuned(tiny, method="scale_shift")
    vectors = {name for name, p in trainer.generator.named_parameters() if p.numel() == max(p.shape, default=1)}
    assert moved
    assert moved <= vectors


def test_shuffled_has_as_many_rows_of_every_layer(tiny):
    plain, other = (finetuned(tiny, method=m, density=0.3)[0].finetuner.selection for m in ("minegan++", "shuffled"))
    assert {n: len(r) for n, r in plain.rows.items()} == {n: len(r) for n, r in other.rows.items()}
    assert any(not torch.equal(plain.rows[n], other.rows[n]) for n in plain.rows)


def test_freeze_top_trains_what_minegan_plus_plus_would_not(tiny):
    settings = {"density": 0.4, "path_length_weight": 0.0, "seed": 3}
    top = make(tiny, method="minegan++", **settings)
    low = make(tiny, method="freeze_top", **settings)
    rows = []
    for trainer in (top, low):
        trainer.begin_finetuning()
        trainer.select()
        rows.append({(n, r) for n, rs in trainer.finetuner.selection.rows.items() for r in rs.tolist()})
    assert not rows[0] & rows[1]


def test_ewc_holds_the_weights(tiny):
    moved = {}
    for weight in (0.0, 1e4):
        trainer = make(tiny, method="ewc", ewc_weight=weight, path_length_weight=0.0)
        trainer.begin_finetuning()
        trainer.select()
        start = torch.cat([p.detach().flatten() for p in trainer.finetuner.parameters()])
        importance = torch.cat([i.flatten() for i in trainer.elastic.importances])
        assert importance.mean() == pytest.approx(1, rel=1e-4)
        for number in range(20):
            trainer.step(number)
        now = torch.cat([p.detach().flatten() for p in trainer.finetuner.parameters()])
        moved[weight] = float(((now - start).square() * importance).sum())
    assert moved[1e4] < 0.5 * moved[0.0]


def test_ewc_is_the_gradient_of_its_penalty(tiny):
    trainer = make(tiny, method="ewc")
    trainer.begin_finetuning()
    trainer.select()
    elastic: ElasticWeights = trainer.elastic
    leaves = elastic.parameters
    with torch.no_grad():
        for p in leaves:
            p.add_(torch.randn_like(p) * 0.1)
    for p in leaves:
        p.grad = torch.zeros_like(p)
    elastic.add_gradients(1.5, torch.tensor(2.0))
    parts = [p.detach().clone().requires_grad_() for p in leaves]
    triples = zip(parts, elastic.anchors, elastic.importances, strict=True)
    (3.0 * sum((f * (p - a).square()).sum() for p, a, f in triples) / 2).backward()
    for own, part in zip(leaves, parts, strict=True):
        torch.testing.assert_close(own.grad, part.grad)


def test_ewc_goes_on_after_a_resume(tiny):
    one, _ = finetuned(tiny, method="ewc")
    two = make(tiny, method="ewc")
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    for trainer in (one, two):
        trainer.step(3)
    for a, b in zip(one.generator.state_dict().values(), two.generator.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_fresh_weights_are_new_and_normalised(tiny):
    generator = copy.deepcopy(tiny["generator"])
    fresh_weights(generator, 1)
    same = [torch.equal(a, b) for a, b in zip(generator.parameters(), tiny["generator"].parameters(), strict=True)]
    assert not all(same)

    class Plain(nn.Module):
        latent_dim, resolution = 4, 8

        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(4, 64), nn.BatchNorm1d(64))

        def forward(self, z):
            return self.layers(z)

    plain = Plain().eval()
    with torch.no_grad():
        plain.layers[0].weight.fill_(7)
        plain.layers[1].running_var.fill_(1e6)
    fresh_weights(plain, 1)
    assert not (plain.layers[0].weight == 7).any()
    assert float(plain(torch.randn(4096, 4)).detach().std()) == pytest.approx(1, abs=0.2)
    assert not plain.layers[1].training
    assert plain.layers[1].momentum == 0.1

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3))

    with pytest.raises(ValueError, match=r"no reset_parameters\(\)"):
        fresh_weights(Odd(), 0)


def test_a_critic_alone_does_not_move_the_miner(tiny):
    trainer = make(tiny, critic_warmup=2)
    for number, still in enumerate([True, True, False]):
        before = trainer.mined.miner.layers[-1].weight.detach().clone()
        values = trainer.step(number)
        assert torch.equal(trainer.mined.miner.layers[-1].weight, before) == still
        assert ("loss_G" in values) != still


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "gan"}, "method must be one of minegan\\+\\+, random"),
        ({"loss": "mmd", "train_critic": "sparse"}, "has no critic"),
        ({"loss": "mmd", "method": "freezed"}, "has no critic"),
        ({"loss": "mmd", "batch": 1}, "2 generated images"),
        ({"loss": "mmd", "mmd_weight": 1.0}, "beside an adversarial loss"),
        ({"part": 0}, "part must be a whole number from 1"),
        ({"prior": "ball"}, "prior must be one of sphere"),
        ({"mining_loss": "l2"}, "mining_loss must be one of"),
    ],
)
def test_settings_that_do_not_go_together(settings, message):
    with pytest.raises(ValueError, match=message):
        TransferConfig(**settings)


def test_what_is_left_open_follows_loss_and_method():
    kernel, adversarial = TransferConfig(loss="mmd"), TransferConfig()
    assert kernel.total_steps < adversarial.total_steps
    assert kernel.beta1 > adversarial.beta1
    mixed = TransferConfig(mining_loss="mmd")
    assert mixed.mining_steps == kernel.mining_steps
    assert mixed.finetune_steps == adversarial.finetune_steps
    assert mixed.adversarial
    assert mixed.kernel
    assert not TransferConfig(method="mined", mining_loss="mmd").adversarial
    assert TransferConfig(method="minegan", density=0.5).density == 0.5, "what is given wins"
