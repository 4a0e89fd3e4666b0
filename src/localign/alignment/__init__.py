"""Locality alignment: masks, teacher, student (encoder and decoder), objectives, losses, and the training task."""

from localign.alignment.export import export_student, load_student
from localign.alignment.task import AlignTask
from localign.options.align import AlignConfig

__all__ = ["AlignConfig", "AlignTask", "export_student", "load_student"]
