"""A generator of the user's own, named on the command line as FILE.py:FUNCTION."""

import hashlib
import importlib.util
import re
import sys
import traceback
from pathlib import Path

from torch import nn


def named_module(source: str | None):
    """The module that FUNCTION in FILE.py returns; any other text, a path, as it is.

    The file is executed, as `python FILE.py` would, its folder being first where modules are looked for. The function
    is called without arguments.

    FileNotFoundError: no such file. ValueError: the file or the function fails, it is not there, or it returns no
    module.
    """
    match = re.fullmatch(r"(.+\.py):([^/\\:]*)", source or "", re.DOTALL)
    if match is None:
        if source is not None and source.endswith(".py") and Path(source).is_file():
            raise ValueError(f"{source} is Python: name the function that returns the generator, {source}:FUNCTION")
        return source
    file, name = Path(match[1]), match[2]
    if not file.is_file():
        raise FileNotFoundError(f"no file {match[1]!r}: check the path before the colon of {source!r}")
    function = getattr(_executed(file), name, None)
    if not callable(function):
        raise ValueError(f"{file} has no function {name!r}: FILE.py:FUNCTION names one that returns the generator")
    try:
        module = function()
    except Exception as error:
        raise ValueError(f"{source} failed: {_told(error, file)}") from error
    if not isinstance(module, nn.Module):
        raise ValueError(
            f"{source} returned {type(module).__name__}, not a torch.nn.Module with latent_dim, resolution and "
            "forward(z)"
        )
    return module


def named_base(sources: list[str] | None):
    """What --source names for a result: nothing, one thing, or a module for each of several sources."""
    named = [named_module(one) for one in sources or []]
    return named if len(named) > 1 else next(iter(named), None)


def _executed(file: Path):
    # A name of its own for each path: files of one name in two folders are two modules.
    name = f"{file.stem}_{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ValueError(f"{file} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    if (folder := str(file.resolve().parent)) not in sys.path:
        sys.path.insert(0, folder)
    sys.modules[name] = module  # dataclasses and pickle look their module up
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise ValueError(f"{file} failed: {_told(error, file)}") from error
    return module


def _told(error: BaseException, file: Path) -> str:
    """The error in one line, with the last line of the file that led to it."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    where = f" (line {lines[-1]}; --debug shows all)" if lines else " (--debug shows all)"
    return f"{type(error).__name__}: {' '.join(str(error).split())}{where}"
