"""The study: rows, their cache, resuming, published tables, the example on a scene made here."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from helpers import ROOT
from PIL import Image as Picture

from okavango import study
from okavango.cli import main
from okavango.data.labels import LabelSets, read_label_sets
from okavango.data.sources import Arrays
from okavango.models.backbone import create_model
from okavango.models.features import Subnet
from okavango.models.preprocess import Raster
from okavango.models.raster import Bands
from okavango.zoo.checkpoint import save_checkpoint
from okavango.zoo.leaderboard.page import render
from okavango.zoo.leaderboard.records import published_file, read_records

torch.set_num_threads(1)
COLOURS = {"field": (40, 160, 60), "water": (30, 60, 170), "town": (150, 140, 130)}


def write_pictures(folder, per_class=6, size=16):
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        for name, colour in COLOURS.items():
            for number in range(per_class):
                pixels = np.clip(rng.normal(colour, 25, (size, size, 3)), 0, 255).astype(np.uint8)
                path = folder / part / name / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Picture.fromarray(pixels).save(path)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return str(write_pictures(tmp_path_factory.mktemp("data")))


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    folder = tmp_path_factory.mktemp("network") / "tiny"
    torch.manual_seed(0)
    save_checkpoint(create_model("timm/test_resnet").eval(), folder)
    return str(folder)


def options(network, **changes):
    fixed = {"imagenet": network, "sizes": (0, 24), "normalisations": ("own", "divide", "standardise"), "seeds": (0,)}
    return {**fixed, "say": lambda line: None, **changes}


def test_rows_have_everything_that_an_encoder_has_to_beat(data, network, tmp_path):
    records = study.run_study(data, out=tmp_path / "r.jsonl", protocols=("knn-5",), **options(network))
    found = {(record.model, record.baseline) for record in records}
    assert {model for model, baseline in found if baseline == "no network"} == {"image-statistics", "rcf", "mosaiks"}
    assert {baseline for _, baseline in found} == {"no network", "ImageNet", "untrained"}
    rows = {(record.model, record.baseline, *record.settings["size"], record.settings["normalisation"]) for record in records}
    assert len(rows) == len(records) == 3 * 4 + 6 + 4  # baselines and the untrained twin have no contract of their own
    statistics = [record for record in records if record.model == "image-statistics"]
    assert min(record.value for record in statistics) > 0.8 and all(record.interval for record in statistics)
    assert all(record.settings["preprocess"] and record.settings["metrics"]["f1_macro"] >= 0 for record in records)


def test_a_study_goes_on_row_by_row(data, network, tmp_path):
    whole, killed, said = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl", []
    study.run_study(data, out=whole, **options(network, sizes=(0,)))

    class Killed(BaseException):
        pass

    def stop(line):
        said.append(line)
        if len(said) == 7:
            raise Killed

    with pytest.raises(Killed):
        study.run_study(data, out=killed, **options(network, sizes=(0,), say=stop))
    done = len(read_records(killed))
    assert 0 < done < len(read_records(whole))
    new = study.run_study(data, out=killed, **options(network, sizes=(0,)))
    assert done + len(new) == len(read_records(killed))

    def numbers(path):
        return [(record.label, record.protocol, record.value, record.interval) for record in read_records(path)]

    assert numbers(killed) == numbers(whole)
    assert study.run_study(data, out=killed, **options(network, sizes=(0,))) == []
    (cache,) = tmp_path.glob("killed.cache")
    before = {path: path.stat().st_mtime_ns for path in cache.glob("*.safetensors")}
    more = study.run_study(data, out=killed, protocols=("linear-c1-standardised",), **options(network, sizes=(0,)))
    assert more and before == {path: path.stat().st_mtime_ns for path in cache.glob("*.safetensors")}  # nothing computed again


def test_features_on_disk(tmp_path):
    from okavango.downstream.classification.features import Embedded

    file = tmp_path / "deep" / "f.safetensors"
    assert study.read_features(file) is None
    vectors = np.arange(6, dtype=np.float32).reshape(2, 3)
    study.write_features(file, Embedded(vectors, np.array([[0, 1], [1, 1]]), ["a", "ü"], [(3, "torn")]))
    found = study.read_features(file)
    assert np.array_equal(found.features, vectors) and found.labels.tolist() == [[0, 1], [1, 1]]
    assert found.ids == ["a", "ü"] and found.bad == [(3, "torn")]
    file.write_bytes(file.read_bytes()[:-5])
    assert study.read_features(file) is None  # torn: computed anew


def test_what_features_depend_on_is_in_their_name(network):
    subject = study.Subject.of(*[Arrays(torch.zeros(4, 8, 8, 3, dtype=torch.uint8), np.array([0, 1, 0, 1]))] * 2)
    encoder = study.baseline_encoder("rcf", 0)
    contract = subject.plain(study.RGB)
    row = study.Row(encoder, contract, "none", "rgb", (8, 8))
    other = [
        dataclasses.replace(row, encoder=study.baseline_encoder("rcf", 1)),
        dataclasses.replace(row, contract=contract.replace("image", scale=2.0)),
    ]
    assert len({row.key("data"), row.key("others"), *(each.key("data") for each in other)}) == 4
    (one,), (again,) = study.checkpoint_encoders(network), study.checkpoint_encoders(network)
    assert one.identity == again.identity != study.baseline_encoder("rcf", 0).identity


def bands(count=12, seed=0):
    channels = ("B02", "B03", "B04", "B08")

    class Source:
        name, classes, digest = f"bands {seed}", ("dry", "wet"), f"{seed:064d}"
        labels = np.arange(count) % 2

        def __len__(self):
            return count

        def __getitem__(self, index):
            level = 500 + 1500 * self.labels[index]
            values = np.random.default_rng(1000 * seed + index).normal(level, 60, (4, 12, 12)).astype(np.uint16)
            values[:, 0, 0] = 0
            about = {"sensor": "sentinel-2", "level": "L2A", "units": "dn", "baseline": "02.00", "nodata": 0}
            image = Bands(values=values, channels=channels, **about)
            return {"image": image, "label": int(self.labels[index]), "id": f"{seed}-{index}"}

    return Source()


def test_rasters_by_name_and_in_their_own_units(network, tmp_path):
    said = []
    records = study.run_study(
        bands(seed=1),
        train=bands(seed=0),
        out=tmp_path / "r.jsonl",
        bands=("rgb", "all"),
        protocols=("knn-5",),
        **options(network, normalisations=("own", "divide", "standardise", "imagenet"), say=said.append),
    )
    statistics = [record for record in records if record.model == "image-statistics" and record.settings["bands"] == "all"]
    assert {record.settings["normalisation"] for record in statistics} == {"divide", "standardise"}
    assert any("ImageNet has statistics of red, green and blue only" in line for line in said)
    assert any("takes 8-bit pictures" in line for line in said)  # the checkpoint's own contract refuses sensor numbers
    spec = statistics[0].settings["preprocess"]["image"]
    assert list(spec["channels"]) == ["B02", "B03", "B04", "B08"] and spec["units"] == "dn"
    assert all(record.value == 1 for record in statistics)


def test_statistics_of_the_training_set_leave_out_what_was_not_measured():
    source = bands()
    subject = study.Subject.of(source, source)
    found = subject.statistics(("red", "B02"))
    values = np.stack([source[index]["image"].values for index in range(len(source))])[:, [2, 0]].astype(float)
    expected = np.where(values == 0, np.nan, values)
    assert found.mean == pytest.approx(np.nanmean(expected, (0, 2, 3))) and found.low == pytest.approx(
        np.nanmin(expected, (0, 2, 3))
    )
    rule = study.normalisation("standardise", found, False)
    spec = subject.contract(("red", "B02"), rule, 0, study.RESIZES["aligned"])
    assert isinstance(spec["image"], Raster)
    fed = torch.cat([spec(image=source[index]["image"])["image"] for index in range(len(source))])
    assert abs(float(fed.mean())) < 0.01


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [("none", 51, 51), ("divide", 51, 0.2), ("imagenet", 51, (0.2 - 0.485) / 0.229), ("minmax", 51, (51 - 10) / 200)],
)
def test_normalisations(name, value, expected):
    images = torch.full((2, 4, 4, 3), 10, dtype=torch.uint8)
    images[1] = 210
    source = Arrays(images, np.array([0, 1]))
    subject = study.Subject.of(source, source)
    rule = study.normalisation(name, subject.statistics(study.RGB), True)
    contract = subject.contract(study.RGB, rule, 0, study.RESIZES["aligned"])
    fed = contract(image=torch.full((3, 4, 4), value, dtype=torch.uint8))["image"]
    assert float(fed[0, 0, 0, 0]) == pytest.approx(expected, abs=1e-5)


def test_several_labels_to_a_picture(network, tmp_path):
    data = write_pictures(tmp_path / "data", per_class=8)
    sets = {f"{name}/{number}.png": [name, "field"][: 1 + (name == "town")] for name in COLOURS for number in range(8)}
    (tmp_path / "labels.json").write_text(json.dumps(sets))
    records = study.run_study(
        str(data),
        out=tmp_path / "r.jsonl",
        labels=tmp_path / "labels.json",
        **options(network, sizes=(0,), normalisations=("divide",)),
    )
    assert {record.protocol for record in records} == {"multilabel-knn-5/v1", "multilabel-linear-c1/v1"}
    best = next(record for record in records if record.model == "image-statistics")
    assert best.metric == "map_micro" and best.value > 0.8 and best.interval[0] <= best.value <= best.interval[1]
    assert {"map_macro", "f1_weighted", "accuracy"} <= set(best.settings["metrics"])


def test_sets_that_do_not_fit(tmp_path):
    source = Arrays(torch.zeros(2, 4, 4, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match="sample '1' has no entry"):
        LabelSets(source, {"0": ["a"]})
    with pytest.raises(ValueError, match="'b', which is not among the classes"):
        LabelSets(source, {"0": ["a"], "1": ["b"]}, ["a"])
    assert LabelSets(source, {"0": ["a"], "1": []}).digest != LabelSets(source, {"0": ["a"], "1": ["a"]}).digest
    for text, message in (("{", "no JSON"), ('{"a": "b"}', "an object of lists")):
        (tmp_path / "l.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_label_sets(tmp_path / "l.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalisations": ("zscore",)}, "unknown normalisation 'zscore'"),
        ({"protocols": ("multilabel-knn-5",)}, "not one for a study of these data; expected knn-5/v1"),
        ({"protocols": ("linear-sweep",)}, "not one for a study"),
        ({"sizes": (-1,)}, "expected antialiased, aligned; rgb, all; 0 or more"),
        ({"checkpoints": ("nothing-of-this-name",)}, "nothing-of-this-name"),
    ],
)
def test_a_study_that_cannot_be(data, network, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        study.run_study(data, out=tmp_path / "r.jsonl", **options(network, **changes))


def test_weights_that_cannot_be_had_are_said(data, tmp_path):
    said = []
    encoders = list(study.all_encoders((), "timm/test_resnet.no_such_tag", (0,), said.append))
    assert [each.baseline for each in encoders] == ["no network"] * 3 + ["untrained"] and "left out" in said[0]


def test_every_subnet_is_a_row(data, network, tmp_path):
    torch.manual_seed(0)
    sizes = {"image_size": 16, "patch_size": 8, "min_width": 8, "max_width": 16, "width_step": 8, "head_dim": 8}
    net = create_model("elastic_vit", **sizes, min_depth=1, max_depth=2).eval()
    whole, cut = str(save_checkpoint(net, tmp_path / "net")), str(save_checkpoint(net.extract(Subnet(8, 1)), tmp_path / "cut"))
    asked = options(network, sizes=(0,), normalisations=("divide",), protocols=("knn-5",))
    said = []
    records = study.run_study(data, out=tmp_path / "r.jsonl", checkpoints=(f"{whole}@all", cut), **{**asked, "say": said.append})
    rows = {record.subnet: record for record in records if record.model == whole}
    assert set(rows) == set(map(str, net.list_subnets()))
    assert all(record.parameters == net.count_parameters(Subnet.parse(name)) for name, record in rows.items())
    (alone,) = [record for record in records if record.model == cut]
    assert (alone.value, alone.interval, alone.subnet) == (rows["w8_d1"].value, rows["w8_d1"].interval, "")
    assert any("net · rgb · 16 px · divide w8_d1, knn-5/v1" in line for line in said)
    again = study.run_study(data, out=tmp_path / "r.jsonl", checkpoints=(f"{whole}@w8_d1", f"{whole}@w16_d2"), **asked)
    assert again == []
    (intact,) = study.run_study(data, out=tmp_path / "r.jsonl", checkpoints=(whole,), **asked)
    assert intact.subnet == "" and intact.value == rows["w16_d2"].value
    with pytest.raises(ValueError, match="widths are 8, 16"):
        study.run_study(data, out=tmp_path / "r.jsonl", checkpoints=(f"{whole}@w9_d1",), **asked)


def test_paired_differences(data, network, tmp_path):
    out = tmp_path / "r.jsonl"
    records = study.run_study(data, out=out, protocols=("knn-5",), **options(network, sizes=(0,)))
    cache = out.with_suffix(".cache")
    first, second = records[0], records[-1]
    mean, low, high = study.paired(first, second, cache)
    assert mean == pytest.approx(first.value - second.value) and low <= mean <= high
    with pytest.raises(study.StudyError, match="another protocol"):
        study.paired(first, dataclasses.replace(second, protocol="knn/v1"), cache)
    with pytest.raises(study.StudyError, match="measure it again"):
        study.paired(first, second, tmp_path / "elsewhere")


def test_published_tables_stand_beside_but_never_among_runs(tmp_path):
    records = read_records(published_file("corley2023"))
    assert {record.dataset for record in records} >= {"eurosat", "bigearthnet", "so2sat random", "resisc45"}
    assert all(record.protocol.startswith("corley2023: ") and record.notes.startswith("published: ") for record in records)

    def value(dataset, model, bands, size, normalisation):
        wanted = {"bands": bands, "size": size, "normalisation": normalisation}
        found = [
            record
            for record in records
            if (record.dataset, record.model) == (dataset, model)
            and record.protocol == "corley2023: knn-5 raw features"
            and all(record.settings[name] == item for name, item in wanted.items())
        ]
        assert len(found) == 1
        return found[0].value

    # the two gains that the paper's abstract names
    sizes = [value("so2sat random", "ResNet-50 ImageNet", "MSI", size, "standardization") for size in (34, 224)]
    assert sizes[1] - sizes[0] == pytest.approx(0.3228)
    sizes = [value("eurosat", "ResNet-50 ImageNet", "MSI", size, "standardization") for size in (64, 224)]
    assert sizes[1] - sizes[0] == pytest.approx(0.1116)
    assert render(records[:50], tmp_path / "page.html").stat().st_size > 10_000
    with pytest.raises(ValueError, match="no published tables 'corley'; there are corley2023"):
        published_file("corley")


def test_by_the_command_line(data, network, tmp_path, capsys):
    out = str(tmp_path / "s.jsonl")
    asked = ["leaderboard", "study", data, "--imagenet", network, "--out", out, "--sizes", "0", "--seeds", "0"]
    assert main([*asked, "--normalisations", "divide", "--protocol", "knn-5"]) == 0
    assert f"the records are in {out}" in capsys.readouterr().out
    assert main(["leaderboard", "render", out, "--published", "corley2023", "--out", str(tmp_path / "page.html")]) == 0
    printed = capsys.readouterr().out
    assert "image-statistics · rgb · 16 px · divide" in printed and "corley2023: knn-5 raw features" in printed
    assert main([*asked, "--normalisations", "zscore"]) == 1
    refused = capsys.readouterr().err
    assert "unknown normalisation 'zscore'" in refused and "Traceback" not in refused


# -- the example ----------------------------------------------------------------------------------------------------------------


def write_scene(folder, side=256):
    """Two classes in stripes along the diagonal, so both sides of the checkerboard have both; a corner was not measured."""
    import rasterio
    from rasterio.transform import from_origin

    rng = np.random.default_rng(0)
    rows, columns = np.indices((side, side)) // 32
    classes = np.where((rows + columns) % 4 < 2, 1, 5).astype(np.uint8)
    folder.mkdir()
    common = {"driver": "GTiff", "height": side, "width": side, "count": 1, "transform": from_origin(0, 0, 28.5, 28.5)}
    for number in ("10", "20", "30", "40", "50", "70"):
        values = np.clip(rng.normal(np.where(classes == 1, 120, 60), 15), 0, 255).round().astype(np.float32)
        values[:8, :8] = -99999
        with rasterio.open(folder / f"lsat7_2000_{number}.tif", "w", dtype="float32", nodata=-99999, **common) as file:
            file.write(values, 1)
    with rasterio.open(folder / "strata.tif", "w", dtype="uint8", nodata=0, **common) as file:
        file.write(classes, 1)
    return folder


def test_landsat_patches_never_touch_the_other_side(tmp_path):
    import importlib.util

    spec = importlib.util.spec_from_file_location("landsat_study", ROOT / "examples" / "landsat_study.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    numbers, measured, classes = example.read_scene(write_scene(tmp_path / "scene"))
    assert not measured[:8, :8].any() and measured[8:].all() and numbers.dtype == np.uint8
    train, test = example.patches(numbers, measured, classes)
    assert train.classes == test.classes == ("developed", "forest") and train.digest != test.digest
    seen = np.zeros((2, *classes.shape), bool)
    for side, source in enumerate((train, test)):
        for top, left in source.places:
            seen[side, top : top + 16, left : left + 16] = True
            assert measured[top : top + 16, left : left + 16].all()
    assert seen.any((1, 2)).all() and not (seen[0] & seen[1]).any()
    sample = train[0]
    number = {"developed": 1, "forest": 5}[train.classes[sample["label"]]]
    top, left = train.places[0]
    assert (classes[top : top + 16, left : left + 16] == number).mean() >= 0.55
    assert sample["image"].units == "u8" and sample["image"].values.shape == (6, 16, 16)
