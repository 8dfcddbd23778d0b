"""A miner's file."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from .._files import save_tensors
from .miner import Miner

FORMAT = "minegan_fast.miner"


def save_miner(path: str | Path, miner: Miner) -> None:
    """The miner as safetensors, with its constructor's arguments in the metadata."""
    save_tensors(path, miner.state_dict(), {"format": FORMAT, "config": json.dumps(miner.config)})


def load_miner(path: str | Path) -> Miner:
    """The miner in a file written by a run. ValueError: another file."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no miner at {path}; a run keeps its own as last/miner.safetensors")
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("format") != FORMAT:
                raise ValueError(f"{path} holds no miner of this project")
            miner = Miner(**json.loads(file.metadata()["config"]))
            miner.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a miner's file: {error}") from None
    return miner.eval()
