"""The benchmarks against peers: our own sides run, at small sizes; what compares crops can tell them apart."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from okavango.zoo.leaderboard.records import read_records

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SMALL = {"width": 64, "depth": 1, "global_size": 28, "local_size": 14, "locals": 1, "batch": 4, "workers": 0}
SMALL |= {"prototypes": 16, "hidden": 16, "bottleneck": 8, "steps": 2, "epochs": 1}


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import data_pipeline
    import peers

    yield peers, data_pipeline
    for name in ("peers", "data_pipeline", "timing"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", ["okavango", "timm"])
def test_our_sides_of_a_step_train_the_same_parameters(benchmarks, tmp_path, name):
    peers, _ = benchmarks
    peers.write_pictures(tmp_path / "data", 8, side=32, different=2)
    noted = peers.run(sys.executable, peers.CANDIDATES[name], {**peers.STEP, **SMALL, "data": str(tmp_path / "data")}, tmp_path)
    assert len(noted["steps"]) == 2 and noted["started"] < noted["steps"][0][0] <= noted["steps"][1][0] <= noted["ended"]
    # patches, class and mask token, positions; one block of 12 w^2 + 13 w and two scales; final norm; head with both norms' factors
    block = 12 * 64**2 + 13 * 64 + 2 * 64
    backbone = 3 * 14**2 * 64 + 64 + 2 * 64 + 5 * 64 + block + 2 * 64
    head = 64 * 16 + 16 + 16 * 16 + 16 + 16 * 8 + 8 + 16 * 8 + 16
    assert noted["trained"] == backbone + head
    assert (noted["checkpoints"] > 0) == (name == "okavango") and noted["peak_mib"] > 50 and noted["processor"] > 0


def test_a_candidate_that_fails_shows_what_it_said(benchmarks, tmp_path):
    peers, _ = benchmarks
    with pytest.raises(SystemExit, match="no_such_script"):
        peers.run(sys.executable, "no_such_script.py", peers.STEP, tmp_path)


def test_pictures_are_files_of_their_own_and_the_same_every_time(benchmarks, tmp_path):
    peers, _ = benchmarks
    for folder in ("a", "b"):
        peers.write_pictures(tmp_path / folder, 3, side=16, different=2)
    a, b = ([path.read_bytes() for path in sorted((tmp_path / folder).iterdir())] for folder in ("a", "b"))
    assert a == b and len(a) == 3 and a[0] == a[2] != a[1]


def test_places_of_crops_are_read_from_their_colours(benchmarks):
    _, data_pipeline = benchmarks
    ramp = np.arange(256) / 256
    whole = np.stack([np.tile(ramp, (256, 1)), np.tile(ramp[:, None], (1, 256)), np.full((256, 256), 0.5)])
    shape = (3, 1, 1)
    whole = (whole - np.reshape(data_pipeline.FILES.mean, shape)) / np.reshape(data_pipeline.FILES.std, shape)
    crops = np.stack([whole[:, 32:96, 64:128], whole[:, 32:96, 64:128][:, :, ::-1]]).astype(np.float32)
    found = data_pipeline.statistics(crops, "places")
    np.testing.assert_allclose(found["area"], [1 / 16] * 2, rtol=1e-2)
    np.testing.assert_allclose(found["left"], [0.25] * 2, rtol=1e-2)
    np.testing.assert_allclose(found["top"], [0.125] * 2, rtol=1e-2)
    assert found["flipped"].tolist() == [0, 1]


def test_distances_see_what_differs_and_only_that(benchmarks):
    _, data_pipeline = benchmarks
    rng = np.random.default_rng(0)
    a, b = (
        {side: rng.normal(size=(80, 3, 12, 12)).astype(np.float32) for side in (data_pipeline.FILES.global_size, 98)} for _ in "ab"
    )
    blurred = {side: (values + np.roll(values, 1, 3)) / 2**0.5 for side, values in b.items()}
    found = data_pipeline.distances({("colours", "okavango"): [a], ("colours", "x"): [b], ("colours", "y"): [blurred]})
    detail = "detail, 98 px, 80 and 80 crops"
    assert found["x"][detail]["p"] > 1e-3 > found["y"][detail]["p"]
    assert all(0 <= one["distance"] <= 1 for tests in found.values() for one in tests.values()) and json.dumps(found)


def test_grey_crops_do_not_differ_by_their_rounding(benchmarks):
    _, data_pipeline = benchmarks
    rng = np.random.default_rng(0)
    grey = rng.random((9, 1, 12, 12)).repeat(3, 1)
    mean, std = (np.reshape(values, (1, 3, 1, 1)) for values in (data_pipeline.FILES.mean, data_pipeline.FILES.std))
    exact = ((grey - mean) / std).astype(np.float32)
    a, b = (data_pipeline.statistics(values, "colours") for values in (exact, exact.astype(np.float16).astype(np.float32)))
    assert all((found["grey"] == 1).all() and (found["saturation"] == 0).all() and (found["hue"] == 0).all() for found in (a, b))


def test_every_candidate_has_a_record_with_its_distances(benchmarks, tmp_path):
    _, data_pipeline = benchmarks
    seconds = {"okavango": [0.01, 0.02, 0.03], "lightly": [0.04, 0.05, 0.03]}
    apart = {"lightly": {"area": {"distance": 0.1, "p": 0.5}}}
    ours, theirs = data_pipeline.records_of("files", seconds, data_pipeline.FILES, 16, (1.0, 2.0), apart)
    assert (ours.value, theirs.value, ours.n) == (50.0, 25.0, 48) and "2.00 times" in theirs.notes
    assert theirs.settings["distances"] == apart["lightly"] and "distances" not in ours.settings
    data_pipeline.publish([ours, theirs], tmp_path / "records.jsonl", "title")
    assert {record.baseline for record in read_records(tmp_path / "records.jsonl")} == set(seconds)
