"""The sample of places: its parts, its names, and the geometry of its views."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest

from okavango.data.places import Places, position, within
from okavango.data.sources import open_source
from okavango.downstream.retrieval.protocols import find_card
from okavango.samples import build_places, places


def test_parts_have_no_place_in_common():
    train, test = open_source("samples/places"), open_source("samples/places:test")
    assert isinstance(train, Places) and isinstance(test, Places)
    assert [train.name, test.name] == ["places-train", "places-test"]
    assert (len(train.database), len(train.queries), len(test.database), len(test.queries)) == (216, 108, 84, 192)
    number = {source.name: {id.split("@")[7] for id in source.ids} for source in (train, test)}
    assert not number["places-train"] & number["places-test"] and len(number["places-test"]) == 9
    assert test[0]["image"].shape == (3, 112, 112)
    with pytest.raises(ValueError, match="splits train and test, not 'val'"):
        open_source("samples/places:val")


def test_within_25_metres_means_a_place_and_30_degrees():
    test = open_source("samples/places:test")
    fields = [id.split("@") for id in test.ids]
    place, heading = np.array([int(f[7]) for f in fields]), np.array([float(f[9]) for f in fields])
    split = len(test.database)
    near = within(test.queries, test.database, 25.0)
    for query, found in zip(range(split, len(test)), near, strict=True):
        turn = np.abs((heading[:split] - heading[query] + 180) % 360 - 180)
        wanted = np.flatnonzero((place[:split] == place[query]) & (turn <= 30))
        doubtful = np.flatnonzero(np.abs(turn - 30) < 0.3)  # centimetres in names, and 25 m are 30.19 degrees
        assert set(wanted) - set(doubtful) <= set(found) <= set(wanted) | set(doubtful)
    unanswerable = [query for query, found in enumerate(near) if not len(found)]
    assert len(unanswerable) == 24
    find_card("places-test").check(*(part.ids for part in test.parts))


def test_files_are_those_that_the_provenance_names():
    noted = json.loads((places.FOLDER / "PROVENANCE.json").read_text())
    assert "CC0" in (places.FOLDER / "LICENSE").read_text()
    for split, facts in noted["splits"].items():
        for part, expected in facts["pictures_sha256"].items():
            paths = sorted((places.FOLDER / split / part).iterdir())
            digests = b"".join(hashlib.sha256(path.read_bytes()).digest() for path in paths)
            assert len(paths) == facts[part] and hashlib.sha256(digests).hexdigest() == expected
    assert sum(path.stat().st_size for path in places.FOLDER.rglob("*.jpg")) < 3e6


def test_a_view_looks_where_its_heading_says():
    columns = np.linspace(-180, 180, 720, endpoint=False) + 0.25  # a panorama whose values are the heading and the elevation
    rows = 90 - (np.arange(360) + 0.5) / 2
    sky = np.stack([np.repeat(columns[None], 360, 0), np.repeat(rows[:, None], 720, 1)], -1)
    for heading, pitch, width in ((0, 0, 75), (40, 0, 60), (-100, 5, 90)):
        seen = build_places.view(sky, heading, pitch, width, side=101)
        assert seen[50, 50] == pytest.approx([heading, pitch], abs=0.3)
        assert seen[0, 50, 1] > pitch > seen[100, 50, 1]  # up is up
        if not pitch:
            edge = np.degrees(np.arctan(np.tan(np.radians(width / 2)) * 100 / 101))
            assert seen[50, [0, 100], 0] == pytest.approx([heading - edge, heading + edge], abs=0.3)


def test_names_tell_positions():
    east, north = position(build_places.picture_name(3, 90.0))
    assert (east, north) == pytest.approx((3000.0, 48.0))
    chord = np.hypot(*np.subtract(position(build_places.picture_name(3, 120.0)), (east, north)))
    assert chord == pytest.approx(24.85, abs=0.02)
