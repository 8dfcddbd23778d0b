"""The program `minegan-fast`: its commands, the demo, and its report on the machine."""

from .app import main

__all__ = ["main"]
