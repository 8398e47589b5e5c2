"""Views of real panoramas, the sample of place recognition that ships: training and test places have nothing in common."""

from __future__ import annotations

from pathlib import Path

from okavango.data.places import Places

FOLDER = Path(__file__).parent / "places"


def places(split: str = "train") -> Places:
    """Pictures of 112 x 112 pixels with made positions: within 25 m means the same place and a heading 30 degrees off at most.

    Args:
        split: "train" (9 places, 216 + 108 pictures in database and queries) or "test" (7 other places, 84 + 192; the queries
            include 24 of two places that the database lacks).
    Raises:
        ValueError: another split.
    """
    if split not in ("train", "test"):
        raise ValueError(f"samples/places has the splits train and test, not {split!r}")
    source = Places(FOLDER / split)
    source.name = f"places-{split}"
    return source
