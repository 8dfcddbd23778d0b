"""Agreement and contrast: what they are for, and what is said where evidence is missing."""

import pytest
import torch
from one_by_one import loss_of
from sample_networks import Fails, build, data
from torch import nn

from minegan_fast.finetune import SparseFinetuner


def test_agreement_is_about_direction_not_size():
    """Gradients of four neurons: constant, constant but small, of random sign but large, none."""
    net = nn.Linear(1, 4, bias=False)
    ft = SparseFinetuner(net, criterion="agreement")
    signs = torch.randint(2, (400,), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    sizes = torch.stack([torch.ones(400), 1e-4 * torch.ones(400), 1e4 * signs, torch.zeros(400)], 1)
    with ft.scoring():
        (net(torch.ones(400, 1)) * sizes).sum(1).mean().backward()
    scores = ft.scores()["weight"]
    torch.testing.assert_close(scores[:2], torch.ones(2))
    torch.testing.assert_close(scores[2], signs.mean().square())
    assert scores[3] == 0
    assert scores.max() <= 1


@pytest.mark.filterwarnings("ignore:scored by the gradient of a whole batch")
def test_agreement_of_what_is_not_followed_is_its_mean_where_samples_are_independent():
    """A batch's gradient stands for its samples': the scores of four batches of 2 are those of four pieces, over 2."""

    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(108, 4))

        def forward(self, x):
            return x.flatten(1) @ self.weight

    torch.manual_seed(0)
    net, batches = Product().double(), data(8).split(2)
    scores = []
    for samples in (2, 1):
        ft = SparseFinetuner(net, criterion="agreement")
        with ft.scoring(samples=samples):
            for x in batches:
                loss_of(net, x).backward()
        scores.append(ft.scores()["weight"])
        ft.release()
    torch.testing.assert_close(scores[0], scores[1] / 2)


def test_contrast_finds_what_is_relevant_for_the_target_alone():
    """A neuron with large gradients in both is not it; one that the source hardly uses does not win by that alone."""
    net = nn.Linear(4, 4, bias=False)
    ft = SparseFinetuner(net, criterion="contrast", density=0.25)
    for of, size in (("target", [100.0, 1.0, 10.0, 1e-4]), ("source", [100.0, 1.0, 1.0, 1e-9])):
        with ft.scoring(of=of):
            (net(torch.ones(2, 4)) * torch.tensor(size)).sum(1).mean().backward()
    assert ft.select().rows["weight"].tolist() == [2]


def test_contrast_where_the_source_does_not_reach_a_layer():
    net = nn.ModuleDict({"both": nn.Linear(1, 2, bias=False), "target": nn.Linear(1, 2, bias=False)})
    ft = SparseFinetuner(net, criterion="contrast")
    x = torch.ones(2, 1)
    with ft.scoring():
        (net["both"](x) + net["target"](x)).sum(1).mean().backward()
    with ft.scoring(of="source"):
        (2 * net["both"](x)).sum(1).mean().backward()
    scores = ft.scores()
    torch.testing.assert_close(scores["both.weight"], torch.full((2,), 1 / (4 * 1.01)))
    torch.testing.assert_close(scores["target.weight"], torch.full((2,), 1 / (0.01 * 2)))


def backward(net, x=None):
    net(data() if x is None else x).square().mean().backward()


def test_agreement_of_one_piece_is_refused():
    net = build("mlp")
    with pytest.raises(ValueError, match="score_steps must be at least 2"):
        SparseFinetuner(net, criterion="agreement", score_steps=1)
    ft = SparseFinetuner(net, criterion="agreement")
    with ft.scoring():
        backward(net, data(1))
    with pytest.raises(RuntimeError, match="at least 2 samples, or 2 backward passes"):
        ft.select()
    with ft.scoring():
        backward(net, data(1, seed=2))
    ft.select()


def test_contrast_without_the_source_says_how_to_give_it():
    net = build("mlp")
    ft = SparseFinetuner(net, criterion="contrast", score_steps=2)
    backward(net)
    ft.step()
    with pytest.raises(RuntimeError, match=r'scoring\(of="source"\)'):
        ft.step()
    assert ft.selection is None
    with ft.scoring(of="source"):
        (0 * net(data())).sum().backward()
    with pytest.raises(RuntimeError, match=r'scoring\(of="source"\)'):
        ft.select()
    with ft.scoring(of="source"):
        backward(net)
    assert ft.select() == ft.selection


def test_contrast_without_the_target():
    ft = SparseFinetuner(build("mlp"), criterion="contrast")
    with ft.scoring(of="source"):
        backward(ft.model)
    with pytest.raises(RuntimeError, match="needs evidence and there is none"):
        ft.select()


@pytest.mark.parametrize("criterion", ["fisher", "agreement"])
def test_only_contrast_takes_the_source(criterion):
    ft = SparseFinetuner(build("mlp"), criterion=criterion)
    with pytest.raises(ValueError, match="only criterion 'contrast' looks at the source's"), ft.scoring(of="source"):
        pass
    with pytest.raises(ValueError, match="of must be 'target' or 'source', got 'both'"), ft.scoring(of="both"):
        pass


@pytest.mark.parametrize("of", ["target", "source"])
@pytest.mark.parametrize("criterion", ["agreement", "contrast"])
def test_scores_that_are_not_finite_are_named(criterion, of):
    net = build("mlp")
    ft = SparseFinetuner(net, criterion=criterion)
    for block in ("target", "source") if criterion == "contrast" else ("target",):
        with ft.scoring(samples=1, of=block):
            backward(net)
            bad = float("nan") if block == of or criterion == "agreement" else 1.0
            (net(data()).square().mean() + net[3].bias.sum() * bad).backward()
    with pytest.raises(ValueError, match=r"the scores of 3\.weight are not finite"):
        ft.select()
    assert ft.evidence.count == 0


@pytest.mark.parametrize("criterion", ["agreement", "contrast", "gradient"])
def test_a_pass_that_fails_adds_nothing(criterion, monkeypatch):
    monkeypatch.setattr("minegan_fast.finetune.samples.passes.PENDING_BYTES", 1)
    net = build("mlp")
    ft = SparseFinetuner(net, criterion=criterion)
    blocks = ("target", "source") if criterion == "contrast" else ("target",)
    for of in blocks:
        with ft.scoring(of=of):
            backward(net)
    before = ft.scores()
    net[2].register_forward_hook(lambda module, args, output: Fails.apply(output))
    for of in blocks:
        with pytest.raises(KeyError, match="stop"), ft.scoring(of=of):
            backward(net)
    assert all(torch.equal(score, before[name]) for name, score in ft.scores().items())
