"""Pictures as data: URIs, all of them together within a size."""

import base64
import io
import warnings
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

SIDES = (1024, 768, 512, 384, 256, 128)  # tried in turn
EXACT = SIDES[0] ** 2  # pixels of a picture that may stay what it is


def opened(file: Path) -> Image.Image | None:
    """The picture, of at most 1024 x 1024 pixels. None: what is there is no picture, or one too large to be opened."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(file) as picture:
                found = picture.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None
    return found if found.width * found.height <= EXACT else _within(found, SIDES[0])


def encoded(pictures: Sequence[Image.Image], budget: int) -> list[str]:
    """A data: URI of each, together at most `budget` bytes where 128 pixels suffice for it.

    A picture whose share suffices stays what it is, as PNG; others become JPEG, the smaller the less room there is.
    """
    share = budget * 3 // 4 // max(1, len(pictures))
    exact = [_bytes(picture, "PNG") if picture.width * picture.height <= EXACT else None for picture in pictures]
    kept = [_uri("png", whole) if whole is not None and len(whole) <= share else None for whole in exact]
    large = [picture for picture, uri in zip(pictures, kept, strict=True) if uri is None]
    room = budget - sum(len(uri) for uri in kept if uri is not None)
    found: list[str] = []
    for side in SIDES if large else ():
        one = _jpeg(large[0], side)  # which mostly tells without trying all of them
        if len(one) * len(large) > room and side != SIDES[-1]:
            continue
        found = [one, *(_jpeg(picture, side) for picture in large[1:])]
        if sum(map(len, found)) <= room:
            break
    jpegs = iter(found)
    return [next(jpegs) if uri is None else uri for uri in kept]


def _within(picture: Image.Image, side: int) -> Image.Image:
    small = picture.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    return small


def _jpeg(picture: Image.Image, side: int) -> str:
    return _uri("jpeg", _bytes(_within(picture, side), "JPEG", quality=85, optimize=True))


def _bytes(picture: Image.Image, form: str, **options) -> bytes:
    written = io.BytesIO()
    picture.save(written, form, **options)
    return written.getvalue()


def _uri(form: str, content: bytes) -> str:
    return f"data:image/{form};base64,{base64.b64encode(content).decode()}"
