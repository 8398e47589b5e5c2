"""The doctor: every kind of wrong input, made for real from one small data set, is found; the right one is not suspected."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from helpers import land_cover
from PIL import Image as Pillow

import okavango as ok
from okavango import cli
from okavango.data import statistics
from okavango.data.sources import Arrays, Part, open_source
from okavango.doctor.check import Report, candidates, preprocess_check, weighed
from okavango.doctor.checks import Finding, better_order, examine, misfit
from okavango.doctor.page import render
from okavango.doctor.seen import chosen, look, places
from okavango.doctor.trials import Candidate, Trial, compare
from okavango.models.backbone import Backbone, FeatureInfo
from okavango.models.band_statistics import STATISTICS
from okavango.models.features import Features
from okavango.models.preprocess import IMAGENET_MEAN, IMAGENET_STD, Image, Normalise, Preprocess, Raster, Resize
from okavango.models.raster import Bands
from okavango.models.sensors import wavelengths

EVIL = "<script>window.hacked=1</script>\"'&"
NET = "elastic_vit_tiny.poa_fashion"
CONTRACT = Preprocess(image=Image(size=(28, 28)))


class View:
    """A source whose pictures are changed by a function of picture and index."""

    def __init__(self, source, change, name=""):
        self.source, self.change, self.name = source, change, name or source.name
        self.classes, self.labels, self.digest = source.classes, source.labels, source.digest

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        sample = self.source[index]
        return {**sample, "image": self.change(sample["image"], index)}


@pytest.fixture(scope="module")
def grey():
    """60 pictures of clothes, grey on black, as the network was trained on."""
    source = open_source("samples/fashion:test")
    return Part(source, chosen(source, 60))


@pytest.fixture(scope="module")
def colour(grey):
    """The same in colours whose statistics are those of ImageNet."""
    cells = torch.stack([grey[i]["image"] for i in range(len(grey))]).float()
    z = (cells - cells.mean()) / cells.std()
    mean, std = (torch.tensor(row).view(3, 1, 1) for row in (IMAGENET_MEAN, IMAGENET_STD))
    pictures = ((mean + std * z) * 255).round().clamp(0, 255).to(torch.uint8)
    return Arrays(pictures.permute(0, 2, 3, 1), grey.labels, classes=grey.classes, name="colour")


def found(source, contract=CONTRACT, **options):
    """What the checks find, by name."""
    (modality,) = contract
    seen = look(source, contract, modality, range(len(source)), **options)
    return {finding.check: finding for finding in examine(seen)}, seen


def mended(source, contract, finding):
    """What is found after a suggestion was followed."""
    (modality,) = contract
    return found(source, contract.replace(modality, **finding.changes), data=finding.data)[0]


# -- pictures ---------------------------------------------------------------------------------------------------------------


def test_right_pictures_give_no_finding(grey, colour):
    assert found(grey)[0] == {} and found(colour)[0] == {}
    report = preprocess_check(NET, "samples/fashion:test", samples=100, say=lambda line: None)
    assert report.findings == () and report.verdict == "nothing looks wrong"
    assert report.suggested == ok.load(NET).preprocess and not report.described


@pytest.mark.parametrize(
    ("check", "severity", "change"),
    [
        ("scale", "wrong", lambda x, i: x.float() / 255),
        ("scale", "wrong", lambda x, i: x // 16),
        ("scale", "wrong", lambda x, i: x.float() * 257),
        ("normalised twice", "wrong", lambda x, i: (x / 255 - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) / 0.225),
        ("channel order", "look", lambda x, i: x.flip(0)),
        ("fit", "look", lambda x, i: (x.float() * 0.12 + 215).to(torch.uint8)),
        ("constant", "wrong", lambda x, i: torch.cat([x[:2], torch.full_like(x[:1], 7)])),
        ("not finite", "wrong", lambda x, i: torch.where(x == x.max(), torch.nan, x.float())),
        ("channels differ", "look", lambda x, i: x[:1] if i % 3 == 0 else x),
    ],
    ids=["0-1 floats", "12 bits", "16 bits", "normalised", "BGR", "washed out", "dead blue", "nan", "some grey"],
)
def test_wrong_pictures_are_found(colour, check, severity, change):
    source = View(colour, change)
    findings, _ = found(source)
    assert findings[check].severity == severity, findings
    assert findings[check].sentence.endswith(".")
    if findings[check].changes:
        after = mended(source, CONTRACT, findings[check])
        assert not {"scale", "normalised twice", "channel order", "fit", "refused"} & set(after), after


def test_scale_names_the_factor_and_carries_the_refusal(colour):
    finding = found(View(colour, lambda x, i: x.float() / 255))[0]["scale"]
    assert finding.evidence["factor"] == 255 and finding.changes == {"scale": pytest.approx(1.0)}
    assert "look scaled or normalised already" in finding.evidence["refused"]
    assert found(View(colour, lambda x, i: x // 16))[0]["scale"].evidence["factor"] == 16
    unscaled = CONTRACT.replace("image", scale=1.0)
    assert found(colour, unscaled)[0]["scale"].changes == {"scale": pytest.approx(1 / 255)}


def test_inverted_pictures_are_suspected_and_with_a_reference_found(grey, colour):
    turned = View(grey, lambda x, i: 255 - x)
    findings, _ = found(turned)
    assert findings["inverted"].severity == "look" and findings["saturated"].severity == "look"
    assert "inverted" not in mended(turned, CONTRACT, findings["inverted"])
    known = statistics.of_source(grey, split="train")
    assert found(turned, reference=known)[0]["inverted"].severity == "wrong"
    assert found(grey, reference=known)[0] == {}
    assert found(grey, reference=statistics.of_source(colour))[0]["fit"].severity == "look"  # grey, where colour is expected
    flipped = found(View(colour, lambda x, i: x.flip(0)), reference=statistics.of_source(colour))[0]
    assert flipped["channel order"].severity == "wrong"


def test_dark_pictures_with_lamps_are_not_taken_for_12_bits(colour):
    def night(x, i):
        x = x // 16
        x[:, 5, 5] = 255
        return x

    assert "scale" not in found(View(colour, night))[0]


def resized(size):
    return lambda x, i: torch.nn.functional.interpolate(x[None].float(), size=size, mode="area")[0].to(torch.uint8)


@pytest.mark.parametrize(
    ("size", "rule", "says", "severity"),
    [
        ((28, 84), Resize(rule="shortest"), "67 % of each picture are cut off", "look"),
        ((28, 84), Resize(rule="exact"), "stretched by 3", "look"),
        ((84, 84), Resize(rule="none"), "leaves the size alone", "look"),
        ((84, 84), Resize(rule="crop"), "only 11 % of them are seen", "look"),
        ((7, 7), Resize(rule="crop"), "94 % of the input are padding", "look"),
        ((84, 84), Resize(antialias=False), "shrink 3 times without a low-pass filter", "look"),
        ((280, 280), Resize(), "details of less than 10 pixels vanish", "look"),
        ((7, 7), Resize(), "enlarged 4 times, as they should be", "ok"),
        ((28, 32), Resize(), None, None),
        ((84, 84), Resize(), None, None),
    ],
)
def test_sizes_that_lose_something_are_told(colour, size, rule, says, severity):
    contract = CONTRACT.replace("image", resize=rule)
    source = View(Part(colour, range(20)), resized(size))
    findings, _ = found(source, contract)
    if says is None:
        assert "size" not in findings
        return
    assert says in findings["size"].sentence and findings["size"].severity == severity
    if findings["size"].changes and size != (28, 84):
        assert mended(source, contract, findings["size"]).get("size", Finding("", "ok", "")).severity == "ok"


def test_padding_is_not_taken_for_values(colour):
    contract = CONTRACT.replace("image", size=(224, 224), resize=Resize(rule="crop"))
    assert set(found(Part(colour, range(20)), contract)[0]) == {"size"}


def test_torn_files_are_counted(tmp_path):
    for name in "abc":
        Pillow.fromarray(np.random.default_rng(0).integers(0, 200, (28, 28, 3), np.uint8)).save(tmp_path / f"{name}.png")
    (tmp_path / "torn.png").write_bytes((tmp_path / "a.png").read_bytes()[:200])
    findings = found(open_source(tmp_path))[0]
    assert findings["unreadable"].severity == "wrong" and "1 of 4 samples" in findings["unreadable"].sentence
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "torn.png").write_bytes(b"no")
    with pytest.raises(ValueError, match="none of the samples could be read"):
        found(open_source(tmp_path / "only"))


# -- rasters ----------------------------------------------------------------------------------------------------------------

EUROSAT = STATISTICS["eurosat"]
S2 = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B10", "B11", "B12")
SPEC = Raster(
    channels=S2,
    sensor="sentinel-2",
    level="L1C",
    units="reflectance",
    scale=(1e-4,),
    resolution=10.0,
    size=(16, 16),
    resize=Resize(rule="exact", interpolation="bilinear"),
    normalise=EUROSAT.standard(S2, 1e-4),
)
LAND = Preprocess(image=SPEC)
SAID = {"channels": S2, "sensor": "sentinel-2", "level": "L1C", "units": "dn", "baseline": "02.08", "resolution": 10.0}


class Land:
    """Made-up tiles whose bands have the statistics of EuroSAT; `change` works on the numbers, `said` on the description.

    The three classes differ in what covers the ground, so bands correlate as real ones do.
    """

    name, classes, digest = "land", ("field", "wood", "town"), "0" * 64

    def __init__(self, change=lambda values: values, count=12, statistics=EUROSAT, **said):
        self.change, self.statistics, self.said = change, statistics, {**SAID, **said}
        self.labels = np.arange(count) % 3
        self.bands = tuple(self.said.pop("stored", S2))
        self.moments = [np.array(statistics.of(name, self.bands))[:, None, None] for name in ("mean", "std")]
        self.centres = [centre or 0.0 for centre in wavelengths(statistics.sensor, self.bands)]
        covers = np.concatenate([self.cover(np.random.default_rng(label), label, 2000) for label in range(3)])
        self.plain = covers.mean(0), covers.std(0)

    def cover(self, rng, label, count):
        """Cells (count, C) of one class: soil and plants, plants, roofs."""
        if self.statistics.sensor == "sentinel-1":
            return rng.normal(size=(count, 1)) + 0.5 * rng.normal(size=(count, len(self.bands)))
        return land_cover(self.centres, rng, count, ((2, 1, 0.2, 0.3), (0.3, 3, 0.3, 0.1), (0.6, 0.5, 0.3, 3))[label])

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        mean, std = self.moments
        cover = self.cover(np.random.default_rng([7, index]), index % 3, 256)
        values = mean + std * ((cover - self.plain[0]) / self.plain[1]).T.reshape(-1, 16, 16)
        if self.statistics is EUROSAT:
            values = values.clip(1, 28000).round()
        return {"image": Bands(values=self.change(values), **self.said), "label": int(self.labels[index]), "id": f"tile {index}"}


def as_uint16(values):
    return values.astype(np.uint16)


def test_right_rasters_give_no_finding_in_any_order():
    assert found(Land(as_uint16), LAND)[0] == {}
    reversed_names = S2[::-1]
    assert found(Land(lambda v: as_uint16(v[::-1]), channels=reversed_names), LAND)[0] == {}
    assert found(Land(lambda v: as_uint16(v + 1000), baseline="04.00"), LAND)[0] == {}
    assert found(Land(lambda v: (v / 1e4).astype(np.float32), units="reflectance"), LAND)[0] == {}


def holes(values, mark, dtype):
    values[:, :4, :4] = mark
    return values.astype(dtype)


FILE_ORDER = (*S2[:8], "B09", "B10", "B11", "B12", "B8A")
NAMELESS = {"channels": tuple(map(str, range(1, 14))), "sensor": "", "level": "", "units": "", "baseline": ""}
SWAPPED = (S2[0], S2[3], S2[2], S2[1], *S2[4:])


@pytest.mark.parametrize(
    ("check", "severity", "source", "description"),
    [
        ("units", "wrong", Land(lambda v: (v / 1e4).astype(np.float32)), {"units": "reflectance"}),
        ("units", "wrong", Land(as_uint16, units="reflectance"), {"units": "dn"}),
        ("units", "wrong", Land(as_uint16, units=""), {"units": "dn"}),
        ("scale", "wrong", Land(lambda v: v / 100, units="dn"), {"scale": (100.0,)}),
        ("offset", "wrong", Land(lambda v: as_uint16(v + 1000)), {"baseline": "04.00"}),
        ("offset", "wrong", Land(lambda v: as_uint16(v + 1000), baseline=""), {"baseline": "04.00"}),
        ("offset", "wrong", Land(lambda v: (v / 1e4 + 0.1).astype(np.float32), units="reflectance"), {"offset": (-0.1,)}),
        ("offset", "wrong", Land(as_uint16, baseline=""), {"baseline": "harmonised"}),
        ("offset", "wrong", Land(as_uint16, baseline="05.09"), {"baseline": "harmonised"}),
        ("names", "wrong", Land(as_uint16, **NAMELESS), {"channels": S2, "units": "dn", "sensor": "sentinel-2"}),
        ("names", "wrong", Land(as_uint16, stored=FILE_ORDER, **NAMELESS), {"channels": FILE_ORDER, "units": "dn"}),
        ("nodata", "wrong", Land(lambda v: holes(v, -9999, np.int16)), {"nodata": -9999}),
        ("nodata", "wrong", Land(lambda v: holes(v, 65535, np.uint16)), {"nodata": 65535}),
        ("empty", "look", Land(lambda v: holes(v, 0, np.uint16)), {"nodata": 0.0}),
        ("channel order", "wrong", Land(as_uint16, stored=FILE_ORDER), {"channels": FILE_ORDER}),
        ("channel order", "wrong", Land(as_uint16, channels=S2[::-1]), {"channels": S2}),
        ("channel order", "wrong", Land(as_uint16, channels=(*S2[1:], S2[0])), {"channels": S2}),
        ("channel order", "look", Land(as_uint16, channels=SWAPPED), {"channels": S2}),
        ("normalised twice", "wrong", Land(lambda v: (v - v.mean((1, 2), keepdims=True)) / v.std((1, 2), keepdims=True)), {}),
        ("resolution", "look", Land(as_uint16, resolution=30.0), {}),
        ("constant", "wrong", Land(lambda v: as_uint16(np.where(np.arange(13)[:, None, None] == 4, 900, v))), {}),
        ("refused", "wrong", Land(lambda v: as_uint16(v[:12]), channels=S2[:12]), {}),
        ("refused", "wrong", Land(as_uint16, level="L2A", channels=tuple(n for n in S2 if n != "B10"), stored=S2[:12]), {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_rasters_are_found(check, severity, source, description):
    findings, _ = found(source, LAND)
    assert findings[check].severity == severity, findings
    assert description.items() <= findings[check].data.items(), findings
    if description:
        left = mended(source, LAND, findings[check])
        assert check not in left and not [each for each in left.values() if each.severity == "wrong"], left


def test_a_folder_of_unnamed_files_is_recognised_by_a_published_contract(tmp_path, capsys):
    import rasterio

    land = Land(as_uint16, stored=FILE_ORDER)  # as EuroSAT lies, whose statistics are not those of SSL4EO
    for index in range(len(land)):
        sample = land[index]
        (tmp_path / land.classes[sample["label"]]).mkdir(exist_ok=True)
        file, profile = (
            tmp_path / land.classes[sample["label"]] / f"{index}.tif",
            dict(driver="GTiff", height=16, width=16, transform=rasterio.Affine(10, 0, 0, 0, -10, 0)),
        )
        with rasterio.open(file, "w", count=13, dtype="uint16", **profile) as dataset:
            dataset.write(sample["image"].values)
    line = ["preprocess", "check", "--checkpoint", "ssl4eo_s12_s2", "--data", str(tmp_path)]
    assert cli.main(line) == 1
    printed = capsys.readouterr().out
    said = json.loads(next(text for text in printed.splitlines() if "bands.json" in text and "{" in text).partition(": ")[2])
    assert said["channels"] == list(FILE_ORDER) and (said["sensor"], said["level"], said["units"]) == ("sentinel-2", "L1C", "dn")
    (tmp_path / "bands.json").write_text(json.dumps(said))
    assert cli.main(line) == 0
    assert "nothing looks wrong" in capsys.readouterr().out


def test_decibels_and_linear_backscatter_are_told_apart():
    table = STATISTICS["ssl4eo_s12_s1"]
    rule = table.standard(("VV", "VH"))
    radar = LAND.replace("image", channels=("VV", "VH"), sensor="sentinel-1", level="GRD", units="db", scale=(1.0,), normalise=rule)
    said = {"stored": ("VV", "VH"), "channels": ("VV", "VH"), "sensor": "sentinel-1", "level": "GRD", "statistics": table}
    for stored_as, change in (("db", lambda v: v), ("linear", lambda v: 10 ** (v / 10))):
        assert found(Land(change, units=stored_as, **said), radar)[0] == {}
        other = "linear" if stored_as == "db" else "db"
        finding = found(Land(change, units=other, **said), radar)[0]["units"]
        assert finding.severity == "wrong" and finding.data["units"] == stored_as


def test_the_other_processing_level_is_suspected():
    bands = tuple(name for name in S2 if name != "B10")
    contract = LAND.replace("image", channels=bands, level="L2A", normalise=Normalise())
    below, above = (STATISTICS[f"ssl4eo_s12_{name}_50k"] for name in ("l2a", "l1c"))
    said = {"channels": bands, "stored": bands, "level": "L2A"}
    clip = lambda v: v.clip(1).round().astype(np.uint16)  # noqa: E731
    assert "level" not in found(Land(clip, statistics=below, **said), contract)[0]
    assert "more like Sentinel-2's L1C" in found(Land(clip, statistics=EUROSAT, **said), contract)[0]["level"].sentence
    assert found(Land(clip, statistics=above, **{**said, "level": "L1C"}), contract.replace("image", level="L1C"))[0] == {}


def test_bands_of_other_contracts_are_put_in_order_too():
    """Contracts that normalise nothing, and pictures from an aeroplane; the sentence says what to do."""
    below = STATISTICS["bigearthnet"]
    bands = tuple(name for name in S2 if name != "B10")
    contract = LAND.replace("image", channels=bands, level="L2A", normalise=Normalise())
    said = {"stored": bands, "level": "L2A", "statistics": below}
    clip = lambda v: v.clip(1).round().astype(np.uint16)  # noqa: E731
    assert "channel order" not in found(Land(clip, channels=bands, **said), contract)[0]
    shifted = (*bands[1:], bands[0])
    finding = found(Land(clip, channels=shifted, **said), contract)[0]["channel order"]
    assert finding.severity == "wrong" and finding.data["channels"] == bands and "shifted by one" in finding.sentence
    assert json.dumps(list(bands)) in finding.sentence

    camera = ("red", "green", "blue", "nir")
    flown = Preprocess(image=Raster(channels=camera, sensor="naip", units="u8", size=(16, 16)))
    said = {"sensor": "naip", "level": "", "units": "u8", "baseline": "", "statistics": STATISTICS["clay_naip"], "stored": camera}
    eight = lambda v: v.clip(0, 255).round().astype(np.uint8)  # noqa: E731
    assert "channel order" not in found(Land(eight, channels=camera, **said), flown)[0]
    finding = found(Land(eight, channels=("green", "blue", "nir", "red"), **said), flown)[0]["channel order"]
    assert finding.severity == "wrong"


def test_rasters_under_a_contract_for_pictures_are_named_and_put_in_order():
    """Eight-bit bands of which a network of pictures takes three: all bands of the file tell the order, not only those three."""
    rule = Normalise(rule="standard", mean=IMAGENET_MEAN, std=IMAGENET_STD)
    pictures = Preprocess(image=Image(channels=("red", "green", "blue"), size=(32, 32), scale=1 / 255, normalise=rule))
    bands = ("B1", "B2", "B3", "B4", "B5", "B7")
    rng = np.random.default_rng(0)
    covers = land_cover([centre or 0.0 for centre in wavelengths("landsat-7", bands)], rng, 4000)
    mean, std = np.array([81, 67, 67, 69, 90, 59]), np.array([15, 17, 24, 15, 25, 23])  # of a scene in North Carolina
    cells = (mean + std * (covers - covers.mean(0)) / covers.std(0)).clip(1, 255).astype(np.uint8)
    tiles = cells[: 15 * 256].reshape(15, 16, 16, 6).transpose(0, 3, 1, 2)

    class Tiles:
        name, classes, digest, labels = "tiles", (), "0" * 64, None

        def __init__(self, called):
            self.called = called

        def __len__(self):
            return len(tiles)

        def __getitem__(self, index):
            return {"image": Bands(values=tiles[index], channels=self.called, sensor="landsat-7", level="L1", units="u8")}

    report = ok.preprocess_check(pictures, Tiles(bands), say=lambda text: None)
    assert report.steps[1] == "channels: red, green, blue are B3, B2, B1"
    assert places(report.seen) == [2, 1, 0] and "channel order" not in {finding.check for finding in report.findings}
    report = ok.preprocess_check(pictures, Tiles(bands[::-1]), say=lambda text: None)
    finding = next(finding for finding in report.findings if finding.check == "channel order")
    assert finding.severity == "wrong" and finding.data == {"channels": bands} and "the reverse" in finding.sentence


# -- numbers ----------------------------------------------------------------------------------------------------------------


def test_only_channels_that_gain_by_it_change_places():
    mean, std = np.array([1.0, 5.0, 5.1, 9.0]), np.ones(4)
    order, gain = better_order(mean[[3, 1, 2, 0]], std, mean, std, 1.0)
    assert order == [3, 1, 2, 0] and gain == pytest.approx(2 * 64)
    assert better_order(mean[[0, 2, 1, 3]], std, mean, std, 1.0) == ([0, 1, 2, 3], 0.0)  # a gain of 0.02 is none
    assert better_order(mean, std, mean, std, 1.0) == ([0, 1, 2, 3], 0.0)
    rotated = better_order(mean[[1, 3, 0, 2]], std, mean, std, 1.0)[0]
    assert [mean[[1, 3, 0, 2]][k] for k in rotated] == mean.tolist()


def test_misfit_counts_shifts_and_ratios():
    expected = np.zeros(2), np.ones(2)
    assert misfit(np.zeros(2), np.ones(2), expected) == 0
    assert misfit(np.array([2.0, 0.0]), np.array([1.0, np.e]), expected) == pytest.approx((4 + 1) / 2)
    assert np.isfinite(misfit(np.zeros(2), np.zeros(2), expected))


# -- what a change is worth -------------------------------------------------------------------------------------------------


def test_trials_are_paired_and_leave_the_sample_itself_out(grey):
    model, every = ok.load(NET), list(range(len(grey)))
    standing = Candidate("as it stands", model.preprocess, {})
    again = Candidate("again", model.preprocess, {}, "x")
    blind = Candidate("all black", model.preprocess.replace("image", scale=0.0), {}, "y")
    refused = Candidate("too small", model.preprocess.replace("image", size=(3, 3)), {}, "z")
    trials = compare(model, "image", grey, every, [standing, again, blind, refused], batch=50)
    assert trials[0].difference is None and trials[0].samples == 60 and trials[0].accuracy > 0.4
    assert trials[1].difference == (0.0, 0.0, 0.0) and not trials[1].better and not trials[1].worse
    assert trials[2].worse and trials[2].accuracy < 0.2  # a picture that found itself would be right
    assert trials[3].accuracy is None and trials[3].refused
    assert not model.training and model.preprocess == ok.load(NET).preprocess


class Bright(Backbone):
    """A network that tells which share of each of four bands lies above 0."""

    architecture, arguments, preprocess = "bright", {}, LAND
    feature_info = FeatureInfo(channels=4, layers=0, layer_channels=(), strides=())

    def forward(self, inputs, **controls):
        return Features(pooled=(inputs["image"][:, :4] > 0).float().mean((2, 3)))


def test_what_rasters_should_say_of_themselves_is_measured_too():
    quiet = {"say": lambda line: None}
    report = preprocess_check(Bright(), Land(lambda v: as_uint16(v + 1000), count=60), **quiet)
    standing, mended = report.trials
    assert [each.check for each in report.trials] == ["", "offset"] and report.findings[0].severity == "wrong"
    assert mended.better and mended.accuracy > 0.8 > standing.accuracy  # the offset lifts all of these bands above 0
    assert report.described == {"baseline": "04.00"} and report.suggested == LAND
    refused = preprocess_check(Bright(), Land(as_uint16, count=60, baseline=""), **quiet).trials
    assert refused[0].accuracy is None and "baseline" in refused[0].refused and refused[1].accuracy == mended.accuracy


def test_findings_are_weighed_by_what_was_measured():
    findings = [Finding(name, "look", f"{name}.", change="x") for name in ("helps", "hurts", "nothing")]
    findings.append(Finding("sure", "wrong", "sure.", change="x"))
    trials = [
        Trial("as it stands", accuracy=0.5, interval=(0.4, 0.6), samples=100),
        *(
            Trial("x", name, 0.6, (0.5, 0.7), difference, 100)
            for name, difference in (
                ("helps", (0.1, 0.05, 0.15)),
                ("hurts", (-0.1, -0.15, -0.05)),
                ("nothing", (0.01, -0.02, 0.04)),
                ("sure", (-0.1, -0.15, -0.05)),
            )
        ),
        Trial("at native size, 64x64", "", 0.7, (0.6, 0.8), (0.2, 0.1, 0.3), 100),
    ]
    severities = {finding.check: finding.severity for finding in weighed(findings, trials)}
    assert severities == {"helps": "wrong", "hurts": "ok", "nothing": "look", "sure": "look", "compared": "look"}


def test_all_suggestions_and_comparisons_are_tried(colour):
    def twice_wrong(x, i):
        return torch.cat([x.flip(0), torch.zeros_like(x)], 2)[:, :, :56] // 16

    seen = look(View(colour, twice_wrong), CONTRACT, "image", range(40))
    findings = examine(seen)
    assert {finding.check for finding in findings} == {"scale", "size"}
    assert [each.check for each in candidates(seen, findings)] == ["", "scale", "size"]
    seen = look(View(colour, resized((56, 56))), CONTRACT, "image", range(40))
    names = [each.name for each in candidates(seen, examine(seen))]
    assert names == ["as it stands", "standardised by their own statistics", "at native size, 56x56"]


# -- the whole --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory, grey):
    """Pictures of clothes, inverted, in a folder per class, one of which has a hostile name."""
    root = tmp_path_factory.mktemp("pictures") / "turned"
    for index in range(len(grey)):
        sample = grey[index]
        place = root / ("&<b>" if sample["label"] == 0 else str(sample["label"]))
        place.mkdir(parents=True, exist_ok=True)
        Pillow.fromarray(255 - sample["image"][0].numpy()).save(place / f"{index}.png")
    return root


def test_the_command_tells_writes_and_fails_when_something_is_wrong(folder, grey, tmp_path, capsys):
    reference, before = tmp_path / "train.json", sorted((path, path.read_bytes()) for path in folder.rglob("*.png"))
    statistics.save(statistics.of_source(grey, split="train"), reference)
    out, suggested = tmp_path / "report", tmp_path / "suggested.json"
    line = ["preprocess", "check", "--checkpoint", NET, "--data", str(folder), "--samples", "60"]
    assert cli.main([*line, "--out", str(out), "--reference", str(reference), "--suggestion", str(suggested)]) == 1
    printed = capsys.readouterr()
    assert printed.err == f"okavango: {folder}: 1 wrong (inverted), see above\n"
    assert "channels: grey is repeated as red, green, blue" in printed.out and "as it stands" in printed.out
    report = json.loads((out / "report.json").read_text())
    assert [trial["name"] for trial in report["trials"]][:2] == ["as it stands", "inverted, 255 - value"]
    assert {finding["check"] for finding in report["findings"]} == {"inverted", "saturated"}
    assert report["statistics"]["stored"]["samples"] == 60
    contract = Preprocess.from_json(json.loads(suggested.read_text()))
    picture = np.asarray(Pillow.open(next(folder.rglob("*.png"))))
    turned, right = contract(image=picture)["image"], ok.load(NET).preprocess(image=255 - picture)["image"]
    torch.testing.assert_close(turned, right, atol=1e-5, rtol=0)
    assert sorted((path, path.read_bytes()) for path in folder.rglob("*.png")) == before
    assert cli.main(["preprocess", "check", "--checkpoint", NET, "--data", "samples/fashion:test", "--samples", "60"]) == 0
    assert "nothing looks wrong" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere"], "no such folder"),
        (["--data", "samples/fashion", "--samples", "0"], "--samples 0: expected at least 1"),
        (["--data", "samples/fashion", "--reference", "nothing.json"], "nothing.json: No such file"),
    ],
)
def test_mistakes_of_users_are_one_line(arguments, message, capsys):
    assert cli.main(["preprocess", "check", "--checkpoint", NET, *arguments]) == 1
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_what_cannot_be_measured_is_said(grey, tmp_path):
    quiet = {"say": lambda line: None}
    assert "no network" in preprocess_check(CONTRACT, grey, **quiet).unmeasured
    unlabelled = Arrays(np.stack([grey[i]["image"][0] for i in range(12)]))
    assert "no labels" in preprocess_check(ok.load(NET), unlabelled, **quiet).unmeasured
    with pytest.raises(ValueError, match="a reference is for pictures"):
        preprocess_check(LAND, Land(), reference=statistics.of_source(grey), **quiet)
    with pytest.raises(ValueError, match="the reference has 13 channels, the contract 3"):
        preprocess_check(CONTRACT, grey, reference=statistics.of_source(Land()), **quiet)
    with pytest.raises(ValueError, match="the reference is of .* itself"):
        preprocess_check(CONTRACT, grey, reference=statistics.of_source(grey), **quiet)
    report = preprocess_check(LAND, Land(as_uint16, units=""), out=tmp_path, **quiet)
    assert report.described == {"units": "dn", "scale": (1.0,), "offset": (0.0,)} and "refused" in str(report)


def page_of(report: Report, path) -> str:
    return render(report, path / "index.html").as_uri()


def test_the_page_opens_and_fits(browser, folder, tmp_path):
    report = preprocess_check(NET, View(open_source(folder), lambda x, i: x, name=EVIL), samples=60, say=lambda line: None)
    first, second = render(report, tmp_path / "a.html"), render(report, tmp_path / "b.html")
    assert first.read_bytes() == second.read_bytes()
    for url in (first.as_uri(), page_of(preprocess_check(LAND, Land(as_uint16), say=lambda line: None), tmp_path)):
        for width in (420, 1400):
            browser.set_window_size(width, 1000)
            browser.get(url)
            script = "return [document.documentElement.scrollWidth, innerWidth, window.hacked, document.images.length]"
            scroll, inner, hacked, images = browser.execute_script(script)
            assert scroll <= inner and not hacked and images >= 12
            assert browser.execute_script("return [...document.images].every(i => i.complete && i.naturalWidth > 0)")
    assert len(browser.find_elements("css selector", ".channel")) == 13
    assert len(browser.find_elements("css selector", ".channel polygon")) == 26
    browser.get(first.as_uri())
    assert EVIL in browser.find_element("tag name", "h1").text
    assert len(browser.find_elements("css selector", ".finding")) == len(report.findings) >= 1
    assert len(browser.find_elements("css selector", "tr.even, tr.better, tr.worse")) == len(report.trials)
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
