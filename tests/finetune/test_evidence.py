"""Every criterion against its equation, computed by hand; evidence leaves nothing behind."""

import copy

import pytest
import torch
from sample_networks import NETWORKS, assert_same, build, data

from minegan_fast.finetune import SparseFinetuner
from minegan_fast.finetune.evidence import BY_SAMPLE, CRITERIA


def per_neuron(ft, tensors):
    """{layer: sum over the neuron} of tensors {parameter: values}."""

    def sums(t, axis):
        return t.reshape(-1) if t.ndim < 2 else t.sum([i for i in range(t.ndim) if i != axis])

    return {layer.name: sum(sums(tensors[m.name], m.axis) for m in layer.members) for layer in ft.layers}


def gradients(net, pieces):
    """[{parameter: gradient}] of every piece."""
    twin = copy.deepcopy(net)
    result = []
    for x in pieces:
        twin.zero_grad()
        twin(x).square().mean().backward()
        result.append(
            {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in twin.named_parameters()}
        )
    return result


def see_the_source(ft, batches):
    """The source's evidence, which "contrast" alone takes, one piece a batch."""
    if ft.criterion == "contrast":
        with ft.scoring(of="source", samples=1):
            for x in batches:
                ft.model(x).square().mean().backward()


def expected(criterion, ft, net, pieces, lr=1e-2, source=()):
    w = {n: p.detach() for n, p in net.named_parameters()}
    if criterion == "contrast":
        target, own = (expected("fisher", ft, net, some) for some in (pieces, source))
        overall = torch.cat(list(own.values())).mean()  # stands in where the source's samples do not reach a layer
        return {n: f / (own[n] + 0.01 * (own[n].mean() if own[n].any() else overall)) for n, f in target.items()}
    if criterion == "agreement":
        mean, fisher = (expected(c, ft, net, pieces) for c in ("gradient", "fisher"))
        return {n: (m.square() / fisher[n]).nan_to_num() for n, m in mean.items()}
    g = gradients(net, pieces)
    mean = {n: sum(piece[n] for piece in g) / len(g) for n in w}
    if criterion == "fisher":
        squares = [per_neuron(ft, {n: t.square() for n, t in piece.items()}) for piece in g]
        return {n: sum(s[n] for s in squares) / len(g) for n in squares[0]}
    if criterion == "gradient":
        return {n: s.sqrt() for n, s in per_neuron(ft, {n: t.square() for n, t in mean.items()}).items()}
    if criterion == "saliency":
        return {n: s.abs() for n, s in per_neuron(ft, {n: mean[n] * w[n] for n in w}).items()}
    if criterion == "magnitude":
        return {n: s.sqrt() for n, s in per_neuron(ft, {n: t.square() for n, t in w.items()}).items()}
    dense = copy.deepcopy(net)
    optimizer = torch.optim.Adam(dense.parameters(), lr=lr, betas=(0.0, 0.99))
    for x in pieces:
        optimizer.zero_grad()
        dense(x).square().mean().backward()
        optimizer.step()
    moved = {n: (p.detach() - w[n]).square() for n, p in dense.named_parameters()}
    return {n: s.sqrt() for n, s in per_neuron(ft, moved).items()}


@pytest.mark.parametrize("criterion", [c for c in CRITERIA if c != "random"])
@pytest.mark.parametrize("name", ["modulated", "resnet", "tied", "constant", "convolutions"])
def test_scoring_block(name, criterion):
    net = build(name).eval()
    pieces = list(data(4).split(1))
    ft = SparseFinetuner(net, lr=1e-2, criterion=criterion)
    source = list(data(3, seed=7).split(1))
    see_the_source(ft, source)
    with ft.scoring(samples=1 if name == "constant" else None):  # it has no layer whose input tells their number
        for x in pieces:
            net(x).square().mean().backward()
    scores, want = ft.scores(), expected(criterion, ft, net, pieces, source=source)
    assert scores.keys() == want.keys() == {layer.name for layer in ft.layers}
    for layer, score in scores.items():
        assert (score.dtype, score.device.type) == (torch.float32, "cpu")
        torch.testing.assert_close(score, want[layer].float(), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_drop_in_steps_score_alike(criterion):
    """The first steps give the same scores as the block, batch by batch, and the last of them selects by them."""
    net, twin = build("convolutions"), build("convolutions")
    pieces = list(data(4).split(2))
    by_hand = SparseFinetuner(twin, lr=1e-2, criterion=criterion, density=0.3, seed=5)
    see_the_source(by_hand, [data(3, seed=7)])
    with by_hand.scoring(samples=1):
        for x in pieces:
            twin(x).square().mean().backward()
    ft = SparseFinetuner(net, lr=1e-2, criterion=criterion, density=0.3, seed=5, score_steps=2)
    see_the_source(ft, [data(3, seed=7)])
    for i, x in enumerate(pieces):
        assert ft.selection is None
        ft.zero_grad()
        net(x).square().mean().backward()
        ft.step()
        if criterion != "movement" or i == 1:
            assert_same(net, build("convolutions"))
    assert ft.selection == by_hand.select()
    for name, score in ft.scores().items():
        assert torch.equal(score, by_hand.scores()[name])
    assert_same(net, build("convolutions"))


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.filterwarnings("ignore:scored by the gradient of a whole batch")  # of batch norm in training mode
@pytest.mark.parametrize("selected", [False, True])
@pytest.mark.parametrize("samples", [None, 1])
def test_scoring_leaves_nothing_behind(criterion, samples, selected):
    """Gradients, flags, leaves, moments and bits are as before, also when the block raises."""
    net = build("resnet")
    net[1].requires_grad_(False)
    ft = SparseFinetuner(net, lr=1e-2, density=0.5, criterion=criterion)
    if selected:
        ft.select({"2.conv1.weight": [0, 2], "0.weight": [1]})
        net(data()).square().mean().backward()
        ft.step()
    ft.zero_grad()
    net(data()).square().mean().backward()
    net[0].requires_grad_(False)  # a script has turned one layer off for the moment
    before = copy.deepcopy(ft.state_dict()["state"])
    values = {n: v.clone() for n, v in net.named_parameters()}
    grads = {p: None if p.grad is None else (p.grad, p.grad.clone()) for p in net.parameters()}
    flags = {p: p.requires_grad for p in net.parameters()}

    def interrupted():
        with ft.scoring(samples=samples):
            net(data()).square().mean().backward()
            raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        interrupted()
    with ft.scoring(samples=samples):
        for seed in (1, 2):
            net(data(seed=seed)).square().mean().backward()
    assert ft.evidence.count == 3 * (3 if criterion in BY_SAMPLE and samples is None else 1)
    assert {p: p.requires_grad for p in net.parameters()} == flags
    for p, kept in grads.items():
        assert p.grad is (None if kept is None else kept[0])
        assert kept is None or torch.equal(*kept)
    assert all(torch.equal(v, values[n]) for n, v in net.named_parameters())
    after = ft.state_dict()["state"]
    assert before.keys() == after.keys()
    assert all(torch.equal(v, after[i][key]) for i, s in before.items() for key, v in s.items())
    if selected:
        ft.verify()
        net.requires_grad_(True)
        ft.step()
        ft.verify()


def test_movement_restores_buffers():
    for drop_in in (False, True):
        net, untouched = build("resnet"), build("resnet")
        ft = SparseFinetuner(net, lr=0.1, criterion="movement", density=0.3, score_steps=3)
        if drop_in:
            for i in range(3):
                ft.zero_grad()
                net(data()).square().mean().backward()
                ft.step()
                assert (ft.selection is None) == (i < 2)
        else:
            with ft.scoring():
                for _ in range(3):
                    net(data()).square().mean().backward()
                assert not torch.equal(net[0].weight, untouched[0].weight)
        assert_same(net, untouched)


@pytest.mark.parametrize("end", ["by hand", "release"])
def test_movement_that_is_cut_short_restores_too(end):
    net = build("mlp")
    ft = SparseFinetuner(net, lr=0.1, criterion="movement", score_steps=9)
    for _ in range(2):
        ft.zero_grad()
        net(data()).square().mean().backward()
        ft.step()
    scores = ft.scores()
    want = expected("movement", ft, build("mlp"), [data(), data()], lr=0.1)
    for layer, score in scores.items():
        torch.testing.assert_close(score, want[layer].float(), rtol=1e-6, atol=0)
    if end == "release":
        ft.release()
    else:
        ft.select({"1.weight": [0]})
    assert_same(net, build("mlp"))


def test_movement_in_a_block_ends_that_of_the_steps():
    """What the drop-in steps moved is measured and taken back before the block's own steps."""
    net = build("mlp")
    ft = SparseFinetuner(net, lr=0.1, criterion="movement", score_steps=9)
    net(data()).square().mean().backward()
    ft.step()
    with ft.scoring():
        assert_same(net, build("mlp"))
        net(data(seed=2)).square().mean().backward()
    assert_same(net, build("mlp"))


def test_movement_does_not_bring_back_what_a_checkpoint_replaced():
    net, other = build("resnet"), build("resnet", seed=9)
    other(data())
    ft = SparseFinetuner(net, lr=0.1, criterion="movement", density=0.3, score_steps=1)
    net.load_state_dict(other.state_dict())
    net.eval()
    net(data()).square().mean().backward()
    ft.step()
    assert_same(net, other)


def test_evidence_of_a_selection_is_used_once():
    net = build("mlp")
    ft = SparseFinetuner(net, density=0.3)
    with ft.scoring():
        net(data()).square().mean().backward()
    first = ft.scores()
    ft.select()
    assert ft.select() == ft.selection  # nothing new was seen
    with ft.scoring():
        net(2 * data()).square().mean().backward()
    twin = SparseFinetuner(build("mlp"))
    with twin.scoring():
        twin.model(2 * data()).square().mean().backward()
    assert all(torch.equal(s, twin.scores()[n]) for n, s in ft.scores().items())
    assert not torch.equal(first["1.weight"], ft.scores()["1.weight"])


def test_gradients_of_half_precision_do_not_overflow():
    net = torch.nn.Linear(4, 3).half()
    ft = SparseFinetuner(net, density=0.5)
    with ft.scoring():
        (net(torch.ones(1, 4).half()).sum() * 1000).backward()
    torch.testing.assert_close(ft.scores()["weight"], torch.full((3,), 5e6))


def test_random_is_uniform_and_seeded():
    scores = [SparseFinetuner(build("mlp"), criterion="random", seed=s).scores() for s in (0, 0, 1)]
    assert all(torch.equal(scores[0][n], scores[1][n]) for n in scores[0])
    assert not torch.equal(scores[0]["1.weight"], scores[2]["1.weight"])
    net, state = build("mlp"), torch.get_rng_state()
    SparseFinetuner(net, criterion="random").select()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_can_be_scored_and_selected(name):
    net = build(name)
    ft = SparseFinetuner(net, density=0.2)
    with ft.scoring(samples=1):
        for x in data(3).split(1):
            net(x).square().mean().backward()
    assert 0 < ft.select().density <= 0.5
    ft.verify()
