"""From what the user names to networks and images that fit together."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from ..files.reading import Contents, read
from ..models import has_discriminator, load_discriminator, load_generator
from ..models.checkpoint import shorten
from .config import TransferConfig
from .critics import check_fit, new_critic
from .generators import Generator, Several, as_generator, image_channels, networks
from .images import ImageSet, load_images

# A KID against fewer images than this would choose the best snapshot by chance: then none is set aside.
LEAST_HELD_OUT = 5


class Checkpoints:
    """Reads files of networks, each of them once: a run asks several times, and a large pickle takes seconds.

    What was read stays in memory until `clear()`.
    """

    def __init__(self):
        self._contents: dict[Path, Contents] = {}

    def open(self, path: str | Path) -> Contents:
        """What the file holds. Errors as in `files.reading.read`."""
        key = Path(path).resolve()
        if key not in self._contents:
            self._contents[key] = read(path)
        return self._contents[key]

    def clear(self) -> None:
        self._contents.clear()


def listed(source) -> list:
    """The sources, of which one need be in no list. ValueError: there is none."""
    if isinstance(source, dict):
        raise TypeError(
            "the source is a dictionary, a state dict perhaps: build its network, load the weights into that, and give "
            "the network, or give the path of a checkpoint of a family that is known here"
        )
    sources = list(source) if isinstance(source, (list, tuple, nn.ModuleList)) else [source]
    if not sources:
        raise ValueError("there is no source: give the path of a checkpoint or a module, or several of them")
    return sources


@dataclass
class Networks:
    """A generator (`Several` of several sources) and the critic that judges it, None where none is needed.

    pretrained: whether the critic came with the source or was given. notes: what a user should know about the choice.
    """

    generator: Generator
    critic: nn.Module | None
    pretrained: bool
    notes: tuple[str, ...] = ()


def open_networks(source, critic, config: TransferConfig, needed: bool = True, names: Sequence[str] = ()) -> Networks:
    """Networks in eval mode from files or modules; modules are copied, and the caller's stay as they are.

    source: a path, the `Contents` of a file, or a module, or a list of them. critic: the same, or None: then it is the
        discriminator in the source's file (the first of several that has one), and where there is none, or none that
        can be used, a new one of the generator's sizes.
    needed: False reads and builds no critic at all, whatever `critic` is.
    names: of several sources.

    ValueError: images of channels that are not adapted, networks whose images differ, NaN in weights.
    """
    sources = listed(source)
    if len(sources) == 1:
        generator = open_generator(sources[0])
    else:
        opened = [open_generator(source, name) for source, name in zip(sources, names, strict=True)]
        generator = cast(Generator, Several(opened, names, config.resize).eval())
    if not needed:
        return Networks(generator, None, pretrained=False)
    if critic is None:
        critic, note = source_critic(sources, generator)
        if critic is None:
            like = networks(generator)[0]  # of its family is the new one
            like = cast(Generator, like) if like.resolution == generator.resolution else generator
            return Networks(generator, new_critic(like, config.seed).eval(), pretrained=False, notes=(note,))
    else:
        critic = open_critic(critic, generator)
    return Networks(generator, critic.eval(), pretrained=True)


def open_generator(source, name: str = "the source") -> Generator:
    """A generator in eval mode from a path, the `Contents` of a file, or a module, which is copied. Errors as in
    `open_networks`."""
    generator = copy.deepcopy(source) if isinstance(source, nn.Module) else load_generator(read(source))
    generator = as_generator(generator)
    if (channels := image_channels(generator)) not in (1, 3):
        raise ValueError(
            f"{name} makes images of {channels} channels, of which no picture can be written: adapted are those "
            "of 1 (grey) and 3 (RGB); cut the others off behind the generator"
        )
    _check_finite(name, generator)
    # A module may come in train mode: what is measured before the training must not move its statistics.
    return generator.eval()


def open_critic(critic, generator: nn.Module) -> nn.Module:
    """A copy of the module, or what is in the file. ValueError: it judges other images than the generator makes."""
    critic = copy.deepcopy(critic) if isinstance(critic, nn.Module) else load_discriminator(critic)
    _check_critic(generator, critic)
    return critic


def source_critic(source, generator: nn.Module) -> tuple[nn.Module | None, str]:
    """(discriminator in the source's file, ""), or (None, why there is none that could judge the generator's images).

    source: a path, the `Contents` of a file, or a module, which has none; or a list, of which the first that has one
        gives it.
    """
    if isinstance(source, list):
        tried = []
        for one in source:
            tried.append(source_critic(one, generator))
            if tried[-1][0] is not None:
                return tried[-1]
        return tried[0]
    if isinstance(source, nn.Module):
        return None, "the source is a module, without a discriminator"
    try:
        contents = read(source)
        if not has_discriminator(contents):
            return None, "the source has no discriminator of a layout known here"
        critic = load_discriminator(contents)
        _check_critic(generator, critic)
    except ValueError as error:
        return None, f"the source's discriminator cannot be used: {error}"
    return critic, ""


def _check_critic(generator: nn.Module, critic: nn.Module) -> None:
    check_fit(generator, critic)
    _check_finite("the critic", critic)


def _check_finite(what: str, network: nn.Module) -> None:
    named = [*network.named_parameters(), *network.named_buffers()]
    if bad := [name for name, t in named if t.is_floating_point() and not torch.isfinite(t).all()]:
        raise ValueError(
            f"{what}'s weights hold NaN or inf, in {shorten(bad)}: its training broke down, or the file is "
            "damaged; take another checkpoint"
        )


def open_images(images, generator: Generator, config: TransferConfig) -> tuple[ImageSet, Tensor | None]:
    """(training images, held-out images uint8 or None): a folder of its own, or a part of `images` set aside."""
    size, channels = generator.resolution, image_channels(generator)
    target = load_images(images, size, channels)
    if isinstance(config.held_out, (str, Path)):
        return target, load_images(config.held_out, size, channels).images
    train, held_out = target.split(config.held_out, config.seed)
    return (train, held_out.images) if len(held_out) >= LEAST_HELD_OUT else (target, None)


def choose_device(name: str | None, index: int | None = None) -> torch.device:
    """The named device, or a GPU where there is one, else the CPU. ValueError: a device that is not there.

    index: which GPU, where the name does not say: the number of this process on its machine.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and index is not None:
        if index >= (count := torch.cuda.device_count()):
            raise ValueError(
                f"process {index} of this machine has no GPU of its own, there are {count}: start no more processes "
                "than that (--nproc-per-node), or take --device cpu"
            )
        name = f"cuda:{index}"
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"device {name!r} cannot be used: the devices are cpu, cuda, cuda:1 and so on")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {name!r} cannot be used here: {reason}; leave it out to take what is there") from None
    return device
