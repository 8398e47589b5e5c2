"""Named and versioned ways to measure a frozen backbone: a number is comparable with another only under the same protocol.

A version never changes once it has been published; another choice of settings is another version. Most protocols take features
(`PROTOCOLS`); the linear sweeps (`SWEEPS`) take backbone and pictures, because they augment. Where a name has "best" in it, the
test set itself chooses, as in publications: the number is a little too high, and comparable with published ones only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from okavango.data.sources import Part
from okavango.downstream.classification import knn, linear, logistic, sweep
from okavango.downstream.classification.features import Embedded, held_out
from okavango.downstream.classification.probes import PROBES, Probe, class_metrics, fit_probe, precision_interval, set_metrics
from okavango.models.backbone import Backbone, unknown_name

HELD_OUT = 0.1


@dataclass(frozen=True, eq=False)
class Outcome:
    """One measurement.

    Attributes:
        metric: "accuracy", or "map_micro" of label sets, the micro-averaged average precision.
        value: 0..1.
        correct: bool (N,), in the order of the test set; of label sets, whether the whole set is right.
        settings: everything that was fixed or chosen, fit for JSON.
        interval: 95 % bootstrap interval of a value that is not the mean of `correct`, None otherwise.
    """

    metric: str
    value: float
    correct: np.ndarray
    settings: dict[str, Any]
    interval: tuple[float, float] | None = None


# of logistic/v1: within half a point of the converged fit also where the penalty is weak
SOLVER: dict[str, Any] = {"iterations": 300, "tolerance": 1e-5, "dtype": torch.float32}

# classes int (N,), or scores float (N, L) of label sets; and what else is worth noting
Predict = Callable[[Embedded], tuple[np.ndarray, dict[str, Any]]]


def knn_v1(train: Embedded, seed: int) -> tuple[Predict, dict[str, Any]]:
    """Weighted votes of the 20 nearest at temperature 0.07; the accuracy at 10, 100 and 200 is noted, never chosen from."""

    def predict(test: Embedded) -> tuple[np.ndarray, dict[str, Any]]:
        predicted = knn.knn_predict(train.features, _labels(train), test.features)
        at = {str(k): float((classes == test.labels).mean()) for k, classes in predicted.items()}
        return predicted[20], {"accuracy_at_k": at}

    return predict, {"k": 20, "temperature": knn.TEMPERATURE, "similarity": "cosine", "bank": len(train)}


def knn_best_v1(train: Embedded, seed: int) -> tuple[Predict, dict[str, Any]]:
    """What POA and DINOv2 report: as `knn_v1`, with the k of 10, 20, 100, 200 that is best on the test set; the first of equals.

    The weights are the same too: a softmax over the similarities of the 200 nearest, of which the k nearest are used.
    """

    def predict(test: Embedded) -> tuple[np.ndarray, dict[str, Any]]:
        predicted = knn.knn_predict(train.features, _labels(train), test.features)
        at = {k: float((classes == test.labels).mean()) for k, classes in predicted.items()}
        best = max(at, key=at.__getitem__)
        return predicted[best], {"k": best, "accuracy_at_k": {str(k): accuracy for k, accuracy in at.items()}}

    settings = {"k_grid": list(knn.KS), "chosen_on": "test set", "temperature": knn.TEMPERATURE, "similarity": "cosine"}
    return predict, {**settings, "bank": len(train)}


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


def _probe(probe: Probe, train: Embedded, seed: int) -> tuple[Predict, dict[str, Any]]:
    """See `probes`; nothing is chosen and nothing drawn."""
    scores, settings = fit_probe(probe, train)
    if probe.label_sets:
        return lambda test: (scores(test.features), {}), settings

    def predict(test: Embedded) -> tuple[np.ndarray, dict[str, Any]]:
        return scores(test.features).argmax(axis=1), {}

    return predict, settings


Protocol = Callable[[Embedded, int], tuple[Predict, dict[str, Any]]]  # fitted to a training set with a seed

PROTOCOLS: dict[str, Protocol] = {
    "knn/v1": knn_v1,
    "logistic/v1": logistic_v1,
    "linear/v1": linear_v1,
    "knn-best/v1": knn_best_v1,
    **{name: partial(_probe, probe) for name, probe in PROBES.items()},
}


@dataclass(frozen=True)
class Sweep:
    """A protocol of 52 linear classifiers, of which one is reported; see `sweep.train_sweep`.

    Attributes:
        blocks: which feed the wide inputs, see `sweep.chosen_blocks`.
        best_on_test: the best one is chosen on the test set after training on all of the training set. Otherwise on a held-out
            tenth of the training set, after training on the rest.
    """

    blocks: sweep.Rule
    best_on_test: bool = False


SWEEPS: dict[str, Sweep] = {
    "linear-sweep/v1": Sweep("even"),
    "linear-sweep-best/v1": Sweep("even", best_on_test=True),  # POA's
    "linear-sweep-last/v1": Sweep("last"),
    "linear-sweep-last-best/v1": Sweep("last", best_on_test=True),  # DINOv2's
}


def resolve(protocol: str) -> str:
    """Full name of a protocol; a bare name means the newest version.

    Raises:
        ValueError: unknown; the message lists the known ones.

    Example:
        >>> resolve("knn")
        'knn/v1'
    """
    known = [*PROTOCOLS, *SWEEPS]
    if protocol in known:
        return protocol
    versions = [name for name in known if name.startswith(f"{protocol}/v")]
    if not versions:
        raise ValueError(unknown_name("protocol", protocol, known))
    return max(versions, key=lambda name: int(name.rpartition("/v")[2]))


@dataclass(frozen=True, eq=False)
class Fitted:
    """A protocol fitted to a training set; measures any number of test sets.

    Attributes:
        protocol: full name.
        width: of the features.
        settings: everything that was fixed or chosen in training.
        seed: of the interval of label sets.
    """

    protocol: str
    width: int
    settings: dict[str, Any]
    predict: Predict = field(repr=False)
    seed: int = 0

    def score(self, test: Embedded) -> Outcome:
        """Measure on a test set, which is never used to choose anything, but by ``knn-best``.

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
        if predicted.ndim == 2:
            return self._score_sets(_labels(test), predicted)
        correct = predicted == test.labels
        if self.protocol in PROBES:
            noted = noted | {"metrics": class_metrics(_labels(test), predicted)}
        return Outcome("accuracy", float(correct.mean()), correct, self.settings | noted)

    def _score_sets(self, labels: np.ndarray, scores: np.ndarray) -> Outcome:
        if labels.shape != scores.shape or not labels.any():
            raise ValueError(
                f"protocol {self.protocol}: {labels.shape[1]} labels in test, {int(labels.sum())} times given, and "
                f"{scores.shape[1]} in training; they must be the same, and at least one sample must have one"
            )
        metrics = set_metrics(labels, scores)
        interval = precision_interval(labels, scores, self.seed)
        correct = ((scores > 0.5) == labels).all(axis=1)
        return Outcome("map_micro", metrics["map_micro"], correct, self.settings | {"metrics": metrics}, interval)


def fit(train: Embedded, protocol: str, seed: int = 0) -> Fitted:
    """Fit what a protocol fits.

    Args:
        protocol: one of `PROTOCOLS`, with or without the version: "knn/v1", "knn".
        seed: for held-out parts, initial weights and order.
    Raises:
        ValueError: unknown protocol, one of `SWEEPS`, labels missing, an empty set, or values that are not finite.
    """
    name = resolve(protocol)
    if name in SWEEPS:
        raise ValueError(f"protocol {name}: takes a backbone and pictures, not features; use fit_sweep")
    _check(name, "training", train)
    predict, settings = PROTOCOLS[name](train, seed)
    return Fitted(name, train.features.shape[1], settings, predict, seed)


def evaluate_features(train: Embedded, test: Embedded, protocol: str, seed: int = 0) -> Outcome:
    """`fit` on one set, `Fitted.score` on the other."""
    _check(resolve(protocol), "test", test)  # before the fit, which may take minutes
    return fit(train, protocol, seed).score(test)


@dataclass(frozen=True, eq=False)
class FittedSweep:
    """A sweep trained on a training set; measures any number of test sets.

    Attributes:
        protocol: full name.
        chosen: number of the reported classifier, None where each test set chooses its own.
        settings: everything that was fixed or chosen in training.
        trained: the classifiers. batch, workers: of the passes over test sets.
    """

    protocol: str
    chosen: int | None
    settings: dict[str, Any]
    trained: sweep.Trained = field(repr=False)
    batch: int
    workers: int

    def score(self, test: Any) -> Outcome:
        """Measure on a test set, a labelled `okavango.data.sources.Source`.

        Raises:
            ValueError: labels missing, or no sample could be read.
        """
        _check_labels(self.protocol, "test", test.labels)
        said = self.trained.classes(test, batch=self.batch, workers=self.workers)
        accuracies = self.trained.accuracies(said)
        chosen = int(accuracies.argmax()) if self.chosen is None else self.chosen
        noted = {"test_accuracy": accuracies.tolist()} if self.chosen is None else {}
        correct = said.features[:, chosen] == said.labels
        return Outcome("accuracy", float(correct.mean()), correct, self.settings | noted | {"chosen": self.trained.choice(chosen)})


def fit_sweep(
    backbone: Backbone,
    train: Any,
    protocol: str,
    seed: int = 0,
    *,
    batch: int = 256,
    workers: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> FittedSweep:
    """Train the classifiers of a sweep on a labelled source.

    Args:
        protocol: one of `SWEEPS`, with or without the version. seed: of the held-out part, order, crops and initial weights.
        batch: pictures per forward pass where nothing is trained; workers: processes that load; say: receives lines of progress.
    Raises:
        ValueError: not a sweep, labels missing, or a backbone that has neither blocks nor stages.
    """
    name = resolve(protocol)
    if name not in SWEEPS:
        raise ValueError(f"protocol {name}: takes features, not a backbone and pictures; use fit")
    _check_labels(name, "training", train.labels)
    plan = SWEEPS[name]
    options: dict[str, Any] = {"rule": plan.blocks, "seed": seed, "workers": workers, "say": say}
    if plan.best_on_test:
        trained = sweep.train_sweep(backbone, train, train.classes, **options)
        return FittedSweep(name, None, {**trained.settings, "chosen_on": "test set"}, trained, batch, workers)
    held = held_out(np.asarray(train.labels), HELD_OUT, seed)
    trained = sweep.train_sweep(backbone, Part(train, np.flatnonzero(~held)), train.classes, **options)
    rest = Part(train, np.flatnonzero(held))
    accuracies = trained.accuracies(trained.classes(rest, batch=batch, workers=workers))
    chosen = {"chosen_on": "held-out tenth of the training set", "held_out": len(rest), "held_out_accuracy": accuracies.tolist()}
    return FittedSweep(name, int(accuracies.argmax()), {**trained.settings, **chosen}, trained, batch, workers)


def _check_labels(protocol: str, what: str, labels: Any) -> None:
    if labels is None:
        raise ValueError(f"protocol {protocol}: the {what} set has no labels; classification needs them")
    if not len(labels):
        raise ValueError(f"protocol {protocol}: the {what} set is empty")
    sets = protocol in PROBES and PROBES[protocol].label_sets
    if np.ndim(labels) != 1 + sets:
        kinds = "a class per sample", "a set of labels per sample"
        other = ", ".join(name for name, probe in PROBES.items() if probe.label_sets != sets)
        raise ValueError(f"protocol {protocol}: takes {kinds[sets]}, and the {what} set has {kinds[not sets]}; use one of {other}")
    if np.min(labels) < 0 or (sets and np.max(labels) > 1):
        worst = np.min(labels) if np.min(labels) < 0 else np.max(labels)
        counted = "label sets are 0 and 1" if sets else "labels count from 0"
        raise ValueError(f"protocol {protocol}: the {what} set has the label {worst}; {counted}")


def _check(protocol: str, what: str, part: Embedded) -> None:
    _check_labels(protocol, what, part.labels)
    if not np.isfinite(part.features).all():
        raise ValueError(f"protocol {protocol}: the features of the {what} set hold values that are not finite; check the model")
