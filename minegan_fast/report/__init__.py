"""A run as one HTML file that needs no network: `page` draws what `Facts` holds."""

from .facts import Facts, Neighbour, series_of
from .page import page

__all__ = ["Facts", "Neighbour", "page", "series_of"]
