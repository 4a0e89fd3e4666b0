"""Results as tables, figures and one self-contained HTML page."""

from localign.report.build import build_report
from localign.report.probing import write_figure, write_probe_report
from localign.report.tables.paper import write_table
from localign.report.tables.rows import before_after, to_terminal
from localign.results import PICTURES_FILE

__all__ = [
    "PICTURES_FILE",
    "before_after",
    "build_report",
    "to_terminal",
    "write_figure",
    "write_probe_report",
    "write_table",
]
