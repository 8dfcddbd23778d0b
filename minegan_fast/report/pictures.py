"""Pictures as data: URIs, all of them together within a size."""

import base64
import io
from collections.abc import Sequence

from PIL import Image

SIDES = (2048, 1024, 768, 512, 384, 256, 128)  # tried in turn


def encoded(pictures: Sequence[Image.Image], budget: int) -> list[str]:
    """A data: URI of each, together at most `budget` bytes where 128 pixels suffice for it.

    A picture whose share suffices stays what it is, as PNG; others become JPEG, the smaller the less room there is.
    """
    share = budget * 3 // 4 // max(1, len(pictures))
    exact = [_bytes(picture, "PNG") if picture.width * picture.height <= 2**20 else None for picture in pictures]
    found: list[str] = []
    for side in SIDES:
        found = [
            _uri("png", whole)
            if whole is not None and len(whole) <= share
            else _uri("jpeg", _bytes(_within(picture, side), "JPEG", quality=85))
            for picture, whole in zip(pictures, exact, strict=True)
        ]
        if sum(map(len, found)) <= budget:
            break
    return found


def _within(picture: Image.Image, side: int) -> Image.Image:
    small = picture.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    return small


def _bytes(picture: Image.Image, form: str, **options) -> bytes:
    written = io.BytesIO()
    picture.save(written, form, optimize=True, **options)
    return written.getvalue()


def _uri(form: str, content: bytes) -> str:
    return f"data:image/{form};base64,{base64.b64encode(content).decode()}"
