"""The generators of a run with several sources, as one network to whoever asks for parameters or the images' shape."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from ..mining.multi import resized


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
        sizes = {int(generator.resolution) for generator in self}
        largest = max(sizes)
        remedy = f"resize={largest} (--resize {largest}) would bring all to one size"
        self.resolution = resize or self._same("resolution", None, "pixels", remedy)
        self.latent_dim = max(int(generator.latent_dim) for generator in self)

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self.generators)

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


def networks(generator: nn.Module) -> list[nn.Module]:
    """The generators of `Several`, or the one that it is."""
    return list(generator) if isinstance(generator, Several) else [generator]


def source_of(layer: str) -> int:
    """The number of the generator in `Several` that a parameter's or a layer's name leads to."""
    return int(layer.split(".")[1])


def short_names(sources: Sequence) -> list[str]:
    """A name for each source, a path or a module, unique and fit for a folder: of a path its last part, and as many
    parts before it as tell all of them apart; of a module its class."""
    parts = [_parts(source) for source in sources]
    names = [_tail(p, 1) for p in parts]
    for depth in range(2, 1 + max(map(len, parts))):
        if len(set(names)) == len(names):
            break
        names = [_tail(p, depth) if names.count(name) > 1 else name for p, name in zip(parts, names, strict=True)]
    for name in {name for name in names if names.count(name) > 1}:
        for number, i in enumerate([i for i, other in enumerate(names) if other == name], 1):
            names[i] = _free(f"{name}-{number}", names)
    return names


def _parts(source) -> tuple[str, ...]:
    if isinstance(source, nn.Module):
        return (type(source).__name__,)
    path = Path(source).resolve()
    folder = path.is_dir() or not path.suffix
    return (*path.parts[1:-1], path.name if folder else path.stem)


def _tail(parts: tuple[str, ...], count: int) -> str:
    return re.sub(r"[^\w.-]|^\.", "_", "-".join(parts[-count:])) or "source"


def _free(name: str, names: list[str]) -> str:
    while name in names:
        name += "_"
    return name


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
