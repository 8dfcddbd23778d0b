"""The files of a result: of one source generator, miner and delta; of several a folder for each, and their shares."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from ..files.atomic import atomic_path
from ..finetune import SparseFinetuner
from ..mining import MultiGenerator, load_mined, save_miner
from ..mining.offload import Transfers
from .folder import DELTA, write_generator
from .generators import Several, networks
from .miners import Network, branches

SHARES = "shares.json"
LARGEST = 1 << 14  # pixels of a side


def write_result(
    folder: Path, sampler: Network, source: nn.Module, finetuner: SparseFinetuner | None, interval: list | None = None
) -> None:
    """Writes what `read_result` reads, and the deltas.

    source: the generator as it was before the run. interval: of each share.
    """
    several = isinstance(source, Several)
    for i, (branch, before) in enumerate(zip(branches(sampler), networks(source), strict=True)):
        own = folder / source.names[i] if several else folder
        own.mkdir(exist_ok=True)
        (own / DELTA).unlink(missing_ok=True)  # one that stayed would lie beside a generator that it is not of
        write_generator(own / "generator.safetensors", branch.generator)
        save_miner(own / "miner.safetensors", branch)
        if finetuner is not None:
            part = (f"generators.{i}", before) if several else None
            finetuner.save_delta(own / DELTA, ema=True, part=part)
    if several:
        p = cast(MultiGenerator, sampler).probabilities.tolist()
        found = {"names": source.names, "p": p, "interval": interval, "resize": source.resize}
        with atomic_path(folder / SHARES) as temporary:
            temporary.write_text(json.dumps(found, indent=2) + "\n")


def read_result(
    folder: Path,
    generator: Callable[[Path, int], nn.Module],
    device: torch.device | None = None,
    sleep: Transfers | None = None,
) -> Network:
    """The sampler of a result, on the device; None: on the CPU. generator: (file, number of the source) -> what is in
    the file. sleep: where generators sleep, of several sources; None: they are on the device."""

    def read(folder: Path, i: int):
        network = generator(folder / "generator.safetensors", i)
        mined = load_mined(folder / "miner.safetensors", network).to(device)
        if sleep:
            network.to("cpu")
        return mined

    if not (folder / SHARES).is_file():
        return read(folder, 0)
    names, p, resize, _ = read_shares(folder / SHARES)
    mined = [read(folder / name, i) for i, name in enumerate(names)]
    found = MultiGenerator([m.generator for m in mined], mined, resize=resize, names=names, offload=sleep)
    found.take(p)
    return found.eval()


class Shares(NamedTuple):
    """Of several sources. p: float64 [K]. interval: float64 [K, 2], or None. resize: of the images, or None."""

    names: list[str]
    p: Tensor
    resize: int | None
    interval: Tensor | None


def read_shares(path: Path) -> Shares:
    """What `write_result` wrote as `shares.json`. ValueError: the file is damaged."""
    try:
        shares = json.loads(path.read_bytes())
        names, p = shares["names"], torch.tensor(shares["p"], dtype=torch.float64)
        resize = shares["resize"]
        if resize is not None and not (type(resize) is int and 0 < resize <= LARGEST):
            raise ValueError(f"resize is {resize}")
        plain = all(isinstance(name, str) and name == Path(name).name != ".." for name in names)
        if not plain or p.shape != (len(names),) or not (p.isfinite().all() and (p >= 0).all() and p.sum() > 0):
            raise ValueError("names and shares do not fit")
        if (interval := shares.get("interval")) is not None:
            interval = torch.tensor(interval, dtype=torch.float64)
            if interval.shape != (len(names), 2):
                raise ValueError("names and intervals do not fit")
        return Shares(names, p, resize, interval)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{path} is damaged ({reason}): write the result again, or copy it again") from None
