"""Pictures of places: a database and queries whose names tell where they were taken.

Layout and names are those of the common benchmarks of visual place recognition: a folder with ``database/`` and ``queries/`` in it,
or ``images/{train,val,test}/`` with both, and pictures called ``@EAST@NORTH@...@.jpg``, in metres (UTM).
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from okavango.data.sources import ImageFolder, _Manifest

TOLERANCE = 1e-6  # metres; names have centimetres, so this only undoes rounding of binary fractions


def find_places(folder: str | os.PathLike, split: str = "") -> Path | None:
    """The folder that holds ``database`` and ``queries``: this one, or that of a split inside; None when there is none."""
    root = Path(folder)
    for place in (root / "images" / split, root / split, root) if split else (root,):
        if (place / "database").is_dir() and (place / "queries").is_dir():
            return place
    return None


def position(name: str) -> tuple[float, float]:
    """East and north in metres from a picture's name; folders before it do not count.

    Raises:
        ValueError: no position in the name.

    Example:
        >>> position("some@where/@0584000.82@4477300.00@17@T@@@@@@@@@@.jpg")
        (584000.82, 4477300.0)
    """
    fields = os.path.basename(name).split("@")
    try:
        return float(fields[1]), float(fields[2])
    except (IndexError, ValueError):
        raise ValueError(f"picture {name!r} tells no position; expected a name like @0584000.82@4477300.00@...@.jpg") from None


def within(queries: np.ndarray, database: np.ndarray, radius: float) -> list[np.ndarray]:
    """For each query the database pictures at most `radius` metres away, `radius` itself included; zones of UTM do not count.

    Args:
        queries: east and north (Q, 2); database: (N, 2).
    Returns:
        ascending indices, int64, one array a query.
    """
    from sklearn.neighbors import NearestNeighbors

    if not len(queries):
        return []
    found = NearestNeighbors(radius=radius + TOLERANCE).fit(database).radius_neighbors(queries, return_distance=False)
    return [np.sort(row).astype(np.int64) for row in found]


def neighbourhoods(
    database: np.ndarray, queries: np.ndarray, *, positive: float = 10.0, negative: float = 25.0, aligned: bool = True
) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
    """Which queries can be trained with, what is their place, and what is too near to be another one.

    Args:
        database, queries: east and north (N, 2), (Q, 2) in metres.
        positive: radius of the place; negative: radius in which nothing is a negative.
        aligned: False looks up the second radius in the list of all queries by the number in the list of kept ones, as the
            published code does; after the first query that is left out, pictures of the same place can be negatives.
    Returns:
        indices of queries that have a positive; for each of these, its positives, and what is excluded as negative.
    """
    near = within(queries, database, positive)
    kept = np.array([index for index, own in enumerate(near) if len(own)], np.int64)
    excluded = within(queries, database, negative)
    return kept, [near[i] for i in kept], [excluded[i] for i in (kept if aligned else range(len(kept)))]


class Places(_Manifest):
    """A folder with ``database`` and ``queries``, each sorted by path; the database's pictures come first.

    Args:
        root: the folder; see `find_places`.
        max_side: see `okavango.data.sources.open_source`.
    Attributes:
        database, queries: east and north in metres, float64 (N, 2) and (Q, 2).
    Raises:
        ValueError: a part that is missing or empty, or a name that tells no position.
    """

    def __init__(self, root: str | os.PathLike, *, max_side: int | None = None):
        found = find_places(root)
        if found is None:
            raise ValueError(f"no places in {os.fspath(root)!r}: expected folders database/ and queries/ in it")
        self.name = found.resolve().name
        self.parts = [ImageFolder(found / part, max_side=max_side) for part in ("database", "queries")]
        self.ids = [f"{part}/{id}" for part, source in zip(("database", "queries"), self.parts, strict=True) for id in source.ids]
        positions = np.array([position(id) for id in self.ids], np.float64)
        self.database, self.queries = np.split(positions, [len(self.parts[0])])

    def _image(self, index: int) -> Tensor:
        first = len(self.parts[0])
        return self.parts[0]._image(index) if index < first else self.parts[1]._image(index - first)

    def _sizes(self) -> Iterable[Any]:
        for part in self.parts:
            yield from part._sizes()
