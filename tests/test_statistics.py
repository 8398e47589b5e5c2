"""Streamed statistics against two passes of numpy, and what they refuse."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image as Pillow

from okavango import cli
from okavango.data import statistics
from okavango.data.sources import Arrays, ImageFolder, Part, open_source
from okavango.data.statistics import PERCENTILES, Statistics, StatisticsError, Streaming, of_source, split_of
from okavango.models.raster import Bands

numbers = st.floats(-1e9, 1e9, width=32, allow_subnormal=False) | st.sampled_from([0.0, -0.0, 255.0, 65535.0, np.nan, np.inf])
sample = st.tuples(st.integers(1, 6), st.integers(1, 6)).flatmap(
    lambda shape: st.tuples(arrays(np.float64, (2, *shape), elements=numbers), arrays(bool, (2, *shape)) | st.none())
)


def two_pass(samples, channel):
    """Every valid cell of a channel, and how many there are that are not."""
    cells = [
        (values[channel].ravel(), np.ones(values[channel].size, bool) if mask is None else mask[channel].ravel())
        for values, mask in samples
    ]
    values, shown = (np.concatenate(each) for each in zip(*cells, strict=True))
    kept = shown & np.isfinite(values)
    return values[kept], int((~kept).sum())


@settings(max_examples=40, deadline=None)
@given(samples=st.lists(sample, min_size=1, max_size=5), cut=st.integers(0, 5))
def test_streamed_and_merged_statistics_are_those_of_two_passes(samples, cut):
    whole, parts = Streaming(("a", "b")), (Streaming(("a", "b")), Streaming(("a", "b")))
    for number, (values, mask) in enumerate(samples):
        before = values.copy()
        whole.update(values, mask)
        parts[number >= cut].update(values, mask)
        np.testing.assert_array_equal(values, before)
    for found in (whole.finish(), parts[0].merge(parts[1]).finish()):
        assert found.samples == len(samples)
        for channel in range(2):
            cells, missing = two_pass(samples, channel)
            assert (found.count[channel], found.missing[channel]) == (len(cells), missing)
            if not len(cells):
                assert np.isnan([found.mean[channel], found.std[channel], found.low[channel], *found.percentiles[channel]]).all()
                continue
            size = np.abs(cells).max()
            assert found.mean[channel] == pytest.approx(cells.mean(), rel=1e-12, abs=1e-12 * size)
            assert found.std[channel] == pytest.approx(cells.std(), rel=1e-9, abs=1e-9 * size)
            assert (found.low[channel], found.high[channel]) == (cells.min(), cells.max())
            assert found.at_low[channel] == (cells == cells.min()).sum() and found.at_high[channel] == (cells == cells.max()).sum()
            ordered = np.sort(cells)
            for share, value in zip(PERCENTILES, found.percentiles[channel], strict=True):
                rank = share / 100 * len(cells)
                near = ordered[max(0, int(rank) - 1)], ordered[min(len(cells) - 1, int(rank) + 1)]
                slack = 0.008 * max(map(abs, near)) + 1e-37
                assert near[0] - slack <= value <= near[1] + slack


def test_a_small_deviation_around_a_large_mean_survives():
    rows = 1e8 + np.random.default_rng(0).normal(0, 1e-3, (50, 1, 64))
    streaming = Streaming(("height",))
    for row in rows:
        streaming.update(row)
    assert streaming.finish().std[0] == pytest.approx(rows.std(), rel=1e-4)


def test_the_histogram_keeps_all_scales_at_once():
    values = np.concatenate([np.full(900, 0.02), np.full(90, 3000.0), np.full(10, -3e38), np.full(7, -1.7e308)])[None]
    streaming = Streaming(("mixed",)).update(values)
    assert streaming.spread(0, np.array([-4e38, -1.0, 0.0, 1.0, 4000.0])) == pytest.approx([0.01, 0, 0.9, 0.09])
    assert streaming.finish().missing == (7,) and streaming.finish().low == (-3e38,)
    eight_bit = Streaming(("grey",)).update(np.arange(256, dtype=np.uint8)[None])
    assert eight_bit.spread(0, np.arange(257.0)) == pytest.approx(np.full(256, 1 / 256))


def test_test_and_training_data_are_never_mixed(tmp_path):
    with pytest.raises(StatisticsError, match="must not depend"):
        Streaming(("a",), "train").merge(Streaming(("a",), "test"))
    with pytest.raises(StatisticsError, match="cannot be added"):
        Streaming(("a",), "train").merge(Streaming(("b",), "train"))
    values = np.arange(8.0)[None]
    with pytest.raises(StatisticsError, match="a test set, must not normalise"):
        Streaming(("a",), "test").update(values).finish(source="x").normalise()
    with pytest.raises(StatisticsError, match="channel a of x is constant"):
        Streaming(("a",), "train").update(values * 0).finish(source="x").normalise()
    rule = Streaming(("a",), "train").update(values).finish(source="x", digest="0123456789abcdef").normalise()
    assert (rule.rule, rule.mean, rule.origin) == ("standard", (3.5,), "x train, 1 samples, 0123456789ab")
    for part in ("train", "Test"):
        (tmp_path / part).mkdir()
        Pillow.new("L", (4, 4), 9).save(tmp_path / part / "x.png")
    with pytest.raises(StatisticsError, match="holds Test and train"):
        of_source(ImageFolder(tmp_path))


def test_samples_that_do_not_go_together_are_refused():
    streaming = Streaming(("a", "b"))
    for values, mask, message in (
        (np.zeros((3, 4, 4)), None, "expected 2 channels first"),
        (np.zeros((2, 4, 4)), np.ones((5, 4), bool), "a mask of shape"),
        (np.float64(1), None, "expected 2 channels first"),
    ):
        with pytest.raises(StatisticsError, match=message):
            streaming.update(values, mask)


def test_a_source_is_read_once_and_bands_leave_out_what_was_not_measured():
    pictures = np.random.default_rng(0).integers(0, 256, (9, 5, 4, 3), dtype=np.uint8)
    found = of_source(Arrays(pictures, name="photos-train"))
    assert (found.channels, found.split, found.samples) == (("red", "green", "blue"), "train", 9)
    np.testing.assert_allclose(found.mean, pictures.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(found.std, pictures.std((0, 1, 2)), rtol=1e-12)
    assert of_source(Arrays(pictures), limit=3).samples == 3

    class Rasters(Part):
        def __getitem__(self, index):
            values = np.array([[[1, 2, -99]], [[5, 6, 7]]], np.int16)
            mask = np.array([[True, False, True]])
            return {"image": Bands(values=values, channels=("B02", "B03"), nodata=-99, mask=mask), "id": "x"}

    found = of_source(Rasters(Arrays(pictures), [0, 1]))
    assert (found.channels, found.count, found.missing) == (("B02", "B03"), (2, 4), (4, 2))
    assert (found.mean, found.low) == ((1.0, 6.0), (1.0, 5.0))


def test_samples_of_other_channels_are_refused_with_the_sample():
    class Mixed(Part):
        def __getitem__(self, index):
            return {"image": torch.zeros(1 + 2 * index, 4, 4, dtype=torch.uint8), "id": f"picture {index}"}

    with pytest.raises(StatisticsError, match="picture 1 has the channels red, green, blue, others have grey"):
        of_source(Mixed(Arrays(np.zeros((2, 4, 4), np.uint8)), [0, 1]))


def test_files_come_back_as_they_were_and_others_are_refused(tmp_path, capsys):
    file = tmp_path / "new" / "stats.json"
    assert cli.main(["preprocess", "statistics", "samples/fashion:test", "--samples", "40", "--out", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "fashion-test, the test part: 40 samples, 31,360 cells a channel" in printed and "grey" in printed
    found = statistics.read(file)
    source = open_source("samples/fashion:test")
    assert found == of_source(source, limit=40) and found.digest == source.digest and found.split == "test"
    assert Statistics.from_json(json.loads(json.dumps(found.to_json()))) == found
    content = json.loads(file.read_text())
    for change, message in (
        ({"version": 9}, "not statistics of format 1"),
        ({"mean": []}, "mean has not one entry for each of 1 channels"),
        ({"colour": 1}, "colour"),
    ):
        file.write_text(json.dumps({**content, **change}))
        with pytest.raises(StatisticsError, match=message):
            statistics.read(file)
    file.write_text("{")
    with pytest.raises(StatisticsError, match=r"stats\.json"):
        statistics.read(file)
    assert cli.main(["preprocess", "statistics", str(tmp_path / "nothing")]) == 1
    assert "no such folder" in capsys.readouterr().err


def test_the_name_tells_the_part():
    names = ("fashion-test", "train", "eurosat_val[12]", "validation", "photos", "latest", "training-set")
    assert [split_of(name) for name in names] == ["test", "train", "val", "val", "", "", "train"]
