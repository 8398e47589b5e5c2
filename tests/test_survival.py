"""Survival in discrete time, and classification of studies."""

from __future__ import annotations

import csv
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sksurv.nonparametric import kaplan_meier_estimator

from okavango import volume_verbs
from okavango.data.studies import Studies, write_scan
from okavango.downstream.classification.studies import StudyClassifier
from okavango.downstream.classification.survival import (
    SurvivalHead,
    discretise,
    evaluate_survival,
    hazard_nll,
    kaplan_meier,
    quantile_cuts,
    risk,
    survival,
    times,
)
from okavango.models.backbone import create_model
from okavango.recipes import named
from okavango.testing import check_objective
from okavango.zoo.checkpoint import load_checkpoint, save_checkpoint

TINY = {"modalities": ("t1", "flair"), "size": 16, "patch_size": 8, "width": 24, "depth": 2, "heads": 2, "mlp": 32}


def backbone():
    torch.manual_seed(0)
    return create_model("bm_mae_tiny", **TINY, spacing=None, orientation=None)


def cohort(seed, count=40):
    rng = np.random.default_rng(seed)
    return np.round(rng.exponential(2.0, count), 2), rng.random(count) < 0.6


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.integers(3, 60))
def test_kaplan_meier(seed, count):
    time, event = cohort(seed, count)
    event[0] = True
    times_, share = kaplan_meier(time, event)
    theirs = kaplan_meier_estimator(event, time)
    assert np.allclose(times_, theirs[0]) and np.allclose(share, theirs[1])


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 12))
def test_cuts_and_indices(seed, bins):
    time, event = cohort(seed)
    cuts = quantile_cuts(time, event, bins)
    assert cuts[0] == 0 and len(cuts) <= bins and (np.diff(cuts) > 0).all()
    index, kept = discretise(time, event, cuts)
    for t, e, i, k in zip(time, event, index, kept, strict=True):
        if k:
            assert t <= cuts[i] and (i == 0 or cuts[i - 1] < t)
        else:
            assert cuts[i] <= t and (i == len(cuts) - 1 or t < cuts[i + 1])
            assert not e or t > cuts[-1]


def test_the_published_first_cut():
    """Two patients leave the study before anything happens: the published rule loses the cut after them."""
    time, event = np.array([0.5, 1.0, 2.0, 3.0, 4.0, 5.0]), np.array([False, False, True, True, True, True])
    assert quantile_cuts(time, event, 5, official=True).tolist() == [0.0, 2.0, 3.0, 4.0, 5.0]
    ours = quantile_cuts(time, event, 5)
    assert ours[0] == 0 and ours[1] == 1.0 and ours[-1] == 5.0 and len(ours) <= 5


@pytest.mark.parametrize("time, event", [([1.0, 2.0], [False, False]), ([1.0, -2.0], [True, True]), ([1.0, np.nan], [True, True])])
def test_times_that_cannot_be_cut(time, event):
    with pytest.raises(ValueError, match="expected at least 2 bins and 1 event"):
        quantile_cuts(np.array(time), np.array(event))


def test_likelihood_by_hand():
    logits = torch.tensor([[0.3, -1.0, 2.0], [1.0, 0.5, -0.2]], dtype=torch.float64)
    h = logits.sigmoid()
    seen, censored = h[0, 1] * (1 - h[0, 0]), (1 - h[1, 0]) * (1 - h[1, 1])
    expected = -(seen.log() + censored.log()) / 2
    assert float(hazard_nll(logits, torch.tensor([1, 1]), torch.tensor([1, 0]))) == pytest.approx(float(expected))
    assert torch.allclose(survival(logits), (1 - h).cumprod(1))
    assert torch.allclose(risk(logits), -(1 - h).cumprod(1).log().sum(1))
    assert torch.allclose(risk(logits, "logits"), logits.sum(1))


def test_metrics():
    time, event = cohort(3)
    cuts = quantile_cuts(time, event)
    perfect = evaluate_survival((time, event), (time, event), np.exp(-np.outer(1 / (time + 0.1), cuts)), cuts, -time)
    wrong = evaluate_survival((time, event), (time, event), np.exp(-np.outer(time, cuts)), cuts, time)
    pairs = [
        (i, j) for i in range(40) for j in range(40) if event[i] and (time[i] < time[j] or (time[i] == time[j] and not event[j]))
    ]
    rng = np.random.default_rng(0)
    some = rng.normal(size=40)
    harrell = np.mean([1.0 if some[i] > some[j] else 0.5 if some[i] == some[j] else 0.0 for i, j in pairs])
    curves = np.tile(np.linspace(1, 0.2, len(cuts)), (40, 1))
    assert evaluate_survival((time, event), (time, event), curves, cuts, some)["c_index"] == pytest.approx(harrell)
    assert perfect["c_index"] > 0.99 > 0.01 > wrong["c_index"] and perfect["brier"] < wrong["brier"]
    with pytest.raises(ValueError, match="nothing can be ordered"):
        evaluate_survival((time, event), (time[:1], event[:1]), curves[:1], cuts, some[:1])


@pytest.fixture
def table(tmp_path):
    """Eight studies; the bright ones live shorter and have the second class."""
    rows = []
    for index in range(8):
        rng, names = np.random.default_rng(index), {}
        for name in TINY["modalities"]:
            volume = rng.uniform(1, 2, (16, 16, 16)).astype(np.float32)
            volume[4:12, 4:12, 4:12] += 5 * (index % 2)
            names[name] = f"s{index}_{name}.nii.gz"
            write_scan(tmp_path / names[name], volume, np.eye(4))
        if index == 3:
            names["flair"] = ""
        split = "test" if index > 4 else "train"
        rows.append(
            {"id": f"s{index}", **names, "label": "ab"[index % 2], "time": 8 - index, "event": int(index != 2), "split": split}
        )
    path = tmp_path / "studies.csv"
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_heads_on_studies(table, tmp_path):
    train = Studies(table, split="train")
    classifier, head = StudyClassifier(backbone(), train.classes, hidden=8), SurvivalHead(backbone(), bins=4, hidden=0, drop=0.5)
    assert isinstance(classifier.head[2], torch.nn.Linear) and classifier.head[2].out_features == 1
    prepared = head.samples(train)
    assert head.cuts == tuple(quantile_cuts(*times(train), 4)) and times(train)[0].tolist() == [8, 7, 6, 5, 4]
    samples = [prepared[i] for i in range(4)]
    assert "forward" in check_objective(classifier, samples) and "forward" in check_objective(head, samples)
    for model in (classifier, head):
        save_checkpoint(model, tmp_path / "m", kind="head", head=model.head_config(), backbone_prefix=model.backbone_prefix)
        again, _ = load_checkpoint(tmp_path / "m", heads={model.entry: lambda b, a, model=model: type(model)(b, **a)})
        inputs = {"flair": torch.randn(3, 1, 16, 16, 16)}
        assert torch.equal(again.predict(inputs), model.eval().predict(inputs))
    shares = head.predict({"t1": torch.randn(2, 1, 16, 16, 16)})
    assert shares.shape == (2, len(head.cuts)) and bool((shares.diff(dim=1) < 0).all())
    three = StudyClassifier(backbone(), ("a", "b", "c"), hidden=0)
    assert three.predict(inputs).shape == (3, 3) and torch.allclose(three.predict(inputs).sum(1), torch.ones(3))


def test_measured_by_their_protocols(table):
    train, test = Studies(table, split="train"), Studies(table, split="test")
    lines: list[str] = []
    classifier = StudyClassifier(backbone(), train.classes)
    options = {"data": test, "modalities": ("t1,t2f", "t1"), "say": lines.append}
    records = volume_verbs.evaluate(classifier.eval(), protocol="studies/classification", **options)
    assert [r.metric for r in records] == ["accuracy", "ROC-AUC", "average precision"] * 2 and {r.n for r in records} == {3}
    head = SurvivalHead(backbone(), bins=4)
    head.samples(train)
    found = volume_verbs.evaluate(head.eval(), protocol="studies/survival", train=train, **options)
    assert {r.metric for r in found} >= {"C-index"} and found[0].settings["censored_by"] == "training part"
    rows = dict(volume_verbs.predict(classifier, test, say=lines.append))
    assert set(rows) == {"s5", "s6", "s7"} and [name for name, _ in rows["s5"]] == ["a", "b"]
    assert lines[-1].startswith("s7\ta ")
    with pytest.raises(ValueError, match="holds a StudyClassifier; expected a Segmenter"):
        volume_verbs.evaluate(classifier, protocol="segmentation/brats", **options)


@pytest.mark.parametrize("recipe", ["classify_bm_mae", "survive_bm_mae"])
def test_recipes_build_their_heads(recipe):
    recipe = named(recipe, "finetune")
    replace(recipe, model="bm_mae_tiny").check()
    model = recipe.objective.build(backbone(), ("a", "b"), recipe.run)
    assert model.head[0].out_features == 256 and {group["wd_mult"] for group in model.param_groups()} == {1.0}


def test_mistakes():
    with pytest.raises(ValueError, match="1 classes, 1 different names"):
        StudyClassifier(backbone(), ("a",))
    with pytest.raises(ValueError, match="5 cuts for 4 bins"):
        SurvivalHead(backbone(), bins=4, cuts=range(5))
    with pytest.raises(ValueError, match="a table with a column label"):
        named("classify_bm_mae", "finetune").objective.build(backbone(), (), None)
    with pytest.raises(ValueError, match="studies need modalities that are volumes"):
        StudyClassifier(create_model("elastic_vit_tiny"), ("a", "b"))
