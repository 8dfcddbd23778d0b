"""TensorBoard event files, where tensorboard is installed."""

import os
import warnings
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from .plots import image_grid


class EventWriter:
    """Writes scalars and image grids that TensorBoard shows; without tensorboard it warns once and writes nothing.

    folder: where the event files go. first_step: where a resumed run begins: TensorBoard forgets what the run that was
    cut off wrote from that step on.
    """

    def __init__(self, folder: str | os.PathLike, first_step: int | None = None):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            warnings.warn("no TensorBoard event files are written: pip install tensorboard", stacklevel=2)
            self._writer = None
        else:
            self._writer = SummaryWriter(os.fspath(folder), purge_step=first_step)

    def scalars(self, step: int, values: Mapping[str, float | Tensor]) -> None:
        """One point of each named curve; a tensor must hold one element."""
        if self._writer:
            for name, value in values.items():
                self._writer.add_scalar(name, value.item() if isinstance(value, Tensor) else value, step)

    def grid(self, step: int, name: str, images: Tensor, columns: int | None = None) -> None:
        """One picture of images as `image_grid` takes them."""
        if self._writer:
            pixels = torch.from_numpy(np.array(image_grid(images, columns)))
            self._writer.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        if self._writer:
            self._writer.close()

    def __enter__(self) -> "EventWriter":
        return self

    def __exit__(self, *exception) -> None:
        self.close()
