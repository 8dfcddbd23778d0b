"""What every step of a run has in common: precision, latents, and how gradients become a step."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..collectives import gradients
from ..mining import Mined
from .config import TransferConfig
from .processes import Processes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Machine:
    config: TransferConfig
    device: torch.device
    processes: Processes
    scaler: torch.amp.GradScaler

    @contextmanager
    def autocast(self) -> Iterator[None]:
        dtype = DTYPES[self.config.precision]
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            yield

    def latents(self, mined: Mined, count: int) -> Tensor:
        return torch.randn(count, mined.input_dim, device=self.device)

    def update(self, loss: Tensor, *optimizers: torch.optim.Optimizer) -> Tensor:
        """Steps by the gradients of the whole batch, of whose loss this returns the mean. One message carries all: the
        dense parameters' gradients, the selected rows of the others, and the loss."""
        if self.processes.size > 1:
            loss = loss.clone()
            groups = [group for optimizer in optimizers for group in optimizer.param_groups]
            self.processes.average([*gradients(groups), loss])
        for optimizer in optimizers:
            self.scaler.step(optimizer)
        return loss

    def mean(self, grad: Tensor) -> Tensor:
        """That of all processes' gradients: a hook."""
        grad = grad.clone()
        self.processes.average([grad])
        return grad
