"""Small pictures of bench/quality.py: the images of a cell side by side in one file."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from minegan_fast.files.atomic import atomic_path
from minegan_fast.training.images import to_float, to_uint8

SIZE = 64


def small(images: Tensor) -> Tensor:
    """uint8 [N, C, R, R] to at most 64 pixels, each pixel the mean of a square."""
    factor = max(1, images.shape[-1] // SIZE)
    return to_uint8(F.avg_pool2d(to_float(images), factor))


def write_strip(path: Path, images: Tensor) -> None:
    """Float [N, C, R, R] in [-1, 1] side by side in one PNG file, without a gap."""
    pixels = to_uint8(images).permute(2, 0, 3, 1).flatten(1, 2).numpy()
    with atomic_path(path) as temporary:
        Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(temporary)


def read_strip(path: Path) -> Tensor:
    """uint8 [N, C, R, R]."""
    with Image.open(path) as strip:
        pixels = torch.from_numpy(np.array(strip))
    pixels = pixels.reshape(len(pixels), -1, len(pixels), pixels.shape[2] if pixels.dim() == 3 else 1)
    return pixels.permute(1, 3, 0, 2).contiguous()
