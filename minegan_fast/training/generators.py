"""What the recipe asks of a generator."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..mining.multi import resized


class Generator(nn.Module):
    """A source, as annotations name it: any module with `latent_dim` and `resolution`, of whatever class.

    The other attributes are asked for only where the module has them.
    """

    latent_dim: int
    resolution: int
    style_dim: int  # of a StyleGAN, which also has `mapping`
    family: str  # of a network of this package, and then
    config: dict[str, Any]  # the arguments of its constructor


class Several(nn.Module):
    """Generators whose images have one shape [C, R, R].

    names: short and unique, one for each. resize: None, or the resolution that all images are brought to.

    Attributes: names, resolution, image_channels, latent_dim (the largest), resize, and finite: for each whether its
    images are numbers, as far as that has been seen. Iteration gives the generators.

    ValueError: images differ in channels, or in resolution without `resize`; the message names the sources.
    """

    def __init__(self, generators: Sequence[nn.Module], names: Sequence[str], resize: int | None = None):
        super().__init__()
        self.generators, self.names, self.resize = nn.ModuleList(generators), list(names), resize
        self.finite = [True] * len(generators)
        self.image_channels = self._same("image_channels", 3, "channels", "the channels must be the same")
        largest = max(generator.resolution for generator in self)
        remedy = f"resize={largest} (--resize {largest}) would bring all to one size"
        self.resolution = resize or self._same("resolution", None, "pixels", remedy)
        self.latent_dim = max(generator.latent_dim for generator in self)

    def __iter__(self) -> Iterator[Generator]:
        return iter(cast(Iterable[Generator], self.generators))

    def __len__(self) -> int:
        return len(self.generators)

    def _same(self, attribute: str, default: int | None, unit: str, remedy: str) -> int:
        first, *others = [getattr(generator, attribute, default) for generator in self]
        for name, other in zip(self.names[1:], others, strict=True):
            if other != first:
                raise ValueError(f"{name} makes images of {other} {unit}, {self.names[0]} of {first}: {remedy}")
        return cast(int, first)

    def resized(self, images: Tensor) -> Tensor:
        return images if self.resize is None else resized(images, (self.resize, self.resize))


def networks(generator: nn.Module) -> list[Generator]:
    """The generators of `Several`, or the one that it is."""
    return list(generator) if isinstance(generator, Several) else [cast(Generator, generator)]


def source_of(layer: str) -> int:
    """The number of the generator in `Several` that a parameter's or a layer's name leads to."""
    return int(layer.split(".")[1])


@contextmanager
def placed(network: nn.Module, device: torch.device | None) -> Iterator[None]:
    """A block in which the network is on the device, None: where it is; afterwards it is where it was."""
    before = next((t.device for t in (*network.parameters(), *network.buffers())), None)
    if device is None or before in (None, device):  # `to` would count as a write to every held weight
        yield
        return
    network.to(device)
    try:
        yield
    finally:
        network.to(before)


@torch.no_grad()
def remember_finite(generator: Several, images: Sequence[Tensor]) -> list[str]:
    """Notes which of the generators make images of numbers, of a batch of each; returns what to say of the others.

    ValueError: none does.
    """
    generator.finite = [bool(torch.isfinite(batch).all()) for batch in images]
    bad = [name for name, finite in zip(generator.names, generator.finite, strict=True) if not finite]
    if len(bad) == len(generator):
        raise ValueError(f"the images of all {len(bad)} sources ({', '.join(bad)}) hold NaN or inf")
    return [f"the images of {name} hold NaN or inf: it gets no share" for name in bad]


def as_generator(module: nn.Module) -> Generator:
    """The module. ValueError: it lacks what every source has."""
    for name in ("latent_dim", "resolution"):
        if not isinstance(getattr(module, name, None), int):
            raise ValueError(f"the source {type(module).__name__} has no {name}: set it as an integer attribute")
    return cast(Generator, module)


def own_samples(generator: Generator, count: int, turn: int = 0, device: torch.device | None = None) -> Tensor:
    """Images [count, C, R, R] of latents (and labels) of the generator's own prior; of several generators those of one,
    whose turn it is: 0 the first, and so on, over and over. One that makes no numbers has no turn.

    device: where the generator is for as long as this takes; None: where it is.
    """
    if isinstance(generator, Several):
        able = [network for network, finite in zip(generator, generator.finite, strict=True) if finite]
        return generator.resized(own_samples(cast(Generator, able[turn % len(able)]), count, device=device))
    with placed(generator, device):
        where = next(generator.parameters()).device
        z = torch.randn(count, generator.latent_dim).to(where)  # drawn on the CPU, whose seed is that of the run
        if classes := class_count(generator):
            return generator(z, torch.randint(classes, (count,)).to(where))
        return generator(z)


def check_samples(generator: Generator, count: int = 2, device: torch.device | None = None) -> Iterator[str]:
    """Runs a generator that a user wrote, once, and yields what a user should know of its images.

    ValueError: it does not run on z [count, latent_dim], or what it makes are no images [count, C, R, R] of the size
        and the channels that it says.
    """
    name = type(generator).__name__
    if class_count(generator) and not hasattr(generator, "class_embeddings"):
        return  # the class miner says what is missing
    try:
        with torch.no_grad():
            images = own_samples(generator, count, device=device)
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


def named_labels(named: int | str | None, classes: int, whose: str) -> list[int]:
    """[207, 208] for "207,208"; all labels for None. ValueError: labels that are not there."""
    if named is None:
        return list(range(classes))
    labels = [int(word) for word in str(named).split(",")]
    if max(labels) >= classes:
        raise ValueError(f"mined_class is {named}, but {whose} labels are 0 to {classes - 1}")
    return labels
