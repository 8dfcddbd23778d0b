"""A run's result as the files of another program."""

from pathlib import Path
from typing import TypeAlias, cast

import torch
from torch import nn

from ..files.atomic import atomic_folder, atomic_path
from ..files.reading import Contents
from ..mining import Mined, Miner, MultiGenerator, project, save_miner
from ..mining.prior import on_sphere
from ..models import has_discriminator, load_discriminator
from .drawing import is_bare
from .folder import RunFolder
from .miner_folding import fold
from .miners import branches, shares
from .programs import PROGRAMS, Program, program_of
from .randomness import keep_and_set_random_state
from .results import IsModuleError, open_result
from .sources import Checkpoints, listed

# (discriminator, where it comes from), best first; None: it is there and cannot be read.
Critics: TypeAlias = list[tuple[nn.Module | None, str]]


def export_run(
    run: str | Path, out: str | Path, to: str, which: str = "best", source=None, miner=None
) -> tuple[list[Path], list[str]]:
    """Writes a result to the folder `out` for another program: (files, what a user should know of them).

    run: a run's folder, or another result: a delta file with its `source`, a checkpoint of the original MineGAN, or
        any other checkpoint, which has no miner.
    out: a folder that is new or empty. Of several sources each has a folder of its own in it.
    to: "rosinality" (`network.pt` of a StyleGAN2 for stylegan2-pytorch, `network.model` of a StyleGAN for
        style-based-gan-pytorch), "nvidia" (`network.pkl`, which their programs for PyTorch convert when they load it),
        "biggan" (a folder for BigGAN-PyTorch), or "safetensors" (this project's own).
    which: "best", "last" or "mined", of a run's folder.
    source, miner: as in `minegan-fast sample`.

    A program's generator takes z, and the adapted one u: the miner comes between. What of it the generator can hold
    becomes a part of its weights, see `miner_folding`. Any other miner is written beside it: `miner.safetensors`, and
    `miner.pt`, a TorchScript program of u that needs no library.

    The discriminator is the run's own from its newest snapshot, else the source's, else, where the program needs one, a
    new one. The notes say which, and what was left out.

    Raises:
        ValueError: an unknown program, a network that it cannot hold, a run of a module; and as in `open_result`.
        FileExistsError: there is something in `out`.
        OSError: a file cannot be written.

    Whatever is raised, nothing is written.
    """
    if to not in PROGRAMS:
        raise ValueError(f"to must be one of {', '.join(PROGRAMS)}, got {to!r}")
    try:
        return _export_result(Path(run), Path(out), to, which, source, miner)
    except IsModuleError:
        raise ValueError(
            f"the run in {str(run)!r} is on a module of yours, which no other program has, and nothing was written: "
            f"minegan-fast sample {run} --source FILE.py:FUNCTION makes its images, and says without --source how "
            "Python does"
        ) from None


def _export_result(run: Path, out: Path, to: str, which: str, source, miner) -> tuple[list[Path], list[str]]:
    checkpoints = Checkpoints()
    sampler = open_result(run, which, "cpu", source, miner, checkpoints)
    critics = _critics(run, source, checkpoints)
    checkpoints.clear()
    files, notes = [], []
    with atomic_folder(out) as temporary:
        if not isinstance(sampler, MultiGenerator):
            files, notes = _export(sampler, temporary, to, critics)
        else:
            for name, branch, share in zip(sampler.names, branches(sampler), shares(sampler), strict=True):
                folder = temporary / name
                folder.mkdir()
                written, said = _export_source(name, branch, folder, to, critics)
                files += written
                notes += [f"{name}: {note}" for note in (*said, f"it makes {share:.1%} of the images")]
    return [out / file.relative_to(temporary) for file in files], notes


def _export_source(name: str, mined: Mined, out: Path, to: str, critics: Critics) -> tuple[list[Path], list[str]]:
    """`_export`, whose refusals name the source."""
    try:
        return _export(mined, out, to, critics)
    except IsModuleError:
        raise
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _export(mined: Mined, out: Path, to: str, critics: Critics) -> tuple[list[Path], list[str]]:
    """Writes one generator into an empty folder."""
    if mined.place == "w" and mined.class_miner is not None:
        raise ValueError("w behind a mined class is of no other program: sample the run itself, or mine z (--mine z)")
    generator, left = (mined.generator, None) if is_bare(mined) else fold(mined)
    program = program_of(to, generator)
    program.check(generator, left)
    critic, notes = _chosen(program, generator, critics)
    files = program.write(out, generator, critic)
    notes.insert(0, program.opened(generator))
    if mined.constant is not None:
        notes.append("the mined constant is the network's own now")
    if is_bare(mined):
        return files, notes
    if left is None:
        notes.append("the miner is a part of the network: its inputs are ordinary z")
        return files, notes
    notes.append(_write_miner(left, out))
    return [*files, out / "miner.safetensors", out / "miner.pt"], notes


def _chosen(program: Program, generator, critics: Critics) -> tuple[nn.Module | None, list[str]]:
    """The first discriminator that the program has beside the generator, else a new one, and what to say of it."""
    notes = []
    for critic, origin in critics:
        problem = "" if critic is None else program.why_not(critic, generator)
        if critic is not None and not problem:
            return critic, [*notes, f"the discriminator is {origin}"]
        notes.append(f"the discriminator is not {origin}{problem and ': ' + problem}")
    with keep_and_set_random_state(0, "critic"):
        critic = program.fresh(generator)
    return critic, notes + (["the discriminator is new and untrained"] if critic is not None else [])


def _write_miner(mined: Mined, out: Path) -> str:
    """Writes miners that the generator cannot hold; returns what to say of them."""
    save_miner(out / "miner.safetensors", mined)
    with torch.no_grad(), atomic_path(out / "miner.pt") as temporary:
        program = torch.jit.trace(_Miners(mined).eval(), torch.zeros(2, cast(Miner, mined.miner).input_dim))
        cast(torch.jit.ScriptModule, program).save(str(temporary))
    takes, gives = ("w", "the w to take in its place") if mined.place == "w" else ("u", "z")
    if mined.class_miner is not None and mined.place == "z":
        gives = "(z, class embedding)"
    return (
        f"the miner is no layer of that network, and lies beside it: torch.jit.load('miner.pt')({takes}) gives {gives}"
        f"{', u being normal' * (takes == 'u')}"
    )


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


def _critics(run: Path, source, checkpoints: Checkpoints) -> Critics:
    """What could stand beside the result: the run's own critic, and those of its sources."""
    folder, found = RunFolder(run), []
    restored = folder.load_snapshot() if folder.snapshots.is_dir() else None
    adversary = restored[1]["trainer"]["adversary"] if restored else None
    if restored and adversary:
        contents = Contents(run, {"discriminator": adversary["critic"]})
        if has_discriminator(contents):  # heads on features are none
            found.append((load_discriminator(contents), f"the run's own of step {restored[0]}"))
    sources = [run] if source is None else listed(source)
    if folder.source.is_dir() or folder.config.is_file():
        sources = sorted(folder.source.glob("*.safetensors"))
    for path in sources:
        if isinstance(path, nn.Module):
            continue
        origin = f"that of {Path(path).name}, which the run did not train"
        try:
            contents = checkpoints.open(path)
            if has_discriminator(contents):
                found.append((load_discriminator(contents), origin))
        except ValueError as error:  # the generator is here, and a new discriminator can stand beside it
            found.append((None, f"{origin}: {error}"))
    return found
