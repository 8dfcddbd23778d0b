"""Penalties on gradients of networks: WGAN-GP, R1 and R2, and StyleGAN2's path length.

    interpolate          x^_i = alpha_i real_i + (1 - alpha_i) fake_i, alpha_i ~ U[0, 1)
    gradient_penalty     mean_i (|grad D(x^_i)|_2 - center)^2
    r1_penalty           mean_i |grad D(x_i)|_2^2
    path_length_penalty  mean_i (|J_i^T n_i|_2 - a)^2, J the derivative of the images by the latents

Sources: Gulrajani et al., "Improved Training of Wasserstein GANs", 2017; Mescheder et al., "Which Training Methods for
GANs do actually Converge?", 2018; Karras et al., "Analyzing and Improving the Image Quality of StyleGAN", 2020.

The inner gradient is taken with respect to the images or latents alone, never the weights, and with autograd.grad: a
backward(create_graph=True) would tie graph and weights into a reference cycle. The results are differentiable.
"""

import torch
from torch import Tensor, nn

from .second_order import second_order

__all__ = ["gradient_penalty", "interpolate", "path_length_penalty", "r1_penalty"]

_HALF = (torch.float16, torch.bfloat16)


def _check_images(x: Tensor, name: str) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, not {getattr(x, 'dtype', type(x).__name__)}")
    if x.dim() < 2 or x.numel() == 0:
        raise ValueError(f"{name} must be a batch [B, ...] with at least one element, got {list(x.shape)}")


def _random(draw, shape, like: Tensor, generator) -> Tensor:
    """Random numbers of at least float32, drawn where the generator lives."""
    device = like.device if generator is None else generator.device
    dtype = torch.float32 if like.dtype in _HALF else like.dtype
    return draw(shape, generator=generator, device=device, dtype=dtype).to(like.device)


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
    wide = torch.float32 if real.dtype in _HALF else real.dtype
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


def _critic_input(critic, x: Tensor, name: str) -> Tensor:
    """x detached, in float32 or wider unless the critic's own weights are of x's type."""
    _check_images(x, name)
    parameters = critic.parameters() if isinstance(critic, nn.Module) else ()
    dtypes = {p.dtype for p in parameters if p.is_floating_point()}
    return x.detach().float() if x.dtype in _HALF and dtypes != {x.dtype} else x.detach()


def _squared_gradient_norms(critic, x: Tensor) -> Tensor:
    """|grad D(x_i)|_2^2 [B] for a leaf x, outside autocast; with a graph if gradients are enabled."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        x.requires_grad_()
        with second_order():
            score = critic(x)
        if not isinstance(score, Tensor):
            raise TypeError(f"the critic must return a tensor [B] or [B, 1], not {type(score).__name__}")
        if score.shape not in ((len(x),), (len(x), 1)):
            raise ValueError(f"the critic must return [B] or [B, 1] with B = {len(x)}, got {list(score.shape)}")
        gradient = None
        if score.requires_grad:
            (gradient,) = torch.autograd.grad(score.sum(), x, create_graph=create_graph, allow_unused=True)
        if gradient is None:
            raise ValueError("the critic's scores do not depend on its input: is something detached, or under no_grad?")
        gradient = gradient.flatten(1)
        return (gradient.float() if gradient.dtype in _HALF else gradient).square().sum(1)


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
    return (_norm(_squared_gradient_norms(critic, x)) - center).square().mean()


def r1_penalty(critic, real: Tensor) -> Tensor:
    """mean(|grad D(x)|_2^2), without the 1/2 of the paper: R1 for real images, R2 for fakes.

    critic: images [B, ...] -> scores [B] or [B, 1]. real: [B, ...], detached. Returns a scalar; dtypes, autocast and
    errors as in `gradient_penalty`.
    """
    return _squared_gradient_norms(critic, _critic_input(critic, real, "real")).mean()


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
        squares = (gradient.float() if gradient.dtype in _HALF else gradient).square().sum(-1)
        lengths = _norm(squares if squares.dim() == 1 else squares.mean(1))
        mean = torch.as_tensor(mean, dtype=lengths.dtype, device=lengths.device).detach()
        mean = mean + decay * (lengths.mean() - mean)
        return (lengths - mean).square().mean(), mean.detach(), lengths.detach()
