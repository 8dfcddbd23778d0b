"""What the recipe asks of a generator."""

from typing import Any, cast

from torch import nn


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


def image_channels(generator: nn.Module) -> int:
    return getattr(generator, "image_channels", 3)


def class_count(generator: nn.Module) -> int:
    """How many labels a conditional generator knows; 0: it is not conditional."""
    return getattr(generator, "num_classes", 0)
