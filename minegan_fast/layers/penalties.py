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
import re
from collections.abc import Callable
from contextlib import nullcontext
from numbers import Integral
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import interpolate
from ..ops._op import refuse_transforms, wide_dtype
from ..ops.penalty import HALF, check_images, penalty_on, random_like
from .second_order import second_order


def _modules_of(critic, depth: int = 2) -> list[nn.Module]:
    """A critic that is a module; else the modules among its variables, attributes and arguments, and among those of the
    functions and objects that stand there, `depth` levels down."""
    if isinstance(critic, nn.Module):
        return [critic]
    if depth < 0 or isinstance(critic, type | ModuleType):
        return []
    if isinstance(critic, functools.partial):
        parts = [critic.func, *critic.args, *critic.keywords.values()]
    elif inspect.isroutine(critic):
        parts = [getattr(critic, "__self__", None), *(getattr(critic, "__defaults__", None) or ())]
        with contextlib.suppress(TypeError):  # of a function that is not written in Python
            variables = inspect.getclosurevars(inspect.unwrap(getattr(critic, "__func__", critic)))
            parts += [*variables.nonlocals.values(), *variables.globals.values()]
    else:
        parts = getattr(critic, "__dict__", {}).values()
    return [m for part in parts for m in _modules_of(part, depth - 1)]


def _critic_input(critic, x: Tensor, name: str) -> Tensor:
    """x detached, in float32 or wider if weights of the critic are found and none of them is of x's type."""
    check_images(x, name)
    if x.dtype in HALF:
        dtypes = {p.dtype for m in _modules_of(critic) for p in m.parameters() if p.is_floating_point()}
        if dtypes and x.dtype not in dtypes:
            return x.detach().float()
    return x.detach()


def _normal(x: Tensor) -> Tensor:
    """x as autograd takes it, also where it was made in inference mode."""
    return x.clone() if x.is_inference() else x


def _scores(critic, x: Tensor, condition) -> Tensor:
    """critic(x, condition), [B] or [B, 1]."""
    others = () if condition is None else condition if isinstance(condition, tuple) else (condition,)
    others = [_normal(c.to(x.dtype) if c.dtype in HALF else c) if isinstance(c, Tensor) else c for c in others]
    try:
        with second_order():
            score = critic(x, *others)
    except TypeError as error:
        if "required positional argument" not in str(error):
            raise
        raise TypeError(
            f"the critic takes more than images ({error}): give the rest as condition=y, or lambda x: critic(x, y)"
        ) from error
    except RuntimeError as error:
        if not re.search("same d?type|type .* should be the same|scalar type", str(error)):
            raise
        raise TypeError(
            f"the critic was run outside of autocast, and its {x.dtype} images and weights do not go together "
            f"({error}): give images of the same dtype as its weights, and labels or embeddings as condition="
        ) from error
    if not isinstance(score, Tensor):
        raise TypeError(
            f"the critic must return a tensor [B] or [B, 1], not {type(score).__name__}: of several results choose "
            "one, lambda x: D(x)[0]"
        )
    if score.shape not in ((len(x),), (len(x), 1)):
        raise ValueError(
            f"the critic must return [B] or [B, 1] with B = {len(x)}, got {list(score.shape)}: of a map of scores, "
            "as PatchGAN's, give the mean, lambda x: D(x).flatten(1).mean(1); [B, B] comes of adding [B, 1] to [B]"
        )
    return score


def _penalty_of(critic, x: Tensor, condition, center=0.0, squared: bool = False) -> Tensor:
    """P of grad D(x) for a leaf x, outside autocast; with a graph if gradients are enabled."""
    if isinstance(center, Tensor) and center.dim():
        raise TypeError(
            f"center must be a number, got a tensor {list(center.shape)}: what the critic takes after the images is "
            "condition="
        )
    refuse_transforms("a penalty on a gradient")
    create_graph = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        x = _normal(x).requires_grad_()
        score = _scores(critic, x, condition)
        gradient = None
        if score.requires_grad:
            (gradient,) = torch.autograd.grad(score.sum(), x, create_graph=create_graph, allow_unused=True)
        if gradient is None:
            raise ValueError("the critic's scores do not depend on its input: is something detached, or under no_grad?")
        with nullcontext() if create_graph else torch.no_grad():
            return penalty_on(gradient, center=center, squared=squared)[0]


def gradient_penalty(
    critic: Callable[..., Tensor],
    real: Tensor,
    fake: Tensor,
    center: float = 1.0,
    generator: torch.Generator | None = None,
    condition: Any = None,
    alpha: float | Tensor | None = None,
) -> Tensor:
    """mean((|grad D(x^)|_2 - center)^2) with x^ = interpolate(real, fake); center 1: WGAN-GP, 0: zero-centred.

    critic: images [B, ...] -> scores [B] or [B, 1].
    real, fake: [B, ...] of the same shape and device. Both are detached: the penalty trains the critic.
    generator: makes the interpolation reproducible.
    condition: what the critic takes after the images, labels or embeddings of the same B samples; a tuple holds several
        arguments. It may have a gradient. Where a call has another form, give lambda x: critic(x, y).
    alpha: as in `interpolate`, where x^ is not to be drawn here.

    Returns a scalar, not weighted: float64 for float64 images, else float32. Autocast is off in here; float16 and
    bfloat16 images become float32 where the critic's weights are of other types alone, and a condition in half
    precision follows them. The norm has subgradient 0 at 0.
    Raises ValueError or TypeError for images that do not match, for a critic that takes more than it is given or
    another dtype, and for scores of another shape or that do not depend on the images; NotImplementedError inside a
    transform of torch.func, vmap, grad or jacrev say.
    """
    real, fake = _critic_input(critic, real, "real"), _critic_input(critic, fake, "fake")
    if torch.float32 in (real.dtype, fake.dtype):  # under autocast generated images are narrower
        real, fake = (x.float() if x.dtype in HALF else x for x in (real, fake))
    return _penalty_of(critic, interpolate(real, fake, alpha, generator), condition, center)


def dragan_penalty(
    critic: Callable[..., Tensor],
    real: Tensor,
    center: float = 1.0,
    scale: float = 0.5,
    generator: torch.Generator | None = None,
    condition: Any = None,
) -> Tensor:
    """mean((|grad D(x^)|_2 - center)^2) around the real images (Kodali et al. 2017).

    x^_i = real_i + alpha_i scale std(real) u_i: alpha_i of U[0, 1), one a sample; u_i of U[0, 1), one an element; std
    (that of a population) over all elements of the batch. The authors' code draws uniform noise; the paper writes
    normal noise. critic, real, generator, condition, result and errors as in `gradient_penalty`.
    """
    real = _critic_input(critic, real, "real")
    noise = random_like(torch.rand, real.shape, real, generator).to(real.dtype)
    x = interpolate(torch.addcmul(real, noise, scale * real.std(correction=0)), real, generator=generator)
    return _penalty_of(critic, x, condition, center)


def r1_penalty(critic: Callable[..., Tensor], real: Tensor, condition: Any = None) -> Tensor:
    """mean(|grad D(x)|_2^2), without the 1/2 of the paper: R1 for real images, R2 for fakes.

    critic: images [B, ...] -> scores [B] or [B, 1]. real: [B, ...], detached. condition: what the critic takes after
    the images. Returns a scalar; condition, dtypes, autocast and errors as in `gradient_penalty`.
    """
    return _penalty_of(critic, _critic_input(critic, real, "real"), condition, squared=True)


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
    refuse_transforms("path_length_penalty")
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
        if not isinstance(every, Integral) or every < 1:
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
