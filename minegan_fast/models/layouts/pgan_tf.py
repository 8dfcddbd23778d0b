"""Progressive GAN's files as the authors' program writes them: tkarras/progressive_growing_of_gans, for TensorFlow.

A pickle of three network objects, of which the variables are read. The differences from this project's layout:

- convolutions are [k, k, in, out], matrices [in, out]; the upsampling convolution is [k, k, out, in] and transposed,
  which is nearest-neighbour upsampling and a correlation with the kernel turned round;
- biases are added behind the scaled convolution, here in front of the scale: divided by He's constant;
- the scale is gain / √fan-in with a gain of its own in some layers, here always √2;
- the first layer has a bias per channel, here one per element;
- images are numbered by `lod`, the number of halvings from the highest resolution. The variable `lod` says how much of
  the network is in use: 0 for all of it, 1 without the highest resolution, between them while that fades in.
"""

import math
from dataclasses import dataclass

import torch

from ..pgan import PGANDiscriminator, PGANGenerator
from ._layout import Layout, State, highest
from .pgan import cropped, discriminator_config, generator_config

PROJECT = "tkarras/progressive_growing_of_gans"
SQRT2 = math.sqrt(2.0)


@dataclass(frozen=True)
class _Entry:
    """A layer: its name in the file and here, its gain, whether it upsamples, and how many elements share a bias."""

    theirs: str
    ours: str
    gain: float = SQRT2
    up: bool = False
    repeat: int = 1


def _converted(state: State, entry: _Entry) -> State:
    weight = state[f"{entry.theirs}/weight"]
    if weight.ndim == 2:
        weight = weight.T
    else:
        weight = weight.permute(2, 3, 0, 1).flip(2, 3) if entry.up else weight.permute(3, 2, 0, 1)
    bias = state[f"{entry.theirs}/bias"].repeat_interleave(entry.repeat) / math.sqrt(2 / weight[0].numel())
    return {f"{entry.ours}.module.weight": weight * (entry.gain / SQRT2), f"{entry.ours}.module.bias": bias}


def _layers(
    state: State, resolution: int | None, images: str, table: list[_Entry], block: tuple[tuple[str, bool], ...]
) -> State:
    """The layers up to a resolution, or those that `lod` says are in use, and how far the highest of them faded in.

    images: "ToRGB" or "FromRGB". block: of both layers of a resolution, the name in the file and whether it upsamples.
    What the file has beyond them stays, and is reported as unexpected.
    """
    stages = highest(state, rf"{images}_lod(\d+)/.*") + 1
    gain = 1.0 if images == "ToRGB" else SQRT2
    ours = {"ToRGB": "toRGBLayers", "FromRGB": "fromRGBLayers"}[images]
    for s in range(stages):
        table.append(_Entry(f"{images}_lod{stages - 1 - s}", f"{ours}.{s}", gain))
        for k, (theirs, up) in enumerate(block if s else ()):
            table.append(_Entry(f"{4 << s}x{4 << s}/{theirs}", f"scaleLayers.{s - 1}.{k}", up=up))
    read = {f"{entry.theirs}/{part}" for entry in table for part in ("weight", "bias")} | {"lod"}
    rest = {name: tensor for name, tensor in state.items() if name not in read}
    converted = {name: tensor for entry in table for name, tensor in _converted(state, entry).items()}
    lod = float(state.get("lod", 0.0))
    used = (2 << stages) >> int(lod)
    kept = rest | cropped(converted, used if resolution is None else resolution)
    return kept | {"lod": torch.tensor(lod % 1)} if resolution in (None, used) else kept


def generator_layers(state: State, resolution: int | None) -> State:
    table = [_Entry("4x4/Dense", "formatLayer", SQRT2 / 4, repeat=16), _Entry("4x4/Conv", "groupScale0.0")]
    return _layers(state, resolution, "ToRGB", table, (("Conv0_up", True), ("Conv1", False)))


def discriminator_layers(state: State, resolution: int | None) -> State:
    table = [
        _Entry("4x4/Conv", "groupScaleZero.0"),
        _Entry("4x4/Dense0", "groupScaleZero.1"),
        _Entry("4x4/Dense1", "decisionLayer", 1.0),
    ]
    return _layers(state, resolution, "FromRGB", table, (("Conv0", False), ("Conv1_down", False)))


def _alpha(state: State) -> dict:
    return {"alpha": 1 - float(state.get("lod", 0.0))}


def _without_lod(state: State) -> State:
    return {name: tensor for name, tensor in state.items() if name != "lod"}


LAYOUTS: tuple[Layout, ...] = (
    Layout(
        project=PROJECT,
        role="generator",
        model=PGANGenerator,
        signature=("4x4/Dense/weight", "ToRGB_lod0/weight"),
        containers=("Gs", "G"),
        averaged=("Gs",),
        crop=generator_layers,
        config=lambda state: generator_config(state) | _alpha(state),
        convert=_without_lod,
    ),
    Layout(
        project=PROJECT,
        role="discriminator",
        model=PGANDiscriminator,
        signature=("4x4/Dense1/weight", "FromRGB_lod0/weight"),
        containers=("D",),
        crop=discriminator_layers,
        config=lambda state: discriminator_config(state) | {"fused": True} | _alpha(state),
        convert=_without_lod,
    ),
)
