"""What the recipe asks of a generator."""

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from .several import Several


class Generator(nn.Module):
    """A source, as annotations name it: any module with `latent_dim` and `resolution`, of whatever class.

    The other attributes are asked for only where the module has them.
    """

    latent_dim: int
    resolution: int
    style_dim: int  # of a StyleGAN, which also has `mapping`
    family: str  # of a network of this package, and then
    config: dict[str, Any]  # the arguments of its constructor


def as_generator(module: nn.Module) -> Generator:
    """The module. ValueError: it lacks what every source has."""
    for name in ("latent_dim", "resolution"):
        if not isinstance(getattr(module, name, None), int):
            raise ValueError(f"the source {type(module).__name__} has no {name}: set it as an integer attribute")
    return cast(Generator, module)


def own_samples(generator: Generator, count: int, turn: int = 0) -> Tensor:
    """Images [count, C, R, R] of latents (and labels) of the generator's own prior; of several generators those of one,
    whose turn it is: 0 the first, and so on, over and over. One that makes no numbers has no turn."""
    if isinstance(generator, Several):
        able = [network for network, finite in zip(generator, generator.finite, strict=True) if finite]
        return generator.resized(own_samples(cast(Generator, able[turn % len(able)]), count))
    device = next(generator.parameters()).device
    z = torch.randn(count, generator.latent_dim).to(device)  # drawn on the CPU, whose seed is that of the run
    if classes := class_count(generator):
        return generator(z, torch.randint(classes, (count,)).to(device))
    return generator(z)


def check_samples(generator: Generator, count: int = 2) -> Iterator[str]:
    """Runs a generator that a user wrote, once, and yields what a user should know of its images.

    ValueError: it does not run on z [count, latent_dim], or what it makes are no images [count, C, R, R] of the size
        and the channels that it says.
    """
    name = type(generator).__name__
    if class_count(generator) and not hasattr(generator, "class_embeddings"):
        return  # the class miner says what is missing
    try:
        with torch.no_grad():
            images = own_samples(generator, count)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"the source {name} does not run on z [{count}, {generator.latent_dim}] ({reason}): latent_dim must be the "
            "size of its z, and forward must take z [B, latent_dim], of a conditional GAN also labels; where a network "
            "wants [B, latent_dim, 1, 1], wrap it in a module whose forward reshapes z"
        ) from error
    wanted = [count, image_channels(generator), generator.resolution, generator.resolution]
    if not isinstance(images, Tensor) or list(images.shape) != wanted:
        found = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(
            f"the source {name} makes {found}, not {wanted}: resolution and image_channels (3 where it is not there) "
            "must be those of the images that forward returns"
        )
    low, high = float(images.min()), float(images.max())
    if low >= 0 or max(-low, high) > 2:
        yield (
            f"the images of the source {name} go from {low:.3g} to {high:.3g}: are they in [-1, 1], as they have to "
            "be? If not, wrap it in a module whose forward converts them"
        )


def image_channels(generator: nn.Module) -> int:
    return getattr(generator, "image_channels", 3)


def class_count(generator: nn.Module) -> int:
    """How many labels a conditional generator knows; 0: it is not conditional."""
    return getattr(generator, "num_classes", 0)
