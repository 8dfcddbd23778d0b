"""Reading and writing networks. A checkpoint is data: reading one never runs code from it.

This project's files are safetensors whose keys start with `generator.` or `discriminator.` and whose metadata holds
the constructors' arguments as JSON. The public projects' files are described in `layouts`.
"""

import json
import logging
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..files.atomic import save_tensors
from ..files.reading import Contents, read
from .layouts import MODELS, Layout, State, describe, families, find, foreign
from .network import Network, Origin

_log = logging.getLogger(__name__)

MOST_NEW = 1 << 27  # numbers that are drawn for what a file leaves out, beside four for each that it has


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
    return write_networks(path, [model for model in (generator, discriminator) if model is not None], {})


def write_networks(path: str | Path, models: list[nn.Module], sources: dict[str, str]) -> Path:
    """Does what `save_model` does. sources: {role: where its weights come from, in words}, for any of the roles."""
    path = writable(path)
    tensors, modules = {}, {}
    for model in models:
        role = next((role for (_, role), cls in MODELS.items() if isinstance(model, cls)), None)
        if role is None:
            known = ", ".join(cls.__name__ for cls in MODELS.values())
            raise TypeError(f"save_model knows {known}; for a {type(model).__name__} save its state_dict() instead")
        if role in modules:
            raise TypeError(f"a file holds one {role}, got two")
        modules[role] = {"family": model.family, "config": model.config}
        modules[role] |= {"source": sources[role]} if role in sources else {}
        tensors |= {f"{role}.{name}": tensor for name, tensor in on_cpu(model).items()}
    metadata = {"format": "minegan_fast", "version": "1", "modules": json.dumps(modules)}
    save_tensors(path, tensors, metadata)
    return path


def load_generator(
    path: str | Path | Contents, family: str | None = None, strict: bool = True, resolution: int | None = None
) -> Network:
    """The generator in a file of this project or of a public one, told by its keys and sized by its shapes.

    Args:
        path: the file, or a folder of BigGAN-PyTorch or pytorch-pretrained-biggan. Averaged weights (EMA) are taken
            where it holds them; `origin` and a line in the log "minegan_fast" (INFO) say so. `D.pth` of BigGAN-PyTorch
            is the critic alone, and is refused here even if a generator lies beside it; `load_discriminator` finds the
            critic beside a generator's file. `origin` names the file that was read. In a path's place this takes the
            `Contents` that `files.reading.read` made of one, so that a file of both networks is read once.
        family: "biggan" (also BigGAN-deep), "dcgan", "pgan", "stylegan", "stylegan2", or None to tell by the keys.
        strict: every tensor of the network must be in the file and the other way round. False: what fits is loaded,
            the rest of the network has the values it is built with (seed 0), and a warning names what did not fit.
        resolution: for a StyleGAN or Progressive GAN. Their public files also hold a network of every lower resolution,
            and those of StyleGAN untrained ones of higher resolutions. None: the highest that was trained.

    Returns the network in eval mode on the CPU, with an `Origin` as its attribute `origin`. Half-precision weights
    become float32. Noise buffers that a file leaves out are drawn from a fixed seed. The global random state is left
    alone.

    Raises:
        FileNotFoundError, ValueError: no such file; a file of another kind, a truncated one, a pickle that asks for
            code (named and refused), another architecture (says what it looks like and which keys would have told),
            tensors that are missing, too many or of another shape (by name).
    """
    return load_network(read(path), "generator", family, strict, resolution)


def load_discriminator(
    path: str | Path | Contents, family: str | None = None, strict: bool = True, resolution: int | None = None
) -> Network:
    """The discriminator in a file. Arguments, result and errors are as in `load_generator`."""
    return load_network(read(path), "discriminator", family, strict, resolution)


def has_discriminator(path: str | Path | Contents) -> bool:
    """Whether the file holds a discriminator that `load_discriminator` would find. Errors as in `load_generator`."""
    return holds(read(path), "discriminator")


def writable(path: str | Path) -> Path:
    """The path. OSError where no file can be written there."""
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path} cannot be written: there is no folder {path.parent}; make it first")
    if path.is_dir():
        raise IsADirectoryError(f"{path} cannot be written: it is a folder; name a file in it")
    return path


def on_cpu(model: nn.Module) -> dict[str, Tensor]:
    """The state dict, in memory of the CPU."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}


def load_network(
    contents: Contents, role: str, family: str | None, strict: bool, resolution: int | None = None
) -> Network:
    """What `load_generator` and `load_discriminator` do, for either role."""
    model = _filled(written_network(contents, role, family, resolution), strict)
    # Only a choice between several networks, made for the user, is worth a line.
    level = logging.INFO if model.origin.passed_over else logging.DEBUG
    _log.log(level, "%s: %s", type(model).__name__, model.origin)
    return model.eval()


@dataclass(frozen=True)
class Written:
    """A network as a file has it: what to build, and the file's tensors under the names of the network's own."""

    model: type[Network]
    config: dict
    state: State
    origin: Origin
    optional: str | None = None

    def on_meta(self) -> Network:
        """The network without memory. So nothing is allocated before the sizes are known to fit the file, and no random
        number is drawn."""
        name = self.model.__name__
        # A network has no more layers than its file has tensors, and each of them takes time to make.
        layers = [n for key, n in self.config.items() if "layers" in key and isinstance(n, int)]
        layers += [len(value) for value in self.config.values() if isinstance(value, (list, dict))]
        if max(layers, default=0) > len(self.state):
            raise ValueError(
                f"{self.origin.path} describes a {name} of {max(layers)} layers, and holds {len(self.state)} tensors"
            )
        try:
            with torch.device("meta"):
                return self.model(**self.config)
        except Exception as error:  # arguments that nobody meant can raise anything
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(f"{self.origin.path} describes a {name} that cannot be built: {reason}") from None

    def differences(self, own: State) -> tuple[list[str], list[str], dict[str, str]]:
        """(missing, unexpected, {name: what is wrong with it}) against the tensors of a network."""
        wrong = {}
        for k in sorted(own.keys() & self.state.keys()):
            if own[k].shape != self.state[k].shape:
                wrong[k] = f"{k} is {list(self.state[k].shape)}, expected {list(own[k].shape)}"
            elif own[k].is_floating_point() and not self.state[k].is_floating_point():
                wrong[k] = f"{k} holds {self.state[k].dtype}, expected floats"
        missing = sorted(own.keys() - self.state.keys())
        missing = [k for k in missing if not (self.optional and re.fullmatch(self.optional, k))]
        return missing, sorted(self.state.keys() - own.keys()), wrong


def described_modules(contents: Contents) -> dict[str, dict]:
    """{role: {"family", "config", "source"}} of a file of this project; empty for other files."""
    try:
        modules = json.loads(contents.metadata.get("modules", "{}"))
        found = {
            role: {"family": entry["family"], "config": entry["config"], "source": entry.get("source")}
            for role, entry in modules.items()
        }
        if not all(isinstance(e["family"], str) and isinstance(e["config"], dict) for e in found.values()):
            raise TypeError
        return found
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
        raise ValueError(f"{contents.path}: its metadata is damaged; write it again with save_model") from None


def holds(contents: Contents, role: str) -> bool:
    """Whether the file holds a network of that role in a layout known here."""
    modules = described_modules(contents)
    return role in modules if modules else find(contents.data, role) is not None


def written_network(contents: Contents, role: str, family: str | None = None, resolution: int | None = None) -> Written:
    """The network of that role in a file. ValueError: there is none, or none of that family or resolution."""
    path = contents.path
    if modules := described_modules(contents):
        if role not in modules:
            raise ValueError(f"{path} holds no {role}, only a {' and a '.join(modules)}")
        state = {name[len(role) + 1 :]: t for name, t in contents.data.items() if name.startswith(role + ".")}
        kind, config = modules[role]["family"], modules[role]["config"]
        _check_family(path, role, kind, family)
        if (kind, role) not in MODELS:
            known = ", ".join(sorted({f for f, _ in MODELS}))
            raise ValueError(f"{path}: the family {kind!r} is unknown to this version, which reads: {known}")
        _check_resolution(f"{path} holds a {kind} {role}", config, resolution)
        origin = Origin(str(path), "minegan_fast", converted=modules[role]["source"])
        return Written(MODELS[kind, role], config, state, origin)
    found = find(contents.data, role)
    if found is None:
        raise ValueError(
            f"{path} holds no {role} of a layout known here. If it is of a network of your own, "
            "build that in Python, load the weights, and give the module to minegan_fast.transfer: any works that has "
            f"latent_dim, resolution and forward(z). {describe(contents.data, role)}"
        )
    layout = found.layout
    if (kind := foreign(found.state)) is not None:
        raise ValueError(
            f"{path} holds a {kind}, which is not read here: build it with the program that made it, and give the "
            "module to minegan_fast.transfer, which takes any that has latent_dim, resolution and forward(z)"
        )
    _check_family(path, role, layout.model.family, family)
    path = contents.files.get(found.container or "", path)
    critic = find(contents.data, "discriminator") if layout.beside else None
    config, state = _sized(layout, found.state, path, resolution, critic.state if critic else {}, contents.data)
    origin = Origin(str(path), layout.project, found.container, found.averaged, found.passed_over)
    return Written(layout.model, config, state, origin, layout.optional)


def _check_family(path: Path, role: str, found: str, wanted: str | None) -> None:
    known = sorted({kind for kind, _ in MODELS})
    if wanted not in (None, *known):
        raise ValueError(f"family must be one of {', '.join(known)}, or None to tell by the keys; got {wanted!r}")
    if wanted is not None and found not in families(wanted):
        raise ValueError(f"{path} holds a {found} {role}, not {wanted}; leave family=None to take what is there")


def _sized(
    layout: Layout, state: State, path: Path, resolution: int | None, critic: State, data: Mapping
) -> tuple[dict, State]:
    """(constructor's arguments, tensors under the model's own names) of tensors in that layout."""
    looks = f"{path} looks like a {layout.model.family} {layout.role} of {layout.project}"
    try:
        state = state if layout.crop is None else layout.crop(state, resolution)
        config, state = layout.config(state), layout.convert(state)
        config = config if layout.beside is None else layout.beside(config, critic, data)
    except KeyError as error:
        raise ValueError(f"{looks} but lacks {error}; is the file complete?") from None
    except IndexError:
        raise ValueError(f"{looks}, but its weights have too few dimensions") from None
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{looks}, but {str(error).splitlines()[0]}") from None
    _check_resolution(looks, config, resolution)
    return config, state


def _check_resolution(what: str, config: dict, wanted: int | None) -> None:
    if isinstance(config, dict) and wanted not in (None, config.get("resolution")):
        raise ValueError(f"{what} of {config.get('resolution')} px, which has no other resolution; got {wanted}")


def _filled(written: Written, strict: bool) -> Network:
    """The network, in CPU memory of its own, with the tensors of the file."""
    model, origin = written.on_meta(), written.origin
    own = model.state_dict()
    missing, extra, wrong = written.differences(own)
    if missing or extra or wrong:
        kinds = {"missing": missing, "unexpected": extra, "wrong": list(wrong.values())}
        told = "; ".join(f"{kind}: {shorten(keys)}" for kind, keys in kinds.items() if keys)
        message = f"{origin.path} does not fit a {type(model).__name__} of its size: {told}"
        if strict:
            raise ValueError(message)
        warnings.warn(f"{message}; the rest was loaded", stacklevel=4)
        origin = replace(origin, missing=(*missing, *wrong), unexpected=(*extra, *wrong))
    state = {k: t for k, t in written.state.items() if k in own and k not in wrong}
    if len(state) < len(own):
        new = sum(own[k].numel() for k in own.keys() - state.keys())
        if new > MOST_NEW + 4 * sum(t.numel() for t in state.values()):
            raise ValueError(f"{origin.path} leaves out {new} numbers of a {type(model).__name__} of its size")
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)  # torch.manual_seed would reach the GPU's generator as well
            state = written.model(**written.config).state_dict() | state
    double = any(t.dtype == torch.float64 for t in state.values())
    model = model.to(torch.float64 if double else torch.float32).to_empty(device="cpu")
    model.load_state_dict(state)
    model.origin = origin
    return model


def shorten(keys: list[str], most: int = 8) -> str:
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")
