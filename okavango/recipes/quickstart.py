"""The whole job in a few minutes: pretrain, extract, measure, draw. Everything it shows was measured while it ran."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from okavango import verbs
from okavango.data.loading import derive
from okavango.data.sources import Part, cached, open_source
from okavango.models.backbone import Backbone, create_model
from okavango.models.elastic_vit import ElasticViT
from okavango.models.features import Subnet
from okavango.recipes import named
from okavango.zoo.checkpoint import file_sha256
from okavango.zoo.hub import load, resolve
from okavango.zoo.leaderboard.page import render, table
from okavango.zoo.leaderboard.records import Record

SHIPPED = "elastic_vit_tiny.poa_fashion"
STEPS = 150
BANK, QUERIES = 3000, 1000  # pictures that answer and that ask; the shipped records use all 10,000 and 2,000
PROTOCOLS = ("knn/v1", "logistic/v1")


def quickstart(out: Path, *, steps: int = 0, seed: int = 0, say: Callable[[str], None] = print) -> list[Record]:
    """Run it; returns the records. See `okavango quickstart --help`."""
    begun = time.perf_counter()
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    recipe = named("poa_fashion", "pretrain")
    recipe = replace(recipe, run=replace(recipe.run, steps=steps or STEPS, seed=seed, log_every=10, save_every=100))
    say(f"1. pretraining {recipe.model} on {recipe.data} for {recipe.run.steps} steps of {recipe.run.batch} pictures")
    run = verbs.pretrain(recipe, out=out / f"run-seed{seed}-steps{recipe.run.steps}", say=say)

    torch.manual_seed(derive(seed, "initial weights"))
    untrained = create_model(recipe.model, **recipe.model_args)
    untrained.preprocess = load(str(run / "export")).preprocess
    shipped, ours = resolve(SHIPPED), run / "export"
    candidates: list[tuple[str, Backbone, dict[str, Any]]] = [
        ("this run", load(str(ours)), {"model": recipe.model, "weights_sha256": file_sha256(ours / "model.safetensors")}),
        ("untrained", untrained.eval(), {"model": recipe.model}),
        ("shipped", load(SHIPPED), {"model": SHIPPED, "weights_sha256": file_sha256(shipped / "model.safetensors")}),
    ]
    say("2. measuring five subnets of each, and raw pixels")
    train = cached(Part(open_source("samples/fashion:train"), range(0, 10_000, 10_000 // BANK)))
    tests = [open_source("samples/fashion:test"), open_source("samples/fashion:moved")]
    tests = [cached(Part(test, range(0, len(test), len(test) // QUERIES))) for test in tests]
    file = out / "records.jsonl"
    file.unlink(missing_ok=True)
    embed, facts = verbs.raw_pixels_job((28, 28), channels=1)
    records = verbs.measure(embed, train, tests, PROTOCOLS, seed=seed, out=file, **facts)
    for baseline, model, own in candidates:
        for embed, facts in verbs.backbone_jobs(model, list(map(str, five_sizes(model))), baseline=baseline, **own):
            records += verbs.measure(embed, train, tests, PROTOCOLS, seed=seed, out=file, **facts)
        say(f"   {baseline}: done after {time.perf_counter() - begun:.0f} s")
    page = out / "index.html"
    curves = {"learning curves of this run": (run / "curves.png").read_bytes()}
    render(records, page, title="Okavango quickstart", pictures=curves)
    say(table(records))
    for line in verdicts(records):
        say(line)
    say(
        f"took {time.perf_counter() - begun:.0f} s on {torch.get_num_threads()} threads\n"
        f"run:     {run}\nrecords: {file}\npage:    {page.resolve()}"
    )
    return records


def five_sizes(model: Backbone) -> list[Subnet]:
    """The corners of the grid of widths and depths, and its middle."""
    assert isinstance(model, ElasticViT)
    widths, depths = model.widths, model.depths
    corners = [Subnet(width, depth) for width in (widths[0], widths[-1]) for depth in (depths[0], depths[-1])]
    return sorted({*corners, Subnet(widths[len(widths) // 2], depths[len(depths) // 2])})


def verdicts(records: list[Record]) -> list[str]:
    """For each data set and protocol, one line: who is best, and by how much over raw pixels and untrained networks."""
    lines = []
    for dataset in dict.fromkeys(record.dataset for record in records):
        for protocol in PROTOCOLS:
            here = [record for record in records if (record.dataset, record.protocol) == (dataset, protocol)]
            best = {
                name: max((r for r in here if r.baseline == name), key=lambda r: r.value)
                for name in ("shipped", "this run", "untrained", "raw pixels")
            }
            winner = max(best.values(), key=lambda r: r.value)
            values = ", ".join(f"{name} {record.value:.3f}" for name, record in best.items())
            lines.append(f"{dataset}, {protocol}: {winner.baseline} {winner.subnet} wins ({values})".replace("  ", " "))
    return lines
