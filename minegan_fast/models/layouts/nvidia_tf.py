"""StyleGAN2's files as NVIDIA's programs for TensorFlow write them, StyleGAN2 and StyleGAN2-ADA.

They are pickles of three network objects; what is read of them is the variables under their slashed names. Convolutions
are kept as [k, k, in, out], matrices as [in, out], the modulation's bias without its 1. The upsampling convolution
correlates with its kernel where a transposed convolution convolves: flipped. The filter's taps are a setting.
"""

from collections.abc import Callable

import torch

from ..stylegan2 import StyleGAN2Discriminator, StyleGAN2Generator
from ._layout import Layout, State, highest
from ._tables import (
    Table,
    apply,
    batch,
    column,
    critic_architecture,
    flipped,
    generator_architecture,
    low_pass,
    oihw,
    one,
    plus1,
    refuse,
    resolutions,
    same,
    transposed,
)

DEFAULT_TAPS = torch.tensor((1.0, 3.0, 3.0, 1.0))


def _generator_config(state: State) -> dict:
    refuse(state, r"mapping/LabelConcat/weight|mapping/LabelEmbed/.*", "a class-conditional StyleGAN2")
    largest = highest(state, r"synthesis/(\d+)x\d+/.*")
    sizes = resolutions(largest)
    first = state["mapping/Dense0/weight"]
    return {
        "resolution": largest,
        "latent_dim": first.shape[0],
        "style_dim": first.shape[1],
        "mapping_layers": highest(state, r"mapping/Dense(\d+)/.*") + 1,
        "image_channels": state[f"synthesis/{largest}x{largest}/ToRGB/weight"].shape[3],
        "channels": {4: state["synthesis/4x4/Conv/weight"].shape[3]}
        | {r: state[f"synthesis/{r}x{r}/Conv1/weight"].shape[3] for r in sizes},
        "architecture": generator_architecture(state, "synthesis/4x4/ToRGB/weight", r"synthesis/\d+x\d+/Skip/weight"),
    }


def _generator(state: State) -> State:
    table = [("synthesis/4x4/Const/const", "input.input", same)]
    for i in range(highest(state, r"mapping/Dense(\d+)/.*") + 1):
        table.append((f"mapping/Dense{i}/weight", f"style.{i + 1}.weight", transposed))
        table.append((f"mapping/Dense{i}/bias", f"style.{i + 1}.bias", same))

    def modulated(theirs: str, ours: str, kernel: Callable = oihw) -> Table:
        return [
            (f"{theirs}/weight", f"{ours}.conv.weight", batch(kernel)),
            (f"{theirs}/mod_weight", f"{ours}.conv.modulation.weight", transposed),
            (f"{theirs}/mod_bias", f"{ours}.conv.modulation.bias", plus1),
        ]

    def styled(theirs: str, ours: str, number: int, kernel: Callable = oihw) -> Table:
        return [
            *modulated(theirs, ours, kernel),
            (f"{theirs}/noise_strength", f"{ours}.noise.weight", one),
            (f"{theirs}/bias", f"{ours}.activate.bias", same),
            (f"synthesis/noise{number}", f"noises.noise_{number}", same),
        ]

    def to_rgb(theirs: str, ours: str) -> Table:
        return [*modulated(theirs, ours), (f"{theirs}/bias", f"{ours}.bias", column)]

    largest = highest(state, r"synthesis/(\d+)x\d+/.*")
    resnet = f"synthesis/{largest}x{largest}/Skip/weight" in state
    table += styled("synthesis/4x4/Conv", "conv1", 0) + to_rgb("synthesis/4x4/ToRGB", "to_rgb1")
    for j, r in enumerate(resolutions(largest)):
        block = f"synthesis/{r}x{r}"
        table += styled(f"{block}/Conv0_up", f"convs.{2 * j}", 2 * j + 1, flipped)
        table += styled(f"{block}/Conv1", f"convs.{2 * j + 1}", 2 * j + 2)
        table += to_rgb(f"{block}/ToRGB", "to_rgb" if resnet else f"to_rgbs.{j}")
        table.append((f"{block}/Skip/weight", f"skips.{j}.0.weight", oihw))
        kernels = (
            f"convs.{2 * j}.conv.blur.kernel",
            f"skips.{j}.1.kernel" if resnet else f"to_rgbs.{j}.upsample.kernel",
        )
        table += [("synthesis/resample_kernel", kernel, low_pass(4.0)) for kernel in kernels]
    state = {"synthesis/resample_kernel": state.get("resample_kernel", DEFAULT_TAPS)} | state
    return apply(state, table, r"dlatent_avg|(.*/)?lod|(.*/)?resample_kernel")


def _discriminator_config(state: State) -> dict:
    largest = highest(state, r"(\d+)x\d+/.*")
    sizes = resolutions(largest)
    if state["Output/weight"].shape[1] != 1:
        raise ValueError(f"a class-conditional StyleGAN2 (Output/weight is {list(state['Output/weight'].shape)})")
    return {
        "resolution": largest,
        "image_channels": state[f"{largest}x{largest}/FromRGB/weight"].shape[2],
        "channels": {largest: state[f"{largest}x{largest}/FromRGB/weight"].shape[3]}
        | {r // 2: state[f"{r}x{r}/Conv1_down/weight"].shape[3] for r in sizes},
        "architecture": critic_architecture(state, f"{largest}x{largest}/Skip/weight", "4x4/FromRGB/weight"),
    }


def _discriminator(state: State) -> State:
    largest = highest(state, r"(\d+)x\d+/.*")
    table = [
        (f"{largest}x{largest}/FromRGB/weight", "convs.0.0.weight", oihw),
        (f"{largest}x{largest}/FromRGB/bias", "convs.0.1.bias", same),
        ("4x4/Conv/weight", "final_conv.0.weight", oihw),
        ("4x4/Conv/bias", "final_conv.1.bias", same),
        ("4x4/Dense0/weight", "final_linear.0.weight", transposed),
        ("4x4/Dense0/bias", "final_linear.0.bias", same),
        ("Output/weight", "final_linear.1.weight", transposed),
        ("Output/bias", "final_linear.1.bias", same),
    ]
    for i, r in enumerate(resolutions(largest)[::-1], 1):
        table += [
            (f"{r}x{r}/Conv0/weight", f"convs.{i}.conv1.0.weight", oihw),
            (f"{r}x{r}/Conv0/bias", f"convs.{i}.conv1.1.bias", same),
            (f"{r}x{r}/Conv1_down/weight", f"convs.{i}.conv2.1.weight", oihw),
            (f"{r}x{r}/Conv1_down/bias", f"convs.{i}.conv2.2.bias", same),
            (f"{r}x{r}/Skip/weight", f"convs.{i}.skip.1.weight", oihw),
            (f"{r // 2}x{r // 2}/FromRGB/weight", f"from_rgbs.{i - 1}.0.weight", oihw),
            (f"{r // 2}x{r // 2}/FromRGB/bias", f"from_rgbs.{i - 1}.1.bias", same),
            ("resample_kernel", f"convs.{i}.conv2.0.kernel", low_pass(1.0)),
        ]
        if f"{r}x{r}/Skip/weight" in state:
            table.append(("resample_kernel", f"convs.{i}.skip.0.kernel", low_pass(1.0)))
    if "4x4/FromRGB/weight" in state:
        table.append(("resample_kernel", "downsample.kernel", low_pass(1.0)))
    return apply({"resample_kernel": DEFAULT_TAPS} | state, table, "lod")


LAYOUTS: tuple[Layout, ...] = (
    Layout(
        project="NVlabs/stylegan2",
        role="generator",
        model=StyleGAN2Generator,
        signature=("synthesis/4x4/Conv/mod_weight",),
        containers=("Gs", "G"),
        averaged=("Gs",),
        config=_generator_config,
        convert=_generator,
        optional=r"noises\..*",
    ),
    Layout(
        project="NVlabs/stylegan2",
        role="discriminator",
        model=StyleGAN2Discriminator,
        signature=("4x4/Dense0/weight", "Output/weight"),
        containers=("D",),
        config=_discriminator_config,
        convert=_discriminator,
    ),
)
