"""What each part of POA is worth: `poa_fashion` whole and with one part left out, at equal steps and from the same seeds.

    python benchmarks/poa_ablations.py --steps 700 --seeds 0 1

Each run is measured in all subnets by k-NN on both test sets. A run that is complete is not made again, one that was stopped goes
on. Several processes share the work by `--only`; the command without it makes what is missing, writes all records to
leaderboard/poa_ablations.jsonl, renders the page beside them and puts the tables into docs/poa.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from poa_fashion import END, ROOT, block_in

from okavango import verbs
from okavango.data.sources import Source, cached, open_source
from okavango.pretrain.state import run_lock
from okavango.recipes import named
from okavango.zoo import hub
from okavango.zoo.checkpoint import file_sha256
from okavango.zoo.leaderboard.page import render
from okavango.zoo.leaderboard.records import Record, paired_bootstrap, read_records, write_record

RECIPE = "poa_fashion"
PROTOCOL = "knn/v1"
ABLATIONS: dict[str, dict[str, Any]] = {  # name -> settings that differ from the recipe's
    "full": {},
    "no-elastic": {"objective.elastic": False},
    "no-same-view": {"objective.same_view": False},
    "no-rescale": {"model_args": {"rescale": False}},
    "scale-1": {"objective.sampling_scale": 1.0},
}
START = "<!-- benchmarks/poa_ablations.py writes from here -->"


@dataclass(frozen=True)
class Measured:
    """One run in all its subnets.

    Attributes:
        records: one per subnet and test set.
        correct: (test set, subnet) -> bool (N,), which test pictures were told right.
    """

    records: list[Record]
    correct: dict[tuple[str, str], np.ndarray]


Results = Mapping[str, Sequence[Measured]]  # ablation -> its runs, a seed each, in the same order everywhere


# -- running and measuring --------------------------------------------------------------------------------------------------


def train(name: str, steps: int, seed: int, threads: int, out: Path) -> Path:
    """The run of one ablation and seed; returns its folder.

    Raises:
        SystemExit: the run was stopped by a signal.
    """
    run = out / f"{name}-steps{steps}-seed{seed}"
    finished = run / "export-full" / "config.json"  # the last thing that a run exports
    if not finished.exists():
        recipe, changes = named(RECIPE, "pretrain"), dict(ABLATIONS[name])
        changes["model_args"] = recipe.model_args | changes.get("model_args", {})
        verbs.pretrain(
            recipe,
            out=run,
            say=lambda line: print(f"{name}, seed {seed}: {line}", flush=True),
            **changes,
            steps=steps,
            seed=seed,
            threads=threads,
            eval_every=0,
            save_every=100,
        )
    if not finished.exists():
        sys.exit(f"{run}: stopped before its end; the same command goes on from there")
    return run


def measure(run: Path, name: str, steps: int, seed: int, train_source: Source, tests: Sequence[Source]) -> Measured:
    """Every subnet of a finished run on all test sets; what its folder holds already is not measured again."""
    file, answers, unfinished = run / "subnets.jsonl", run / "subnets.npz", run / "subnets.part"
    if not file.exists():
        recipe, correct = named(RECIPE, "pretrain"), {}
        changes = ", ".join(f"{key} {value}" for key, value in ABLATIONS[name].items()) or "nothing changed"
        facts = {
            "model": recipe.model,
            "label": f"{name}, seed {seed}",
            "baseline": name,
            "notes": f"{RECIPE}, {steps} steps of {recipe.run.batch} pictures, seed {seed}, {changes}",
            "weights_sha256": file_sha256(run / "export" / "model.safetensors"),
            "latency_ms": None,  # several processes may share the machine
        }
        unfinished.unlink(missing_ok=True)
        for embed, own in verbs.backbone_jobs(hub.load(str(run / "export")), "all", **facts):
            for record, outcome in verbs.outcomes(embed, train_source, tests, [PROTOCOL], seed=seed, **own):
                write_record(unfinished, record)
                correct[f"{record.dataset} {record.subnet}"] = outcome.correct
            print(f"{name}, seed {seed}, {own['subnet']}: measured", flush=True)
        np.savez_compressed(answers, **correct)
        unfinished.replace(file)  # last: with it, all is there
    records = read_records(file)
    with np.load(answers) as arrays:
        return Measured(records, {(r.dataset, r.subnet): arrays[f"{r.dataset} {r.subnet}"] for r in records})


# -- what they come to ------------------------------------------------------------------------------------------------------


def sizes(records: Sequence[Record]) -> dict[str, list[str]]:
    """Subnets by number of parameters, in three parts ("smallest 5"), and the intact network."""
    parameters = {record.subnet: record.parameters or 0 for record in records}
    ordered = sorted(parameters, key=lambda subnet: (parameters[subnet], subnet))
    thirds = np.array_split(np.array(ordered), 3)
    groups = zip(("smallest", "middle", "largest"), thirds, strict=True)
    return {f"{name} {len(third)}": third.tolist() for name, third in groups} | {"intact": ordered[-1:]}


def hits(runs: Sequence[Measured], dataset: str, subnets: Sequence[str]) -> np.ndarray:
    """Share of the subnets that told each picture right: (seeds, N)."""
    return np.stack([np.mean([run.correct[dataset, subnet] for subnet in subnets], axis=0) for run in runs])


def block(results: Results, steps: int) -> str:
    """The tables of docs/poa.md: accuracies with their range over seeds, and differences to the full method."""
    records = [record for runs in results.values() for run in runs for record in run.records]
    groups, seeds = sizes(records), ", ".join(map(str, sorted({record.seed for record in records})))
    columns, rule = " | ".join(groups), "|---" * (2 + len(groups)) + "|"
    accuracies = [f"| test pictures | accuracy | {columns} |", rule]
    differences = [f"| test pictures | less that of `full` | {columns} |", rule]
    for dataset in dict.fromkeys(record.dataset for record in records):
        for name, runs in results.items():
            cells, changes = [], []
            for subnets in groups.values():
                ours, full = hits(runs, dataset, subnets), hits(results["full"], dataset, subnets)
                per_seed = ours.mean(1)
                cells.append(f"{ours.mean():.3f} ({per_seed.min():.3f}..{per_seed.max():.3f})")
                change, low, high = paired_bootstrap(ours.mean(0), full.mean(0), seed=0)
                changes.append(f"{change:+z.3f} ({low:+z.3f}..{high:+z.3f})")  # z: no minus before zero
            accuracies.append(f"| {dataset} | `{name}` | " + " | ".join(cells) + " |")
            if name != "full":
                differences.append(f"| {dataset} | `{name}` | " + " | ".join(changes) + " |")
    said = f"{steps} steps, seeds {seeds}; {PROTOCOL}; means over the smallest subnets, the middle ones, the largest ones."
    return "\n".join([START, said, "", *accuracies, "", *differences, END])


def report(results: Results, steps: int) -> None:
    """Records, page and tables."""
    records = [record for runs in results.values() for run in runs for record in run.records]
    out = ROOT / "leaderboard" / "poa_ablations.jsonl"
    unfinished = out.with_suffix(".part")
    unfinished.unlink(missing_ok=True)
    for record in records:
        write_record(unfinished, record)
    unfinished.replace(out)
    render(records, out.with_suffix(".html"), title="POA, one part left out at a time")
    page = ROOT / "docs" / "poa.md"
    text, tables = page.read_text(), block(results, steps)
    page.write_text(text.replace(block_in(text, START), tables))
    print(tables)


def pictures() -> tuple[Source, list[Source]]:
    """Training and test pictures of the measurements."""
    return cached(open_source("samples/fashion:train")), [cached(open_source(f"samples/fashion:{n}")) for n in ("test", "moved")]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=700, help="of every run; schedules shrink with it")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="each ablation runs once with every seed")
    parser.add_argument("--only", nargs="+", choices=list(ABLATIONS), metavar="NAME", help=f"of {', '.join(ABLATIONS)}; no report")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--out", type=Path, default=Path("runs/poa_ablations"), help="folder of the run folders")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    sources = pictures()
    results: dict[str, list[Measured]] = {name: [] for name in given.only or ABLATIONS}
    for seed in dict.fromkeys(given.seeds):
        for name, runs in results.items():
            run = train(name, given.steps, seed, given.threads, given.out)
            with run_lock(run):
                runs.append(measure(run, name, given.steps, seed, *sources))
    if not given.only:
        report(results, given.steps)


if __name__ == "__main__":
    main()
