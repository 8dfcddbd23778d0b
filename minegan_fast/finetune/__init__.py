"""Sparse finetuning: which neurons matter, how a network trains only them, and the small files that this leaves."""

from .delta import load_delta, unload_delta
from .finetuner import SparseFinetuner
from .hashing import fingerprint
from .rows.freezing import FrozenNeuronsChanged
from .selection import Selection

__all__ = ["FrozenNeuronsChanged", "Selection", "SparseFinetuner", "fingerprint", "load_delta", "unload_delta"]
