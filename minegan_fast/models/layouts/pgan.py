"""Progressive GAN's files: facebookresearch/pytorch_GAN_zoo, before and after its layers were wrapped in a `module`."""

import re
from collections.abc import Mapping

from ...files.pickle_names import Thing
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


def _settings(data: Mapping) -> Mapping:
    """What the program keeps of its settings under `config`: an object, or a dict of a file written again."""
    settings = data.get("config")
    settings = settings.state if isinstance(settings, Thing) else settings
    return settings if isinstance(settings, Mapping) else {}


def _faded(config: dict, settings: Mapping) -> dict:
    """With the weight of the highest resolution, which that program gives as the weight of the one below.

    ValueError: the settings are of a network that has none of this project's.
    """
    for name, own in (("leakyReluLeak", 0.2), ("perChannelNormalization", True), ("equalizedlR", True)):
        if settings.get(name, own) != own:
            raise ValueError(f"{name} is {settings[name]!r}, where networks read here have {own!r}")
    below, others = settings.get("alpha", 0.0), settings.get("depthOtherScales")
    # At 4 pixels nothing fades in, and a lower resolution, which the user named, has grown long ago.
    fades = not isinstance(others, list) or (others and config["resolution"] == 4 << len(others))
    if not fades or not below:
        return config
    if not isinstance(below, (int, float)) or not 0 <= below <= 1:
        raise ValueError(f"its alpha is {below!r}, and no number of 0 to 1")
    return config | {"alpha": 1.0 - below}


def of_generator(config: dict, critic: State, data: Mapping) -> dict:
    """The generator's shapes tell the size of z and labels together; the critic beside it has a score a label."""
    settings = _settings(data)
    if (loss := settings.get("lossCriterion")) in ("DCGAN", "MSE"):
        raise ValueError(f"its images pass through tanh (lossCriterion is {loss}), which this network does not have")
    scores = wrapped(critic).get("decisionLayer.module.weight")
    labels = 0 if scores is None else scores.shape[0] - 1
    config = config | {"latent_dim": config["latent_dim"] - labels, "num_classes": labels}
    return _faded(config, settings)


def of_discriminator(config: dict, _: State, data: Mapping) -> dict:
    """That program's discriminator blends from 16 pixels on; at 8 it leaves the lower resolution out."""
    config = _faded(config, _settings(data))
    return {name: value for name, value in config.items() if name != "alpha" or config["resolution"] > 8}


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
            beside=of_generator,
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
            beside=of_discriminator,
        )
        for module in ("module.", "")
    ),
)
