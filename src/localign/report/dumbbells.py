"""Recall of each class before and after alignment as two dots and a line, drawn by the browser itself."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from localign.report.tables.rows import ClassRow, percent, signed

_WIDTH, _LEFT, _RIGHT, _LINE, _TOP = 640, 170, 84, 22, 26
_NAME_LENGTH = 24
_TICKS = (0, 25, 50, 75, 100)


def dumbbells(rows: Sequence[ClassRow]) -> str:
    """An SVG element: for each class a disc at the recall before, a square after, and the interval of the difference.

    The interval is drawn around the square. Rows without both recalls are left out; without any row the text is empty.
    """
    both = [row for row in rows if _is_share(row.recall.baseline) and _is_share(row.recall.aligned)]
    if not both:
        return ""
    height = _TOP + _LINE * len(both) + 22
    axis = "".join(
        f'<line x1="{_x(t / 100):.1f}" x2="{_x(t / 100):.1f}" y1="{_TOP - 6}" y2="{height - 20}"/>'
        f'<text x="{_x(t / 100):.1f}" y="{height - 5}" text-anchor="middle">{t} %</text>'
        for t in _TICKS
    )
    legend = (
        f'<circle class="before" cx="{_LEFT + 6}" cy="9" r="5"/><text x="{_LEFT + 16}" y="13">before</text>'
        f'<rect class="after" x="{_LEFT + 78}" y="4" width="10" height="10"/>'
        f'<text x="{_LEFT + 94}" y="13">after</text>'
    )
    lines = "".join(_line(row, _TOP + _LINE * (number + 0.5)) for number, row in enumerate(both))
    return (
        f'<svg class="dumbbells" viewBox="0 0 {_WIDTH} {height}" role="img" '
        f'aria-label="Recall of {len(both)} classes before and after alignment; the table below has the numbers">'
        f'<g class="axis">{axis}</g>{legend}{lines}</svg>'
    )


def _line(row: ClassRow, y: float) -> str:
    recall = row.recall
    before, after = float(recall.baseline or 0), float(recall.aligned or 0)
    name = row.name if len(row.name) <= _NAME_LENGTH else row.name[: _NAME_LENGTH - 1] + "…"
    whisker = ""
    if recall.half_width is not None and math.isfinite(recall.half_width):
        low, high = (min(1.0, max(0.0, after + sign * recall.half_width)) for sign in (-1, 1))
        ends = "".join(
            f'<line class="whisker" x1="{_x(v):.1f}" x2="{_x(v):.1f}" y1="{y - 5}" y2="{y + 5}"/>'
            for v in (low, high)
        )
        whisker = f'<line class="whisker" x1="{_x(low):.1f}" x2="{_x(high):.1f}" y1="{y}" y2="{y}"/>{ends}'
    told = f"{row.name}: {percent(before)} % before, {percent(after)} % after, {signed(recall)} points"
    return (
        f"<g><title>{html.escape(told)}</title>"
        f'<text x="{_LEFT - 10}" y="{y + 4}" text-anchor="end">{html.escape(name)}</text>'
        f'<line class="link" x1="{_x(before):.1f}" x2="{_x(after):.1f}" y1="{y}" y2="{y}"/>{whisker}'
        f'<circle class="before" cx="{_x(before):.1f}" cy="{y}" r="5"/>'
        f'<rect class="after" x="{_x(after) - 5:.1f}" y="{y - 5}" width="10" height="10"/>'
        f'<text x="{_WIDTH - _RIGHT + 14}" y="{y + 4}">{html.escape(signed(recall))}</text></g>'
    )


def _x(share: float) -> float:
    return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)


def _is_share(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
