"""Hooks of the site (mkdocs.yml): generated pages, links out of docs/, formulas, and no request to other servers."""

from __future__ import annotations

import ast
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "localign"
DOCS = ROOT / "docs"
BORROWED = {
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "results.md": "benchmarks/RESULTS.md",
    "log.md": "benchmarks/LOG.md",
}
"""Page of the site -> file of the repository that it shows."""
NOTEBOOKS = "notebooks/"
_LINK = re.compile(r"\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")
_FORMULA = re.compile(r'<(span|div) class="arithmatex">(?:\\\(|\\\[)(.*?)(?:\\\)|\\\])</\1>', re.DOTALL)
_ROLE = re.compile(r":(?:class|func|meth|attr|data|mod|exc):<code>~?([^<]*)</code>")
_REQUEST = re.compile(
    r"<(?:link|script|img|iframe|source|video|audio)\b[^>]*?\b(?:src|href)=[\"']?((?:https?:)?//[^\"'\s>]+)"
    r"|@import\s+[\"']?((?:https?:)?//[^\"')\s]+)|url\([\"']?((?:https?:)?//[^\"')\s]+)",
    re.IGNORECASE,
)


# -- pages ----------------------------------------------------------------------------------------------------


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are not files of docs/: borrowed, generated, and notebooks."""
    for page, source in BORROWED.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    files.append(File.generated(config, "commands.md", content=commands_page()))
    files.append(File.generated(config, "errors.md", content=errors_page()))
    for notebook in [file for file in files if file.src_uri.endswith(".ipynb")]:
        files.remove(notebook)
        page = notebook.src_uri.replace(".ipynb", ".md")
        text = (DOCS / notebook.src_uri).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=notebook_page(text)))
    return files


def on_config(config: Any) -> Any:
    """The navigation names notebooks by their own file names; their pages end in .md."""
    config.nav = json.loads(json.dumps(config.nav).replace(".ipynb", ".md"))
    return config


def commands_page() -> str:
    """Every command with its options: what ``--help`` prints."""
    sys.path.insert(0, str(PACKAGE.parent))
    os.environ["COLUMNS"] = "100"
    from localign.cli.parser import build_parser
    from localign.cli.table import COMMANDS

    parts = [
        "# Commands\n\nWhat `localign COMMAND --help` prints. Options can also come from a file (`--config run.yaml`, "
        "flat keys named like the options); options on the command line win. Exit codes: 0 for success; 1 for a "
        "failed run; 2 for bad usage or input, with one line that names the problem.\n"
    ]
    parts += [f"## localign {name}\n\n```text\n{build_parser(name).format_help()}```\n" for name in COMMANDS]
    return "\n".join(parts)


def errors_page() -> str:
    """Every error line of the package, by the folder that raises it."""
    parts = [
        "# Error lines\n\nEvery line that localign can end with, collected from the code. `...` stands for a name, a "
        "number or a reason. The lines of the section `options` are about options, those of `data` about images and "
        "their files, and so on. [Troubleshooting](troubleshooting.md) has the frequent lines with their causes.\n"
    ]
    for room, lines in error_lines().items():
        listed = "".join(f"{line}\n" for line in lines)
        parts.append(f"## {room}\n\n```text\n{listed}```\n")
    return "\n".join(parts)


def error_lines() -> dict[str, list[str]]:
    """Folder or file of the package -> the lines of the errors that it raises, ``...`` for what varies."""
    found: dict[str, set[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        inside = path.relative_to(PACKAGE)
        room = "/".join(inside.parts[:2]) if inside.parts[0] == "vlm" else inside.parts[0]
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("UserError", "RunFailure"):
                for text in map(_template, _sources(node.args[0], tree) if node.args else ()):
                    line = " ".join(text.split())
                    if re.search(r"\w{2}", line.replace("...", "")):
                        found.setdefault(room.removesuffix(".py"), set()).add(line)
    return {room: sorted(lines) for room, lines in found.items()}


def _sources(node: ast.expr, tree: ast.Module) -> list[ast.expr]:
    """The expressions that give an error its line: those of a function or a variable of the same file, if it is one."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        functions = [f for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) and f.name == node.func.id]
        returns = [r.value for f in functions for r in ast.walk(f) if isinstance(r, ast.Return) and r.value]
        return returns or [node]
    if isinstance(node, ast.Name):
        assigned = [a for a in ast.walk(tree) if isinstance(a, ast.Assign) and len(a.targets) == 1]
        return [a.value for a in assigned if getattr(a.targets[0], "id", "") == node.id] or [node]
    return [node]


def _template(node: ast.expr) -> str:
    """The constant parts of a string expression, with ``...`` for the others."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_template(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _template(node.left) + _template(node.right)
    return "..."


def notebook_page(text: str) -> str:
    """A notebook as a page: its text and its code."""
    parts = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
    return "\n\n".join(parts) + "\n"


# -- text -----------------------------------------------------------------------------------------------------


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links between files of the repository become links of the site; links to files outside it become text."""
    source = ROOT / BORROWED.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    pages = {(ROOT / file).resolve(): page for page, file in BORROWED.items()}

    def replaced(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        if re.match(r"[a-z]+:", target):
            return match[0]
        path = (source.parent / target).resolve()
        generated = page.file.src_uri not in BORROWED and not path.exists()
        if path in pages:
            uri = pages[path]
        elif path.is_relative_to(DOCS) and (path.is_file() or generated):
            uri = path.relative_to(DOCS).as_posix().replace(".ipynb", ".md")
        else:
            return text
        return f"[{text}]({os.path.relpath(uri, Path(page.file.src_uri).parent)}{anchor})"

    return _LINK.sub(replaced, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Formulas as MathML, which browsers draw without a script; names of docstrings without their roles."""
    return _ROLE.sub(r"<code>\1</code>", _FORMULA.sub(lambda found: mathml(found[2], found[1]), html))


def mathml(formula: str, element: str) -> str:
    """The MathML of a LaTeX formula; a div is a line of its own."""
    from html import unescape

    from latex2mathml.converter import convert

    return str(convert(unescape(formula), display="block" if element == "div" else "inline"))


# -- no outside request -----------------------------------------------------------------------------------------


def on_post_build(config: Any) -> None:
    """Refuse a site that asks another server for anything.

    Raises:
        PluginError: Names the pages and addresses.
    """
    found = [f"{file}: {url}" for file, url in outside_requests(Path(config.site_dir))]
    if found:
        raise PluginError("the site asks other servers for files:\n" + "\n".join(found[:10]))


def outside_requests(site: Path) -> Iterator[tuple[Path, str]]:
    """Files of a site and the addresses elsewhere that a browser would load for them."""
    for path in sorted(site.rglob("*")):
        if path.suffix in (".html", ".css"):
            for match in _REQUEST.finditer(path.read_text(encoding="utf-8")):
                url = next(group for group in match.groups() if group)
                if 'rel="canonical"' not in match[0]:
                    yield path.relative_to(site), url
