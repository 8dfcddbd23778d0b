"""The critic of a run: a new one where the source has none, and what of it stays frozen."""

from torch import nn

from ..models import StyleGAN2Discriminator
from .randomness import seed_all

# Of each family: the critic, and which of the generator's settings are its own too.
CRITICS = {
    "stylegan2": (StyleGAN2Discriminator, ("resolution", "channel_base", "channel_max", "image_channels", "channels")),
}


def new_critic(generator: nn.Module, seed: int) -> nn.Module:
    """An untrained critic of the generator's family and sizes. ValueError: a generator of no known family."""
    if getattr(generator, "family", None) not in CRITICS:
        raise ValueError(f"no critic came with the source {type(generator).__name__}: give one with critic=")
    network, shared = CRITICS[generator.family]
    seed_all(seed, "critic")
    return network(**{name: generator.config[name] for name in shared})


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

    Blocks are the entries of the critic's first nn.Sequential or nn.ModuleList, or its children where it has none.
    """
    sequences = [m for m in critic.children() if isinstance(m, (nn.Sequential, nn.ModuleList))]
    blocks = list(sequences[0] if sequences else critic.children())
    if count > len(blocks):
        raise ValueError(f"freeze_blocks is {count}, but {type(critic).__name__} has {len(blocks)} blocks")
    for block in blocks[:count]:
        block.requires_grad_(False)
