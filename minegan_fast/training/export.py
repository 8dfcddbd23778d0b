"""A run's result as the files of another program."""

import copy
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from ..files.atomic import atomic_path
from ..mining import Mined, Miner, MultiGenerator, project, save_miner
from ..mining.prior import on_sphere
from ..models import (
    BigGANDiscriminator,
    BigGANGenerator,
    StyleGAN2Discriminator,
    StyleGAN2Generator,
    export_biggan,
    export_nvidia,
    export_rosinality,
    has_discriminator,
    load_discriminator,
    save_model,
)
from .critics import check_fit, new_critic
from .folder import RunFolder
from .miners import branches
from .results import open_result

PROGRAMS = ("rosinality", "nvidia", "biggan", "safetensors")
_TAKES = {
    "rosinality": (StyleGAN2Generator, StyleGAN2Discriminator),
    "nvidia": (StyleGAN2Generator, StyleGAN2Discriminator),
    "biggan": (BigGANGenerator, BigGANDiscriminator),
}


def export_run(run: str | Path, out: str | Path, to: str, which: str = "best") -> tuple[list[Path], list[str]]:
    """Writes a result to the folder `out` for another program: (files, what a user should know of them).

    to: "rosinality" (`network.pt`, for stylegan2-pytorch), "nvidia" (`network.pkl`, which their programs for PyTorch
        convert when they load it), "biggan" (a folder for BigGAN-PyTorch), or "safetensors" (this project's own).
    which: "best", "last" or "mined".

    A program's generator takes z, and the adapted one u: the miner comes between. A linear one behind the mapping
    network, and a mined constant, become a part of the network's own weights, which is exact. Any other miner is
    written beside it: `miner.safetensors`, and `miner.pt`, a TorchScript program of u that needs no library.

    Of several sources each has a folder of its own. ValueError: an unknown program, a network that it does not have, a
    run of a module; and as in `open_result`.
    """
    if to not in PROGRAMS:
        raise ValueError(f"to must be one of {', '.join(PROGRAMS)}, got {to!r}")
    sampler, out = open_result(run, which, "cpu"), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    if not isinstance(sampler, MultiGenerator):
        return _export(sampler, out, to, _critic(run, sampler))
    files, notes = [], []
    for name, branch in zip(sampler.names, branches(sampler), strict=True):
        (out / name).mkdir(exist_ok=True)
        written, said = _export(branch, out / name, to, _critic(run, branch))
        files += written
        notes += [f"{name}: {note}" for note in said]
    return files, notes


def _export(mined: Mined, out: Path, to: str, critic: nn.Module | None) -> tuple[list[Path], list[str]]:
    generator: Any = copy.deepcopy(mined.generator)
    notes: list[str] = []
    if mined.place == "w" and mined.class_miner is not None:
        raise ValueError("w behind a mined class is of no other program: sample the run itself, or mine z (--mine z)")
    if to in _TAKES and not isinstance(generator, _TAKES[to][0]):
        fits = [name for name, (kind, _) in _TAKES.items() if isinstance(generator, kind)]
        family = getattr(generator, "family", type(generator).__name__)
        raise ValueError(f"{to} has no {family}: take {' or '.join([*fits, 'safetensors'])}")
    if mined.constant is not None:
        with torch.no_grad():
            generator.learned_constant.copy_(mined.constant)
        notes.append("the mined constant is the network's own now")
    judge: Any = critic
    if to in _TAKES and not isinstance(judge, _TAKES[to][1]):
        judge = new_critic(generator, 0)
        notes.append("the discriminator is new and untrained: the run has none of its source")
    folded = _fold(generator, mined)
    if to == "rosinality":
        files = [export_rosinality(out / "network.pt", generator, judge)]
    elif to == "nvidia":
        files = [export_nvidia(out / "network.pkl", generator, judge)]
    elif to == "biggan":
        files = export_biggan(out, generator, judge)
    else:
        files = [save_model(out / "network.safetensors", generator, judge)]
    if folded:
        notes.append("the miner is a part of the network: its inputs are ordinary z")
        return files, notes
    save_miner(out / "miner.safetensors", mined)
    with torch.no_grad(), atomic_path(out / "miner.pt") as temporary:
        program: Any = torch.jit.trace(_Miners(mined).eval(), torch.zeros(2, cast(Miner, mined.miner).input_dim))
        program.save(str(temporary))
    takes, gives = ("w", "the w to take in its place") if mined.place == "w" else ("u", "z")
    if mined.class_miner is not None:
        gives = "(z, class embedding)"
    notes.append(
        f"the miner is no layer of that network, and lies beside it: torch.jit.load('miner.pt')({takes}) gives {gives}"
        f"{', u being normal' * (takes == 'u')}"
    )
    return [*files, out / "miner.safetensors", out / "miner.pt"], notes


class _Miners(nn.Module):
    """u -> z, or (z, class embedding), or w -> w, in PyTorch's own operations and without checks."""

    def __init__(self, mined: Mined):
        super().__init__()
        classes = [] if mined.class_miner is None or mined.place == "w" else [mined.class_miner]
        self.miners, self.sphere = nn.ModuleList([mined.miner, *classes]), on_sphere(mined.prior)

    def forward(self, u):
        miners = [cast(Miner, m) for m in self.miners]
        made = [m.layers(u) if m.skip is None else m.skip(u) + m.layers(u) for m in miners]
        if self.sphere:
            made[0] = project(made[0], "sphere")
        return made[0] if len(made) == 1 else tuple(made)


def _fold(generator: nn.Module, mined: Mined) -> bool:
    """Makes a miner that is a linear map of w a part of the layers that read w. Whether it could be: before the mapping
    network z is normalised, and the layers of a deeper miner are none of that network."""
    miner = mined.miner
    if mined.place != "w" or not isinstance(generator, StyleGAN2Generator) or not isinstance(miner, Miner):
        return False
    if miner.config["depth"] > 1 and miner.config["activation"] != "linear":
        return False
    with torch.no_grad():
        zero = torch.zeros(1, generator.style_dim, dtype=torch.float64)
        exact = copy.deepcopy(miner).double()
        b = exact(zero)[0]
        A = exact(torch.eye(generator.style_dim, dtype=torch.float64)).T - b[:, None]  # w' = A w + b
        for name, module in generator.named_modules():
            if name.endswith("modulation"):
                layer: Any = module
                W = layer.weight.double()
                layer.bias.add_((W @ b * layer.scale).to(layer.bias.dtype))
                layer.weight.copy_((W @ A).to(layer.weight.dtype))
    return True


def _critic(run: str | Path, mined: Mined) -> nn.Module | None:
    """The discriminator that the run keeps of its source and that judges images of this generator."""
    for path in sorted(RunFolder(run).source.glob("*.safetensors")):
        if has_discriminator(path):
            critic = load_discriminator(path)
            try:
                check_fit(mined.generator, critic)
            except ValueError:
                continue
            return critic
    return None
