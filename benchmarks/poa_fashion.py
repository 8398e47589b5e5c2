"""From a finished run of `poa_fashion` to the checkpoint that ships and its published records.

    okavango pretrain poa_fashion --out runs/poa_fashion
    python benchmarks/poa_fashion.py runs/poa_fashion

Writes the checkpoint with its card into the package, measures five subnets (trained and untrained) and raw pixels under every
protocol on both test sets into leaderboard/poa_fashion.jsonl, keeps recipe and log beside them, renders the page.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import torch

from okavango import verbs
from okavango.data.loading import derive
from okavango.data.sources import open_source
from okavango.downstream.classification.features import extract_features, raw_pixels
from okavango.models.backbone import create_model
from okavango.recipes.quickstart import five_sizes
from okavango.zoo import hub
from okavango.zoo.checkpoint import file_sha256, save_checkpoint
from okavango.zoo.leaderboard.page import render, table
from okavango.zoo.leaderboard.records import environment, read_records, write_record

ROOT = Path(__file__).parent.parent
NAME = "elastic_vit_tiny.poa_fashion"
PROTOCOLS = ("knn/v1", "logistic/v1")


def hours(log: list[dict], batch: int) -> float:
    """Time in steps, from the logged rates."""
    seconds, before = 0.0, -1
    for entry in log:
        if "samples_per_second" in entry:
            seconds += (entry["step"] - before) * batch / entry["samples_per_second"]
            before = entry["step"]
    return seconds / 3600


def ship(run: Path) -> Path:
    """The exported backbone with a card that says how it was made."""
    recipe = json.loads((run / "recipe.json").read_text())
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    took, settings = hours(log, recipe["run"]["batch"]), recipe["run"]
    knn = {entry["step"] + 1: entry["backbone_knn_accuracy"] for entry in log if "backbone_knn_accuracy" in entry}
    losses = {entry["step"] + 1: entry["loss"] for entry in log if "loss" in entry}
    steps = [step for step in losses if step % (settings["steps"] // 8) == 0 or step == settings["steps"]]
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
    return folder


def measure(folder: Path, out: Path) -> None:
    """Records of everything, from scratch."""
    shipped, sha256 = hub.load(str(folder)), file_sha256(folder / "model.safetensors")
    seed = json.loads((ROOT / "leaderboard" / "poa_fashion.recipe.json").read_text())["run"]["seed"]
    torch.manual_seed(derive(seed, "initial weights"))
    untrained = create_model(shipped.architecture, **shipped.arguments).eval()
    untrained.preprocess = shipped.preprocess
    train = open_source("samples/fashion:train")
    tests = [open_source("samples/fashion:test"), open_source("samples/fashion:moved")]
    out.unlink(missing_ok=True)

    def rows(embed, **facts) -> None:
        bank = embed(train)
        for test in tests:
            queries = embed(test)
            for protocol in PROTOCOLS:
                hashes = {"train_manifest_sha256": train.digest, "test_manifest_sha256": test.digest}
                write_record(out, verbs.measured(bank, queries, protocol, seed=0, dataset=test.name, **hashes, **facts))

    rows(lambda source: raw_pixels(source, 28, channels=1), model="raw-pixels", baseline="raw pixels")
    for baseline, model, digest in (("shipped", shipped, sha256), ("untrained", untrained, "")):
        for subnet in five_sizes(model):
            sized = model.extract(subnet)
            rows(
                lambda source, sized=sized: extract_features(sized, source),
                model=NAME if digest else shipped.architecture,
                subnet=str(subnet),
                baseline=baseline,
                weights_sha256=digest,
                parameters=sum(p.numel() for p in sized.parameters()),
                latency_ms=verbs.latency(sized),
            )
            print(f"{baseline} {subnet}: measured", flush=True)


def main(run: str) -> None:
    """Ship, measure, render."""
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores", flush=True)
    out = ROOT / "leaderboard" / "poa_fashion.jsonl"
    measure(ship(Path(run)), out)
    records = read_records(out)
    render(records, ROOT / "leaderboard" / "poa_fashion.html", title=f"{NAME}: five subnets")
    print(table(records))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
