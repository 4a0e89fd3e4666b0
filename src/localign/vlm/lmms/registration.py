"""What is registered with lmms-eval, without importing it."""

from __future__ import annotations

from pathlib import Path

TASK_FOLDER = Path(__file__).with_name("tasks")
"""Of our tasks; lmms-eval's ``--include_path``."""

MODEL_NAME = "localign"
"""lmms-eval's ``--model``."""

MODEL_CLASS = "localign.vlm.lmms.model.LocalignLMM"
