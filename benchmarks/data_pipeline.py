"""Multi-crop augmentation per core: ours against the usual one, PIL pictures through torchvision transforms as in DINOv2.

    python benchmarks/data_pipeline.py [--repeats 5] [--out FILE.json]

Both get decoded pictures and do the same at the same parameters; candidates take turns, the median of the repeats counts. One
thread each. Rates are in pictures per second of processor time, so a busy machine disturbs them less; the load is in the output.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
import torchvision
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from okavango.data.multicrop import MultiCrop

CASES = {
    "28 px grey, 2x28 + 4x14": ((1, 28, 28), 64, MultiCrop(global_size=28, local_size=14, locals=4)),
    "256 px RGB, 2x224 + 8x96": ((3, 256, 256), 16, MultiCrop()),
}


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


def usual(crop: MultiCrop, images: torch.Tensor) -> Callable[[], object]:
    """One torchvision pipeline per crop on PIL pictures, then stacking."""
    pils = [TF.to_pil_image(image).convert("RGB") for image in images]

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
        globals_ = torch.stack([make(picture) for make in (first, second) for picture in pils])
        return globals_, torch.stack([local(picture) for _ in range(crop.locals) for picture in pils])

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    result: dict = {
        "benchmark": "data_pipeline",
        "unit": "pictures per second of processor time, one thread",
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__},
        "processors": os.cpu_count(),
        "load_before": os.getloadavg(),
        "repeats": given.repeats,
        "cases": {},
    }
    for name, (shape, count, crop) in CASES.items():
        images = pictures(shape, count)
        candidates = {"okavango": ours(crop, images), "pil_torchvision": usual(crop, images)}
        rates: dict[str, list[float]] = {candidate: [] for candidate in candidates}
        for repeat in range(given.repeats + 1):
            for candidate, run in candidates.items():
                start = time.process_time()
                run()
                if repeat:  # the first round warms up
                    rates[candidate].append(count / (time.process_time() - start))
        medians = {candidate: round(statistics.median(values), 1) for candidate, values in rates.items()}
        result["cases"][name] = {
            "settings": asdict(crop),
            "median": medians,
            "all": {candidate: [round(value, 1) for value in values] for candidate, values in rates.items()},
            "ratio": round(medians["okavango"] / medians["pil_torchvision"], 2),
        }
    result["load_after"] = os.getloadavg()
    text = json.dumps(result, indent=2)
    print(text)
    if given.out:
        given.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
