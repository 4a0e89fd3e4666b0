"""localign: locality alignment for vision transformers."""

from localign._version import __version__

__all__ = ["__version__"]
