"""Image files of a folder or a zip archive: which there are, and the pixels of each at one size."""

import io
import os
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError, features
from PIL.TiffImagePlugin import PHOTOMETRIC_INTERPRETATION
from torch import Tensor

# The content decides, not the suffix. The list also keeps files away from decoders that nobody asked for.
_AVIF = ("AVIF",) if features.check("avif") else ()
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", *_AVIF)
WANTED = f"PNG, JPEG, WebP, BMP, {'TIFF, GIF or AVIF' if _AVIF else 'TIFF or GIF'}"
LABELS = "dataset.json"  # beside the images in a data set of StyleGAN
_LARGEST = 2**27  # bytes of one file in an archive, which is read into memory as a whole
_DEPTHS = (8, 10, 12, 14, 16)


@dataclass(frozen=True)
class Files:
    """The files of a folder or an archive.

    names: relative paths, "/" between parts, sorted. skipped: (name, reason) of what is certainly no image. labels:
    whether labels lie beside them. open: name -> what Pillow opens.
    """

    names: list[str]
    skipped: list[tuple[str, str]]
    labels: bool
    open: Callable[[str], Path | io.BytesIO]


class Decoded(NamedTuple):
    """pixels: uint8 [C, R, R], or float32 [1, R, R] of 16-bit grey, as stored. peak: the largest value of the square
    before it was resized, None for 8 bits. small: whether the image was enlarged."""

    pixels: Tensor
    peak: int | None
    small: bool


@contextmanager
def image_files(place: Path) -> Iterator[Files]:
    """The files at `place`, open as long as the block runs. Names that begin with "." are left out.

    FileNotFoundError: nothing is there. ValueError: neither a folder nor a zip archive, or no files in it.
    """
    if not place.exists():
        raise FileNotFoundError(f"no image folder at {str(place)!r}: check the path")
    if place.is_dir():
        names, skipped = _walk(place)
        yield _files(place, names, skipped, lambda name: place / name)
        return
    try:
        archive = zipfile.ZipFile(place)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        raise ValueError(
            f"{str(place)!r} is a file: give the folder that holds the images, or a zip archive of them"
        ) from None
    with archive:
        inside = (name for name in dict.fromkeys(archive.namelist()) if name and not name.endswith("/"))
        names = [name for name in inside if not any(p.startswith((".", "__MACOSX")) for p in name.split("/"))]
        yield _files(place, names, [], lambda name: _unpacked(archive, name))


def _files(place: Path, names: list[str], skipped: list[tuple[str, str]], opened) -> Files:
    if not names and not skipped:
        raise ValueError(f"{str(place)!r} holds no files: put at least 2 {WANTED} images there")
    labels = LABELS in names
    return Files(sorted(name for name in names if name != LABELS), sorted(skipped), labels, opened)


def _unpacked(archive: zipfile.ZipFile, name: str) -> io.BytesIO:
    info = archive.getinfo(name)
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError("compressed otherwise than by deflate: pack the archive anew")
    if info.file_size > _LARGEST:
        raise ValueError(f"{info.file_size} bytes unpacked, more than the {_LARGEST} that are read")
    with archive.open(info) as file:
        return io.BytesIO(file.read(info.file_size))


def _walk(top: Path) -> tuple[list[str], list[tuple[str, str]]]:
    """(relative paths of the regular files below `top`, links and folders that cannot be followed, with the reason).

    Linked folders come after all others, and no folder twice, so a loop ends.
    """
    names: list[str] = []
    skipped: list[tuple[str, str]] = []
    root = Path(os.path.realpath(top))
    seen: set[str] = set()
    pending = [top]

    def relative(path: str | Path) -> str:
        return Path(path).relative_to(top).as_posix()

    def unreadable(error: OSError) -> None:
        skipped.append((relative(error.filename), error.strerror or str(error)))

    while pending:
        for parent, folders, files in os.walk(pending.pop(0), onerror=unreadable):
            if (real := os.path.realpath(parent)) in seen:
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for path in (Path(parent, name) for name in folders):
                if path.is_symlink():
                    if Path(os.path.realpath(path)) in root.parents:
                        skipped.append((relative(path), "a link to a folder around this one"))
                    else:
                        pending.append(path)
            for path in (Path(parent, name) for name in files if not name.startswith(".")):
                if path.is_file():
                    names.append(relative(path))
                elif path.is_symlink():
                    skipped.append((relative(path), "a link that leads nowhere"))
    return names, skipped


def decode(files: Files, name: str, resolution: int, channels: int) -> Decoded | str:
    """The first frame of one file, its centre square at `resolution`; or why it cannot be read."""
    try:
        with Image.open(files.open(name), formats=_FORMATS) as image:
            small = min(image.size) < resolution
            # Of 16-bit colour Pillow keeps the upper 8 bits.
            halved = ";16" in str(image.tile[:1]) and not image.mode.startswith("I")
            # Pillow turns such pixels over for 8 bits only.
            from_white = getattr(image, "tag_v2", {}).get(PHOTOMETRIC_INTERPRETATION) == 0
            image.draft(None, (2 * resolution, 2 * resolution))  # a large JPEG is decoded at 1/2, 1/4 or 1/8
            image.load()
            image = ImageOps.exif_transpose(image)
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        square = image.crop((left, top, left + side, top + side))
        peak = None
        if image.mode.startswith("I") and from_white:
            raise ValueError("its 16 bits count from white to black: turn them over, or scale it to 8 bits")
        if image.mode.startswith("I"):
            square, peak = _deep(square)
        elif image.mode == "F":
            raise ValueError("floating point pixels, whose range no file says: scale them to 8 or 16 bits")
        else:
            square = _flatten(square, "L" if channels == 1 else "RGB")
            if halved and 0 < np.asarray(square).max() < 16:
                raise ValueError(
                    "of its 16 bits a channel at most 12 are used, of which 4 would be left: scale it to 8 bits, or to "
                    "the whole of 16"
                )
        if side != resolution:
            square = square.resize((resolution, resolution), Image.Resampling.LANCZOS)
        pixels = torch.from_numpy(np.array(square)).view(resolution, resolution, -1)
        return Decoded(pixels.permute(2, 0, 1).contiguous(), peak, small)
    except UnidentifiedImageError:
        return f"not a {WANTED} image"
    except Exception as error:  # a damaged file raises whatever its decoder stumbles over
        return " ".join(str(error).split()) or type(error).__name__


def _deep(image: Image.Image) -> tuple[Image.Image, int]:
    """16-bit grey as floating point, which Pillow resamples without clipping, and its largest value."""
    values = np.asarray(image)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise ValueError(f"integers from {low} to {high} are no 16-bit grey: scale them to 8 or 16 bits")
    return Image.fromarray(values.astype(np.float32)), high


def _flatten(image: Image.Image, mode: str) -> Image.Image:
    """To 8 bits a channel without transparency."""
    if image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, "white")
        canvas.alpha_composite(image.convert("RGBA"))
        image = canvas
    return image.convert(mode)


def depth_of(peak: int) -> int:
    """How many bits values up to `peak` <= 65535 use: the least of 8, 10, 12, 14 and 16; black says nothing: 16."""
    return next(bits for bits in _DEPTHS if peak < 2**bits) if peak else 16


def to_8_bits(pixels: Tensor, bits: int, channels: int) -> Tensor:
    """float32 [1, R, R] of so many bits -> uint8 [channels, R, R]."""
    scaled = (pixels * (255 / (2**bits - 1))).round().clamp(0, 255).to(torch.uint8)
    return scaled.expand(channels, -1, -1).contiguous()
