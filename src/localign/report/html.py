"""The parts of the page: plain HTML and CSS, pictures included, no scripts and no links to other files."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

CSS = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1f2328; --muted: #57606a; --rule: #d8dce1; --soft: #f5f7f9;
  --before: #b35c00; --after: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --paper: #14181d; --ink: #e8ecf0; --muted: #9aa6b2; --rule: #343c45;
  --soft: #1e242b; --before: #f0a84a; --after: #6cb6ff; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1060px; margin: 0 auto; padding: 40px 24px 80px; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .4rem; }
h2 { font-size: 1.2rem; margin: 3rem 0 .6rem; padding-top: 1rem; border-top: 1px solid var(--rule); }
p, li { max-width: 76ch; }
.lead { font-size: 1.1rem; margin: 0 0 1.4rem; }
.muted, figcaption, .tile small { color: var(--muted); font-size: .88rem; }
.tiles { display: grid; gap: 12px; margin: 1.4rem 0;
  grid-template-columns: repeat(auto-fit, minmax(205px, 1fr)); }
.tile { background: var(--soft); border-radius: 8px; padding: 12px 16px; }
.tile b { display: block; font-size: 1.45rem; line-height: 1.35; font-variant-numeric: tabular-nums; }
.tile small { display: block; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .93rem; font-variant-numeric: tabular-nums; margin: .6rem 0; }
th, td { padding: 5px 14px; text-align: right; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th { color: var(--muted); font-weight: 600; }
th.word, td.word { text-align: left; padding-left: 2px; }
td.word:first-child { white-space: normal; }
table.facts td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
table.facts td:first-child { color: var(--muted); white-space: nowrap; vertical-align: top; }
figure { margin: 1.2rem 0 1.8rem; }
figure img { display: block; max-width: 100%; height: auto; background: #fff; border-radius: 6px; }
.dumbbells { width: 100%; max-width: 760px; height: auto; display: block; margin: .6rem 0; }
.dumbbells text { font-size: 13px; fill: var(--ink); } .dumbbells .axis text { fill: var(--muted); font-size: 12px; }
.dumbbells .axis line { stroke: var(--rule); } .dumbbells .link { stroke: var(--muted); stroke-width: 2; }
.dumbbells .whisker { stroke: var(--after); stroke-width: 1.4; } .dumbbells .before { fill: var(--before); }
.dumbbells .after { fill: var(--after); }
figcaption { margin-top: .5rem; max-width: 88ch; }
details { margin: .8rem 0; }
summary { cursor: pointer; font-weight: 600; }
@media (max-width: 620px) { main { padding: 20px 12px 60px; }
  th, td { padding: 4px 5px; } table { font-size: .8rem; } th { white-space: normal; vertical-align: bottom; }
  td.word { white-space: normal; } .tiles { grid-template-columns: 1fr 1fr; } .tile { padding: 10px; }
  .tile b { font-size: 1.05rem; } }
@media print { :root { --paper: #fff; --ink: #1f2328; --muted: #57606a; --rule: #d8dce1; --soft: #f5f7f9; }
  main { padding: 0; max-width: none; }
  h2 { break-after: avoid; } figure { break-inside: avoid; } }
"""


@dataclass(frozen=True)
class Tile:
    """One number in large type."""

    title: str
    value: str
    remark: str


def text(value: object) -> str:
    """Escape a value's text for HTML."""
    return html.escape(str(value))


def section(title: str, *parts: str) -> str:
    """A heading and its parts; an empty string without parts."""
    content = "\n".join(p for p in parts if p)
    return f"<section>\n<h2>{text(title)}</h2>\n{content}\n</section>" if content else ""


def paragraph(content: str, kind: str = "") -> str:
    """A paragraph of plain text; ``kind`` is a CSS class."""
    mark = f' class="{kind}"' if kind else ""
    return f"<p{mark}>{text(content)}</p>"


def figure(uri: str, alt: str, caption: str) -> str:
    """A picture with alternative text and a caption."""
    return f'<figure><img src="{uri}" alt="{text(alt)}">\n<figcaption>{text(caption)}</figcaption></figure>'


def tiles(entries: Sequence[Tile]) -> str:
    """Tiles side by side."""
    cells = (
        f'<div class="tile"><small>{text(t.title)}</small><b>{text(t.value)}</b>'
        f"<small>{text(t.remark)}</small></div>"
        for t in entries
    )
    return f'<div class="tiles">{"".join(cells)}</div>' if entries else ""


def bullets(lines: Iterable[str]) -> str:
    """A list of plain text lines."""
    items = "\n".join(f"<li>{text(line)}</li>" for line in lines)
    return f"<ul>\n{items}\n</ul>" if items else ""


def folded(title: str, content: str, is_open: bool = False) -> str:
    """A part that the reader can unfold; an empty string without content."""
    if not content:
        return ""
    return f"<details{' open' if is_open else ''}><summary>{text(title)}</summary>\n{content}\n</details>"


def facts(values: Mapping[str, Any]) -> str:
    """A table of names and values; nested names become ``outer.inner``."""
    lines = "\n".join(f"<tr><td>{text(k)}</td><td>{text(v)}</td></tr>" for k, v in _flat(values))
    return f'<div class="scroll"><table class="facts">\n{lines}\n</table></div>' if lines else ""


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
            yield f"{prefix}{key}", shown


def page(title: str, body: Iterable[str]) -> str:
    """The whole document."""
    content = "\n".join(part for part in body if part)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n{content}\n</main>\n</body>\n</html>\n"
    )
