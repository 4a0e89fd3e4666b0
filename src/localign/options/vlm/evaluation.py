"""Config classes of the commands that put benchmarks to models."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from localign.errors import UserError

Scoring = Literal["default", "published", "strict"]

IN_LMMS_EVAL = ("tallyqa", "vsr", "ocid-ref")
"""Our benchmarks that lmms-eval lacks, and has from us; every other name is one of its own tasks."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Put benchmarks to a vision-language model; one that was cut off is continued, and nothing is asked twice."""

    GROUPS: ClassVar[Mapping[str, str]] = {
        "Model": "model revision boxes dtype",
        "Benchmarks": "benchmarks data limit scoring allow_partial engine task_folders",
        "Run": "out batch_size device",
    }

    model: str = ""
    """A run folder of `localign vlm train`, its export, or an image-text-to-text model of transformers."""
    revision: str | None = None
    """Of a model of the Hub: its branch, tag or commit; default main. Results hold the commit that it stood for."""
    benchmarks: tuple[str, ...] = ()
    """Which: refcoco, ocid-ref, tallyqa, vsr, ai2d, textvqa, textvqa-ocr, vqav2, vizwiz, pope, gqa; scenes. With
    --engine lmms-eval: tallyqa, vsr, ocid-ref, and names of that package's own tasks, as pope or mmstar."""
    data: str = ""
    """Folder that holds download/, with the benchmarks' official files; for scenes, what `vlm demo` wrote as "test".
    Own tasks of lmms-eval fetch theirs."""
    engine: Literal["localign", "lmms-eval"] = "localign"
    """Who asks and averages: localign, or the package lmms-eval (the extra localign[lmms-eval]), in one process and
    from the beginning each time."""
    task_folders: tuple[str, ...] = ()
    """Folders of further tasks, with --engine lmms-eval; for example its own on local data."""
    out: str = "eval"
    """Folder of answers and results."""
    limit: int | None = None
    """Questions of each split, at most; default all. A smaller subset is part of every larger one. Of lmms-eval's own
    tasks: questions of each task."""
    allow_partial: bool = False
    """Go on where files hold other numbers of questions than the official ones, or images are missing."""
    batch_size: int = 16
    """Questions asked together, on each rank; it changes no answer."""
    scoring: Scoring = "default"
    """published: all by the published rules, faults included. strict: answers and truth normalised alike, where a
    benchmark has that. default: words by the published rules, boxes in the frame that the model declares."""
    boxes: str | None = None
    """What coordinates in answers mean, as LAYOUT:0-SCALE: original:0-1 (shares of the image), letterboxed:336x336:0-1,
    ...; default what the model declares."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 on CUDA, float32 elsewhere."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""

    def __post_init__(self) -> None:
        without_data = self.engine == "lmms-eval" and not set(IN_LMMS_EVAL) & set(self.benchmarks)
        if not self.model or not self.benchmarks or not (self.data or without_data):
            raise UserError("eval needs a model, --benchmarks and --data")
        if self.engine == "localign" and self.task_folders:
            raise UserError("--task-folders has no effect without --engine lmms-eval")
        if without_data:
            self._refuse_what_is_of_benchmarks()
        if len(set(self.benchmarks)) < len(self.benchmarks):
            raise UserError("--benchmarks takes names, each once")
        if self.batch_size < 1:
            raise UserError(f"--batch-size must be at least 1, not {self.batch_size}")

    def _refuse_what_is_of_benchmarks(self) -> None:
        given = {
            "--data": self.data != "",
            "--allow-partial": self.allow_partial,
            "--scoring": self.scoring != "default",
            "--boxes": self.boxes is not None,
        }
        for option in [option for option, is_given in given.items() if is_given]:
            raise UserError(
                f"{option} has no effect on lmms-eval's own tasks, only on {', '.join(IN_LMMS_EVAL)}"
            )


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """Score answers again, without the model; with several folders compare their models, in tables and figures."""

    runs: tuple[str, ...] = ()
    """Folders that `localign vlm eval` wrote, each maybe as NAME=folder; the first is what the others are compared
    with. Folders of one NAME (given again, or NAME=runs/eval-seed*) are trainings with different seeds.
    PANEL/NAME=folder, or FIGURE/PANEL/NAME=folder, puts models into panels, each with a first one of its own."""
    scoring: Scoring = "default"
    """default, published or strict, as for `localign vlm eval`."""
    out: str | None = None
    """Folder of the comparison's tables and figures; default "comparison". Of a single folder, scores are written into
    it."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise UserError("score what? give folders of `localign vlm eval`")
        if len(set(self.runs)) < len(self.runs):
            raise UserError("a folder is compared with others, not with itself")


@dataclass(frozen=True, kw_only=True)
class ShowConfig:
    """Draw questions and answers: the picture, the true box and the model's, and the words."""

    answers: str = ""
    """An answers.jsonl that `localign vlm eval` wrote, or its folder."""
    wrong: bool = False
    """Only answers with less than the full score."""
    benchmarks: tuple[str, ...] = ()
    """Only questions of these; default all."""
    limit: int = 20
    """Pictures, at most."""
    out: str = "shown"
    """Folder to write PNG files into."""

    def __post_init__(self) -> None:
        if not self.answers:
            raise UserError("show what? give an answers.jsonl of `localign vlm eval`")
        if self.limit < 1:
            raise UserError(f"--limit must be at least 1, not {self.limit}")
