"""Orders of bands: the right one is never suspected, on tables of other data sets and on real scenes; the wrong ones are found."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import land_cover
from hypothesis import given, settings
from hypothesis import strategies as st

from okavango.doctor import orders
from okavango.doctor.orders import comparable, find_order, habitual, references
from okavango.models.band_statistics import STATISTICS
from okavango.models.sensors import SENTINEL_2, find_band, wavelengths

KIN = ({"eurosat", "eurosat_spatial"}, {"ssl4eo_s12_l1c", "ssl4eo_s12_l1c_50k"}, {"so2sat_random", "so2sat_culture_10"})
RGB, RGBN = ("B04", "B03", "B02"), ("B04", "B03", "B02", "B08")
COLOURS = {"red": 650.0, "green": 555.0, "blue": 465.0, "nir": 845.0}
TABLES = sorted(name for name, table in STATISTICS.items() if table.mean and table.sensor not in ("modis", "sentinel-1"))


@pytest.fixture
def without(monkeypatch):
    """Takes a data set, and others of the same pixels, out of what the doctor knows."""

    def take(name):
        kin = next((kin for kin in KIN if name in kin), {name})
        monkeypatch.setattr(orders, "STATISTICS", {key: table for key, table in STATISTICS.items() if key not in kin})

    return take


def ordered(name):
    """Bands of a table in the order of the sensor."""
    table = STATISTICS[name]
    if table.sensor != "sentinel-2":
        return table.channels
    return tuple(band.name for band in SENTINEL_2.bands if band.name in table.channels)


def cells_of(name, channels, seed=0):
    """Pixels of a made-up country with a table's means and deviations."""
    table, rng = STATISTICS[name], np.random.default_rng(seed)
    centres = [centre or COLOURS[band] for centre, band in zip(wavelengths(table.sensor, channels), channels, strict=True)]
    mean, std = np.array(table.of("mean", channels)), np.array(table.of("std", channels))
    covers = land_cover(centres, rng, 3000)
    return (mean + std * (covers - covers.mean(0)) / covers.std(0)).clip(1e-3 * mean)


def asked(name, channels, order=None, seed=0):
    table = STATISTICS[name]
    cells = cells_of(name, channels, seed)
    cells = cells if order is None else cells[:, list(order)]
    return find_order(cells, channels, sensor=table.sensor, level=table.level, units=table.units)


@pytest.mark.parametrize("name", TABLES)
def test_the_right_order_of_a_data_set_that_is_not_known_is_not_suspected(name, without):
    without(name)
    for seed in range(2):
        assert asked(name, ordered(name), seed=seed) is None
        if STATISTICS[name].sensor == "sentinel-2" and "B08" in ordered(name):
            assert asked(name, RGB, seed=seed) is None and asked(name, RGBN, seed=seed) is None


@pytest.mark.parametrize("name", [name for name in TABLES if STATISTICS[name].sensor == "sentinel-2" and len(ordered(name)) > 9])
def test_sentinel_2_of_the_other_level_is_not_taken_for_another_order(name):
    channels = tuple(band for band in ordered(name) if band != "B10")
    for level in ("L1C", "L2A", ""):
        assert (
            find_order(cells_of(name, channels), channels, sensor="sentinel-2", level=level, units=STATISTICS[name].units) is None
        )


def lying(channels, how):
    """The order in which the bands lie: place -> band."""
    number = list(range(len(channels)))
    if how == "the reverse":
        return number[::-1]
    if how == "shifted by one":
        return number[1:] + number[:1]
    name, _, where = how.partition(" ")
    number.insert(0 if where == "first" else len(number), number.pop(channels.index(name)))
    return number


S2 = tuple(band.name for band in SENTINEL_2.bands)


@pytest.mark.parametrize(
    ("name", "channels", "how"),
    [(name, S2, how) for name in ("eurosat", "ssl4eo_s12_l1c", "fmow_sentinel") for how in ("the reverse", "shifted by one")]
    + [(name, S2, how) for name in ("eurosat", "ssl4eo_s12_l1c") for how in ("B8A last", "B08 first")]
    + [(name, ordered("bigearthnet"), how) for name in ("bigearthnet", "treesatai") for how in ("the reverse", "shifted by one")]
    + [("ssl4eo_s12_l2a_50k", ordered("bigearthnet"), "shifted by one"), ("treesatai", ordered("bigearthnet"), "B8A last")]
    + [("so2sat_random", ordered("so2sat_random"), how) for how in ("the reverse", "shifted by one", "B8A last")]
    + [(name, RGBN, "B08 first") for name in ("eurosat", "bigearthnet", "so2sat_random")]
    + [(name, ("red", "green", "blue", "nir"), how) for name in ("sat6", "clay_naip") for how in ("nir first", "the reverse")]
    + [("clay_landsat_l2", STATISTICS["clay_landsat_l2"].channels, how) for how in ("the reverse", "B5 first")],
    ids=lambda value: value if isinstance(value, str) else str(len(value)),
)
def test_wrong_orders_of_data_sets_that_are_not_known_are_found(name, channels, how, without):
    without(name)
    order = lying(channels, how)
    found = asked(name, channels, order)
    assert found is not None and found.sure, found
    assert [channels[order[k]] for k in found.order] == list(channels)
    if how in ("the reverse", "shifted by one"):
        assert found.habit == how
    assert found.now - found.then >= orders.SURE


@pytest.mark.parametrize(
    ("name", "found"), [("eurosat", True), ("bigearthnet", True), ("so2sat_random", True), ("imagenet", False)]
)
def test_red_and_blue_alone_are_suspected_where_sensors_tell_them_apart(name, found, without):
    without(name)
    channels = RGB if name != "imagenet" else ("red", "green", "blue")
    suspicion = asked(name, channels, (2, 1, 0))
    if not found:
        assert suspicion is None  # red and blue of photographs are too much alike
    else:
        assert suspicion is not None and not suspicion.sure and suspicion.habit == "red and blue exchanged"


# Two Landsat 7 scenes of 8-bit numbers, bands 1, 2, 3, 4, 5, 7: North Carolina 2000 (GRASS), and Olinda, Brazil (R package stars).
SCENES = {
    "north carolina": (
        (80.92, 66.87, 66.82, 69.15, 90.24, 59.18),
        (15.24, 16.95, 24.09, 15.09, 25.32, 22.69),
        (0.98, 0.94, 0.17, 0.60, 0.80, 0.97, 0.28, 0.68, 0.84, 0.19, 0.73, 0.88, 0.49, 0.25, 0.90),
    ),
    "olinda": (
        (79.15, 67.57, 64.36, 59.24, 83.18, 59.98),
        (14.69, 16.39, 21.59, 23.02, 38.49, 33.38),
        (0.98, 0.85, -0.47, 0.03, 0.25, 0.85, -0.44, 0.02, 0.22, -0.11, 0.49, 0.65, 0.63, 0.39, 0.95),
    ),
}
ETM = ("B1", "B2", "B3", "B4", "B5", "B7")


def scene(name):
    mean, std, above = map(np.array, SCENES[name])
    alike = np.eye(6)
    alike[np.triu_indices(6, 1)] = above
    alike = alike + np.triu(alike, 1).T
    values, vectors = np.linalg.eigh(alike)
    rows = np.random.default_rng(0).normal(size=(4000, 6)) * np.sqrt(values.clip(0)) @ vectors.T
    return (mean + std * rows).clip(1, 255)


@pytest.mark.parametrize("name", SCENES)
def test_numbers_of_landsat_7_in_any_order(name):
    """Between real scenes' numbers, gains differ from band to band: they are compared as reflectances."""
    cells = scene(name)
    assert find_order(cells, ETM, sensor="landsat-7", level="L1", units="dn") is None
    for order in (
        (5, 4, 3, 2, 1, 0),
        (1, 2, 3, 4, 5, 0),
        (3, 0, 1, 2, 4, 5),
        (3, 2, 1, 0, 4, 5),
        (3, 4, 2, 1, 0, 5),
        (2, 4, 0, 5, 1, 3),
    ):
        found = find_order(cells[:, order], ETM, sensor="landsat-7", level="L1", units="dn")
        assert found is not None and found.sure and [order[k] for k in found.order] == [0, 1, 2, 3, 4, 5], (order, found)


@settings(deadline=None, max_examples=12)
@given(st.permutations(range(13)), st.floats(0.2, 5))
def test_what_is_found_does_not_depend_on_the_gain_or_on_where_it_began(order, gain):
    cells = gain * cells_of("eurosat", S2)[:, order]
    found = find_order(cells, S2, sensor="sentinel-2", level="L1C", units="dn")
    sorted_by = list(order) if found is None else [order[k] for k in found.order]
    wrong = [k for k, band in enumerate(sorted_by) if k != band]
    assert len(wrong) <= 4  # bands that are alike may stay exchanged
    groups = {"B06": 1, "B07": 1, "B08": 1, "B8A": 1, "B01": 2, "B02": 2, "B03": 2, "B05": 2, "B04": 2, "B12": 2}
    assert all(groups.get(S2[k]) == groups.get(S2[sorted_by[k]]) for k in wrong), [S2[k] for k in sorted_by]


def test_radar_is_compared_in_decibels():
    rng = np.random.default_rng(0)
    table = STATISTICS["clay_sentinel_1"]
    cells = np.array(table.mean) + np.array(table.std) * (rng.normal(size=(500, 1)) + 0.3 * rng.normal(size=(500, 2)))
    assert find_order(cells, ("VV", "VH"), sensor="sentinel-1", level="GRD", units="db") is None
    assert find_order(cells, ("VH", "VV"), sensor="sentinel-1", level="GRD", units="db").sure


def test_nothing_is_said_without_evidence():
    noise = np.random.default_rng(0).normal(1000, 200, (500, 3))
    assert find_order(noise, ("a", "b", "c"), sensor="unheard-of") is None
    assert find_order(noise[:, :1], ("B04",), sensor="sentinel-2") is None
    assert find_order(noise[:50], RGB, sensor="sentinel-2") is None
    assert find_order(np.where(np.arange(3) == 1, 7.0, noise), RGB, sensor="sentinel-2") is None  # a constant band
    expected = np.array([200.0, 1000.0, 5000.0]), np.array([50.0, 100.0, 900.0])
    known = expected[0] + expected[1] * np.random.default_rng(1).normal(size=(500, 3))
    assert find_order(known, ("a", "b", "c"), sensor="unheard-of", expected=expected) is None
    assert find_order(known[:, ::-1], ("a", "b", "c"), sensor="unheard-of", expected=expected).habit == "the reverse"


def test_habits_are_named():
    habits = dict(habitual(RGBN, "sentinel-2"))
    assert habits[3, 2, 1, 0] == "the reverse" and habits[2, 1, 0, 3] == "red and blue exchanged"
    assert habits[1, 2, 3, 0] == "near infrared first"
    assert dict(habitual(RGB, "sentinel-2"))[2, 1, 0] == "red and blue exchanged"


def test_tables_become_comparable():
    mean, _ = references(("B3", "B4"), "landsat-7", "L1", "dn")[0]
    table = STATISTICS["eurosat"]
    np.testing.assert_allclose(mean, [1e-4 * number for number in table.of("mean", ("B04", "B08"))])
    scale, offset = comparable("landsat-7", "L1", "dn", "B3")  # by the formula of Chander et al.
    assert 255 * scale + offset == pytest.approx(np.pi * 152.9 / 1533) and scale + offset == pytest.approx(-np.pi * 5 / 1533)
    assert comparable("landsat-8", "L2", "dn", "B4") == (2.75e-5, -0.2)
    assert comparable("naip", "", "u8", "red") == (1.0, 0.0)
    assert find_band("landsat-7", "B6").kind == "thermal" and comparable("landsat-7", "L1", "dn", "B6") == (1.0, 0.0)
    assert len(references(("B04",), "sentinel-2", "L1C", "dn")) > len(references(("B10",), "sentinel-2", "L1C", "dn")) == 5
    assert references(("B10",), "sentinel-2", "L2A", "dn") == []
