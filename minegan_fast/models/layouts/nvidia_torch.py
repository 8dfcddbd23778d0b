"""StyleGAN2's files as NVIDIA's StyleGAN2-ADA for PyTorch writes them.

They are pickles of network objects; what is read of them is the tensors under their dotted names. The resampling
filter is stored with sum 1; upsampling multiplies it by 4. That program adds demodulation's 1e-8 to the norm of the
unscaled kernel: its images differ by about 1e-8 of themselves from TensorFlow's, rosinality's and this project's.
Not in the tensors, and so not read: the limit of +-256 that half-precision training puts on activations, and the group
size of the minibatch standard deviation, which is 4 here.
"""

import re
from collections.abc import Callable

from torch import Tensor

from ..stylegan2 import StyleGAN2Discriminator, StyleGAN2Generator
from ._layout import Layout, State, highest, square

# (name in the file, name here, what happens to the tensor)
Table = list[tuple[str, str, Callable[[Tensor], Tensor]]]


def same(t: Tensor) -> Tensor:
    return t


def _times4(t: Tensor) -> Tensor:
    return 4 * t


def _batch(t: Tensor) -> Tensor:
    return t[None]


def _one(t: Tensor) -> Tensor:
    return t.reshape(1)


def _column(t: Tensor) -> Tensor:
    return t.reshape(1, -1, 1, 1)


def _apply(state: State, table: Table, unused: str) -> State:
    """The tensors under the names of this project; what no entry names stays, unless `unused` matches it."""
    named = {theirs for theirs, _, _ in table}
    rest = {k: v for k, v in state.items() if k not in named and not re.fullmatch(unused, k)}
    return {ours: change(state[theirs]) for theirs, ours, change in table if theirs in state} | rest


def _resolutions(largest: int) -> list[int]:
    if largest < 8 or largest & (largest - 1):
        raise ValueError(f"its resolution must be a power of two >= 8, got {largest}")
    return [2**i for i in range(3, largest.bit_length())]


def _embedding(state: State) -> tuple[int, int]:
    """(size of the class embeddings, how many classes) of a conditional network; 0 and 0 of others."""
    if "mapping.embed.weight" not in state:
        return 0, 0
    if (weight := state["mapping.embed.weight"]).ndim != 2:
        raise ValueError(f"its class embeddings are {list(weight.shape)}, and no matrix")
    return weight.shape[0], weight.shape[1]


def _residual(state: State) -> bool:
    return any(re.fullmatch(r"(synthesis\.)?b\d+\.skip\.weight", name) for name in state)


def _architecture(state: State, images: str) -> str:
    """images: how the layers are called that make or read images, of which a skip network has several."""
    if _residual(state):
        return "resnet"
    several = {name for name in state if re.fullmatch(rf"(synthesis\.)?b\d+\.{images}\.weight", name)}
    return "skip" if len(several) > 1 else "orig"


def _mapping(state: State, ours: str) -> Table:
    """Of the mapping network, whose layers here follow a normalisation."""
    names = {"embed": "embed"} | {f"fc{i}": f"{ours}.{i + 1}" for i in range(_depth(state))}
    return [(f"mapping.{a}.{part}", f"{b}.{part}", same) for a, b in names.items() for part in ("weight", "bias")]


def _depth(state: State) -> int:
    return highest(state, r"mapping\.fc(\d+)\..*") + 1


def generator_config(state: State) -> dict:
    largest = highest(state, r"synthesis\.b(\d+)\..*")
    sizes = _resolutions(largest)
    first = state["mapping.fc0.weight"]
    square(state.get("synthesis.b4.const"))
    class_dim, classes = _embedding(state)
    conditional = {"num_classes": classes, "class_dim": class_dim} if classes else {}
    return (
        {
            "resolution": largest,
            "latent_dim": first.shape[1] - class_dim,
            "style_dim": first.shape[0],
            "mapping_layers": _depth(state),
            "image_channels": state[f"synthesis.b{largest}.torgb.weight"].shape[0],
            "channels": {4: state["synthesis.b4.conv1.weight"].shape[0]}
            | {r: state[f"synthesis.b{r}.conv1.weight"].shape[0] for r in sizes},
            "architecture": _architecture(state, "torgb"),
        }
        | ({"latent_avg": True} if "mapping.w_avg" in state else {})
        | conditional
    )


def generator(state: State) -> State:
    table = [("synthesis.b4.const", "input.input", _batch), ("mapping.w_avg", "latent_avg", same)]
    table += _mapping(state, "style")

    def modulated(theirs: str, ours: str) -> Table:
        return [
            (f"{theirs}.weight", f"{ours}.conv.weight", _batch),
            (f"{theirs}.affine.weight", f"{ours}.conv.modulation.weight", same),
            (f"{theirs}.affine.bias", f"{ours}.conv.modulation.bias", same),
        ]

    def styled(theirs: str, ours: str, number: int) -> Table:
        return [
            *modulated(theirs, ours),
            (f"{theirs}.noise_strength", f"{ours}.noise.weight", _one),
            (f"{theirs}.bias", f"{ours}.activate.bias", same),
            (f"{theirs}.noise_const", f"noises.noise_{number}", lambda t: t[None, None]),
        ]

    def to_rgb(theirs: str, ours: str) -> Table:
        return [*modulated(theirs, ours), (f"{theirs}.bias", f"{ours}.bias", _column)]

    largest = highest(state, r"synthesis\.b(\d+)\..*")
    architecture = _architecture(state, "torgb")
    table += styled("synthesis.b4.conv1", "conv1", 0) + to_rgb("synthesis.b4.torgb", "to_rgb1")
    for j, r in enumerate(_resolutions(largest)):
        block = f"synthesis.b{r}"
        table += styled(f"{block}.conv0", f"convs.{2 * j}", 2 * j + 1)
        table += styled(f"{block}.conv1", f"convs.{2 * j + 1}", 2 * j + 2)
        table.append((f"{block}.conv0.resample_filter", f"convs.{2 * j}.conv.blur.kernel", _times4))
        if architecture == "resnet":
            table.append((f"{block}.skip.weight", f"skips.{j}.0.weight", same))
            table.append((f"{block}.skip.resample_filter", f"skips.{j}.1.kernel", _times4))
        elif architecture == "skip":
            table.append((f"{block}.resample_filter", f"to_rgbs.{j}.upsample.kernel", _times4))
        table += to_rgb(f"{block}.torgb", f"to_rgbs.{j}" if architecture == "skip" else "to_rgb")
    return _apply(state, table, r".*\.resample_filter")


def discriminator_config(state: State) -> dict:
    largest = highest(state, r"b(\d+)\..*")
    sizes = _resolutions(largest)
    class_dim, classes = _embedding(state)
    conditional = {"num_classes": classes, "class_dim": class_dim, "mapping_layers": _depth(state)}
    conditional |= {"projection": state["b4.out.weight"].shape[0]}
    return {
        "resolution": largest,
        "image_channels": state[f"b{largest}.fromrgb.weight"].shape[1],
        "channels": {largest: state[f"b{largest}.fromrgb.weight"].shape[0]}
        | {r // 2: state[f"b{r}.conv1.weight"].shape[0] for r in sizes},
        "architecture": _architecture(state, "fromrgb"),
    } | (conditional if classes else {})


def discriminator(state: State) -> State:
    largest = highest(state, r"b(\d+)\..*")
    table = [
        (f"b{largest}.fromrgb.weight", "convs.0.0.weight", same),
        (f"b{largest}.fromrgb.bias", "convs.0.1.bias", same),
        ("b4.conv.weight", "final_conv.0.weight", same),
        ("b4.conv.bias", "final_conv.1.bias", same),
        *_mapping(state, "class_mapping"),
    ]
    for part in ("weight", "bias"):
        table += [
            (f"b4.fc.{part}", f"final_linear.0.{part}", same),
            (f"b4.out.{part}", f"final_linear.1.{part}", same),
        ]
    for i, r in enumerate(_resolutions(largest)[::-1], 1):
        table += [
            (f"b{r}.conv0.weight", f"convs.{i}.conv1.0.weight", same),
            (f"b{r}.conv0.bias", f"convs.{i}.conv1.1.bias", same),
            (f"b{r}.conv1.resample_filter", f"convs.{i}.conv2.0.kernel", same),
            (f"b{r}.conv1.weight", f"convs.{i}.conv2.1.weight", same),
            (f"b{r}.conv1.bias", f"convs.{i}.conv2.2.bias", same),
            (f"b{r}.skip.weight", f"convs.{i}.skip.1.weight", same),
            (f"b{r // 2}.fromrgb.weight", f"from_rgbs.{i - 1}.0.weight", same),
            (f"b{r // 2}.fromrgb.bias", f"from_rgbs.{i - 1}.1.bias", same),
        ]
        if _residual(state):
            table.append((f"b{r}.skip.resample_filter", f"convs.{i}.skip.0.kernel", same))
    if _architecture(state, "fromrgb") == "skip":
        table.append((f"b{largest}.resample_filter", "downsample.kernel", same))
    return _apply(state, table, r".*\.resample_filter")


LAYOUTS: tuple[Layout, ...] = (
    Layout(
        project="NVlabs/stylegan2-ada-pytorch",
        role="generator",
        model=StyleGAN2Generator,
        signature=("synthesis.b4.conv1.affine.weight",),
        containers=("G_ema", "G"),
        averaged=("G_ema",),
        config=generator_config,
        convert=generator,
        optional=r"noises\..*",
    ),
    Layout(
        project="NVlabs/stylegan2-ada-pytorch",
        role="discriminator",
        model=StyleGAN2Discriminator,
        signature=("b4.fc.weight",),
        containers=("D",),
        config=discriminator_config,
        convert=discriminator,
    ),
)
