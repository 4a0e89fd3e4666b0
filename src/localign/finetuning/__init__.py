"""Classification fine-tuning of a backbone with a transformer head: model and task."""

from localign.finetuning.model import ImageClassifier, export_classifier, load_classifier
from localign.finetuning.task import FinetuneTask, finetune
from localign.options.finetune import FinetuneConfig

__all__ = [
    "FinetuneConfig",
    "FinetuneTask",
    "ImageClassifier",
    "export_classifier",
    "finetune",
    "load_classifier",
]
