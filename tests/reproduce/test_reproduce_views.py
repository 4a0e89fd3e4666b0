"""Masks and crops of fig. 10."""

from __future__ import annotations

from localign.reproduce.views import draw_masks, draw_windows


def test_masks_come_with_their_complements_and_windows_stay_inside() -> None:
    masks = draw_masks(3, (10, 10), seed=1)
    assert len(masks) == 3
    for pair in masks.values():
        assert pair.shape == (3, 2, 100)
        assert (pair[:, 0] == ~pair[:, 1]).all()
    kinds = list(masks.values())
    assert (kinds[0] != kinds[1]).any()
    for windows in draw_windows(20, (10, 7), seed=1):
        for top, left, height, width in windows:
            assert 3 <= height <= 10
            assert 3 <= width <= 7
            assert 0 <= top <= 10 - height
            assert 0 <= left <= 7 - width
    assert draw_windows(2, (5, 5), seed=3) == draw_windows(2, (5, 5), seed=3)
