"""Options of `localign export`, `import`, `embed`, `explore`, `report` and `verify-reference`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from localign.errors import UserError
from localign.options.data import row_group_bytes
from localign.options.names import ExportFormat, ImageSize, check_repository

FeatureDtype = Literal["float16", "float32"]
MAX_MODELS = 4
"""Models of one page: more do not fit side by side."""
MAX_PAGE_MIB = 512.0
"""The largest --max-mib; browsers refuse longer pages."""


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Export the backbone of a run, or a backbone by name, as model.safetensors and config.json."""

    source: str = ""
    """Run folder of `localign align`, or the name of a backbone."""
    out: str = "export"
    """Folder to write."""
    checkpoint: str = "last"
    """Checkpoint of a run: last, best, or a step."""
    format: ExportFormat = "timm"
    """Format of the folder: timm (localign, timm, and transformers with trust_remote_code load it); a transformers
    family, clip, siglip, siglip2, dinov2, dinov3 or vit, whose own class loads it; onnx (needs the extra
    localign[onnx]) or torch-export, a graph from normalised images to tokens."""
    bake: bool = False
    """Write a soft-capped backbone in a transformers format, which has ordinary attention. The change of the tokens is
    measured on --images; the export is refused above --tolerance."""
    images: str | None = None
    """Folder of images on which the tokens of other formats than timm are compared; default random pixels."""
    tolerance: float | None = None
    """Largest difference of a token channel, divided by the tokens' root mean square; default 1e-4, with --bake
    0.05."""
    decoder: bool = True
    """Also write the decoder of a run (format timm)."""
    keep_pooling: bool = False
    """Write the aligned blocks of a run with the starting model's final norm and pooling instead of the trained norm: a
    replacement for the starting model whose pooled output (zero-shot) and inner layers are read as before. Without
    decoder. Made for --objective maskembed+, which preserves the pooled output."""
    results: str | None = None
    """Folder of a `localign probe` of this backbone and the one before alignment; the figures go into README.md."""
    push_to: str | None = None
    """Upload the export to this repository of the Hugging Face Hub, ORGANISATION/NAME; it is created if it does not
    exist. Needs a token: `hf auth login`, or HF_TOKEN."""
    private: bool = False
    """Keep the repository of --push-to private."""
    weights: str = "pretrained"
    """Weights of a backbone given by name: pretrained, none (random), or a weight file."""
    image_size: ImageSize | None = None
    """Side of the input in pixels, or HEIGHTxWIDTH; default the backbone's own. Positions of the backbone and of the
    decoder are resampled."""
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    """Extra arguments for timm's constructor, for a backbone given by name; for example depth=2."""

    def __post_init__(self) -> None:
        if not self.source:
            raise UserError("export needs a run folder or the name of a backbone")
        check_repository(self.push_to, self.private)
        if self.keep_pooling:
            object.__setattr__(self, "decoder", False)
        if self.bake and self.images is None:
            raise UserError("--bake needs --images DIR, on which the change of the tokens is measured")
        if self.format == "timm" and (self.bake or self.images or self.tolerance is not None):
            raise UserError("--bake, --images and --tolerance apply to --format clip, siglip, dinov2, ...")
        if self.format in ("onnx", "torch-export") and self.bake:
            raise UserError(f"--bake does not apply to --format {self.format}, which keeps the soft-cap")


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """Convert a checkpoint of the published release (.pth.tar) to an export folder."""

    file: str = ""
    """Published checkpoint file."""
    backbone: str = ""
    """Backbone that the checkpoint was trained from: a name from `localign list backbones`, or a timm name."""
    out: str = "imported"
    """Folder to write."""
    decoder: bool = False
    """Also write the decoder."""
    soft_cap: float | str | None = "auto"
    """Bound of the attention logits that the checkpoint was trained with: a number, none, or auto (30 for backbone
    families that support it, else none)."""
    image_size: ImageSize | None = None
    """Side of the input in pixels, or HEIGHTxWIDTH; default the backbone's own."""
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    """Extra arguments for timm's constructor, for example depth=2."""

    def __post_init__(self) -> None:
        if not self.file or not self.backbone:
            raise UserError("import needs a file and --backbone NAME")


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Recompute every quantity in a folder of reference numbers and show the largest error of each."""

    folder: str = ""
    """Folder with meta.json, <variant>.safetensors and <variant>.pth.tar, or with samplers.json, or with both."""
    tol: float = 1e-5
    """Tolerance; the exit code is 1 if an error is larger. An error is the largest absolute difference, divided by the
    root mean square of the reference where that exceeds 1."""

    def __post_init__(self) -> None:
        if not self.folder:
            raise UserError("verify-reference needs the folder of reference numbers")


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Rebuild report.html in a run folder."""

    run: str = ""
    """Run folder."""

    def __post_init__(self) -> None:
        if not self.run:
            raise UserError("report needs a run folder")


@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """Write the features of images to a parquet file, one row per image.

    Needs the extra localign[parquet]. docs/formats.md lists the columns.
    """

    images: str = ""
    """Images: any value of --data of a training command, scenes and mixtures included."""
    backbone: str = ""
    """Backbone: a run or export folder, a model folder or repository, or a name."""
    out: str = "features.parquet"
    """Parquet file to write. A file that this command wrote is replaced."""
    patches: bool = False
    """Also write the patch tokens."""
    dtype: FeatureDtype = "float16"
    """Data type of stored patch tokens; the pooled features are always float32."""
    image_size: ImageSize | None = None
    """Side of the input in pixels, or HEIGHTxWIDTH; default the backbone's own."""
    weights: str = "pretrained"
    """Weights of a backbone given by name: pretrained, none (random), or a weight file."""
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    """Extra arguments for timm's constructor, for example depth=2."""
    field: str | None = None
    """Fields of tar samples, or columns of parquet files, that hold the image: the first that is there, as in
    jpg,png."""
    exclude: str | None = None
    """List of images to leave out, as written by `localign data verify`."""
    allow_outside: bool = False
    """Accept lists of files whose paths, absolute or with .., lead out of the list's folder."""
    max_row_group_gib: float | None = None
    """GiB that a row group of a parquet file may take in memory when it is read, in each worker; default 2."""
    batch_size: int = 32
    """Images per forward pass."""
    workers: int = 0
    """Loader processes; 0 loads in the main process."""
    device: str = "auto"
    """cuda, cuda:N, mps, cpu, or auto."""

    def __post_init__(self) -> None:
        if not self.images or not self.backbone:
            raise UserError("embed needs images and --backbone NAME")
        if self.batch_size < 1:
            raise UserError(f"--batch-size must be above 0, not {self.batch_size}")
        if self.workers < 0:
            raise UserError(f"--workers must not be negative, not {self.workers}")
        if self.dtype == "float32" and not self.patches:
            raise UserError("--dtype has no effect without --patches: pooled features are always float32")
        row_group_bytes(self.max_row_group_gib)


@dataclass(frozen=True, kw_only=True)
class ExploreConfig:
    """Write one web page that shows what each patch of some images looks like to two models or more.

    The page is a single file without a server or network: pick an image and a patch, and see the cosine similarity of
    all other patches, the nearest patches, principal components and attention of all models side by side.
    """

    GROUPS: ClassVar[Mapping[str, str]] = {
        "Models": "models weights model_kwargs image_size",
        "Content": "images limit probe vlm questions masks attention",
        "Page": "out dtype max_mib",
        "Run": "device batch_size seed",
        "Server": "serve host port",
    }

    models: tuple[str, ...] = ()
    """Models to compare, as NAME=BACKBONE: names, run or export folders, or folders or Hub repositories of transformers
    or timm. The others are compared with the first."""
    images: str = ""
    """Images: any value of --data of a training command, scenes included."""
    limit: int = 24
    """Images on the page: the first that can be read."""
    probe: str | None = None
    """Folder of `localign probe` or `localign demo` with the same model names: its pictures come first, with
    the classes that its head predicts, and marks on the patches that a model fixes or breaks."""
    vlm: tuple[str, ...] = ()
    """Folders of `localign vlm eval`, as NAME=FOLDER: adds questions, the answers of all, and boxes. The questions on
    which the models disagree come first."""
    questions: int = 40
    """Questions on the page."""
    masks: bool = True
    """Where the second model is an alignment of the first, and its decoder is there: show masked views, the first
    model's tokens of them, and the decoder's reconstruction."""
    attention: bool = True
    """Store the attention of the last block."""
    out: str = "explore.html"
    """Page to write. A page that this command wrote is replaced."""
    dtype: Literal["int8", "float16"] = "int8"
    """Data type of stored features. int8 has one scale per patch; the command prints the largest error of a cosine
    similarity."""
    max_mib: float = 20.0
    """The largest page that is written, MiB."""
    image_size: ImageSize | None = None
    """Side of the input in pixels, or HEIGHTxWIDTH; default each model's own."""
    weights: str = "pretrained"
    """Weights of models given by name, not of folders: pretrained, none (random), or a weight file."""
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    """Extra arguments for timm's constructor of models given by name, for example depth=2."""
    device: str = "auto"
    """cuda, cuda:N, mps, cpu, or auto."""
    batch_size: int = 8
    """Images per forward pass."""
    seed: int = 0
    """Seed of the masks, and of random weights."""
    serve: bool = False
    """Write no page, but serve pages of photographs that are uploaded in a browser, until Ctrl-C. Needs the extra
    localign[serve]."""
    host: str = "127.0.0.1"
    """Address to serve at; by default only this machine reaches it."""
    port: int = 8765
    """Port to serve at; 0 takes a free one."""

    def __post_init__(self) -> None:
        named = self.named_models()
        if len(named) < 2:
            raise UserError("explore compares two models or more: give baseline=NAME aligned=RUN")
        if len(named) > MAX_MODELS:
            raise UserError(f"explore shows at most {MAX_MODELS} models, not {len(named)}")
        self._check_server()
        if not self.images and self.probe is None and not self.serve:
            raise UserError("explore needs --images FOLDER, or --probe RUN, whose pictures it shows")
        if len(self.named_answers()) == 1:
            raise UserError("--vlm compares models: give baseline=FOLDER aligned=FOLDER")
        for name in ("limit", "questions", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        if not 0 < self.max_mib <= MAX_PAGE_MIB:
            raise UserError(f"--max-mib must be above 0 and at most {MAX_PAGE_MIB:g}, not {self.max_mib:g}")

    def _check_server(self) -> None:
        if not self.serve and (self.host, self.port) != ("127.0.0.1", 8765):
            raise UserError("--host and --port have no effect without --serve")
        if self.serve and (self.images or self.probe is not None or self.vlm):
            raise UserError(
                "--images, --probe and --vlm have no effect with --serve, which takes uploaded photographs"
            )
        if not 0 <= self.port < 2**16:
            raise UserError(f"--port takes 0 to 65535, not {self.port}")

    def named_models(self) -> dict[str, str]:
        """Name on the page -> name or path of the backbone, in the order given.

        Raises:
            UserError: A name is empty or used twice.
        """
        return _named(self.models, "models", "NAME=BACKBONE")

    def named_answers(self) -> dict[str, str]:
        """Name on the page -> folder of `localign vlm eval`, in the order given.

        Raises:
            UserError: A name is empty or used twice.
        """
        return _named(self.vlm, "--vlm", "NAME=FOLDER")


def _named(entries: tuple[str, ...], what: str, form: str) -> dict[str, str]:
    named: dict[str, str] = {}
    for entry in (part for word in entries for part in word.split(",")):
        name, equals, source = (part.strip() for part in entry.partition("="))
        source = source if equals else name
        if not name or not source:
            raise UserError(f"{what} takes {form}, separated by spaces or commas, not {' '.join(entries)!r}")
        if name in named:
            raise UserError(f"{what} has the name {name!r} twice; give each its own with {form}")
        named[name] = source
    return named
