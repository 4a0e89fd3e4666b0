"""Export folders: a backbone as tensors plus one JSON file, which others can load.

``model.safetensors`` holds the ViT with timm's parameter names. ``config.json`` holds timm's own keys, and in a section
``localign`` what timm has no key for: soft-cap, final norm, feature layer, provenance. The decoder of an alignment is
stored as ``decoder.safetensors`` in the same folder. transformers loads the backbone, soft-cap and all, with the code
that lies beside it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import NoneType
from typing import Any, TypedDict, cast, get_args

import torch
from safetensors.torch import save_file
from torch import nn

from localign._version import __version__
from localign.backbones.backbone import Backbone, FinalNorm
from localign.backbones.building import NORM_EPS_ARGUMENT, build_described_vit
from localign.backbones.families.writing import preprocessor_config
from localign.backbones.preprocessing import Preprocessing
from localign.backbones.publishing.cards import backbone_card, write_card
from localign.backbones.weights import StateDict, read_file
from localign.errors import UserError
from localign.files import replace_text, replacing
from localign.files.output import EXPORT, kinds_of
from localign.options.names import AttentionBackend
from localign.portable import VIT, VIT_CLASSES, module_text
from localign.portable.native_localign_vlm import PositionInterpolation
from localign.text.printing import printable
from localign.text.reading import read_json_object
from localign.weights import check_finite, check_fit, load_strict

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
DECODER_FILE = "decoder.safetensors"
PREPROCESSOR_FILE = "preprocessor_config.json"
OTHER_FILES = (DECODER_FILE, "model.onnx*", "model.pt2")
"""Files of exports that not every format writes."""
IMAGE_PROCESSOR = "CLIPImageProcessor"
"""transformers' class; it takes a folder with timm's keys for one of timm's unless config.json names it, too."""
NO_OTHER_CLASS = "unknown: load this folder with AutoModel.from_pretrained(FOLDER, trust_remote_code=True)"
"""Stands where other classes of transformers expect a number. They would load the folder with random weights, and now
fail with this text."""
FORMAT = 1


class PretrainedConfig(TypedDict):
    """timm's facts about a model's input."""

    input_size: list[int]
    """Channels, height, width."""
    mean: list[float]
    std: list[float]
    num_classes: int
    fixed_input_size: bool


class ClassifierSection(TypedDict):
    """The head that fine-tuning stores beside the backbone."""

    classes: list[str]
    multi_label: bool
    sha256: str


class _Section(TypedDict):
    format: int
    version: str
    name: str
    soft_cap: float | None
    final_norm: FinalNorm
    norm: str
    """Class name of the final norm."""
    norm_eps: float | None
    pooling: str | None
    feature_layer: int
    num_prefix_tokens: int
    grid: list[int]
    decoder: dict[str, Any] | None
    """Fields of the decoder's config."""
    provenance: dict[str, Any]
    sha256: str


class ExportSection(_Section, total=False):
    """The section ``localign`` of an export's ``config.json``."""

    position_interpolation: str
    """Present if it is not bicubic."""
    block_norm_eps: float | None
    """Epsilon of all other norms, if it is not timm's default for the architecture."""
    decoder_sha256: str | None
    classifier: ClassifierSection


_TOP_FIELDS: dict[str, tuple[type, ...]] = {
    "architecture": (str,),
    "model_args": (dict,),
    "pretrained_cfg": (dict,),
}
_SECTION_FIELDS: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "soft_cap": (int, float, NoneType),
    "final_norm": (str,),
    "norm_eps": (int, float, NoneType),
    "pooling": (str, NoneType),
    "decoder": (dict, NoneType),
    "provenance": (dict,),
    "sha256": (str,),
}
"""Keys that readers use, and the types of their values."""


class ExportDescription(TypedDict):
    """An export's ``config.json``: transformers' and timm's keys, and ours in a section."""

    model_type: str
    architectures: list[str]
    auto_map: dict[str, str]
    image_processor_type: str
    hidden_size: str
    architecture: str
    num_classes: int
    num_features: int
    global_pool: str
    model_args: dict[str, Any]
    pretrained_cfg: PretrainedConfig
    localign: ExportSection


def save_backbone(
    backbone: Backbone,
    folder: str | Path,
    *,
    decoder: StateDict | None = None,
    decoder_config: dict[str, Any] | None = None,
    provenance: dict[str, Any] | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write an export folder. Each file is written completely or not at all, and the config last.

    Args:
        backbone: The backbone to save.
        folder: Created if it does not exist.
        decoder: Tensors of the alignment's decoder and of the projection before it.
        decoder_config: The arguments to build the decoder again.
        provenance: Facts for the reader: base weights, run, seed, data.
        dtype: Storage dtype of floating-point tensors; default the dtype of each tensor.

    Returns:
        The folder.

    Raises:
        UserError: A weight is NaN or infinite, perhaps because it is too large for ``dtype``. Nothing is written then.
    """
    folder = Path(folder)
    state = {k: _stored(v, dtype) for k, v in backbone.vit.state_dict().items()}
    check_finite(state, f"the backbone {backbone.name} is not exported")
    if decoder is not None:
        decoder = {k: _stored(v, dtype) for k, v in decoder.items()}
        check_finite(decoder, "the decoder is not exported")
    folder.mkdir(parents=True, exist_ok=True)
    _save_tensors(state, folder / WEIGHTS_FILE)
    if decoder is not None:
        _save_tensors(decoder, folder / DECODER_FILE)
    if EXPORT in kinds_of(folder):
        for file in [file for pattern in OTHER_FILES for file in folder.glob(pattern)]:
            if decoder is None or file.name != DECODER_FILE:
                file.unlink(missing_ok=True)  # left by an earlier export
    replace_text(
        folder / PREPROCESSOR_FILE, json.dumps(preprocessor_config(backbone, "clip"), indent=1) + "\n"
    )
    for name in VIT:
        replace_text(folder / f"{name}.py", module_text(name))
    write_card(folder, backbone_card(backbone, folder, "timm", provenance or {}))
    config = _config(backbone, state, decoder_config, provenance or {})
    if backbone.position_interpolation != "bicubic":
        config["localign"]["position_interpolation"] = backbone.position_interpolation
    config["localign"]["decoder_sha256"] = content_hash(decoder) if decoder is not None else None
    replace_text(folder / CONFIG_FILE, json.dumps(config, indent=1) + "\n")
    return folder


def _stored(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    tensor = tensor.detach().cpu()
    return tensor.to(dtype).contiguous() if dtype and tensor.is_floating_point() else tensor.contiguous()


def _save_tensors(state: StateDict, path: Path) -> None:
    with replacing(path) as temporary:
        save_file(state, temporary, metadata={"format": "pt"})  # transformers asks for it


def _config(
    backbone: Backbone, state: StateDict, decoder: dict[str, Any] | None, provenance: dict[str, Any]
) -> ExportDescription:
    vit = backbone.vit
    norm = vit.norm if backbone.final_norm == "norm" else getattr(vit, "fc_norm", None)
    kwargs = {k: list(v) if isinstance(v, tuple) else v for k, v in backbone.model_kwargs.items()}
    block_norm_eps: Any = kwargs.pop(NORM_EPS_ARGUMENT, None)  # timm has no such argument
    height, width = backbone.image_size
    return {
        # transformers' keys, for AutoModel.from_pretrained(FOLDER, trust_remote_code=True)
        "model_type": "localign_vit",
        "architectures": ["LocalignViT"],
        "auto_map": VIT_CLASSES,
        "image_processor_type": IMAGE_PROCESSOR,
        "hidden_size": NO_OTHER_CLASS,
        # timm's keys, which timm.create_model("local-dir:FOLDER") reads
        "architecture": backbone.architecture.split(".")[0],
        "num_classes": 0,
        "num_features": backbone.width,
        "global_pool": "avg" if backbone.final_norm == "fc_norm" else "",
        "model_args": kwargs,
        "pretrained_cfg": {
            "input_size": [3, height, width],
            "mean": list(backbone.mean),
            "std": list(backbone.std),
            "num_classes": 0,
            "fixed_input_size": True,
            **backbone.preprocessing.stated(),  # type: ignore[typeddict-item]
        },
        "localign": {
            "format": FORMAT,
            "version": __version__,
            "name": backbone.name,
            "soft_cap": backbone.soft_cap,
            "final_norm": backbone.final_norm,
            "norm": type(norm).__name__,
            "norm_eps": getattr(norm, "eps", None),
            "block_norm_eps": block_norm_eps,
            "pooling": vit.global_pool or None,
            "feature_layer": backbone.depth - 1,
            "num_prefix_tokens": backbone.num_prefix_tokens,
            "grid": list(backbone.grid),
            "decoder": decoder,
            "provenance": provenance,
            "sha256": content_hash(state),
        },
    }


def content_hash(state: StateDict) -> str:
    """SHA-256 over the names, dtypes, shapes and values of tensors, independent of the file format."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def read_config(folder: str | Path) -> ExportDescription:
    """The ``config.json`` of an export folder.

    Raises:
        UserError: The file is missing, not JSON, or not written by localign.
    """
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        raise UserError(f"{printable(folder)} is not an exported backbone: it has no {CONFIG_FILE}")
    try:
        config = read_json_object(path)
    except UserError as error:
        line = str(error).removeprefix(f"{printable(path)} ")
        raise UserError(f"{printable(path)} is not readable JSON: it {line}") from None
    section = config.get("localign")
    if not isinstance(section, dict):
        raise UserError(
            f"{printable(path)} was not written by localign; if it is a timm folder, give local-dir:{printable(folder)}"
        )
    if section.get("format") != FORMAT:
        raise UserError(
            f"{printable(path)} has format {printable(repr(section.get('format'))):.40}; this version reads {FORMAT}"
        )
    for fields, part in ((_TOP_FIELDS, config), (_SECTION_FIELDS, section)):
        for name, kinds in fields.items():
            if not isinstance(part.get(name), kinds) or isinstance(part[name], bool):
                raise UserError(
                    f"{printable(path)} is damaged: {name} is {type(part.get(name)).__name__}, not "
                    f"{' or '.join(kind.__name__ for kind in kinds)}"
                )
    return cast(ExportDescription, config)


def export_folder(path: str | Path) -> Path:
    """The export folder inside a run folder; any other path unchanged."""
    inner = Path(path) / "export"
    return inner if inner.is_dir() else Path(path)


def find_export(name: str | Path) -> Path | None:
    """The export folder that a name points to, directly or as a run folder; None for any other name or folder.

    Raises:
        UserError: The folder's ``config.json`` cannot be read.
    """
    path = export_folder(name) / CONFIG_FILE
    return path.parent if path.is_file() and "localign" in read_json_object(path) else None


def load_backbone(folder: str | Path, *, attention: AttentionBackend = "auto") -> Backbone:
    """Read an export folder back; the inverse of :func:`save_backbone`.

    Returns:
        The backbone in eval mode, float32, with its soft-cap.

    Raises:
        UserError: The folder is incomplete, the tensors do not fit, or they differ from the config's hash.
    """
    folder = Path(folder)
    config = read_config(folder)
    ours = config["localign"]
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise UserError(f"{folder} is not a complete export: it has no {WEIGHTS_FILE}")
    state = read_hashed(path, ours["sha256"])
    with torch.device("meta"):
        check_fit(_empty_vit(config, folder), state, path)  # before a damaged config takes memory
    vit = _empty_vit(config, folder)
    load_strict(vit, state, path)
    cfg = config["pretrained_cfg"]
    return Backbone(
        vit,
        name=ours["name"],
        architecture=config["architecture"],
        model_kwargs=_arguments(config),
        mean=cfg.get("mean", ()),
        std=cfg.get("std", ()),
        soft_cap=ours["soft_cap"],
        attention=attention,
        final_norm=ours["final_norm"],
        preprocessing=Preprocessing.of_timm(cfg, folder / CONFIG_FILE),
        position_interpolation=_interpolation(ours.get("position_interpolation", "bicubic"), folder),
    ).eval()


def _interpolation(found: str, folder: Path) -> PositionInterpolation:
    for known in get_args(PositionInterpolation):
        if found == known:
            return cast(PositionInterpolation, known)
    raise UserError(f"{printable(folder)} resamples positions by {printable(found)!r:.40}, which is unknown")


def _arguments(config: ExportDescription) -> dict[str, Any]:
    """Arguments of :func:`~localign.backbones.building.build_vit`."""
    eps = config["localign"].get("block_norm_eps")
    return config["model_args"] if eps is None else {**config["model_args"], NORM_EPS_ARGUMENT: eps}


def _empty_vit(config: ExportDescription, folder: Path) -> Any:
    ours, path = config["localign"], folder / CONFIG_FILE
    vit: Any = build_described_vit(config["architecture"], _arguments(config), path)
    if ours["pooling"] is None:
        vit.reset_classifier(0, "")
    name = ours["final_norm"]
    if name != "none":
        if name not in ("norm", "fc_norm") or not isinstance(getattr(vit, name, None), nn.Module):
            raise UserError(f"{printable(path)} is damaged: the model has no {printable(name)!r:.40}")
        if ours.get("norm") == "LayerNorm" and not isinstance(getattr(vit, name), nn.LayerNorm):
            setattr(vit, name, nn.LayerNorm(vit.embed_dim))  # alignment has replaced another kind of norm
        if ours["norm_eps"] is not None:
            getattr(vit, name).eps = ours["norm_eps"]
    return vit


def read_hashed(path: Path, expected_hash: str | None) -> StateDict:
    """The tensors of a file of an export folder.

    Raises:
        UserError: The file is missing or damaged, its tensors differ from their :func:`content_hash`, or some are NaN.
    """
    state = read_file(path)
    if expected_hash != content_hash(state):
        raise UserError(f"{printable(path)} is damaged: its tensors differ from the hash in {CONFIG_FILE}")
    check_finite(state, path)
    return state


def load_decoder_state(folder: str | Path) -> StateDict:
    """The decoder tensors of an export folder.

    Raises:
        UserError: The folder has no decoder, or its tensors differ from the config's hash.
    """
    path = Path(folder) / DECODER_FILE
    if not path.is_file():
        raise UserError(f"{folder} holds a backbone without a decoder")
    return read_hashed(path, read_config(folder)["localign"].get("decoder_sha256"))
