"""StyleGAN2 as NVIDIA's programs for TensorFlow write it: the inverse of `nvidia_tf`.

What is written are the variables and arguments of the three networks. It holds none of the source text that those
programs put into their files. So theirs for PyTorch, which read the variables alone, take such a file, and theirs for
TensorFlow do not.

The modulation's bias is kept in float64: there it is stored without its 1, of which float32 would lose digits.
"""

import torch
from torch import Tensor

from ...files.pickle_writing import Named
from ..stylegan2 import StyleGAN2Discriminator, StyleGAN2Generator
from ._layout import State
from .nvidia_tf import DEFAULT_TAPS


def _transposed(t: Tensor) -> Tensor:
    return t.movedim(0, 1)


def _hwio(t: Tensor) -> Tensor:
    return t.reshape(t.shape[-4:]).movedim((0, 1), (3, 2))


def network(model: StyleGAN2Generator | StyleGAN2Discriminator, average: Tensor | None = None) -> Named:
    """The pickled network. average: of w, [style_dim], for a generator.

    ValueError: channels or filters that NVIDIA's programs cannot build.
    """
    state = {name: t.detach().cpu() for name, t in model.state_dict().items()}
    _check_filters(state, gain=4 if isinstance(model, StyleGAN2Generator) else 1)  # every generator's one enlarges
    arguments = _arguments(model)
    if isinstance(model, StyleGAN2Discriminator):
        return _named("D", discriminator_variables(state, model), arguments)
    variables, components = generator_variables(state, model), {}
    for part in ("mapping", "synthesis"):
        own = {name[len(part) + 1 :]: t for name, t in variables.items() if name.startswith(part + "/")}
        components[part] = _named(f"G_{part}", own, {})
    return _named("G", {} if average is None else {"dlatent_avg": average.detach().cpu()}, arguments, components)


def _named(name: str, variables: State, arguments: dict, components: dict | None = None) -> Named:
    state = {
        "version": 4,
        "name": name,
        "static_kwargs": arguments,
        "components": components or {},
        "build_module_src": "",
        "build_func_name": f"{name}_main",
        "variables": [(name, t.contiguous().numpy()) for name, t in variables.items()],
    }
    return Named("dnnlib.tflib.network", "Network", state)


def _arguments(model: StyleGAN2Generator | StyleGAN2Discriminator) -> dict:
    """What the program builds the network with."""
    base, most = _widths(model)
    arguments = {
        "num_channels": model.image_channels,
        "resolution": model.resolution,
        "label_size": 0,
        "fmap_base": base // 2,
        "fmap_max": most,
        "architecture": model.config["architecture"],
    }
    if isinstance(model, StyleGAN2Generator):
        arguments |= {
            "latent_size": model.latent_dim,
            "dlatent_size": model.style_dim,
            "mapping_fmaps": model.style_dim,
            "mapping_layers": model.config["mapping_layers"],
        }
    else:
        # The deviation is over groups of 4 here, as in TensorFlow's program. The converter's own is the batch.
        arguments |= {"mbstd_group_size": 4}
    return arguments


def _widths(model: StyleGAN2Generator | StyleGAN2Discriminator) -> tuple[int, int]:
    """(base, max) of channels that are min(base / resolution, max)."""
    channels = {int(r): c for r, c in model.config["channels"].items()}
    base, most = max(r * c for r, c in channels.items()), max(channels.values())
    if any(min(base // r, most) != c for r, c in channels.items()):
        raise ValueError(
            f"NVIDIA's programs build networks of min(base / resolution, max) channels, and this one has {channels}: "
            "take rosinality's layout, or safetensors"
        )
    return base, most


def _check_filters(state: State, gain: int) -> None:
    default = gain * torch.outer(DEFAULT_TAPS, DEFAULT_TAPS) / DEFAULT_TAPS.sum() ** 2
    for name, kernel in state.items():
        if name.endswith(".kernel") and not torch.allclose(kernel, default.to(kernel.dtype)):
            raise ValueError(f"the filter {name} is not that of StyleGAN2, (1, 3, 3, 1), which alone is exported")


def generator_variables(state: State, model: StyleGAN2Generator) -> State:
    """Those of `mapping` and `synthesis`, under their slashed names."""
    out = {"synthesis/4x4/Const/const": state["input.input"]}
    for i in range(model.config["mapping_layers"]):
        out[f"mapping/Dense{i}/weight"] = _transposed(state[f"style.{i + 1}.weight"])
        out[f"mapping/Dense{i}/bias"] = state[f"style.{i + 1}.bias"]

    def modulated(ours: str, theirs: str) -> None:
        weight = _hwio(state[f"{ours}.conv.weight"])
        out[f"{theirs}/weight"] = weight.flip(0, 1) if theirs.endswith("up") else weight
        out[f"{theirs}/mod_weight"] = _transposed(state[f"{ours}.conv.modulation.weight"])
        out[f"{theirs}/mod_bias"] = state[f"{ours}.conv.modulation.bias"].double() - 1

    def styled(ours: str, theirs: str, number: int) -> None:
        modulated(ours, theirs)
        out[f"{theirs}/noise_strength"] = state[f"{ours}.noise.weight"][0]
        out[f"{theirs}/bias"] = state[f"{ours}.activate.bias"]
        out[f"synthesis/noise{number}"] = state[f"noises.noise_{number}"]

    def to_rgb(ours: str, theirs: str) -> None:
        modulated(ours, theirs)
        out[f"{theirs}/bias"] = state[f"{ours}.bias"].flatten()

    architecture = model.config["architecture"]
    styled("conv1", "synthesis/4x4/Conv", 0)
    for j in range(len(model.convs) // 2):
        block = f"synthesis/{8 << j}x{8 << j}"
        styled(f"convs.{2 * j}", f"{block}/Conv0_up", 2 * j + 1)
        styled(f"convs.{2 * j + 1}", f"{block}/Conv1", 2 * j + 2)
        if architecture == "resnet":
            out[f"{block}/Skip/weight"] = _hwio(state[f"skips.{j}.0.weight"])
        elif architecture == "skip":
            to_rgb(f"to_rgbs.{j}", f"{block}/ToRGB")
    if architecture == "skip":
        to_rgb("to_rgb1", "synthesis/4x4/ToRGB")
    else:
        to_rgb("to_rgb", f"synthesis/{model.resolution}x{model.resolution}/ToRGB")
    return out


def discriminator_variables(state: State, model: StyleGAN2Discriminator) -> State:
    out = {}

    def layer(ours: str, theirs: str, conv: int = 0) -> None:
        out[f"{theirs}/weight"] = _hwio(state[f"{ours}.{conv}.weight"])
        out[f"{theirs}/bias"] = state[f"{ours}.{conv + 1}.bias"]

    size, architecture = model.resolution, model.config["architecture"]
    layer("convs.0", f"{size}x{size}/FromRGB")
    for i in range(1, len(model.convs)):
        r = size >> i - 1
        layer(f"convs.{i}.conv1", f"{r}x{r}/Conv0")
        layer(f"convs.{i}.conv2", f"{r}x{r}/Conv1_down", conv=1)
        if architecture == "resnet":
            out[f"{r}x{r}/Skip/weight"] = _hwio(state[f"convs.{i}.skip.1.weight"])
        elif architecture == "skip":
            layer(f"from_rgbs.{i - 1}", f"{r // 2}x{r // 2}/FromRGB")
    layer("final_conv", "4x4/Conv")
    for number, theirs in enumerate(("4x4/Dense0", "Output")):
        out[f"{theirs}/weight"] = _transposed(state[f"final_linear.{number}.weight"])
        out[f"{theirs}/bias"] = state[f"final_linear.{number}.bias"]
    return out
