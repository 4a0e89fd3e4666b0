"""The documentation as the tests read it: code blocks, command lines and inline code of README and the site."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"


@cache
def pages() -> dict[str, str]:
    """Name of a page -> its text, of README and of everything in docs/."""
    files = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    texts = {str(file.relative_to(ROOT)): file.read_text(encoding="utf-8") for file in files}
    for file in sorted((ROOT / "docs").rglob("*.ipynb")):
        cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
        texts[str(file.relative_to(ROOT))] = "\n\n".join(
            "".join(c["source"]) for c in cells if c["cell_type"] == "markdown"
        )
    return texts


def blocks(text: str, language: str) -> list[str]:
    """The contents of the fenced blocks of a language; ``""`` for blocks that name none."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    return [content for name, content in fenced if name == language]


def command_lines(text: str) -> Iterator[list[str]]:
    """The words of every command line of fenced and indented blocks, and after ``$`` in texts, without comments."""
    indented = re.findall(r"^    (.*)$", _without_fences(text).replace("\\\n", " "), flags=re.MULTILINE)
    fenced = [line for name in ("bash", "") for block in blocks(text, name) for line in _lines(block)]
    prompted = [line[2:] for block in blocks(text, "text") for line in _lines(block) if line.startswith("$ ")]
    for line in (*fenced, *prompted, *indented):
        try:
            yield shlex.split(line, comments=True)
        except ValueError:
            continue


def localign_lines(text: str) -> Iterator[list[str]]:
    """What follows ``localign``, or ``torchrun ... -m localign``, on every command line."""
    for words in command_lines(text):
        if words[:1] == ["localign"]:
            yield words[1:]
        elif "-m" in words and words[words.index("-m") + 1] == "localign":
            yield words[words.index("-m") + 2 :]


def inline_code(text: str) -> list[str]:
    """The inline code of a text, line breaks as spaces."""
    return [" ".join(code.split()) for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", _without_fences(text))]


def _lines(block: str) -> list[str]:
    return block.replace("\\\n", " ").splitlines()


def _without_fences(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
