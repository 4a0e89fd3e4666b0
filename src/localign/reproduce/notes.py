"""What a reader has to know of a reproduced table or figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from localign.options.reproduce import ReproduceConfig
from localign.reproduce.pieces import Alignment, Heads, Probing
from localign.reproduce.worlds import NOTE, DataScale

_PROTOCOLS = {
    "fixed": "Heads are judged as their last step left them: nothing is chosen on the images that are reported. The "
    "published protocol takes each head's best epoch on these very images, which gives somewhat higher figures.",
    "published": "Of every head the best epoch on the reported images is reported, as published; such figures "
    "flatter.",
}


def notes_of(
    config: ReproduceConfig,
    world: DataScale,
    heads: Heads,
    probings: Mapping[str, Sequence[Probing]],
) -> list[str]:
    """One line each.

    Args:
        config: What was asked for.
        world: Where.
        heads: What heads are trained and judged on.
        probings: By row.
    """
    every = [p for row in probings.values() for p in row]
    aligned = [p.aligned for p in every if p.aligned is not None]
    notes = list(world.notes)
    if config.quick:
        notes.append("A quick run: with fewer steps and images, differences are smaller and less sure.")
    if aligned:
        notes.append(_alignments(aligned, config.seeds))
    notes.append(_heads(every, heads))
    notes.append(_PROTOCOLS[config.protocol])
    notes += _of_rows(config, world, probings)
    if aligned and all(a.config.data == config.train_data for a in aligned):
        notes.append(
            f"All alignments ran on the images of {config.train_data}, whatever data set a row names."
        )
    return notes


def _alignments(aligned: Sequence[Alignment], seeds: int) -> str:
    steps, batch = _span([a.steps for a in aligned]), _span([a.config.batch_size for a in aligned])
    rate = _span([a.config.lr or 0.0 for a in aligned])
    return (
        f"Alignments: {steps} steps of {batch} images, learning rate {rate}, {seeds} seed{'s' * (seeds > 1)}."
    )


def _heads(every: Sequence[Probing], heads: Heads) -> str:
    (judged,) = heads.judged.values()
    config = every[0].config
    return (
        f"Heads: {every[0].steps:,} steps of {config.batch} images, trained alike on {len(heads.train):,} images for "
        f"every row and judged on {len(judged):,}."
    )


def _of_rows(
    config: ReproduceConfig, world: DataScale, probings: Mapping[str, Sequence[Probing]]
) -> list[str]:
    rows = (row for row in world.rows_of(config.target) if row.name in probings)
    found = (world.of_row(row, config.target).get(NOTE) for row in rows)
    return list(dict.fromkeys(str(note) for note in found if note))


def _span(values: Sequence[float]) -> str:
    """A value, or the smallest and the largest."""
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
