"""Adversarial losses on logits of any shape; each is a scalar mean, in float32 at least, also under autocast.

    nonsaturating   G: softplus(-f)   D: softplus(f) + softplus(-r)       Goodfellow et al. 2014
    wgan            G: -f             D: f - r                            Arjovsky et al. 2017
    hinge           G: -f             D: max(0, 1 + f) + max(0, 1 - r)    Lim and Ye 2017, Miyato et al. 2018

r are the critic's logits of real images, f those of generated ones.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

LOSSES = ("nonsaturating", "wgan", "hinge")


def generator_loss(name: str, fake_logits: Tensor) -> Tensor:
    """What generator and miner minimise. fake_logits: floating point, any shape -> scalar. ValueError: unknown name."""
    fake = _prepare(name, fake_logits)
    return F.softplus(-fake).mean() if name == "nonsaturating" else -fake.mean()


def critic_loss(name: str, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """What the critic minimises. Logits: floating point, any shapes -> scalar. ValueError: unknown name."""
    real, fake = _prepare(name, real_logits), _prepare(name, fake_logits)
    if name == "nonsaturating":
        return F.softplus(fake).mean() + F.softplus(-real).mean()
    if name == "wgan":
        return fake.mean() - real.mean()
    return F.relu(1 + fake).mean() + F.relu(1 - real).mean()


def _prepare(name: str, logits: Tensor) -> Tensor:
    if name not in LOSSES:
        raise ValueError(f"unknown loss {name!r}: choose one of {', '.join(LOSSES)}")
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
