"""Classification fine-tuning of a backbone under a transformer pooling head: options, model, task."""

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
