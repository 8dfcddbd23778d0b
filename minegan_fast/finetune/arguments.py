"""What the arguments of `SparseFinetuner` and of its methods have to be."""

import gc
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral, Real

from torch import Tensor

from ..ops.row_update import OPTIMIZERS, check_lr
from .evidence import CRITERIA
from .selection import SCOPES


def check_arguments(
    optimizer, budget, criterion, scope, policy, lr, betas, eps, weight_decay, momentum, density, score_steps,
    ema_decay, affine,
):  # fmt: skip
    """Raises ValueError or TypeError, which name the first argument that is out of range."""
    for name, value, allowed in (
        ("optimizer", optimizer, OPTIMIZERS),
        ("budget", budget, ("neurons", "parameters")),
        ("criterion", criterion, CRITERIA),
        ("scope", scope, SCOPES),
        ("policy", policy, ("train_top", "freeze_top")),
    ):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    check_lr(lr)
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
        ("score_steps", score_steps, int(score_steps) >= 1, "at least 1"),
        ("ema_decay", ema_decay, ema_decay is None or 0 <= ema_decay < 1, "in [0, 1) or None"),
    ):
        if not fits:
            raise ValueError(f"{name} must be {what}, got {value!r}")
    if criterion == "agreement" and score_steps < 2:
        raise ValueError("criterion 'agreement' compares gradients: score_steps must be at least 2, got 1")
    if not isinstance(affine, bool):
        raise TypeError(f"affine must be True or False, got {affine!r}")


def check_options(options: Mapping, known: Mapping, optimizer: str):
    """ValueError where a parameter group has an option that the optimizer does not have."""
    unknown = options.keys() - {"params", "param_names", "initial_lr", *known}
    if unknown:
        raise ValueError(
            f"a group has options that optimizer={optimizer!r} does not have: {', '.join(sorted(unknown))}; "
            f"there are {', '.join(known)}"
        )


def check_scoring(reduction: str, samples: int | None, of: str, criterion: str):
    """ValueError where an argument of `scoring()` is not as it says."""
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
    if samples is not None and not (isinstance(samples, Integral) and samples >= 1):
        raise ValueError(f"samples must be an integer of at least 1, or None, got {samples!r}")
    if of not in ("target", "source"):
        raise ValueError(f"of must be 'target' or 'source', got {of!r}")
    if of == "source" and criterion != "contrast":
        raise ValueError(
            f"only criterion 'contrast' looks at the source's samples, this one is {criterion!r}; build the "
            "optimizer with criterion='contrast', or leave this block out"
        )


def refuse_rivals(own: Iterable[Tensor], rivals: Callable[[], Iterable[Iterable[Tensor]]]):
    """ValueError where another optimizer of this kind trains some of the same parameters: it would train nothing once
    the first has selected, which freezes all that it does not select. rivals: what the living ones train."""
    ids = set(map(id, own))

    def shared() -> bool:
        return any(not ids.isdisjoint(map(id, theirs)) for theirs in rivals())

    if shared():
        gc.collect()  # an optimizer that nobody has any more may still wait for it
        if shared():
            raise ValueError(
                "another SparseFinetuner trains this model: release() it first, or give one optimizer include= and "
                "exclude= patterns; for learning rates by part of the model it takes groups=[{'include': ..., "
                "'lr': ...}]"
            )
