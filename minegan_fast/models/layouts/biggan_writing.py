"""BigGAN as BigGAN-PyTorch writes it, whose names are this project's own: what else is in its folder, and what fits."""

from ..biggan import DISCRIMINATOR_WIDTHS, BigGANDiscriminator, BigGANGenerator
from ..biggan_layers import GENERATOR_WIDTHS

BN_EPS = 1e-5  # of the last batch norm, whatever the others have


def options(generator: BigGANGenerator, critic: BigGANDiscriminator | None) -> dict:
    """The options of that program which build these networks.

    ValueError: none do.
    """
    config = generator.config
    width = config["channels"][-1] // GENERATOR_WIDTHS[generator.resolution][-1]
    if config["channels"] != [width * m for m in GENERATOR_WIDTHS[generator.resolution]]:
        raise ValueError(f"BigGAN-PyTorch does not build a generator of {config['channels']} channels")
    if generator.image_channels != 3:
        raise ValueError(f"BigGAN-PyTorch builds RGB networks, and this one has {generator.image_channels} channels")
    if config["bn_eps"] != BN_EPS:
        raise ValueError(f"the last batch norm of BigGAN-PyTorch has eps {BN_EPS}, and this one has {config['bn_eps']}")
    found = {
        "model": "BigGAN",
        "resolution": generator.resolution,
        "n_classes": generator.num_classes,
        "dim_z": generator.latent_dim,
        "shared_dim": config["class_dim"],
        "G_shared": config["shared"],
        "hier": config["hierarchical"],
        "G_ch": width,
        "G_attn": _attention(config),
        "G_param": "SN" if config["sn_eps"] else "none",
        "BN_eps": config["bn_eps"],
        "ema": True,
    }
    if critic is not None:
        found |= {
            "D_ch": critic.config["channels"][0] // DISCRIMINATOR_WIDTHS[critic.resolution][0],
            "D_attn": _attention(critic.config),
            "D_wide": critic.config["wide"],
        }
    eps = config["sn_eps"] or (critic.config["sn_eps"] if critic else None)
    return found | ({"SN_eps": eps} if eps else {})


def _attention(config: dict) -> str:
    return "_".join(map(str, config["attention"])) or "0"


def critic_like(generator: BigGANGenerator) -> BigGANDiscriminator | None:
    """An untrained critic that the program builds beside the generator; None: it builds none."""
    config = generator.config
    if generator.resolution == 512:
        return None
    return BigGANDiscriminator(
        generator.resolution,
        generator.num_classes,
        config["channels"][-1] // GENERATOR_WIDTHS[generator.resolution][-1],
        attention=config["attention"],
        sn_eps=config["sn_eps"] or 1e-6,
    )


def check_critic(critic: BigGANDiscriminator, generator: BigGANGenerator) -> None:
    """ValueError: the program does not build that critic beside the generator."""
    config, widths = critic.config, DISCRIMINATOR_WIDTHS[critic.resolution]
    if critic.resolution == 512:
        raise ValueError("that program has none of 512 px")
    if config["channels"] != [config["channels"][0] // widths[0] * m for m in widths]:
        raise ValueError(f"that program has none of {config['channels']} channels")
    if critic.num_classes != generator.num_classes:
        raise ValueError(f"it knows {critic.num_classes} classes, and the generator {generator.num_classes}")
    if not config["sn_eps"]:
        raise ValueError("it has no spectral normalisation, which that program always has there")
