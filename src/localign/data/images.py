"""A run's training stream and validation set, opened from its options."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping

from localign.backbones.preprocessing import UNSTATED, Preprocessing
from localign.data.loader import BadImages, Batch, DrawViews, EvalLoader, TrainLoader
from localign.data.mixing import Mixing
from localign.data.sources import ImageSource, open_source
from localign.data.sources.opening import takes_field
from localign.data.transforms import EvalTransform, NativeTransform, NativeView, TrainTransform
from localign.engine.distributed import DistributedContext
from localign.engine.task import BatchPlan
from localign.errors import UserError
from localign.options.data import DataConfig, row_group_bytes
from localign.options.names import TrainCrop


def planned_batches(
    source: ImageSource,
    transform: TrainTransform,
    plan: BatchPlan,
    max_bad_share: float = 0.01,
    views: DrawViews | None = None,
) -> Iterator[Batch]:
    """One rank's micro-batches, in order."""
    return iter(
        TrainLoader(
            source,
            transform,
            seed=plan.seed,
            global_batch=plan.global_batch,
            micro_batch=plan.micro_batch,
            rank=plan.rank,
            world_size=plan.world_size,
            workers=plan.workers,
            start_step=plan.start_step,
            end_step=plan.end_step,
            pin_memory=plan.pin_memory,
            max_bad_share=max_bad_share,
            timeout=plan.timeout,
            views=views,
        )
    )


def print_notice(source: ImageSource) -> None:
    """Print the source's notice, if it has one, on rank 0."""
    if source.notice and os.environ.get("RANK", "0") == "0":
        print(f"data       {source.notice}", file=sys.stderr)


class ImageData:
    """A run's training stream and validation set.

    Args:
        config: See :class:`DataConfig`.
        image_size: Rows and columns of the backbone's input.
        preprocessing: Of the backbone; validation photographs are resized and cropped in this way.
        native: The sizes of images that keep their aspect ratio; default: all have ``image_size``.

    Raises:
        UserError: A source does not exist or holds no images, or an option is out of range.
    """

    def __init__(
        self,
        config: DataConfig,
        image_size: tuple[int, int],
        preprocessing: Preprocessing = UNSTATED,
        native: NativeView | None = None,
    ) -> None:
        self.config = config
        scenes = config.is_scenes
        crop: TrainCrop = config.crop or ("none" if scenes else "published")
        hflip = config.hflip if config.hflip is not None else (0.0 if scenes else 0.5)
        if scenes and config.decode is not None:
            raise UserError("--decode has no effect on scenes, which are drawn, not decoded")
        if native is None:
            self.transform = TrainTransform(
                image_size, crop, config.auto_augment, hflip, decode=config.decode or "scaled"
            )
        else:
            self.transform = NativeTransform(native, config.auto_augment, hflip)
        self.native = native
        scaled = self.transform.scaled_decode
        self.source: ImageSource = open_source(
            config.data,
            image_size=image_size,
            scaled_decode=scaled,
            exclude=config.exclude,
            field=config.field,
            max_group_bytes=row_group_bytes(config.max_row_group_gib),
            allow_outside=config.allow_outside,
        )
        print_notice(self.source)
        if config.crop == "none" and not scenes:
            raise UserError(
                "--crop none works for scenes only, which have the right size; photographs need a crop"
            )
        val = config.val or ("scenes:val" if scenes else None)
        # Validation always decodes in full, so that results stay comparable with published ones.
        self.val_source = self._open_val(val, image_size) if val else None
        self.val_transform = EvalTransform(image_size, preprocessing=UNSTATED if scenes else preprocessing)
        mixes = config.mixup is not None or config.cutmix is not None
        self.mixing = Mixing(config.mixup, config.cutmix) if mixes else None

    def _open_val(self, val: str, image_size: tuple[int, int]) -> ImageSource:
        field = self.config.field if self.config.field and takes_field(val) else None
        limit = row_group_bytes(self.config.max_row_group_gib)
        return open_source(
            val,
            image_size=image_size,
            scaled_decode=False,
            field=field,
            max_group_bytes=limit,
            allow_outside=self.config.allow_outside,
        )

    @property
    def micro_batch_multiple(self) -> int:
        """2 if neighbouring images are mixed in pairs, which a micro-batch must not split; else 1."""
        return 1 if self.mixing is None else 2

    def train_batches(self, plan: BatchPlan, views: DrawViews | None = None) -> Iterator[Batch]:
        """This rank's training micro-batches, in order; ``views`` draws what else each batch needs."""
        return planned_batches(self.source, self.transform, plan, self.config.max_bad_share, views)

    def data_files(self) -> Iterator[tuple[str, str]]:
        """(name, path) of the local files of the training and validation images."""
        yield from self.source.data_files()
        for name, path in self.val_source.data_files() if self.val_source is not None else ():
            yield f"validation: {name}", path

    def check_skipped(self, images: Mapping[str, str]) -> None:
        """Raise UserError if more than ``max_bad_share`` of the training images are unreadable."""
        BadImages(len(self.source), self.config.max_bad_share).add(tuple(images.items()))

    def val_batches(self, context: DistributedContext, batch: int) -> Iterator[Batch]:
        """This rank's share of the validation images, in order; empty if there is no validation set."""
        if self.val_source is None:
            return iter(())
        return iter(
            EvalLoader(
                self.val_source,
                self.native or self.val_transform,
                batch=batch,
                limit=self.config.val_images,
                rank=context.rank,
                world_size=context.size,
                max_bad_share=self.config.max_bad_share,
            )
        )
