"""Results as tables, figures and one self-contained HTML page."""

from localign.report.build import build_report
from localign.report.gather import PICTURES_FILE, gather_pictures, gather_predictions
from localign.report.papertables import write_table
from localign.report.probing import write_figure, write_probe_report
from localign.report.tables import before_after, to_terminal

__all__ = [
    "PICTURES_FILE",
    "before_after",
    "build_report",
    "gather_pictures",
    "gather_predictions",
    "to_terminal",
    "write_figure",
    "write_probe_report",
    "write_table",
]
