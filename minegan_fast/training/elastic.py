"""Elastic weight consolidation: weights that mattered for the source are held where they were.

    penalty = 1/2 Σ_i F_i (w_i - w_i⁰)²

F is the diagonal of the empirical Fisher information of the run's loss on the source's own samples, w⁰ are the source's
weights. Source: Kirkpatrick et al. 2017, arXiv 1612.00796; for few-shot GANs Li et al. 2020, arXiv 2012.02780. F is
scaled to a mean of 1, so that a weight of the penalty means the same under every loss.
"""

import torch
from torch import Tensor

from ..finetune import SparseFinetuner
from .generators import own_samples
from .methods import KERNEL
from .randomness import set_random_state


class ElasticWeights:
    """Holds what `finetuner` trains where it was: the parameters' values at the start, and how much each matters."""

    def __init__(self, finetuner: SparseFinetuner):
        self.parameters = list(finetuner.parameters())
        self.anchors = [p.detach().clone() for p in self.parameters]
        self.importances = [torch.zeros_like(p) for p in self.parameters]

    def measure(self, trainer) -> None:
        """Estimates the Fisher information from squared gradients, of batches of the source's own samples."""
        config = trainer.config
        # The square of a batch's gradient is not the mean of its samples' squares, so a batch is one sample where the
        # loss has a value for one. The kernel distance has none.
        batch = config.batch if trainer.loss_name == KERNEL else 1
        for k in range(-(-config.score_samples // batch) * len(trainer.branches)):
            set_random_state(config.seed, "elastic", k)
            loss = trainer.loss(own_samples(trainer.generator, batch, turn=k))
            gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
            for importance, gradient in zip(self.importances, gradients, strict=True):
                if gradient is not None:
                    importance.addcmul_(gradient, gradient)
        total = sum(float(importance.sum(dtype=torch.float64)) for importance in self.importances)
        mean = total / sum(importance.numel() for importance in self.importances)
        for importance in self.importances:
            importance.div_(max(mean, 1e-30))

    @torch.no_grad()
    def add_gradients(self, weight: float, scale: Tensor) -> None:
        """Adds `weight` times `scale`, 0-d, times the penalty's gradient to those of the parameters."""
        for parameter, anchor, importance in zip(self.parameters, self.anchors, self.importances, strict=True):
            if parameter.grad is not None:
                parameter.grad.addcmul_(importance * scale, parameter - anchor, value=weight)

    def state_dict(self) -> dict[str, list[Tensor]]:
        return {"anchors": self.anchors, "importances": self.importances}

    def load_state_dict(self, state: dict[str, list[Tensor]]) -> None:
        for name in ("anchors", "importances"):
            for own, saved in zip(getattr(self, name), state[name], strict=True):
                own.copy_(saved)
