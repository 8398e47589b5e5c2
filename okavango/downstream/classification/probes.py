"""Two plain probes of frozen features, without anything to choose: the 5 nearest neighbours and logistic regression with C = 1.

As Corley et al. (arXiv 2305.13456) measure encoders of satellite images. Both take one class per sample, or a set of labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from okavango.downstream.classification import knn
from okavango.downstream.classification.features import Embedded
from okavango.downstream.classification.logistic import Standardiser

NEIGHBOURS, ITERATIONS = 5, 3000
AVERAGES: tuple[Literal["micro", "macro", "weighted"], ...] = ("micro", "macro", "weighted")
ROUNDS = 1000

Predict = Callable[[np.ndarray], np.ndarray]  # features (M, D) -> shares or probabilities, float64 (M, classes)


@dataclass(frozen=True)
class Probe:
    """One probe.

    Attributes:
        rule: "knn": Euclidean distance, 5 neighbours that count the same, the smallest class of equals wins. "linear":
            multinomial logistic regression by L-BFGS, for label sets one such regression per label.
        standardise: bring features to mean 0 and deviation 1 by the training set first.
        C: inverse strength of the penalty of "linear"; infinite for none.
        label_sets: a sample has a set of labels, int (N, L) of 0 and 1; a label is given where its score exceeds 1/2.
    """

    rule: Literal["knn", "linear"]
    standardise: bool = False
    C: float = 1.0
    label_sets: bool = False

    def settings(self) -> dict[str, Any]:
        """Everything that is fixed, fit for JSON."""
        own: dict[str, Any] = {"k": NEIGHBOURS, "distance": "euclidean", "votes": "equal"}
        if self.rule == "linear":
            own = {"C": self.C if math.isfinite(self.C) else "infinite", "solver": "lbfgs", "iterations": ITERATIONS}
        return {**own, "features": "standardised" if self.standardise else "raw"}


def _both(probes: dict[str, Probe]) -> dict[str, Probe]:
    sets = {f"multilabel-{name}": Probe(probe.rule, probe.standardise, probe.C, True) for name, probe in probes.items()}
    return {**probes, **sets}


PROBES = _both(
    {
        "knn-5/v1": Probe("knn"),
        "knn-5-standardised/v1": Probe("knn", standardise=True),
        "linear-c1/v1": Probe("linear"),
        "linear-c1-standardised/v1": Probe("linear", standardise=True),
        "linear-free/v1": Probe("linear", C=math.inf),
        "linear-free-standardised/v1": Probe("linear", standardise=True, C=math.inf),
    }
)


def fit_probe(probe: Probe, train: Embedded) -> tuple[Predict, dict[str, Any]]:
    """Fit a probe to labelled features.

    Returns:
        features -> scores, and `Probe.settings` with what fitting came to.
    """
    labels = train.labels
    assert labels is not None  # protocols have checked
    scale = Standardiser.fit(train.features) if probe.standardise else _same
    bank = scale(train.features)
    if probe.rule == "knn":
        k = min(NEIGHBOURS, len(bank))
        classes = int(labels.max()) + 1

        def predict(features: np.ndarray) -> np.ndarray:
            found = labels[knn.nearest(bank, scale(features), k, metric="euclidean")[1]]
            return found.mean(axis=1) if probe.label_sets else knn.shares(found, classes)

        return predict, {**probe.settings(), "bank": len(bank)}
    from sklearn.linear_model import LogisticRegression  # here, because it takes as long to import as torch
    from sklearn.multiclass import OneVsRestClassifier

    model: Any = LogisticRegression(C=probe.C, max_iter=ITERATIONS)
    model = OneVsRestClassifier(model) if probe.label_sets else model
    if not probe.label_sets and len(np.unique(labels)) < 2:
        raise ValueError(f"logistic regression: all {len(labels)} training samples are of class {labels[0]}; it needs two classes")
    model.fit(bank, labels)
    parts = [each for each in getattr(model, "estimators_", [model]) if hasattr(each, "n_iter_")]  # a constant label has no fit
    converged = all(int(each.n_iter_.max()) < ITERATIONS for each in parts)

    def probabilities(features: np.ndarray) -> np.ndarray:
        found = model.predict_proba(scale(features))
        if probe.label_sets:
            return found
        spread = np.zeros((len(found), int(model.classes_.max()) + 1))
        spread[:, model.classes_] = found
        return spread

    return probabilities, {**probe.settings(), "converged": converged}


def _same(features: np.ndarray) -> np.ndarray:
    return features


def class_metrics(labels: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Accuracy, and F1, precision and recall by every average.

    Args:
        labels, predicted: int (N,), a class per sample.
    """
    return {"accuracy": float((labels == predicted).mean()), **_counted(labels, predicted)}


def set_metrics(labels: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    """Mean average precision, F1, precision and recall by every average, and the share of samples whose whole set is right.

    Macro and weighted averages are over the labels that occur; one that no sample has tells nothing.

    Args:
        labels: int (N, L), 0 or 1; scores: float (N, L), a label is given above 1/2.
    """
    from sklearn.metrics import average_precision_score

    given, occurs = (scores > 0.5).astype(np.int64), labels.any(axis=0)
    found: dict[str, float] = {}
    for average in AVERAGES if occurs.any() else ():
        columns = slice(None) if average == "micro" else occurs
        found[f"map_{average}"] = float(average_precision_score(labels[:, columns], scores[:, columns], average=average))
    return {**found, "accuracy": float((given == labels).all(axis=1).mean()), **_counted(labels, given)}


def _counted(labels: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    from sklearn.metrics import precision_recall_fscore_support

    found: dict[str, float] = {}
    for average in AVERAGES:
        precision, recall, f1, _ = precision_recall_fscore_support(labels, predicted, average=average, zero_division=0)
        found |= {f"f1_{average}": float(f1), f"precision_{average}": float(precision), f"recall_{average}": float(recall)}
    return found


def precision_interval(labels: np.ndarray, scores: np.ndarray, seed: int, rounds: int = ROUNDS) -> tuple[float, float]:
    """95 % bootstrap interval of the micro-averaged average precision, by resampling samples.

    The decisions are sorted once; each round weighs them by how often their sample was drawn.

    Args:
        labels: int (N, L), 0 or 1, at least one of them 1; scores: float (N, L). seed, rounds: of the resampling.
    Returns:
        (low, high).
    """
    count, width = labels.shape
    order = np.argsort(-scores, axis=None, kind="stable")
    ranked, right = scores.ravel()[order], labels.ravel()[order].astype(bool)
    ends = np.flatnonzero(np.diff(ranked, append=-np.inf))  # equal scores are one step
    owner, group = order // width, np.repeat(np.arange(len(ends)), np.diff(ends, prepend=-1))
    rng = np.random.default_rng(seed)
    found: list[float] = []
    while len(found) < rounds:
        weights = np.bincount(rng.integers(count, size=count), minlength=count)[owner].astype(np.float64)
        hits = np.bincount(group, weights * right, len(ends)).cumsum()
        given = np.bincount(group, weights, len(ends)).cumsum()
        if hits[-1]:  # a draw without any positive has no precision
            gained = np.diff(hits, prepend=0.0) / hits[-1]
            found.append(float((gained * hits / np.maximum(given, 1)).sum()))
    low, high = np.quantile(found, (0.025, 0.975))
    return float(low), float(high)
