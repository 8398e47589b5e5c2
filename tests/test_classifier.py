from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import nn

from okavango.downstream.classification.head import Classifier, TrainTransform, crop_box
from okavango.models.backbone import Backbone, FeatureInfo
from okavango.models.features import Features, Subnet
from okavango.models.preprocess import Image, Normalise, Preprocess, Resize, Text

torch.set_num_threads(1)


class Tiny(Backbone):
    """Patches, two blocks, a norm: enough layers for layer decay; the subnet's depth is the number of blocks."""

    def __init__(self, width=16):
        super().__init__()
        normalise = Normalise(rule="standard", mean=(0.5,), std=(0.25,))
        resize = Resize(rule="shortest", interpolation="bilinear", crop_ratio=0.5)
        self.preprocess = Preprocess(image=Image(channels=("grey",), size=(8, 8), resize=resize, normalise=normalise))
        self.feature_info = FeatureInfo(channels=width, layers=2, layer_channels=(width,) * 2, strides=(4, 4), prefix=0)
        self.embed = nn.Conv2d(1, width, 4, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.Dropout(0.1), nn.GELU()) for _ in range(2))
        self.norm = nn.LayerNorm(width)

    def layer_ids(self):
        ids = {name: 0 for name, _ in self.named_parameters() if name.startswith("embed")}
        return ids | {name: int(name.split(".")[1]) + 1 for name, _ in self.named_parameters() if name.startswith("blocks")}

    def forward(self, inputs, *, present=None, token_mask=None, subnet=None, layers=()):
        x = self.embed(inputs["image"]).flatten(2).mT
        for block in self.blocks[: subnet.depth if subnet else 2]:
            x = x + block(x)
        return Features(pooled=self.norm(x).mean(1))


CLASSES = tuple("0123456789")


def sample(index=0, size=(20, 26), label=3):
    generator = torch.Generator().manual_seed(index)
    return {"image": torch.randint(0, 256, (1, *size), generator=generator, dtype=torch.uint8), "label": label, "id": f"s{index}"}


def test_it_learns_digits():
    torch.manual_seed(0)
    digits = load_digits()
    samples = [
        {"image": torch.from_numpy((image * 15).astype(np.uint8))[None], "label": int(label), "id": str(i)}
        for i, (image, label) in enumerate(zip(digits.images[:300], digits.target[:300], strict=True))
    ]
    model = Classifier(Tiny(32), CLASSES, crop_scale=(0.9, 1.0), flip=0.0)
    transform = model.transform(model.preprocess)
    groups = [
        {"params": [p for _, p in group["params"]], "weight_decay": 0.01 * group["wd_mult"]} for group in model.param_groups()
    ]
    optimiser, losses = torch.optim.AdamW(groups, lr=3e-3), []
    for step in range(60):
        rows = np.random.default_rng(step).permutation(300)[:64]
        batch = model.collate([transform(samples[row], seed=step * 1000 + int(row)) for row in rows], seed=step)
        out = model(batch, step)
        optimiser.zero_grad()
        out["loss"].backward()
        nn.utils.clip_grad_norm_(model.clip_groups()[0], 3.0)
        optimiser.step()
        model.after_step(step)
        losses.append(float(out["loss"].detach()))
    assert losses[0] == pytest.approx(np.log(10), abs=0.1) and np.mean(losses[-5:]) < 0.6 * losses[0]
    preprocess = model.preprocess.replace("image", resize=Resize(rule="exact"))
    predicted = model.predict(preprocess(image=[s["image"] for s in samples])).argmax(1)
    assert (predicted == torch.from_numpy(digits.target[:300])).float().mean() > 0.6
    assert 0 <= float(out["accuracy"]) <= 1 and not out["accuracy"].requires_grad


def test_the_loss_is_smoothed_cross_entropy():
    model = Classifier(Tiny(), CLASSES, smoothing=0.2).eval()
    batch = {"image": torch.randn(6, 1, 8, 8), "label": torch.arange(6)}
    target = torch.full((6, 10), 0.02) + 0.8 * torch.eye(10)[:6]
    expected = -(target * model.logits({"image": batch["image"]}).log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(model(batch, 0)["loss"], expected)


def test_predict_gives_probabilities_and_leaves_the_modes_alone():
    model = Classifier(Tiny(), CLASSES)
    x = {"image": torch.randn(4, 1, 8, 8)}
    first, second = model.predict(x), model.predict(x)
    assert torch.equal(first, second) and model.training and model.backbone.blocks[0][1].training  # dropout was off, is on again
    torch.testing.assert_close(first.sum(1), torch.ones(4))
    assert not first.requires_grad and not torch.equal(first, model.predict(x, subnet=Subnet(width=16, depth=1)))


def test_groups_follow_layer_and_kind():
    model = Classifier(Tiny(), CLASSES, layer_decay=0.5)
    groups = model.param_groups()
    names = [name for group in groups for name, _ in group["params"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())  # each once
    where = {name: (group["lr_mult"], group["wd_mult"]) for group in groups for name, _ in group["params"]}
    assert where["backbone.embed.weight"] == (0.125, 1.0) and where["backbone.embed.bias"] == (0.125, 0.0)
    assert where["backbone.blocks.0.0.weight"] == (0.25, 1.0) and where["backbone.blocks.1.0.bias"] == (0.5, 0.0)
    assert where["backbone.norm.weight"] == (1.0, 0.0) and where["head.weight"] == (1.0, 1.0)
    assert {group["lr_mult"] for group in Classifier(Tiny(), CLASSES).param_groups()} == {1.0}
    assert sum(map(len, model.clip_groups())) == len(names)


def test_frozen_trains_the_head_alone():
    model = Classifier(Tiny(), CLASSES, frozen=True, layer_decay=0.5)
    assert {name for group in model.param_groups() for name, _ in group["params"]} == {"head.weight", "head.bias"}
    assert {group["lr_mult"] for group in model.param_groups()} == {1.0}
    model.train()
    assert model.training and not model.backbone.training and not model.backbone.blocks[0][1].training
    model({"image": torch.randn(2, 1, 8, 8), "label": torch.tensor([0, 1])}, 0)["loss"].backward()
    assert all(p.grad is None for p in model.backbone.parameters()) and model.head.weight.grad is not None
    assert len(model.clip_groups()[0]) == 2


def test_parameters_that_the_backbone_froze_stay_out():
    backbone = Tiny()
    backbone.blocks.requires_grad_(False)
    names = [name for group in Classifier(backbone, CLASSES).param_groups() for name, _ in group["params"]]
    assert "head.weight" in names and not any("blocks" in name for name in names)


def test_augmentation_depends_on_the_seed_alone():
    model = Classifier(Tiny(), CLASSES)
    transform = pickle.loads(pickle.dumps(model.transform(model.preprocess)))
    assert isinstance(transform, TrainTransform) and transform == model.transform(model.preprocess)
    torch.manual_seed(0)
    first = transform(sample(), seed=5)
    torch.manual_seed(1)
    np.random.seed(1)
    state = torch.get_rng_state()
    again = transform(sample(), seed=5)
    assert torch.equal(first["image"], again["image"]) and torch.equal(state, torch.get_rng_state())
    assert len({transform(sample(), seed=seed)["image"].sum().item() for seed in range(20)}) == 20
    assert first["image"].shape == (1, 8, 8) and first["image"].dtype == torch.float32 and first["label"] == 3


def test_without_crop_and_flip_it_is_the_preprocess():
    picture = sample(size=(16, 16))
    model = Classifier(Tiny(), CLASSES, crop_scale=(1.0, 1.0), flip=0.0)
    transform = TrainTransform(model.preprocess, "image", CLASSES, (1.0, 1.0), 0.0, aspect=(1.0, 1.0))
    expected = model.preprocess.replace("image", resize=Resize(rule="exact", interpolation="bilinear"))(image=picture["image"])
    assert torch.equal(transform(picture, 0)["image"], expected["image"][0])
    mirrored = TrainTransform(model.preprocess, "image", CLASSES, (1.0, 1.0), 1.0, aspect=(1.0, 1.0))
    torch.testing.assert_close(mirrored(picture, 0)["image"], expected["image"][0].flip(-1), atol=1 / 60, rtol=0)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.floats(0.01, 1), st.integers(0, 2**63 - 1))
def test_crops_lie_inside(height, width, low, seed):
    top, left, h, w = crop_box(np.random.default_rng(seed), height, width, (low, 1.0), (3 / 4, 4 / 3))
    assert h >= 1 and w >= 1 and top >= 0 and left >= 0 and top + h <= height and left + w <= width


def test_crops_keep_the_asked_share_and_reach_everywhere():
    boxes = np.array([crop_box(np.random.default_rng(seed), 100, 120, (0.35, 0.6), (3 / 4, 4 / 3)) for seed in range(500)])
    share, ratio = boxes[:, 2] * boxes[:, 3] / 12000, boxes[:, 3] / boxes[:, 2]
    assert 0.34 < share.min() < 0.37 and 0.58 < share.max() < 0.61
    assert 0.73 < ratio.min() < 0.78 and 1.28 < ratio.max() < 1.36
    assert (boxes[:, 0] == 0).any() and (boxes[:, 0] + boxes[:, 2] == 100).any()


def test_flips_come_at_the_asked_rate():
    ramp = {"image": torch.arange(16, dtype=torch.uint8).mul(16).expand(1, 16, 16), "label": 0, "id": "ramp"}
    model = Classifier(Tiny(), CLASSES, flip=0.25)
    transform = model.transform(model.preprocess)
    images = [transform(ramp, seed)["image"] for seed in range(300)]
    flipped = sum(bool(image[0, 0, 0] > image[0, 0, -1]) for image in images)
    assert 50 <= flipped <= 100


def test_batches():
    model = Classifier(Tiny(), CLASSES)
    transform = model.transform(model.preprocess)
    batch = model.collate([transform(sample(i, size=(9 + i, 30), label=i), seed=i) for i in range(4)], seed=0)
    assert batch["image"].shape == (4, 1, 8, 8) and batch["label"].tolist() == [0, 1, 2, 3] and batch["label"].dtype == torch.int64


@pytest.mark.parametrize("label", [None, -1, 10])
def test_labels_outside_the_classes_are_named(label):
    model = Classifier(Tiny(), CLASSES)
    with pytest.raises(ValueError, match=rf"sample 's0': label {label}; expected 0\.\.9"):
        model.transform(model.preprocess)(sample(label=label), 0)


def test_what_is_exported():
    model = Classifier(Tiny(), CLASSES, frozen=True)
    module, card = model.exports()["classifier"]
    assert module is model and card["classes"] == list(CLASSES) and card["task"] == "classification" and card["frozen"] is True


@pytest.mark.parametrize(
    ("classes", "settings", "message"),
    [
        (("a",), {}, "at least two"),
        (("a", "a"), {}, "1 different names"),
        (("a", "b"), {"smoothing": 1.0}, "smoothing"),
        (("a", "b"), {"layer_decay": 0.0}, "layer_decay"),
        (("a", "b"), {"crop_scale": (0.5, 0.2)}, "crop_scale"),
        (("a", "b"), {"flip": 2}, "flip"),
    ],
)
def test_bad_settings(classes, settings, message):
    with pytest.raises(ValueError, match=message):
        Classifier(Tiny(), classes, **settings)


def test_a_backbone_without_pictures_or_pooling_is_refused():
    blind = Tiny()
    blind.preprocess = Preprocess(text=Text(tokenizer="hf/x"))
    with pytest.raises(ValueError, match="takes text; .* image modality"):
        Classifier(blind, CLASSES)
    flat = Classifier(Tiny(), CLASSES)
    flat.backbone.forward = lambda inputs, **_: Features()
    with pytest.raises(ValueError, match="Tiny has no pooled features"):
        flat({"image": torch.zeros(1, 1, 8, 8), "label": torch.tensor([0])}, 0)
