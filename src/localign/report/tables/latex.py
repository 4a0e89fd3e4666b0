"""Tables as LaTeX."""

from __future__ import annotations

from localign.report.tables.rows import Grid

_ESCAPES = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "–": "--",
    "—": "---",
    "\u2212": "$-$",
    "±": r"$\pm$",
    "→": r"$\to$",
    "×": r"$\times$",
    "…": r"\ldots{}",
    "\u00a0": "~",
}


def escape(text: str) -> str:
    """Escape the characters that LaTeX treats specially; a line break becomes a space."""
    return "".join(_ESCAPES.get(letter, letter) for letter in " ".join(text.split("\n")))


def to_latex(grid: Grid, caption: str = "", label: str = "") -> str:
    """A floating ``booktabs`` table with a rule above each of the grid's groups.

    Args:
        grid: The table.
        caption: Plain text.
        label: The label for ``\\ref``, not escaped.
    """
    columns = "l" * grid.texts + "r" * (len(grid.header) - grid.texts)
    lines = ["% \\usepackage{booktabs}", "\\begin{table}", "\\centering", "\\small"]
    if caption:
        lines.append(f"\\caption{{{escape(caption)}}}")
    if label:
        lines.append(f"\\label{{{label}}}")
    lines += [f"\\begin{{tabular}}{{{columns}}}", "\\toprule", _line(grid.header), "\\midrule"]
    for i, row in enumerate(grid.rows):
        if i and i in grid.groups:
            lines.append("\\midrule")
        lines.append(_line(row))
    lines += ["\\bottomrule", "\\end{tabular}", "\\end{table}"]
    return "\n".join(lines) + "\n"


def _line(cells: tuple[str, ...]) -> str:
    return " & ".join(escape(cell) for cell in cells) + r" \\"
