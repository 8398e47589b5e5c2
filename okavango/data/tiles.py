"""Tiles that cover a scene, and what was made of each put back in its place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np


class Window(NamedTuple):
    """A part of a scene, in pixels of its grid; it may reach beyond the scene."""

    top: int
    left: int
    height: int
    width: int


def moved(transform, top: float, left: float, tall: float = 1.0, wide: float = 1.0):
    """The transform of pixels that begin `top` and `left` pixels further on and are `tall` and `wide` pixels large.

    Args:
        transform: `affine.Affine` (which spells this differently from version to version).
    """
    a, b, c, d, e, f = tuple(transform)[:6]
    return type(transform)(a * wide, b * tall, c + a * left + b * top, d * wide, e * tall, f + d * left + e * top)


@dataclass(frozen=True)
class Tiles:
    """The regular grid of square windows that covers a scene.

    Tile (row, column) begins at pixel (row * stride, column * stride). Those at the lower and the right border may reach beyond the
    scene, so that all are of one size and a map whose pixel is a tile has one transform.

    Args:
        height, width: of the scene, in pixels.
        size: side of a tile, in pixels.
        overlap: pixels that neighbours share, less than `size`.
    Raises:
        ValueError: an empty scene or tile, or an overlap that leaves no step.

    Example:
        >>> tiles = Tiles(height=100, width=50, size=40, overlap=10)
        >>> (tiles.rows, tiles.columns), tiles.window(2, 1), tiles.centre(2, 1)
        ((3, 2), Window(top=60, left=30, height=40, width=40), Window(top=65, left=35, height=35, width=15))
    """

    height: int
    width: int
    size: int
    overlap: int = 0

    def __post_init__(self):
        if min(self.height, self.width, self.size) < 1:
            raise ValueError(f"tiles of {self.size} pixels over a scene of {self.height}x{self.width}: expected at least 1 of each")
        if not 0 <= self.overlap < self.size:
            raise ValueError(f"tiles of {self.size} pixels cannot overlap by {self.overlap}; expected 0..{self.size - 1}")

    @property
    def stride(self) -> int:
        """Pixels from one tile to the next."""
        return self.size - self.overlap

    @property
    def rows(self) -> int:
        return 1 + max(0, -(-(self.height - self.size) // self.stride))

    @property
    def columns(self) -> int:
        return 1 + max(0, -(-(self.width - self.size) // self.stride))

    def window(self, row: int, column: int) -> Window:
        """What a tile sees."""
        return Window(row * self.stride, column * self.stride, self.size, self.size)

    def centre(self, row: int, column: int) -> Window:
        """What is a tile's own: the pixels that are nearer to its centre than to any other's, up to the border of the scene.

        These parts cover the scene, each pixel once.
        """
        top, below = self._own(row, self.rows, self.height)
        left, right = self._own(column, self.columns, self.width)
        return Window(top, left, below - top, right - left)

    def _own(self, number: int, count: int, length: int) -> tuple[int, int]:
        first = 0 if number == 0 else number * self.stride + self.overlap // 2
        last = length if number == count - 1 else (number + 1) * self.stride + self.overlap // 2
        return first, last

    def transform(self, transform):
        """That of a map whose pixel is a tile: a cell of one stride around the tile's centre.

        Args:
            transform: `affine.Affine` of the scene's pixels, or None.
        """
        if transform is None:
            return None
        return moved(transform, self.overlap / 2, self.overlap / 2, self.stride, self.stride)


def mosaic(
    tiles: Tiles,
    maps: Iterable[Sequence[np.ndarray | None]],
    channels: int,
    *,
    overlap: Literal["blend", "centre"] = "blend",
) -> Iterator[np.ndarray]:
    """Put dense maps of tiles together, from top to bottom, with one row of tiles in memory at a time.

    Args:
        tiles: the grid.
        maps: per row of tiles, in order, one map (channels, size, size) per column; None for a tile that was left out.
        channels: of each map.
        overlap: "blend" averages where tiles overlap, with weights that fall towards the border of a tile; "centre" keeps what
            `Tiles.centre` calls a tile's own.
    Yields:
        Strips (channels, h, width), float32, one per row of tiles, that together are the scene. NaN where no tile was.
    Raises:
        ValueError: rows, columns or maps are not those of the grid.
    """
    if overlap not in ("blend", "centre"):
        raise ValueError(f"overlap {overlap!r}: expected 'blend' or 'centre'")
    row, held = -1, np.zeros((channels + 1, tiles.size, tiles.width), np.float32)
    for row, line in enumerate(maps):
        if row >= tiles.rows or len(line) != tiles.columns:
            raise ValueError(f"row {row} of {len(line)} maps: expected {tiles.rows} rows of {tiles.columns}")
        for each in line:
            if each is not None and each.shape != (channels, tiles.size, tiles.size):
                raise ValueError(f"a map of shape {each.shape}: expected {(channels, tiles.size, tiles.size)}")
        yield _blended(tiles, row, line, held) if overlap == "blend" else _centred(tiles, row, line, channels)
    if row != tiles.rows - 1:
        raise ValueError(f"{row + 1} rows of maps: expected {tiles.rows}")


def _centred(tiles: Tiles, row: int, line: Sequence[np.ndarray | None], channels: int) -> np.ndarray:
    strip = np.full((channels, tiles.centre(row, 0).height, tiles.width), np.nan, np.float32)
    for column, each in enumerate(line):
        if each is not None:
            own, whole = tiles.centre(row, column), tiles.window(row, column)
            top, left = own.top - whole.top, own.left - whole.left
            strip[:, :, own.left : own.left + own.width] = each[:, top : top + own.height, left : left + own.width]
    return strip


def _blended(tiles: Tiles, row: int, line: Sequence[np.ndarray | None], held: np.ndarray) -> np.ndarray:
    """`held` (channels + 1, size, width): weighted sums and, last, sums of weights, from the first row of this row of tiles on."""
    channels = len(held) - 1
    ramp = np.minimum(1, np.minimum(np.arange(1, tiles.size + 1), np.arange(tiles.size, 0, -1)) / (tiles.overlap + 1))
    weight = np.outer(ramp, ramp).astype(np.float32)
    for column, each in enumerate(line):
        if each is not None:
            left = column * tiles.stride
            width = min(tiles.size, tiles.width - left)
            held[:channels, :, left : left + width] += (each * weight)[:, :, :width]
            held[channels, :, left : left + width] += weight[:, :width]
    complete = tiles.stride if row < tiles.rows - 1 else tiles.height - row * tiles.stride
    sums, weights = held[:channels, :complete], held[channels, :complete]
    strip = np.divide(sums, weights, out=np.full_like(sums, np.nan), where=weights > 0)
    held[:, : tiles.size - tiles.stride] = held[:, tiles.stride :].copy()
    held[:, tiles.size - tiles.stride :] = 0
    return strip
