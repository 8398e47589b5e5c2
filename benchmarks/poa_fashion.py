"""From a finished run of `poa_fashion` to the checkpoint that ships and its published records.

    okavango pretrain poa_fashion --out runs/poa_fashion
    python benchmarks/poa_fashion.py runs/poa_fashion

Writes the checkpoint with its card into the package, measures every subnet (trained and untrained) and raw pixels under every
protocol on both test sets into leaderboard/poa_fashion.jsonl, keeps recipe and log beside them, renders the page, and writes what
they come to into the card and the README.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sys
from pathlib import Path

import torch

from okavango import verbs
from okavango.data.loading import derive
from okavango.data.sources import cached, open_source
from okavango.models.backbone import create_model
from okavango.zoo import hub
from okavango.zoo.checkpoint import file_sha256, save_checkpoint
from okavango.zoo.leaderboard.page import render, table
from okavango.zoo.leaderboard.records import Record, environment, read_records

ROOT = Path(__file__).parent.parent
NAME = "elastic_vit_tiny.poa_fashion"
PROTOCOLS = ("knn/v1", "logistic/v1", "linear/v1")


def hours(log: list[dict], batch: int) -> float:
    """Time in steps, from the logged rates."""
    seconds, before = 0.0, -1
    for entry in log:
        if "samples_per_second" in entry:
            seconds += (entry["step"] - before) * batch / entry["samples_per_second"]
            before = entry["step"]
    return seconds / 3600


def ship(run: Path, results: dict[str, str]) -> None:
    """The exported backbone with a card that says how it was made, and what it is worth."""
    recipe = json.loads((run / "recipe.json").read_text())
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    took, settings = hours(log, recipe["run"]["batch"]), recipe["run"]
    knn = {entry["step"] + 1: entry["backbone_knn_accuracy"] for entry in log if "backbone_knn_accuracy" in entry}
    losses = {entry["step"] + 1: entry["loss"] for entry in log if "loss" in entry}
    every = settings["eval_every"] * max(1, round(settings["steps"] / 8 / settings["eval_every"]))
    steps = [step for step in losses if step % every == 0 or step == settings["steps"]]
    online = {step: f", online k-NN {value:.3f}" for step, value in knn.items()}
    rows = {f"step {step}": f"loss {losses[step]:.3f}" + online.get(step, "") for step in steps}
    versions, hardware = environment()
    newest = sorted((run / "state").glob("step-*"))[-1]
    threads = json.loads((newest / "meta.json").read_text())["environment"]["threads"]
    card = {
        "licence": "mit",
        "recipe": recipe["name"],
        "seed": settings["seed"],
        "command": f"okavango pretrain {recipe['name']} --steps {settings['steps']} --threads {threads} --out runs/poa_fashion",
        "hours": round(took, 2),
        "hardware": f"{threads} thread(s) of {hardware['cpu']}",
        "pictures seen": settings["steps"] * settings["batch"],
        "data": "samples/fashion: 10,000 training pictures of Fashion-MNIST (Zalando SE, MIT), labels unused",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "results": results,
        "log": rows,
        "records": "leaderboard/poa_fashion.jsonl in the repository; the whole log and recipe lie beside it",
        "intended use": "examples, tests and studies of elastic pretraining on small pictures; not a general-purpose encoder",
    }
    folder = ROOT / "okavango" / "zoo" / "weights" / NAME
    model = hub.load(str(run / "export"))
    save_checkpoint(model, folder, card=card)
    for name in ("recipe.json", "log.jsonl"):
        shutil.copy(run / name, ROOT / "leaderboard" / f"poa_fashion.{name}")
    shutil.copy(run / "curves.png", ROOT / "docs" / "poa_fashion_curves.png")


def measure(run: Path, out: Path) -> None:
    """Records of everything, from scratch."""
    shipped, sha256 = hub.load(str(run / "export")), file_sha256(run / "export" / "model.safetensors")
    seed = json.loads((run / "recipe.json").read_text())["run"]["seed"]
    torch.manual_seed(derive(seed, "initial weights"))
    untrained = create_model(shipped.architecture, **shipped.arguments).eval()
    untrained.preprocess = shipped.preprocess
    train = cached(open_source("samples/fashion:train"))
    tests = [cached(open_source("samples/fashion:test")), cached(open_source("samples/fashion:moved"))]
    out.unlink(missing_ok=True)
    jobs = [
        [verbs.raw_pixels_job((28, 28), channels=1)],
        verbs.backbone_jobs(shipped, "all", model=NAME, baseline="shipped", weights_sha256=sha256),
        verbs.backbone_jobs(untrained, "all", model=shipped.architecture, baseline="untrained"),
    ]
    for embed, facts in itertools.chain(*jobs):
        verbs.measure(embed, train, tests, PROTOCOLS, seed=0, out=out, **facts)
        print(f"{facts['baseline']} {facts.get('subnet', '')}: measured", flush=True)


def results(records: list[Record]) -> dict[str, str]:
    """For each test set and protocol, the accuracies of all sizes, and who wins; whose interval overlaps with that is named."""
    said = {}
    for dataset, protocol in dict.fromkeys((record.dataset, record.protocol) for record in records):
        found: dict[str, list[Record]] = {}
        for record in records:
            if (record.dataset, record.protocol) == (dataset, protocol):
                found.setdefault(record.baseline, []).append(record)
        values = {name: [record.value for record in some] for name, some in found.items()}
        ranges = {name: f"{min(v):.3f}" + (f"..{max(v):.3f}" if len(v) > 1 else "") for name, v in values.items()}
        best, *others = sorted((max(some, key=lambda r: r.value) for some in found.values()), key=lambda r: -r.value)
        near = [other.baseline for other in others if bounds(other)[1] >= bounds(best)[0]]
        wins = f"{best.baseline} best" + (f", not surely over {', '.join(near)}" if near else "")
        said[f"{dataset}, {protocol}"] = ", ".join(f"{name} {text}" for name, text in ranges.items()) + f": {wins}"
    return said


def bounds(record: Record) -> tuple[float, float]:
    """The interval, or the value alone."""
    return record.interval or (record.value, record.value)


START, END = "<!-- benchmarks/poa_fashion.py writes from here -->", "<!-- to here -->"


def block(records: list[Record]) -> str:
    """What the README says of the records."""
    rows = [[*key.split(", "), *value.rpartition(": ")[::2]] for key, value in results(records).items()]
    lines = ["| test pictures | protocol | accuracy, smallest to largest of all sizes | |", "|---|---|---|---|"]
    return "\n".join([START, *lines, *("| " + " | ".join(row) + " |" for row in rows), END])


def block_in(text: str, start: str = START) -> str:
    """That part of the README, or of another page: from a line that says who writes it to the next end."""
    begin = text.index(start)
    return text[begin : text.index(END, begin) + len(END)]


def main(run: str) -> None:
    """Ship, measure, render."""
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores", flush=True)
    out = ROOT / "leaderboard" / "poa_fashion.jsonl"
    measure(Path(run), out)
    records = read_records(out)
    ship(Path(run), results(records))
    render(records, ROOT / "leaderboard" / "poa_fashion.html", title=f"{NAME}: all subnets")
    readme = ROOT / "README.md"
    text = readme.read_text()
    readme.write_text(text.replace(block_in(text), block(records)))
    print(table(records))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
