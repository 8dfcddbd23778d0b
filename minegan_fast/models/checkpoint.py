"""Reading and writing networks. A checkpoint is data: reading one never runs code from it.

This project's files are safetensors whose keys start with `generator.` or `discriminator.` and whose metadata holds
the constructors' arguments as JSON. PyTorch files are read with `weights_only=True`.
"""

import argparse
import json
import re
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .._files import atomic_path, save_tensors
from .stylegan2 import StyleGAN2Discriminator, StyleGAN2Generator

CLASSES = {
    ("stylegan2", "generator"): StyleGAN2Generator,
    ("stylegan2", "discriminator"): StyleGAN2Discriminator,
}

# The first of these keys that a file has says what it looks like; the public layouts of each family.
SIGNATURES = {
    "conv1.conv.modulation.weight": "StyleGAN2 generator",
    "final_linear.0.weight": "StyleGAN2 discriminator",
    "generator.progression.0.conv1.input": "StyleGAN generator",
    "from_rgb.8.conv.weight_orig": "StyleGAN discriminator",
    "from_rgb.8.0.conv.weight_orig": "StyleGAN discriminator",
    "blocks.0.0.bn1.gain.weight": "BigGAN generator",
    "blocks.0.0.conv_sc.weight": "BigGAN discriminator",
    "formatLayer.module.weight": "Progressive GAN generator",
    "groupScaleZero.0.module.weight": "Progressive GAN discriminator",
    "transform.0.weight": "miner",
    "layer1.0.conv1.weight": "ResNet classifier",
}

# Where a training file keeps what is asked for, best first, and the key by which a StyleGAN2 is known there.
CONTAINERS = {
    "generator": ("g_ema", "generator", "g", "G_ema", "G"),
    "discriminator": ("d", "discriminator", "D"),
}
KEYS = {"generator": "conv1.conv.modulation.weight", "discriminator": "final_linear.0.weight"}


def save_model(path: str | Path, generator: nn.Module, discriminator: nn.Module | None = None) -> Path:
    """Writes networks of `minegan_fast.models` as one safetensors file, atomically.

    Args:
        path: the file to write; its folder must exist.
        generator: a generator, or a discriminator alone.
        discriminator: goes into the same file.

    Returns the path. `load_generator` and `load_discriminator` read float32 and float64 networks back bit for bit.

    Raises:
        TypeError: a module that is no network of this package, or two of one kind.
        OSError: the file cannot be written; what was at `path` is still there.
    """
    path = _writable(path)
    tensors, modules = {}, {}
    for model in (generator, discriminator):
        if model is None:
            continue
        role = next((role for (_, role), cls in CLASSES.items() if isinstance(model, cls)), None)
        if role is None:
            known = ", ".join(cls.__name__ for cls in CLASSES.values())
            raise TypeError(f"save_model knows {known}; for a {type(model).__name__} save its state_dict() instead")
        if role in modules:
            raise TypeError(f"a file holds one {role}, got two")
        modules[role] = {"family": model.family, "config": model.config}
        tensors |= {f"{role}.{name}": tensor for name, tensor in _on_cpu(model).items()}
    metadata = {"format": "minegan_fast", "version": "1", "modules": json.dumps(modules)}
    try:
        save_tensors(path, tensors, metadata)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written ({error}); is the disk full?") from None
    return path


def export_rosinality(path: str | Path, generator: StyleGAN2Generator, discriminator: nn.Module | None = None) -> Path:
    """Writes a StyleGAN2 as rosinality/stylegan2-pytorch does: {"g_ema", "latent_avg"[, "d"]}, a torch.save file.

    Programs for that layout build RGB networks with latent_dim == style_dim and the channels of config-e or -f, and
    load no others. Errors as in `save_model`.
    """
    path = _writable(path)
    for model, expected in ((generator, StyleGAN2Generator), (discriminator, StyleGAN2Discriminator)):
        if not isinstance(model, expected) and not (model is None and expected is StyleGAN2Discriminator):
            raise TypeError(f"the rosinality layout takes a {expected.__name__}, got a {type(model).__name__}")
    content = {"g_ema": _on_cpu(generator), "latent_avg": generator.mean_latent()[0].cpu()}
    if discriminator is not None:
        content["d"] = _on_cpu(discriminator)
    with atomic_path(path) as temporary:
        try:
            torch.save(content, temporary)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise OSError(f"{path} cannot be written ({reason}); is the disk full?") from None
    return path


def load_generator(path: str | Path, family: str | None = None) -> nn.Module:
    """The generator in a file: this project's safetensors, or a StyleGAN2 in the rosinality layout (.pt).

    Args:
        path: the file. EMA weights are taken where it holds them.
        family: "stylegan2", or None to tell by the keys.

    Returns the network in eval mode on the CPU. Half-precision weights become float32. Noise buffers that a file
    leaves out are drawn from a fixed seed. The global random state is left alone.

    Raises:
        FileNotFoundError, ValueError: no such file; a file of another kind, a truncated one, a pickle that asks for
            code (named and refused), another architecture (says what it looks like and which keys differ).
    """
    return _load(Path(path), "generator", family)


def load_discriminator(path: str | Path, family: str | None = None) -> nn.Module:
    """The discriminator in a file. As `load_generator`."""
    return _load(Path(path), "discriminator", family)


def has_discriminator(path: str | Path) -> bool:
    """Whether the file holds a discriminator that `load_discriminator` would find. Errors as in `load_generator`."""
    content, modules = _read(Path(path))
    return "discriminator" in modules or _extract(content, "discriminator") is not None


def _writable(path: str | Path) -> Path:
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path} cannot be written: there is no folder {path.parent}; make it first")
    if path.is_dir():
        raise IsADirectoryError(f"{path} cannot be written: it is a folder; name a file in it")
    return path


def _on_cpu(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}


def _load(path: Path, role: str, family: str | None) -> nn.Module:
    content, modules = _read(path)
    if modules:
        if role not in modules:
            raise ValueError(f"{path} holds no {role}, only a {' and a '.join(modules)}")
        state = {name[len(role) + 1 :]: t for name, t in content.items() if name.startswith(role + ".")}
        found, config = modules[role]["family"], modules[role]["config"]
    else:
        state = _extract(content, role)
        if state is None:
            raise ValueError(f"{path} holds no StyleGAN2 {role}. {_describe(content, role)}")
        found, config = "stylegan2", _config(state, role, path)
    if family not in (None, found):
        raise ValueError(f"{path} holds a {found} {role}, not {family}; leave family=None to take what is there")
    if (found, role) not in CLASSES:
        known = ", ".join(sorted({f for f, _ in CLASSES}))
        raise ValueError(f"{path}: the family {found!r} is unknown to this version, which reads: {known}")
    try:
        # On meta nothing is allocated before the sizes are known to fit the file, and no random number is drawn.
        with torch.device("meta"):
            model = CLASSES[found, role](**config)
    except (TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} describes a {found} {role} that cannot be built: {reason}") from None
    return _filled(model, state, path).eval()


def _filled(model: nn.Module, state: dict[str, Tensor], path: Path) -> nn.Module:
    """The model, built on meta, with the tensors of the state in CPU memory of its own."""
    own = model.state_dict()
    noises = {k: v for k, v in own.items() if k.startswith("noises.") and k not in state}
    missing, extra = sorted(own.keys() - state.keys() - noises.keys()), sorted(state.keys() - own.keys())
    common = sorted(own.keys() & state.keys())
    wrong = [
        f"{k} is {list(state[k].shape)}, expected {list(own[k].shape)}"
        for k in common
        if own[k].shape != state[k].shape
    ]
    wrong += [f"{k} holds {state[k].dtype}, expected floats" for k in common if not state[k].is_floating_point()]
    kinds = {"missing": missing, "unexpected": extra, "wrong": wrong}
    if missing or extra or wrong:
        told = "; ".join(f"{kind}: {_shorten(keys)}" for kind, keys in kinds.items() if keys)
        raise ValueError(f"{path} does not fit a {type(model).__name__} of its size: {told}")
    seeded = torch.Generator().manual_seed(0)
    state = state | {k: torch.randn(v.shape, generator=seeded) for k, v in noises.items()}
    wide = any(t.dtype == torch.float64 for t in state.values())
    model = model.to(torch.float64 if wide else torch.float32).to_empty(device="cpu")
    model.load_state_dict(state)
    return model


def _shorten(keys: list[str], most: int = 8) -> str:
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")


def _extract(content: dict, role: str) -> dict[str, Tensor] | None:
    """The StyleGAN2 state dict of that role in a PyTorch file: in a training file's container, or the file itself."""
    for candidate in (*(content.get(key) for key in CONTAINERS[role]), content):
        if isinstance(candidate, dict):
            named = {k: v for k, v in candidate.items() if isinstance(k, str) and isinstance(v, Tensor)}
            state = {re.sub(r"^((module|_orig_mod)\.)+", "", k): v for k, v in named.items()}
            if KEYS[role] in state:
                return state
    return None


def _describe(content: dict, role: str) -> str:
    keys = [str(k) for k in content]
    keys += [f"{top}.{key}" for top, inner in content.items() if isinstance(inner, dict) for key in inner]
    looks = (
        f"It looks like a {kind} (it has {key}). "
        for key, kind in SIGNATURES.items()
        if any(k == key or k.endswith("." + key) for k in keys)
    )
    return f"{next(looks, '')}Its first keys: {_shorten(keys, 5)}; a StyleGAN2 {role} has {KEYS[role]}"


def _config(state: dict[str, Tensor], role: str, path: Path) -> dict:
    """The constructor's arguments, told from the shapes."""

    def count(pattern: str) -> int:
        return sum(re.fullmatch(pattern, key) is not None for key in state)

    try:
        if role == "generator":
            stages = count(r"to_rgbs\.\d+\.bias")
            channels = {4: state["conv1.conv.weight"].shape[1]}
            channels |= {8 << j: state[f"convs.{2 * j}.conv.weight"].shape[1] for j in range(stages)}
            return {
                "resolution": 4 << stages,
                "latent_dim": state["style.1.weight"].shape[1],
                "style_dim": state["style.1.weight"].shape[0],
                "mapping_layers": count(r"style\.\d+\.weight"),
                "image_channels": state["to_rgb1.conv.weight"].shape[1],
                "channels": channels,
            }
        blocks = count(r"convs\.\d+\.skip\.1\.weight")
        resolution = 4 << blocks
        channels = {resolution: state["convs.0.0.weight"].shape[0]}
        channels |= {resolution >> i: state[f"convs.{i}.conv2.1.weight"].shape[0] for i in range(1, blocks + 1)}
        return {"resolution": resolution, "image_channels": state["convs.0.0.weight"].shape[1], "channels": channels}
    except KeyError as error:
        raise ValueError(f"{path} looks like a StyleGAN2 {role} but lacks {error}; is the file complete?") from None
    except IndexError:
        raise ValueError(f"{path} looks like a StyleGAN2 {role}, but its weights have too few dimensions") from None


def _read(path: Path) -> tuple[dict, dict]:
    """(content, modules): what is in the file, and this project's description of it (empty for foreign files)."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the checkpoint file in it")
    try:
        with open(path, "rb") as file:
            head = file.read(512)
    except FileNotFoundError:
        raise FileNotFoundError(f"no checkpoint at {path}: check the path") from None
    if not head:
        raise ValueError(f"{path} is empty; copy or download it again")
    if head[8:9] == b"{":
        return _read_safetensors(path)
    if head.lstrip()[:1] == b"<":
        raise ValueError(f"{path} is a web page, not a checkpoint: the download gave HTML; fetch the file itself")
    zipped = head[:2] == b"PK"
    if not zipped and head[:1] != b"\x80":
        raise ValueError(f"{path} is neither a safetensors nor a PyTorch file (it begins with {head[:16]})")
    return _read_torch(path, zipped), {}


def _read_safetensors(path: Path) -> tuple[dict, dict]:
    try:
        with safe_open(path, "pt") as file:
            content = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            modules = json.loads((file.metadata() or {}).get("modules", "{}"))
            return content, {role: {key: entry[key] for key in ("family", "config")} for role, entry in modules.items()}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); copy or download it again") from None
    except (ValueError, TypeError, AttributeError, KeyError):
        raise ValueError(f"{path}: its metadata is damaged; write it again with save_model") from None


def _read_torch(path: Path, zipped: bool) -> dict:
    try:
        # Training files of the rosinality layout hold their command line: a Namespace is plain data.
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # a damaged pickle can raise anything
        if wanted := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise ValueError(
                f"{path} was refused: its pickle asks for {wanted[1]!r}, which is code, and a checkpoint is data. "
                "Save the state_dict() of the network on the machine that made the file, and load that"
            ) from None
        reason = (str(error) or type(error).__name__).splitlines()[0].split(". ")[0]
        raise ValueError(
            f"{path} is truncated, damaged or no file of torch.save ({reason}); nothing of it was run. "
            "Copy or download it again, or save the network's state_dict() with torch.save"
        ) from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a dict of tensors (a state_dict)")
    return content
