"""The unreadable images of a run: each one is reported once."""

from __future__ import annotations

from collections.abc import Iterable

from localign.engine.distributed import DistributedContext
from localign.engine.log import say


class UnreadableImages:
    """Collects unreadable images as name -> reason.

    Args:
        context: All ranks of the run.
        known: Images that an earlier part of the run met and logged.
    """

    def __init__(self, context: DistributedContext, known: dict[str, str] | None = None) -> None:
        self.context = context
        self._own = dict(known or {})
        self._logged = set(self._own)

    def add(self, bad: Iterable[tuple[str, str]]) -> None:
        """Add (name, reason) pairs that this rank met, and print new ones."""
        for name, reason in bad:
            if name not in self._own:
                self._own[name] = reason
                say(f"skipped unreadable image {name}: {reason}")

    def gather(self) -> tuple[dict[str, str], dict[str, str]]:
        """All unreadable images of all ranks, and the new ones since the last call. All ranks call it."""
        parts = self.context.all_gather_object(self._own)
        images = {name: reason for part in parts for name, reason in part.items()}
        new = {name: reason for name, reason in images.items() if name not in self._logged}
        self._logged |= new.keys()
        return images, new
