"""Named and versioned ways to measure frozen features: a number is comparable with another only under the same protocol.

A version never changes once it has been published; another choice of settings is another version.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from okavango.downstream.classification import knn, linear, logistic
from okavango.downstream.classification.features import Embedded
from okavango.models.backbone import unknown_name

HELD_OUT = 0.1


@dataclass(frozen=True, eq=False)
class Outcome:
    """One measurement.

    Attributes:
        metric: "accuracy".
        value: 0..1.
        correct: bool (N,), in the order of the test set.
        settings: everything that was fixed or chosen, fit for JSON.
    """

    metric: str
    value: float
    correct: np.ndarray
    settings: dict[str, Any]


# of logistic/v1: within half a point of the converged fit also where the penalty is weak
SOLVER: dict[str, Any] = {"iterations": 300, "tolerance": 1e-5, "dtype": torch.float32}

Predict = Callable[[Embedded], tuple[np.ndarray, dict[str, Any]]]  # classes int (N,), and what else is worth noting


def knn_v1(train: Embedded, seed: int) -> tuple[Predict, dict[str, Any]]:
    """Weighted votes of the 20 nearest at temperature 0.07; the accuracy at 10, 100 and 200 is noted, never chosen from."""

    def predict(test: Embedded) -> tuple[np.ndarray, dict[str, Any]]:
        predicted = knn.knn_predict(train.features, _labels(train), test.features)
        at = {str(k): float((classes == test.labels).mean()) for k, classes in predicted.items()}
        return predicted[20], {"accuracy_at_k": at}

    return predict, {"k": 20, "temperature": knn.TEMPERATURE, "similarity": "cosine", "bank": len(train)}


def logistic_v1(train: Embedded, seed: int) -> tuple[Predict, dict[str, Any]]:
    """L-BFGS on standardised features; C by the accuracy on a held-out tenth of the training set, then fitted on all of it."""
    kept, held = train.split(HELD_OUT, seed)
    classes = int(_labels(train).max()) + 1
    accuracies, model = [], None
    for C in logistic.GRID:  # from strong to weak penalty, each beginning where the last one ended
        model = logistic.fit_logistic(kept.features, _labels(kept), classes, C=C, start=model, **SOLVER)
        accuracies.append(float((model.predict(held.features) == held.labels).mean()))
    C = logistic.GRID[int(np.argmax(accuracies))]
    model = logistic.fit_logistic(train.features, _labels(train), classes, C=C, **SOLVER)
    settings = {
        "C": C,
        "grid": list(logistic.GRID),
        "held_out": len(held),
        "held_out_accuracy": accuracies,
        "features": "standardised",
        "converged": model.converged,
    }
    return lambda test: (model.predict(test.features), {}), settings


def linear_v1(train: Embedded, seed: int) -> tuple[Predict, dict[str, Any]]:
    """2000 steps of SGD on standardised features; the rate by a held-out tenth of the training set, then trained on all of it."""
    kept, held = train.split(HELD_OUT, seed)
    classes = int(_labels(train).max()) + 1
    inner = logistic.Standardiser.fit(kept.features)
    weights, biases = linear.train_heads(*_tensors(inner, kept), classes, steps=linear.STEPS, seed=seed)
    best, accuracies = linear.best_head(weights, biases, *_tensors(inner, held))
    outer = logistic.Standardiser.fit(train.features)
    rate = linear.RATES[best]
    weights, biases = linear.train_heads(*_tensors(outer, train), classes, rates=[rate], steps=linear.STEPS, seed=seed)

    def predict(test: Embedded) -> tuple[np.ndarray, dict[str, Any]]:
        logits = torch.from_numpy(outer(test.features)).float() @ weights[0] + biases[0]
        return logits.argmax(dim=1).numpy(), {}

    settings = {
        "rate": rate,
        "grid": list(linear.RATES),
        "steps": linear.STEPS,
        "batch": linear.BATCH,
        "momentum": linear.MOMENTUM,
        "held_out": len(held),
        "held_out_accuracy": accuracies,
        "features": "standardised",
    }
    return predict, settings


def _labels(part: Embedded) -> np.ndarray:
    assert part.labels is not None  # `_check` came first
    return part.labels


def _tensors(standardise: logistic.Standardiser, part: Embedded) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(standardise(part.features)).float(), torch.from_numpy(_labels(part))


Protocol = Callable[[Embedded, int], tuple[Predict, dict[str, Any]]]  # fitted to a training set with a seed

PROTOCOLS: dict[str, Protocol] = {
    "knn/v1": knn_v1,
    "logistic/v1": logistic_v1,
    "linear/v1": linear_v1,
}


def resolve(protocol: str) -> str:
    """Full name of a protocol; a bare name means the newest version.

    Raises:
        ValueError: unknown; the message lists the known ones.

    Example:
        >>> resolve("knn")
        'knn/v1'
    """
    if protocol in PROTOCOLS:
        return protocol
    versions = [name for name in PROTOCOLS if name.startswith(f"{protocol}/v")]
    if not versions:
        raise ValueError(unknown_name("protocol", protocol, PROTOCOLS))
    return max(versions, key=lambda name: int(name.rpartition("/v")[2]))


@dataclass(frozen=True, eq=False)
class Fitted:
    """A protocol fitted to a training set; measures any number of test sets.

    Attributes:
        protocol: full name.
        width: of the features.
        settings: everything that was fixed or chosen in training.
    """

    protocol: str
    width: int
    settings: dict[str, Any]
    predict: Predict = field(repr=False)

    def score(self, test: Embedded) -> Outcome:
        """Measure on a test set, which is never used to choose anything.

        Raises:
            ValueError: labels missing, an empty set, another width, or values that are not finite.
        """
        _check(self.protocol, "test", test)
        if test.features.shape[1] != self.width:
            raise ValueError(
                f"protocol {self.protocol}: features are {self.width} wide in training and {test.features.shape[1]} in test; "
                "extract both with the same model and subnet"
            )
        predicted, noted = self.predict(test)
        correct = predicted == test.labels
        return Outcome("accuracy", float(correct.mean()), correct, self.settings | noted)


def fit(train: Embedded, protocol: str, seed: int = 0) -> Fitted:
    """Fit what a protocol fits.

    Args:
        protocol: "knn", "logistic" or "linear", with or without a version such as "knn/v1".
        seed: for held-out parts, initial weights and order.
    Raises:
        ValueError: unknown protocol, labels missing, an empty set, or values that are not finite.
    """
    name = resolve(protocol)
    _check(name, "training", train)
    predict, settings = PROTOCOLS[name](train, seed)
    return Fitted(name, train.features.shape[1], settings, predict)


def evaluate_features(train: Embedded, test: Embedded, protocol: str, seed: int = 0) -> Outcome:
    """`fit` on one set, `Fitted.score` on the other."""
    _check(resolve(protocol), "test", test)  # before the fit, which may take minutes
    return fit(train, protocol, seed).score(test)


def _check(protocol: str, what: str, part: Embedded) -> None:
    if part.labels is None:
        raise ValueError(f"protocol {protocol}: the {what} set has no labels; classification needs them")
    if not len(part):
        raise ValueError(f"protocol {protocol}: the {what} set is empty")
    if part.labels.min() < 0:
        raise ValueError(f"protocol {protocol}: the {what} set has the label {part.labels.min()}; labels count from 0")
    if not np.isfinite(part.features).all():
        raise ValueError(f"protocol {protocol}: the features of the {what} set hold values that are not finite; check the model")
