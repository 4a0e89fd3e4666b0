"""The student of ``maskembed+``: two more linear layers, which serve training alone."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from localign.alignment.student import Decoder, Encoder, Student, build_student
from localign.backbones import Backbone
from localign.backbones.native import NativeImages


class PlusPrediction(NamedTuple):
    """What one forward pass of the student gives."""

    tokens: Tensor
    """The decoder's reconstructions, ``(batch * masks, tokens, teacher width)``."""
    pooled: Tensor
    """The decoder's pooled output of each view, ``(batch * masks, teacher width)``."""
    vectors: Tensor
    """Linear images of the patch embeddings of the whole image, ``(batch, patches, teacher width)``."""
    last: Tensor
    """Tokens after the encoder's last block, without norm, ``(batch, tokens, width)``."""


class PlusStudent(Student):
    """A student that also predicts pooled outputs, from patch embeddings and from the decoder.

    Both layers start at zero. Exports leave them out.
    """

    def __init__(self, encoder: Encoder, decoder: Decoder) -> None:
        super().__init__(encoder, decoder)
        width, output_width = decoder.config.width, decoder.config.output_width
        self.readout = _zero_linear(encoder.backbone.width, output_width)
        self.pooled_head = _zero_linear(width, output_width)

    def forward(self, images: Tensor | NativeImages, keep_mask: Tensor | None = None) -> Any:
        """As :meth:`Student.forward`, but with a keep-mask a :class:`PlusPrediction`, of images of one size."""
        if keep_mask is None:
            return super().forward(images)
        assert self.decoder is not None
        assert isinstance(images, Tensor)
        backbone = self.encoder.backbone
        last = backbone.tokens(images, norm=False)
        tokens = backbone.normalise_tokens(last)
        decoded = self.decoder.features(self.masked(self.encoder.head(tokens), keep_mask))
        return PlusPrediction(
            tokens=self.decoder.head(decoded),
            pooled=self.pooled_head(decoded[:, 0]),
            vectors=self.readout(tokens[:, self.num_prefix_tokens :]),
            last=last,
        )


def build_plus_student(backbone: Backbone, **options: Any) -> PlusStudent:
    """As :func:`~localign.alignment.student.build_student`, with the same initial weights of what both have."""
    student = build_student(backbone, **options)
    assert student.decoder is not None
    return PlusStudent(student.encoder, student.decoder)


def _zero_linear(width: int, output_width: int) -> nn.Linear:
    layer = nn.Linear(width, output_width)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
