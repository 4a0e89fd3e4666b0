"""Config classes of the commands that are no training run."""

from dataclasses import dataclass, field
from typing import Any

from localign.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write a backbone as model.safetensors + config.json, from a run or by name."""

    source: str = ""
    """A run folder of `localign align`, or the name of any backbone."""
    out: str = "export"
    """Folder to write."""
    checkpoint: str = "last"
    """Of a run: last, best, or a step."""
    decoder: bool = True
    """Of a run: also write the decoder."""
    weights: str = "pretrained"
    """Of a name: pretrained, none, or a weight file."""
    image_size: int | None = None
    """Of a name: side of the square input, pixels."""
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    """Of a name: further arguments of timm's constructor."""

    def __post_init__(self) -> None:
        if not self.source:
            raise UserError("export what? give a run folder or the name of a backbone")


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """Convert a checkpoint of the published release (.pth.tar) to an export folder."""

    file: str = ""
    """The published file."""
    backbone: str = ""
    """The backbone it was trained from, by catalogue or timm name."""
    out: str = "imported"
    """Folder to write."""
    decoder: bool = False
    """Also keep the decoder."""
    soft_cap: float | str | None = "auto"
    """Bound of the encoder's attention logits in that run; auto: 30 where the catalogue says so."""
    image_size: int | None = None
    """Side of the square input, pixels; default the backbone's own."""
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    """Further arguments of timm's constructor."""

    def __post_init__(self) -> None:
        if not self.file or not self.backbone:
            raise UserError("import takes a file and --backbone NAME")


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Recompute every quantity of a folder of reference numbers and show the largest error of each."""

    folder: str = ""
    """Folder with meta.json, <variant>.safetensors and <variant>.pth.tar."""
    tol: float = 1e-5
    """Largest error allowed; above it the exit code is 1."""

    def __post_init__(self) -> None:
        if not self.folder:
            raise UserError("verify-reference takes the folder of reference numbers")


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Write report.html of a run folder again."""

    run: str = ""
    """The run folder."""

    def __post_init__(self) -> None:
        if not self.run:
            raise UserError("report takes a run folder")
