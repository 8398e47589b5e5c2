"""Preprocessing of rasters, baselines and probes against tensors recorded from the study's published code, torchgeo and timm.

Every output comes from a spec and described data by the call that users make. Sizes are read from the keys.
"""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
import torch

from okavango.downstream.classification.baselines import (
    ImageStatistics,
    RandomConvolutions,
    draw_places,
    gaussian_filters,
    mosaiks,
)
from okavango.downstream.classification.features import Embedded
from okavango.downstream.classification.knn import nearest
from okavango.downstream.classification.knn import shares as knn_shares
from okavango.downstream.classification.logistic import Standardiser
from okavango.downstream.classification.probes import AVERAGES, PROBES, fit_probe
from okavango.downstream.classification.protocols import evaluate_features
from okavango.models.band_statistics import STATISTICS
from okavango.models.channels import adapt_filters
from okavango.models.expectations import RGB, S2, S2_RGB, S2_SATLAS, checkpoint, study
from okavango.models.preprocess import Preprocess, Raster, Resize
from okavango.models.raster import Bands

FAMILY, TOLERANCE = "remote_sensing", 1e-5
TREESATAI_FILE = ("B02", "B03", "B04", "B08", "B05", "B06", "B07", "B8A", "B11", "B12", "B01", "B09")
TREESATAI_CLASSES = (
    *("Abies", "Acer", "Alnus", "Betula", "Cleared", "Fagus", "Fraxinus", "Larix"),
    *("Picea", "Pinus", "Populus", "Prunus", "Pseudotsuga", "Quercus", "Tilia"),
)
SLIP = {
    "order": "the study's statistics are listed for another order",
    **dict.fromkeys(("saturated", "range", "normalised"), "recorded as it was, whatever the synthetic values look like"),
}


@pytest.fixture
def inputs(recorded):
    fixture = recorded(FAMILY, "inputs")
    return {key: fixture.input(key) for key in fixture.tensors}


def sentinel_2(values, channels, level, **fields) -> Bands:
    return Bands(
        **{
            "values": values,
            "channels": channels,
            "sensor": "sentinel-2",
            "level": level,
            "units": "dn",
            "baseline": "02.06",
            **fields,
        }
    )


def eurosat(inputs) -> Bands:
    return sentinel_2(inputs["eurosat_u16"], STATISTICS["eurosat"].channels, "L1C")


def aerial(inputs, **fields) -> Bands:
    return Bands(**{"values": inputs["rgb_u8"], "channels": RGB, "sensor": "rgb", "units": "u8", **fields})


def run(preprocess: Preprocess, bands: Bands) -> torch.Tensor:
    return preprocess(image=bands, allow=SLIP)["image"]


def sampled(full: torch.Tensor, shape) -> torch.Tensor:
    """The rows and columns that were recorded."""
    rows, columns = (
        torch.from_numpy(np.round(np.linspace(0, side - 1, count)).astype(int))
        for side, count in zip(full.shape[-2:], shape[-2:], strict=True)
    )
    return full[..., rows[:, None], columns]


def close(fixture, key: str, ours: torch.Tensor) -> None:
    """Relative to the largest value recorded, also where that is below 1."""
    largest = float(fixture.tensors[key].double().abs().max())
    fixture.compare(key, ours, TOLERANCE * min(1.0, largest))


def compare(fixture, key: str, ours: torch.Tensor) -> None:
    """A whole tensor, a sample of it, or the three tensors that stand for a resized one."""
    if f"{key}.grid" not in fixture.tensors:
        return close(fixture, key, sampled(ours, fixture.tensors[key].shape))
    full = ours.double().flatten(2)
    fixture.compare(f"{key}.shape", torch.tensor(ours.shape), 0)
    close(fixture, f"{key}.grid", sampled(ours, fixture.tensors[f"{key}.grid"].shape))
    close(fixture, f"{key}.stats", torch.stack([full.mean(-1), full.std(-1, correction=0), full.amin(-1), full.amax(-1)], -1))


def keys(fixture, pattern: str):
    """Matches of the keys, of three that stand for one tensor only once."""
    names = dict.fromkeys(re.sub(r"\.(grid|stats|shape)$", "", key) for key in fixture.tensors)
    return [match for name in names if (match := re.fullmatch(pattern, name))]


def test_eurosat(recorded, inputs):
    fixture, data = recorded(FAMILY, "eurosat"), eurosat(inputs)
    for match in keys(fixture, r"(all|rgb)\.(\w+)\.(native|resize(\d+))"):
        bands, normalisation, _, size = match.groups()
        spec = study("eurosat", normalisation, bands=bands, size=size and int(size), as_published=True)
        compare(fixture, match[0], run(spec, data))


SETS = {
    "bigearthnet": lambda inputs: sentinel_2(inputs["bigearthnet_u16"], STATISTICS["bigearthnet"].channels, "L2A"),
    "treesatai": lambda inputs: sentinel_2(inputs["treesatai_i16_fileorder"], TREESATAI_FILE, "L2A"),
    "so2sat": lambda inputs: sentinel_2(
        inputs["so2sat_f32"], STATISTICS["so2sat_random"].channels, "L1C", units="reflectance", baseline=""
    ),
    "sat6": lambda inputs: Bands(values=inputs["sat6_u8_rgbn"], channels=(*RGB, "nir"), sensor="naip", units="u8"),
}


@pytest.mark.parametrize("name", SETS)
def test_resized_then_scaled(recorded, inputs, name):
    fixture, data = recorded(FAMILY, name), SETS[name](inputs)
    plain = "none" if name == "so2sat" else "divide"
    names = {"moco_or_random_or_rcf": plain, "imagenet": "standardization"}
    for match in keys(fixture, r"(msi|rgb)\.(\w+)(?:\.3_(\w+))?\.resize(\d+)"):
        bands, encoder, split, size = match.groups()
        dataset = name if name != "so2sat" else f"so2sat_{split or 'random'}"
        spec = study(dataset, names[encoder], bands="rgb" if bands == "rgb" else "all", size=int(size), as_published=True)
        compare(fixture, match[0], run(spec, data))
    dataset = "so2sat_random" if name == "so2sat" else name
    for bands in dict.fromkeys(match[1] for match in keys(fixture, r"(msi|rgb)\.imagestats")):
        raw = run(study(dataset, "none", bands="rgb" if bands == "rgb" else "all", size=None, as_published=True), data)
        statistics = ImageStatistics(study(dataset, "none", bands="rgb" if bands == "rgb" else "all", size=None, as_published=True))
        close(fixture, f"{bands}.imagestats", statistics(image=raw).pooled)
        if f"{bands}.loaded" in fixture.tensors:
            fixture.compare(f"{bands}.loaded", raw, 0)
        if bands == "msi" and "msi_padded_nonzero_channels" in fixture.tensors:
            fixture.compare("msi_padded_nonzero_channels", raw.flatten(2).any(-1).byte(), 0)
    if "labels_multihot" in fixture.tensors:
        shares = ({"Abies": 0.94, "Tilia": 0.06}, {"Quercus": 0.5, "Cleared": 0.3, "Acer": 0.2})
        hot = [[int(each.get(genus, 0) > 0) for genus in TREESATAI_CLASSES] for each in shares]
        fixture.compare("labels_multihot", torch.tensor(hot), 0)


def unresized(preprocess: Preprocess, size) -> Preprocess:
    return preprocess.replace("image", resize=Resize(rule="none"), size=tuple(size))


def test_aerial(recorded, inputs):
    fixture, data = recorded(FAMILY, "rgb_aerial"), aerial(inputs)
    names = {"ucm": "ucmerced", "resisc45": "resisc45"}
    for match in keys(fixture, r"(ucm|resisc45)\.(\w+)\.(?:native|resize(\d+)_short_side)"):
        spec = study(names[match[1]], match[2], size=match[3] and int(match[3]))
        compare(fixture, match[0], run(spec, data))
    numbers = inputs["rgb_u8"].float()
    described = {
        "uint8": (study("ucmerced", "divide"), data),
        "imagenet": (study("ucmerced", "imagenet"), aerial(inputs, values=numbers / 255, scale=255.0)),
        "seco_rgb": (checkpoint("seco", "study"), sentinel_2(inputs["rgb_u8"], S2_RGB, "", units="u8")),
        "sentinel2": (study("eurosat", "divide", bands="rgb"), sentinel_2(numbers, S2_RGB, "L1C")),
        "ssl4eo": (checkpoint("ssl4eo_s12_s2_rgb"), sentinel_2(numbers, S2_RGB, "L1C")),
    }
    for name, (spec, bands) in described.items():
        compare(fixture, f"lists.{name}_transforms", run(unresized(spec, numbers.shape[-2:]), bands))


def test_torchgeo_weights(recorded, inputs):
    fixture, scene, pictures = recorded(FAMILY, "torchgeo_weights"), eurosat(inputs), aerial(inputs)
    numbers = inputs["rgb_u8"].float()
    radar = Bands(values=inputs["s1_db_f32"], channels=("VV", "VH"), sensor="sentinel-1", level="GRD", units="db")
    stacked = torch.cat([numbers, 30 * numbers, 32 * numbers], 1)
    described = {
        "ssl4eo_s12_s2_10k.all": (checkpoint("ssl4eo_s12_s2"), scene),
        "ssl4eo_s12_s2_stats.all": (checkpoint("ssl4eo_s12_s2", "statistics"), scene),
        "ssl4eo_s12_s1": (checkpoint("ssl4eo_s12_s1"), radar),
        "seco.rgb_u8": (checkpoint("seco", "torchgeo"), sentinel_2(inputs["rgb_u8"], S2_RGB, "", units="u8")),
        "seco_eco.rgb": (checkpoint("seco_eco"), scene),
        "gassl.rgb_u8": (checkpoint("gassl"), pictures),
        "scale_mae.rgb_u8": (checkpoint("scale_mae", "torchgeo"), pictures),
        "satlas.rgb_u8": (checkpoint("satlas_rgb"), sentinel_2(inputs["rgb_u8"], S2_RGB, "", units="u8")),
        "satlas_s2_ms": (checkpoint("satlas_s2_ms", "torchgeo"), sentinel_2(stacked, S2_SATLAS, "L1C")),
    }
    for key, (spec, bands) in described.items():
        compare(fixture, key, run(spec, bands))
    order = [scene.channels.index(name) for name in S2]
    fixture.compare("eurosat_file_to_canonical_index", torch.tensor(order), 0)


RESIZES = {
    "kornia_default": Resize(rule="exact", interpolation="bilinear", antialias=False, corners="aligned"),
    "align_corners_false": Resize(rule="exact", interpolation="bilinear", antialias=False),
    "torchvision_v2_antialias": Resize(rule="exact", interpolation="bilinear"),
    "bicubic_antialias": Resize(rule="exact", interpolation="bicubic"),
    "nearest": Resize(rule="exact", interpolation="nearest"),
}


def test_resizes(recorded, inputs):
    fixture, data = recorded(FAMILY, "resize_variants"), eurosat(inputs)
    data = dataclasses.replace(data, values=data.values[:1])
    common = {"channels": S2_RGB, "sensor": "sentinel-2", "level": "L1C", "units": "dn"}
    for match in keys(fixture, r"(\w+)\.(\d+)x(\d+)"):
        spec = Raster(**common, size=(int(match[2]), int(match[3])), resize=RESIZES[match[1]])
        compare(fixture, match[0], run(Preprocess(image=spec), data))
    for match in keys(fixture, r"kornia_short_side_shape_(\d+)"):
        spec = study("ucmerced", "none", size=int(match[1]))
        fixture.compare(match[0], torch.tensor(run(spec, aerial(inputs)).shape), 0)


FEATURE_INPUTS = ("timm_conv.w3", "rcf.probe_all", "mosaiks.toy_dataset")


def features(recorded, prefix: str):
    """The file of features, for a test that compares what begins with `prefix`."""
    fixture = recorded(FAMILY, "features")
    for key in fixture.tensors:
        if key in FEATURE_INPUTS:
            fixture.left_out[key] = "input"
        elif not key.startswith(prefix):
            fixture.left_out.setdefault(key, "compared by another test of this file")
    return fixture


def test_first_layers(recorded):
    """timm's rule for other numbers of channels."""
    fixture = features(recorded, "timm_conv.")
    weight = fixture.tensors["timm_conv.w3"]
    for match in keys(fixture, r"timm_conv\.w(\d+)"):
        if match[0] != "timm_conv.w3":
            bands = Raster(channels=tuple(f"band {index}" for index in range(int(match[1]))))
            fixture.compare(match[0], adapt_filters(weight, RGB, bands), 1e-6)


def test_image_statistics(recorded, inputs):
    fixture, data = features(recorded, "imagestats."), eurosat(inputs)
    for match in keys(fixture, r"imagestats\.eurosat_(all|rgb)_(raw|divide)(?:_resize(\d+))?"):
        bands, normalisation, size = match.groups()
        names = {"raw": "none"}
        size = size and int(size)
        spec = study("eurosat", names.get(normalisation, normalisation), bands=bands, size=size, as_published=True)
        images = run(spec, data)
        fixture.compare(match[0], ImageStatistics(spec)(image=images).pooled, 1e-4)


def probe(fixture, bands: str) -> torch.Tensor:
    """What was recorded as the input of the convolutions, of all bands or three of them."""
    images = fixture.tensors["rcf.probe_all"]
    return images if bands == "all" else images[:, [3, 2, 1]]


def test_random_convolutions(recorded):
    fixture = features(recorded, "rcf.")
    for match in keys(fixture, r"rcf\.(all|rgb)\.seed(\d+)\.features"):
        bands, seed = match[1], int(match[2])
        spec = study("eurosat", "divide", bands=bands, as_published=True)
        images = probe(fixture, bands)
        filters = gaussian_filters(images.shape[1], seed=seed, seed_zero_unset=True)
        model = RandomConvolutions(spec, filters, architecture="rcf", second="negated")
        fixture.compare(match[0], model(image=images).pooled, 1e-4)
        fixture.compare(f"rcf.{bands}.seed{seed}.weights_torchgeo05plus", filters, 0)
    for match in keys(fixture, r"rcf\.(all|rgb)\.seed(\d+)\.weights_manual_seed\d+_first(\d+)"):
        channels = fixture.tensors[match[0]].shape[1]
        fixture.compare(match[0], gaussian_filters(channels, seed=int(match[2]))[: int(match[3])], 0)


class Toys:
    """The recorded data set as a source of bands in the order of EuroSAT's files."""

    name = "toys"

    def __init__(self, values):
        self.values = values

    def __len__(self):
        return len(self.values)

    def __getitem__(self, index):
        return {"image": sentinel_2(self.values[index], STATISTICS["eurosat"].channels, "L1C"), "id": str(index)}


def test_mosaiks(recorded):
    fixture = features(recorded, "mosaiks.")
    toys = Toys(fixture.tensors["mosaiks.toy_dataset"])
    for match in keys(fixture, r"mosaiks\.(all|rgb)\.features"):
        bands = match[1]
        spec, stored = (study("eurosat", name, bands=bands, size=None, as_published=True) for name in ("divide", "none"))
        count = len(fixture.tensors[f"mosaiks.{bands}.weights"])
        published = {"count": count, "seed": 42, "last": False}
        height, width = toys.values.shape[-2:]
        places = draw_places(len(toys), height, width, **published)
        fixture.compare(f"mosaiks.{bands}.draws_idx_y_x", torch.from_numpy(places), 0)
        model = mosaiks(toys, spec, drawn_with=stored, second="negated", allow=SLIP, **published)
        fixture.compare(f"mosaiks.{bands}.weights", model.filters, 1e-3)
        fixture.compare(match[0], model(image=probe(fixture, bands)).pooled, 1e-3)


def test_probes(recorded):
    """k-NN and logistic regression of given features; both searches of neighbours."""
    fixture = recorded(FAMILY, "knn")
    tensors = {key: tensor.numpy() for key, tensor in fixture.tensors.items()}
    inputs = [f"{kind}.{name}" for kind, names in (("multiclass", "xy"), ("multilabel", "y")) for name in names]
    for key in (f"{name}_{part}" for name in inputs for part in ("train", "test")):
        fixture.input(key)
    x = {part: tensors[f"multiclass.x_{part}"] for part in ("train", "test")}

    def part(kind: str, name: str) -> Embedded:
        return Embedded(x[name], tensors[f"{kind}.y_{name}"], [str(row) for row in range(len(x[name]))])

    scaled = Standardiser.fit(x["train"])(x["test"])
    fixture.compare("multiclass.x_test_scaled", torch.from_numpy(scaled), 1e-5)
    train, test = part("multiclass", "train"), part("multiclass", "test")
    for kind, suffix in (("raw", ""), ("scaled", "-standardised")):
        predict, _ = fit_probe(PROBES[f"knn-5{suffix}/v1"], train)
        shares = predict(test.features)
        fixture.compare(f"multiclass.{kind}.proba", torch.from_numpy(shares), 1e-12)
        fixture.compare(f"multiclass.{kind}.pred", torch.from_numpy(shares.argmax(1)), 0)
        bank, queries = (x["train"], x["test"]) if kind == "raw" else (Standardiser.fit(x["train"])(x["train"]), scaled)
        neighbours = nearest(bank, queries, 5, "faiss", "euclidean")[1]
        voted = knn_shares(train.labels[neighbours], shares.shape[1]).argmax(1)
        fixture.compare(f"multiclass.{kind}.pred_faiss", torch.from_numpy(voted), 0)
        outcome = evaluate_features(train, test, f"knn-5{suffix}")
        names = ["accuracy", *(f"{metric}_{how}" for metric in ("f1", "precision", "recall") for how in AVERAGES)]
        metrics = torch.tensor([outcome.settings["metrics"][name] for name in names], dtype=torch.float64)
        fixture.compare(f"multiclass.{kind}.metrics", metrics, 1e-9)
        predict, settings = fit_probe(PROBES[f"linear-c1{suffix}/v1"], train)
        probabilities = predict(test.features)
        # L-BFGS ends where the gradient is small; on features of other scales, where that is depends on the processor's rounding
        fixture.compare(f"multiclass.{kind}.linear_proba", torch.from_numpy(probabilities), 1e-2 if kind == "raw" else 1e-5)
        fixture.compare(f"multiclass.{kind}.linear_pred", torch.from_numpy(probabilities.argmax(1)), 0)
        accuracies = [evaluate_features(train, test, f"linear-{name}{suffix}").value for name in ("c1", "free")]
        key = f"multiclass.{kind}.linear_acc_l2_then_nopenalty"
        fixture.compare(key, torch.tensor(accuracies, dtype=torch.float64), 1e-9)
    train, test = part("multilabel", "train"), part("multilabel", "test")
    scores = fit_probe(PROBES["multilabel-knn-5-standardised/v1"], train)[0](test.features)
    fixture.compare("multilabel.scaled.score", torch.from_numpy(scores), 1e-6)
    fixture.compare("multilabel.scaled.pred", torch.from_numpy((scores > 0.5).astype(int)), 0)
    found = evaluate_features(train, test, "multilabel-knn-5-standardised").settings["metrics"]
    names = [*(f"{metric}_{how}" for metric in ("map", "f1") for how in AVERAGES), "accuracy"]
    fixture.compare("multilabel.scaled.metrics", torch.tensor([found[name] for name in names], dtype=torch.float64), 1e-9)
