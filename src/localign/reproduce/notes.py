"""Notes for the readers of a reproduced table or figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from localign.options.reproduce import ReproduceConfig
from localign.reproduce.pieces import Alignment, LabelledData, Probing
from localign.reproduce.worlds import NOTE, DataScale

_PROTOCOLS = {
    "fixed": "Heads are evaluated after their last step; nothing is chosen on the reported images. The published "
    "protocol takes each head's best epoch on these images, which gives somewhat higher recall.",
    "published": "Each head's best epoch on the reported images is reported, as published, which overstates recall.",
}


def reader_notes(
    config: ReproduceConfig,
    world: DataScale,
    data: LabelledData,
    probings: Mapping[str, Sequence[Probing]],
) -> list[str]:
    """The notes, one line each.

    Args:
        config: The options.
        world: The world of the runs.
        data: The images that heads are trained and evaluated on.
        probings: By row, one per seed.
    """
    every = [probing for seeds in probings.values() for probing in seeds]
    alignments = [probing.alignment for probing in every if probing.alignment is not None]
    notes = list(world.notes)
    if config.quick:
        notes.append("A quick run: with fewer steps and images, differences are smaller and less certain.")
    if alignments:
        notes.append(_alignments_note(alignments, config.seeds))
    notes.append(
        f"Heads: {every[0].steps:,} steps of {every[0].config.batch} images, trained on the same "
        f"{len(data.train):,} images for every row and evaluated on {len(data.test):,}."
    )
    notes.append(_PROTOCOLS[config.protocol])
    notes += _row_notes(config, world, probings)
    if alignments and all(a.config.data == config.train_data for a in alignments):
        notes.append(
            f"All alignments use the images of {config.train_data}, also where a row names a data set."
        )
    return notes


def _alignments_note(alignments: Sequence[Alignment], seeds: int) -> str:
    steps = _span([a.steps for a in alignments])
    batch = _span([a.config.batch_size for a in alignments])
    rate = _span([a.config.lr or 0.0 for a in alignments])
    return (
        f"Alignments: {steps} steps of {batch} images, learning rate {rate}, {seeds} seed{'s' * (seeds > 1)}."
    )


def _row_notes(
    config: ReproduceConfig, world: DataScale, probings: Mapping[str, Sequence[Probing]]
) -> list[str]:
    rows = (row for row in world.rows_of(config.target) if row.name in probings)
    notes = (world.row_options(row, config.target).get(NOTE) for row in rows)
    return list(dict.fromkeys(str(note) for note in notes if note))


def _span(values: Sequence[float]) -> str:
    """The smallest and the largest value; one value if they are equal."""
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
