"""Progressive GAN's files: facebookresearch/pytorch_GAN_zoo, before and after its layers were wrapped in a `module`."""

import re

from ..pgan import PGANDiscriminator, PGANGenerator
from ._layout import Layout, State, highest

PROJECT = "facebookresearch/pytorch_GAN_zoo"


def wrapped(state: State) -> State:
    """Today's names: `decisionLayer.weight` of old files is `decisionLayer.module.weight`."""
    return {re.sub(r"(?<!module)\.(weight|bias)$", r".module.\1", name): tensor for name, tensor in state.items()}


def cropped(state: State, resolution: int | None) -> State:
    """The layers up to a resolution, which are a network of that size: what grew on top of them is left out."""
    if resolution is None:
        return state
    sizes = [4 << stage for stage in range(highest(state, r"(?:toRGB|fromRGB)Layers\.(\d+)\..*") + 1)]
    if resolution not in sizes:
        raise ValueError(f"it holds the resolutions {sizes}, not {resolution}")
    stages = sizes.index(resolution)

    def kept(name: str) -> bool:
        match = re.match(r"(scaleLayers|toRGBLayers|fromRGBLayers)\.(\d+)\.", name)
        return match is None or int(match[2]) < stages + (match[1] != "scaleLayers")

    return {name: tensor for name, tensor in state.items() if kept(name)}


def _widths(state: State, images: str, axis: int) -> dict[int, int]:
    stages = highest(state, rf"{images}\.(\d+)\..*") + 1
    return {4 << s: state[f"{images}.{s}.module.weight"].shape[axis] for s in range(stages)}


def generator_config(state: State) -> dict:
    state = wrapped(state)
    channels = _widths(state, "toRGBLayers", 1)
    return {
        "resolution": max(channels),
        "latent_dim": state["formatLayer.module.weight"].shape[1],
        "image_channels": state["toRGBLayers.0.module.weight"].shape[0],
        "channels": channels,
    }


def labels_of_critic(config: dict, critic: State) -> dict:
    """The generator's shapes tell the size of z and labels together; the critic beside it has a score a label."""
    scores = wrapped(critic).get("decisionLayer.module.weight")
    labels = 0 if scores is None else scores.shape[0] - 1
    return config | {"latent_dim": config["latent_dim"] - labels, "num_classes": labels}


def discriminator_config(state: State) -> dict:
    state = wrapped(state)
    channels = _widths(state, "fromRGBLayers", 0)
    return {
        "resolution": max(channels),
        "image_channels": state["fromRGBLayers.0.module.weight"].shape[1],
        "num_classes": state["decisionLayer.module.weight"].shape[0] - 1,
        "channels": channels,
    }


LAYOUTS: tuple[Layout, ...] = (
    *(
        Layout(
            project=PROJECT,
            role="generator",
            model=PGANGenerator,
            signature=(f"formatLayer.{module}weight", f"toRGBLayers.0.{module}weight"),
            containers=("avgG", "netG"),
            averaged=("avgG",),
            config=generator_config,
            convert=wrapped,
            crop=cropped,
            beside=labels_of_critic,
        )
        for module in ("module.", "")
    ),
    *(
        Layout(
            project=PROJECT,
            role="discriminator",
            model=PGANDiscriminator,
            signature=(f"decisionLayer.{module}weight", f"fromRGBLayers.0.{module}weight"),
            containers=("netD",),
            config=discriminator_config,
            convert=wrapped,
            crop=cropped,
        )
        for module in ("module.", "")
    ),
)
