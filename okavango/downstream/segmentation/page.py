"""One page for all subsets of sequences: a table that is a heat map, and where the numbers come from."""

from __future__ import annotations

import html
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from okavango.files import write_whole
from okavango.zoo.leaderboard.records import Record

Cell = tuple[float, tuple[float, float] | None, int]  # value, 95 % interval, studies
LOWER_IS_BETTER = ("HD95", "integrated Brier score")

_STYLE = """
:root{color-scheme:light dark}
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:80rem;padding:0 1rem}
table{border-collapse:collapse}
th,td{padding:.3rem .6rem;text-align:right;border:1px solid #8884}
th{font-weight:600}
td.dot,th.dot{text-align:center;padding:.3rem .45rem}
td.cell{color:#111}
td.cell small{display:block;color:#333;font-size:.72rem}
caption{text-align:left;padding-bottom:.6rem}
.scroll{overflow-x:auto}
pre{white-space:pre-wrap;font-size:.8rem}
"""


def render(
    path: str | os.PathLike,
    rows: Sequence[tuple[Sequence[str], Mapping[str, Cell]]],
    modalities: Sequence[str],
    *,
    title: str,
    about: Record,
) -> Path:
    """Write the page: a row per subset, a column per metric, darker where it is better; it needs nothing else.

    Args:
        rows: subset -> metric -> cell; a metric that a subset lacks stays empty.
        modalities: in the order of the columns of dots.
        title: a heading; say "semi-synthetic" there where it is.
        about: one of the records, for protocol, command and versions.
    """
    names = list(dict.fromkeys(name for _, cells in rows for name in cells))
    ranges = {}
    for name in names:
        values = [cells[name][0] for _, cells in rows if name in cells]
        ranges[name] = (min(values), max(values))
    head = "".join(f'<th class="dot" scope="col">{html.escape(name)}</th>' for name in modalities)
    head += "".join(f'<th scope="col">{html.escape(name)}</th>' for name in names)
    body = []
    for subset, cells in rows:
        dots = "".join(f'<td class="dot">{"●" if name in subset else "○"}</td>' for name in modalities)
        filled = "".join(_cell(name, cells.get(name), ranges[name]) for name in names)
        body.append(f"<tr>{dots}{filled}</tr>")
    facts = {
        "protocol": about.protocol,
        "dataset": about.dataset,
        "command": about.command,
        "created": about.created,
        "seed of intervals": about.seed,
        "settings": {key: value for key, value in about.settings.items() if key not in ("modalities", "region", "cases", "median")},
        "versions": about.versions,
        "hardware": about.hardware,
    }
    text = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>
<h1>{html.escape(title)}</h1>
<div class="scroll"><table><caption>{html.escape(about.protocol)}: which sequences each study was seen with (●), and the mean over
studies with its 95&nbsp;% bootstrap interval and number. Green is the best of a column, white the worst. HD95 is in millimetres.
</caption><thead><tr>{head}</tr></thead><tbody>
{chr(10).join(body)}
</tbody></table></div>
<h2>Where this comes from</h2><pre>{html.escape(json.dumps(facts, indent=1))}</pre>
</body></html>
"""
    path = Path(path)
    write_whole(path, lambda file: file.write(text.encode()))
    return path


def _cell(name: str, cell: Cell | None, span: tuple[float, float]) -> str:
    if cell is None:
        return "<td>-</td>"
    value, interval, count = cell
    share = (value - span[0]) / (span[1] - span[0]) if span[1] > span[0] else 0.5
    if name.startswith(LOWER_IS_BETTER):
        share = 1 - share
    between = f"{interval[0]:.3g} to {interval[1]:.3g}, " if interval else ""
    colour = f"hsl(140 45% {97 - 35 * share:.0f}%)"
    return f'<td class="cell" style="background:{colour}">{value:.3f}<small>{between}n&nbsp;{count}</small></td>'
