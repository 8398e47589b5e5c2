"""POA's fine-tuning: its numbers, its augmentation as pure functions of seeds, and the network it starts from."""

from __future__ import annotations

import dataclasses
import pickle
import random

import numpy as np
import pytest
import torch
from timm.layers import DropPath

import okavango as ok
from okavango import verbs
from okavango.data.sources import Part, open_source
from okavango.downstream.classification.augment import erase, mix, rand_augment
from okavango.downstream.classification.head import Classifier
from okavango.models.backbone import create_model
from okavango.models.features import Subnet
from okavango.pretrain.optim import Optimiser
from okavango.recipes import named

torch.set_num_threads(1)
POLICY, FILL = "rand-m9-mstd0.5-inc1", (0.5, 0.4, 0.3)
PUBLISHED = {  # rate, layer decay, epochs, drop path
    "vit_s": (0.002, 0.55, 200, 0.1),
    "vit_b": (0.0007, 0.4, 100, 0.2),
    "vit_l": (0.0018, 0.6, 50, 0.2),
    "swin_t": (0.0014, 0.6, 200, 0.1),
    "swin_s": (0.001, 0.4, 100, 0.2),
    "swin_b": (0.0007, 0.55, 50, 0.2),
    "resnet_50": (0.0014, 0.6, 100, 0.1),
    "resnet_101": (0.001, 0.4, 100, 0.2),
    "resnet_152": (0.0007, 0.45, 100, 0.2),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_numbers(name):
    recipe = named(f"classify_{name}", "finetune")
    rate, decay, epochs, drop_path = PUBLISHED[name]
    objective, optim = recipe.objective, recipe.optim
    assert (optim.lr, objective.layer_decay, recipe.model_args) == (rate, decay, {"drop_path": drop_path})
    assert recipe.name == f"classify_{name}" and recipe.run.steps == epochs * 625 and 0 <= 1_281_167 / 2048 - 625 < 1
    assert objective.pool == ("stages" if "resnet" in name else "pooled")
    assert (objective.randaugment, objective.mixup, objective.cutmix, objective.erasing) == (POLICY, 0.8, 1.0, 0.25)
    assert (objective.smoothing, optim.weight_decay, optim.warmup, optim.ema) == (0.1, (0.05, 0.05), 0.1, 0.7)
    # The cosine of a run of 200 epochs with the same warm-up, at the last step.
    weight = torch.nn.Parameter(torch.zeros(1))
    steps, warmup = recipe.run.steps, round(0.1 * recipe.run.steps)
    optimiser = Optimiser([{"params": [("w", weight)], "lr_mult": 1.0, "wd_mult": 1.0}], optim, steps, 2048)
    share = (steps - 1 - warmup) / (200 * 625 - warmup)
    assert optimiser.lr(steps - 1) == pytest.approx(1e-6 + 0.5 * (rate - 1e-6) * (1 + np.cos(np.pi * share)), rel=1e-6)


def picture(index=0, size=(30, 24), channels=3):
    generator = torch.Generator().manual_seed(index)
    image = torch.randint(0, 256, (channels, *size), generator=generator, dtype=torch.uint8)
    return {"image": image, "label": index % 3, "id": str(index)}


def test_strong_augmentation_follows_from_the_seed_and_leaves_generators_alone():
    model = Classifier(create_model("elastic_vit_tiny"), "abc", randaugment=POLICY, erasing=1.0, mixup=0.8, cutmix=1.0)
    transform = pickle.loads(pickle.dumps(model.transform(model.preprocess)))
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    first = model.collate([transform(picture(i), seed=i) for i in range(5)], seed=9)  # an odd number
    assert states[:2] == (random.getstate(), np.random.get_state()[1].tolist()) and torch.equal(states[2], torch.get_rng_state())
    random.seed(2)
    np.random.seed(2)
    torch.manual_seed(2)
    again = model.collate([transform(picture(i), seed=i) for i in range(5)], seed=9)
    assert all(torch.equal(first[name], again[name]) for name in ("image", "label", "target"))
    assert first["image"].shape == (5, 3, 28, 28) and first["target"].shape == (5, 3)
    assert not torch.equal(first["image"], model.collate([transform(picture(i), seed=i + 50) for i in range(5)], seed=9)["image"])
    assert not torch.equal(first["image"], model.collate([transform(picture(i), seed=i) for i in range(5)], seed=10)["image"])


def test_without_it_nothing_changes():
    model = Classifier(create_model("elastic_vit_tiny"), "abc")
    strong = dataclasses.replace(model.transform(model.preprocess), erasing=1.0)
    plain = model.transform(model.preprocess)(picture(), 3)["image"]
    noise = strong(picture(), 3)["image"] != plain
    assert 0.01 < noise.float().mean() < 0.4 and set(model.collate([{"image": plain, "label": 1}], 0)) == {"image", "label"}


def test_rand_augment():
    image = picture(size=(32, 32))["image"]
    results = [rand_augment(image, POLICY, FILL, seed) for seed in range(20)]
    assert all(r.shape == image.shape and r.dtype == torch.uint8 for r in results)
    assert len({r.sum().item() for r in results}) > 5 and sum(torch.equal(r, image) for r in results) < 12
    assert rand_augment(image[:1], POLICY, FILL, 4).shape == (1, 32, 32)
    with pytest.raises(ValueError, match="1 or 3 channels"):
        rand_augment(image[:2], POLICY, FILL, 0)
    with pytest.raises(ValueError, match="1 or 3 channels"):
        rand_augment(image.float(), POLICY, FILL, 0)


def test_erasing_comes_at_its_probability_in_one_rectangle():
    values = torch.zeros(3, 40, 40)
    found = [erase(values, 0.25, seed) for seed in range(200)]
    assert not values.any()
    changed = [f for f in found if f.any()]
    assert 32 <= len(changed) <= 68
    for f in changed:
        rows, columns = torch.nonzero(f[0].any(1))[:, 0], torch.nonzero(f[0].any(0))[:, 0]
        area = (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
        assert (f[0] != 0).sum() == area and 0.01 < area / 1600 < 0.37


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_mixed_pictures_have_the_shares_of_their_targets(mixup, cutmix):
    labels = torch.arange(4)
    images = torch.nn.functional.one_hot(labels, 4).float()[:, :, None, None].expand(4, 4, 16, 16)  # channel c is 1 in class c
    whole = []
    for seed in range(20):
        mixed, target = mix(images, labels, 4, mixup, cutmix, seed)
        torch.testing.assert_close(mixed.mean((2, 3)), target, atol=1e-5, rtol=0)
        torch.testing.assert_close(target.sum(1), torch.ones(4))
        whole.append(bool(((mixed == 0) | (mixed == 1)).all()))
    assert all(whole) if not mixup else not all(whole)
    assert any(whole) == bool(cutmix)


def test_the_loss_of_a_mixed_batch_is_smoothed_too():
    model = Classifier(create_model("elastic_vit_tiny"), "abc", smoothing=0.3, mixup=0.8).eval()
    batch = model.collate([{"image": torch.randn(3, 28, 28), "label": i % 3} for i in range(4)], seed=1)
    target = 0.7 * batch["target"] + 0.1
    expected = -(target * model.logits({"image": batch["image"]}).log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(model(batch, 0)["loss"], expected)


def test_stages_are_pooled(tmp_path):
    backbone = create_model("elastic_resnet_tiny").eval()
    model = Classifier(backbone, "abc", pool="stages").eval()
    images = torch.randn(2, 3, 64, 64)
    maps = backbone(image=images).maps
    expected = torch.cat([m.flatten(2).mean(2) for m in maps[1:]], 1)
    assert expected.shape == (2, 128 + 256 + 512)
    torch.testing.assert_close(model.logits({"image": images}), model.head(expected))
    ok.save(model, tmp_path / "head", kind="head", head=model.head_config(), backbone_prefix="backbone.")
    again = ok.load(str(tmp_path / "head"), heads=verbs.heads())
    torch.testing.assert_close(again.predict({"image": images}), model.predict({"image": images}))
    with torch.device("meta"):
        assert Classifier(create_model("resnet"), "abc", pool="stages").head.in_features == 3584


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"randaugment": "rand-z9"}, "randaugment='rand-z9'"),
        ({"randaugment": "auto"}, "expected a policy of timm"),
        ({"erasing": 2}, "erasing=2"),
        ({"mixup": -1.0}, "mixup=-1.0"),
        ({"pool": "all"}, "pool='all'"),
        ({"pool": "stages"}, "three strides"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Classifier(create_model("elastic_vit_tiny"), "abc", **settings)


NETWORKS = {
    "vit": ("elastic_vit_tiny", Subnet(64, 2)),
    "swin": ("elastic_swin_tiny", Subnet(16, (2, 2, 2, 2))),
    "resnet": ("elastic_resnet_tiny", Subnet(16, (1, 1, 1, 1))),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    for family, (name, subnet) in NETWORKS.items():
        net = create_model(name)
        ok.save(net.extract(subnet), root / family)
        ok.save(net, root / f"elastic_{family}")
    return root


@pytest.mark.parametrize("name", ["vit_b", "swin_b", "resnet_50"])
def test_drop_path_is_put_into_the_extracted_network(name, checkpoints):
    family = name.partition("_")[0]
    recipe = named(f"classify_{name}", "finetune")
    rate = recipe.model_args["drop_path"]
    start = ok.load(str(checkpoints / family))
    net = verbs.starting_backbone(dataclasses.replace(recipe, start=str(checkpoints / family)))
    assert net.arguments == {**start.arguments, "drop_path": rate} and net.architecture == family
    assert all(map(torch.equal, net.state_dict().values(), start.state_dict().values())) and net.preprocess == start.preprocess
    if family == "swin":
        rates = [block.drop_path for block in net.blocks]
    else:
        rates = [module.drop_prob for module in net.modules() if isinstance(module, DropPath)]
    assert max(rates) == rates[-1] == pytest.approx(rate)
    images = torch.randn(16, 3, *net.preprocess.array().size)
    with torch.no_grad():
        torch.testing.assert_close(net.eval()(image=images).pooled, start(image=images).pooled)
        net.train()
        torch.manual_seed(0)
        first = net(image=images).pooled
        assert not torch.equal(first, net(image=images).pooled)


def test_a_network_without_drop_path_is_refused(checkpoints):
    recipe = dataclasses.replace(named("classify_resnet_50", "finetune"), start=str(checkpoints / "elastic_resnet"))
    with pytest.raises(ValueError, match="recipe classify_resnet_50 sets drop_path .* extract a subnet first"):
        verbs.starting_backbone(recipe)
    for build in ("vit", "swin", "resnet"):
        with pytest.raises(ValueError, match=r"drop_path 1\.5"):
            create_model(build, drop_path=1.5)


@pytest.mark.parametrize("name", ["vit_s", "swin_t", "resnet_50"])
def test_it_runs(name, checkpoints, tmp_path):
    source = Part(open_source("samples/fashion:train"), range(0, 600, 100))
    quick = {"batch": 2, "workers": 0, "precision": "fp32", "trackers": (), "threads": 1, "log_every": 1}
    start = str(checkpoints / name.partition("_")[0])
    out = ok.finetune(f"classify_{name}", start=start, data=source, out=tmp_path / "run", epochs=0.7, say=lambda s: None, **quick)
    assert len((out / "log.jsonl").read_text().splitlines()) == 2  # 0.7 x 6 / 2 steps
    head = ok.load(str(out / "export"), heads=verbs.heads())
    assert head.pool == ("stages" if "resnet" in name else "pooled") and head.backbone.arguments["drop_path"] == 0.1
