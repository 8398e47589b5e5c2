from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from okavango.downstream.classification import linear, protocols
from okavango.downstream.classification.features import Embedded
from okavango.downstream.classification.linear import best_head, train_heads
from okavango.downstream.classification.logistic import Standardiser, fit_logistic
from okavango.downstream.classification.protocols import evaluate_features

torch.set_num_threads(1)
X, Y = load_digits(return_X_y=True)


def embedded(rows, features=X) -> Embedded:
    return Embedded(features[rows].astype(np.float32), Y[rows].astype(np.int64), [str(row) for row in rows])


def test_standardising_is_scikit_learns_and_leaves_constants_at_zero():
    features = np.concatenate([X * 1e3, np.full((len(X), 1), 0.1)], axis=1).astype(np.float32)
    ours = Standardiser.fit(features)(features)
    np.testing.assert_allclose(ours[:, :-1], StandardScaler().fit_transform(features.astype(np.float64))[:, :-1], atol=1e-9)
    assert np.abs(ours[:, -1]).max() < 1e-6


@pytest.mark.parametrize("C", [0.01, 1.0])
def test_logistic_regression_is_scikit_learns(C):
    train, test = X[:500], X[500:800]
    ours = fit_logistic(train, Y[:500], 10, C=C, tolerance=1e-8)
    scaler = StandardScaler().fit(train)
    theirs = LogisticRegression(C=C, tol=1e-9, max_iter=5000).fit(scaler.transform(train), Y[:500])
    assert ours.converged
    np.testing.assert_allclose(ours.probabilities(test), theirs.predict_proba(scaler.transform(test)), atol=2e-4)
    np.testing.assert_allclose(ours.weight, theirs.coef_, atol=2e-3)
    assert np.array_equal(ours.predict(test), theirs.predict(scaler.transform(test)))
    np.testing.assert_allclose(ours.probabilities(test).sum(1), 1)


def test_single_precision_and_a_warm_start_find_the_same():
    exact = fit_logistic(X[:300], Y[:300], 10, C=0.1)
    single = fit_logistic(X[:300], Y[:300], 10, C=0.1, dtype=torch.float32, tolerance=1e-5)
    warm = fit_logistic(X[:300], Y[:300], 10, C=0.1, start=fit_logistic(X[:300], Y[:300], 10, C=1e-3))
    np.testing.assert_allclose(single.probabilities(X), exact.probabilities(X), atol=5e-3)
    np.testing.assert_allclose(warm.probabilities(X), exact.probabilities(X), atol=1e-4)
    assert not fit_logistic(X[:300], Y[:300], 10, C=10.0, iterations=3).converged


def test_bad_arguments():
    with pytest.raises(ValueError, match="C=0"):
        fit_logistic(X[:9], Y[:9], 10, C=0)
    with pytest.raises(ValueError, match=r"0\.\.3"):
        fit_logistic(X[:9], Y[:9], 4)


def test_each_head_is_what_sgd_alone_would_train():
    features, labels = torch.from_numpy(Standardiser.fit(X)(X)[:160]).float(), torch.from_numpy(Y[:160])
    rates, steps, batch = (0.01, 0.1), 25, 64
    weights, biases = train_heads(features, labels, 10, rates=rates, steps=steps, batch=batch, seed=3)
    for head, rate in enumerate(rates):
        generator = torch.Generator().manual_seed(3)
        layer = torch.nn.Linear(64, 10)
        layer.weight.data = torch.empty(64, 1, 10).normal_(0, 0.01, generator=generator)[:, 0].T.contiguous()
        torch.nn.init.zeros_(layer.bias)
        sgd = torch.optim.SGD(layer.parameters(), lr=rate * batch / 256, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, steps)
        order: list[int] = []
        for _ in range(steps):
            if len(order) < batch:
                order = torch.randperm(160, generator=generator).tolist()
            chosen, order = order[:batch], order[batch:]
            sgd.zero_grad()
            torch.nn.functional.cross_entropy(layer(features[chosen]), labels[chosen]).backward()
            sgd.step()
            schedule.step()
        torch.testing.assert_close(weights[head].T, layer.weight.data, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(biases[head], layer.bias.data, atol=1e-5, rtol=1e-4)


def test_the_best_head_is_finite_and_the_lowest_of_equal_rates():
    features, labels = torch.eye(3), torch.arange(3)
    good = torch.eye(3)
    weights = torch.stack([torch.zeros(3, 3), good, 2 * good, torch.full((3, 3), torch.nan)])
    best, accuracies = best_head(weights, torch.zeros(4, 3), features, labels)
    assert best == 1 and accuracies == pytest.approx([1 / 3, 1, 1, 0])


def test_the_held_out_part_has_every_class_and_nothing_twice():
    whole = embedded(np.arange(400))
    kept, held = whole.split(0.1, seed=0)
    assert set(kept.ids) | set(held.ids) == set(whole.ids) and not set(kept.ids) & set(held.ids)
    assert set(held.labels) == set(range(10)) == set(kept.labels) and 35 <= len(held) <= 45
    assert held.ids == whole.split(0.1, seed=0)[1].ids != whole.split(0.1, seed=1)[1].ids
    rows = np.flatnonzero(Y == 3)[:1].tolist() + np.flatnonzero(Y == 4)[:2].tolist()
    assert embedded(np.array(rows)).split(0.5, 0)[1].labels.tolist() == [4]
    with pytest.raises(ValueError, match="single sample"):
        embedded(np.array(rows[:2])).split(0.1, 0)
    with pytest.raises(ValueError, match="no labels"):
        Embedded(X, None, []).split(0.1, 0)


@pytest.mark.parametrize("protocol", ["logistic", "linear"])
def test_protocols_learn_repeat_and_never_look_at_the_test_labels(protocol, monkeypatch):
    monkeypatch.setattr(linear, "STEPS", 150)
    monkeypatch.setattr(protocols.logistic, "GRID", (1e-3, 1e-1))
    train, test = embedded(np.arange(600)), embedded(np.arange(600, 900))
    first = evaluate_features(train, test, protocol, seed=1)
    assert first.value == first.correct.mean() > 0.85
    json.dumps(first.settings)
    again = evaluate_features(train, test, protocol, seed=1)
    assert np.array_equal(first.correct, again.correct) and first.settings == again.settings
    shifted = Embedded(test.features, (test.labels + 1) % 10, test.ids)
    blind = evaluate_features(train, shifted, protocol, seed=1)
    assert blind.settings == first.settings and not (blind.correct & first.correct).any()
    assert sum(first.settings["held_out_accuracy"]) > 0 and first.settings["held_out"] == len(train.split(0.1, 1)[1])


def test_classes_that_only_the_test_set_has_count_as_wrong():
    train, test = embedded(np.flatnonzero(Y < 3)[:90]), embedded(np.flatnonzero(Y == 7)[:5])
    for protocol in ("knn", "logistic"):
        assert evaluate_features(train, test, protocol).value == 0
