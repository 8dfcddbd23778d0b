"""Penalties on gradients of networks: WGAN-GP, DRAGAN, R1 and R2, StyleGAN2's path length; and lazy schedules of them.

    gradient_penalty     mean_i (|grad D(x^_i)|_2 - center)^2 at x^ = interpolate(real, fake)
    dragan_penalty       the same at x^_i = real_i + alpha_i scale std(real) u_i, u_i of U[0, 1) for every element
    r1_penalty           mean_i |grad D(x_i)|_2^2
    path_length_penalty  mean_i (|J_i^T n_i|_2 - a)^2, J the derivative of the images by the latents

Sources: Gulrajani et al., "Improved Training of Wasserstein GANs", 2017; Kodali et al., "On Convergence and Stability
of GANs", 2017; Mescheder et al., "Which Training Methods for GANs do actually Converge?", 2018; Karras et al.,
"Analyzing and Improving the Image Quality of StyleGAN", 2020.

The inner gradient is taken with respect to the images or latents alone, never the weights, and with autograd.grad: a
backward(create_graph=True) would tie graph and weights into a reference cycle. The critic runs under `second_order`.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from ..ops import interpolate
from ..ops.penalty import HALF, check_images, penalty_on, random_like, wide_dtype
from .second_order import second_order


def _modules_of(critic) -> list[nn.Module]:
    """The critic where it is a module, else the modules that a function's variables or a partial's arguments show."""
    if isinstance(critic, nn.Module):
        return [critic]
    if isinstance(critic, functools.partial):
        parts = [critic.func, *critic.args, *critic.keywords.values()]
        return [m for part in parts if callable(part) for m in _modules_of(part)]
    if not inspect.isroutine(critic):
        return []
    found = [getattr(critic, "__self__", None)]
    with contextlib.suppress(TypeError):  # of a function that is not written in Python
        variables = inspect.getclosurevars(inspect.unwrap(getattr(critic, "__func__", critic)))
        found += [*variables.nonlocals.values(), *variables.globals.values()]
    return [m for m in found if isinstance(m, nn.Module)]


def _critic_input(critic, x: Tensor, name: str) -> Tensor:
    """x detached, in float32 or wider unless the critic's own weights are of x's type."""
    check_images(x, name)
    dtypes = {p.dtype for m in _modules_of(critic) for p in m.parameters() if p.is_floating_point()}
    return x.detach().float() if x.dtype in HALF and dtypes != {x.dtype} else x.detach()


def _penalty_of(critic, x: Tensor, center: float = 0.0, squared: bool = False) -> Tensor:
    """P of grad D(x) for a leaf x, outside autocast; with a graph if gradients are enabled."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        x.requires_grad_()
        with second_order():
            score = critic(x)
        if not isinstance(score, Tensor):
            raise TypeError(f"the critic must return a tensor [B] or [B, 1], not {type(score).__name__}")
        if score.shape not in ((len(x),), (len(x), 1)):
            raise ValueError(
                f"the critic must return [B] or [B, 1] with B = {len(x)}, got {list(score.shape)}: of a map of scores, "
                "as PatchGAN's, give the mean, lambda x: D(x).flatten(1).mean(1)"
            )
        gradient = None
        if score.requires_grad:
            (gradient,) = torch.autograd.grad(score.sum(), x, create_graph=create_graph, allow_unused=True)
        if gradient is None:
            raise ValueError("the critic's scores do not depend on its input: is something detached, or under no_grad?")
        with nullcontext() if create_graph else torch.no_grad():
            return penalty_on(gradient, center=center, squared=squared)[0]


def gradient_penalty(
    critic: Callable[[Tensor], Tensor],
    real: Tensor,
    fake: Tensor,
    center: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """mean((|grad D(x^)|_2 - center)^2) with x^ = interpolate(real, fake); center 1: WGAN-GP, 0: zero-centred.

    critic: images [B, ...] -> scores [B] or [B, 1].
    real, fake: [B, ...] of the same shape and device. Both are detached: the penalty trains the critic.
    generator: makes the interpolation reproducible.

    Returns a scalar, not weighted: float64 for float64 images, else float32. Autocast is off in here; float16 and
    bfloat16 images become float32 unless the critic's own weights are of that type. The norm has subgradient 0 at 0.
    Raises ValueError or TypeError for images that do not match, and for scores of another shape or that do not depend
    on the images.
    """
    x = interpolate(_critic_input(critic, real, "real"), _critic_input(critic, fake, "fake"), generator=generator)
    return _penalty_of(critic, x, center)


def dragan_penalty(
    critic: Callable[[Tensor], Tensor],
    real: Tensor,
    center: float = 1.0,
    scale: float = 0.5,
    generator: torch.Generator | None = None,
) -> Tensor:
    """mean((|grad D(x^)|_2 - center)^2) around the real images (Kodali et al. 2017).

    x^_i = real_i + alpha_i scale std(real) u_i: alpha_i of U[0, 1), one a sample; u_i of U[0, 1), one an element; std
    (that of a population) over all elements of the batch. The authors' code draws uniform noise; the paper writes
    normal noise. critic, real, generator, result and errors as in `gradient_penalty`.
    """
    real = _critic_input(critic, real, "real")
    noise = random_like(torch.rand, real.shape, real, generator).to(real.dtype)
    return _penalty_of(critic, interpolate(torch.addcmul(real, noise, scale * real.std(correction=0)), real,
                                           generator=generator), center)  # fmt: skip


def r1_penalty(critic: Callable[[Tensor], Tensor], real: Tensor) -> Tensor:
    """mean(|grad D(x)|_2^2), without the 1/2 of the paper: R1 for real images, R2 for fakes.

    critic: images [B, ...] -> scores [B] or [B, 1]. real: [B, ...], detached. Returns a scalar; dtypes, autocast and
    errors as in `gradient_penalty`.
    """
    return _penalty_of(critic, _critic_input(critic, real, "real"), squared=True)


def path_length_penalty(
    images: Tensor,
    latents: Tensor,
    mean: float | Tensor = 0.0,
    decay: float = 0.01,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """mean((lengths - a)^2), lengths_i = |J_i^T n_i|_2 with n = N(0, I) / sqrt(H W), a the lengths' running mean.

    images: [B, C, H, W] that a generator made from the latents, with their graph.
    latents: [B, L, W], one w a layer, or [B, W]. lengths = sqrt(mean over L of the sum over W of the squared gradient).
    mean: the running mean so far, a number or 0-d tensor; a = mean + decay (mean of lengths - mean), through which the
        gradient flows as in the public StyleGAN2 implementations.
    generator: makes n reproducible; it may live on another device.

    Returns (penalty, a, lengths [B]), the last two detached, in float32 or wider under autocast too; the generator's
    own graph keeps the precision that it was recorded in.
    Raises ValueError or TypeError for shapes that do not match and for images that do not depend on the latents.
    """
    check_images(images, "images")
    check_images(latents, "latents")
    if images.dim() != 4:
        raise ValueError(f"images must be [B, C, H, W], got {list(images.shape)}")
    if latents.dim() not in (2, 3) or len(latents) != len(images):
        raise ValueError(f"latents must be [B, L, W] or [B, W] with B = {len(images)}, got {list(latents.shape)}")
    unrelated = "images do not depend on latents: pass the very latents (with requires_grad) that made these images"
    if not (images.requires_grad and latents.requires_grad):
        raise ValueError(unrelated)
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad(), torch.autocast(images.device.type, enabled=False):
        noise = random_like(torch.randn, images.shape, images, generator) / (images.shape[2] * images.shape[3]) ** 0.5
        projection = (images * noise).sum()
        (gradient,) = torch.autograd.grad(projection, latents, create_graph=create_graph, allow_unused=True)
        if gradient is None:
            raise ValueError(unrelated)
        mean = torch.as_tensor(mean, dtype=wide_dtype(gradient.dtype), device=gradient.device).detach()
        parts = 1 if gradient.dim() == 2 else gradient.shape[1]
        with nullcontext() if create_graph else torch.no_grad():
            penalty, lengths, mean = penalty_on(gradient, mean, decay=decay, parts=parts)
        return penalty, mean, lengths


class LazyPenalty:
    """A penalty on every `every`-th step alone, weighted accordingly (Karras et al. 2020, appendix B).

        r1 = LazyPenalty(r1_penalty, every=16, weight=5.0)          # gamma / 2 with gamma 10
        loss = critic_loss + r1(step, critic, real)

    penalty: (critic, real, ...) -> 0-d tensor. every: at least 1. weight: of the penalty, were it taken at each step.
    ValueError where they are not so.
    """

    def __init__(self, penalty: Callable[..., Tensor], every: int = 16, weight: float = 5.0):
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"every must be an integer of at least 1, got {every!r}")
        if not 0 <= weight < float("inf"):
            raise ValueError(f"weight must be finite and at least 0, got {weight}")
        self.penalty, self.every, self.weight = penalty, every, weight

    def __call__(self, step: int, critic: Callable[[Tensor], Tensor], real: Tensor, *args, **kwargs) -> Tensor:
        """every * weight * penalty(critic, real, ...) where `every` divides step, else a zero without a graph, of the
        penalty's dtype on real's device."""
        if step % self.every or not self.weight:
            return torch.zeros((), dtype=wide_dtype(real.dtype), device=real.device)
        return self.every * self.weight * self.penalty(critic, real, *args, **kwargs)


def lazy_adam(lr: float, betas: tuple[float, float], every: int = 16) -> tuple[float, tuple[float, float]]:
    """Adam's lr and betas for a network whose lazy penalty steps apart from its loss: with c = every / (every + 1) they
    are c lr and betas^c, so that every + 1 steps do what `every` did (Karras et al. 2020, appendix B)."""
    c = every / (every + 1)
    return lr * c, (betas[0] ** c, betas[1] ** c)
