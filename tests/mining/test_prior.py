"""How far mined latents are from the prior, and what keeps them there: against the equations, exact expectations."""

import copy
import itertools

import pytest
import torch
from torch import nn

from minegan_fast.mining import Mined, Miner, load_mined, save_miner
from minegan_fast.mining.prior import (
    default_prior,
    effective_dimension,
    latent_statistics,
    own_latents,
    prior_penalty,
    project,
    whitening,
)
from minegan_fast.models import PGANGenerator, StyleGAN2Generator, StyleGANGenerator


class Sum(nn.Module):
    """(z [B, 6], class embedding [B, 3]) -> [B, 9]."""

    latent_dim, class_dim, num_classes = 6, 3, 4

    def forward(self, z, y=None, *, scale=1.0):
        return scale * (z if y is None else torch.cat((z, y), 1))


def stylegan2(**settings):
    settings = {"latent_dim": 6, "style_dim": 7, "channel_base": 64, "channel_max": 4, "mapping_layers": 2, **settings}
    return StyleGAN2Generator(8, **settings).eval()


def random_miner(size=6, **settings):
    miner = Miner(size, **settings)
    with torch.no_grad():
        for parameter in miner.parameters():
            parameter.normal_()
    return miner


def draws(n, d, seed=0, dtype=torch.float64):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_the_sphere_keeps_directions_and_fixes_the_length():
    z = draws(7, 10) * torch.logspace(-3, 3, 7)[:, None]
    on = project(z, "sphere")
    torch.testing.assert_close(on.square().sum(1), torch.full((7,), 10.0).double(), rtol=0.02, atol=0)
    torch.testing.assert_close(on[1:].square().sum(1), torch.full((6,), 10.0).double(), rtol=2e-4, atol=0)
    torch.testing.assert_close(nn.functional.normalize(on), nn.functional.normalize(z))
    assert torch.equal(project(z, "sphere+moments"), on)
    for prior in ("moments", "shell", "none"):
        assert project(z, prior) is z


def test_zero_stays_zero_with_a_finite_gradient():
    z = torch.zeros(2, 5, requires_grad=True)
    on = project(z, "sphere")
    on.sum().backward()
    assert not on.any()
    assert z.grad.isfinite().all()


def test_the_sphere_in_half_precision_is_that_of_float32():
    z = draws(3, 1000, dtype=torch.float32).half() * 300  # |z|²/d is beyond float16
    torch.testing.assert_close(project(z, "sphere"), project(z.float(), "sphere").half(), rtol=0, atol=0)


def test_shell():
    z = draws(5, 4)
    expected = sum((sum(float(x) ** 2 for x in row) / 4 - 1) ** 2 for row in z) / 5
    assert float(prior_penalty(z, "shell")) == pytest.approx(expected)
    assert float(prior_penalty(project(z, "sphere"), "shell")) < 1e-12
    assert prior_penalty(z, "none") == 0
    assert prior_penalty(z, "sphere") == 0
    assert prior_penalty(z, "sphere+moments") == prior_penalty(z, "moments")


@pytest.mark.parametrize("prior", ["sphere", "none", "moments", "sphere+moments"])
def test_where_there_is_no_penalty_a_backward_is_no_error(prior):
    z = draws(1, 4).requires_grad_()  # a single sample says nothing about moments
    prior_penalty(z, prior).backward()
    assert z.grad is not None
    assert not z.grad.any()


def moments(mean, second, prior):
    """(|μ|² + |S - V|²) / d."""
    return float((mean.square().sum() + (second - prior).square().sum()) / len(mean))


@pytest.mark.parametrize("n", [2, 3])
def test_moments_are_unbiased_at_every_batch_size(n):
    """Over all batches of a distribution of three points the mean of the estimates is the exact value."""
    points = draws(3, 4) + 0.3
    exact = moments(points.mean(0), points.T @ points / 3, torch.eye(4).double())
    estimates = [prior_penalty(points[list(chosen)], "moments") for chosen in itertools.product(range(3), repeat=n)]
    torch.testing.assert_close(float(torch.stack(estimates).mean()), exact)


def test_on_the_sphere_the_moments_are_the_cost_of_collapse():
    z = project(draws(4000, 10) * torch.tensor([3, 2] + 8 * [1]).double() + 0.5, "sphere")
    second = z.T @ z / 4000
    expected = z.mean(0).square().sum() / 10 + 10 * second.square().sum() / second.trace() ** 2 - 1
    assert float(prior_penalty(z, "sphere+moments")) == pytest.approx(float(expected), abs=0.01)


def test_moments_see_a_shift_a_scale_and_a_collapse():
    z = draws(2000, 8)
    z = (z - z.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(z.T))).T  # sample moments of N(0, I)
    flat = z * torch.tensor([2, 2, 0, 0, 0, 0, 0, 0]).double()
    values = {name: float(prior_penalty(x, "moments")) for name, x in {"own": z, "shift": z + 0.5}.items()}
    assert values["own"] == pytest.approx(0, abs=0.02)
    assert values["shift"] == pytest.approx(0.25 + 2 * (0.25) ** 2 * 4, abs=0.06)  # S - I = ¼ 11ᵀ: 64/16 over 8
    assert float(prior_penalty(2 * z, "moments")) == pytest.approx(9, rel=0.03)
    assert float(prior_penalty(flat, "moments")) == pytest.approx((2 * 9 + 6) / 8, rel=0.03)


@pytest.mark.parametrize("prior", ["shell", "moments"])
def test_descent_leads_back_to_the_prior(prior):
    torch.manual_seed(0)
    scale = nn.Parameter(torch.full((10,), 1.6))
    optimizer = torch.optim.Adam([scale], 0.03)
    for _ in range(100):
        optimizer.zero_grad()
        prior_penalty(torch.randn(32, 10) * scale, prior).backward()
        optimizer.step()
    norm = float(scale.detach().square().mean())
    assert (0.7 if prior == "shell" else 0.85) < norm < 1.15  # that of the shell is smallest at |z|²/d of 10 / 12


@pytest.mark.parametrize(("n", "d"), [(5, 3), (6, 100), (32, 100), (400, 50)])
def test_the_effective_dimension_of_the_prior_is_about_d(n, d):
    """The ratio of two unbiased estimates: the inverse, of which only the numerator varies little, averages to 1/d."""
    repeats = 100 if n < 100 else 5
    values = torch.tensor([1 / effective_dimension(draws(n, d, seed=i)) for i in range(repeats)])
    error = float(values.std() / repeats**0.5)
    assert abs(float(values.mean()) - 1 / d) < 4 * error + 0.02 / d


def test_the_parts_of_the_effective_dimension_are_means_over_four_samples():
    z = draws(6, 3)
    above = below = 0.0
    for i, j, k, m in itertools.permutations(range(6), 4):
        a, b = z[i] - z[j], z[k] - z[m]
        above += float((a @ a) * (b @ b)) / 4
        below += float((a @ b) ** 2) / 4
    assert effective_dimension(z) == pytest.approx(above / below)
    assert effective_dimension(z + 100) == pytest.approx(above / below, rel=1e-6)


def test_the_effective_dimension_of_unequal_directions():
    scales = torch.tensor([3.0, 2.0, 1.0, 0.0, 0.0]).double()
    expected = float(scales.square().sum() ** 2 / scales.pow(4).sum())
    assert effective_dimension(draws(5000, 5) * scales) == pytest.approx(expected, rel=0.03)
    line = draws(200, 1) * scales
    assert effective_dimension(line) == pytest.approx(1)
    assert effective_dimension(torch.ones(5, 3)) == 0


def test_statistics_of_z():
    z = draws(4000, 20) * 1.2
    z[:, 0] += 3
    found = latent_statistics(z)
    assert found["norm"] == pytest.approx(float(z.square().sum(1).mean()) / 20)
    assert found["norm_spread"] == pytest.approx(float((z.square().sum(1) / 20).std()))
    assert found["mean"] == pytest.approx(9 / 20, rel=0.05)
    assert found["dimension"] == pytest.approx(20, rel=0.03)
    assert found["dimension_prior"] == 20
    assert "mahalanobis" not in found
    assert abs(latent_statistics(draws(10, 500))["mean"]) < 0.02, "the mean of ten samples has |mean|²/d of 0.1"


def test_whitened_samples_have_the_length_of_the_prior():
    w = draws(3000, 6) @ torch.diag(torch.tensor([5, 3, 1, 1, 0.1, 1e-6]).double()) @ draws(6, 6) + 7
    own = whitening(w)
    white = own(w)
    torch.testing.assert_close(torch.cov(white.T), torch.diag(own.variances), rtol=0, atol=1e-9)
    torch.testing.assert_close(white.mean(0), torch.zeros(6).double(), rtol=0, atol=1e-9)
    assert float(own.variances.mean()) == pytest.approx(1)
    assert own.variances.min() < 0.01, "an axis without variance is no measure of distance"
    found = latent_statistics(w, w)
    assert found["mahalanobis"] == found["norm"] == pytest.approx(1, abs=1e-3)
    assert found["dimension"] == found["dimension_prior"] == pytest.approx(effective_dimension(w))
    far = w + 2 * w.std(0)
    assert latent_statistics(far, own)["mahalanobis"] > 2
    assert float(prior_penalty(w, "moments", own)) == pytest.approx(0, abs=0.01)
    assert float(prior_penalty(far, "moments", own)) > 1
    with pytest.raises(ValueError, match="the samples of w are all equal"):
        whitening(torch.ones(8, 3))


def test_moments_of_w_are_unbiased():
    own, points = whitening(draws(50, 4) * torch.tensor([3, 1, 1, 0.01]).double()), draws(3, 4) + 0.3
    white = own(points)
    exact = moments(white.mean(0), white.T @ white / 3, torch.diag(own.variances))
    batches = itertools.product(range(3), repeat=2)
    estimates = [prior_penalty(points[list(chosen)], "moments", own) for chosen in batches]
    assert float(torch.stack(estimates).mean()) == pytest.approx(exact)


def test_a_generators_own_w():
    generator = stylegan2()
    assert own_latents(generator, "z") is None
    before = torch.get_rng_state()
    own = own_latents(generator, "w")
    assert torch.equal(torch.get_rng_state(), before)
    w = generator.mapping(torch.randn(4000, 6)).detach()
    assert latent_statistics(w, own)["mahalanobis"] == pytest.approx(1, abs=0.1)
    assert not own.mean.requires_grad


@pytest.mark.parametrize(
    "generator",
    [
        stylegan2,
        lambda: StyleGANGenerator(8, 6, 64, 4, mapping_layers=2, style_dim=7),
        lambda: PGANGenerator(8, 6, 32, 4),
    ],
    ids=["StyleGAN2", "StyleGAN", "PGAN"],
)
def test_families_that_normalise_z_make_the_same_images_of_the_sphere(generator):
    generator, miner, u = generator().eval(), random_miner(), torch.randn(5, 6)
    assert (default_prior("z"), default_prior("w")) == ("sphere+moments", "moments")
    keywords = {} if isinstance(generator, PGANGenerator) else {"noise": "none"}
    free, bound = (Mined(generator, miner, prior=prior) for prior in ("none", "sphere"))
    torch.testing.assert_close(bound(u, **keywords), free(u, **keywords), rtol=1e-4, atol=1e-5)
    assert free.latents(u).square().mean() > 2
    assert bound.statistics(bound.latents(u))["norm"] == pytest.approx(1, abs=1e-5)


def test_mined_projects_z_and_never_the_class():
    miner, class_miner, u = random_miner(), random_miner(output_dim=3, residual=False), torch.randn(4, 6)
    mined = Mined(Sum(), miner, class_miner, prior="sphere")
    z = project(miner(u), "sphere")
    assert torch.equal(mined.latents(u), z)
    assert torch.equal(mined(u, scale=2.0), 2 * torch.cat((z, class_miner(u)), 1))
    assert torch.equal(mined.images(-z, u), torch.cat((-z, class_miner(u)), 1))
    assert torch.equal(Mined(Sum(), miner, class_miner, prior="moments").latents(u), miner(u))


def test_mined_w_has_a_penalty_and_statistics_by_its_reference():
    generator, u = stylegan2(), torch.randn(64, 6)
    own = own_latents(generator, "w")
    mined = Mined(generator, random_miner(7), place="w", prior="moments", reference=own)
    w = mined.latents(u)
    assert torch.equal(w, mined.miner(generator.mapping(u)))
    assert torch.equal(mined.images(w, u, noise="none"), mined(u, noise="none"))
    assert torch.equal(mined.penalty(w), prior_penalty(w, "moments", own))
    assert mined.penalty(w) > 0
    assert mined.statistics(w) == latent_statistics(w, own)
    bare = Mined(generator, Miner(7), place="w", prior="moments")
    for method in (bare.penalty, bare.statistics):
        with pytest.raises(ValueError, match="give reference=own_latents"):
            method(w)


def test_the_prior_stays_with_copies_and_files(tmp_path):
    mined, u = Mined(Sum(), random_miner(), prior="sphere"), torch.randn(3, 6)
    save_miner(tmp_path / "m.safetensors", mined)
    for other in (mined.before(Sum()), copy.deepcopy(mined), load_mined(tmp_path / "m.safetensors", Sum())):
        assert other.prior == "sphere"
        assert torch.equal(other(u), mined(u))
    generator = stylegan2()
    own = own_latents(generator, "w")
    in_w = Mined(generator, Miner(7), place="w", prior="shell", reference=own)
    assert in_w.before(stylegan2()).reference is own
    save_miner(tmp_path / "w.safetensors", in_w)
    assert load_mined(tmp_path / "w.safetensors", generator).prior == "shell"


def test_a_file_without_a_prior_has_none_and_a_wrong_one_is_named(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    path = tmp_path / "m.safetensors"
    save_miner(path, Mined(Sum(), random_miner(), prior="sphere"))
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    save_file(tensors, path, {k: v for k, v in metadata.items() if k != "prior"})
    assert load_mined(path, Sum()).prior == "none"
    save_file(tensors, path, metadata | {"prior": "cube"})
    with pytest.raises(ValueError, match=r"does not fit the generator: prior must be one of .*, got 'cube'"):
        load_mined(path, Sum())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: project(torch.ones(2, 3), "cube"), "prior must be one of sphere, moments, .*, got 'cube'"),
        (lambda: prior_penalty(torch.ones(2, 3), "cube"), "got 'cube'"),
        (lambda: Mined(Sum(), Miner(6), prior="cube"), "got 'cube'"),
        (
            lambda: Mined(stylegan2(), Miner(7), place="w", prior="sphere"),
            "the prior sphere is for z; w lies on no sphere",
        ),
        (lambda: Mined(stylegan2(), Miner(7), place="w", prior="sphere+moments"), "sphere.moments is for z"),
        (lambda: effective_dimension(torch.ones(3, 3)), "takes 4 samples or more, got 3"),
        (lambda: latent_statistics(torch.ones(3, 3)), "takes 4 samples or more, got 3"),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
