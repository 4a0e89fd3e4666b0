"""localign: locality alignment for vision transformers."""

from localign._version import __version__
from localign.api import align, load

__all__ = ["__version__", "align", "load"]
