"""The distribution that a generator was trained on, and how mined latents are kept near it.

A generator knows z ~ N(0, I), d numbers each, whose length is nearly the same: |z|²/d = 1 ± √(2/d). A miner that leaves
it finds images that the generator never made. What keeps it there, for z [n, d]:

    sphere           z <- z √d / |z|, a part of the network
    moments          a penalty P = (|μ|² + |S - V|²) / d, μ = E z, S = E z zᵀ, V that of the prior: I; 0 for N(0, I)
    sphere+moments   both
    shell            a penalty P = mean_i (|z_i|²/d - 1)²; 2/d for N(0, I)
    none

Of `moments` the batch gives an unbiased estimate, whatever its size n >= 2, since each square becomes a product of two
different samples:

    |μ|² ≈ mean_{i≠j} z_i·z_j        |S - V|² ≈ mean_{i≠j} (z_i·z_j)² - 2 mean_i z_iᵀ V z_i + tr V²

It may thus be negative. It is the unbiased MMD² to the prior under the kernel x·y + (x·y)², with the prior's
expectations in closed form. The sphere alone bounds the length of z, not how much of it all z have in common: a miner
may put every z a dozen deviations along one direction. S sees that, and on the sphere |S - I|²/d = tr S²/d - 1 is
d / (effective dimension) - 1, without centring: a cost of collapse.

The same for w, whose distribution the mapping network makes: w is whitened first (`Whitening`).
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

PRIORS = ("sphere", "moments", "sphere+moments", "shell", "none")


class Mapped(Protocol):
    """A generator with a mapping network z [B, latent_dim] -> w [B, style_dim], of labels too where there are any."""

    latent_dim: int

    def mapping(self, z: Tensor, *y: Tensor) -> Tensor: ...


class Whitening(NamedTuple):
    """A distribution's mean and axes: (w - mean) @ axes [n, d] has the mean 0 and the diagonal covariance `variances`.

    The axes are the principal ones, each divided by its deviation; what the regularisation takes from the small
    variances is given to all, so that the mean squared length of a whitened sample is d.
    """

    mean: Tensor  # [d]
    axes: Tensor  # [d, d]
    variances: Tensor  # [d], of mean 1
    dimension: float  # effective dimension of the samples, see `effective_dimension`

    def __call__(self, w: Tensor) -> Tensor:
        return (w - self.mean.to(w)) @ self.axes.to(w)


@torch.no_grad()
def whitening(samples: Tensor, regularisation: float = 1e-2) -> Whitening:
    """Of samples [n >= 4, d]. The share `regularisation` of their mean variance is added to the variance of every axis:
    directions in which the samples hardly move would decide every distance otherwise. ValueError: samples that are all
    equal."""
    x = samples.double()
    mean = x.mean(0)
    variances, axes = torch.linalg.eigh((x - mean).T @ (x - mean) / (len(x) - 1))
    variances = variances.clamp(min=0)
    if not variances.sum() > 0:
        raise ValueError("the samples of w are all equal, so they give no distance: mine z")
    floor = regularisation * variances.mean()
    scale = (variances / (variances + floor)).mean().rsqrt()
    scales = scale * (variances + floor).rsqrt()
    return Whitening(mean, axes * scales, variances * scales.square(), effective_dimension(x))


@torch.no_grad()
def own_latents(
    generator: nn.Module, place: str = "z", samples: int = 4096, labels: Sequence[int] | None = None
) -> Whitening | None:
    """Where a generator's own w lie, from `samples` draws under a fixed seed; for place z None, which is N(0, I).

    labels: of a conditional generator those that are drawn, each as often; None for all.
    """
    if place == "z":
        return None
    like = next(generator.parameters())
    mapped = cast(Mapped, generator)
    drawn = torch.Generator().manual_seed(0)
    z = torch.randn(samples, mapped.latent_dim, generator=drawn).to(like)
    if not (classes := getattr(generator, "num_classes", 0)):
        return whitening(mapped.mapping(z))
    known = torch.arange(classes) if labels is None else torch.tensor([*labels])
    y = known[torch.randint(len(known), (samples,), generator=drawn)]
    return whitening(mapped.mapping(z, y.to(like.device)))


def default_prior(place: str = "z") -> str:
    """The prior that suits a place, as measured: moments for w, sphere+moments for z.

    Where a generator normalises z itself (StyleGAN, StyleGAN2, Progressive GAN), the sphere changes no image; it keeps
    the numbers that are reported, and the miner's weights, at the scale that the generator sees. Without the moments
    some hundred steps leave a tenth of the directions there too.
    """
    return "moments" if place == "w" else "sphere+moments"


def check_prior(prior: str, place: str = "z") -> None:
    """ValueError: no prior of that name, or none for that place."""
    if prior not in PRIORS:
        raise ValueError(f"prior must be one of {', '.join(PRIORS)}, got {prior!r}")
    if on_sphere(prior) and place == "w":
        raise ValueError(f"the prior {prior} is for z; w lies on no sphere: take moments, shell or none")


def on_sphere(prior: str) -> bool:
    """Whether a prior is a part of the network: a projection onto the sphere."""
    return prior.startswith("sphere")


def project(z: Tensor, prior: str) -> Tensor:
    """z [n, d] -> [n, d]: z √d / |z| with the prior sphere or sphere+moments, z itself with another. As PixelNorm does,
    it adds 1e-8 to |z|²/d, so that 0 stays 0."""
    check_prior(prior)
    if not on_sphere(prior):
        return z
    x = z.to(torch.promote_types(z.dtype, torch.float32))
    return (x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-8)).to(z.dtype)


def prior_penalty(z: Tensor, prior: str, reference: Whitening | None = None) -> Tensor:
    """The penalty P above of a batch z [n, d], a scalar in float32 or z's wider dtype; 0 where the prior has none.

    A single sample says nothing about moments: they cost it nothing.
    reference: of the generator's own w, where z is w. ValueError: an unknown prior, sphere for w.
    """
    check_prior(prior, "z" if reference is None else "w")
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    z = z if reference is None else reference(z)
    n, d = z.shape
    if prior == "shell":
        return (z.square().mean(1) - 1).square().mean()
    if "moments" not in prior or n < 2:
        return 0 * z.sum()  # with a graph, as a trainer calls backward
    v = torch.ones_like(z[0]) if reference is None else reference.variances.to(z)
    products = z @ z.T
    products = products - torch.diag(products.diagonal())
    pairs = (products + products.square()).sum() / (n * (n - 1))
    return (pairs - 2 * (z.square() @ v).mean() + v.square().sum()) / d


def effective_dimension(z: Tensor) -> float:
    """(tr C)² / tr C², C the covariance of z [n >= 4, d]: d where all directions vary alike, 1 on a line, 0 at a point.

    The covariance of n samples has at most n - 1 directions, which would make it too small. Both parts are therefore
    the unbiased estimates, means over four different samples (Himeno and Yamada 2014, Journal of Multivariate Analysis
    130): for centred z, with q_i = |z_i|², Q = Σ q_i, P = Σ q_i², N = |zᵀz|², and a common factor left out,

        (tr C)² ≈ (n² - 3n + 1) Q² - n(n-1) P + 2 N        tr C² ≈ (n-1)(n-2) N + Q² - n(n-1) P
    """
    n, d = z.shape
    if n < 4:
        raise ValueError(f"the effective dimension takes 4 samples or more, got {n}")
    z = z.detach().double()
    z = z - z.mean(0)
    squares = z.square().sum(1)
    total, fourth = squares.sum(), squares.square().sum()
    pairs = (z.T @ z if d < n else z @ z.T).square().sum()
    above = (n * n - 3 * n + 1) * total.square() - n * (n - 1) * fourth + 2 * pairs
    below = (n - 1) * (n - 2) * pairs + total.square() - n * (n - 1) * fourth
    if not total > 0:
        return 0.0
    return float(above / below) if below > 0 else float(d)  # a few samples may leave an estimate of tr C² below 0


def latent_statistics(z: Tensor, reference: Whitening | Tensor | None = None) -> dict[str, float]:
    """How far mined latents z [n >= 4, d] are from the prior.

    norm, norm_spread: mean and deviation of |z|²/d (N(0, I): 1 and √(2/d)).
    mean: |E z|²/d, unbiased: the part of the norm that all samples share (the prior: 0; one point: the norm).
    dimension, dimension_prior: the effective dimension of z and of the prior.

    reference: samples [m, d] of the generator's own w, or their `Whitening`, where z is w. The first three are then
    those of the whitened w, and `mahalanobis` is the norm: the mean squared Mahalanobis distance per dimension.
    """
    n, d = z.shape
    z = z.detach().double()
    own = whitening(reference) if isinstance(reference, Tensor) else reference
    dimension, prior = effective_dimension(z), float(d) if own is None else own.dimension
    white = z if own is None else own(z)
    norms = white.square().mean(1)
    mean = (n * white.mean(0).square().mean() - norms.mean()) / (n - 1)
    found = {"norm": float(norms.mean()), "norm_spread": float(norms.std()), "mean": float(mean)}
    found |= {"dimension": dimension, "dimension_prior": prior}
    return found if own is None else found | {"mahalanobis": found["norm"]}
