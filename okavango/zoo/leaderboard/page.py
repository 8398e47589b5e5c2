"""Records as a page and as a table for the terminal. Both are pure functions of the records."""

from __future__ import annotations

import base64
import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

from okavango.files import page_template, write_whole
from okavango.zoo.leaderboard.records import Record

_SHARES = re.compile(r"(top|acc|r@|recall|precision|f1|map|miou|iou|dice)", re.IGNORECASE)
_PNG = b"\x89PNG\r\n\x1a\n"
_SUBNET = re.compile(r"w(\d+)_d(\d+(?:-\d+)*)")  # as `models.features.Subnet` prints it; that module would import torch

#: Colours of the maps, from low to high: dark blue over teal to light yellow, each as far from the next in CIELAB and lighter.
RAMP = (
    *("#252b60", "#004377", "#005c87", "#00728e", "#198a95", "#2da199"),
    *("#49b597", "#6fc691", "#99d58b", "#c4e289", "#efed8e"),
)
DARK = 4  # text is white on the first four, black on the others: at least 4.5 : 1


def render(
    records: Iterable[Record],
    out_html: str | os.PathLike,
    title: str = "Leaderboard",
    pictures: Mapping[str, bytes] | None = None,
) -> Path:
    """Write one HTML file that needs nothing else: no network, no other file.

    Rows can be sorted and filtered, plots and maps follow the filters, each row opens its provenance. A map has a cell for each
    width and depth of a model whose subnets were measured on a grid of at least 2 x 2. Without JavaScript table and maps are still
    there. The file is replaced whole or not at all, and the same records give the same bytes.

    Args:
        records: in any order; the page begins with the highest value, and where no metric has half of more than 12 of them
            with the one that has most.
        out_html: the file to write; its folder is made.
        title: of the page.
        pictures: caption -> PNG bytes, shown below the table.
    Returns:
        the path that was written.
    Raises:
        ValueError: a picture that is not a PNG.
    """
    records = sorted(records, key=lambda record: (-record.value, record.name, record.subnet, json.dumps(record.to_json())))
    figures = []
    for caption, png in (pictures or {}).items():
        if not png.startswith(_PNG):
            raise ValueError(f"picture {caption!r}: expected the bytes of a PNG file")
        figures.append({"caption": caption, "png": base64.b64encode(png).decode()})
    best = _best(records)
    rows = [_row(record, index in best) for index, record in enumerate(records)]
    html = page_template(Path(__file__).with_name("page.html.j2")).render(
        title=title,
        rows=rows,
        points=_script_json([_point(record, row) for record, row in zip(records, rows, strict=True)]),
        filters=_filters(records),
        map_groups=_map_groups(records),
        ramp=RAMP,
        dark=DARK,
        figures=figures,
        summary=_summary(records),
        heading=_heading(records),
    )
    out = Path(out_html)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, lambda file: file.write(html.encode()))
    return out


def table(records: Iterable[Record]) -> str:
    """Plain text for a terminal: aligned columns, highest value first within each dataset and protocol.

    Control characters in names are left out.
    """
    heads = ("model", "subnet", "baseline", "params", "ms", "dataset", "protocol", "metric", "value", "95 % interval", "n")
    ordered = sorted(records, key=lambda record: (record.dataset, record.protocol, record.metric, -record.value, record.name))
    if not ordered:
        return "no records"
    lines: list[tuple[str, ...]] = [heads]
    for r in ordered:
        cells = (r.name, r.subnet, r.baseline, _count(r.parameters), _milliseconds(r.latency_ms), r.dataset, r.protocol, r.metric)
        lines.append((*map(_plain, cells), _value(r, r.value), _interval(r), f"{r.n:,}"))
    right = {3, 4, 8, 9, 10}
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width) for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    text.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in text)


# -- one record, written out ---------------------------------------------------------------------------------------------


def _row(record: Record, best: bool) -> dict[str, Any]:
    return {
        "name": record.name,
        "subnet": record.subnet,
        "baseline": record.baseline,
        "parameters": _count(record.parameters),
        "latency": _milliseconds(record.latency_ms),
        "dataset": record.dataset,
        "protocol": record.protocol,
        "metric": record.metric,
        "value": _value(record, record.value),
        "interval": _interval(record),
        "n": f"{record.n:,}",
        "best": best,
        "keys": [
            record.name,
            record.subnet,
            record.baseline,
            record.parameters,
            record.latency_ms,
            record.dataset,
            record.protocol,
            record.value,
            record.n,
        ],
        "provenance": _provenance(record),
    }


def _provenance(record: Record) -> list[tuple[str, str, str]]:
    """(name, text, kind) of what stands behind a number; kind is "text", "code" or "block"."""
    entries = [
        ("Model", record.model, "code"),
        ("Weights sha256", record.weights_sha256, "code"),
        ("Parameters", "" if record.parameters is None else f"{record.parameters:,}", "text"),
        ("Training manifest sha256", record.train_manifest_sha256, "code"),
        ("Test manifest sha256", record.test_manifest_sha256, "code"),
        (
            "Value",
            repr(record.value) + (f", 95 % {record.interval[0]!r} to {record.interval[1]!r}" if record.interval else ""),
            "text",
        ),
        ("Seed", str(record.seed), "text"),
        ("Created", record.created, "text"),
        ("Hardware", _pairs(record.hardware), "text"),
        ("Versions", _pairs(record.versions), "text"),
        ("Notes", record.notes, "text"),
        ("Command", record.command, "block"),
        ("Settings", json.dumps(record.settings, ensure_ascii=False) if record.settings else "", "block"),
    ]
    return [entry for entry in entries if entry[1]]


def _point(record: Record, row: Mapping[str, Any]) -> dict[str, Any]:
    low, high = record.interval or (None, None)
    return {
        "name": record.name,
        "subnet": record.subnet,
        "baseline": record.baseline,
        "dataset": record.dataset,
        "protocol": record.protocol,
        "metric": record.metric,
        "share": _is_share(record),
        "value": record.value,
        "low": low,
        "high": high,
        "parameters": record.parameters,
        "latency": record.latency_ms,
        "text": {key: row[key] for key in ("value", "interval", "parameters", "latency")},
        "search": " ".join(
            (
                record.model,
                record.label,
                record.subnet,
                record.baseline,
                record.dataset,
                record.protocol,
                record.metric,
                record.notes,
            )
        ).lower(),
        "keys": row["keys"],
    }


def _pairs(values: Mapping[str, Any]) -> str:
    return " · ".join(f"{key} {value}" for key, value in values.items())


def _is_share(record: Record) -> bool:
    """True for accuracies and the like, which are stored as 0..1 and shown in per cent."""
    return bool(_SHARES.match(record.metric)) and 0 <= record.value <= 1


def _value(record: Record, value: float) -> str:
    return f"{100 * value:.1f} %" if _is_share(record) else f"{value:.4g}"


def _interval(record: Record) -> str:
    if record.interval is None:
        return ""
    low, high = record.interval
    return f"{100 * low:.1f}–{100 * high:.1f}" if _is_share(record) else f"{low:.4g} to {high:.4g}"


def _count(number: int | None) -> str:
    """Parameters in three digits: 812, 4.91 M, 1.20 B; nothing when unknown."""
    if number is None:
        return ""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= 0.9995 * size:
            scaled = number / size
            return f"{scaled:.{2 if scaled < 9.995 else 1 if scaled < 99.95 else 0}f} {unit}"
    return str(number)


def _milliseconds(number: float | None) -> str:
    if number is None:
        return ""
    return f"{number:.0f}" if number >= 100 else f"{number:.1f}" if number >= 10 else f"{number:.2f}"


def _plain(text: str) -> str:
    return "".join(character for character in text if unicodedata.category(character)[0] != "C")


# -- maps of width x depth -----------------------------------------------------------------------------------------------


def _map_groups(records: list[Record]) -> list[dict[str, Any]]:
    """Grids of measured subnets: one group for each dataset, protocol and metric, one map in it for each model and baseline."""
    grids: dict[tuple[str, str, str], dict[tuple[str, str], dict[tuple[int, tuple[int, ...]], int]]] = {}
    for index, record in enumerate(records):
        if (size := _size(record.subnet)) is None:
            continue
        group = grids.setdefault((record.dataset, record.protocol, record.metric), {})
        grid = group.setdefault((record.name, record.baseline), {})
        if size not in grid or records[grid[size]].created < record.created:  # measured twice: the newer counts
            grid[size] = index
    groups = []
    for (dataset, protocol, metric), group in sorted(grids.items()):
        kept = {key: grid for key, grid in group.items() if _covers_a_square(grid)}
        if not kept:
            continue
        cells = [records[index] for grid in kept.values() for index in grid.values()]
        low, high = min(cells, key=lambda r: r.value), max(cells, key=lambda r: r.value)
        maps = [
            {"name": name, "baseline": baseline, **_map(grid, records, low.value, high.value)}
            for (name, baseline), grid in kept.items()
        ]
        unit = ", %" if all(map(_is_share, cells)) else ""
        ends = {"low": _value(low, low.value), "high": _value(high, high.value)}
        groups.append({"dataset": dataset, "protocol": protocol, "metric": metric, "unit": unit, "maps": maps, **ends})
    return groups


def _map(grid: Mapping[tuple[int, tuple[int, ...]], int], records: list[Record], low: float, high: float) -> dict[str, Any]:
    """Rows are widths; columns are depths, by the number of blocks."""
    depths = sorted({depth for _, depth in grid}, key=lambda depth: (sum(depth), depth))
    rows = []
    for width in sorted({width for width, _ in grid}):
        cells: list[dict[str, Any] | None] = []
        for depth in depths:
            index = grid.get((width, depth))
            if index is None:
                cells.append(None)
                continue
            record = records[index]
            # half a step up and down, as JavaScript's Math.round: the page colours anew what is left by its filters
            level = int((len(RAMP) - 1) * (record.value - low) / (high - low) + 0.5) if high > low else len(RAMP) // 2
            value = _value(record, record.value).removesuffix(" %")
            cells.append({"row": index, "level": level, "value": value, "interval": _interval(record)})
        rows.append({"width": width, "cells": cells})
    return {"depths": ["-".join(map(str, depth)) for depth in depths], "rows": rows}


def _size(subnet: str) -> tuple[int, tuple[int, ...]] | None:
    """Width and depths (one number, or one per stage) of a subnet's name; None for another name."""
    match = _SUBNET.fullmatch(subnet)
    return (int(match[1]), tuple(map(int, match[2].split("-")))) if match else None


def _covers_a_square(grid: Iterable[tuple[int, tuple[int, ...]]]) -> bool:
    """True when two widths have two depths in common."""
    depths: dict[int, set[tuple[int, ...]]] = {}
    for width, depth in grid:
        depths.setdefault(width, set()).add(depth)
    return any(len(a & b) > 1 for a, b in combinations(depths.values(), 2))


# -- the page as a whole -------------------------------------------------------------------------------------------------


def _best(records: list[Record]) -> set[int]:
    """Indices of the highest value of each dataset, protocol and metric that two or more records share."""
    groups: dict[tuple[str, str, str], list[int]] = {}
    for index, record in enumerate(records):
        if _is_share(record):
            groups.setdefault((record.dataset, record.protocol, record.metric), []).append(index)
    top = {key: max(records[i].value for i in indices) for key, indices in groups.items()}
    return {i for key, indices in groups.items() if len(indices) > 1 for i in indices if records[i].value == top[key]}


def _filters(records: list[Record]) -> list[dict[str, Any]]:
    filters = []
    for key in ("dataset", "protocol", "baseline", "metric"):
        counts = Counter(getattr(record, key) for record in records)
        if key != "metric" or len(counts) > 1:
            filters.append({"key": key, "options": sorted(counts.items())})
    return filters


def _heading(records: list[Record]) -> str:
    metrics = sorted({record.metric for record in records})
    return metrics[0][:1].upper() + metrics[0][1:] if len(metrics) == 1 else "Value"


def _summary(records: list[Record]) -> list[str]:
    def amount(number: int, noun: str) -> str:
        return f"{number} {noun}{'' if number == 1 else 's'}"

    parts = [
        amount(len(records), "result"),
        amount(len({record.name for record in records}), "model"),
        amount(len({record.dataset for record in records}), "dataset"),
        amount(len({record.protocol for record in records}), "protocol"),
    ]
    newest = max((record.created[:10] for record in records), default="")
    return [*parts, f"newest {newest}"] if newest else parts


def _script_json(data: Any) -> str:
    """JSON that cannot end or open a script element, whatever the names are."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
