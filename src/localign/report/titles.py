"""What a report says of its run in one line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from localign.report.tables.rows import probe_runs
from localign.results import Results

_NAMED = 3
"""Backbones that a title names."""


def title(results: Results, folder: str) -> str:
    """The run in words, such as "Alignment of clip-vit-b on photographs, 1.28 M samples seen".

    Args:
        results: ``results.json``, or the saved config of an unfinished run.
        folder: Name of the run's folder, for runs that say nothing of themselves.
    """
    command = str(results.get("command", "run"))
    config: Mapping[str, Any] = results.get("config") or {}
    names = list(probe_runs(results))
    if command == "align" and config.get("backbone"):
        images = results.get("images")
        seen = f", {amount(images)} samples seen" if isinstance(images, int) and images > 0 else ""
        return f"Alignment of {_name(config['backbone'])}{_on(config)}{seen}"
    if command == "probe" and names:
        shown = ", ".join(names) if len(names) <= _NAMED else f"{len(names)} backbones"
        return f"Probing of {shown}{_on(config)}"
    if command == "demo":
        return "Demonstration: a backbone before and after alignment, on drawn scenes"
    if command == "reproduce" and config.get("target"):
        return f"Reproduction of {config['target']}"
    return f"localign {command}: {folder}"


def amount(number: int) -> str:
    """A count for people: 9,876, 57 k or 1.28 M."""
    for unit, name in ((1e9, "G"), (1e6, "M")):
        if number >= 0.9995 * unit:
            return f"{number / unit:.3g} {name}"
    return f"{number / 1e3:.0f} k" if number >= 10_000 else f"{number:,}"


def _on(config: Mapping[str, Any]) -> str:
    data = config.get("data")
    if not isinstance(data, str) or not data:
        return ""
    return " on drawn scenes" if data.partition(":")[0] == "scenes" else f" on {_name(data)}"


def _name(source: object) -> str:
    """The last part of a path; other names as they are."""
    text = str(source)
    return PurePath(text).name or text if text.startswith(("/", ".", "~")) else text
