"""`localign align`: train, print the results and write the report."""

from __future__ import annotations

from localign.alignment.native import align_task
from localign.alignment.setup import resolve_align
from localign.engine import train
from localign.engine.log import print_results
from localign.options.align import AlignConfig
from localign.pictures import example_images, save_pictures
from localign.report import build_report
from localign.text.printing import printable


def run_align(config: AlignConfig) -> None:
    """Align a backbone, print the results, and write pictures and the report.

    Raises:
        UserError: Options or data are invalid.
        RunFailure: The run cannot continue.
    """
    config = resolve_align(config)
    task = align_task(config)
    outcome = train(task, config, "align")
    if outcome.is_main:
        save_pictures(outcome.folder, task, example_images(task))
        print_results(outcome.folder, outcome.results)
        print(f"report     {printable(build_report(outcome.folder))}")
