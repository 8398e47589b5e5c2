"""Rasters are reconciled with a checkpoint by name, or refused: properties, every refusal, and the mistakes that are known."""

from __future__ import annotations

import dataclasses
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Picture

from okavango.models.backbone import create_model
from okavango.models.band_statistics import STATISTICS, BandStatistics, statistics
from okavango.models.channels import ChannelError, adapt_channels, adapt_filters
from okavango.models.expectations import (
    BESIDES,
    CHECKPOINTS,
    RGB,
    S2,
    S2_L2A,
    S2_RGB,
    STUDY_DATASETS,
    checkpoint,
    csmask,
    imagenet,
    study,
    study_recipe,
)
from okavango.models.preprocess import IMAGENET_MEAN, IMAGENET_STD, Image, Normalise, Preprocess, PreprocessError, Raster, Resize
from okavango.models.raster import SWITCHES, Bands, Plan, apply_raster, as_expected, plan
from okavango.models.sensors import (
    LANDSAT_8,
    SENSORS,
    baseline_offset,
    find_band,
    find_level,
    find_sensor,
    landsat_scaling,
    scaling,
    wavelengths,
)
from okavango.zoo.checkpoint import load_checkpoint, save_checkpoint

torch.set_num_threads(1)

# typical Sentinel-2 numbers; cirrus is dark
LEVELS = dict(zip(S2, (1400, 1100, 1000, 900, 1200, 2000, 2400, 2300, 2600, 700, 12, 1800, 1100), strict=True))
NONE = Resize(rule="none")


def numbers(channels=S2, height=9, width=11, batch=(), seed=0) -> np.ndarray:
    """uint16 numbers that look like those of the named Sentinel-2 bands."""
    rng = np.random.default_rng(seed)
    levels = np.array([LEVELS[name] for name in channels], float).reshape(-1, 1, 1)
    return (levels * rng.uniform(0.5, 1.5, (*batch, len(channels), height, width))).astype(np.uint16)


def bands(values=None, channels=S2, **fields) -> Bands:
    """Described Sentinel-2 numbers from before baseline 04.00."""
    values = numbers(channels) if values is None else values
    said = {"sensor": "sentinel-2", "level": "L1C", "units": "dn", "baseline": "02.08"}
    return Bands(values=values, channels=channels, **{**said, **fields})


def spec(channels=S2_RGB, **fields) -> Raster:
    said = {"sensor": "sentinel-2", "level": "L1C", "units": "reflectance", "scale": (1e-4,), "size": (9, 11), "resize": NONE}
    return Raster(channels=channels, **{**said, **fields})


def run(contract: Raster, data, allow=None) -> torch.Tensor:
    return Preprocess(image=contract)(image=data, allow=allow)["image"]


rules = st.sampled_from(
    [
        Normalise(),
        Normalise(rule="standard", mean=(0.1, 0.2, 0.3), std=(0.05, 0.06, 0.07)),
        Normalise(rule="minmax", low=(0.0, 0.0, 0.0), high=(0.3, 0.4, 0.5)),
        Normalise(rule="stretch", low=(0.05,) * 3, high=(0.3,) * 3, mean=IMAGENET_MEAN, std=IMAGENET_STD, quantise=256),
        Normalise(rule="percentile", percentiles=(2, 98)),
        Normalise(rule="zscore"),
        Normalise(rule="deviations"),
        Normalise(rule="none", clip=(0.0, 0.2)),
    ]
)
resizes = st.builds(
    Resize,
    rule=st.sampled_from(["exact", "shortest", "pad", "crop", "short_side", "none"]),
    interpolation=st.sampled_from(["bilinear", "bicubic", "nearest"]),
    antialias=st.booleans(),
    corners=st.sampled_from(["half_pixel", "aligned"]),
    on=st.sampled_from(["native", "normalised"]),
)
sides = st.integers(1, 24)
specs = st.builds(lambda rule, resize, h, w: spec(normalise=rule, resize=resize, size=(h, w)), rules, resizes, sides, sides)
seeds = st.integers(0, 999)


# -- properties -------------------------------------------------------------------------------------------------------------


@given(specs, st.permutations(range(13)), seeds)
@settings(deadline=None, max_examples=20)
def test_the_order_of_the_bands_in_the_data_never_matters(contract, order, seed):
    values = numbers(seed=seed)
    shuffled = bands(values[list(order)], tuple(S2[index] for index in order))
    assert torch.equal(run(contract, bands(values)), run(contract, shuffled))


@given(specs, st.permutations(range(13)), seeds)
@settings(deadline=None, max_examples=20)
def test_numbers_reflectances_and_shifted_numbers_are_one_scene(contract, order, seed):
    values = numbers(seed=seed)
    first = run(contract, bands(values))
    scaled = np.array([2e-4 if index % 2 else 1e-4 for index in range(13)])
    same = [
        bands(values + 1000, baseline="05.10"),
        bands(values / 1e4, units="reflectance", baseline=""),
        bands(values.astype(np.float32), units="reflectance", scale=1e-4, baseline=""),
        bands(values + 1000, units="reflectance", scale=1e-4, offset=-0.1, baseline="05.10"),
        bands((values / 1e4) / scaled[:, None, None], units="reflectance", scale=tuple(scaled), baseline=""),
        bands(values[list(order)].astype(np.int32), tuple(S2[index].lower() for index in order), baseline="harmonised"),
    ]
    level = 1.01 / 255 / min(IMAGENET_STD) if contract.normalise.quantise else 2e-4  # rounding may fall to the next level
    for other in same:
        assert (run(contract, other) - first).abs().max() <= level


@given(specs, seeds, st.integers(1, 4))
@settings(deadline=None, max_examples=20)
def test_a_batch_a_list_and_single_samples_agree(contract, seed, count):
    values = numbers(batch=(count,), seed=seed)
    batch = run(contract, bands(values))
    assert torch.equal(batch, run(contract, [bands(sample) for sample in values]))
    alone = torch.cat([run(contract, bands(sample)) for sample in values])
    assert torch.allclose(batch, alone, rtol=1e-5, atol=1e-5)  # torch's kernels for few planes round otherwise
    assert torch.equal(batch, run(contract, [bands(torch.from_numpy(sample)) for sample in values]))
    assert batch.dtype == torch.float32 and batch.is_contiguous()


@given(specs, seeds)
@settings(deadline=None, max_examples=20)
def test_a_stored_contract_gives_identical_tensors(contract, seed):
    preprocess = Preprocess(image=contract)
    read = [Preprocess.from_json(preprocess.to_json()), pickle.loads(pickle.dumps(preprocess))]
    data = bands(numbers(seed=seed))
    assert all(each == preprocess for each in read)
    assert all(torch.equal(each(image=data)["image"], preprocess(image=data)["image"]) for each in read)
    assert pickle.loads(pickle.dumps(plan(contract, data))) == plan(contract, data)


@given(specs, st.sampled_from(["uint16", "int16", "int32", "float32", "float64", ">u2"]), st.booleans())
@settings(deadline=None, max_examples=20)
def test_the_callers_values_stay(contract, dtype, as_tensor):
    values = numbers().astype(dtype)
    values[3, 2:4] = 0
    given_values = torch.from_numpy(values.astype(values.dtype.newbyteorder("="))) if as_tensor else values
    before = values.copy()
    mask = np.ones(values.shape[-2:], bool)
    mask[0] = False
    run(contract, bands(given_values, nodata=0, mask=mask))
    assert np.array_equal(before, np.asarray(given_values)) and mask[1:].all() and not mask[0].any()


@given(specs, seeds, st.sampled_from([1e9, -9999.0, float("nan"), float("inf")]))
@settings(deadline=None, max_examples=30)
def test_what_was_not_measured_never_leaks(contract, seed, filler):
    rng = np.random.default_rng(seed)
    values = numbers(seed=seed).astype(np.float64)
    holes = rng.random(values.shape[-2:]) < 0.3
    dirty = np.where(holes, filler, values)
    contract = dataclasses.replace(contract, nodata_fill=-7.0)
    masked = run(contract, bands(values, mask=~holes))
    assert torch.equal(masked, run(contract, bands(dirty, mask=~holes)))
    assert torch.equal(masked, run(contract, bands(dirty, nodata=filler)))
    if contract.resize.rule == "none":
        assert torch.equal(masked[0, 0] == -7, torch.from_numpy(holes))


def test_cells_that_were_not_measured_are_filled_before_and_after_a_resize():
    values = np.full((1, 4, 4), 2000, np.uint16)
    values[0, :2, :2] = 0
    out = run(spec(("B04",), resize=Resize(rule="exact", interpolation="bilinear"), size=(8, 8)), bands(values, ("B04",), nodata=0))
    expected = torch.full((8, 8), 0.2)
    expected[:4, :4] = 0.0
    assert torch.allclose(out[0, 0], expected)


def test_samples_whose_bands_were_all_missed():
    for rule in (Normalise(), Normalise(rule="zscore"), Normalise(rule="percentile"), Normalise(rule="deviations")):
        out = run(spec(normalise=rule, nodata_fill=3.0), bands(np.zeros((13, 9, 11), np.uint16), nodata=0))
        assert torch.equal(out, torch.full((1, 3, 9, 11), 3.0))


def test_statistics_of_a_sample_leave_out_what_was_not_measured():
    values = numbers()
    holes = np.random.default_rng(1).random((9, 11)) < 0.4
    red = values[3][~holes].astype(np.float64) / 1e4
    ours = run(spec(("B04",), normalise=Normalise(rule="zscore")), bands(values, mask=~holes))[0, 0][torch.from_numpy(~holes)]
    assert np.allclose(ours, (red - red.mean()) / red.std(), atol=1e-4)
    rule = Normalise(rule="percentile", percentiles=(10, 90))
    ours = run(spec(("B04",), normalise=rule), bands(values, mask=~holes))[0, 0][torch.from_numpy(~holes)]
    low, high = np.percentile(red, [10, 90])
    assert np.allclose(ours, ((red - low) / (high - low)).clip(0, 1), atol=1e-4)


def test_deviations_against_numpy_one_by_one_and_over_the_batch():
    values = numbers(batch=(2,)) / 1e4
    data = bands(values, units="reflectance")
    for whole in (False, True):
        rule = Normalise(rule="deviations", batch_dependent=whole)
        picked = values[:, [3, 2, 1]]
        axes = (0, 2, 3) if whole else (2, 3)
        mean, std = (f(picked, axes, keepdims=True) for f in (np.mean, np.std))
        expected = ((picked - mean + 2 * std) / (4 * std)).clip(0, 1)
        assert np.allclose(run(spec(normalise=rule), data), expected, atol=1e-5)
    mixed = [bands(values[0], units="reflectance"), bands(values[1, :, :4], units="reflectance")]
    with pytest.raises(PreprocessError, match="statistics of the batch need samples of one size"):
        run(spec(normalise=rule), mixed)


@given(st.integers(5, 40), st.integers(5, 40), st.integers(4, 40), st.integers(4, 40))
@settings(deadline=None, max_examples=15)
def test_against_plain_torch(height, width, rows, columns):
    values = numbers(height=height, width=width)
    rule = Normalise(rule="standard", mean=(0.1, 0.2, 0.3), std=(0.05, 0.06, 0.07))
    x = torch.from_numpy(values[[3, 2, 1]] / 1e4).float()[None]
    mean, std = (torch.tensor(n)[:, None, None] for n in (rule.mean, rule.std))
    for on in ("native", "normalised"):
        resize = Resize(rule="exact", interpolation="bilinear", on=on)
        out = run(spec(normalise=rule, resize=resize, size=(rows, columns)), bands(values))
        expected = (F.interpolate(x, (rows, columns), mode="bilinear", antialias=True) - mean) / std
        assert torch.allclose(out, expected, atol=1e-4)


def test_short_side_lets_the_other_side_follow():
    resize = Resize(rule="short_side", interpolation="bilinear", corners="aligned", antialias=False)
    assert run(spec(resize=resize, size=(18, 18)), bands()).shape[-2:] == (18, 22)
    assert run(spec(resize=resize, size=(20, 20)), bands(numbers(height=11, width=9))).shape[-2:] == (24, 20)


# -- units ------------------------------------------------------------------------------------------------------------------


@given(st.integers(0, 99))
@settings(deadline=None, max_examples=20)
def test_linear_and_decibels(seed):
    linear = np.random.default_rng(seed).uniform(1e-3, 0.5, (2, 6, 6))
    contract = dataclasses.replace(checkpoint("ssl4eo_s12_s1").array(), resize=NONE, size=(6, 6))
    said = {"channels": ("VH", "VV"), "sensor": "sentinel-1", "level": "GRD"}
    first = run(contract, Bands(values=linear, units="linear", **said))
    assert torch.allclose(first, run(contract, Bands(values=10 * np.log10(linear), units="db", **said)), atol=1e-4)
    assert torch.allclose(first[0, 0], torch.from_numpy((10 * np.log10(linear[1]) + 12.59) / 5.26).float(), atol=1e-4)
    back = dataclasses.replace(contract, units="linear", normalise=Normalise())
    assert torch.allclose(
        run(back, Bands(values=10 * np.log10(linear), units="db", **said))[0, 1].double(), torch.from_numpy(linear[0])
    )


def test_no_power_is_no_measurement():
    linear = np.full((1, 4, 4), 0.1)
    linear[0, 0] = 0
    contract = Raster(channels=("VV",), sensor="sentinel-1", units="db", size=(4, 4), resize=NONE, nodata_fill=5.0)
    out = run(contract, Bands(values=linear, channels=("vv",), sensor="sentinel-1", units="linear"))
    assert torch.allclose(out[0, 0], torch.tensor([5.0, -10.0, -10.0, -10.0])[:, None].expand(4, 4))


def test_eight_bit_copies_are_rounded_down():
    levels = np.arange(0, 256)
    values = np.ceil(levels * 10000 / 255).astype(np.uint16).reshape(1, 16, 16).repeat(3, 0)  # the first number of each level
    contract = dataclasses.replace(checkpoint("seco").array(), resize=NONE, size=(16, 16), normalise=Normalise())
    for shift, expected in ((0, levels), (-1, np.maximum(levels - 1, 0))):
        data = bands(np.maximum(values.astype(np.int32) + shift, 0), S2_RGB, level="")
        assert np.array_equal(run(contract, data)[0, 0].numpy().ravel(), expected)
    assert float(run(contract, bands(np.full((3, 4, 4), 30000, np.uint16), S2_RGB, level="")).max()) == 255


def test_landsat_numbers():
    values = np.full((2, 3, 3), 10000, np.uint16)
    contract = Raster(channels=("red", "nir"), size=(3, 3), resize=NONE)
    surface = Bands(values=values, channels=("SR_B4", "SR_B5"), sensor="landsat-8", level="L2SP", units="dn")
    assert torch.allclose(run(contract, surface), torch.tensor(0.075))
    mtl = {
        "SUN_ELEVATION": "30.0",
        **{f"REFLECTANCE_{key}_BAND_{n}": v for n in (4, 5) for key, v in (("MULT", 2e-5), ("ADD", -0.1))},
    }
    pairs = [landsat_scaling(mtl, "landsat-8", name) for name in ("B4", "nir")]
    top = dataclasses.replace(surface, level="L1", units="reflectance", scale=[p[0] for p in pairs], offset=[p[1] for p in pairs])
    assert torch.allclose(run(contract, top), torch.tensor(0.2))
    with pytest.raises(PreprocessError, match="landsat_scaling"):
        run(contract, dataclasses.replace(surface, level="L1"))
    warm = Raster(channels=("B10",), sensor="landsat-8", level="L2", units="kelvin", size=(3, 3), resize=NONE)
    thermal = Bands(values=np.full((1, 3, 3), 44000, np.uint16), channels=("ST_B10",), sensor="landsat-8", level="L2", units="dn")
    assert torch.allclose(run(warm, thermal), torch.tensor(44000 * 0.00341802 + 149), rtol=1e-6)


def test_numbers_of_one_sensor_become_those_of_another():
    contract = Raster(channels=("B04", "B8A"), sensor="sentinel-2", level="L2A", units="dn", size=(3, 3), resize=NONE)
    data = Bands(values=np.full((2, 3, 3), 12000, np.uint16), channels=("B5", "B4"), sensor="landsat-8", level="L2", units="dn")
    out = run(contract, data, {"sensor": "the same reflectances"})
    assert torch.allclose(out, torch.tensor(10000 * (12000 * 2.75e-5 - 0.2)), rtol=1e-5)


# -- names ------------------------------------------------------------------------------------------------------------------


def test_red_is_band_3_of_landsat_7_and_band_4_of_landsat_8():
    contract = Raster(channels=("red", "green", "blue"), size=(2, 2), resize=NONE)
    for sensor, count, red in (("landsat-5", 6, 3), ("landsat-7", 6, 3), ("landsat-8", 8, 4), ("landsat-9", 8, 4)):
        names = tuple(f"B{number}" for number in range(1, count))
        values = np.arange(1, count).reshape(-1, 1, 1) * np.full((1, 2, 2), 1e-2)
        out = run(contract, Bands(values=values, channels=names, sensor=sensor, units="reflectance"))
        assert torch.allclose(out[0, :, 0, 0], torch.tensor([red, red - 1, red - 2]) * 1e-2)


def test_landsat_9_and_both_of_hls_serve_the_checkpoints_of_their_family():
    eight = Raster(channels=("B4",), sensor="landsat-8", level="L2", units="reflectance", size=(2, 2), resize=NONE)
    nine = Bands(values=np.full((1, 2, 2), 0.1), channels=("B4",), sensor="landsat-9", level="L2", units="reflectance")
    assert torch.allclose(run(eight, nine), torch.tensor(0.1))
    names = ("B02", "B03", "B04", "B05", "B06", "B07")
    values = np.arange(1000, 7000, 1000, dtype=np.int16).reshape(-1, 1, 1) * np.ones((1, 4, 4), np.int16)
    hls = Bands(values=values, channels=names, sensor="hls-l30", level="L2", units="dn", nodata=-9999)
    contract = dataclasses.replace(checkpoint("prithvi_1").array(), normalise=Normalise(), resize=NONE, size=(4, 4))
    assert run(contract, hls)[0, :, 0, 0].tolist() == pytest.approx([1000, 2000, 3000, 4000, 5000, 6000], rel=1e-6)


@pytest.mark.parametrize(
    ("sensor", "name", "expected"),
    [
        ("sentinel-2", "B8A", "B8A"),
        ("sentinel-2", "B8a", "B8A"),
        ("sentinel-2", "B08A", "B8A"),
        ("sentinel-2", "8A", "B8A"),
        ("sentinel-2", "B8", "B08"),
        ("Sentinel-2B", "band 8", "B08"),
        ("s2", "nir", "B08"),
        ("s2", "nir08", "B8A"),
        ("s2", "B1", "B01"),
        ("s2", "B11", "B11"),
        ("s2", "8", None),
        ("s2", "B13", None),
        ("landsat-7", "SR_B3", "B3"),
        ("landsat-7", "B6_VCID_2", "B6_VCID_2"),
        ("landsat-8", "ST_B10", "B10"),
        ("LC08", "swir16", "B6"),
        ("naip", "N", "nir"),
        ("hls-s30", "B8A", "B8A"),
        ("hls-l30", "B5", "B05"),
        ("sentinel-1", "vh", "VH"),
        ("", "R", "red"),
        ("", "B04", None),
        ("unheard-of", "red", None),
    ],
)
def test_spellings(sensor, name, expected):
    found = find_band(sensor, name)
    assert (found and found.name) == expected


def test_the_tables_of_sensors_are_sound():
    for name, sensor in SENSORS.items():
        names = [band.name for band in sensor.bands]
        assert find_sensor(name) is sensor and len(set(names)) == len(names)
        for band in sensor.bands:
            assert find_band(name, band.name) is band
            assert band.kind != "optical" or name in ("rgb",) or 400 < band.centre < 2500
            assert all(find_band(name, alias) is band for alias in band.aliases)
        assert all(lacks in names for level in sensor.levels for lacks in level.lacks)
    assert wavelengths("sentinel-2", ("B02", "b8a")) == (492.4, 864.7)
    assert wavelengths("sentinel-1", ("VV",)) == (None,)
    assert find_level("landsat-9", "l2sp") is LANDSAT_8.levels[1] and find_level("sentinel-2", "L3") is None
    assert scaling("landsat-8", "L1", find_band("landsat-8", "B4")) is None
    assert scaling("sentinel-2", "L2A", find_band("sentinel-2", "B04"), "04.00") == (1e-4, -0.1)
    assert scaling("sentinel-2", "L2A", find_band("sentinel-2", "B04")) is None
    assert [baseline_offset(each) for each in ("03.01", "04.00", "N0510", "harmonized", "new", "")] == [
        0,
        -1000,
        -1000,
        0,
        None,
        None,
    ]


def test_older_metadata_of_landsat_knows_radiance_only():
    mtl = {"SUN_ELEVATION": 45.0, "RADIANCE_MULT_BAND_3": 0.62, "RADIANCE_ADD_BAND_3": -5.0, "EARTH_SUN_DISTANCE": 1.01}
    factor = np.pi * 1.01**2 / (1533 * np.sin(np.pi / 4))
    assert landsat_scaling(mtl, "landsat-7", "red") == pytest.approx((0.62 * factor, -5 * factor))
    oldest = {"SUN_ELEVATION": 45.0, "LMAX_BAND3": 153.0, "LMIN_BAND3": -5.0, "QCALMAX_BAND3": 255, "QCALMIN_BAND3": 1}
    oldest["ACQUISITION_DATE"] = "2002-07-04"  # the earth is farthest from the sun, 1.0167
    scale, offset = landsat_scaling(oldest, "landsat-7", "B3")
    factor = np.pi * 1.0167**2 / (1533 * np.sin(np.pi / 4))
    assert (scale * 255 + offset, scale + offset) == pytest.approx((153 * factor, -5 * factor), rel=1e-3)
    for broken, message in (
        ({}, "SUN_ELEVATION"),
        ({"SUN_ELEVATION": 45.0}, "no numbers for the reflectance or radiance"),
        ({k: v for k, v in mtl.items() if k != "EARTH_SUN_DISTANCE"}, "neither EARTH_SUN_DISTANCE nor a date"),
    ):
        with pytest.raises(PreprocessError, match=message):
            landsat_scaling(broken, "landsat-7", "B3")
    with pytest.raises(PreprocessError, match="no solar irradiance"):
        landsat_scaling(mtl, "landsat-8", "B3")
    with pytest.raises(PreprocessError, match="no band that has a reflectance"):
        landsat_scaling(mtl, "landsat-7", "B6")


# -- absent bands -------------------------------------------------------------------------------------------------------------


def test_absent_bands_are_filled_after_normalisation_and_the_plan_says_so():
    rule = STATISTICS["eurosat"].standard(S2)
    contract = spec(S2, units="dn", scale=(1.0,), normalise=rule, absent=0.0, level="")
    data = bands(numbers(S2_L2A), S2_L2A, level="L2A")
    out = run(contract, data)
    assert torch.equal(out[:, 10], torch.zeros_like(out[:, 10])) and "B10" in str(plan(contract, data))
    native = run(dataclasses.replace(contract, absent_on="native"), data)
    assert torch.allclose(native[:, 10], torch.tensor(-12.11327804 / 4.77584468))
    rest = [index for index in range(13) if index != 10]
    assert torch.equal(native[:, rest], out[:, rest])


def test_nearest_wavelength_only_within_the_tolerance():
    values = np.full((2, 2, 2), 0.1)
    values[1] = 0.2
    data = Bands(values=values, channels=("B4", "B3"), sensor="landsat-7", units="reflectance")
    contract = Raster(channels=("B8A",), sensor="sentinel-2", size=(2, 2), resize=NONE, nearest_nm=40)
    made = plan(contract, data, allow={"sensor": "a neighbour will do"})
    assert torch.allclose(apply_raster(made, values), torch.tensor(0.1)) and "B8A is taken from B4" in str(made)
    with pytest.raises(PreprocessError, match=r"lack band B8A \(nir_narrow\)"):
        plan(dataclasses.replace(contract, nearest_nm=20), data, allow={"sensor": ""})
    far = Bands(values=values, channels=("one", "two"), wavelengths=(900.0, 870.0), units="reflectance")
    given_nm = Raster(channels=("x",), wavelengths=(868.0,), size=(2, 2), resize=NONE, nearest_nm=5)
    assert torch.allclose(run(given_nm, far), torch.tensor(0.2))


# -- refusals -----------------------------------------------------------------------------------------------------------------

SMALL = numbers()
SCALED = (SMALL / 1e4).astype(np.float32)
RADAR = Raster(channels=("VV", "VH"), sensor="sentinel-1", level="GRD", units="db", size=(9, 11), resize=NONE)
DB = np.random.default_rng(0).uniform(-30, -5, (2, 9, 11))


def radar(values=DB, **fields) -> Bands:
    return Bands(values=values, **{"channels": ("VV", "VH"), "sensor": "sentinel-1", "level": "GRD", "units": "db", **fields})


def aerial(values=None, **fields) -> Bands:
    values = np.random.default_rng(0).integers(0, 256, (3, 9, 11), np.uint8) if values is None else values
    return Bands(values=values, **{"channels": RGB, "units": "u8", **fields})


PICTURES = Raster(channels=RGB, units="u8", size=(9, 11), resize=NONE)
SATURATED = SMALL.copy()
SATURATED[3, 0, 0] = 65535
MISLABELLED = STATISTICS["eurosat"].channels  # the order of EuroSAT's files ...
FILES = numbers(MISLABELLED)  # ... whose numbers some call by the usual order
PAIR = Bands(values=np.full((2, 2, 2), 0.1), channels=("red", "nir"), units="reflectance")

REFUSALS = [
    # contract, data, what the sentence says, the switch that lets it pass
    (spec(), SMALL, "an array that does not say what it is; describe it, Bands", None),
    (spec(S2), SMALL, "does not say what it is", "undescribed"),
    (spec(), bands(sensor="landsat-8", channels=S2[:7], values=SMALL[:7]), "the data are of landsat-8, and this", None),
    (spec(), bands(sensor=""), "do not say their sensor", None),
    (spec(level="L2A"), bands(), "the data are of level L1C, and this checkpoint was trained on L2A", "level"),
    (spec(), bands(level=""), "do not say their processing level", "level"),
    (spec(), bands(baseline=""), "unknown processing baseline: from 04.00 on they carry an offset of 1000", "baseline"),
    (spec(), bands(baseline="latest"), "unknown processing baseline", "baseline"),
    (spec(), bands(normalised=True), "the data are normalised already", "normalised"),
    (spec(), bands(SCALED), "look scaled or normalised already; expected sensor numbers", "normalised"),
    (spec(), bands((SMALL - SMALL.mean()) / SMALL.std()), "look scaled or normalised already", "normalised"),
    (spec(), bands(SCALED - 1, units="reflectance"), "look scaled or normalised already; expected reflectances", "normalised"),
    (PICTURES, aerial(np.random.default_rng(0).random((3, 9, 11))), "already; expected 0..255", "normalised"),
    (PICTURES, aerial(np.random.default_rng(0).normal(size=(3, 9, 11))), "already; expected 0..255", "normalised"),
    (RADAR, radar((DB + 12) / 5), "already; expected decibels", "normalised"),
    (RADAR, radar(10 ** (DB / 10)), "look like linear backscatter, not like decibels", "range"),
    (RADAR, radar(DB, units="linear"), "already; expected linear backscatter", "normalised"),
    (RADAR, radar(DB * 10), "do not fit decibels", "range"),
    (spec(), bands(SMALL.astype(np.float32), units="reflectance"), "look like sensor numbers, not like reflectances", "range"),
    (PICTURES, aerial(SMALL[:3]), "do not fit 0..255", "range"),
    (spec(), bands((SMALL // 64).astype(np.uint8)), "8-bit values are a picture of sentinel-2", "range"),
    (spec(valid=(0.0, 0.1)), bands(), "lie outside of 0..0.1, what is possible", "range"),
    (spec(), bands(SATURATED), "cells of 65535 are saturated", "saturated"),
    (spec(), bands(FILES), r"B10 \(cirrus\) of about \d+ is much brighter than B09", "order"),
    (spec(), bands(FILES / 1e4, units="reflectance"), r"B10 \(cirrus\)", "order"),
    (spec(), bands(units=""), "the unit of the data is not known; say units=", None),
    (spec(units="counts"), bands(), "the checkpoint's unit is 'counts'", None),
    (spec(), bands(SMALL[:3], ("B01", "B02", "B03")), r"the data lack band B04 \(red\); they have B01, B02, B03", None),
    (spec(), bands(SMALL[:2], ("B8A", "B08A")), "channels 'B8A' and 'B08A' are the same band", None),
    (spec(), bands(SMALL[:2], ("B04", "B13")), "sentinel-2 has no band 'B13'", None),
    (spec(level="L2A"), bands(SMALL[:2], ("B04", "B10"), level="L2A"), "L2A of sentinel-2 has no band B10", None),
    (PICTURES, bands(SMALL, level="L1C"), "the data are in dn and this checkpoint takes u8, and nothing says how", None),
    (spec(), bands((SMALL // 64).astype(np.uint8), units="u8"), "the data are in u8 and this checkpoint takes reflectance", None),
    (Raster(channels=RGB, units="dn"), bands(), "mean is not known", None),
    (Raster(channels=("B04",)), bands(), "the data lack band B04", None),
    (spec(normalise=Normalise(rule="minmax", low=(0.0,) * 3, high=(0.0,) * 3)), bands(), "divides by zero", None),
    (spec(), [], "the list of samples is empty", None),
    (spec(), Bands(channels=S2), "a description without values", None),
    (spec(), "scene.tif", "a str; expected Bands", None),
    (
        spec(S2, units="dn", scale=(1.0,), normalise=Normalise(rule="standard", mean=STATISTICS["eurosat"].mean, std=(1.0,) * 13)),
        bands(),
        "by the checkpoint's statistics, B10 .* is much brighter than B09",
        "order",
    ),
    (spec(), [bands(), bands(numbers(height=4))], "samples have sizes", None),
]


@pytest.mark.parametrize(("contract", "data", "message", "switch"), REFUSALS, ids=[str(i) for i in range(len(REFUSALS))])
def test_what_is_refused_and_the_switch_that_allows_it(contract, data, message, switch):
    with pytest.raises(PreprocessError, match=message) as refused:
        run(contract, data)
    assert "\n" not in str(refused.value)
    if switch:
        assert f"allow={{'{switch}': " in str(refused.value)
        assert run(contract, data, {switch: "on purpose"}).isfinite().all()
        if isinstance(data, Bands):
            assert plan(contract, data, allow={switch: "on purpose"}).allowed == ((switch, "on purpose"),)
            assert plan(contract, data, allow=frozenset({switch})).allowed == ((switch, ""),)


def test_each_switch_has_its_refusal():
    assert {switch for *_, switch in REFUSALS if switch} | {"sensor"} == set(SWITCHES)
    with pytest.raises(PreprocessError, match="of landsat-8.*allow={'sensor'"):
        plan(spec(), Bands(channels=("B4", "B3", "B2"), sensor="landsat-8", level="L2", units="dn"))
    with pytest.raises(PreprocessError, match="unknown switch 'anything'"):
        run(spec(), bands(), {"anything": ""})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"channels": S2[:3]}, r"shape \(13, 9, 11\) with 3 names"),
        ({"values": SMALL.transpose(1, 2, 0)}, "the channels come first"),
        ({"values": SMALL[0]}, r"expected \(C, H, W\)"),
        ({"values": SMALL[:, :0]}, r"expected \(C, H, W\)"),
        ({"units": "counts"}, "units 'counts': expected one of dn, reflectance"),
        ({"scale": (1.0, 2.0)}, "scale has 2 numbers for 13 channels"),
        ({"offset": ()}, "offset has 0 numbers"),
        ({"wavelengths": (490.0,)}, "wavelengths has 1 numbers"),
        ({"mask": np.ones((3, 3), bool)}, r"mask of shape \(3, 3\)"),
    ],
)
def test_descriptions_that_contradict_themselves(fields, message):
    with pytest.raises(PreprocessError, match=message):
        Bands(**{"values": SMALL, "channels": S2, **fields})


def test_values_that_do_not_fit_their_plan():
    made = plan(spec(), Bands(**{f.name: getattr(bands(), f.name) for f in dataclasses.fields(Bands) if f.name != "values"}))
    assert isinstance(made, Plan) and torch.equal(apply_raster(made, SMALL), run(spec(), bands()))
    for values, message in ((SMALL[:4], "the plan's channels"), (SMALL.astype(complex), "expected numbers")):
        with pytest.raises(PreprocessError, match=message):
            apply_raster(made, values)


def test_descriptions_take_lists_and_numbers_and_are_equal_when_they_say_the_same():
    first, second = (bands(scale=np.float32(2), channels=list(S2), nodata=float("nan")) for _ in range(2))
    assert first.describe() == second.describe() and hash(first.describe()) == hash(second.describe())
    assert first.scale == (2.0,) and first.channels == S2 and first.nodata is None


def test_saturated_cells_can_be_left_out():
    out = run(spec(nodata_fill=-1.0), bands(SATURATED, nodata=65535))
    assert float(out[0, 0, 0, 0]) == -1 and int((out == -1).sum()) == 1


def test_masks_of_all_shapes():
    hole = np.ones((9, 11), bool)
    hole[2, 3] = False
    several = np.stack([hole if name == "B04" else np.ones_like(hole) for name in S2])
    batch = np.stack([SMALL, SMALL])
    for values, mask, count in (
        (SMALL, hole, 3),
        (SMALL, several, 1),
        (batch, hole, 6),
        (batch, several, 2),
        (batch, np.stack([hole, np.ones_like(hole)]), 3),
        (batch, np.stack([several, np.ones_like(several)]), 1),
        (torch.from_numpy(batch), torch.from_numpy(hole), 6),
    ):
        assert int((run(spec(nodata_fill=-1.0), bands(values, mask=mask)) == -1).sum()) == count


# -- the known mistakes do not pass --------------------------------------------------------------------------------------------


def test_files_of_eurosat_are_put_into_the_order_of_the_network():
    """Slip 1 and 11: B8A stands last in the files and ninth in the network."""
    right, published = (study("eurosat", "divide", as_published=flag, size=None).array() for flag in (False, True))
    assert right.channels == S2 and published.channels == MISLABELLED
    data = bands(FILES, MISLABELLED)
    assert torch.equal(run(right, data)[:, 8], run(published, data)[:, 12])
    wrong = BandStatistics(S2, "sentinel-2", "L1C", "dn", "GEO-Bench", "", STATISTICS["eurosat"].mean, STATISTICS["eurosat"].std)
    with pytest.raises(PreprocessError, match="the order of the channels looks wrong"):
        run(spec(S2, units="dn", scale=(1.0,), normalise=wrong.standard(S2)), bands())


def test_statistics_stay_with_their_bands_when_a_band_is_missing():
    """Slip 2: a zero band at place 8, statistics for place 10."""
    data = bands(numbers(S2_L2A), S2_L2A, level="L2A")
    right, published = (study("bigearthnet", "standardization", as_published=flag, size=None).array() for flag in (False, True))
    plain = run(spec(("B8A",), level="L2A", units="dn", scale=(1.0,), normalise=STATISTICS["bigearthnet"].standard(("B8A",))), data)
    out = run(right, data)
    assert torch.allclose(out[:, 8], plain[:, 0], atol=1e-5) and not out[:, 10].any()
    with pytest.raises(PreprocessError, match="by the checkpoint's statistics"):
        run(published, data)
    wrong = run(published, data, {"order": "as published"})
    assert not torch.allclose(wrong[:, 9], out[:, 8], atol=0.01)
    assert torch.allclose(wrong[:, 8], torch.tensor(-2266.46036911 / 1356.13789355))


def test_the_quantiles_of_seco_belong_to_their_bands():
    """Slip 3."""
    right = checkpoint("seco").array().normalise
    assert dict(zip(S2_RGB, zip(right.low, right.high, strict=True), strict=True)) == {
        "B04": (0, 129),
        "B03": (2, 103),
        "B02": (3, 88),
    }
    data = bands(level="")
    pictures = [run(dataclasses.replace(checkpoint("seco", v).array(), resize=NONE), data) for v in CHECKPOINTS["seco"]]
    assert not torch.allclose(pictures[0], pictures[2], atol=0.1) and pictures[1].abs().max() > 100 > pictures[0].abs().max()


def test_no_entry_leaves_the_sensors_numbers_as_they_are():
    """Slip 10: transforms that only crop; they are there by name, and the plan says what they are."""
    for name in CHECKPOINTS:
        for contract in checkpoint(name).values():
            assert contract.normalise.rule != "none" or contract.units == "reflectance", name
    for name in ("croma", "dofa_sentinel_2"):
        assert all(each.normalise.rule == "none" for each in checkpoint(name, "torchgeo").values())
    optical = checkpoint("croma", "torchgeo")["optical"]
    assert "nothing is normalised" in str(plan(optical, bands(numbers(S2_L2A), S2_L2A, level="L2A")))
    clipped, open_ended = (checkpoint("satlas_s2_ms", variant).array().normalise.clip for variant in ("", "torchgeo"))
    assert clipped == (0, 1) and open_ended is None


def test_a_missed_offset_is_three_deviations():
    rule = STATISTICS["eurosat"].standard(("B02",))
    contract = spec(("B02",), units="dn", scale=(1.0,), normalise=rule)
    missed = run(contract, bands(SMALL + 1000, baseline="02.08"))
    assert torch.allclose(missed - run(contract, bands(SMALL + 1000, baseline="04.00")), torch.tensor(3.0), atol=0.01)


# -- tables -------------------------------------------------------------------------------------------------------------------


def test_every_entry_stores_and_takes_its_own_data():
    for name, variants in CHECKPOINTS.items():
        for variant in variants:
            entry = checkpoint(name, variant)
            assert Preprocess.from_json(entry.to_json()) == entry
            for modality, contract in entry.items():
                assert plan(contract, as_expected(contract)).steps and modality
    for dataset in STUDY_DATASETS:
        for encoder in ("imagenet", "moco", "random", "rcf", "mosaiks", "statistics"):
            for published in (False, True):
                contract = study(dataset, study_recipe(dataset, encoder), as_published=published).array()
                assert plan(contract, as_expected(contract), allow={"order": ""}).steps
    for call, message in (
        (lambda: checkpoint("nothing"), "unknown checkpoint 'nothing'"),
        (lambda: checkpoint("seco", "mine"), "unknown variant 'mine'"),
        (lambda: study("nothing", "divide"), "unknown data set"),
        (lambda: study("eurosat", "divide", bands="ir"), "expected 'all' or 'rgb'"),
        (lambda: study("bigearthnet", "for_sec"), "no normalisation 'for_sec'"),
        (lambda: statistics("nothing"), "unknown statistics"),
        (lambda: STATISTICS["bigearthnet"].of("mean", ("B10",)), "no statistics of band 'B10'"),
        (lambda: STATISTICS["bigearthnet"].of("low", ("B02",)), "no low is known"),
        (lambda: BandStatistics(("a",), "", "", "dn", "x", "", (1.0, 2.0)), "mean has 2 numbers for 1 bands"),
    ):
        with pytest.raises(PreprocessError, match=message):
            call()


def test_what_networks_want_besides_pixels():
    assert set(BESIDES) <= set(CHECKPOINTS) and "sampling distance" in BESIDES["scale_mae"]


def test_tables_go_by_name():
    table = STATISTICS["eurosat"]
    assert table.of("mean", ("B8A", "narrow_nir", "b08a")) == (2594.14080798,) * 3 and table.of("high", ("B10",)) == (183,)
    assert imagenet("ucmerced").array().sensor == "" and imagenet("eurosat", ("B8A",), size=(9, 11)).array().size == (9, 11)
    rule = table.eight_bit(("B04",), 1e-4)
    assert (rule.low[0], rule.high[0]) == pytest.approx((-0.024, 0.2135), abs=1e-4) and rule.quantise == 256
    assert csmask((0.1,) * 4, (0.2,) * 4).array().channels == ("blue", "green", "red", "nir")


def test_true_colour_of_satlas_comes_from_numbers_or_the_picture():
    contract = dataclasses.replace(checkpoint("satlas_rgb").array(), size=(9, 11))
    dark = bands(np.full((3, 9, 11), 1779, np.uint16), S2_RGB, level="")
    picture = bands(np.full((3, 9, 11), 127, np.uint8), S2_RGB, level="", units="u8")
    assert torch.equal(run(contract, dark), run(contract, picture))


# -- pictures -----------------------------------------------------------------------------------------------------------------


def test_eight_bit_bands_serve_checkpoints_of_pictures():
    values = np.random.default_rng(0).integers(0, 256, (2, 4, 8, 8), np.uint8)
    preprocess = Preprocess(image=Image(size=(8, 8)))
    names = ("nir", "blue", "green", "red")
    expected = preprocess(image=values[:, [3, 2, 1]].transpose(0, 2, 3, 1))["image"]
    assert torch.equal(preprocess(image=Bands(values=values, channels=names, units="u8", sensor="naip"))["image"], expected)
    assert torch.equal(preprocess(image=[Bands(values=sample, channels=names, units="u8") for sample in values])["image"], expected)
    with pytest.raises(PreprocessError, match="takes 8-bit pictures .* see okavango.models.expectations.imagenet"):
        preprocess(image=bands())
    with pytest.raises(PreprocessError, match="the data lack band red"):
        preprocess(image=Bands(values=values[0, :1], channels=("blue",), units="u8"))


def test_pictures_serve_checkpoints_of_rasters_when_asked():
    picture = Picture.fromarray(np.random.default_rng(0).integers(0, 256, (9, 11, 3), np.uint8))
    out = run(PICTURES, picture, {"undescribed": "an RGB photograph"})
    assert np.array_equal(out[0].numpy().transpose(1, 2, 0), np.asarray(picture))


# -- first layers ---------------------------------------------------------------------------------------------------------------

FOUR = imagenet("so2sat_random", ("B02", "B03", "B04", "B08")).array()


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("elastic_vit_tiny", {}),
        ("elastic_swin_tiny", {}),
        ("elastic_resnet_tiny", {}),
        ("timm/test_vit", {"image_size": 32}),
        ("timm/test_resnet", {"image_size": 64}),
        ("timm/test_efficientnet", {"image_size": 64}),
        ("torchvision/resnet18", {"image_size": 64}),
    ],
)
def test_any_network_for_red_green_and_blue_takes_other_bands(name, arguments, tmp_path):
    torch.manual_seed(0)
    model = create_model(name, **arguments).eval()
    size = model.preprocess.array().size
    contract = dataclasses.replace(FOUR, size=size)
    wide = adapt_channels(model, contract, "wavelength")
    data = bands(numbers(S2, *size) / 1e4, units="reflectance")
    inputs = wide.preprocess(image=data)
    assert inputs["image"].shape == (1, 4, *size)
    with torch.no_grad():
        features = wide(inputs).pooled
        assert features.isfinite().all()
        # a picture of blue, green, red and nothing else gives what it gave before, but for the scale of 3/4
        three = torch.randn(1, 3, *size)
        four = torch.cat([three.flip(1), torch.zeros(1, 1, *size)], 1) * 4 / 3
        near = {"B02": 490.0, "B03": 560.0, "B04": 665.0, "B08": 800.0}
        exact = adapt_channels(model, dataclasses.replace(contract, wavelengths=tuple(near.values())), "wavelength")
        assert torch.allclose(exact(image=four).pooled, model(image=three).pooled, atol=1e-4)
    save_checkpoint(wide, tmp_path / "wide")
    again, report = load_checkpoint(tmp_path / "wide")
    assert not report.missing and not report.unexpected and not report.resized
    assert again.preprocess == wide.preprocess and again.preprocess.array().adapted == "wavelength from red, green, blue"
    with torch.no_grad():
        assert torch.equal(again(again.preprocess(image=data)).pooled, features)
    assert len(model.preprocess.array().channels) == 3  # the original is as it was


def test_subnets_of_an_adapted_supernet():
    wide = adapt_channels(create_model("elastic_vit_tiny"), dataclasses.replace(FOUR, size=(28, 28)))
    subnet = wide.list_subnets()[0]
    small, x = wide.extract(subnet).eval(), torch.randn(2, 4, 28, 28)
    with torch.no_grad():
        assert torch.allclose(small(image=x).pooled, wide.eval()(image=x, subnet=subnet).pooled, atol=1e-5)
    assert small.preprocess == wide.preprocess


def test_filters():
    weight = torch.randn(4, 3, 3, 3)
    s2 = Raster(channels=S2, sensor="sentinel-2")
    repeat, average, by_nm = (adapt_filters(weight, RGB, s2, how) for how in ("repeat", "average", "wavelength"))
    assert torch.equal(repeat[:, 4], weight[:, 1] * (3 / 13))
    assert torch.allclose(average[:, 7], weight.mean(1) * (3 / 13), atol=1e-6)
    assert torch.allclose(by_nm[:, 12], weight[:, 0] * (3 / 13), atol=1e-6)  # beyond red: red
    assert torch.allclose(by_nm[:, 0], weight[:, 2] * (3 / 13), atol=1e-6)  # before blue: blue
    share = (559.8 - 490) / 70
    assert torch.allclose(by_nm[:, 2], (share * weight[:, 1] + (1 - share) * weight[:, 2]) * (3 / 13), atol=1e-6)
    radar = adapt_filters(weight, RGB, Raster(channels=("VV",), sensor="sentinel-1"), "wavelength")
    assert torch.allclose(radar[:, 0], weight.mean(1) * 3, atol=1e-5)
    assert torch.allclose(adapt_filters(weight, RGB, Raster(channels=("VV",)))[:, 0], weight.sum(1))


def test_networks_that_cannot_be_adapted():
    for call, message in (
        (lambda: adapt_channels(create_model("elastic_vit_tiny"), FOUR, "copy"), "expected 'repeat', 'average'"),
        (lambda: adapt_channels(create_model("elastic_vit_tiny", channels=1), FOUR, "wavelength"), "need red, green and blue"),
        (
            lambda: adapt_channels(create_model("adapted", backbone="elastic_vit_tiny"), FOUR),
            "takes no number of channels",
        ),
    ):
        with pytest.raises(ChannelError, match=message):
            call()
