"""The linear sweep and the protocols that publications use."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from test_knn import Flat, Pictures

from okavango import verbs
from okavango.data.loading import Batches
from okavango.downstream.classification import sweep
from okavango.downstream.classification.features import Embedded, extract_features
from okavango.downstream.classification.head import TrainTransform
from okavango.downstream.classification.protocols import evaluate_features, fit, fit_sweep, resolve
from okavango.models.backbone import create_model
from okavango.models.features import Subnet
from okavango.zoo.leaderboard.records import read_records

torch.set_num_threads(1)
SMALL = {"image_size": 8, "patch_size": 4, "min_width": 16, "max_width": 16, "width_step": 16, "head_dim": 8, "channels": 1}
VIT = {**SMALL, "min_depth": 2, "max_depth": 4, "layer_scale": 1.0}


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(sweep, "PASSES", 0)
    monkeypatch.setattr(sweep, "LEAST_STEPS", 6)
    monkeypatch.setattr(sweep, "BATCH", 40)


def network(**changes):
    torch.manual_seed(0)
    return create_model("elastic_vit", **{**VIT, **changes}).eval()


def test_evenly_spaced_blocks():
    assert sweep.chosen_blocks(12, "even") == (3, 6, 9, 11) and sweep.chosen_blocks(24, "even") == (6, 12, 18, 23)
    assert sweep.chosen_blocks(6, "even") == (2, 3, 4, 5)  # 1.5 and 4.5, halves to even
    assert [sweep.chosen_blocks(depth, "even") for depth in (1, 2, 3, 4, 5)] == [(0,), (0, 1), (1, 2), (1, 2, 3), (1, 2, 4)]
    assert sweep.chosen_blocks(24, "last") == (20, 21, 22, 23) and sweep.chosen_blocks(2, "last") == (0, 1)


@pytest.mark.parametrize("name", ["elastic_vit", "extracted", "timm/test_vit"])
def test_inputs_of_a_vit(name):
    net = network() if name != "timm/test_vit" else create_model(name, image_size=32)
    net = net.extract(Subnet(16, 4)) if name == "extracted" else net
    spec = net.preprocess.array()
    read = sweep.Reader(net, "even")
    features = net(image=torch.randn(3, len(spec.channels), *spec.size), layers=read.layers)
    one, one_mean, four, four_mean = read(features)
    torch.testing.assert_close(one, features.prefix[:, 0])  # the norm of the last block's tokens is what the network returns
    torch.testing.assert_close(one_mean, torch.cat([one, features.tokens["image"].mean(1)], 1))
    norm = net.norm if name == "elastic_vit" else net.trunk.norm
    expected = [norm(features.layers[index].prefix)[:, 0] for index in read.layers]
    torch.testing.assert_close(four, torch.cat(expected, 1))
    torch.testing.assert_close(four_mean, torch.cat([four, features.tokens["image"].mean(1)], 1))


@pytest.mark.parametrize("name", ["elastic_swin_tiny", "elastic_resnet_tiny"])
def test_inputs_of_stages(name):
    net = create_model(name).eval()
    read = sweep.Reader(net, "even")
    features = net(image=torch.randn(2, 3, *net.preprocess.array().size), layers=read.layers)
    one, one_mean, four, _ = read(features)
    torch.testing.assert_close(one, features.pooled)
    torch.testing.assert_close(one_mean, features.pooled.repeat(1, 2))
    torch.testing.assert_close(four, torch.cat([stage.flatten(2).mean(2) for stage in features.maps], 1))
    assert len(features.maps) == 4


def test_each_classifier_is_what_sgd_alone_would_train(short):
    net, source = network(), Pictures(range(100))
    trained = sweep.train_sweep(net, source, source.classes, rule="even", seed=3)
    assert trained.settings["blocks"] == [1, 2, 3] and trained.settings["steps"] == 6 and trained.settings["batch"] == 40
    generator = torch.Generator().manual_seed(3)
    layers = []
    for heads in trained.heads:
        layers.append(torch.nn.Linear(len(heads.weight), 10))
        layers[-1].weight.data = torch.empty(len(heads.weight), 1, 10).normal_(0, 0.01, generator=generator)[:, 0].T.contiguous()
        torch.nn.init.zeros_(layers[-1].bias)
    groups = [{"params": layer.parameters()} for layer in layers]
    optimiser = torch.optim.SGD(groups, lr=0.05 * 40 / 256, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 6)
    transform = TrainTransform(net.preprocess, "image", source.classes, (0.08, 1.0), 0.5)
    collate = lambda samples, seed: {k: [s[k] for s in samples] for k in ("image", "label")}  # noqa: E731
    batches = Batches(source, transform, collate, batch=40, seed=3)
    for step in range(6):
        batch = batches[step, 0]
        with torch.no_grad():
            inputs = trained.reader(net(image=torch.stack(batch["image"]), layers=(1, 2, 3)))
        losses = [
            torch.nn.functional.cross_entropy(layer(x), torch.tensor(batch["label"]))
            for layer, x in zip(layers, inputs, strict=True)
        ]
        optimiser.zero_grad()
        sum(losses).backward()
        optimiser.step()
        schedule.step()
    column = sweep.RATES.index(0.05)
    for layer, heads in zip(layers, trained.heads, strict=True):
        torch.testing.assert_close(heads.weight[:, column].T, layer.weight.detach(), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(heads.bias[column], layer.bias.detach(), atol=1e-5, rtol=1e-4)
    assert trained.choice(13 + column) == {"blocks": 1, "mean_patch_token": True, "rate": 0.05}


def test_the_test_set_chooses_only_where_the_name_says_so(short):
    net, train, test = network(), Pictures(range(300)), Pictures(range(900, 1000), broken={7})
    before = net.training, [parameter.clone() for parameter in net.parameters()]
    fitted = fit_sweep(net, train, "linear-sweep", seed=1)
    outcome = fitted.score(test)
    assert outcome.value == outcome.correct.mean() > 0.2 and outcome.correct.shape == (99,)
    json.dumps(outcome.settings)
    assert outcome.settings["chosen_on"].startswith("held-out") and len(outcome.settings["held_out_accuracy"]) == 52
    again = fit_sweep(net, train, "linear-sweep/v1", seed=1).score(test)
    assert np.array_equal(again.correct, outcome.correct) and again.settings == outcome.settings
    test.labels = (test.labels + 1) % 10
    blind = fitted.score(test)
    assert blind.settings == outcome.settings and not (blind.correct & outcome.correct).any()
    test.labels = (test.labels - 1) % 10

    best = fit_sweep(net, train, "linear-sweep-last-best", seed=1).score(test)
    assert best.settings["chosen_on"] == "test set" and best.settings["block_rule"] == "the last four"
    assert best.settings["blocks"] == [0, 1, 2, 3] and best.value == pytest.approx(max(best.settings["test_accuracy"]))
    assert net.training == before[0] and all(map(torch.equal, net.parameters(), before[1]))


def test_a_classifier_that_diverged_is_never_chosen():
    reader = sweep.Reader(network(), "even")
    heads = [sweep.Heads(4, 2, torch.tensor(sweep.RATES), torch.Generator().manual_seed(0)) for _ in sweep.INPUTS]
    heads[2].weight[1, 3] = torch.nan
    said = Embedded(np.ones((5, 52)), np.ones(5, dtype=np.int64), list("abcde"))
    accuracies = sweep.Trained(reader, heads, {}).accuracies(said)
    assert accuracies[2 * 13 + 3] == 0 and accuracies.sum() == 51


def test_the_whole_way_to_records(short, tmp_path):
    lines: list[str] = []
    train, test = Pictures(range(200)), Pictures(range(200, 300))
    asked = {"data": test, "train": train, "protocol": ["linear-sweep", "knn-best"], "subnets": ["w16_d2", "w16_d4"]}
    records = verbs.evaluate(network(), **asked, out=tmp_path / "r.jsonl", say=lines.append)
    assert [(r.subnet, r.protocol) for r in records] == [
        (subnet, protocol) for subnet in ("w16_d2", "w16_d4") for protocol in ("linear-sweep/v1", "knn-best/v1")
    ]
    assert read_records(tmp_path / "r.jsonl") == records
    assert [r.settings["blocks"] for r in records[::2]] == [[0, 1], [1, 2, 3]]
    assert all(r.interval[0] <= r.value <= r.interval[1] and r.n == 100 for r in records)
    assert any("step 6/6" in line for line in lines)


def test_knn_best_reports_the_best_k():
    images, labels = load_digits(return_X_y=True)
    noisy = (images + np.random.default_rng(0).normal(0, 8, images.shape)).astype(np.float32)
    train = Embedded(noisy[:900], labels[:900].astype(np.int64), [""] * 900)
    test = Embedded(noisy[900:1300], labels[900:1300].astype(np.int64), [""] * 400)
    best, fixed = evaluate_features(train, test, "knn-best"), evaluate_features(train, test, "knn")
    assert best.settings["accuracy_at_k"] == fixed.settings["accuracy_at_k"]
    assert best.value == max(best.settings["accuracy_at_k"].values()) == best.settings["accuracy_at_k"][str(best.settings["k"])]
    assert best.settings["chosen_on"] == "test set" and best.value >= fixed.value


def test_names_and_refusals(short):
    assert resolve("linear-sweep") == "linear-sweep/v1" and resolve("linear") == "linear/v1" and resolve("knn") == "knn/v1"
    features = extract_features(Flat(), Pictures(range(30)))
    with pytest.raises(ValueError, match="takes a backbone and pictures"):
        fit(features, "linear-sweep")
    with pytest.raises(ValueError, match="protocol knn/v1: takes features"):
        fit_sweep(network(), Pictures(range(30)), "knn")
    with pytest.raises(ValueError, match="has no blocks to read"):
        flat = Flat()
        flat.architecture = "flat"
        fit_sweep(flat, Pictures(range(30)), "linear-sweep")
    with pytest.raises(ValueError, match="training set has no labels"):
        fit_sweep(network(), Pictures(range(30), labelled=False), "linear-sweep")
    with pytest.raises(ValueError, match="linear-sweep/v1: needs a backbone"):
        verbs.evaluate("raw-pixels", data=Pictures(range(9)), train=Pictures(range(30)), protocol="linear-sweep")
