"""The buffers of a model before evidence is collected, which runs of the model change."""

import torch
from torch import Tensor, nn

from ..._torch import version_of


class BufferCopy:
    """The buffers of a model, to be given back bit for bit."""

    def __init__(self, model: nn.Module):
        self.copies = {name: b.detach().clone() for name, b in model.named_buffers()}
        self.versions = [version_of(p) for p in model.parameters()]

    def outdated(self, model: nn.Module) -> bool:
        """Whether parameters were written since, by load_state_dict say: then the buffers were, too."""
        return self.versions is not None and self.versions != [version_of(p) for p in model.parameters()]

    def adopt(self, copies: dict[str, Tensor]):
        """Takes the copies of a run that goes on here; that its model is loaded as well does not outdate them."""
        self.copies, self.versions = copies, None

    @torch.no_grad()
    def restore(self, model: nn.Module):
        for name, buffer in model.named_buffers():
            if name in self.copies:
                buffer.copy_(self.copies[name])
