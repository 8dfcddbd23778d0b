"""The shares of a mixture: the solver against a grid and its optimality conditions, the estimate on gaussians."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from minegan_fast.mining import Mixture
from minegan_fast.mining.mixture import mixture_shares
from minegan_fast.ops import MmdTarget, mmd_groups
from minegan_fast.ops._features import median_distance

D = 8


def value(K, b, p):
    return p @ K @ p - 2 * p @ b


def random_problem(rng, N):
    """K of any rank, of clusters and of noise; b near a mixture or anywhere."""
    points = rng.normal(size=(N, rng.integers(1, 2 * N + 2)))
    if rng.random() < 0.3:
        points[rng.integers(N)] = points[0]
    K = points @ points.T / points.shape[1] + 5 * rng.random()
    b = K @ rng.dirichlet(np.full(N, rng.choice([0.05, 1.0])))
    return K, b + rng.normal(size=N) * rng.choice([0, 1e-3, 0.1, 1.0])


@pytest.mark.parametrize("N", [2, 3, 4])
def test_no_point_of_a_grid_is_better(N):
    steps = {2: 1000, 3: 100, 4: 40}[N]
    grid = np.array([q for q in itertools.product(range(steps + 1), repeat=N) if sum(q) == steps]) / steps
    rng = np.random.default_rng(N)
    for _ in range(60):
        K, b = random_problem(rng, N)
        p = mixture_shares(K, b)
        assert p.min() >= 0
        assert abs(p.sum() - 1) < 1e-12
        best = (np.einsum("gi,ij,gj->g", grid, K, grid) - 2 * grid @ b).min()
        assert value(K, b, p) <= best + 1e-9 * np.abs(K).max()
        assert value(K, b, p) >= best - 4 * np.abs(K).max() / steps, "the grid is not far from it either"


def assert_optimal(K, b, p):
    """Karush, Kuhn and Tucker: all branches with a share have one slope, and no other has a lower one."""
    slope = K @ p - b
    common = p @ slope
    size = np.abs(K).max() + np.abs(b).max()
    assert p.min() >= 0
    assert abs(p.sum() - 1) < 1e-12
    assert (slope - common).min() >= -1e-8 * size
    assert np.abs((slope - common) * p).max() <= 1e-8 * size


@pytest.mark.parametrize("N", [1, 2, 5, 16, 33, 64])
def test_the_optimality_conditions_hold(N):
    rng = np.random.default_rng(N)
    for _ in range(40):
        K, b = random_problem(rng, N)
        assert_optimal(K, b, mixture_shares(K, b))


def projected(K):
    """K on the directions of sum 0, its negative eigenvalues there set to 0."""
    P = np.eye(len(K)) - 1 / len(K)
    values, vectors = np.linalg.eigh(P @ K @ P)
    return (vectors * values.clip(0)) @ vectors.T


@pytest.mark.parametrize("N", [2, 8, 40])
def test_an_indefinite_matrix_is_projected(N):
    rng, least = np.random.default_rng(N), []
    for _ in range(20):
        noise = rng.normal(size=(N, N))
        K = noise + noise.T + 3
        u = K.mean(1) - K.mean() / 2
        b = rng.normal(size=N)
        p = mixture_shares(K, b)
        assert_optimal(projected(K), b - u, p)
        least.append(np.linalg.eigvalsh(K - u[:, None] - u)[0])
    assert min(least) < -1


def test_what_adds_the_same_to_all_changes_nothing():
    K, b = random_problem(np.random.default_rng(1), 5)
    u = np.arange(5.0)
    np.testing.assert_allclose(mixture_shares(K + u[:, None] + u, b + u), mixture_shares(K, b), atol=1e-8)


def test_branches_that_are_the_same_get_equal_shares():
    K = np.array([[1.0, 1, 0], [1, 1, 0], [0, 0, 1]])
    np.testing.assert_allclose(mixture_shares(K, np.array([0.6, 0.6, 0.4])), [0.3, 0.3, 0.4], atol=1e-6)
    np.testing.assert_allclose(mixture_shares(np.ones((4, 4)), np.ones(4)), [0.25] * 4)
    np.testing.assert_allclose(mixture_shares(np.zeros((3, 3)), np.array([0.0, 2, 1])), [0, 1, 0])
    np.testing.assert_allclose(mixture_shares(np.array([[7.0]]), np.array([3.0])), [1])
    with pytest.raises(ValueError, match="the kernel means hold NaN or inf"):
        mixture_shares(np.full((2, 2), np.nan), np.zeros(2))


class Gaussians:
    """N unit gaussians whose means are `apart` along axes of their own, and a target of them in exact shares."""

    def __init__(self, shares, apart, seed=0, count=100, unbiased=True):
        self.means, self.random = apart * torch.eye(D)[: len(shares)].double(), torch.Generator().manual_seed(seed)
        self.y = torch.cat([self.draw(i, round(share * count)) for i, share in enumerate(shares)])
        self.sigma = median_distance(self.y)
        self.target = MmdTarget([self.y], [self.sigma], unbiased)

    def draw(self, i, n):
        return torch.randn(n, D, generator=self.random, dtype=torch.float64) + self.means[i]

    def batch(self, n=16):
        return [[self.draw(i, n)] for i in range(len(self.means))]

    def truth(self):
        """p for infinitely many samples of the branches, whose kernel means have a closed form."""
        v = self.sigma**2
        K = (v / (v + 2)) ** (D / 2) * torch.exp(-(torch.cdist(self.means, self.means) ** 2) / (2 * (v + 2)))
        b = (v / (v + 1)) ** (D / 2) * torch.exp(-(torch.cdist(self.means, self.y) ** 2) / (2 * (v + 1)))
        return mixture_shares(K.numpy(), b.mean(1).numpy()), K, b.mean(1)


def test_the_means_are_those_of_the_distributions():
    toy = Gaussians([0.25, 0.75, 0], 1.5)
    mixture = Mixture(3, toy.target, window=300)
    for _ in range(300):
        mixture.update(toy.batch())
    p, K, b = toy.truth()
    torch.testing.assert_close(mixture.K, K, atol=0.01, rtol=0)
    torch.testing.assert_close(mixture.b, b, atol=0.01, rtol=0)
    assert np.abs(mixture.p.numpy() - p).max() < 0.03


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_shares_are_found(share):
    """The mean of 3 seeds, with a third branch that has none, in 50 steps."""
    found = []
    for seed in range(3):
        toy = Gaussians([share, 1 - share, 0], 2, seed)
        mixture = Mixture(3, toy.target)
        for _ in range(50):
            mixture.update(toy.batch())
        found.append(mixture.p)
    assert (torch.stack(found).mean(0) - torch.tensor([share, 1 - share, 0])).abs().max() < 0.08


def mean_error(unbiased, batches, apart, runs=60):
    errors = []
    for seed in range(runs):
        toy = Gaussians([0.25, 0.75], apart, seed, unbiased=unbiased)
        mixture = Mixture(2, toy.target)
        for _ in range(batches):
            mixture.update(toy.batch())
        errors.append(mixture.p[0] - toy.truth()[0][0])
    errors = torch.stack(errors)
    return float(errors.mean()), float(errors.std() / runs**0.5)


def test_the_bias_that_is_left():
    """As the module says: none to be seen with 20 unbiased batches; towards equal shares with biased ones, however
    many, and with one unbiased batch, whose K is mostly noise."""
    mean, error = mean_error(True, 20, 0.7)
    assert abs(mean) < 3 * error
    for batches in (5, 20):
        mean, error = mean_error(False, batches, 0.7)
        assert abs(mean - 0.15) < 0.05 > 3 * error
    mean, error = mean_error(True, 1, 0.4, runs=200)
    assert mean > 3 * error


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    hits, widths = [], {10: [], 40: []}
    for seed in range(40):
        toy = Gaussians([0, 0.25, 0.75], 1.5, seed)
        mixture = Mixture(3, toy.target)
        for step in range(40):
            mixture.update(toy.batch())
            if step + 1 in widths:
                low, high = mixture.interval(draws=60).T
                widths[step + 1].append(high - low)
        assert ((low <= mixture.p) & (mixture.p <= high)).all()
        p = torch.from_numpy(toy.truth()[0])
        hits.append((low - 1e-9 <= p) & (p <= high + 1e-9))
    # 0.9 of 120, which hang together, less three deviations; and not nearly always.
    assert 0.78 < torch.stack(hits).double().mean() < 0.99
    narrow, wide = torch.stack(widths[40]).mean(), torch.stack(widths[10]).mean()
    assert 0.4 < narrow / wide < 0.65, "a half for four times as many batches"


def test_the_interval_of_little_is_everything():
    toy = Gaussians([0.5, 0.5], 2)
    mixture = Mixture(2, toy.target)
    assert mixture.interval().tolist() == [[0, 1], [0, 1]]
    mixture.update(toy.batch())
    assert mixture.interval().tolist() == [[0, 1], [0, 1]]
    mixture.update(toy.batch())
    assert torch.equal(mixture.interval(), mixture.interval())
    assert (mixture.interval(0.5) <= mixture.interval(0.9)).all(1).any()


def test_distance_is_mmd_of_the_mixture():
    """For one branch that of mmd_groups; for a mixture that of samples drawn in these shares, on average."""
    toy = Gaussians([0.25, 0.75], 2)
    alone, features = Mixture(1, toy.target), [toy.draw(0, 16)]
    alone.update([features])
    assert alone.p.tolist() == [1]
    expected = float(mmd_groups(features, toy.target))
    assert abs(alone.distance - expected) < 1e-12
    assert abs(float(alone.loss([features])) - expected) < 1e-12
    mixture = Mixture(2, toy.target, window=200)
    for _ in range(200):
        mixture.update(toy.batch())
    n = 400
    counts = (mixture.p * n).round().int().tolist()
    drawn = torch.stack([
        mmd_groups([torch.cat([toy.draw(i, count) for i, count in enumerate(counts)])], toy.target) for _ in range(20)
    ])  # fmt: skip
    assert abs(mixture.distance - float(drawn.mean())) < 4 * float(drawn.std()) / 20**0.5 + 1e-3


class Branch(nn.Module):
    def __init__(self, mean):
        super().__init__()
        self.mean = nn.Parameter(mean.clone())

    def forward(self, n):
        return [self.mean + torch.randn(n, D, dtype=torch.float64)]


def test_miners_follow_the_mixture_and_branches_without_a_share_stay():
    """Two branches beside their parts of the target move onto them; a third, far away, gets no share, no gradient."""
    toy = Gaussians([0.25, 0.75, 0], 3)
    shift = torch.zeros(3, D).double()
    shift[0, 4] = shift[1, 5] = 1.5
    shift[2, 6] = 10
    branches = [Branch(mean) for mean in toy.means + shift]
    mixture = Mixture(3, toy.target, window=20)
    parameters = [branch.mean for branch in branches]
    optimizer, distances, without = torch.optim.Adam(parameters, 0.05), [], 0
    for _ in range(150):
        features = [branch(16) for branch in branches]
        mixture.update(features)
        distances.append(mixture.distance)
        optimizer.zero_grad()
        mixture.loss(features).backward()
        assert (parameters[2].grad is None) == (mixture.p[2] == 0)
        without += parameters[2].grad is None
        optimizer.step()
    assert without > 30
    assert mixture.p[2] < 0.02
    assert np.mean(distances[-10:]) < 0.2 * np.mean(distances[:10])
    assert abs(float(mixture.p[0]) - 0.25) < 0.12
    for i in (0, 1):
        assert (branches[i].mean - toy.means[i]).norm() < 0.8


def test_the_loss_has_the_gradient_of_the_mixture():
    toy = Gaussians([0.3, 0.7, 0], 2)
    mixture = Mixture(3, toy.target)
    for _ in range(30):
        mixture.update(toy.batch())
    assert mixture.p[2] < 0.1
    mixture._p = np.array([0.4, 0.6, 0])
    x, z, other = (toy.draw(i, n).requires_grad_() for i, n in ((0, 5), (1, 7), (2, 3)))
    loss = mixture.loss([[x], [z], [other]])
    assert torch.equal(loss, mixture.loss([[x], [z], None]))
    loss.backward()
    assert other.grad is None

    def kernel(p, q):
        return torch.exp(-torch.cdist(p, q).square() / (2 * toy.sigma**2))

    def within(p):
        return (kernel(p, p).sum() - len(p)) / (len(p) * (len(p) - 1))

    a, c = x.detach().requires_grad_(), z.detach().requires_grad_()
    plain = 0.16 * within(a) + 0.36 * within(c) + 0.48 * kernel(a, c).mean()
    plain = plain - 2 * (0.4 * kernel(a, toy.y).mean() + 0.6 * kernel(c, toy.y).mean()) + within(toy.y)
    plain.backward()
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(x.grad, a.grad)
    torch.testing.assert_close(z.grad, c.grad)


def test_the_window_forgets_and_a_state_goes_on():
    toy = Gaussians([0.25, 0.75], 2)
    one, other = Mixture(2, toy.target, window=3), Mixture(2, toy.target, window=3)
    batches = [toy.batch() for _ in range(5)]
    for batch in batches:
        one.update(batch)
    for batch in batches[2:]:
        other.update(batch)
    assert torch.equal(one.K, other.K)
    assert torch.equal(one.p, other.p)
    resumed = Mixture(2, toy.target, window=3)
    resumed.load_state_dict(one.state_dict())
    assert torch.equal(resumed.p, one.p)
    for mixture in (one, resumed):
        mixture.update(batches[0])
    assert torch.equal(resumed.p, one.p)
    assert torch.equal(resumed.interval(), one.interval())
    p = one.p
    one.reset()
    assert torch.equal(one.p, p)
    with pytest.raises(ValueError, match=r"nothing is known of the mixture yet: call update\(\) first"):
        _ = one.distance
    fresh = Mixture(2, toy.target)
    fresh.load_state_dict(Mixture(2, toy.target).state_dict())
    assert fresh.p.tolist() == [0.5, 0.5]


def test_what_does_not_fit_is_named():
    toy = Gaussians([0.25, 0.75], 2)
    mixture, x = Mixture(2, toy.target), toy.draw(0, 4)
    for make, message in (
        (lambda: Mixture(0, toy.target), "at least 1 branch and a window of at least 1 batch, got 0, 100"),
        (lambda: Mixture(2, toy.target, window=0), "got 2, 0"),
        (lambda: mixture.update([[x]]), "features of 1 branches, and the mixture has 2"),
        (lambda: mixture.loss([[x], [x], [x]]), "features of 3 branches"),
        (lambda: mixture.loss([[x], None]), "branch 1 has the share 0.5, and its features are missing"),
        (lambda: mixture.update([[x], [x / 0]]), r"group 0 of branches\[1\] holds NaN or inf in 4 of 4 rows"),
        (lambda: mixture.interval(1.0), "level must be between 0 and 1"),
        (lambda: mixture.interval(draws=0), "draws at least 1, got 0.9 and 0"),
        (lambda: mixture.load_state_dict(Mixture(3, toy.target).state_dict()), "of 3 branches, and this mixture has 2"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_a_branch_without_features_has_no_share_while_its_batch_is_known():
    torch.manual_seed(0)
    target = torch.randn(40, D)
    mixture = Mixture(3, MmdTarget([target], [[median_distance(target)]], unbiased=True), window=2)

    def batch(shift):
        return [torch.randn(12, D) + shift]

    near, far = batch(0.0), batch(3.0)
    mixture.update([far, None, near])
    assert mixture.p[1] == 0
    alone = Mixture(2, mixture.target)
    alone.update([far, near])
    assert torch.equal(mixture.p[[0, 2]], alone.p)
    assert mixture.distance == pytest.approx(alone.distance)
    mixture.update([far, near, far])
    assert not mixture.interval()[1].any()
    assert mixture.p[1] == 0, "the batch without it is in the window"
    mixture.update([far, near, far])
    assert mixture.p[1] > 0.5
    assert mixture.batches == 2
    with pytest.raises(ValueError, match="branches is empty"):
        mixture.update([None, None, None])
    mixture.update([None, near, None])
    with pytest.raises(ValueError, match="no branch has had features in every batch of the window"):
        mixture.update([near, None, near])
