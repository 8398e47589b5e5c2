"""Tiles cover a scene, and what was made of each comes back in its place."""

from __future__ import annotations

import numpy as np
import pytest
from affine import Affine
from hypothesis import given
from hypothesis import strategies as st

from okavango.data.tiles import Tiles, Window, mosaic


@st.composite
def grids(draw) -> Tiles:
    size = draw(st.integers(1, 12))
    return Tiles(draw(st.integers(1, 40)), draw(st.integers(1, 40)), size, draw(st.integers(0, size - 1)))


def cut(tiles: Tiles, scene: np.ndarray, outside: float = -1.0):
    """Maps of all tiles, row by row, filled with `outside` beyond the scene."""
    padded = np.full((len(scene), tiles.height + 2 * tiles.size, tiles.width + 2 * tiles.size), outside)
    padded[:, : tiles.height, : tiles.width] = scene
    for row in range(tiles.rows):
        windows = [tiles.window(row, column) for column in range(tiles.columns)]
        yield [padded[:, w.top : w.top + w.height, w.left : w.left + w.width] for w in windows]


@given(grids())
def test_the_centres_cover_every_pixel_once_and_lie_inside_their_tiles(tiles):
    seen = np.zeros((tiles.height, tiles.width), int)
    for row in range(tiles.rows):
        for column in range(tiles.columns):
            own, whole = tiles.centre(row, column), tiles.window(row, column)
            seen[own.top : own.top + own.height, own.left : own.left + own.width] += 1
            assert own.height > 0 and own.width > 0
            assert whole.top <= own.top and own.top + own.height <= whole.top + whole.height
            assert whole.left <= own.left and own.left + own.width <= whole.left + whole.width
    assert (seen == 1).all()


@given(grids())
def test_no_tile_more_than_the_scene_needs(tiles):
    assert (tiles.rows - 1) * tiles.stride + tiles.size >= tiles.height
    assert tiles.rows == 1 or (tiles.rows - 2) * tiles.stride + tiles.size < tiles.height


@given(grids())
def test_a_tile_keeps_the_pixels_that_are_nearest_to_its_centre(tiles):
    middles = np.array([tiles.window(row, 0).top + tiles.size / 2 for row in range(tiles.rows)])
    for row in range(tiles.rows):
        own = tiles.centre(row, 0)
        for pixel in range(own.top, own.top + own.height):
            gaps = np.abs(middles - (pixel + 0.5))
            assert gaps[row] <= gaps.min() + 1  # an odd overlap leaves one pixel that lies between two


@given(grids(), st.sampled_from(["blend", "centre"]), st.integers(0, 2**32 - 1))
def test_what_was_cut_out_of_a_scene_gives_the_scene_again(tiles, overlap, seed):
    scene = np.random.default_rng(seed).normal(size=(2, tiles.height, tiles.width)).astype(np.float32)
    strips = list(mosaic(tiles, cut(tiles, scene), 2, overlap=overlap))
    assert len(strips) == tiles.rows
    np.testing.assert_allclose(np.concatenate(strips, 1), scene, rtol=1e-4, atol=1e-5)


def test_blending_goes_smoothly_from_one_tile_to_the_next():
    tiles = Tiles(height=8, width=12, size=8, overlap=4)
    left, right = np.zeros((1, 8, 8)), np.ones((1, 8, 8))
    (strip,) = mosaic(tiles, [[left, right]], 1)
    np.testing.assert_allclose(strip[0, 3], [0] * 4 + [0.2, 0.4, 0.6, 0.8] + [1] * 4, atol=1e-6)
    (strip,) = mosaic(tiles, [[left, right]], 1, overlap="centre")
    np.testing.assert_array_equal(strip[0, 3], [0] * 6 + [1] * 6)


@pytest.mark.parametrize("overlap", ["blend", "centre"])
def test_where_no_tile_was_there_is_no_value(overlap):
    tiles = Tiles(height=4, width=8, size=4)
    (strip,) = mosaic(tiles, [[None, np.ones((3, 4, 4))]], 3, overlap=overlap)
    assert np.isnan(strip[:, :, :4]).all() and (strip[:, :, 4:] == 1).all()


def test_a_map_of_tiles_lies_where_their_centres_lie():
    tiles = Tiles(height=100, width=100, size=20, overlap=10)
    scene = Affine(10, 0, 500_000, 0, -10, 4_000_000)
    a, b, c, d, e, f = tuple(tiles.transform(scene))[:6]
    middle = tiles.window(2, 3)
    assert a * 3.5 + b * 2.5 + c == pytest.approx(500_000 + 10 * (middle.left + 10))  # of the map's pixel in row 2, column 3
    assert d * 3.5 + e * 2.5 + f == pytest.approx(4_000_000 - 10 * (middle.top + 10))
    assert tiles.transform(None) is None


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="cannot overlap by 4; expected 0..3"):
        Tiles(10, 10, 4, 4)
    with pytest.raises(ValueError, match="scene of 0x10"):
        Tiles(0, 10, 4)
    tiles = Tiles(8, 8, 4)
    good = [np.zeros((1, 4, 4))] * 2
    with pytest.raises(ValueError, match="1 rows of maps: expected 2"):
        list(mosaic(tiles, [good], 1))
    with pytest.raises(ValueError, match="row 2 of 2 maps"):
        list(mosaic(tiles, [good] * 3, 1))
    with pytest.raises(ValueError, match=r"shape \(1, 4, 3\): expected \(1, 4, 4\)"):
        list(mosaic(tiles, [[np.zeros((1, 4, 3))] * 2] * 2, 1))
    with pytest.raises(ValueError, match="'mean': expected 'blend' or 'centre'"):
        list(mosaic(tiles, [good] * 2, 1, overlap="mean"))
    assert tiles.window(1, 1) == Window(4, 4, 4, 4)
