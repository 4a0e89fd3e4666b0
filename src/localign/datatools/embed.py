"""`localign embed`: features of images as rows of a parquet file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from localign._version import __version__
from localign.backbones import Backbone, create_backbone
from localign.backbones.export import content_hash
from localign.backbones.preprocessing import UNSTATED
from localign.data.image_source import ImageSource
from localign.data.images import print_notice
from localign.data.loader import EvalLoader
from localign.data.sources import open_source
from localign.data.transforms import EvalTransform
from localign.engine.distributed import choose_device
from localign.engine.progress import progress_bars
from localign.errors import UserError
from localign.files import replacing
from localign.files.output import EMBEDDING_KEY
from localign.options.data import row_group_bytes
from localign.options.export import EmbedConfig
from localign.text.printing import printable

if TYPE_CHECKING:
    import pyarrow as pa

_GROUP_BYTES = 2**26
"""Features in a row group, which is also about what is kept in memory."""
_GROUP_ROWS = 4096
OWN_POOLING, CLASS_TOKEN, MEAN_OF_PATCHES = "the model's own", "class token", "mean of patches"
_NAMED = 100
"""Unreadable images that the file names; it counts all of them."""


def run_embed(config: EmbedConfig) -> None:
    """Write the features of all readable images, and print what was written.

    Raises:
        UserError: pyarrow is missing; the images or the backbone cannot be opened; no image is readable; a feature is
            not finite, or too large for float16; or torchrun started several processes.
        RunFailure: A worker process died.
    """
    rows, bad = write_features(config)
    kinds = "pooled, patches" if config.patches else "pooled"
    print(f"features   {printable(config.out)}: {rows:,} images, {kinds}")
    if bad:
        print(f"skipped    {len(bad):,} unreadable images")
    for name, reason in list(bad.items())[:5]:
        print(f"           {printable(name)}: {printable(reason)}")


def write_features(config: EmbedConfig) -> tuple[int, dict[str, str]]:
    """Write the file; returns its number of rows, and name -> reason of the unreadable images.

    The columns are ``index`` (int64, position in the source), ``key`` (the image's name there), ``pooled`` (float32,
    ``width`` numbers) and, with ``patches``, ``patches`` (``rows * columns * width`` numbers, in row order).

    Raises:
        UserError, RunFailure: As :func:`run_embed` does.
    """
    try:
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError("localign embed requires pyarrow: pip install 'localign[parquet]'") from None
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("localign embed runs in one process; start it without torchrun")
    device = choose_device(config.device)
    backbone = create_backbone(
        config.backbone,
        weights=config.weights,
        image_size=config.image_size,
        model_kwargs=config.model_kwargs,
    )
    source = open_source(
        config.images,
        image_size=backbone.image_size,
        scaled_decode=False,
        exclude=config.exclude,
        field=config.field,
        max_group_bytes=row_group_bytes(config.max_row_group_gib),
        allow_outside=config.allow_outside,
    )
    print_notice(source)
    drawn = config.images.partition(":")[0] == "scenes"  # at the right size
    loader = EvalLoader(
        source,
        EvalTransform(backbone.image_size, preprocessing=UNSTATED if drawn else backbone.preprocessing),
        batch=config.batch_size,
        workers=config.workers,
        pin_memory=device.type == "cuda",
        max_bad_share=1.0,
    )
    schema = _schema(backbone.to(device), source, config)
    rows = 0
    with replacing(config.out) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        for table in _tables(loader, backbone, source, schema):
            writer.write_table(table, row_group_size=len(table))
            rows += len(table)
        bad = {**dict(source.unreadable), **loader.bad.reasons}
        if not rows:
            name, reason = next(iter(bad.items()))
            raise UserError(
                f"none of the {len(source):,} images of {printable(config.images)} can be read; the first is "
                f"{printable(name)}: {printable(reason)}"
            )
        named = [[_text(name), _text(reason)] for name, reason in list(bad.items())[:_NAMED]]
        writer.add_key_value_metadata({"unreadable": json.dumps({"count": len(bad), "named": named})})
    return rows, bad


def embed(backbone: Backbone, images: Tensor, patches: bool = True) -> dict[str, Tensor]:
    """Pooled features and patch tokens in one pass.

    Args:
        backbone: In eval mode.
        images: uint8 ``(batch, 3, height, width)``, on the backbone's device.
        patches: Return the patch tokens, too.

    Returns:
        ``pooled``, float32 ``(batch, width)``, see :func:`pooling`; and ``patches``, float32
        ``(batch, num_patches, width)``, which equals ``backbone.tokens`` without the prefix tokens.
    """
    prefix = backbone.num_prefix_tokens
    with torch.inference_mode():
        tokens = backbone.tokens(backbone.normalise(images), norm=False)
        normed = backbone.normalise_tokens(tokens)
        if (kind := pooling(backbone)) == OWN_POOLING:
            pooled = backbone.vit.forward_head(backbone.vit.norm(tokens), pre_logits=True)
        else:
            pooled = normed[:, 0] if kind == CLASS_TOKEN else normed[:, prefix:].mean(dim=1)
        found = {"pooled": pooled.float()}
        if patches:
            found["patches"] = normed[:, prefix:].float()
    return found


def pooling(backbone: Backbone) -> str:
    """What ``pooled`` is: the model's own pooled output, which equals ``backbone.pooled``.

    Alignment removes pooling; the feature of an aligned model is its class token after the final norm, or the mean of
    its patches if it has no class token.
    """
    if backbone.vit.global_pool:
        return OWN_POOLING
    return MEAN_OF_PATCHES if getattr(backbone.vit, "cls_token", None) is None else CLASS_TOKEN


def _tables(
    loader: EvalLoader, backbone: Backbone, source: ImageSource, schema: pa.Schema
) -> Iterator[pa.Table]:
    """The rows in tables of about :data:`_GROUP_BYTES`; no more than one table and one batch are in memory."""
    import pyarrow as pa

    device = _device(backbone)
    features = [name for name in ("pooled", "patches") if name in schema.names]
    row_bytes = sum(schema.field(name).type.list_size * 4 for name in features)
    least = min(max(_GROUP_BYTES // row_bytes, 1), _GROUP_ROWS)
    held: list[pa.RecordBatch] = []
    with progress_bars() as progress:
        for batch in loader:
            found = embed(backbone, batch.images.to(device, non_blocking=True), "patches" in features)
            indices = batch.indices.tolist()
            keys = [_text(source.name(index)) for index in indices]
            columns = [pa.array(indices, pa.int64()), pa.array(keys, pa.string())]
            columns += [_column(schema.field(name).type, found[name], keys, name) for name in features]
            held.append(pa.record_batch(columns, schema=schema))
            progress("embedding", indices[-1] + 1, len(source))
            if sum(map(len, held)) >= least:
                yield pa.Table.from_batches(held)
                held = []
    if held:
        yield pa.Table.from_batches(held)


def _column(kind: pa.FixedSizeListType, values: Tensor, keys: Sequence[str], name: str) -> pa.Array:
    """Features ``(batch, ...)`` as lists of fixed size. Raises UserError if one is not a finite number of the type."""
    import pyarrow as pa

    dtype = np.dtype(kind.value_type.to_pandas_dtype())
    with np.errstate(over="ignore"):
        stored: NDArray[Any] = values.cpu().numpy().reshape(len(values), -1).astype(dtype)
    wrong = ~np.isfinite(stored).all(axis=1)
    if wrong.any():
        row = int(wrong.argmax())
        fits = bool(torch.isfinite(values[row]).all())
        remedy = (
            "does not fit float16; give --dtype float32" if fits else "is not a number; check the weights"
        )
        raise UserError(f"the {name} feature of {printable(keys[row])} {remedy}")
    return pa.FixedSizeListArray.from_arrays(pa.array(stored.ravel()), type=kind)


def _schema(backbone: Backbone, source: ImageSource, config: EmbedConfig) -> pa.Schema:
    import pyarrow as pa

    facts = {
        "localign": __version__,
        "backbone": _text(config.backbone),
        "architecture": backbone.architecture,
        "sha256": content_hash(backbone.vit.state_dict()),
        "image_size": backbone.image_size,
        "patch_size": backbone.patch_size,
        "grid": backbone.grid,
        "width": backbone.width,
        "soft_cap": backbone.soft_cap,
        "final_norm": backbone.final_norm,
        "pooling": pooling(backbone),
        "mean": backbone.mean,
        "std": backbone.std,
        "images": _text(config.images),
        "images_fingerprint": source.fingerprint(),
    }
    dtypes = {"float16": pa.float16(), "float32": pa.float32()}
    blank = torch.zeros(1, 3, *backbone.image_size, dtype=torch.uint8, device=_device(backbone))
    pooled = embed(backbone, blank, patches=False)["pooled"].shape[1]  # pooling may change the width
    fields = [pa.field("index", pa.int64()), pa.field("key", pa.string())]
    fields.append(pa.field("pooled", pa.list_(pa.float32(), pooled)))
    if config.patches:
        size = backbone.num_patches * backbone.width
        fields.append(pa.field("patches", pa.list_(dtypes[config.dtype], size)))
    return pa.schema(fields, metadata={EMBEDDING_KEY: json.dumps(facts)})


def _device(backbone: Backbone) -> torch.device:
    return next(backbone.parameters()).device


def _text(name: str) -> str:
    """A name as UTF-8; bytes of file names that are not UTF-8 are escaped."""
    return name.encode("utf-8", "backslashreplace").decode()
