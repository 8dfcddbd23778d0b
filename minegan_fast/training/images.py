"""The target images: a folder, an archive or an array becomes one uint8 tensor [N, C, R, R]."""

import hashlib
import math
import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..files.atomic import atomic_path
from .image_files import LABELS, WANTED, decode, depth_of, image_files, to_8_bits

_NAMED = 10
_OF_ONE = (
    "; a single image does not say what varies: cut several squares out of it, take more frames of its video, or add "
    "images of its kind, of which 10 are a start"
)


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Square images of one size.

    images: uint8 [N, C, R, R] on the CPU; names: N paths relative to the folder, "/" between parts (an array: indices);
    skipped: (name, reason) of every file that gave no image; enlarged: how many images were smaller than R.
    """

    images: Tensor = field(repr=False)
    names: list[str] = field(repr=False)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    enlarged: int = 0

    def __len__(self) -> int:
        return len(self.images)

    def split(self, fraction: float, seed: int = 0) -> tuple["ImageSet", "ImageSet"]:
        """A random `fraction` (0 <= fraction < 1) is held out: (train, held out), both in the order of this set.

        A fraction above 0 holds out at least one image, but always leaves two to train on; the same N, fraction and
        seed give the same split.
        """
        if not 0 <= fraction < 1:
            raise ValueError(f"fraction of images to hold out must be at least 0 and below 1, got {fraction}")
        held = min(max(1, round(fraction * len(self))), max(0, len(self) - 2)) if fraction > 0 else 0
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return self._subset(order[held:]), self._subset(order[:held])

    def _subset(self, index: Tensor) -> "ImageSet":
        index = index.sort().values
        return ImageSet(self.images[index], [self.names[i] for i in index.tolist()])

    def fingerprint(self) -> str:
        """SHA-256 of shape, order and pixels: changes when the folder's images do, not when the folder is renamed."""
        digest = hashlib.sha256(repr(tuple(self.images.shape)).encode())
        digest.update(self.images.contiguous().numpy().data)
        return digest.hexdigest()


def load_images(
    source: str | os.PathLike | Tensor | np.ndarray, resolution: int, channels: int = 3, *, limit: int | None = None
) -> ImageSet:
    """Reads the images to adapt to.

    source: a folder (searched recursively through links too, each folder once, sorted by path; names that begin with
        "." are passed over), a zip archive of one (StyleGAN's dataset.zip; labels in it are not used), or an array
        [N, channels, resolution, resolution], floating point in [-1, 1] or uint8. PNG, JPEG, WebP, BMP, TIFF, GIF and,
        where Pillow has it, AVIF files of any size and mode are read: EXIF rotation is applied, the centre square is
        cut out, transparency is laid over white, and an animation gives its first frame. 16-bit grey is rounded to 8,
        after it was stretched where all such images together use 8, 10, 12 or 14 bits, with a warning. Lanczos
        resampling, which averages where it shrinks, then brings them to `resolution`. Smaller images are enlarged,
        with a warning.
    channels: for a folder 3 (RGB) or 1 (ITU-R 601 luma), for an array those that it has.
    limit: at most so many readable images are taken, the first ones.

    A file that is no readable image (truncated, another format, a decompression bomb) is skipped, named in a warning
    and in `ImageSet.skipped`. ValueError where fewer than 2 images remain, or an array's shape or range is wrong;
    FileNotFoundError for a missing folder; TypeError for another source or dtype.
    """
    if resolution < 1:
        raise ValueError(f"resolution must be at least 1, got {resolution}")
    if limit is not None and limit < 2:
        raise ValueError(f"limit must be at least 2 images or None, got {limit}")
    if isinstance(source, str | os.PathLike):
        return _from_folder(Path(source), resolution, channels, limit)
    if isinstance(source, np.ndarray):
        source = torch.from_numpy(np.ascontiguousarray(source))
    if isinstance(source, Tensor):
        return _from_array(source.detach().cpu(), resolution, channels, limit)
    raise TypeError(f"images must be a folder, a tensor or a NumPy array, got {type(source).__name__}")


def _from_folder(folder: Path, resolution: int, channels: int, limit: int | None) -> ImageSet:
    if channels not in (1, 3):
        raise ValueError(f"an image folder is read as 1 (grey) or 3 (RGB) channels, got channels={channels}")
    found, names, enlarged = [], [], 0
    with image_files(folder) as files, warnings.catch_warnings():
        skipped = list(files.skipped)
        warnings.simplefilter("ignore")  # Pillow's, of odd metadata and of merely large images
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # decoding and resizing release the GIL
            decoded = pool.map(lambda name: decode(files, name, resolution, channels), files.names)
            for name, result in zip(files.names, decoded, strict=True):
                if isinstance(result, str):
                    skipped.append((name, result))
                    continue
                found.append(result)
                names.append(name)
                enlarged += result.small
                if len(found) == limit:
                    pool.shutdown(wait=False, cancel_futures=True)
                    break

    if len(found) < 2:
        listed = ", ".join(f"{name!r} ({reason})" for name, reason in skipped[:_NAMED])
        more = f" and {len(skipped) - _NAMED} more" if len(skipped) > _NAMED else ""
        raise ValueError(
            f"{str(folder)!r}: {len(found)} of {len(files.names)} files could be read, at least 2 images are needed; "
            + (f"skipped {listed}{more}; add {WANTED} images or repair these" if skipped else f"add {WANTED} images")
            + (_OF_ONE if len(found) == 1 else "")
        )
    for name, reason in skipped[:_NAMED]:
        warnings.warn(f"skipped {name!r}: {reason}", stacklevel=3)
    if len(skipped) > _NAMED:
        warnings.warn(f"skipped {len(skipped)} of {len(files.names)} files in {str(folder)!r}", stacklevel=3)
    if files.labels:
        warnings.warn(f"labels in {LABELS!r} are not used: the target of an adaptation has no classes", stacklevel=3)
    if enlarged:
        size = f"{resolution}x{resolution}"
        warnings.warn(f"{enlarged} of {len(found)} images are smaller than {size} and were enlarged", stacklevel=3)
    # One depth for all, or a dark image would come out as bright as the others.
    peak = max((image.peak for image in found if image.peak is not None), default=0)
    if (bits := depth_of(peak)) < 16:
        warnings.warn(
            f"the 16-bit images reach {peak} at most, so they are taken for images of {bits} bits, whose white is "
            f"{2**bits - 1}, and stretched; if they are dark instead, convert them to 8 bits first",
            stacklevel=3,
        )
    images = [i.pixels if i.peak is None else to_8_bits(i.pixels, bits, channels) for i in found]
    return ImageSet(torch.stack(images), names, sorted(skipped), enlarged)


def _from_array(images: Tensor, resolution: int, channels: int, limit: int | None) -> ImageSet:
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise TypeError(f"images must be uint8 or floating point in [-1, 1], got {images.dtype}: convert them first")
    expected = f"[N, {channels}, {resolution}, {resolution}]"
    if images.ndim != 4 or images.shape[1:] != (channels, resolution, resolution):
        hint = "cut and resize them, or give a folder, which is resized"
        if images.ndim == 4 and images.shape[-1] == channels != images.shape[1]:
            hint = "channels come last here: permute(0, 3, 1, 2)"
        elif images.ndim == 3:
            hint = "one dimension is missing: unsqueeze(1) for N grey images, unsqueeze(0) for a single one"
        elif images.ndim == 4 and images.shape[1] != channels:
            hint = f"the model wants {channels} channels: average or repeat those given"
        raise ValueError(f"images must have the shape {expected}, got {list(images.shape)}; {hint}")
    if len(images) < 2:
        raise ValueError(f"at least 2 images are needed, got {len(images)}" + (_OF_ONE if len(images) == 1 else ""))
    images = images[:limit]
    if images.dtype == torch.uint8:
        pixels = images.clone(memory_format=torch.contiguous_format)
    else:
        low, high = images.min().item(), images.max().item()
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError("images hold NaN or infinite values: remove those images")
        if low < -1.001 or high > 1.001:  # room for the rounding of half precision and of a resize
            raise ValueError(
                f"floating point images must lie in [-1, 1], got [{low:.4g}, {high:.4g}]: "
                "give 0..255 as uint8, or scale them (x / 127.5 - 1)"
            )
        if low >= 0:
            warnings.warn("no image value is below 0: if the range is [0, 1], give 2 * x - 1", stacklevel=3)
        pixels = to_uint8(images).contiguous()
    return ImageSet(pixels, [str(i) for i in range(len(pixels))])


def to_float(images: Tensor) -> Tensor:
    """uint8 0..255 of any shape -> float32 in [-1, 1]: x / 127.5 - 1."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Floating point of any shape in [-1, 1] -> uint8 0..255, rounded and clamped: the inverse of `to_float`."""
    return (images.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


PICTURED = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}  # by channels


def to_pil(image: Tensor) -> Image.Image:
    """One image [C, H, W], C 1 to 4, uint8 or floating point in [-1, 1] -> PIL image of mode L, LA, RGB or RGBA."""
    if image.ndim != 3 or image.shape[0] not in PICTURED:
        raise ValueError(f"an image must be [1 to 4, H, W], got {list(image.shape)}")
    pixels = image if image.dtype == torch.uint8 else to_uint8(image)
    pixels = pixels.detach().cpu().permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def save_folder(
    path: str | os.PathLike, images: Tensor | Sequence[Tensor], *, start: int = 0, names: Sequence[str] | None = None
) -> list[Path]:
    """Writes [N, C, H, W] (C 1 to 4, uint8 or floating point in [-1, 1]) as `path`/00000.png and so on from `start`;
    where the images have names, as 00000-NAME.png.

    The folder is made where it is missing; each file is whole or not there. Returns the paths.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"cannot write images into {str(path)!r}: a file is in its place, choose another") from None
    ends = [""] * len(images) if names is None else [f"-{name}" for name in names]
    paths = [folder / f"{number:05d}{end}.png" for number, end in enumerate(ends, start)]
    for file, image in zip(paths, images, strict=True):
        with atomic_path(file) as temporary:
            to_pil(image).save(temporary)
    return paths
