"""How the cost of a POA step grows with width, depth, local crops, batch and processes.

    python benchmarks/growth.py [--quick] [--repeats 3] [--threads 1] [--out FILE.jsonl]

One of them varies at a time, the others stay at the base. Each point runs in a process of its own, or in several under torchrun
with gloo, which share the batch: pictures per second of them all by the clock on the wall, and the peak memory of one. Steps are
those of `pretrain_step.py`, on an elastic ViT whose subnets go down to half its width and depth.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from pretrain_step import Case, MultiplyAdds, Step, stand_ins
from timing import interleave, load, peak_memory, png, publish, speed_record

from okavango.recipes.pretraining import poa_vit_small
from okavango.zoo.leaderboard.records import Record

DRAWS = 3  # elastic students that stand for the pool


@dataclass(frozen=True)
class Point:
    """What one measurement is made with; the batch is that of all processes."""

    width: int
    depth: int
    local_crops: int
    batch: int
    processes: int


BASE = Point(width=192, depth=6, local_crops=4, batch=8, processes=1)
GRID = {"width": (64, 128, 192, 384), "depth": (2, 4, 6, 12), "local_crops": (0, 2, 4, 8), "batch": (4, 8, 16), "processes": (1, 2)}


def measure(point: Point, repeats: int, threads: int) -> dict[str, Any]:
    """In a process of the point: seconds of its steps, and its peak memory."""
    torch.set_num_threads(threads)
    if point.processes > 1:
        dist.init_process_group("gloo")
    network = dict(max_width=point.width, min_width=point.width // 2, width_step=point.width // 2, head_dim=32, patch_size=8)
    case = Case(
        recipe=poa_vit_small,
        model_args={**network, "min_depth": point.depth // 2, "max_depth": point.depth},
        batch=point.batch // point.processes,
        global_size=64,
        local_size=32,
        locals=point.local_crops,
    )
    step = Step(case.whole())
    counted = MultiplyAdds(step)
    pool = step.objective.pool
    numbers = [stand_ins([counted.student(step.objective.draw(number)) for number in range(len(pool))], DRAWS)]
    if point.processes > 1:
        dist.broadcast_object_list(numbers)  # the same steps everywhere; each process draws a subnet of its own for them
        step.model = torch.nn.parallel.DistributedDataParallel(step.objective, find_unused_parameters=True)
    times = interleave({f"step {number}": partial(step, number) for number in numbers[0]}, repeats, time.perf_counter)
    found = {
        "seconds": times,
        "peak_mib": peak_memory(),
        "parameters": sum(parameter.numel() for parameter in step.objective.student.parameters()),
    }
    if point.processes > 1:
        dist.destroy_process_group()
    return found


def in_its_own_process(point: Point, repeats: int, threads: int) -> dict[str, Any]:
    """What `measure` finds."""
    launcher = [sys.executable]
    if point.processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(point.processes)]
    task = json.dumps({"point": asdict(point), "repeats": repeats, "threads": threads})
    done = subprocess.run([*launcher, __file__, "--task", task], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def picture(records: Sequence[Record]) -> bytes:
    """PNG: a column for each thing that varies, speed above, memory below."""
    axes = list(dict.fromkeys(record.baseline for record in records))
    metrics = list(dict.fromkeys(record.metric for record in records))
    figure = Figure(figsize=(3 * len(axes), 2.6 * len(metrics)), layout="constrained")
    panels = figure.subplots(len(metrics), len(axes), squeeze=False, sharey="row")
    for row, metric in zip(panels, metrics, strict=True):
        for panel, axis in zip(row, axes, strict=True):
            points = [(r.settings["point"][axis], r.value) for r in records if (r.metric, r.baseline) == (metric, axis)]
            panel.plot(*zip(*points, strict=True), marker="o")
            panel.set_xlabel(axis.replace("_", " "))
            panel.set_xticks([value for value, _ in points])
            panel.set_ylim(bottom=0)
            panel.grid(alpha=0.3)
        row[0].set_ylabel(metric)
    return png(figure)


def main(arguments: Sequence[str] | None = None) -> list[Record]:
    """The whole grid."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="ends of the grid only, one repeat")
    parser.add_argument("--axes", nargs="+", choices=GRID, default=list(GRID), help="what varies")
    parser.add_argument("--repeats", type=int, default=3, help="of every step")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--out", type=Path, help="file of records, a page is written beside it")
    parser.add_argument("--task", help=argparse.SUPPRESS)  # of a process that this script starts
    given = parser.parse_args(arguments)
    if given.task:
        task = json.loads(given.task)
        found = measure(Point(**task["point"]), task["repeats"], task["threads"])
        if not int(os.environ.get("RANK", 0)):
            print(json.dumps(found))
        return []
    repeats = 1 if given.quick else given.repeats
    found, records = {}, []
    for axis in given.axes:
        for value in GRID[axis][:: len(GRID[axis]) - 1] if given.quick else GRID[axis]:
            point, before = replace(BASE, **{axis: value}), load()
            if point not in found:
                found[point] = in_its_own_process(point, repeats, given.threads), (before, load())
            result, loads = found[point]
            rate = point.batch / fmean(map(median, result["seconds"].values()))
            print(f"{axis} {value}: {rate:.2f} pictures/s, {result['peak_mib']:.0f} MiB, load {loads[0]} to {loads[1]}", flush=True)
            for metric, number in (("pictures per second", rate), ("peak memory of a process, MiB", result["peak_mib"])):
                records.append(
                    speed_record(
                        f"{axis.replace('_', ' ')} {value}",
                        metric,
                        number,
                        protocol="growth/v1",
                        n=repeats * DRAWS * point.batch,
                        baseline=axis,
                        loads=loads,
                        times=result["seconds"],
                        settings={"point": asdict(point), "threads": given.threads},
                        parameters=result["parameters"],
                    )
                )
    base = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in asdict(BASE).items())
    publish(records, given.out, "How the cost of a POA step grows", {f"One thing varies at a time around {base}": picture(records)})
    return records


if __name__ == "__main__":
    main()
