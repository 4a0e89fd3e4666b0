"""The names under which lmms-eval finds our model and tasks. This file does not import lmms-eval."""

from __future__ import annotations

from pathlib import Path

TASK_FOLDER = Path(__file__).with_name("tasks")
"""Folder of our tasks, for lmms-eval's ``--include_path``."""

MODEL_NAME = "localign"
"""For lmms-eval's ``--model``."""

MODEL_CLASS = "localign.vlm.lmms.model.LocalignLMM"
