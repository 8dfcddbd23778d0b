"""Layers that can be differentiated any number of times, and the penalties on gradients that need it."""

from .penalties import LazyPenalty, dragan_penalty, gradient_penalty, lazy_adam, path_length_penalty, r1_penalty
from .second_order import second_order

__all__ = [
    "LazyPenalty",
    "dragan_penalty",
    "gradient_penalty",
    "lazy_adam",
    "path_length_penalty",
    "r1_penalty",
    "second_order",
]
