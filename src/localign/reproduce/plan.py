"""From a target to the runs that it needs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from localign.alignment import AlignConfig
from localign.backbones import CATALOGUE
from localign.data.sources import open_source
from localign.engine.schedule import total_steps
from localign.errors import UserError
from localign.options.reproduce import ReproduceConfig
from localign.probing import ProbeConfig
from localign.reproduce.notes import reader_notes
from localign.reproduce.pieces import Alignment, LabelledData, Probing, UnalignedBackbone, backbone_identity
from localign.reproduce.targets import TARGETS, Target, TargetRow
from localign.reproduce.worlds import LEFT_OUT, DataScale

_WEIGHT_FILES = (".safetensors", ".pth.tar", ".pth", ".pt", ".bin")


@dataclass
class ReproductionPlan:
    """The runs of a target. Rows with equal runs share them."""

    target: Target
    rows: list[TargetRow] = field(default_factory=list)
    """The rows that are run."""
    probings: dict[str, list[Probing]] = field(default_factory=dict)
    """By row, one per seed."""
    left_out: list[str] = field(default_factory=list)
    """The rows that are not run, and why, one line per reason."""
    notes: list[str] = field(default_factory=list)
    """Notes for readers of the result; they include ``left_out``."""

    def pieces(self) -> list[Alignment | Probing]:
        """Every run once, each after the runs that it needs."""
        runs: dict[str, Alignment | Probing] = {}
        for probing in (p for seeds in self.probings.values() for p in seeds):
            if probing.alignment is not None:
                runs.setdefault(probing.alignment.key, probing.alignment)
            runs.setdefault(probing.key, probing)
        return list(runs.values())


class Planner:
    """Plans the runs of a target in a world.

    Args:
        config: The options.
        world: The world of the runs.
        data: The images that heads are trained and evaluated on.
    """

    def __init__(self, config: ReproduceConfig, world: DataScale, data: LabelledData) -> None:
        self.config, self.world, self.data = config, world, data
        self.target = TARGETS[config.target]
        self.folder = Path(config.out) / config.world
        self._sources: dict[tuple[str, str | None], tuple[str, int]] = {}
        self._identities: dict[tuple[str, str], str] = {}

    def plan(self) -> ReproductionPlan:
        """The rows, each with its alignments and probings.

        Raises:
            UserError: An alignment has no images.
        """
        plan = ReproductionPlan(self.target)
        left_out: dict[str, list[str]] = {}
        for row in self.world.rows_of(self.config.target):
            if reason := self._left_out(row):
                left_out.setdefault(reason, []).append(row.name)
                continue
            plan.rows.append(row)
            plan.probings[row.name] = [self._probing(row, seed) for seed in range(self.config.seeds)]
        plan.left_out = [f"Left out: {', '.join(names)} ({reason})." for reason, names in left_out.items()]
        plan.notes = reader_notes(self.config, self.world, self.data, plan.probings) + plan.left_out
        return plan

    def _key(self, row: TargetRow) -> str:
        return f"{self.config.target}/{row.name}"

    def _left_out(self, row: TargetRow) -> str:
        """The reason why a row is not run; empty for a row that is run."""
        reason = str(self.world.row_options(row, self.config.target).get(LEFT_OUT, ""))
        entry = CATALOGUE.get(row.backbone)
        if not reason and entry and entry.loader != "timm" and self._weights(row.backbone) == "pretrained":
            return "its weights are a file of the authors: pass the folder of that file with --weights"
        return reason

    def _weights(self, backbone: str) -> str:
        """The backbone's weight file in the folder of ``--weights``; ``pretrained`` if there is none."""
        if self.config.weights is not None:
            for suffix in _WEIGHT_FILES:
                if (path := Path(self.config.weights) / f"{backbone}{suffix}").is_file():
                    return str(path)
        return "pretrained"

    def _identity(self, backbone: str) -> str:
        named = backbone, self._weights(backbone)
        if named not in self._identities:
            self._identities[named] = backbone_identity(*named)
        return self._identities[named]

    def _probing(self, row: TargetRow, seed: int) -> Probing:
        workers = {} if self.config.workers is None else {"workers": self.config.workers}
        config = ProbeConfig(
            protocol=self.config.protocol,
            heads=self.world.heads_of(self.target),
            tasks=self.target.tasks,
            seed=seed,
            **{**self.world.probe, **workers},
        )
        source: Alignment | UnalignedBackbone
        if row.recipe:
            source = self._alignment(row, seed)
        else:
            weights = self._weights(row.backbone)
            source = UnalignedBackbone(row.backbone, weights, self._identity(row.backbone))
        label = f"{self._key(row)}, seed {seed}"
        return Probing.of(label, source, config, self.data, self.folder / "probe")

    def _alignment(self, row: TargetRow, seed: int) -> Alignment:
        options = self.world.align_options(row, self.config.target)
        options["data"] = self._images(str(options["data"]))
        given = {name: getattr(self.config, name) for name in ("device", "micro_batch", "workers")}
        options |= {name: value for name, value in given.items() if value is not None}
        config = AlignConfig(**options, weights=self._weights(row.backbone), seed=seed)
        named = config.data, config.exclude
        if named not in self._sources:
            source = open_source(
                config.data,
                exclude=config.exclude,
                field=config.field,
                allow_outside=config.allow_outside,
            )
            self._sources[named] = source.fingerprint(), len(source)
        fingerprint, images = self._sources[named]
        return Alignment.of(
            f"{self._key(row)}, seed {seed}",
            config,
            total_steps(config, images),
            fingerprint,
            self._identity(row.backbone),
            self.folder / "align",
        )

    def _images(self, name: str) -> str:
        """The folder of a recipe's data set: its own folder in ``--train-data``, or else all of ``--train-data``."""
        if self.config.world == "scenes":
            return name
        if self.config.train_data is None:
            raise UserError(f"{self.config.target} needs --train-data DIR, images to align on")
        root = Path(self.config.train_data)
        own = root / name, root / name.removesuffix("/train")
        return str(next((folder for folder in own if folder.is_dir()), root))
