"""Export folders of aligned students: writing and reading."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from localign.alignment.formats.graphs import FILES as GRAPHS
from localign.alignment.formats.graphs import export_graph
from localign.alignment.formats.transformers import export_transformers
from localign.alignment.published import read_published
from localign.alignment.setup import resolve_soft_cap, student_of_run, with_starting_pooling
from localign.alignment.student import Decoder, DecoderConfig, Encoder, Student
from localign.backbones import Backbone, create_backbone, load_backbone, save_backbone
from localign.backbones.building import check_numbers, set_image_size
from localign.backbones.export import content_hash, load_decoder_state, read_config
from localign.backbones.publishing.cards import backbone_card, measured
from localign.backbones.publishing.push import publish
from localign.backbones.weights import StateDict
from localign.engine.run_folder import provenance, read_results
from localign.errors import UserError
from localign.files.output import EXPORT_FILES
from localign.options.export import ExportConfig, ImportConfig
from localign.options.names import AttentionBackend
from localign.text.printing import printable
from localign.weights import check_fit, load_strict

_PROJECTION, _DECODER = "encoder_head.", "decoder."


def export_student(
    student: Student, folder: str | Path, *, decoder: bool = True, provenance: dict[str, Any] | None = None
) -> Path:
    """Write the aligned backbone and, by default, the decoder and the linear layer before it.

    A student without a decoder is exported as its backbone alone, because its head serves only training.

    Args:
        student: The trained student; not changed.
        folder: Created if it does not exist.
        decoder: Also write ``decoder.safetensors`` if the student has a decoder.
        provenance: Facts about the run, stored in ``config.json``.
    """
    tensors, config = None, None
    if decoder and student.decoder is not None:
        tensors = {_PROJECTION + k: v for k, v in student.encoder.head.state_dict().items()}
        tensors |= {_DECODER + k: v for k, v in student.decoder.state_dict().items()}
        config = asdict(student.decoder.config)
    return save_backbone(
        student.encoder.backbone,
        folder,
        decoder=tensors,
        decoder_config=config,
        provenance=provenance,
    )


def load_student(
    folder: str | Path,
    *,
    image_size: int | Sequence[int] | None = None,
    attention: AttentionBackend = "auto",
) -> Student:
    """Read a student from an export folder with a decoder; the inverse of :func:`export_student`.

    Args:
        folder: The export folder.
        image_size: Input side, or (height, width), pixels; default that of the export. Positions of encoder and decoder
            are resampled.
        attention: Back-end of soft-capped attention.

    Returns:
        The student in eval mode.

    Raises:
        UserError: The folder has no decoder, is damaged, its parts do not fit together, or the image size does not fit
            the patches.
    """
    backbone = load_backbone(folder, attention=attention)
    config = read_config(folder)["localign"]["decoder"]
    if config is None:
        raise UserError(f"{folder} holds a backbone without a decoder")
    state = load_decoder_state(folder)
    parts = {prefix: _without_prefix(state, prefix) for prefix in (_PROJECTION, _DECODER)}
    with torch.device("meta"):  # before a damaged config takes memory
        modules = _empty_parts(backbone, config, folder)
        for prefix, part in parts.items():
            check_fit(modules[prefix], part, f"{folder} {prefix.rstrip('.')}")
    encoder, decoder = Encoder(backbone, DecoderConfig(**config).width), Decoder(DecoderConfig(**config))
    load_strict(encoder.head, parts[_PROJECTION], f"{folder} {_PROJECTION.rstrip('.')}")
    load_strict(decoder, parts[_DECODER], f"{folder} {_DECODER.rstrip('.')}")
    student = Student(encoder, decoder).eval()
    return student if image_size is None else student.set_image_size(image_size)


def _without_prefix(state: StateDict, prefix: str) -> StateDict:
    return {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}


def _empty_parts(backbone: Backbone, config: dict[str, Any], folder: str | Path) -> dict[str, nn.Module]:
    check_numbers(config, folder)
    try:
        described = DecoderConfig(**config)
        return {_PROJECTION: Encoder(backbone, described.width).head, _DECODER: Decoder(described)}
    except (TypeError, ValueError, RuntimeError, ArithmeticError, AttributeError, AssertionError) as error:
        line = printable(str(error).partition("\n")[0])
        raise UserError(f"{printable(folder)} describes a decoder that cannot be built: {line}") from None


def run_export(config: ExportConfig) -> None:
    """Write an export folder from a run, or from a backbone by name.

    Raises:
        UserError: The run, checkpoint or backbone does not exist, an option is already fixed by the run, the results
            are of other weights, or the Hub refuses the export.
    """
    student, backbone, facts = _opened(config)
    section = ""
    if config.results is not None:
        digest = content_hash(backbone.vit.state_dict())
        section = measured(read_results(config.results), digest, config.results)
    folder = Path(config.out)
    if config.format != "timm":
        export = export_graph if config.format in GRAPHS else export_transformers
        difference = export(backbone.eval(), config, facts)
        kept = f"tokens within {difference:.1e} of their root mean square"
        print(f"export     {printable(folder)}: format {config.format}, {kept}")
    else:
        if student is not None:
            export_student(student, folder, decoder=config.decoder, provenance=facts)
        else:
            save_backbone(backbone, folder, provenance=facts)
        print(f"export     {printable(folder)}")
    publish(
        folder,
        backbone_card(backbone, folder, config.format, facts, measured=section, repository=config.push_to),
        EXPORT_FILES,
        private=config.private,
    )


def _opened(config: ExportConfig) -> tuple[Student | None, Backbone, dict[str, Any]]:
    """The student of a run, if the source is one, the backbone, and their provenance."""
    source = Path(config.source)
    if (source / "checkpoints").is_dir():
        if config.model_kwargs or config.weights != "pretrained":
            raise UserError(
                f"{source} is a run; --weights and --model-kwargs apply to backbones by name only"
            )
        student, run = student_of_run(source, config.checkpoint)
        if config.keep_pooling:
            backbone = with_starting_pooling(student, source)
            if config.image_size is not None:
                set_image_size(backbone, config.image_size)
            return None, backbone, {**run, "pooling": "of the starting model", **provenance()}
        facts: dict[str, Any] = {**run, **provenance()}
        if config.image_size is not None:
            facts["resampled_from"] = list(student.encoder.backbone.image_size)
            student.set_image_size(config.image_size)
        return student, student.encoder.backbone, facts
    if config.keep_pooling:
        raise UserError(f"--keep-pooling applies to runs of `localign align`; {config.source} is none")
    backbone = create_backbone(
        config.source,
        weights=config.weights,
        image_size=config.image_size,
        model_kwargs=config.model_kwargs,
    )
    weights = {} if config.weights == "pretrained" else {"weights": config.weights}
    return None, backbone, {"source": config.source, **weights, **provenance()}


def run_import(config: ImportConfig) -> None:
    """Convert a checkpoint of the published release to an export folder.

    Raises:
        UserError: The file is unreadable, the backbone is unknown, or they do not fit together.
    """
    backbone = create_backbone(
        config.backbone, weights="none", image_size=config.image_size, model_kwargs=config.model_kwargs
    )
    student = read_published(config.file, backbone, soft_cap=resolve_soft_cap(config.soft_cap, backbone))
    facts = {"method": "MaskEmbed", "source": Path(config.file).name, "backbone": config.backbone}
    folder = export_student(student, config.out, decoder=config.decoder, provenance=facts)
    print(f"imported   {printable(config.file)} -> {printable(folder)}")
