"""A run's inputs when their paths no longer hold: found beside the run, or in what the run keeps of them."""

from pathlib import Path
from typing import Any

from ..models import save_model
from .config import PATHS
from .folder import RunFolder
from .generators import Several, networks
from .names import short_names
from .prepared import Prepared
from .sources import listed


def keep_source(folder: RunFolder, prepared: Prepared) -> None:
    """Writes the networks that the run read from files, as they were, to the folder's `source/`. Modules are the
    user's, and a critic that was given is in a file of its own."""
    config = prepared.config
    sources = listed(config.source)
    critic = prepared.judging if hasattr(prepared.judging, "family") else None
    folder.source.mkdir(exist_ok=True)
    if critic is not None and config.critic is not None:
        save_model(folder.source / "critic.safetensors", critic)
        critic = None
    names = prepared.source.names if isinstance(prepared.source, Several) else []
    for i, (path, network) in enumerate(zip(sources, networks(prepared.source), strict=True)):
        if path is not None and hasattr(network, "family"):
            name = names[i] if names else short_names([path])[0]
            save_model(folder.source / f"{name}.safetensors", network, critic)
            critic = None  # the first source has it


def located(folder: RunFolder, settings: dict[str, Any]) -> dict[str, Any]:
    """A run's settings with paths that exist: as they are stored, else the same tail of the path beside the run or
    above it, else, of networks, the run's own copies. A path that is nowhere stays as it is.

    Whether what is found there is what the run began with is for the run to check: it knows the contents.
    """
    found = dict(settings)
    for name in PATHS:
        if isinstance(value := settings.get(name), str):
            found[name] = _found_again(folder, value)
    sources = settings.get("source")
    if isinstance(sources, str) and not Path(found["source"]).exists():
        found["source"] = _own(folder, short_names([sources])[0]) or sources
    elif isinstance(sources, list) and None not in sources:
        again = [_found_again(folder, path) for path in sources]
        own = [_own(folder, name) for name in short_names(sources)]
        found["source"] = [a if Path(a).exists() else o or a for a, o in zip(again, own, strict=True)]
        if short_names(found["source"]) != short_names(sources) and all(own):
            found["source"] = own  # names that folders and columns already have
    critic = settings.get("critic")
    if isinstance(critic, str) and critic != "features" and not Path(found["critic"]).exists():
        found["critic"] = _own(folder, "critic") or critic
    return found


def _found_again(folder: RunFolder, path: str) -> str:
    parts = Path(path).parts[1:]
    if not Path(path).is_absolute() or Path(path).exists():
        return path
    for above in folder.path.resolve().parents:
        for tail in range(len(parts), 0, -1):
            if (candidate := above.joinpath(*parts[-tail:])).exists():
                return str(candidate)
    return path


def _own(folder: RunFolder, name: str) -> str | None:
    path = folder.source / f"{name}.safetensors"
    return str(path.resolve()) if path.is_file() else None
