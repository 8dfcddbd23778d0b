"""What the arguments of `SparseFinetuner` have to be."""

from numbers import Integral, Real

from torch import Tensor

from ..ops.row_update import OPTIMIZERS
from .evidence import CRITERIA
from .selection import SCOPES


def check_arguments(
    optimizer, budget, criterion, scope, policy, lr, betas, eps, weight_decay, momentum, density, score_steps,
    ema_decay, affine,
):  # fmt: skip
    """ValueError, TypeError with the name of the first one that is out of range."""
    for name, value, allowed in (
        ("optimizer", optimizer, OPTIMIZERS),
        ("budget", budget, ("neurons", "parameters")),
        ("criterion", criterion, CRITERIA),
        ("scope", scope, SCOPES),
        ("policy", policy, ("train_top", "freeze_top")),
    ):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    numbers = {"density": density, "eps": eps, "weight_decay": weight_decay, "momentum": momentum}
    numbers |= {"ema_decay": 0 if ema_decay is None else ema_decay, "lr": 0 if isinstance(lr, Tensor) else lr}
    for name, value in numbers.items():
        if not isinstance(value, Real):
            raise TypeError(f"{name} must be a number, got {value!r}")
    if not isinstance(score_steps, Integral):
        raise TypeError(f"score_steps must be a whole number, got {score_steps!r}")
    if not (isinstance(betas, tuple | list) and len(betas) == 2 and all(isinstance(b, Real) for b in betas)):
        raise TypeError(f"betas must be two numbers in [0, 1), got {betas!r}")
    for name, value, fits, what in (
        ("density", density, 0 < density <= 1, "above 0 and at most 1"),
        ("lr", lr, lr >= 0, "at least 0"),
        ("betas", betas, all(0 <= beta < 1 for beta in betas), "two numbers in [0, 1)"),
        ("eps", eps, eps >= 0, "at least 0"),
        ("weight_decay", weight_decay, weight_decay >= 0, "at least 0"),
        ("momentum", momentum, momentum >= 0, "at least 0"),
        ("score_steps", score_steps, score_steps >= 1, "at least 1"),
        ("ema_decay", ema_decay, ema_decay is None or 0 <= ema_decay < 1, "in [0, 1) or None"),
    ):
        if not fits:
            raise ValueError(f"{name} must be {what}, got {value!r}")
    if criterion == "agreement" and score_steps < 2:
        raise ValueError("criterion 'agreement' compares gradients: score_steps must be at least 2, got 1")
    if not isinstance(affine, bool):
        raise TypeError(f"affine must be True or False, got {affine!r}")
