"""An image classifier: a backbone with a transformer head, as a module and as an export folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from localign.backbones import Backbone, load_backbone, save_backbone
from localign.backbones.export import CONFIG_FILE, content_hash, export_folder, read_config, read_hashed
from localign.errors import UserError
from localign.files import replace_text, replacing
from localign.options.names import AttentionBackend
from localign.probing.heads import Geometry, build_head
from localign.text.printing import printable
from localign.weights import check_finite, load_strict

HEAD_FILE = "head.safetensors"

# Sub-modules of timm's models after the last block.
_AFTER_TOKENS = ("norm", "fc_norm", "attn_pool", "head")


class ImageClassifier(nn.Module):
    """An image classifier: the transformer head of the probing benchmark on the backbone's last-layer tokens.

    The head has two pre-norm blocks over all tokens, the mean of the outputs at the prefix tokens (at all tokens, if
    there are no prefix tokens), and a linear layer. The backbone's own pooling is not used and not trained.

    Args:
        backbone: Becomes a part of this module.
        classes: Class names of the logits.
        multi_label: An image may have several classes.
        freeze: Do not train the backbone, and keep it in eval mode.
    """

    def __init__(
        self, backbone: Backbone, classes: Sequence[str], *, multi_label: bool = False, freeze: bool = False
    ) -> None:
        super().__init__()
        self.backbone = backbone.requires_grad_(not freeze)
        self.classes = tuple(classes)
        self.multi_label = multi_label
        self.freeze = freeze
        for name in _AFTER_TOKENS:
            module = getattr(backbone.vit, name, None)
            if isinstance(module, nn.Module) and name != backbone.final_norm:
                module.requires_grad_(False)
        self.head = build_head("transformer", Geometry.of(backbone), len(self.classes), "global")

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images ``(batch, 3, height, width)`` to logits ``(batch, classes)``."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze):
            tokens = self.backbone.tokens(images)
        logits: Tensor = self.head(tokens)
        return logits

    def train(self, mode: bool = True) -> ImageClassifier:
        super().train(mode)
        if self.freeze:
            self.backbone.eval()
        return self


def export_classifier(
    model: ImageClassifier, folder: str | Path, *, provenance: dict[str, Any] | None = None
) -> Path:
    """Write an export folder of the backbone, with the head's weights and its classes added.

    Args:
        model: The trained classifier; it does not change.
        folder: Created if it does not exist.
        provenance: Facts for the reader of ``config.json``.

    Raises:
        UserError: A weight is NaN or infinite.
    """
    folder = Path(folder)
    state = {k: v.detach().cpu().contiguous() for k, v in model.head.state_dict().items()}
    check_finite(state, "the classifier is not exported")
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / HEAD_FILE) as temporary:
        save_file(state, temporary)
    save_backbone(model.backbone, folder, provenance=provenance)
    config = read_config(folder)
    config["localign"]["classifier"] = {
        "classes": list(model.classes),
        "multi_label": model.multi_label,
        "sha256": content_hash(state),
    }
    replace_text(folder / CONFIG_FILE, json.dumps(config, indent=1) + "\n")
    return folder


def load_classifier(folder: str | Path, *, attention: AttentionBackend = "auto") -> ImageClassifier:
    """Read a classifier from an export folder or a run folder. It is in eval mode.

    Raises:
        UserError: The folder has no classifier, is damaged, or its parts do not fit together.
    """
    folder = export_folder(folder)
    section = read_config(folder)["localign"].get("classifier")
    if section is None:
        raise UserError(f"{folder} holds a backbone without a classifier")
    _check_section(section, folder / CONFIG_FILE)
    backbone = load_backbone(folder, attention=attention)
    state = read_hashed(folder / HEAD_FILE, section["sha256"])
    model = ImageClassifier(backbone, section["classes"], multi_label=section["multi_label"])
    load_strict(model.head, state, folder / HEAD_FILE)
    return model.eval()


def _check_section(section: Any, path: Path) -> None:
    kinds = {"classes": list, "multi_label": bool, "sha256": str}
    good = isinstance(section, dict) and all(isinstance(section.get(k), kind) for k, kind in kinds.items())
    if not good or not section["classes"] or not all(isinstance(name, str) for name in section["classes"]):
        raise UserError(f"{printable(path)} is damaged: its classifier has no list of classes, or no hash")
