"""Files that travel with exported models and run without localign, by ``trust_remote_code=True``.

They import nothing of localign, and each other only relatively, because transformers copies them out of the model's
folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

VIT = ("modeling_localign_vit",)
VLM = (
    "configuration_localign_vlm",
    "modeling_localign_vit",
    "modeling_localign_vlm",
    "native_localign_vlm",
    "processing_localign_vlm",
)
VIT_CLASSES = {
    "AutoConfig": "modeling_localign_vit.LocalignViTConfig",
    "AutoModel": "modeling_localign_vit.LocalignViT",
}
VLM_CLASSES = {
    "AutoConfig": "configuration_localign_vlm.LocalignVLMConfig",
    "AutoModel": "modeling_localign_vlm.LocalignVLMModel",
    "AutoModelForImageTextToText": "modeling_localign_vlm.LocalignVLMForConditionalGeneration",
}
VLM_PROCESSOR = {"AutoProcessor": "processing_localign_vlm.LocalignProcessor"}


def add_code(folder: Path, modules: tuple[str, ...], auto_map: Mapping[str, str], architecture: str) -> None:
    """Copy modules into a model's folder and name their classes in its ``config.json``.

    Args:
        folder: A folder that transformers wrote.
        modules: :data:`VIT` or :data:`VLM`.
        auto_map: Class of transformers -> module and class in the folder.
        architecture: The class name of the model.
    """
    for module in modules:
        (folder / f"{module}.py").write_text(module_text(module), encoding="utf-8")
    add_entries(folder / "config.json", {"architectures": [architecture], "auto_map": dict(auto_map)})


def module_text(name: str) -> str:
    """The source text of a module of this folder."""
    return Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")


def add_entries(path: Path, entries: Mapping[str, object]) -> None:
    """Add entries to a JSON object in a file."""
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | entries, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
