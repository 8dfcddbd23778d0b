"""StyleGAN2's files: rosinality/stylegan2-pytorch, whose names and shapes are this project's own.

That project has the skip generator and the residual discriminator; the other two have names in the same manner.
"""

from ..stylegan2 import StyleGAN2Discriminator, StyleGAN2Generator
from ._layout import Layout, State, highest, square


def generator_config(state: State) -> dict:
    stages = (highest(state, r"convs\.(\d+)\..*") + 1) // 2
    channels = {4: state["conv1.conv.weight"].shape[1]}
    channels |= {8 << j: state[f"convs.{2 * j}.conv.weight"].shape[1] for j in range(stages)}
    resnet = "skips.0.0.weight" in state
    square(state.get("input.input"))
    return {
        "resolution": 4 << stages,
        "latent_dim": state["style.1.weight"].shape[1],
        "style_dim": state["style.1.weight"].shape[0],
        "mapping_layers": highest(state, r"style\.(\d+)\..*"),
        "image_channels": state["to_rgb.conv.weight" if resnet else "to_rgb1.conv.weight"].shape[1],
        "channels": channels,
        "architecture": "resnet" if resnet else "skip",
    } | ({"latent_avg": True} if "latent_avg" in state else {})


def discriminator_config(state: State) -> dict:
    blocks = highest(state, r"convs\.(\d+)\..*")
    resolution = 2 << blocks + 1
    channels = {resolution: state["convs.0.0.weight"].shape[0]}
    channels |= {resolution >> i: state[f"convs.{i}.conv2.1.weight"].shape[0] for i in range(1, blocks + 1)}
    return {
        "resolution": resolution,
        "image_channels": state["convs.0.0.weight"].shape[1],
        "channels": channels,
        "architecture": "skip" if "from_rgbs.0.0.weight" in state else "resnet",
    }


LAYOUTS: tuple[Layout, ...] = (
    Layout(
        project="rosinality/stylegan2-pytorch",
        role="generator",
        model=StyleGAN2Generator,
        signature=("conv1.conv.modulation.weight",),
        containers=("g_ema", "generator", "g", "G_ema", "G"),
        averaged=("g_ema", "G_ema"),
        at_the_top=("latent_avg",),
        config=generator_config,
        optional=r"noises\..*",
    ),
    Layout(
        project="rosinality/stylegan2-pytorch",
        role="discriminator",
        model=StyleGAN2Discriminator,
        signature=("final_linear.0.weight",),
        containers=("d", "discriminator", "D"),
        config=discriminator_config,
    ),
)
