"""Every quantity compared with the reference numbers of the published code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from localign.alignment.verify import _errors, verify_reference
from localign.errors import UserError

GOLDEN = Path(__file__).parents[3] / "shared" / "golden" / "maskembed"
TOLERANCE = 1e-5


@pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"the reference numbers are not at {GOLDEN}")
def test_every_quantity_of_the_published_code_is_reproduced() -> None:
    results = verify_reference(GOLDEN)
    assert {r.variant for r in results} == set(json.loads((GOLDEN / "meta.json").read_text()))
    assert {r.quantity.split(" ")[0] for r in results} >= {
        "tokens.plain", "tokens.softcap30", "tokens.softcap1",
        "teacher.skip0", "teacher.skip1", "teacher.skip2", "teacher.cls",
        "student.encoder", "student.reconstruction", "student.mse", "student.cosine",
    }  # fmt: skip
    assert any("exported" in r.quantity for r in results)
    for result in results:
        assert result.max_error <= TOLERANCE, result
        # From image to reconstruction, the reference's own rounding error exceeds the tolerance.
        if result.quantity.split(" (exported")[0] != "student.reconstruction":
            assert result.max_absolute <= TOLERANCE, result


@pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"the reference numbers are not at {GOLDEN}")
def test_masks_and_crop_are_compared_too() -> None:
    rows = {(r.variant, r.quantity): r for r in verify_reference(GOLDEN.parent)}
    assert rows["training crop", "crop.pixels"].max_absolute == 0
    rates = [r for (variant, _), r in rows.items() if variant.startswith("block ratio")]
    assert len(rates) == 6
    for row in rates:
        assert row.tolerance is not None
        assert 0 < row.max_error <= row.tolerance, row
    assert ("cls", "student.reconstruction") in rows  # the variants in the folder maskembed


def test_errors_are_relative_to_the_size_of_the_whole_tensor() -> None:
    reference = torch.tensor([3.0, -4.0, 0.0, 0.0]) * 4
    error, absolute = _errors(reference + torch.tensor([0, 0, 0.5, 0]), reference)
    assert absolute == 0.5
    assert error == pytest.approx(0.5 / 10)  # root mean square 10
    error, absolute = _errors(reference / 1e3 + 0.25, reference / 1e3)
    assert error == absolute == pytest.approx(0.25)  # never more lenient than absolute for small numbers


def test_another_shape_or_a_nan_is_an_infinite_error() -> None:
    reference = torch.ones(3)
    assert _errors(torch.ones(1), reference) == (float("inf"), float("inf"))
    assert _errors(torch.tensor([1.0, float("nan"), 1.0]), reference) == (float("inf"), float("inf"))


def test_a_folder_without_a_description_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no meta\.json"):
        verify_reference(tmp_path)
