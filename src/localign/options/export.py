"""Options of `localign export`, `import`, `verify-reference` and `report`."""

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
    """For a run: last, best, or the number of a step."""
    decoder: bool = True
    """For a run: also write the decoder."""
    weights: str = "pretrained"
    """For a name: pretrained, none (random), or a weight file."""
    image_size: int | None = None
    """For a name: side of the square input in pixels; default the backbone's own."""
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    """For a name: further arguments of timm's constructor, for example depth=2."""

    def __post_init__(self) -> None:
        if not self.source:
            raise UserError("export what? give a run folder or the name of a backbone")


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """Convert a checkpoint of the published release (.pth.tar) to an export folder."""

    file: str = ""
    """The published file."""
    backbone: str = ""
    """Catalogue or timm name of the backbone that the run started from."""
    out: str = "imported"
    """Folder to write."""
    decoder: bool = False
    """Also write the decoder."""
    soft_cap: float | str | None = "auto"
    """Bound of the encoder's attention logits in that run. auto: 30 if the catalogue lists a soft-cap."""
    image_size: int | None = None
    """Side of the square input in pixels; default the backbone's own."""
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    """Further arguments of timm's constructor."""

    def __post_init__(self) -> None:
        if not self.file or not self.backbone:
            raise UserError("import takes a file and --backbone NAME")


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Recompute a folder of reference numbers and print the largest error of each quantity."""

    folder: str = ""
    """Folder with meta.json, <variant>.safetensors and <variant>.pth.tar."""
    tol: float = 1e-5
    """Largest allowed error; above it the exit code is 1."""

    def __post_init__(self) -> None:
        if not self.folder:
            raise UserError("verify-reference takes the folder of reference numbers")


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Write report.html of a run again, for example after an update of localign."""

    run: str = ""
    """The run folder."""

    def __post_init__(self) -> None:
        if not self.run:
            raise UserError("report takes a run folder")
