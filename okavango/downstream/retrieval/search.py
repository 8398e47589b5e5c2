"""Exact nearest neighbours of global descriptors, and the share of queries that find their place."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def search(queries: Tensor, database: Tensor, count: int, *, cells: int = 2**26) -> tuple[Tensor, Tensor]:
    """The nearest database rows of each query by Euclidean distance.

    Args:
        queries: (Q, D); database: (N, D); of one dtype and device.
        count: neighbours per query; N at most are returned.
        cells: entries of the distance matrix that are held at once.
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
    count, lengths = min(count, len(database)), database.square().sum(1)
    found = []
    for part in queries.split(max(1, cells // len(database))):
        distances = (part.square().sum(1, keepdim=True) + lengths - 2 * part @ database.T).clamp_min(0)
        values, indices = distances.topk(count, largest=False)
        last = values[:, -1:]
        for row in ((distances == last).sum(1) > (values == last).sum(1)).nonzero().flatten():  # topk took any of equal ones
            values[row], indices[row] = (sorted[:count] for sorted in distances[row].sort(stable=True))
        indices, order = indices.sort(dim=1)
        values, order = values.gather(1, order).sort(dim=1, stable=True)
        found.append((values, indices.gather(1, order)))
    if not found:
        return queries.new_empty(0, count), torch.empty(0, count, dtype=torch.int64, device=queries.device)
    values, indices = (torch.cat(parts) for parts in zip(*found, strict=True))
    return values, indices


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
