"""Protocols of place recognition as data: when a prediction is right, and what the common datasets hold.

A protocol is a rule. A card is a dataset under a rule: two rules, or two lists of queries, are two cards, so their results never
share a column. Counts that our sources give as approximate or not at all are None.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from okavango.data.places import position, within
from okavango.models.backbone import unknown_name

HEADING = 9  # which of the fields between @ tells the heading, in degrees


@dataclass(frozen=True)
class Radius:
    """Right within so many metres, the limit included; where `degrees` is given, the heading must be as near too."""

    metres: float = 25.0
    degrees: float | None = None

    def __call__(self, queries: Sequence[str], database: Sequence[str]) -> list[np.ndarray]:
        """Per query the rows of its place, ascending, from the names of all pictures.

        Raises:
            ValueError: a name without a position, or without a heading where one is needed.
        """
        near = within(positions(queries), positions(database), self.metres)
        if self.degrees is None:
            return near
        asked, known = (np.array([heading(name) for name in names]) for names in (queries, database))
        turns = (np.abs((known[rows] - own + 180) % 360 - 180) for rows, own in zip(near, asked, strict=True))
        return [rows[turn <= self.degrees] for rows, turn in zip(near, turns, strict=True)]


@dataclass(frozen=True)
class Frames:
    """Two passes along one way, a picture each for the same frames, sorted by name: right up to so many frames off."""

    frames: int

    def __call__(self, queries: Sequence[str], database: Sequence[str]) -> list[np.ndarray]:
        """See `Radius`. Fewer queries than frames are every k-th frame, from the first on.

        Raises:
            ValueError: numbers of pictures that do not go together.
        """
        step = -(-len(database) // len(queries))
        if -(-len(database) // step) != len(queries):
            raise ValueError(
                f"frames: {len(queries)} queries and {len(database)} database pictures; expected as many, or every k-th frame"
            )
        frames = np.argsort(np.argsort(np.array(database), kind="stable"))  # frame of each row
        rows = np.argsort(frames)
        own = np.argsort(np.argsort(np.array(queries), kind="stable")) * step
        return [np.sort(rows[max(0, frame - self.frames) : frame + self.frames + 1]) for frame in own]


@dataclass(frozen=True)
class Pairs:
    """Right are the pictures that a file names: JSON of ``{query name: [database names]}``, names relative to their folders."""

    file: str

    def __call__(self, queries: Sequence[str], database: Sequence[str]) -> list[np.ndarray]:
        """See `Radius`.

        Raises:
            ValueError: no such file, not such JSON, or a name that there is no picture of.
        """
        try:
            given = json.loads(Path(self.file).read_text(encoding="utf-8"))
            pairs = {str(query): [str(name) for name in names] for query, names in given.items()}
        except (OSError, ValueError, AttributeError, TypeError):
            raise ValueError(f"{self.file}: expected a JSON file of {{query name: [database names]}}") from None
        number, known = {name: row for row, name in enumerate(database)}, set(queries)
        for name in [*(q for q in pairs if q not in known), *(n for names in pairs.values() for n in names if n not in number)]:
            raise ValueError(f"{self.file}: names {name!r}, and there is no such picture")
        return [np.array(sorted(number[name] for name in pairs.get(query, [])), np.int64) for query in queries]


Rule = Callable[[Sequence[str], Sequence[str]], list[np.ndarray]]

PROTOCOLS: dict[str, Radius | Frames] = {
    "retrieval/utm25": Radius(25.0),
    "retrieval/utm25-heading40": Radius(25.0, 40.0),
    "retrieval/frames1": Frames(1),
    "retrieval/frames2": Frames(2),
    "retrieval/frames10": Frames(10),
}


def resolve(protocol: str, pairs: str | os.PathLike | None = None) -> tuple[str, Rule]:
    """Full name and rule of a protocol; ``retrieval`` alone is ``retrieval/utm25``, ``retrieval/pairs`` takes a file.

    Raises:
        ValueError: unknown, or a file of pairs that is missing or not asked for.
    """
    name = "retrieval/utm25" if protocol == "retrieval" else protocol
    if (name == "retrieval/pairs") != (pairs is not None):
        raise ValueError(f"protocol {name!r}: a file of pairs (--pairs FILE.json) goes with retrieval/pairs, and only with it")
    if name == "retrieval/pairs":
        return name, Pairs(os.fspath(pairs or ""))
    if name not in PROTOCOLS:
        raise ValueError(unknown_name("protocol", name, [*PROTOCOLS, "retrieval/pairs"]))
    return name, PROTOCOLS[name]


def positions(names: Sequence[str]) -> np.ndarray:
    """East and north in metres of pictures, float64 (N, 2), from their names; see `okavango.data.places.position`."""
    return np.array([position(name) for name in names], np.float64).reshape(-1, 2)


def heading(name: str) -> float:
    """Degrees from a picture's name.

    Raises:
        ValueError: no heading in the name.
    """
    try:
        return float(os.path.basename(name).split("@")[HEADING])
    except (IndexError, ValueError):
        raise ValueError(f"picture {name!r} tells no heading; expected it in field {HEADING} of @east@north@...@.jpg") from None


def names_digest(database: Sequence[str], queries: Sequence[str]) -> str:
    """sha256 of the sorted base names of both parts: the same wherever the folders lie, another for another list of queries."""
    parts = ("\n".join(sorted(os.path.basename(name) for name in names)) for names in (database, queries))
    return hashlib.sha256("\n\n".join(parts).encode("utf-8", "surrogateescape")).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Card:
    """A dataset under a rule.

    Attributes:
        name: of the dataset in records; protocol: a name in `PROTOCOLS`, or "retrieval/pairs".
        database, queries: numbers of pictures, None where our sources do not say them exactly.
        subset: which queries.
        names_sha256: see `names_digest`; "" where nobody has told it yet.
        notes: what to know before results are compared.
    """

    name: str
    protocol: str
    database: int | None
    queries: int | None
    subset: str = "all"
    names_sha256: str = ""
    notes: str = ""

    def check(self, database: Sequence[str], queries: Sequence[str]) -> None:
        """Refuse folders that do not hold what the card says.

        Raises:
            ValueError: other numbers of pictures, or other names.
        """
        for part, wanted, found in (("database", self.database, len(database)), ("queries", self.queries, len(queries))):
            if wanted is not None and wanted != found:
                raise ValueError(f"card {self.name}: the {part} has {found:,} pictures, the card says {wanted:,} ({self.subset})")
        if self.names_sha256 and names_digest(database, queries) != self.names_sha256:
            raise ValueError(f"card {self.name}: the numbers of pictures are right, their names are not")

    def to_json(self) -> dict[str, Any]:
        """For records."""
        return {"name": self.name, "subset": self.subset, "notes": self.notes}


def _card(name: str, protocol: str, database: int | None, queries: int | None, **more: str) -> Card:
    return Card(name=name, protocol=f"retrieval/{protocol}", database=database, queries=queries, **more)


CARDS: dict[str, Card] = {
    card.name: card
    for card in (
        _card("pitts30k-test", "utm25", 10_000, 6_816),
        _card("pitts250k-test", "utm25", 83_952, 8_280),
        _card("tokyo247", "utm25", 75_984, 315, notes="pictures by phone, at day, sunset and night, of several sizes"),
        _card("msls-val-740", "utm25", 18_871, 740, subset="the official list"),
        _card(
            "msls-val-11k",
            "utm25",
            18_871,
            None,
            subset="about 11,000, as the common downloader leaves them",
            notes="recall is several points lower than on the official list, with the same model",
        ),
        _card("nordland-3450-frames2", "frames2", 3_450, 3_450, subset="the same share of the frames in both"),
        _card(
            "nordland-frames10",
            "frames10",
            27_592,
            27_592,
            notes="25 m of made positions, about 2.4 m a frame; which season is the database differs between papers",
        ),
        _card(
            "nordland-2760-frames1",
            "frames1",
            27_592,
            2_760,
            subset="every tenth frame",
            notes="in the papers of BoQ and SALAD",
        ),
        _card("st-lucia", "utm25", 1_549, 1_464, notes="numbers not checked against a copy"),
        _card("sped", "pairs", 607, 607, notes="numbers not checked against a copy"),
        _card("amstertime", "pairs", 1_231, 1_231, notes="numbers not checked against a copy"),
        _card("eynsham", "utm25", 23_935, 23_935, notes="numbers not checked against a copy"),
        _card(
            "places-test",
            "utm25",
            84,
            192,
            names_sha256="f866326602387f39dafdc0909ee84f4ef80e83a999db46e193c96e6b39844daa",
            notes="ships with the package; 24 queries have no place in the database",
        ),
    )
}


def find_card(name: str) -> Card:
    """A card by its name.

    Raises:
        ValueError: unknown; the message offers the nearest.
    """
    if name not in CARDS:
        raise ValueError(unknown_name("card", name, CARDS))
    return CARDS[name]
