"""Run a benchmark: ``python benchmarks/run.py NAME [options]``; ``NAME --help`` shows its options."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from localign.cli.main import exit_code, run
from localign.cli.table import Command
from localign.errors import UserError, did_you_mean

PROGRAM = "python benchmarks/run.py"
BENCHMARKS = {
    name: Command(
        name, f"config:{config}", f"{name}:run_bench_{name}", about, package="benchmarks", program=PROGRAM
    )
    for name, config, about in (
        ("labels", "LabelsConfig", "reduce label maps, against loops over patches"),
        ("probe", "ProbingConfig", "train all heads in one pass, against one run per head"),
        ("vlm", "VLMBenchConfig", "train on packed batches, against padded batches"),
        (
            "objectives",
            "ObjectivesConfig",
            "objectives of alignment on drawn scenes, by probing and pooled output",
        ),
        ("answers", "AnswersConfig", "read and score VQAv2, against a plain script"),
        ("scaling", "ScalingConfig", "alignment steps with more ranks, images and tokens"),
    )
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one benchmark; returns an exit code with the meaning of ``localign``'s exit codes."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__, *(f"  {b.name:<11}{b.help}" for b in BENCHMARKS.values()), sep="\n")
        return 0 if arguments else 2
    return exit_code(lambda: _run(arguments))


def _run(arguments: Sequence[str]) -> int | None:
    name, *rest = arguments
    if name not in BENCHMARKS:
        known = ", ".join(BENCHMARKS)
        raise UserError(
            f"unknown benchmark {name!r}{did_you_mean(name, BENCHMARKS)}; the benchmarks are {known}"
        )
    return run(BENCHMARKS[name], rest)


if __name__ == "__main__":
    raise SystemExit(main())
