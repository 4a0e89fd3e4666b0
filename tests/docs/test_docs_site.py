"""The site's generated parts: error lines, links, formulas; and that it asks no other server for anything."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from docs_text import ROOT, pages

docs_site = pytest.importorskip("docs_site", reason="needs localign[docs]")


def test_error_lines_of_troubleshooting_are_lines_of_the_code() -> None:
    known = [line for lines in docs_site.error_lines().values() for line in lines]
    assert len(known) > 600
    # A quoted line may be cut at either end, and has `...` where the code has one or several names.
    joined = "\n".join(re.sub(r"(\.\.\.\W*)+", "...", line) for line in known)
    rows = re.findall(r"^\| `(.+?)` \| [A-Z]", pages()["docs/troubleshooting.md"], flags=re.MULTILINE)
    assert len(rows) > 40
    quoted = {row: re.sub(r"(\.\.\.\W*)+", "...", row).strip(".") for row in rows}
    assert [row for row, text in quoted.items() if text not in joined] == []


def test_an_error_line_shows_what_is_constant() -> None:
    lines = docs_site.error_lines()
    assert "unknown option ......" in lines["cli"]
    assert any("docker run --shm-size" in line for line in lines["data"])  # its line is written by a function


def page(name: str) -> SimpleNamespace:
    return SimpleNamespace(file=SimpleNamespace(src_uri=name))


def test_links_between_files_of_the_repository_become_links_of_the_site() -> None:
    def shown(text: str, name: str) -> str:
        return str(docs_site.on_page_markdown(text, page(name)))

    assert shown("[R](../benchmarks/RESULTS.md#time)", "multinode.md") == "[R](results.md#time)"
    assert shown("[N](docs/multinode.md)", "contributing.md") == "[N](multinode.md)"
    assert shown("[R](RELEASING.md) [p](pretrain/)", "contributing.md") == "R p"
    assert shown("[F](../formats.md)", "notebooks/vlm-swap.ipynb") == "[F](../formats.md)"
    assert shown("[x](https://example.org)", "index.md") == "[x](https://example.org)"
    assert shown("[E](errors.md)", "troubleshooting.md") == "[E](errors.md)"


def test_formulas_become_mathml() -> None:
    html = docs_site.on_page_content('<span class="arithmatex">\\(a &lt; b_i\\)</span>')
    assert html.startswith("<math")
    assert "<msub>" in html
    assert "&lt;" in html or "&#x0003C;" in html
    assert docs_site.on_page_content(":class:<code>~localign.X</code>") == "<code>localign.X</code>"


@pytest.mark.parametrize(
    "text",
    [
        '<script src="https://cdn.example.org/x.js"></script>',
        '<link rel="stylesheet" href="//fonts.example.org/a.css">',
        "<style>@import 'https://example.org/a.css';</style>",
        "<style>body { background: url(https://example.org/a.png) }</style>",
        '<img alt="a" src=https://example.org/a.png>',
    ],
)
def test_requests_to_other_servers_are_found(text: str, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(text)
    assert len(list(docs_site.outside_requests(tmp_path))) == 1
    with pytest.raises(Exception, match="asks other servers"):
        docs_site.on_post_build(SimpleNamespace(site_dir=str(tmp_path)))


def test_links_to_click_are_no_requests(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text('<a href="https://example.org">x</a><img src="a.png">')
    assert list(docs_site.outside_requests(tmp_path)) == []


def test_every_page_is_in_the_navigation() -> None:
    listed = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    names = [p.removeprefix("docs/") for p in pages() if p.startswith("docs/")]
    assert [name for name in names if f" {name}\n" not in listed] == []
