"""Networks as other programs write them, so that those load them strictly. `layouts` reads the same files."""

import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..files.atomic import atomic_path, save_torch
from .biggan import BigGANDiscriminator, BigGANGenerator
from .checkpoint import on_cpu, writable
from .stylegan2 import StyleGAN2Discriminator, StyleGAN2Generator

# (pattern of our name, the name in TensorFlow's program, what happens to the tensor); the first that fits
Rules = list[tuple[str, str | Callable[[re.Match], str], Callable[[Tensor], Tensor]]]

_TAPS = torch.tensor((1.0, 3.0, 3.0, 1.0))


def export_biggan(folder: str | Path, generator: BigGANGenerator, discriminator: nn.Module) -> list[Path]:
    """Writes a BigGAN as BigGAN-PyTorch does: a folder of `G.pth`, `G_ema.pth` (the same), `D.pth` and
    `state_dict.pth`, which its `load_weights` reads with load_optim=False. Errors as in `save_model`."""
    for model, expected in ((generator, BigGANGenerator), (discriminator, BigGANDiscriminator)):
        if not isinstance(model, expected):
            raise TypeError(f"BigGAN-PyTorch's layout takes a {expected.__name__}, got a {type(model).__name__}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    progress = {"itr": 0, "epoch": 0, "save_num": 0, "save_best_num": 0, "best_IS": 0, "best_FID": 999999, "config": {}}
    G, D = on_cpu(generator), on_cpu(discriminator)
    contents = {"G": G, "G_ema": G, "D": D, "state_dict": progress}
    for name, content in contents.items():
        save_torch(folder / f"{name}.pth", content)
    return [folder / f"{name}.pth" for name in contents]


class _Network:
    """What NVIDIA's programs for TensorFlow pickle: {"version", "name", "static_kwargs", "components", ...}."""


_InPython: Any = pickle._Pickler  # the one whose steps can be overridden


class _Pickler(_InPython):
    """Gives `_Network` the name of the class that those programs look up, which is in no package here."""

    def save_global(self, obj, name=None):
        if obj is not _Network:
            return super().save_global(obj, name)
        self.write(b"cdnnlib.tflib.network\nNetwork\n")
        self.memoize(obj)


def export_nvidia(path: str | Path, generator: StyleGAN2Generator, discriminator: StyleGAN2Discriminator) -> Path:
    """Writes a StyleGAN2 as NVIDIA's program for TensorFlow does: a pickle of (G, D, Gs), which their programs for
    PyTorch convert when they load it. It holds arrays and no code; G and Gs are the same.

    Errors as in `save_model`; ValueError where that program has no such network: channels that follow no rule, a filter
    that is not its own, a latent that is mapped in other sizes.
    """
    for model, expected in ((generator, StyleGAN2Generator), (discriminator, StyleGAN2Discriminator)):
        if not isinstance(model, expected):
            raise TypeError(f"NVIDIA's layout takes a {expected.__name__}, got a {type(model).__name__}")
    if generator.num_classes:  # what stands for a mined class is no label, and their program takes labels alone
        raise ValueError("no networks with classes are written in NVIDIA's layout: take save_model (--to safetensors)")
    path, config = writable(path), generator.config
    _check_filters(generator), _check_filters(discriminator)
    G = _renamed(on_cpu(generator), _generator_rules(generator))
    G["dlatent_avg"] = generator.centre()[0].detach().cpu()
    shared = {"resolution": config["resolution"], "num_channels": config["image_channels"], "label_size": 0}
    of_generator = shared | _widths(generator) | {
        "latent_size": config["latent_dim"], "dlatent_size": config["style_dim"], "structure": "fixed",
        "mapping_layers": config["mapping_layers"], "mapping_fmaps": config["style_dim"],
        "architecture": config["architecture"],
    }  # fmt: skip
    of_critic = shared | _widths(discriminator) | {"architecture": discriminator.config["architecture"]}
    # The standard deviation is over groups of 4 here, as in TensorFlow's program; its own default is the whole batch.
    of_critic |= {"mbstd_group_size": 4}
    D = _renamed(on_cpu(discriminator), _discriminator_rules(discriminator))
    networks = (
        _network("G", "G_main", G, of_generator), _network("D", "D_stylegan2", D, of_critic),
        _network("Gs", "G_main", G, of_generator),
    )  # fmt: skip
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        _Pickler(file, 2).dump(networks)
    return path


def _network(name: str, build: str, tensors: dict[str, Tensor], settings: dict) -> _Network:
    """A network of {"a/b/weight": tensor}: what begins with a component's name lies in that component."""
    parts = {}
    for part in ("mapping", "synthesis"):
        inner = {key[len(part) + 1 :]: t for key, t in tensors.items() if key.startswith(part + "/")}
        if inner:
            parts[part] = _network(part, f"G_{part}", inner, settings)
    own = {key: t for key, t in tensors.items() if key.partition("/")[0] not in parts}
    network = _Network()
    network.__dict__.update(
        version=4, name=name, static_kwargs=dict(settings), components=parts, build_module_src="",
        build_func_name=build,
        variables=[(key, t.float().numpy().copy(order="C")) for key, t in own.items()],
    )  # fmt: skip
    return network


def _widths(model: StyleGAN2Generator | StyleGAN2Discriminator) -> dict[str, int]:
    """The rule that channels follow, as that program has it: min(2 fmap_base / resolution, fmap_max)."""
    channels = {int(r): c for r, c in model.config["channels"].items()}
    largest = max(channels)
    base, most = largest * channels[largest], max(channels.values())
    if base % 2 or any(c != min(base // r, most) for r, c in channels.items()):
        shown = ", ".join(f"{r}: {c}" for r, c in sorted(channels.items()))
        raise ValueError(f"the channels ({shown}) follow no rule that NVIDIA's program has: take rosinality's layout")
    return {"fmap_base": base // 2, "fmap_max": most}


def _check_filters(model: nn.Module) -> None:
    own = torch.outer(_TAPS, _TAPS) / _TAPS.sum() ** 2
    for name, kernel in model.named_buffers():
        if name.endswith("kernel") and not torch.allclose(kernel.cpu() / kernel.cpu().sum(), own.to(kernel.dtype)):
            raise ValueError(f"the filter {name} is not that of StyleGAN2, (1, 3, 3, 1), which alone is exported")


def _renamed(state: dict[str, Tensor], rules: Rules) -> dict[str, Tensor]:
    out = {}
    for name, tensor in state.items():
        if name.endswith("kernel") or name == "latent_avg":
            continue
        for pattern, theirs, change in rules:
            if match := re.fullmatch(pattern, name):
                out[theirs(match) if callable(theirs) else match.expand(theirs)] = change(tensor)
                break
        else:
            raise ValueError(f"NVIDIA's program has no {name}")
    return out


def _turned(t: Tensor) -> Tensor:
    """[(1,) out, in, k, k] as [k, k, in, out]; [out, in] as [in, out]."""
    return t.reshape(t.shape[-4:]).permute(2, 3, 1, 0) if t.ndim >= 4 else t.T


def _up(t: Tensor) -> Tensor:
    return _turned(t).flip(0, 1)


def _same(t: Tensor) -> Tensor:
    return t


def _layers(ours: str, resolution: Callable[[re.Match], int], layer: Callable[[re.Match], str]) -> Rules:
    """Of styled convolutions and of those to RGB; the first group of `ours` is their number."""

    def called(part: str) -> Callable[[re.Match], str]:
        return lambda match: f"synthesis/{resolution(match)}x{resolution(match)}/{layer(match)}/{part}"

    return [
        (rf"{ours}\.conv\.weight", called("weight"), _turned),
        (rf"{ours}\.conv\.modulation\.weight", called("mod_weight"), _turned),
        (rf"{ours}\.conv\.modulation\.bias", called("mod_bias"), lambda t: t - 1),
        (rf"{ours}\.noise\.weight", called("noise_strength"), lambda t: t[0]),
        (rf"{ours}\.(?:activate\.)?bias", called("bias"), lambda t: t.flatten()),
    ]


def _pair(match: re.Match) -> int:
    """The resolution of one of two convolutions."""
    return 8 << int(match[1]) // 2


def _size(match: re.Match) -> int:
    return 8 << int(match[1])


def _generator_rules(generator: StyleGAN2Generator) -> Rules:
    R = generator.resolution
    return [
        (r"style\.(\d+)\.weight", lambda m: f"mapping/Dense{int(m[1]) - 1}/weight", _turned),
        (r"style\.(\d+)\.bias", lambda m: f"mapping/Dense{int(m[1]) - 1}/bias", _same),
        (r"input\.input", "synthesis/4x4/Const/const", _same),
        (r"noises\.noise_(\d+)", r"synthesis/noise\1", _same),
        (r"convs\.(\d*[02468])\.conv\.weight", lambda m: f"synthesis/{_pair(m)}x{_pair(m)}/Conv0_up/weight", _up),
        *_layers(r"convs\.(\d*[02468])", _pair, lambda m: "Conv0_up"),
        *_layers(r"convs\.(\d*[13579])", _pair, lambda m: "Conv1"),
        *_layers(r"conv1", lambda m: 4, lambda m: "Conv"),
        *_layers(r"to_rgb1", lambda m: 4, lambda m: "ToRGB"),
        *_layers(r"to_rgbs\.(\d+)", _size, lambda m: "ToRGB"),
        *_layers(r"to_rgb", lambda m: R, lambda m: "ToRGB"),
        (r"skips\.(\d+)\.0\.weight", lambda m: f"synthesis/{_size(m)}x{_size(m)}/Skip/weight", _up),
    ]


def _discriminator_rules(discriminator: StyleGAN2Discriminator) -> Rules:
    R = discriminator.resolution

    def of(part: str, first: int = 1) -> Callable[[re.Match], str]:
        return lambda match: "{0}x{0}/{1}".format(R >> int(match[1]) - first, part)

    return [
        (r"convs\.0\.0\.weight", f"{R}x{R}/FromRGB/weight", _turned),
        (r"convs\.0\.1\.bias", f"{R}x{R}/FromRGB/bias", _same),
        (r"convs\.(\d+)\.conv1\.0\.weight", of("Conv0/weight"), _turned),
        (r"convs\.(\d+)\.conv1\.1\.bias", of("Conv0/bias"), _same),
        (r"convs\.(\d+)\.conv2\.1\.weight", of("Conv1_down/weight"), _turned),
        (r"convs\.(\d+)\.conv2\.2\.bias", of("Conv1_down/bias"), _same),
        (r"convs\.(\d+)\.skip\.1\.weight", of("Skip/weight"), _turned),
        (r"from_rgbs\.(\d+)\.0\.weight", of("FromRGB/weight", -1), _turned),
        (r"from_rgbs\.(\d+)\.1\.bias", of("FromRGB/bias", -1), _same),
        (r"final_conv\.0\.weight", "4x4/Conv/weight", _turned),
        (r"final_conv\.1\.bias", "4x4/Conv/bias", _same),
        (r"final_linear\.0\.(weight|bias)", r"4x4/Dense0/\1", lambda t: t.T if t.ndim == 2 else t),
        (r"final_linear\.1\.(weight|bias)", r"Output/\1", lambda t: t.T if t.ndim == 2 else t),
    ]
