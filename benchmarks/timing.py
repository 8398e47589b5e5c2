"""What the benchmarks share: candidates that take turns, and records of what they took."""

from __future__ import annotations

import io
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

from candidates.clock import peak_memory as peak_memory  # the candidates' environments cannot import this module
from matplotlib.figure import Figure

from okavango.zoo.leaderboard.page import render, table
from okavango.zoo.leaderboard.records import Record, environment, write_record


def interleave(
    candidates: Mapping[str, Callable[[], object]], repeats: int, clock: Callable[[], float] = time.process_time
) -> dict[str, list[float]]:
    """Seconds of every call; candidates take turns, so that what disturbs the machine disturbs them alike.

    A first round, which warms up, is not counted. The order turns round from one round to the next.

    Args:
        clock: processor time of this process, which other processes disturb least; where work is done by child processes, or with
            more than one thread, `time.perf_counter`, on an idle machine.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(repeats + 1):
        for name in list(candidates)[:: 1 if turn % 2 else -1]:
            start = clock()
            candidates[name]()
            if turn:
                times[name].append(clock() - start)
    return times


def load() -> float:
    """Processes that wanted to run, averaged over the last minute."""
    return round(os.getloadavg()[0], 2)


def speed_record(
    model: str,
    metric: str,
    value: float,
    *,
    protocol: str,
    n: int,
    loads: tuple[float, float],
    times: Mapping[str, list[float]] | None = None,
    settings: Mapping[str, Any] | None = None,
    dataset: str = "random tensors",
    baseline: str = "okavango",
    **facts: Any,
) -> Record:
    """A record whose settings hold every repeat, the medians and the load of the machine before and after.

    Args:
        model, metric, value, dataset, baseline, facts: fields of `Record`; `baseline` says which candidate it is.
        protocol: name and version of the benchmark, e.g. "pretrain_step/v1".
        n: pictures, or other samples, that were measured.
        loads: what `load` said before and after.
        times: what `interleave` returned, seconds.
        settings: whatever else decides the number, fit for JSON.
    """
    versions, hardware = environment()
    measured: dict[str, Any] = {"load_before": loads[0], "load_after": loads[1]}
    if times:
        measured["median_seconds"] = {name: round(median(values), 6) for name, values in times.items()}
        measured["seconds"] = {name: [round(value, 6) for value in values] for name, values in times.items()}
    return Record(
        model=model,
        dataset=dataset,
        protocol=protocol,
        metric=metric,
        value=value,
        n=n,
        baseline=baseline,
        settings={**(settings or {}), **measured},
        versions=versions,
        hardware=hardware,
        command=shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        **facts,
    )


def publish(records: Iterable[Record], out: Path | None, title: str, pictures: Mapping[str, bytes] | None = None) -> None:
    """Print a table of the records; with `out`, write them to that file, one a line, and a page beside it.

    Args:
        out: a file *.jsonl, which is replaced; title: of the page; pictures: caption -> PNG bytes, for the page; bars of all
            values when there are none.
    """
    records = list(records)
    pictures = {"Each value, by what was measured": bars(records)} if pictures is None else pictures
    print(table(records))
    if out:
        out.unlink(missing_ok=True)
        for record in records:
            write_record(out, record)
        print(f"records are in {out}, their page is {render(records, out.with_suffix('.html'), title, pictures)}")


def png(figure: Figure) -> bytes:
    """A figure as a picture for a page."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    return out.getvalue()


def bars(records: list[Record]) -> bytes:
    """PNG: one panel for each dataset, protocol and metric, one bar for each record of it."""
    groups: dict[tuple[str, str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record.dataset, record.protocol, record.metric), []).append(record)
    rows = -(-len(groups) // 2)
    tallest = max(map(len, groups.values()))
    figure = Figure(figsize=(12, rows * (0.7 + 0.24 * tallest)), layout="constrained")
    for number, ((dataset, protocol, metric), members) in enumerate(groups.items()):
        axis = figure.add_subplot(rows, 2, number + 1)
        names = [member.name if member.baseline == member.name else f"{member.name}, {member.baseline}" for member in members]
        drawn = axis.barh(range(len(members)), [member.value for member in members], color="#2a78d6")
        axis.bar_label(drawn, [f"{member.value:.4g}" for member in members], padding=3, fontsize=8)
        axis.set_yticks(range(len(members)), names, fontsize=8)
        axis.invert_yaxis()
        axis.margins(x=0.12)
        axis.tick_params(axis="x", labelsize=8)
        axis.set_title(f"{metric}\n{dataset}, {protocol}", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    return png(figure)


def fresh(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function of a module in a process of its own, which begins with nothing in memory."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()
