"""Files on the Hugging Face Hub, by its own client, which is optional: `hf://user/name` read, a folder published."""

import importlib
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

from .lines import one_line

CLIENT = "huggingface_hub"
MOST = 16 << 30  # bytes of a file that is read without knowing the network it is for
_NAME = r"[A-Za-z0-9_](?:[\w.-]*[A-Za-z0-9_])?"
_REPO = re.compile(rf"{_NAME}/{_NAME}", re.ASCII)
_URI = re.compile(
    r"hf://(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>refs/(?:pr|convert)/[^/@]+|[^/@]+))?(?:/(?P<path>.+))?"
)
_FILES = (".safetensors", ".pt", ".pth", ".pkl", ".bin", ".ckpt", ".model", ".tar")


class Place(NamedTuple):
    """A repository of models, a branch, tag or commit of it (None: main), and a file or folder in it ("": all)."""

    repo: str
    revision: str | None
    path: str

    def is_file(self) -> bool:
        """Whether the path is one of a file, by its suffix."""
        return self.path.endswith(_FILES)

    def file(self, name: str) -> str:
        """The file that is named, or `name` in the folder that is."""
        if self.is_file():
            return self.path
        return f"{self.path}/{name}" if self.path else name


def is_named(path: Any) -> bool:
    """Whether that is a place on the Hub and no path here."""
    return isinstance(path, (str, Path)) and str(path).startswith("hf:/")


def _written(path: str | Path) -> str:
    """As it was written: a Path makes one slash of two."""
    return re.sub("^hf:/(?!/)", "hf://", str(path))


def parse(text: str | Path) -> Place:
    """The place that `hf://user/name`, `hf://user/name@revision` or `hf://user/name/path/in/it` names.

    A slash in a revision is written %2F, but for refs/pr/1. ValueError: another form.
    """
    text = _written(text)
    match = _URI.fullmatch(text)
    if match is None:
        raise ValueError(
            f"{text!r} names no place on the Hub: write hf://user/name, with @revision and /path/in/it where needed"
        )
    path, revision = (match["path"] or "").rstrip("/"), unquote(match["revision"] or "") or None
    if path and ("\\" in path or any(part in ("", ".", "..") for part in path.split("/"))):
        raise ValueError(f"{text!r} names no file on the Hub: {path!r} is no path in a repository")
    return Place(check_repo(match["repo"]), revision, path)


def check_repo(repo: str) -> str:
    """The name of a repository. ValueError: it can be none."""
    if not _REPO.fullmatch(repo) or "--" in repo or ".." in repo or repo.endswith(".git") or len(repo) > 96:
        raise ValueError(
            f"{repo!r} can be no repository on the Hub: its name is USER/NAME, of letters, digits, '_', '-' and '.'"
        )
    return repo


def client() -> Any:
    """huggingface_hub. ImportError: it is not installed."""
    try:
        for part in (".constants", ".errors"):  # it loads them when they are asked for
            importlib.import_module(CLIENT + part)
        return importlib.import_module(CLIENT)
    except ImportError as error:
        raise ImportError(
            f"the Hub needs {CLIENT}, which is not here ({error}): pip install 'minegan_fast[hub]'"
        ) from None


def local(path: str | Path, name: str, most: int = MOST) -> Path:
    """A path here as it is; of a place on the Hub the file that it names, or `name` in its folder, downloaded to the
    client's cache.

    What is downloaded is data for this project's own readers. most: bytes that it may have, looked up before the
    download and after it. Where the Hub cannot be reached, what the cache has is taken, with a warning.

    Raises:
        ImportError: no huggingface_hub. ValueError: a place of another form, a file that is larger.
        FileNotFoundError: no such repository, revision or file, or one that the token does not see. PermissionError,
        ConnectionError.
    """
    if not is_named(path):
        return Path(path)
    place, path = parse(path), _written(path)
    hub, file = client(), place.file(name)
    try:
        with _explained(hub, place, file):
            url = hub.hf_hub_url(place.repo, file, revision=place.revision)
            about = hub.HfApi().get_hf_file_metadata(url=url)
        _check_size(path, file, about.size, most)
        with _explained(hub, place, file):
            found = hub.hf_hub_download(place.repo, file, revision=place.revision)
    except ConnectionError as error:
        found = hub.try_to_load_from_cache(place.repo, file, revision=place.revision)
        if not isinstance(found, str):
            raise
        warnings.warn(f"{error}; taken is what was downloaded of {path!r} before", stacklevel=2)
    _check_size(path, file, Path(found).stat().st_size, most)
    return Path(found)


def _check_size(path: str, file: str, size: int | None, most: int) -> None:
    if size is None:
        raise ValueError(f"the Hub does not say how large {file!r} of {path!r} is, so it was not downloaded")
    if size > most:
        raise ValueError(
            f"{file!r} of {path!r} has {size:,} bytes, and what it is to be has at most {most:,}: it is another "
            "file than you look for, or of a larger network"
        )


def logged_in() -> Any:
    """The client, which has a token. ImportError, PermissionError: it is not here, or has none."""
    hub = client()
    if not hub.get_token():
        raise PermissionError("you are not logged in to the Hub: run hf auth login, or set HF_TOKEN")
    return hub


def publish(folder: Path, repo: str, private: bool, message: str, stale: Sequence[str] = ()) -> str:
    """Commits the files of a folder to a repository of models, which is made if it is not there: its address.

    private: make it so; otherwise a new one is what the Hub makes by default. stale: patterns of files that are
    deleted in the same commit where the folder has none of their name. Nothing is asked: the token is the client's own
    (`hf auth login`, HF_TOKEN), and HF_ENDPOINT names another Hub.

    ImportError, PermissionError, ConnectionError; ValueError: the Hub refuses what is in the folder, or the repository
    is there already and public though `private`.
    """
    hub, place = logged_in(), Place(check_repo(repo), None, "")
    api = hub.HfApi(library_name="minegan_fast")
    with _explained(hub, place, ""):
        url = api.create_repo(repo, private=private or None, exist_ok=True)
        public = private and not api.model_info(repo).private
    if public:
        raise ValueError(
            f"{repo} is there already and public, so nothing was sent: make it private on its page, or leave --private "
            "out"
        )
    with _explained(hub, place, ""):
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message, delete_patterns=list(stale) or None)
    return str(url)


@contextmanager
def _explained(hub: Any, place: Place, file: str) -> Iterator[None]:
    """Says in this project's words what went wrong while the client was at work."""
    try:
        yield
    except Exception as error:  # whatever its transports raise; the client itself has dozens
        disk = isinstance(error, OSError) and type(error).__module__ == "builtins" and error.errno is not None
        if disk and not isinstance(error, (ConnectionError, TimeoutError)):
            raise
        if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
            error = error.__cause__  # "Error while uploading"
        raise _in_words(error, hub, place, file) from error


def _in_words(error: Exception, hub: Any, place: Place, file: str) -> Exception:
    errors, repo, where = hub.errors, place.repo, hub.constants.ENDPOINT
    status = getattr(getattr(error, "response", None), "status_code", 0)
    said = _one_line(getattr(error, "server_message", None) or str(error))
    if isinstance(error, errors.GatedRepoError):
        return PermissionError(f"{repo} is given on request only: ask for it on its page, {where}/{repo}")
    if isinstance(error, errors.RepositoryNotFoundError):
        seen = "the token here does not see it" if hub.get_token() else "you are not logged in (hf auth login)"
        return FileNotFoundError(f"{where} has no model {repo!r}, or it is private and {seen}: check the name")
    if isinstance(error, errors.RevisionNotFoundError):
        return FileNotFoundError(f"{repo!r} has no revision {place.revision!r}: it is a branch, a tag or a commit")
    if isinstance(error, errors.EntryNotFoundError) and status:
        return FileNotFoundError(
            f"{repo!r} has no file {file!r}: name the one you mean, hf://{repo}/path/in/it; {where}/{repo}/tree/main "
            "shows what is there"
        )
    if status == 401:
        return PermissionError("the Hub does not take the token: run hf auth login again, or set HF_TOKEN anew")
    if status == 403 and file:
        return PermissionError(f"the Hub does not give {file!r} of {repo!r} to you ({said})")
    if status == 403:
        return PermissionError(
            f"the token may not do that to {repo!r} ({said}): it needs the right to write, and USER must be you or an "
            "organisation of yours"
        )
    if (400 <= status < 500 and status != 429) or isinstance(error, ValueError):
        return ValueError(f"the Hub refused ({said})" + ("" if file else f"; no commit was made at {where}/{repo}"))
    return ConnectionError(f"the Hub at {where} does not answer, or broke off ({type(error).__name__}: {said})")


def _one_line(text: str) -> str:
    """What another machine says, no longer than an error may be."""
    return one_line(text)[:300]
