"""Vision tower and adapter for each configuration in the paper: which features feed which adapter.

==================  ===========  ======================  ==========  ===============
adapter             backbone     block                   final norm  prefix tokens
==================  ===========  ======================  ==========  ===============
linear, mlp         baseline     second to last          no          dropped
transformer         baseline     second to last          no          kept
linear, mlp,        aligned      last                    yes         kept
transformer
decoder             aligned      last                    yes         kept, hidden
truncated           either       third to last; the      in the      kept
                                 adapter holds the rest  adapter
fused-mlp,          several      last if aligned, else   if aligned  dropped
fused-decoder                    second to last
==================  ===========  ======================  ==========  ===============
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from localign.alignment.student import Student
from localign.backbones import Backbone
from localign.errors import UserError
from localign.options.names import AdapterName
from localign.vlm.model.adapters import Adapter, fresh_adapter
from localign.vlm.model.pretrained_adapters import (
    TRUNCATED_BLOCKS,
    adapter_from_backbone,
    adapter_from_student,
    check_decoder_fits,
    fused_adapter_from_student,
)
from localign.vlm.model.vision import TowerConfig, VisionTower


@dataclass(frozen=True)
class VisionSource:
    """One backbone to build a tower from; its weights are copied."""

    backbone: Backbone
    """The complete ViT."""
    aligned: bool = False
    """Whether the backbone was aligned, so that its last block and final norm are used."""
    student: Student | None = None
    """The alignment's student, if the adapter takes its decoder."""


def build_tower(
    kind: AdapterName, sources: Sequence[VisionSource], *, published_quirks: bool = False
) -> VisionTower:
    """The vision tower that feeds an adapter, with the sources' weights.

    Args:
        kind: Name of the adapter.
        sources: One backbone, or several whose tokens are concatenated on channels in this order.
        published_quirks: End a truncated baseline one block earlier; see
            :func:`~localign.vlm.model.pretrained_adapters.adapter_from_backbone`.

    Raises:
        UserError: The adapter does not work with these backbones.
    """
    _check(kind, sources)
    configs = [_features(kind, source, len(sources) > 1, published_quirks) for source in sources]
    return VisionTower(configs, [source.backbone for source in sources])


def _features(kind: AdapterName, source: VisionSource, fused: bool, quirks: bool) -> TowerConfig:
    if kind == "truncated":
        last = -1 - TRUNCATED_BLOCKS - int(quirks and not source.aligned)
        return TowerConfig.of(source.backbone, layer=last, norm=False, keep_prefix=True)
    keep_prefix = not fused and (source.aligned or kind == "transformer")
    layer = -1 if source.aligned else -2
    return TowerConfig.of(source.backbone, layer=layer, norm=source.aligned, keep_prefix=keep_prefix)


def _check(kind: AdapterName, sources: Sequence[VisionSource]) -> None:
    names = " + ".join(source.backbone.name for source in sources)
    if kind in ("transformer", "decoder", "truncated") and len(sources) != 1:
        raise UserError(f"the {kind} adapter takes one backbone, not {names}")
    if kind in ("decoder", "fused-decoder"):
        aligned = [source for source in sources if source.aligned]
        if len(aligned) != 1 or aligned[0].student is None:
            raise UserError(f"the {kind} adapter takes one aligned backbone with its decoder, not {names}")
        check_decoder_fits(aligned[0].student, aligned[0].backbone)


def build_vision(
    kind: AdapterName,
    sources: Sequence[VisionSource],
    output_width: int,
    *,
    seed: int = 0,
    published_quirks: bool = False,
) -> tuple[VisionTower, Adapter]:
    """Tower and adapter of a configuration, ready for training.

    Args:
        kind: Name of the adapter.
        sources: One backbone, or several whose tokens are concatenated on channels in this order.
        output_width: Width of the language model.
        seed: Seed of the adapter's random weights.
        published_quirks: Reproduce the published code where it differs from the paper: a truncated baseline loses
            its last block and norm; a decoder's blocks use exact GELU.

    Raises:
        UserError: The adapter does not work with these backbones; the error names both.
    """
    tower = build_tower(kind, sources, published_quirks=published_quirks)
    aligned = next((source for source in sources if source.aligned), None)
    if kind == "truncated":
        quirks = published_quirks and aligned is None
        adapter = adapter_from_backbone(sources[0].backbone, output_width, published_quirks=quirks)
    elif kind in ("decoder", "fused-decoder"):
        assert aligned is not None
        assert aligned.student is not None
        if kind == "decoder":
            adapter = adapter_from_student(aligned.student, output_width, published_quirks=published_quirks)
        else:
            adapter = fused_adapter_from_student(
                aligned.student, tower, output_width, seed=seed, published_quirks=published_quirks
            )
    else:
        adapter = fresh_adapter(kind, tower, output_width, seed=seed)
    return tower, adapter
