"""StyleGAN2's files as NVIDIA's programs for TensorFlow write them, StyleGAN2 and StyleGAN2-ADA.

They are pickles of three network objects; what is read of them is the variables under their slashed names, which become
those of NVIDIA's program for PyTorch. Convolutions are kept as [k, k, in, out], matrices as [in, out], the modulation's
bias without its 1. The upsampling convolution correlates with its kernel where a transposed convolution convolves:
flipped. The filter is one for all layers, kept as its taps where it is not the default.
"""

import re
from collections.abc import Callable

import torch
from torch import Tensor

from ..stylegan2 import StyleGAN2Discriminator, StyleGAN2Generator
from ._layout import Layout, State, highest
from .nvidia_torch import discriminator, discriminator_config, generator, generator_config, same

PROJECT = "NVlabs/stylegan2"
DEFAULT_TAPS = torch.tensor((1.0, 3.0, 3.0, 1.0))

# (pattern of the name in the file, the name in a file of PyTorch, what happens to the tensor); the first that fits
Rules = list[tuple[str, str | Callable[[re.Match], str], Callable[[Tensor], Tensor]]]


def _transposed(t: Tensor) -> Tensor:
    return t.movedim(0, 1)


def _oihw(t: Tensor) -> Tensor:
    return t.movedim((3, 2), (0, 1))


def _layers(theirs: str, ours: str, layers: dict[str, str]) -> Rules:
    """Of the layers of a resolution; `theirs` and `ours` begin the name."""
    parts = {
        "weight": ("weight", _oihw),
        "bias": ("bias", same),
        "mod_weight": ("affine.weight", _transposed),
        "mod_bias": ("affine.bias", lambda t: t + 1),
        "noise_strength": ("noise_strength", same),
    }
    return [
        (rf"{theirs}(\d+)x\1/{layer}/{part}", rf"{ours}b\1.{name}.{called}", change)
        for layer, name in layers.items()
        for part, (called, change) in parts.items()
    ]


def _noise(match: re.Match) -> str:
    k = int(match[1])
    return f"synthesis.b{4 << (k + 1) // 2}.conv{1 - k % 2}.noise_const"


GENERATOR: Rules = [
    (r"dlatent_avg", "mapping.w_avg", same),
    (r"mapping/LabelEmbed/weight", "mapping.embed.weight", _transposed),
    (r"mapping/LabelEmbed/bias", "mapping.embed.bias", same),
    (r"mapping/Dense(\d+)/weight", r"mapping.fc\1.weight", _transposed),
    (r"mapping/Dense(\d+)/bias", r"mapping.fc\1.bias", same),
    (r"synthesis/4x4/Const/const", "synthesis.b4.const", lambda t: t[0]),
    (r"synthesis/noise(\d\d?)", _noise, lambda t: t[0, 0]),
    (r"synthesis/(\d+)x\1/Conv0_up/weight", r"synthesis.b\1.conv0.weight", lambda t: _oihw(t).flip(2, 3)),
    *_layers(
        "synthesis/",
        "synthesis.",
        {"Conv": "conv1", "Conv0_up": "conv0", "Conv1": "conv1", "ToRGB": "torgb", "Skip": "skip"},
    ),
]
DISCRIMINATOR: Rules = [
    (r"LabelEmbed/weight", "mapping.embed.weight", _transposed),
    (r"LabelEmbed/bias", "mapping.embed.bias", same),
    (r"4x4/Dense0/weight", "b4.fc.weight", _transposed),
    (r"4x4/Dense0/bias", "b4.fc.bias", same),
    (r"Output/weight", "b4.out.weight", _transposed),
    (r"Output/bias", "b4.out.bias", same),
    *_layers("", "", {"Conv": "conv", "Conv0": "conv0", "Conv1_down": "conv1", "FromRGB": "fromrgb", "Skip": "skip"}),
]


def _grown(state: State, prefix: str, layer: str) -> State:
    """Of configurations B to D, which grew: the layer that makes or reads the images of the highest resolution, under
    the name that it has in the others. Those of lower resolutions are out of use."""
    start = f"{prefix}{layer}_lod"
    if not any(name.startswith(start) for name in state):
        return state
    if float(state.get(f"{prefix}lod", 0.0)) != 0:
        raise ValueError(f"it is still growing (lod is {float(state[f'{prefix}lod']):g})")
    largest = highest(state, rf"{prefix}(\d+)x\1/.*")
    renamed = {k.replace(f"{start}0/", f"{prefix}{largest}x{largest}/{layer}/"): t for k, t in state.items()}
    return {name: tensor for name, tensor in renamed.items() if not name.startswith(start)}


def _translated(state: State, rules: Rules, block: str) -> State:
    """Names and axes of a file of PyTorch; what no rule names stays. block: how its blocks' names begin."""
    out: State = {}
    for name, tensor in state.items():
        if not re.fullmatch(r"(.*/)?(lod|resample_kernel)", name):
            rule = next((rule for rule in rules if re.fullmatch(rule[0], name)), None)
            # A bias without its 1 may be kept in float64, which loses no digits of it; the network has one dtype.
            like = state.get(re.sub(r"/mod_bias$", "/mod_weight", name), tensor)
            out |= {re.sub(rule[0], rule[1], name): rule[2](tensor).to(like.dtype)} if rule else {name: tensor}
    taps = state.get("synthesis/resample_kernel", state.get("resample_kernel", DEFAULT_TAPS))
    square = torch.outer(taps, taps) if taps.ndim == 1 else taps
    largest = highest(out, re.escape(block) + r"(\d+)\..*")
    for r in (2**i for i in range(3, largest.bit_length())):
        for layer in ("", "conv0.", "conv1.", "skip."):
            out[f"{block}{r}.{layer}resample_filter"] = square / square.sum()
    return out


def _generator(state: State, _: int | None) -> State:
    if "mapping/LabelConcat/weight" in state:
        raise ValueError("it is a class-conditional StyleGAN2 from before ADA (it has mapping/LabelConcat/weight)")
    return _translated(_grown(state, "synthesis/", "ToRGB"), GENERATOR, "synthesis.b")


def _discriminator(state: State, _: int | None) -> State:
    if state["Output/weight"].shape[1] != 1 and "LabelEmbed/weight" not in state:
        shape = list(state["Output/weight"].shape)
        raise ValueError(f"it is a class-conditional StyleGAN2 from before ADA (Output/weight is {shape})")
    if "Mapping0/weight" in state:
        raise ValueError("what scales the layers that map its labels (mapping_lrmul) is no tensor of the file")
    return _translated(_grown(state, "", "FromRGB"), DISCRIMINATOR, "b")


LAYOUTS: tuple[Layout, ...] = (
    Layout(
        project=PROJECT,
        role="generator",
        model=StyleGAN2Generator,
        signature=("synthesis/4x4/Conv/mod_weight",),
        containers=("Gs", "G"),
        averaged=("Gs",),
        crop=_generator,
        config=generator_config,
        convert=generator,
        optional=r"noises\..*",
    ),
    Layout(
        project=PROJECT,
        role="discriminator",
        model=StyleGAN2Discriminator,
        signature=("4x4/Dense0/weight", "Output/weight"),
        containers=("D",),
        crop=_discriminator,
        config=discriminator_config,
        convert=discriminator,
    ),
)
