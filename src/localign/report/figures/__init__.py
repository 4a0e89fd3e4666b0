"""The figures of the report, one file per family. Numbers or arrays in, drawings out."""

from localign.report.figures.drawing import Drawing

__all__ = ["Drawing"]
