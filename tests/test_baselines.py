"""Baselines without training, and the probes that measure them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score
from sklearn.neighbors import KNeighborsClassifier

from okavango.data.sources import Arrays, BadSample
from okavango.downstream.classification.baselines import (
    BASELINES,
    ImageStatistics,
    RandomConvolutions,
    baseline,
    draw_places,
    gaussian_filters,
    mosaiks,
    untrained,
    whitened,
)
from okavango.downstream.classification.features import Embedded, extract_features
from okavango.downstream.classification.probes import PROBES, class_metrics, precision_interval, set_metrics
from okavango.downstream.classification.protocols import evaluate_features, fit
from okavango.models.preprocess import Image, Normalise, Preprocess, Resize

torch.set_num_threads(1)
PLAIN = Preprocess(image=Image(size=(12, 10), scale=1 / 255, normalise=Normalise(), resize=Resize(rule="none")))


def drawn(count=8, height=12, width=10) -> tuple[torch.Tensor, np.ndarray]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, height, width, 3), generator=generator, dtype=torch.uint8), np.arange(count) % 2


def pictures() -> Arrays:
    return Arrays(*drawn())


def test_statistics_of_the_pixels():
    images = torch.rand(2, 3, 5, 7)
    found = ImageStatistics(PLAIN)(image=images).pooled
    cells = images.flatten(2).numpy()
    expected = [cells.mean(2), cells.std(2, ddof=1), cells.max(2), cells.min(2)]
    assert np.allclose(found, np.concatenate(expected, 1), atol=1e-6)
    assert torch.isfinite(ImageStatistics(PLAIN)(image=torch.rand(1, 3, 1, 1)).pooled).all()


@pytest.mark.parametrize("second", ["opposite", "negated"])
def test_convolutions_place_by_place(second):
    filters, images = gaussian_filters(3, count=5, seed=1), torch.rand(3, 3, 9, 6)
    found = RandomConvolutions(PLAIN, filters, architecture="rcf", second=second)(image=images).pooled
    patches = F.unfold(images, 3).transpose(1, 2) @ filters.flatten(1).T  # (B, places, K)
    rest = -patches - 1 if second == "opposite" else -(patches - 1)
    expected = torch.cat([(patches - 1).relu().mean(1), rest.relu().mean(1)], 1)
    assert torch.allclose(found, expected, atol=1e-5)


def test_the_result_does_not_depend_on_how_much_goes_at_once(monkeypatch):
    model, images = RandomConvolutions(PLAIN, gaussian_filters(3, count=7), architecture="rcf"), torch.rand(5, 3, 8, 8)
    whole = model(image=images).pooled
    monkeypatch.setattr("okavango.downstream.classification.baselines.RESPONSES", 80)
    assert torch.allclose(model(image=images).pooled, whole, atol=1e-6)


def test_seeds_draw_and_zero_is_one_of_them():
    assert torch.equal(gaussian_filters(3, seed=0), gaussian_filters(3, seed=0))
    assert not torch.equal(gaussian_filters(3, seed=0), gaussian_filters(3, seed=0, seed_zero_unset=True))
    assert torch.equal(gaussian_filters(3, seed=5), gaussian_filters(3, seed=5, seed_zero_unset=True))


def test_every_place_is_drawn_unless_asked_otherwise():
    places = draw_places(4, 6, 5, count=2000)
    assert places.min(0).tolist() == [0, 0, 0] and places.max(0).tolist() == [3, 3, 2]
    assert draw_places(4, 6, 5, count=2000, last=False).max(0).tolist() == [3, 2, 1]
    with pytest.raises(ValueError, match="patches of 3 pixels cannot be drawn from 4 samples of 2 x 5"):
        draw_places(4, 2, 5)


def test_whitening_makes_the_patches_white():
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(4000, 2, 2, 2, generator=generator) * torch.tensor([1.0, 0.3])[:, None, None]
    rows = patches.flatten(1).double()
    rows = rows - rows.mean(1, keepdim=True)
    rows = rows / rows.norm(dim=1, keepdim=True)
    spread = torch.linalg.eigvalsh(rows.T @ rows / len(rows))
    once = whitened(patches).flatten(1).double()  # P Z Z, so (P Z)'(P Z) / K is the mean of P'(P Z Z)
    white = torch.linalg.eigvalsh(rows.T @ once / len(rows))
    assert spread[1] < spread[-1] / 4 and white[1:].min() > 0.95 and white.max() <= 1  # one direction went with the means
    assert torch.isfinite(whitened(torch.ones(6, 1, 3, 3))).all()  # flat patches


def test_patches_come_from_what_the_contract_makes_of_the_data():
    source = pictures()
    small = PLAIN.replace("image", size=(6, 6), resize=Resize(rule="exact", interpolation="bilinear"))
    model = mosaiks(source, small, count=16)
    assert model.filters.shape == (16, 3, 3, 3) and model(image=torch.rand(2, 3, 6, 6)).pooled.shape == (2, 32)
    assert not torch.equal(model.filters, mosaiks(source, small, count=16, drawn_with=PLAIN).filters)


class Torn(Arrays):
    def __getitem__(self, index):
        if index in (0, 3):
            raise BadSample(str(index), "torn")
        return super().__getitem__(index)


def test_torn_samples_and_several_sizes():
    assert torch.isfinite(mosaiks(Torn(*drawn()), PLAIN, count=32).filters).all()

    class Mixed(Arrays):
        def __getitem__(self, index):
            sample = super().__getitem__(index)
            return {**sample, "image": sample["image"][:, : 12 - index]}

    with pytest.raises(ValueError, match="patches are drawn from one size"):
        mosaiks(Mixed(*drawn()), PLAIN, count=32)


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_is_fed_as_any_other_backbone(name):
    source = pictures()
    model = baseline(name, source, PLAIN)
    embedded = extract_features(model, source, batch=3)
    assert embedded.features.shape == (8, model.feature_info.channels) and np.isfinite(embedded.features).all()
    with pytest.raises(ValueError, match="a baseline has neither layers nor subnets"):
        model(image=torch.rand(1, 3, 12, 10), layers=[0])


def test_what_a_baseline_cannot_do():
    with pytest.raises(ValueError, match="unknown baseline 'mosaik'; did you mean 'mosaiks'"):
        baseline("mosaik", pictures(), PLAIN)
    with pytest.raises(ValueError, match=r"filters of shape \(2, 4, 3, 3\); expected \(K, 3, h, w\)"):
        RandomConvolutions(PLAIN, torch.zeros(2, 4, 3, 3), architecture="rcf")
    with pytest.raises(ValueError, match="smaller than its filters"):
        baseline("rcf", pictures(), PLAIN)(image=torch.rand(1, 3, 2, 9))


def test_untrained_networks_follow_their_seed():
    one, two, three = (untrained("elastic_vit_tiny", PLAIN, seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], three[name]) for name in one)


# -- probes ---------------------------------------------------------------------------------------------------------------------


def embedded(count=90, classes=4, seed=0, sets=False) -> Embedded:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    hot = np.eye(classes, dtype=np.int64)[labels] | (rng.random((count, classes)) < 0.2)
    features = (hot if sets else np.eye(classes)[labels]) @ np.random.default_rng(9).normal(size=(classes, 6))
    features = (features + rng.normal(size=(count, 6))).astype(np.float32)
    return Embedded(features, hot.astype(np.int64) if sets else labels, [str(row) for row in range(count)])


def test_neighbours_vote_as_in_scikit_learn():
    train, test = embedded(seed=0), embedded(seed=1)
    theirs = KNeighborsClassifier(5).fit(train.features, train.labels).predict(test.features)
    outcome = evaluate_features(train, test, "knn-5")
    assert np.array_equal(outcome.correct, theirs == test.labels) and outcome.metric == "accuracy"
    assert outcome.settings["metrics"]["accuracy"] == outcome.value


def test_the_smallest_class_of_equals_wins():
    train = Embedded(np.array([[0.0], [0.1], [0.2], [0.3], [9.0]]), np.array([2, 2, 1, 1, 0]), list("abcde"))
    test = Embedded(np.array([[0.15]]), np.array([1]), ["x"])
    assert fit(train, "knn-5").predict(test)[0].tolist() == [1]


def test_sets_of_labels():
    train, test = embedded(sets=True, seed=0), embedded(sets=True, seed=1)
    scores = KNeighborsClassifier(5).fit(train.features, train.labels).predict_proba(test.features)
    scores = np.stack([each[:, 1] for each in scores], 1)
    outcome = evaluate_features(train, test, "multilabel-knn-5")
    assert outcome.metric == "map_micro"
    assert outcome.value == pytest.approx(average_precision_score(test.labels, scores, average="micro"))
    assert np.array_equal(outcome.correct, ((scores >= 0.6) == test.labels).all(1))
    assert outcome.interval[0] < outcome.value < outcome.interval[1]
    linear = evaluate_features(train, test, "multilabel-linear-c1")
    assert linear.value > 0.6 and linear.settings["converged"]


def test_a_label_that_no_sample_has_does_not_enter_the_means():
    labels = np.array([[1, 0, 0], [1, 1, 0], [0, 1, 0]])
    scores = np.array([[0.9, 0.1, 0.0], [0.8, 0.7, 0.3], [0.6, 0.9, 0.2]])
    assert set_metrics(labels, scores)["map_macro"] == average_precision_score(labels[:, :2], scores[:, :2], average="macro")


def test_the_interval_of_the_precision_is_that_of_resampling():
    rng = np.random.default_rng(0)
    labels = (rng.random((40, 3)) < 0.4).astype(np.int64)
    scores = np.round(np.clip(0.3 * labels + rng.random((40, 3)) * 0.7, 0, 1) * 5) / 5  # many ties
    draws = np.random.default_rng(7)
    rounds = []
    for _ in range(50):
        rows = draws.integers(40, size=40)
        rounds.append(average_precision_score(labels[rows], scores[rows], average="micro"))
    assert precision_interval(labels, scores, seed=7, rounds=50) == pytest.approx(tuple(np.quantile(rounds, (0.025, 0.975))))


def test_metrics_of_classes():
    found = class_metrics(np.array([0, 0, 1, 2]), np.array([0, 1, 1, 1]))
    assert found["accuracy"] == 0.5 and found["recall_macro"] == 0.5 and found["precision_weighted"] == pytest.approx(0.5833333)


@pytest.mark.parametrize("protocol", [name for name in PROBES if not name.startswith("multilabel-")])
def test_probes_learn_and_say_how(protocol):
    outcome = evaluate_features(embedded(seed=0), embedded(seed=1), protocol)
    assert outcome.value > 0.4 and outcome.settings["features"] == ("standardised" if "standardised" in protocol else "raw")


@pytest.mark.parametrize(
    ("protocol", "change", "message"),
    [
        ("multilabel-knn-5", {}, "takes a set of labels per sample, and the test set has a class per sample"),
        ("knn-5", {"labels": np.zeros((90, 4), int)}, "takes a class per sample, and the test set has a set of labels"),
        ("logistic", {"labels": np.zeros((90, 4), int)}, "takes a class per sample"),
        ("multilabel-knn-5", {"labels": np.full((90, 4), 2)}, "has the label 2; label sets are 0 and 1"),
    ],
)
def test_labels_of_the_wrong_kind(protocol, change, message):
    train = embedded(sets=protocol.startswith("multilabel"))
    fields = {"features": train.features, "labels": embedded().labels, "ids": train.ids, **change}
    with pytest.raises(ValueError, match=message):
        evaluate_features(train, Embedded(**fields), protocol)


def test_labels_that_do_not_fit():
    train, test = embedded(sets=True), embedded(sets=True)
    with pytest.raises(ValueError, match="3 labels in test"):
        evaluate_features(train, Embedded(test.features, test.labels[:, :3], test.ids), "multilabel-knn-5")
    with pytest.raises(ValueError, match="it needs two classes"):
        fit(Embedded(test.features, np.zeros(90, int), test.ids), "linear-c1")
    with pytest.raises(ValueError, match="sets of labels; a part held out by class"):
        train.split(0.1, 0)
