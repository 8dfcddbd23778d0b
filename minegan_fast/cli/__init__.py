"""The program `minegan-fast`: its commands, the demo, and what it says of the machine."""

from .app import main

__all__ = ["main"]
