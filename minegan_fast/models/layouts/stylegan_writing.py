"""StyleGAN as rosinality/style-based-gan-pytorch writes it: the inverse of `stylegan`.

That program always builds nine resolutions, of 4 to 1024 px. Those above a network's own are written as the program
begins them, untrained. Its discriminator counts them from the top.
"""

import re

from ..stylegan import StyleGANDiscriminator, StyleGANGenerator
from ._layout import State

LARGEST = 1024
FUSED_FROM = 128


def check(model: StyleGANGenerator | StyleGANDiscriminator) -> None:
    """ValueError: the program builds no such network."""
    config = model.config
    if config["resolution"] > LARGEST:
        raise ValueError(f"that program builds networks of up to {LARGEST} px, and this one has {config['resolution']}")
    if config["image_channels"] != 3:
        raise ValueError(f"that program builds RGB networks, and this one has {config['image_channels']} channels")
    fused = [int(r) for r in config["channels"] if config["fused_from"] is not None and int(r) >= config["fused_from"]]
    if fused != [int(r) for r in config["channels"] if int(r) >= FUSED_FROM]:
        raise ValueError(
            f"that program resamples and convolves in one from {FUSED_FROM} px on, and this network from "
            f"{config['fused_from']}"
        )
    if isinstance(model, StyleGANGenerator) and config["latent_dim"] != config["style_dim"]:
        raise ValueError("that program has no z and w of different sizes")


def whole_generator(model: StyleGANGenerator) -> StyleGANGenerator:
    """Of all resolutions, those above the model's own untrained; its weights are drawn from the global random state."""
    names = ("latent_dim", "style_dim", "mapping_layers", "channels")
    whole = StyleGANGenerator(LARGEST, fused_from=FUSED_FROM, **{name: model.config[name] for name in names})
    whole.load_state_dict(whole.state_dict() | model.state_dict())
    return whole


def whole_discriminator(model: StyleGANDiscriminator) -> StyleGANDiscriminator:
    """As `whole_generator`."""
    names = ("from_rgb_activate", "channels")
    whole = StyleGANDiscriminator(LARGEST, fused_from=FUSED_FROM, **{name: model.config[name] for name in names})
    above = len(whole.from_rgb) - len(model.from_rgb)
    own: State = {
        re.sub(r"^(progression|from_rgb)\.(\d+)", lambda found: f"{found[1]}.{int(found[2]) + above}", name): tensor
        for name, tensor in model.state_dict().items()
    }
    whole.load_state_dict(whole.state_dict() | own)
    return whole
