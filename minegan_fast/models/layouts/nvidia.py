"""StyleGAN2's files as NVIDIA's programs write them: StyleGAN2-ADA for PyTorch, and StyleGAN2(-ADA) for TensorFlow.

Both are pickles of network objects; what is read of them is the tensors under their dotted (PyTorch) or slashed
(TensorFlow) names. The differences from this project's layout, all in the tables below:

- TensorFlow keeps convolutions as [k, k, in, out], matrices as [in, out], and the modulation's bias without its 1;
- its upsampling convolution correlates with the stored kernel, a transposed convolution convolves with it: flipped;
- the resampling filter is stored with sum 1; upsampling multiplies it by 4.

The PyTorch program adds demodulation's 1e-8 to the norm of the unscaled kernel: its images differ by about 1e-8 of
themselves from TensorFlow's, rosinality's and this project's.
"""

import re
from collections.abc import Callable

import torch
from torch import Tensor

from ..stylegan2 import StyleGAN2Discriminator, StyleGAN2Generator
from ._layout import Layout, State

# (name in the file, name here, what happens to the tensor)
Table = list[tuple[str, str, Callable[[Tensor], Tensor]]]


def _same(t: Tensor) -> Tensor:
    return t


def _times4(t: Tensor) -> Tensor:
    return 4 * t


def _plus1(t: Tensor) -> Tensor:
    return t + 1


def _transposed(t: Tensor) -> Tensor:
    return t.T


def _one(t: Tensor) -> Tensor:
    return t.reshape(1)


def _column(t: Tensor) -> Tensor:
    return t.reshape(1, -1, 1, 1)


def _oihw(t: Tensor) -> Tensor:
    return t.permute(3, 2, 0, 1)


def _batch(change: Callable = _same) -> Callable:
    return lambda t: change(t)[None]


def _flipped(t: Tensor) -> Tensor:
    return _oihw(t).flip(2, 3)


def _kernel(gain: float) -> Callable:
    """The 2-D filter of sum `gain` of the taps that a TensorFlow network was built with."""

    def make(t: Tensor) -> Tensor:
        square = torch.outer(t, t) if t.ndim == 1 else t
        return square / square.sum() * gain

    return make


def _apply(state: State, table: Table, unused: str) -> State:
    """The tensors under the names of this project; what no entry names stays, unless `unused` matches it."""
    named = {theirs for theirs, _, _ in table}
    rest = {k: v for k, v in state.items() if k not in named and not re.fullmatch(unused, k)}
    return {ours: change(state[theirs]) for theirs, ours, change in table if theirs in state} | rest


def _highest(state: State, pattern: str) -> int:
    found = [int(m[1]) for key in state if (m := re.match(pattern, key))]
    if not found:
        raise KeyError(pattern)
    return max(found)


def _resolutions(highest: int) -> list[int]:
    if highest < 8 or highest & (highest - 1):
        raise ValueError(f"its resolution must be a power of two >= 8, got {highest}")
    return [2**i for i in range(3, highest.bit_length())]


def _refuse(state: State, key: str, what: str) -> None:
    if found := next((k for k in state if re.fullmatch(key, k)), None):
        raise ValueError(f"{what} (it has {found}) cannot be expressed here")


def _count(state: State, pattern: str) -> int:
    return sum(re.fullmatch(pattern, key) is not None for key in state)


# StyleGAN2-ADA for PyTorch


def _torch_generator_config(state: State) -> dict:
    _refuse(state, r"mapping\.embed\.weight", "a class-conditional StyleGAN2")
    highest = _highest(state, r"synthesis\.b(\d+)\.")
    sizes = _resolutions(highest)
    if f"synthesis.b{sizes[0]}.torgb.weight" not in state and sizes[0] != highest:
        raise ValueError("a generator without an image at every resolution (no skip architecture) is not read here")
    first = state["mapping.fc0.weight"]
    return {
        "resolution": highest,
        "latent_dim": first.shape[1],
        "style_dim": first.shape[0],
        "mapping_layers": _count(state, r"mapping\.fc\d+\.weight"),
        "image_channels": state["synthesis.b4.torgb.weight"].shape[0],
        "channels": {4: state["synthesis.b4.conv1.weight"].shape[0]}
        | {r: state[f"synthesis.b{r}.conv1.weight"].shape[0] for r in sizes},
    }


def _torch_generator(state: State) -> State:
    table = [("synthesis.b4.const", "input.input", _batch())]
    for i in range(_count(state, r"mapping\.fc\d+\.weight")):
        table += [(f"mapping.fc{i}.{part}", f"style.{i + 1}.{part}", _same) for part in ("weight", "bias")]

    def modulated(theirs: str, ours: str) -> Table:
        return [
            (f"{theirs}.weight", f"{ours}.conv.weight", _batch()),
            (f"{theirs}.affine.weight", f"{ours}.conv.modulation.weight", _same),
            (f"{theirs}.affine.bias", f"{ours}.conv.modulation.bias", _same),
        ]

    def styled(theirs: str, ours: str, number: int) -> Table:
        return [
            *modulated(theirs, ours),
            (f"{theirs}.noise_strength", f"{ours}.noise.weight", _one),
            (f"{theirs}.bias", f"{ours}.activate.bias", _same),
            (f"{theirs}.noise_const", f"noises.noise_{number}", lambda t: t[None, None]),
        ]

    def to_rgb(theirs: str, ours: str) -> Table:
        return [*modulated(theirs, ours), (f"{theirs}.bias", f"{ours}.bias", _column)]

    table += styled("synthesis.b4.conv1", "conv1", 0) + to_rgb("synthesis.b4.torgb", "to_rgb1")
    for j, r in enumerate(_resolutions(_highest(state, r"synthesis\.b(\d+)\."))):
        block = f"synthesis.b{r}"
        table += styled(f"{block}.conv0", f"convs.{2 * j}", 2 * j + 1)
        table += styled(f"{block}.conv1", f"convs.{2 * j + 1}", 2 * j + 2)
        table += to_rgb(f"{block}.torgb", f"to_rgbs.{j}")
        table.append((f"{block}.conv0.resample_filter", f"convs.{2 * j}.conv.blur.kernel", _times4))
        table.append((f"{block}.resample_filter", f"to_rgbs.{j}.upsample.kernel", _times4))
    return _apply(state, table, r"mapping\.w_avg|.*\.resample_filter")


def _torch_discriminator_config(state: State) -> dict:
    _refuse(state, r"mapping\..*", "a class-conditional StyleGAN2")
    highest = _highest(state, r"b(\d+)\.")
    sizes = _resolutions(highest)
    _refuse(state, rf"b(?!{highest}\.)\d+\.fromrgb\.weight", "a discriminator that sees the image at every resolution")
    if f"b{highest}.skip.weight" not in state:
        raise ValueError(
            f"a discriminator without residual blocks (no b{highest}.skip.weight) cannot be expressed here"
        )
    return {
        "resolution": highest,
        "image_channels": state[f"b{highest}.fromrgb.weight"].shape[1],
        "channels": {highest: state[f"b{highest}.fromrgb.weight"].shape[0]}
        | {r // 2: state[f"b{r}.conv1.weight"].shape[0] for r in sizes},
    }


def _torch_discriminator(state: State) -> State:
    highest = _highest(state, r"b(\d+)\.")
    table = [
        (f"b{highest}.fromrgb.weight", "convs.0.0.weight", _same),
        (f"b{highest}.fromrgb.bias", "convs.0.1.bias", _same),
        ("b4.conv.weight", "final_conv.0.weight", _same),
        ("b4.conv.bias", "final_conv.1.bias", _same),
    ]
    for part in ("weight", "bias"):
        table += [
            (f"b4.fc.{part}", f"final_linear.0.{part}", _same),
            (f"b4.out.{part}", f"final_linear.1.{part}", _same),
        ]
    for i, r in enumerate(_resolutions(highest)[::-1], 1):
        table += [
            (f"b{r}.conv0.weight", f"convs.{i}.conv1.0.weight", _same),
            (f"b{r}.conv0.bias", f"convs.{i}.conv1.1.bias", _same),
            (f"b{r}.conv1.resample_filter", f"convs.{i}.conv2.0.kernel", _same),
            (f"b{r}.conv1.weight", f"convs.{i}.conv2.1.weight", _same),
            (f"b{r}.conv1.bias", f"convs.{i}.conv2.2.bias", _same),
            (f"b{r}.skip.resample_filter", f"convs.{i}.skip.0.kernel", _same),
            (f"b{r}.skip.weight", f"convs.{i}.skip.1.weight", _same),
        ]
    return _apply(state, table, r".*\.resample_filter")


# StyleGAN2 and StyleGAN2-ADA for TensorFlow

DEFAULT_TAPS = torch.tensor((1.0, 3.0, 3.0, 1.0))


def _tf_generator_config(state: State) -> dict:
    _refuse(state, r"mapping/LabelConcat/weight|mapping/LabelEmbed/.*", "a class-conditional StyleGAN2")
    highest = _highest(state, r"synthesis/(\d+)x\d+/")
    sizes = _resolutions(highest)
    if f"synthesis/{sizes[0]}x{sizes[0]}/ToRGB/weight" not in state and sizes[0] != highest:
        raise ValueError("a generator without an image at every resolution (no skip architecture) is not read here")
    first = state["mapping/Dense0/weight"]
    return {
        "resolution": highest,
        "latent_dim": first.shape[0],
        "style_dim": first.shape[1],
        "mapping_layers": _count(state, r"mapping/Dense\d+/weight"),
        "image_channels": state["synthesis/4x4/ToRGB/weight"].shape[3],
        "channels": {4: state["synthesis/4x4/Conv/weight"].shape[3]}
        | {r: state[f"synthesis/{r}x{r}/Conv1/weight"].shape[3] for r in sizes},
    }


def _tf_generator(state: State) -> State:
    table = [("synthesis/4x4/Const/const", "input.input", _same)]
    for i in range(_count(state, r"mapping/Dense\d+/weight")):
        table.append((f"mapping/Dense{i}/weight", f"style.{i + 1}.weight", _transposed))
        table.append((f"mapping/Dense{i}/bias", f"style.{i + 1}.bias", _same))

    def modulated(theirs: str, ours: str, kernel: Callable = _oihw) -> Table:
        return [
            (f"{theirs}/weight", f"{ours}.conv.weight", _batch(kernel)),
            (f"{theirs}/mod_weight", f"{ours}.conv.modulation.weight", _transposed),
            (f"{theirs}/mod_bias", f"{ours}.conv.modulation.bias", _plus1),
        ]

    def styled(theirs: str, ours: str, number: int, kernel: Callable = _oihw) -> Table:
        return [
            *modulated(theirs, ours, kernel),
            (f"{theirs}/noise_strength", f"{ours}.noise.weight", _one),
            (f"{theirs}/bias", f"{ours}.activate.bias", _same),
            (f"synthesis/noise{number}", f"noises.noise_{number}", _same),
        ]

    def to_rgb(theirs: str, ours: str) -> Table:
        return [*modulated(theirs, ours), (f"{theirs}/bias", f"{ours}.bias", _column)]

    table += styled("synthesis/4x4/Conv", "conv1", 0) + to_rgb("synthesis/4x4/ToRGB", "to_rgb1")
    for j, r in enumerate(_resolutions(_highest(state, r"synthesis/(\d+)x\d+/"))):
        block = f"synthesis/{r}x{r}"
        table += styled(f"{block}/Conv0_up", f"convs.{2 * j}", 2 * j + 1, _flipped)
        table += styled(f"{block}/Conv1", f"convs.{2 * j + 1}", 2 * j + 2)
        table += to_rgb(f"{block}/ToRGB", f"to_rgbs.{j}")
        kernels = (f"convs.{2 * j}.conv.blur.kernel", f"to_rgbs.{j}.upsample.kernel")
        table += [("synthesis/resample_kernel", kernel, _kernel(4.0)) for kernel in kernels]
    state = {"synthesis/resample_kernel": state.get("resample_kernel", DEFAULT_TAPS)} | state
    return _apply(state, table, r"dlatent_avg|(.*/)?lod|(.*/)?resample_kernel")


def _tf_discriminator_config(state: State) -> dict:
    highest = _highest(state, r"(\d+)x\d+/")
    sizes = _resolutions(highest)
    if state["Output/weight"].shape[1] != 1:
        raise ValueError(f"a class-conditional StyleGAN2 (Output/weight is {list(state['Output/weight'].shape)})")
    _refuse(state, rf"(?!{highest}x)\d+x\d+/FromRGB/weight", "a discriminator that sees the image at every resolution")
    if f"{highest}x{highest}/Skip/weight" not in state:
        raise ValueError(
            f"a discriminator without residual blocks (no {highest}x{highest}/Skip) cannot be expressed here"
        )
    return {
        "resolution": highest,
        "image_channels": state[f"{highest}x{highest}/FromRGB/weight"].shape[2],
        "channels": {highest: state[f"{highest}x{highest}/FromRGB/weight"].shape[3]}
        | {r // 2: state[f"{r}x{r}/Conv1_down/weight"].shape[3] for r in sizes},
    }


def _tf_discriminator(state: State) -> State:
    highest = _highest(state, r"(\d+)x\d+/")
    table = [
        (f"{highest}x{highest}/FromRGB/weight", "convs.0.0.weight", _oihw),
        (f"{highest}x{highest}/FromRGB/bias", "convs.0.1.bias", _same),
        ("4x4/Conv/weight", "final_conv.0.weight", _oihw),
        ("4x4/Conv/bias", "final_conv.1.bias", _same),
        ("4x4/Dense0/weight", "final_linear.0.weight", _transposed),
        ("4x4/Dense0/bias", "final_linear.0.bias", _same),
        ("Output/weight", "final_linear.1.weight", _transposed),
        ("Output/bias", "final_linear.1.bias", _same),
    ]
    for i, r in enumerate(_resolutions(highest)[::-1], 1):
        table += [
            (f"{r}x{r}/Conv0/weight", f"convs.{i}.conv1.0.weight", _oihw),
            (f"{r}x{r}/Conv0/bias", f"convs.{i}.conv1.1.bias", _same),
            (f"{r}x{r}/Conv1_down/weight", f"convs.{i}.conv2.1.weight", _oihw),
            (f"{r}x{r}/Conv1_down/bias", f"convs.{i}.conv2.2.bias", _same),
            (f"{r}x{r}/Skip/weight", f"convs.{i}.skip.1.weight", _oihw),
            ("resample_kernel", f"convs.{i}.conv2.0.kernel", _kernel(1.0)),
            ("resample_kernel", f"convs.{i}.skip.0.kernel", _kernel(1.0)),
        ]
    return _apply({"resample_kernel": DEFAULT_TAPS} | state, table, "lod")


LAYOUTS: tuple[Layout, ...] = (
    Layout(
        project="NVlabs/stylegan2-ada-pytorch",
        role="generator",
        model=StyleGAN2Generator,
        signature=("synthesis.b4.conv1.affine.weight",),
        containers=("G_ema", "G"),
        averaged=("G_ema",),
        config=_torch_generator_config,
        convert=_torch_generator,
        optional=r"noises\..*",
    ),
    Layout(
        project="NVlabs/stylegan2-ada-pytorch",
        role="discriminator",
        model=StyleGAN2Discriminator,
        signature=("b4.fc.weight",),
        containers=("D",),
        config=_torch_discriminator_config,
        convert=_torch_discriminator,
    ),
    Layout(
        project="NVlabs/stylegan2",
        role="generator",
        model=StyleGAN2Generator,
        signature=("synthesis/4x4/Conv/mod_weight",),
        containers=("Gs", "G"),
        averaged=("Gs",),
        config=_tf_generator_config,
        convert=_tf_generator,
        optional=r"noises\..*",
    ),
    Layout(
        project="NVlabs/stylegan2",
        role="discriminator",
        model=StyleGAN2Discriminator,
        signature=("4x4/Dense0/weight", "Output/weight"),
        containers=("D",),
        config=_tf_discriminator_config,
        convert=_tf_discriminator,
    ),
)
