"""The method: masks, targets (teacher), student (encoder and decoder), losses; and its task."""

from localign.alignment.export import export_student, load_student
from localign.alignment.task import AlignTask
from localign.options.align import AlignConfig

__all__ = ["AlignConfig", "AlignTask", "export_student", "load_student"]
