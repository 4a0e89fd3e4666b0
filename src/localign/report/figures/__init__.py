"""The figures of the probing benchmark, one file per family. Measures in, drawings out."""

from localign.report.figures.drawing import Drawing

__all__ = ["Drawing"]
