"""A run of retrieval as one HTML page that needs nothing else: numbers, failures, ranked strips, matches, a map."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from okavango.data.sources import Source
from okavango.downstream.retrieval.describe import Described, cell_centres
from okavango.downstream.retrieval.evaluate import Ranking
from okavango.downstream.retrieval.protocols import positions
from okavango.downstream.retrieval.rerank import mutual
from okavango.files import page_template, write_whole

SIDE = 132  # pixels of a picture's longer side in a strip
LINES = 60  # matches that are drawn on a pair
GAP = 60.0  # metres: wider stretches without any picture are drawn as this


def render(
    out: str | os.PathLike,
    ranking: Ranking,
    database: Source,
    queries: Source,
    *,
    known: Described,
    asked: Described,
    title: str,
    summary: Mapping[str, str],
    details: str,
    upsampled: bool = False,
    shown: int = 12,
    columns: int = 6,
) -> Path:
    """Write the page, whole or not at all; the same run gives the same bytes.

    Args:
        database, queries: where the pictures are read from; known, asked: how they were described.
        title: of the page; summary: name -> value, in large figures; details: settings, as text.
        upsampled: see `okavango.downstream.retrieval.describe.cell_centres`.
        shown: queries in each gallery; columns: predictions of each.
    Returns:
        the path that was written.
    """
    right, answerable = ranking.right, ranking.answerable
    failures = np.flatnonzero(answerable & ~right[:, 0])
    successes = np.flatnonzero(right[:, 0])
    unanswerable = np.flatnonzero(~answerable)
    drawer = _Drawer(ranking, database, queries, known, asked, columns)
    texts = {
        "Failures": f"{len(failures)} of {answerable.sum()} queries with a place in the database find another place first.",
        "Found": f"{len(successes)} queries find their place first.",
        "Without a place": f"{len(unanswerable)} queries have no place in the database; whatever comes first is wrong.",
    }
    galleries = zip(texts.items(), (failures, successes, unanswerable), strict=True)
    matched = [*_spread(successes, 2), *_spread(failures, 2)] if ranking.scores is not None else []
    html = page_template(Path(__file__).with_name("page.html.j2")).render(
        title=title,
        summary=summary,
        details=details,
        galleries=[
            {"name": name, "text": text, "strips": [drawer.strip(query) for query in _spread(rows, shown)], "all": len(rows)}
            for (name, text), rows in galleries
            if len(rows)
        ],
        matches=[drawer.matches(query, upsampled) for query in matched],
        map=_map(ranking) if ranking.located else None,
        curve=_curve(ranking),
        bad=ranking.bad,
    )
    write_whole(Path(out), lambda file: file.write(html.encode("utf-8", "replace")))
    return Path(out)


class _Drawer:
    def __init__(self, ranking: Ranking, database: Source, queries: Source, known: Described, asked: Described, columns: int):
        self.ranking, self.database, self.queries, self.known, self.asked = ranking, database, queries, known, asked
        self.columns, self.right = columns, ranking.right
        self.metres: np.ndarray | None = None
        if ranking.located:
            there, here = positions(ranking.database), positions(ranking.queries)
            first = ranking.predictions[:, :columns]
            self.metres = np.hypot(*np.moveaxis(there[first] - here[:, None], -1, 0))

    def strip(self, query: int) -> dict[str, Any]:
        """A query and its first predictions; the first right one at the end where it comes later."""
        ranks = [rank for rank in range(min(self.columns, self.right.shape[1])) if self.ranking.predictions[query, rank] >= 0]
        later = np.flatnonzero(self.right[query, self.columns :])[:1] + self.columns
        cells = [self._cell(query, rank) for rank in [*ranks, *later.tolist()]]
        return {"query": {"picture": self._query(query), "name": self.ranking.queries[query]}, "cells": cells}

    def _cell(self, query: int, rank: int) -> dict[str, Any]:
        row, texts = int(self.ranking.predictions[query, rank]), []
        if self.metres is not None and rank < self.metres.shape[1]:
            texts.append(_metres(self.metres[query, rank]))
        texts.append(f"distance {self.ranking.distances[query, rank]:.2f}")
        scores = self.ranking.scores
        if scores is not None and rank < scores.shape[1]:
            texts.append(f"score {scores[query, rank]:.4g}")
        return {
            "picture": self._known(row),
            "name": self.ranking.database[row],
            "right": bool(self.right[query, rank]),
            "rank": rank + 1,
            "texts": texts,
        }

    def matches(self, query: int, upsampled: bool) -> dict[str, Any]:
        """Mutual nearest neighbours between a query and its first prediction, as lines between the two pictures."""
        row = int(self.ranking.predictions[query, 0])
        here, there = self.asked.local([query]), self.known.local([row])
        partner, both = mutual(here.flatten(1, 2), there.flatten(1, 2))
        cells = np.flatnonzero(both[0].numpy())
        cosines = (here.flatten(1, 2)[0] * there.flatten(1, 2)[0, partner[0]]).sum(1).numpy()[cells]
        best = cells[np.argsort(-cosines, kind="stable")[:LINES]]
        start = cell_centres(*here.shape[1:3], upsampled=upsampled)[best]
        end = cell_centres(*there.shape[1:3], upsampled=upsampled)[partner[0].numpy()[best]]
        side, gap = 250, 30
        lines = [
            {
                "x1": f"{side * a[0]:.1f}",
                "y1": f"{side * a[1]:.1f}",
                "x2": f"{side + gap + side * b[0]:.1f}",
                "y2": f"{side * b[1]:.1f}",
                "hue": int(300 * a[0]),
            }
            for a, b in zip(start, end, strict=True)
        ]
        return {
            "side": side,
            "gap": gap,
            "query": self._query(query, side),
            "prediction": self._known(row, side),
            "right": bool(self.right[query, 0]),
            "lines": lines,
            "text": f"{len(cells)} mutual matches of {both.shape[1]} cells, the {len(lines)} most similar drawn",
            "names": f"{self.ranking.queries[query]} and {self.ranking.database[row]}",
        }

    def _query(self, query: int, side: int = SIDE) -> str:
        return _data_url(self.queries, int(self.asked.index[query]), side)

    def _known(self, row: int, side: int = SIDE) -> str:
        return _data_url(self.database, int(self.known.index[row]), side)


def _data_url(source: Source, number: int, side: int) -> str:
    pixels = source[number]["image"].permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    picture.thumbnail((side, side))
    stream = io.BytesIO()
    picture.convert("RGB").save(stream, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()


def _spread(rows: np.ndarray, count: int) -> list[int]:
    """At most `count` of the rows, evenly chosen."""
    return [int(rows[i]) for i in np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int))]


def _metres(value: float) -> str:
    return f"{value:.0f} m" if value < 999.5 else f"{value / 1000:.1f} km" if value < 99_950 else f"{value / 1000:.0f} km"


def _map(ranking: Ranking, width: int = 1080, most: int = 4000) -> dict[str, Any]:
    """Queries where they were taken, and a line from each wrong one to what it was taken for."""
    there, here = positions(ranking.database), positions(ranking.queries)
    true = np.ptp(np.concatenate([there, here]), axis=0).max()
    everything = np.stack([_without_gaps(axis) for axis in np.concatenate([there, here]).T], 1)
    there, here = np.split(everything, [len(there)])
    low, span = everything.min(0), np.ptp(everything, axis=0).clip(1e-9)
    scale = (width - 40) / max(span[0], 2 * span[1])
    height = int(span[1] * scale) + 40

    def place(points: np.ndarray) -> list[tuple[str, str]]:
        at = 20 + (points - low) * scale
        return [(f"{x:.1f}", f"{height - y:.1f}") for x, y in at]  # north is up

    known, asked, right = place(there), place(here), ranking.right[:, 0]
    first, answerable = ranking.predictions[:, 0], ranking.answerable
    kinds = np.where(right, "right", np.where(answerable, "wrong", "none"))
    drawn = _spread(np.arange(len(asked)), most)
    return {
        "width": width,
        "height": height,
        "database": [known[i] for i in _spread(np.arange(len(known)), most)],
        "lines": [(*asked[i], *known[first[i]]) for i in drawn if not right[i] and answerable[i] and first[i] >= 0],
        "queries": [(*asked[i], kinds[i], ranking.queries[i]) for i in drawn],
        "metres": _metres(float(true)),
        "gap": _metres(GAP) if span.max() < true - 1 else "",
    }


def _without_gaps(values: np.ndarray) -> np.ndarray:
    """Coordinates along one axis, with stretches of more than `GAP` without any shortened to it."""
    order = np.argsort(values, kind="stable")
    steps = np.diff(values[order], prepend=values[order[:1]])
    shortened = np.empty_like(values)
    shortened[order] = np.minimum(steps, GAP).cumsum()
    return shortened


def _curve(ranking: Ranking, width: int = 520, height: int = 240) -> dict[str, Any]:
    """Recall@N against N, over all and over answerable queries, as points of two lines."""
    right = ranking.right
    ranks = np.arange(1, right.shape[1] + 1)
    found = np.maximum.accumulate(right, 1)
    x = 40 + (width - 60) * np.log(ranks) / max(np.log(ranks[-1]), 1e-9)

    def line(values: np.ndarray) -> str:
        return " ".join(f"{a:.1f},{10 + (height - 40) * (1 - b):.1f}" for a, b in zip(x, values, strict=True))

    marks = [n for n in (1, 2, 5, 10, 20, 50, 100) if n <= ranks[-1]]
    return {
        "width": width,
        "height": height,
        "all": line(found.mean(0)),
        "answerable": line(found[ranking.answerable].mean(0)),
        "x": [(f"{x[n - 1]:.1f}", n) for n in marks],
        "y": [(f"{10 + (height - 40) * (1 - share):.1f}", f"{100 * share:.0f}") for share in (0, 0.25, 0.5, 0.75, 1)],
    }
