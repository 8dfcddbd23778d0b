"""From what the user names to networks and images that fit together."""

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..models import has_discriminator, load_discriminator, load_generator
from ..models.checkpoint import shorten
from .config import TransferConfig
from .critics import check_fit, new_critic
from .images import ImageSet, load_images

# A KID against fewer images than this would choose the best snapshot by chance: then none is set aside.
LEAST_HELD_OUT = 5


@dataclass
class Networks:
    """A generator and the critic that judges it; `pretrained` says whether the critic came with the source."""

    generator: nn.Module
    critic: nn.Module
    pretrained: bool


def open_networks(source, critic, config: TransferConfig) -> Networks:
    """Networks from paths or modules; modules are copied, the caller's stay as they are.

    A path without a discriminator gets a new critic of the generator's sizes. ValueError: several sources, networks
    whose images differ.
    """
    if isinstance(source, (list, tuple)):
        if len(source) != 1:
            raise ValueError(f"one source at a time can be adapted, got {len(source)}; give one path or module")
        source = source[0]
    generator = copy.deepcopy(source) if isinstance(source, nn.Module) else load_generator(source)
    for name in ("latent_dim", "resolution"):
        if not isinstance(getattr(generator, name, None), int):
            raise ValueError(f"the source {type(generator).__name__} has no {name}: set it as an integer attribute")
    pretrained = True
    if isinstance(critic, nn.Module):
        critic = copy.deepcopy(critic)
    elif critic is not None:
        critic = load_discriminator(critic)
    elif not isinstance(source, nn.Module) and has_discriminator(source):
        critic = load_discriminator(source)
    else:
        critic, pretrained = new_critic(generator, config.seed), False
    check_fit(generator, critic)
    _check_finite("source", generator)
    _check_finite("critic", critic)
    # A module may come in train mode: what is measured before the training must not move its statistics.
    return Networks(generator.eval(), critic.eval(), pretrained)


def _check_finite(what: str, network: nn.Module) -> None:
    named = [*network.named_parameters(), *network.named_buffers()]
    if bad := [name for name, t in named if t.is_floating_point() and not torch.isfinite(t).all()]:
        raise ValueError(
            f"the {what}'s weights hold NaN or inf, in {shorten(bad)}: its training broke down, or the file is "
            "damaged; take another checkpoint"
        )


def image_channels(generator: nn.Module) -> int:
    return getattr(generator, "image_channels", 3)


def open_images(images, generator: nn.Module, config: TransferConfig) -> tuple[ImageSet, Tensor | None]:
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
