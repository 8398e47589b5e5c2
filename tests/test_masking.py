"""Block masks: their bounds, their statistics and that everything follows from the generator."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from okavango.data.masking import batch_masks, block_mask


@given(st.integers(2, 16), st.integers(2, 16), st.floats(0, 1), st.integers(0, 10_000))
@settings(deadline=None)
def test_a_mask_hides_at_most_what_is_asked_for(rows, columns, share, seed):
    count = int(share * rows * columns)
    mask = block_mask((rows, columns), count, Random(seed))
    assert mask.shape == (rows, columns) and mask.dtype == bool and mask.sum() <= count
    assert np.array_equal(mask, block_mask((rows, columns), count, Random(seed)))


def test_nothing_is_hidden_when_nothing_is_asked_for():
    assert not block_mask((8, 8), 0, Random(0)).any()


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5])
def test_masks_come_close_to_the_count(share):
    count = int(share * 196)
    sizes = [int(block_mask((14, 14), count, Random(seed)).sum()) for seed in range(200)]
    assert max(sizes) <= count and np.mean(sizes) > 0.9 * count


def test_hidden_patches_come_in_blocks():
    """Neighbours of a hidden patch are hidden far more often than the share says."""
    together, hidden = 0, 0
    for seed in range(100):
        mask = block_mask((14, 14), 59, Random(seed))
        together += int((mask[:, 1:] & mask[:, :-1]).sum())
        hidden += int(mask[:, :-1].sum())
    assert together / hidden > 0.65  # independent patches: 0.3


def test_the_middle_is_hidden_more_often_than_the_edges_and_both_sides_equally():
    share = np.mean([block_mask((10, 10), 40, Random(seed)) for seed in range(600)], 0)
    inner = share[2:-2, 2:-2]
    assert inner.min() > 0.35 and inner.max() < 0.75 and share[[0, 0, -1, -1], [0, -1, 0, -1]].max() < 0.2 and share.min() > 0
    assert np.abs(share - share[::-1]).max() < 0.12 and np.abs(share - share[:, ::-1]).max() < 0.12


def test_a_single_rectangle_has_the_area_and_aspect_asked_for():
    for seed in range(200):
        mask = block_mask((20, 20), 36, Random(seed), min_patches=30, max_share=0.09)
        rows, columns = mask.any(1), mask.any(0)
        if mask[np.ix_(rows, columns)].all() and mask.sum() >= 25:  # one rectangle
            aspect = rows.sum() / columns.sum()
            assert 0.3 * 0.7 < aspect < 1 / 0.3 / 0.7


@given(st.integers(1, 12), st.floats(0, 1), st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_a_share_of_the_crops_is_masked(crops, probability, seed):
    masks = batch_masks(crops, (7, 9), Random(seed), probability=probability, ratio=(0.1, 0.5))
    assert masks.shape == (crops, 63) and masks.dtype == bool
    # small counts may fail to place a rectangle; none is above its bound
    assert masks.any(1).sum() <= int(crops * probability) and masks.sum(1).max(initial=0) <= 31
    assert np.array_equal(masks, batch_masks(crops, (7, 9), Random(seed), probability=probability, ratio=(0.1, 0.5)))


def test_ratios_are_spread_over_the_masked_crops():
    """The i-th smallest mask of a batch lies in the i-th of equal intervals of the ratio, up to what blocks miss."""
    bounds = np.linspace(0.1, 0.5, 9)
    totals = np.zeros(8)
    for seed in range(60):
        masks = batch_masks(16, (14, 14), Random(seed), probability=0.5, ratio=(0.1, 0.5))
        sizes = np.sort(masks.sum(1))
        assert (sizes[:8] == 0).all() and (sizes[8:] <= bounds[1:] * 196).all()
        totals += sizes[8:] / 196
    means = totals / 60
    assert (means > bounds[:-1] * 0.85).all() and (means < bounds[1:]).all()


def test_masked_crops_stand_anywhere_in_the_batch():
    places = np.mean([batch_masks(8, (8, 8), Random(seed), probability=0.5, ratio=(0.2, 0.5)).any(1) for seed in range(400)], 0)
    assert np.abs(places - 0.5).max() < 0.12


def test_settings_of_the_rectangles_are_passed_on():
    large = batch_masks(4, (14, 14), Random(0), probability=1.0, ratio=(0.3, 0.3), min_patches=50)
    small = batch_masks(4, (14, 14), Random(0), probability=1.0, ratio=(0.3, 0.3), max_share=0.03)
    edges = [np.abs(np.diff(m.reshape(-1, 14, 14).astype(int), axis=2)).sum() / max(1, m.sum()) for m in (large, small)]
    assert edges[0] < edges[1]
