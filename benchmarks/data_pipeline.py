"""Multi-crop augmentation per core: ours, PIL pictures through torchvision transforms as in DINOv2, and LightlyTrain's.

    python benchmarks/data_pipeline.py [--lightly PYTHON] [--repeats 5] [--out FILE.jsonl]

In memory: ours and torchvision's get decoded pictures. From files: all get 256 px JPEGs, and read, decode, crop, colour, normalise
and stack them. The same parameters for all, one thread each; in memory candidates take turns, from files one follows the other.
Rates are in pictures per second of processor time, so a busy machine disturbs them less; the load is in the records. With files,
the crops are compared as well: two-sample Kolmogorov-Smirnov distances between ours and the others', of what was cut out (on
pictures whose colours are coordinates, colour operations off) and of how it looks; they are in the settings of the others' records.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import cv2
import numpy as np
import torch
from peers import CANDIDATES, STEP, run, write_pictures
from PIL import Image
from scipy.stats import ks_2samp
from timing import interleave, load, publish, speed_record
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from okavango.data.multicrop import MultiCrop
from okavango.zoo.leaderboard.records import Record

CASES = {
    "28 px grey, 2x28 + 4x14": ((1, 28, 28), 64, MultiCrop(global_size=28, local_size=14, locals=4)),
    "256 px RGB, 2x224 + 8x96": ((3, 256, 256), 16, MultiCrop()),
}
FILES = MultiCrop(local_size=98)  # LightlyTrain's ViT has patches of 14 pixels
PLAIN: dict[str, Any] = {"jitter": (0.0,) * 5, "grayscale": 0.0, "blur": (0.0,) * 3, "solarize": 0.0}
BATCH = 16


def pictures(shape: tuple[int, int, int], count: int) -> torch.Tensor:
    """Smooth random pictures, uint8 (N, C, H, W)."""
    rough = torch.rand(count, shape[0], 16, 16, generator=torch.Generator().manual_seed(0))
    return (TF.resize(rough, list(shape[1:]), v2.InterpolationMode.BICUBIC).clamp(0, 1) * 255).to(torch.uint8)


def ours(crop: MultiCrop, images: torch.Tensor) -> Callable[[], object]:
    """Our two parts, as transform and collation run them."""

    def run():
        crops = [crop.crop(image, torch.Generator().manual_seed(i)) for i, image in enumerate(images)]
        stacked = (torch.stack([one[key] for one in crops], 1) for key in ("global", "local"))
        return crop.photometric(*stacked, torch.Generator().manual_seed(0))

    return run


def usual(crop: MultiCrop, images: list[Image.Image] | list[Path]) -> Callable[[], tuple[Tensor, Tensor]]:
    """One torchvision pipeline per crop on PIL pictures, or on files, then stacking."""

    def pipeline(size: int, scale: tuple[float, float], blur: float, solarize: float) -> v2.Compose:
        probability, *strengths = crop.jitter
        return v2.Compose(
            [
                v2.RandomResizedCrop(size, scale=scale, ratio=crop.ratio, interpolation=v2.InterpolationMode.BICUBIC),
                v2.RandomHorizontalFlip(crop.flip),
                v2.RandomApply([v2.ColorJitter(*strengths)], probability),
                v2.RandomGrayscale(crop.grayscale),
                v2.RandomApply([v2.GaussianBlur(9, crop.blur_sigma)], blur),
                v2.RandomSolarize(128, solarize),
                v2.PILToTensor(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(list(crop.mean), list(crop.std)),
            ]
        )

    first = pipeline(crop.global_size, crop.global_scale, crop.blur[0], 0.0)
    second = pipeline(crop.global_size, crop.global_scale, crop.blur[1], crop.solarize)
    local = pipeline(crop.local_size, crop.local_scale, crop.blur[2], 0.0)

    def run():
        pils = [image if isinstance(image, Image.Image) else Image.open(image).convert("RGB") for image in images]
        globals_ = torch.stack([make(picture) for make in (first, second) for picture in pils])
        return globals_, torch.stack([local(picture) for _ in range(crop.locals) for picture in pils])

    return run


def in_memory(shape: tuple[int, int, int], count: int, crop: MultiCrop, repeats: int) -> dict[str, list[float]]:
    """Seconds per picture of one of `CASES`."""
    images = pictures(shape, count)
    pils = [TF.to_pil_image(image).convert("RGB") for image in images]
    seconds = interleave({"okavango": ours(crop, images), "pil_torchvision": usual(crop, pils)}, repeats)
    return {name: [one / count for one in values] for name, values in seconds.items()}


def from_files(lightly: str | None, repeats: int, work: Path) -> tuple[dict[str, list[float]], dict[str, dict]]:
    """Seconds per picture with reading and decoding, and how far the crops lie apart."""
    write_pictures(work / "colours", BATCH * (repeats + 1))
    ramp = np.arange(256, dtype=np.uint8)
    (work / "places").mkdir()
    for number in range(BATCH * (repeats + 1)):
        coordinates = np.stack([np.tile(ramp, (256, 1)), np.tile(ramp[:, None], (1, 256)), np.full((256, 256), 128, np.uint8)], -1)
        Image.fromarray(coordinates).save(work / "places" / f"{number:03d}.jpg", quality=100, subsampling=0)
    pythons = {"okavango": sys.executable, "lightly": lightly}
    settings = {**STEP, "workers": 0, "batch": BATCH, "steps": repeats + 1, "epochs": 1, "only_data": repeats}
    settings |= {"global_size": FILES.global_size, "local_size": FILES.local_size, "locals": FILES.locals}
    settings |= {"width": 64, "depth": 1}  # no step is made, a first try of ours apart
    seconds: dict[str, list[float]] = {}
    crops: dict[tuple[str, str], list[dict[int, np.ndarray]]] = {}
    for kind, crop in (("places", replace(FILES, **PLAIN)), ("colours", FILES)):
        for name in [name for name in pythons if pythons[name]]:
            plain = {"geometry": True, "crops": PLAIN} if kind == "places" else {}
            noted = run(str(pythons[name]), CANDIDATES[name], {**settings, **plain, "data": str(work / kind)}, work)
            crops[kind, name] = [{int(side): values.astype(np.float32) for side, values in noted["crops"].items()}]
            if kind == "colours":
                seconds[name] = [one / BATCH for one in noted["data_seconds"]]
        took, crops[kind, "pil_torchvision"] = by_torchvision(crop, sorted((work / kind).glob("*.jpg")), repeats)
        if kind == "colours":
            seconds["pil_torchvision"] = [one / BATCH for one in took]
    return seconds, distances(crops)


def by_torchvision(crop: MultiCrop, files: list[Path], repeats: int) -> tuple[list[float], list[dict[int, np.ndarray]]]:
    """Seconds of each batch of files but the first, and the crops of all batches."""
    batches = iter([usual(crop, files[start : start + BATCH]) for start in range(0, len(files), BATCH)])
    made: list[dict[int, np.ndarray]] = []

    def one() -> None:
        made.append({part.shape[-1]: part.numpy() for part in next(batches)()})

    return interleave({"pil_torchvision": one}, repeats)["pil_torchvision"], made


def distances(crops: dict[tuple[str, str], list[dict[int, np.ndarray]]]) -> dict:
    """Kolmogorov-Smirnov distance and p-value of every statistic, ours against each other candidate's."""
    found: dict[str, dict] = {}
    for kind, name in crops:
        if name == "okavango":
            continue
        for side in (FILES.global_size, FILES.local_size):
            a, b = (statistics(np.concatenate([one[side] for one in crops[kind, who]]), kind) for who in ("okavango", name))
            for what in a:
                test = ks_2samp(a[what], b[what])
                label = f"{what}, {side} px, {len(a[what])} and {len(b[what])} crops"
                found.setdefault(name, {})[label] = {"distance": round(test.statistic, 3), "p": round(test.pvalue, 4)}
    return found


def statistics(crops: np.ndarray, kind: str) -> dict[str, np.ndarray]:
    """Per crop (N, 3, S, S), normalised: where it was cut out ("places"), or how it looks ("colours")."""
    shape = (1, 3, 1, 1)
    values = crops * np.reshape(FILES.std, shape).astype(np.float32) + np.reshape(FILES.mean, shape).astype(np.float32)
    if kind == "places":
        side = values.shape[-1]
        x, y = values[:, 0].mean(1), values[:, 1].mean(2)  # red is the column, green the row
        width, height = ((line[:, -2] - line[:, 1]) * side / (side - 3) for line in (x, y))
        return {
            "area": np.abs(width * height),
            "aspect": np.abs(width / height),
            "left": np.minimum(x[:, 0], x[:, -1]),
            "top": y[:, 0],
            "flipped": (width < 0).astype(np.float32),
        }
    luma = 0.299 * values[:, 0] + 0.587 * values[:, 1] + 0.114 * values[:, 2]
    chroma = values.max(1) - values.min(1)
    colourful = chroma.mean((1, 2))
    # what a grey crop has of colour is rounding, which differs from program to program
    colourful = np.where(colourful < 0.01, 0, colourful)
    angle = np.arctan2(3**0.5 * (values[:, 1] - values[:, 2]), 2 * values[:, 0] - values[:, 1] - values[:, 2])
    return {
        "brightness": luma.mean((1, 2)),
        "contrast": luma.std((1, 2)),
        "saturation": colourful,
        "hue": np.where(colourful > 0.02, np.arctan2(np.sin(angle).mean((1, 2)), np.cos(angle).mean((1, 2))), 0),
        "grey": (colourful == 0).astype(np.float32),
        "detail": np.abs(np.diff(luma, 2, axis=2)).mean((1, 2)) / luma.std((1, 2)).clip(1e-3),
    }


def records_of(
    case: str,
    seconds: dict[str, list[float]],
    crop: MultiCrop,
    pictures: int,
    loads: tuple[float, float],
    distances: dict[str, dict] | None = None,
) -> list[Record]:
    """Pictures per second of every candidate; `seconds` is per picture, `pictures` are those of one repeat."""
    rates = {name: 1 / median(values) for name, values in seconds.items()}
    return [
        speed_record(
            "multi-crop",
            "pictures per second of processor",
            round(rate, 1),
            protocol="data_pipeline/v1",
            dataset=case,
            n=pictures * len(seconds[name]),
            loads=loads,
            times=seconds,
            settings={
                "crops": asdict(crop),
                "opencv": cv2.__version__,
                **({"distances": distances[name]} if distances and name in distances else {}),
            },
            baseline=name,
            label=name,
            notes="" if name == "okavango" else f"ours is {rates['okavango'] / rate:.2f} times as fast",
        )
        for name, rate in rates.items()
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lightly", metavar="PYTHON", help="interpreter of LightlyTrain's environment")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="a file *.jsonl for the records; a page is drawn beside it")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    records = []
    for case, (shape, count, crop) in CASES.items():
        before = load()
        seconds = in_memory(shape, count, crop, given.repeats)
        records += records_of(case, seconds, crop, count, (before, load()))
    with tempfile.TemporaryDirectory(prefix="data-pipeline-") as work:
        before = load()
        seconds, apart = from_files(given.lightly, given.repeats, Path(work))
        records += records_of("256 px JPEG files, 2x224 + 8x98", seconds, FILES, BATCH, (before, load()), apart)
    publish(records, given.out, "Multi-crop augmentation per core")


if __name__ == "__main__":
    main()
