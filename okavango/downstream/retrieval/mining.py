"""Which positive and which negatives a query is trained with: pure functions of descriptors, positions and draws."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from okavango.data.loading import derive
from okavango.downstream.retrieval.search import search


def draw(size: int, count: int, *seed: int | str) -> np.ndarray:
    """`count` different numbers 0 .. size - 1 (all of them where there are fewer), by a seed of several parts."""
    raw = np.random.Philox(key=derive(*seed)).random_raw(size)  # a stream that numpy promises for ever
    return np.argsort(raw, kind="stable")[:count]


def best_positives(queries: Tensor, database: Tensor, positives: Sequence[np.ndarray]) -> np.ndarray:
    """For each query the nearest, by descriptors, of its own positives.

    Args:
        queries: descriptors (Q, D); database: (N, D).
        positives: per query, rows of the database, at least one.
    Returns:
        rows of the database, int64 (Q,).
    """
    picks = [own[int(search(query[None], database[own], 1)[1])] for query, own in zip(queries, positives, strict=True)]
    return np.array(picks, np.int64)


def hard_negatives(queries: Tensor, pool: Tensor, indices: np.ndarray, excluded: Sequence[np.ndarray], count: int) -> np.ndarray:
    """For each query the nearest, by descriptors, of those in the pool that are not of its own place.

    Args:
        queries: descriptors (Q, D); pool: (P, D).
        indices: int64 (P,), database index of each row of the pool.
        excluded: per query, database indices that are too near to be negatives.
        count: negatives per query.
    Returns:
        database indices, int64 (Q, count), nearest first.
    Raises:
        ValueError: the pool holds too few that are far enough.
    """
    rows = []
    for query, near in zip(queries, excluded, strict=True):
        far = np.flatnonzero(~np.isin(indices, near))
        if len(far) < count:
            raise ValueError(
                f"mining: {len(far)} of {len(pool)} pictures are far enough from a query, {count} are needed; draw more"
            )
        rows.append(indices[far[search(query[None], pool[torch.from_numpy(far)], count)[1][0].cpu().numpy()]])
    return np.array(rows, np.int64).reshape(len(queries), count)


def random_negatives(excluded: Sequence[np.ndarray], size: int, count: int, *seed: int | str) -> np.ndarray:
    """For each query different random database indices out of 0 .. size - 1 that are not excluded; see `hard_negatives`."""
    rows = []
    for number, near in enumerate(excluded):
        far = np.setdiff1d(np.arange(size), near)
        if len(far) < count:
            raise ValueError(f"mining: {len(far)} of {size} pictures are far enough from a query, {count} are needed")
        rows.append(far[draw(len(far), count, *seed, number)])
    return np.array(rows, np.int64).reshape(len(excluded), count)
