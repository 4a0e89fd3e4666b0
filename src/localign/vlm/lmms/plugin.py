"""What lmms-eval finds of us by itself: the entry point of the group ``lmms_eval.models``."""

from __future__ import annotations

from lmms_eval.models.registry_v2 import ModelManifest

from localign.vlm.lmms.registration import MODEL_CLASS, MODEL_NAME


def manifest() -> ModelManifest:
    """Our models, as ``--model localign``.

    They are of lmms-eval's "simple" kind: to its "chat" kind it gives generation tasks alone, no choices.
    """
    return ModelManifest(model_id=MODEL_NAME, simple_class_path=MODEL_CLASS)
