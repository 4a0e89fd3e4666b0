"""Results as tables, figures and one self-contained HTML page."""

from localign.report.build import build_report
from localign.report.gather import PICTURES_FILE, gather_pictures
from localign.report.tables import before_after, to_terminal

__all__ = ["PICTURES_FILE", "before_after", "build_report", "gather_pictures", "to_terminal"]
