"""Nearest neighbours of frozen features, exactly, and their votes: weighted as DINOv2 and POA do it (Wu et al., arXiv 1805.01978),
or each the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import Literal

import numpy as np
import torch

KS = (10, 20, 100, 200)
TEMPERATURE = 0.07

# Float32 products of vectors of length 1 are right to about 1e-6. What the fast search leaves out can only belong to the k nearest
# if it is closer than this to the k-th.
_SLACK_32, _SLACK_64 = 1e-5, 1e-12
_SPARE = 16

Metric = Literal["cosine", "euclidean"]
Search = Callable[[np.ndarray, np.ndarray, int], np.ndarray]


def normalised(features: np.ndarray) -> np.ndarray:
    """Rows of unit length, float32 (N, D); rows of zeros stay zero."""
    values = np.asarray(features, dtype=np.float64)
    lengths = np.linalg.norm(values, axis=1, keepdims=True)
    return np.ascontiguousarray(values / np.maximum(lengths, 1e-12), dtype=np.float32)


def nearest(
    bank: np.ndarray, queries: np.ndarray, k: int, backend: str = "auto", metric: Metric = "cosine"
) -> tuple[np.ndarray, np.ndarray]:
    """The k rows of the bank with the greatest cosine similarity, or the smallest Euclidean distance, exactly.

    A fast float32 search proposes, float64 decides; equal ones are ordered by index. The result therefore does not depend on the
    backend, its blocking or its threads.

    Args:
        bank: float (N, D); queries: float (M, D); for "cosine" both are L2-normalised here.
        k: neighbours per query, at most N.
        backend: "faiss", "torch", or "auto" for FAISS where it is installed.
        metric: "cosine" or "euclidean".
    Returns:
        similarities float64 (M, k), falling, or distances (M, k), rising; indices int64 (M, k).
    Raises:
        ValueError: k out of range, unknown backend, or shapes that do not fit.
    """
    if bank.ndim != 2 or queries.ndim != 2 or bank.shape[1] != queries.shape[1]:
        raise ValueError(f"nearest: bank {bank.shape} and queries {queries.shape}; expected (N, D) and (M, D)")
    if not 1 <= k <= len(bank):
        raise ValueError(f"nearest: k={k}; expected 1..{len(bank)}, the size of the bank")
    if backend == "auto":
        backend = "faiss" if find_spec("faiss") else "torch"
    if backend not in _BACKENDS:
        raise ValueError(f"nearest: unknown backend {backend!r}; expected auto, {', '.join(_BACKENDS)}")
    prepare, closeness = _METRICS[metric]
    bank, queries, lifted, scale = prepare(bank, queries)
    near, far = (np.ascontiguousarray(each, np.float32) for each in lifted)
    proposed = _BACKENDS[backend](near, far, min(len(bank), k + _SPARE))
    found, indices = np.empty((len(queries), k)), np.empty((len(queries), k), dtype=np.int64)
    unsure: list[int] = []
    block = max(1, 2**24 // (proposed.shape[1] * bank.shape[1]))  # 128 MiB of float64
    for start in range(0, len(queries), block):
        rows = slice(start, start + block)
        ranked, order = _rank(queries[rows], bank, proposed[rows], closeness)
        found[rows], indices[rows] = ranked[:, :k], order[:, :k]
        if proposed.shape[1] < len(bank):
            unsure += (np.flatnonzero(ranked[:, k - 1] - ranked[:, -1] <= _SLACK_32 * scale) + start).tolist()
    if unsure:
        found[unsure], indices[unsure] = _exhaustive(bank, queries[unsure], k, (lifted[0], lifted[1][unsure]), closeness)
    return (found if metric == "cosine" else np.sqrt(-found)), indices


def vote(
    similarities: np.ndarray,
    labels: np.ndarray,
    ks: Iterable[int] = KS,
    temperature: float = TEMPERATURE,
    classes: int | None = None,
) -> dict[int, np.ndarray]:
    """Class of each query by the votes of its k nearest, for several k.

    A neighbour's weight is softmax(similarity / temperature) over the largest k, truncated to k; votes of a class are summed, the
    first of equal classes wins.

    Args:
        similarities: float (M, K), falling; labels: int (M, K), the neighbours' classes.
        ks: each at most K.
    Returns:
        k -> int64 (M,).
    """
    ks = tuple(ks)
    largest = max(ks)
    scaled = np.asarray(similarities[:, :largest], dtype=np.float64) / temperature
    weights = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    classes = int(labels.max()) + 1 if classes is None else classes
    rows = np.arange(len(labels))[:, None]
    predicted = {}
    for k in ks:
        votes = np.zeros((len(labels), classes))
        np.add.at(votes, (rows, labels[:, :k]), weights[:, :k])
        predicted[k] = votes.argmax(axis=1)
    return predicted


def shares(labels: np.ndarray, classes: int) -> np.ndarray:
    """Share of each class among neighbours that all count the same, float64 (M, classes); `argmax` takes the first of equals.

    Args:
        labels: int (M, K), the neighbours' classes.
    """
    votes = np.zeros((len(labels), classes), dtype=np.int64)
    np.add.at(votes, (np.arange(len(labels))[:, None], labels), 1)
    return votes / labels.shape[1]


def knn_predict(
    bank: np.ndarray,
    labels: np.ndarray,
    queries: np.ndarray,
    ks: Iterable[int] = KS,
    temperature: float = TEMPERATURE,
    backend: str = "auto",
) -> dict[int, np.ndarray]:
    """Classify queries by the labelled bank; the arguments are those of `nearest` and `vote`. A k above the bank's size means all.

    Returns:
        k (as asked for) -> predicted class, int64 (M,).

    Example:
        >>> bank = np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
        >>> knn_predict(bank, np.array([0, 0, 1]), np.array([[0.1, 2.0]]), ks=(1,), backend="torch")[1].tolist()
        [1]
    """
    effective = {k: min(k, len(bank)) for k in ks}
    similarities, indices = nearest(bank, queries, max(effective.values()), backend)
    predicted = vote(similarities, np.asarray(labels)[indices], set(effective.values()), temperature)
    return {asked: predicted[k] for asked, k in effective.items()}


def _faiss(bank: np.ndarray, queries: np.ndarray, k: int) -> np.ndarray:
    import faiss

    index = faiss.IndexFlatIP(bank.shape[1])
    index.add(bank)
    return index.search(queries, k)[1]


def _torch(bank: np.ndarray, queries: np.ndarray, k: int) -> np.ndarray:
    columns = torch.from_numpy(bank).T
    block = max(1, 2**25 // len(bank))  # 128 MiB of float32
    found = [(rows @ columns).topk(k, dim=1).indices for rows in torch.from_numpy(queries).split(block)]
    return torch.cat(found).numpy() if found else np.empty((0, k), dtype=np.int64)


_BACKENDS: dict[str, Search] = {"faiss": _faiss, "torch": _torch}

# bank, queries, both as vectors whose products rank as the metric does, and the unit of these products in that of the closeness
Prepared = tuple[np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray], float]


def _directions(bank: np.ndarray, queries: np.ndarray) -> Prepared:
    bank, queries = normalised(bank), normalised(queries)
    return bank, queries, (bank, queries), 1.0


def _points(bank: np.ndarray, queries: np.ndarray) -> Prepared:
    """|q - b|^2 / 2 = |q|^2 / 2 - (q.b - |b|^2 / 2), so the nearest b has the greatest product of (q, 1) and (b, -|b|^2 / 2).

    Both are moved to the bank's mean and scaled to lengths of at most 1 first, where float32 is at its best.
    """
    bank, queries = (np.ascontiguousarray(each, dtype=np.float32) for each in (bank, queries))
    centre = bank.mean(axis=0, dtype=np.float64)
    moved = [each.astype(np.float64) - centre for each in (bank, queries)]
    longest = max([np.linalg.norm(each, axis=1).max() for each in moved if len(each)], default=0.0) or 1.0
    inner, outer = (each / longest for each in moved)
    lifted = np.column_stack([inner, -np.square(inner).sum(axis=1) / 2]), np.column_stack([outer, np.ones(len(outer))])
    return bank, queries, lifted, 2 * longest**2


def _similarity(rows: np.ndarray, queries: np.ndarray) -> np.ndarray:
    return (rows * queries).sum(axis=2)


def _minus_squared_distance(rows: np.ndarray, queries: np.ndarray) -> np.ndarray:
    return -np.square(rows - queries).sum(axis=2)


Closeness = Callable[[np.ndarray, np.ndarray], np.ndarray]  # float64 (m, c, D) and (m, 1, D) -> (m, c)

_METRICS: dict[str, tuple[Callable[[np.ndarray, np.ndarray], Prepared], Closeness]] = {
    "cosine": (_directions, _similarity),
    "euclidean": (_points, _minus_squared_distance),
}


def _rank(queries: np.ndarray, bank: np.ndarray, proposed: np.ndarray, closeness: Closeness) -> tuple[np.ndarray, np.ndarray]:
    """Closeness (m, c), falling, and indices (m, c) of the proposed rows; equally close ones by index.

    Summing pair by pair, unlike a matrix product, gives equal rows of the bank equal bits wherever they stand.
    """
    proposed = np.sort(proposed, axis=1)
    found = closeness(bank[proposed].astype(np.float64), queries[:, None].astype(np.float64))
    order = np.argsort(-found, axis=1, kind="stable")
    return np.take_along_axis(found, order, 1), np.take_along_axis(proposed, order, 1)


def _exhaustive(
    bank: np.ndarray,
    queries: np.ndarray,
    k: int,
    lifted: tuple[np.ndarray, np.ndarray],
    closeness: Closeness,
) -> tuple[np.ndarray, np.ndarray]:
    """`nearest` in float64 for queries where the float32 search could not tell: many rows are almost equally near."""
    found, indices = np.empty((len(queries), k)), np.empty((len(queries), k), dtype=np.int64)
    columns = lifted[0].T.astype(np.float64)
    block = max(1, 2**24 // len(bank))
    for start in range(0, len(queries), block):
        rough = lifted[1][start : start + block].astype(np.float64) @ columns
        thresholds = np.partition(rough, len(bank) - k, axis=1)[:, len(bank) - k] - _SLACK_64
        for row, (scores, threshold) in enumerate(zip(rough, thresholds, strict=True), start=start):
            ranked, order = _rank(queries[row : row + 1], bank, np.flatnonzero(scores >= threshold)[None], closeness)
            found[row], indices[row] = ranked[0, :k], order[0, :k]
    return found, indices
