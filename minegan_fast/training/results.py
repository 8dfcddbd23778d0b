"""An adapted GAN from its files, and how good it is."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..files import hub
from ..finetune import load_delta
from ..finetune.delta import DELTA, is_delta
from ..mining import Mined, MultiGenerator, load_mined
from ..mining.checkpoint import LARGEST, MINER, has_miner, with_weights
from ..models import load_discriminator, load_generator
from .config import TransferConfig, load_config
from .drawing import bare, is_bare
from .evaluation import MEASURES, choose_features, generate, intervals, judge_name, measure
from .folder import RESULTS, RunFolder
from .generators import Several, as_generator, image_channels
from .images import load_images
from .miners import Network, branches, new_mined
from .moved import located
from .result_files import SHARES, read_result
from .sources import Checkpoints, choose_device, listed, source_critic


class IsModuleError(ValueError):
    """A result's generator is a module of the user's own, which only they can build."""


def open_result(
    path: str | Path,
    which: str = "best",
    device: str | None = None,
    source=None,
    miner=None,
    checkpoints: Checkpoints | None = None,
    labels: Sequence[int] = (),
) -> Network:
    """The sampler of a result; of a run with several sources a `MultiGenerator`.

    path: a run's folder, of a run on modules with these as `source`, in their order; a delta file, which needs its
        `source` and takes `miner` or the miner's file beside it; a checkpoint with a miner: a training file of the
        original MineGAN (for BigGAN the folder with G.pth and M.pth), or any checkpoint with `miner`; or a checkpoint
        without one, whose own images it then gives (`drawing.bare`). Or a place on the Hub: `hf://user/name`, with a
        source a delta and without one a network, each with its miner, or `hf://user/name/file`, any checkpoint.
    labels: of which classes, for a checkpoint without a miner alone; none: of all.
    checkpoints: reads the files, and keeps what it read for the caller.

    ValueError/FileNotFoundError: no run there, none of that name, a delta without its source, no miner;
    labels where the class is mined.
    """
    where, checkpoints = choose_device(device), checkpoints or Checkpoints()
    if hub.is_named(path):
        path, miner = _from_hub(path, source, miner)
    path = Path(path)
    if path.suffix == ".safetensors" and not path.exists():
        raise FileNotFoundError(f"no file at {str(path)!r}: check the path; results from before stage 2 have no delta")
    if path.is_file() and source is not None:
        generator = source if isinstance(source, nn.Module) else load_generator(checkpoints.open(source))
        load_delta(generator, path)
        beside = path.with_name("miner.safetensors")
        # Without a miner's file the miners are those before the first step.
        found = miner or beside.exists()
        mined = (
            load_mined(miner or beside, generator) if found else new_mined(TransferConfig(), as_generator(generator))
        )
    elif path.is_file() or _is_folder_of_networks(path):
        mined = _of_checkpoint(path, miner, checkpoints, labels)
    else:
        if which not in RESULTS:
            raise ValueError(f"which must be one of {', '.join(RESULTS)}, got {which!r}")
        folder = getattr(RunFolder(path), which)
        if not any((folder / name).is_file() for name in ("generator.safetensors", SHARES)):
            raise FileNotFoundError(f"no {which} result in {str(path)!r}: give the folder that transfer wrote")
        mined = read_result(folder, _reader(path, source))
    if labels and not is_bare(mined):
        raise ValueError("the classes of this result are mined: --class is for a checkpoint's own images")
    return mined.to(where).eval()


def _reader(path: Path, source) -> Callable[[Path, int], nn.Module]:
    """(a file of a run, number of its source) -> the generator in it; of a module that one, with the file's weights.

    ValueError: the run is on others than are given.
    """
    given = [one for one in ([] if source is None else listed(source)) if isinstance(one, nn.Module)]
    config = load_config(path) if RunFolder(path).config.is_file() else {}
    sources = listed(config.get("source", ""))
    numbers = [i for i, one in enumerate(sources) if one is None]
    if len(given) == len(sources) == 1:  # of a checkpoint too, whose weights are then shown by a class of the user's
        numbers = [0]
    if given and len(given) != len(numbers):
        raise ValueError(
            f"{len(numbers)} of the {len(sources)} sources of the run in {str(path)!r} are modules, and {len(given)} "
            "are given: give each once, in the order of the run's sources"
        )
    own = dict(zip(numbers, given, strict=False))

    def read_generator(file: Path, i: int) -> nn.Module:
        if i in own:
            return with_weights(own[i], file)
        try:
            return load_generator(file)
        except ValueError:  # those of a class of `models` are read without
            if i not in numbers:
                raise
            which = "the generator" if len(sources) == 1 else f"source {i + 1} of {len(sources)}"
            raise IsModuleError(
                f"{which} of the run in {str(path)!r} is a module of yours: name the function that builds it (--source "
                "FILE.py:FUNCTION; of several modules once for each, in their order), or in Python "
                + _in_python(path, len(sources))
            ) from None

    return read_generator


def _in_python(path: Path, sources: int) -> str:
    if sources == 1:
        return f"minegan_fast.load_mined({str(path)!r}, module).sample(16) shows what the run made of it"
    return "the result of transfer(..., resume=True) samples from it"


def _from_hub(path: str | Path, source, miner) -> tuple[Path, Any]:
    """(file, miner) of what was shared as `hf://user/name`, or of the file that is named there."""
    if hub.parse(path).is_file():
        return hub.local(path, ""), miner
    if miner is None:
        miner = hub.local(path, MINER, LARGEST)
    try:
        return hub.local(path, DELTA if source is not None else "generator.safetensors"), miner
    except FileNotFoundError:
        way = "it may be a whole network, so leave --source out" if source is not None else "--source names its base"
        raise FileNotFoundError(f"{str(path)!r} has no {'delta' if source is not None else 'network'}: {way}") from None


def _is_folder_of_networks(path: Path) -> bool:
    """Whether it is a folder with a checkpoint in several files, rather than that of a run."""
    return path.is_dir() and not any((path / name).is_dir() for name in RESULTS) and any(path.glob("*.*"))


def _of_checkpoint(path: Path, miner, checkpoints: Checkpoints, labels: Sequence[int]) -> Mined:
    if path.is_file() and is_delta(path):
        raise ValueError(f"{path} is a delta: name the checkpoint that it was trained from with --source")
    contents = checkpoints.open(path)
    generator = load_generator(contents)
    if miner is None and not has_miner(contents):
        return bare(generator, labels)
    try:
        return load_mined(miner or contents, generator)
    except ValueError as error:
        raise ValueError(f"{error}; name the file of the miner with --miner") from None


def _paths(source) -> list[str | Path]:
    return [one for one in (listed(source) if source else []) if isinstance(one, (str, Path))]


@torch.no_grad()
def evaluate_result(
    path, which, device, source, miner, images, samples: int, features, seed: int, with_intervals: bool = False
) -> dict:
    """Metrics of an adapted GAN against a folder: {"metrics": {...}, "generated", "real", "features", "seed", "notes"}.

    images: also a tensor of them. notes: the warnings of the metrics, in which x are the generated images and y the
    real ones. with_intervals: also "intervals", of which each takes as many evaluations as there are images.
    """
    checkpoints = Checkpoints()
    sampler = open_result(path, which, device, source, miner, checkpoints)
    names = sampler.names if isinstance(sampler, MultiGenerator) else []
    generator = as_generator(branches(sampler)[0].generator)
    resize = sampler.resize if isinstance(sampler, MultiGenerator) else None
    resolution = generator.resolution if resize is None else resize[0]
    real = load_images(images, resolution, image_channels(generator)).images
    critic = config = None
    if RunFolder(path).config.is_file():
        config = TransferConfig(**located(RunFolder(path), load_config(path)))
        features = features or config.features
        if config.critic and config.critic != "features":
            critic = load_discriminator(checkpoints.open(config.critic))
    if critic is None and features in (None, "critic"):
        named = _paths(source) or _paths(config and config.source)
        files = [checkpoints.open(one) for one in named]
        if files:
            made = [b.generator for b in branches(sampler)]
            critic, _ = source_critic(files, Several(made, names, resolution) if len(made) > 1 else made[0])
    checkpoints.clear()  # the networks have the weights
    extractor = choose_features(features, critic, real, next(generator.parameters()).device)
    fake = generate(sampler, samples, seed)
    notes: list[str] = []
    judge = extractor.name
    if config is not None:
        loss_choice = (config.loss_features or "critic") if config.kernel else None
        judge = judge_name(extractor, features, loss_choice, config.adversarial)
        if judge != extractor.name:
            notes.append("the network that judges trained the run too, so its numbers flatter: judge with another")
    x, y = extractor(fake), extractor(real)
    values = measure(x, y, MEASURES, notes)
    report = {
        "metrics": values,
        "generated": len(fake),
        "real": len(real),
        "features": judge,
        "seed": seed,
        "notes": notes,
    }
    return report | ({"intervals": intervals(x, y, values)} if with_intervals else {})
