"""Files of miners: this project's, and those of the original code."""

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from ..files import hub
from ..files.atomic import save_tensors
from ..files.reading import Contents, read
from .bank import MinerBank
from .mined import Mined
from .miner import Miner
from .originals import find_original

FORMAT = "minegan_fast.miner"
MINER = "miner.safetensors"  # its name in a folder, here and on the Hub
LARGEST = 1 << 30  # bytes of a miner's file on the Hub


def save_miner(path: str | Path, miner: Miner | Mined | MinerBank) -> None:
    """Writes a miner or a bank of them as safetensors, with its constructor's arguments in the metadata.

    Of a `Mined` it writes everything but the generator: the miner, the class miner, the learned constant, the place
    where the miner acts, and the prior.
    """
    mined = miner if isinstance(miner, Mined) else None
    of_latent = miner if mined is None else mined.miner
    tensors, metadata = of_latent.state_dict(), {"format": FORMAT, "config": json.dumps(of_latent.config)}
    if isinstance(miner, MinerBank):
        metadata["miners"] = str(len(miner))
    if mined:
        metadata |= {"place": mined.place, "prior": mined.prior}
        if mined.class_miner is not None:
            metadata["class_config"] = json.dumps(mined.class_miner.config)
            tensors |= {f"class_miner.{name}": tensor for name, tensor in mined.class_miner.state_dict().items()}
        if mined.constant is not None:
            tensors["constant"] = mined.constant
    save_tensors(path, tensors, metadata)


def load_miner(path: str | Path | Contents) -> Miner:
    """The miner of the latent from a file of a run, or of the original MineGAN code: a StyleGAN or StyleGAN2 training
    file, BigGAN's M.pth, or its folder. Or from what was read of one.

    FileNotFoundError/ValueError: there is no such file, or it is of another kind.
    """
    return _miners(_read(path))[0]


def load_bank(path: str | Path | Contents) -> MinerBank:
    """The bank of miners that `save_miner` wrote, in eval mode; from the file of a single miner a bank of one.

    FileNotFoundError/ValueError: as in `load_miner`.
    """
    contents = _read(path)
    if contents.metadata.get("format") != FORMAT or "miners" not in contents.metadata:
        return MinerBank.of([_miners(contents)[0]]).eval()
    with _named(contents):
        n, config = int(contents.metadata["miners"]), json.loads(contents.metadata["config"])
        _check_sizes(config, {name: tensor[0] for name, tensor in contents.data.items()})
        if any(len(tensor) != n for tensor in contents.data.values()):
            raise ValueError(f"it is said to hold {n} miners, and its tensors are of others")
        bank = MinerBank(n, **config)
        bank.load_state_dict(dict(contents.data))
        return bank.eval()


def load_mined(path: str | Path | Contents, generator: nn.Module) -> Mined:
    """`generator` behind all the miners that the file holds, in eval mode.

    path: also a place on the Hub, `hf://user/name`, of which `miner.safetensors` is read (`files.hub`). Also the folder
        of a run: then a copy of `generator`, which is a network of the same class as the run's, gets the weights of its
        best result.

    `originals` says what the files of the original code hold. Where the file names no prior, it is "none".

    ValueError: as in `load_miner`, or miners or weights do not fit the generator.
    """
    if not isinstance(path, Contents):
        path = hub.local(path, MINER, LARGEST)
        if (best := path / "best" / MINER).is_file():
            generator = with_weights(generator, best.with_name("generator.safetensors"))
            path = best
    contents = _read(path)
    miners = _miners(contents)
    try:
        return Mined(generator, *miners).eval()
    except ValueError as error:
        raise ValueError(f"the miner in {contents.path} does not fit the generator: {error}") from None


def with_weights(generator: nn.Module, path: Path) -> nn.Module:
    """A copy of the generator with the weights in a run's file. ValueError: they are of another one."""
    weights = read(path).data
    if weights.keys() != generator.state_dict().keys():  # networks of `models` are kept beside their critics
        weights = {name.removeprefix("generator."): tensor for name, tensor in weights.items()}
    generator = copy.deepcopy(generator)
    try:
        generator.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{str(path)!r} was made with another generator: {reason}") from None
    return generator


def has_miner(contents: Contents) -> bool:
    """Whether the file holds a miner, be it damaged."""
    try:
        return contents.metadata.get("format") == FORMAT or find_original(contents.data) is not None
    except (KeyError, ValueError, TypeError, IndexError, RuntimeError):
        return True


def _read(path: str | Path | Contents) -> Contents:
    if not isinstance(path, Contents) and not Path(path).exists():
        raise FileNotFoundError(f"no miner at {path}; a run keeps its own as last/miner.safetensors")
    return read(path)


def _miners(contents: Contents) -> tuple[Miner, Miner | None, str, Tensor | None, str]:
    """(miner, class miner, place, constant, prior): what `Mined` takes after the generator."""
    path = contents.path
    if contents.metadata.get("format") == FORMAT:
        return _own(contents)
    try:
        found = find_original(contents.data)
    except KeyError as error:
        raise ValueError(f"{path} holds a miner of the original MineGAN that lacks {error}") from None
    except (ValueError, TypeError, IndexError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} holds a miner of the original MineGAN that is not whole: {reason}") from None
    if found is None:
        raise ValueError(f"{path} holds no miner; a run keeps its own as last/miner.safetensors")
    miner, class_miner, constant = found
    return miner, class_miner, "z", constant, "none"


@contextmanager
def _named(contents: Contents) -> Iterator[None]:
    """Says of what is wrong with the file's contents which file it is."""
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError, OverflowError, ValueError, RuntimeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{contents.path}: the miner in it is damaged ({reason}); write it again") from None


def _check_sizes(config: dict, tensors: Mapping[str, Tensor]) -> None:
    """ValueError: the arguments are of a miner of other sizes. No layer is made that the tensors would not fill."""
    if (layers := config.get("depth", 2)) > len(tensors):
        raise ValueError(f"it is said to have {layers} layers, and there are {len(tensors)} tensors")
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Miner(**config).state_dict().items()}
    if shapes != {name: tensor.shape for name, tensor in tensors.items()}:
        raise ValueError("its tensors are not those of a miner of the sizes that it is said to have")


def _built(config: dict, tensors: Mapping[str, Tensor]) -> Miner:
    _check_sizes(config, tensors)
    miner = Miner(**config)
    miner.load_state_dict(tensors)
    return miner


def _own(contents: Contents) -> tuple[Miner, Miner | None, str, Tensor | None, str]:
    tensors, metadata = dict(contents.data), contents.metadata
    if "miners" in metadata:
        raise ValueError(f"{contents.path} holds a bank of {metadata['miners']} miners: take load_bank")
    with _named(contents):
        constant = tensors.pop("constant", None)
        of_class = {name: tensors.pop(name) for name in list(tensors) if name.startswith("class_miner.")}
        miner, class_miner = _built(json.loads(metadata["config"]), tensors), None
        if "class_config" in metadata:
            of_class = {name.partition(".")[2]: tensor for name, tensor in of_class.items()}
            class_miner = _built(json.loads(metadata["class_config"]), of_class).eval()
        return miner.eval(), class_miner, metadata.get("place", "z"), constant, metadata.get("prior", "none")
