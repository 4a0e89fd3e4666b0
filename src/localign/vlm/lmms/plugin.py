"""The entry point of the group ``lmms_eval.models``, through which lmms-eval finds our model."""

from __future__ import annotations

from lmms_eval.models.registry_v2 import ModelManifest

from localign.vlm.lmms.registration import MODEL_CLASS, MODEL_NAME


def manifest() -> ModelManifest:
    """Our model, as ``--model localign``.

    It is of lmms-eval's "simple" kind, because the "chat" kind gets generation tasks only, without choices.
    """
    return ModelManifest(model_id=MODEL_NAME, simple_class_path=MODEL_CLASS)
