"""`localign reproduce`: figures of vision-language models here, all other targets in ``reproduce/``."""

from __future__ import annotations

from pathlib import Path

from localign.options.names import VLM_FIGURES
from localign.options.reproduce import ReproduceConfig


def run_reproduction(config: ReproduceConfig) -> list[Path]:
    """Reproduce a table or figure of the paper.

    Returns:
        The paths of the table or figure; none for a dry run.

    Raises:
        UserError: Bad options or data, or nothing to draw.
        RunFailure: A run failed; the next call continues it.
    """
    # Only what is asked for is imported, as these imports take seconds.
    if config.target not in VLM_FIGURES:
        from localign.reproduce.run import run_reproduce

        return run_reproduce(config)
    if config.world == "scenes":
        from localign.vlm.figures.scenes import reproduce_on_scenes

        return reproduce_on_scenes(config)
    from localign.vlm.figures.published import reproduce_published

    return reproduce_published(config)
