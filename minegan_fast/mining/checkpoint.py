"""Files of miners: this project's, and those of the original code."""

import json
from pathlib import Path

from torch import Tensor, nn

from ..files.atomic import save_tensors
from ..files.reading import Contents, read
from .mined import Mined
from .miner import Miner
from .originals import find_original

FORMAT = "minegan_fast.miner"


def save_miner(path: str | Path, miner: Miner | Mined) -> None:
    """Writes a miner as safetensors, with its constructor's arguments in the metadata; of a `Mined` all but the
    generator: miner, class miner, learned constant, where they act and the prior."""
    mined = miner if isinstance(miner, Mined) else None
    of_latent = miner if mined is None else mined.miner
    tensors, metadata = of_latent.state_dict(), {"format": FORMAT, "config": json.dumps(of_latent.config)}
    if mined:
        metadata |= {"place": mined.place, "prior": mined.prior}
        if mined.class_miner is not None:
            metadata["class_config"] = json.dumps(mined.class_miner.config)
            tensors |= {f"class_miner.{name}": tensor for name, tensor in mined.class_miner.state_dict().items()}
        if mined.constant is not None:
            tensors["constant"] = mined.constant
    save_tensors(path, tensors, metadata)


def load_miner(path: str | Path) -> Miner:
    """The latent's miner in a file: of a run, or of the original MineGAN code (a StyleGAN or StyleGAN2 training file,
    BigGAN's M.pth or its folder). FileNotFoundError/ValueError: no such file, another kind of file."""
    return _load(path)[0]


def load_mined(path: str | Path, generator: nn.Module) -> Mined:
    """`generator` behind all that the file of miners holds, in eval mode; see `originals` for what the original code's
    files hold. A file without a prior has none. ValueError: as `load_miner`, or the miners do not fit the generator."""
    parts = _load(path)
    try:
        return Mined(generator, *parts).eval()
    except ValueError as error:
        raise ValueError(f"the miner in {path} does not fit the generator: {error}") from None


def _load(path: str | Path) -> tuple[Miner, Miner | None, str, Tensor | None, str]:
    if not Path(path).exists():
        raise FileNotFoundError(f"no miner at {path}; a run keeps its own as last/miner.safetensors")
    contents = read(path)
    if contents.metadata.get("format") == FORMAT:
        return _own(contents)
    try:
        found = find_original(contents.data)
    except KeyError as error:
        raise ValueError(f"{path} holds a miner of the original MineGAN that lacks {error}") from None
    except ValueError as error:
        raise ValueError(f"{path} holds a miner of the original MineGAN that is not whole: {error}") from None
    if found is None:
        raise ValueError(f"{path} holds no miner; a run keeps its own as last/miner.safetensors")
    miner, class_miner, constant = found
    return miner, class_miner, "z", constant, "none"


def _own(contents: Contents) -> tuple[Miner, Miner | None, str, Tensor | None, str]:
    try:
        tensors, metadata = dict(contents.data), contents.metadata
        constant = tensors.pop("constant", None)
        of_class = {name: tensors.pop(name) for name in list(tensors) if name.startswith("class_miner.")}
        miner, class_miner = Miner(**json.loads(metadata["config"])), None
        miner.load_state_dict(tensors)
        if "class_config" in metadata:
            class_miner = Miner(**json.loads(metadata["class_config"]))
            class_miner.load_state_dict({name.partition(".")[2]: tensor for name, tensor in of_class.items()})
            class_miner.eval()
        return miner.eval(), class_miner, metadata.get("place", "z"), constant, metadata.get("prior", "none")
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{contents.path}: the miner in it is damaged ({reason}); write it again") from None
