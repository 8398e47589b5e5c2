"""One page for all subsets of sequences: a table that is a heat map, and where the numbers come from."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from okavango.files import page_template, write_whole

Cell = tuple[float, tuple[float, float] | None, int]  # value, 95 % interval, studies
LOWER_IS_BETTER = ("HD95", "integrated Brier score")


def render(
    path: str | os.PathLike,
    rows: Sequence[tuple[Sequence[str], Mapping[str, Cell]]],
    modalities: Sequence[str],
    *,
    title: str,
    protocol: str,
    facts: Mapping[str, Any],
) -> Path:
    """Write the page: a row per subset, a column per metric, darker where it is better; it needs nothing else.

    Args:
        rows: subset -> metric -> cell; a metric that a subset lacks stays empty.
        modalities: in the order of the columns of dots.
        title: a heading; say "semi-synthetic" there where it is.
        protocol: what was measured.
        facts: where the numbers come from, fit for JSON.
    """
    names = list(dict.fromkeys(name for _, cells in rows for name in cells))
    spans = {}
    for name in names:
        values = [cells[name][0] for _, cells in rows if name in cells]
        spans[name] = (min(values), max(values))
    html = page_template(Path(__file__).with_name("page.html.j2")).render(
        title=title,
        protocol=protocol,
        modalities=modalities,
        metrics=names,
        rows=[(subset, [_cell(name, cells.get(name), spans[name]) for name in names]) for subset, cells in rows],
        facts=json.dumps(facts, indent=1),
    )
    path = Path(path)
    write_whole(path, lambda file: file.write(html.encode()))
    return path


def _cell(name: str, cell: Cell | None, span: tuple[float, float]) -> dict[str, Any] | None:
    """What a cell shows; the colour says where its value lies within the span of the column."""
    if cell is None:
        return None
    value, interval, count = cell
    share = (value - span[0]) / (span[1] - span[0]) if span[1] > span[0] else 0.5
    if name.startswith(LOWER_IS_BETTER):
        share = 1 - share
    between = f"{interval[0]:.3g} to {interval[1]:.3g}, " if interval else ""
    return {"value": f"{value:.3f}", "between": between, "count": count, "colour": f"hsl(140 45% {97 - 35 * share:.0f}%)"}
