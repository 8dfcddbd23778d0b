"""The critic of a run: a new one where the source has none, and which parts of it stay frozen."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers import r1_penalty
from ..models import BigGANDiscriminator, PGANDiscriminator, StyleGAN2Discriminator, StyleGANDiscriminator
from ..models.biggan_layers import GENERATOR_WIDTHS
from .generators import Generator, image_channels, named_labels
from .randomness import keep_and_set_random_state

CRITICS = {"pgan": PGANDiscriminator, "stylegan": StyleGANDiscriminator, "stylegan2": StyleGAN2Discriminator}
SHARED = ("resolution", "channel_base", "channel_max", "image_channels", "channels", "fused_from")
# For the critic of a generator of no known family: the widths to choose from (32768 is StyleGAN2's own), and the fewest
# channels at the resolution of the images.
CHANNEL_BASES, LEAST_WIDTH = [2**k for k in range(6, 16)], 8


def new_critic(generator: Generator, seed: int) -> nn.Module:
    """An untrained critic of the generator's family and sizes.

    A generator of no known family, with `resolution` and perhaps `image_channels` (else 3), gets a StyleGAN2
    discriminator with about as many parameters as it has itself; where the resolution is no power of two from 8 up,
    images are enlarged to the next one first.
    """
    family, config = getattr(generator, "family", None), getattr(generator, "config", {})
    with keep_and_set_random_state(seed, "critic"):
        if family in CRITICS:
            return CRITICS[family](**{name: value for name, value in config.items() if name in SHARED})
        if family in ("biggan", "biggan_deep"):
            resolution = generator.resolution
            # One class: mining uses the critic without its projection, so nothing would read a larger table.
            return BigGANDiscriminator(
                resolution,
                num_classes=1,
                channel_width=max(1, config["channels"][-1] // GENERATOR_WIDTHS[resolution][-1]),
                attention=config["attention"],
                image_channels=image_channels(generator),
            )
        return _critic_of_no_family(generator)


def _critic_of_no_family(generator: Generator) -> nn.Module:
    resolution, channels = generator.resolution, image_channels(generator)
    wanted = sum(p.numel() for p in generator.parameters())
    size = max(8, 1 << (resolution - 1).bit_length())
    bases = [base for base in CHANNEL_BASES if base >= LEAST_WIDTH * size] or CHANNEL_BASES[-1:]

    def distance(base: int) -> float:
        with torch.device("meta"):
            critic = StyleGAN2Discriminator(size, channel_base=base, image_channels=channels)
        return abs(math.log(sum(p.numel() for p in critic.parameters()) / max(1, wanted)))

    critic = StyleGAN2Discriminator(size, channel_base=min(bases, key=distance), image_channels=channels)
    return critic if size == resolution else EnlargingCritic(critic, resolution)


class EnlargingCritic(nn.Module):
    """A critic behind a bilinear enlargement: images [B, C, resolution, resolution] -> logits [B]."""

    def __init__(self, critic: StyleGAN2Discriminator, resolution: int):
        super().__init__()
        self.critic, self.resolution, self.image_channels = critic, resolution, critic.image_channels

    def forward(self, x: Tensor) -> Tensor:
        size = self.critic.resolution
        return self.critic(F.interpolate(x, (size, size), mode="bilinear"))

    def image_side_blocks(self) -> list[nn.Module]:
        return [*self.critic.convs]


def without_labels(critic: nn.Module, mined_class: int | str | None) -> nn.Module:
    """The critic as it judges images that have no label. One whose every logit is of an image and a label gives the
    mean of its logits for the labels that are mined, or for all. ValueError: it does not have them."""
    if isinstance(critic, StyleGAN2Discriminator) and critic.num_classes:
        return critic.of_classes(named_labels(mined_class, critic.num_classes, "the critic's"))
    return critic


def check_fit(generator: nn.Module, critic: nn.Module) -> None:
    """ValueError where the critic judges other images than the generator makes."""
    for name, what in (("resolution", "{} pixels wide"), ("image_channels", "of {} channels")):
        made, judged = getattr(generator, name, None), getattr(critic, name, None)
        if made is not None and judged is not None and made != judged:
            labels = ""
            if name == "image_channels" and judged > made:
                labels = (
                    f"; if the {judged - made} further ones are maps of a label, a part of the generator's z is that "
                    'label too, and the file does not say which: see "Labels in z" in docs/checkpoints.md'
                )
            raise ValueError(
                f"generator and critic do not fit: {name} is {made} and {judged}; the critic {type(critic).__name__} "
                f"judges images {what.format(judged)}, {type(generator).__name__} makes them "
                f"{what.format(made)}{labels}"
            )


def begin_training(critic: nn.Module) -> None:
    """Puts the critic into train mode, with gradients for `trainable_parameters`. ValueError: it has no parameters."""
    parameters = trainable_parameters(critic)
    if not parameters:
        raise ValueError(f"the critic {type(critic).__name__} has no parameters to train: give another with critic=")
    for parameter in parameters:
        parameter.requires_grad_(True)
    train_mode(critic)


def train_mode(critic: nn.Module) -> None:
    """`critic.train()`, but modules whose parameters are all frozen go to eval mode: their batch statistics, dropout
    and power iterations are part of what is frozen."""
    critic.train()
    for module in critic.modules():
        parameters = [*module.parameters()]
        if parameters and not any(p.requires_grad for p in parameters):
            module.eval()


def trainable_parameters(critic: nn.Module) -> list[nn.Parameter]:
    """The parameters that did not come frozen (requires_grad=False).

    Where every parameter is frozen, these are all of them: a script leaves a critic so if it only judged with it.
    """
    parameters = [*critic.parameters()]
    return [p for p in parameters if p.requires_grad] or parameters


def critic_r1(critic: nn.Module, real: Tensor) -> Tensor:
    """R1 of real images [B, C, R, R], a scalar without weight: on the pixels (`layers.r1_penalty`), or by the critic's
    own method `r1_penalty(real)`."""
    own = getattr(critic, "r1_penalty", None)
    return r1_penalty(critic, real) if own is None else own(real)


def freeze_lower_blocks(critic: nn.Module, count: int) -> None:
    """FreezeD (Mo et al. 2020, arXiv 2002.10964): the `count` blocks nearest to the image do not train.

    Blocks are those that the critic's `image_side_blocks()` lists; else the entries of its first nn.Sequential or
    nn.ModuleList; else its children.
    """
    image_side_blocks = getattr(critic, "image_side_blocks", None)
    if image_side_blocks is not None:
        blocks = image_side_blocks()
    else:
        sequences = [m for m in critic.children() if isinstance(m, (nn.Sequential, nn.ModuleList))]
        blocks = list(sequences[0] if sequences else critic.children())
    if count > len(blocks):
        raise ValueError(f"freeze_blocks is {count}, but {type(critic).__name__} has {len(blocks)} blocks")
    for block in blocks[:count]:
        block.requires_grad_(False)
    if not any(p.requires_grad for p in critic.parameters()):
        raise ValueError(f"freeze_blocks is {count}, which leaves nothing of {type(critic).__name__} to train")
