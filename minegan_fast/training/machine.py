"""What every step of a run has in common: precision, latents, and how gradients become a step."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from ..collectives import gradients
from ..mining import Mined, MultiGenerator
from .config import TransferConfig
from .miners import spread_of
from .processes import Processes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Machine:
    """What the generator's and the critic's steps share: device, precision, random latents, and the processes.

    fixed: whether steps are to be captured (captured.py): gradients stay where they are, learning rates lie on the
        device, and no number is read back.
    """

    config: TransferConfig
    device: torch.device
    processes: Processes
    scaler: torch.amp.GradScaler
    fixed: bool = False

    @contextmanager
    def autocast(self) -> Iterator[None]:
        dtype = DTYPES[self.config.precision]
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            yield

    def latents(self, mined: Mined | MultiGenerator, count: int) -> Tensor:
        """u ~ N(0, I) [count, input_dim]."""
        return torch.randn(count, mined.input_dim, device=self.device)

    @contextmanager
    def batch(self, mined: Mined | MultiGenerator) -> Iterator[int]:
        """Gives how many samples of a batch this process makes, and a block whose draws are for these: its part. Where
        generators are spread over the processes, which make every sample together, it is all of them."""
        everyone = spread_of(mined) is not None
        with nullcontext(self.config.batch) if everyone else self.processes.part(self.config.batch) as count:
            yield count

    @contextmanager
    def judged(self, mined: Mined | MultiGenerator, images: Tensor) -> Iterator[Tensor]:
        """Gives those of a batch's images that this process's loss is of, its part, and a block whose draws are for
        these."""
        if spread_of(mined) is None:
            yield images
            return
        with self.processes.part(self.config.batch):
            yield self.processes.own(images)

    def rate(self, lr: float) -> float | Tensor:
        """A learning rate as the optimizers of this run take it."""
        return torch.full((), lr, device=self.device) if self.fixed else lr

    def zero_grad(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad(set_to_none=not self.fixed)

    def update(self, loss: Tensor, *optimizers: torch.optim.Optimizer, agreed: bool = False) -> Tensor:
        """Takes the optimizers' steps by the gradients of the whole batch, and returns the mean of its loss.

        Several processes send one message for all: the gradients of dense parameters, those of selected rows, and the
        loss. agreed: whether all have the same gradients already.
        """
        if self.processes.size > 1:
            loss = loss.clone()
            groups = [group for optimizer in optimizers for group in optimizer.param_groups if not agreed]
            self.processes.average([*gradients(groups), loss])
        capturing = self.fixed and self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        for optimizer in optimizers:
            with _capturable(optimizer) if capturing else nullcontext():
                self.scaler.step(optimizer)
        return loss

    def mean(self, grad: Tensor) -> Tensor:
        """The mean of all processes' gradients; a hook of a parameter."""
        grad = grad.clone()
        self.processes.average([grad])
        return grad


@contextmanager
def _capturable(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """PyTorch's Adam demands this flag in a capture, and warns of it outside."""
    groups = [group for group in optimizer.param_groups if "capturable" in group]
    for group in groups:
        group["capturable"] = True
    try:
        yield
    finally:
        for group in groups:
            group["capturable"] = False
