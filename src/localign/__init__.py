"""localign: locality alignment for vision transformers."""

from typing import TYPE_CHECKING, Any

from localign._version import __version__

if TYPE_CHECKING:
    from localign.api import align, load

__all__ = ["__version__", "align", "load"]


def __getattr__(name: str) -> Any:
    """These bring torch with them, for which the command line's help, refusals and signals need not wait."""
    if name in ("align", "load"):
        from localign import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
