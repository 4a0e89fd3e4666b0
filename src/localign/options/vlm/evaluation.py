"""Options of `localign vlm eval`, `vlm score` and `vlm show`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from localign.errors import UserError

Scoring = Literal["default", "published", "strict"]

IN_LMMS_EVAL = ("tallyqa", "vsr", "ocid-ref")
"""Benchmarks that localign adds to lmms-eval as tasks; every other name is one of lmms-eval's own tasks."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluate a vision-language model on benchmarks. An interrupted evaluation resumes without repeating questions."""

    GROUPS: ClassVar[Mapping[str, str]] = {
        "Model": "model revision boxes dtype",
        "Benchmarks": "benchmarks data limit scoring allow_partial allow_outside engine task_folders",
        "Run": "out batch_size device",
    }

    model: str = ""
    """Run folder of `localign vlm train`, its export, or an image-text-to-text model of transformers."""
    revision: str | None = None
    """Branch, tag or commit of a model on the Hugging Face Hub; default main. The results record the commit."""
    benchmarks: tuple[str, ...] = ()
    """Benchmarks: refcoco, ocid-ref, tallyqa, vsr, ai2d, textvqa, textvqa-ocr, vqav2, vizwiz, pope, gqa, scenes. With
    --engine lmms-eval: tallyqa, vsr, ocid-ref, and lmms-eval's own tasks, such as pope or mmstar."""
    data: str = ""
    """Folder with the benchmarks' official files in download/. For scenes: the folder "test" of `vlm demo`. lmms-eval's
    own tasks download their data themselves."""
    engine: Literal["localign", "lmms-eval"] = "localign"
    """Harness that asks the questions and computes the scores: localign, or lmms-eval (needs the extra
    localign[lmms-eval]). lmms-eval runs in one process and cannot resume."""
    task_folders: tuple[str, ...] = ()
    """Folders with more tasks for --engine lmms-eval, for example variants of its own tasks that read local data."""
    out: str = "eval"
    """Folder for answers and results."""
    limit: int | None = None
    """Maximum number of questions per split; default all. A smaller subset is part of every larger one. For lmms-eval's
    own tasks: maximum number of questions per task."""
    allow_partial: bool = False
    """Accept missing images, and files whose number of questions differs from the official one."""
    allow_outside: bool = False
    """Accept image paths in the files, absolute or with .., that lead out of --data."""
    batch_size: int = 16
    """Questions per batch and rank. Answers do not depend on it."""
    scoring: Scoring = "default"
    """published: the published rules, with their faults. strict: predictions and right answers are normalised alike, in
    benchmarks with answers in words. default: the published rules for words, and boxes in the model's own frame."""
    boxes: str | None = None
    """Frame of coordinates in answers, as LAYOUT:0-SCALE: original:0-1 (shares of the image), letterboxed:336x336:0-1,
    padded-square:0-100, ...; default the frame that the model declares."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision; auto is bfloat16 on CUDA and float32 elsewhere."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""

    def __post_init__(self) -> None:
        without_data = self.engine == "lmms-eval" and not set(IN_LMMS_EVAL) & set(self.benchmarks)
        if not self.model or not self.benchmarks or not (self.data or without_data):
            raise UserError("eval needs a model, --benchmarks and --data")
        if self.engine == "localign" and self.task_folders:
            raise UserError("--task-folders has no effect without --engine lmms-eval")
        if without_data:
            self._refuse_options_of_benchmarks()
        if len(set(self.benchmarks)) < len(self.benchmarks):
            raise UserError("--benchmarks names a benchmark twice")
        if self.batch_size < 1:
            raise UserError(f"--batch-size must be at least 1, not {self.batch_size}")

    def _refuse_options_of_benchmarks(self) -> None:
        given = {
            "--data": self.data != "",
            "--allow-partial": self.allow_partial,
            "--allow-outside": self.allow_outside,
            "--scoring": self.scoring != "default",
            "--boxes": self.boxes is not None,
        }
        for option in [option for option, is_given in given.items() if is_given]:
            raise UserError(
                f"{option} has no effect on lmms-eval's own tasks; only {', '.join(IN_LMMS_EVAL)} use it"
            )


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """Score the answers of one evaluation again, or compare the models of several evaluations in tables and charts."""

    runs: tuple[str, ...] = ()
    """Folders of `localign vlm eval`, as FOLDER or NAME=FOLDER. Models are compared with the first one. A NAME given
    again, or a pattern such as NAME=runs/eval-seed*, adds training seeds. PANEL/NAME=FOLDER and
    FIGURE/PANEL/NAME=FOLDER put models into panels; each panel is compared with its first model."""
    scoring: Scoring = "default"
    """default, published or strict, as for `localign vlm eval`."""
    skip_missing: bool = False
    """Compare the evaluations that exist and name the missing ones, instead of refusing to start."""
    out: str | None = None
    """Folder for the comparison's tables and charts; default "comparison". The scores of a single evaluation are
    written into its own folder."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise UserError("score needs one or more folders of `localign vlm eval`")
        if len(set(self.runs)) < len(self.runs):
            raise UserError("a folder is given twice; a model cannot be compared with itself")


@dataclass(frozen=True, kw_only=True)
class ShowConfig:
    """Draw questions and answers: the image, the true box, the model's box, and the texts."""

    answers: str = ""
    """An answers.jsonl of `localign vlm eval`, or its folder."""
    wrong: bool = False
    """Draw only answers with less than the full score."""
    benchmarks: tuple[str, ...] = ()
    """Draw only answers to these benchmarks; default all."""
    limit: int = 20
    """Maximum number of pictures."""
    out: str = "shown"
    """Folder for the PNG files."""

    def __post_init__(self) -> None:
        if not self.answers:
            raise UserError("show needs an answers.jsonl of `localign vlm eval`")
        if self.limit < 1:
            raise UserError(f"--limit must be at least 1, not {self.limit}")
