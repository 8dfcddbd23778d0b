"""StyleGAN's files: rosinality/style-based-gan-pytorch.

That project's networks have the blocks of all nine resolutions up to 1024 px, whatever was trained. The blocks that no
step has reached still have the zeros they began with, in the noise weights and in the biases, and so have their
averages: a file is taken for a network of the highest resolution whose block has something else.
"""

import re

from torch import Tensor

from ..stylegan import StyleGANDiscriminator, StyleGANGenerator
from ._layout import Layout, State, highest

PROJECT = "rosinality/style-based-gan-pytorch"


def _stages(resolution: int | None, held: int, trained: list[bool]) -> int:
    """How many resolutions, from 4 px, are kept of those that are held."""
    if resolution is None:
        return max((i + 1 for i, was in enumerate(trained) if was), default=held)
    sizes = [4 << i for i in range(held)]
    if resolution not in sizes:
        raise ValueError(f"it holds the resolutions {sizes}, not {resolution}")
    return sizes.index(resolution) + 1


def _any(*tensors: Tensor | None) -> bool:
    return any(t is not None and bool(t.any()) for t in tensors)


def cropped_generator(state: State, resolution: int | None) -> State:
    """The blocks up to a resolution, or up to the highest one that was trained."""
    held, block = highest(state, r"generator\.to_rgb\.(\d+)\..*") + 1, "generator.progression.{}.{}"
    beginnings = ("noise1.weight_orig", "noise2.weight_orig", "conv2.conv.bias")
    trained = [_any(*(state.get(block.format(i, name)) for name in beginnings)) for i in range(held)]
    stages = _stages(resolution, held, trained)

    def kept(name: str) -> bool:
        match = re.match(r"generator\.(?:progression|to_rgb)\.(\d+)\.", name)
        return match is None or int(match[1]) < stages

    return {name: tensor for name, tensor in state.items() if kept(name)}


def cropped_discriminator(state: State, resolution: int | None) -> State:
    """The blocks from a resolution down, or from the highest one that was trained, counted from 0."""
    held = highest(state, r"from_rgb\.(\d+)\..*") + 1
    biases = [state.get(f"progression.{i}.conv1.0.conv.bias") for i in range(held)]
    above = held - _stages(resolution, held, [_any(bias) for bias in reversed(biases)])
    kept = {}
    for name, tensor in state.items():
        match = re.match(r"(progression|from_rgb)\.(\d+)(\..*)", name)
        if match is None:
            kept[name] = tensor
        elif int(match[2]) >= above:
            kept[f"{match[1]}.{int(match[2]) - above}{match[3]}"] = tensor
    return kept


def generator_config(state: State) -> dict:
    stages = highest(state, r"generator\.to_rgb\.(\d+)\..*") + 1
    fused = (i for i in range(stages) if f"generator.progression.{i}.conv1.0.weight" in state)
    lowest = next(fused, None)
    first = state["style.1.linear.weight_orig"]
    return {
        "resolution": 2 << stages,
        "latent_dim": first.shape[1],
        "style_dim": first.shape[0],
        "mapping_layers": (highest(state, r"style\.(\d+)\..*") + 1) // 2,
        "image_channels": state["generator.to_rgb.0.conv.weight_orig"].shape[0],
        "channels": {4 << i: state[f"generator.to_rgb.{i}.conv.weight_orig"].shape[1] for i in range(stages)},
        "fused_from": None if lowest is None else 4 << lowest,
    }


def discriminator_config(state: State) -> dict:
    stages = highest(state, r"from_rgb\.(\d+)\..*") + 1
    activate = "from_rgb.0.0.conv.bias" in state
    images = [state[f"from_rgb.{i}.{'0.' if activate else ''}conv.weight_orig"] for i in range(stages)]
    lowest = max((i for i in range(stages) if f"progression.{i}.conv2.1.weight" in state), default=None)
    return {
        "resolution": 2 << stages,
        "image_channels": images[0].shape[1],
        "channels": {(2 << stages) >> i: weight.shape[0] for i, weight in enumerate(images)},
        "fused_from": None if lowest is None else (2 << stages) >> lowest,
        "from_rgb_activate": activate,
    }


LAYOUTS: tuple[Layout, ...] = (
    Layout(
        project=PROJECT,
        role="generator",
        model=StyleGANGenerator,
        signature=("generator.progression.0.conv1.input", "style.1.linear.weight_orig"),
        containers=("g_running", "generator"),
        averaged=("g_running",),
        config=generator_config,
        crop=cropped_generator,
    ),
    *(
        Layout(
            project=PROJECT,
            role="discriminator",
            model=StyleGANDiscriminator,
            signature=(f"from_rgb.0.{activated}conv.weight_orig", "linear.linear.weight_orig"),
            containers=("discriminator",),
            config=discriminator_config,
            crop=cropped_discriminator,
        )
        for activated in ("0.", "")
    ),
)
