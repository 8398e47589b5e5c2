"""How well a ranking finds places. Everything is a pure function of predictions, positives, distances and positions.

A query is answerable when it has positives at all. Recall@N is taken over all queries, as the published tables do, or over the
answerable ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

COUNTS = (1, 5, 10, 20, 100)


def right(predictions: np.ndarray, positives: Sequence[np.ndarray]) -> np.ndarray:
    """Which predictions show the query's place.

    Args:
        predictions: database rows (Q, K), best first.
        positives: per query, the rows of its place.
    Returns:
        bool (Q, K).
    Raises:
        ValueError: not one list of positives per query.
    """
    predictions = np.asarray(predictions)
    if predictions.ndim != 2 or len(predictions) != len(positives):
        raise ValueError(
            f"predictions of shape {predictions.shape}, positives of {len(positives)} queries; expected (queries, ranks)"
        )
    found = [np.isin(row, wanted) for row, wanted in zip(predictions, positives, strict=True)]
    return np.array(found, bool).reshape(predictions.shape)


def hits(right: np.ndarray, count: int) -> np.ndarray:
    """Per query, whether one of the first `count` predictions is right: bool (Q,); its mean is Recall@`count`."""
    return np.asarray(right[:, :count].any(1))


def average_precisions(right: np.ndarray, positives: Sequence[np.ndarray]) -> np.ndarray:
    """Average precision of each query's K predictions: the mean, over the positives that K has room for, of the precision at each
    right prediction. Its mean over the answerable queries is mAP@K.

    Args:
        right: bool (Q, K), best first; positives: see `right`.
    Returns:
        float64 (Q,), 0..1; NaN where a query has no positive.
    """
    counts = np.array([len(own) for own in positives])
    precision = right.cumsum(1) / np.arange(1, right.shape[1] + 1)
    room = np.minimum(counts, right.shape[1])
    return np.where(counts > 0, (precision * right).sum(1) / np.maximum(room, 1), np.nan)


@dataclass(frozen=True, eq=False)
class PrecisionRecall:
    """What is gained and lost when only the surest first predictions are believed, as loop closure does.

    Attributes:
        precision: share of those believed that are right, float64 (T,); recall: share of the answerable queries that are answered
            rightly, ascending, (T,); thresholds: the lowest score that is believed, descending, (T,).
    """

    precision: np.ndarray
    recall: np.ndarray
    thresholds: np.ndarray

    @property
    def area(self) -> float:
        """Average precision: the sum of precision times each rise of recall."""
        return float((np.diff(self.recall, prepend=0.0) * self.precision).sum())

    def recall_at(self, precision: float = 1.0) -> float:
        """The greatest recall whose precision is at least this; 0 where there is none."""
        return float(self.recall[self.precision >= precision].max(initial=0.0))


def precision_recall(scores: np.ndarray, first: np.ndarray, answerable: np.ndarray) -> PrecisionRecall:
    """One point per distinct score of a first prediction; equal scores are believed together.

    Args:
        scores: (Q,), of the first prediction, higher is surer; first: bool (Q,), whether it is right.
        answerable: bool (Q,); an answer to another query is always wrong.
    Raises:
        ValueError: shapes that differ, or no answerable query.
    """
    scores, first, answerable = np.asarray(scores, np.float64), np.asarray(first, bool), np.asarray(answerable, bool)
    if not scores.shape == first.shape == answerable.shape or scores.ndim != 1:
        raise ValueError(f"scores {scores.shape}, right {first.shape}, answerable {answerable.shape}; expected (queries,) each")
    if not answerable.any():
        raise ValueError("no query has a positive, so there is no recall to measure")
    order = np.argsort(-scores, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))
    believed = (first & answerable)[order].cumsum()[ends]
    return PrecisionRecall(believed / (ends + 1), believed / answerable.sum(), scores[order][ends])


def distance_errors(predictions: np.ndarray, queries: np.ndarray, database: np.ndarray) -> np.ndarray:
    """Metres from each query to its first prediction, float64 (Q,); infinite where there is none.

    Args:
        predictions: rows (Q, K), -1 for none; queries: east and north (Q, 2); database: (N, 2).
    """
    first = np.asarray(predictions)[:, 0]
    return np.where(first < 0, np.inf, np.hypot(*(database[first] - queries).T))
