"""GeoTIFF patches -> input of a network, by one of several libraries; imports only the one that is asked for.

    python run_patches.py SETTINGS_AS_JSON

Settings: `library`, `files`, `batch`, `repeats`, `threads`; `notes`, a JSON to write, the seconds of processor time of every pass;
`first`, a .npy to write, the first batch. Each pass reads all files, which the operating system keeps in memory.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

BANDS = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B10", "B11", "B12")


def okavango(files: list[str]) -> Callable[[list[str]], Tensor]:
    """Ours: files that are alike, and the contract of the checkpoint."""
    from okavango.data.geotiff import Alike
    from okavango.models.preprocess import Preprocess, Raster, Resize

    spec = Raster(
        channels=BANDS,
        sensor="sentinel-2",
        level="L1C",
        units="reflectance",
        scale=(1e-4,),
        size=(224, 224),
        resize=Resize(rule="exact", interpolation="bilinear", crop_ratio=0.875),
    )
    preprocess = Preprocess(image=spec)
    read = Alike(Path(files[0]), channels=BANDS, sensor="sentinel-2", level="L1C", units="dn", baseline="02.08")
    return lambda paths: preprocess(image=[read(Path(path)) for path in paths])["image"]


def _loaded(path: str) -> Tensor:
    """As torchgeo's data sets read a file."""
    import rasterio

    with rasterio.open(path) as file:
        return torch.from_numpy(file.read().astype(np.int32)).float()


def torchgeo(files: list[str]) -> Callable[[list[str]], Tensor]:
    """The transforms that torchgeo ships with its SSL4EO-S12 weights, on a batch."""
    del files
    from torchgeo.models import ResNet50_Weights

    transforms = ResNet50_Weights.SENTINEL2_ALL_MOCO.transforms
    return lambda paths: transforms(torch.stack([_loaded(path) for path in paths]))


def torchgeo_each(files: list[str]) -> Callable[[list[str]], Tensor]:
    """The same, sample by sample, as a data set applies them."""
    del files
    from torchgeo.models import ResNet50_Weights

    transforms = ResNet50_Weights.SENTINEL2_ALL_MOCO.transforms
    return lambda paths: torch.stack([transforms(_loaded(path)) for path in paths])


def _torchvision() -> Callable[[Tensor], Tensor]:
    from torchvision.transforms import v2

    return v2.Compose([v2.Resize((256, 256)), v2.CenterCrop(224), v2.Normalize(mean=[0.0] * 13, std=[10_000.0] * 13)])


def torchvision(files: list[str]) -> Callable[[list[str]], Tensor]:
    """Plain transforms of torchvision v2, on a batch."""
    del files
    transforms = _torchvision()
    return lambda paths: transforms(torch.stack([_loaded(path) for path in paths]))


def torchvision_each(files: list[str]) -> Callable[[list[str]], Tensor]:
    """The same, sample by sample."""
    del files
    transforms = _torchvision()
    return lambda paths: torch.stack([transforms(_loaded(path)) for path in paths])


def main() -> None:
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(settings["threads"])
    files, batch = settings["files"], settings["batch"]
    prepare = globals()[settings["library"]](files)
    batches = [files[start : start + batch] for start in range(0, len(files), batch)]
    np.save(settings["first"], prepare(batches[0]).numpy())
    seconds = []
    for _ in range(settings["repeats"]):
        start = time.process_time()
        for paths in batches:
            prepare(paths)
        seconds.append(time.process_time() - start)
    Path(settings["notes"]).write_text(json.dumps({"seconds": seconds, "torch": torch.__version__}))


if __name__ == "__main__":
    main()
