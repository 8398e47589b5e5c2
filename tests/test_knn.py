from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

from okavango.data.sources import BadSample
from okavango.downstream.classification.features import Embedded, extract_features, raw_pixels
from okavango.downstream.classification.knn import knn_predict, nearest, normalised, vote
from okavango.downstream.classification.protocols import PROTOCOLS, evaluate_features, fit, resolve
from okavango.models.backbone import Backbone, FeatureInfo
from okavango.models.features import Features, Subnet
from okavango.models.preprocess import Image, Normalise, Preprocess, Resize

torch.set_num_threads(1)
X, Y = load_digits(return_X_y=True)


class Pictures:
    """The digits of scikit-learn as a source; the indices in `broken` cannot be read."""

    name, digest, classes = "digits", "0" * 64, tuple("0123456789")

    def __init__(self, rows, broken=(), labelled=True):
        self.images = torch.from_numpy((X[rows] * 15).astype(np.uint8)).view(-1, 1, 8, 8)
        self.labels = Y[rows].astype(np.int64) if labelled else None
        self.broken = broken

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        if index in self.broken:
            raise BadSample(f"digit-{index}", "torn")
        sample = {"image": self.images[index], "id": f"digit-{index}"}
        return sample if self.labels is None else {**sample, "label": int(self.labels[index])}


class Flat(Backbone):
    """Pixels through one elastic linear layer, batch norm and dropout, so that a wrong mode shows."""

    def __init__(self, width=24):
        super().__init__()
        normalise = Normalise(rule="standard", mean=(0.5,), std=(0.5,))
        self.preprocess = Preprocess(image=Image(channels=("grey",), size=(8, 8), resize=Resize(rule="exact"), normalise=normalise))
        self.feature_info = FeatureInfo(channels=width, layers=0, layer_channels=(), strides=())
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(width, 64, generator=generator) / 8)
        self.norm, self.drop = torch.nn.BatchNorm1d(width, affine=False), torch.nn.Dropout(0.5)

    def forward(self, inputs, *, present=None, token_mask=None, subnet=None, layers=()):
        width = subnet.width if subnet else len(self.weight)
        return Features(pooled=self.drop(self.norm(inputs["image"].flatten(1) @ self.weight.T))[:, :width])


def brute_force(bank, queries, k):
    """Cosine similarities in float64, sorted one by one; ties by index."""
    bank, queries = normalised(bank).astype(np.float64), normalised(queries).astype(np.float64)
    found = []
    for query in queries:
        scores = [float((row * query).sum()) for row in bank]
        found.append(sorted(range(len(bank)), key=lambda i: (-scores[i], i))[:k])
    return np.array(found)


@pytest.mark.parametrize("backend", ["faiss", "torch"])
def test_neighbours_are_exact_and_ties_go_by_index(backend):
    rng = np.random.default_rng(0)
    bank = rng.normal(size=(300, 16)).astype(np.float32)
    bank[rng.permutation(300)[:200]] = bank[7]  # many equal rows: more than any margin of candidates
    bank[[3, 250]] = 2 * bank[[4, 249]]  # the same direction, another length
    queries = np.concatenate([bank[[7, 4]], rng.normal(size=(5, 16)).astype(np.float32)])
    for k in (1, 5, 40, 250, 300):
        similarities, indices = nearest(bank, queries, k, backend)
        assert np.array_equal(indices, brute_force(bank, queries, k))
        assert (np.diff(similarities, axis=1) <= 0).all()
    assert nearest(bank, queries, 1, backend)[0][0, 0] == pytest.approx(1, abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(1, 6), st.integers(1, 4), st.integers(0, 2**31), st.data())
def test_both_backends_agree_to_the_bit(count, queries, width, seed, data):
    rng = np.random.default_rng(seed)
    bank = rng.integers(-1, 2, size=(count, width)).astype(np.float32)  # few directions, so ties everywhere, and zero rows
    asked = rng.integers(-1, 2, size=(queries, width)).astype(np.float32)
    k = data.draw(st.integers(1, count))
    one, two = nearest(bank, asked, k, "faiss"), nearest(bank, asked, k, "torch")
    assert np.array_equal(one[1], two[1]) and np.array_equal(one[0], two[0])
    assert np.array_equal(one[1], brute_force(bank, asked, k))


@pytest.mark.parametrize("backend", ["faiss", "torch"])
def test_almost_equal_features_of_an_untrained_network(backend):
    rng = np.random.default_rng(1)  # all similarities lie within 1e-7 of each other: float32 cannot rank them
    bank = (1 + 1e-4 * rng.normal(size=(400, 8))).astype(np.float32)
    queries = (1 + 1e-4 * rng.normal(size=(6, 8))).astype(np.float32)
    assert np.array_equal(nearest(bank, queries, 20, backend)[1], brute_force(bank, queries, 20))


@pytest.mark.parametrize("backend", ["faiss", "torch"])
def test_euclidean_neighbours_are_those_of_brute_force(backend):
    rng = np.random.default_rng(3)
    bank = (1000 + rng.normal(size=(300, 16))).astype(np.float32)  # far from 0, where float32 products would tell nothing
    bank[rng.permutation(300)[:200]] = bank[7]
    queries = np.concatenate([bank[[7]], (1000 + rng.normal(size=(5, 16))).astype(np.float32)])
    squared = np.square(queries[:, None].astype(np.float64) - bank).sum(2)
    for k in (1, 5, 40, 300):
        distances, indices = nearest(bank, queries, k, backend, "euclidean")
        expected = np.argsort(squared, axis=1, kind="stable")[:, :k]
        assert np.array_equal(indices, expected)
        assert np.allclose(distances**2, np.take_along_axis(squared, expected, 1))


def test_votes_follow_the_dossier():
    rng = np.random.default_rng(2)
    bank, labels, queries = rng.normal(size=(90, 12)), rng.integers(0, 4, 90), rng.normal(size=(30, 12))
    b, q = torch.from_numpy(normalised(bank)), torch.from_numpy(normalised(queries))
    similarities, indices = (q @ b.T).topk(50, largest=True, sorted=True)
    weights = (similarities / 0.07).softmax(1)
    one_hot = torch.nn.functional.one_hot(torch.from_numpy(labels)[indices], 4)
    predicted = knn_predict(bank, labels, queries, ks=(10, 20, 50))
    for k in (10, 20, 50):
        expected = (one_hot[:, :k] * weights[:, :k, None]).sum(1).argmax(1)
        assert np.array_equal(predicted[k], expected.numpy())


def test_a_hot_vote_is_a_plain_majority_as_in_scikit_learn():
    rows = np.random.default_rng(0).permutation(len(X))
    train, test = rows[:600], rows[600:900]
    ours = knn_predict(X[train], Y[train], X[test], ks=(1,), temperature=1e6)[1]
    theirs = KNeighborsClassifier(1, metric="cosine").fit(X[train], Y[train]).predict(X[test])
    assert np.array_equal(ours, theirs)


def test_a_small_temperature_trusts_the_nearest():
    labels = np.array([[1, 0, 0]])
    assert vote(np.array([[0.9, 0.5, 0.5]]), labels, (3,), temperature=0.07)[3] == [1]
    assert vote(np.array([[0.9, 0.5, 0.5]]), labels, (3,), temperature=10.0)[3] == [0]


@pytest.mark.parametrize(
    ("k", "backend", "message"), [(0, "auto", "k=0"), (4, "auto", "1..3"), (1, "annoy", "unknown backend 'annoy'")]
)
def test_bad_arguments(k, backend, message):
    with pytest.raises(ValueError, match=message):
        nearest(np.eye(3), np.eye(3), k, backend)


def test_widths_must_agree():
    with pytest.raises(ValueError, match=r"\(3, 3\).*\(2, 2\)"):
        nearest(np.eye(3), np.eye(2), 1)


def test_features_are_those_of_the_model_in_order():
    model, source = Flat(), Pictures(range(70), broken={0, 13, 69})
    model.norm.eval()  # a module with a mode of its own
    before, state = torch.get_rng_state(), {name: value.clone() for name, value in model.state_dict().items()}
    calls: list[tuple[int, int]] = []
    found = extract_features(model, source, batch=16, progress=lambda done, total: calls.append((done, total)))
    assert model.training and model.drop.training and not model.norm.training
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    good = [i for i in range(70) if i not in source.broken]
    model.eval()
    with torch.no_grad():
        expected = model(**model.preprocess(image=[source.images[i] for i in good])).pooled.numpy()
    np.testing.assert_allclose(found.features, expected, atol=1e-6)
    assert found.features.dtype == np.float32 and found.labels.dtype == np.int64
    assert np.array_equal(found.labels, Y[good]) and found.ids == [f"digit-{i}" for i in good]
    assert found.bad == [(i, f"digit-{i}: torn") for i in (0, 13, 69)]
    assert calls == [(16, 70), (32, 70), (48, 70), (64, 70), (70, 70)]


def test_workers_precision_and_subnets():
    model, source = Flat(), Pictures(range(40), broken={5}, labelled=False)
    plain = extract_features(model, source, batch=7)
    assert plain.labels is None and plain.features.shape == (39, 24)
    with_workers = extract_features(model, source, batch=7, workers=2)
    assert np.array_equal(plain.features, with_workers.features) and plain.ids == with_workers.ids and plain.bad == with_workers.bad
    half = extract_features(model, source, dtype=torch.bfloat16, device="cpu").features
    assert half.dtype == np.float32 and 0 < np.abs(half - plain.features).max() < 0.1
    narrow = extract_features(model, source, subnet=Subnet(width=8, depth=1), batch=7).features
    assert np.array_equal(narrow, plain.features[:, :8])


def test_raw_pixels():
    source = Pictures(range(30), broken={2})
    found = raw_pixels(source, 8, channels=1)
    np.testing.assert_allclose(found.features, np.delete((X[:30] * 15).astype(np.uint8), 2, 0) / 255, atol=1e-7)
    assert found.bad == [(2, "digit-2: torn")] and len(found.labels) == 29
    colour = raw_pixels(source, (4, 6))
    assert colour.features.shape == (29, 72) and np.array_equal(colour.features[:, :24], colour.features[:, 48:])
    source.images = source.images.expand(-1, 2, -1, -1)
    with pytest.raises(ValueError, match="'digit-0' has 2 channels, expected 3"):
        raw_pixels(source, 8)


def test_a_source_of_bad_samples_is_an_error():
    for measure in (lambda s: extract_features(Flat(), s), lambda s: raw_pixels(s, 8)):
        with pytest.raises(ValueError, match="none of its 3 samples could be read; the first one: digit-0: torn"):
            measure(Pictures(range(3), broken={0, 1, 2}))


def test_the_protocol():
    train = extract_features(Flat(), Pictures(range(800)))
    test = extract_features(Flat(), Pictures(range(800, 1100)))
    outcome = evaluate_features(train, test, "knn")
    assert outcome.metric == "accuracy" and outcome.value == outcome.correct.mean() > 0.8 and outcome.correct.shape == (300,)
    assert outcome.value == outcome.settings["accuracy_at_k"]["20"] and outcome.settings["k"] == 20
    expected = knn_predict(train.features, train.labels, test.features, ks=(20, 200))[20]
    assert np.array_equal(outcome.correct, expected == test.labels)
    few = evaluate_features(train.take(np.arange(12)), test, "knn/v1")  # a bank smaller than k: all of it votes
    assert 0.1 < few.value < outcome.value


def test_one_fit_measures_any_number_of_test_sets():
    train = extract_features(Flat(), Pictures(range(300)))
    tests = [extract_features(Flat(), Pictures(range(start, start + 100))) for start in (800, 900)]
    for protocol in (name for name in PROTOCOLS if not name.startswith("multilabel-")):
        fitted = fit(train, protocol, seed=1)
        for test in tests:
            once, again = fitted.score(test), evaluate_features(train, test, protocol, seed=1)
            assert np.array_equal(once.correct, again.correct) and once.settings == again.settings


def test_names_of_protocols(monkeypatch):
    assert resolve("knn") == resolve("knn/v1") == "knn/v1"
    monkeypatch.setitem(PROTOCOLS, "knn/v10", PROTOCOLS["knn/v1"])
    monkeypatch.setitem(PROTOCOLS, "knn/v9", PROTOCOLS["knn/v1"])
    assert resolve("knn") == "knn/v10"
    with pytest.raises(ValueError, match="unknown protocol 'logistics'; did you mean .*logistic/v1.* known: knn/v1, logistic/v1"):
        resolve("logistics")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": None}, "test set has no labels"),
        ({"features": np.full((2, 3), np.nan, np.float32)}, "not finite"),
        ({"features": np.zeros((2, 4), np.float32)}, "3 wide in training and 4 in test"),
        ({"labels": np.array([0, -1])}, "label -1"),
        ({"features": np.zeros((0, 3)), "labels": np.zeros(0, int), "ids": []}, "test set is empty"),
    ],
)
def test_what_cannot_be_measured(change, message):
    fields = {"features": np.ones((2, 3), np.float32), "labels": np.array([0, 1]), "ids": ["a", "b"]}
    with pytest.raises(ValueError, match=message):
        evaluate_features(Embedded(**fields), Embedded(**{**fields, **change}), "knn")
