"""What is in a checkpoint, and writing it as this project's own file."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from ..files.pickle_names import Thing
from ..files.reading import Contents, read
from .checkpoint import described_modules, holds, load_network, writable, write_networks, written_network
from .layouts import MINERS, describe

ROLES = ("generator", "discriminator")


@dataclass(frozen=True)
class NetworkReport:
    """One network of a file.

    Attributes:
        role: "generator" or "discriminator".
        family: "biggan", "biggan_deep", "dcgan", "pgan", "stylegan" or "stylegan2".
        layout: whose way of writing it is.
        container: the file's key that holds it; None: the file itself.
        averaged: whether its weights are an exponential moving average; None: the file does not say.
        passed_over: other keys of the file that hold the same network.
        source: for a converted file, what it was converted from.
        config: the constructor's arguments (`resolution`, `channels` and others), as the shapes tell them.
        resolution, image_channels, latent_dim, num_classes, parameters: of the network; None where it has none.
        dtypes: of the tensors.
        missing, unexpected, wrong: the names of what keeps the file from loading with strict=True.
        problem: why the network cannot be built at all; all the above but the role is then unknown.
    """

    role: str
    family: str | None = None
    layout: str | None = None
    container: str | None = None
    averaged: bool | None = None
    passed_over: tuple[str, ...] = ()
    source: str | None = None
    config: dict | None = None
    resolution: int | None = None
    image_channels: int | None = None
    latent_dim: int | None = None
    num_classes: int | None = None
    parameters: int | None = None
    dtypes: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    wrong: tuple[str, ...] = ()
    problem: str | None = None


@dataclass(frozen=True)
class FileReport:
    """What `inspect` finds.

    Attributes:
        path: the file, or folder.
        networks: in the order generator, discriminator.
        others: what else the file holds, {key: what it is}.
        unknown: why no network was recognised; None where one was.
    """

    path: str
    networks: tuple[NetworkReport, ...]
    others: dict[str, str]
    unknown: str | None = None

    def as_dict(self) -> dict:
        """Plain data for JSON."""
        return asdict(self)


def inspect(path: str | Path) -> FileReport:
    """Says what is in a checkpoint. It reads everything that `load_generator` reads, and builds nothing.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or nothing can be read of it, as in `load_generator`. A
            file without a known network, or whose tensors do not fit, is no error: the report says so.
    """
    contents = read(path)
    networks = tuple(_network(contents, role) for role in ROLES if holds(contents, role))
    taken = {name for n in networks for name in (n.container, *n.passed_over)}
    own = bool(described_modules(contents))
    flat = own or None in taken
    others = {
        str(key): _kind(str(key), value)
        for key, value in contents.data.items()
        if key not in taken and not (flat and isinstance(value, Tensor))
    }
    if contents.metadata.get("format", "").startswith("minegan_fast."):
        others = {"": f"a {contents.metadata['format'].removeprefix('minegan_fast.')} of this project"}
    elif not networks and (miner := _miner(contents.data)):
        others = {"": miner}
    unknown = None if networks or own else describe(contents.data, "generator")
    return FileReport(str(contents.path), networks, others, unknown)


def convert(
    source: str | Path,
    out: str | Path,
    family: str | None = None,
    only: str | None = None,
    strict: bool = True,
    force: bool = False,
    resolution: int | None = None,
) -> Path:
    """Writes the generator and the discriminator of any file that is read here as this project's safetensors.

    Args:
        source: as `load_generator`'s path.
        out: the file to write.
        family, strict, resolution: as in `load_generator`.
        only: "generator" or "discriminator": leave the other network out.
        force: overwrite `out` where it exists.

    Returns `out`. Its metadata say what the weights were taken from, and whether they are averaged.

    Raises:
        FileExistsError: `out` exists and `force` is False.
        ValueError, OSError: as in `load_generator` and `save_model`; `out` does not end in .safetensors.
    """
    if only not in (None, *ROLES):
        raise ValueError(f'only must be "generator" or "discriminator", got {only!r}')
    if writable(out).suffix != ".safetensors":
        raise ValueError(f"{out} would be a safetensors file: let its name end in .safetensors")
    if Path(out).exists() and not force:
        raise FileExistsError(f"{out} exists already; name another file, or give --force (force=True) to overwrite it")
    contents = read(source)
    roles = [role for role in ROLES if only in (None, role) and holds(contents, role)]
    if not roles:
        wanted = only or "generator"
        raise ValueError(f"{source} holds no {wanted} of a layout known here. {describe(contents.data, wanted)}")
    try:
        models = {role: load_network(contents, role, family, strict, resolution) for role in roles}
    except ValueError as error:
        other = ' (only="generator", --only generator, leaves the discriminator out)' if len(roles) > 1 else ""
        raise ValueError(f"{error}{other}") from None
    return write_networks(out, [*models.values()], {role: str(model.origin) for role, model in models.items()})


def _network(contents: Contents, role: str) -> NetworkReport:
    try:
        written = written_network(contents, role)
        model = written.on_meta()
    except ValueError as error:
        return NetworkReport(role, problem=str(error))
    missing, unexpected, wrong = written.differences(model.state_dict())
    origin = written.origin
    return NetworkReport(
        role,
        family=model.family,
        layout=origin.project,
        container=origin.container,
        averaged=origin.averaged,
        passed_over=origin.passed_over,
        source=origin.converted,
        config=model.config,
        resolution=model.resolution,
        image_channels=model.image_channels,
        latent_dim=getattr(model, "latent_dim", None),
        num_classes=model.num_classes,
        parameters=sum(p.numel() for p in model.parameters()),
        dtypes=tuple(sorted({str(t.dtype).removeprefix("torch.") for t in written.state.values()})),
        missing=tuple(missing),
        unexpected=tuple(unexpected),
        wrong=tuple(wrong.values()),
    )


def _miner(state: Mapping) -> str | None:
    keys = {str(k).removeprefix("module.") for k in state}
    return next((kind for key, kind in MINERS.items() if key in keys), None)


def _kind(key: str, value) -> str:
    """A few words for a value that lies beside the networks."""
    if isinstance(value, Tensor):
        return f"tensor {list(value.shape)}"
    if isinstance(value, Mapping):
        if {"param_groups", "state"} <= value.keys() or (not value and key.endswith("_optim")):
            return "optimizer"
        if miner := _miner(value):
            return miner
        tensors = sum(isinstance(v, Tensor) for v in value.values())
        return f"{tensors} tensors" if tensors else f"{len(value)} entries"
    if isinstance(value, Thing):
        return f"object of {value.name}, not read"
    if isinstance(value, (str, float, bool, type(None))) or (isinstance(value, int) and abs(value) < 2**63):
        return repr(value)[:60]
    return f"{type(value).__name__}"
