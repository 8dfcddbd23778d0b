"""The critic of a run: a new one where the source has none, and what of it stays frozen."""

from torch import nn

from ..models import BigGANDiscriminator, PGANDiscriminator, StyleGAN2Discriminator, StyleGANDiscriminator
from ..models.biggan_layers import GENERATOR_WIDTHS
from .randomness import seeded

CRITICS = {"pgan": PGANDiscriminator, "stylegan": StyleGANDiscriminator, "stylegan2": StyleGAN2Discriminator}
SHARED = ("resolution", "channel_base", "channel_max", "image_channels", "channels", "fused_from")


def new_critic(generator: nn.Module, seed: int) -> nn.Module:
    """An untrained critic of the generator's family and sizes. ValueError: a generator of no known family."""
    family, config = getattr(generator, "family", None), getattr(generator, "config", {})
    with seeded(seed, "critic"):
        if family in CRITICS:
            return CRITICS[family](**{name: value for name, value in config.items() if name in SHARED})
        if family in ("biggan", "biggan_deep"):
            resolution = generator.resolution
            # One class: mining takes the critic without its projection, so that table would only lie there.
            return BigGANDiscriminator(
                resolution,
                num_classes=1,
                channel_width=max(1, config["channels"][-1] // GENERATOR_WIDTHS[resolution][-1]),
                attention=config["attention"],
                image_channels=generator.image_channels,
            )
    raise ValueError(f"no critic came with the source {type(generator).__name__}: give one with critic=")


def check_fit(generator: nn.Module, critic: nn.Module) -> None:
    """ValueError where the critic judges other images than the generator makes."""
    for name, what in (("resolution", "{} pixels wide"), ("image_channels", "of {} channels")):
        made, judged = getattr(generator, name, None), getattr(critic, name, None)
        if None not in (made, judged) and made != judged:
            raise ValueError(
                f"generator and critic do not fit: {name} is {made} and {judged}; the critic {type(critic).__name__} "
                f"judges images {what.format(judged)}, {type(generator).__name__} makes them {what.format(made)}"
            )


def freeze_lower_blocks(critic: nn.Module, count: int) -> None:
    """FreezeD (Mo et al. 2020, arXiv 2002.10964): the `count` blocks nearest to the image do not train.

    Blocks are those that the critic's `image_side_blocks()` lists; else the entries of its first nn.Sequential or
    nn.ModuleList; else its children.
    """
    if hasattr(critic, "image_side_blocks"):
        blocks = critic.image_side_blocks()
    else:
        sequences = [m for m in critic.children() if isinstance(m, (nn.Sequential, nn.ModuleList))]
        blocks = list(sequences[0] if sequences else critic.children())
    if count > len(blocks):
        raise ValueError(f"freeze_blocks is {count}, but {type(critic).__name__} has {len(blocks)} blocks")
    for block in blocks[:count]:
        block.requires_grad_(False)
