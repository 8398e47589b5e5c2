"""Numbers of retrieval against plain loops and cases made by hand; rules of what is right; dataset cards."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, precision_recall_curve

from okavango.downstream.retrieval import metrics
from okavango.downstream.retrieval.protocols import CARDS, PROTOCOLS, Card, Frames, Pairs, Radius, find_card, names_digest, resolve


def name(east: float, north: float, heading: float = 0.0) -> str:
    return f"some@where/@{east:010.2f}@{north:010.2f}@17@T@@@x@@{heading}@@@@@@.jpg"


@st.composite
def rankings(draw):
    """Rankings of a few rows for a few queries, and the rows that are right."""
    queries, rows = draw(st.integers(1, 6)), draw(st.integers(1, 8))
    random = np.random.default_rng(draw(st.integers(0, 10**6)))
    kept = draw(st.integers(1, rows))
    predictions = np.array([random.permutation(rows)[:kept] for _ in range(queries)])
    positives = [np.flatnonzero(random.random(rows) < draw(st.sampled_from([0.0, 0.2, 0.6]))) for _ in range(queries)]
    return predictions, positives


@settings(max_examples=60, deadline=None)
@given(rankings())
def test_recall_and_average_precision_are_those_of_a_plain_loop(case):
    predictions, positives = case
    right = metrics.right(predictions, positives)
    for count in (1, 2, 5):
        found = [
            any(row in own for row in ranks[:count]) for ranks, own in zip(predictions.tolist(), map(set, positives), strict=True)
        ]
        assert metrics.hits(right, count).tolist() == found
    for ranks, own, value in zip(predictions.tolist(), positives, metrics.average_precisions(right, positives), strict=True):
        total, seen = 0.0, 0
        for rank, row in enumerate(ranks, start=1):
            if row in own:
                seen += 1
                total += seen / rank
        assert np.isnan(value) if not len(own) else value == pytest.approx(total / min(len(own), len(ranks)))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 30))
def test_precision_and_recall_are_those_of_sklearn(seed, size):
    random = np.random.default_rng(seed)
    scores, first = random.integers(0, 6, size).astype(float), random.random(size) < 0.5  # with ties
    first[0] = True
    curve = metrics.precision_recall(scores, first, first)  # then every answerable query is a positive of sklearn's
    assert curve.area == pytest.approx(average_precision_score(first, scores))
    precision, recall, thresholds = precision_recall_curve(first, scores, drop_intermediate=False)
    assert curve.precision == pytest.approx(precision[:-1][::-1]) and curve.recall == pytest.approx(recall[:-1][::-1])
    assert curve.thresholds.tolist() == thresholds[::-1].tolist()


def test_unanswerable_queries_count_against_precision_but_not_against_recall():
    first, answerable = np.array([True, False, True, False]), np.array([True, False, True, True])
    curve = metrics.precision_recall(np.array([4.0, 3.0, 2.0, 1.0]), first, answerable)
    assert curve.recall.tolist() == pytest.approx([1 / 3, 1 / 3, 2 / 3, 2 / 3])
    assert curve.precision.tolist() == pytest.approx([1, 1 / 2, 2 / 3, 1 / 2])
    assert curve.recall_at(1.0) == pytest.approx(1 / 3) and curve.recall_at(0.6) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="no query has a positive"):
        metrics.precision_recall(np.ones(2), np.zeros(2, bool), np.zeros(2, bool))
    with pytest.raises(ValueError, match="expected \\(queries,\\) each"):
        metrics.precision_recall(np.ones(2), np.zeros(3, bool), np.zeros(2, bool))


def test_a_case_by_hand():
    predictions = np.array([[2, 0, 1], [0, 1, 2], [1, -1, -1]])
    positives = [np.array([0, 1]), np.array([], int), np.array([2])]
    right = metrics.right(predictions, positives)
    assert right.tolist() == [[False, True, True], [False] * 3, [False] * 3]
    assert metrics.average_precisions(right, positives)[0] == pytest.approx((1 / 2 + 2 / 3) / 2)
    there, here = np.array([[0.0, 0.0], [3.0, 4.0], [100.0, 0.0]]), np.zeros((3, 2))
    assert metrics.distance_errors(predictions, here, there).tolist() == [100.0, 0.0, 5.0]
    assert metrics.distance_errors(np.array([[-1]]), here[:1], there).tolist() == [np.inf]
    with pytest.raises(ValueError, match="positives of 2 queries"):
        metrics.right(predictions, positives[:2])


# -- rules ---------------------------------------------------------------------------------------------------------------


def test_radius_includes_its_limit_and_headings_go_round():
    queries = [name(0, 0, 350.0), name(1000, 0, 0.0)]
    database = [name(25, 0, 29.9), name(25.01, 0, 0.0), name(0, 0, 100.0), name(1000, 20, 180.0)]
    assert [own.tolist() for own in Radius(25.0)(queries, database)] == [[0, 2], [3]]
    assert [own.tolist() for own in Radius(25.0, 40.0)(queries, database)] == [[0], []]
    with pytest.raises(ValueError, match="picture 'a.jpg' tells no position"):
        Radius()(["a.jpg"], database)
    with pytest.raises(ValueError, match="tells no heading"):
        Radius(25.0, 40.0)(["@1@2@.jpg"], database)


def test_frames_go_by_the_order_of_names():
    database = ["f3", "f0", "f1", "f2"]  # rows are not in the order of frames
    assert [own.tolist() for own in Frames(1)(["q0", "q1", "q2", "q3"], database)] == [[1, 2], [1, 2, 3], [0, 2, 3], [0, 3]]
    every = [f"f{i:02d}" for i in range(29)]
    assert [own.tolist() for own in Frames(1)(["q0", "q1", "q2"], every)] == [[0, 1], [9, 10, 11], [19, 20, 21]]
    with pytest.raises(ValueError, match="as many, or every k-th frame"):
        Frames(1)(["q0", "q1", "q2"], database)


def test_pairs_are_read_from_a_file(tmp_path):
    file = tmp_path / "pairs.json"
    file.write_text(json.dumps({"q1": ["b", "a"]}))
    assert [own.tolist() for own in Pairs(str(file))(["q0", "q1"], ["a", "b"])] == [[], [0, 1]]
    with pytest.raises(ValueError, match="names 'b', and there is no such picture"):
        Pairs(str(file))(["q0", "q1"], ["a"])
    for text in ("[1]", "{", '{"q": 3}'):
        file.write_text(text)
        with pytest.raises(ValueError, match="expected a JSON file"):
            Pairs(str(file))(["q"], ["a"])
    assert resolve("retrieval/pairs", file) == ("retrieval/pairs", Pairs(str(file)))
    with pytest.raises(ValueError, match="--pairs"):
        resolve("retrieval/pairs")
    with pytest.raises(ValueError, match="did you mean 'retrieval/utm25'"):
        resolve("retrieval/utm52")
    assert resolve("retrieval") == ("retrieval/utm25", Radius(25.0))


def test_cards_of_one_dataset_never_share_a_column():
    nordland = [card for card in CARDS.values() if card.name.startswith("nordland")]
    msls = [card for card in CARDS.values() if card.name.startswith("msls-val")]
    assert len(nordland) == 3 and len({(card.name, card.protocol) for card in nordland}) == 3
    assert len(msls) == 2 and msls[0].queries != msls[1].queries
    assert all(card.protocol in PROTOCOLS or card.protocol == "retrieval/pairs" for card in CARDS.values())
    with pytest.raises(ValueError, match="did you mean 'pitts30k-test'"):
        find_card("pitts30k")


def test_a_card_refuses_other_pictures():
    card = Card(name="two", protocol="retrieval/utm25", database=2, queries=1, names_sha256=names_digest(["a", "b"], ["c"]))
    card.check(["x/b", "a"], ["c"])
    with pytest.raises(ValueError, match="the queries has 2 pictures, the card says 1"):
        card.check(["a", "b"], ["c", "d"])
    with pytest.raises(ValueError, match="their names are not"):
        card.check(["a", "b"], ["d"])
