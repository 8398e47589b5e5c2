"""What the benchmarks share: candidates that take turns, and records of what they took."""

from __future__ import annotations

import os
import resource
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

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


def peak_memory() -> float:
    """Greatest resident memory of this process so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


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
        out: a file *.jsonl, which is replaced; title: of the page; pictures: caption -> PNG bytes, for the page.
    """
    records = list(records)
    print(table(records))
    if out:
        out.unlink(missing_ok=True)
        for record in records:
            write_record(out, record)
        print(f"records are in {out}, their page is {render(records, out.with_suffix('.html'), title, pictures)}")
