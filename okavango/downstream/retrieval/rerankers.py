"""Re-rankers: each scores candidates of a query by local descriptors, higher is better. One budget, one order, one loop for all.

Another package offers its own by the entry point ``okavango.rerankers``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from okavango.downstream.retrieval.describe import Described
from okavango.downstream.retrieval.rerank import match_counts, mutual
from okavango.models.backbone import unknown_name

Reranker = Callable[[Tensor, Tensor], Tensor]  # (H, W, C), (K, H', W', C), unit length -> scores (K,)
ROOM = 2**26  # bytes of candidates' local descriptors that are held at once
TOLERANCE = 1.5  # cells that a match may lie off the homography


def mutual_nn(query: Tensor, candidates: Tensor) -> Tensor:
    """Number of mutual nearest neighbours (SelaVPR, arXiv 2402.14505); see `okavango.downstream.retrieval.rerank`."""
    return match_counts(query.flatten(0, 1), candidates.flatten(1, 2))


def similarity_sum(query: Tensor, candidates: Tensor) -> Tensor:
    """Sum of the cosines of mutual nearest neighbours: as `mutual_nn`, but sure matches count for more."""
    maps = candidates.flatten(1, 2)
    cells = query.flatten(0, 1).expand(len(maps), -1, -1)
    partner, both = mutual(cells, maps)
    cosines = (cells * maps.gather(1, partner[..., None].expand(-1, -1, maps.shape[2]))).sum(2)
    return (cosines * both).sum(1)


def ransac(query: Tensor, candidates: Tensor) -> Tensor:
    """Number of mutual nearest neighbours that agree on one homography, found by RANSAC through OpenCV with a fixed seed."""
    here, there = _cells(query.shape[:2]), _cells(candidates.shape[1:3])
    partner, both = mutual(query.flatten(0, 1).expand(len(candidates), -1, -1), candidates.flatten(1, 2))
    scores = []
    for matched, mask in zip(partner.cpu().numpy(), both.cpu().numpy(), strict=True):
        inliers = None
        if mask.sum() >= 4:  # a homography has eight unknowns
            cv2.setRNGSeed(0)
            inliers = cv2.findHomography(here[mask], there[matched[mask]], cv2.RANSAC, TOLERANCE)[1]
        scores.append(0 if inliers is None else int(inliers.sum()))
    return torch.tensor(scores)


def _cells(grid: tuple[int, ...]) -> np.ndarray:
    y, x = np.meshgrid(np.arange(grid[0]), np.arange(grid[1]), indexing="ij")
    return np.stack([x.ravel(), y.ravel()], 1).astype(np.float32)


RERANKERS: dict[str, Reranker] = {"mutual-nn": mutual_nn, "similarity": similarity_sum, "ransac": ransac}


def find_reranker(name: str) -> Reranker:
    """A re-ranker by its name, ours or another package's.

    Raises:
        ValueError: unknown; the message offers the nearest.
    """
    plugins: dict[str, Any] = {point.name: point for point in entry_points(group="okavango.rerankers")}
    if name not in RERANKERS and name not in plugins:
        raise ValueError(unknown_name("re-ranker", name, [*RERANKERS, *plugins]))
    return RERANKERS[name] if name in RERANKERS else plugins[name].load()


def rerank_all(
    reranker: Reranker, queries: Described, database: Described, rows: np.ndarray, *, budget: int
) -> tuple[np.ndarray, np.ndarray, float]:
    """Order the first `budget` candidates of each query anew; equal scores keep their order, and so does what comes after.

    Local descriptors are read from their stores, `ROOM` bytes of candidates at a time.

    Args:
        rows: database rows (Q, K), best first; -1 fills up where a search found fewer.
    Returns:
        order: int64 (Q, K), for `numpy.take_along_axis` on `rows`; scores: float64 (Q, budget), in that order; seconds.
    """
    began = time.perf_counter()
    budget = min(budget, rows.shape[1])
    each = max(1, ROOM // (2 * max(1, database.store.bytes_each["local"])))  # float16 on disk, float32 here
    order, scores = np.tile(np.arange(rows.shape[1]), (len(rows), 1)), np.full((len(rows), budget), -np.inf)
    for query, candidates in enumerate(rows[:, :budget]):
        known = candidates[candidates >= 0]
        cells = queries.local([query])[0]
        for first in range(0, len(known), each):
            some = known[first : first + each]
            scores[query, first : first + len(some)] = reranker(cells, database.local(some)).double().cpu().numpy()
        order[query, :budget] = np.argsort(-scores[query], kind="stable")
        scores[query] = scores[query, order[query, :budget]]
    return order, scores, time.perf_counter() - began
