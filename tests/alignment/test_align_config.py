"""Options that contradict one another, or would have no effect, are refused."""

from __future__ import annotations

from typing import Any

import pytest

from localign.alignment import AlignConfig
from localign.errors import UserError


def test_defaults_are_the_published_method() -> None:
    config = AlignConfig()
    assert (config.target, config.loss, config.loss_tokens) == ("penultimate", "mse", "all")
    assert config.masks().masks_per_image == 3
    assert config.masks().kind == "uniform"
    assert (config.decoder_depth, config.decoder_layer_scale) == (2, 1e-6)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"mask": "blocks"}, "unknown mask kind"),
        ({"mask": "bernoulli", "keep_ratio": 1.0}, "between 0 and 1"),
        ({"keep_ratio": 0.25}, "own cardinality"),
        ({"target": "cls", "loss_tokens": "hidden"}, "no patch tokens"),
        ({"target": "cls", "loss_tokens": "visible"}, "no patch tokens"),
        ({"target": "first"}, "--target takes"),
        ({"loss": "huber"}, "--loss takes"),
        ({"loss_tokens": "some"}, "--loss-tokens takes"),
        ({"attention": "flash"}, "--attention takes"),
        ({"soft_cap": "yes"}, "auto or none"),
        ({"scale_images": 0}, "at least 1"),
        ({"decoder_depth": 0}, "at least 1"),
        ({"decoder_layer_scale": 0.0}, "--decoder-layer-scale"),
        ({"steps": 3, "epochs": 1.0}, "contradict"),
    ],
)
def test_contradictions_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        AlignConfig(**options)
