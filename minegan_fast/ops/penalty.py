"""Penalties on gradients of networks: WGAN-GP, DRAGAN, R1 and R2, StyleGAN2's path length; and lazy schedules of them.

    interpolate          x^_i = alpha_i real_i + (1 - alpha_i) fake_i, alpha_i ~ U[0, 1)
    gradient_penalty     mean_i (|grad D(x^_i)|_2 - center)^2
    dragan_penalty       the same at x^_i = real_i + alpha_i scale std(real) u_i, u_i of U[0, 1) for every element
    r1_penalty           mean_i |grad D(x_i)|_2^2
    path_length_penalty  mean_i (|J_i^T n_i|_2 - a)^2, J the derivative of the images by the latents

Sources: Gulrajani et al., "Improved Training of Wasserstein GANs", 2017; Kodali et al., "On Convergence and Stability
of GANs", 2017; Mescheder et al., "Which Training Methods for GANs do actually Converge?", 2018; Karras et al.,
"Analyzing and Improving the Image Quality of StyleGAN", 2020.

The inner gradient is taken with respect to the images or latents alone, never the weights, and with autograd.grad: a
backward(create_graph=True) would tie graph and weights into a reference cycle. The critic runs under `second_order`.

The penalty on a gradient g of B samples, each of L parts (path length: the layers' latents, else 1), is an op:

    r_i = sqrt(|g_i|^2 / L),   a = m + decay (mean of r - m)
    forward    P    = mean_i (r_i - a)^2                                   squared: P = mean_i |g_i|^2
    backward   dg_i = dP s_i g_i,   s_i = 2 / (B L r_i) (r_i - a - decay mean(r - a)), 0 where r_i is;   squared: 2 / B

m is a running mean, or the center with decay 0. Its second order is the reference's.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.autograd import Function

from ._op import DTYPE_CODES, Op, forced_backend
from .second_order import second_order

__all__ = ["LazyPenalty", "dragan_penalty", "gradient_penalty", "interpolate", "lazy_adam", "path_length_penalty",
           "r1_penalty"]  # fmt: skip

_HALF = (torch.float16, torch.bfloat16)


@Op
def penalty_forward(
    g: Tensor, mean: Tensor | None, center: float, decay: float, parts: int, squared: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """P, r [B], s [B], a of g [B, ...], in float32 at least; mean, 0-d, takes the place of center."""
    g = g.to(_wide(g.dtype))
    r = _norm(g.flatten(1).square().sum(1) / parts)
    m = torch.full_like(r[0], center) if mean is None else mean
    a = m + decay * (r.mean() - m)
    d = r - a
    if squared:
        return (r.square() * parts).mean(), r, torch.full_like(r, 2 / len(g)), a
    s = torch.where(r > 0, 2 / len(g) * (d - decay * d.mean()) / (parts * torch.where(r > 0, r, 1.0)), 0.0)
    return d.square().mean(), r, s, a


@Op
def penalty_backward(g: Tensor, s: Tensor, dP: Tensor) -> Tensor:
    """dg [B, ...] of g's dtype; s [B] and dP, 0-d, as penalty_forward's results."""
    return ((s * dP).view(-1, *[1] * (g.dim() - 1)) * g).to(g.dtype)


@Op
def interpolate_drawn(real: Tensor, fake: Tensor, seed: int, offset: int) -> Tensor:
    """interpolate with alpha_i the first number of Philox4x32-10 (Salmon et al., "Parallel Random Numbers", 2011) for
    the counter (i, offset, offset >> 32, 0) and the key seed, as Triton makes numbers in [0, 1) of it."""
    word = 0xFFFFFFFF
    c = [torch.arange(len(real), device=real.device)]
    c += [torch.full_like(c[0], value & word) for value in (offset, offset >> 32, 0)]
    key = [seed & word, seed >> 32 & word]
    for _ in range(10):
        (low0, high0), (low1, high1) = (_product(x, m) for x, m in ((c[0], 0xD2511F53), (c[2], 0xCD9E8D57)))
        c = [high1 ^ c[1] ^ key[0], low1, high0 ^ c[3] ^ key[1], low0]
        key = [key[0] + 0x9E3779B9 & word, key[1] + 0xBB67AE85 & word]
    drawn = torch.where(c[0] >= 1 << 31, word - c[0], c[0])
    alpha = (drawn.float() * 4.6566127342e-10).view(-1, *[1] * (real.dim() - 1))
    wide = _wide(real.dtype)
    return torch.lerp(fake.to(wide), real.to(wide), alpha.to(wide)).to(real.dtype)


def _product(x: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """Low and high word of x m for words x in int64, whose product wraps at 64 bits."""
    low, high = x * (m & 0xFFFF), x * (m >> 16)
    total = low + ((high & 0xFFFF) << 16)
    return total & 0xFFFFFFFF, (total >> 32) + (high >> 16)


class _Penalty(Function):
    @staticmethod
    def forward(ctx, g, mean, *args):
        *args, backend = args
        P, r, s, a = penalty_forward(_laid_out(g), mean, *args, backend=backend)
        ctx.save_for_backward(g, s, mean)
        ctx.args, ctx.backend = args, backend
        ctx.mark_non_differentiable(r, a)
        return P, r, a

    @staticmethod
    def backward(ctx, dP, *_):
        g, s, mean = ctx.saved_tensors
        if torch.is_grad_enabled():
            P = penalty_forward.reference(g, mean, *ctx.args)[0]
            dg = torch.autograd.grad(P, g, dP, create_graph=True)[0]
        else:
            dg = penalty_backward(_laid_out(g), s, dP, backend=ctx.backend)
        return dg, *[None] * (2 + len(ctx.args))


def _penalty_on(g: Tensor, mean: Tensor | None = None, center=0.0, decay=0.0, parts=1, squared=False):
    """P, r and a; the last two without a graph."""
    return _Penalty.apply(g, mean, float(center), float(decay), parts, squared, forced_backend())


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in _HALF else dtype


def _has_dense_samples(x: Tensor) -> bool:
    """Whether each sample is a run of memory, in whatever order."""
    size = 1
    for stride, n in sorted(zip(x.stride()[1:], x.shape[1:], strict=True)):
        if n > 1:
            if stride != size:
                return False
            size *= n
    return len(x) == 1 or x.stride(0) >= size


def _laid_out(x: Tensor) -> Tensor:
    return x if _has_dense_samples(x) else x.contiguous()


def _check_images(x: Tensor, name: str) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, not {getattr(x, 'dtype', type(x).__name__)}")
    if x.dim() < 2 or x.numel() == 0:
        raise ValueError(f"{name} must be a batch [B, ...] with at least one element, got {list(x.shape)}")


def _random(draw, shape, like: Tensor, generator) -> Tensor:
    """Random numbers of at least float32, drawn where the generator lives."""
    device = like.device if generator is None else generator.device
    return draw(shape, generator=generator, device=device, dtype=_wide(like.dtype)).to(like.device)


def _norm(squares: Tensor) -> Tensor:
    """sqrt with derivative 0 at 0, of any order: a critic that is flat somewhere must not give NaN."""
    positive = squares > 0
    return torch.where(positive, torch.where(positive, squares, 1.0).sqrt(), 0.0)


def interpolate(real: Tensor, fake: Tensor, alpha=None, generator: torch.Generator | None = None) -> Tensor:
    """alpha * real + (1 - alpha) * fake, one alpha a sample.

    real, fake: [B, ...] of the same shape, floating dtype and device.
    alpha: None draws U[0, 1) per sample; else a number, [B], or a tensor that broadcasts against real.
    generator: makes the draw reproducible; it may live on another device.

    Returns [B, ...] in the dtype of the inputs, computed in at least float32. Differentiable in real, fake and alpha.
    """
    _check_images(real, "real")
    _check_images(fake, "fake")
    if real.shape != fake.shape:
        raise ValueError(f"real and fake must have the same shape, got {list(real.shape)} and {list(fake.shape)}")
    if real.dtype != fake.dtype:
        raise TypeError(f"real and fake must have the same dtype, got {real.dtype} and {fake.dtype}")
    if real.device != fake.device:
        raise ValueError(f"real and fake must be on the same device, got {real.device} and {fake.device}")
    per_sample = (len(real),) + (1,) * (real.dim() - 1)
    wide = _wide(real.dtype)
    if alpha is None and _draws_in_a_kernel(real, fake, generator):
        return interpolate_drawn(real, fake, *_next_draw(real.device, generator))
    if alpha is None:
        alpha = _random(torch.rand, per_sample, real, generator)
    else:
        alpha = torch.as_tensor(alpha, dtype=wide, device=real.device)
        if alpha.shape == (len(real),):
            alpha = alpha.view(per_sample)
        try:
            fits = torch.broadcast_shapes(alpha.shape, real.shape) == real.shape
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(
                f"alpha {list(alpha.shape)} does not broadcast to {list(real.shape)}: give a number, [B] or [B, 1, ...]"
            )
    return torch.lerp(fake.to(wide), real.to(wide), alpha).to(real.dtype)


def _draws_in_a_kernel(real: Tensor, fake: Tensor, generator: torch.Generator | None) -> bool:
    """Whether one kernel may draw and interpolate: outside of CUDA graphs, whose replays must draw anew."""
    return (
        real.is_cuda
        and (generator is None or generator.device.type == "cuda")
        and not (torch.is_grad_enabled() and (real.requires_grad or fake.requires_grad))
        and type(real) is type(fake) is Tensor
        and not torch.compiler.is_compiling()
        and interpolate_drawn.lacks("triton", "cuda", real.dtype) is None
        and not torch.cuda.is_current_stream_capturing()
    )


def _next_draw(device: torch.device, generator: torch.Generator | None) -> tuple[int, int]:
    """The generator's seed and offset, which moves on as for one draw."""
    generator = generator or torch.cuda.default_generators[device.index]
    seed, offset = generator.initial_seed(), generator.get_offset()
    generator.set_offset(offset + 4)
    return seed, offset


def _modules_of(critic) -> list[nn.Module]:
    """A critic that is a module; the modules that a function or a partial one calls, as far as its variables show."""
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
    _check_images(x, name)
    dtypes = {p.dtype for m in _modules_of(critic) for p in m.parameters() if p.is_floating_point()}
    return x.detach().float() if x.dtype in _HALF and dtypes != {x.dtype} else x.detach()


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
            return _penalty_on(gradient, center=center, squared=squared)[0]


def gradient_penalty(
    critic, real: Tensor, fake: Tensor, center: float = 1.0, generator: torch.Generator | None = None
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
    critic, real: Tensor, center: float = 1.0, scale: float = 0.5, generator: torch.Generator | None = None
) -> Tensor:
    """mean((|grad D(x^)|_2 - center)^2) around the real images (Kodali et al. 2017).

    x^_i = real_i + alpha_i scale std(real) u_i: alpha_i of U[0, 1), one a sample; u_i of U[0, 1), one an element; std
    (that of a population) over all elements of the batch. So the authors' code has it; the paper writes the noise as
    normal. critic, real, generator, result and errors as in `gradient_penalty`.
    """
    real = _critic_input(critic, real, "real")
    noise = _random(torch.rand, real.shape, real, generator).to(real.dtype)
    return _penalty_of(critic, interpolate(torch.addcmul(real, noise, scale * real.std(correction=0)), real,
                                           generator=generator), center)  # fmt: skip


def r1_penalty(critic, real: Tensor) -> Tensor:
    """mean(|grad D(x)|_2^2), without the 1/2 of the paper: R1 for real images, R2 for fakes.

    critic: images [B, ...] -> scores [B] or [B, 1]. real: [B, ...], detached. Returns a scalar; dtypes, autocast and
    errors as in `gradient_penalty`.
    """
    return _penalty_of(critic, _critic_input(critic, real, "real"), squared=True)


def path_length_penalty(
    images: Tensor, latents: Tensor, mean=0.0, decay: float = 0.01, generator: torch.Generator | None = None
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
    _check_images(images, "images")
    _check_images(latents, "latents")
    if images.dim() != 4:
        raise ValueError(f"images must be [B, C, H, W], got {list(images.shape)}")
    if latents.dim() not in (2, 3) or len(latents) != len(images):
        raise ValueError(f"latents must be [B, L, W] or [B, W] with B = {len(images)}, got {list(latents.shape)}")
    unrelated = "images do not depend on latents: pass the very latents (with requires_grad) that made these images"
    if not (images.requires_grad and latents.requires_grad):
        raise ValueError(unrelated)
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad(), torch.autocast(images.device.type, enabled=False):
        noise = _random(torch.randn, images.shape, images, generator) / (images.shape[2] * images.shape[3]) ** 0.5
        projection = (images * noise).sum()
        (gradient,) = torch.autograd.grad(projection, latents, create_graph=create_graph, allow_unused=True)
        if gradient is None:
            raise ValueError(unrelated)
        mean = torch.as_tensor(mean, dtype=_wide(gradient.dtype), device=gradient.device).detach()
        parts = 1 if gradient.dim() == 2 else gradient.shape[1]
        with nullcontext() if create_graph else torch.no_grad():
            penalty, lengths, mean = _penalty_on(gradient, mean, decay=decay, parts=parts)
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

    def __call__(self, step: int, critic, real: Tensor, *args, **kwargs) -> Tensor:
        """every * weight * penalty(critic, real, ...) where `every` divides step, else a zero without a graph, of the
        penalty's dtype on real's device."""
        if step % self.every or not self.weight:
            return torch.zeros((), dtype=_wide(real.dtype), device=real.device)
        return self.every * self.weight * self.penalty(critic, real, *args, **kwargs)


def lazy_adam(lr: float, betas: tuple[float, float], every: int = 16) -> tuple[float, tuple[float, float]]:
    """Adam's lr and betas for a network whose lazy penalty steps apart from its loss: with c = every / (every + 1) they
    are c lr and betas^c, so that every + 1 steps do what `every` did (Karras et al. 2020, appendix B)."""
    c = every / (every + 1)
    return lr * c, (betas[0] ** c, betas[1] ** c)


# Launchers. Samples of g are runs of memory: _laid_out saw to it.


def _results(g: Tensor) -> list[Tensor]:
    return [torch.empty(shape, dtype=_wide(g.dtype), device=g.device) for shape in ((), len(g), len(g), ())]


@penalty_forward.register("cpp")
def _(native, g, mean, center, decay, parts, squared):
    P, r, s, a = _results(g)
    addresses = [t.data_ptr() for t in (P, r, s, a)]
    native.penalty_cpu(
        DTYPE_CODES[g.dtype], g.data_ptr(), 0 if mean is None else mean.data_ptr(), *addresses, len(g), g[0].numel(),
        g.stride(0), center, decay, parts, squared, torch.get_num_threads(),
    )  # fmt: skip
    return P, r, s, a


@penalty_forward.register("triton")
def _(kernels, g, mean, center, decay, parts, squared):
    P, r, s, a = _results(g)
    kernels.penalty(g, mean, P, r, s, a, len(g), g[0].numel(), g.stride(0), center, decay, parts, squared)
    return P, r, s, a


@penalty_backward.register("cpp")
def _(native, g, s, dP):
    dg = torch.empty_like(g)
    addresses = g.data_ptr(), s.data_ptr(), dP.data_ptr(), dg.data_ptr()
    sizes = len(g), g[0].numel(), g.stride(0), dg.stride(0)
    native.penalty_backward_cpu(DTYPE_CODES[g.dtype], *addresses, *sizes, torch.get_num_threads())
    return dg


@penalty_backward.register("triton")
def _(kernels, g, s, dP):
    dg = torch.empty_like(g)
    kernels.penalty_backward(g, s, dP, dg, len(g), g[0].numel(), g.stride(0), dg.stride(0))
    return dg


@interpolate_drawn.register("triton")
def _(kernels, real, fake, seed, offset):
    if real.stride() != fake.stride() or not _has_dense_samples(real):
        real, fake = real.contiguous(), fake.contiguous()
    out = torch.empty_like(real)
    if out.stride() != real.stride():
        real, fake, out = (
            real.contiguous(),
            fake.contiguous(),
            torch.empty(real.shape, dtype=real.dtype, device=real.device),
        )
    kernels.interpolate(real, fake, out, seed, offset, len(real), real[0].numel(), real.stride(0))
    return out
