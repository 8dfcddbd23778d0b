"""DCGAN's files as PyTorch's tutorial writes them: a state dict of `main.0.weight` and so on.

Programs after it put other layers between (dropout, which a network in eval mode passes by), so positions differ: the
convolutions and batch norms are taken in their order. A conditional one has an embedding beside `main`, which such
programs append to z.
"""

import re

from torch import Tensor

from ..dcgan import DCGANDiscriminator, DCGANGenerator
from ._layout import Layout, State

_EMBEDDING = r"(label_?)?emb(ed(ding)?)?s?\.weight"


def _positions(state: State) -> list[int]:
    found = (re.fullmatch(r"main\.(\d{1,4})\.weight", name) for name in state)
    return sorted(int(match[1]) for match in found if match)


def _convolutions(state: State) -> list[Tensor]:
    weights = [state[f"main.{i}.weight"] for i in _positions(state)]
    convolutions = [weight for weight in weights if weight.ndim == 4]
    if any(weight.shape[2:] != (4, 4) for weight in convolutions):
        shown = ", ".join("x".join(map(str, weight.shape[2:])) for weight in convolutions)
        raise ValueError(f"its convolutions have {shown} taps, and not 4x4 throughout")
    if len(convolutions) < 3:
        raise ValueError(f"it has {len(convolutions)} convolutions, of which a DCGAN has 3 at least")
    return convolutions


def _embedding(state: State) -> str | None:
    return next((name for name in state if re.fullmatch(_EMBEDDING, name) and state[name].ndim == 2), None)


def _biased(state: State) -> bool:
    return "main.0.bias" in state


def generator_config(state: State) -> dict:
    weights, name = _convolutions(state), _embedding(state)
    classes, class_dim = (0, 0) if name is None else state[name].shape
    return {
        "latent_dim": weights[0].shape[0] - class_dim,
        "channels": [weight.shape[1] for weight in weights[:-1]],
        "image_channels": weights[-1].shape[1],
        "num_classes": classes,
        "class_dim": class_dim,
        "bias": _biased(state),
    }


def discriminator_config(state: State) -> dict:
    weights = _convolutions(state)
    if weights[-1].shape[0] != 1:
        raise ValueError(f"it gives {weights[-1].shape[0]} numbers for an image, and not one")
    channels = [weight.shape[0] for weight in weights[:-1]]
    return {"channels": channels, "image_channels": weights[0].shape[1], "bias": _biased(state)}


def _convert(state: State, first_norm: int) -> State:
    """With every layer where the tutorial has it. first_norm: the convolution that the first batch norm is behind."""
    out, convolutions = {}, -1
    for position in _positions(state):
        is_convolution = state[f"main.{position}.weight"].ndim == 4
        convolutions += is_convolution
        place = 3 * convolutions - (first_norm if convolutions else 0) + (not is_convolution)
        prefix = f"main.{position}."
        out |= {f"main.{place}.{k.removeprefix(prefix)}": t for k, t in state.items() if k.startswith(prefix)}
    rest = {k: t for k, t in state.items() if not re.match(r"main\.\d+\.", k)}
    if (name := _embedding(state)) is not None and first_norm == 0:
        out["embed.weight"] = rest.pop(name)
    return out | rest


LAYOUTS: tuple[Layout, ...] = (
    Layout(
        project="PyTorch's DCGAN tutorial",
        role="generator",
        model=DCGANGenerator,
        signature=("main.0.weight", "main.1.running_mean"),
        containers=("netG_state_dict", "netG", "generator", "G"),
        config=generator_config,
        convert=lambda state: _convert(state, 0),
        optional=r".*\.num_batches_tracked",
    ),
    Layout(
        project="PyTorch's DCGAN tutorial",
        role="discriminator",
        model=DCGANDiscriminator,
        signature=("main.0.weight", "main.2.weight", "main.3.running_mean"),
        containers=("netD_state_dict", "netD", "discriminator", "D"),
        config=discriminator_config,
        convert=lambda state: _convert(state, 1),
        optional=r".*\.num_batches_tracked",
    ),
)
