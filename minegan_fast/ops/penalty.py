"""The penalty on a gradient, as an op, and points between real and generated images.

    interpolate  x^_i = alpha_i real_i + (1 - alpha_i) fake_i, alpha_i ~ U[0, 1)

The penalty on a gradient g of B samples, each of L parts (path length: the layers' latents, else 1), is an op:

    r_i = sqrt(|g_i|^2 / L),   a = m + decay (mean of r - m)
    forward    P    = mean_i (r_i - a)^2                                   squared: P = mean_i |g_i|^2
    backward   dg_i = dP s_i g_i,   s_i = 2 / (B L r_i) (r_i - a - decay mean(r - a)), 0 where r_i is;   squared: 2 / B

m is a running mean, or the center with decay 0. Its second order is the reference's. The losses that use it are in
layers/penalties.py.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import Function

from ._op import DTYPE_CODES, Op, forced_backend, refuse_transforms, wide_dtype

HALF = (torch.float16, torch.bfloat16)


@Op
def penalty_forward(
    g: Tensor, mean: Tensor | None, center: float, decay: float, parts: int, squared: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """P, r [B], s [B], a of g [B, ...], in float32 at least; mean, 0-d, takes the place of center."""
    g = g.to(wide_dtype(g.dtype))
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
    wide = wide_dtype(real.dtype)
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
        refuse_transforms("a penalty on a gradient", dP)
        g, s, mean = ctx.saved_tensors
        if torch.is_grad_enabled():
            P = penalty_forward.reference(g, mean, *ctx.args)[0]
            dg = torch.autograd.grad(P, g, dP, create_graph=True)[0]
        else:
            dg = penalty_backward(_laid_out(g), s, dP, backend=ctx.backend)
        return dg, *[None] * (2 + len(ctx.args))


def penalty_on(
    g: Tensor,
    mean: Tensor | None = None,
    center: float = 0.0,
    decay: float = 0.0,
    parts: int = 1,
    squared: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """P, r and a of the equations above; the last two have no graph."""
    return _Penalty.apply(g, mean, float(center), float(decay), parts, squared, forced_backend())


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


def check_images(x: Tensor, name: str) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, not {getattr(x, 'dtype', type(x).__name__)}")
    if x.dim() < 2 or x.numel() == 0:
        raise ValueError(f"{name} must be a batch [B, ...] with at least one element, got {list(x.shape)}")


def random_like(
    draw: Callable[..., Tensor], shape: Sequence[int], like: Tensor, generator: torch.Generator | None
) -> Tensor:
    """Random numbers by `draw` (torch.rand or torch.randn), in float32 or wider, on the device of `like`.

    They are drawn on the generator's device, where it has one."""
    device = like.device if generator is None else generator.device
    return draw(shape, generator=generator, device=device, dtype=wide_dtype(like.dtype)).to(like.device)


def _norm(squares: Tensor) -> Tensor:
    """sqrt with derivative 0 at 0, of any order: a critic that is flat somewhere must not give NaN."""
    positive = squares > 0
    return torch.where(positive, torch.where(positive, squares, 1.0).sqrt(), 0.0)


def interpolate(
    real: Tensor,
    fake: Tensor,
    alpha: float | Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """alpha * real + (1 - alpha) * fake, one alpha a sample.

    real, fake: [B, ...] of the same shape, floating dtype and device.
    alpha: None draws U[0, 1) per sample; else a number, [B], or a tensor that broadcasts against real.
    generator: makes the draw reproducible; it may live on another device.

    Returns [B, ...] in the dtype of the inputs, computed in at least float32. Differentiable in real, fake and alpha.
    """
    check_images(real, "real")
    check_images(fake, "fake")
    if real.shape != fake.shape:
        raise ValueError(f"real and fake must have the same shape, got {list(real.shape)} and {list(fake.shape)}")
    if real.dtype != fake.dtype:
        raise TypeError(f"real and fake must have the same dtype, got {real.dtype} and {fake.dtype}")
    if real.device != fake.device:
        raise ValueError(f"real and fake must be on the same device, got {real.device} and {fake.device}")
    per_sample = (len(real),) + (1,) * (real.dim() - 1)
    wide = wide_dtype(real.dtype)
    if alpha is None and _draws_in_a_kernel(real, fake, generator):
        return interpolate_drawn(real, fake, *_next_draw(real.device, generator))
    if alpha is None:
        alpha = random_like(torch.rand, per_sample, real, generator)
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
    """Whether one kernel may draw and interpolate. Within a CUDA graph it may not: each replay has to draw anew."""
    return (
        real.is_cuda
        and (generator is None or generator.device.type == "cuda")
        and not (torch.is_grad_enabled() and (real.requires_grad or fake.requires_grad))
        and type(real) is type(fake) is Tensor
        and not torch.compiler.is_compiling()
        and interpolate_drawn.lacks("triton", real.device, real.dtype) is None
        and not torch.cuda.is_current_stream_capturing()
    )


def _next_draw(device: torch.device, generator: torch.Generator | None) -> tuple[int, int]:
    """The generator's seed and offset. The offset then moves on as one draw of torch's moves it."""
    generator = generator or torch.cuda.default_generators[device.index]
    seed, offset = generator.initial_seed(), generator.get_offset()
    generator.set_offset(offset + 4)
    return seed, offset


# Launchers. Samples of g are runs of memory: _laid_out saw to it.


def _results(g: Tensor) -> list[Tensor]:
    return [torch.empty(shape, dtype=wide_dtype(g.dtype), device=g.device) for shape in ((), len(g), len(g), ())]


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


@interpolate_drawn.register("cpp")
def _(native, real, fake, seed, offset):
    wide = wide_dtype(real.dtype)
    alpha = torch.empty(len(real), *[1] * (real.dim() - 1), dtype=torch.float32)
    native.penalty_philox_cpu(seed & (1 << 64) - 1, offset, alpha.data_ptr(), len(real))
    return torch.lerp(fake.to(wide), real.to(wide), alpha.to(wide)).to(real.dtype)


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
