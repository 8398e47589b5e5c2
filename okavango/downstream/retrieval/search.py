"""Exact nearest neighbours of global descriptors, and the share of queries that find their place."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

CELLS = 2**20  # entries of the distance matrix that are held at once: they stay in the cache while they are looked through
QUERIES = 2**12  # more of them hold more entries, rather than take the database in ever smaller parts


class Nearest:
    """The nearest rows of each query among those that were looked at so far, in the order in which they came.

    Args:
        queries: (Q, D).
        count: rows per query that are kept; at least so many must be looked at in the end.
        cells: see `CELLS`.

    Distances are compared without the query's own length, which is the same for all rows. Once `count` rows are known, only what is
    nearer than the last of them is sorted in.
    """

    def __init__(self, queries: Tensor, count: int, *, cells: int = CELLS):
        self.queries, self.count, self.seen = queries, count, 0
        self.step = max(1, cells // min(max(1, len(queries)), QUERIES))
        self.least = -lengths(queries)[:, None]  # what a row at distance 0 has
        self.values = queries.new_full((len(queries), count), torch.inf)
        self.rows = torch.full((len(queries), count), -1, dtype=torch.int64, device=queries.device)

    def look(self, database: Tensor) -> None:
        """Look at further rows (N, D), which are numbered on."""
        for part in database.split(self.step):
            values = torch.addmm(lengths(part), self.queries, part.T, alpha=-2)
            torch.maximum(values, self.least, out=values)  # rounding makes no distance negative, nor one zero less than another
            nearer = values < self.values[:, -1:]
            if nearer.count_nonzero() > 4 * self.values.numel():  # at the start, or where rows come nearer and nearer
                nearer = values <= values.kthvalue(min(self.count, len(part)), dim=1, keepdim=True).values
            query, row = nearer.nonzero(as_tuple=True)
            self._keep(query, row, values)
            self.seen += len(part)

    def _keep(self, query: Tensor, row: Tensor, values: Tensor) -> None:
        """Sort rows of a part in; for each query they come in ascending order, so that equal ones keep it."""
        found = query.bincount(minlength=len(self.queries))
        column = torch.arange(len(query), device=query.device) - (found.cumsum(0) - found)[query]
        size = (len(found), int(found.max()) if len(query) else 0)
        new, rows = values.new_full(size, torch.inf), row.new_full(size, -1)
        new[query, column] = values[query, row]
        rows[query, column] = row + self.seen
        new, order = torch.cat([self.values, new], 1).sort(dim=1, stable=True)
        self.values = new[:, : self.count]
        self.rows = torch.cat([self.rows, rows], 1).gather(1, order[:, : self.count])

    @property
    def distances(self) -> Tensor:
        """Squared, (Q, count), ascending."""
        return self.values - self.least


def lengths(vectors: Tensor) -> Tensor:
    """Squared, of each row: (N, D) -> (N,); on a processor without a matrix of squares beside the vectors."""
    if vectors.device.type == "cpu":
        return torch.from_numpy(np.einsum("nd,nd->n", rows := vectors.detach().numpy(), rows))
    return vectors.square().sum(1)


def search(queries: Tensor, database: Tensor, count: int, *, cells: int = CELLS) -> tuple[Tensor, Tensor]:
    """The nearest database rows of each query by Euclidean distance.

    Args:
        queries: (Q, D); database: (N, D); of one dtype and device.
        count: neighbours per query; N at most are returned.
        cells: entries of the distance matrix that are held at once, for up to `QUERIES` queries.
    Returns:
        squared distances (Q, K), ascending, and indices int64 (Q, K); of equal distances the lower index comes first.
    Raises:
        ValueError: shapes that do not fit, or nothing to search.
    """
    if queries.ndim != 2 or database.ndim != 2 or queries.shape[1] != database.shape[1] or not len(database) or count < 1:
        raise ValueError(
            f"search: queries {list(queries.shape)}, database {list(database.shape)}, count {count}; expected (Q, D) and (N, D) "
            "with at least one row and one neighbour"
        )
    nearest = Nearest(queries, min(count, len(database)), cells=cells)
    nearest.look(database)
    return nearest.distances, nearest.rows


def recalls(predictions: Tensor | np.ndarray, positives: Sequence[np.ndarray], counts: Sequence[int]) -> np.ndarray:
    """Recall@N: share of all queries with one of their positives among the first N predictions.

    Args:
        predictions: database indices (Q, K), best first.
        positives: per query, database indices of its place; a query without any counts as not found.
        counts: the values of N.
    Returns:
        shares 0..1, float64, one for each N.
    Raises:
        ValueError: not one list of positives per query.
    """
    predictions = np.asarray(predictions)
    if len(predictions) != len(positives):
        raise ValueError(
            f"recalls: {len(predictions)} rows of predictions, positives of {len(positives)} queries; expected as many"
        )
    hits = np.stack([np.isin(row, wanted) for row, wanted in zip(predictions, positives, strict=True)])
    return np.array([hits[:, :count].any(1).mean() for count in counts])
